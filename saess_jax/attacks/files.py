"""Attacks that somebody else has made: JailbreakBench artifacts, or any CSV or JSONL of behaviors and prompts.

  JSON         JailbreakBench's schema (Chao et al. 2024): {"parameters": ..., "jailbreaks": [{"index", "goal",
               "behavior", "prompt", ...}, ...]}; "goal" is the request, "behavior" only its title
  CSV, JSONL   columns goal (or behavior, forbidden_prompt) and prompt; prefix (or target_prefix), queries and technique
               if there are some; names of columns in any case. In JSONL a prompt may be a chat that ends with the
               user's turn: [{"role", "content"}, ...]
  PAP          the same with bad_request, ss_prompt and ss_technique (Zeng et al. 2024; the names from memory)

Several rows of a behavior are several attempts. A prompt that is null, or empty in a CSV, is a behavior for which that
attack found nothing; it is asked as it stands. The same file is a suite too, of what its prompts ask for.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from saess_jax.attacks.base import Attack, Attempt, Target
from saess_jax.data import chat, sources

READERS = {".json": sources.read_artifact, ".csv": sources.read_csv, ".jsonl": sources.read_jsonl}
PREFIX = ("prefix", "target_prefix")
QUERIES = ("queries", "number_of_queries", "queries_to_jailbreak")
TECHNIQUE = ("technique", "ss_technique")


class File(Attack):
  """The attempts of a file, matched to behaviors by their text, white space at the ends and case aside."""

  def __init__(self, path: str):
    """Raises FileNotFoundError, or ValueError for another ending, a malformed file or one without the columns."""
    file = pathlib.Path(path).expanduser()
    self.name, self._found = f"file:{path}", _read(file)
    self.content = hashlib.sha256(file.read_bytes()).hexdigest()

  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    """Raises ValueError for behaviors that are not in the file."""
    del target
    missing = [behavior for behavior in behaviors if sources.request_key(behavior) not in self._found]
    if missing:
      raise ValueError(
          f"{self.name} has nothing for {len(missing)} of {len(behaviors)} behaviors, such as "
          f"{', '.join(repr(behavior[:80]) for behavior in missing[:3])}; it has {len(self._found)} behaviors. "
          f"Evaluate those that it was made for (--config.suites=malicious:{self.name.removeprefix('file:')}).")
    return [self._found[sources.request_key(behavior)] or [Attempt(behavior, variant="none found")]
            for behavior in behaviors]


def _read(path: pathlib.Path) -> dict[str, list[Attempt]]:
  """The attempts at each behavior by its key; none where the file says that nothing was found."""
  found: dict[str, list[Attempt]] = {}
  for number, record in sources.read_records(path, READERS):
    place = f"{path.name}{', jailbreak ' if path.suffix.lower() == '.json' else ':'}{number}"
    record = sources.fields_of(record)
    behavior, prompt = sources.request_of(record), _first(record, sources.ATTACK_COLUMNS)
    if not isinstance(behavior, str) or not any(column in record for column in sources.ATTACK_COLUMNS):
      raise ValueError(f"{place} has {', '.join(record) or 'nothing'}; expected one of "
                       f"{', '.join(sources.REQUEST_COLUMNS)}, and one of {', '.join(sources.ATTACK_COLUMNS)}.")
    prefix, queries = _first(record, PREFIX) or "", _first(record, QUERIES) or 0
    technique = _first(record, TECHNIQUE) or ""
    for name, text in (("prefix", prefix), ("technique", technique)):
      if not isinstance(text, str):
        raise ValueError(f"{place} has a {name} of type {type(text).__name__}; expected text.")
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
      try:
        chat.check_messages(prompt)
      except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    elif not isinstance(prompt or "", str):
      raise ValueError(
          f"{place} has a prompt of type {type(prompt).__name__}; expected text, or turns of a chat, each with role "
          "and content.")
    turns = [turn["content"] for turn in prompt] if isinstance(prompt, list) else [prompt or ""]
    for text in (*turns, prefix, technique):
      sources.check_unicode(text, f"{place}: prompt, prefix or technique")
    if not re.fullmatch(r"\d+(\.0)?", str(queries)):  # A table with gaps in it holds its whole numbers as 7.0.
      raise ValueError(f"{place} has queries {queries!r}; expected a number of 0 or more.")
    attempts = found.setdefault(sources.request_key(behavior), [])
    if prompt and (isinstance(prompt, list) or prompt.strip()):
      variant = technique or (f"attempt {len(attempts) + 1}" if attempts else "")
      attempts.append(Attempt(prompt, prefix, variant=variant, queries=int(float(queries))))
  return found


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
  """The first of these columns that is there and not empty."""
  return next((record[name] for name in names if record.get(name)), None)
