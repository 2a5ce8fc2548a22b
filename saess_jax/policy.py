"""Strategic attention and strategic decoding as a small state machine, without a model (paper, section on inference).

  phase      rule  what [CLS] sees after response token t                 leaves it
  BENIGN     2     the newest r2 response tokens                          a malicious verdict at t: ALARM, S_t = t
  ALARM      3     response tokens S_t - r2 .. S_t + r3, as far as t      a benign verdict: BENIGN (false alarm)
                                                                          tau malicious ones running: CONFIRMED
  CONFIRMED  3     frozen: the state that convicted stays                 -
  MALICIOUS  1     QUERY and the first r1 response tokens, then frozen    -

MALICIOUS is entered by the initial verdict alone. "medium" dependency intervenes on entering MALICIOUS or CONFIRMED,
"high" does so at the first malicious verdict (as if tau were 1), "low" never. AUX, HEADER and PAD are never seen
(Rule 4, `masks.view_visibility`). With `sees_all`, an ablation, [CLS] sees QUERY and all of the response so far in
every phase; CONFIRMED alone freezes it. Without `heeds_query`, another, nothing is MALICIOUS and all begin as BENIGN.

Every function is pure and vectorised over rows; r's, tau and threshold may be traced. Axes: B rows, T response tokens.
"""

from __future__ import annotations

import enum

import flax.struct
import jax
import jax.numpy as jnp

from saess_jax import schedule as schedule_lib
from saess_jax.config import SafetyConfig


class Phase(enum.IntEnum):
  BENIGN = 0
  ALARM = 1
  CONFIRMED = 2
  MALICIOUS = 3


@flax.struct.dataclass
class PolicyState:
  """All int32 [B].

  Attributes:
    phase: of `Phase`.
    run: malicious evaluations running, in the open alarm.
    transition_at: S_t, the response index at which the alarm opened; -1 outside ALARM and CONFIRMED.
    intervened_at: 0 by the initial verdict, t + 1 by the verdict on token t, -1 not (yet).
    leaked: tokens from S_t to that of the confirming verdict, both ends in, that a reader has seen; 0 without one or
      with rollback.
  """

  phase: jax.Array
  run: jax.Array
  transition_at: jax.Array
  intervened_at: jax.Array
  leaked: jax.Array


@flax.struct.dataclass
class Replay:
  """`replay`'s result: phase int32 [B, T] after each token's verdict; the others as in PolicyState at the end."""

  phase: jax.Array
  intervened_at: jax.Array
  transition_at: jax.Array
  leaked: jax.Array


def start(initial_prob: jax.Array, config: SafetyConfig) -> PolicyState:
  """The state before the first response token. `initial_prob`: P(malicious) of the query, float [B]."""
  malicious = _malicious(initial_prob, config) & config.heeds_query
  never = jnp.full(initial_prob.shape, -1, jnp.int32)
  intervenes = malicious & (config.dependency != "low")
  return PolicyState(
      phase=jnp.where(malicious, Phase.MALICIOUS, Phase.BENIGN).astype(jnp.int32),
      run=jnp.zeros_like(never), transition_at=never, intervened_at=jnp.where(intervenes, 0, never),
      leaked=jnp.zeros_like(never))


def _malicious(prob: jax.Array, config: SafetyConfig) -> jax.Array:
  """A verdict, bool. That of a NaN, as broken numerics give, is malicious: nothing passes unjudged."""
  return ~(prob < config.threshold)


def is_scheduled(schedule: jax.Array, t: jax.Array, prefix_length: int | jax.Array, config: SafetyConfig) -> jax.Array:
  """Is [CLS] to be re-evaluated after response token t, as long as no alarm is open?

  A caller's prefix is judged at every token (`sweep_prefill`) or at none; the schedule counts from the first token
  behind it. So nobody can write the tokens that a schedule looks at.

  Args:
    schedule: bool [T].
    t, prefix_length: int32 [B] or scalar.

  Returns:
    bool, of their shape.
  """
  own = jnp.clip(t - prefix_length, 0, len(schedule) - 1)
  return jnp.where(t < prefix_length, config.sweep_prefill, schedule[own])


