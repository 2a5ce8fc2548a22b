"""Does a data set teach intent, or a shortcut? `python -m saess_jax.data.checks [--source embedded]`

A classifier that reads single words, and one that reads only the form of a prompt, should be near chance on unseen
prompts: what they can tell apart, the model can learn instead of intent. Near duplicates between train and test would
hide that. Axes: N rows, W features.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import scipy.sparse

from saess_jax.data import sources

_STOP_WORDS = frozenset(re.findall(r"\w+", """
a about all also am an and any are as at be been but by can could did do does each for from get give had has have he her
him his how i if in into is it its just like make me my no not of on one or our out please she should so some step tell
than that the their them then there these they this to up us use was way we were what when where which who why will with
without would write you your explain describe
"""))
_MIN_CONTENT_WORDS = 4  # Containment of fewer words says nothing.


def bag_of_words_accuracy(train: Sequence[sources.Row], test: Sequence[sources.Row]) -> float:
  """Accuracy on `test` of a logistic regression on which words occur, fitted to `train`."""
  return _fit_and_score(lambda row: {word: 1.0 for word in _words(row.prompt)}, train, test)


def form_accuracy(train: Sequence[sources.Row], test: Sequence[sources.Row]) -> float:
  """Accuracy on `test` of a logistic regression on length, punctuation and first words, fitted to `train`."""
  return _fit_and_score(lambda row: _form(row.prompt), train, test)


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two prompts and how alike they are, both measures in [0, 1]."""

  train: str
  test: str
  jaccard: float  # Shared / all character 5-grams.
  containment: float  # Shared / fewer content words; 0 where a prompt has under four.

  @property
  def score(self) -> float:
    return max(self.jaccard, self.containment)


def near_duplicates(
    train: Sequence[sources.Row], test: Sequence[sources.Row], threshold: float = 0.5
) -> list[Pair]:
  """Pairs of a train and a test prompt whose `score` is at least `threshold`, worst first."""
  jaccard = _overlap(
      [_grams(row.prompt) for row in train], [_grams(row.prompt) for row in test],
      lambda shared, n_train, n_test: shared / np.maximum(n_train + n_test - shared, 1))
  containment = _overlap(
      [_content_words(row.prompt) for row in train], [_content_words(row.prompt) for row in test],
      lambda shared, n_train, n_test: shared * (np.minimum(n_train, n_test) >= _MIN_CONTENT_WORDS)
      / np.maximum(np.minimum(n_train, n_test), 1))
  found = np.argwhere(np.maximum(jaccard, containment) >= threshold)
  pairs = [Pair(train[i].prompt, test[j].prompt, float(jaccard[j, i]), float(containment[j, i])) for j, i in found]
  return sorted(pairs, key=lambda pair: -pair.score)


def _words(prompt: str) -> list[str]:
  """Letters with their marks, digits and apostrophes that stand together, of any alphabet."""
  text = unicodedata.normalize("NFC", prompt.lower())
  return "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def _content_words(prompt: str) -> set[str]:
  return set(_words(prompt)) - _STOP_WORDS


def _grams(prompt: str) -> set[str]:
  text = " ".join(_words(prompt))
  return {text[i:i + 5] for i in range(max(1, len(text) - 4))} - {""}


def _form(prompt: str) -> dict[str, float]:
  words = prompt.split()
  return {
      "first " + words[0].lower(): 1.0, "first two " + " ".join(words[:2]).lower(): 1.0,
      "words": len(words) / 10, "characters": len(prompt) / 60, "capital": float(prompt[0].isupper()),
      "ends " + prompt[-1] if prompt[-1] in ".?!" else "ends open": 1.0,
      **{"has " + mark: float(mark in prompt) for mark in ":,;!\"'()"},
      "sentences": float(len(re.findall(r"[.!?]", prompt))),
  }


def _fit_and_score(features: Callable[[sources.Row], dict[str, float]], train, test) -> float:
  """Fits on `train`, scores on `test`; features seen in one training row only are dropped."""
  train_features = [features(row) for row in train]
  counts = collections.Counter(name for row in train_features for name in row)
  index = {name: i for i, name in enumerate(sorted(name for name, count in counts.items() if count > 1))}

  def matrix(rows: list[dict[str, float]]) -> scipy.sparse.csr_array:
    entries = [(i, index[name], value) for i, row in enumerate(rows) for name, value in row.items() if name in index]
    entries += [(i, len(index), 1.0) for i in range(len(rows))]  # Bias.
    i, j, values = map(np.asarray, zip(*entries))
    return scipy.sparse.csr_array((values.astype(np.float32), (i, j)), shape=(len(rows), len(index) + 1))

  weights = _logistic_regression(matrix(train_features), np.array([row.label for row in train], np.float32))
  predicted = matrix([features(row) for row in test]) @ weights > 0
  return float(np.mean(predicted == np.array([row.label for row in test])))


def _logistic_regression(x: scipy.sparse.csr_array, y: np.ndarray, steps: int = 300) -> np.ndarray:
  """argmin over w [W] of sum_n log-loss(x_n . w, y_n) + |w|^2 / 2, by Nesterov's accelerated gradient."""
  direction = np.ones(x.shape[1], np.float32)
  for _ in range(20):  # Power iteration: the largest eigenvalue of x'x bounds the curvature.
    direction = x.T @ (x @ direction)
    largest = np.linalg.norm(direction)
    direction /= largest
  step_size = 1.0 / (0.25 * 1.1 * largest + 1.0)
  w = ahead = np.zeros(x.shape[1], np.float32)
  for step in range(steps):
    gradient = x.T @ (1.0 / (1.0 + np.exp(-(x @ ahead))) - y) + ahead
    w, previous = ahead - step_size * gradient, w
    ahead = w + step / (step + 3) * (w - previous)
  return w


def _overlap(train: list[set[Hashable]], test: list[set[Hashable]], measure: Callable) -> np.ndarray:
  """`measure(shared, size of train set, size of test set)` of all pairs, [test N, train N], by an inverted index."""
  postings = collections.defaultdict(list)
  for i, items in enumerate(train):
    for item in items:
      postings[item].append(i)
  sizes = np.array([len(items) for items in train])
  scores = np.zeros((len(test), len(train)), np.float32)
  for j, items in enumerate(test):
    hits = [postings[item] for item in items if item in postings]
    shared = np.bincount(np.concatenate(hits), minlength=len(train)) if hits else np.zeros(len(train))
    scores[j] = measure(shared, sizes, len(items))
  return scores


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--source", default="embedded", help="as --config.data.source of a training run, but for 'paper'")
  parser.add_argument("--threshold", type=float, default=0.5, help="score from which a pair is a near duplicate")
  args = parser.parse_args(argv)
  try:
    train, test = (sources.load_split(args.source, split) for split in ("train", "test"))
    sources.require_two_classes(train, f"The train split of {args.source}")
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))
  pairs = near_duplicates(train, test, args.threshold)
  print(f"{'split':<8}{'malicious':>10}{'benign':>8}")
  for name, rows in (("train", train), ("test", test)):
    malicious = sum(row.label for row in rows)
    print(f"{name:<8}{malicious:>10}{len(rows) - malicious:>8}")
  print(f"\nlabel of unseen prompts from\n  words    {bag_of_words_accuracy(train, test):6.1%}")
  print(f"  form     {form_accuracy(train, test):6.1%}")
  print(f"\nnear duplicates across splits: {len(pairs)}")
  for pair in pairs[:5]:
    print(f"  {pair.score:.2f}  {pair.train[:70]!r}\n        {pair.test[:70]!r}")


if __name__ == "__main__":
  main()
