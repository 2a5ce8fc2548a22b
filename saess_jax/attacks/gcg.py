"""GCG: a suffix found token by token along the gradient (Zou et al. 2023, "Universal and transferable attacks").

Each step takes the gradient of the loss with respect to the one-hot vectors of the suffix, keeps at every position the
`top_k` tokens along which the loss falls fastest, draws `candidates` suffixes that differ from the present one in a
single token of these, and goes on from the best of them. Plain GCG: no buffer, one replacement a candidate; it moves
even where the best candidate is worse, and gives back the best suffix it has seen.

A suffix is sent as text. A candidate whose text would be read back as other tokens is dropped before it is scored, by
encoding the whole prompt with `chat.encode_prompt` as the decoder does. Special and non-printable tokens are not used.

A run of N steps makes an attempt of its best suffix so far after N/4, N/2 and N of them, rounded down: success by
queries from one run. The attack succeeds if any of the three does, which is a little more than its last suffix alone.

  gcg_N         N steps on the base model; every model is sent what came out (transfer)
  gcg_victim_N  on the language model of the victim
  gcg_cls_N     on the victim, adaptively: the loss also wants [CLS] to find query and response benign (`objective.py`)

"NxB" in the place of N: B candidates a step. 64 by default, and 20 steps in our config, are what two cores can do; the
paper's are 512 and 500, two hundred times as many queries.

Axes: R suffix tokens, B candidates, V vocab, D embed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saess_jax.attacks import objective
from saess_jax.attacks.base import Attack, Attempt, Target, Weights
from saess_jax.attacks.filler import draw
from saess_jax.attacks.objective import Rows, Scores
from saess_jax.config import SafetyConfig, precision_of
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, Params

START = " x" * 20  # The first suffix, as in nanoGCG: twenty tokens in most vocabularies.
CANDIDATES = 64  # Scored a step, by default.
DRAWS = 4  # Candidates drawn for each that is wanted, at most: those that do not survive as text are drawn anew.


class Gcg(Attack):
  """See the module docstring; `steps` is the N of the name."""

  family = "gcg"
  cls_weight = 0.0
  at_a_time = 1

  def __init__(self, steps: int, candidates: int | None = None, top_k: int = 256):
    """candidates: B, scored a step; None: `CANDIDATES`. top_k: tokens a position that they are drawn from."""
    self.steps, self.candidates, self.top_k = steps, candidates or CANDIDATES, top_k
    self.checkpoints = {steps // 4, steps // 2, steps} - {0}  # Steps after which an attempt is made.
    self.name = f"{self.family}_{steps}{f'x{candidates}' if candidates else ''}"

  @property
  def asks_base(self) -> bool:
    return not self.adaptive

  def attempts(self, behaviors: Sequence[str], target: Target) -> list[list[Attempt]]:
    """An attempt a checkpoint; its queries, a gradient and its candidates each step, are those since the one before.

    Raises:
      ValueError: a behavior behind which the first suffix is not read as tokens of its own, or one too long.
    """
    weights = target.weights(target.victim if self.adaptive else "base")
    allowed = allowed_tokens(weights.tokenizer, weights.model.config.vocab_size)
    return [self._attempts(behavior, weights, allowed, target) for behavior in behaviors]

  def _attempts(self, behavior: str, weights: Weights, allowed: np.ndarray, target: Target) -> list[Attempt]:
    rng = np.random.default_rng(draw(behavior, target.seed))
    place = Place(weights, behavior, objective.target_of(behavior, target.target_strings))
    ids, queries, seen, made = place.ids, 0, [], []
    for step in range(1, self.steps + 1):
      scores, best_tokens = compiled_top_tokens(
          weights.model, weights.params, place.rows([ids]), place.start, jnp.asarray(allowed), weights.safety,
          float(self.cls_weight), size=len(ids), slots=place.slots, top_k=min(self.top_k, int(allowed.sum())))
      seen = seen or [(ids, objective.best_of(jax.device_get(scores)))]
      suffixes = draw_candidates(place, ids, np.asarray(best_tokens), self.candidates, rng)
      queries += 1 + len(suffixes)
      if suffixes:  # None survived: the next draws are others.
        scores = objective.score_all(weights, place.rows(suffixes), self.cls_weight, place.slots)
        ids = suffixes[int(np.argmin(scores.loss))]
        seen.append((ids, objective.best_of(scores)))
      if step in self.checkpoints:
        best, scores = min(seen, key=lambda entry: float(entry[1].loss))
        assert place.survives(best), "the suffix is not read back as the tokens that were optimised"
        course = objective.summary(seen[0][1], scores)
        made.append(Attempt(
            place.text(best), variant=f"{step} steps, {course}", target=place.answer, queries=queries))
        queries = 0
    return made


class GcgVictim(Gcg):
  family, adaptive = "gcg_victim", True


class GcgCls(GcgVictim):
  """Adaptive GCG. cls_weight: of the CLS terms beside the language loss's 1; without a defence there are none."""

  family = "gcg_cls"

  def __init__(self, steps: int, candidates: int | None = None, top_k: int = 256, cls_weight: float = 1.0):
    super().__init__(steps, candidates, top_k)
    self.cls_weight = cls_weight


