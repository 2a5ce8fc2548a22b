"""The objective against plain sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from saess_jax import losses
from saess_jax.config import LossConfig
from saess_jax.model import Output

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(3, 7, 4)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(4, 11)), jnp.float32)
BATCH = {
    "loss_positions": jnp.asarray([[1, 2, 3, 0], [0, 0, 0, 0], [2, 5, 0, 0]]),
    "targets": jnp.asarray(RNG.integers(0, 9, (3, 4))),  # With a vocabulary of nine no target is padding.
    "loss_weights": jnp.asarray([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]], jnp.float32),
    "label": jnp.asarray([1.0, 1.0, 0.0]), "label_weight": jnp.asarray([1.0, 0.0, 1.0]),
    "probe_labels": jnp.asarray([[1.0, 0.0]] * 3), "probe_weights": jnp.asarray([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
    "kl_positions": jnp.asarray([[0, 4], [3, 0], [1, 6]]),
    "kl_weights": jnp.asarray([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]),
}
OUT = Output(
    hidden=HIDDEN, logits=None, cls_logit=jnp.asarray([2.0, -9.0, 1.0]),
    probe_logits=jnp.asarray([[1.0, -1.0], [3.0, 50.0], [50.0, 50.0]]))
ROWS = [(0, 1, 0), (0, 2, 1), (0, 3, 2), (2, 2, 0), (2, 5, 1)]  # (sequence, position, target's column)


def test_the_loss_is_what_the_paper_says():
  loss, parts = losses.loss_sums(OUT, HEAD, BATCH, losses.totals(BATCH), LossConfig(cls_weight=0.1))
  lm = np.mean([
      -jax.nn.log_softmax(HIDDEN[b, s] @ HEAD)[BATCH["targets"][b, r]] for b, s, r in ROWS])
  bce = lambda logit, label: float(optax.sigmoid_binary_cross_entropy(jnp.asarray(logit), jnp.asarray(label)))
  cls = (bce(2.0, 1.0) + bce(1.0, 0.0)) / 2
  probe = (bce(1.0, 1.0) + bce(-1.0, 0.0) + bce(3.0, 1.0)) / 3
  np.testing.assert_allclose(
      [loss, parts["lm_loss"], parts["cls_loss"], parts["probe_loss"]],
      [lm + 0.1 * (cls + probe), lm, cls, probe], rtol=1e-5)
  assert parts["cls_accuracy"] == 0.5 and parts["probe_accuracy"] == 1.0


def test_the_kl_term_looks_from_the_base_at_the_chosen_positions():
  base = HIDDEN[::-1], HEAD[::-1]
  loss, parts = losses.loss_sums(
      OUT, HEAD, BATCH, losses.totals(BATCH), LossConfig(cls_weight=0.1, kl_weight=3.0), vocab_size=9, reference=base)
  def kl(b, s):  # Nine columns: the last two are padding.
    p, q = (scipy.special.softmax(np.asarray(h[b, s] @ w)[:9]) for h, w in (base, (HIDDEN, HEAD)))
    return np.sum(p * np.log(p / q))
  expected = np.mean([kl(0, 0), kl(0, 4), kl(1, 3), kl(2, 6)])
  np.testing.assert_allclose(parts["kl_loss"], expected, rtol=1e-5)
  without, plain = losses.loss_sums(OUT, HEAD, BATCH, losses.totals(BATCH), LossConfig(cls_weight=0.1), vocab_size=9)
  assert np.isfinite(without)
  np.testing.assert_allclose(loss, without + 3 * expected, rtol=1e-5)
  lm = np.mean([-np.log(scipy.special.softmax(np.asarray(HIDDEN[b, s] @ HEAD)[:9])[BATCH["targets"][b, r]])
                for b, s, r in ROWS])
  np.testing.assert_allclose([plain["lm_loss"], parts["lm_loss"]], lm, rtol=1e-5)
  to_hidden, to_head = jax.grad(
      lambda hidden, head: losses.kl_sum(base, (hidden, head), BATCH, vocab_size=9), (0, 1))(HIDDEN, HEAD)
  assert not to_head.any() and to_hidden[0, 4].any() and not to_hidden[0, 1].any()


def test_dpo_is_what_its_paper_says():
  ours, reference = jnp.asarray([[-2.0, -9.0], [-5.0, -1.0]]), jnp.asarray([[-3.0, -4.0], [-5.0, -1.5]])
  loss, right = losses.dpo_loss(ours, reference, 0.5)
  # Ours prefers the chosen by 7 and by -4 nats, the reference by 1 and by -3.5: margins 6 and -0.5.
  np.testing.assert_allclose(loss, [np.log1p(np.exp(-3.0)), np.log1p(np.exp(0.25))], rtol=1e-5)
  assert right.tolist() == [1.0, 0.0]


def test_log_probs_of_whole_responses():
  found = losses.response_log_probs(HIDDEN, HEAD, BATCH, LossConfig(chunk=3), vocab_size=11)
  log_p = lambda b, s, r: jax.nn.log_softmax(HIDDEN[b, s] @ HEAD)[BATCH["targets"][b, r]]
  expected = [log_p(0, 1, 0) + log_p(0, 2, 1) + log_p(0, 3, 2), 0.0, log_p(2, 2, 0) + log_p(2, 5, 1)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


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
