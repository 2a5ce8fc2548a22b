"""Who attends to whom (paper, section on strategic attention in training; table below).

  row            stage "pretrain"        stage "sft"
  CLS            every non-PAD token     itself and QUERY: not AUX (Rule 4), not RESPONSE
  AUX, QUERY     causal, not CLS         causal, not CLS
  HEADER         causal, not CLS         causal; CLS if `header_sees_cls`
  RESPONSE       causal, not CLS         causal, and CLS

Nothing sees PAD, and the row of PAD, which nobody reads, is empty. "Causal" is meant in reading order: the stored order
of all tokens but CLS, wherever CLS itself is stored.

Storing [CLS] in the right place makes the dense mask unnecessary: see `cls_slot`. Axes: B batch, S stored sequence,
E examples packed into a row, P views.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np

STAGES = ("pretrain", "sft")
CLS_SEES_RESPONSE = ("none", "benign", "malicious", "all")


class TokenKind(enum.IntEnum):
  """What a token is for. Carried beside the ids, never inferred from them: pad and eos share an id in many Llamas."""

  PAD = 0
  CLS = 1
  AUX = 2  # BOS, system text, role headers, other template text.
  QUERY = 3  # User content; in a chat also earlier assistant content, which an attacker can forge.
  HEADER = 4  # Between the last QUERY token and the first RESPONSE token.
  RESPONSE = 5


def attention_mask(
    kinds: jax.Array,
    stage: str,
    header_sees_cls: bool = True,
    cls_sees_response: str = "none",
    malicious: jax.Array | None = None,
) -> jax.Array:
  """The dense specification: may row i attend to column j?

  For the stored order CLS AUX QUERY QUERY HEADER RESPONSE RESPONSE PAD, stage "sft" (row attends to column):

    CLS       1 . 1 1 . . . .
    AUX       . 1 . . . . . .
    QUERY     . 1 1 . . . . .
    QUERY     . 1 1 1 . . . .
    HEADER    1 1 1 1 1 . . .
    RESPONSE  1 1 1 1 1 1 . .
    RESPONSE  1 1 1 1 1 1 1 .
    PAD       . . . . . . . .

  Args:
    kinds: int [B, S] of `TokenKind`, one CLS a row, stored anywhere.
    stage: "pretrain" or "sft".
    header_sees_cls: SFT only. True (our choice) lets the token that predicts the first response token see the signal.
    cls_sees_response: SFT only. "none" is the paper. "benign" and "malicious" are the released code's two data set
      versions: CLS sees the response of the examples that carry that label, so that the very visibility of a response
      tells the label (a leak; kept for reproduction). "all" shows it always. All but "none" also break causality, since
      the response in turn sees CLS.
    malicious: bool [B], needed for "benign" and "malicious" alone.

  Returns:
    bool [B, S, S].

  Raises:
    ValueError: an unknown stage or `cls_sees_response`, or missing labels.
  """
  kinds = jnp.asarray(kinds)
  size = kinds.shape[-1]
  causal = jnp.tril(jnp.ones((size, size), bool))
  is_cls, real = kinds == TokenKind.CLS, kinds != TokenKind.PAD
  sees_cls = jnp.zeros_like(is_cls)
  if stage == "sft":
    sees_cls = (kinds == TokenKind.RESPONSE) | (header_sees_cls & (kinds == TokenKind.HEADER))
  others = (real & ~is_cls)[:, :, None] & (real & ~is_cls)[:, None, :] & causal
  to_cls = sees_cls[:, :, None] & is_cls[:, None, :]
  cls_row = cls_visibility(kinds, stage, cls_sees_response, malicious)
  return others | to_cls | (is_cls[:, :, None] & cls_row[:, None, :])


def cls_visibility(
    kinds: jax.Array, stage: str, cls_sees_response: str = "none", malicious: jax.Array | None = None
) -> jax.Array:
  """The CLS row of `attention_mask`, for kinds [..., S] and malicious [...]: bool [..., S]. The rest as there."""
  if stage not in STAGES:
    raise ValueError(f"stage is {stage!r}; expected one of {', '.join(STAGES)}.")
  if cls_sees_response not in CLS_SEES_RESPONSE:
    raise ValueError(f"cls_sees_response is {cls_sees_response!r}; expected one of {', '.join(CLS_SEES_RESPONSE)}.")
  if stage == "pretrain":
    return kinds != TokenKind.PAD
  seen = (kinds == TokenKind.QUERY) | (kinds == TokenKind.CLS)
  if cls_sees_response == "none":
    return seen
  response = kinds == TokenKind.RESPONSE
  if cls_sees_response != "all":
    if malicious is None:
      raise ValueError(f'cls_sees_response="{cls_sees_response}" depends on the labels: pass malicious, bool [B].')
    shown = malicious if cls_sees_response == "malicious" else ~malicious
    response &= jnp.asarray(shown)[..., None]
  return seen | response


def cls_slot(kinds: np.ndarray, stage: str, header_sees_cls: bool = True) -> int:
  """Where to store CLS among the tokens `kinds` [S] (without CLS) so that plain causal order already hides it rightly.

  SFT: between QUERY and HEADER (after HEADER when `header_sees_cls` is off): rows before cannot see it, rows after can.
  Pretraining: behind everything: nobody sees it. Only the CLS row itself then differs from causal attention.

  Returns:
    The index that CLS will have.

  Raises:
    ValueError: an unknown stage; in SFT a HEADER or RESPONSE that is not at the end, which no single slot can serve.
  """
  if stage not in STAGES:
    raise ValueError(f"stage is {stage!r}; expected one of {', '.join(STAGES)}.")
  real = int(np.sum(kinds != TokenKind.PAD))
  if stage == "pretrain":
    return real
  after = (TokenKind.HEADER, TokenKind.RESPONSE) if header_sees_cls else (TokenKind.RESPONSE,)
  sees = np.isin(kinds[:real], [int(kind) for kind in after])
  slot = real - int(sees.sum())
  if sees[:slot].any():
    raise ValueError("A HEADER or RESPONSE token stands before other tokens; earlier turns are AUX and QUERY.")
  return slot


def predictor(kinds: jax.Array | np.ndarray, index: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """Slots [..., T] from whose hidden states the tokens in slots `index` [..., T] of kinds [..., S] are predicted.

  The slot before; where CLS is stored there, before the response of a HEADER that does not see it, the one before that.
  Of numpy arrays it is numpy's; one of them may be traced and the other not.
  """
  xp = np if isinstance(kinds, np.ndarray) and isinstance(index, np.ndarray) else jnp
  before = index - 1
  return before - (xp.take_along_axis(kinds, xp.clip(before, 0, kinds.shape[-1] - 1), axis=-1) == TokenKind.CLS)


def cls_last(kinds: jax.Array) -> jax.Array:
  """Indices [..., S] that bring kinds [..., S] into an order in which no row sees a CLS: they all come last."""
  return jnp.argsort(kinds == TokenKind.CLS, axis=-1, stable=True)


def apart(kinds: jax.Array, segments: jax.Array, examples: int) -> jax.Array:
  """Packed rows taken apart: every rule above holds for each example alone, as if the others were PAD.

  Args:
    kinds: int [B, S], one CLS an example.
    segments: int [B, S], from 1 which example a token belongs to; 0 is padding.
    examples: E, as many as a row holds at most.

  Returns:
    int [B, E, S]: the kinds of each example in its place, PAD elsewhere.
  """
  own = segments[:, None] == 1 + jnp.arange(examples)[:, None]
  return jnp.where(own, kinds[:, None], TokenKind.PAD)


def rope_positions(kinds: jax.Array) -> jax.Array:
  """RoPE positions of kinds [..., S], int32: CLS 0, all others from 1 in reading order wherever stored; PAD 0."""
  counted = (kinds != TokenKind.PAD) & (kinds != TokenKind.CLS)
  return jnp.where(counted, jnp.cumsum(counted, axis=-1), 0).astype(jnp.int32)


def view_visibility(kinds: jax.Array, views: jax.Array) -> jax.Array:
  """What [CLS] sees in one of its inference-time views (Rules 1 to 4), for training probes and for the decoder alike.

  Args:
    kinds: int [..., S].
    views: int [..., P, 3] of (sees_query, start, stop): QUERY if sees_query, and the response tokens of index
      [start, stop), counted from 0 at the first RESPONSE token. Never AUX, HEADER, PAD or a stored CLS (Rule 4).

  Returns:
    bool [..., P, S].
  """
  response = kinds == TokenKind.RESPONSE
  index = jnp.cumsum(response, axis=-1) - 1
  sees_query, start, stop = (views[..., i, None] for i in range(3))
  window = response[..., None, :] & (index[..., None, :] >= start) & (index[..., None, :] < stop)
  return window | ((sees_query > 0) & (kinds == TokenKind.QUERY)[..., None, :])
