"""Every family of models that can be read, as transformers makes a tiny random one: plain, padded, with a cache."""

from __future__ import annotations

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saess_jax import adapters, hf, masks, model, sharding, weights
from saess_jax.attention import Step
from saess_jax.config import LoraConfig, MeshConfig
from saess_jax.masks import TokenKind

TOLERANCE = 1e-4  # Of logits, float32.
SIZE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
FAMILIES = {  # model_type, and what the family's config.json has that others do not.
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-5}),
    "llama3.1": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 8.0}}),
    "llama3.2": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral_v0.1": ("mistral", {"sliding_window": 16, "rope_theta": 1e4}),
    "mistral_v0.2": ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "mistral_v0.3": ("mistral", {"sliding_window": None, "rope_theta": 1e6, "head_dim": 16}),
    "smollm2": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48, "rope_theta": 1e5,
                          "tie_word_embeddings": True}),
    "tinyllama": ("llama", {"rms_norm_eps": 1e-5, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 16}),
    "qwen2.5": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True, "max_window_layers": 1}),
}
TEXTS = np.random.default_rng(3).integers(0, 96, (2, 14), dtype=np.int32)
LENGTHS = (14, 9)  # Tokens of each row; 4 of them are decoded one by one.


@functools.cache
def torch_model(family):
  torch = pytest.importorskip("torch", reason="torch is the reference")
  import transformers
  kind, options = FAMILIES[family]
  config = transformers.AutoConfig.for_model(kind, **SIZE | options)
  torch.manual_seed(0)
  config._attn_implementation = "eager"  # The plain formula.
  theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  with torch.no_grad():
    for name, value in theirs.named_parameters():  # Biases start at zero and norms at one: hide nothing.
      value.copy_(torch.randn_like(value) * 0.2 + ("norm" in name))
  return theirs


def loaded(family, folder, **how):
  torch_model(family).save_pretrained(folder, **how)
  params = jax.tree.map(jnp.asarray, weights.with_cls(hf.read_params(folder)))
  return hf.read_config(folder), params


def expected_logits(family, tokens, real=None):
  """Of transformers' torch model; real: bool, where tokens are no padding."""
  import torch
  how = {}
  if real is not None:
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    how = {"attention_mask": torch.tensor(real.astype(np.int64)), "position_ids": torch.tensor(positions)}
  with torch.no_grad():
    return torch_model(family)(torch.tensor(tokens), **how).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_padded_and_cached_logits(family, tmp_path):
  torch_model(family)
  config, params = loaded(family, tmp_path)
  run = jax.jit(lambda params, tokens, **how: model.Llama(config).apply({"params": params}, tokens, **how))
  long = np.random.default_rng(4).integers(0, 96, (1, 40), dtype=np.int32)  # Beyond Mistral's window.
  np.testing.assert_allclose(run(params, long).logits, expected_logits(family, long), rtol=0, atol=TOLERANCE)
  plain = [expected_logits(family, row[None, :length])[0] for row, length in zip(TEXTS, LENGTHS)]
  prompt = TEXTS.shape[1] - 4
  for side in ("right", "left"):
    rows = [row[: length - 4] for row, length in zip(TEXTS, LENGTHS)]
    pad = lambda row: (0, prompt - len(row)) if side == "right" else (prompt - len(row), 0)  # noqa: B023
    tokens = np.stack([np.pad(row, pad(row)) for row in rows])
    real = np.stack([np.pad(np.ones(len(row), bool), pad(row)) for row in rows])
    kinds = jnp.where(real, TokenKind.AUX, TokenKind.PAD)
    padded = run(params, tokens, kinds=kinds, mask=masks.attention_mask(kinds, "pretrain"),
                 cache=model.init_cache(config, 2, prompt + 4))
    theirs = expected_logits(family, tokens, real)
    np.testing.assert_allclose(padded.logits[real], theirs[real], rtol=0, atol=TOLERANCE, err_msg=side)
    cache, text = padded.cache, jnp.pad(jnp.asarray(real), ((0, 0), (0, 4)))
    for i in range(4):
      text = text.at[:, prompt + i].set(True)
      token = np.stack([row[length - 4 + i : length - 3 + i] for row, length in zip(TEXTS, LENGTHS)])
      out = run(params, token, kinds=jnp.full((2, 1), TokenKind.RESPONSE), positions=text.sum(axis=1)[:, None],
                cache=cache, step=Step(slot=jnp.asarray(prompt + i), visible=text[:, None],
                                       refresh=jnp.zeros(2, bool), sees_cls=jnp.zeros(2, bool)))
      cache = out.cache
      for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            out.logits[row, 0], plain[row][length - 4 + i], rtol=0, atol=TOLERANCE, err_msg=f"{side}, token {i}")


@pytest.mark.parametrize("family", ["llama3.2", "qwen2"])
def test_shards_and_halves(family, tmp_path):
  torch = pytest.importorskip("torch", reason="torch is the reference")
  torch_model(family)
  whole = loaded(family, tmp_path / "whole")[1]
  sharded = loaded(family, tmp_path / "sharded", max_shard_size="20KB")[1]
  assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
  jax.tree.map(np.testing.assert_array_equal, sharded, whole)
  for dtype in (torch.bfloat16, torch.float16):
    copy.deepcopy(torch_model(family)).to(dtype).save_pretrained(tmp_path / str(dtype))
    half = hf.read_params(tmp_path / str(dtype))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6), half, {
        name: leaf for name, leaf in whole.items() if name in half})


def test_biases_are_sharded_scanned_and_adapted(tmp_path):
  config, params = loaded("qwen2", tmp_path)
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  attn = weights.placement(config, mesh)["layers_0"]["attn"]
  assert attn["q"]["bias"].spec == attn["v"]["bias"].spec == jax.sharding.PartitionSpec("tensor", None)
  assert "bias" not in attn["o"]
  assert params["layers_0"]["attn"]["q"]["bias"].shape == (4, 8)
  tokens = TEXTS[:, :8]
  run = jax.jit(lambda variables: model.Llama(config).apply(variables, tokens).logits)
  plain = run({"params": params})
  scan = jax.jit(lambda params: model.Llama(config.replace(scan_layers=True)).apply({"params": params}, tokens).logits)
  np.testing.assert_allclose(scan(model.stack_layers(params)), plain, atol=1e-5)
  boxed = jax.eval_shape(model.Llama(config).init, jax.random.key(0), tokens)["params"]
  lora = sharding.unbox(adapters.init_lora(boxed, LoraConfig(rank=2), jax.random.key(1)))
  lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), lora)
  beside, merged = run({"params": params, "lora": lora}), run({"params": adapters.merge_lora(params, lora)})
  np.testing.assert_allclose(beside, merged, atol=1e-4)
  assert np.abs(beside - plain).max() > 0.1


@pytest.mark.parametrize("change, words", [
    ({"use_sliding_window": True}, "use_sliding_window is True; supported is False only"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention for some layers"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM.*Qwen2ForCausalLM"),
])
def test_a_qwen2_that_is_not_supported_is_named(change, words, tmp_path):
  config = SIZE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 16} | change
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=f"config.json.*{words}"):
    hf.read_config(tmp_path)
