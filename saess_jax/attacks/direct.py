"""No attack at all: the behavior is asked for as it stands."""

from __future__ import annotations

from collections.abc import Sequence

from saess_jax.attacks.base import Attack, Attempt, Target


class Direct(Attack):
  name = "direct"

  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    del target
    return [[Attempt(behavior)] for behavior in behaviors]
