"""How programs that take a --config file read their flags, and say in one line what is wrong with what they were given.

A `raise ValueError` or OSError of this package is written for its user, and so is an OSError that names a file: status
2 and a line on stderr, with --verbosity=1 the traceback too. Ctrl-C is a line, and ends the process as it does by
itself, so that a shell script stops. Anything else keeps its traceback.
"""

from __future__ import annotations

import pathlib
import signal
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
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])  # --help shows the main module's.

  def parse(argv: list[str]) -> list[str]:
    try:
      rest = app.parse_flags_with_usage(argv)
      config.value.keys()  # A file that could not be read says so only when it is asked for something.
    except AttributeError as error:
      key = error.args[0]  # Of the lookup of KEY: its name, and the nearest one on a line of its own.
      in_the_file = any(frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__))
      if in_the_file or not isinstance(key, KeyError):
        raise
      _end("--config has no setting " + ". ".join(str(key.args[0]).splitlines()))
    except OSError as error:
      _end(str(error).splitlines()[-1].strip())
    if len(rest) > 1:
      _end(f"unexpected arguments {rest[1:]}; settings are given as --config.KEY=VALUE.")
    return rest

  def call(argv: list[str]) -> None:
    del argv
    verbosity = logging.get_verbosity()
    if verbosity == logging.INFO:  # app.run's default; checkpointing alone says hundreds of lines of it.
      logging.set_verbosity(logging.WARNING)
    try:
      main(config.value)
    except (OSError, ValueError) as error:
      if verbosity > logging.INFO or not is_for_the_user(error):
        raise
      _end(error)
    except KeyboardInterrupt:
      print(f"{pathlib.Path(sys.argv[0]).name}: interrupted.", file=sys.stderr, flush=True)
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      signal.raise_signal(signal.SIGINT)

  app.run(call, flags_parser=parse)


def is_for_the_user(error: OSError | ValueError) -> bool:
  """Whether it names a file, or a `raise` of this package began it: an `int("x")` in the package is a defect of it."""
  began = traceback.extract_tb(error.__traceback__)[-1]
  ours = pathlib.Path(began.filename).is_relative_to(PACKAGE) and "raise " in (began.line or "")
  return ours or getattr(error, "filename", None) is not None


def _end(error: object) -> NoReturn:
  print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
  sys.exit(2)
