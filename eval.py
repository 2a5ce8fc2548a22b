"""Attacks a trained model and its base, and writes rows, metrics and an HTML report.

  python eval.py --config configs/eval_embedded.py --checkpoint RUN --workdir OUT
  python eval.py --config configs/eval_full.py --config.suites=file:prompts.csv --checkpoint RUN --workdir OUT

Kept short so that the logic can be imported and tested: see `saess_jax.evaluate` and `saess_jax.report`.
"""

import dataclasses
import pathlib

from absl import flags

from saess_jax import command, evaluate, evaluation, report
from saess_jax import config as config_lib

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A training run's workdir or an adapter; short for --config.checkpoint.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for the results; an interrupted evaluation there is resumed.", required=True)


def main(config):
  config = config_lib.from_config_dict(config_lib.EvalConfig, config)
  if _CHECKPOINT.value is not None:
    config = dataclasses.replace(config, checkpoint=_CHECKPOINT.value)
  metrics = evaluate.evaluate(config, _WORKDIR.value)
  path = pathlib.Path(_WORKDIR.value).expanduser() / "report.html"
  report.write_report(metrics, evaluation.read_results(_WORKDIR.value, config.judges), path)
  print(f"Report: {path}")


if __name__ == "__main__":
  command.run(main)
