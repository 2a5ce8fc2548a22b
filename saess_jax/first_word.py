"""Asks a model which of two words its answer begins with: how guards and classifiers give their verdict.

One forward pass a prompt, nothing is generated. Axes: N prompts, B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import batching, hf, sharding
from saess_jax import model as model_lib
from saess_jax.config import MeshConfig
from saess_jax.model import Llama

_OPEN_HEADER = "<|end_header_id|>"  # Ends the prompt of a template that leaves the header line open.
_STEP = 64  # Padded lengths are multiples: few are compiled.
_SAMPLE = 4096  # Bytes of each tensor that go into a digest.


class FirstWord:
  """A model and the two words, laid out over this process's devices."""

  def __init__(
      self, loaded: hf.Pretrained, words: tuple[Sequence[str], Sequence[str]], dtype: str, batch_size: int):
    """
    Args:
      words: the spellings of the one word and of the other, such as (("no", "No"), ("yes", "Yes")); each also counts
        with a space before it.

    Raises:
      ValueError: the tokenizer begins both words alike.
    """
    devices = jax.local_devices()
    self._batch_size = batching.round_up(batch_size, len(devices))
    ids = first_tokens(loaded.tokenizer, words)
    model = Llama(loaded.config.replace(dtype=dtype))
    self._mesh = sharding.make_mesh(MeshConfig(), devices)
    boxed = model_lib.abstract_params(model.config)
    self._params = jax.tree.map(jax.device_put, loaded.params, sharding.shardings(boxed, self._mesh))
    self._ask = jax.jit(functools.partial(_ask, model, ids))

  def __call__(self, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each prompt's answer begins: the other word's probability beside the one's, and what else may come.

    Args:
      prompts: token ids, one array a prompt.

    Returns:
      p float32 [N]: the other word's share of what both words have; share float32 [N]: what both have of everything;
      best int32 [N]: the likeliest first token of all.
    """
    results = np.zeros((len(prompts), 2), np.float32)
    best = np.zeros(len(prompts), np.int32)
    place = sharding.batch_sharding(self._mesh)
    for chosen, filled, size in batching.by_length(list(map(len, prompts)), self._batch_size, _STEP):
      tokens = batching.padded((prompts[i] for i in filled), size)
      last = np.asarray([len(prompts[i]) - 1 for i in filled], np.int32)
      with jax.set_mesh(self._mesh), nn.logical_axis_rules(sharding.RULES):
        out, top = self._ask(self._params, *jax.device_put((tokens, last), place))
      results[chosen], best[chosen] = np.asarray(out)[: len(chosen)], np.asarray(top)[: len(chosen)]
    return results[:, 0], results[:, 1], best


def _ask(model: Llama, words, params, tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float32 [B, 2]: p and share, int32 [B]: the best token; at index `last` [B] of right-padded `tokens` [B, S]."""
  hidden = model.apply({"params": params}, tokens).hidden
  hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  logits = model_lib.logits_of(hidden, model_lib.output_head(params), model.config.vocab_size)
  one, other = (jax.nn.logsumexp(logits[:, np.asarray(ids)], axis=-1) for ids in words)
  share = jnp.exp(jnp.logaddexp(one, other) - jax.nn.logsumexp(logits, axis=-1))
  return jnp.stack([jax.nn.sigmoid(other - one), share], axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32)


def first_tokens(tokenizer: Any, words: tuple[Sequence[str], Sequence[str]]) -> tuple[list[int], list[int]]:
  """The ids that either word can begin with, with and without a space before it, less those of both."""
  first = lambda text: tokenizer(text, add_special_tokens=False).input_ids[:1]
  one, other = (
      {i for word in spellings for i in (*first(word), *first(f" {word}"))} - {tokenizer.unk_token_id}
      for spellings in words)
  if not one - other or not other - one:
    raise ValueError(
        f'The tokenizer begins "{words[0][0]}" with {sorted(one)} and "{words[1][0]}" with {sorted(other)}: no first '
        "token tells them apart. Name a model that answers with these words.")
  return sorted(one - other), sorted(other - one)


def close_header(tokenizer: Any, tokens: np.ndarray) -> np.ndarray:
  """`tokens` up to where the answer begins, int32: Llama Guard 3 first closes an open header with a blank line."""
  if tokenizer.decode(tokens[-1:]) == _OPEN_HEADER:
    tokens = np.append(tokens, tokenizer("\n\n", add_special_tokens=False).input_ids)
  return np.asarray(tokens, np.int32)


def digest(params: Any) -> str:
  """12 hex digits that tell weights apart: SHA-256 over each tensor's name, shape, and first and last 4 KiB."""
  total = hashlib.sha256()
  leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  for path, leaf in sorted(leaves.items()):
    flat = np.asarray(leaf).reshape(-1)
    count = max(1, _SAMPLE // flat.dtype.itemsize)
    total.update(f"{path} {leaf.shape} {flat.dtype}".encode())
    total.update(np.ascontiguousarray(flat[:count]).tobytes() + np.ascontiguousarray(flat[-count:]).tobytes())
  return total.hexdigest()[:12]
