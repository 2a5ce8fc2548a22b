"""Soft prompts: free embeddings in the place of a suffix, where no text has to be found.

Projected gradient descent as in Schwinn et al. 2024 ("Soft prompt threats"): no tokens, so nothing to search. Such a
prompt cannot be sent, only fed by who holds the weights. Step and projection are our choice: each row moves by a fixed
part of the mean norm of the model's embeddings, against its gradient, and is scaled back to the longest of them. From
one start and in a few steps: a lower bound of what embeddings can do, whose loss goes on falling with more.

  soft_prompt_N   N steps on the victim; where it has [CLS], that is attacked too (`objective.py`)

Axes: R suffix rows, D embed, S stored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saess_jax.attacks import objective
from saess_jax.attacks.base import Attack, Attempt, Target, Weights
from saess_jax.attacks.gcg import START, Place
from saess_jax.attacks.objective import Rows, Scores
from saess_jax.config import SafetyConfig
from saess_jax.model import Llama, Params


class SoftPrompt(Attack):
  """See the module docstring; nothing is drawn."""

  adaptive = True
  at_a_time = 1

  def __init__(self, steps: int, step_size: float = 0.1, cls_weight: float = 1.0):
    """
    Args:
      steps: gradients a behavior, the N of the name.
      step_size: of a row, in mean norms of the embeddings.
      cls_weight: of the CLS terms beside the language loss's 1.
    """
    self.steps, self.step_size, self.cls_weight = steps, step_size, cls_weight
    self.name = f"soft_prompt_{steps}"

  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    """One attempt a behavior: the prompt ends with `gcg.START`, and the rows stand in the place of its tokens.

    Raises:
      ValueError: what `gcg.Place` raises.
    """
    weights = target.weights(target.victim)
    places = (Place(weights, text, objective.target_of(text, target.target_strings)) for text in behaviors)
    return [[self._attempt(weights, place)] for place in places]

  def _attempt(self, weights: Weights, place: Place) -> Attempt:
    params = weights.params
    rows, seen = place.rows([place.ids]), []
    embeddings = jnp.take(params["embed"]["embedding"], place.ids, axis=0).astype(jnp.float32)
    for _ in range(self.steps):
      scores, moved = compiled_step(
          weights.model, params, rows, place.start, embeddings, weights.safety, float(self.cls_weight),
          float(self.step_size), slots=place.slots)
      seen.append((objective.best_of(jax.device_get(scores)), embeddings))
      embeddings = moved
    best, embeddings = min(seen, key=lambda entry: float(entry[0].loss))
    return Attempt(
        place.behavior + START, variant=objective.summary(seen[0][0], best), target=place.answer, queries=self.steps,
        soft_suffix=np.round(np.asarray(embeddings, np.float64), 6).tolist())


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


compiled_step = jax.jit(step, static_argnames=("model", "slots"))