@dataclasses.dataclass
class Place:
  """A behavior with room for a suffix behind it.

  Attributes:
    answer: the target.
    ids: int32 [R], the first suffix.
    row: (tokens, kinds) with it, as `objective.encode_row` gives them.
    start: where in `row` it begins.
    slots: T of the target.
  """

  weights: Weights
  behavior: str
  answer: str

  def __post_init__(self):
    self.behavior = self.behavior.rstrip()
    self._alone = self._query(self.behavior)
    self._before = self._decode(self._alone)
    self.row = objective.encode_row(self.weights, self.behavior + START, self.answer)
    self.slots = objective.target_slots(objective.pad_rows([self.row]))
    tokens, kinds = self.row
    places = np.flatnonzero(kinds == TokenKind.QUERY)
    if not np.array_equal(tokens[places][: len(self._alone)], self._alone) or len(places) == len(self._alone):
      raise ValueError(
          f"Behind {self.behavior[-30:]!r} the suffix {START!r} is not read as tokens of its own; end the "
          "behavior with a full stop.")
    self.start = int(places[len(self._alone)])
    self.ids = tokens[places[len(self._alone):]]

  def text(self, ids: np.ndarray) -> str:
    """The prompt with the suffix `ids`, decoded with what stands before it: some decoders cut a first space."""
    return self.behavior + self._decode(np.concatenate([self._alone, ids]))[len(self._before):]

  def survives(self, ids: np.ndarray) -> bool:
    """Whether the whole prompt, read back from its text, has just these tokens and kinds."""
    tokens, kinds = chat.encode_prompt(
        self.weights.tokenizer, self.text(ids), system_prompt=self.weights.system_prompt)
    mine, my_kinds = self.tokens(ids), self.row[1]
    plain = ~np.isin(my_kinds, [int(TokenKind.CLS), int(TokenKind.RESPONSE)])
    return np.array_equal(tokens, mine[plain]) and np.array_equal(kinds, my_kinds[plain])

  def tokens(self, ids: np.ndarray) -> np.ndarray:
    """The row's tokens with the suffix `ids`."""
    tokens = self.row[0].copy()
    tokens[self.start : self.start + len(ids)] = ids
    return tokens

  def rows(self, suffixes: Sequence[np.ndarray]) -> Rows:
    """A row for each suffix, padded to a multiple of 32."""
    return objective.pad_rows([(self.tokens(ids), self.row[1]) for ids in suffixes])

  def _query(self, prompt: str) -> np.ndarray:
    tokens, kinds = chat.encode_prompt(self.weights.tokenizer, prompt, system_prompt=self.weights.system_prompt)
    return tokens[kinds == TokenKind.QUERY]

  def _decode(self, ids: np.ndarray) -> str:
    return self.weights.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def allowed_tokens(tokenizer: Any, vocab_size: int) -> np.ndarray:
  """bool [V]: what a suffix may hold. Printable ASCII only; no special or added tokens, nor ids without one."""
  count = min(len(tokenizer), vocab_size)
  words = tokenizer.batch_decode([[i] for i in range(count)], clean_up_tokenization_spaces=False)
  allowed = np.zeros(vocab_size, bool)
  allowed[:count] = [word != "" and word.isascii() and word.isprintable() for word in words]
  allowed[[i for i in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} if i < vocab_size]] = False
  return allowed


def one_hot_gradient(
    model: Llama, params: Params, rows: Rows, start: jax.Array, safety: SafetyConfig | None, cls_weight: jax.Array,
    size: int, slots: int) -> tuple[Scores, jax.Array]:
  """The loss of one row and its gradient with respect to the one-hot vectors of its suffix.

  The suffix is fed as rows of its own behind the embeddings (`model.with_rows`): with x = onehot @ E, the gradient
  is (dloss / dx) E^T.

  Args:
    rows: of one row, B = 1.
    start, size: where the suffix is, and R (static).
    safety, cls_weight, slots: as `objective.score`.

  Returns:
    Scores [1], and float32 [R, V].
  """
  table = params["embed"]["embedding"]
  ids = jax.lax.dynamic_slice_in_dim(jnp.asarray(rows.tokens)[0], start, size)

  def loss(embeddings):
    scores = objective.score_embeddings(model, params, rows, start, embeddings, safety, cls_weight, slots)
    return scores.loss[0], scores

  gradient, scores = jax.grad(loss, has_aux=True)(jnp.take(table, ids, axis=0).astype(jnp.float32))
  words = table[: model.config.vocab_size].astype(jnp.float32)
  return scores, jnp.matmul(gradient, words.T, precision=precision_of(words.dtype))


def top_tokens(
    model: Llama, params: Params, rows: Rows, start: jax.Array, allowed: jax.Array, safety: SafetyConfig | None,
    cls_weight: jax.Array, size: int, slots: int, top_k: int) -> tuple[Scores, jax.Array]:
  """(Scores [1], int32 [R, top_k]): at each position the allowed tokens along which the loss falls fastest."""
  scores, gradient = one_hot_gradient(model, params, rows, start, safety, cls_weight, size, slots)
  return scores, jax.lax.top_k(jnp.where(allowed[None], -gradient, -jnp.inf), top_k)[1]


compiled_top_tokens = jax.jit(top_tokens, static_argnames=("model", "size", "slots", "top_k"))


def draw_candidates(
    place: Place, ids: np.ndarray, best_tokens: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
  """`count` suffixes that differ from `ids` [R] in one token, all different and readable back; fewer where DRAWS draws
  for each do not yield so many.

  Args:
    best_tokens: int [R, top_k].
  """
  found: dict[bytes, np.ndarray] = {}
  seen = {ids.tobytes()}
  for _ in range(DRAWS * count):
    position, rank = rng.integers(len(ids)), rng.integers(best_tokens.shape[1])
    suffix = ids.copy()
    suffix[position] = best_tokens[position, rank]
    key = suffix.tobytes()
    if key not in seen and place.survives(suffix):
      found[key] = suffix
    seen.add(key)
    if len(found) == count:
      break
  return list(found.values())
