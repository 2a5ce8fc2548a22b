"""What the picture of a generation shows is what the policy says."""

import math

import matplotlib.colors

from saess_jax import generate, trace
from saess_jax.config import SafetyConfig
from saess_jax.trace import View

NAN = math.nan


def test_views_of_the_verdicts():
  safety = SafetyConfig(r1=2, r2=3, r3=2, tau=3)
  assert trace.views(0.1, [0.1, NAN, 0.2, 0.3, 0.9, 0.1, 0.2], safety) == [
      View(0, False, 0, 1), View(2, False, 0, 3), View(3, False, 1, 4), View(4, False, 2, 5),
      View(5, False, 1, 6),  # The alarm opened at 4: from 4 - r2 on.
      View(6, False, 4, 7)]  # A false one: back to the newest three.
  assert trace.views(0.9, [0.9, 0.9, NAN], safety) == [View(0, True, 0, 1), View(1, True, 0, 2)]


def test_the_figure_has_bands_dots_and_windows():
  safety = SafetyConfig(r2=3, tau=2)
  response = generate.Response(
      text="", generated="", tokens=["a", " b", "\n", "$x$", "e"], cls_prob=[0.1, 0.2, 0.9, 0.8, NAN],
      phase=["benign", "benign", "alarm", "confirmed", "confirmed"], initial_prob=0.3, intervened_at=4, leaked=2,
      evaluations=4, prefix_tokens=0, ids=[1] * 5)
  figure = trace.draw(response, safety)
  top, bottom = figure.axes
  bands = [(p.get_x(), p.get_width(), matplotlib.colors.to_hex(p.get_facecolor())) for p in top.patches]
  assert bands == [(-0.5, 2, "#d9ead9"), (1.5, 1, "#f7e3b5"), (2.5, 2, "#f2c1bd")]
  assert [line.get_ydata()[0] for line in top.lines[:2]] == [0.3, 0.1]
  assert top.lines[-1].get_xdata()[0] == 3.5
  assert [(p.get_x(), p.get_width()) for p in bottom.patches] == [(-0.5, 1), (-0.5, 3), (-0.5, 4)]
  assert [label.get_text() for label in bottom.get_xticklabels()] == ["query", "a", "b", "\u21b5", "\\$x\\$", "e"]
