"""Attacks: names, prefixes of just N tokens, budgets, and the same again for the same seed."""

from __future__ import annotations

import types

import pytest
from tiny_tokenizer import tiny_tokenizer

from saess_jax.attacks import ATTACKS, Attempt, Target, make_attack
from saess_jax.attacks.prefill import FIRST_STEPS, OPENERS, SECOND_STEPS, encode

BEHAVIORS = [f"Do the forbidden thing number {i}." for i in range(12)]
OWN = "Step one: take the blue box. Step two: open it with the key."


def target(seed=0):
  asked = []
  tokenizer = tiny_tokenizer()

  def query_base(prompts, max_new_tokens):
    asked.append((list(prompts), max_new_tokens))
    ids = encode(tokenizer, OWN)[:max_new_tokens]
    return [types.SimpleNamespace(generated=tokenizer.decode(ids), tokens=ids) for _ in prompts]

  return Target(tokenizer, query_base, seed), asked


def test_direct_asks_as_it_stands():
  attack = make_attack("direct")
  assert attack.attempts(BEHAVIORS[:1], target()[0]) == [Attempt(BEHAVIORS[0], prefix="", queries=0, tokens=0)]
  assert attack.name == "direct"


@pytest.mark.parametrize("tokens", [1, 5, 10, 20, 40])
def test_prefill_has_just_n_tokens(tokens):
  here, asked = target()
  attempts = make_attack(f"prefill_{tokens}").attempts(BEHAVIORS, here)
  assert [len(encode(here.tokenizer, attempt.prefix)) for attempt in attempts] == [tokens] * len(BEHAVIORS)
  assert [attempt.prompt for attempt in attempts] == BEHAVIORS
  assert not asked and all(attempt.queries == attempt.tokens == 0 for attempt in attempts)


def test_prefill_varies_with_behavior_and_seed_and_nothing_else():
  def prefixes(seed, order=1):
    return [attempt.prefix for attempt in make_attack("prefill_40").attempts(BEHAVIORS[::order], target(seed)[0])]

  assert len(set(prefixes(0))) > 3
  assert prefixes(0) == prefixes(0) == prefixes(0, order=-1)[::-1]
  assert prefixes(0) != prefixes(1)


def test_a_deeper_prefill_goes_on_where_a_shallow_one_ends():
  shallow, deep = (make_attack(f"prefill_{n}").attempts(BEHAVIORS[:1], target()[0])[0].prefix for n in (10, 40))
  assert deep.startswith(shallow)


def test_openers_reach_forty_tokens_of_a_large_vocabulary():
  shortest = sum(min(len(text.split()) for text in texts) for texts in (OPENERS, FIRST_STEPS, SECOND_STEPS))
  assert shortest >= 40  # A word is at least a token.


def test_prefill_own_is_the_base_models_answer_and_costs_a_query():
  here, asked = target()
  attempts = make_attack("prefill_own_10").attempts(BEHAVIORS, here)
  assert asked == [(BEHAVIORS, 10)]
  expected = here.tokenizer.decode(encode(here.tokenizer, OWN)[:10])
  assert attempts[3] == Attempt(BEHAVIORS[3], expected, queries=1, tokens=10)


def test_a_short_answer_makes_a_short_prefix():
  here, _ = target()
  attempt = make_attack("prefill_own_500").attempts(BEHAVIORS[:1], here)[0]
  assert attempt.prefix == OWN and attempt.tokens == len(encode(here.tokenizer, OWN))


def test_the_cut_never_leaves_half_a_character():
  here, _ = target()
  half = Target(here.tokenizer, lambda prompts, n: [types.SimpleNamespace(generated="ab€", tokens=[1] * n)])
  assert make_attack("prefill_own_3").attempts(["x"], half)[0].prefix == "ab"


@pytest.mark.parametrize(
    "name", ["", "prefil_5", "prefill", "prefill_", "prefill_0", "prefill_-5", "prefill_5x", "direct_5", "gcg"])
def test_an_unknown_name_is_told_the_known_ones(name):
  with pytest.raises(ValueError, match=f"attack is '{name}'.*direct, prefill_N, prefill_own_N"):
    make_attack(name)


def test_a_prefill_longer_than_the_text_is_refused():
  with pytest.raises(ValueError, match="prefill_9999 needs an opener of 9999 tokens.*prefill_own_9999"):
    make_attack("prefill_9999").attempts(BEHAVIORS[:1], target()[0])


def test_names_are_their_settings():
  assert {make_attack(name.replace("N", "7")).name for name in ATTACKS} == {
      "direct", "prefill_7", "prefill_own_7", "gcg_7", "gcg_victim_7", "gcg_cls_7", "autodan_7", "autodan_cls_7"}
