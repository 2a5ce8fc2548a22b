import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saess_jax import batching


def test_neighbours_of_like_length_fill_a_batch():
  batches = list(batching.by_length([5, 1, 9, 2, 2], batch_size=2, multiple=4))
  assert batches == [([1, 3], [1, 3], 4), ([4, 0], [4, 0], 8), ([2], [2, 2], 12)]


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 7), st.integers(1, 9))
def test_every_row_is_in_one_batch_and_fits(lengths, batch_size, multiple):
  batches = list(batching.by_length(lengths, batch_size, multiple))
  assert sorted(i for chosen, _, _ in batches for i in chosen) == list(range(len(lengths)))
  for chosen, filled, length in batches:
    assert len(filled) == batch_size and filled[: len(chosen)] == chosen and set(filled) == set(chosen)
    assert length % multiple == 0 and length - multiple < max(lengths[i] for i in chosen) <= length


def test_padded():
  rows = batching.padded([np.array([1, 2, 3]), np.zeros(0), [4]], 4)
  assert rows.dtype == np.int32 and rows.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
