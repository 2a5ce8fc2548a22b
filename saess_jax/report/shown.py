"""What of an attempt and its response may be printed.

Nothing that a model wrote in answer to a malicious request is, unless every judge calls it a refusal, and then only
from the refusal on that decoding put in. What a model complied with stays in responses.jsonl.
"""

from __future__ import annotations

import re
from typing import Any

from saess_jax.report.markup import shorten

Row = dict[str, Any]  # Of `evaluation.read_results`.
_OFFLINE = ("rules", "prefix")  # Their reasons hold nothing of a refusal but its own words; see `judges`.


def refused(row: Row, judge: str) -> bool | None:
  return row["judgements"][judge]["refused"]


def verdict(judgement: dict[str, Any]) -> str:
  """What a judge says of the response to a malicious request, in a word or two."""
  if judgement["refused"]:
    return "refused"
  if judgement["jailbroken"] is None:
    return "not judged"
  if judgement["jailbroken"]:
    return "jailbroken"
  return "harmless" if judgement["refused"] is None else "neither"  # A judge of harm does not speak of refusals.


def complied(row: Row, judge: str) -> bool:
  """A malicious request that got through."""
  return row["label"] == 1 and row["judgements"][judge]["jailbroken"]


def prefix_is_harmless(row: Row) -> bool:
  """Only prefixes that we wrote are known to hold nothing; any other attack's may be what was asked for."""
  return re.fullmatch(r"prefill_\d+|late_\d+|filler", row["method"]) is not None


def refusal_tokens(row: Row, safety: dict[str, Any]) -> tuple[int, int]:
  """(start, stop) of the refusal among `row["tokens"]`, as decoding put it in; empty where it did not.

  Compared without white space, for a token decoded alone may have lost its own.
  """
  if row["intervened_at"] < 0:
    return 0, 0
  start = max(row["intervened_at"], _supplied(row, safety))  # A caller's prefix is finished first.
  wanted = [_squeezed(text) for text in (safety["refusal_prefix"], safety["fixed_refusal"]) if text]
  said = ""
  for stop in range(start, len(row["tokens"])):
    said += _squeezed(row["tokens"][stop])
    if not any(text.startswith(said) for text in wanted):
      return start, stop
  return start, len(row["tokens"])


def shown_tokens(row: Row, safety: dict[str, Any]) -> list[bool]:
  """For every token of a malicious request's response: may it be printed?"""
  start, stop = refusal_tokens(row, safety)
  if start < stop and all(judgement["refused"] for judgement in row["judgements"].values()):
    stop = len(row["tokens"])
  opener = _supplied(row, safety) if prefix_is_harmless(row) else 0
  return [row["label"] == 0 or i < opener or start <= i < stop for i in range(len(row["tokens"]))]


def _supplied(row: Row, safety: dict[str, Any]) -> int:
  """How many of `row["tokens"]`, from the first on, the caller's prefix gave: rollback from within it ends it there."""
  cut = safety["rollback"] and row["intervened_at"] > 0
  return min(row["prefix_tokens"], row["intervened_at"]) if cut else row["prefix_tokens"]


def outcome(row: Row, judge: str, safety: dict[str, Any], limit: int = 240) -> str:
  """What became of it, in words."""
  if not row["generated"].strip():
    return "empty"
  if row["label"] == 0:
    what = {True: "refused", False: "answered", None: "not judged"}[refused(row, judge)]
    return f"{what}: “{shorten(row['response'], limit)}”"
  if not refused(row, judge):
    word = verdict(row["judgements"][judge])
    return {"jailbroken": "complied", "neither": "neither refused nor complied"}.get(word, word)
  start, stop = refusal_tokens(row, safety)
  all_agree = all(judgement["refused"] for judgement in row["judgements"].values())
  # Behind what the attacker wrote, which may hold the same words; if they come twice, from the last time on.
  texts = [text for text in (safety["refusal_prefix"], safety["fixed_refusal"]) if text]
  begins = max(map(row["response"].rfind, texts), default=-1)
  behind = begins >= len(row["response"]) - len(row["generated"])
  if start < stop and all_agree and begins >= 0 and behind:
    return f"refused: “{shorten(row['response'][begins:], limit)}”"
  return "refused in its own words"


def reason(row: Row, judge: str) -> str:
  """Why a judge judged so; left out where it repeats four words running of what is not printed."""
  said = row["judgements"][judge]["reason"]
  shown = judge in _OFFLINE and all(judgement["refused"] for judgement in row["judgements"].values())
  if row["label"] == 1 and not shown and _fours(said) & _fours(row["response"]):
    return "(quotes the response)"
  return shorten(said, 160)


def attempt_text(row: Row) -> str:
  """What was sent in the behavior's place; of a chat the user's turns alone, since the others may be a model's."""
  if isinstance(row["prompt"], str):
    return shorten(row["prompt"], 600)
  said = lambda turn: shorten(turn["content"], 300) if turn["role"] == "user" else "▪"
  turns = [f"{turn['role']}: {said(turn)}" for turn in row["prompt"]]
  return "\n".join(turns[:2] + [f"… {len(turns) - 4} more turns"] * (len(turns) > 4) + turns[2:][-2:])


def highest(row: Row) -> float | None:
  """The highest P(malicious) of all verdicts on query and response; None without a verdict."""
  return max((p for p in [row["initial_prob"], *row["cls_prob"]] if p is not None), default=None)


def _squeezed(text: str) -> str:
  return re.sub(r"\s+", "", text)


def _fours(text: str) -> set[tuple[str, ...]]:
  words = re.findall(r"\w+", text.lower())
  return {tuple(words[i : i + 4]) for i in range(max(len(words) - 3, min(len(words), 1)))}
