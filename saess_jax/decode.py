"""The decoder: one `lax.while_loop` that asks [CLS] after every token and steers by the answer.

A step at which a verdict is due runs two query rows, [CLS, newest token], through the layers together, so that
re-evaluating [CLS] costs no second pass over the weights. Buffers are static and every row of a batch takes one cache
slot a step; a token that is cut by rollback becomes PAD where it lies, so nothing is ever moved.

What comes next in a row is, in this order: the rest of the caller's response prefix, the refusal prefix once the policy
has intervened, a sampled token. All of them pass through the same step and are judged alike.

Axes: B batch, S prompt slots, E buffer of response tokens, T = S + E cache slots, F prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import masks, policy, sampling
from saess_jax import schedule as schedule_lib
from saess_jax.attention import Step
from saess_jax.batching import round_up
from saess_jax.config import ModelConfig, SafetyConfig, dtype_of
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, Params, init_cache, logits_of, output_head
from saess_jax.sampling import SamplingConfig

MULTIPLE = 32  # Sizes that are not given are multiples of it.


@flax.struct.dataclass
class Prompt:
  """A batch of ragged prompts; `pad_prompts` makes it.

  Attributes:
    tokens, kinds: int32 [B, S], [CLS] stored at `masks.cls_slot`, PAD at the right.
    prefix: int32 [B, F], tokens that the response begins with (a prefill attack, an assistant prefix).
    prefix_length: int32 [B].
  """

  tokens: jax.Array
  kinds: jax.Array
  prefix: jax.Array
  prefix_length: jax.Array


@flax.struct.dataclass
class DecodeConfig:
  """How to decode; `decode_config` makes it from words.

  Attributes:
    safety: None decodes as a plain language model: nothing sees [CLS] and nothing intervenes. Its numbers may be
      replaced here, and its dependency by "low"; its words have become `refusal`, `refusal_break` and `schedule`.
    sampling: see there.
    max_new_tokens: int, response tokens after the caller's prefix, or what rollback left of it; at most `buffer` of
      both together.
    stop_ids: int32 [K], tokens that end a response (and are not part of it).
    refusal: int32 [F], what an intervention inserts; where nothing stands before it, from `refusal_break` on.
    refusal_break: int, tokens of the refusal that only part it from what stands before.
    schedule: bool [E], of the tokens behind the caller's prefix.
    buffer: E, response slots (static, as safety's dependency is).
    refuses_for_good: whether `refusal` is what dependency "high" says before it stops (static).
  """

  safety: SafetyConfig | None
  sampling: SamplingConfig
  max_new_tokens: jax.Array
  stop_ids: jax.Array
  refusal: jax.Array
  refusal_break: jax.Array
  schedule: jax.Array
  buffer: int = flax.struct.field(pytree_node=False)
  refuses_for_good: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class DecodeResult:
  """What happened.

  Attributes:
    tokens: int32 [B, E], the response with the caller's prefix and any refusal prefix, without what rollback cut and
      without the stop token; 0 behind `lengths` int32 [B].
    cls_prob: float32 [B, E], P(malicious) after each step's token, NaN where [CLS] was not evaluated.
    phase: int32 [B, E] of `policy.Phase` after each step.
    step_tokens: int32 [B, E], the token of each step, what was cut later included; equals `tokens` without rollback.
    steps: int32 [B], steps the row was alive.
    initial_prob: float32 [B], of the query alone (NaN without safety).
    intervened_at, transition_at, leaked: int32 [B], as in `policy.PolicyState`.
    evaluations: int32 [B], re-evaluations of [CLS], the initial one not counted.
  """

  tokens: jax.Array
  lengths: jax.Array
  cls_prob: jax.Array
  phase: jax.Array
  step_tokens: jax.Array
  steps: jax.Array
  initial_prob: jax.Array
  intervened_at: jax.Array
  transition_at: jax.Array
  leaked: jax.Array
  evaluations: jax.Array


@flax.struct.dataclass
class LoopState:
  """The loop's state.

  Attributes:
    step: int32 scalar, tokens processed so far; also the next free response slot.
    token: int32 [B], chosen for this step and not yet processed.
    done: bool [B].
    kinds: int32 [B, T], kinds of the cache's slots; PAD is unused, padding, or cut.
    count: int32 [B], response tokens that stand.
    inserted: int32 [B], tokens of the refusal already chosen.
    verdicts: PolicyState.
    result: DecodeResult, filled as the loop goes (tokens and lengths at the end).
    cache: of the model.
  """

  step: jax.Array
  token: jax.Array
  done: jax.Array
  kinds: jax.Array
  count: jax.Array
  inserted: jax.Array
  verdicts: policy.PolicyState
  result: DecodeResult
  cache: Any


def pad_prompts(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], prefixes: Sequence[Sequence[int]] | None = None,
    length: int | None = None, prefix_length: int | None = None,
) -> Prompt:
  """Ragged (tokens, kinds) pairs, [CLS] in place, -> a padded batch of numpy arrays.

  Args:
    prefixes: response prefix tokens of each row, none by default.
    length, prefix_length: sizes to pad to; by default the next multiples of 32 (0 without a prefix), so that few
      shapes are compiled.

  Raises:
    ValueError: no rows, as many prefixes as rows not given, a row longer than `length`, or a row without just one CLS
      in one of its places (`masks.cls_slot`), or with RESPONSE tokens: what a response begins with is a prefix.
  """
  if not rows:
    raise ValueError("No prompts were given; expected at least one.")
  prefixes = [[]] * len(rows) if prefixes is None else prefixes
  if len(prefixes) != len(rows):
    raise ValueError(f"{len(prefixes)} response prefixes were given for {len(rows)} prompts; expected one each.")
  longest, longest_prefix = max(len(tokens) for tokens, _ in rows), max(map(len, prefixes))
  length = round_up(longest, MULTIPLE) if length is None else length
  prefix_length = round_up(longest_prefix, MULTIPLE) if prefix_length is None else prefix_length
  if longest > length or longest_prefix > prefix_length:
    raise ValueError(
        f"The longest prompt has {longest} tokens and the longest prefix {longest_prefix}; they must fit into "
        f"{length} and {prefix_length}. Shorten them or raise the sizes.")
  for i, (tokens, kinds) in enumerate(rows):
    if len(tokens) != len(kinds):
      raise ValueError(f"Prompt {i} has {len(tokens)} tokens and {len(kinds)} kinds; expected as many, [CLS] in both.")
    kinds = np.asarray(kinds)
    is_pad = kinds == TokenKind.PAD
    if np.any(is_pad[:-1] & ~is_pad[1:]):
      raise ValueError(f"Prompt {i} has PAD before other tokens; expected none: rows are padded here, at the right.")
    if np.any(kinds == TokenKind.RESPONSE):
      raise ValueError(
          f"Prompt {i} holds RESPONSE tokens; give the tokens that its response begins with as `prefixes`.")
    is_cls = kinds == TokenKind.CLS
    if np.sum(is_cls) != 1:
      raise ValueError(f"Prompt {i} holds {np.sum(is_cls)} CLS tokens; expected one.")
    places = {masks.cls_slot(kinds[~is_cls], "sft", sees) for sees in (True, False)}
    if int(np.argmax(is_cls)) not in places:
      raise ValueError(
          f"Prompt {i} has CLS in slot {np.argmax(is_cls)}, where tokens would see it that must not; expected "
          f"{' or '.join(map(str, sorted(places)))}, where chat.insert_cls puts it.")
  pad = lambda rows, size: np.stack([np.pad(np.asarray(r, np.int32), (0, size - len(r))) for r in rows])
  return Prompt(
      tokens=pad([tokens for tokens, _ in rows], length), kinds=pad([kinds for _, kinds in rows], length),
      prefix=pad(prefixes, prefix_length), prefix_length=np.asarray([len(p) for p in prefixes], np.int32))


def buffer_for(tokens: int, safety: SafetyConfig | None) -> int:
  """Response slots for so many tokens, and for what rollback may cut."""
  return round_up(tokens + _cut_at_most(safety), MULTIPLE)


def _cut_at_most(safety: SafetyConfig | None) -> int:
  """Tokens that rollback takes back, those of an alarm that is confirmed at once."""
  cuts = safety is not None and bool(safety.rollback) and safety.dependency != "low"
  return int(policy.patience(safety)) if cuts else 0


def decode_config(
    tokenizer: Any, safety: SafetyConfig | None = SafetyConfig(), sampling_config: SamplingConfig = SamplingConfig(),
    max_new_tokens: int = 128, buffer: int | None = None,
) -> DecodeConfig:
  """Turns words into what `decode` reads: token ids of the refusal and of the end, the schedule as an array.

  They are gone from its `safety` then, so that other words compile nothing new.

  Args:
    tokenizer: a Hugging Face tokenizer; its end-of-sequence token and `chat.end_of_turn` stop a response.
    safety: None for a plain language model.
    buffer: response slots, by default `buffer_for` max_new_tokens.

  Raises:
    ValueError: max_new_tokens is not positive or exceeds the buffer, an empty refusal, or a tokenizer without an end.
  """
  buffer = buffer_for(max_new_tokens, safety) if buffer is None else buffer
  if not 0 < max_new_tokens <= buffer:
    raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 to the buffer of {buffer}.")
  gap, refusal = [], []
  if safety is not None:
    text = safety.fixed_refusal if safety.dependency == "high" else safety.refusal_prefix
    gap, refusal = (
        tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for words in (safety.refusal_break, text))
    if not refusal and safety.dependency != "low":
      raise ValueError(f"The refusal {text!r} has no tokens; expected text to insert.")
  schedule = "first" if safety is None else safety.schedule
  schedule_lib.as_array(schedule, max_new_tokens)  # Raises where it says nothing of some of them.
  return DecodeConfig(
      safety=safety and without_words(safety), sampling=sampling_config, max_new_tokens=max_new_tokens,
      stop_ids=np.asarray(chat.stop_ids(tokenizer), np.int32), refusal=np.asarray(gap + refusal, np.int32),
      refusal_break=len(gap), schedule=np.asarray(schedule_lib.over(schedule, buffer)), buffer=buffer,
      refuses_for_good=safety is not None and safety.dependency == "high")


def without_words(safety: SafetyConfig) -> SafetyConfig:
  """What is left of it once its words are token ids and an array: other words then compile nothing new."""
  return safety.replace(schedule="each", refusal_prefix="", fixed_refusal="", refusal_break="")


def check(shape: ModelConfig, prompt: Prompt, config: DecodeConfig) -> None:
  """What only the values tell and a compiled `decode` cannot: call it on host arrays first, as `Generator` does.

  Raises:
    ValueError: token ids outside the vocabulary, a buffer that is too small for a row's prefix, its new tokens and what
      rollback may cut, a row that exceeds the model's context with these, prompts padded beyond its sliding window, or
      an empty prompt.
  """
  tokens, kinds = np.asarray(prompt.tokens), np.asarray(prompt.kinds)
  text = (kinds != TokenKind.PAD) & (kinds != TokenKind.CLS)
  supplied = np.arange(prompt.prefix.shape[1]) < np.asarray(prompt.prefix_length)[:, None]
  for name, ids in (
      ("prompts", tokens[text]), ("response prefixes", np.asarray(prompt.prefix)[supplied]),
      ("the refusal", np.asarray(config.refusal))):
    wrong = ids[(ids < 0) | (ids >= shape.vocab_size)]
    if len(wrong):
      raise ValueError(
          f"Token id {wrong[0]} in {name} is outside the vocabulary of {shape.vocab_size}; is this the model's "
          "own tokenizer?")
  window, slots = shape.sliding_window, prompt.tokens.shape[1]
  if window is not None and slots > window:
    raise ValueError(
        f"Prompts are padded to {slots} slots, beyond the sliding window of {window}, where [CLS] would be lost; give "
        "pad_prompts a `length` within it.")
  cut = _cut_at_most(config.safety)
  for row, prefix in enumerate(np.asarray(prompt.prefix_length)):
    needed = int(prefix) + int(config.max_new_tokens) + cut
    if not np.any(kinds[row] == TokenKind.QUERY):
      raise ValueError(f"Prompt {row} is empty: it holds no QUERY token. Give it text.")
    if needed > config.buffer:
      raise ValueError(
          f"Row {row} has a response prefix of {prefix} tokens and {int(config.max_new_tokens)} new ones to come"
          f"{f', and rollback may cut {cut}' * bool(cut)}, but the buffer holds {config.buffer}; make it larger, or "
          "ask for fewer.")
    size = int(np.sum(text[row]))
    total = size + int(prefix) + int(config.max_new_tokens)
    if total > shape.context:
      raise ValueError(
          f"Row {row} has {size} tokens, a response prefix of {prefix} and {int(config.max_new_tokens)} new ones to "
          f"come, {total} in all, but the model's context is {shape.context}. Shorten it, or ask for fewer.")


def decode(model: Llama, params: Params, prompt: Prompt, rng: jax.Array, config: DecodeConfig) -> DecodeResult:
  """Generates a response for every row of `prompt`; jit-able with `model` static.

  One compilation serves a shape of prompt, a buffer and a dependency: max_new_tokens, thresholds, tau, r's, sampling
  numbers, the schedule and a refusal of a given length are data.

  Args:
    model: layers in either form; unrolled (`scan_layers=False`) is the faster one on CPU.
    params: of that form.
    rng: one key of `jax.random.key` (row i draws from `fold_in(rng, i)`), or [B] of them.
    config: see there.
  """
  state = start(model, params, prompt, rng, config)
  return finish(advance(model, params, prompt, rng, config, state, config.buffer))


def start(model: Llama, params: Params, prompt: Prompt, rng: jax.Array, config: DecodeConfig) -> LoopState:
  """Reads the prompt in one pass, takes the initial verdict and chooses the first response token. As `decode`.

  Raises:
    ValueError: the prompt's slots exceed the model's sliding window, keys of `jax.random.PRNGKey`, or words in the
      config's safety that `decode_config` has not read.
  """
  prompt, config = _as_read(prompt, config)
  batch, length = prompt.tokens.shape
  cache = init_cache(model.config, batch, length + config.buffer)
  stage = "pretrain" if config.safety is None else "sft"
  out = model.apply({"params": params}, prompt.tokens, kinds=prompt.kinds, cache=cache, stage=stage)
  if config.safety is None:
    initial = jnp.full(batch, jnp.nan)
    verdicts = policy.start(initial, SafetyConfig(dependency="low", heeds_query=False))
  else:
    initial = jax.nn.sigmoid(out.cls_logit)
    verdicts = policy.start(initial, config.safety)
  text = (prompt.kinds != TokenKind.PAD) & (prompt.kinds != TokenKind.CLS)
  last = length - 1 - jnp.argmax(text[:, ::-1], axis=1)  # Not [CLS], which may be stored behind the header.
  logits = _logits(model, params, jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0])
  unwritten = jnp.zeros((batch, config.buffer), jnp.int32)
  zeros = jnp.zeros(batch, jnp.int32)
  state = LoopState(
      step=jnp.zeros((), jnp.int32), token=zeros, done=jnp.zeros(batch, bool),
      kinds=jnp.pad(prompt.kinds, ((0, 0), (0, config.buffer))), count=zeros, inserted=zeros, verdicts=verdicts,
      result=DecodeResult(
          tokens=unwritten, lengths=zeros, cls_prob=jnp.full((batch, config.buffer), jnp.nan), phase=unwritten,
          step_tokens=unwritten, steps=zeros, initial_prob=initial, intervened_at=verdicts.intervened_at,
          transition_at=verdicts.transition_at, leaked=verdicts.leaked, evaluations=zeros),
      cache=out.cache)
  return _choose(prompt, _keys(rng, prompt), config, state, logits)


def advance(
    model: Llama, params: Params, prompt: Prompt, rng: jax.Array, config: DecodeConfig, state: LoopState,
    until: jax.Array) -> LoopState:
  """Decodes on until `until` steps are done, or every row is. Arguments as `decode`; a whole response in pieces is the
  same as at once.

  Args:
    until: int32 scalar, may be traced.
  """
  prompt, config = _as_read(prompt, config)
  keys, until = _keys(rng, prompt), jnp.minimum(until, config.buffer)
  running = lambda s: (s.step < until) & ~jnp.all(s.done)
  return jax.lax.while_loop(running, lambda s: step(model, params, prompt, keys, config, s), state)


def _as_read(prompt: Prompt, config: DecodeConfig) -> tuple[Prompt, DecodeConfig]:
  """On the device, for host arrays cannot be indexed by traced ones. Without safety nobody may see [CLS]: it comes
  last, where causal order hides it.
  """
  _check_words(config)
  prompt, config = jax.tree.map(jnp.asarray, (prompt, config))
  if config.safety is None:
    order = masks.cls_last(prompt.kinds)
    tokens, kinds = (jnp.take_along_axis(x, order, axis=1) for x in (prompt.tokens, prompt.kinds))
    prompt = prompt.replace(tokens=tokens, kinds=kinds)
  return prompt, config


def _check_words(config: DecodeConfig) -> None:
  """Raises ValueError for words of safety that came after `decode_config` had read them, and would do nothing."""
  safety = config.safety
  if safety is None:
    return
  other = safety.dependency != "low" and config.refuses_for_good != (safety.dependency == "high")
  if other or jax.tree.structure(safety) != jax.tree.structure(without_words(safety)):  # Of which words are a part.
    raise ValueError(
        "The config's safety has a schedule, a refusal or a dependency that decode_config has not read; it makes token "
        "ids and an array of them. Give decode_config the whole of safety, or replace numbers alone (and `schedule` "
        "and `refusal` of the config itself).")


def finish(state: LoopState) -> DecodeResult:
  """What has been decoded so far, as a result."""
  stands = state.kinds[:, -state.result.step_tokens.shape[1]:] == TokenKind.RESPONSE
  order = jnp.argsort(~stands, axis=1, stable=True)
  tokens = jnp.take_along_axis(jnp.where(stands, state.result.step_tokens, 0), order, axis=1)
  return state.result.replace(
      tokens=tokens, lengths=state.count, intervened_at=state.verdicts.intervened_at,
      transition_at=state.verdicts.transition_at, leaked=state.verdicts.leaked)


def _keys(rng: jax.Array, prompt: Prompt) -> jax.Array:
  """[B] keys: a row's own, so that its tokens do not depend on its neighbours."""
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise ValueError(f"rng is an array of {rng.dtype} {rng.shape}; expected keys, as jax.random.key gives them.")
  rows = jnp.arange(prompt.tokens.shape[0])
  return rng if jnp.ndim(rng) else jax.vmap(lambda i: jax.random.fold_in(rng, i))(rows)


def step(
    model: Llama, params: Params, prompt: Prompt, keys: jax.Array, config: DecodeConfig, s: LoopState) -> LoopState:
  """One turn of the loop: the chosen token of every row is appended and judged, what is to be cut is cut, and the next
  one is chosen. Arguments as `decode`, with one key a row.
  """
  length = prompt.tokens.shape[1]
  slot, t, alive = length + s.step, s.count, ~s.done
  kinds = s.kinds.at[:, slot].set(jnp.where(alive, TokenKind.RESPONSE, TokenKind.PAD))
  text = (kinds != TokenKind.PAD) & (kinds != TokenKind.CLS)
  position = jnp.sum(text, axis=1)  # The newest token's: all others count from 1.

  sees_cls = jnp.full(alive.shape, config.safety is not None)

  def run(wanted: jax.Array, cls_sees: jax.Array | None, cache: Any) -> tuple[jax.Array, jax.Array, Any]:
    """The newest token's row, and with `cls_sees` that of [CLS] before it, which is kept where it is wanted: (hidden
    [B, D], cls_logit [B], cache).
    """
    rows = [TokenKind.RESPONSE] if cls_sees is None else [TokenKind.CLS, TokenKind.RESPONSE]
    row_kinds = jnp.broadcast_to(jnp.asarray(rows), (len(alive), len(rows)))
    is_token = row_kinds == TokenKind.RESPONSE
    visible = text[:, None] if cls_sees is None else jnp.concatenate([cls_sees, text[:, None]], axis=1)
    out = model.apply(
        {"params": params}, jnp.where(is_token, s.token[:, None], 0), kinds=row_kinds,
        positions=jnp.where(is_token, position[:, None], 0), cache=cache,
        step=Step(slot=slot, visible=visible, refresh=wanted, sees_cls=sees_cls))
    return out.hidden[:, -1], out.cls_logit, out.cache

  if config.safety is None:
    wanted = jnp.zeros_like(alive)
    hidden, cls_logit, cache = run(wanted, None, s.cache)
  else:
    scheduled = policy.is_scheduled(config.schedule, t, prompt.prefix_length, config.safety)
    wanted = policy.wants_verdict(s.verdicts, t, scheduled, config.safety) & alive
    window = masks.view_visibility(kinds, policy.view(s.verdicts, t, config.safety)[:, None])
    # A step at which no row's verdict is due runs without the [CLS] rows. Two loops of one turn or none: the cache is
    # updated where it lies, while the branches of a `lax.cond` would each copy it.
    due = jnp.any(wanted)
    nothing = jnp.zeros((len(alive), model.config.embed_dim), dtype_of(model.config.dtype)), jnp.zeros(len(alive))
    once = lambda now, cls_sees, out: jax.lax.while_loop(
        lambda c: c[0], lambda c: (jnp.zeros((), bool), run(wanted, cls_sees, c[1][2])), (now, out))[1]
    hidden, cls_logit, cache = once(~due, None, once(due, window, (*nothing, s.cache)))

  result = s.result.replace(
      step_tokens=s.result.step_tokens.at[:, s.step].set(jnp.where(alive, s.token, 0)),
      steps=s.result.steps + alive, evaluations=s.result.evaluations + wanted)
  count, verdicts = t + alive, s.verdicts
  if config.safety is not None:
    prob = jax.nn.sigmoid(cls_logit)
    verdicts = policy.update(s.verdicts, t, prob, wanted, config.safety)
    convicted = (verdicts.intervened_at > 0) & (s.verdicts.intervened_at < 0)
    count = jnp.where(convicted & config.safety.rollback, verdicts.transition_at, count)
    kinds = _keep(kinds, count)
    result = result.replace(
        cls_prob=result.cls_prob.at[:, s.step].set(jnp.where(wanted, prob, jnp.nan)),
        phase=result.phase.at[:, s.step].set(jnp.where(alive, verdicts.phase, 0)))
  state = s.replace(
      step=s.step + 1, kinds=kinds, count=count, verdicts=verdicts, result=result, cache=cache)
  return _choose(prompt, keys, config, state, _logits(model, params, hidden))


def _keep(kinds: jax.Array, count: jax.Array) -> jax.Array:
  """kinds [B, T] of which the first `count` [B] RESPONSE slots stand; what rollback cuts is PAD where it lies."""
  is_response = kinds == TokenKind.RESPONSE
  return jnp.where(is_response & (jnp.cumsum(is_response, axis=1) > count[:, None]), TokenKind.PAD, kinds)


def _logits(model: Llama, params: Params, hidden: jax.Array) -> jax.Array:
  """float32 [B, V] of the one row [B, D] that is wanted; `Output.logits`, of all, is not read and costs nothing.

  Rows behind the vocabulary (`ModelConfig.vocab_padding`) are no tokens and have no logit.
  """
  return logits_of(hidden, output_head(params), model.config.vocab_size)


def _choose(prompt, keys, config, s: LoopState, logits: jax.Array) -> LoopState:
  """Sets the next token of every row and ends the rows that are finished."""
  step_keys = jax.vmap(jax.random.fold_in)(keys, s.count)
  token = sampling.sample(
      logits, step_keys, config.sampling, jnp.concatenate([prompt.tokens, s.result.step_tokens], axis=1),
      (s.kinds != TokenKind.PAD) & (s.kinds != TokenKind.CLS))
  stops = jnp.any(token[:, None] == config.stop_ids, axis=1)

  inserted, refusing = s.inserted, s.verdicts.intervened_at >= 0
  size = config.refusal.shape[0]
  if config.safety is not None and size:
    inserted = jnp.where(s.count == 0, config.refusal_break, s.inserted)
    inserting = refusing & (inserted < size)
    token = jnp.where(inserting, config.refusal[jnp.minimum(inserted, size - 1)], token)
    stops = jnp.where(inserting, False, stops | (refusing & (config.safety.dependency == "high")))
    inserted = jnp.where(inserting, inserted + 1, s.inserted)

  if prompt.prefix.shape[1]:
    # Rollback may have cut into the prefix: its rest is then gone too, and the refusal follows at once.
    supplied = (s.count < prompt.prefix_length) & (s.step == s.count)
    at = jnp.minimum(s.count, prompt.prefix.shape[1] - 1)[:, None]
    token = jnp.where(supplied, jnp.take_along_axis(prompt.prefix, at, axis=1)[:, 0], token)
    stops &= ~supplied
    inserted = jnp.where(supplied, s.inserted, inserted)

  cut = s.step != s.count  # By rollback, so that no more of the prefix stands than what is before S_t.
  stands = jnp.where(cut, jnp.minimum(prompt.prefix_length, s.verdicts.transition_at), prompt.prefix_length)
  full = s.count >= stands + config.max_new_tokens
  return s.replace(token=token, inserted=inserted, done=s.done | stops | full)
