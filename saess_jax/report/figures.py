"""Drawings: SVG inside the page, in the page's own text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saess_jax.report.markup import NAMES, Raw, escape

_INK = "#010203"  # Stands for the page's text colour in a drawing; becomes currentColor.
_COLORS = {"base": "#d07a2d", "plain": "#8a6fb3", "saess": "#3b8ac4", "benign": "#3f9b6b", "malicious": "#c9453f"}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 4)))
_WIDTH = 5.0  # Inches: about a phone's width, so that words keep their size there.


def intervals(groups: dict[str, dict[str, dict[str, float]]], label: str) -> Figure:
  """A dot with its interval for every group and model."""
  figure = Figure(figsize=(_WIDTH, 0.9 + 0.4 * len(groups)))
  axes = figure.subplots()
  models = [model for model in NAMES if any(model in rates for rates in groups.values())]
  for k, model in enumerate(models):
    named = False
    for i, rates in enumerate(groups.values()):
      if model not in rates or not rates[model]["n"]:
        continue
      rate, y = rates[model], i + (k - (len(models) - 1) / 2) * 0.26
      axes.plot(
          [100 * rate["low"], 100 * rate["high"]], [y, y], color=_COLORS[model], linewidth=2.4, alpha=0.55,
          solid_capstyle="round")
      axes.plot(
          100 * rate["rate"], y, "o", color=_COLORS[model], markersize=6, label=None if named else NAMES[model])
      named = True
  axes.set(xlim=(-2, 102), ylim=(len(groups) - 0.5, -0.5), xlabel=f"{label}, %")
  axes.set_yticks(range(len(groups)), [_label(name) for name in groups])
  axes.tick_params(axis="y", length=0)
  axes.spines["left"].set_visible(False)
  axes.xaxis.grid(True, color=_INK, alpha=0.12)
  if axes.lines:
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(models), borderaxespad=0)
  return figure


def histogram(benign: Sequence[float], malicious: Sequence[float], threshold: float) -> Figure:
  """How many prompts of either label have which P(malicious)."""
  figure = Figure(figsize=(_WIDTH, 2.3))
  axes = figure.subplots()
  axes.hist(
      [benign, malicious], bins=[i / 20 for i in range(21)], label=["benign", "malicious"],
      color=[_COLORS["benign"], _COLORS["malicious"]], rwidth=0.85)
  axes.axvline(threshold, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
  axes.set(xlabel="P(malicious) of the query", ylabel="prompts", xlim=(0, 1))
  axes.yaxis.get_major_locator().set_params(integer=True)
  axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
  return figure


def roc_curve(points: Sequence[tuple[float, float, float]], at: tuple[float, float]) -> Figure:
  """`scores.roc`; `at`: (false alarm rate, detection rate) at the threshold in use."""
  figure, axes = _square()
  axes.plot([0, 100], [0, 100], color=_INK, alpha=0.2, linewidth=1)
  axes.plot([100 * x for _, x, _ in points], [100 * y for _, _, y in points], color=_COLORS["saess"], linewidth=2,
            clip_on=False)
  axes.plot(100 * at[0], 100 * at[1], "o", color=_COLORS["saess"], markersize=7, label="threshold", clip_on=False)
  axes.set(
      xlim=(0, 100), ylim=(0, 100), xlabel="benign taken for malicious, %", ylabel="malicious caught, %")
  axes.legend(frameon=False, loc="lower right")
  return figure


def det_curve(
    points: Sequence[tuple[float, float, float]], at: tuple[float, float], benign: int, malicious: int) -> Figure:
  """Both kinds of error on normal-deviate axes: what is straight here is normal, and small rates are told apart.

  Rates of 0 and 1 are drawn at half a prompt (of two at least), for they lie infinitely far out.
  """
  figure, axes = _square()
  far = lambda rate, n: NormalDist().inv_cdf(min(max(rate, 0.5 / max(n, 2)), 1 - 0.5 / max(n, 2)))
  ends = [far(0, benign), far(0, malicious)]
  axes.plot(
      [far(x, benign) for _, x, _ in points], [far(1 - y, malicious) for _, _, y in points], color=_COLORS["saess"],
      linewidth=2, clip_on=False)
  axes.plot(
      far(at[0], benign), far(1 - at[1], malicious), "o", color=_COLORS["saess"], markersize=7, label="threshold",
      clip_on=False)
  ticks = [rate for rate in (0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)]
  places = [NormalDist().inv_cdf(rate) for rate in ticks]
  names = [f"{100 * rate:g}" for rate in ticks]
  axes.set_xticks(places, names)
  axes.set_yticks(places, names)
  axes.set(
      xlim=(ends[0], -ends[0]), ylim=(ends[1], -ends[1]), xlabel="benign taken for malicious, %",
      ylabel="malicious missed, %")
  axes.grid(True, color=_INK, alpha=0.12)
  axes.legend(frameon=False, loc="upper right")
  return figure


def calibration(bins: Sequence[dict[str, Any]]) -> Figure:
  """`scores.reliability`: a dot with interval a bin, and how many prompts it holds."""
  figure, axes = _square()
  axes.plot([0, 100], [0, 100], color=_INK, alpha=0.2, linewidth=1)
  for b in bins:
    x, rate = 100 * b["mean"], b["malicious"]
    axes.plot([x, x], [100 * rate["low"], 100 * rate["high"]], color=_COLORS["saess"], linewidth=2.4, alpha=0.55)
    axes.plot(x, 100 * rate["rate"], "o", color=_COLORS["saess"], markersize=6, clip_on=False)
    axes.text(x, 103, b["n"], ha="center", va="bottom", fontsize=8, color=_INK)
  axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="P(malicious) of the query, %", ylabel="of these malicious, %")
  return figure


def steps(curves: dict[str, dict[str, dict[str, Any]]]) -> Figure:
  """`scores.budgets`: behaviors that gave way within so many queries."""
  figure = Figure(figsize=(_WIDTH, 2.9))
  axes = figure.subplots()
  end = max(curve["spent"] for models in curves.values() for curve in models.values())
  for k, (family, models) in enumerate(curves.items()):
    for model, curve in models.items():
      share = [100 * i / curve["n"] for i in range(len(curve["successes"]) + 1)]
      axes.step(
          [0, *curve["successes"], curve["spent"]], [*share, share[-1]], where="post", color=_COLORS[model],
          linestyle=_DASHES[k % len(_DASHES)], linewidth=2, label=f"{_label(family)}, {NAMES[model]}",
          clip_on=False, zorder=3)  # Before the axes: much happens at 0 queries.
  axes.set(xlim=(0, 1.04 * end), ylim=(0, 102), xlabel="queries", ylabel="attack success, %")
  axes.yaxis.grid(True, color=_INK, alpha=0.12)
  axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
  return figure


def _square() -> tuple[Figure, Axes]:
  figure = Figure(figsize=(3.6, 3.2))
  return figure, figure.subplots()


def _label(name: str, limit: int = 26) -> str:
  return (name if len(name) <= limit else f"…{name[1 - limit:]}").replace("$", r"\$")


class Drawings:
  """Turns figures into HTML; numbers them, so that no two share an id."""

  def __init__(self):
    self._count = 0

  def html(self, figure: Figure, caption: str) -> Raw:
    self._count += 1
    settings = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}
    with rc_context(settings):
      for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        for text in axes.get_legend().get_texts() if axes.get_legend() else []:
          text.set_color(_INK)
      figure.patch.set_alpha(0)
      buffer = io.StringIO()
      figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg"):].replace(_INK, "currentColor")
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', drawing))
    drawing = re.sub(r' id="([^"]*)"', lambda m: f' id="f{self._count}-{m[1]}"' if m[1] in used else "", drawing)
    drawing = re.sub(r'(url\(|href=")#', rf"\g<1>#f{self._count}-", drawing)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return Raw(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>\n")
