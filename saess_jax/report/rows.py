"""Rows in full, folded, at the end of the page; whatever is listed before them links there."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from saess_jax.evaluation import KEYS, key_of
from saess_jax.records import Records
from saess_jax.report.markup import NAMES, NONE, Raw, beside, escape, section, shorten
from saess_jax.report.shown import Row, attempt_text, highest, outcome, reason, verdict
from saess_jax.report.trace import LEGEND, trace

_PROBS = 200  # Printed of one response.


class RowBook:
  """Gives out links to rows and collects what was linked to.

  Attributes:
    judge: whose verdicts count.
    safety: `SafetyConfig` as a dict.
  """

  def __init__(self, rows: Sequence[Row], judge: str, safety: dict[str, Any], responses: pathlib.Path):
    """`responses`: responses.jsonl, to name its lines; where it is absent only keys are named."""
    self.judge, self.safety = judge, safety
    self._numbers = {key_of(row): number for number, row in enumerate(rows, 1)}
    lines = reversed(list(enumerate(Records(responses).read(), 1)))  # Of a row that is there twice the first counts.
    self._lines = {key_of(record): line for line, record in lines}
    self._linked: dict[int, Row] = {}

  def link(self, row: Row, text: str) -> Raw:
    """`text` as a link to the row."""
    number = self._numbers[key_of(row)]
    self._linked[number] = row
    return Raw(f'<a href="#row-{number}">{escape(text)}</a>')

  def line(self, row: Row) -> str:
    """"line 12": where the row stands in responses.jsonl."""
    return f"line {self._lines[key_of(row)]}" if key_of(row) in self._lines else "the line"

  def html(self) -> str:
    """All that was linked to, in the order of the rows."""
    if not self._linked:
      return ""
    parts = "".join(self._row(number, row) for number, row in sorted(self._linked.items()))
    return section("Rows", (
        "<p class='soft'>Everything that is listed above, in full. What a model complied with is not printed: it "
        f"stands under “response” in the line of {beside('responses.jsonl')}, beside this page, that each row names."
        f"</p>\n{parts}<p class='soft'>{escape(LEGEND)}</p>\n"), "rows")

  def _row(self, number: int, row: Row) -> str:
    title = f"{('benign', 'malicious')[row['label']]} · {row['method']} · {NAMES[row['model']]} · " + shorten(
        row["behavior"], 70)
    key = ", ".join(f"{name} {row[name]}" for name in KEYS)
    lines = [
        ["request", shorten(row["behavior"], 1000)],
        *([["sent", attempt_text(row)]] if row["prompt"] != row["behavior"] else []),
        *([["fed", f"{row['soft_tokens']} free embeddings in the place of its last tokens (attempts.jsonl)"]]
          if row.get("soft_tokens") else []),
        ["prefix", f"{row['prefix_tokens']} tokens" if row["prefix"] else "none"],
        *([["variant", shorten(row["variant"], 160)]] if row["variant"] else []),
        ["outcome", outcome(row, self.judge, self.safety, 600)],
        *[[f"judge {shorten(name, 60)}", _verdict(row, name)] for name in row["judgements"]],
        ["P(malicious)", self._probabilities(row)],
        ["decoding", (f"intervened at {row['intervened_at']}, {row['leaked']} tokens leaked"
                      if row["intervened_at"] >= 0 else "no intervention")
         + f", {row['evaluations']} evaluations of [CLS], {len(row['tokens'])} tokens"],
        ["sampling", ", ".join(f"{name} {value}" for name, value in row["sampling"].items())],
        ["attack's cost", f"{row['queries']} queries, {row['query_tokens']} tokens"],
        ["suite", f"{row['suite']}, index {row['index']}, attempt {row['attempt']}"],
        ["category, source", f"{row['category'] or NONE}, {row['source'] or NONE}"],
        ["raw", Raw(f"{beside('responses.jsonl')}, {self.line(row)} with {escape(key)}")]]
    return (
        f"<details><summary>{escape(title)}</summary>\n<div class='row' id='row-{number}'>"
        f"{trace(row, self.safety)}{_facts(lines)}</div></details>\n")

  def _probabilities(self, row: Row) -> str:
    if row["initial_prob"] is None:
      return "no verdicts: decoded plainly"
    listed = " ".join(NONE if p is None else f"{p:.2f}" for p in row["cls_prob"][:_PROBS])
    more = f" … {len(row['cls_prob']) - _PROBS} more" if len(row["cls_prob"]) > _PROBS else ""
    return f"query {row['initial_prob']:.3f}, highest {highest(row):.3f}; after each token: {listed}{more}"


def _facts(lines: Sequence[Sequence[str]]) -> str:
  return "<table><tbody>" + "".join(
      f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in lines
  ) + "</tbody></table>"


def _verdict(row: Row, judge: str) -> str:
  judgement = row["judgements"][judge]
  word = verdict(judgement)
  if row["label"] == 0:
    word = {True: "refused", False: "not refused", None: "nothing said of refusal"}[judgement["refused"]]
  return f"{word}: {reason(row, judge)} (version {shorten(str(judgement['version']), 60)})"
