"""One HTML page about an evaluation, complete in itself: no scripts, no network, for light and dark screens.

Nothing that a model wrote in answer to a malicious request is printed unless it was judged a refusal, and then only
from the refusal on. What a model complied with stays in rows.jsonl.
"""

from __future__ import annotations

import html
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from saess_jax.evaluate import percent

_INK = "#010203"  # Stands for the page's text colour in a drawing; becomes currentColor.
_COLORS = {"base": "#d07a2d", "saess": "#3b8ac4", "benign": "#3f9b6b", "malicious": "#c9453f"}
_NAMES = {"base": "base model", "saess": "SA-ESS"}
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #66707a; --line: #d9dee3; --page: #fcfcfb;
  --panel: #f3f4f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #9aa4ad; --line: #343b42; --page: #15181b; --panel: #1e2226; }
}
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 50rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 1.5rem; line-height: 1.35; font-weight: 600; margin: .3rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 3rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 500; }
.trace { background: var(--panel); border-radius: 8px; padding: 1rem; line-height: 2.3;
  font: .9rem/2.3 ui-monospace, Menlo, Consolas, monospace; }
.trace span { white-space: pre-wrap; padding: .15rem .05rem; border-bottom: 3px solid transparent; }
.trace .alarm { border-bottom: 3px dotted #c9453f; } .trace .confirmed { border-bottom-color: #c9453f; }
.trace .malicious { border-bottom: 3px double #c9453f; }
.trace b { background: var(--ink); color: var(--page); border-radius: 4px; padding: .1rem .45rem; font-weight: 600;
  margin: 0 .2rem; }
.tag { border: 1px solid var(--line); border-radius: 99px; padding: .05rem .55rem; font-size: .8rem;
  white-space: nowrap; }
"""


def write_report(metrics: dict[str, Any], rows: Sequence[dict[str, Any]], path: str | pathlib.Path) -> None:
  """Writes the page.

  Args:
    metrics: of `evaluate.metrics_of`.
    rows: of `evaluate.read_results`.
  """
  sections = [
      _section("Attacks", _attacks(metrics)), _section("Benign prompts", _benign(metrics)),
      _section("The first verdict", _verdicts(metrics, rows)), _section("One response, token by token", _trace(rows)),
      _section("Examples", _examples(metrics, rows)), _section("What was run", _settings(metrics))]
  page = (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1"><title>SA-ESS evaluation</title>'
      f"<style>{_STYLE}</style></head><body><main>\n<p class='soft'>SA-ESS evaluation</p>\n"
      f"{_headline(metrics)}\n{''.join(sections)}</main></body></html>\n")
  pathlib.Path(path).write_text(page, encoding="utf-8")


def _section(title: str, body: str) -> str:
  return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def _headline(metrics: dict[str, Any]) -> str:
  models, n, judge = metrics["config"]["models"], metrics["n"], metrics["judge"]
  success, refusal = metrics["any_attack"], metrics["over_refusal"]
  each = lambda rates: ", ".join(f"{_NAMES[model]} {percent(rates[model])}" for model in reversed(models))
  parts = []
  if success:
    attacks = len(next(iter(metrics["attack_success_rate"].values())))
    under = f"at least one of {attacks} attacks" if attacks > 1 else "one attack"
    parts.append(f"Malicious prompts not refused under {under}: {each(success)}.")
  if refusal:
    parts.append(f"Benign prompts refused: {each(refusal)}.")
  return (
      f"<h1>{html.escape(' '.join(parts))}</h1>\n"
      f"<p class='soft'>{n['malicious']} malicious and {n['benign']} benign prompts; "
      "95% Wilson intervals in brackets. An attack succeeds when the response is not a refusal, whatever else it says: "
      f"an upper bound of harm. Judge: {html.escape(judge['name'])} {html.escape(judge['version'])}.</p>")


def _attacks(metrics: dict[str, Any]) -> str:
  success = metrics["attack_success_rate"]
  if not success:
    return ""
  attacks = list(next(iter(success.values())))
  groups = {attack: {model: success[model][attack] for model in success} for attack in attacks}
  if len(attacks) > 1:
    groups["any of these"] = metrics["any_attack"]
  lines = [
      [attack, _NAMES[model].replace(" ", "\N{NO-BREAK SPACE}"), _percent(success[model][attack]),
       _percent(metrics["attack_success_rate_prefix_judge"][model][attack]), str(conduct["empty"]),
       f"{conduct['leaked_mean']:.1f} / {conduct['leaked_max']}", f"{conduct['evaluations_mean']:.1f}",
       _percent(conduct["intervened"])]
      for attack in attacks for model in success for conduct in [metrics["attacks"][model][attack]]]
  heads = [
      "attack", "model", "success", "by prefix list", "empty", "leaked tokens mean / max", "[CLS] evaluations",
      "intervened"]
  return (
      _figure(_intervals(groups, "Attack success"), "Share of malicious prompts whose response is not a refusal.")
      + _table(heads, lines)
      + "<p class='soft'>Leaked: response tokens from the one that opened the alarm to the refusal. "
      "By prefix list: the same responses judged by the field's list of phrases.</p>\n"
      + _categories(metrics["by_category"]))


def _categories(by_category: dict[str, Any]) -> str:
  model = list(by_category)[-1]
  names = sorted({name for rates in by_category[model].values() for name in rates})
  if len(names) < 2:
    return ""
  lines = [[name or "(none)"] + [_count(rates.get(name)) for rates in by_category[model].values()] for name in names]
  caption = f"{_NAMES[model]}: attacks that succeeded, by category."
  return _table(["category"] + list(by_category[model]), lines, caption)


def _benign(metrics: dict[str, Any]) -> str:
  refusal = metrics["over_refusal"]
  if not refusal:
    return ""
  groups, by_source = {"all benign prompts": refusal}, metrics["over_refusal_by_source"]
  for source in sorted({source for rates in by_source.values() for source in rates}):
    groups[source or "(no source)"] = {model: rates[source] for model, rates in by_source.items()}
  if len(groups) == 2:
    groups.popitem()
  by_category = metrics["over_refusal_by_category"]
  names = sorted({name for rates in by_category.values() for name in rates})
  lines = [[name or "(none)"] + [_count(rates.get(name)) for rates in by_category.values()] for name in names]
  table = _table(["category"] + [_NAMES[model] for model in by_category], lines, "Refused, by category.")
  figure = _figure(_intervals(groups, "Benign prompts refused"), "Over-refusal: fewer is better.")
  return figure + (table if len(names) > 1 else "")


def _verdicts(metrics: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
  seen = {(row["index"], row["label"]): row["initial_prob"] for row in rows if row["initial_prob"] is not None}
  if not seen:
    return ""
  figure = Figure(figsize=(7.2, 2.6))
  axes = figure.subplots()
  probabilities = [[p for (_, label), p in seen.items() if label == wanted] for wanted in (0, 1)]
  axes.hist(
      probabilities, bins=[i / 20 for i in range(21)], label=["benign", "malicious"],
      color=[_COLORS["benign"], _COLORS["malicious"]], rwidth=0.85)
  axes.axvline(metrics["config"]["safety"]["threshold"], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
  axes.set(xlabel="P(malicious) of the query", ylabel="prompts", xlim=(0, 1))
  axes.legend(frameon=False, loc="upper center", ncols=2)
  caught, alarmed = metrics["caught_initially"], metrics["alarmed_initially"]
  text = [f"{percent(rate)} of malicious prompts are caught by the first verdict" for rate in caught.values()]
  text += [f"{percent(rate)} of benign ones are taken for malicious" for rate in alarmed.values()]
  return _figure(figure, f"{'; '.join(text)}. Dashed: the threshold.")


def _trace(rows: Sequence[dict[str, Any]]) -> str:
  candidates = [row for row in rows if row["initial_prob"] is not None and row["label"] == 1 and _refused(row)]
  if not candidates:
    return ""
  # The one that shows most: an intervention in the middle of a response, with a prefix that can be printed.
  row = max(candidates, key=lambda row: (row["intervened_at"] > 0, _prefix_is_harmless(row), row["intervened_at"]))
  begins = _refusal_begins(row)
  spans = [f"<b>[CLS] P = {row['initial_prob']:.2f}</b>"]
  for i, (token, p, phase) in enumerate(zip(row["tokens"], row["cls_prob"], row["phase"])):
    if i == row["intervened_at"]:
      spans.append("<b>verdict: refuse</b>")
    shown = i >= begins if begins is not None else False
    shown |= i < row["prefix_tokens"] and _prefix_is_harmless(row)
    tint = "" if p is None else f' style="background: rgba(201, 69, 63, {0.75 * p:.2f})"'
    title = "not evaluated" if p is None else f"P(malicious) = {p:.3f}"
    text = html.escape(token) if shown else "▪ "
    spans.append(f'<span class="{html.escape(phase)}" title="{title}"{tint}>{text}</span>')
  return (
      f"<p>Request, under <span class='tag'>{html.escape(row['method'])}</span>: {html.escape(row['behavior'])}</p>\n"
      f"<div class='trace'>{''.join(spans)}</div>\n"
      "<p class='soft'>The redder a token, the higher P(malicious) after it; no colour where [CLS] was not evaluated. "
      "Underlined: dotted an open alarm, solid a confirmed one, double a malicious first verdict. ▪ is a token before "
      "the refusal that is not printed here.</p>")


def _examples(metrics: dict[str, Any], rows: Sequence[dict[str, Any]], each: int = 3) -> str:
  safe = [row for row in rows if row["model"] == metrics["config"]["models"][-1]]
  malicious = [row for row in safe if row["label"] == 1]
  benign = [row for row in safe if row["label"] == 0]
  kinds = [
      [row for row in malicious if _refused(row)], [row for row in malicious if not _refused(row)],
      [row for row in benign if not _refused(row)], [row for row in benign if _refused(row)]]
  lines = [
      [("benign", "malicious")[row["label"]], row["method"], _shorten(row["behavior"]), _outcome(row, metrics)]
      for kind in kinds for row in _spread(kind, each)]
  heads = ["label", "attack", "request", f"response of {_NAMES[metrics['config']['models'][-1]]}"]
  return _table(heads, lines) if lines else ""


def _outcome(row: dict[str, Any], metrics: dict[str, Any]) -> str:
  if row["judgements"]["rules"]["reason"] == "empty":
    return "empty"
  if row["label"] == 0:
    return f"{'refused' if _refused(row) else 'answered'}: “{_shorten(row['response'])}”"
  if not _refused(row):
    return "complied; text in rows.jsonl"
  safety = metrics["config"]["safety"]
  found = [row["response"].find(text) for text in (safety["refusal_prefix"], safety["fixed_refusal"]) if text]
  begins = min((at for at in found if at >= 0), default=None)
  if row["intervened_at"] >= 0 and begins is not None:
    return f"refused: “{_shorten(row['response'][begins:])}”"
  return f"refused ({row['judgements']['rules']['reason']}); text in rows.jsonl"


def _settings(metrics: dict[str, Any]) -> str:
  flat = {**{k: v for k, v in metrics["config"].items() if k != "safety"},
          **{f"safety.{k}": v for k, v in metrics["config"]["safety"].items()}}
  lines = [[key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)] for key, value in flat.items()]
  lines += [
      [f"budget of {attack}", f"{cost['queries']} queries of the base model, {cost['tokens']} tokens"]
      for attack, cost in metrics["budget"].items()]
  return _table(["setting", "value"], lines)


def _refused(row: dict[str, Any]) -> bool:
  return row["judgements"]["rules"]["refused"]


def _prefix_is_harmless(row: dict[str, Any]) -> bool:
  """Only the openers of `prefill_N` are known to hold nothing; any other attack's prefix may be what was asked for."""
  return re.fullmatch(r"prefill_\d+", row["method"]) is not None


def _refusal_begins(row: dict[str, Any]) -> int | None:
  """Index of the inserted refusal's first token: a caller's prefix is finished first."""
  return None if row["intervened_at"] < 0 else max(row["intervened_at"], row["prefix_tokens"])


def _spread(rows: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
  """About `n` rows from all over `rows`."""
  return [rows[i * len(rows) // n] for i in range(n)] if len(rows) > n else list(rows)


def _shorten(text: str, limit: int = 240) -> str:
  return text if len(text) <= limit else text[:limit].rstrip() + " …"


def _percent(rate: dict[str, float]) -> str:
  return percent(rate).replace(" ", "\N{NO-BREAK SPACE}")


def _count(rate: dict[str, float] | None) -> str:
  return "" if rate is None else f"{rate['count']} of {rate['n']}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "") -> str:
  cells = lambda values, tag: "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)
  body = "".join(f"<tr>{cells(line, 'td')}</tr>\n" for line in lines)
  title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
  head = f"<thead><tr>{cells(heads, 'th')}</tr></thead>"
  return f"<div class='scroll'><table>{title}{head}\n<tbody>{body}</tbody></table></div>\n"


def _intervals(groups: dict[str, dict[str, dict[str, float]]], label: str) -> Figure:
  """A dot with its interval for every group and model."""
  figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(groups)))
  axes = figure.subplots()
  models = list(next(iter(groups.values())))
  for k, model in enumerate(models):
    for i, rates in enumerate(groups.values()):
      if model not in rates:
        continue
      rate, y = rates[model], i + (k - (len(models) - 1) / 2) * 0.26
      axes.plot(
          [100 * rate["low"], 100 * rate["high"]], [y, y], color=_COLORS[model], linewidth=2.4, alpha=0.55,
          solid_capstyle="round")
      axes.plot(
          100 * rate["rate"], y, "o", color=_COLORS[model], markersize=6.5, label=_NAMES[model] if i == 0 else None)
  axes.set(xlim=(-2, 102), ylim=(len(groups) - 0.5, -0.5), xlabel=f"{label}, %")
  axes.set_yticks(range(len(groups)), list(groups))
  axes.tick_params(axis="y", length=0)
  axes.spines["left"].set_visible(False)
  axes.xaxis.grid(True, color=_INK, alpha=0.12)
  axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(models), borderaxespad=0)
  return figure


def _figure(figure: Figure, caption: str) -> str:
  settings = {"svg.fonttype": "none", "svg.hashsalt": caption, "font.family": "sans-serif", "font.size": 10}
  with rc_context(settings):
    for axes in figure.axes:
      axes.patch.set_alpha(0)
      axes.tick_params(colors=_INK)
      axes.xaxis.label.set_color(_INK)
      axes.yaxis.label.set_color(_INK)
      axes.spines[["top", "right"]].set_visible(False)
      axes.spines[["left", "bottom"]].set_color(_INK)
      for text in axes.get_legend().get_texts():
        text.set_color(_INK)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
  drawing = buffer.getvalue()
  drawing = drawing[drawing.index("<svg"):].replace(_INK, "currentColor")
  drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
  return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>\n"
