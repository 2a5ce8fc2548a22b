"""Your own prompts: `--config.suites=file:prompts.csv`, a CSV or JSONL file with a prompt, goal, behavior, ... column.

A label column (malicious or benign) is used where there is one; without it all rows count as malicious, or as benign in
`benign:prompts.csv`. A file of attacks (a goal, behavior or forbidden_prompt beside prompt, or a JailbreakBench
artifact) is a suite of its goals; `--config.attacks="('direct','file:attacks.csv')"` sends its prompts.
"""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig(
      suites="file:prompts.csv",  # Several: "malicious:a.csv,benign:b.jsonl".
      attacks=("direct", "prefill_5", "prefill_10", "prefill_20", "prefill_40", "prefill_own_20")))
