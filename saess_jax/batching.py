"""Rows of unlike length in batches of one size: little padding, and few shapes to compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def round_up(length: int, multiple: int) -> int:
  """The least multiple that is not below `length`: few shapes are compiled."""
  return -(-length // multiple) * multiple


def by_length(lengths: Sequence[int], batch_size: int, multiple: int) -> Iterator[tuple[list[int], list[int], int]]:
  """Neighbours of like length together.

  Args:
    lengths: of the rows.
    multiple: padded lengths are multiples of it.

  Yields:
    Indices of some rows; the same, filled up to `batch_size` with copies of the first; the length to pad them to.
  """
  order = sorted(range(len(lengths)), key=lengths.__getitem__)
  for at in range(0, len(order), batch_size):
    chosen = order[at : at + batch_size]
    yield chosen, chosen + chosen[:1] * (batch_size - len(chosen)), round_up(lengths[chosen[-1]], multiple)


def padded(rows: Iterable[np.ndarray], length: int, dtype: type = np.int32) -> np.ndarray:
  """Rows of one axis each, with zeros behind them: [rows, length]."""
  return np.stack([np.pad(np.asarray(row, dtype), (0, length - len(row))) for row in rows])
