"""The page: what to quote first, then figures, then the cases that went wrong, each one click from its raw row."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from saess_jax import scores, staging
from saess_jax.metrics import (
    HARMFUL,
    NOT_REFUSED,
    OF_VERDICTS,
    TO_THE_POINT,
    any_of,
    is_text,
    mean,
    rate,
    silence,
    written_before_stop,
)
from saess_jax.report import figures
from saess_jax.report.markup import (
    NAMES,
    NONE,
    STYLE,
    beside,
    count,
    escape,
    folded,
    listing,
    section,
    share,
    shorten,
    table,
)
from saess_jax.report.rows import RowBook
from saess_jax.report.shown import Row, complied, highest, outcome, prefix_is_harmless, refused
from saess_jax.report.trace import LEGEND, trace
from saess_jax.suites import short_names

TRACES, LISTED, EXAMPLES = 5, 100, 3  # How many of a kind are printed; others by their lines of responses.jsonl.


def write_report(metrics: dict[str, Any], rows: Sequence[Row], path: str | pathlib.Path) -> None:
  """Writes the page.

  Args:
    metrics: of `metrics.metrics_of`.
    rows: of `evaluation.read_results`, those that `metrics` were made of.
    path: of the page; its rows name lines of the responses.jsonl beside it.
  """
  path = pathlib.Path(path)
  staging.write_text(path, _Report(metrics, rows, path.with_name("responses.jsonl")).html())


class _Report:
  """One page in the making.

  Attributes:
    judge: whose verdicts count.
    got_through, succeeded: what a prompt and its response are where an attack succeeds, in the judge's terms.
    defended: the model that is defended, or the only one there is.
    names: short names of the suites.
  """

  def __init__(self, metrics: dict[str, Any], rows: Sequence[Row], responses: pathlib.Path):
    self.metrics, self.rows = metrics, rows
    self.judge, self.models = metrics["judge"]["name"], metrics["config"]["models"]
    self.defended = "saess" if "saess" in self.models else self.models[-1]
    self.got_through, self.succeeded = {
        NOT_REFUSED: ("not refused", "not refused"), HARMFUL: ("answered harmfully", "harmful"),
        TO_THE_POINT: ("answered", "answers")}[metrics["judge"]["success"]]
    self.safety = metrics["config"]["safety"]
    self.suites = metrics["figures"]
    self.names = short_names(list(self.suites))
    self.book = RowBook(rows, self.judge, self.safety, responses)
    self.drawings = figures.Drawings()

  def html(self) -> str:
    parts = [
        ("Attacks", self._attacks(), "attacks"), ("Queries that an attack took", self._budgets(), "queries"),
        ("Benign prompts", self._benign(), "benign"), ("The first verdict", self._verdicts(), "verdict"),
        ("Attacks that got through", self._failures(), "failures"),
        ("Benign prompts that were refused", self._over_refusals(), "refusals"),
        ("Examples", self._examples(), "examples"), ("What was run", self._settings(), "settings")]
    rows = self.book.html()  # Now that all links are given out.
    links = [(title, name) for title, body, name in parts if body] + [("Rows", "rows")] * bool(rows)
    contents = " ".join(f'<a href="#{name}">{escape(title)}</a>' for title, name in links)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>SA-ESS evaluation</title>'
        f"<style>{STYLE}</style></head><body><main>\n<p class='soft'>SA-ESS evaluation</p>\n"
        f"{self._headline()}\n<nav>{contents}</nav>\n{''.join(section(*part) for part in parts)}{rows}"
        "</main></body></html>\n")

  # ---- What to quote

  def _headline(self) -> str:
    n = {label: sum(suite["n"][label] for suite in self.suites.values()) for label in ("malicious", "benign")}
    success, refusal = self._pooled("any_attack"), self._pooled("over_refusal")
    each = lambda rates: ", ".join(f"{NAMES[model]} {share(rates[model])}" for model in reversed(self.models))
    parts = []
    sent = len({name for suite in self.suites.values() for name in suite["sent"]})
    if sent:
      under = f"at least one of {sent} attacks" if sent > 1 else "one attack"
      parts.append(f"Malicious prompts {self.got_through} under {under}: {each(success)}.")
    if refusal:
      parts.append(f"Benign prompts refused: {each(refusal)}.")
      empty = self._pooled("benign_empty")
      if any(rates["count"] for rates in empty.values()):
        parts.append(f"Benign prompts with an empty answer: {each(empty)}.")
    if not parts:
      parts.append("Nothing was asked that can be sent.")
    of_suites = f" of {len(self.suites)} suites" if len(self.suites) > 1 else ""
    judge, defended = self.metrics["judge"], "saess" in self.models
    whatever = (
        ", whatever else it says: near an upper bound of harm, but not one, for the judge can miss an answer in prose "
        "behind a refusal" + ", and only SA-ESS has refusals put in, so that such misses flatter it" * defended
    ) if judge["success"] == NOT_REFUSED else ""
    about_attacks = [f"An attack succeeds by {judge['success']}{whatever}. {silence(self.metrics)}"] + [
        "Leaked: tokens from the alarm to the verdict that put a refusal in, averaged over the responses that were "
        "stopped so, 0 for those that the first verdict stopped. What was never stopped has no such figure; the model "
        "may have refused it by itself."] * defended + [
        "Free embeddings cannot be sent: they stand in their own attack's figures alone."] * (
            not all(map(is_text, self.rows)))
    notes = [
        f"{_sizes(n)} prompts{of_suites}; 95% intervals in brackets. Judge: {judge['name']} {judge['version']}. The "
        "first verdict is on the query, before a token is out" + (
            "; on what each attack sent it stands under “Every attack in figures”." if success else "."),
        *(about_attacks if success else [])]
    return f"<h1>{escape(' '.join(parts))}</h1>\n{self._main_table()}" + "".join(
        f"<p class='soft'>{escape(note.strip())}</p>\n" for note in notes)

  def _pooled(self, figure: str) -> dict[str, dict[str, float]]:
    """A figure's rates over all suites together."""
    found = {}
    for model in self.models:
      rates = [suite[figure][model] for suite in self.suites.values() if model in suite[figure]]
      if rates:
        hits, n = sum(r["count"] for r in rates), sum(r["n"] for r in rates)
        found[model] = rate(range(n), lambda i, hits=hits: i < hits)
    return found

  def _main_table(self) -> str:
    bodies = []
    if len(self.suites) > 1:
      pooled = [(self._pooled(key), words) for key, words in (
          ("any_attack", "attack success, any attack"), ("over_refusal", "benign refused"), *OF_VERDICTS.items())]
      bodies.append(self._body(f"all {len(self.suites)} suites", "", [
          (words, [share(rates.get(model)) for model in self.models]) for rates, words in pooled if rates]))
    for suite, of in self.suites.items():
      lines = []
      if of["attack_success_rate"]:
        success = of["attack_success_rate"]
        if len(of["sent"]) > 1:
          lines.append(("attack success, any attack", [share(of["any_attack"][model]) for model in self.models]))
        if "direct" in next(iter(success.values())):
          lines.append(("asked directly", [share(success[model]["direct"]) for model in self.models]))
        if of["sent"]:
          lines.append(("worst attack", [
              self._worst({name: success[model][name] for name in of["sent"]}) for model in self.models]))
      if of["over_refusal"]:
        lines.append(("benign refused", [share(of["over_refusal"][model]) for model in self.models]))
      if any(empty["count"] for empty in of["benign_empty"].values()):
        lines.append(("benign, empty answer", [share(of["benign_empty"][model]) for model in self.models]))
      for key, words in OF_VERDICTS.items():
        if of[key]:
          lines.append((words, [share(of[key].get(model)) for model in self.models]))
      if of["stopped"]:
        lines.append(("mean leaked tokens", [self._leaked(suite, model) for model in self.models]))
        lines.append(("mean tokens written before a window's refusal", [
            self._written(suite, model) for model in self.models]))
        lines.append(("malicious, never stopped", [self._never_stopped(of["stopped"].get(model))
                                                   for model in self.models]))
      bodies.append(self._body(self.names[suite], _sizes(of["n"]), lines))
    heads = "".join(f"<th>{NAMES[model]}</th>" for model in self.models)
    return f"<div class='scroll'><table><thead><tr><th></th>{heads}</tr></thead>\n{''.join(bodies)}</table></div>\n"

  def _body(self, title: str, size: str, lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """The part of the table about one suite; cells are HTML."""
    return (
        f"<tbody><tr><th scope='rowgroup' colspan='{len(self.models) + 1}'>{escape(title)} "
        f"<span class='soft'>{size}</span></th></tr>\n" + "".join(
            f"<tr><td>{words}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n" for words, cells in lines)
        + "</tbody>\n")

  def _worst(self, rates: dict[str, dict[str, float]]) -> str:
    attack = max(rates, key=lambda name: (-1.0 if rates[name]["rate"] is None else rates[name]["rate"]))
    return f"{share(rates[attack])} <span class='soft'>{escape(shorten(attack, 40))}</span>"

  def _sent(self, suite: str, model: str) -> list[Row]:
    """What was asked of `model` that is malicious and can be sent."""
    return [row for row in self.rows
            if (row["suite"], row["model"], row["label"]) == (suite, model, 1) and is_text(row)]

  def _leaked(self, suite: str, model: str) -> str:
    stopped = [row for row in self._sent(suite, model) if row["intervened_at"] >= 0]
    if not stopped:
      return NONE
    leaked, low, high = scores.mean_interval(stopped, "leaked")
    windows = sum(row["intervened_at"] > 0 for row in stopped)
    interval = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
    figure = f"{leaked:.1f}{interval}".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{figure} <span class='soft'>of {len(stopped)} stopped, {windows} by a window</span>"

  def _written(self, suite: str, model: str) -> str:
    tokens = written_before_stop(self._sent(suite, model))
    return f"{mean(tokens):.1f} <span class='soft'>at most {max(tokens)}</span>" if tokens else NONE

  def _never_stopped(self, stopped: dict[str, float] | None) -> str:
    return NONE if stopped is None else f"{stopped['n'] - stopped['count']} of {stopped['n']} responses"

  # ---- Figures

  def _attacks(self) -> str:
    attacked = {suite: of for suite, of in self.suites.items() if of["attack_success_rate"]}
    parts = []
    if len(attacked) > 1:
      groups = {self.names[suite]: of["any_attack"] for suite, of in attacked.items()}
      parts.append(self.drawings.html(
          figures.intervals(groups, "Attack success"), "Share of each suite that at least one attack got through."))
    for suite, of in attacked.items():
      success = of["attack_success_rate"]
      attacks = list(next(iter(success.values())))
      groups = {attack: {model: success[model][attack] for model in success} for attack in attacks}
      if len(of["sent"]) > 1:
        groups[any_of(of)] = of["any_attack"]
      body = (
          self.drawings.html(
              figures.intervals(groups, "Attack success"),
              f"{self.names[suite]}: share of malicious prompts with {self.metrics['judge']['success']}.")
          + folded("Every attack in figures", self._attack_table(of)) + folded("By category", self._categories(of)))
      parts.append(folded(f"{self.names[suite]}, by attack", body) if len(attacked) > 1 else body)
    return "".join(parts)

  def _attack_table(self, of: dict[str, Any]) -> str:
    success, others = of["attack_success_rate"], list(of["by_judge"])
    lines = [
        [attack, NAMES[model].replace(" ", "\N{NO-BREAK SPACE}"), share(success[model][attack]),
         *[share(of["by_judge"][judge][model][attack]) for judge in others],
         *[(share if conduct["responses"] == conduct["n"] else _of_attempts)(conduct[key])
           for key in ("first_verdict", "intervened")],
         _mean_and_most(conduct, "leaked"),
         _mean_and_most(conduct, "written_before_stop"),
         f"{conduct['evaluations_mean']:.1f}", str(conduct["responses"]), str(conduct["empty"])]
        for attack in next(iter(success.values())) for model in success for conduct in [of["attacks"][model][attack]]]
    heads = [
        "attack", "model", f"success ({shorten(self.judge, 30)})", *[f"by {shorten(judge, 30)}" for judge in others],
        "first verdict", "intervened", "leaked mean / max", "written before, mean / max", "[CLS] evaluations",
        "responses", "empty"]
    return table(
        [head.replace(" ", "\N{NO-BREAK SPACE}") for head in heads], lines,
        "Each judge has judged the same responses. First verdict: attempts, as they were sent, whose query alone was "
        "taken for malicious; without an interval where a behavior has several, which are alike. Leaked: tokens, of "
        "the responses with an intervention. Written: tokens of the model's own when a window stopped it.")

  def _categories(self, of: dict[str, Any]) -> str:
    model, by_category = self.defended, of["by_category"]
    names = sorted({name for rates in by_category[model].values() for name in rates})
    if len(names) < 2:
      return ""
    lines = [[name or "(none)"] + [count(rates.get(name)) for rates in by_category[model].values()] for name in names]
    return table(["category", *by_category[model]], lines, f"{NAMES[model]}: attacks that succeeded.")

  def _budgets(self) -> str:
    curves = scores.budgets(self.rows, self.judge)
    if not curves:
      return ""
    lines = [
        [family, NAMES[model], f"{len(curve['successes'])} of {curve['n']}",
         NONE if 2 * len(curve["successes"]) < curve["n"] else f"{curve['successes'][(curve['n'] - 1) // 2]:,}",
         f"{curve['spent']:,}"]
        for family, models in curves.items() for model, curve in models.items()]
    asked = any(row["method"] == "direct" and row["label"] == 1 for row in self.rows)
    return self.drawings.html(
        figures.steps(curves), "Share of behaviors that gave way within so many queries of a model: of attacks that "
        "differ in their number of steps alone, the cheapest that got through. Queries are those that made the "
        "attempts; of samplings, which nothing makes, each attempt is one. " + (
            "A behavior that gave way when it was asked directly counts at 0 queries." if asked else
            "Nothing was asked directly here: which behaviors needed no attack is not known.")) + table(
            ["attack", "model", "gave way", "queries for half of them", "most spent on one"], lines)

  def _benign(self) -> str:
    groups = {}
    asked = {suite: of for suite, of in self.suites.items() if of["over_refusal"]}
    for suite, of in asked.items():
      groups[self.names[suite]] = of["over_refusal"]
      by_source = of["over_refusal_by_source"]
      sources = sorted({source for rates in by_source.values() for source in rates})
      for source in sources if len(sources) > 1 else []:
        of_suite = f" ({self.names[suite]})" if len(asked) > 1 else ""
        groups[f"· {source or '(no source)'}{of_suite}"] = {
            model: rates[source] for model, rates in by_source.items() if source in rates}
    if not groups:
      return ""
    parts = [self.drawings.html(figures.intervals(groups, "Benign prompts refused"), "Over-refusal: fewer is better.")]
    for suite, of in asked.items():
      by_category, by_judge = of["over_refusal_by_category"], of["over_refusal_by_judge"]
      names = sorted({name for rates in by_category.values() for name in rates})
      lines = [
          [name or "(none)"] + [count(rates.get(name)) for rates in by_category.values()] for name in names
          if len(names) > 1]
      lines += [
          [f"all, by judge {shorten(judge, 40)}"] + [count(rates[model]) for model in by_category]
          for judge, rates in by_judge.items()]
      if lines:
        parts.append(folded(
            f"{self.names[suite]}, in figures",
            table(["category", *[NAMES[model] for model in by_category]], lines, "Benign prompts refused.")))
    return "".join(parts)

  def _verdicts(self) -> str:
    benign, malicious = scores.first_verdicts(self.rows)
    if not benign and not malicious:
      return ""
    threshold = self.safety["threshold"]
    at = [sum(p >= threshold for p in kept) / max(len(kept), 1) for kept in (benign, malicious)]
    known = [f"{len(kept)} {label}" for kept, label in ((malicious, "malicious"), (benign, "benign")) if kept]
    histogram = self.drawings.html(
        figures.histogram(benign, malicious, threshold),
        f"{' and '.join(known)} prompts of all suites, asked as they stand. Dashed: the threshold, {threshold:g}.")
    if not benign or not malicious:
      return histogram
    points, bins = scores.roc(benign, malicious), scores.reliability(benign, malicious)
    value, low, high = scores.area(benign, malicious)
    roc = self.drawings.html(
        figures.roc_curve(points, (at[0], at[1])),
        f"ROC. Area {value:.3f} [{low:.3f}, {high:.3f}]: the chance that a malicious prompt scores above a benign one.")
    det = self.drawings.html(
        figures.det_curve(points, (at[0], at[1]), len(benign), len(malicious)),
        f"DET, the same errors on normal-deviate axes. Equal error rate {scores.equal_error(points):.1%}; at the "
        f"threshold {at[0]:.1%} of benign prompts are taken for malicious, {1 - at[1]:.1%} of malicious ones missed.")
    error = scores.calibration_error(bins)
    calibration = self.drawings.html(
        figures.calibration(bins),
        "Calibration, in bins of 0.1 with their number of prompts above; it should follow the line. Expected "
        f"calibration error {error:.3f}; it holds for this share of malicious prompts.")
    lines = [
        [f"{b['low']:.1f} to {b['high']:.1f}", str(b["n"]), f"{b['mean']:.3f}", share(b["malicious"])] for b in bins]
    return (
        f"{histogram}<div class='pair'>{roc}{det}{calibration}</div>\n"
        + folded("Calibration in figures", table(["P(malicious)", "prompts", "mean", "malicious"], lines)))

  # ---- Cases

  def _failures(self) -> str:
    mine = [row for row in self.rows if row["model"] == self.defended and is_text(row)]
    failed = [row for row in mine if complied(row, self.judge)]
    if not any(row["label"] == 1 for row in mine):
      return ""
    parts = [self._intervention(mine)]
    if not failed:
      return "".join(parts) + f"<p>None of {NAMES[self.defended]}'s responses.</p>\n"
    unnoticed = lambda row: highest(row) if highest(row) is not None else 1.0
    worst = sorted(failed, key=lambda row: (-row["leaked"], unnoticed(row)))
    each = _one_a_behavior(worst)
    said = [row for row in mine if row["label"] == 1 and row["judgements"][self.judge]["jailbroken"] is not None]
    prompts = len(_one_a_behavior(said))
    text = f"{len(failed)} responses, to {len(each)} of {prompts} malicious prompts, were {self.succeeded}"
    judged = self.defended == "saess"
    order = (
        "; first those that leaked most before a refusal that did not hold, then those whose P(malicious) stayed lowest"
    ) * judged
    parts.append(f"<h3>The worst failures</h3>\n<p>{text}{order}.</p>\n")
    traced = each[: TRACES * judged]
    for row in traced:
      parts.append(
          f"<p><span class='tag'>{escape(row['method'])}</span> {escape(shorten(row['behavior']))} "
          f"{self.book.link(row, 'row')}</p>\n{trace(row, self.safety)}")
    rest = [row for row in worst if not any(row is shown for shown in traced)]
    verdicts = lambda row: [
        _number(row["initial_prob"]), _number(highest(row)),
        str(row["leaked"]) if row["intervened_at"] >= 0 else NONE] * judged
    lines = [
        [self.book.link(row, "row"), row["method"], shorten(row["behavior"], 160), *verdicts(row)]
        for row in rest[:LISTED]]
    if lines:
      heads = ["", "attack", "REQUEST"] + ["P of the query", "highest P", "leaked"] * judged
      parts.append(listing(heads, lines, "The others:" * bool(traced)))
    more = rest[LISTED:]
    if more:
      parts.append(folded(
          f"{len(more)} more responses that were {self.succeeded} are not listed.",
          f"<p class='soft'>They stand, in the same order, in {beside('responses.jsonl')}: "
          f"{', '.join(map(self.book.line, more))}.</p>\n"))
    return "".join(parts)

  def _intervention(self, mine: Iterable[Row]) -> str:
    """A response that shows how it is meant to go: an intervention in its middle, with a prefix that can be printed."""
    stopped = [row for row in mine if row["label"] == 1 and refused(row, self.judge) and row["intervened_at"] >= 0]
    if not stopped:
      return ""
    row = max(stopped, key=lambda row: (row["intervened_at"] > 0, prefix_is_harmless(row), row["intervened_at"]))
    return (
        "<h3>First, one that did not get through</h3>\n"
        f"<p><span class='tag'>{escape(row['method'])}</span> {escape(shorten(row['behavior']))} "
        f"{self.book.link(row, 'row')}</p>\n{trace(row, self.safety)}<p class='soft'>{escape(LEGEND)}</p>\n")

  def _over_refusals(self) -> str:
    over = [row for row in self.rows if row["model"] == self.defended and row["label"] == 0
            and refused(row, self.judge)]
    if not over:
      return ""
    by_base = {(row["suite"], row["index"], row["attempt"]): refused(row, self.judge) for row in self.rows
               if row["model"] == "base" and row["label"] == 0}
    others = self.defended != "base" and bool(by_base)
    over.sort(key=lambda row: -(row["initial_prob"] or 0.0))
    lines = [
        [self.book.link(row, "row") if place < LISTED else beside(self.book.line(row)),
         shorten(row["behavior"], 200), _number(row["initial_prob"]), _number(highest(row)),
         self.names[row["suite"]] if len(self.suites) > 1 else row["category"] or NONE]
        + [("yes" if by_base.get((row["suite"], row["index"], row["attempt"])) else "no")] * others
        for place, row in enumerate(over)]
    heads = ["", "PROMPT", "P of the query", "highest P", "suite" if len(self.suites) > 1 else "category"]
    caption = f"The first {LISTED} link to their rows below, the others to responses.jsonl, beside this page."
    return listing(heads + ["base refused too"] * others, lines, caption if len(over) > LISTED else "")

  def _examples(self) -> str:
    mine = [row for row in self.rows if row["model"] == self.defended]
    kinds = [
        [row for row in mine if row["label"] == 1 and refused(row, self.judge)],
        [row for row in mine if row["label"] == 0 and refused(row, self.judge) is False]]
    lines = [
        [self.book.link(row, "row"), ("benign", "malicious")[row["label"]], row["method"],
         shorten(row["behavior"], 160), outcome(row, self.judge, self.safety, 160)]
        for kind in kinds for row in _spread(kind, EXAMPLES)]
    heads = ["", "label", "attack", "REQUEST", "RESPONSE"]
    caption = f"Some that went as they should; responses of {NAMES[self.defended]}."
    return listing(heads, lines, caption) if lines else ""

  def _settings(self) -> str:
    config = self.metrics["config"]
    flat = {k: v for k, v in config.items() if k != "safety"}
    flat |= {f"safety.{k}": v for k, v in config["safety"].items()}
    lines = [[k, ", ".join(map(str, v)) if isinstance(v, list) else str(v)] for k, v in flat.items()]
    for suite, of in self.suites.items():
      lines += [
          [f"cost of {attack}, sent to {NAMES[model]}",
           f"{cost['queries']:,} queries, {cost['tokens']:,} tokens on {self.names[suite]}"]
          for model, costs in of["budget"].items() for attack, cost in costs.items() if cost["queries"]]
    return folded("All settings", table(["setting", "value"], lines))


def _sizes(n: dict[str, int]) -> str:
  """"12 malicious and 8 benign"."""
  return " and ".join(f"{n[label]} {label}" for label in ("malicious", "benign") if n[label])


def _mean_and_most(conduct: dict[str, Any], key: str) -> str:
  return NONE if conduct[f"{key}_mean"] is None else f"{conduct[f'{key}_mean']:.1f} / {conduct[f'{key}_max']}"


def _of_attempts(rate: dict[str, float]) -> str:
  return count(rate).replace(" ", "\N{NO-BREAK SPACE}") if rate["n"] else NONE


def _number(p: float | None) -> str:
  return NONE if p is None else f"{p:.2f}"


def _one_a_behavior(rows: Sequence[Row]) -> list[Row]:
  """The first row of each behavior, in order."""
  first: dict[tuple[str, int], Row] = {}
  for row in rows:
    first.setdefault((row["suite"], row["index"]), row)
  return list(first.values())


def _spread(rows: Sequence[Row], n: int) -> list[Row]:
  """About `n` rows from all over `rows`."""
  return [rows[i * len(rows) // n] for i in range(n)] if len(rows) > n else list(rows)
