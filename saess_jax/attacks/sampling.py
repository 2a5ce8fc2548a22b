"""Other decoding parameters: where greedy decoding refuses, some draw may not (Huang et al. 2023, MaliciousInstruct).

The paper's sweep: temperature 0.05 to 1 in steps of 0.05, top-k of nine sizes, top-p 0.05 to 1 in steps of 0.05: 49
attempts, of which one has to succeed. Temperature is 1 where top-k or top-p vary (our choice), so temperature 1 and
top-p 1 are the same setting, drawn from twice. `sampling_N` is N of them: the three families take turns until one is
used up, and each is spread evenly.
"""

from __future__ import annotations

from collections.abc import Sequence

from saess_jax.attacks.base import Attack, Attempt, Target
from saess_jax.sampling import SamplingConfig

STEPS = tuple(round(0.05 * i, 2) for i in range(1, 21))
TOP_KS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
FAMILIES = (  # (in words, sampling) of each member.
    tuple((f"temperature {t}", SamplingConfig(temperature=t)) for t in STEPS),
    tuple((f"top-k {k}", SamplingConfig(temperature=1.0, top_k=k)) for k in TOP_KS),
    tuple((f"top-p {p}", SamplingConfig(temperature=1.0, top_p=p)) for p in STEPS),
)


class Sampling(Attack):
  """49 attempts, or `count`, each with a sampling of its own: a query each, for who sweeps has to read every answer."""

  def __init__(self, count: int | None = None):
    """Raises ValueError for a count above 49."""
    most = sum(map(len, FAMILIES))
    if count is not None and count > most:
      raise ValueError(f"attack is sampling_{count}; expected 1 to {most} attempts.")
    shares = _shares(most if count is None else count)
    self.ways = [family[int((i + 0.5) * len(family) / share)]
                 for family, share in zip(FAMILIES, shares) for i in range(share)]
    self.name = "sampling" if count is None else f"sampling_{count}"

  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    del target
    return [
        [Attempt(behavior, sampling=way, variant=words, queries=1) for words, way in self.ways]
        for behavior in behaviors]


def _shares(count: int) -> list[int]:
  """How many attempts each family gets of `count`."""
  shares = [0] * len(FAMILIES)
  while sum(shares) < count:
    for i, family in enumerate(FAMILIES):
      shares[i] += shares[i] < len(family) and sum(shares) < count
  return shares
