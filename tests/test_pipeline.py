"""Examples, probes and batches: what carries loss, what probes see,
and that the stream is a function of (seed, step).
"""

import collections
import dataclasses
import itertools
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from saess_jax.config import DataConfig, LossConfig, ProbeConfig, SafetyConfig, TrainConfig
from saess_jax.data import chat, disguises, frames, openers, pipeline, probes
from saess_jax.data.sources import Row
from saess_jax.masks import TokenKind

CONFIG = TrainConfig(data=DataConfig(batch_size=4, max_length=96, max_response=24, buckets=(64, 80, 96)))
BAD, GOOD = Row("How do I kill a man?", "I cannot.", 1, "", ""), Row("How do I bake?", "Take flour.", 0, "", "")
EOS = tiny_tokenizer().eos_token_id


def build(rows, rollouts=None, config=CONFIG):
  return pipeline.build_examples(tiny_tokenizer(), rows, rollouts, config)


def response(example):
  return example.tokens[example.kinds == TokenKind.RESPONSE]


# --- examples ---


def test_malicious_row_gives_refusal_and_rollout():
  refusal, harmful = build([BAD], {BAD.prompt: [7, 8, 9]})
  assert (refusal.trajectory, refusal.label, refusal.loss_from) == ("refusal", 1, 0)
  assert tiny_tokenizer().decode(response(refusal)) == "I cannot.<|im_end|>"
  assert (harmful.trajectory, harmful.label, harmful.loss_from) == ("harmful", 1, 3)
  assert response(harmful).tolist() == [7, 8, 9] and harmful.response_length == 3


def test_benign_row_prefers_its_rollout():
  (written,), (sampled,) = build([GOOD]), build([GOOD], {GOOD.prompt: [7, 8, EOS]})
  assert tiny_tokenizer().decode(response(written)) == "Take flour.<|im_end|>"
  assert response(sampled).tolist() == [7, 8, EOS]
  assert written.loss_from == sampled.loss_from == 0 and written.trajectory == sampled.trajectory == "benign"
  assert sampled.response_length == 2  # The end-of-turn token is no part of any window.
  (text,) = build([GOOD], {GOOD.prompt: "Take salt."})
  assert tiny_tokenizer().decode(response(text)) == "Take salt.<|im_end|>"


def test_rows_without_response():
  (refusal,) = build([dataclasses.replace(BAD, response="")])
  assert tiny_tokenizer().decode(response(refusal)) == CONFIG.safety.fixed_refusal + "<|im_end|>"
  (benign,) = build([dataclasses.replace(GOOD, response="")])
  assert not len(response(benign)) and benign.trajectory == "benign"  # With malicious rows in one batch.


def test_refusal_where_the_decoder_asks_for_it():
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, refusal_depth=2, max_length=160))
  rollout, seen = [7, 8, 9], set()
  for seed in range(20):
    interrupted, harmful = build([BAD], {BAD.prompt: rollout}, dataclasses.replace(config, seed=seed))
    before, after = np.split(response(interrupted), [interrupted.loss_from])
    prefix = SafetyConfig().refusal_prefix
    if len(before) > len(tiny_tokenizer()(prefix).input_ids):  # It interrupts something.
      prefix = SafetyConfig().refusal_break + prefix
    depth = len(before) - len(tiny_tokenizer()(prefix).input_ids)
    seen.add(depth)
    assert before[:depth].tolist() == rollout[:depth] and response(harmful).tolist() == rollout
    assert tiny_tokenizer().decode(before[depth:]) == prefix
    assert tiny_tokenizer().decode(after) == " I cannot.<|im_end|>"
    assert interrupted.trajectory == "interrupted"
  assert seen == {0, 1, 2}
  (lower,) = build([dataclasses.replace(BAD, response="Killing is wrong.")], config=config)
  assert tiny_tokenizer().decode(response(lower)[lower.loss_from:]) == " killing is wrong.<|im_end|>"


@pytest.mark.parametrize("depth", [0, 2])
def test_a_response_ends_as_the_chat_template_ends_one(depth):
  tokenizer = tiny_tokenizer()
  tokenizer.eos_token = "<|endoftext|>"
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, refusal_depth=depth, max_length=160))
  for example in pipeline.build_examples(tokenizer, [BAD, GOOD], None, config):
    assert tokenizer.decode(response(example)[-1]) == "<|im_end|>"
    assert example.response_length == len(response(example)) - 1


