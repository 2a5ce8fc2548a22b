"""Trains a model with its safety signal: python train.py --config configs/tiny.py --workdir runs/tiny

Kept short: the logic is in saess_jax/train.py, to be imported and tested.
"""

import os
import sys

import jax
from absl import flags

from saess_jax import checkpoint, cluster, command, train
from saess_jax import config as config_lib

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, rollouts and logs go; an earlier run there is resumed.", required=True)


def main(config):
  cluster.start()
  try:
    train.train_and_evaluate(config_lib.from_config_dict(config_lib.TrainConfig, config), _WORKDIR.value)
  except checkpoint.SaveFailed as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # At the interpreter's end each of orbax's unfinished writes would say a page, and bury the message.
  except KeyboardInterrupt:
    jax.distributed.shutdown()  # The others, who have saved too, would wait for this process.
    raise


if __name__ == "__main__":
  command.run(main)
