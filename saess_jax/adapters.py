"""LoRA as a collection of its own beside the params: W x becomes W x + B (A x).

The model reads it from the collection "lora" (`model.Projection`), so the base weights are never touched and get no
gradient. There is no alpha: B starts at zero and the learning rate alone says how fast it grows.

A trained adapter is one safetensors file: the pairs, the [CLS] parameters, and as metadata the settings and the base
that it goes with (`save`, `load`, `apply`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from saess_jax import checksums, staging
from saess_jax.config import (
  LoraConfig,
  ModelConfig,
  SafetyConfig,
  from_config_dict,
  precision_of,
  safety_as_dict,
)

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16, "int8": np.int8}
CLS_PARAMS = ("cls_embedding", "cls_head")
# What of a shape decides whether a pair fits.
_SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What a run learned, as low-rank pairs, and what it goes with.

  Attributes:
    lora: unrolled, {"layers_0": {"attn": {"q": {"a", "b"}}}}, as `merge_lora` takes it.
    cls: the [CLS] parameters, {"cls_embedding", "cls_head": {"kernel", "bias"}}.
    safety: the run's.
    base: what `--config.weights` named: the weights below.
    sizes: of the base, name in `ModelConfig` -> number.
    fingerprint: of the base's weights.
    layout: `header_sees_cls`, `system_prompt` and `chat_template` of the run.
  """

  lora: Any
  cls: Any
  safety: SafetyConfig
  base: str
  sizes: dict[str, int]
  fingerprint: str
  layout: dict[str, Any]


def sizes_of(config: ModelConfig) -> dict[str, int]:
  """What `Adapter.sizes` says of a base of this shape."""
  return {name: getattr(config, name) for name in _SIZES}


def fingerprint(params: Any) -> str:
  """What tells the weights that an adapter was trained on from others of their shape: 16 hexadecimal digits.

  A digest of the embeddings, the lowest and the highest layer and the final norm, rounded to bfloat16: the same in
  either dtype, on every mesh, and whatever [CLS] is. Another quantisation has another one; its weights are others.

  Args:
    params: unrolled, without `vocab_padding`.
  """
  layers = sorted((name for name in params if name.startswith("layers_")), key=lambda name: int(name[7:]))
  some = {name: params[name] for name in ("embed", "final_norm", layers[0], layers[-1])}
  sums = checksums.of(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), some))
  return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def is_adapter(path: str | pathlib.Path) -> bool:
  """Whether `path` names an adapter's file, which need not be there."""
  return pathlib.Path(path).suffix == ".safetensors"


def check_target(path: str | pathlib.Path, dtype: str) -> pathlib.Path:
  """The file that `save` would write. Raises its errors of `path` and `dtype`, before there is an adapter."""
  path = staging.local(path)
  if not is_adapter(path) or dtype not in DTYPES:
    raise ValueError(f"{path} in {dtype}: expected a name that ends in .safetensors and one of {', '.join(DTYPES)}.")
  staging.refuse_existing(path)
  return path


def save(path: str | pathlib.Path, adapter: Adapter, dtype: str = "float32") -> None:
  """Writes one file, whole or not at all.

  Args:
    path: ends in .safetensors and does not exist.
    dtype: of the pairs, "float32", "bfloat16", "float16" or "int8", which has a float32 scale for each of a pair's
      columns and rows; [CLS] stays float32.

  Raises:
    FileExistsError: `path` exists.
    ValueError: another ending or dtype; a schedule as an array.
  """
  path = check_target(path, dtype)
  settings = {"format": 1, "safety": safety_as_dict(adapter.safety), "base": adapter.base,
              "sizes": adapter.sizes, "fingerprint": adapter.fingerprint, "layout": adapter.layout}
  pairs, cls = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (adapter.lora, adapter.cls))
  tensors = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in cls.items()}
  for name, leaf in pairs.items():
    if dtype == "int8":
      leaf, tensors[name + "_scale"] = _to_int8(np.asarray(leaf, np.float32), _summed(name, leaf))
    tensors[name] = np.ascontiguousarray(leaf, DTYPES[dtype])
  with staging.new(path) as unfinished:
    safetensors.numpy.save_file(tensors, unfinished, metadata={"saess": json.dumps(settings)})


def _summed(name: str, leaf: Any) -> tuple[int, ...]:
  """The axes of a pair's half that are not its rank: all but the last of an a, all but the first of a b."""
  return tuple(range(leaf.ndim - 1) if name.endswith("/a") else range(1, leaf.ndim))


