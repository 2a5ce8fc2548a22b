"""The folder of an evaluation, and what is read from it.

  attempts.jsonl        what each attack makes of each behavior; one line a behavior
  responses.jsonl       what each model answers; one line a response
  judgements/JUDGE.jsonl    what each judge says of each response
  metrics.json          what `metrics.metrics_of` makes of these
  evaluation.json       what is evaluated: config, checkpoint, a digest of the files; another evaluation's is refused

  python -m saess_jax.evaluation OUT_A OUT_B      what differs between two of them, behavior by behavior
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

from saess_jax import metrics as metrics_lib
from saess_jax import staging, suites
from saess_jax.config import SafetyConfig
from saess_jax.records import Records

KEYS = ("suite", "method", "model", "index", "attempt")  # What tells one response from all others.


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
      name: {key_of(record): record["judgement"] for record in judgements(workdir, name).read()} for name in names}
  return [
      row | {"judgements": {name: found[name][key_of(row)] for name in names}}
      for row in read_responses(workdir) if all(key_of(row) in found[name] for name in names)]


def read_claim(workdir: str | pathlib.Path) -> dict[str, Any]:
  """evaluation.json: "config" (of the last command, without judges), "models" (their identity), "rows" and files.

  Raises:
    ValueError: there is none.
  """
  path = pathlib.Path(workdir).expanduser() / "evaluation.json"
  if not path.exists():
    raise ValueError(f"{workdir} holds no evaluation; expected the --workdir of one (eval.py).")
  return json.loads(path.read_text())


def read_responses(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """What `read_results` says of responses; in the order of suites and attacks, whichever was answered first."""
  workdir = pathlib.Path(workdir).expanduser()
  if not (workdir / "evaluation.json").exists():
    return []
  config, first = read_claim(workdir)["config"], {}
  names, attacks = suites.names(config["suites"]), config["attacks"]
  for record in Records(workdir / "responses.jsonl").read():
    if record["method"] in attacks or record["label"] == 0:  # Benign ones are direct, whether that is an attack or not.
      first.setdefault(key_of(record), record)
  place = lambda row: (names.index(row["suite"]), ["direct", *attacks].index(row["method"]))
  return sorted(first.values(), key=place)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
  """The values of KEYS, of a response or a judgement."""
  return tuple(record[key] for key in KEYS)


def judgements(workdir: pathlib.Path, judge: str) -> Records:
  """The records of what one judge said there."""
  return Records(workdir / "judgements" / (urllib.parse.quote(judge, safe=":") + ".jsonl"))


def claim_workdir(workdir: pathlib.Path, claim: dict[str, Any]) -> None:
  """Says in evaluation.json what is evaluated there; files of attacks that an earlier command named stay named.

  Raises:
    ValueError: it says already that something else is.
  """
  path = workdir / "evaluation.json"
  if path.exists():
    theirs = read_claim(workdir)
    different = [f"{name} is {now!r} now and {then!r} there" for name, now, then in differences(claim, theirs)]
    if claim["rows"] != theirs["rows"]:
      different.append(f"the digest of the prompts is {claim['rows']!r} now and {theirs['rows']!r} there")
    if different:
      raise ValueError(
          f"{workdir} holds another evaluation: {'; '.join(different)}. Choose another --workdir, or give the config "
          "of that evaluation to resume it.")
    claim = claim | {"attack files": theirs.get("attack files", {}) | claim["attack files"]}
  staging.write_text(path, json.dumps(claim, indent=2) + "\n")


def differences(claim: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
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
  parser = argparse.ArgumentParser(prog="python -m saess_jax.evaluation", description="Compares two evaluations.")
  parser.add_argument("workdirs", nargs=2, metavar="OUT", help="workdirs of two evaluations (eval.py)")
  parser.add_argument("--judge", default="rules", help="whose verdicts count; it has to have judged both")
  options = parser.parse_args(argv)
  try:
    claim, other = map(read_claim, options.workdirs)
    a, b = (_judged(workdir, options.judge) for workdir in options.workdirs)
    same = {key: _same_files({row[key] for row in a}, {row[key] for row in b}) for key in ("suite", "method")}
    b = [row | {key: names.get(row[key], row[key]) for key, names in same.items()} for row in b]
    other["attack files"] = {
        same["method"].get(name, name): digest for name, digest in other.get("attack files", {}).items()}
    different = differences(claim, other)
    print(metrics_lib.compare(a, b, options.judge))
  except ValueError as error:
    raise SystemExit(f"{error} (A: {options.workdirs[0]}, B: {options.workdirs[1]})") from None
  if different:
    print("A and B differ in " + ", ".join(f"{name} ({ours!r}, {theirs!r})" for name, ours, theirs in different) + ".")


def _judged(workdir: str, judge: str) -> list[dict[str, Any]]:
  """`read_results` of one judge; ValueError if it has not judged all that is there."""
  rows, there = read_results(workdir, [judge]), read_responses(workdir)
  if not rows or len(rows) < len(there):  # Of some attempts "any" says less than of all.
    count = f"{len(rows)} of {len(there)} responses" if rows else "nothing"
    raise ValueError(
        f"{judge} has judged {count} in {workdir}; ask for another --judge, or give that evaluation's command again "
        f"with --config.judges=\"('{judge}',)\": it needs no new responses.")
  return rows


def _same_files(ours: set[str], theirs: set[str]) -> dict[str, str]:
  """Their suites or attacks -> ours, of files that lie elsewhere: what both have once, by the last part of its path."""
  last = lambda names: {suites.last_part(name): name for name in sorted(names)}
  alone = [last(names) if len(last(names)) == len(names) else {} for names in (ours - theirs, theirs - ours)]
  return {alone[1][name]: alone[0][name] for name in alone[0].keys() & alone[1].keys()}


if __name__ == "__main__":
  main()
