"""Trains a model with its safety signal: python train.py --config configs/tiny.py --workdir runs/tiny

Kept short: the logic is in saess_jax/train.py, to be imported and tested.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from saess_jax import checkpoint, cluster, train
from saess_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File under configs/; --config.KEY=VALUE overrides.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, rollouts and logs go; an earlier run there is resumed.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  if logging.get_verbosity() == logging.INFO:  # app.run's default; checkpointing alone says hundreds of lines of it.
    logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments {argv[1:]}; settings are given as --config.KEY=VALUE.")
  cluster.start()
  try:
    train.train_and_evaluate(config_lib.from_config_dict(config_lib.TrainConfig, _CONFIG.value), _WORKDIR.value)
  except checkpoint.SaveFailed as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # At the interpreter's end each of orbax's unfinished writes would say a page, and bury the message.


if __name__ == "__main__":
  app.run(main)