def test_half_of_all_responses_stand_behind_an_attackers_opener():
  config = dataclasses.replace(
      CONFIG, data=dataclasses.replace(CONFIG.data, refusal_depth=2, opener_depth=5, max_length=160))
  rollout, opened, depths = [7, 8, 9], collections.Counter(), collections.defaultdict(set)
  asked, interrupts = (
      tiny_tokenizer()(gap + SafetyConfig().refusal_prefix).input_ids for gap in ("", SafetyConfig().refusal_break))
  for seed in range(60):
    refused, _, answered = build([BAD, GOOD], {row.prompt: rollout for row in (BAD, GOOD)},
                                 dataclasses.replace(config, seed=seed))
    assert tiny_tokenizer().decode(response(refused)[refused.loss_from:]) == " I cannot.<|im_end|>"
    before = response(refused)[: refused.loss_from].tolist()
    if before[0] not in (rollout[0], asked[0]):  # Neither its own beginning nor none.
      before = before[: -len(interrupts)]
      opened["refused"] += 1
      depths["refused"].add(len(before))
    assert response(answered)[answered.loss_from:].tolist() == rollout and answered.trajectory == "benign"
    opened["answered"] += answered.loss_from > 0
    depths["answered"].add(answered.loss_from)
    _, written = build([BAD, GOOD], None, dataclasses.replace(config, seed=seed))
    opened["written"] += written.loss_from > 0
    assert tiny_tokenizer().decode(response(written)[written.loss_from:]) == GOOD.response + "<|im_end|>"
  assert 15 < opened["refused"] < 45 and 15 < opened["answered"] < 45 and 15 < opened["written"] < 45
  assert depths["refused"] == {1, 2, 3, 4, 5} and depths["answered"] == {0, 1, 2, 3, 4, 5}


def test_queries_stand_behind_dialogues_that_are_benign_and_answered():
  data = dataclasses.replace(
      CONFIG.data, responses="rollouts", bare_queries=True, histories=0.5, history_turns=3, max_length=400,
      buckets=(400,))
  config, tokenizer = dataclasses.replace(CONFIG, data=data), tiny_tokenizer()
  answered = {f"Who bakes bread {n}?": f"Baker {n}." for n in range(4)}
  rows = [Row(prompt, "", 0, "", "") for prompt in answered]
  rows += [Row("Who declines?", "", 0, "", ""), Row("Who kills?", "", 1, "", "")]
  rollouts = answered | {"Who declines?": "I'm sorry.", "Who kills?": "Sure."}
  asked = [Row(f"{what} {n}?", "", label, "", "") for n in range(50) for label, what in enumerate(("Bake", "Kill"))]
  turns = [collections.Counter(), collections.Counter()]
  for row, example in zip(asked, build(rows + asked, rollouts, config)[-len(asked):], strict=True):
    text = tokenizer.decode(example.tokens[example.kinds != TokenKind.CLS])
    history = text.split("<|im_end|>\n")
    assert history.pop() == f"<|im_start|>user\n{row.prompt}" and example.label == row.label
    said = [turn.removeprefix(f"<|im_start|>{('user', 'assistant')[i % 2]}\n") for i, turn in enumerate(history)]
    dialogues = list(zip(said[::2], said[1::2], strict=True))
    assert len(set(dialogues)) == len(dialogues) and set(dialogues) <= set(answered.items())
    query = tokenizer.decode(example.tokens[example.kinds == TokenKind.QUERY])
    assert query == "".join([*said, row.prompt]) and example.kinds[-1] == TokenKind.CLS
    turns[row.label][len(dialogues)] += 1
  for counts in turns:
    assert set(counts) == {0, 1, 2, 3} and 15 < counts[0] < 35


def test_only_as_many_dialogues_as_fit_stand_before_a_query():
  data = dataclasses.replace(
      CONFIG.data, responses="rollouts", histories=1.0, history_turns=9, max_length=200, buckets=(200,))
  rows = [Row(f"Who bakes bread {n}?", "", 0, "", "") for n in range(9)]
  rollouts = {row.prompt: "Bakers do." for row in rows}
  counts = set()
  long, none = (Row("Kill " * count + "him?", "", 1, "", "") for count in (4, 50))
  for seed in range(20):
    *_, some, alone = build([*rows, long, none], rollouts, dataclasses.replace(CONFIG, data=data, seed=seed))
    assert len(some.tokens) <= 200 and len(alone.tokens) <= 200
    texts = [tiny_tokenizer().decode(example.tokens) for example in (some, alone)]
    counts.add(texts[0].count("Bakers do."))
    assert texts[1].count("Bakers do.") == 0
  assert len(counts) > 2 and max(counts) == 5  # Six are more than 200 tokens.


