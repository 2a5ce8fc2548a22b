"""Soft prompts: descent on free embeddings, and a response decoded from just these."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from white_box import BEHAVIORS, target, with_verdict

from saess_jax import decode
from saess_jax.attacks import soft_prompt
from saess_jax.attacks.gcg import Place
from saess_jax.attacks.soft_prompt import soft_prompt_attack
from saess_jax.masks import TokenKind


@pytest.fixture(scope="module")
def params(tiny_params):
  return with_verdict(tiny_params)


def test_it_lowers_the_loss_and_the_verdict_and_the_decoder_agrees(params):
  result, = soft_prompt_attack(target(params).weights("saess"), BEHAVIORS[:1], steps=12, max_new_tokens=4)
  assert result.queries == len(result.losses) == len(result.query_probs) == 12
  assert min(result.losses) < result.losses[0] - 2 and result.lm_losses[-1] < result.lm_losses[0]
  assert result.query_probs[0] > 0.9 and result.initial_prob < 0.5
  best = int(np.argmin(result.losses))
  assert result.initial_prob == pytest.approx(result.query_probs[best], abs=1e-5)
  assert result.behavior == BEHAVIORS[0] and result.response and result.embeddings.shape == (40, 48)


def test_the_base_model_is_attacked_on_its_language_loss_alone(params):
  result, = soft_prompt_attack(target(params).weights("base"), BEHAVIORS[:1], steps=4, max_new_tokens=4)
  assert result.losses == result.lm_losses and result.losses[-1] < result.losses[0]
  assert np.isnan(result.query_probs).all() and np.isnan(result.initial_prob) and result.intervened_at == -1


def test_rows_stay_within_the_longest_of_the_embeddings(params):
  result, = soft_prompt_attack(target(params).weights("base"), BEHAVIORS[:1], 3, step_size=50.0, max_new_tokens=1)
  longest = np.linalg.norm(params["embed"]["embedding"], axis=1).max()
  place = Place(target(params).weights("base"), BEHAVIORS[0])
  _, moved = soft_prompt.compiled_step(
      place.weights.model, params, place.rows([place.ids]), place.start, jnp.asarray(result.embeddings), None, 1.0,
      50.0, slots=place.slots)
  np.testing.assert_allclose(np.linalg.norm(moved, axis=1), longest, rtol=1e-5)


def prompt_of(place):
  asked = place.row[1] != TokenKind.RESPONSE
  return decode.pad_prompts([(place.row[0][asked], place.row[1][asked])])


def test_embeddings_of_tokens_decode_as_these_tokens(params):
  place = Place(target(params).weights("saess"), BEHAVIORS[0])
  w = place.weights
  config = decode.decode_config(w.tokenizer, w.safety.replace(dependency="low"), max_new_tokens=24)
  plain = jax.jit(decode.decode, static_argnums=0)(w.model, params, prompt_of(place), jax.random.key(0), config)
  soft = soft_prompt.decode_soft(
      w.model, params, prompt_of(place), place.start, params["embed"]["embedding"][place.ids], config)
  jax.tree.map(np.testing.assert_array_equal, plain, soft)


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_is_never_sampled(params, tied):
  """Though every token's logit is below 0, those of an untied head's lone rows: tied ones may have any."""
  w = target(params).weights("base")
  place = Place(w, BEHAVIORS[0])
  prompt, model = prompt_of(place), w.model
  rows = 100.0 * params["embed"]["embedding"][place.ids].at[::2].multiply(-1)  # Both signs: one of them would win.
  if not tied:
    rows = params["embed"]["embedding"][place.ids]
    text = prompt.tokens[:, prompt.kinds[0] > TokenKind.CLS]
    last = model.apply({"params": params}, text).hidden[0, -1]
    model = type(model)(model.config.replace(tie_embeddings=False))
    params = {**params, "lm_head": {"kernel": jnp.repeat(-last[:, None], 512, axis=1)}}
  config = decode.decode_config(w.tokenizer, None, max_new_tokens=1)
  result = soft_prompt.decode_soft(model, params, prompt, place.start, rows, config)
  assert 0 <= int(result.step_tokens[0, 0]) < 512


def test_steps_have_to_be_positive(params):
  with pytest.raises(ValueError, match="steps is 0 and step_size 0.1; expected 1 or more"):
    soft_prompt_attack(target(params).weights("base"), BEHAVIORS[:1], steps=0)
