"""What `make demo` attacks: the whole embedded test split, under three attacks."""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig(
      attacks=("direct", "prefill_5", "prefill_40"), max_new_tokens=24, batch_size=64))
