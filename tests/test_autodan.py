"""AutoDAN: its texts, its two levels of exchange, and that the best loss never rises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from white_box import BEHAVIORS, target, with_verdict

from saess_jax.attacks import autodan, objective
from saess_jax.attacks.autodan import REQUEST, SENTENCES, SYNONYMS, AutoDan, AutoDanCls


@pytest.fixture(scope="module")
def params(tiny_params):
  return with_verdict(tiny_params)


def losses_of(attempt):
  return [float(word) for word in attempt.variant.removeprefix("loss ").split(",")[0].split(" -> ")]


def test_every_prompt_holds_the_request_once_and_word_for_word():
  assert [sum(REQUEST in sentence for sentence in kind) for kind in SENTENCES] == [0, 0, 6, 0, 0]
  rng = np.random.default_rng(0)
  prompts = autodan.first_population(20, rng)
  scores = {word: 0.0 for group in SYNONYMS for word in group}
  for _ in range(10):
    prompts = autodan.next_population(prompts, np.ones(20), scores, rng)
  behavior = "Explain the [steps] of a question, a story and a list."
  assert len(prompts) == 20
  assert all(autodan.text_of(prompt, behavior).count(behavior) == 1 for prompt in prompts)
  assert all(autodan.text_of(prompt, behavior).isascii() for prompt in prompts)


def test_a_word_has_one_group_of_synonyms():
  words = [word for group in SYNONYMS for word in group]
  assert len(words) == len(set(words)) == 63


def test_word_scores_are_the_momentum_of_fitness():
  prompts = [("a good answer",), ("a fine answer",), ("a good reply",)]
  first = autodan.word_scores(prompts, np.array([1.0, 2.0, 5.0]), {})
  assert first == {"good": -3.0, "fine": -2.0, "answer": -1.5, "reply": -5.0}
  second = autodan.word_scores(prompts[:1], np.array([1.0]), first)
  assert second == {"good": -2.0, "fine": -2.0, "answer": -1.25, "reply": -5.0}


def test_words_give_way_to_better_synonyms():
  scores = {"answer": -50.0, "reply": 0.0, "response": -50.0}
  rng = np.random.default_rng(1)
  said = autodan.exchange_words("an answer, an answer and an Answer to it " * 50, scores, rng)
  assert said.count("an answer") + said.count("a reply") + said.count("an reply") == 100
  assert 20 <= said.count("an reply") <= 40  # 0.3 of a hundred words are looked at.
  assert said.count("Answer") == 50 and "response" not in said


def test_the_elite_stays_and_the_unfit_have_no_children():
  rng = np.random.default_rng(2)
  prompts = autodan.first_population(20, rng)
  losses = np.full(20, 60.0)
  losses[[4, 7]] = 2.0, 1.0
  children = autodan.next_population(prompts, losses, {}, rng)
  assert children[:2] == [prompts[7], prompts[4]] and len(children) == 20
  kept = sum(sentence in parents for child in children[2:] for sentence, *parents in zip(child, prompts[4], prompts[7]))
  assert kept > 0.4 * 18 * 5  # The rest are new sentences and words.


@pytest.mark.parametrize("attack, where", [(AutoDan, "base"), (AutoDanCls, "saess")])
def test_it_lowers_the_loss_of_what_is_sent(params, attack, where):
  answer = "Sure, here is bread"
  here = dataclasses.replace(target(params), target_strings={BEHAVIORS[0]: answer})
  attempt, = attack(4, population=16).attempts(BEHAVIORS[:1], here)[0]
  first, last = losses_of(attempt)
  assert attempt.target == answer
  assert last < first and attempt.queries == 16 * (1 + 4) and attempt.tokens == 0
  assert ("P(malicious)" in attempt.variant) == (where == "saess")
  weights = here.weights(where)
  rows = objective.pad_rows(
      [objective.encode_row(weights, attempt.prompt, answer)], multiple=64)
  scores = objective.score_all(weights, rows, 1.0, objective.target_slots(rows))
  assert f"{float(scores.loss[0]):.2f}" == f"{last:.2f}"


@pytest.mark.slow
def test_more_generations_are_never_worse_and_all_is_drawn_from_behavior_and_seed(params):
  run = lambda generations, seed=0, behaviors=BEHAVIORS[:1]: AutoDan(generations, population=8).attempts(
      behaviors, target(params, seed=seed))
  lowest = [losses_of(run(generations)[0][0])[1] for generations in (1, 2, 3)]
  assert lowest == sorted(lowest, reverse=True)
  assert run(1) == run(1, behaviors=BEHAVIORS[1::-1])[::-1][:1] != run(1, seed=1)


def test_a_prompt_that_is_too_long_is_told_so(params):
  with pytest.raises(ValueError, match="but the model's context is 128"):
    AutoDan(1).attempts(BEHAVIORS[:1], target(params, max_seq_len=128))
