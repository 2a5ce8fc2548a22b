"""The embedded test split: malicious prompts under all prefill depths, benign look-alikes asked directly."""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig())
