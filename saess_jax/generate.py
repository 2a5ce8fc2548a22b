"""From text to text: a model, its tokenizer and a way to decode, ready to be asked.

What rollouts, evaluation and attacks have in common. For the arrays themselves call `decode.decode`.

  python -m saess_jax.generate --checkpoint RUN chat                 a chat in the terminal, also without the word
  python -m saess_jax.generate --checkpoint RUN --prompt "..."       one answer
  python -m saess_jax.generate --checkpoint RUN --no-safety          the same weights, nothing intervenes
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from saess_jax import decode as decode_lib
from saess_jax import pretrained, terminal, trace
from saess_jax.batching import round_up
from saess_jax.config import SafetyConfig
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, Params, with_rows
from saess_jax.policy import Phase
from saess_jax.sampling import SamplingConfig

_finish = jax.jit(decode_lib.finish)


@functools.lru_cache(maxsize=4)
def _jitted(model: Llama):
  """decode, start and advance of `model`, shared by all its generators: other settings compile nothing new."""
  decode, start, advance = (
      functools.partial(function, model) for function in (decode_lib.decode, decode_lib.start, decode_lib.advance))
  return jax.jit(decode), jax.jit(start), jax.jit(advance, donate_argnames="state")  # The cache stays where it lies.


@dataclasses.dataclass(frozen=True)
class Response:
  """One response and what [CLS] thought of it.

  Attributes:
    text: the whole response, the caller's prefix included.
    generated: what follows the caller's prefix, or what rollback left of it.
    tokens: its pieces as text, one a decoding step (what rollback cut is among them).
    cls_prob: P(malicious) after each of them, NaN where [CLS] was not evaluated.
    phase: name of `policy.Phase` after each.
    initial_prob: of the query; NaN without safety.
    intervened_at: -1 never, 0 by the initial verdict, t + 1 by the verdict on token t.
    leaked: tokens from the transition S_t to the verdict that confirmed it. The refusal follows that verdict, but for a
      caller's prefix, which is finished first, and at the last token, behind which there is room for none.
    evaluations: of [CLS], the initial one not counted.
    prefix_tokens: tokens of the caller's prefix.
    ids: token ids of `text`, with the end-of-turn token behind them if it ended before the limit.
  """

  text: str
  generated: str
  tokens: list[str]
  cls_prob: list[float]
  phase: list[str]
  initial_prob: float
  intervened_at: int
  leaked: int
  evaluations: int
  prefix_tokens: int
  ids: list[int]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A piece of a response that is still being decoded. What was given out is never taken back.

  Attributes:
    text: what is new; the texts of all chunks together are `Response.text`.
    ids, cls_prob, phase: of the new tokens, as in `Response` (tokens that rollback cut are not among them).
    tokens: what each of them adds to `text`: one that holds part of a character adds nothing, the last part all of it.
    initial_prob, intervened_at: as in `Response`, as far as is known.
  """

  text: str
  ids: list[int]
  tokens: list[str]
  cls_prob: list[float]
  phase: list[str]
  initial_prob: float
  intervened_at: int


def place_of(*parts: Any) -> int:
  """A number that depends on these alone: of a request, one of `respond`'s `places`, whatever else is asked."""
  return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