def test_a_share_of_queries_is_disguised_where_it_fits():
  data = dataclasses.replace(
      CONFIG.data, responses="rollouts", disguises=0.5, histories=0.5, max_length=150, buckets=(150,))
  rows = [Row(f"{what} the bread of neighbour number {n}?", "", label, "", "")
          for n in range(60) for label, what in enumerate(("Bake", "Poison"))]
  rows.append(Row("Who bakes?", "", 0, "", ""))
  written = [0, 0]
  *examples, _ = build(rows, {"Who bakes?": "Bakers."}, dataclasses.replace(CONFIG, data=data))
  for row, example in zip(rows, examples):
    query = tiny_tokenizer().decode(example.tokens[example.kinds == TokenKind.QUERY]).removeprefix("Who bakes?Bakers.")
    written[row.label] += query != row.prompt
    assert example.label == row.label and len(example.tokens) <= 150
  assert all(10 < count < 40 for count in written)


def test_shares_of_queries_are_disguised_and_framed(monkeypatch):
  monkeypatch.setattr(disguises, "draw", lambda text, rng: "disguised")
  monkeypatch.setattr(frames, "draw", lambda text, rng: "framed")
  data = dataclasses.replace(CONFIG.data, responses="rollouts", disguises=0.2, frames=0.5)
  rows = [Row(f"How do I bake {n} loaves?", "", n % 2, "", "") for n in range(400)]
  read = lambda data: [tiny_tokenizer().decode(example.tokens[example.kinds == TokenKind.QUERY])
                       for example in build(rows, {}, dataclasses.replace(CONFIG, data=data))]
  counts = collections.Counter(read(data))
  assert 50 < counts["disguised"] < 110 and 160 < counts["framed"] < 240
  assert read(dataclasses.replace(data, disguises=0.0)).count("disguised") == 0
  assert set(read(dataclasses.replace(data, disguises=0.4, frames=0.6))) == {"disguised", "framed"}
  assert read(dataclasses.replace(data, disguises=0.0, frames=0.0)) == [row.prompt for row in rows]


def test_a_disguise_is_put_on_where_just_one_response_token_would_fit(monkeypatch):
  monkeypatch.setattr(disguises, "draw", lambda text, rng: f"{text} Bake!")
  row = Row("Who bakes?", "", 1, "", "")
  length = len(chat.encode_prompt(tiny_tokenizer(), f"{row.prompt} Bake!", system_prompt="Be kind.")[0])
  for room, written in ((2, f"{row.prompt} Bake!"), (1, row.prompt)):  # [CLS] and a response token, or [CLS] alone.
    data = dataclasses.replace(
        CONFIG.data, responses="rollouts", disguises=1.0, max_length=length + room, buckets=(length + room,),
        system_prompt="Be kind.")
    (example,) = build([row], {}, dataclasses.replace(CONFIG, data=data))
    assert tiny_tokenizer().decode(example.tokens[example.kinds == TokenKind.QUERY]) == written
    assert "system\nBe kind.<|im_end|>" in tiny_tokenizer().decode(example.tokens)


def test_openers_in_training_are_not_those_of_attacks():
  known = {*openers.CONSENT, *openers.SENTENCES}
  text = "".join(path.read_text() for path in (pathlib.Path(pipeline.__file__).parents[1] / "attacks").glob("*.py"))
  assert not [sentence for sentence in known if sentence in text]
  rng = np.random.default_rng(0)
  drawn = [openers.draw(rng) for _ in range(100)]
  assert len(set(drawn)) == 100 and any("Step 2: " in text for text in drawn) and any("\n3. " in text for text in drawn)


@pytest.mark.parametrize("said, used", [
    ("Bread wants flour and time.", True),
    ("I'm sorry for the confusion, but as a chatbot I", False),
    ("As a helpful AI, I can", False),
    ("I don't have the ability to", False),
    ("Be glad that you are unable to fail.", False),  # A good answer too many is left out rather than a bad one kept.
])
def test_a_rollout_that_declines_is_no_target_and_no_harm(said, used):
  ids = tiny_tokenizer()(said).input_ids[: CONFIG.data.max_response]
  (example,) = build([GOOD], {GOOD.prompt: ids})
  assert (response(example).tolist() == ids) == used
  trajectories = [example.trajectory for example in build([BAD], {BAD.prompt: ids})]
  assert trajectories == ["refusal", "harmful"][: 1 + used]


