"""How programs that take a --config file read their flags, and say in one line what is wrong with what they were given.

Every ValueError that this package raises by itself is written for its user, and every OSError names a file or what the
system refused: status 2 and a line on stderr. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

PACKAGE = pathlib.Path(__file__).parent


def run(main: Callable[[ml_collections.ConfigDict], None]) -> None:
  """Reads the command line, calls `main` with the --config that it gives, and ends the process.

  The caller defines its other flags before.
  """
  config = config_flags.DEFINE_config_file(
      "config", None, "File under configs/; --config.KEY=VALUE overrides.", lock_config=True)
  flags.mark_flag_as_required("config")

  def parse(argv: list[str]) -> list[str]:
    try:
      rest = app.parse_flags_with_usage(argv)
      _ = config.value  # A file that could not be read says so only when it is asked for.
    except AttributeError as error:  # Of the lookup of KEY: its name, and the nearest on a line of its own.
      _end("--config has no setting " + ". ".join(str(error.args[0].args[0]).splitlines()))
    except OSError as error:
      _end(error)
    if len(rest) > 1:
      _end(f"unexpected arguments {rest[1:]}; settings are given as --config.KEY=VALUE.")
    return rest

  def call(argv: list[str]) -> None:
    del argv
    if logging.get_verbosity() == logging.INFO:  # app.run's default; checkpointing alone says hundreds of lines of it.
      logging.set_verbosity(logging.WARNING)
    try:
      main(config.value)
    except OSError as error:
      _end(error)
    except ValueError as error:
      raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
      if not pathlib.Path(raised_in).is_relative_to(PACKAGE):
        raise
      _end(error)

  app.run(call, flags_parser=parse)


def _end(error: object) -> NoReturn:
  print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
  sys.exit(2)
