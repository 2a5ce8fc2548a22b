"""Rows -> examples -> batches, through grain.

A batch is a pure function of (seed, step): each epoch is a plan, made by a seeded shuffle, that names the examples of
every batch. The iterator's state is therefore one number and a digest of the examples, resuming is exact, and every
process computes its share of a global batch alone. Batches hold rows of like length, padded to one of
`DataConfig.buckets`; a row is one example, or with `DataConfig.examples_per_row` several packed end to end.

Axes: B this process's share of the batch, S stored sequence, E examples of a row, R loss positions, P probes, K places
of the KL term.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
import transformers

from saess_jax import masks
from saess_jax.config import TrainConfig
from saess_jax.data import chat, disguises, frames, openers, probes, sources
from saess_jax.data import rollouts as rollouts_lib
from saess_jax.masks import TokenKind

Batch = dict[str, np.ndarray]
RESPONSES = ("all", "rollouts")  # Values of `DataConfig.responses`.


@dataclasses.dataclass(frozen=True)
class Example:
  """One training sequence in the stored layout (`chat.insert_cls`), without padding."""

  tokens: np.ndarray  # int32 [S]
  kinds: np.ndarray  # int32 [S]
  label: int  # Of the prompt: 1 malicious, 0 benign.
  trajectory: str  # What the response is: one of `probes.TRAJECTORIES`.
  loss_from: int  # Index of the first response token that is a target; the response's length for none.
  response_length: int  # Response tokens without the end-of-turn token: what probes see windows of.


def build_examples(
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Sequence[sources.Row],
    rollouts: Mapping[str, str | Sequence[int]] | None,
    config: TrainConfig,
) -> list[Example]:
  """One example a row, and a second one for each malicious row that has a rollout.

  A malicious row gives its refusal (`safety.fixed_refusal` where the row has none), trained on, and its rollout, which
  is there for the probes alone. A benign row gives its rollout (self-distillation keeps utility), else its response,
  else none; a rollout that declines a benign request (`rollouts.declines`) counts as none.
  With `data.refusal_depth` a malicious row without a refusal gives its query alone in the refusal's place.
  With `data.opener_depth` half of these refusals, and half of the benign answers, stand behind an attacker's opener
  (`openers.draw`) instead of the row's own beginning.
  With `data.responses` "rollouts" a row that has none gives its query alone, with `data.bare_queries` without what
  stands before its turn. `data.disguises` puts some of these into other writings and `data.frames` others into frames
  (`_reworded`), `data.histories` some behind dialogues (`_behind_dialogues`).

  In stage "pretrain" a row is a document, and gives an example for each `data.max_length` tokens of it, with its label.

  The rivals' examples have no [CLS]. Objective "sft" has those of the above that teach a response; its refusals are
  whole, for no decoder puts a prefix in, and with `data.refusal_depth` every second one stands behind a harmful
  beginning, while the others are the model's first words. Objective "dpo" has pairs,
  chosen and rejected in turns: a malicious row's refusal and its rollout, a benign row's rollout and
  `safety.fixed_refusal`; rows without a rollout give none.

  Args:
    rollouts: prompt -> completion by the unaligned base model, as sampled token ids (with the end-of-turn token if it
      came to that) or as a finished text.

  Raises:
    ValueError: as `chat.encode_example`, for a prompt that is too long above all; `data.responses` is unknown; a row
      with a response in stage "pretrain".
  """
  if config.stage == "pretrain":
    return [example for row in rows for example in _documents(tokenizer, row, config)]
  if config.data.responses not in RESPONSES:
    raise ValueError(f"data.responses is {config.data.responses!r}; expected one of {', '.join(RESPONSES)}.")
  rollouts, rng = rollouts or {}, np.random.default_rng(config.seed)
  encode_response = functools.partial(chat.encode_response, tokenizer, max_tokens=config.data.max_response)
  encode = functools.partial(
      chat.encode_example, tokenizer, stage=config.stage, header_sees_cls=config.header_sees_cls,
      max_length=config.data.max_length, system_prompt=config.data.system_prompt)

  def example(row, response, trajectory, loss_from, prompt=None):
    tokens, kinds = encode(prompt or row.prompt, response)
    answer = tokens[kinds == TokenKind.RESPONSE]
    ended = len(answer) > 0 and answer[-1] == chat.end_of_turn(tokenizer)
    return Example(tokens, kinds, row.label, trajectory, loss_from, len(answer) - int(ended))

  def usable(row):
    rollout = encode_response(rollouts.get(row.prompt, ""))
    return rollout[:0] if rollouts_lib.declines(tokenizer.decode(rollout)) else rollout

  sampled = [usable(row) for row in rows]
  dialogues = [
      (row.prompt, answer) for row, rollout in zip(rows, sampled)
      if config.data.histories and not row.label
      and (answer := tokenizer.decode(rollout, skip_special_tokens=True).strip())]
  examples = []
  for row, rollout in zip(rows, sampled):
    if config.objective == "dpo":
      if len(rollout):
        refusal = encode_response((row.label and row.response) or config.safety.fixed_refusal)
        chosen, rejected = (refusal, rollout) if row.label else (rollout, refusal)
        examples += [_without_cls(example(row, response, "benign", 0)) for response in (chosen, rejected)]
      continue
    # Nothing could follow the prefix.
    wordless = row.label and config.data.refusal_depth and not row.response and config.objective == "saess"
    if wordless or (not len(rollout) and config.data.responses == "rollouts"):
      asked = _reworded(tokenizer, row.prompt, config, rng)
      query = example(row, None, "none", 0, _behind_dialogues(tokenizer, asked, dialogues, config, rng))
      examples.append(_bare(query, tokenizer.all_special_ids) if config.data.bare_queries else query)
    elif row.label:
      depth = int(rng.integers(1 + min(len(rollout), config.data.refusal_depth)))
      # For a rival no decoder puts refusals in: every second one is to be the model's first words [Qi et al. 2024].
      whole = config.objective != "saess" and config.data.refusal_depth and rng.random() < 0.5
      opener = _opener(tokenizer, config, rng)
      beginning = rollout[:0] if whole else opener if len(opener) else rollout[:depth]
      before, refusal = _refusal(tokenizer, row, beginning, config)
      trajectory = "interrupted" if len(before) else "refusal"
      examples.append(example(row, np.concatenate([before, encode_response(refusal)]), trajectory, len(before)))
    else:
      answer = rollout if len(rollout) else encode_response(row.response)
      opener = _opener(tokenizer, config, rng) if len(answer) else answer
      examples.append(example(row, np.concatenate([opener, answer]), "benign", len(opener)))
    if row.label and len(rollout):
      examples.append(example(row, rollout, "harmful", len(rollout)))
  if config.objective == "saess":
    return examples
  teaches = lambda example: (example.kinds == TokenKind.RESPONSE).sum() > example.loss_from
  return [_without_cls(example) for example in examples if teaches(example)]


def _opener(tokenizer, config: TrainConfig, rng: np.random.Generator) -> np.ndarray:
  """1 to `data.opener_depth` tokens of an attacker's opener, or, every second time on average, none."""
  if not config.data.opener_depth or rng.random() < 0.5:
    return np.zeros(0, np.int32)
  tokens = chat.encode_text(tokenizer, openers.draw(rng))
  return np.asarray(tokens[: int(rng.integers(1, 1 + config.data.opener_depth))], np.int32)