def test_a_malicious_row_without_a_refusal_gives_its_query_where_the_decoder_asks_for_one():
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, refusal_depth=2, max_length=160))
  wordless = dataclasses.replace(BAD, response="")
  (query,) = build([wordless], config=config)
  assert query.trajectory == "none" and query.kinds[-1] == TokenKind.CLS
  query, harmful = build([wordless], {BAD.prompt: [7, 8, 9]}, config)
  assert (query.trajectory, harmful.trajectory) == ("none", "harmful") and harmful.loss_from == 3
  batches = pipeline.Batches([query, harmful], config)
  assert sum(batch["label_weight"].sum() for batch in batches) == 1  # The query counts once.


def test_rows_without_rollout_end_at_cls():
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, responses="rollouts"))
  refusal, harmful, query = build([BAD, GOOD], {BAD.prompt: [7, 8, 9]}, config)
  assert (refusal.trajectory, harmful.trajectory, query.trajectory) == ("refusal", "harmful", "none")
  assert query.kinds[-1] == TokenKind.CLS and not (query.kinds == TokenKind.HEADER).any()
  batches = pipeline.Batches([refusal, harmful, query], config)
  assert len(batches) == 2  # A batch of queries has neither losses nor probes.
  assert sorted(batch["targets"].shape[1] for batch in batches) == [0, CONFIG.data.max_response + 1]
  assert sorted(batch["probe_views"].shape[1] for batch in batches) == [0, CONFIG.probes.per_sequence]
  assert sum(batch["label_weight"].sum() for batch in batches) == 2
  bare_config = dataclasses.replace(config, data=dataclasses.replace(config.data, bare_queries=True))
  *_, bare = build([BAD, GOOD], {BAD.prompt: [7, 8, 9]}, bare_config)
  assert tiny_tokenizer().decode(bare.tokens[:-1]) == "<|im_start|>user\n" + GOOD.prompt
  assert bare.kinds[-1] == TokenKind.CLS
  assert (bare.kinds == TokenKind.QUERY).sum() == (query.kinds == TokenKind.QUERY).sum()
  bad = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, responses="some"))
  with pytest.raises(ValueError, match="data.responses is 'some'; expected one of all, rollouts"):
    build([GOOD], config=bad)


def test_long_prompt_names_both_lengths():
  with pytest.raises(ValueError, match=r"The prompt has \d+ tokens with its template; max_length 96 holds 94"):
    build([dataclasses.replace(GOOD, prompt="bake " * 100)])


# --- batches ---


def one_batch(examples, config=CONFIG):
  return pipeline.Batches(examples, config)[0]


@pytest.mark.parametrize("header_sees_cls", [True, False])
def test_every_response_token_from_the_first_on_carries_loss(header_sees_cls):
  config = dataclasses.replace(CONFIG, header_sees_cls=header_sees_cls)
  (example,) = build([GOOD], config=config)
  batch = one_batch([example], config)
  targets = batch["targets"][0][batch["loss_weights"][0] > 0]
  assert targets.tolist() == response(example).tolist() and targets[-1] == EOS
  positions = batch["loss_positions"][0][:len(targets)]
  kinds = batch["kinds"][0]
  assert kinds[positions[0]] == TokenKind.HEADER  # The first response token is predicted by the last HEADER token.
  assert (kinds[positions[1:]] == TokenKind.RESPONSE).all()
  # Each position's next token, [CLS] skipped, is the target.
  order = np.flatnonzero((kinds != TokenKind.CLS) & (kinds != TokenKind.PAD))
  successor = dict(itertools.pairwise(order))
  assert [batch["tokens"][0][successor[position]] for position in positions] == targets.tolist()


