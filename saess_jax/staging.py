"""Folders and files that appear whole or not at all, and a folder for one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import IO

LOCK = "lock"  # The file of `alone`.


@contextlib.contextmanager
def new(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """A place to make a file or a folder at, NAME.unfinished beside the one asked for, which what is made there is
  renamed to once the block is done.

  If the block fails it is deleted. If the process was killed it is still there, and the next call starts over and says
  so on stderr; whether its process is still at work is told by a lock, which the system takes back from a killed one.

  Yields:
    The path, of nothing so far.

  Raises:
    FileExistsError: there is something at `path`, or another process is writing it now.
  """
  path = local(path).absolute()
  refuse_existing(path)
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.parent.mkdir(parents=True, exist_ok=True)
  with open(unfinished.with_name(unfinished.name + ".lock"), "a") as lock:  # A file: NFS locks no folders.
    if not _locked(lock):
      raise FileExistsError(f"Another process is writing {path} now (in {unfinished}); wait for it.")
    try:
      if unfinished.exists():
        print(f"{unfinished} was left by a process that did not finish: starting over.", file=sys.stderr)
        _delete(unfinished)
      yield unfinished
      refuse_existing(path)
      unfinished.rename(path)
    except BaseException:
      _delete(unfinished)
      raise
    finally:
      pathlib.Path(lock.name).unlink(missing_ok=True)


def _delete(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def local(path: str | pathlib.Path) -> pathlib.Path:
  """The path with "~" read. Raises ValueError for an address: what is written is renamed and locked, as files are."""
  if "://" in str(path):
    raise ValueError(
        f"{path} is an address; expected a path. Mount the bucket (docs/pods.md) and give the folder of it.")
  return pathlib.Path(path).expanduser()


@contextlib.contextmanager
def alone(folder: pathlib.Path, lock: str = LOCK) -> Iterator[None]:
  """Lets one process at a time into `folder`, or at what else is locked there by the name `lock`.

  It leaves an empty file of that name; the lock itself ends with its process.

  The file is locked and not the folder, since NFS locks only what is open for writing.

  Raises:
    ValueError: another process is in it.
  """
  with open(folder / lock, "a") as file:
    if not _locked(file):
      where = folder if lock == LOCK else folder / lock.removesuffix(f".{LOCK}")
      raise ValueError(f"Another process is at work in {where}; wait for it, or choose another folder.")
    yield


def _locked(file: IO[str]) -> bool:
  """Locks an open file until it is closed; False if another process has it, or had it and has just deleted it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return os.fstat(file.fileno()).st_nlink > 0


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces what is at `path`, in UTF-8."""
  unfinished = path.with_name(path.name + ".tmp")
  unfinished.write_text(text, encoding="utf-8")
  unfinished.replace(path)


def refuse_existing(path: str | pathlib.Path) -> None:
  """Raises FileExistsError if there is anything at `path`, and what `local` does."""
  if local(path).exists():
    raise FileExistsError(f"{path} exists, and nothing is ever overwritten; delete it, or choose another name.")
