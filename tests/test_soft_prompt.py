"""Soft prompts: descent on free embeddings, and responses decoded from just these."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from white_box import BEHAVIORS, target, with_verdict

from saess_jax.attacks import make_attack, soft_prompt
from saess_jax.attacks.gcg import START, Place
from saess_jax.attacks.soft_prompt import SoftPrompt
from saess_jax.data import chat
from saess_jax.generate import Generator
from saess_jax.model import Llama


@pytest.fixture(scope="module")
def params(tiny_params):
  return with_verdict(tiny_params)


def generator(weights, **changes):
  settings = {"max_new_tokens": 4, "batch_size": 4, "safety": weights.safety} | changes
  return Generator(weights.model, weights.params, weights.tokenizer, **settings)


def alike(one, other):
  """The same response; batches of other sizes round otherwise."""
  assert one.ids == other.ids
  np.testing.assert_allclose([one.initial_prob, *one.cls_prob], [other.initial_prob, *other.cls_prob], rtol=1e-5)


@pytest.mark.slow
def test_it_lowers_loss_and_verdict_and_the_decoder_agrees(params):
  here = target(params)
  (one,), (other,) = make_attack("soft_prompt_12").attempts(BEHAVIORS[:2], here)
  assert one.queries == 12 and one.prompt == BEHAVIORS[0] + START and np.shape(one.soft_suffix) == (40, 48)
  losses, verdicts = ([float(x) for x in part.split(" -> ")] for part in one.variant[5:].split(", P(malicious) "))
  assert losses[1] < losses[0] - 2 and verdicts[0] > 0.9 and verdicts[1] < 0.5
  asked = generator(here.weights("saess"))
  suffixes = [one.soft_suffix, other.soft_suffix, ()]
  soft = asked.respond([one.prompt, other.prompt, BEHAVIORS[0]], soft_suffixes=suffixes)
  assert soft[0].initial_prob == pytest.approx(verdicts[1], abs=0.006) and soft[0].text
  alike(soft[2], asked.respond([BEHAVIORS[0]])[0])  # Its neighbours' rows are not its own.
  alike(soft[1], asked.respond([other.prompt], soft_suffixes=[other.soft_suffix])[0])
  for a, b in zip(soft[1::-1], asked.respond([other.prompt, one.prompt], soft_suffixes=suffixes[1::-1])):
    alike(a, b)


def test_the_base_model_is_attacked_on_its_language_loss_alone(params):
  here = dataclasses.replace(target(params, "base"), target_strings={BEHAVIORS[0]: "Sure, bread is"})
  (attempt,), = SoftPrompt(4).attempts(BEHAVIORS[:1], here)
  assert attempt.target == "Sure, bread is"
  first, last = map(float, attempt.variant.removeprefix("loss ").split(" -> "))  # And nothing of a verdict.
  assert last < first


def test_rows_stay_within_the_longest_of_the_embeddings(params):
  (attempt,), = SoftPrompt(3, step_size=50.0).attempts(BEHAVIORS[:1], target(params, "base"))
  longest = np.linalg.norm(params["embed"]["embedding"], axis=1).max()
  place = Place(target(params).weights("base"), BEHAVIORS[0], "Sure, bread is")
  _, moved = soft_prompt.compiled_step(
      place.weights.model, params, place.rows([place.ids]), place.start, jnp.asarray(attempt.soft_suffix), None, 1.0,
      50.0, slots=place.slots)
  np.testing.assert_allclose(np.linalg.norm(moved, axis=1), longest, rtol=1e-5)


def test_embeddings_of_tokens_are_read_as_these_tokens(params):
  place = Place(target(params).weights("saess"), BEHAVIORS[0], "Sure, bread is")
  asked = generator(place.weights, safety=place.weights.safety.replace(dependency="low"), max_new_tokens=24)
  rows = np.asarray(params["embed"]["embedding"])[place.ids]
  soft, = asked.respond([place.text(place.ids)], soft_suffixes=[rows])
  alike(soft, asked.respond([place.text(place.ids)])[0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_is_never_sampled(params, tied):
  """Though every token's logit is below 0, those of an untied head's lone rows: tied ones may have any."""
  w = target(params).weights("base")
  place, prompt = Place(w, BEHAVIORS[0], "Sure, bread is"), BEHAVIORS[0] + START
  rows = 100.0 * params["embed"]["embedding"][place.ids].at[::2].multiply(-1)  # Both signs: one of them would win.
  if not tied:
    rows = params["embed"]["embedding"][place.ids]
    model = Llama(w.model.config.replace(tie_embeddings=False))
    text, _ = chat.encode_prompt(w.tokenizer, prompt)
    last = w.model.apply({"params": params}, text[None]).hidden[0, -1]
    params = {**params, "lm_head": {"kernel": jnp.repeat(-last[:, None], 512, axis=1)}}
    w = type(w)(model, params, w.tokenizer, None)
  response, = generator(w, max_new_tokens=1).respond([prompt], soft_suffixes=[rows])
  assert all(0 <= i < 512 for i in response.ids)
