"""What safety costs: perplexity on benign responses, how far the model moved from its base, and how fast it answers.

  python -m saess_jax.utility --checkpoint RUN --data benign.jsonl --rows 40

Perplexity and KL look at response tokens only, given their prompts, in float32. With `sees_cls` [CLS] stands in its
place and header and response attend to it, as in safe decoding; without it the sequence is plain text and the model a
plain Llama.

Axes: B batch, S tokens, R response tokens, C of them at a time, D embed, V vocab.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import batching, masks, subjects
from saess_jax.config import EvalConfig, precision_of
from saess_jax.data import chat, sources
from saess_jax.generate import Generator
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, Params, output_head

CHUNK = 64  # Response tokens of a row whose logits are in memory at a time; lengths are padded to multiples.

Row = tuple[np.ndarray, np.ndarray]  # tokens and kinds int32 [S], in the stored layout.


@dataclasses.dataclass(frozen=True)
class Measure:
  """A mean over all response tokens of all rows, and how many they are."""

  value: float
  tokens: int


@dataclasses.dataclass(frozen=True)
class Speed:
  """Medians over rounds in which the two took turns; what ran beside them changes both.

  Attributes:
    tokens_per_second: name -> of all prompts in batches, reading them included.
    first_token_seconds: name -> from one prompt to its first token.
    ratio: of tokens per second, safe over plain, the median of the rounds' own ratios.
  """

  tokens_per_second: dict[str, float]
  first_token_seconds: dict[str, float]
  ratio: float


@flax.struct.dataclass
class _Batch:
  """Padded rows.

  Attributes:
    tokens, kinds: int32 [B, S].
    before: int32 [B, R], where the token stands that predicts each response token.
    targets: int32 [B, R], the response tokens; weights: float32 [B, R], 0 for padding.
  """

  tokens: jax.Array
  kinds: jax.Array
  before: jax.Array
  targets: jax.Array
  weights: jax.Array


def encode_rows(
    tokenizer: Any, prompts: Sequence[chat.Messages], responses: Sequence[str], max_length: int,
    system_prompt: str = "", header_sees_cls: bool = True) -> list[Row]:
  """Prompts with their responses (end-of-turn token included) in the stored layout; what is longer is cut.

  Raises:
    ValueError: an empty response, or as `chat.encode_example`.
  """
  rows = []
  for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    ids = chat.encode_response(tokenizer, response, max_length)
    if not len(ids):
      raise ValueError(f"Response {i} is {response!r}; expected text.")
    rows.append(chat.encode_example(
        tokenizer, prompt, ids, stage="sft", header_sees_cls=header_sees_cls, max_length=max_length,
        system_prompt=system_prompt))
  return rows


def perplexity(
    model: Llama, params: Params, rows: Sequence[Row], *, sees_cls: bool = False, batch_size: int = 8) -> Measure:
  """exp of the mean -log p of a response token.

  Args:
    rows: as `encode_rows` gives them.
    sees_cls: see the top of this file.

  Raises:
    ValueError: no rows.
  """
  total, count = 0.0, 0
  sums = _jitted_nll(_in_float32(model), sees_cls)
  for chosen in _batches(rows, batch_size):
    batch = _pad(chosen, batch_size, sees_cls)
    total, count = total + float(sums(params, batch)), count + int(batch.weights.sum())
  return Measure(math.exp(total / count), count)


def mean_kl(
    base: Llama, base_params: Params, model: Llama, params: Params, rows: Sequence[Row], *, sees_cls: bool = True,
    batch_size: int = 8) -> Measure:
  """Mean over response tokens of KL(base || model) in nats: what the base would say, seen by the model.

  Args:
    base: reads plain text.
    sees_cls: whether `model` reads [CLS].

  Raises:
    ValueError: no rows, or vocabularies of different sizes.
  """
  if base.config.vocab_size != model.config.vocab_size:
    raise ValueError(
        f"The base has a vocabulary of {base.config.vocab_size} and the model one of {model.config.vocab_size}; "
        "expected the model that it was trained from.")
  total, count = 0.0, 0
  sums = _jitted_kl(_in_float32(base), _in_float32(model), sees_cls)
  for chosen in _batches(rows, batch_size):
    plain, batch = _pad(chosen, batch_size, False), _pad(chosen, batch_size, sees_cls)
    total, count = total + float(sums(base_params, params, plain, batch)), count + int(batch.weights.sum())
  return Measure(total / count, count)


def speed(plain: Generator, safe: Generator, prompts: Sequence[chat.Messages], rounds: int = 5) -> Speed:
  """How fast the same weights answer without and with [CLS]; the first round, which compiles, does not count."""
  generators = {"plain": plain, "safe": safe}
  rates, waits = {name: [] for name in generators}, {name: [] for name in generators}
  for number in range(rounds + 1):
    for name, generator in generators.items():
      began = time.perf_counter()
      tokens = sum(len(response.ids) for response in generator.respond(prompts))
      between = time.perf_counter()
      generator.respond(prompts[:1], max_new_tokens=1)
      if number:
        rates[name].append(tokens / (between - began))
        waits[name].append(time.perf_counter() - between)
  median = lambda of: {name: statistics.median(values) for name, values in of.items()}
  return Speed(median(rates), median(waits), statistics.median(b / a for a, b in zip(rates["plain"], rates["safe"])))


def _in_float32(model: Llama) -> Llama:
  return Llama(model.config.replace(dtype="float32"))


@functools.lru_cache(maxsize=8)
def _jitted_nll(model: Llama, sees_cls: bool):
  def sums(params, batch):
    hidden = _hidden(model, params, batch, sees_cls)
    def one(at):
      target = jnp.take_along_axis(_log_probs(model, params, at(hidden)), at(batch.targets)[..., None], axis=-1)
      return -jnp.sum(at(batch.weights) * target[..., 0])
    return _over_chunks(one, batch)
  return jax.jit(sums)


@functools.lru_cache(maxsize=8)
def _jitted_kl(base: Llama, model: Llama, sees_cls: bool):
  def sums(base_params, params, plain, batch):
    theirs, ours = _hidden(base, base_params, plain, False), _hidden(model, params, batch, sees_cls)
    def one(at):
      p, q = _log_probs(base, base_params, at(theirs)), _log_probs(model, params, at(ours))
      return jnp.sum(at(batch.weights) * jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    return _over_chunks(one, batch)
  return jax.jit(sums)


def _hidden(model: Llama, params: Params, batch: _Batch, sees_cls: bool) -> jax.Array:
  """[B, R, D]: the state that predicts each response token."""
  layout = {"kinds": batch.kinds, "stage": "sft"} if sees_cls else {}  # Right padding: causal order hides it.
  hidden = model.apply({"params": params}, batch.tokens, **layout).hidden
  return jnp.take_along_axis(hidden, batch.before[..., None], axis=1)


def _log_probs(model: Llama, params: Params, hidden: jax.Array) -> jax.Array:
  head = output_head(params)[:, : model.config.vocab_size].astype(jnp.float32)
  return jax.nn.log_softmax(jnp.matmul(hidden, head, precision=precision_of(head.dtype)))


def _over_chunks(one, batch: _Batch) -> jax.Array:
  """The sum of `one(at)` over chunks of C response tokens, where at(x) takes a chunk's part of x [B, R, ...]."""
  def step(total, start):
    return total + one(lambda x: jax.lax.dynamic_slice_in_dim(x, start, CHUNK, axis=1)), None
  return jax.lax.scan(step, jnp.float32(0), jnp.arange(0, batch.targets.shape[1], CHUNK))[0]


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
  """Rows of like length together."""
  if not rows:
    raise ValueError("No rows were given; expected at least one text to measure on.")
  batches = batching.by_length([len(tokens) for tokens, _ in rows], size, CHUNK)
  return ([rows[i] for i in chosen] for chosen, _, _ in batches)


