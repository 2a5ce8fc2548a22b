"""Attention in three forms that agree: dense by a mask, causal with the [CLS] rows apart, and one step on a cache.

The second is the fast path. With [CLS] stored at the boundary (`masks.cls_slot`) every other row is plain causal
attention, so any flash kernel serves (`flash.py`); only the CLS row, and the probes' rows, have a visibility of their
own, and these few are computed apart. Exact, differentiable, and no S x S mask anywhere.

Axes: B batch, S stored sequence, E examples packed into a row (1 without packing), P probes, Q query rows, T cache
slots, N query heads, K kv heads, G = N / K, H head dim.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from saess_jax import config as config_lib
from saess_jax import flash


@flax.struct.dataclass
class Sight:
  """Who sees whom in a full sequence; built once, outside the layers.

  Attributes:
    mask: bool [B, S, S], the dense reference; if given it alone says who sees whom (and there are no rows apart).
    cls_index: int32 [B, E], the slot of each CLS; S for one that is not there. None: a plain causal language model.
    rows: bool [B, E + P, S], what each CLS row and each probe row see beside themselves.
    segments: int32 [B, S], which of E packed examples a token belongs to. None: one example a row.
  """

  mask: jax.Array | None = None
  cls_index: jax.Array | None = None
  rows: jax.Array | None = None
  segments: jax.Array | None = None


@flax.struct.dataclass
class Step:
  """One decoding step of Q rows on a cache: the newest token, and before it (Q = 2) the CLS row.

  Attributes:
    slot: int32 scalar, the cache slot that the newest token takes.
    visible: bool [B, Q, T], slots each row sees (the newest token's own among them); never the CLS.
    refresh: bool [B], whether the CLS row counts: if not, the K/V that CLS has stay, and its output means nothing.
    sees_cls: bool [B], whether the newest token sees CLS (False: a plain language model).
  """

  slot: jax.Array
  visible: jax.Array
  refresh: jax.Array
  sees_cls: jax.Array


@flax.struct.dataclass
class LayerCache:
  """K and V of one layer ([L, ...] in front when layers are scanned).

  The first place is that of CLS, wherever the prompt stores it: it is rewritten while tokens are appended to the T
  slots behind it, and a row's tokens see its latest state.

  Attributes:
    k: [B, K, H, 1 + T]; v: [B, K, 1 + T, H]. The orders in which the two products of attention read them: any other is
      copied into these at every step.
  """

  k: jax.Array
  v: jax.Array


def rope_angles(positions: jax.Array, config: config_lib.ModelConfig) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines, float32 [B, S, H / 2], for int positions [B, S]."""
  half = config.head_dim // 2
  frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling is not None:
    s = config.rope_scaling
    wavelength = 2 * jnp.pi / frequency
    # 0 where a wave is longer than the low limit (divided by factor), 1 where shorter than the high one (kept).
    blend = (s.original_max_seq_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    frequency = (1 - blend) * frequency / s.factor + blend * frequency
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates x [B, S, N, H], pairing element i with i + H / 2 as Hugging Face does;
  in float32: bf16 rounds 257 to 256.
  """
  cos, sin = (a[:, :, None] for a in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, own_k: jax.Array | None = None,
    own_v: jax.Array | None = None,
) -> jax.Array:
  """A few query rows over shared keys, each with one further key of its own if there are such.

  That further key is what a [CLS] row has and its neighbours must not see: itself.

  Args:
    q: [B, Q, N, H]; k: [B, K, H, T]; v: [B, K, T, H]; visible: bool [B, Q, T].
    own_k, own_v: [B, Q, K, H], or None.

  Returns:
    [B, Q, N, H] in q's dtype; the softmax is float32.
  """
  batch, rows, heads, dim = q.shape
  grouped = jnp.moveaxis(q.reshape(batch, rows, v.shape[1], -1, dim), 1, 3)  # [B, K, G, Q, H]
  # Products of matrices, rows first: of all ways to write them XLA:CPU runs these fastest.
  precision = config_lib.precision_of(q.dtype)
  over = lambda x, matrix, **how: jnp.matmul(
      x.reshape(*matrix.shape[:2], -1, x.shape[-1]), matrix, precision=precision, **how).reshape(*x.shape[:-1], -1)
  scores = over(grouped, k, preferred_element_type=jnp.float32)
  scores = jnp.where(visible[:, None, None], scores * dim**-0.5, jnp.finfo(jnp.float32).min)
  if own_k is not None:
    own = jnp.einsum(
        "BKGQH,BQKH->BKGQ", grouped, own_k, precision=precision, preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.concatenate([scores, own[..., None]], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  out = over(weights[..., : v.shape[2]], v)
  if own_v is not None:
    out += weights[..., -1:] * jnp.moveaxis(own_v, 1, 2)[:, :, None]
  return jnp.moveaxis(out, 3, 1).reshape(batch, rows, heads, dim)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, config: config_lib.ModelConfig) -> jax.Array:
  """Attention within full sequences.

  Args:
    q: [B, S + P, N, H], the probes' rows behind the stored sequence; k, v: [B, S + P, K, H].
    sight: see there; P is read off its `rows`.
    config: names the kernel and the sliding window.

  Returns:
    [B, S + P, N, H].
  """
  if sight.mask is not None:
    with jax.default_matmul_precision(config_lib.precision_of(q.dtype).name.lower()):
      return jax.nn.dot_product_attention(q, k, v, mask=sight.mask[:, None])
  causal = functools.partial(
      flash.causal_attention, kernel=config.attention, window=config.sliding_window, segments=sight.segments)
  if sight.cls_index is None:
    return causal(q, k, v)
  size, examples = sight.rows.shape[-1], sight.cls_index.shape[1]
  trunk = causal(q[:, :size], k[:, :size], v[:, :size])
  at_cls = jnp.arange(q.shape[0])[:, None], sight.cls_index
  rows = [jnp.concatenate([x[:, :size].at[at_cls].get(mode="clip"), x[:, size:]], axis=1) for x in (q, k, v)]
  apart = attend_rows(
      rows[0], jnp.moveaxis(k[:, :size], 1, 3), jnp.moveaxis(v[:, :size], 1, 2), sight.rows, rows[1], rows[2])
  trunk = trunk.at[at_cls].set(apart[:, :examples], mode="drop")
  return jnp.concatenate([trunk, apart[:, examples:]], axis=1)


def attend_step(
    q: jax.Array, k: jax.Array, v: jax.Array, step: Step, cache: LayerCache
) -> tuple[jax.Array, LayerCache]:
  """The fused step: [CLS, newest token] or the newest token alone, in one pass over the weights.

  Both write their K and V before either attends, so the token sees the CLS that has just seen the token.

  Args:
    q: [B, Q, N, H]; k, v: [B, Q, K, H], Q = 2 (CLS first) or 1.

  Returns:
    [B, Q, N, H] and the cache with the newest token, and where `refresh` the new CLS, in it.
  """
  rows = q.shape[1]

  def write(places, new, axis):
    """`new` [B, Q, K, H] into `places`, whose slots are on `axis`."""
    part = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=1, axis=axis)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    new = jnp.moveaxis(new, 1, axis)
    if rows == 2:
      refresh = step.refresh[:, None, None, None]
      places = put(places, jnp.where(refresh, part(new, 0), part(places, 0)), 0)
    return put(places, part(new, rows - 1), 1 + step.slot)

  cache = LayerCache(k=write(cache.k, k, 3), v=write(cache.v, v, 2))
  see_cls = jnp.stack([jnp.ones_like(step.sees_cls), step.sees_cls], axis=1)[:, -rows:, None]
  visible = jnp.concatenate([see_cls, step.visible], axis=-1)
  if rows == 1 and flash.platform() == "tpu":
    # There a product of one row becomes a sum, whose result is padded to many times its size; of two rows it does not.
    q, visible = (jnp.repeat(x, 2, axis=1) for x in (q, visible))
  return attend_rows(q, cache.k, cache.v, visible)[:, -rows:], cache