def _reworded(tokenizer, prompt: str, config: TrainConfig, rng: np.random.Generator) -> str:
  """The prompt, or for `data.disguises` of all in another writing, for `data.frames` in a frame, where that fits."""
  if not config.data.disguises and not config.data.frames:
    return prompt
  drawn, asked = rng.random(), prompt
  if drawn < config.data.disguises:
    asked = disguises.draw(prompt, rng)
  elif drawn < config.data.disguises + config.data.frames:
    asked = frames.draw(prompt, rng)
  return asked if asked is prompt or _excess(tokenizer, asked, config) <= 0 else prompt


def _excess(tokenizer, messages: chat.Messages, config: TrainConfig) -> int:
  """By how many tokens a prompt, [CLS] and one response token exceed `data.max_length` (not to be encoded if any)."""
  tokens, _ = chat.encode_prompt(tokenizer, messages, system_prompt=config.data.system_prompt)
  return len(tokens) + 2 - config.data.max_length


def _behind_dialogues(
    tokenizer, prompt: str, dialogues: Sequence[tuple[str, str]], config: TrainConfig, rng: np.random.Generator
) -> chat.Messages:
  """The prompt alone, or for a share of `data.histories` behind a draw of these requests and answers, if some fit.

  Whatever was talked about, the verdict is on what is asked now. All of the history is benign: what an earlier
  malicious request makes of a benign one is left open.
  """
  if not dialogues or rng.random() >= config.data.histories:
    return prompt
  drawn = rng.permutation(len(dialogues))[: int(rng.integers(1, 1 + config.data.history_turns))]
  last = lambda count: chat.conversation([dialogues[i] for i in drawn[len(drawn) - count:]], prompt)
  excess = lambda count: _excess(tokenizer, last(count), config)
  return last(bisect.bisect_right(range(1, 1 + len(drawn)), 0, key=excess))


