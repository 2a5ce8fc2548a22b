"""What the benchmarks share: the rival in torch, and contestants that run in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from saess_jax import weights


def torch_model(loaded: Any) -> Any:
  """transformers' torch model with the weights of `hf.load_pretrained`, tied embeddings and all, in float32."""
  import torch
  import transformers.initialization
  c = loaded.config
  with transformers.initialization.no_init_weights():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.embed_dim, intermediate_size=c.mlp_dim,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim, max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
  leaves = flax.traverse_util.flatten_dict(jax.device_get(loaded.params), sep="/")
  tensors = {
      name: torch.tensor(weights.to_torch_layout(leaf, np.asarray(leaves[leaf]), theirs))
      for leaf, (name, _, theirs) in weights.plan(loaded.config, weights.HF_NAMES).items()}
  missing, unexpected = model.load_state_dict(tensors, strict=False)
  if unexpected or missing != ["lm_head.weight"]:  # Tied to the embedding.
    raise RuntimeError(f"transformers' model lacks {missing} and does not know {unexpected}.")
  model.tie_weights()
  return model


def compare(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
  """Seconds (of a token, of a step), which a contestant that has run before returns, in each round, [rounds]."""
  times = [{name: seconds() for name, seconds in contestants.items()} for _ in range(rounds)]
  return {name: np.asarray([once[name] for once in times]) for name in contestants}


def ratio(times: dict[str, np.ndarray], name: str, base: str) -> float:
  return round(float(np.median(times[name] / times[base])), 3)
