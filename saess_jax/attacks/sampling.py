"""Other decoding parameters: where greedy decoding refuses, some draw may not (Huang et al. 2023, MaliciousInstruct).

The paper's sweep: temperature 0.05 to 1 in steps of 0.05, top-k of nine sizes at temperature 1, top-p 0.05 to 1 in
steps of 0.05 at temperature 1: 49 attempts, of which one has to succeed. `sampling_N` is N of them, evenly over that
list. Temperature 1 and top-p 1 are the same setting, drawn from twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from saess_jax.attacks.base import Attack, Attempt, Target
from saess_jax.sampling import SamplingConfig

TEMPERATURES = tuple(round(0.05 * i, 2) for i in range(1, 21))
TOP_KS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
TOP_PS = TEMPERATURES


class Sampling(Attack):
  """49 attempts, or `count`, each with a sampling of its own."""

  def __init__(self, count: int | None = None):
    """Raises ValueError for a count below 3 or above 49."""
    every = [
        *(SamplingConfig(temperature=t) for t in TEMPERATURES), *(SamplingConfig(1.0, top_k=k) for k in TOP_KS),
        *(SamplingConfig(1.0, top_p=p) for p in TOP_PS)]
    if count is not None and not 3 <= count <= len(every):
      raise ValueError(f"attack is sampling_{count}; expected 3 to {len(every)} attempts.")
    share = len(every) if count is None else count
    self.ways = [every[round(i * (len(every) - 1) / (share - 1))] for i in range(share)]
    self.name = "sampling" if count is None else f"sampling_{count}"

  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    del target
    return [[Attempt(behavior, sampling=way, variant=_words(way)) for way in self.ways] for behavior in behaviors]


def _words(way: SamplingConfig) -> str:
  if way.top_k:
    return f"top-k {way.top_k}"
  return f"top-p {way.top_p}" if way.temperature == 1 and way.top_p < 1 else f"temperature {way.temperature}"
