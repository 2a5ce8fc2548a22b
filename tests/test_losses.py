"""The objective against plain sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saess_jax import losses
from saess_jax.config import LossConfig
from saess_jax.model import Output

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(3, 7, 4)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(4, 11)), jnp.float32)
BATCH = {
    "loss_positions": jnp.asarray([[1, 2, 3, 0], [0, 0, 0, 0], [2, 5, 0, 0]]),
    "targets": jnp.asarray(RNG.integers(0, 11, (3, 4))),
    "loss_weights": jnp.asarray([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]], jnp.float32),
    "label": jnp.asarray([1.0, 1.0, 0.0]), "label_weight": jnp.asarray([1.0, 0.0, 1.0]),
    "probe_labels": jnp.asarray([[1.0, 0.0]] * 3), "probe_weights": jnp.asarray([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
}
OUT = Output(
    hidden=HIDDEN, logits=None, cls_logit=jnp.asarray([2.0, -9.0, 1.0]),
    probe_logits=jnp.asarray([[1.0, -1.0], [3.0, 50.0], [50.0, 50.0]]))


def test_the_loss_is_what_the_paper_says():
  loss, parts = losses.loss_sums(OUT, HEAD, BATCH, losses.totals(BATCH), LossConfig(cls_weight=0.1))
  rows = [(0, 1, 0), (0, 2, 1), (0, 3, 2), (2, 2, 0), (2, 5, 1)]  # (sequence, position, target's column)
  lm = np.mean([
      -jax.nn.log_softmax(HIDDEN[b, s] @ HEAD)[BATCH["targets"][b, r]] for b, s, r in rows])
  bce = lambda logit, label: float(optax.sigmoid_binary_cross_entropy(jnp.asarray(logit), jnp.asarray(label)))
  cls = (bce(2.0, 1.0) + bce(1.0, 0.0)) / 2
  probe = (bce(1.0, 1.0) + bce(-1.0, 0.0) + bce(3.0, 1.0)) / 3
  np.testing.assert_allclose(
      [loss, parts["lm_loss"], parts["cls_loss"], parts["probe_loss"]],
      [lm + 0.1 * (cls + probe), lm, cls, probe], rtol=1e-5)
  assert parts["cls_accuracy"] == 0.5 and parts["probe_accuracy"] == 1.0


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_change_neither_value_nor_gradient(chunk):
  total = lambda chunk: lambda hidden, head: losses.cross_entropy_sum(
      hidden, head, BATCH["targets"], BATCH["loss_weights"], chunk)
  whole, pieces = (jax.value_and_grad(total(c), (0, 1))(HIDDEN[:, :4], HEAD) for c in (99, chunk))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, pieces)


def test_shares_of_micro_batches_add_up_to_the_batch():
  total = losses.totals(BATCH)
  share = lambda rows: losses.loss_sums(
      jax.tree.map(lambda x: x[rows], OUT), HEAD, jax.tree.map(lambda x: x[rows], BATCH), total, LossConfig())[1]
  whole, first, rest = share(np.s_[:]), share(np.s_[:1]), share(np.s_[1:])
  for name in whole:
    np.testing.assert_allclose(first[name] + rest[name], whole[name], rtol=1e-5)


def test_a_batch_without_losses_gives_zero_and_no_nan():
  empty = {name: jnp.zeros_like(value) for name, value in BATCH.items()}
  assert losses.loss_sums(OUT, HEAD, empty, losses.totals(empty), LossConfig())[0] == 0
