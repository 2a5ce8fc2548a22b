"""GCG: gradients by finite differences and by nanoGCG's loss in torch; suffixes that are read back; what it lowers."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer
from white_box import BEHAVIORS, SAFETY, target, with_verdict

from saess_jax import decode, model, schedule
from saess_jax.attacks import Weights, gcg, make_attack, objective
from saess_jax.attacks.gcg import Gcg, GcgCls, GcgVictim, Place
from saess_jax.data import chat
from saess_jax.masks import TokenKind

TOP_K = 64  # Of every attack here: each number is a compilation of its own.
ANSWER = objective.target_of(BEHAVIORS[0])
one_hot_gradient = jax.jit(gcg.one_hot_gradient, static_argnames=("model", "size", "slots"))


@pytest.fixture(scope="module")
def params(tiny_params):
  return with_verdict(tiny_params)


def place_of(params, name="saess", **changes):
  return Place(target(params, **changes).weights(name), BEHAVIORS[0], ANSWER)


def test_the_target_follows_the_form_of_the_request_and_not_its_content():
  assert [objective.target_of(text) for text in ("How does one x?", "Write: x.", "list x", "Do x.", "")] == [
      "Sure, here is how it is done, step by step:", "Sure, here is the full text that you asked for:",
      "Sure, here is the list that you asked for:", "Sure, here is everything that you asked for:",
      "Sure, here is everything that you asked for:"]
  assert objective.target_of("Do x.", {"Do x.": "Sure, x is", "Do y.": "No"}) == "Sure, x is"
  assert objective.target_of("Do z.", {"Do x.": "Sure, x is"}) == objective.target_of("Do z.")


@pytest.mark.parametrize("name, kind, steps, candidates", [
    ("gcg_20", Gcg, 20, gcg.CANDIDATES), ("gcg_20x64", Gcg, 20, 64), ("gcg_victim_500x512", GcgVictim, 500, 512),
    ("gcg_cls_500x512", GcgCls, 500, 512)])
def test_steps_and_candidates_stand_in_the_name(name, kind, steps, candidates):
  attack = make_attack(name)
  assert type(attack) is kind and (attack.name, attack.steps, attack.candidates) == (name, steps, candidates)


def test_the_first_suffix_is_tokens_of_its_own_behind_the_behavior(params):
  place = place_of(params)
  tokens, kinds = place.row
  assert place.text(place.ids) == BEHAVIORS[0] + " x" * 20
  stands = slice(place.start, place.start + len(place.ids))
  id_of = place.weights.tokenizer.convert_tokens_to_ids
  assert tokens[stands].tolist() == place.ids.tolist() == id_of(["Ġ", "x"]) * 20
  assert set(kinds[stands]) == {TokenKind.QUERY} and kinds[stands.stop] == TokenKind.CLS


def test_nothing_special_or_unprintable_is_allowed():
  tokenizer = tiny_tokenizer()
  tokenizer.add_tokens(["<added>"])
  allowed = gcg.allowed_tokens(tokenizer, 600)
  id_of = tokenizer.convert_tokens_to_ids
  assert allowed.shape == (600,) and not allowed[len(tokenizer):].any()
  assert [bool(allowed[id_of(token)]) for token in ("a", "Ġ", "How", "Ċ", "Ã", "<|im_end|>", "<added>")] == [
      True, True, True, False, False, False, False]


def test_a_suffix_that_reads_otherwise_does_not_survive(params):
  place = place_of(params)
  id_of = place.weights.tokenizer.convert_tokens_to_ids
  apart, whole = place.ids.copy(), place.ids.copy()
  apart[4:6], whole[4:6] = id_of(["a", "n"]), id_of(["an", "x"])
  assert "an" in place.weights.tokenizer.get_vocab()
  assert place.survives(place.ids) and place.survives(whole) and not place.survives(apart)


@pytest.mark.parametrize("name", ["base", "saess"])
def test_the_one_hot_gradient_is_that_of_finite_differences(params, name):
  place = place_of(params, name)
  w, rows = place.weights, place.rows([place.ids])
  scores, gradient = one_hot_gradient(
      w.model, params, rows, place.start, w.safety, 1.0, size=len(place.ids), slots=place.slots)
  plain = objective.score_all(w, rows, 1.0, place.slots)
  np.testing.assert_allclose(scores.loss, plain.loss, rtol=0, atol=1e-5)
  loss = jax.jit(lambda embeddings: objective.score_embeddings(
      w.model, params, rows, place.start, embeddings, w.safety, 1.0, place.slots).loss[0])
  table = params["embed"]["embedding"]
  for position, token in ((0, 40), (7, 300), (19, 11)):
    move = jnp.zeros((len(place.ids), table.shape[1])).at[position].set(0.01 * table[token])
    slope = (loss(table[place.ids] + move) - loss(table[place.ids] - move)) / 0.02
    assert abs(slope - gradient[position, token]) < 2e-3 and abs(slope) > 5e-3, (position, token, slope)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_behind_the_embeddings_read_like_tokens_and_have_no_logit(params, tied):
  shape = place_of(params).weights.model.config
  if not tied:
    params = {**params, "lm_head": {"kernel": params["embed"]["embedding"].T}}
  plain = model.Llama(shape.replace(tie_embeddings=tied))
  extended, longer = model.with_rows(plain, params, params["embed"]["embedding"][jnp.asarray([7, 9])])
  by_row = extended.apply({"params": longer}, jnp.asarray([[5, 512, 513, 6]])).logits
  assert by_row.shape == (1, 4, 512)
  np.testing.assert_array_equal(by_row, plain.apply({"params": params}, jnp.asarray([[5, 7, 9, 6]])).logits)


@pytest.mark.parametrize("changes", [
    {"rule2_keeps_query": False, "r2": 3}, {"schedule": "periodic(4)"}, {"heeds_query": False}])
def test_verdicts_on_query_and_windows_are_the_decoders(params, changes):
  """With one layer a window's verdict does not depend on what its tokens saw of [CLS], so both agree exactly."""
  safety = SAFETY.replace(threshold=1.0, **changes)  # Benign all along.
  shallow = {name: leaf for name, leaf in params.items() if name != "layers_1"}
  there = target(shallow, safety=safety).weights("saess")
  w = Weights(model.Llama(there.model.config.replace(num_layers=1)), shallow, there.tokenizer, safety)
  place = Place(w, BEHAVIORS[0], ANSWER)
  scores = objective.score_all(w, place.rows([place.ids]), 1.0, place.slots)
  tokens, kinds = place.row
  answer = kinds == TokenKind.RESPONSE
  result = jax.jit(decode.decode, static_argnums=0)(
      w.model, shallow, decode.pad_prompts([(tokens[~answer], kinds[~answer])], [tokens[answer]]), jax.random.key(0),
      decode.decode_config(w.tokenizer, safety, max_new_tokens=1, buffer=64))
  np.testing.assert_allclose(scores.query_prob, result.initial_prob, rtol=0, atol=1e-6)
  probs = np.asarray(result.cls_prob[0])[: answer.sum()]
  judged = probs[schedule.as_array(safety.schedule, len(probs))]  # As if the model had written what is a prefix here.
  assert len(judged) == (answer.sum() if not changes.get("schedule") else answer.sum() // 4)
  np.testing.assert_allclose(scores.window_prob, judged.max(), rtol=0, atol=1e-6)
  query = -np.log1p(-scores.query_prob) if safety.heeds_query else 0  # Nobody fights what is not heeded.
  expected = scores.lm + query - np.log1p(-judged).mean()
  np.testing.assert_allclose(scores.loss, expected, rtol=0, atol=1e-4)


def test_the_base_model_sees_no_cls(params):
  place = place_of(params, "base")
  blind = {**params, "cls_embedding": params["cls_embedding"] + 1}
  score = lambda params: objective.score_all(
      dataclasses.replace(place.weights, params=params), place.rows([place.ids]), 1.0, place.slots)
  assert score(params).loss == score(blind).loss == score(params).lm
  assert np.isnan(score(params).query_prob)


@pytest.mark.parametrize("name", ["base", "saess"])
def test_the_target_follows_the_header_wherever_cls_is_stored(params, name):
  w = dataclasses.replace(target(params).weights(name), header_sees_cls=False)
  place = Place(w, BEHAVIORS[0], ANSWER)
  tokens, kinds = place.row
  answer = np.flatnonzero(kinds == TokenKind.RESPONSE)
  assert kinds[answer[0] - 2 : answer[0]].tolist() == [TokenKind.HEADER, TokenKind.CLS] and place.survives(place.ids)
  found = objective.score_all(w, place.rows([place.ids]), 1.0, place.slots)
  if name == "base":  # Nothing sees [CLS], so its slot does not matter.
    first = place_of(params, name)
    expected = objective.score_all(first.weights, first.rows([first.ids]), 1.0, first.slots).lm
  else:
    logits = w.model.apply({"params": params}, tokens[None], kinds=kinds[None], stage="sft").logits[0]
    expected = -np.mean(jax.nn.log_softmax(logits)[np.r_[answer[0] - 2, answer[:-1]], tokens[answer]])
  np.testing.assert_allclose(found.lm, expected, rtol=0, atol=1e-4)


def test_scores_do_not_depend_on_the_neighbours(params):
  place = place_of(params)
  suffixes = [np.roll(place.ids, 1) + i for i in range(objective.CHUNK + 3)]
  many = objective.score_all(place.weights, place.rows(suffixes), 1.0, place.slots)
  alone = objective.score_all(place.weights, place.rows(suffixes[-1:]), 1.0, place.slots)
  assert many.loss.shape == (objective.CHUNK + 3,)
  np.testing.assert_allclose(many.loss[-1:], alone.loss, rtol=0, atol=1e-5)


def test_candidates_along_the_gradient_are_better_than_others(params):
  place = place_of(params)
  w, rows, allowed = place.weights, place.rows([place.ids]), gcg.allowed_tokens(tiny_tokenizer(), 512)
  _, best = gcg.compiled_top_tokens(
      w.model, params, rows, place.start, allowed, w.safety, 1.0, size=len(place.ids), slots=place.slots, top_k=TOP_K)
  assert allowed[np.asarray(best)].all()
  best, others = best[:, :8], np.tile(np.flatnonzero(allowed), (len(place.ids), 1))
  def mean_loss(tokens):
    drawn = gcg.draw_candidates(place, place.ids, np.asarray(tokens), 24, np.random.default_rng(0))
    assert len(drawn) == 24 and all((ids != place.ids).sum() == 1 and place.survives(ids) for ids in drawn)
    return objective.score_all(w, place.rows(drawn), 1.0, place.slots).loss.mean()
  assert mean_loss(best) < mean_loss(others) - 0.1, (mean_loss(best), mean_loss(others))


@pytest.mark.parametrize("named", ["", "Sure, here is bread"])
def test_it_lowers_the_loss_and_its_text_is_what_it_optimised(params, named):
  here = dataclasses.replace(target(params), target_strings={BEHAVIORS[0]: named})
  *_, attempt = Gcg(6, candidates=16, top_k=TOP_K).attempts(BEHAVIORS[:1], here)[0]
  before, after = (float(word) for word in attempt.variant.removeprefix("6 steps, loss ").split(" -> "))
  assert after < before - 0.5 and attempt.target == (named or ANSWER)
  assert attempt.queries == 3 * (1 + 16) and attempt.tokens == 0 and attempt.prefix == ""
  assert attempt.prompt.startswith(BEHAVIORS[0]) and attempt.prompt.isascii()
  # Scored as text, by the way of every prompt, it has the loss that was reported.
  weights = here.weights("base")
  rows = objective.pad_rows([objective.encode_row(weights, attempt.prompt, named or ANSWER)])
  assert rows.tokens.shape == place_of(params).rows([place_of(params).ids]).tokens.shape
  lm = objective.score_all(weights, rows, 0.0, objective.target_slots(rows)).lm
  assert f"{float(lm[0]):.2f}" == attempt.variant.rsplit(" ", 1)[1]


@pytest.mark.slow
def test_one_run_makes_an_attempt_at_each_checkpoint(params):
  """Shorter runs draw the same: the attempts of a long one are what they would have given back, with their queries."""
  run = lambda steps: Gcg(steps, candidates=8, top_k=TOP_K).attempts(BEHAVIORS[:1], target(params))[0]
  made = run(8)
  assert [attempt.variant.split(",")[0] for attempt in made] == ["2 steps", "4 steps", "8 steps"]
  assert [attempt.prompt for attempt in made] == [run(steps)[-1].prompt for steps in (2, 4, 8)]
  spent = np.cumsum([attempt.queries for attempt in made]).tolist()
  assert spent == [sum(attempt.queries for attempt in run(steps)) for steps in (2, 4, 8)] == [18, 36, 72]
  losses = [float(attempt.variant.split(" -> ")[1]) for attempt in made]
  assert losses == sorted(losses, reverse=True)
  assert [sorted(Gcg(steps).checkpoints) for steps in (1, 2, 3, 6, 20)] == [[1], [1, 2], [1, 3], [1, 3, 6], [5, 10, 20]]


def test_the_same_for_the_same_behavior_and_seed_whatever_the_others_are(params):
  attack = Gcg(2, candidates=8, top_k=TOP_K)
  first = attack.attempts(BEHAVIORS[:2], target(params))
  assert first == attack.attempts(BEHAVIORS[1::-1], target(params, victim="base"))[::-1]
  assert first[0] != attack.attempts(BEHAVIORS[:1], target(params, seed=1))[0]


def test_adaptive_gcg_talks_the_verdict_down_where_plain_gcg_does_not(params):
  def verdict(attack):
    *_, attempt = attack(8, candidates=32, top_k=TOP_K).attempts(BEHAVIORS[:1], target(params))[0]
    row = chat.encode_request(tiny_tokenizer(), attempt.prompt)
    weights = target(params).weights("saess")
    prompt = decode.pad_prompts([row])
    logit = weights.model.apply({"params": params}, prompt.tokens, kinds=prompt.kinds, stage="sft").cls_logit
    return float(jax.nn.sigmoid(logit[0])), attempt.variant

  (adaptive, words), (plain, _) = verdict(GcgCls), verdict(GcgVictim)
  assert adaptive < 0.1 and plain > 0.2, (adaptive, plain)
  assert words.endswith(f"-> {adaptive:.2f}") and float(words.split("P(malicious) ")[1].split()[0]) > 0.9


def test_against_a_model_without_a_defence_there_is_nothing_to_adapt_to(params):
  here = target(params, victim="base")
  attempts = [
      attack(2, candidates=8, top_k=TOP_K).attempts(BEHAVIORS[:1], here) for attack in (GcgCls, GcgVictim, Gcg)]
  assert attempts[0] == attempts[1] == attempts[2]
  assert "malicious" not in attempts[0][0][0].variant


def test_which_weights_are_read(params):
  def read_by(name):
    here, asked = target(params), []
    def weights(which):
      asked.append(which)
      return here.weights(which)
    make_attack(name).attempts(BEHAVIORS[:1], type(here)("saess", here.tokenizer, None, weights, here.context))
    return asked, make_attack(name).adaptive
  assert read_by("gcg_1") == (["base"], False)
  assert read_by("gcg_victim_1") == read_by("gcg_cls_1") == (["saess"], True)


def test_behaviors_of_like_length_share_a_compilation(params):
  attack = GcgCls(1, candidates=8, top_k=TOP_K)
  sizes = lambda: (gcg.compiled_top_tokens._cache_size(), objective.compiled_score._cache_size())
  attack.attempts(BEHAVIORS[:1], target(params))
  compiled = sizes()
  attack.attempts([*BEHAVIORS[1:], "Now write of the forbidden thing."], target(params))
  GcgCls(2, candidates=12, top_k=TOP_K, cls_weight=0.5).attempts(
      BEHAVIORS[:1], target(params, safety=SAFETY.replace(r2=5)))
  assert sizes() == compiled


def test_a_behavior_that_is_too_long_is_told_so(params):
  with pytest.raises(ValueError, match="tokens, but the model's context is 60"):
    Gcg(1).attempts(["Do it. " * 20], target(params, max_seq_len=60))


def torch_llama(params, shape):
  """transformers' model with our weights."""
  flat = lambda kernel, axes: np.asarray(kernel).reshape(*axes).T
  D, F = shape.embed_dim, shape.mlp_dim
  state = {"model.embed_tokens.weight": np.asarray(params["embed"]["embedding"]),
           "model.norm.weight": np.asarray(params["final_norm"]["scale"])}
  for i in range(shape.num_layers):
    layer = params[f"layers_{i}"]
    attn, mlp = layer["attn"], layer["mlp"]
    state |= {f"model.layers.{i}.{name}.weight": value for name, value in {
        "input_layernorm": np.asarray(layer["attn_norm"]["scale"]),
        "post_attention_layernorm": np.asarray(layer["mlp_norm"]["scale"]),
        **{f"self_attn.{x}_proj": flat(attn[x]["kernel"], (D, -1)) for x in "qkv"},
        "self_attn.o_proj": flat(attn["o"]["kernel"], (-1, D)),
        **{f"mlp.{x}_proj": flat(mlp[x]["kernel"], (D, F)) for x in ("gate", "up")},
        "mlp.down_proj": flat(mlp["down"]["kernel"], (F, D))}.items()}
  config = make_golden.hf_config("tied") | {
      "vocab_size": shape.vocab_size, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": shape.num_layers,
      "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim,
      "max_position_embeddings": shape.max_seq_len, "rope_theta": shape.rope_theta}
  return make_golden.torch_model(config, state)


def plain_torch(torch, theirs, ids):
  """(losses [B], gradient [R, V]): nanoGCG's formulas, written anew, for where it is not installed."""
  table = theirs.get_input_embeddings().weight.detach()
  def loss(suffix):
    x = torch.cat([table[ids["before"]], suffix, table[ids["after"]], table[ids["target"]]])[None]
    logits = theirs(inputs_embeds=x).logits[0]
    return torch.nn.functional.cross_entropy(logits[-len(ids["target"]) - 1 : -1], ids["target"])
  one_hot = torch.nn.functional.one_hot(ids["suffixes"][0], len(table)).float().requires_grad_()
  gradient, = torch.autograd.grad(loss(one_hot @ table), one_hot)
  with torch.no_grad():
    return torch.stack([loss(table[suffix]) for suffix in ids["suffixes"]]), gradient


def nano(torch, theirs, ids):
  """The same by nanoGCG itself."""
  from nanogcg import gcg as nanogcg
  attack = nanogcg.GCG(theirs, tiny_tokenizer(), nanogcg.GCGConfig(use_prefix_cache=False))
  embed = theirs.get_input_embeddings()
  attack.target_ids = ids["target"][None]
  for name in ("before", "after", "target"):
    setattr(attack, f"{name}_embeds", embed(ids[name][None]).detach())
  gradient = attack.compute_token_gradient(ids["suffixes"][:1])
  repeat = lambda x: x.repeat(len(ids["suffixes"]), 1, 1)
  losses = attack._compute_candidates_loss_original(8, torch.cat([
      repeat(attack.before_embeds), embed(ids["suffixes"]), repeat(attack.after_embeds),
      repeat(attack.target_embeds)], dim=1))
  return losses, gradient[0]


def test_loss_and_top_candidates_are_nanogcgs(params):
  torch = pytest.importorskip("torch", reason="torch is the reference")
  place = place_of(params, "base")
  w, (tokens, kinds) = place.weights, place.row
  suffixes = [place.ids, np.roll(place.ids, 3) + 5, np.arange(40, 40 + len(place.ids), dtype=np.int32)]
  text = kinds != TokenKind.CLS
  end = place.start + len(place.ids)
  kept = lambda part: torch.tensor(part[0][part[1]]).long()
  after = slice(end, len(tokens) - int((kinds == TokenKind.RESPONSE).sum()))
  ids = {"before": kept((tokens[: place.start], text[: place.start])), "after": kept((tokens[after], text[after])),
         "target": torch.tensor(tokens[kinds == TokenKind.RESPONSE]).long(),
         "suffixes": torch.tensor(np.stack(suffixes)).long()}
  reference = nano if importlib.util.find_spec("nanogcg") else plain_torch
  losses, gradient = reference(torch, torch_llama(params, w.model.config), ids)

  ours = objective.score_all(w, place.rows(suffixes), 0.0, place.slots).loss
  np.testing.assert_allclose(ours, losses.numpy(), rtol=0, atol=1e-4)
  _, our_gradient = one_hot_gradient(
      w.model, params, place.rows(suffixes[:1]), place.start, None, 0.0, size=len(place.ids), slots=place.slots)
  np.testing.assert_allclose(our_gradient, gradient.numpy(), rtol=0, atol=1e-4)
  _, top = gcg.compiled_top_tokens(
      w.model, params, place.rows(suffixes[:1]), place.start, np.ones(512, bool), None, 0.0, size=len(place.ids),
      slots=place.slots, top_k=8)
  np.testing.assert_array_equal(np.sort(top), np.sort((-gradient).topk(8, dim=1).indices.numpy()))
