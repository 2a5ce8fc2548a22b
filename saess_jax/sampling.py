"""Choosing the next token. Axes: B batch, T tokens so far, V vocab."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from saess_jax.config import check_ranges


@flax.struct.dataclass
class SamplingConfig:
  """A pytree of scalars, all of which may be traced: another temperature compiles nothing new.

  Meaning and order are those of transformers: penalty, temperature, top-k, top-p, min-p.
  """

  temperature: float = 0.0  # 0: greedy.
  top_k: int = 0  # Most likely tokens kept; 0: all.
  top_p: float = 1.0  # Probability mass kept, most likely first; 1: all.
  min_p: float = 0.0  # Share of the most likely token's probability that a token must have; 0: all are kept.
  repetition_penalty: float = 1.0  # Divides positive logits of tokens that occurred, multiplies negative ones; 1: none.

  def __post_init__(self):
    check_ranges(self, {
        "temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1),
        "repetition_penalty": (0, math.inf)})
    if isinstance(self.repetition_penalty, (int, float)) and self.repetition_penalty == 0:
      raise ValueError("repetition_penalty is 0, and logits are divided by it; expected more than 0 (1: none).")


def sample(
    logits: jax.Array, keys: jax.Array, config: SamplingConfig, tokens: jax.Array, counted: jax.Array) -> jax.Array:
  """One token a row, int32 [B].

  Args:
    logits: float32 [B, V].
    keys: [B] PRNG keys, one a row, so that a row's choice does not depend on its neighbours.
    config: see there.
    tokens: int32 [B, T], prompt and response, read for the penalty alone.
    counted: bool [B, T], which of them stand ([CLS], padding and what was cut do not).
  """
  logits = jax.lax.cond(
      config.repetition_penalty != 1, lambda: _penalize(logits, tokens, counted, config.repetition_penalty),
      lambda: logits)
  greedy = lambda: jnp.argmax(logits, axis=-1)

  def drawn():
    scaled = logits / config.temperature
    limited = jax.lax.cond(
        (config.top_k > 0) | (config.top_p < 1) | (config.min_p > 0), lambda: _limit(scaled, config), lambda: scaled)
    return jax.vmap(jax.random.categorical)(keys, limited)

  return jax.lax.cond(config.temperature > 0, drawn, greedy).astype(jnp.int32)


def _penalize(logits: jax.Array, tokens: jax.Array, counted: jax.Array, penalty: jax.Array) -> jax.Array:
  occurred = jnp.zeros(logits.shape, bool).at[jnp.arange(len(tokens))[:, None], tokens].max(counted)
  return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _limit(logits: jax.Array, config: SamplingConfig) -> jax.Array:
  """-inf at all tokens but those that top-k, top-p and min-p keep; the most likely one always stays.

  Without a sort, which on a CPU takes longer than the model: a logit is kept if few enough tokens, and little enough
  probability, lie above it, and both only grow as it falls. So the lowest that is kept can be looked for by halves.

  Args:
    logits: float32 [B, V]; -inf for what is never drawn.
  """
  highest = jnp.max(logits, axis=-1, keepdims=True)
  weight = jnp.exp(logits - highest)
  count_above = lambda x: jnp.sum(logits > x, axis=-1, keepdims=True)
  weight_above = lambda x: jnp.sum(jnp.where(logits > x, weight, 0.0), axis=-1, keepdims=True)
  k = jnp.where(config.top_k > 0, jnp.minimum(config.top_k, logits.shape[-1]), logits.shape[-1])
  lowest = _lowest(logits, lambda x: count_above(x) < k)
  # Of tokens that tie for the last of k places only those that fit are part of the mass that top-p shares out.
  mass = weight_above(lowest) + (k - count_above(lowest)) * jnp.exp(lowest - highest)
  in_nucleus = lambda x: (weight_above(x) < config.top_p * mass) | (config.top_p >= 1)
  likely = lambda x: x - highest >= jnp.log(config.min_p)
  lowest = _lowest(logits, lambda x: (x >= lowest) & in_nucleus(x) & likely(x))
  return jnp.where(logits >= lowest, logits, -jnp.inf)


def _lowest(logits: jax.Array, kept: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """The lowest number from a row's lowest logit on that is `kept`, float32 [B, 1]; the highest logit always is.

  Args:
    kept: float32 [B, 1] -> bool [B, 1], true from some number on.
  """
  flip = lambda bits: bits ^ ((bits >> 31) & 0x7FFFFFFF)  # Its own inverse: as integers, floats then have their order.
  place = lambda x: flip(jax.lax.bitcast_convert_type(x, jnp.int32))
  value = lambda bits: jax.lax.bitcast_convert_type(flip(bits), jnp.float32)

  def halve(_, ends):
    out, into = ends
    middle = (out | into) - ((out ^ into) >> 1)  # Their mean, rounded up, without an overflow: never `out`.
    is_kept = kept(value(middle))
    return jnp.where(is_kept, out, middle), jnp.where(is_kept, middle, into)

  ends = place(jnp.min(logits, axis=-1, keepdims=True)) - 1, place(jnp.max(logits, axis=-1, keepdims=True))
  return value(jax.lax.fori_loop(0, 32, halve, ends)[1])
