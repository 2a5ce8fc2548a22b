"""A number for each array of a tree, by which what was restored is told from what was saved."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named(tree: Any) -> dict[str, Any]:
  """Leaves by their path, "/" between its keys."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def of(tree: Any) -> dict[str, int]:
  """A number for each array, by its name, that any one changed element changes.

  Storage does not check all the bytes that it holds. The sum is over the elements' bits, each times an odd number of
  its own, modulo 2^32: no order of additions, hence no mesh, changes it.
  """
  if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree)):  # Through a device one by one, never all.
    return {name: int(_jitted({"": leaf})[""]) for name, leaf in named(tree).items()}
  return {name: int(value) for name, value in _jitted(named(tree)).items()}


def compare(tree: Any, saved: dict[str, int]) -> None:
  """Raises ValueError, which names an array, if any is not what was saved."""
  changed = [name for name, value in of(tree).items() if saved[name] != value]
  if changed:
    raise ValueError(f"{changed[0]} is not what was saved, nor are {len(changed) - 1} other arrays")


@jax.jit
def _jitted(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  def one(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
      index = index * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
  return jax.tree.map(one, arrays)
