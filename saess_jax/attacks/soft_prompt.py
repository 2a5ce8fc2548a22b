"""Soft prompts: free embeddings in the place of a suffix, an upper bound for every attack that has to write text.

Projected gradient descent as in Schwinn et al. 2024 ("Soft prompt threats"): no tokens, so nothing to search. Such a
prompt cannot be sent, only fed by who holds the weights; what it does is therefore reported apart from the attacks by
name. Step and projection are our choice: each row moves by a fixed part of the mean norm of the model's embeddings,
against its gradient, and is scaled back to the longest of them.

Axes: R suffix rows, D embed, S stored tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import decode
from saess_jax.attacks import objective
from saess_jax.attacks.base import Weights
from saess_jax.attacks.gcg import Place
from saess_jax.attacks.objective import Rows, Scores
from saess_jax.config import SafetyConfig
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, Params


@dataclasses.dataclass(frozen=True)
class SoftPromptResult:
  """What came of one behavior.

  Attributes:
    losses, lm_losses, query_probs, window_probs: at each step, before it is taken; as in `objective.Scores`
      (probabilities are NaN without a defence).
    embeddings: float32 [R, D], those with the lowest loss.
    response: what the model answers to them, decoded greedily with its defence.
    initial_prob, cls_prob, intervened_at: of that response, as in `decode.DecodeResult`.
    queries: gradients taken.
  """

  behavior: str
  losses: list[float]
  lm_losses: list[float]
  query_probs: list[float]
  window_probs: list[float]
  embeddings: np.ndarray
  response: str
  initial_prob: float
  cls_prob: list[float]
  intervened_at: int
  queries: int


def soft_prompt_attack(
    weights: Weights, behaviors: Sequence[str], steps: int = 100, step_size: float = 0.1, cls_weight: float = 1.0,
    max_new_tokens: int = 128) -> list[SoftPromptResult]:
  """Optimises a soft suffix for each behavior, and decodes the answer. Nothing is drawn: the same every time.

  Args:
    weights: of the victim; its `safety` decides whether [CLS] is attacked and intervenes.
    steps: gradients a behavior, at least 1.
    step_size: of a row, in mean norms of the embeddings.
    cls_weight: of the CLS terms beside the language loss's 1.

  Raises:
    ValueError: steps or step_size is not positive, or what `gcg.Place` and `decode.decode_config` raise.
  """
  if steps < 1 or step_size <= 0:
    raise ValueError(f"steps is {steps} and step_size {step_size}; expected 1 or more, and more than 0.")
  config = decode.decode_config(weights.tokenizer, weights.safety, max_new_tokens=max_new_tokens)
  return [_attack(weights, behavior, steps, step_size, cls_weight, config) for behavior in behaviors]


def _attack(weights, behavior, steps, step_size, cls_weight, config) -> SoftPromptResult:
  params, place = weights.params, Place(weights, behavior)
  rows = place.rows([place.ids])
  embeddings = jnp.take(params["embed"]["embedding"], place.ids, axis=0).astype(jnp.float32)
  path, best = [], None
  for _ in range(steps):
    scores, moved = compiled_step(
        weights.model, params, rows, place.start, embeddings, weights.safety, float(cls_weight), float(step_size),
        slots=place.slots)
    path.append(jax.tree.map(lambda leaf: float(leaf[0]), scores))
    if best is None or path[-1].loss < best[0]:
      best = path[-1].loss, embeddings
    embeddings = moved
  asked = place.row[1] != TokenKind.RESPONSE
  prompt = decode.pad_prompts([(place.row[0][asked], place.row[1][asked])])
  result = jax.device_get(decode_soft(weights.model, params, prompt, place.start, best[1], config))
  return SoftPromptResult(
      behavior=behavior, losses=[s.loss for s in path], lm_losses=[s.lm for s in path],
      query_probs=[s.query_prob for s in path], window_probs=[s.window_prob for s in path],
      embeddings=np.asarray(best[1]), response=weights.tokenizer.decode(result.tokens[0, : result.lengths[0]]),
      initial_prob=float(result.initial_prob[0]), cls_prob=result.cls_prob[0, : result.steps[0]].tolist(),
      intervened_at=int(result.intervened_at[0]), queries=steps)


def step(
    model: Llama, params: Params, rows: Rows, start: jax.Array, embeddings: jax.Array, safety: SafetyConfig | None,
    cls_weight: jax.Array, step_size: jax.Array, slots: int) -> tuple[Scores, jax.Array]:
  """Scores [1] of `embeddings` [R, D] and what one step makes of them. Arguments as `objective.score_embeddings`."""
  def loss(embeddings):
    scores = objective.score_embeddings(model, params, rows, start, embeddings, safety, cls_weight, slots)
    return scores.loss[0], scores

  gradient, scores = jax.grad(loss, has_aux=True)(embeddings)
  norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
  norms = norm(params["embed"]["embedding"][: model.config.vocab_size])
  moved = embeddings - step_size * jnp.mean(norms) * gradient / jnp.maximum(norm(gradient), 1e-12)
  return scores, moved * jnp.minimum(1.0, jnp.max(norms) / jnp.maximum(norm(moved), 1e-12))


compiled_step = functools.partial(jax.jit, static_argnames=("model", "slots"))(step)


@functools.partial(jax.jit, static_argnames=("model",))
def decode_soft(
    model: Llama, params: Params, prompt: decode.Prompt, start: jax.Array, embeddings: jax.Array,
    config: decode.DecodeConfig) -> decode.DecodeResult:
  """`decode.decode`, greedily, of a prompt of one row with `embeddings` [R, D] in the place of its tokens from `start`.

  They are rows behind the model's embeddings, named by id; no response can hold such an id.
  """
  extended, longer = objective.with_rows(model, params, embeddings)
  ids = len(params["embed"]["embedding"]) + jnp.arange(len(embeddings), dtype=jnp.int32)
  tokens = jax.lax.dynamic_update_slice_in_dim(jnp.asarray(prompt.tokens), ids[None], start, axis=1)
  return decode.decode(extended, longer, prompt.replace(tokens=tokens), jax.random.key(0), config)
