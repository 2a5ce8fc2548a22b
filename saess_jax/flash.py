"""Causal attention over whole sequences in memory linear in their length: no S x S mask, no S x S scores.

Three kernels of one meaning. Which one a model runs is `ModelConfig.attention`; "auto" is the one of the backend.

  chunked  plain JAX, any backend: online softmax over blocks, forward and backward (FlashAttention-2, Dao 2023)
  cudnn    NVIDIA GPUs, bfloat16, one example a row
  splash   TPUs, of itself for bfloat16 alone; on a mesh each device runs it on its own rows and heads

Axes: B batch, S sequence, C one block of it, N query heads, K kv heads, G = N / K, H head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from saess_jax import sharding
from saess_jax.config import precision_of

KERNELS = ("auto", "chunked", "cudnn", "splash")
BLOCK = 512  # Rows and columns of scores that exist at one time (a head); a shorter sequence is one block.
HIDDEN = -1e30  # Score of what is not seen: finite, so that a block of which a row sees nothing gives no NaN.


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, kernel: str = "auto", *, window: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
  """Every row sees itself and what is stored before it, scores scaled by H^-1/2, softmax in float32.

  Args:
    q: [B, S, N, H]; k, v: [B, S, K, H].
    kernel: one of `KERNELS`.
    window: tokens a row can look back on, itself included; None: all.
    segments: int32 [B, S]; a row sees its own segment alone. None: one segment.

  Returns:
    [B, S, N, H] in q's dtype.

  Raises:
    ValueError: an unknown kernel, or "cudnn" for what it cannot do.
  """
  if kernel not in KERNELS:
    raise ValueError(f"attention is {kernel!r}; expected one of {', '.join(KERNELS)}.")
  narrow = q.dtype == jnp.bfloat16  # Splash does not say how its products are to round float32.
  runs_on_cudnn = narrow and segments is None
  if kernel == "auto":
    fastest = {"tpu": "splash" if narrow else "chunked", "gpu": "cudnn" if runs_on_cudnn else "chunked"}
    kernel = fastest.get(platform(), "chunked")
  if kernel == "cudnn":
    if not runs_on_cudnn:
      raise ValueError(
          f"attention is 'cudnn' for {q.dtype} activations {'with' if segments is not None else 'without'} segments; "
          "that kernel takes bfloat16 and one example a row. Set attention to 'chunked', or dtype to bfloat16 and "
          "data.examples_per_row to 1.")
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=None if window is None else (window - 1, 0), implementation="cudnn")
  return (_splash if kernel == "splash" else _chunked)(q, k, v, window, segments)


def platform() -> str:
  """Where the program will run: the mesh's platform (a TPU's, when compiling for one elsewhere), or the default one."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _chunked(q, k, v, window, segments):
  batch, size, heads, dim = q.shape
  block = min(size, BLOCK)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -size % block)) + ((0, 0),) * (x.ndim - 2))
  q = jnp.moveaxis(pad(q).reshape(batch, -1, k.shape[2], heads // k.shape[2], dim), 1, 3)
  k, v = (jnp.moveaxis(pad(x), 1, 2) for x in (k, v))
  out = _online(q, k, v, None if segments is None else pad(segments), block, window)
  return jnp.moveaxis(out, 3, 1).reshape(batch, -1, heads, dim)[:, :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _online(q, k, v, segments, block, window):
  """Attention of q [B, K, G, S, H] over k, v [B, K, S, H], S a multiple of `block`."""
  return _online_forward(q, k, v, segments, block, window)[0]


def _online_forward(q, k, v, segments, block, window):
  part = functools.partial(_part, block=block)

  def rows(i):
    """One block of rows: its output and log-sum-exp."""
    q_block = part(q, i, 3)

    def add(j, carry):
      highest, total, out = carry
      scores = _scores(q_block, part(k, j, 2), segments, i, j, block, window)
      new = jnp.maximum(highest, scores.max(axis=-1))
      weights, fade = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
      out = out * fade[..., None] + _matmul(weights.astype(v.dtype), part(v, j, 2))
      return new, total * fade + weights.sum(axis=-1), out

    shape = q_block.shape[:-1]
    carry = jnp.full(shape, HIDDEN), jnp.zeros(shape), jnp.zeros(q_block.shape, jnp.float32)
    highest, total, out = _loop(_first(i, block, window), i + 1, add, carry)
    return (out / total[..., None]).astype(q.dtype), highest + jnp.log(total)

  _, (out, log_sum) = _each(q.shape[3] // block, lambda carry, i: (carry, rows(i)), None)
  out, log_sum = _join(out), _join(log_sum)
  return out, (q, k, v, segments, out, log_sum)


def _online_backward(block, window, saved, cotangent):
  q, k, v, segments, out, log_sum = saved
  part = functools.partial(_part, block=block)
  # d score = weight * (d weight - delta), delta being the row's sum of weight * d weight.
  delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
  scale = q.shape[-1] ** -0.5

  def rows(carry, i):
    q_block, out_block, sum_block, delta_block = (part(x, i, 3) for x in (q, cotangent, log_sum, delta))

    def add(j, carry):
      to_q, to_k, to_v = carry
      k_block = part(k, j, 2)
      scores = _scores(q_block, k_block, segments, i, j, block, window)
      weights = jnp.exp(scores - sum_block[..., None])
      to_weights = _matmul(out_block, jnp.swapaxes(part(v, j, 2), -1, -2))
      to_scores = (weights * (to_weights - delta_block[..., None]) * scale).astype(q.dtype)
      to_q += _matmul(to_scores, k_block)
      to_k = _add_part(to_k, _columns(to_scores, q_block), j, block)
      to_v = _add_part(to_v, _columns(weights.astype(q.dtype), out_block), j, block)
      return to_q, to_k, to_v

    to_q, *carry = _loop(
        _first(i, block, window), i + 1, add, (jnp.zeros(q_block.shape, jnp.float32), *carry))
    return tuple(carry), to_q.astype(q.dtype)

  nothing = jnp.zeros(k.shape, jnp.float32)
  (to_k, to_v), to_q = _each(q.shape[3] // block, rows, (nothing, nothing))
  return _join(to_q), to_k.astype(k.dtype), to_v.astype(v.dtype), None


_online.defvjp(_online_forward, _online_backward)


def _scores(q, k, segments, i, j, block, window):
  """float32 [B, K, G, C, C] of row block i over column block j."""
  scores = _matmul(q, jnp.swapaxes(k, -1, -2)) * q.shape[-1] ** -0.5
  row, column = i * block + jnp.arange(block)[:, None], j * block + jnp.arange(block)
  seen = column <= row
  if window is not None:
    seen &= row - column < window
  if segments is not None:
    own = _part(segments, i, 1, block)[:, :, None] == _part(segments, j, 1, block)[:, None]
    seen = (seen & own)[:, None, None]
  return jnp.where(seen, scores, HIDDEN)


def _matmul(x, matrix):
  """x [B, K, G, C, X] times matrix [B, K, X, Y]: the groups of a kv head are rows of one product."""
  flat = x.reshape(*matrix.shape[:2], -1, x.shape[-1])
  return jnp.matmul(
      flat, matrix, precision=precision_of(flat.dtype), preferred_element_type=jnp.float32).reshape(*x.shape[:-1], -1)


def _columns(weights, x):
  """What rows x [B, K, G, C, H] give to the columns that `weights` [B, K, G, C, T] read: [B, K, T, H]."""
  return jnp.einsum(
      "BKGCT,BKGCH->BKTH", weights, x, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def _part(x, i, axis, block):
  return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _add_part(x, new, i, block):
  return jax.lax.dynamic_update_slice_in_dim(x, _part(x, i, 2, block) + new, i * block, 2)


def _first(i, block, window):
  """The first column block that row block i sees anything of."""
  return 0 if window is None else jnp.maximum(i * block - window + 1, 0) // block


def _loop(start: Any, stop: Any, body: Callable, carry: Any) -> Any:
  """`fori_loop`, written out where there is one block: an XLA loop, even of one turn, keeps products from fusing."""
  return body(0, carry) if isinstance(stop, int) else jax.lax.fori_loop(start, stop, body, carry)


def _each(count: int, body: Callable, carry: Any) -> Any:
  """`scan` over block indices, written out likewise: (last carry, outputs stacked over blocks)."""
  if count > 1:
    return jax.lax.scan(body, carry, jnp.arange(count))
  carry, out = body(carry, 0)
  return carry, jax.tree.map(lambda x: x[None], out)


def _join(x):
  """[blocks, B, K, G, C, ...] -> [B, K, G, S, ...]."""
  x = jnp.moveaxis(x, 0, 3)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _splash(q, k, v, window, segments):
  size, heads = q.shape[1], q.shape[2]
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and not set(sharding.AXES) <= set(mesh.axis_names):
    raise ValueError(
        f"The mesh has the axes {mesh.axis_names}; expected {', '.join(sharding.AXES)} among them, as "
        "`sharding.make_mesh` names them.")
  tensor = 1 if mesh.empty else mesh.shape["tensor"]
  if tensor > 1 and k.shape[2] % tensor:  # Each device then needs a kv head for each of its query heads.
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
  padded = size + -size % 128  # The kernel's blocks are 128 or more.
  fill = lambda x: jnp.pad(x, ((0, 0), (0, padded - size)) + ((0, 0),) * (x.ndim - 2))
  block = next(block for block in (512, 256, 128) if padded % block == 0)
  sizes = splash.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block)
  causal = (splash.CausalMask((padded, padded)) if window is None
            else splash.LocalMask((padded, padded), (window - 1, 0), 0))
  segments = jnp.zeros((q.shape[0], size), jnp.int32) if segments is None else segments

  def local(q, k, v, segments):
    kernel = splash.make_splash_mha(
        splash.splash_attention_mask.MultiHeadMask([causal] * q.shape[1]), block_sizes=sizes, head_shards=1,
        q_seq_shards=1, interpret=platform() == "cpu")
    return jax.vmap(lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments, segments)))(
        q, k, v, segments)

  heads_first = lambda x: jnp.moveaxis(fill(x), 1, 2)
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  if not mesh.empty:
    # What does not divide is computed by every device.
    rows = sharding.BATCH_AXES if len(q) % sharding.batch_shards(mesh) == 0 else None
    spread = PartitionSpec(rows, "tensor" if heads % tensor == 0 else None)
    local = jax.shard_map(
        local, in_specs=(spread, spread, spread, PartitionSpec(rows)), out_specs=spread, check_vma=False)
  return jnp.moveaxis(local(*map(heads_first, (q, k, v)), fill(segments)), 2, 1)[:, :size]
