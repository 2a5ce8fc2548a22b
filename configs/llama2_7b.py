"""Llama2-7B as in the paper: `--config configs/llama2_7b.py:pretrain`, then `:paper`; `:released` is SFT in the
released code's numbers.

All weights are trained: some 110 GB for them, their gradients and AdamW's moments in float32, over the mesh. Where a
batch is too large, raise optimizer.accumulation.
"""

from saess_jax.config import paper_config, to_config_dict


def get_config(preset="paper"):
  return to_config_dict(paper_config(
      preset,
      model="llama2_7b",
      weights="meta-llama/Llama-2-7b-chat-hf",  # Or the workdir of the pretraining run; the chat model has a template.
      epochs=15))
