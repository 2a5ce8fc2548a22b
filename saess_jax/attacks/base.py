"""What an attack is: it turns behaviors into attempts, and says what they cost."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saess_jax.config import SafetyConfig
from saess_jax.data.chat import Messages
from saess_jax.model import Llama, Params
from saess_jax.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Attempt:
  """What is sent to a model in the place of one behavior.

  Attributes:
    prompt: the user's turn, or a chat that ends with one.
    prefix: what the response is made to begin with; "" nothing.
    sampling: how the response is drawn, where the attacker chooses it; greedy by default.
    variant: which of an attack's several attempts at a behavior this is, in words; "" where there is one.
    soft_suffix: free embeddings [R, D] in the place of the prompt's last R tokens ("soft prompt"); none if empty.
    target: what a white-box attack wanted the response to begin with.
    queries, tokens: the attack's budget for this attempt: calls of a model (of any kind: a gradient is one) and the
      tokens that it generated.
  """

  prompt: Messages
  prefix: str = ""
  sampling: SamplingConfig = SamplingConfig()
  variant: str = ""
  soft_suffix: Sequence[Sequence[float]] = ()
  target: str = ""
  queries: int = 0
  tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model laid open: what `decode` and gradients need. `safety` is None where nothing intervenes (the base model).

  The last two say how the run asks: its system prompt, and where [CLS] is stored.
  """

  model: Llama
  params: Params
  tokenizer: Any
  safety: SafetyConfig | None
  system_prompt: str = ""
  header_sees_cls: bool = True


@dataclasses.dataclass(frozen=True)
class Target:
  """What an attacker may use.

  Attributes:
    victim: the model to be attacked, "base", "plain" or "saess"; what an attack that is not adaptive does must not
      depend on it.
    tokenizer: of all of them.
    query: (model, prompts, max_new_tokens) -> a `generate.Response` for each, decoded greedily, with its defence if it
      has one.
    weights: model -> all of it, for white-box attacks.
    context: tokens that a prompt and its response may have together, in each of the models.
    seed: for whatever an attack draws.
    safety: what "saess" decodes by.
    max_new_tokens: of a response.
    system_prompt: what stands before every prompt.
    target_strings: behavior -> what an obliging answer to it begins with, where its file says so.
  """

  victim: str
  tokenizer: Any
  query: Callable[[str, Sequence[Messages], int], list[Any]]
  weights: Callable[[str], Weights]
  context: int
  seed: int = 0
  safety: SafetyConfig = SafetyConfig()
  max_new_tokens: int = 0
  system_prompt: str = ""
  target_strings: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Attack(abc.ABC):
  """A way to attack, with its settings.

  Attributes:
    name: as `make_attack` takes it, which is what stands in the `method` column of all results; tells the settings.
    adaptive: it looks at the victim, so that each model gets attempts of its own; else all get the same (transfer).
    at_a_time: behaviors for which it is asked at once; what is made in one go is lost if the run is killed in it.
    asks_cls: it asks [CLS] of "saess", whoever the victim is.
    asks_base: it is made on "base", whoever the victim is.
    content: a digest of the file that it was read from, so that an evaluation is not resumed with another; "" none.
  """

  name: str
  adaptive: bool = False
  at_a_time: int = 64
  asks_cls: bool = False
  asks_base: bool = False
  content: str = ""

  @abc.abstractmethod
  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    """The attempts at each behavior, in order, at least one; the attack succeeds if any of them does.

    The same for the same behavior and seed, whatever the other behaviors are: a run that was interrupted goes on.
    """