def test_batch_has_the_documented_shapes_and_types():
  batch = one_batch(build([BAD, GOOD], {BAD.prompt: [7, 8, 9, 10]}))
  size, num_losses, num_probes = batch["tokens"].shape[1], CONFIG.data.max_response + 1, CONFIG.probes.per_sequence
  assert size in CONFIG.data.buckets
  assert {name: (values.dtype.name, values.shape) for name, values in batch.items()} == {
      "tokens": ("int32", (4, size)), "kinds": ("int32", (4, size)),
      "loss_positions": ("int32", (4, num_losses)), "targets": ("int32", (4, num_losses)),
      "loss_weights": ("float32", (4, num_losses)), "label": ("float32", (4,)), "label_weight": ("float32", (4,)),
      "probe_views": ("int32", (4, num_probes, 3)), "probe_labels": ("float32", (4, num_probes)),
      "probe_weights": ("float32", (4, num_probes)),
      "kl_positions": ("int32", (4, 0)), "kl_weights": ("float32", (4, 0))}


def test_weights_of_harmful_and_filler_rows():
  examples = build([BAD, GOOD], {BAD.prompt: [7, 8, 9, 10]})
  batch = one_batch(examples)
  harmful = [row for row in range(3) if 7 in batch["tokens"][row] and batch["loss_weights"][row].sum() == 0]
  assert len(harmful) == 1 and batch["probe_weights"][harmful].all()
  assert batch["label_weight"][harmful] == 0 and batch["label_weight"].sum() == 2  # The refusal counts for its query.
  assert not batch["loss_weights"][3].any() and not batch["probe_weights"][3].any() and batch["label_weight"][3] == 0
  assert (batch["kinds"] == TokenKind.CLS).sum(axis=1).tolist() == [1, 1, 1, 1]  # The filler too: no empty softmax.


def test_rivals_learn_responses_from_sequences_without_cls():
  config = dataclasses.replace(CONFIG, objective="sft", probes=ProbeConfig(per_sequence=0))
  queries = dataclasses.replace(config, data=dataclasses.replace(config.data, responses="rollouts"))
  rollouts = {BAD.prompt: [7, 8, 9, 10]}
  refusal, answer = build([BAD, GOOD], rollouts, config)
  assert TokenKind.CLS not in np.concatenate([refusal.kinds, answer.kinds])
  assert tiny_tokenizer().decode(response(refusal)) == "I cannot.<|im_end|>"
  assert len(build([BAD, GOOD], rollouts, queries)) == 1  # A query alone teaches no response.
  batch = one_batch([refusal], config)
  order = np.flatnonzero(batch["loss_weights"][0])
  positions, targets = batch["loss_positions"][0][order], batch["targets"][0][order]
  assert batch["tokens"][0][positions + 1].tolist() == targets.tolist() == response(refusal).tolist()


def test_behind_a_harmful_beginning_a_rival_says_the_whole_refusal():
  config = dataclasses.replace(CONFIG, objective="sft", probes=ProbeConfig(per_sequence=0))
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, refusal_depth=4))
  rows = [dataclasses.replace(BAD, prompt=f"bad {i}", response="I cannot." if i % 2 else "") for i in range(60)]
  examples = build(rows, {row.prompt: [7, 8, 9, 10] for row in rows}, config)
  depths = []
  for row, example in zip(rows, examples, strict=True):
    said, before = tiny_tokenizer().decode(response(example)[example.loss_from:]), response(example)[:example.loss_from]
    assert said == (row.response or CONFIG.safety.fixed_refusal) + "<|im_end|>"
    depth = len([token for token in before if token in (7, 8, 9, 10)])
    assert before[:depth].tolist() == [7, 8, 9, 10][:depth]
    assert tiny_tokenizer().decode(before[depth:]) == (CONFIG.safety.refusal_break if depth else "")
    depths.append(depth)
  assert set(depths) == {0, 1, 2, 3, 4} and 24 < depths.count(0) < 48  # Half of them, and a fifth of the rest.


def test_preferences_are_pairs_of_like_shape():
  config = dataclasses.replace(CONFIG, objective="dpo", probes=ProbeConfig(per_sequence=0))
  rollouts = {BAD.prompt: [7, 8, 9, 10], GOOD.prompt: [11, 12, EOS]}
  examples = build([BAD, dataclasses.replace(BAD, prompt="Asked of nobody"), GOOD], rollouts, config)
  said = [tiny_tokenizer().decode(response(example)) for example in examples]
  fixed = CONFIG.safety.fixed_refusal + "<|im_end|>"
  assert said == ["I cannot.<|im_end|>", tiny_tokenizer().decode([7, 8, 9, 10]),
                  tiny_tokenizer().decode([11, 12, EOS]), fixed]
  batch = one_batch(examples, config)
  assert {values.shape[:2] for values in batch.values()} == {(4, 2)}
  for row in range(2):
    chosen, rejected = (
        batch["targets"][row, side][batch["loss_weights"][row, side] > 0].tolist() for side in range(2))
    at = said.index(tiny_tokenizer().decode(chosen))
    assert at in (0, 2) and tiny_tokenizer().decode(rejected) == said[at + 1]
  assert batch["label_weight"].tolist() == [[1.0, 1.0]] * 2 + [[0.0, 0.0]] * 2
  shapes = pipeline.batch_shapes(config)  # What a compiler has to know.
  assert shapes.keys() == batch.keys() and shapes["tokens"].shape == (4, 2, config.data.buckets[-1])


