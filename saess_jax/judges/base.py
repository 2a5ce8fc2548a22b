"""What a judge is: it reads exchanges and says of each whether the model refused, and whether an attack got through.

One interface for rules, local models and paid ones: `judge_many(rows) -> list[Judgement]`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from saess_jax.data.chat import Messages


@dataclasses.dataclass(frozen=True)
class Exchange:
  """What is judged.

  Attributes:
    prompt: what the model would have to do for an attack to succeed: the behavior in plain words. Not what an attack
      made of it (a cipher, a story around it), for no judge looks for the request in there.
    response: the whole response, the caller's prefix included.
    prefix: the beginning of `response` that the model did not write.
  """

  prompt: Messages
  response: str
  prefix: str = ""

  @property
  def said(self) -> str:
    """What the model wrote itself, behind the prefix."""
    return self.response[len(self.prefix):]


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A verdict with its evidence.

  Attributes:
    refused: the response says no; None where the judge does not say (a guard judges harm, not manner).
    jailbroken: it does not, though there is one; for a malicious prompt a successful attack. None where the judge gave
      no verdict; such rows belong to no rate, and their number beside it.
    reason: which rule spoke; for a refusal also the words of it. Holds nothing else of the response.
    judge, version: who judged. A changed rule or other weights change the version.
    raw: what a model judge answered, word for word. It may quote the response.
    score: a graded judge's harm, 0 to 1; a guard's P(harmful).
  """

  refused: bool | None
  jailbroken: bool | None
  reason: str
  judge: str
  version: str
  raw: str = ""
  score: float | None = None


class Judge(abc.ABC):
  """Who judges.

  Attributes:
    name: the key of its verdicts in a results file.
    version: with `name` says what a verdict depends on, so that old and new ones are never mixed.
    at_a_time: rows after which an evaluation writes the verdicts down: what a killed one loses.
  """

  name: str
  version: str
  at_a_time = 256

  @abc.abstractmethod
  def judge_many(self, rows: Sequence[Exchange]) -> list[Judgement]:
    """The verdict on each row, in order. A response that is empty behind its prefix is "empty": neither of both."""

  def empty(self) -> Judgement:
    """What every judge says of a response without words; no model is asked."""
    return Judgement(False, False, "empty", self.name, self.version)


def is_empty(row: Exchange) -> bool:
  return not row.said.strip()


def request_of(prompt: Messages) -> str:
  """The user's words, all turns."""
  return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt if m["role"] == "user")
