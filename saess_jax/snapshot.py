"""A model alone as an orbax folder: what `--config.weights` and `load_for_research` take beside the workdir of a run.

  snapshot.json   ModelConfig, SafetyConfig, where the weights came from and how they were trained
  params/         orbax: the unrolled tree of `model.py`, [CLS] included
  tokenizer/      as transformers writes it
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import transformers
from jax.sharding import Mesh

from saess_jax import config as config_lib
from saess_jax import damage, hf, sharding, staging, weights
from saess_jax.config import ModelConfig, SafetyConfig, safety_as_dict
from saess_jax.hf import Pretrained
from saess_jax.model import abstract_params


@dataclasses.dataclass(frozen=True)
class Settings:
  """What snapshot.json holds; `safety`, `source` and `layout` as `write` was told them."""

  config: ModelConfig
  safety: SafetyConfig | None
  source: str
  layout: dict[str, Any]


def write(
    folder: str | pathlib.Path, config: ModelConfig, params: Any, tokenizer: Any, safety: SafetyConfig | None,
    source: str, layout: dict[str, Any]) -> None:
  """Writes the folder, whole or not at all.

  Args:
    params: unrolled, host or device arrays, whose dtypes stay as they are.
    safety: with a named schedule; None of weights whose [CLS] was never trained.
    source: what `inspect` will say the weights came from.
    layout: `header_sees_cls` and `system_prompt`, kept for `export_hf`.

  Raises:
    FileExistsError: `folder` exists, or another process is writing it.
    ValueError: a schedule as an array.
  """
  values = {
      "format": 1, "model": dataclasses.asdict(config.replace(scan_layers=False, vocab_padding=0, frozen_layers=0)),
      "safety": None if safety is None else safety_as_dict(safety), "source": source, "layout": layout}
  with staging.new(folder) as unfinished:
    unfinished.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(unfinished / "params", params)
      checkpointer.wait_until_finished()
    tokenizer.save_pretrained(unfinished / "tokenizer")
    (unfinished / "snapshot.json").write_text(json.dumps(values, indent=2) + "\n")


def is_snapshot(folder: str | pathlib.Path) -> bool:
  return (pathlib.Path(folder).expanduser() / "snapshot.json").is_file()


def read_settings(folder: str | pathlib.Path) -> Settings:
  """The model's shape, its settings, and where it came from.

  Raises:
    ValueError: snapshot.json is not what `write` writes.
  """
  path = pathlib.Path(folder).expanduser() / "snapshot.json"
  try:
    values = json.loads(path.read_text())
    model, safety = ModelConfig(**values["model"]), values["safety"]
    safety = None if safety is None else config_lib.from_config_dict(SafetyConfig, safety)
    return Settings(model, safety, values["source"], values["layout"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} cannot be read ({error}); write the folder again (saess_jax.convert).") from error


def read_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
  return hf.read_tokenizer(pathlib.Path(folder).expanduser() / "tokenizer")


def read(folder: str | pathlib.Path, dtype: str = "", mesh: Mesh | None = None) -> Pretrained:
  """The model of the folder, unrolled: numpy arrays, or jax.Arrays that are read straight onto the mesh.

  Args:
    dtype: of the params ([CLS] head apart, which is float32 always); "": as they were written.

  Raises:
    ValueError: snapshot.json is not what `write` writes.
    damage.Damaged: the params cannot be read.
  """
  folder = pathlib.Path(folder).expanduser().absolute()
  settings = read_settings(folder)
  config = settings.config.replace(param_dtype=dtype or settings.config.param_dtype)
  shapes = sharding.unbox(abstract_params(config))
  if mesh is None:
    how = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), shapes)
  else:
    how = jax.tree.map(
        lambda leaf, place: ocp.ArrayRestoreArgs(sharding=place, global_shape=leaf.shape, dtype=leaf.dtype),
        shapes, weights.placement(config, mesh))
  with damage.named(folder / "params", " Write the folder again (saess_jax.convert)."):
    params = ocp.PyTreeCheckpointer().restore(
        folder / "params", args=ocp.args.PyTreeRestore(item=shapes, restore_args=how))
  return Pretrained(config, params, read_tokenizer(folder), settings.safety)
