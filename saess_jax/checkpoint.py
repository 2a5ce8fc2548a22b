"""What a run keeps in its workdir, and how it is had back.

  config.json          the TrainConfig; another run's config is refused
  checkpoints/STEP/    orbax: state (step, trainable weights, optimizer, rng), iterator, config
  rollouts.jsonl       the base model's completions of the training prompts
  tensorboard/         events

With LoRA the base weights are not stored again: they come from where the run took them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from saess_jax import adapters, hf
from saess_jax import config as config_lib
from saess_jax import model as model_lib
from saess_jax.config import ModelConfig, SafetyConfig, TrainConfig


def claim_workdir(workdir: str | pathlib.Path, config: TrainConfig) -> pathlib.Path:
  """Makes the workdir this run's by writing config.json, or finds that it is so already.

  Raises:
    ValueError: it holds another run's config; the keys that differ are named and nothing is touched.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  path, mine = workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
  if path.exists():
    ours, theirs = _flat(mine), _flat(json.loads(path.read_text()))
    different = [
        f"{key} is {ours.get(key)!r} now and {theirs.get(key)!r} there"
        for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if different:
      raise ValueError(
          f"{workdir} holds another run: {'; '.join(different)}. Choose another --workdir, or give the config of "
          "that run to resume it.")
    return workdir
  workdir.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(".tmp")
  unfinished.write_text(json.dumps(mine, indent=2) + "\n")
  unfinished.replace(path)
  return workdir


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


class Checkpoints:
  """The checkpoints of one run: the newest few and the one with the best validation CLS accuracy are kept."""

  def __init__(self, workdir: str | pathlib.Path, keep_last: int = 2):
    keep = checkpoint_managers.preservation_policy
    accuracy = lambda metrics: metrics["cls_accuracy"]
    self.folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    handlers = {
        "state": ocp.StandardCheckpointHandler(), "iterator": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=ocp.CheckpointManagerOptions(
        best_fn=accuracy,
        preservation_policy=keep.AnyPreservationPolicy([
            keep.LatestN(keep_last),
            keep.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)])))

  def save(
      self, step: int, state: Any, iterator: dict[str, Any], config: TrainConfig, metrics: dict[str, float] | None
  ):
    """Starts writing in the background; `close` waits for it. A step that is there already is left as it is."""
    if step in self._manager.all_steps():
      return
    self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), iterator=ocp.args.JsonSave(iterator),
        config=ocp.args.JsonSave(dataclasses.asdict(config))))

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step with the best validation CLS accuracy; the latest if none was validated."""
    best = self._manager.best_step()
    return self._manager.latest_step() if best is None else best

  def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """The state and the iterator's state of `step`.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct, with shardings to place the arrays on a mesh.

    Raises:
      ValueError: the checkpoint is of another model or optimizer; the first array that differs is named.
    """
    stored = _shapes(self._manager.item_metadata(step)["state"].tree)
    expected = _shapes(abstract_state)
    for name in sorted(stored.keys() | expected.keys()):
      if stored.get(name) != expected.get(name):
        raise ValueError(
            f"{self.folder / str(step)} is a checkpoint of another model: {name} is "
            f"{stored.get(name, 'absent')} there, and {expected.get(name, 'absent')} in this model. Give the config "
            "it was made with.")
    restored = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), iterator=ocp.args.JsonRestore()))
    return restored["state"], restored["iterator"]

  def restore_trainable(self, step: int) -> Any:
    """The trainable weights of `step` alone, as they were saved, on the default device."""
    state = self._manager.item_metadata(step)["state"].tree
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    as_array = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
    wanted = {"trainable": jax.tree.map(as_array, state["trainable"])}
    handler = ocp.PyTreeCheckpointer()
    return handler.restore(self.folder / str(step) / "state", args=ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True))["trainable"]

  def close(self):
    self._manager.wait_until_finished()
    self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.lru_cache(maxsize=4)
def _jitted_init(shape: ModelConfig):
  """Compiled once: a run that goes on from another one asks for its random start several times."""
  return jax.jit(model_lib.Llama(shape).init)


def load_base(config: TrainConfig, dtype: str = "float32") -> tuple[ModelConfig, Any, Any]:
  """The weights that a run starts from: (model config, unrolled params as numpy or jax arrays, tokenizer).

  Raises:
    ValueError: the weights have another shape than `config.model` says, or random weights have no model named.
  """
  overrides = dict(config.model_overrides)
  if not config.weights:
    shape = config_lib.model_config(config.model, **overrides).replace(scan_layers=False)
    boxed = _jitted_init(shape)(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    return shape, nn.unbox(boxed["params"]), hf.byte_tokenizer()
  is_run = (pathlib.Path(config.weights).expanduser() / "checkpoints").is_dir()
  loaded = _load_run(config.weights) if is_run else hf.load_pretrained(config.weights, dtype)
  shape = loaded.config.replace(**overrides)
  if config.model:
    preset = config_lib.model_config(config.model, **overrides)
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    wrong = [
        f"{s} {getattr(shape, s)} for {getattr(preset, s)}" for s in sizes if getattr(shape, s) != getattr(preset, s)]
    if wrong:
      raise ValueError(
          f"The weights {config.weights!r} are not a {config.model}: they have {', '.join(wrong)}. Name the model they "
          'are, or set model to "" to take their shape.')
    shape = preset.replace(rope_scaling=shape.rope_scaling, rope_theta=shape.rope_theta, norm_eps=shape.norm_eps)
  return shape.replace(scan_layers=False), loaded.params, loaded.tokenizer


def _load_run(path: str | pathlib.Path) -> hf.Pretrained:
  """The last weights of another run: the best by validation may be far from where its loss ended."""
  checkpoints = Checkpoints(path)
  step = checkpoints.latest_step()
  checkpoints.close()
  model, params, tokenizer, _ = load_for_research(path, step)
  return hf.Pretrained(model.config, jax.tree.map(np.asarray, params), tokenizer)  # Off the one device they are on.


def load_for_research(
    path: str | pathlib.Path, step: int | None = None
) -> tuple[model_lib.Llama, Any, Any, SafetyConfig]:
  """A trained run, ready for `decode`: (model, params, tokenizer, settings).

  Layers are unrolled, LoRA is merged in, and the best checkpoint is taken unless `step` names another.

  Raises:
    FileNotFoundError: no run, or no checkpoint, in `path`.
    ValueError: `step` is not there, or the base weights are of another shape than the run's.
  """
  config = read_config(path)
  checkpoints = Checkpoints(path)
  chosen = checkpoints.best_step() if step is None else step
  if chosen is None:
    raise FileNotFoundError(f"{checkpoints.folder} holds no checkpoint yet; let the training run reach one.")
  steps = sorted(int(entry.name) for entry in checkpoints.folder.iterdir() if entry.name.isdigit())
  if chosen not in steps:
    raise ValueError(f"{checkpoints.folder} has no step {chosen}; it has {', '.join(map(str, steps))}.")
  trained = checkpoints.restore_trainable(chosen)
  checkpoints.close()
  shape, base, tokenizer = load_base(config)
  # Into the run's form of layers, and from there into the decoder's.
  is_stacked = "layers" in {**trained["params"], **trained.get("lora", {})}
  params = model_lib.stack_layers(base, config.frozen_layers) if is_stacked else base
  params = {**params, **trained["params"]}
  padding = len(params["embed"]["embedding"]) - shape.vocab_size
  params = model_lib.pad_vocab(params, -padding) if padding else params
  if "lora" in trained:
    params = adapters.merge_lora(params, trained["lora"])
  params = jax.tree.map(jnp.asarray, model_lib.unstack_layers(params))
  return model_lib.Llama(shape.replace(dtype="float32")), params, tokenizer, config.safety
