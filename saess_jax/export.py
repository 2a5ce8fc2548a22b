"""A model as a Hugging Face folder: what `AutoModelForCausalLM.from_pretrained` loads, and [CLS] beside it.

  config.json, generation_config.json    the language model's shape, its end of sequence
  model.safetensors                      its weights, bit for bit; in several files with an index where they are large
  tokenizer.json, ...                    the tokenizer with its chat template
  saess.safetensors                      cls_embedding [D], cls_head/kernel [D, 1], cls_head/bias [1], where trained
  saess_config.json                      SafetyConfig where [CLS] was trained, and how it is stored

transformers reads the first three and passes over the rest; `hf.load_pretrained` reads all.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy
import tqdm

from saess_jax import hf, staging, weights
from saess_jax.config import ModelConfig, SafetyConfig, safety_as_dict
from saess_jax.data import chat

SHARD_BYTES = 5 * 10**9


def export_hf(
    folder: str | pathlib.Path, config: ModelConfig, params: Any, tokenizer: Any, safety: SafetyConfig | None, *,
    header_sees_cls: bool = True, system_prompt: str = "", shard_bytes: int = SHARD_BYTES, progress: str = "",
) -> None:
  """Writes the folder above, whole or not at all; each tensor leaves its devices when its file is written.

  Args:
    folder: must not exist.
    params: unrolled, as `load_for_research` gives them; host or device arrays, whose dtypes stay as they are.
    tokenizer: a transformers tokenizer.
    safety: with a named schedule; None of weights whose [CLS] was never trained, which is then left out.
    header_sees_cls, system_prompt: how the run was trained, for who wants to ask the same way.
    shard_bytes: the size at which a file of weights is full.
    progress: the name of a progress bar; "" shows none.

  Raises:
    FileExistsError: `folder` exists.
    ValueError: params that do not fit `config`; a model that transformers has no architecture for; a schedule as
      an array.
  """
  staging.refuse_existing(folder)
  settings = {
      "format": 1, "safety": None if safety is None else safety_as_dict(safety),
      "layout": {
          "stage": "sft", "header_sees_cls": header_sees_cls, "cls_stored": "before header" if header_sees_cls else
          "after header", "cls_position": 0, "first_position": 1, "system_prompt": system_prompt}}
  hf_config = _hf_config(config, tokenizer)
  leaves = _leaves(config, params)
  dtype = str(leaves["embed/embedding"].dtype)
  hf_config |= {"dtype": dtype, "torch_dtype": dtype}  # Of transformers 5, and of those before.
  with staging.new(folder) as unfinished:
    unfinished.mkdir()
    _write_json(unfinished / "config.json", hf_config)
    ends = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in hf_config}
    if "eos_token_id" in ends and len(stops := chat.stop_ids(tokenizer)) > 1:
      ends["eos_token_id"] = stops
    _write_json(unfinished / "generation_config.json", ends)
    tokenizer.save_pretrained(unfinished)
    _write_weights(unfinished, config, leaves, shard_bytes, progress)
    if safety is not None:
      cls = {name: np.asarray(leaves[name]) for name in hf.CLS_NAMES}
      safetensors.numpy.save_file(cls, unfinished / hf.CLS_FILE, metadata={"format": "pt"})
    _write_json(unfinished / hf.SETTINGS_FILE, settings)


def _hf_config(config: ModelConfig, tokenizer: Any) -> dict[str, Any]:
  """config.json of the architecture that computes what ours does."""
  if config.attention_bias and config.sliding_window is not None:
    raise ValueError(
        "The model has both attention_bias and sliding_window, which no architecture of transformers has in the way "
        "ours does; set sliding_window to None if its context may be as long as max_seq_len.")
  kind = "qwen2" if config.attention_bias else "llama" if config.sliding_window is None else "mistral"
  architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[kind]
  rope = None
  if config.rope_scaling is not None:
    s = config.rope_scaling
    rope = {
        "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_max_seq_len}
  values = {
      "architectures": [architecture], "model_type": kind, "vocab_size": config.vocab_size,
      "hidden_size": config.embed_dim, "intermediate_size": config.mlp_dim, "num_hidden_layers": config.num_layers,
      "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
      "head_dim": config.head_dim, "max_position_embeddings": config.max_seq_len, "hidden_act": "silu",
      "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings, "rope_theta": config.rope_theta,
      "rope_scaling": rope,  # With rope_theta the spelling of transformers 4, which 5 reads too.
      "use_cache": True}
  if kind == "mistral":
    values["sliding_window"] = config.sliding_window
  if kind == "qwen2":
    values["use_sliding_window"] = False
  ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
  return values | {name: i for name, i in ids.items() if i is not None}


def _leaves(config: ModelConfig, params: Any) -> dict[str, Any]:
  """Name -> leaf, once all are seen to be there, each in its shape, and no others."""
  flat, dim = flax.traverse_util.flatten_dict(params, sep="/"), config.embed_dim
  wanted = {leaf: ours for leaf, (_, ours, _) in weights.plan(config, weights.HF_NAMES).items()}
  wanted |= dict(zip(hf.CLS_NAMES, [(dim,), (dim, 1), (1,)]))
  for leaf in sorted(wanted.keys() | flat.keys()):
    found = flat[leaf].shape if leaf in flat else None
    if found != wanted.get(leaf):
      raise ValueError(
          f"params: {leaf} is {found or 'absent'}; the configuration asks for {wanted.get(leaf, 'no such leaf')}. Give "
          "the params and the config of one model, unrolled (model.unstack_layers) and without vocab_padding "
          "(model.resize_vocab), as `load_for_research` does.")
  return flat


def _write_weights(folder, config, leaves, shard_bytes, progress) -> None:
  planned = weights.plan(config, weights.HF_NAMES)
  shards, full = [[]], 0
  for leaf in planned:
    if shards[-1] and full + leaves[leaf].nbytes > shard_bytes:
      shards.append([])
      full = 0
    shards[-1].append(leaf)
    full += leaves[leaf].nbytes
  weight_map = {}
  with tqdm.tqdm(total=len(planned), desc=progress, unit="tensor", disable=not progress) as bar:
    for number, shard in enumerate(shards, 1):
      file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
      tensors = {}
      for leaf in shard:
        name, _, theirs = planned[leaf]
        tensors[name] = weights.to_torch_layout(leaf, np.asarray(leaves[leaf]), theirs)
        weight_map[name] = file
        bar.update()
      safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
  if len(shards) > 1:
    _write_json(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(leaves[leaf].nbytes for leaf in planned)}, "weight_map": weight_map})


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")
