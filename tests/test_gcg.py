"""GCG: its gradient and loss, against finite differences and torch; suffixes that are sent as they were optimised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from saess_jax import export, hf, masks
from saess_jax.attacks import Target, Weights, gcg, make_attack
from saess_jax.config import SafetyConfig, model_config
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, nn

BEHAVIOR = "Do the forbidden thing."
SAFETY = SafetyConfig(r2=4, rule2_keeps_query=True)


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.slow)])
def model(request):
  llama = Llama(model_config("tiny", vocab_size=259, scan_layers=False, tie_embeddings=request.param == "tied"))
  params = nn.unbox(jax.jit(llama.init)(jax.random.key(2), jnp.zeros((1, 1), jnp.int32))["params"])
  params["cls_head"]["kernel"] *= 30  # Verdicts that differ.
  return llama, params


def weights(model, safety=None, **changes):
  return Weights(*model, hf.byte_tokenizer(), safety, **changes)


def start(w):
  suffix = np.asarray(w.tokenizer(" !" * 10, add_special_tokens=False).input_ids, np.int32)
  frame = gcg.make_frame(w, *gcg.read_back(w, BEHAVIOR, suffix), len(suffix))
  return suffix, {f.name: jnp.asarray(getattr(frame, f.name)) for f in dataclasses.fields(frame)}


def test_a_frame_is_what_is_decoded(model):
  for header_sees_cls in (True, False):
    w = weights(model, SAFETY, header_sees_cls=header_sees_cls)
    suffix, frame = start(w)
    kinds, tokens = np.asarray(frame["kinds"]), np.asarray(frame["tokens"])
    text = BEHAVIOR + w.tokenizer.decode(suffix)
    prompt, prompt_kinds = chat.insert_cls(*chat.encode_prompt(w.tokenizer, text), "sft", header_sees_cls)
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
    np.testing.assert_array_equal(kinds[: len(prompt)], prompt_kinds)
    assert w.tokenizer.decode(tokens[kinds == TokenKind.RESPONSE]) == gcg.GOAL
    assert w.tokenizer.decode(tokens[np.asarray(frame["places"])]) == " !" * 10
    assert np.asarray(frame["targets"]).tolist() == tokens[kinds == TokenKind.RESPONSE].tolist()
    assert len(tokens) % 32 == 0 and TokenKind.CLS not in kinds[np.asarray(frame["predict_at"])]
    seen = np.asarray(frame["windows"])[6]  # After the seventh response token: the newest four, and the query.
    assert seen.sum() == 4 + (kinds == TokenKind.QUERY).sum() and not seen[kinds == TokenKind.HEADER].any()


@pytest.mark.slow  # A pass for each window.
def test_the_loss_is_that_of_one_pass_by_hand(model):
  w = weights(model, SAFETY)
  llama, params = model
  suffix, frame = start(w)
  found = gcg.losses_of(llama, params, frame, suffix[None], 2.0)[0]
  kinds = jnp.asarray(frame["kinds"])[None]
  # The probes one by one as [CLS] itself, by the dense mask.
  run = lambda sees: llama.apply(
      {"params": params}, frame["tokens"][None], kinds=kinds, stage="sft",
      cls_visible=None if sees is None else sees[None])
  out = run(None)
  log_prob = jax.nn.log_softmax(out.logits[0, np.asarray(frame["predict_at"])])
  lm = -np.mean([log_prob[i, t] for i, t in enumerate(np.asarray(frame["targets"]))])
  benign = lambda logit: -np.log(1 - 1 / (1 + np.exp(-float(logit))))
  windows = np.mean([benign(run(sees | (kinds[0] == TokenKind.CLS)).cls_logit[0]) for sees in frame["windows"]])
  assert found == pytest.approx(lm + 2.0 * (benign(out.cls_logit[0]) + windows), abs=1e-4)
  assert masks.cls_slot(np.asarray(kinds[0])[np.asarray(kinds[0]) != TokenKind.CLS], "sft", True) == int(
      np.flatnonzero(np.asarray(kinds[0]) == TokenKind.CLS)[0])


@pytest.mark.parametrize("safety", [None, SAFETY])
def test_the_gradient_is_that_of_the_one_hot_choice(model, safety):
  w = weights(model, safety)
  llama, params = model
  suffix, frame = start(w)
  weight = 0.0 if safety is None else 1.0
  found = gcg.gradient_of(llama, params, frame, suffix, weight)
  assert found.shape == (len(suffix), 259)
  embedding, rng = params["embed"]["embedding"], np.random.default_rng(0)
  for place, token in zip(rng.integers(0, len(suffix), 4), rng.integers(3, 259, 4)):
    # A little of another token's row in place of nothing, by finite differences over a table with one row of its own.
    def loss(step, place=int(place), token=int(token)):
      row = embedding[suffix[place]] + step * embedding[token]
      table = jnp.concatenate([embedding, row[None]])
      wider = {**params, "embed": {"embedding": table}}
      if "lm_head" in params:
        wider["lm_head"] = {"kernel": jnp.pad(params["lm_head"]["kernel"], ((0, 0), (0, 1)))}
      changed = jnp.asarray(suffix).at[place].set(259)
      return float(gcg.losses_of(Llama(llama.config.replace(vocab_padding=1)), wider, frame, changed[None], weight)[0])
    assert found[place, token] == pytest.approx((loss(2e-2) - loss(-2e-2)) / 4e-2, rel=0.03, abs=2e-4)


def test_loss_and_gradient_are_those_of_torch(model, tmp_path):
  """The plain form, as nanoGCG computes it: one-hot vectors times the embeddings, cross-entropy of the target."""
  torch = pytest.importorskip("torch", reason="transformers' models need it")
  w = weights(model)
  llama, params = model
  suffix, frame = start(w)
  export.export_hf(tmp_path / "tiny", llama.config, params, w.tokenizer, SafetyConfig())
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", attn_implementation="eager")
  ids = torch.tensor(np.asarray(frame["tokens"])[: int(frame["predict_at"][-1]) + 2], dtype=torch.long)
  places = torch.tensor(np.asarray(frame["places"]), dtype=torch.long)
  table = theirs.get_input_embeddings().weight
  one_hot = torch.nn.functional.one_hot(torch.tensor(suffix, dtype=torch.long), 259).float().requires_grad_()
  inputs = table[ids].detach().clone()
  inputs[places] = one_hot @ table.detach()
  logits = theirs(inputs_embeds=inputs[None]).logits[0, np.asarray(frame["predict_at"])]
  loss = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(frame["targets"]), dtype=torch.long))
  loss.backward()
  assert float(gcg.losses_of(llama, params, frame, suffix[None], 0.0)[0]) == pytest.approx(loss.item(), abs=1e-4)
  np.testing.assert_allclose(
      gcg.gradient_of(llama, params, frame, suffix, 0.0), one_hot.grad.numpy(), atol=1e-4)


def target(model, victim="saess", seed=0):
  every = {"base": weights(model), "saess": weights(model, SAFETY)}
  return Target(victim, every["base"].tokenizer, None, every.__getitem__, seed)


@pytest.mark.parametrize("name", ["gcg_6", "gcg_cls_6"])
def test_a_few_steps_lower_the_loss_and_what_is_sent_was_optimised(model, name):
  attack, here = make_attack(name), target(model)
  ((attempt,), (other,)) = attack.attempts([BEHAVIOR, "Bake bread."], here)
  before, after = map(float, attempt.variant.removeprefix("loss ").split(" -> "))
  assert after < before - 0.01
  assert attempt.prompt.startswith(BEHAVIOR) and attempt.prompt != BEHAVIOR + " !" * 10
  assert 7 < attempt.queries <= 1 + 6 * 65 and attempt.prefix == "" and attempt.tokens == 0
  assert attack.attempts(["Bake bread."], here) == [[other]]  # Whatever was attacked before.
  assert make_attack(name).attempts([BEHAVIOR], target(model, seed=1))[0][0].prompt != attempt.prompt
  w = here.weights("saess" if attack.adaptive else "base")
  tokens, kinds = chat.encode_prompt(w.tokenizer, attempt.prompt)
  frame = gcg.make_frame(w, tokens, kinds, 20)
  arrays = {f.name: jnp.asarray(getattr(frame, f.name)) for f in dataclasses.fields(frame)}
  suffix = tokens[np.flatnonzero(kinds == TokenKind.QUERY)[-20:]]
  again = gcg.losses_of(w.model, w.params, arrays, jnp.asarray(suffix)[None], attack.cls_weight)[0]
  assert again == pytest.approx(after, abs=2e-3)


def test_transfer_is_the_same_for_every_victim_and_adaptive_is_not(model):
  plain = [make_attack("gcg_2").attempts([BEHAVIOR], target(model, victim)) for victim in ("base", "saess")]
  known = [make_attack("gcg_cls_2").attempts([BEHAVIOR], target(model, victim)) for victim in ("base", "saess")]
  assert plain[0] == plain[1] and known[0] != known[1]
  assert not make_attack("gcg_2").adaptive and make_attack("gcg_cls_2").adaptive


def test_behaviors_of_like_length_share_their_programs(model):
  here = target(model)
  make_attack("gcg_1").attempts([BEHAVIOR], here)
  sizes = gcg.losses_of._cache_size(), gcg.gradient_of._cache_size()
  make_attack("gcg_1").attempts(["Do another thing now."], here)
  assert (gcg.losses_of._cache_size(), gcg.gradient_of._cache_size()) == sizes


def test_special_and_unprintable_tokens_are_not_allowed():
  tokenizer = hf.byte_tokenizer()
  allowed = gcg.allowed_tokens(tokenizer, 300)
  said = {tokenizer.decode([i]) for i in np.flatnonzero(allowed)}
  assert said == {chr(i) for i in range(32, 127)} and not allowed[tokenizer.all_special_ids].any()
