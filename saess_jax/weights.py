"""Checkpoints in torch's layout <-> the tree of `model.py`: names, shapes, and one tensor after the other.

Shared by `hf.py` and `gguf.py`, which read, and `export.py`, which writes. With a mesh a tensor goes to its shards as
soon as it is read, so that the host never holds more than the one at hand.

Axes: D embed, N query heads, K kv heads, H head dim, F mlp, V vocab, L layers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding

from saess_jax import sharding
from saess_jax.config import CLS_HEAD_DEVIATION, ModelConfig, dtype_of
from saess_jax.model import abstract_params

Shape = tuple[int, ...]

# Leaf of our tree -> tensor of a Hugging Face folder.
HF_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers_{i}/attn_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "layers_{i}/attn/q/kernel": "model.layers.{i}.self_attn.q_proj.weight",
    "layers_{i}/attn/k/kernel": "model.layers.{i}.self_attn.k_proj.weight",
    "layers_{i}/attn/v/kernel": "model.layers.{i}.self_attn.v_proj.weight",
    "layers_{i}/attn/q/bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers_{i}/attn/k/bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers_{i}/attn/v/bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers_{i}/attn/o/kernel": "model.layers.{i}.self_attn.o_proj.weight",
    "layers_{i}/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers_{i}/mlp/gate/kernel": "model.layers.{i}.mlp.gate_proj.weight",
    "layers_{i}/mlp/up/kernel": "model.layers.{i}.mlp.up_proj.weight",
    "layers_{i}/mlp/down/kernel": "model.layers.{i}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}

# Leaf of our tree -> tensor of a GGUF file.
GGUF_NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers_{i}/attn_norm/scale": "blk.{i}.attn_norm.weight",
    "layers_{i}/attn/q/kernel": "blk.{i}.attn_q.weight",
    "layers_{i}/attn/k/kernel": "blk.{i}.attn_k.weight",
    "layers_{i}/attn/v/kernel": "blk.{i}.attn_v.weight",
    "layers_{i}/attn/q/bias": "blk.{i}.attn_q.bias",
    "layers_{i}/attn/k/bias": "blk.{i}.attn_k.bias",
    "layers_{i}/attn/v/bias": "blk.{i}.attn_v.bias",
    "layers_{i}/attn/o/kernel": "blk.{i}.attn_output.weight",
    "layers_{i}/mlp_norm/scale": "blk.{i}.ffn_norm.weight",
    "layers_{i}/mlp/gate/kernel": "blk.{i}.ffn_gate.weight",
    "layers_{i}/mlp/up/kernel": "blk.{i}.ffn_up.weight",
    "layers_{i}/mlp/down/kernel": "blk.{i}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "lm_head/kernel": "output.weight",
}


def plan(config: ModelConfig, names: Mapping[str, str]) -> dict[str, tuple[str, Shape, Shape]]:
  """Leaf of the unrolled tree, "/" between its keys -> (name in the checkpoint, shape of the leaf, shape there).

  Args:
    names: HF_NAMES or GGUF_NAMES. The [CLS] parameters are in neither.
  """
  V, D, F = config.vocab_size, config.embed_dim, config.mlp_dim
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  layer = {
      "attn_norm/scale": ((D,), (D,)),
      "attn/q/kernel": ((D, N, H), (N * H, D)),
      "attn/k/kernel": ((D, K, H), (K * H, D)),
      "attn/v/kernel": ((D, K, H), (K * H, D)),
      "attn/o/kernel": ((N, H, D), (D, N * H)),
      "mlp_norm/scale": ((D,), (D,)),
      "mlp/gate/kernel": ((D, F), (F, D)),
      "mlp/up/kernel": ((D, F), (F, D)),
      "mlp/down/kernel": ((F, D), (D, F)),
  }
  if config.attention_bias:
    layer |= {f"attn/{part}/bias": ((heads, H), (heads * H,)) for part, heads in (("q", N), ("k", K), ("v", K))}
  named = {"embed/embedding": (names["embed/embedding"], (V, D), (V, D))}
  for i in range(config.num_layers):
    named |= {f"layers_{i}/{leaf}": (names[f"layers_{{i}}/{leaf}"].format(i=i), *pair) for leaf, pair in layer.items()}
  named["final_norm/scale"] = names["final_norm/scale"], (D,), (D,)
  if not config.tie_embeddings:
    named["lm_head/kernel"] = names["lm_head/kernel"], (D, V), (V, D)
  return named


def build_params(
    config: ModelConfig, names: Mapping[str, str], shapes: Mapping[str, Shape], read: Callable[[str], np.ndarray],
    source: str | pathlib.Path, dtype: str, mesh: Mesh | None = None, progress: str = "",
    file_of: Mapping[str, pathlib.Path] | None = None) -> dict[str, Any]:
  """Reads a checkpoint in torch's layout, one tensor at a time, into the unrolled tree of `model.py` without [CLS].

  Every name and shape is checked before the first tensor is read.

  Args:
    names: HF_NAMES or GGUF_NAMES.
    shapes: the checkpoint's tensors: name -> shape, kernels as [out, in].
    read: name -> the tensor, of any float type.
    source: file or folder that errors name.
    dtype: of the leaves, "float32" or "bfloat16".
    mesh: where the leaves go, each as soon as it is read; None: numpy arrays.
    progress: the name of a progress bar; "" shows none.
    file_of: name -> the file of `source` that holds it, for errors.

  Raises:
    ValueError: tensors are missing, of the wrong shape, or unknown (a bias, say: without it, it is another model).
  """
  kind, planned, file_of = dtype_of(dtype), plan(config, names), file_of or {}
  missing = [name for name, _, _ in planned.values() if name not in shapes]
  if missing:
    raise ValueError(f"{source} lacks {len(missing)} tensors of this model: {_some(missing)}.")
  unknown = sorted(set(shapes) - {name for name, _, _ in planned.values()})
  if unknown:
    where = file_of.get(unknown[0], source)
    raise ValueError(f"{where} holds {len(unknown)} tensors that this model has no place for: {_some(unknown)}.")
  for name, _, theirs in planned.values():
    if shapes[name] != theirs:
      raise ValueError(
          f"{file_of.get(name, source)}: {name} has shape {shapes[name]}; the configuration asks for {theirs}.")

  places = None if mesh is None else flax.traverse_util.flatten_dict(placement(config, mesh), sep="/")
  leaves = {}
  for leaf, (name, ours, _) in tqdm.tqdm(planned.items(), desc=progress, unit="tensor", disable=not progress):
    values = read(name)
    values = values if leaf == "embed/embedding" else values.T  # [out, in] -> [in, out]; others have one axis.
    values = np.array(values, kind, order="C").reshape(ours)  # A copy: the file may be closed or changed.
    leaves[leaf] = values if places is None else put(values, places[leaf])
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def to_torch_layout(leaf: str, values: np.ndarray, theirs: Shape) -> np.ndarray:
  """The leaf of that name as a checkpoint stores it, of shape `theirs`: the inverse of what `build_params` does."""
  if leaf == "embed/embedding":
    return values
  return np.ascontiguousarray(values.reshape(theirs[::-1]).T)


def placement(config: ModelConfig, mesh: Mesh) -> Any:
  """NamedSharding of every parameter, [CLS] included, in the form of layers that `config` says; no array is made."""
  return sharding.shardings(abstract_params(config), mesh)


def put(values: np.ndarray | jax.Array, place: NamedSharding) -> jax.Array:
  """`values` on its shards, done when this returns: else a loader would fill the host's memory with copies on the way.

  A host array, the same on every process, gives each device its own part alone.
  """
  if isinstance(values, jax.Array):
    return jax.device_put(values, place)
  return jax.block_until_ready(jax.make_array_from_callback(values.shape, place, lambda index: values[index]))


def with_cls(params: dict[str, Any]) -> dict[str, Any]:
  """Adds the [CLS] parameters that `params` lacks; stacked or unrolled layers alike.

  The embedding starts as the mean of the token embeddings [our choice: the attention layers have met nothing far from
  it], the head small and random (always the same), so that the first gradient reaches the layers.
  """
  embedding = params["embed"]["embedding"]
  head = np.random.default_rng(0).normal(scale=CLS_HEAD_DEVIATION, size=(embedding.shape[1], 1))
  fresh = {
      "cls_embedding": embedding.mean(axis=0, dtype=np.float32).astype(embedding.dtype),
      "cls_head": {"kernel": head.astype(np.float32), "bias": np.zeros(1, np.float32)},
  }
  return fresh | params


def _some(names: list[str]) -> str:
  return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
