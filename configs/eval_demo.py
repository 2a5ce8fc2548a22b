"""What `make demo` attacks: a part of the embedded test split, so that base and SA-ESS model fit into its time."""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig(
      max_rows=40, attacks=("direct", "prefill_5", "prefill_10", "prefill_20", "prefill_40", "prefill_own_10"),
      max_new_tokens=24, batch_size=40))
