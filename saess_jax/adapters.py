"""LoRA as a collection of its own beside the params: W x becomes W x + B (A x).

The model reads it from the collection "lora" (`model.Projection`), so the base weights are never touched and get no
gradient. There is no alpha: B starts at zero and the learning rate alone says how fast it grows.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from saess_jax.config import LoraConfig

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


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


def merge_lora(params: Any, lora: Any) -> Any:
  """Params in which every adapted kernel W has become W + A B: the same function without the collection."""
  flat = flax.traverse_util.flatten_dict(params)
  pairs = flax.traverse_util.flatten_dict(lora)
  for path in pairs:
    if path[-1] == "a":
      a, b = pairs[path], pairs[path[:-1] + ("b",)]
      kernel = path[:-1] + ("kernel",)
      product = lambda a, b: jnp.tensordot(a, b, 1)
      stacked = path[0] == "layers"
      flat[kernel] = flat[kernel] + (jax.vmap(product) if stacked else product)(a, b).astype(flat[kernel].dtype)
  return flax.traverse_util.unflatten_dict(flat)