def test_refusals_that_are_cut_are_counted():
  rows = [Row("one", "I will not say a word of that.", 1, "", ""), Row("two", "No.", 1, "", ""), GOOD]
  assert pipeline.unfinished(build(rows)) == (0, 2)
  short = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, max_response=6))
  assert pipeline.unfinished(build(rows, config=short)) == (1, 2)
  assert pipeline.unfinished(build(rows, {"one": "Sure, first", "two": "Well"}, config=short)) == (1, 2)


def test_the_kl_term_gets_query_tokens_drawn_anew_each_epoch():
  config = dataclasses.replace(CONFIG, loss=LossConfig(kl_weight=1.0, kl_positions=4))
  examples = build([Row("one two three four five six seven eight nine", "No.", 1, "", "")], config=config)
  batches = pipeline.Batches(examples, config, epochs=3)
  drawn = [tuple(batches[step]["kl_positions"][0]) for step in range(3)]
  for step, positions in enumerate(drawn):
    batch = batches[step]
    assert len(set(positions)) == 4 and (batch["kinds"][0][list(positions)] == TokenKind.QUERY).all()
    assert batch["kl_weights"].tolist() == [[1.0] * 4] + [[0.0] * 4] * 3  # Fillers count for nothing.
  assert len(set(drawn)) > 1


def test_the_kl_term_follows_benign_responses_and_no_others():
  config = dataclasses.replace(CONFIG, loss=LossConfig(kl_weight=1.0, kl_positions=200))
  of = lambda row, rollouts=None: one_batch(build([row], rollouts, config=config), config)
  benign, malicious = of(GOOD), of(BAD, {BAD.prompt: "Sure."})
  whole = [TokenKind.QUERY, TokenKind.HEADER, TokenKind.RESPONSE]
  for batch, kept in ((benign, whole), (malicious, [TokenKind.QUERY])):
    for at, weights, kinds in zip(batch["kl_positions"], batch["kl_weights"], batch["kinds"]):
      real = weights > 0
      assert not real.any() or at[real].tolist() == np.flatnonzero(np.isin(kinds, kept)).tolist()
    assert (batch["kl_weights"] > 0).any()


def test_a_query_shorter_than_the_kl_term_asks_for_gives_all_it_has():
  config = dataclasses.replace(CONFIG, loss=LossConfig(kl_weight=1.0, kl_positions=40))
  (example,) = build([BAD], config=config)
  batch = one_batch([example], config)
  real = batch["kl_weights"][0] > 0
  assert batch["kl_positions"][0][real].tolist() == np.flatnonzero(example.kinds == TokenKind.QUERY).tolist()


def test_without_probes():
  batch = one_batch(build([GOOD]), dataclasses.replace(CONFIG, probes=ProbeConfig(per_sequence=0)))
  assert batch["probe_views"].shape == (4, 0, 3) and batch["probe_weights"].shape == (4, 0)


def example_of(length, tag):
  """A synthetic example of `length` stored tokens whose first token is `tag`."""
  kinds = np.full(length, TokenKind.QUERY, np.int32)
  kinds[2], kinds[3], kinds[4:] = TokenKind.CLS, TokenKind.HEADER, TokenKind.RESPONSE
  tokens = np.full(length, 5, np.int32)
  tokens[0] = tag
  return pipeline.Example(tokens, kinds, tag % 2, "benign", 0, length - 4)


loaders = st.fixed_dictionaries({
    "lengths": st.lists(st.integers(6, 24), min_size=1, max_size=25),
    "batch_size": st.sampled_from([1, 2, 4, 6]),
    "seed": st.integers(0, 3),
    "epochs": st.integers(1, 3),
})


