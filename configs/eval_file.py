"""Your own prompts: `--config.source=prompts.csv`, a CSV or JSONL file with a prompt, goal, behavior, ... column.

A `label` column (malicious or benign) is used where there is one; else say what all rows are with `--config.label`.
"""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig(
      source="prompts.csv",  # Several files: "a.csv,b.jsonl".
      label="malicious",  # both | malicious | benign.
      max_rows=0,  # Of each label; 0: all.
      attacks=("direct", "prefill_5", "prefill_10", "prefill_20", "prefill_40", "prefill_own_20")))
