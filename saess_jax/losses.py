"""The objective L = L_lm + cls_weight * L_cls (paper, section on training) + kl_weight * L_kl (ours, off by default).

L_lm is the cross-entropy of response tokens, averaged over all response tokens of the global batch. L_cls is the binary
cross-entropy of the [CLS] logit (label 1 = malicious), averaged over its sequences, plus, if there are trajectory
probes (our addition), that of the probes, averaged over the probes. L_kl is KL(base || model) of the next token in
nats, averaged over some tokens of each query and benign response: what the signal costs the language model.

Two rivals, for comparison: L_lm alone (sft), and preferences between two responses (`dpo_loss`).

Averages over the whole batch also hold under gradient accumulation and on any mesh, because a loss here is a sum
divided by `Totals` that were counted over the whole batch beforehand.

Axes: B batch, R loss positions, P probes, K positions of the KL term, D embed, V vocab.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax

from saess_jax.config import LossConfig
from saess_jax.model import Output, logits_of


@flax.struct.dataclass
class Totals:
  """Float32 scalars: the weights that a whole batch holds."""

  tokens: jax.Array
  sequences: jax.Array
  probes: jax.Array
  compared: jax.Array


def totals(batch: dict[str, jax.Array]) -> Totals:
  """Counts a batch (of any leading shape)."""
  return Totals(*(jnp.sum(batch[name]) for name in (
      "loss_weights", "label_weight", "probe_weights", "kl_weights")))


def cross_entropy_sum(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int,
    vocab_size: int | None = None) -> jax.Array:
  """Weighted sum of -log p(target), with logits of `chunk` positions a sequence in memory at a time.

  Args:
    hidden: [B, R, D]; head: [D, V]; targets: int32 [B, R]; weights: float32 [B, R].
    vocab_size: columns of the head behind it are padding (`ModelConfig.vocab_padding`). None: there are none.

  Returns:
    float32 scalar.
  """
  def one(hidden, targets, weights):
    logits = logits_of(hidden, head)
    if vocab_size is not None and vocab_size < head.shape[1]:
      logits = jnp.where(jnp.arange(head.shape[1]) < vocab_size, logits, -jnp.inf)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

  size = targets.shape[1]
  if size <= chunk:
    return one(hidden, targets, weights)
  pad = -size % chunk
  def chunks(x):
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
  add = lambda total, piece: (total + jax.checkpoint(one)(*piece), None)  # Backward recomputes the logits.
  return jax.lax.scan(add, jnp.zeros(()), tuple(map(chunks, (hidden, targets, weights))))[0]


def language_loss(
    hidden: jax.Array, head: jax.Array, batch: dict[str, jax.Array], total: Totals, config: LossConfig,
    vocab_size: int | None = None,
) -> jax.Array:
  """A batch's share of L_lm; all that a plain language model is trained on. Arguments as `loss_sums`."""
  picked = jnp.take_along_axis(hidden, batch["loss_positions"][..., None], axis=1)
  return cross_entropy_sum(
      picked, head, batch["targets"], batch["loss_weights"], config.chunk, vocab_size) / total.tokens


def kl_sum(
    reference: tuple[jax.Array, jax.Array], ours: tuple[jax.Array, jax.Array], batch: dict[str, jax.Array],
    vocab_size: int | None = None) -> jax.Array:
  """Sum of KL(reference || ours) over a batch's `kl_positions`, in nats.

  The head gets no gradient: a small one for every word of the vocabulary, which Adam makes a full step of, would push
  the two apart faster than this term holds them together.

  Args:
    reference, ours: hidden [B, S, D] and head [D, V] of either model.
    vocab_size: as `cross_entropy_sum`.

  Returns:
    float32 scalar.
  """
  def log_probs(hidden, head):
    picked = jnp.take_along_axis(hidden, batch["kl_positions"][..., None], axis=1)
    return jax.nn.log_softmax(logits_of(picked, head, vocab_size))
  hidden, head = ours
  apart = optax.losses.kl_divergence_with_log_targets(
      log_probs(hidden, jax.lax.stop_gradient(head)), log_probs(*reference))
  return jnp.sum(batch["kl_weights"] * apart)


def loss_sums(
    out: Output, head: jax.Array, batch: dict[str, jax.Array], total: Totals, config: LossConfig,
    vocab_size: int | None = None, reference: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """This batch's, or micro-batch's, share of the loss.

  Args:
    out: the model's, with probe logits if the batch has probes. `out.logits` is not read, so a jitted caller computes
      logits at loss positions only.
    head: [D, V].
    batch: see `data/pipeline.py`.
    total: counted over the whole batch; with it the shares of all micro-batches add up to the loss.
    vocab_size: as `cross_entropy_sum`.
    reference: the base's hidden states [B, S, D] and head [D, V]; None: no KL term.

  Returns:
    The share of L, and the shares of its parts and of the accuracies (at probability 0.5), float32 scalars that add up
    in the same way.
  """
  total = jax.tree.map(lambda count: jnp.maximum(count, 1.0), total)  # Sums over nothing are 0, not 0 / 0.
  lm = language_loss(out.hidden, head, batch, total, config, vocab_size)
  cls, cls_right = _binary(out.cls_logit, batch["label"], batch["label_weight"], total.sequences)
  metrics = {"lm_loss": lm, "cls_loss": cls, "cls_accuracy": cls_right}
  loss = lm + config.cls_weight * cls
  if out.probe_logits is not None:
    probe, probe_right = _binary(out.probe_logits, batch["probe_labels"], batch["probe_weights"], total.probes)
    metrics |= {"probe_loss": probe, "probe_accuracy": probe_right}
    loss += config.cls_weight * probe
  if reference is not None:
    metrics["kl_loss"] = kl_sum(reference, (out.hidden, head), batch, vocab_size) / total.compared
    loss += config.kl_weight * metrics["kl_loss"]
  return loss, {"loss": loss, **metrics}


def dpo_loss(
    ours: jax.Array, reference: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
  """Direct preference optimization (Rafailov et al. 2023, equation 7).

  Args:
    ours, reference: float32 [B, 2], the log probability that either model gives the whole chosen and the whole rejected
      response.
    beta: see `LossConfig.dpo_beta`.

  Returns:
    Of each pair, float32 [B]: -log sigmoid(beta * margin), and whether the margin is above 0. The margin is by how much
    more the model prefers the chosen response than the reference does, in nats.
  """
  preference = lambda log_probs: log_probs[:, 0] - log_probs[:, 1]
  margin = preference(ours) - preference(reference)
  return -jax.nn.log_sigmoid(beta * margin), (margin > 0).astype(jnp.float32)


def response_log_probs(
    hidden: jax.Array, head: jax.Array, batch: dict[str, jax.Array], config: LossConfig, vocab_size: int | None = None
) -> jax.Array:
  """log p of each sequence's targets, summed: float32 [B]. Arguments as `loss_sums`."""
  picked = jnp.take_along_axis(hidden, batch["loss_positions"][..., None], axis=1)
  one = lambda hidden, targets, weights: -cross_entropy_sum(
      hidden[None], head, targets[None], weights[None], config.chunk, vocab_size)
  return jax.vmap(one)(picked, batch["targets"], batch["loss_weights"])


def _binary(logits, labels, weights, total) -> tuple[jax.Array, jax.Array]:
  losses = optax.sigmoid_binary_cross_entropy(logits, labels)
  right = (logits >= 0) == (labels >= 0.5)
  return jnp.sum(weights * losses) / total, jnp.sum(weights * right) / total
