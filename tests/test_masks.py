"""The mask builder, as pictures."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saess_jax import masks
from saess_jax.masks import TokenKind

LETTERS = {"P": TokenKind.PAD, "C": TokenKind.CLS, "A": TokenKind.AUX, "Q": TokenKind.QUERY, "H": TokenKind.HEADER,
           "R": TokenKind.RESPONSE}


def kinds(*rows):
  return jnp.asarray([[LETTERS[letter] for letter in row] for row in rows])


def picture(mask):
  return [" ".join("1" if seen else "." for seen in row) for row in np.asarray(mask)]


SFT = [
    "1 . 1 1 . . . .",
    ". 1 . . . . . .",
    ". 1 1 . . . . .",
    ". 1 1 1 . . . .",
    "1 1 1 1 1 . . .",
    "1 1 1 1 1 1 . .",
    "1 1 1 1 1 1 1 .",
    ". . . . . . . .",
]


def test_sft_is_the_paper_s_table():
  assert picture(masks.attention_mask(kinds("CAQQHRRP"), "sft")[0]) == SFT


def test_header_does_not_see_cls_when_told_so():
  blind = SFT.copy()
  blind[4] = ". 1 1 1 1 . . ."
  assert picture(masks.attention_mask(kinds("CAQQHRRP"), "sft", header_sees_cls=False)[0]) == blind


def test_pretrain_cls_sees_all_and_nobody_sees_it():
  for header_sees_cls in (True, False):
    assert picture(masks.attention_mask(kinds("CAQHRP"), "pretrain", header_sees_cls)[0]) == [
        "1 1 1 1 1 .",
        ". 1 . . . .",
        ". 1 1 . . .",
        ". 1 1 1 . .",
        ". 1 1 1 1 .",
        ". . . . . .",
    ]


@pytest.mark.parametrize("who, sees", [
    ("none", [False, False]), ("all", [True, True]), ("benign", [True, False]), ("malicious", [False, True])])
def test_cls_sees_response_by_label_is_the_released_code_s_leak(who, sees):
  mask = masks.attention_mask(
      kinds("CQHRR", "CQHRR"), "sft", cls_sees_response=who, malicious=jnp.asarray([False, True]))
  for row, seen in zip(mask, sees):
    assert picture(row)[0] == ("1 1 . 1 1" if seen else "1 1 . . .")
    assert picture(row)[3:] == ["1 1 1 1 .", "1 1 1 1 1"]


def test_the_stored_place_of_cls_changes_nothing_but_its_row_and_column():
  front, boundary = kinds("CAQQHRRP"), kinds("AQQCHRRP")
  order = np.asarray([1, 2, 3, 0, 4, 5, 6, 7])
  for stage in masks.STAGES:
    moved = np.asarray(masks.attention_mask(front, stage)[0])[np.ix_(order, order)]
    np.testing.assert_array_equal(moved, masks.attention_mask(boundary, stage)[0])


def test_multi_turn_cls_sees_every_query_and_no_template():
  row = masks.attention_mask(kinds("AQAQAQCHR"), "sft")[0, 6]
  assert picture([row]) == [". 1 . 1 . 1 1 . ."]


@pytest.mark.parametrize("stage, header_sees_cls, slot", [("sft", True, 3), ("sft", False, 4), ("pretrain", True, 6)])
def test_cls_slot(stage, header_sees_cls, slot):
  assert masks.cls_slot(np.asarray(kinds("AQQHRRP"))[0], stage, header_sees_cls) == slot


@hypothesis.given(
    parts=st.tuples(*(st.integers(0, 3) for _ in range(5))), stage=st.sampled_from(masks.STAGES), sees=st.booleans())
def test_at_the_slot_only_the_row_of_cls_differs_from_causal(parts, stage, sees):
  """What the fast path rests on."""
  text = "".join(letter * count for letter, count in zip("AQHRP", parts))
  plain = np.asarray(kinds(text))[0] if text else np.zeros(0, int)
  slot = masks.cls_slot(plain, stage, sees)
  stored = np.insert(plain, slot, TokenKind.CLS)[None]
  mask = np.asarray(masks.attention_mask(jnp.asarray(stored), stage, sees))[0]
  real = stored[0] != TokenKind.PAD
  others = real & (np.arange(len(real)) != slot)
  np.testing.assert_array_equal(mask[others], (np.tril(np.ones_like(mask)) & real)[others])


def test_positions_count_from_one_in_reading_order():
  expected = [[1, 2, 3, 0, 4, 5, 0]]
  np.testing.assert_array_equal(masks.rope_positions(kinds("AQQCHRP")), expected)
  np.testing.assert_array_equal(masks.rope_positions(kinds("CAQQHRP")), [[0, 1, 2, 3, 4, 5, 0]])


def test_packed_examples_are_blocks_that_do_not_see_each_other():
  packed, segments = kinds("QCHRQCRP"), jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]])
  each = masks.apart(packed, segments, 3)  # Room for a third that is not there.
  assert picture(jnp.any(jnp.stack([masks.attention_mask(one, "sft")[0] for one in jnp.moveaxis(each, 1, 0)]), 0)) == [
      "1 . . . . . . .",
      "1 1 . . . . . .",
      "1 1 1 . . . . .",
      "1 1 1 1 . . . .",
      ". . . . 1 . . .",
      ". . . . 1 1 . .",
      ". . . . 1 1 1 .",
      ". . . . . . . .",
  ]
  assert masks.rope_positions(each).sum(axis=1).tolist() == [[1, 0, 2, 3, 1, 0, 2, 0]]
  assert picture(masks.cls_visibility(each, "sft")[0]) == [
      "1 1 . . . . . .", ". . . . 1 1 . .", ". . . . . . . ."]


def test_views_are_windows_over_query_and_response_alone():
  seen = masks.view_visibility(kinds("AQCHRRRRP"), jnp.asarray([[[1, 0, 2], [0, 1, 3], [0, 0, 0]]]))
  assert picture(seen[0]) == [". 1 . . 1 1 . . .", ". . . . . 1 1 . .", ". . . . . . . . ."]


def test_views_skip_tokens_that_were_cut():
  """After rollback cut tokens are PAD between others; indices count what stands."""
  seen = masks.view_visibility(kinds("QCRRPPRR"), jnp.asarray([[[0, 1, 3]]]))
  assert picture(seen[0]) == [". . . 1 . . 1 ."]


def test_cls_last():
  assert masks.cls_last(kinds("CAQQHR")).tolist() == [[1, 2, 3, 4, 5, 0]]
  assert masks.cls_last(kinds("AQCHRAQCHRP")).tolist() == [[0, 1, 3, 4, 5, 6, 8, 9, 10, 2, 7]]


def test_a_token_is_predicted_by_the_one_before_it_and_never_by_cls():
  seen, unseen = "AQCHRR", "AQHCRR"  # HEADER sees [CLS], or not.
  for at in (np.asarray, jnp.asarray):
    assert masks.predictor(at(kinds(seen, unseen)), at([[4, 5], [4, 5]])).tolist() == [[3, 4], [2, 4]]
    traced = jax.jit(lambda index, known=np.asarray(kinds(seen, unseen)): masks.predictor(known, index))
    assert traced(at([[4, 5], [4, 5]])).tolist() == [[3, 4], [2, 4]]
  assert masks.predictor(np.asarray(kinds(unseen))[0], np.asarray([4, 9])).tolist() == [2, 8]  # Behind the end too.


@pytest.mark.parametrize("call, message", [
    (lambda: masks.attention_mask(kinds("CQ"), "dpo"), "stage is 'dpo'; expected one of pretrain, sft"),
    (lambda: masks.attention_mask(kinds("CQ"), "sft", cls_sees_response="some"), "cls_sees_response is 'some'"),
    (lambda: masks.attention_mask(kinds("CQ"), "sft", cls_sees_response="benign"), "pass malicious"),
    (lambda: masks.cls_slot(np.asarray(kinds("QHRAQ"))[0], "sft"), "earlier turns are AUX and QUERY"),
])
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()
