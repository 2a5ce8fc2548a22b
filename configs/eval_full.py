"""One to three hours on two cores: every attack that reads no weights, 32 embedded test requests of each label.

  python eval.py --config configs/eval_full.py --checkpoint RUN --workdir OUT
  python eval.py --config configs/eval_full.py --config.suites=malicious:advbench.csv,benign:xstest.csv ...
  python eval.py --config configs/eval_full.py --config.max_rows=0 ...     # all requests, six times as many

A request meets 66 attempts by each of two models; `sampling` in place of `sampling_12` makes it 103.
A killed run goes on where it was; what is left is shown with the time it will take.
"""

from saess_jax.config import EvalConfig, to_config_dict


def get_config():
  return to_config_dict(EvalConfig(
      max_rows=32, attacks=(
          "direct", "prefill_5", "prefill_10", "prefill_20", "prefill_40", "prefill_100", "prefill_500", "prefill_2000",
          "prefill_own_10", "prefill_own_40", "prefill_own_200", "sampling_12", "nested", "roleplay", "suppression",
          "splitting", "past", "translation", "persuasion", "base64", "rot13", "leetspeak", "homoglyphs", "zero_width",
          "many_shot_16", "multi_turn_2", "homoglyphs_3", "filler", "filler_prefill_10", "filler_own_20", "late_142",
          "fake_refusal", "injection"),
      judges=("rules", "prefix", "rules_topic"), max_new_tokens=64, batch_size=32))
