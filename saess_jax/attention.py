"""Attention in three forms that agree: dense by a mask, causal with the [CLS] rows apart, and one step on a cache.

The second is the fast path. With [CLS] stored at the boundary (`masks.cls_slot`) every other row is plain causal
attention, so any flash kernel serves; only the CLS row, and the probes' rows, have a visibility of their own, and
these few are computed apart. Exact, differentiable, and no S x S mask anywhere.

Axes: B batch, S stored sequence, P probes, Q query rows, T cache slots, N query heads,
K kv heads, G = N / K, H head dim.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from saess_jax import config as config_lib


@flax.struct.dataclass
class Sight:
  """Who sees whom in a full sequence; built once, outside the layers.

  Attributes:
    mask: bool [B, S, S], the dense reference; if given it alone counts (and there are no rows apart).
    cls_index: int32 [B], the slot of CLS; -1 in a row that has none. None: a plain causal language model.
    rows: bool [B, 1 + P, S], what the CLS row and each probe row see beside themselves.
  """

  mask: jax.Array | None = None
  cls_index: jax.Array | None = None
  rows: jax.Array | None = None


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

  CLS lives apart from the slots: it is rewritten while tokens are appended, and a row's tokens see its latest state.

  Attributes:
    k, v: [B, K, T, H]: heads before slots, the order in which attention reads them.
    cls_k, cls_v: [B, K, H].
  """

  k: jax.Array
  v: jax.Array
  cls_k: jax.Array
  cls_v: jax.Array


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
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, own_k: jax.Array, own_v: jax.Array,
    own_visible: jax.Array | None = None,
) -> jax.Array:
  """A few query rows over shared keys, each with one further key of its own.

  That further key is what a [CLS] row has and its neighbours must not see: itself.

  Args:
    q: [B, Q, N, H]; k, v: [B, K, T, H]; visible: bool [B, Q, T].
    own_k, own_v: [B, Q, K, H]; own_visible: bool [B, Q], None for everywhere.

  Returns:
    [B, Q, N, H] in q's dtype; the softmax is float32.
  """
  batch, rows, heads, dim = q.shape
  grouped = q.reshape(batch, rows, k.shape[1], -1, dim)
  scores = jnp.einsum("BQKGH,BKTH->BKGQT", grouped, k, preferred_element_type=jnp.float32)
  own = jnp.sum(grouped.astype(jnp.float32) * own_k.astype(jnp.float32)[:, :, :, None], axis=-1)
  scores = jnp.concatenate([scores, jnp.transpose(own, (0, 2, 3, 1))[..., None]], axis=-1) * dim**-0.5
  if own_visible is None:
    own_visible = jnp.ones((batch, rows), bool)
  seen = jnp.concatenate([visible, own_visible[..., None]], axis=-1)[:, None, None]
  weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(q.dtype)
  out = jnp.einsum("BKGQT,BKTH->BQKGH", weights[..., :-1], v)
  out += jnp.transpose(weights[..., -1], (0, 3, 1, 2))[..., None] * own_v[:, :, :, None]
  return out.reshape(batch, rows, heads, dim)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> jax.Array:
  """Attention within full sequences.

  Args:
    q: [B, S + P, N, H], the probes' rows behind the stored sequence; k, v: [B, S + P, K, H].
    sight: see there; P is read off its `rows`.

  Returns:
    [B, S + P, N, H].
  """
  if sight.mask is not None:
    return jax.nn.dot_product_attention(q, k, v, mask=sight.mask[:, None])
  if sight.cls_index is None:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
  size = sight.rows.shape[-1]
  trunk = jax.nn.dot_product_attention(q[:, :size], k[:, :size], v[:, :size], is_causal=True)
  batch = jnp.arange(q.shape[0])
  has_cls, index = sight.cls_index >= 0, jnp.maximum(sight.cls_index, 0)
  rows = [jnp.concatenate([x[batch, index][:, None], x[:, size:]], axis=1) for x in (q, k, v)]
  heads_first = (jnp.moveaxis(x[:, :size], 2, 1) for x in (k, v))
  apart = attend_rows(rows[0], *heads_first, sight.rows, rows[1], rows[2])
  cls = jnp.where(has_cls[:, None, None], apart[:, 0], trunk[batch, index])
  return jnp.concatenate([trunk.at[batch, index].set(cls), apart[:, 1:]], axis=1)


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
  cls_k, cls_v = cache.cls_k, cache.cls_v
  if rows == 2:
    refresh = step.refresh[:, None, None]
    cls_k, cls_v = jnp.where(refresh, k[:, 0], cls_k), jnp.where(refresh, v[:, 0], cls_v)
  cache = LayerCache(
      k=jax.lax.dynamic_update_slice_in_dim(cache.k, k[:, -1, :, None], step.slot, axis=2),
      v=jax.lax.dynamic_update_slice_in_dim(cache.v, v[:, -1, :, None], step.slot, axis=2),
      cls_k=cls_k, cls_v=cls_v)
  own_k, own_v = (jnp.broadcast_to(x[:, None], (x.shape[0], rows, *x.shape[1:])) for x in (cls_k, cls_v))
  own_visible = jnp.stack([jnp.ones_like(step.sees_cls), step.sees_cls], axis=1)[:, -rows:]
  return attend_rows(q, cache.k, cache.v, step.visible, own_k, own_v, own_visible), cache
