"""Attacks a trained model and its base, and writes rows, metrics and an HTML report.

  python eval.py --config configs/eval_embedded.py --checkpoint RUN --workdir OUT
  python eval.py --config configs/eval_full.py --config.suites=file:prompts.csv --checkpoint RUN --workdir OUT

Kept short so that the logic can be imported and tested: see `saess_jax.evaluate` and `saess_jax.report`.
"""

from __future__ import annotations

import dataclasses
import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from saess_jax import config as config_lib
from saess_jax import evaluate, evaluation, report

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File under configs/ that returns an EvalConfig; --config.KEY=VALUE overrides.", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training run; short for --config.checkpoint.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results; an interrupted evaluation there is resumed.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  if logging.get_verbosity() == logging.INFO:  # app.run's default; checkpointing alone says hundreds of lines of it.
    logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
  config = config_lib.from_config_dict(config_lib.EvalConfig, _CONFIG.value)
  if _CHECKPOINT.value is not None:
    config = dataclasses.replace(config, checkpoint=_CHECKPOINT.value)
  metrics = evaluate.evaluate(config, _WORKDIR.value)
  path = pathlib.Path(_WORKDIR.value).expanduser() / "report.html"
  report.write_report(metrics, evaluation.read_results(_WORKDIR.value, config.judges), path)
  print(f"Report: {path}")


if __name__ == "__main__":
  app.run(main)
