"""The decoder against slow references: whole passes of the model, and the policy replayed over its own verdicts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from saess_jax import config, decode, generate, hf, model, policy, sampling, sharding
from saess_jax.config import SafetyConfig
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.sampling import SamplingConfig

TINY = config.model_config("tiny", scan_layers=False)
BREAK, REFUSAL = [10], [11, 12, 13, 14]
ROWS = [
    (np.asarray([3, 4, 5, 0, 9, 8]), np.asarray([2, 3, 3, 1, 4, 4])),
    (np.asarray([3, 40, 5, 60, 7, 8, 0, 9, 8]), np.asarray([2, 3, 3, 3, 3, 3, 1, 4, 4])),
    (np.asarray([3, 44, 5, 0, 9, 8]), np.asarray([2, 3, 3, 1, 4, 4])),
]
SAMPLING = SamplingConfig(temperature=0.8, top_k=40, top_p=0.9)


class Words:
  """As much of a tokenizer as decode_config asks for."""

  eos_token_id, chat_template = 7, None

  def __call__(self, text, **_):
    return {"input_ids": BREAK if text == "\n\n" else REFUSAL if text else []}


@functools.cache
def jitted(shape=TINY):
  return jax.jit(functools.partial(decode.decode, model.Llama(shape)))


@functools.cache
def jitted_apply():
  return jax.jit(model.Llama(TINY).apply)


def run(
    params, safety=SafetyConfig(), rows=ROWS, prefixes=None, sampling_config=SAMPLING, tokens=24, shape=TINY, **sizes
):
  how = decode.decode_config(Words(), safety, sampling_config, tokens, buffer=48)
  return jitted(shape)(params, decode.pad_prompts(rows, prefixes, **sizes), jax.random.key(5), how)


def pivot(params, quantile=0.5):
  """A threshold that some verdicts of these rows pass and others do not."""
  out = run(params, SafetyConfig(threshold=1.0))
  return float(np.nanquantile(np.concatenate([out.initial_prob, np.ravel(out.cls_prob)]), quantile))


def test_plain_greedy_decoding_equals_whole_passes(tiny_params):
  out = run(tiny_params, None, sampling_config=SamplingConfig(), prefixes=[[], [21, 22, 23], []])
  assert out.lengths.tolist() == [24, 27, 24]
  for row, (tokens, kinds) in enumerate(ROWS):
    prompt = tokens[kinds != TokenKind.CLS].tolist()
    response = out.tokens[row, : out.lengths[row]].tolist()
    logits = model.Llama(TINY).apply({"params": tiny_params}, jnp.asarray([prompt + response])).logits[0]
    forced = [0, 3, 0][row]
    choices = jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist()
    assert choices[forced:] == response[forced:]
  assert out.tokens[1, :3].tolist() == [21, 22, 23] and np.isnan(out.initial_prob).all()


def test_a_response_ends_before_its_first_stop_token(tiny_params):
  prompt = decode.pad_prompts(ROWS, [[], [21, 22, 23], []])
  how = decode.decode_config(Words(), None, SamplingConfig(), 24, buffer=48)
  whole = jitted()(tiny_params, prompt, jax.random.key(5), how)
  stop = int(whole.tokens[0, 5])
  out = jitted()(tiny_params, prompt, jax.random.key(5), how.replace(stop_ids=np.asarray([stop], np.int32)))
  for row, said in enumerate(np.asarray(whole.tokens).tolist()):
    length = said.index(stop) if stop in said else int(whole.lengths[row])
    assert out.lengths[row] == length and out.tokens[row].tolist() == said[:length] + [0] * (48 - length)
  assert out.lengths[0] <= 5


def test_a_stop_token_in_a_prefix_or_a_refusal_stops_nothing(tiny_params):
  """Nor does one that the model would have said in their place: here it is what it begins with."""
  stop = int(run(tiny_params, SafetyConfig(threshold=1.0), sampling_config=SamplingConfig()).tokens[0, 0])
  refusal, prefix = [stop, 12, 13, 14], [stop, 21, stop]
  prompt = decode.pad_prompts(ROWS[:1] * 3, [[], prefix, []])  # Three rows, as is compiled already.
  def said(threshold):
    how = decode.decode_config(Words(), SafetyConfig(threshold=threshold), SamplingConfig(), 24, buffer=48)
    how = how.replace(stop_ids=np.asarray([stop], np.int32), refusal=np.asarray(BREAK + refusal, np.int32))
    out = jitted()(tiny_params, prompt, jax.random.key(5), how)
    return [tokens[:length] for tokens, length in zip(out.tokens.tolist(), out.lengths)]
  alone, behind, _ = said(0.0)
  assert alone[:4] == refusal and behind[:8] == prefix + BREAK + refusal
  alone, behind, _ = said(1.0)  # Nothing intervenes.
  assert alone == [] and behind[:3] == prefix


@pytest.mark.parametrize("dependency", ["low", "medium", "high"])
@pytest.mark.parametrize("prefixes", [None, [[], [21, 22, 23], [31] * 9]])
def test_the_decoder_does_what_the_policy_says_of_its_verdicts(tiny_params, dependency, prefixes):
  safety = SafetyConfig(r1=4, r2=5, r3=4, threshold=pivot(tiny_params), dependency=dependency)
  out = run(tiny_params, safety, prefixes=prefixes)
  replay = policy.replay(out.initial_prob, out.cls_prob, safety)
  for row in range(len(ROWS)):
    np.testing.assert_array_equal(replay.phase[row, : out.steps[row]], out.phase[row, : out.steps[row]])
  np.testing.assert_array_equal(replay.intervened_at, out.intervened_at)
  np.testing.assert_array_equal(replay.leaked, out.leaked)
  np.testing.assert_array_equal((~np.isnan(out.cls_prob)).sum(axis=1), out.evaluations)
  assert dependency == "low" or (out.intervened_at >= 0).any()
  for row, at in enumerate(np.asarray(out.intervened_at)):
    if at >= 0:  # The caller's prefix is never cut short; the refusal follows it at the earliest.
      begin = max(at, len(prefixes[row]) if prefixes else 0)
      refusal = BREAK * int(begin > 0) + REFUSAL
      assert out.tokens[row, begin : begin + len(refusal)].tolist() == refusal
      assert dependency == "medium" or out.lengths[row] == begin + len(refusal)


def stepped(params, row, said, transition_at=-1, intervened_at=99):
  """(verdict, likeliest next token) after each token of `said`, without the loop, the buffers or the policy's state.

  A batch of one through a fresh cache. [CLS] is asked up to the intervention, which cuts back to the transition.
  """
  tokens, kinds = row
  cache_slots, apply = 64, jitted_apply()
  first = model.Llama(TINY).apply(
      {"params": params}, tokens[None], kinds=kinds[None], stage="sft", cache=model.init_cache(TINY, 1, cache_slots))
  cache, slots = first.cache, np.zeros(cache_slots, int)
  slots[: len(kinds)] = kinds
  for t, token in enumerate(said):
    slots[len(kinds) + t] = TokenKind.RESPONSE
    window = [len(kinds) + i for i in range(max(0, t - 4), t + 1)]
    text = slots > TokenKind.CLS
    visible = np.zeros((1, 2, cache_slots), bool)
    visible[0, 0, window], visible[0, 1] = True, text
    step = model.attention.Step(
        slot=np.asarray(len(kinds) + t), visible=visible, refresh=np.asarray([t < intervened_at]),
        sees_cls=np.ones(1, bool))
    out = apply(
        {"params": params}, np.asarray([[0, token]]), kinds=np.asarray([[TokenKind.CLS, TokenKind.RESPONSE]]),
        positions=np.asarray([[0, text.sum()]]), cache=cache, step=step)
    cache = out.cache
    if t == intervened_at - 1:
      slots[len(kinds) + transition_at : len(kinds) + intervened_at] = TokenKind.PAD
    yield jax.nn.sigmoid(out.cls_logit)[0], int(jnp.argmax(out.logits[0, 1]))


def test_each_verdict_is_that_of_a_whole_pass_with_the_same_view(tiny_params):
  """Cached equals uncached, with safety on: layer by layer K and V of every token hold the CLS it saw when new."""
  safety = SafetyConfig(r1=4, r2=5, r3=4, threshold=1.0)
  out = run(tiny_params, safety, rows=ROWS[:1])
  verdicts = [verdict for verdict, _ in stepped(tiny_params, ROWS[0], out.tokens[0, : out.lengths[0]].tolist())]
  np.testing.assert_allclose(verdicts, out.cls_prob[0, : out.lengths[0]], atol=1e-5)


def test_what_follows_a_cut_is_what_a_stepped_pass_says_of_what_stands(tiny_params):
  """The refusal and the rest have the positions that the text gives them, and see nothing of what was cut."""
  safety = SafetyConfig(r2=5, threshold=pivot(tiny_params), rollback=True)
  out = run(tiny_params, safety, sampling_config=SamplingConfig())
  (row,) = np.flatnonzero(out.transition_at > 0)
  said, stopped = out.step_tokens[row, : out.steps[row]].tolist(), int(out.intervened_at[row])
  assert stopped == out.transition_at[row] + safety.tau
  seen = list(stepped(tiny_params, ROWS[row], said, int(out.transition_at[row]), stopped))
  np.testing.assert_allclose([verdict for verdict, _ in seen[:stopped]], out.cls_prob[row, :stopped], atol=1e-5)
  begin = stopped + len(BREAK + REFUSAL)
  assert said[stopped:begin] == BREAK + REFUSAL
  assert said[:stopped] == [int(out.tokens[row, 0]), *[token for _, token in seen[: stopped - 1]]]
  assert said[begin:] == [token for _, token in seen[begin - 1 : -1]] and len(said) == 27


def test_rollback_cuts_to_the_transition_and_leaks_nothing(tiny_params):
  safety = SafetyConfig(r2=5, threshold=pivot(tiny_params), rollback=False)
  kept, cut = run(tiny_params, safety), run(tiny_params, safety.replace(rollback=True))
  rows = np.flatnonzero(np.asarray(kept.transition_at) >= 0)
  assert len(rows)
  for row in rows:
    at = int(kept.transition_at[row])
    assert cut.transition_at[row] == at and cut.leaked[row] == 0 and kept.leaked[row] == safety.tau
    refusal = BREAK * int(at > 0) + REFUSAL
    assert cut.tokens[row, : at + len(refusal)].tolist() == kept.tokens[row, :at].tolist() + refusal
    assert cut.step_tokens[row, : at + 3].tolist() == kept.tokens[row, : at + 3].tolist()


def test_rollback_reaches_into_a_prefix(tiny_params):
  prefix = list(range(100, 120))
  safety = SafetyConfig(threshold=1.0, rollback=True, rule2_keeps_query=True, heeds_query=False)
  calm = run(tiny_params, safety, prefixes=[prefix] * 3)
  out = run(
      tiny_params, safety.replace(threshold=float(np.quantile(calm.cls_prob[:, :20], 0.5))), prefixes=[prefix] * 3)
  rows = np.flatnonzero((np.asarray(out.transition_at) > 0) & (np.asarray(out.intervened_at) <= 20))
  assert len(rows)
  for row in rows:
    at = int(out.transition_at[row])
    refusal = BREAK + REFUSAL
    assert out.tokens[row, : at + len(refusal)].tolist() == prefix[:at] + refusal
    assert out.lengths[row] <= at + 24  # New tokens are counted from what is left of the prefix.
  assert any(out.lengths[row] == out.transition_at[row] + 24 for row in rows)


def test_a_prefix_that_is_not_swept_is_not_judged(tiny_params):
  out = run(tiny_params, SafetyConfig(threshold=1.0, sweep_prefill=False), prefixes=[[5] * 6] * 3)
  judged = ~np.isnan(out.cls_prob)
  assert not judged[:, :6].any() and judged[:, 6].all()


def test_a_prefix_is_judged_whatever_the_schedule_which_begins_behind_it(tiny_params):
  schedule = np.isin(np.arange(48), [1, 3, 4])
  out = run(tiny_params, SafetyConfig(threshold=1.0, schedule=schedule), prefixes=[[], [5] * 6, [5]])
  for row, prefix in enumerate([0, 6, 1]):
    wanted = [*range(prefix), *(prefix + np.flatnonzero(schedule))]
    assert np.flatnonzero(~np.isnan(out.cls_prob[row])).tolist() == wanted and out.evaluations[row] == len(wanted)


def test_a_row_does_not_depend_on_its_neighbours_or_padding(tiny_params):
  together = run(tiny_params)
  alone = run(tiny_params, rows=ROWS[:1], length=64)
  np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])
  np.testing.assert_allclose(together.cls_prob[0], alone.cls_prob[0], atol=1e-5)


def test_scanned_layers_decode_the_same(tiny_params):
  one = run(tiny_params)
  two = run(model.stack_layers(tiny_params), shape=TINY.replace(scan_layers=True))
  np.testing.assert_array_equal(one.tokens, two.tokens)


def test_compiled_once_for_all_numbers(tiny_params):
  fresh = jax.jit(functools.partial(decode.decode, model.Llama(TINY)))
  prompt = decode.pad_prompts(ROWS)
  for tokens, safety, how in [
      (5, SafetyConfig(), SamplingConfig()), (24, SafetyConfig(r1=3, r2=4, r3=5, tau=2, threshold=0.3), SAMPLING),
      (9, SafetyConfig(schedule="annealing", rollback=True, rule2_keeps_query=True),
       SamplingConfig(1.0, 5, 0.5, 0.1, 1.2)),
      (9, SafetyConfig(schedule=np.ones(48, bool)), SamplingConfig(1.0))]:
    made = decode.decode_config(Words(), safety, how, tokens, buffer=48)
    fresh(tiny_params, prompt, jax.random.key(0), made)
  assert fresh._cache_size() == 1


def test_cls_stored_where_tokens_would_see_it_is_refused():
  tokens, kinds = ROWS[0]
  first = np.argsort(kinds != TokenKind.CLS, kind="stable")
  with pytest.raises(ValueError, match="Prompt 0 has CLS in slot 0, where tokens would see it that must not; expected"):
    decode.pad_prompts([(tokens[first], kinds[first])])


LIMIT = jax.jit(sampling._limit)
NOTHING = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), bool)  # Tokens so far, none of which counts.


def test_sampling_keeps_what_top_k_top_p_and_min_p_keep():
  logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
  def seen(how):
    draw = jax.jit(lambda key: sampling.sample(logits, key[None], how, *NOTHING)[0])
    return set(np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 400))).tolist())
  assert seen(SamplingConfig()) == {0}
  assert seen(SamplingConfig(1.0)) == {0, 1, 2, 3}
  assert seen(SamplingConfig(1.0, top_k=2)) == {0, 1}
  assert seen(SamplingConfig(1.0, top_p=0.6)) == {0, 1}
  assert seen(SamplingConfig(1.0, top_p=0.8)) == {0, 1, 2}
  assert seen(SamplingConfig(1.0, top_k=3, top_p=0.6)) == {0, 1}
  assert seen(SamplingConfig(1.0, top_p=0.0)) == {0}
  assert seen(SamplingConfig(1.0, min_p=0.4)) == {0, 1}
  assert seen(SamplingConfig(1.0, min_p=0.25)) == {0, 1, 2}
  assert seen(SamplingConfig(1.0, min_p=1.0)) == {0}


def test_penalty_is_on_what_occurred_and_stands():
  logits = jnp.asarray([[2.0, 1.5, -1.0, -1.5]] * 2)
  tokens, counted = jnp.asarray([[0, 0, 3], [0, 2, 1]]), jnp.asarray([[True, True, True], [False, True, True]])
  pick = lambda penalty: sampling.sample(
      logits, jax.random.split(jax.random.key(0), 2), SamplingConfig(repetition_penalty=penalty), tokens,
      counted).tolist()
  assert pick(1.0) == [0, 0] and pick(2.0) == [1, 0] and pick(0.5) == [0, 1]
  np.testing.assert_allclose(
      sampling._penalize(logits, tokens, counted, 2.0), [[1.0, 1.5, -1.0, -3.0], [2.0, 0.75, -2.0, -1.5]])


def test_limits_are_those_of_transformers():
  torch = pytest.importorskip("torch", reason="transformers' processors need it")
  process = transformers.generation.logits_process
  logits = np.random.default_rng(0).normal(scale=3, size=(4, 64)).astype(np.float32)
  tokens = np.random.default_rng(1).integers(0, 64, (4, 9))
  for penalty, top_k, top_p, min_p in [(1.3, 5, 0.9, 0.1), (0.7, 64, 0.5, 0.3), (1.1, 20, 0.99, 0.01)]:
    how = SamplingConfig(0.7, top_k, top_p, min_p, penalty)
    expected = torch.tensor(logits)
    for processor in (
        process.RepetitionPenaltyLogitsProcessor(penalty), process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(top_k), process.TopPLogitsWarper(top_p), process.MinPLogitsWarper(min_p)):
      expected = processor(torch.tensor(tokens), expected)
    ours = sampling._limit(sampling._penalize(logits, tokens, np.ones_like(tokens, bool), penalty) / 0.7, how)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5)


@given(
    logits=npst.arrays(
        np.float32, (2, 12), elements=st.one_of(st.integers(-24, 24).map(lambda n: n / 4), st.just(-np.inf))),
    top_k=st.integers(0, 14), top_p=st.sampled_from([0.0, 0.1, 0.45, 0.8, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]))
@settings(max_examples=200)
def test_limits_are_those_of_a_sorted_list(logits, top_k, top_p, min_p):
  assume(np.all(np.isfinite(logits).any(axis=1)))
  for row, ours in zip(logits, np.asarray(LIMIT(logits, SamplingConfig(1.0, top_k, top_p, min_p)))):
    descending = np.sort(row.astype(np.float64))[::-1]
    first = np.exp(descending - descending[0])[: top_k or None]
    before = (np.cumsum(first) - first) / np.sum(first)
    assume(not np.any(np.isclose(before, top_p, atol=1e-5)) or top_p in (0, 1))  # Not for rounding to decide.
    kept = ((before < top_p) | (top_p == 1)) & (first >= min_p * (1 - 1e-6))
    kept[0] = True
    lowest = max(np.min(descending[: len(kept)][kept]), np.finfo(np.float32).min)  # -inf is what nobody keeps.
    np.testing.assert_array_equal(ours > -np.inf, row >= lowest)  # Ties stay together.
    np.testing.assert_array_equal(ours[ours > -np.inf], row[ours > -np.inf])


def test_a_mass_of_one_keeps_what_float32_adds_up_to_nothing():
  logits = np.linspace(0, -60, 64, dtype=np.float32)[None]
  assert np.isfinite(LIMIT(logits, SamplingConfig(1.0, top_k=50, top_p=1.0))).sum() == 50
  assert np.isfinite(LIMIT(logits, SamplingConfig(1.0, top_p=0.0, min_p=0.5))).sum() == 1


def test_a_penalty_keeps_the_decoder_from_repeating(tiny_params):
  plain = run(tiny_params, None, sampling_config=SamplingConfig())
  never = run(tiny_params, None, sampling_config=SamplingConfig(repetition_penalty=1e9))
  length = int(never.lengths[0])
  said = never.tokens[0, :length].tolist()
  assert len(set(said)) == length and not set(said) & set(ROWS[0][0].tolist())
  assert len(set(plain.tokens[0].tolist())) < length  # The tiny model does repeat itself.


def test_generator_gives_text_back_in_order(tiny_params):
  tokenizer = hf.byte_tokenizer()
  make = lambda **how: generate.Generator(
      model.Llama(TINY), tiny_params, tokenizer, max_new_tokens=6, batch_size=2, **how)
  prompts, prefixes = ["a", "long prompt of bytes", "mid one"], ["", "Sure, ", ""]
  responses = make(safety=SafetyConfig(dependency="low")).respond(prompts, prefixes)
  assert responses[1].text == "Sure, " + responses[1].generated and responses[1].prefix_tokens == 6
  assert all(len(r.tokens) == len(r.cls_prob) == len(r.phase) for r in responses)
  assert [r.initial_prob for r in responses] == [
      pytest.approx(make(safety=SafetyConfig(dependency="low")).respond([p])[0].initial_prob, abs=1e-5)
      for p in prompts]
  fewer, = make(safety=None).respond(prompts[:1], max_new_tokens=2)
  assert len(fewer.tokens) == 2 and fewer.tokens == make(safety=None).respond(prompts[:1])[0].tokens[:2]
  empty = len(chat.encode_prompt(tokenizer, "x")[0]) - 1
  assert len(make(safety=None).respond(["x" * (256 - empty - 2)], max_new_tokens=2)[0].tokens) == 2
  windowed = generate.Generator(model.Llama(TINY.replace(sliding_window=64)), tiny_params, tokenizer, max_new_tokens=6)
  with pytest.raises(ValueError, match="the model's context is 64"):
    windowed.check_fit(["x" * 80], [""])
  narrow = generate.Generator(model.Llama(TINY.replace(sliding_window=100)), tiny_params, tokenizer, max_new_tokens=2)
  longest = "x" * (100 - empty - 2)  # What fits is not padded beyond the window.
  assert len(narrow.respond([longest])[0].tokens) == 2
  with pytest.raises(ValueError, match="max_new_tokens is 6 and batch_size 0; expected 1 or more"):
    generate.Generator(model.Llama(TINY), tiny_params, tokenizer, max_new_tokens=6, batch_size=0)
  with pytest.raises(ValueError, match="2 soft suffixes were given for 3 prompts"):
    make().respond(prompts, soft_suffixes=np.zeros((2, 1, 48), np.float32))
  with pytest.raises(ValueError, match="max_new_tokens is 7; this generator was made for 1 to 6"):
    make().respond(prompts, max_new_tokens=7)
  with pytest.raises(ValueError, match="the model's context is 256"):
    make().respond(["x" * 300])
  with pytest.raises(ValueError, match="1 prefixes were given for 3 prompts; expected one each"):
    make().respond(["a", "b", "c"], ["Sure"])


def test_a_response_says_what_a_rollback_into_its_prefix_did(tiny_params):
  # The second prefix begins as the refusal does.
  tokenizer, prompts, prefixes = hf.byte_tokenizer(), ["mid one", "a"], ["First, ", "Sure, here is how: "]
  rows = [chat.encode_request(tokenizer, prompt) for prompt in prompts]
  prompt = decode.pad_prompts(rows, [chat.encode_text(tokenizer, prefix) for prefix in prefixes], prefix_length=64)
  decoded = lambda safety: generate._jitted(model.Llama(TINY))[0](  # As the generator's, which compiles nothing more.
      tiny_params, prompt, jax.random.split(jax.random.key(0), 2),
      decode.decode_config(tokenizer, safety, max_new_tokens=6, buffer=96))
  safety = SafetyConfig(threshold=1.0, tau=1, rollback=True, heeds_query=False)
  calm = decoded(safety)
  safety = safety.replace(threshold=float(np.nanmax(calm.cls_prob[0])))
  out = decoded(safety)
  responses = generate.Generator(
      model.Llama(TINY), tiny_params, tokenizer, safety, max_new_tokens=6, batch_size=2).respond(prompts, prefixes)
  cut = int(out.transition_at[0])
  assert 0 < cut < len(prefixes[0])
  for row, response in enumerate(responses):
    tokens, steps = out.tokens[row, : out.lengths[row]].tolist(), int(out.steps[row])
    assert response.text == tokenizer.decode(tokens) and response.ids[: len(tokens)] == tokens
    assert response.tokens == [tokenizer.decode([token]) for token in out.step_tokens[row, :steps].tolist()]
    np.testing.assert_array_equal(response.cls_prob, out.cls_prob[row, :steps])
    for name in ("intervened_at", "leaked", "evaluations", "initial_prob"):
      assert getattr(response, name) == getattr(out, name)[row]
  assert responses[0].text == prefixes[0][:cut] + responses[0].generated
  assert responses[0].generated.startswith(safety.refusal_break)
  assert responses[0].prefix_tokens == len(prefixes[0]) and responses[0].leaked == 0
  assert out.transition_at[1] == 0 and responses[1].text == responses[1].generated == safety.refusal_prefix[:6]
  assert len(responses[1].ids) == 6  # Its length ended it, and no end of turn.


def test_a_row_draws_by_its_place_whatever_stands_beside_it(tiny_params):
  asked = generate.Generator(
      model.Llama(TINY), tiny_params, hf.byte_tokenizer(), SafetyConfig(dependency="low"), max_new_tokens=6,
      batch_size=2)
  prompts, warm = ["long prompt of bytes", "a", "a"], SamplingConfig(temperature=1.0)
  drawn = [r.ids for r in asked.respond(prompts, sampling=warm)]
  assert drawn == [r.ids for r in asked.respond(prompts[::-1], sampling=warm, places=[2, 1, 0])][::-1]
  greedy = [r.ids for r in asked.respond(prompts)]
  assert drawn[1] != drawn[2] and greedy[1] == greedy[2] and greedy[1] not in drawn


@pytest.mark.slow
def test_the_generator_stores_cls_where_the_run_did(tiny_params):
  loud = {**tiny_params, "cls_embedding": 30 * tiny_params["cls_embedding"]}  # So that who sees it says another thing.
  tokenizer, asked = hf.byte_tokenizer(), ["a", "bread", "a long one"]
  said = {
      seen: [r.text for r in generate.Generator(
          model.Llama(TINY), loud, tokenizer, SafetyConfig(dependency="low"), max_new_tokens=8, header_sees_cls=seen
      ).respond(asked)] for seen in (True, False)}
  rows = [chat.encode_request(tokenizer, text, header_sees_cls=False) for text in asked]
  by_hand = decode.decode(
      model.Llama(TINY), loud, decode.pad_prompts(rows), jax.random.key(0),
      decode.decode_config(tokenizer, SafetyConfig(dependency="low"), max_new_tokens=8, buffer=32))
  assert said[False] == [
      tokenizer.decode(tokens[:length]) for tokens, length in zip(by_hand.tokens, by_hand.lengths)] != said[True]


def test_where_cls_is_stored_is_nothing_to_who_never_sees_it(tiny_params):
  """So the first token follows the header's last, also where [CLS] is stored between the two."""
  said = [[r.tokens for r in generate.Generator(
      model.Llama(TINY), tiny_params, hf.byte_tokenizer(), None, max_new_tokens=8, header_sees_cls=seen
  ).respond(["a", "bread", "a long one"])] for seen in (True, False)]
  assert said[0] == said[1]


