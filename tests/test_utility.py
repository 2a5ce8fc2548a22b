"""Perplexity and KL against torch, with and without [CLS], and that neither padding nor batches matter."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from make_golden import BASE, hf_state, write_folder, write_with_tokenizer
from tiny_tokenizer import tiny_tokenizer

from saess_jax import adapters, hf, utility, weights
from saess_jax.config import SafetyConfig
from saess_jax.masks import TokenKind
from saess_jax.model import Llama

PROMPTS = ["How do I bake bread?", "Write a story.", "Hi"]
RESPONSES = ["Take flour, water and salt, and mix them well.", "A baker opens a safe. " * 9, "Bread"]


def config_of():
  return BASE | {"vocab_size": 512, "max_position_embeddings": 512}


def state_of(seed):
  state = hf_state("grouped")
  rng = np.random.default_rng(seed)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    state[name] = rng.normal(0, 0.3, (512, BASE["hidden_size"])).astype(np.float32)
  return state


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Two tiny random models with the same tokenizer: (model, params) each."""
  pairs = []
  for seed in (3, 4):
    folder = write_folder(tmp_path_factory.mktemp("model"), config=config_of(), state=state_of(seed))
    pairs.append((Llama(hf.read_config(folder)), weights.with_cls(hf.read_params(folder))))
  return pairs


@pytest.fixture(scope="module")
def rows():
  return utility.encode_rows(tiny_tokenizer(), PROMPTS, RESPONSES, 512)


def plain(row):
  tokens, kinds = row
  return tokens[kinds != TokenKind.CLS], np.flatnonzero(kinds[kinds != TokenKind.CLS] == TokenKind.RESPONSE)


def padded(ids):
  return jnp.asarray(np.pad(ids, (0, 256 - len(ids)))[None])


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, kinds=None):
  layout = {} if kinds is None else {"kinds": kinds, "stage": "sft"}
  return Llama(config).apply({"params": params}, tokens, **layout).logits


def log_probs(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
      -1, keepdims=True)


def test_against_torch(models, rows):
  torch = pytest.importorskip("torch", reason="torch is the reference")
  theirs = [make_golden.torch_model(config_of(), state_of(seed)) for seed in (3, 4)]
  nll, kl, count = 0.0, 0.0, 0
  for tokens, at in map(plain, rows):
    with torch.no_grad():
      p, q = (log_probs(model(torch.tensor(tokens[None]).long()).logits[0].numpy())[at - 1] for model in theirs)
    nll -= p[np.arange(len(at)), tokens[at]].sum()
    kl += (np.exp(p) * (p - q)).sum()
    count += len(at)
  (model, params), (other, other_params) = models
  result = utility.perplexity(model, params, rows)
  assert result.tokens == count == sum(
      len(tiny_tokenizer()(text).input_ids) + 1 for text in RESPONSES)  # With the end of turn.
  assert result.value == pytest.approx(np.exp(nll / count), rel=1e-5)
  result = utility.mean_kl(model, params, other, other_params, rows, sees_cls=False)
  assert result.tokens == count and result.value == pytest.approx(kl / count, rel=1e-4) and kl / count > 0.1


@pytest.mark.parametrize("header_sees_cls", [True, False])
def test_what_sees_cls(models, header_sees_cls):
  (base, base_params), (model, params) = models
  rows = utility.encode_rows(tiny_tokenizer(), PROMPTS, RESPONSES, 512, header_sees_cls=header_sees_cls)
  nll, kl, count = 0.0, 0.0, 0
  for tokens, kinds in rows:
    at = np.flatnonzero(kinds == TokenKind.RESPONSE)
    bare, bare_at = plain((tokens, kinds))
    before = at - 1 - (kinds[at - 1] == TokenKind.CLS)
    assert header_sees_cls or before[0] == at[0] - 2
    q = log_probs(forward(model.config, params, padded(tokens), padded(kinds))[0])[before]
    p = log_probs(forward(base.config, base_params, padded(bare))[0])[bare_at - 1]
    nll, kl, count = nll - q[np.arange(len(at)), tokens[at]].sum(), kl + (np.exp(p) * (p - q)).sum(), count + len(at)
  assert utility.perplexity(model, params, rows, sees_cls=True).value == pytest.approx(np.exp(nll / count), rel=1e-5)
  assert utility.mean_kl(base, base_params, model, params, rows).value == pytest.approx(kl / count, rel=1e-4)
  assert utility.perplexity(model, params, rows).value != pytest.approx(np.exp(nll / count), rel=1e-3)


def test_a_model_does_not_differ_from_itself_and_batches_do_not_matter(models, rows):
  (model, params), _ = models
  assert utility.mean_kl(model, params, model, params, rows, sees_cls=False).value == 0
  one, many = (utility.perplexity(model, params, rows, batch_size=n) for n in (1, 2))
  assert one.tokens == many.tokens and one.value == pytest.approx(many.value, rel=1e-6)


def test_bad_input(models, rows):
  (model, params), _ = models
  with pytest.raises(ValueError, match="No rows were given"):
    utility.perplexity(model, params, [])
  with pytest.raises(ValueError, match="Response 1 is ''; expected text"):
    utility.encode_rows(tiny_tokenizer(), PROMPTS, ["a", "", "b"], 512)
  other = Llama(model.config.replace(vocab_size=500))
  with pytest.raises(ValueError, match="The base has a vocabulary of 500 and the model one of 512"):
    utility.mean_kl(other, params, model, params, rows)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
  folder = str(write_with_tokenizer(tmp_path / "model", tiny_tokenizer(), context=256))
  path = tmp_path / "a.safetensors"
  base = hf.load_pretrained(folder)
  adapters.save(path, adapters.Adapter(
      lora={}, cls={name: base.params[name] for name in adapters.CLS_PARAMS}, safety=SafetyConfig(), base=folder,
      sizes=adapters.sizes_of(base.config), fingerprint=adapters.fingerprint(base.params),
      layout={"header_sees_cls": True, "system_prompt": "", "chat_template": ""}))
  data = tmp_path / "benign.jsonl"
  data.write_text("".join(
      json.dumps({"prompt": p, "response": r[:60]}) + "\n" for p, r in zip(PROMPTS, RESPONSES)))
  ask = ["--checkpoint", str(path), "--data", str(data), "--new-tokens", "4"]
  utility.main([*ask, "--rows", "2"])
  said = json.loads(capsys.readouterr().out)
  own = said["perplexity"]
  assert said["rows"] == 2 and own["base"] == own["without [CLS]"]  # It has no pairs, [CLS] alone.
  assert own["with [CLS]"]["value"] != own["base"]["value"] and own["with [CLS]"]["tokens"] == own["base"]["tokens"]
  assert said["kl"]["value"] > 0 and said["kl"]["tokens"] == own["base"]["tokens"]
  for figures in (said["speed"]["tokens_per_second"], said["speed"]["first_token_seconds"]):
    assert set(figures) == {"plain", "safe"} and all(math.isfinite(x) and x > 0 for x in figures.values())
  utility.main(["--checkpoint", folder, *ask[2:], "--rows", "2"])  # Without a [CLS], as a rival's run: what there is.
  plain = json.loads(capsys.readouterr().out)
  assert plain["perplexity"] == {"base": own["base"], "without [CLS]": own["base"]} and "speed" not in plain
  assert plain["kl"]["value"] == pytest.approx(0, abs=1e-6)
  for rows in ("4", "0"):
    with pytest.raises(SystemExit):
      utility.main([*ask, "--rows", rows])
    assert "benign.jsonl has 3 benign rows with a response: expected 1 to" in capsys.readouterr().err
