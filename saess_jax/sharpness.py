"""How sure a model is of its next token under attack: entropy and sharpness of the K likeliest tokens.

  python -m saess_jax.sharpness --checkpoint RUN --evaluation OUT

The paper's probe experiment, over the responses that an evaluation stored (`evaluation.py`; attacks direct, prefill_N,
nested): the responses are read again, token by token, by the model that gave them. Where a model that was aligned by
examples alone hesitates between refusing and complying, its first tokens are flat; with an explicit signal they need
not be. K, and that sharpness is the likeliest token's share, are our choice: the paper names the two without formulas.

A response is read as far as nobody intervened: a refusal prefix is no choice of the model's. `configs/eval_probe.py`
has responses in which the decoder puts nothing in.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import batching, evaluation, masks, metrics, staging, subjects
from saess_jax.attacks import Weights
from saess_jax.config import EvalConfig
from saess_jax.data import chat
from saess_jax.masks import TokenKind


def top_k_statistics(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Of the k likeliest tokens, their probabilities made to sum to one.

  Args:
    logits: float32 [..., V].

  Returns:
    entropy [...], in nats, 0 to log k; sharpness [...], the likeliest one's probability, 1/k to 1.
  """
  log_prob = jax.nn.log_softmax(jax.lax.top_k(logits, k)[0])
  prob = jnp.exp(log_prob)
  return -jnp.sum(prob * log_prob, axis=-1), prob[..., 0]


@functools.partial(jax.jit, static_argnames=("model", "plain", "k"))
def _statistics(model, params, ids, kinds, before, plain, k):
  how = {} if plain else {"kinds": kinds, "stage": "sft"}
  logits = model.apply({"params": params}, ids, **how).logits
  return jnp.stack(top_k_statistics(logits[0, before], k), axis=-1)


def of_responses(weights: Weights, rows: Sequence[dict[str, Any]], tokens: int, k: int) -> np.ndarray:
  """Entropy and sharpness before each of the first `tokens` tokens that a row's model wrote itself.

  A model with [CLS] sees it as before the response (`stage` "sft"): what [CLS] became while decoding is not repeated.

  Args:
    rows: of `evaluation.read_results`.

  Returns:
    float32 [rows, tokens, 2]; NaN where a response is shorter, and from an intervention on.
  """
  found = np.full((len(rows), tokens, 2), np.nan, np.float32)
  for row, values in zip(rows, found):
    ids, kinds = chat.encode_prompt(weights.tokenizer, row["prompt"], system_prompt=weights.system_prompt)
    response = chat.encode_response(weights.tokenizer, row["response"], len(row["tokens"]) + tokens)
    prefix, count = row["prefix_tokens"], min(tokens, len(response) - row["prefix_tokens"])
    if row["intervened_at"] >= 0:
      cut = len(row["tokens"]) - (len(response) - 1)  # Steps that rollback took back; the last is the end of turn.
      count = min(count, row["intervened_at"] - prefix - max(0, cut))
    if count < 1:
      continue  # It intervened at once, rollback cut into the attacker's prefix, or the model said nothing.
    ids = np.concatenate([ids, response[: prefix + count]])
    kinds = np.concatenate([kinds, np.full(prefix + count, TokenKind.RESPONSE)])
    if weights.safety is not None:
      ids, kinds = chat.insert_cls(ids, kinds, "sft", weights.header_sees_cls)
    written = np.arange(len(ids) - count, len(ids) - count + tokens)
    size = batching.round_up(written[-1] + 1, 64)  # What is behind a token it never sees.
    ids, kinds = (
        np.pad(x, (0, size - len(x)), constant_values=value)[None] for x, value in ((ids, 0), (kinds, TokenKind.PAD)))
    before, plain = masks.predictor(kinds[0], written), weights.safety is None
    values[:count] = _statistics(weights.model, weights.params, ids, kinds, before, plain, k)[:count]
  return found


def _check_evaluated(evaluation: str, claim: dict[str, Any], checkpoint: str, identity: str) -> None:
  """Raises ValueError unless it was this checkpoint that gave the responses of `evaluation`, by its claim."""
  there = claim["config"]["checkpoint"]
  if (there, claim["models"]) != (checkpoint, identity):
    raise ValueError(
        f"{evaluation} is an evaluation of {there!r} ({claim['models']}), and --checkpoint is {checkpoint!r} "
        f"({identity}); give the checkpoint that was evaluated, by the same path.")


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
      prog="python -m saess_jax.sharpness", description="Entropy and sharpness of the next token under attacks.")
  parser.add_argument("--checkpoint", required=True, help="the run that was evaluated")
  parser.add_argument("--evaluation", required=True, help="workdir of its evaluation (eval.py)")
  parser.add_argument("--tokens", type=int, default=8, help="generated tokens looked at")
  parser.add_argument("--k", type=int, default=10, help="likeliest tokens")
  options = parser.parse_args(argv)
  try:
    claim = evaluation.read_claim(options.evaluation)
    models = subjects.load_models(EvalConfig(checkpoint=options.checkpoint, models=tuple(claim["config"]["models"])))
    _check_evaluated(options.evaluation, claim, options.checkpoint, models.identity)
    rows = evaluation.read_responses(options.evaluation)
    if not rows:
      raise ValueError(f"{options.evaluation} holds no responses yet; let its evaluation (eval.py) end.")
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))
  # What soft prompts fed cannot be read again from a row.
  by_model = metrics.group([row for row in rows if row["label"] == 1 and not row.get("soft_tokens")], "model")
  report: dict[str, dict[str, Any]] = {}
  print(f"{'model, attack':<36}{'n':>6}   entropy (nats), sharpness: before token 1, mean of {options.tokens}")
  for model, of_model in by_model.items():
    for method, kept in metrics.group(of_model, "method").items():
      values = of_responses(models.weights(model), kept, options.tokens, options.k)
      if not np.isfinite(values).any():
        print(f"{model + ', ' + method:<36}{0:>6}   no response holds a token of the model's own")
        continue
      by_token = np.nanmean(values[:, np.isfinite(values[..., 0]).any(axis=0)], axis=0)
      first, mean = by_token[0], np.nanmean(values, axis=(0, 1))
      report.setdefault(model, {})[method] = {
          "n": int(np.isfinite(values[:, 0, 0]).sum()), "entropy": by_token[:, 0].tolist(),
          "sharpness": by_token[:, 1].tolist()}
      print(f"{model + ', ' + method:<36}{report[model][method]['n']:>6}   {first[0]:.3f} {mean[0]:.3f}   "
            f"{first[1]:.3f} {mean[1]:.3f}", flush=True)
  path = pathlib.Path(options.evaluation).expanduser() / "sharpness.json"
  staging.write_text(path, json.dumps({"k": options.k, "by_model": report}, indent=2) + "\n")
  print(path)


if __name__ == "__main__":
  main()
