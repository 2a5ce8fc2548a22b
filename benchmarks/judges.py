"""Offline judges against human labels: precision, recall and F1 of "no answer was given", with Wilson intervals.

  python benchmarks/judges.py --labels refusal.csv,refusal_extra.csv --seed 0

A CSV has the columns objective (the request), assistant_response and human_score (1: refused), as the files of PyRIT's
refusal scorer; lines before them that begin with # are skipped. Whoever labelled them also called an answer to another
question a refusal, so a judge says "no answer" here where it does not say jailbroken. The halves are a random split by
--seed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import pathlib
import random
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The project is not installed.

from saess_jax.judges import OFFLINE, Exchange, make_judge  # noqa: E402
from saess_jax.metrics import wilson_interval  # noqa: E402

COLUMNS = ("objective", "assistant_response", "human_score")


def read_labels(names: str) -> tuple[list[Exchange], list[bool]]:
  """Exchanges and whether a person called them refused.

  Raises:
    ValueError: a column is missing, a score is no number (file and line are named), or there are no rows.
    FileNotFoundError: no such file.
  """
  rows, labels = [], []
  for name in names.split(","):
    with pathlib.Path(name).open(encoding="utf-8-sig", newline="") as file:
      reader = csv.DictReader(itertools.dropwhile(lambda line: line.startswith("#"), file))
      missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
      if missing:
        raise ValueError(f"{name} has no column {', '.join(missing)}; its columns are {reader.fieldnames}.")
      for number, row in enumerate(reader, 1):
        try:
          labels.append(float(row["human_score"]) >= 0.5)
        except (ValueError, TypeError) as error:
          raise ValueError(f"{name}, row {number}: human_score is {row['human_score']!r}; expected 0 or 1.") from error
        rows.append(Exchange(row["objective"], row["assistant_response"]))
  if not rows:
    raise ValueError(f"{names} holds no rows.")
  return rows, labels


def figures(said: Sequence[bool], labels: Sequence[bool]) -> str:
  """One line; intervals are of precision and recall, which are shares."""
  both = sum(s and y for s, y in zip(said, labels))
  precision, recall = _share(both, sum(said)), _share(both, sum(labels))
  f1 = 2 * both / max(1, sum(said) + sum(labels))
  return f"n {len(labels):4d}  precision {precision}  recall {recall}  F1 {f1:.3f}"


def _share(count: int, n: int) -> str:
  if not n:
    return "none".rjust(20)
  low, high = wilson_interval(count, n)
  return f"{count / n:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
  parser = argparse.ArgumentParser(description="Offline judges against human labels.")
  parser.add_argument("--labels", required=True, help="CSV files, separated by commas")
  parser.add_argument("--seed", type=int, default=0, help="of the random halves")
  options = parser.parse_args()
  try:
    rows, labels = read_labels(options.labels)
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))
  order = list(range(len(rows)))
  random.Random(options.seed).shuffle(order)
  half = len(order) // 2
  for name in OFFLINE:
    judge = make_judge(name)
    said = [not verdict.jailbroken for verdict in judge.judge_many(rows)]
    for part, chosen in (("all", order), ("first half", order[:half]), ("second half", order[half:])):
      line = figures([said[i] for i in chosen], [labels[i] for i in chosen])
      sys.stdout.write(f"{name:12s} {part:12s} {line}\n")


if __name__ == "__main__":
  main()