def unfinished(examples: Sequence[Example]) -> tuple[int, int]:
  """How many refusals are cut before their end, of how many: from such a model does not learn to stop."""
  refusals = [example for example in examples if example.trajectory in ("refusal", "interrupted")]
  return sum((r.kinds == TokenKind.RESPONSE).sum() == r.response_length for r in refusals), len(refusals)


def _documents(tokenizer, row: sources.Row, config: TrainConfig) -> list[Example]:
  if row.response:
    raise ValueError(
        f"stage 'pretrain' reads documents, but a row of {row.source} has a response: {row.prompt[:60]!r}. Name a file "
        "with a text column in data.source (python -m saess_jax.data.label writes one), or set stage to 'sft'.")
  chunks = chat.encode_document(tokenizer, row.prompt, config.data.max_length)
  return [Example(tokens, kinds, row.label, "document", 0, len(tokens) - 2) for tokens, kinds in chunks]


def _without_cls(example: Example) -> Example:
  kept = example.kinds != TokenKind.CLS
  return dataclasses.replace(example, tokens=example.tokens[kept], kinds=example.kinds[kept])


def _bare(example: Example, special_ids: Sequence[int]) -> Example:
  """The query with the last special token before it and what follows that, "<|im_start|>user" in ChatML."""
  query = int(np.argmax(example.kinds == TokenKind.QUERY))
  special = np.flatnonzero(np.isin(example.tokens[:query], special_ids))
  start = special[-1] if len(special) else 0
  return dataclasses.replace(example, tokens=example.tokens[start:], kinds=example.kinds[start:])


def _refusal(
    tokenizer, row: sources.Row, before: np.ndarray, config: TrainConfig) -> tuple[np.ndarray, str | list[int]]:
  """What stands before a refusal, in tokens, and the refusal, for `chat.encode_response`."""
  text = row.response or config.safety.fixed_refusal
  if not config.data.refusal_depth:
    return np.zeros(0, np.int32), text
  gap = chat.encode_text(tokenizer, config.safety.refusal_break) if len(before) else []
  if config.objective != "saess":  # No decoder puts a prefix in.
    return np.concatenate([before, np.asarray(gap, np.int32)]), text
  # The prefix ends in the middle of a sentence ("because"), which the text goes on with.
  follows = text[0].lower() + text[1:] if text[1:2].islower() else text
  prefix = config.safety.refusal_prefix
  refusal = [*chat.encode_behind(tokenizer, prefix, f" {follows}"), chat.end_of_turn(tokenizer)]
  return np.concatenate([before, np.asarray(gap + chat.encode_text(tokenizer, prefix), np.int32)]), refusal