def _to_int8(leaf: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Integers in -127..127, and by what float32 [r] to multiply them."""
  scale = np.maximum(np.abs(leaf).max(axis=axes), np.finfo(np.float32).tiny) / 127
  return np.rint(leaf / np.expand_dims(scale, axes)), scale


def load(path: str | pathlib.Path) -> Adapter:
  """The adapter of a file that `save` wrote: float32 numpy arrays.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a truncated file, one without our metadata, or without its [CLS] parameters.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected an adapter (saess_jax.convert run2adapter).")
  try:
    with safetensors.safe_open(path, framework="np") as file:
      settings = json.loads((file.metadata() or {})["saess"])
      flat = {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}
    scales = {name: flat.pop(name) for name in sorted(flat) if name.endswith("_scale")}
    for name, scale in scales.items():
      name = name.removesuffix("_scale")
      flat[name] = flat[name] * np.expand_dims(scale, _summed(name, flat[name]))
    tree = flax.traverse_util.unflatten_dict(flat, sep="/")
    return Adapter(
        lora={name: leaf for name, leaf in tree.items() if name not in CLS_PARAMS},
        cls={name: tree[name] for name in CLS_PARAMS},
        safety=from_config_dict(SafetyConfig, settings["safety"]),
        base=settings["base"], sizes=settings["sizes"], fingerprint=settings["fingerprint"], layout=settings["layout"])
  except (safetensors.SafetensorError, KeyError, ValueError) as error:
    raise ValueError(
        f"{path} is no adapter, or was truncated ({type(error).__name__}: {error}); expected a file that "
        "`saess_jax.convert run2adapter` wrote.") from error


def check_base(config: ModelConfig, params: Any, adapter: Adapter) -> None:
  """Raises ValueError for params (unrolled) of another shape than the adapter's base, or with other weights."""
  ours = sizes_of(config)
  wrong = [f"{name} {ours[name]} for {size}" for name, size in adapter.sizes.items() if ours[name] != size]
  if wrong:
    raise ValueError(f"The adapter goes with {adapter.base!r}; this base has {', '.join(wrong)}. Give it its own base.")
  found = fingerprint(params)
  if found != adapter.fingerprint:
    raise ValueError(
        f"The adapter was trained on {adapter.base!r} of fingerprint {adapter.fingerprint}; this base has its shape, "
        f"but other weights (fingerprint {found}). Give it its own base; a fine-tuned or quantised copy is another.")


def apply(config: ModelConfig, params: Any, adapter: Adapter) -> Any:
  """`params`, unrolled, with the pairs merged in and the adapter's [CLS]; the same function as with both beside it.

  Raises:
    ValueError: as `check_base`; a pair that has no place in the params.
  """
  check_base(config, params, adapter)
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  for name, leaf in flax.traverse_util.flatten_dict(adapter.lora, sep="/").items():
    kernel = flat.get(name.rpartition("/")[0] + "/kernel")
    end = leaf.ndim - 1
    fits = kernel is not None and (
        leaf.shape[:-1] == kernel.shape[:end] if name.endswith("/a") else leaf.shape[1:] == kernel.shape[-end:])
    if not fits:
      raise ValueError(f"The adapter's {name}, of shape {leaf.shape}, has no place in a model of this shape.")
  as_params = lambda leaf, old: jnp.asarray(leaf, old.dtype)
  cls = {name: jax.tree.map(as_params, leaf, params[name]) for name, leaf in adapter.cls.items()}
  return {**params, **{
      layer: merge_lora({layer: params[layer]}, {layer: pairs})[layer] for layer, pairs in adapter.lora.items()}, **cls}


def init_lora(boxed: Any, config: LoraConfig, rng: jax.Array) -> Any:
  """Low-rank pairs for the projections named in `config`.

  Args:
    boxed: params with logical axis names, in either form of layers (shapes from `jax.eval_shape` will do).

  Returns:
    The same tree, cut down to those projections, each with a [..., r] and b [r, ...] (a leading L axis where layers are
    stacked), boxed in their logical names; a is normal with deviation fan_in ** -0.5, b is zero.

  Raises:
    ValueError: a rank that is not positive, or a projection that does not exist.
  """
  unknown = sorted(set(config.projections) - set(PROJECTIONS))
  if unknown or not config.projections or config.rank < 1:
    raise ValueError(
        f"lora is rank {config.rank} on {config.projections}; expected a positive rank and some of {PROJECTIONS}.")
  lora = {}
  for path, leaf in flax.traverse_util.flatten_dict(boxed, is_leaf=lambda _, x: isinstance(x, nn.Partitioned)).items():
    if path[-1] != "kernel" or path[-2] not in config.projections:
      continue
    stacked, inputs = int(leaf.names[0] == "layers"), 2 if path[-2] == "o" else 1
    front, into, outof = (
        (leaf.names[part], leaf.value.shape[part])
        for part in (slice(0, stacked), slice(stacked, stacked + inputs), slice(stacked + inputs, None)))
    shape = (*front[1], *into[1], config.rank)
    a = jax.random.normal(jax.random.fold_in(rng, len(lora)), shape) * float(np.prod(into[1])) ** -0.5
    box = lambda value, names: nn.LogicallyPartitioned(value, names)
    lora[path[:-1] + ("a",)] = box(a, (*front[0], *into[0], "rank"))
    lora[path[:-1] + ("b",)] = box(jnp.zeros((*front[1], config.rank, *outof[1])), (*front[0], "rank", *outof[0]))
  return flax.traverse_util.unflatten_dict(lora)


def factorize(before: Any, after: Any, rank: int) -> Any:
  """Pairs that bring the projections of `before` as near to those of `after` as this rank can (truncated SVD).

  Args:
    before, after: params of one shape, unrolled; projections that are equal in both get no pair.

  Returns:
    As `Adapter.lora`, float32 numpy arrays; of a kernel with fewer than `rank` directions, as many as it has.
  """
  lora, old = {}, flax.traverse_util.flatten_dict(before)
  for path, new in flax.traverse_util.flatten_dict(after).items():
    if path[-1] != "kernel" or path[-2] not in PROJECTIONS:
      continue
    change = np.asarray(new, np.float32) - np.asarray(old[path], np.float32)
    if not change.any():
      continue
    inputs = 2 if path[-2] == "o" else 1
    into, outof = change.shape[:inputs], change.shape[inputs:]
    left, values, right = np.linalg.svd(change.reshape(np.prod(into), -1), full_matrices=False)
    scale = np.sqrt(values[:rank])  # Half to either side: both are as large, and lose as little by rounding.
    lora[path[:-1] + ("a",)] = (left[:, :rank] * scale).reshape(*into, -1)
    lora[path[:-1] + ("b",)] = (scale[:, None] * right[:rank]).reshape(-1, *outof)
  return flax.traverse_util.unflatten_dict(lora)


def weaken(adapter: Adapter, strength: float) -> Adapter:
  """The adapter between its base and itself: what it changes in the weights times `strength`, [CLS] as it is.

  A fine-tuned model part of the way back to its base often generalises better, and has forgotten less ("WiSE-FT",
  Wortsman et al. 2022).

  Raises:
    ValueError: not 0 < strength <= 1.
  """
  check_strength(strength)
  part = lambda path, leaf: leaf * np.float32(strength) if path[-1].key == "b" else leaf
  return dataclasses.replace(adapter, lora=jax.tree_util.tree_map_with_path(part, adapter.lora))


def between(start: Adapter, adapter: Adapter, strength: float) -> Adapter:
  """The adapter part of the way from `start`, where its run began (`lora.start`), to itself: pairs and [CLS] alike.

  The mean is one of pairs, not of their products; they are close to each other where one was trained on from the other.

  Raises:
    ValueError: not 0 < strength <= 1; the two have other bases, or pairs of other projections or ranks.
  """
  check_strength(strength)
  shapes = [jax.tree.map(np.shape, part.lora) for part in (start, adapter)]
  if start.fingerprint != adapter.fingerprint or shapes[0] != shapes[1]:
    raise ValueError(
        f"start is an adapter of {start.base} with pairs {_pairs(start)}, and the run's of {adapter.base}, "
        f"{_pairs(adapter)}; expected the one that the run went on from (lora.start).")
  mean = lambda a, b: (np.float32(1 - strength) * a + np.float32(strength) * b).astype(np.float32)
  return dataclasses.replace(
      adapter, lora=jax.tree.map(mean, start.lora, adapter.lora), cls=jax.tree.map(mean, start.cls, adapter.cls))


def _pairs(adapter: Adapter) -> str:
  """"of q, v, rank 16": which projections have pairs, and the highest rank."""
  firsts = {path: leaf for path, leaf in flax.traverse_util.flatten_dict(adapter.lora).items() if path[-1] == "a"}
  names = ", ".join(sorted({path[-2] for path in firsts}))
  return f"of {names}, rank {max(leaf.shape[-1] for leaf in firsts.values())}"


def check_strength(strength: float) -> None:
  """Raises ValueError: not 0 < strength <= 1."""
  if not 0 < strength <= 1:
    raise ValueError(
        f"strength is {strength}; expected more than 0 (where it begins) and at most 1 (all that was learned).")


def merge_lora(params: Any, lora: Any) -> Any:
  """Params in which every adapted kernel W has become W + A B: the same function without the collection."""
  flat = flax.traverse_util.flatten_dict(params)
  pairs = flax.traverse_util.flatten_dict(lora)
  for path in pairs:
    if path[-1] == "a":
      a, b = pairs[path], pairs[path[:-1] + ("b",)]
      kernel = path[:-1] + ("kernel",)
      product = lambda a, b: jnp.tensordot(a, b, 1, precision=precision_of(a.dtype))
      stacked = path[0] == "layers"
      flat[kernel] = flat[kernel] + (jax.vmap(product) if stacked else product)(a, b).astype(flat[kernel].dtype)
  return flax.traverse_util.unflatten_dict(flat)