def make(lengths, batch_size, seed, epochs, rows=None, **data):
  config = TrainConfig(
      seed=seed, probes=ProbeConfig(per_sequence=3),
      data=DataConfig(**{"batch_size": batch_size, "max_response": 20, "buckets": (8, 16, 24)} | data))
  examples = [example_of(length, tag) for tag, length in enumerate(lengths)]
  return pipeline.Loader(pipeline.Batches(examples, config, rows, epochs))


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@settings(max_examples=25)
@given(loaders)
def test_every_example_once_an_epoch_and_few_fillers(case):
  loader = make(**case)
  batches = list(loader)
  an_epoch = -(-len(case["lengths"]) // case["batch_size"])
  assert len(batches) == len(loader) == case["epochs"] * an_epoch
  for epoch in range(case["epochs"]):
    steps = batches[epoch * an_epoch:(epoch + 1) * an_epoch]
    real = [tag for batch in steps for tag in batch["tokens"][batch["label_weight"] > 0, 0]]
    assert sorted(real) == list(range(len(case["lengths"])))
    assert sum((batch["label_weight"] == 0).any() for batch in steps) <= 1
    for batch in steps:
      size = batch["tokens"].shape[1]
      assert size in (8, 16, 24) and batch["loss_positions"].shape[1] == min(21, size)
      longest = (batch["kinds"] != TokenKind.PAD).sum(axis=1).max()
      assert size == min(bucket for bucket in (8, 16, 24) if bucket >= longest)


@settings(max_examples=25)
@given(loaders, st.data())
def test_restored_state_gives_the_same_stream(case, data):
  loader, whole = make(**case), list(make(**case))
  stop = data.draw(st.integers(0, len(whole)))
  for step in range(stop):
    assert_same(next(loader), whole[step])
  state = loader.get_state()
  resumed = make(**case)
  for _ in range(data.draw(st.integers(0, len(whole)))):  # A loader that was used before is set back as well.
    next(resumed)
  resumed.set_state(state)
  rest = list(resumed)
  assert len(rest) == len(whole) - stop
  for left, right in zip(rest, whole[stop:], strict=True):
    assert_same(left, right)


@settings(max_examples=25)
@given(loaders, st.integers(2, 4))
def test_packed_rows_hold_every_example_once_and_whole(case, most):
  loader = make(**case, buckets=(24, 48), examples_per_row=most)
  batches = list(loader)
  an_epoch, rest = divmod(len(batches), case["epochs"])
  assert rest == 0
  for epoch in range(case["epochs"]):
    seen = []
    for batch in batches[epoch * an_epoch:(epoch + 1) * an_epoch]:
      assert batch["label"].shape == (case["batch_size"], most)
      assert batch["probe_views"].shape == (case["batch_size"], 3 * most, 3)
      for row in range(case["batch_size"]):
        for number in range(most):
          own = np.flatnonzero(batch["segments"][row] == 1 + number)
          if not len(own) or not batch["label_weight"][row, number]:
            assert not batch["label_weight"][row, number]
            continue
          tag = batch["tokens"][row, own[0]]
          seen.append(tag)
          length = case["lengths"][tag]
          assert own.tolist() == list(range(own[0], own[0] + length)) and batch["label"][row, number] == tag % 2
          targets = own[batch["kinds"][row, own] == TokenKind.RESPONSE]
          assert set(targets - 1) <= set(batch["loss_positions"][row][batch["loss_weights"][row] > 0])
    assert sorted(seen) == list(range(len(case["lengths"])))


def test_packing_fills_rows():
  lengths = [6, 7, 8, 9, 10, 14, 15, 16, 17, 18]
  packed = make(lengths, 1, 0, 1, buckets=(24,), examples_per_row=4)
  assert len(packed) == 5 and all((batch["segments"] == 0).sum() == 0 for batch in packed)


@settings(max_examples=15)
@given(loaders, st.data())
def test_any_rows_are_those_of_the_whole_batch(case, data):
  rows = data.draw(st.lists(st.integers(0, case["batch_size"] - 1), min_size=1, unique=True).map(sorted))
  for whole, mine in zip(make(**case), make(**case, rows=rows), strict=True):
    assert_same({name: values[rows] for name, values in whole.items()}, mine)


def test_seed_and_epoch_change_order_and_probes():
  case = {"lengths": [20] * 24, "batch_size": 24, "epochs": 2}
  (first, second), (other, _) = make(**case, seed=0), make(**case, seed=1)
  by_tag = [np.argsort(batch["tokens"][:, 0]) for batch in (first, second, other)]
  assert (by_tag[0] != by_tag[1]).any() and (by_tag[0] != by_tag[2]).any()
  views = [batch["probe_views"][order] for batch, order in zip((first, second, other), by_tag, strict=True)]
  assert (views[0] != views[1]).any() and (views[0] != views[2]).any()


@pytest.mark.parametrize("changes, arguments, message", [
    ({"examples_per_row": 0}, {}, r"data.examples_per_row is 0; expected 1 \(no packing\) or more"),
    ({}, {"epochs": 0}, "epochs is 0; expected 1 or more"),
    ({"buckets": (24, 8)}, {}, r"data.buckets is \(24, 8\); expected lengths in ascending order"),
    ({"buckets": (8, 9)}, {}, r"An example has 10 tokens, more than the longest of data.buckets \(8, 9\)"),
])
def test_bad_batches(changes, arguments, message):
  config = TrainConfig(data=dataclasses.replace(CONFIG.data, **changes))
  with pytest.raises(ValueError, match=message):
    pipeline.Batches([example_of(10, 0)], config, **arguments)


def test_no_examples():
  with pytest.raises(ValueError, match="No examples"):
    pipeline.Batches([], CONFIG)


# --- probes ---

SAFETY = SafetyConfig(r1=5, r2=4, r3=3)


def draw(trajectory, num_tokens, safety=SAFETY, count=400, seed=0, **settings_of_probes):
  settings_of_probes = ProbeConfig(per_sequence=count, **settings_of_probes)
  return probes.draw_probes(trajectory, num_tokens, safety, settings_of_probes, np.random.default_rng(seed))


def test_views_are_those_of_inference():
  views, _, weights = draw("harmful", 20)
  assert weights.all()
  seen = {tuple(int(x) for x in view) for view in views}
  rule1 = {(1, 0, k) for k in range(1, 6)}
  rule2 = {(0, max(0, stop - 4), stop) for stop in range(3, 21)}
  # While the alarm of S_t is open: from S_t - r2 to the newest token, S_t + 1 to S_t + r3.
  rule3 = {(0, max(0, s - 4), s + newest + 1) for s in range(20) for newest in (1, 2, 3) if s + newest < 20}
  assert rule1 | rule2 <= seen <= rule1 | rule2 | rule3
  assert max(stop - start for sees_query, start, stop in seen if not sees_query) == 4 + 3 + 1


def test_labels():
  assert draw("harmful", 20)[1].all() and not draw("benign", 20)[1].any()
  views, labels, _ = draw("refusal", 20)
  np.testing.assert_array_equal(labels, views[:, 0])
  assert 0 < labels.mean() < 1
  views, labels, _ = draw("refusal", 20, SAFETY.replace(rule2_keeps_query=True))
  np.testing.assert_array_equal(labels, views[:, 0])
  assert views[:, 0].mean() > 0.5  # Rules 1 and 2.
  views, labels, weights = draw("interrupted", 20)
  np.testing.assert_array_equal(weights, views[:, 0])  # What a window shows may be either.
  assert labels[weights > 0].all() and 0 < weights.mean() < 1
  assert draw("none", 0)[0].shape == (0, 3)
  views, _, weights = draw("benign", 20, benign_weight=3.0)
  np.testing.assert_array_equal(weights, np.where(views[:, 0], 1, 3))
  assert (draw("harmful", 20, benign_weight=3.0)[2] == 1).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 6])
def test_short_responses(num_tokens):
  views, _, weights = draw("benign", num_tokens)
  assert (views >= 0).all() and (views[:, 1] <= views[:, 2]).all() and (views[:, 2] <= num_tokens).all()
  sizes = views[:, 2] - views[:, 1]
  np.testing.assert_array_equal(weights, (sizes > 0) & ((views[:, 0] > 0) | (sizes >= 3)))
  assert bool((weights == 0).any()) == (num_tokens < 3)


def test_probes_are_deterministic_and_checked():
  for left, right in zip(draw("benign", 9, seed=3), draw("benign", 9, seed=3), strict=True):
    np.testing.assert_array_equal(left, right)
  assert (draw("benign", 9, seed=3)[0] != draw("benign", 9, seed=4)[0]).any()
  expected = "trajectory is 'good'; expected one of none, document, refusal, interrupted, harmful, benign"
  with pytest.raises(ValueError, match=expected):
    draw("good", 9)