class Batches(Sequence):
  """`epochs` passes over examples at random access, `batches[step]`: each example once a pass, in batches of a kind and
  of like length.

  A batch is a dict of numpy arrays:
    tokens, kinds int32 [B, S]; loss_positions int32 [B, R] (stored index whose hidden state predicts the target);
    targets int32 [B, R]; loss_weights float32 [B, R]; label, label_weight float32 [B]; probe_views int32 [B, P, 3];
    probe_labels, probe_weights float32 [B, P]; kl_positions int32 [B, K], kl_weights float32 [B, K]. S is one of
    `buckets`, R = min(max_response + 1, S), S for documents; R and P are 0 in a batch of queries alone, K without a KL
    term.
  With E = `examples_per_row` above 1: segments int32 [B, S] too, from 1 which example of its row a token belongs to;
  label and label_weight are [B, E], R = min(E (max_response + 1), S), of the E p probes every p are one example's, and
  K is E `kl_positions`.
  Under objective "dpo" all arrays have an axis of 2 behind B, the chosen response's and the rejected one's.
  Copies that fill up the last batch have weight 0 throughout.
  """

  def __init__(
      self, examples: Sequence[Example], config: TrainConfig, rows: Sequence[int] | None = None, epochs: int = 1):
    """
    Args:
      rows: which rows of each batch to give, as many as then stand for B: those of this process
        (`sharding.rows_here`). None for all.

    Raises:
      ValueError: no examples, one that is longer than all buckets, or buckets out of order.
    """
    size, buckets = config.data.batch_size, config.data.buckets
    if epochs < 1:
      raise ValueError(f"epochs is {epochs}; expected 1 or more.")
    if config.data.examples_per_row < 1:
      raise ValueError(f"data.examples_per_row is {config.data.examples_per_row}; expected 1 (no packing) or more.")
    if not examples:
      raise ValueError("No examples to make batches of.")
    if list(buckets) != sorted(set(buckets)):
      raise ValueError(f"data.buckets is {buckets}; expected lengths in ascending order.")
    longest = max(len(example.tokens) for example in examples)
    if not buckets or longest > buckets[-1]:
      raise ValueError(
          f"An example has {longest} tokens, more than the longest of data.buckets {buckets}; add a bucket or lower "
          "data.max_length.")
    self._examples, self._config = examples, config
    self._compared = config.loss.kl_positions if config.loss.kl_weight else 0
    self._mine = range(size) if rows is None else rows
    of = lambda row: [len(examples[i].tokens) for i in row]
    if config.objective == "dpo":  # A row is a pair, beside each other instead of end to end.
      self._rows = [[i, i + 1] for i in range(0, len(examples), 2)]
      lengths = [max(of(row)) for row in self._rows]
    else:
      self._rows = _pack(examples, buckets[-1], config.data.examples_per_row, config.seed)
      lengths = [sum(of(row)) for row in self._rows]
    self._buckets = [min(b for b in buckets if b >= length) for length in lengths]
    self._alone = [_is_query(examples[row[0]]) for row in self._rows]
    self._plan = functools.lru_cache(maxsize=2)(self._plan)  # Steps of one epoch come one after the other.
    self.steps_per_epoch = sum(-(-count // size) for count in collections.Counter(self._alone).values())
    self._len = epochs * self.steps_per_epoch

  def __len__(self) -> int:
    return self._len

  def digest(self) -> str:
    """Tells these examples from any others."""
    found = hashlib.sha256()
    for example in self._examples:
      found.update(example.tokens.tobytes() + example.kinds.tobytes())
      found.update(repr((example.label, example.trajectory, example.loss_from, example.response_length)).encode())
    return found.hexdigest()[:16]

  def __getitem__(self, step: int) -> Batch:
    epoch, index = divmod(range(len(self))[step], self.steps_per_epoch)
    bucket, members = self._plan(epoch)[index]
    size = self._config.data.batch_size
    # The last batch is filled up with copies of weight 0: rows of padding alone would have no [CLS].
    members = [(member, True) for member in members] + [(members[0], False)] * (size - len(members))
    rows = [self._row(*members[place], epoch, bucket) for place in self._mine]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
    """(padded length, indices of the rows) of each batch.

    Examples without a response keep among themselves, so that their batches hold neither losses nor probes. All batches
    are full but one of each kind.
    """
    rng = np.random.default_rng((self._config.seed, epoch))
    by_kind = collections.defaultdict(lambda: collections.defaultdict(list))
    for index in rng.permutation(len(self._rows)):
      by_kind[self._alone[index]][self._buckets[index]].append(int(index))
    size, plan = self._config.data.batch_size, []
    for by_bucket in by_kind.values():
      rest = []
      for bucket in sorted(by_bucket):
        waiting = rest + by_bucket[bucket]  # What did not fill a batch of the shorter bucket is padded to this one.
        full = len(waiting) - len(waiting) % size
        plan += [(bucket, waiting[start:start + size]) for start in range(0, full, size)]
        rest = waiting[full:]
      if rest:
        plan.append((max(by_bucket), rest))
    return [plan[i] for i in rng.permutation(len(plan))]

  def _row(self, index: int, real: bool, epoch: int, size: int) -> dict[str, np.ndarray]:
    """One row, padded to `size`: its examples end to end, and places of weight 0 for those that it could still hold.

    A pair's two stay apart on an axis in front.
    """
    pieces = [self._piece(member, real, epoch) for member in self._rows[index]]
    if self._config.objective == "dpo":
      pair = [self._padded(piece, index, size) for piece in pieces]
      return {name: np.stack([piece[name] for piece in pair]) for name in pair[0]}
    if self._config.data.examples_per_row == 1:
      return self._padded(pieces[0], index, size)
    starts = np.cumsum([0] + [len(piece["tokens"]) for piece in pieces])
    for number, piece in enumerate(pieces):
      for name in ("loss_positions", "kl_positions"):
        piece[name] = piece[name] + starts[number]
      piece["segments"] = np.full(len(piece["tokens"]), 1 + number, np.int32)
    joined = {name: np.concatenate([np.atleast_1d(piece[name]) for piece in pieces]) for name in pieces[0]}
    return self._padded(joined, index, size)

  def _padded(self, joined: dict[str, np.ndarray], index: int, size: int) -> dict[str, np.ndarray]:
    most = self._config.data.examples_per_row
    trained = size if self._config.stage == "pretrain" else min(most * (self._config.data.max_response + 1), size)
    num_losses = 0 if self._alone[index] else trained
    num_probes = 0 if self._alone[index] else most * self._config.probes.per_sequence
    sizes = {"loss": num_losses, "targets": num_losses, "probe": num_probes, "label": most, "kl": most * self._compared}
    length_of = lambda name: sizes.get(name.partition("_")[0], size)
    return {name: _pad(value, length_of(name)) if np.ndim(value) else value for name, value in joined.items()}

  def _piece(self, index: int, real: bool, epoch: int) -> dict[str, np.ndarray]:
    """What one example puts into a batch, without padding."""
    example, config = self._examples[index], self._config
    # 1 + index: numpy takes (seed, epoch, 0) for (seed, epoch), which is the plan's.
    rng = np.random.default_rng((config.seed, epoch, 1 + index))
    views, labels, weights = probes.draw_probes(
        example.trajectory, example.response_length, config.safety, config.probes, rng)
    targets = np.flatnonzero(example.kinds == TokenKind.RESPONSE)[example.loss_from:]
    positions = masks.predictor(example.kinds, targets)
    # The base may be asked how it goes on from any query, but a model is to answer as it does benign ones alone.
    kept = [TokenKind.QUERY] + [TokenKind.HEADER, TokenKind.RESPONSE] * (example.trajectory == "benign")
    compared = np.sort(rng.permutation(np.flatnonzero(np.isin(example.kinds, kept)))[:self._compared])
    # The query of a harmful trajectory is that of its refusal: counted twice, it would shift the verdict's prior.
    label_weight = real and example.trajectory != "harmful"
    return {
        "tokens": example.tokens.astype(np.int32),
        "kinds": example.kinds.astype(np.int32),
        "loss_positions": positions.astype(np.int32),
        "targets": example.tokens[targets].astype(np.int32),
        "loss_weights": np.full(len(targets), real, np.float32),
        "label": np.float32(example.label),
        "label_weight": np.float32(label_weight),
        "probe_views": views,
        "probe_labels": labels,
        "probe_weights": weights * np.float32(real),
        "kl_positions": compared.astype(np.int32),
        "kl_weights": np.full(len(compared), real, np.float32),
    }


def _is_query(example: Example) -> bool:
  return example.trajectory == "none"


class Loader:
  """Iterator over `Batches` that reads ahead. Its state counts the batches handed out, not those read, and tells by a
  digest which examples they are made of (`examples`).
  """

  def __init__(self, batches: Batches):
    self._len, self.examples = len(batches), batches.digest()
    self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(1, 4)))

  def __len__(self) -> int:
    """Steps of the whole run, those done included."""
    return self._len

  def __iter__(self) -> Loader:
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    return self._iterator.get_state() | {"examples": self.examples}

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises ValueError where that is a state over other examples: a step's number would not mean the same batches."""
    before = state.get("examples", self.examples)  # A run that is older than these digests.
    if before != self.examples:
      raise ValueError(
          f"The examples of this run were others when it was stopped (digest {before}, now {self.examples}): its "
          "rollouts.jsonl changed, or the code that makes examples of rows. Put back what it was to resume the run, or "
          "choose another --workdir.")
    self._iterator.set_state({name: value for name, value in state.items() if name != "examples"})


