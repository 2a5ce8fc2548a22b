"""Models under attacks, side by side, with the evidence kept beside every verdict.

Three steps over JSONL, each of which goes on where it was interrupted when the same command is given again:

  attempts.jsonl        what each attack makes of each behavior; one line a behavior
  responses.jsonl       what each model answers; one line a response
  judgements/JUDGE.jsonl    what each judge says of each response; another judge needs no new responses
  metrics.json          what `metrics.metrics_of` makes of these, written anew each time
  evaluation.json       what is evaluated: config, checkpoint, a digest of the files; another evaluation's is refused

Attacks and judges may be left out or added from one command to the next: what is there of the others stays, and figures
are made of those that the last command named. `lock` keeps a second process out.

  python -m saess_jax.evaluate OUT_A OUT_B      what differs between two evaluations, behavior by behavior
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from saess_jax import adapters, checkpoint, generate, judges, runs, staging
from saess_jax import attacks as attacks_lib
from saess_jax import metrics as metrics_lib
from saess_jax.config import EvalConfig, SafetyConfig, from_config_dict
from saess_jax.data import sources
from saess_jax.model import Llama
from saess_jax.records import Records

MODELS = ("base", "plain", "saess")


@dataclasses.dataclass(frozen=True)
class Models:
  """What is evaluated.

  Attributes:
    identity: says which weights these are, so that an evaluation is not resumed with others.
    has_cls: the trained weights come with a [CLS] that can be asked; a rival's do not.
    generator: (model, max_new_tokens) -> `generate.Generator` or what answers like one.
    weights: model -> what a white-box attacker reads.
    safety: what "saess" decodes by.
  """

  identity: str
  has_cls: bool
  generator: Callable[[str, int], Any]
  weights: Callable[[str], attacks_lib.Weights]
  safety: SafetyConfig


def load_models(config: EvalConfig) -> Models:
  """The model of `config.checkpoint` ("saess") and the weights that its training began with ("base").

  "base" is decoded plainly: nothing sees [CLS] and nothing intervenes; so are the trained weights as
  "plain". Weights that were trained from no others are their own base. Weights are read when they are first asked.

  Raises:
    ValueError, FileNotFoundError: no checkpoint is named, or there is none; a field of `config.safety` is wrong;
      "saess" of a rival's run.
  """
  path = config.checkpoint
  if not path:
    raise ValueError("checkpoint is empty; expected a training run, an adapter or other weights (--checkpoint PATH).")
  settings = checkpoint.settings_of(path)
  identity, trained, step = path, None, None
  if checkpoint.is_run(path):
    trained = runs.read_config(path)
    if trained.objective != "saess" and "saess" in config.models:
      raise ValueError(
          f"{path} trained with objective {trained.objective!r} and has no [CLS]; expected --config.models="
          "\"('base','plain')\", its weights decoded plainly.")
    checkpoints = checkpoint.Checkpoints(path)
    step = checkpoints.best_step()
    checkpoints.close()
    if step is None:
      raise FileNotFoundError(f"{checkpoints.folder} holds no checkpoint yet; let the training run reach one.")
    written = (checkpoints.folder / str(step)).stat().st_mtime  # A new run in its place?
    identity = f"step {step} of {datetime.datetime.fromtimestamp(written):%Y-%m-%d %H:%M:%S}"
  elif path.endswith(".safetensors"):
    identity = f"{path}, sha256 {hashlib.sha256(pathlib.Path(path).expanduser().read_bytes()).hexdigest()[:16]}"
  changes = {name: value for name, value in config.safety.items() if value is not None}
  safety = from_config_dict(SafetyConfig, dataclasses.asdict(settings) | changes)
  layout = checkpoint.layout_of(path)
  research = functools.cache(lambda: checkpoint.load_for_research(path, step)[:3])

  @functools.cache
  def weights(name: str) -> attacks_lib.Weights:
    if name != "base":
      return attacks_lib.Weights(*research(), safety if name == "saess" else None, **layout)
    if trained is not None:
      shape, params, tokenizer = checkpoint.load_base(trained)
      params = jax.tree.map(jnp.asarray, params)  # From the host once, and not at every call.
      return attacks_lib.Weights(Llama(shape), params, tokenizer, None, **layout)
    if path.endswith(".safetensors"):
      model, params, _, _ = checkpoint.load_for_research(adapters.load(path).base)
      return attacks_lib.Weights(model, params, research()[2], None, **layout)  # Asked in the adapter's template.
    return attacks_lib.Weights(*research(), None, **layout)

  @functools.cache  # A generator keeps what it has compiled.
  def generator(name: str, max_new_tokens: int) -> generate.Generator:
    asked = weights(name)
    return generate.Generator(
        asked.model, asked.params, asked.tokenizer, asked.safety, max_new_tokens=max_new_tokens,
        batch_size=config.batch_size, seed=config.seed, **layout)

  return Models(identity, trained is None or trained.objective == "saess", generator, weights, safety)


def evaluate(
    config: EvalConfig, workdir: str | pathlib.Path, load: Callable[[EvalConfig], Models] = load_models
) -> dict[str, Any]:
  """Runs what is not there yet, writes everything named above, prints a table and returns the metrics.

  Args:
    workdir: an empty or new folder, or one in which this same evaluation was begun (with these attacks and judges or
      others).
    load: gives the models.

  Raises:
    ValueError: an unknown attack, judge, model or suite, no rows, a prompt that does not fit the model's context with
      its response, an attack that asks the [CLS] of a rival, or a `workdir` that holds something else or
      that another process is at work in.
    FileNotFoundError: no such checkpoint or file.
  """
  _check(config)
  attacks = {name: attacks_lib.make_attack(name) for name in ("direct", *config.attacks)}  # Benign ones are direct.
  chosen = {name: judges.make_judge(name) for name in config.judges}
  suites = suites_of(config)
  workdir = pathlib.Path(workdir).expanduser().absolute()
  begun = (workdir / "evaluation.json").exists()
  if not begun and (
      workdir.is_file() or workdir.is_dir() and any(entry.name != staging.LOCK for entry in workdir.iterdir())):
    raise ValueError(f"{workdir} is not empty and holds no evaluation; choose a new --workdir.")
  models = load(config)
  asking = [name for name, attack in attacks.items() if attack.asks_cls and not models.has_cls]
  if asking:
    raise ValueError(
        f"{config.checkpoint} is a rival's run and has no [CLS] that {', '.join(asking)} could ask; leave it out of "
        "--config.attacks, or craft it on an SA-ESS run and give its file (file:PATH).")
  config = dataclasses.replace(config, safety=dataclasses.asdict(models.safety))
  claimed = {key: value for key, value in _plain(config).items() if key != "judges"}
  if not begun:
    for suite, method, indices in _plan(config, suites):
      if method == "direct":
        _check_fit(models.generator(config.models[0], config.max_new_tokens), suite,
                   [(suites[suite][i].prompt, "") for i in indices])
  workdir.mkdir(parents=True, exist_ok=True)
  with staging.alone(workdir):
    _claim_workdir(workdir, {"config": claimed, "rows": _digest(suites), "models": models.identity, "attack files": {
        name: attack.content for name, attack in attacks.items() if attack.content}})
    attempts = _attempts(config, attacks, suites, models, Records(workdir / "attempts.jsonl"))
    _respond(config, suites, models, attempts, Records(workdir / "responses.jsonl"))
    responses = _responses(workdir)
    for name, judge in chosen.items():
      _judge(name, judge, responses, _judgements(workdir, name))
    metrics = metrics_lib.metrics_of(read_results(workdir, config.judges), _plain(config))
    staging.write_text(workdir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
  print(metrics_lib.table(metrics))
  return metrics


def suites_of(config: EvalConfig) -> dict[str, list[sources.Row]]:
  """The rows of every suite that `config.suites` names, `config.max_rows` of each label at most.

  A suite is "embedded" (its test split), or a CSV or JSONL file with a prompt, goal, behavior, instruction or
  forbidden_prompt column: "file:PATH" (labels from its label column, all malicious without one), "malicious:PATH" or
  "benign:PATH" (rows of that label, all of them in a file without labels). A file of attacks, with a prompt column
  beside goal or behavior or a JailbreakBench artifact, is a suite of what these ask for.

  Raises:
    ValueError: an unknown suite, one without rows, or what `sources` raises.
  """
  suites = {}
  for suite in config.suites.split(","):
    kind, _, path = suite.partition(":")
    if suite == "embedded":
      rows = sources.embedded_rows("test")
    elif kind in ("file", *sources.LABELS) and path:
      rows = sources.read_requests(path, "malicious" if kind == "file" else kind)
      rows = [row for row in rows if kind in ("file", sources.LABELS[row.label])]
    else:
      raise ValueError(
          f"suite is {suite!r}; expected embedded, file:PATH, malicious:PATH or benign:PATH, or several of them with "
          "commas between them (a path cannot hold one).")
    suites[suite] = sources.draw_evenly(rows, config.max_rows, config.seed)
    if not rows:
      raise ValueError(f"Suite {suite} has no rows.")
  return suites


def read_results(workdir: str | pathlib.Path, judged_by: Sequence[str] = ()) -> list[dict[str, Any]]:
  """The responses of an evaluation that these judges have judged, each with its `judgements`; [] before it has begun.

  They are those to the attacks that its last command named, and each is there once, should its line be there twice: of
  responses the first counts, which judges read, and of judgements the last.

  Args:
    judged_by: names of judges; () for whichever there are.
  """
  workdir = pathlib.Path(workdir).expanduser()
  names = judged_by or sorted(urllib.parse.unquote(path.stem) for path in (workdir / "judgements").glob("*.jsonl"))
  found = {
      name: {_key(record): record["judgement"] for record in _judgements(workdir, name).read()} for name in names}
  return [
      row | {"judgements": {name: found[name][_key(row)] for name in names}}
      for row in _responses(workdir) if all(_key(row) in found[name] for name in names)]


def read_claim(workdir: str | pathlib.Path) -> dict[str, Any]:
  """evaluation.json: "config" (of the last command, without judges), "models" (their identity), "rows" and files.

  Raises:
    ValueError: there is none.
  """
  path = pathlib.Path(workdir).expanduser() / "evaluation.json"
  if not path.exists():
    raise ValueError(f"{workdir} holds no evaluation; expected the --workdir of one (eval.py).")
  return json.loads(path.read_text())


def _responses(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """What `read_results` says of responses; in the order of suites and attacks, whichever was answered first."""
  if not (workdir / "evaluation.json").exists():
    return []
  config, first = read_claim(workdir)["config"], {}
  suites, attacks = config["suites"].split(","), config["attacks"]
  for record in Records(workdir / "responses.jsonl").read():
    if record["method"] in attacks or record["label"] == 0:  # Benign ones are direct, whether that is an attack or not.
      first.setdefault(_key(record), record)
  place = lambda row: (suites.index(row["suite"]), ["direct", *attacks].index(row["method"]))
  return sorted(first.values(), key=place)


_KEYS = ("suite", "method", "model", "index", "attempt")


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
  return tuple(record[key] for key in _KEYS)


def _judgements(workdir: pathlib.Path, judge: str) -> Records:
  return Records(workdir / "judgements" / (urllib.parse.quote(judge, safe=":") + ".jsonl"))


def _plan(config: EvalConfig, suites: dict[str, list[sources.Row]]) -> list[tuple[str, str, list[int]]]:
  """(suite, attack, indices of its rows): malicious rows under every attack, benign ones asked directly."""
  plan = []
  for suite, rows in suites.items():
    malicious = [i for i, row in enumerate(rows) if row.label == 1]
    benign = [i for i, row in enumerate(rows) if row.label == 0]
    methods = {name: malicious for name in config.attacks}
    if benign:
      methods = {"direct": methods.pop("direct", []) + benign} | methods
    plan += [(suite, method, indices) for method, indices in methods.items() if indices]
  return plan


def _attempts(
    config: EvalConfig, attacks: dict[str, attacks_lib.Attack], suites: dict[str, list[sources.Row]], models: Models,
    records: Records
) -> dict[tuple[str, str, str, int], list[attacks_lib.Attempt]]:
  """(suite, method, model, index) -> attempts. An attack that is not adaptive is made once for all models."""
  identify = lambda record: tuple(record[key] for key in ("suite", "method", "victim", "index"))
  made = {identify(record): record["attempts"] for record in reversed(records.read())}  # The first counts.
  jobs = []
  for suite, method, indices in _plan(config, suites):
    attack = attacks[method]
    for victim in config.models if attack.adaptive else [""]:
      missing = [i for i in indices if (suite, method, victim, i) not in made]
      jobs += [(suite, method, attack, victim, missing[at : at + attack.at_a_time])
               for at in range(0, len(missing), attack.at_a_time)]
  with tqdm.tqdm(total=sum(len(indices) for *_, indices in jobs), desc="attacks", unit="behavior",
                 disable=not jobs) as bar:
    for suite, method, attack, victim, indices in jobs:
      bar.set_postfix_str(method)
      try:
        found = attack.attempts(
            [suites[suite][i].prompt for i in indices], _target(config, models, victim or config.models[0]))
      except ValueError as error:
        raise ValueError(f"{suite}, {method}: {error}") from error
      new = [{"suite": suite, "method": method, "victim": victim, "index": i,
              "attempts": [dataclasses.asdict(attempt) for attempt in attempts]}
             for i, attempts in zip(indices, found, strict=True)]
      records.append(new)
      made |= {identify(record): record["attempts"] for record in new}
      bar.update(len(indices))
  read = lambda record: attacks_lib.Attempt(
      **record | {"sampling": generate.SamplingConfig(**record["sampling"])})
  return {
      (suite, method, model, i): list(map(read, made[suite, method, model, i] if (suite, method, model, i) in made
                                          else made[suite, method, "", i]))
      for suite, method, indices in _plan(config, suites) for model in config.models for i in indices}


def _target(config: EvalConfig, models: Models, victim: str) -> attacks_lib.Target:
  query = lambda model, prompts, tokens: models.generator(model, max(tokens, config.max_new_tokens)).respond(
      list(prompts), max_new_tokens=tokens)
  base = models.generator("base", config.max_new_tokens)
  return attacks_lib.Target(victim, base.tokenizer, query, models.weights, base.context, config.seed)


def _respond(
    config: EvalConfig, suites: dict[str, list[sources.Row]], models: Models,
    attempts: dict[tuple[str, str, str, int], list[attacks_lib.Attempt]], records: Records) -> None:
  """Has every model answer what it has not answered yet, a few batches at a time."""
  there = {_key(record) for record in records.read()}
  groups: dict[Any, list[Any]] = {}  # What can share a batch.
  for (suite, method, model, index), made in attempts.items():
    for number, attempt in enumerate(made):
      if (suite, method, model, index, number) not in there:
        groups.setdefault((model, suite, method, attempt.sampling), []).append((index, number, attempt))
  for (_, suite, method, _), jobs in groups.items():
    any_model = next(iter(groups))[0]  # They read alike, and have the same context.
    _check_fit(models.generator(any_model, config.max_new_tokens), f"{suite}, {method}",
               [(attempt.prompt, attempt.prefix) for *_, attempt in jobs])
  with tqdm.tqdm(total=sum(map(len, groups.values())), desc="responses", unit="response", disable=not groups) as bar:
    for (model, suite, method, sampling), jobs in groups.items():
      bar.set_postfix_str(f"{method} {model}")
      generator = models.generator(model, config.max_new_tokens)
      # Alike in length, so that little padding is computed; the order says nothing about the answers.
      jobs.sort(key=lambda job: (len(job[2].prefix), len(str(job[2].prompt))))
      for at in range(0, len(jobs), 4 * config.batch_size):
        chosen = jobs[at : at + 4 * config.batch_size]
        responses = generator.respond(
            [attempt.prompt for *_, attempt in chosen], [attempt.prefix for *_, attempt in chosen], sampling=sampling,
            places=[_place(suite, method, index, number) for index, number, _ in chosen],
            soft_suffixes=[attempt.soft_suffix for *_, attempt in chosen])
        records.append(
            _record(suite, method, model, index, number, suites[suite][index], attempt, response)
            for (index, number, attempt), response in zip(chosen, responses, strict=True))
        bar.update(len(chosen))


def _check_fit(generator: Any, where: str, asked: Sequence[tuple[Any, str]]) -> None:
  """Raises ValueError, with `where` in it, unless each (prompt, prefix) leaves room for a response."""
  try:
    generator.check_fit(*zip(*asked))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _place(suite: str, method: str, index: int, number: int) -> int:
  """A number of its own for what is drawn in a response, whatever was asked before."""
  return int.from_bytes(hashlib.sha256(f"{suite}\n{method}\n{index}\n{number}".encode()).digest()[:4], "big") >> 1


def _record(
    suite: str, method: str, model: str, index: int, number: int, row: sources.Row, attempt: attacks_lib.Attempt,
    response: generate.Response) -> dict[str, Any]:
  number_of = lambda x: None if math.isnan(x) else round(x, 5)  # JSON has no NaN.
  return {
      "suite": suite, "method": method, "model": model, "index": index, "attempt": number, "label": row.label,
      "category": row.category, "source": row.source, "behavior": row.prompt, "prompt": attempt.prompt,
      "prefix": attempt.prefix, "variant": attempt.variant, "soft_tokens": len(attempt.soft_suffix),
      "sampling": dataclasses.asdict(attempt.sampling),
      "response": response.text, "generated": response.generated, "queries": attempt.queries,
      "query_tokens": attempt.tokens, "initial_prob": number_of(response.initial_prob),
      "intervened_at": response.intervened_at, "leaked": response.leaked, "evaluations": response.evaluations,
      "prefix_tokens": response.prefix_tokens, "tokens": response.tokens,
      "cls_prob": [number_of(p) for p in response.cls_prob], "phase": response.phase}


def _judge(
    name: str, judge: judges.Judge, responses: Sequence[dict[str, Any]], records: Records) -> None:
  """Has one judge judge what it has not judged yet, or judged in another version."""
  there = {_key(record): record["judgement"]["version"] for record in records.read()}  # The last counts.
  missing = [row for row in responses if there.get(_key(row)) != judge.version]
  with tqdm.tqdm(total=len(missing), desc=f"judge {name}", unit="response", disable=not missing) as bar:
    for at in range(0, len(missing), judge.at_a_time):
      rows = missing[at : at + judge.at_a_time]
      write = lambda judged, rows=rows: records.append(
          {key: row[key] for key in _KEYS} | {"judgement": dataclasses.asdict(judgement)}
          for row, judgement in zip(rows, judged))
      try:
        write(judge.judge_many([
            judges.Exchange(row["behavior"], row["response"], os.path.commonprefix([row["response"], row["prefix"]]))
            for row in rows]))  # Rollback may have cut the prefix short.
      except judges.ApiError as error:
        write(error.judged)  # What was paid for is kept.
        raise
      bar.update(len(rows))


def _check(config: EvalConfig) -> None:
  for field in ("attacks", "models", "judges"):
    names = getattr(config, field)
    if isinstance(names, str) or not names or len(set(names)) != len(names):
      raise ValueError(f"{field} is {names!r}; expected a tuple of different names, at least one.")
  for name in config.models:
    if name not in MODELS:
      raise ValueError(f"model is {name!r}; expected one of {', '.join(MODELS)}.")
  if config.max_new_tokens < 1 or config.batch_size < 1 or config.max_rows < 0:
    raise ValueError(
        f"max_new_tokens is {config.max_new_tokens}, batch_size {config.batch_size}, max_rows {config.max_rows}; "
        "expected at least 1, 1 and 0.")


def _plain(config: EvalConfig) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(config)))


def _digest(suites: dict[str, list[sources.Row]]) -> str:
  return hashlib.sha256(json.dumps({
      suite: [dataclasses.astuple(row) for row in rows] for suite, rows in suites.items()}).encode()).hexdigest()


def _claim_workdir(workdir: pathlib.Path, claim: dict[str, Any]) -> None:
  """Says in evaluation.json what is evaluated there; files of attacks that an earlier command named stay named.

  Raises:
    ValueError: it says already that something else is.
  """
  path = workdir / "evaluation.json"
  if path.exists():
    theirs = read_claim(workdir)
    different = [f"{name} is {now!r} now and {then!r} there" for name, now, then in _differences(claim, theirs)]
    if claim["rows"] != theirs["rows"]:
      different.append(f"the digest of the prompts is {claim['rows']!r} now and {theirs['rows']!r} there")
    if different:
      raise ValueError(
          f"{workdir} holds another evaluation: {'; '.join(different)}. Choose another --workdir, or give the config "
          "of that evaluation to resume it.")
    claim = claim | {"attack files": theirs.get("attack files", {}) | claim["attack files"]}
  staging.write_text(path, json.dumps(claim, indent=2) + "\n")


def _differences(claim: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
  """(setting, here, there) of all that makes another evaluation, its prompts aside; a row names its own attack."""
  defaults = dataclasses.asdict(SafetyConfig())  # Of settings that an older evaluation did not know.
  flat = lambda config: config | {f"safety.{name}": value for name, value in (defaults | config["safety"]).items()}
  settings, others = flat(claim["config"]), flat(other["config"])
  files, other_files = claim.get("attack files", {}), other.get("attack files", {})
  pairs = [(name, settings.get(name), others.get(name)) for name in settings | others
           if name not in ("attacks", "safety")]
  pairs += [(f"the digest of {name}", files[name], other_files[name]) for name in files if name in other_files]
  pairs.append(("the model", claim["models"], other["models"]))
  return [pair for pair in pairs if pair[1] != pair[2]]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m saess_jax.evaluate", description="Compares two evaluations.")
  parser.add_argument("workdirs", nargs=2, metavar="OUT", help="workdirs of two evaluations (eval.py)")
  parser.add_argument("--judge", default="rules", help="whose verdicts count; it has to have judged both")
  options = parser.parse_args(argv)
  try:
    different = _differences(*map(read_claim, options.workdirs))
    a, b = (_judged(workdir, options.judge) for workdir in options.workdirs)
    print(metrics_lib.compare(a, b, options.judge))
  except ValueError as error:
    raise SystemExit(f"{error} (A: {options.workdirs[0]}, B: {options.workdirs[1]})") from None
  if different:
    print("A and B differ in " + ", ".join(f"{name} ({ours!r}, {theirs!r})" for name, ours, theirs in different) + ".")


def _judged(workdir: str, judge: str) -> list[dict[str, Any]]:
  """`read_results` of one judge; ValueError if it has judged nothing there."""
  rows = read_results(workdir, [judge])
  if not rows:
    raise ValueError(
        f"{judge} has judged nothing in {workdir}; ask for another --judge, or give that evaluation's command again "
        f"with --config.judges=\"('{judge}',)\": it needs no new responses.")
  return rows


if __name__ == "__main__":
  main()
