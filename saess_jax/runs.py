"""Whose a workdir is: the config, the data and the weights that a training run began with. Another run's are refused.

  config.json    the TrainConfig
  data.json      rows and digest of each split
  base.json      what tells the weights that it began from, and its chat template
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from saess_jax import config as config_lib
from saess_jax import staging
from saess_jax.config import TrainConfig
from saess_jax.data import sources


def is_run(path: str | pathlib.Path) -> bool:
  """Whether `path` is the workdir of a training run; "" is none."""
  folder = pathlib.Path(path).expanduser()
  return path != "" and ((folder / "checkpoints").is_dir() or (folder / "data.json").is_file())


def claim(
    workdir: pathlib.Path, config: TrainConfig, rows: dict[str, Sequence[sources.Row]], fingerprint: str = "",
    template: str | None = None) -> None:
  """Makes the workdir this run's by writing data.json, base.json and config.json, or finds that it is so already.

  Args:
    workdir: a folder, locked: two runs that begin at once would each claim a part of it.
    rows: of each split.
    fingerprint: of the weights that the run begins from (`pretrained.fingerprint_of_base`); "" of those without one.
    template: the tokenizer's chat template.

  Raises:
    ValueError: it holds another run's config (the mesh apart), or a run over other rows or from other weights; what
      differs is named and nothing is touched. Or a process beside the first does not find what the first wrote.
  """
  path, mine = workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
  if jax.process_index() and not path.exists():
    raise ValueError(
        f"The first process made {path}, and it is not there on process {jax.process_index()}; give a --workdir on a "
        "file system that all hosts share.")
  digests = {split: {"rows": len(of), "sha256": hashlib.sha256(repr(list(of)).encode()).hexdigest()}
             for split, of in rows.items()}
  if path.exists():
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # Of settings that an older run did not know.
    ours, theirs = _flat(mine), _flat(defaults) | _flat(json.loads(path.read_text()))
    different = [
        f"{key} is {ours.get(key)!r} now and {theirs.get(key)!r} there"
        for key in sorted(ours.keys() | theirs.keys())
        # A run goes on with whatever devices there are.
        if ours.get(key) != theirs.get(key) and not key.startswith("mesh.")]
    if different:
      raise ValueError(
          f"{workdir} holds another run: {'; '.join(different)}. Choose another --workdir, or give the config of "
          "that run to resume it.")
    _check_rows(workdir / "data.json", config.data.source, digests)
    check_start(workdir, config.weights, fingerprint, template)
    return
  staging.write_text(workdir / "data.json", json.dumps(digests, indent=2) + "\n")
  staging.write_text(workdir / "base.json", json.dumps(
      {"fingerprint": fingerprint, "chat_template": _digest(template)}) + "\n")
  staging.write_text(path, json.dumps(mine, indent=2) + "\n")  # Last: it is what makes the workdir a run's.


def check_start(workdir: str | pathlib.Path, weights: str, fingerprint: str, template: str | None) -> None:
  """Raises ValueError where the run in `workdir` began from other `weights`, of another fingerprint, or with another
  chat template. "" as fingerprint: they were not read.
  """
  path = pathlib.Path(workdir).expanduser() / "base.json"
  start = json.loads(path.read_text()) if path.exists() else {}  # A run older than this file, or than its template.
  began = start.get("fingerprint")
  if began and fingerprint and began != fingerprint:
    raise ValueError(
        f"The run in {workdir} began from other weights than {weights} holds now (fingerprint {began}, now "
        f"{fingerprint}). Put them back as they were, or choose another --workdir to train from these.")
  if start.get("chat_template", _digest(template)) != _digest(template):
    raise ValueError(
        f"The chat template of the run in {workdir} was another one when it began: the file that data.chat_template "
        "names, or the tokenizer beside its weights, changed. Put it back as it was, or choose another --workdir.")


def _digest(text: str | None) -> str:
  return hashlib.sha256((text or "").encode()).hexdigest()[:16]


def _check_rows(path: pathlib.Path, source: str, digests: dict[str, Any]) -> None:
  before = json.loads(path.read_text()) if path.exists() else digests  # A run older than this file.
  changed = [
      f"{split} had {before[split]['rows']} rows and has {now['rows']}" + (
          " others" if before[split]["rows"] == now["rows"] else "")
      for split, now in digests.items() if before[split] != now]
  if changed:
    raise ValueError(
        f"The data of {source} changed since the run in {path.parent} began: {'; '.join(changed)}. Put the data back "
        "as it was to resume that run, or choose another --workdir.")


def read_config(workdir: str | pathlib.Path) -> TrainConfig:
  """The config of the run in `workdir`.

  Raises:
    FileNotFoundError: there is no run.
  """
  path = pathlib.Path(workdir).expanduser() / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; expected the --workdir of a training run (python train.py).")
  return config_lib.from_config_dict(TrainConfig, json.loads(path.read_text()))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return flat