def batch_shapes(config: TrainConfig) -> dict[str, np.ndarray]:
  """A global batch of the longest bucket, whose rows hold as much as one can, of zeros: what a compiler has to know."""
  count = 2 if config.objective == "dpo" else config.data.examples_per_row
  kinds = np.full(config.data.buckets[-1] // config.data.examples_per_row, TokenKind.QUERY, np.int32)
  kinds[-1] = TokenKind.RESPONSE
  return Batches([Example(np.zeros_like(kinds), kinds, 0, "benign", 0, 1)] * count, config)[0]


def _pack(examples: Sequence[Example], room: int, most: int, seed: int) -> list[list[int]]:
  """Rows of at most `most` examples and `room` tokens; those of one sort (`_is_query`) keep among themselves.

  Best fit, the longest first: an example goes where the least room is left over. Once for all epochs, so that all have
  as many steps.
  """
  rows, open_rows = [], {True: [], False: []}  # Of each sort (room left, row), ascending.
  order = range(len(examples))
  if most > 1:  # The seed decides among equals.
    order = sorted(np.random.default_rng(seed).permutation(len(examples)), key=lambda i: -len(examples[i].tokens))
  for index in map(int, order):
    waiting, length = open_rows[_is_query(examples[index])], len(examples[index].tokens)
    place = bisect.bisect_left(waiting, (length,))
    left, row = waiting.pop(place) if place < len(waiting) else (room, len(rows))
    if row == len(rows):
      rows.append([])
    rows[row].append(index)
    if len(rows[row]) < most:
      bisect.insort(waiting, (left - length, row))
  return rows


def _pad(values: np.ndarray, size: int) -> np.ndarray:
  return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1))
