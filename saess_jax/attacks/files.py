"""Attacks that somebody else has made: JailbreakBench artifacts, or any CSV or JSONL of behaviors and prompts.

  JSON         JailbreakBench's schema: {"jailbreaks": [{"goal", "prompt", "queries_to_jailbreak", ...}, ...]}; a prompt
               that is null is a behavior for which that attack found nothing, which is then asked as it stands
  CSV, JSONL   columns behavior (or goal) and prompt; prefix (or target_prefix) and queries if there are some. Several
               rows of a behavior are several attempts
"""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from saess_jax.attacks.base import Attack, Attempt, Target

BEHAVIOR = ("behavior", "goal")
PREFIX = ("prefix", "target_prefix")


class File(Attack):
  """The attempts of a file, matched to behaviors by their text, white space at the ends and case aside."""

  def __init__(self, path: str):
    """Raises FileNotFoundError, or ValueError for another ending or a file without the columns."""
    self.name, self._found = f"file:{path}", _read(pathlib.Path(path).expanduser())

  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    """Raises ValueError for behaviors that are not in the file."""
    del target
    missing = [behavior for behavior in behaviors if _key(behavior) not in self._found]
    if missing:
      raise ValueError(
          f"{self.name} has nothing for {len(missing)} of {len(behaviors)} behaviors, such as {missing[0]!r}; it has "
          f"{len(self._found)} others. Evaluate the behaviors that it was made for (--config.suites=malicious:PATH).")
    return [self._found[_key(behavior)] or [Attempt(behavior, variant="none found")] for behavior in behaviors]


def _key(behavior: str) -> str:
  return behavior.strip().casefold()


def _read(path: pathlib.Path) -> dict[str, list[Attempt]]:
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a file of attacks (JSON, CSV or JSONL).")
  text = path.read_text(encoding="utf-8-sig")
  try:
    if path.suffix == ".json":
      records = json.loads(text)["jailbreaks"]
    elif path.suffix == ".jsonl":
      records = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif path.suffix == ".csv":
      records = list(csv.DictReader(text.splitlines(keepends=True)))
    else:
      raise ValueError("its ending is none of .json, .jsonl and .csv")
    found: dict[str, list[Attempt]] = {}
    for number, record in enumerate(records, 1):
      behavior = _first(record, BEHAVIOR) if "goal" not in record else record["goal"]
      if not behavior or "prompt" not in record:
        raise ValueError(f"record {number} has {', '.join(record)}; expected behavior (or goal) and prompt")
      attempts = found.setdefault(_key(behavior), [])
      if record["prompt"]:
        queries = int(_first(record, ("queries", "number_of_queries", "queries_to_jailbreak")) or 0)
        attempts.append(Attempt(record["prompt"], _first(record, PREFIX) or "", queries=queries))
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is no file of attacks: {error}.") from error
  if not found:
    raise ValueError(f"{path} is no file of attacks: it is empty.")
  return found


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
  return next((record[name] for name in names if record.get(name)), None)
