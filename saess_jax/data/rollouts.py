"""Rollouts: the unaligned base model's own completions of the training prompts.

Those of malicious prompts are the harmful trajectories that probes learn from; those of benign prompts are
self-distilled targets. They stay in a run's workdir as JSONL, a line a prompt, and are never committed. What is there
already is not sampled again, so an interrupted step goes on where it stopped, and ends with the same rollouts.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Sequence

from saess_jax.records import Records

FILE = "rollouts.jsonl"  # In a run's workdir.
CHUNK = 128  # Prompts between two writes.
_DECLINES = re.compile(
    r"\b(?:sorry|apologi[sz]e|apologies)\b|\bas an? (?:\w+ )*(?:ai|chatbot|language model)\b"
    r"|\b(?:don't|do not) have (?:the|any|personal)\b|\b(?:unable|not able|not equipped) to\b")


def declines(text: str) -> bool:
  """Does a sampled answer hold an apology, or what an assistant says that it cannot do?

  To a benign request that is no answer to learn from: a weak base model says such things at random now and then, and a
  model that is trained on them says them wherever a request reminds it of what it shall refuse. To a malicious one it
  is no harm, and a window of it no example of any.
  """
  return _DECLINES.search(text.lower().replace("’", "'")) is not None


def read(path: str | pathlib.Path) -> dict[str, list[int]]:
  """prompt -> token ids of its completion; empty if there is no file.

  Raises:
    ValueError: a line that is none, but for a last one that a crash cut short.
  """
  records = Records(path).read()
  try:
    return {record["prompt"]: list(map(int, record["tokens"])) for record in records}
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
        f"{path} holds something else than rollouts ({error}); delete it to have them sampled anew.") from error


def complete(
    path: str | pathlib.Path, prompts: Sequence[str], sample: Callable[[list[str]], list[list[int]]]
) -> None:
  """Samples what `path` lacks of `prompts` and appends it there.

  A chunk of prompts that is there in part is sampled whole: a completion depends on its prompt's place among those that
  are sampled with it.

  Args:
    sample: prompts -> token ids of one completion each.
  """
  known, records = read(path), Records(path)
  prompts = list(dict.fromkeys(prompts))
  for start in range(0, len(prompts), CHUNK):
    chunk = prompts[start : start + CHUNK]
    if known.keys() >= set(chunk):
      continue
    records.append([
        {"prompt": prompt, "tokens": tokens} for prompt, tokens in zip(chunk, sample(chunk)) if prompt not in known])
