"""A JSONL file that grows by whole lines: what was appended stays when the process dies, and is there to go on from."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any


class Records:
  """The records of one file; [] where there is none yet. Only one process may append."""

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)

  def read(self) -> list[dict[str, Any]]:
    """All records. A last line without its end, which a killed process left, is not one.

    Raises:
      ValueError: another line is no JSON object.
    """
    if not self.path.exists():
      return []
    *lines, _ = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
      try:
        records.append(json.loads(line))
      except ValueError as error:
        raise ValueError(f"{self.path}, line {number} is no record ({error}); delete that line to have it made again."
                         ) from error
    return records

  def append(self, records: Iterable[dict[str, Any]]) -> None:
    """Writes records behind the others, and waits until they are on the disk."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with open(self.path, "ab") as file:
      file.truncate(self._whole_bytes())
      file.write(text)
      file.flush()
      os.fsync(file.fileno())

  def _whole_bytes(self) -> int:
    """Length of the file without a last line that was not finished."""
    with open(self.path, "rb") as file:
      end = file.seek(0, os.SEEK_END)
      step, at, tail = 1 << 16, end, b""
      while at and b"\n" not in tail:
        at = max(at - step, 0)
        file.seek(at)
        tail = file.read(end - at)
    return at + tail.rfind(b"\n") + 1
