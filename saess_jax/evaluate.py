"""Models under attacks, side by side, with the evidence kept beside every verdict.

Three steps over JSONL (`evaluation.py` says which files), each of which goes on where it was interrupted when the same
command is given again: what attacks make of behaviors, what models answer, what judges say. Another judge needs no new
responses.

Attacks and judges may be left out or added from one command to the next: what is there of the others stays, and figures
are made of those that the last command named. A lock keeps a second process out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm

from saess_jax import attacks as attacks_lib
from saess_jax import evaluation, generate, judges, staging, subjects
from saess_jax import metrics as metrics_lib
from saess_jax import suites as suites_lib
from saess_jax.config import EvalConfig
from saess_jax.data import sources
from saess_jax.records import Records
from saess_jax.subjects import Models


def evaluate(
    config: EvalConfig, workdir: str | pathlib.Path, load: Callable[[EvalConfig], Models] = subjects.load_models
) -> dict[str, Any]:
  """Runs what is not there yet, writes the files that `evaluation` names, prints a table and returns the metrics.

  Args:
    workdir: an empty or new folder, or one in which this same evaluation was begun (with these attacks and judges or
      others).
    load: gives the models.

  Raises:
    ValueError: an unknown attack, judge, model or suite, no rows, a prompt that does not fit the model's context with
      its response, an attack on a [CLS] that was not trained or a base that is not known, or a `workdir` that holds
      something else or that another process is at work in.
    FileNotFoundError: no such checkpoint or file.
  """
  _check(config)
  attacks = {name: attacks_lib.make_attack(name) for name in ("direct", *config.attacks)}  # Benign ones are direct.
  suites = suites_lib.load_suites(config)
  workdir = staging.local(workdir).absolute()
  begun = (workdir / "evaluation.json").exists()
  if not begun and (
      workdir.is_file() or workdir.is_dir() and any(entry.name != staging.LOCK for entry in workdir.iterdir())):
    raise ValueError(f"{workdir} is not empty and holds no evaluation; choose a new --workdir.")
  chosen = {name: judges.make_judge(name) for name in config.judges}  # A guard is read: behind what costs nothing.
  models = load(config)
  asking = [name for name, attack in attacks.items() if attack.asks_cls and not models.has_cls]
  if asking:
    raise ValueError(
        f"{config.checkpoint} has no trained [CLS] that {', '.join(asking)} could ask; leave it out of "
        "--config.attacks, or craft it on an SA-ESS run and give its file (file:PATH).")
  crafted = [name for name, attack in attacks.items() if attack.asks_base and not models.has_base]
  if crafted:
    raise ValueError(
        f"{', '.join(crafted)}: made on the base model, and what {config.checkpoint} was trained from is not known; "
        "leave it out of --config.attacks, or evaluate the run or the adapter, which name their base.")
  config = dataclasses.replace(config, safety=dataclasses.asdict(models.safety))
  claimed = {key: value for key, value in _plain(config).items() if key != "judges"}
  if not begun:
    for suite, method, indices in _plan(config, suites):
      if method == "direct":
        _check_fit(models.generator(config.models[0], config.max_new_tokens), suite,
                   [(suites[suite][i].prompt, "") for i in indices])
  workdir.mkdir(parents=True, exist_ok=True)
  with staging.alone(workdir):
    evaluation.claim_workdir(workdir, {
        "config": claimed, "rows": suites_lib.digest(suites), "models": models.identity,
        "attack files": {name: attack.content for name, attack in attacks.items() if attack.content}})
    attempts = _attempts(config, attacks, suites, models, Records(workdir / "attempts.jsonl"))
    _respond(config, suites, models, attempts, Records(workdir / "responses.jsonl"))
    responses = evaluation.read_responses(workdir)
    for name, judge in chosen.items():
      _judge(name, judge, responses, evaluation.judgements(workdir, name))
    metrics = metrics_lib.metrics_of(evaluation.read_results(workdir, config.judges), _plain(config))
    staging.write_text(workdir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
  print(metrics_lib.table(metrics))
  return metrics


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
      with _told_where(f"{suite}, {method}"):
        found = attack.attempts(
            [suites[suite][i].prompt for i in indices],
            _target(config, models, victim or config.models[0], suites[suite]))
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


def _target(config: EvalConfig, models: Models, victim: str, rows: Sequence[sources.Row]) -> attacks_lib.Target:
  query = lambda model, prompts, tokens: models.generator(model, max(tokens, config.max_new_tokens)).respond(
      list(prompts), max_new_tokens=tokens)
  any_model = models.generator(config.models[0], config.max_new_tokens)  # They read alike, and have the same context.
  return attacks_lib.Target(
      victim, any_model.tokenizer, query, models.weights, any_model.context, config.seed, models.safety,
      config.max_new_tokens, any_model.system_prompt, {row.prompt: row.target for row in rows if row.target})


def _respond(
    config: EvalConfig, suites: dict[str, list[sources.Row]], models: Models,
    attempts: dict[tuple[str, str, str, int], list[attacks_lib.Attempt]], records: Records) -> None:
  """Has every model answer what it has not answered yet, a few batches at a time."""
  there = {evaluation.key_of(record) for record in records.read()}
  groups: dict[Any, list[Any]] = {}  # What can share a batch.
  for (suite, method, model, index), made in attempts.items():
    for number, attempt in enumerate(made):
      if (suite, method, model, index, number) not in there:
        groups.setdefault((model, suite, method, attempt.sampling), []).append((index, number, attempt))
  for (_, suite, method, _), jobs in groups.items():
    any_model = next(iter(groups))[0]
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
            places=[generate.place_of(suite, method, index, number) for index, number, _ in chosen],
            soft_suffixes=[attempt.soft_suffix for *_, attempt in chosen])
        records.append(
            _record(suite, method, model, index, number, suites[suite][index], attempt, response)
            for (index, number, attempt), response in zip(chosen, responses, strict=True))
        bar.update(len(chosen))


def _check_fit(generator: Any, where: str, asked: Sequence[tuple[Any, str]]) -> None:
  """Raises ValueError, with `where` in it, unless each (prompt, prefix) leaves room for a response."""
  with _told_where(where):
    generator.check_fit(*zip(*asked))


@contextlib.contextmanager
def _told_where(where: str) -> Iterator[None]:
  """A ValueError gets `where` in front, and is raised on: where it began tells an unfit prompt from a defect
  (`command.py`)."""
  try:
    yield
  except ValueError as error:
    error.args = (f"{where}: {error}",)
    raise


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
  """Has one judge judge what it has not judged yet, or judged in another version or when it was another text."""
  there = {  # The last counts.
      evaluation.key_of(record): (record["judgement"]["version"], record.get("text")) for record in records.read()}
  done = lambda row, version="", text=None: version == judge.version and text in (None, _text_of(row))
  missing = [row for row in responses if not done(row, *there.get(evaluation.key_of(row), ()))]
  with tqdm.tqdm(total=len(missing), desc=f"judge {name}", unit="response", disable=not missing) as bar:
    for at in range(0, len(missing), judge.at_a_time):
      rows = missing[at : at + judge.at_a_time]
      write = lambda judged, rows=rows: records.append(
          {key: row[key] for key in evaluation.KEYS} | {
              "text": _text_of(row), "judgement": dataclasses.asdict(judgement)}
          for row, judgement in zip(rows, judged))
      try:
        write(judge.judge_many([
            judges.Exchange(  # Behind the prefix, or what rollback left of it.
                row["behavior"], row["response"], row["response"][: len(row["response"]) - len(row["generated"])])
            for row in rows]))
      except judges.ApiError as error:
        write(error.judged)  # What was paid for is kept.
        error.args = (f"{error} What {name} has judged is kept: the same command goes on once this is mended, and "
                      "gives the figures of other judges if --config.judges names these alone.",)
        raise
      bar.update(len(rows))


def _text_of(row: dict[str, Any]) -> str:
  """A digest of what judges read of a response, for one that was made again."""
  return hashlib.sha256(f"{row['behavior']}\n{len(row['generated'])}\n{row['response']}".encode()).hexdigest()[:12]


def _check(config: EvalConfig) -> None:
  for field in ("attacks", "models", "judges"):
    names = getattr(config, field)
    if isinstance(names, str) or not names or len(set(names)) != len(names):
      raise ValueError(f"{field} is {names!r}; expected a tuple of different names, at least one.")
  for name in config.judges:
    if len(evaluation.judgements(pathlib.Path(), name).path.name) > 240:
      raise ValueError(f"judge {name!r} has a name too long for a file of its own; give its weights by a shorter path.")
  for name in config.models:
    if name not in subjects.MODELS:
      raise ValueError(f"model is {name!r}; expected one of {', '.join(subjects.MODELS)}.")
  if config.max_new_tokens < 1 or config.batch_size < 1 or min(config.max_rows, config.seed) < 0:
    raise ValueError(
        f"max_new_tokens is {config.max_new_tokens}, batch_size {config.batch_size}, max_rows {config.max_rows}, seed "
        f"{config.seed}; expected at least 1, 1, 0 and 0.")


def _plain(config: EvalConfig) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(config)))