def _pad(rows: list[Row], size: int, sees_cls: bool) -> _Batch:
  """`size` rows, those that are missing of weight 0; without `sees_cls` [CLS] is taken out."""
  if not sees_cls:
    rows = [(tokens[kinds != TokenKind.CLS], kinds[kinds != TokenKind.CLS]) for tokens, kinds in rows]
  rows = rows + [(np.zeros(0, np.int32), np.zeros(0, np.int32))] * (size - len(rows))
  responses = [np.flatnonzero(kinds == TokenKind.RESPONSE) for _, kinds in rows]
  up = lambda lengths: batching.round_up(max(lengths), CHUNK)
  length, longest = up(len(tokens) for tokens, _ in rows), up(map(len, responses))
  return _Batch(
      tokens=batching.padded((tokens for tokens, _ in rows), length),
      kinds=batching.padded((kinds for _, kinds in rows), length),
      before=batching.padded((masks.predictor(kinds, r) for (_, kinds), r in zip(rows, responses)), longest),
      targets=batching.padded((tokens[r] for (tokens, _), r in zip(rows, responses)), longest),
      weights=batching.padded((np.ones(len(r)) for r in responses), longest, np.float32))


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
      prog="python -m saess_jax.utility", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", required=True, help="a training run (a rival's too), or an adapter")
  parser.add_argument("--data", required=True, help="benign prompts with responses: a .csv or .jsonl file")
  parser.add_argument("--rows", type=int, default=40, help="drawn from it")
  parser.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt with its response")
  parser.add_argument("--new-tokens", type=int, default=64, help="of an answer whose time is taken")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(argv)
  try:
    answered = [row for row in sources.read_rows(options.data, "benign") if row.response and not row.label]
    if not 1 <= options.rows <= len(answered):
      raise ValueError(
          f"--rows is {options.rows}; {options.data} has {len(answered)} benign rows with a response: expected 1 to "
          "as many.")
    drawn = np.random.default_rng(options.seed).permutation(len(answered))[: options.rows]
    chosen = [answered[i] for i in sorted(drawn)]
    models = subjects.load_models(
        EvalConfig(checkpoint=options.checkpoint, models=("base", "plain"), seed=options.seed))
    base, ours = models.weights("base"), models.weights("saess" if models.has_cls else "plain")
    rows = encode_rows(
        ours.tokenizer, [row.prompt for row in chosen], [row.response for row in chosen], options.max_length,
        ours.system_prompt, ours.header_sees_cls)
  except (ValueError, OSError) as error:
    parser.error(str(error))
  generator = lambda safety: Generator(
      ours.model, ours.params, ours.tokenizer, safety, max_new_tokens=options.new_tokens, batch_size=8,
      system_prompt=ours.system_prompt, seed=options.seed, header_sees_cls=ours.header_sees_cls)
  found = {
      "rows": len(rows), "seed": options.seed,
      "perplexity": {
          "base": dataclasses.asdict(perplexity(base.model, base.params, rows)),
          "without [CLS]": dataclasses.asdict(perplexity(ours.model, ours.params, rows))},
      "kl": dataclasses.asdict(mean_kl(
          base.model, base.params, ours.model, ours.params, rows, sees_cls=models.has_cls))}
  if models.has_cls:
    found["perplexity"]["with [CLS]"] = dataclasses.asdict(perplexity(ours.model, ours.params, rows, sees_cls=True))
    found["speed"] = dataclasses.asdict(
        speed(generator(None), generator(ours.safety), [row.prompt for row in chosen[:8]]))
  print(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
