"""When [CLS] is re-evaluated while a response is generated: a bool per response token, as data.

The tokens are those behind a caller's prefix, which is judged whole or not at all (`SafetyConfig.sweep_prefill`): an
attacker who writes it cannot use the checks up. While an alarm is open (Rule 3) every token is checked. `policy.py`
sees to both, whatever the schedule says.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("each", "first", "periodic(N)", "annealing")


def as_array(schedule: str | jax.Array | np.ndarray, steps: int) -> jax.Array | np.ndarray:
  """The schedule as bool [steps]: is [CLS] re-evaluated after the token of that index, behind a caller's prefix?

  Args:
    schedule: "each"; "first": none, the initial verdict is all; "periodic(N)", or "periodic" for N = 10; "annealing";
      or a bool array of at least `steps`, which is cut.
    steps: response tokens.

  Raises:
    ValueError: an unknown name, or an array that is not one-dimensional and bool, or too short.
  """
  if not isinstance(schedule, str):
    if schedule.dtype != bool or schedule.ndim != 1:
      raise ValueError(f"schedule has dtype {schedule.dtype} and shape {schedule.shape}; expected bool [steps].")
    if len(schedule) < steps:
      raise ValueError(
          f"schedule has {len(schedule)} entries; expected one for each of {steps} response tokens (more are cut).")
    return schedule[:steps]
  if schedule == "each":
    return np.ones(steps, bool)
  if schedule == "first":
    return np.zeros(steps, bool)
  if schedule == "annealing":
    return annealing(steps)
  period = re.fullmatch(r"periodic(?:\(([1-9]\d*)\))?", schedule)
  if period is None:
    raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(NAMES)}, or a bool array.")
  return (np.arange(1, steps + 1) % int(period[1] or 10)) == 0


def over(schedule: str | jax.Array | np.ndarray, steps: int) -> jax.Array | np.ndarray:
  """`as_array`, of an array of any length: behind its end [CLS] is not re-evaluated.

  Raises:
    ValueError: as there, but for an array that is too short.
  """
  known = steps if isinstance(schedule, str) or not schedule.ndim else min(len(schedule), steps)
  array = as_array(schedule, known)
  return (np if isinstance(array, np.ndarray) else jnp).pad(array, (0, steps - known))


def annealing(steps: int, dense: int = 16, last: int = 256) -> np.ndarray:
  """Bool [steps]: every token at first, then ever fewer, then none.

  The paper asks for just that and gives no numbers. Ours: the first `dense` tokens, then gaps of 2, 4, 8, ..., and
  nothing from index `last` on.
  """
  array = np.arange(steps) < min(dense, last)
  index, gap = dense + 1, 2
  while index < min(steps, last):
    array[index] = True
    index, gap = index + 2 * gap, 2 * gap
  return array
