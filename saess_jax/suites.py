"""The prompts that an evaluation asks, in suites: sets of the package and files of its user."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

from saess_jax.config import EvalConfig
from saess_jax.data import sources

PACKAGE = ("embedded", *sources.SETS)


def names(suites: str) -> list[str]:
  """The suites that a config's `suites` names, with commas between them (a path cannot hold one)."""
  return suites.split(",")


def load_suites(config: EvalConfig) -> dict[str, list[sources.Row]]:
  """The rows of every suite that `config.suites` names, `config.max_rows` of each label at most.

  A suite is the test split of a set of the package ("embedded", "plain", "subtle") or another one of it
  ("embedded:validation", on which settings are chosen), or a CSV or JSONL file with a
  prompt, goal, behavior, instruction or forbidden_prompt column: "file:PATH" (labels from its label column, all
  malicious without one), "malicious:PATH" or "benign:PATH" (rows of that label, all of them in a file without labels).
  A file of attacks, with a prompt column beside one of `sources.REQUEST_COLUMNS` or a JailbreakBench artifact, is a
  suite of what these ask for.

  Raises:
    ValueError: an unknown suite, one without rows, or what `sources` raises.
  """
  suites = {}
  for suite in names(config.suites):
    kind, _, path = suite.partition(":")
    if kind in PACKAGE and (path or suite == kind):
      rows = sources.load_split(kind, path or "test")
    elif kind in ("file", *sources.LABELS) and path:
      rows = sources.read_requests(path, "malicious" if kind == "file" else kind)
      rows = [row for row in rows if kind in ("file", sources.LABELS[row.label])]
    else:
      raise ValueError(
          f"suite is {suite!r}; expected {', '.join(PACKAGE)} (or {PACKAGE[0]}:validation and so on), file:PATH, "
          "malicious:PATH or benign:PATH, or several of them with commas between them (a path cannot hold one).")
    suites[suite] = sources.draw_evenly(rows, config.max_rows, config.seed)
    if not rows:
      raise ValueError(f"Suite {suite} has no rows.")
  return suites


def last_part(name: str) -> str:
  """A suite's or an attack's name with the last part of its path alone."""
  kind, _, path = name.partition(":")
  return f"{kind}:{path.rstrip('/').rpartition('/')[2]}" if path else name


def short_names(names: Collection[str]) -> dict[str, str]:
  """`last_part` of each, where that still tells them apart."""
  short = {name: last_part(name) for name in names}
  return short if len(set(short.values())) == len(short) else {name: name for name in names}


def digest(suites: dict[str, list[sources.Row]]) -> str:
  """Says which rows these are, so that an evaluation is not resumed with others."""
  told = lambda row: [row.prompt, row.response, row.label, row.category, row.source] + [row.target] * bool(row.target)
  return hashlib.sha256(
      json.dumps({suite: list(map(told, rows)) for suite, rows in suites.items()}).encode()).hexdigest()
