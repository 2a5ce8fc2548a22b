"""A picture of one generation: tokens against P(malicious), the phases behind them, and what [CLS] sees when.

  python -m saess_jax.generate --checkpoint RUN --prompt "..." --figure generation.svg
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from saess_jax import policy
from saess_jax.config import SafetyConfig

_PHASE_COLORS = {"benign": "#d9ead9", "alarm": "#f7e3b5", "confirmed": "#f2c1bd", "malicious": "#f2c1bd"}
_LINE, _QUERY, _SEEN = "#3b5b7a", "#7a5ba8", "#3b8ac4"
QUERY_AT = -2  # Where the query stands on the token axis.


@dataclasses.dataclass(frozen=True)
class View:
  """What [CLS] saw for the verdict after one token: the query or not, and response tokens [start, stop)."""

  token: int
  sees_query: bool
  start: int
  stop: int


def views(initial_prob: float, cls_prob: list[float], safety: SafetyConfig) -> list[View]:
  """The view of every verdict of one response (`generate.Response`), in order; NaN marks tokens without one."""
  state = policy.start(jnp.asarray([initial_prob]), safety)
  seen = []
  for t, prob in enumerate(cls_prob):
    if np.isnan(prob):
      continue
    sees_query, start, stop = np.asarray(policy.view(state, jnp.asarray(t), safety))[0].tolist()
    seen.append(View(t, bool(sees_query), start, stop))
    state = policy.update(state, jnp.asarray(t), jnp.asarray([prob]), jnp.asarray([True]), safety)
  return seen


def draw(response: Any, safety: SafetyConfig) -> Figure:
  """The figure of one `generate.Response`."""
  count = len(response.tokens)
  figure = Figure(figsize=(max(6.5, 0.24 * (count + 4)), 5.2), layout="constrained")
  top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
  for phase, run in itertools.groupby(range(count), key=lambda t: response.phase[t]):
    run = list(run)
    top.axvspan(run[0] - 0.5, run[-1] + 0.5, color=_PHASE_COLORS[phase], linewidth=0)
    top.text(run[0] - 0.4, 1.02, phase, fontsize=8, va="bottom")
  top.plot(QUERY_AT, response.initial_prob, "D", color=_QUERY)
  top.plot(range(count), response.cls_prob, "o-", color=_LINE, markersize=4, linewidth=1.2)
  top.axhline(safety.threshold, color="black", linewidth=0.8, linestyle=":")
  if response.intervened_at >= 0:
    at = response.intervened_at - 0.5
    top.axvline(at, color="#c9453f", linewidth=1.5)
    top.annotate("verdict: refuse", (at, 0.5), rotation=90, ha="right", va="center", fontsize=8, color="#c9453f")
  top.set(ylim=(-0.03, 1.03), ylabel="P(malicious)")

  seen = views(response.initial_prob, response.cls_prob, safety)
  moments = [seen[i] for i in sorted({0, len(seen) // 2, len(seen) - 1})] if seen else []
  for row, view in enumerate(moments):
    for start, stop, color in [(QUERY_AT, QUERY_AT + 1, _QUERY)] * view.sees_query + [(view.start, view.stop, _SEEN)]:
      bottom.add_patch(Rectangle((start - 0.5, row - 0.3), stop - start, 0.6, color=color, linewidth=0))
  bottom.set(ylim=(max(len(moments), 1) - 0.5, -0.5), xlim=(QUERY_AT - 0.8, count - 0.3))
  bottom.set_yticks(range(len(moments)), [f"seen after\ntoken {view.token}" for view in moments], fontsize=8)
  bottom.set_xticks([QUERY_AT, *range(count)], ["query", *map(_printable, response.tokens)], rotation=90, fontsize=7)
  for axes in (top, bottom):
    axes.spines[["top", "right"]].set_visible(False)
  return figure


def _printable(token: str) -> str:
  shown = token.replace("\n", "\u21b5").replace("$", "\\$").strip()
  return shown if shown and shown.isprintable() else "\u00b7"