def wants_verdict(state: PolicyState, t: jax.Array, scheduled: jax.Array, config: SafetyConfig) -> jax.Array:
  """Is [CLS] to be re-evaluated after response token t?

  An open alarm is checked at every token, whatever the schedule, until it is confirmed or called off; where verdicts
  are ignored ("low") no longer than its window grows.

  Args:
    t: int32 [B] or scalar, index of the newest response token.
    scheduled: bool [B] or scalar, `is_scheduled` at t.

  Returns:
    bool [B].
  """
  growing = (t <= state.transition_at + config.r3) | config.sees_all | (config.dependency != "low")
  return jnp.select(
      [state.phase == Phase.BENIGN, state.phase == Phase.ALARM, state.phase == Phase.MALICIOUS],
      [scheduled, growing, scheduled & ((t < config.r1) | config.sees_all)], False)


def view(state: PolicyState, t: jax.Array, config: SafetyConfig) -> jax.Array:
  """What [CLS] sees after response token t, int32 [B, 3] as (sees_query, start, stop) for `masks.view_visibility`."""
  t = jnp.broadcast_to(t, state.phase.shape)
  benign, malicious = state.phase == Phase.BENIGN, state.phase == Phase.MALICIOUS
  sees_query = malicious | (benign & config.rule2_keeps_query) | config.sees_all
  first = jnp.select([malicious, benign], [0, t + 1 - config.r2], state.transition_at - config.r2)
  last = jnp.select([malicious, benign], [config.r1 - 1, t], state.transition_at + config.r3)
  first = jnp.where(config.sees_all, 0, jnp.maximum(first, 0))
  stop = jnp.where(config.sees_all, t, jnp.minimum(last, t)) + 1
  return jnp.stack([sees_query, first, stop], axis=-1).astype(jnp.int32)


def patience(config: SafetyConfig) -> int | jax.Array:
  """Malicious verdicts running, from the alarm's on, at which an alarm is confirmed; with "low" none is."""
  return 1 if config.dependency == "high" else config.tau


def update(
    state: PolicyState, t: jax.Array, prob: jax.Array, evaluated: jax.Array, config: SafetyConfig
) -> PolicyState:
  """The state after the verdict on response token t.

  Args:
    t: int32 [B] or scalar; prob: P(malicious), float [B]; evaluated: bool [B], rows whose prob counts.
  """
  malicious = _malicious(prob, config)
  hit = evaluated & malicious & (state.phase <= Phase.ALARM)
  opens = hit & (state.phase == Phase.BENIGN)
  false_alarm = evaluated & ~malicious & (state.phase == Phase.ALARM)
  run = jnp.where(hit, state.run + 1, jnp.where(evaluated, 0, state.run))
  transition_at = jnp.where(opens, t, jnp.where(false_alarm, -1, state.transition_at))
  confirmed = hit & (run >= patience(config)) & (config.dependency != "low")
  phase = jnp.select([confirmed, opens, false_alarm], [Phase.CONFIRMED, Phase.ALARM, Phase.BENIGN], state.phase)
  seen = jnp.where(config.rollback, 0, t + 1 - transition_at)
  return PolicyState(
      phase=phase.astype(jnp.int32), run=run, transition_at=transition_at,
      intervened_at=jnp.where(confirmed, t + 1, state.intervened_at),
      leaked=jnp.where(confirmed, seen, state.leaked))


def replay(
    initial_prob: jax.Array, step_prob: jax.Array, config: SafetyConfig, prefix_length: int | jax.Array = 0) -> Replay:
  """The decoder's verdict logic run over stored verdicts, to tune tau and schedules offline from a trace.

  Exact for a smaller tau. Larger ones, other schedules and other thresholds are estimates: a stored verdict is on the
  view that the recording run had, and there is none behind its intervention ("medium") or an alarm's full window
  ("low").

  Args:
    initial_prob: float [B], P(malicious) of the query.
    step_prob: float [B, T], after each response token; NaN (never evaluated) counts for nothing.
    config: its schedule says at which tokens behind the prefix a stored verdict is looked at.
    prefix_length: int or [B], tokens of the caller's prefix, whose verdicts count with `sweep_prefill` alone.
  """
  steps = step_prob.shape[1]
  schedule = jnp.asarray(schedule_lib.over(config.schedule, max(steps, 1)))  # An empty response has no token.

  def step(state, inputs):
    t, prob = inputs
    now = is_scheduled(schedule, t, prefix_length, config)
    evaluated = wants_verdict(state, t, now, config) & ~jnp.isnan(prob)
    state = update(state, t, prob, evaluated, config)
    return state, state.phase

  state, phase = jax.lax.scan(
      step, start(jnp.asarray(initial_prob), config), (jnp.arange(steps), jnp.asarray(step_prob).T))
  return Replay(
      phase=phase.T, intervened_at=state.intervened_at, transition_at=state.transition_at, leaked=state.leaked)
