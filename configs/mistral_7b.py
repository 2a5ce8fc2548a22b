"""Mistral-7B as in the paper: `--config configs/mistral_7b.py:pretrain`, then `:paper`; `:released` is SFT in the
released code's numbers. Memory as in configs/llama2_7b.py.
"""

from saess_jax.config import paper_config, to_config_dict


def get_config(preset="paper"):
  return to_config_dict(paper_config(
      preset,
      model="mistral_7b",
      weights="mistralai/Mistral-7B-Instruct-v0.1",  # Or the workdir of the pretraining run.
      epochs=8))
