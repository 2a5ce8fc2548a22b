"""Scalars for TensorBoard, written where they are given.

tensorboardX's SummaryWriter hands events to a thread: its `flush` does not wait for what is queued there, and once the
thread has died of a full disk the next scalar blocks for good. Here a write that fails raises.
"""

from __future__ import annotations

import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Events:
  """One events file of a run."""

  def __init__(self, folder: pathlib.Path, steps_done: int):
    """Events of later steps than `steps_done`, from files that were there before, are no longer shown."""
    folder.mkdir(exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # Two starts in a second differ.
    self._writer.write_event(Event(
        wall_time=time.time(), step=steps_done + 1, session_log=SessionLog(status=SessionLog.START)))

  def write(self, scalars: dict[str, float], step: int) -> None:
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def flush(self) -> None:
    """Onto the disk. Raises OSError where there is no room."""
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()
