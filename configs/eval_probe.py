"""The responses that the paper's probe experiment reads: nothing is put into them, so that every token is the model's.

  python eval.py --config configs/eval_probe.py --checkpoint RUN --workdir OUT
  python -m saess_jax.sharpness --checkpoint RUN --evaluation OUT

As they are not defended (`dependency` low: verdicts are kept and nothing is done about them), attack success here is
that of the trained language model alone.
"""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  config = to_config_dict(EvalConfig(
      max_rows=64, attacks=("direct", "prefill_5", "prefill_40", "nested"), max_new_tokens=16, batch_size=32))
  config.safety.dependency = "low"
  return config
