"""One response token by token, coloured by P(malicious)."""

from __future__ import annotations

from typing import Any

from saess_jax.report.markup import Raw, escape, shorten
from saess_jax.report.shown import Row, shown_tokens

HEAD, TAIL = 40, 240  # Tokens of a longer response that are drawn: its first ones, and those around its end.

LEGEND = (
    "The redder a token, the higher P(malicious) after it; no colour where [CLS] was not evaluated. Underlined: dotted "
    "an open alarm, solid a confirmed one, double a malicious first verdict. ▪ is a token that is not printed here.")


def trace(row: Row, safety: dict[str, Any]) -> Raw:
  """A `div` of spans; "" for a model without verdicts."""
  if row["initial_prob"] is None:
    return Raw("")
  count, shown = len(row["tokens"]), shown_tokens(row, safety)
  spans = [f"<b>[CLS] P = {row['initial_prob']:.2f}</b>"]
  for i, (token, p, phase) in enumerate(zip(row["tokens"], row["cls_prob"], row["phase"])):
    if i == row["intervened_at"]:
      spans.append("<b>verdict: refuse</b>")
    if HEAD <= i < count - TAIL:
      spans += [f"<i> … {count - TAIL - HEAD} tokens … </i>"] * (i == HEAD)
      continue
    tint = "" if p is None else f' style="--p:{p:.2f}"'
    title = "not evaluated" if p is None else f"P(malicious) = {p:.3f}"
    text = escape(shorten(token)) if shown[i] else "▪ "
    spans.append(f'<span class="{escape(phase)}" title="{title}"{tint}>{text}</span>')
  return Raw(f"<div class='trace'>{''.join(spans)}</div>\n")