class Generator:
  """Asks a model in batches. A prompt's answer depends on the seed, its text and its place, not on its neighbours."""

  def __init__(
      self, model: Llama, params: Params, tokenizer: Any, safety: SafetyConfig | None = SafetyConfig(),
      sampling: SamplingConfig = SamplingConfig(), max_new_tokens: int = 128, batch_size: int = 16,
      system_prompt: str = "", seed: int = 0, header_sees_cls: bool = True):
    """`safety=None` asks the plain language model. `params` in the form (stacked or not) of `model`.

    `header_sees_cls` as in training: it says where [CLS] is stored.

    Raises:
      ValueError: `max_new_tokens` or `batch_size` is not positive.
    """
    if max_new_tokens < 1 or batch_size < 1:
      raise ValueError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; expected 1 or more.")
    self.tokenizer, self._model = tokenizer, model
    self._params, self._safety, self._sampling = params, safety, sampling
    self._max_new_tokens, self._batch_size, self._seed = max_new_tokens, batch_size, seed
    self.system_prompt, self._header_sees_cls = system_prompt, header_sees_cls
    self.context = model.config.context
    self._decode, self._start, self._advance = _jitted(model)

  def respond(
      self, prompts: Sequence[chat.Messages], prefixes: Sequence[str] | None = None,
      max_new_tokens: int | None = None, progress: str = "", sampling: SamplingConfig | None = None,
      places: Sequence[int] | None = None, soft_suffixes: Sequence[Sequence[Sequence[float]]] | None = None
  ) -> list[Response]:
    """Answers every prompt, in order.

    Args:
      prompts: user texts, or lists of chat messages ending with the user's.
      prefixes: what each response must begin with (a prefill attack); none by default.
      max_new_tokens: fewer than the generator was made for; compiles nothing new.
      progress: a label for a progress bar; "" shows none.
      sampling: in place of the generator's own; compiles nothing new.
      places: numbers that tell the prompts' draws apart; their order by default.
      soft_suffixes: for each prompt free embeddings [R, D] that are read in the place of its last R tokens, or ().

    Raises:
      ValueError: a prompt that with its response exceeds the model's context, more new tokens than there is room, not
        as many prefixes, places or soft suffixes as prompts, or a soft suffix that is longer than its prompt.
    """
    limit = self._max_new_tokens if max_new_tokens is None else max_new_tokens
    if not 0 < limit <= self._max_new_tokens:
      raise ValueError(f"max_new_tokens is {limit}; this generator was made for 1 to {self._max_new_tokens}.")
    prefixes = [""] * len(prompts) if prefixes is None else prefixes
    places = range(len(prompts)) if places is None else places
    soft = [()] * len(prompts) if soft_suffixes is None else soft_suffixes
    for name, given in (("prefixes", prefixes), ("places", places), ("soft suffixes", soft)):
      if len(given) != len(prompts):
        raise ValueError(f"{len(given)} {name} were given for {len(prompts)} prompts; expected one each.")
    rows, forced = self._encode(prompts, prefixes, limit)
    # Neighbours of like length share a batch, so that little padding is computed.
    order = sorted(range(len(prompts)), key=lambda i: (len(forced[i]), len(rows[i][0])))
    responses: list[Response | None] = [None] * len(prompts)
    with tqdm.tqdm(total=len(prompts), desc=progress, unit="prompt", disable=not progress) as bar:
      for at in range(0, len(order), self._batch_size):
        chosen = order[at : at + self._batch_size]
        batch = self._batch(
            [rows[i] for i in chosen], [forced[i] for i in chosen], [places[i] for i in chosen], limit,
            self._sampling if sampling is None else sampling,
            [np.asarray(soft[i], np.float32) for i in chosen])
        for i, response in zip(chosen, batch):
          responses[i] = response
        bar.update(len(chosen))
    return responses

  def check_fit(self, prompts: Sequence[chat.Messages], prefixes: Sequence[str]) -> None:
    """Raises the ValueError of `respond` for a prompt that is too long, and asks nothing."""
    self._encode(prompts, prefixes, self._max_new_tokens)

  def stream(self, prompt: Any, prefix: str = "", chunk: int = 4) -> Iterator[Chunk]:
    """Answers one prompt as `respond` does, in pieces of about `chunk` tokens; the last one may hold no text.

    With rollback the tokens of an open alarm are held back until it is false or confirmed: tau - 1 at most where every
    token is checked.

    Args:
      prompt: text, or chat messages ending with the user's.
      prefix: what the response must begin with; it is part of the stream.

    Raises:
      ValueError: as `respond`; `chunk` is not positive.
    """
    if chunk < 1:
      raise ValueError(f"chunk is {chunk}; expected 1 or more.")
    limit = self._max_new_tokens
    inputs = self._inputs(*self._encode([prompt], [prefix], limit), [0], limit, self._sampling)
    state = self._start(self._params, *inputs)
    text, count = "", 0
    while True:
      result, kinds, verdicts, step, done = jax.device_get(
          (_finish(state), state.kinds, state.verdicts, state.step, state.done.all()))
      done = bool(done) or step >= result.tokens.shape[1]
      standing = np.flatnonzero(kinds[0, -result.tokens.shape[1]:] == TokenKind.RESPONSE)
      stop = len(standing) if done or not self._may_cut(verdicts.phase[0]) else int(verdicts.transition_at[0])
      ids, pieces = result.tokens[0, :stop].tolist(), []
      while not done and len(ids) > count and self.tokenizer.decode(ids).endswith("\ufffd"):
        ids.pop()  # Part of a character, the rest of which is still to come.
      for end in range(count + 1, len(ids) + 1):
        said = self.tokenizer.decode(ids[:end])
        pieces.append(said[len(text):] if end == len(ids) else said.rstrip("\ufffd")[len(text):])
        text += pieces[-1]
      if done or pieces:
        steps = standing[count : len(ids)]
        yield Chunk(
            text="".join(pieces), ids=ids[count:], tokens=pieces,
            cls_prob=[float(p) for p in result.cls_prob[0, steps]],
            phase=[Phase(p).name.lower() for p in result.phase[0, steps]],
            initial_prob=float(result.initial_prob[0]), intervened_at=int(result.intervened_at[0]))
      if done:
        return
      count = len(ids)
      state = self._advance(self._params, *inputs, state, step + chunk)

  def _may_cut(self, phase: int) -> bool:
    """Whether rollback may still take the tokens of an open alarm back."""
    safety = self._safety
    return safety is not None and safety.rollback and safety.dependency != "low" and phase == Phase.ALARM

  def _encode(self, prompts, prefixes, limit):
    """Prompts in the stored layout and prefixes as token ids; all of them fit the model's context."""
    rows = [
        chat.encode_request(
            self.tokenizer, prompt, system_prompt=self.system_prompt, header_sees_cls=self._header_sees_cls)
        for prompt in prompts]
    forced = [chat.encode_text(self.tokenizer, prefix) for prefix in prefixes]
    for i, ((tokens, _), prefix) in enumerate(zip(rows, forced)):
      needed = len(tokens) - 1 + len(prefix) + limit
      if needed > self.context:
        raise ValueError(
            f"Prompt {i} has {len(tokens) - 1} tokens, its response prefix {len(prefix)}, and up to "
            f"{limit} are generated: {needed} in all, but the model's context is {self.context}. "
            f"Shorten or leave out {str(prompts[i])[:60]!r}, or lower max_new_tokens.")
    return rows, forced

  def _batch(self, rows, forced, places, limit, sampling, soft_suffixes) -> list[Response]:
    # Few shapes are compiled: of batches, and of prefixes, where a prefill attack has more than one length.
    fill = min(self._batch_size, 1 << math.ceil(math.log2(len(rows)))) - len(rows)
    inputs = self._inputs(
        rows + rows[:1] * fill, forced + forced[:1] * fill, [*places, *places[:1] * fill], limit, sampling)
    decode, params = self._decode, self._params
    if any(map(len, soft_suffixes)):
      prompt, decode, params = self._soften(inputs[0], soft_suffixes)
      inputs = (prompt, *inputs[1:])
    result = jax.device_get(decode(params, *inputs))
    return [self._read(result, row, forced[row], limit) for row in range(len(rows))]

  def _soften(self, prompt, soft_suffixes):
    """(prompt, decode, params) in which the last tokens of each query are rows behind the embeddings."""
    first, longest = len(self._params["embed"]["embedding"]), max(map(len, soft_suffixes))
    table = np.zeros((len(prompt.tokens), longest, self._params["embed"]["embedding"].shape[1]), np.float32)
    tokens = np.array(prompt.tokens)
    for i, suffix in enumerate(soft_suffixes):
      if len(suffix):
        query = np.flatnonzero(prompt.kinds[i] == TokenKind.QUERY)
        if len(suffix) > len(query):
          raise ValueError(f"A soft suffix has {len(suffix)} rows; expected at most the prompt's {len(query)} tokens.")
        table[i, : len(suffix)] = suffix
        tokens[i, query[-len(suffix):]] = first + i * longest + np.arange(len(suffix))
    model, params = with_rows(self._model, self._params, table.reshape(-1, table.shape[-1]))
    return prompt.replace(tokens=tokens), _jitted(model)[0], params

  def _inputs(
      self, rows, forced, places, limit, sampling) -> tuple[decode_lib.Prompt, jax.Array, decode_lib.DecodeConfig]:
    room = round_up(max(map(len, forced)), 64)
    length = round_up(max(len(tokens) for tokens, _ in rows), decode_lib.MULTIPLE)
    window = self._model.config.sliding_window
    prompt = decode_lib.pad_prompts(
        rows, forced, length=length if window is None else min(length, window), prefix_length=room)
    buffer = decode_lib.buffer_for(room + self._max_new_tokens, self._safety)
    config = decode_lib.decode_config(self.tokenizer, self._safety, sampling, limit, buffer)
    decode_lib.check(self._model.config, prompt, config)
    root = jax.random.key(self._seed)
    return prompt, jax.vmap(lambda i: jax.random.fold_in(root, i))(np.asarray(places)), config

  def _read(self, result: decode_lib.DecodeResult, row: int, prefix: list[int], limit: int) -> Response:
    tokens, steps = result.tokens[row, : result.lengths[row]], result.steps[row]
    stands = len(prefix)
    if self._safety is not None and self._safety.rollback and result.intervened_at[row] > 0:
      stands = min(stands, int(result.transition_at[row]))  # It may have cut into the prefix.
    ended = len(tokens) < stands + limit
    return Response(
        text=self.tokenizer.decode(tokens), generated=self.tokenizer.decode(tokens[stands:]),
        tokens=[self.tokenizer.decode([token]) for token in result.step_tokens[row, :steps]],
        cls_prob=[float(p) for p in result.cls_prob[row, :steps]],
        phase=[Phase(p).name.lower() for p in result.phase[row, :steps]],
        initial_prob=float(result.initial_prob[row]), intervened_at=int(result.intervened_at[row]),
        leaked=int(result.leaked[row]), evaluations=int(result.evaluations[row]), prefix_tokens=len(prefix),
        ids=tokens.tolist() + [chat.end_of_turn(self.tokenizer)] * ended)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m saess_jax.generate", description="Talks to a trained model.")
  parser.add_argument("--checkpoint", required=True, help="a run, an adapter, or what else load_for_research takes")
  what = parser.add_mutually_exclusive_group()
  what.add_argument("--prompt", help="one request; without it a chat, a request a line")
  what.add_argument("mode", nargs="?", choices=["chat"], help="the default")
  parser.add_argument("--prefix", default="", help="what the response must begin with, as in a prefill attack")
  parser.add_argument("--figure", help="with --prompt: a file (svg, png, pdf) to draw tokens against P(malicious) in")
  parser.add_argument("--safety", action=argparse.BooleanOptionalAction, default=True, help="let [CLS] steer")
  parser.add_argument(
      "--rollback", action=argparse.BooleanOptionalAction, help="cut what an intervention found malicious, or not; "
      "without either as the model's settings say")
  parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=128)
  parser.add_argument("--temperature", type=float, default=0.0)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(argv)
  if options.figure and (options.prompt is None or not options.safety):
    parser.error("--figure draws the verdicts on one response: give --prompt, and leave --no-safety out.")
  if options.prefix and options.prompt is None:
    parser.error("--prefix belongs to one response: give --prompt too.")
  colours = terminal.has_colours(sys.stdout)
  try:
    model, params, tokenizer, safety = pretrained.load_for_research(options.checkpoint)
    if options.rollback is not None:
      safety = safety.replace(rollback=options.rollback)
    generator = Generator(
        model, params, tokenizer, safety if options.safety else None,
        SamplingConfig(temperature=options.temperature), options.max_new_tokens, 1, seed=options.seed,
        **pretrained.settings_of(options.checkpoint).layout)
    if options.prompt is None:
      sys.stderr.write("A request a line; /new forgets the chat, /quit or Ctrl-D ends it.\n")
      terminal.converse(generator, sys.stdin, sys.stdout, colours)
    else:
      terminal.show(generator.stream(options.prompt, options.prefix), sys.stdout, colours)
      if options.figure:
        response, = generator.respond([options.prompt], [options.prefix])
        trace.draw(response, safety).savefig(options.figure)
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()
