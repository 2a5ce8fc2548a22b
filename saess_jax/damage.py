"""What is wrong with files that orbax cannot read, said in one line and by one error."""

from __future__ import annotations

import contextlib
import gc
import io
import pathlib
from collections.abc import Iterator


class Damaged(ValueError):
  """Weights that cannot be read, or that are not those that were saved."""


@contextlib.contextmanager
def named(path: pathlib.Path, advice: str = "") -> Iterator[None]:
  """What orbax, tensorstore and JSON raise for a file that is missing, cut short or overwritten, as `Damaged`."""
  said = None
  with contextlib.redirect_stderr(io.StringIO()):  # Of each array orbax's unfinished reads say a page.
    try:
      yield
    except MemoryError:
      raise
    except Exception as error:  # Not chained: its frames keep those reads alive, to speak later.
      if "RESOURCE_EXHAUSTED" in str(error):  # Memory, or files that may be open: the fault is not the file's.
        raise
      said = first_line(error)
    if said:
      gc.collect()
  if said:
    raise Damaged(f"{path} is damaged ({said}).{advice}")


def first_line(error: Exception) -> str:
  """Behind it tensorstore says a page of its settings."""
  return f"{type(error).__name__}: {error}".splitlines()[0][:200]
