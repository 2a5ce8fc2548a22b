"""The shortcut checks find a planted shortcut and stay at chance without one."""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest

from saess_jax.data import checks, sources

NOUNS = re.findall(r"\w+", "lamp river goat engine violin tunnel carpet planet harbor button ladder mirror")
VERBS = re.findall(r"\w+", "paint carry polish follow measure borrow hide trade weigh photograph")


def make_rows(count, seed, dress=lambda text, label: text):
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(count):
    text = f"{rng.choice(VERBS)} the {rng.choice(NOUNS)} near a {rng.choice(NOUNS)} and the {rng.choice(NOUNS)}"
    rows.append(sources.Row(dress(text, i % 2), "", i % 2, "", ""))
  return rows


@pytest.mark.parametrize("measure", [checks.bag_of_words_accuracy, checks.form_accuracy])
def test_chance_without_a_shortcut(measure):
  assert abs(measure(make_rows(400, 0), make_rows(400, 1)) - 0.5) < 0.1


def test_a_word_is_found_by_words_alone():
  dress = lambda text, label: f"{text} {'tonight' if label else 'sunrise'}"  # Same length, not in front.
  train, test = make_rows(200, 0, dress), make_rows(200, 1, dress)
  assert checks.bag_of_words_accuracy(train, test) > 0.98
  assert checks.form_accuracy(train, test) < 0.6


def test_a_form_is_found_by_form_alone():
  dress = lambda text, label: text + ("?" if label else ".")
  train, test = make_rows(200, 0, dress), make_rows(200, 1, dress)
  assert checks.form_accuracy(train, test) > 0.98
  assert checks.bag_of_words_accuracy(train, test) < 0.6


def test_logistic_regression_is_at_the_optimum():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 5)).astype(np.float32)
  y = (x[:, 0] > 0).astype(np.float32)
  w = checks._logistic_regression(x, y)
  gradient = x.T @ (1 / (1 + np.exp(-x @ w)) - y) + w
  assert np.abs(gradient).max() < 1e-3


def row(prompt):
  return sources.Row(prompt, "", 0, "", "")


def test_near_duplicates_worst_first():
  train = [row("How do I bake a chocolate cake with cherries on top?"), row("Name three rivers of France")]
  test = [
      row("Cherries on top of some chocolate bread: how would you bake that?"),  # Four of five content words.
      row("how do I bake a chocolate cake with cherries on top"),  # Same but for case and punctuation.
      row("Which planet is the largest?"),
  ]
  pairs = checks.near_duplicates(train, test, 0.5)
  assert [(pair.train, pair.test) for pair in pairs] == [
      (train[0].prompt, test[1].prompt), (train[0].prompt, test[0].prompt)]
  assert pairs[0].jaccard == pairs[0].score == 1
  assert pairs[1].jaccard < 0.5 and pairs[1].containment == pairs[1].score == pytest.approx(4 / 5)


def test_jaccard_and_containment_by_hand():
  (pair,) = checks.near_duplicates([row("abcdefg")], [row("abcdefx")], 0.4)  # {abcde bcdef cdefg} {abcde bcdef cdefx}
  assert pair.jaccard == pytest.approx(2 / 4) and pair.containment == 0
  assert not checks.near_duplicates([row("the lamp")], [row("is my lamp on")])  # One content word says nothing.
  assert not checks.near_duplicates([row("?!")], [row("...")])
  russian = [row("Как испечь хлеб дома?"), row("как испечь хлеб дома"), row("Как починить велосипед?")]
  assert [pair.test for pair in checks.near_duplicates(russian[:1], russian[1:])] == [russian[1].prompt]


def test_words_of_any_alphabet_can_give_the_label_away():
  assert checks._words("मैं रोटी; Re\u0301sume\u0301_2 don't") == ["मैं", "रोटी", "résumé", "2", "don't"]
  rows = [sources.Row(f"{word} {i}", "", label, "", "") for i in range(40) for label, word in enumerate(("хлеб", "яд"))]
  assert checks.bag_of_words_accuracy(rows[:60], rows[60:]) == 1


def test_main_prints_a_table(tmp_path, capsys):
  path = tmp_path / "a.csv"
  path.write_text(
      "prompt,label\n" + "".join(f"{row.prompt} {i},{row.label}\n" for i, row in enumerate(make_rows(99, 0))))
  checks.main(["--source", str(path)])
  printed = capsys.readouterr().out
  assert "words" in printed and "form" in printed and "near duplicates across splits" in printed
  path.write_text("prompt,label\n" + "".join(f"p {i},1\n" for i in range(99)))
  for source, message in ((str(path), "has 0 benign"), ("paper", "paper does not exist")):
    with pytest.raises(SystemExit):
      checks.main(["--source", source])
    assert message in capsys.readouterr().err


def test_the_embedded_set_keeps_its_promises():
  """docs/data.md in numbers: size, breadth, balance, and no shortcut from the training to the test split."""
  rows = {split: sources.embedded_rows(split) for split in sources.SPLITS}
  everything = [row for part in rows.values() for row in part]
  for label in (0, 1):
    assert sum(row.label == label for row in everything) >= 700
    assert len({row.category for row in everything if row.label == label}) >= 10
  assert sum(row.source == "embedded/lookalike" for row in everything) >= 150
  assert len({row.prompt for row in everything}) == len(everything)
  refusals = [row.response for row in everything if row.label and row.response]
  assert len(refusals) >= 3600 and all(row.response for row in rows["validation"] + rows["test"])
  assert all(10 <= len(text.split()) <= 60 for text in refusals) and len(set(refusals)) == len(refusals)
  assert checks.bag_of_words_accuracy(rows["train"], rows["test"]) < 0.75
  assert checks.form_accuracy(rows["train"], rows["test"]) < 0.60
  assert not checks.near_duplicates(rows["train"] + rows["validation"], rows["test"])


def test_the_plain_pairs_keep_theirs():
  files = sorted((pathlib.Path(sources.__file__).parent / "plain").glob("*.jsonl"))
  records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
  rows = sources.read_rows("plain")
  assert len(files) == 15 and len(rows) >= 3700
  labels = {idea: sorted(r["label"] for r in pair) for idea, pair in itertools.groupby(records, lambda r: r["idea"])}
  assert all(pair == ["benign", "malicious"] for pair in labels.values()) and 2 * len(labels) == len(rows)
  split = sources.split_rows(rows)
  assert checks.bag_of_words_accuracy(split["train"], split["test"]) < 0.70
  assert checks.form_accuracy(split["train"], split["test"]) < 0.60
  embedded = {part: sources.embedded_rows(part) for part in sources.SPLITS}
  assert not checks.near_duplicates(rows, embedded["validation"] + embedded["test"])
  assert not {row.prompt for row in rows} & {row.prompt for row in embedded["train"]}
