"""From logical axis names to devices: the mesh ("data", "fsdp", "tensor") and what lies where on it."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saess_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # What the rows of a batch are split over.
# Embeddings are trained with a multiple of this many rows (`ModelConfig.vocab_padding`): even on any tensor axis up to
# it, and the same on all of them, so that a checkpoint fits every mesh.
VOCAB_MULTIPLE = 128

RULES = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("length", None),
    ("activation", None),
    ("head_dim", None),
    ("norm", None),
    ("layers", None),
    ("rank", None),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
  """A mesh over all devices (or those given).

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"mesh is {given}; expected positive sizes, at most one of them -1 (what is left).")
  known = int(np.prod([size for size in sizes if size != -1]))
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise ValueError(
        f"mesh is {given}, which does not divide the {len(devices)} devices; set sizes whose product is "
        f"{len(devices)}, or one of them to -1.")
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def shardings(boxed: Any, mesh: Mesh) -> Any:
  """A tree of NamedSharding for a tree of shapes whose leaves carry logical axis names (`nn.LogicallyPartitioned`).

  An axis that a mesh axis does not divide (3 kv heads on tensor=2, say) is replicated instead.
  """
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
  def one(spec, leaf):
    spec = tuple(spec) + (None,) * (len(leaf.shape) - len(spec))
    fits = (axis if axis is None or size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, leaf.shape))
    return NamedSharding(mesh, PartitionSpec(*fits))
  return jax.tree.map(one, specs, unbox(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))


def unbox(boxed: Any) -> Any:
  """The leaves without their axis names. `nn.unbox` would constrain them too, uneven axes among them."""
  is_box = lambda x: isinstance(x, nn.Partitioned)
  return jax.tree.map(lambda x: x.unbox(apply_constraint=False) if is_box(x) else x, boxed, is_leaf=is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are split over data and fsdp, on their first axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts batches are split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def one_a_device(mesh: Mesh, value: bool) -> jax.Array:
  """bool [devices]: on each device of the mesh what its process says."""
  return jax.make_array_from_process_local_data(
      NamedSharding(mesh, PartitionSpec(AXES)), np.full(len(mesh.local_devices), value), (mesh.size,))


def rows_here(mesh: Mesh, size: int) -> list[int]:
  """Which rows of a batch of `size` this process's devices hold, ascending. Where the tensor axis goes over several
  processes these hold the same ones.

  Raises:
    ValueError: data times fsdp does not divide `size`.
  """
  held = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
  return sorted({row for (rows,) in held for row in range(*rows.indices(size))})
