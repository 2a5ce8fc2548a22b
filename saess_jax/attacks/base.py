"""What an attack is: it turns behaviors into attempts, and says what that cost."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Attempt:
  """What is sent to a model in the place of one behavior.

  Attributes:
    prompt: the user's turn.
    prefix: what the response is made to begin with; "" nothing.
    queries, tokens: the attack's budget for this behavior: base-model calls and the tokens they generated.
  """

  prompt: str
  prefix: str = ""
  queries: int = 0
  tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Target:
  """What an attacker may use. The defended model is not part of it: these attacks are transferred to it.

  Attributes:
    tokenizer: of the models.
    query_base: (prompts, max_new_tokens) -> a `generate.Response` for each, from the unprotected base model.
    seed: for whatever an attack draws.
  """

  tokenizer: Any
  query_base: Callable[[Sequence[str], int], list[Any]]
  seed: int = 0


class Attack(abc.ABC):
  """`name` stands in the `method` column of all results and must tell its settings."""

  name: str

  @abc.abstractmethod
  def attempts(self, behaviors: Sequence[str], target: Target) -> list[Attempt]:
    """One attempt a behavior, in order; the same for the same behaviors and seed."""
