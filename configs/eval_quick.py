"""Minutes on two cores: a draw of the embedded test split under the attacks that say most."""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig(
      max_rows=24, attacks=("direct", "prefill_10", "prefill_40", "prefill_own_10"), max_new_tokens=32, batch_size=24))