def test_no_mask_of_the_square_of_the_prompt_is_made_with_or_without_safety():
  llama = model.Llama(config.model_config("tiny", scan_layers=False, max_seq_len=8192, attention="chunked"))
  params = nn.unbox(jax.eval_shape(llama.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
  def temporary(size, safety):
    prompt = decode.pad_prompts([(np.ones(size - 2, np.int32), np.asarray([3] * (size - 5) + [1, 4, 4]))], length=size)
    run = jax.jit(functools.partial(decode.start, llama))
    how = decode.decode_config(Words(), safety, max_new_tokens=8)
    return run.lower(params, prompt, jax.random.key(0), how).compile().memory_analysis().temp_size_in_bytes
  for safety in (None, SafetyConfig()):
    assert temporary(8192, safety) < 4.2 * temporary(2048, safety)


def test_vmap_over_settings(tiny_params):
  """Thresholds and tau as axes: the same as one after the other."""
  how = decode.decode_config(Words(), SafetyConfig(), SAMPLING, 16, buffer=32)
  prompt, low = decode.pad_prompts(ROWS), pivot(tiny_params)
  def one(threshold, tau):
    safety = how.safety.replace(threshold=threshold, tau=tau)
    out = decode.decode(model.Llama(TINY), tiny_params, prompt, jax.random.key(5), how.replace(safety=safety))
    return out.tokens, out.intervened_at, out.cls_prob
  thresholds, taus = jnp.asarray([low, low, 1.0]), jnp.asarray([1, 3, 3])
  together = jax.jit(jax.vmap(one))(thresholds, taus)
  alone = jax.jit(one)
  for i in range(3):
    tokens, intervened_at, cls_prob = alone(thresholds[i], taus[i])
    np.testing.assert_array_equal(together[0][i], tokens)
    np.testing.assert_array_equal(together[1][i], intervened_at)
    np.testing.assert_allclose(together[2][i], cls_prob, atol=1e-5)
  assert len({tuple(row) for row in np.asarray(together[1])}) > 1  # The settings do matter here.


def test_on_a_mesh_batch_over_data_and_heads_over_tensor(tiny_params):
  mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
  boxed = jax.eval_shape(model.Llama(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  params = jax.device_put(tiny_params, sharding.shardings(boxed, mesh))
  assert params["layers_0"]["attn"]["q"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor", None)
  safety, rows = SafetyConfig(threshold=pivot(tiny_params)), ROWS + ROWS[:1]
  prompt = jax.device_put(decode.pad_prompts(rows), sharding.batch_sharding(mesh))
  how = decode.decode_config(Words(), safety, SamplingConfig(), 24, buffer=48)
  with mesh, nn.logical_axis_rules(sharding.RULES):
    out = jax.jit(functools.partial(decode.decode, model.Llama(TINY)))(params, prompt, jax.random.key(5), how)
  alone = run(tiny_params, safety, rows=rows, sampling_config=SamplingConfig())
  np.testing.assert_array_equal(out.tokens, alone.tokens)
  np.testing.assert_array_equal(out.intervened_at, alone.intervened_at)
  np.testing.assert_allclose(out.cls_prob, alone.cls_prob, atol=1e-5)


def test_a_step_without_a_due_verdict_is_the_same_alone_and_beside_rows_that_have_one(tiny_params):
  """Alone it runs without the [CLS] row; beside a row in alarm, which is checked at every token, with it."""
  safety = SafetyConfig(threshold=pivot(tiny_params), tau=30, schedule=np.arange(48) % 3 == 1)
  together, alone = run(tiny_params, safety), run(tiny_params, safety, rows=ROWS[:1])
  assert len({tuple(row) for row in np.isnan(together.cls_prob).tolist()}) > 1  # Rows are asked at different steps.
  np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])
  np.testing.assert_allclose(together.cls_prob[0], alone.cls_prob[0], atol=1e-5)


def products(jaxpr):
  """Every product of a program, those of its loops and calls too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns"):
        yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_multiplied_as_such_on_every_device(tiny_params, dtype):
  """By default a TPU would round the operands to bfloat16."""
  how = decode.decode_config(Words(), buffer=32, max_new_tokens=8)
  program = jax.make_jaxpr(functools.partial(decode.decode, model.Llama(TINY.replace(dtype=dtype))))(
      tiny_params, decode.pad_prompts(ROWS), jax.random.key(0), how)
  found = [(equation.invars[0].aval.dtype.name, str(equation.params["precision"])) for equation in products(program)]
  assert len(found) > 20 and any(dtype in operand for operand, _ in found)
  for operand, precision in found:
    assert ("HIGHEST" in precision) == (operand == "float32"), (operand, precision)


def refused_by_check(message, rows=ROWS, prefixes=None, shape=TINY, **changes):
  how = decode.decode_config(Words(), max_new_tokens=24, buffer=32)
  with pytest.raises(ValueError, match=message):
    decode.check(shape, decode.pad_prompts(rows, prefixes), how.replace(**changes))


@pytest.mark.parametrize("words", [
    {"dependency": "high"}, {"schedule": "first"}, {"schedule": np.ones(32, bool)}, {"refusal_prefix": "No, because"}])
def test_words_that_decode_config_has_not_read_are_refused(tiny_params, words):
  """They have become arrays, and would do nothing."""
  how = decode.decode_config(Words(), SafetyConfig(), max_new_tokens=4, buffer=32)
  run = lambda config: jax.eval_shape(
      functools.partial(decode.decode, model.Llama(TINY)), tiny_params, decode.pad_prompts(ROWS), jax.random.key(0),
      config)
  with pytest.raises(ValueError, match="a schedule, a refusal or a dependency that decode_config has not read"):
    run(how.replace(safety=how.safety.replace(**words)))
  run(how.replace(safety=how.safety.replace(dependency="low", tau=2)))


def test_what_only_values_tell_is_checked_before_decoding():
  decode.check(TINY, decode.pad_prompts(ROWS), decode.decode_config(Words(), max_new_tokens=24, buffer=32))
  refused_by_check("prefix of 9 tokens and 24 new ones to come, but the buffer holds 32", prefixes=[[], [], [5] * 9])
  refused_by_check("id 60 in prompts is outside the vocabulary of 50", shape=TINY.replace(vocab_size=50))
  refused_by_check("id 700 in response prefixes is outside", prefixes=[[700], [], []])
  short = [(np.asarray([3, 4, 0]), np.asarray([2, 3, 1]))]
  refused_by_check("id 14 in the refusal is outside", shape=TINY.replace(vocab_size=14), rows=short)
  rollback = decode.decode_config(Words(), SafetyConfig(rollback=True), max_new_tokens=30, buffer=32)
  low = rollback.replace(safety=rollback.safety.replace(dependency="low"))  # Nothing is ever cut.
  decode.check(TINY, decode.pad_prompts(ROWS), low)
  with pytest.raises(ValueError, match="30 new ones to come, and rollback may cut 3, but the buffer holds 32"):
    decode.check(TINY, decode.pad_prompts(ROWS), rollback)
  with pytest.raises(ValueError, match="padded to 64 slots, beyond the sliding window of 60, where .CLS."):
    decode.check(TINY.replace(sliding_window=60), decode.pad_prompts(ROWS, length=64), rollback)
  for context in ({"max_seq_len": 34}, {"sliding_window": 34}):
    refused_by_check(
        "Row 1 has 8 tokens, a response prefix of 3 and 24 new ones to come, 35 in all, but the model's context is 34",
        prefixes=[[], [5] * 3, []], shape=TINY.replace(**context))
  decode.check(
      TINY.replace(max_seq_len=35), decode.pad_prompts(ROWS, [[], [5] * 3, []]),
      decode.decode_config(Words(), max_new_tokens=24, buffer=32))
  refused_by_check("Prompt 0 is empty", rows=[(np.asarray([3, 0, 9]), np.asarray([2, 1, 4]))])


@pytest.mark.parametrize("call, message", [
    (lambda: SamplingConfig(temperature=-0.1), "temperature is -0.1; expected 0 or more"),
    (lambda: SamplingConfig(top_p=1.5), "top_p is 1.5; expected 0 to 1"),
    (lambda: SamplingConfig(repetition_penalty=0.0), "repetition_penalty is 0"),
    (lambda: decode.decode_config(Words(), SafetyConfig(schedule=np.ones(7, bool)), buffer=32, max_new_tokens=8),
     "7 entries; expected one for each of 8"),
    (lambda: decode.pad_prompts([(np.ones(4), np.asarray([3, 1, 4]))]), "0 has 4 tokens and 3 kinds"),
    (lambda: decode.pad_prompts([(np.ones(4), np.asarray([0, 3, 1, 4]))]), "0 has PAD before other tokens"),
    (lambda: decode.pad_prompts([]), "No prompts"),
    (lambda: decode.pad_prompts(ROWS, [[1]]), "1 response prefixes were given for 3 prompts"),
    (lambda: decode.pad_prompts(ROWS, length=8), "longest prompt has 9 tokens"),
    (lambda: decode.pad_prompts([(np.ones(3), np.full(3, TokenKind.QUERY))]), "0 CLS tokens"),
    (lambda: decode.pad_prompts([(np.ones(3), np.asarray([3, 1, 5]))]), "0 holds RESPONSE tokens; give .* `prefixes`"),
    (lambda: decode._keys(jax.random.PRNGKey(0), decode.pad_prompts(ROWS)), r"array of uint32 \(2,\); expected keys"),
    (lambda: decode.decode_config(Words(), max_new_tokens=0), "max_new_tokens is 0"),
    (lambda: decode.decode_config(Words(), max_new_tokens=64, buffer=32), "expected 1 to the buffer of 32"),
    (lambda: decode.decode_config(Words(), SafetyConfig(refusal_prefix="")), "has no tokens"),
    (lambda: decode.decode_config(Words(), SafetyConfig(schedule="hourly")), "schedule is 'hourly'"),
])
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_what_fits_a_sliding_window_is_decoded_whatever_its_padding(tiny_params):
  how, prompt = decode.decode_config(Words(), max_new_tokens=24, buffer=48), decode.pad_prompts(ROWS)
  windowed = TINY.replace(sliding_window=32)  # 32 slots of a prompt, 8 of which are tokens, and 48 of a response.
  decode.check(windowed, prompt, how)
  jax.tree.map(
      np.testing.assert_array_equal,
      *(jitted(shape)(tiny_params, prompt, jax.random.key(5), how) for shape in (TINY, windowed)))
  with pytest.raises(ValueError, match="33 in all, but the model's context is 32"):
    decode.check(windowed, prompt, how.replace(max_new_tokens=25))
  with pytest.raises(ValueError, match="32 stored tokens exceed the sliding window of 31"):
    jitted(TINY.replace(sliding_window=31))(tiny_params, prompt, jax.random.key(5), how)


def test_room_is_kept_for_what_rollback_may_cut():
  assert decode.buffer_for(64, None) == decode.buffer_for(64, SafetyConfig(tau=10**6)) == 64
  assert decode.buffer_for(64, SafetyConfig(tau=3, rollback=True)) == 96
  assert decode.buffer_for(64, SafetyConfig(tau=3, rollback=True, dependency="low")) == 64


def test_a_schedule_of_one_s_own_is_of_new_tokens():
  own = np.arange(8) % 2 == 0
  how = decode.decode_config(Words(), SafetyConfig(schedule=own), max_new_tokens=8, buffer=32)
  np.testing.assert_array_equal(how.schedule, np.pad(own, (0, 24)))
  with pytest.raises(ValueError, match="schedule is a list; expected a name, or a bool array"):
    SafetyConfig(schedule=[True])
