"""Overnight on two cores: attacks that read the weights, on eight malicious requests of the embedded test split.

  python eval.py --config configs/eval_white_box.py --checkpoint RUN --workdir OUT

`gcg_N` and `autodan_N` are crafted on the base model and sent to both; the others on each model by itself, and those
with `_cls_` and the soft prompts go against [CLS] too. GCG makes attempts after 5, 10 and 20 steps, for success by
queries in the report. One behavior at a time: a killed run loses that one. Eight benign requests are asked directly.
"""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig(
      max_rows=8, attacks=("direct", "gcg_20", "gcg_victim_20", "gcg_cls_20", "autodan_5", "autodan_cls_5",
                           "soft_prompt_30"),
      max_new_tokens=64, batch_size=8))
