"""What training has done to the language model: perplexity on benign responses, and how far it moved from the base.

Both look at response tokens only, given their prompts, in float32. With `sees_cls` [CLS] stands in its place and header
and response attend to it, as in safe decoding; without it the sequence is plain text and the model a plain Llama.

Axes: B batch, S tokens, R response tokens, C of them at a time, D embed, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, Params, output_head

CHUNK = 64  # Response tokens of a row whose logits are in memory at a time; lengths are padded to multiples.

Row = tuple[np.ndarray, np.ndarray]  # tokens and kinds int32 [S], in the stored layout.


@dataclasses.dataclass(frozen=True)
class Measure:
  """A mean over all response tokens of all rows, and how many they are."""

  value: float
  tokens: int


@flax.struct.dataclass
class _Batch:
  """Padded rows.

  Attributes:
    tokens, kinds: int32 [B, S].
    before: int32 [B, R], where the token stands that predicts each response token.
    targets: int32 [B, R], the response tokens; weights: float32 [B, R], 0 for padding.
  """

  tokens: jax.Array
  kinds: jax.Array
  before: jax.Array
  targets: jax.Array
  weights: jax.Array


def encode_rows(
    tokenizer: Any, prompts: Sequence[chat.Messages], responses: Sequence[str], max_length: int,
    system_prompt: str = "") -> list[Row]:
  """Prompts with their responses (end-of-turn token included) in the stored layout; what is longer is cut.

  Raises:
    ValueError: an empty response, or as `chat.encode_example`.
  """
  rows = []
  for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    ids = chat.encode_response(tokenizer, response, max_length)
    if not len(ids):
      raise ValueError(f"Response {i} is {response!r}; expected text.")
    rows.append(chat.encode_example(
        tokenizer, prompt, ids, stage="sft", header_sees_cls=True, max_length=max_length, system_prompt=system_prompt))
  return rows


def perplexity(
    model: Llama, params: Params, rows: Sequence[Row], *, sees_cls: bool = False, batch_size: int = 8) -> Measure:
  """exp of the mean -log p of a response token.

  Args:
    rows: as `encode_rows` gives them.
    sees_cls: see the top of this file.

  Raises:
    ValueError: no rows.
  """
  total, count = 0.0, 0
  sums = _jitted_nll(_in_float32(model), sees_cls)
  for chosen in _batches(rows, batch_size):
    batch = _pad(chosen, batch_size, sees_cls)
    total, count = total + float(sums(params, batch)), count + int(batch.weights.sum())
  return Measure(math.exp(total / count), count)


def mean_kl(
    base: Llama, base_params: Params, model: Llama, params: Params, rows: Sequence[Row], *, sees_cls: bool = True,
    batch_size: int = 8) -> Measure:
  """Mean over response tokens of KL(base || model) in nats: what the base would say, seen by the model.

  Args:
    base: reads plain text.
    sees_cls: whether `model` reads [CLS].

  Raises:
    ValueError: no rows, or vocabularies of different sizes.
  """
  if base.config.vocab_size != model.config.vocab_size:
    raise ValueError(
        f"The base has a vocabulary of {base.config.vocab_size} and the model one of {model.config.vocab_size}; "
        "expected the model that it was trained from.")
  total, count = 0.0, 0
  sums = _jitted_kl(_in_float32(base), _in_float32(model), sees_cls)
  for chosen in _batches(rows, batch_size):
    plain, batch = _pad(chosen, batch_size, False), _pad(chosen, batch_size, sees_cls)
    total, count = total + float(sums(base_params, params, plain, batch)), count + int(batch.weights.sum())
  return Measure(total / count, count)


def _in_float32(model: Llama) -> Llama:
  return Llama(model.config.replace(dtype="float32"))


@functools.lru_cache(maxsize=8)
def _jitted_nll(model: Llama, sees_cls: bool):
  def sums(params, batch):
    hidden = _hidden(model, params, batch, sees_cls)
    def one(at):
      target = jnp.take_along_axis(_log_probs(model, params, at(hidden)), at(batch.targets)[..., None], axis=-1)
      return -jnp.sum(at(batch.weights) * target[..., 0])
    return _over_chunks(one, batch)
  return jax.jit(sums)


@functools.lru_cache(maxsize=8)
def _jitted_kl(base: Llama, model: Llama, sees_cls: bool):
  def sums(base_params, params, plain, batch):
    theirs, ours = _hidden(base, base_params, plain, False), _hidden(model, params, batch, sees_cls)
    def one(at):
      p, q = _log_probs(base, base_params, at(theirs)), _log_probs(model, params, at(ours))
      return jnp.sum(at(batch.weights) * jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    return _over_chunks(one, batch)
  return jax.jit(sums)


def _hidden(model: Llama, params: Params, batch: _Batch, sees_cls: bool) -> jax.Array:
  """[B, R, D]: the state that predicts each response token."""
  layout = {"kinds": batch.kinds, "stage": "sft"} if sees_cls else {}  # Right padding: causal order hides it.
  hidden = model.apply({"params": params}, batch.tokens, **layout).hidden
  return jnp.take_along_axis(hidden, batch.before[..., None], axis=1)


def _log_probs(model: Llama, params: Params, hidden: jax.Array) -> jax.Array:
  head = output_head(params)[:, : model.config.vocab_size].astype(jnp.float32)
  return jax.nn.log_softmax(jnp.matmul(hidden, head, precision="highest"))


def _over_chunks(one, batch: _Batch) -> jax.Array:
  """The sum of `one(at)` over chunks of C response tokens, where at(x) takes a chunk's part of x [B, R, ...]."""
  def step(total, start):
    return total + one(lambda x: jax.lax.dynamic_slice_in_dim(x, start, CHUNK, axis=1)), None
  return jax.lax.scan(step, jnp.float32(0), jnp.arange(0, batch.targets.shape[1], CHUNK))[0]


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
  """Rows of like length together."""
  if not rows:
    raise ValueError("No rows were given; expected at least one text to measure on.")
  order = sorted(rows, key=lambda row: len(row[0]))
  return (order[at : at + size] for at in range(0, len(order), size))


def _pad(rows: list[Row], size: int, sees_cls: bool) -> _Batch:
  """`size` rows, those that are missing of weight 0; without `sees_cls` [CLS] is taken out."""
  if not sees_cls:
    rows = [(tokens[kinds != TokenKind.CLS], kinds[kinds != TokenKind.CLS]) for tokens, kinds in rows]
  responses = [np.flatnonzero(kinds == TokenKind.RESPONSE) for _, kinds in rows]
  up = lambda lengths: -(-max(lengths) // CHUNK) * CHUNK
  length, longest = up(len(tokens) for tokens, _ in rows), up(len(r) for r in responses)
  def pad(arrays, to, dtype=np.int32):
    out = np.zeros((size, to), dtype)
    for i, array in enumerate(arrays):
      out[i, : len(array)] = array
    return out
  return _Batch(
      tokens=pad((tokens for tokens, _ in rows), length), kinds=pad((kinds for _, kinds in rows), length),
      before=pad((r - 1 for r in responses), longest),
      targets=pad((tokens[r] for (tokens, _), r in zip(rows, responses)), longest),
      weights=pad((np.ones(len(r)) for r in responses), longest, np.float32))
