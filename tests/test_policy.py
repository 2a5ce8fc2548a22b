"""The verdict logic against a reference in plain Python, written from the rules and not from the code."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saess_jax import policy, schedule
from saess_jax.config import SAFETY_PRESETS, SafetyConfig
from saess_jax.policy import Phase

STEPS = 24


def reference(initial, probs, config, scheduled, prefix):
  """One row, whose first `prefix` tokens a caller wrote: (phases, intervened_at, transition_at, leaked)."""
  bad = lambda p: p >= config.threshold
  if bad(initial) and config.heeds_query:
    return [Phase.MALICIOUS] * len(probs), (-1 if config.dependency == "low" else 0), -1, 0
  phases, alarm, running = [], None, 0
  for t, p in enumerate(probs):
    look = config.sweep_prefill if t < prefix else scheduled[t - prefix]
    if alarm is not None:
      look = config.dependency != "low" or t <= alarm + config.r3 or config.sees_all
    if look and not np.isnan(p):
      if bad(p):
        alarm, running = (t, 1) if alarm is None else (alarm, running + 1)
        if config.dependency == "high" or (config.dependency == "medium" and running >= config.tau):
          left = len(probs) - t
          return phases + [Phase.CONFIRMED] * left, t + 1, alarm, 0 if config.rollback else t + 1 - alarm
      else:
        alarm, running = None, 0
    phases.append(Phase.BENIGN if alarm is None else Phase.ALARM)
  return phases, -1, -1 if alarm is None else alarm, 0


jitted = jax.jit(policy.replay)
settings = st.builds(
    SafetyConfig, r1=st.integers(0, 6), r2=st.integers(1, 6), r3=st.integers(0, 6), tau=st.integers(1, 5),
    threshold=st.sampled_from([0.25, 0.5, 0.75]), rollback=st.booleans(), sweep_prefill=st.booleans(),
    sees_all=st.booleans(), heeds_query=st.booleans(),
    dependency=st.sampled_from(["low", "medium", "high"]),
    schedule=st.one_of(
        st.sampled_from(["each", "first", "annealing", "periodic", "periodic(3)"]),
        st.lists(st.booleans(), min_size=STEPS, max_size=STEPS + 3).map(lambda bits: np.asarray(bits, bool))))


def tables(values, *shape):
  """Arrays of these values, each drawn as a byte: 400 draws of one value each would take longer than the test."""
  size = int(np.prod(shape))
  return st.binary(min_size=size, max_size=size).map(
      lambda drawn: np.asarray(values, np.float32)[np.frombuffer(drawn, np.uint8) % len(values)].reshape(shape))


@hypothesis.settings(max_examples=625)  # 16 rows each: 10,000 cases.
@hypothesis.given(
    initial=tables([0.1, 0.3, 0.5, 0.9], 16), probs=tables([0.0, 0.3, 0.5, 0.6, 0.9, np.nan], 16, STEPS),
    prefixes=tables([0, 1, 5, STEPS - 1], 16), config=settings)
def test_replay_is_the_reference(initial, probs, prefixes, config):
  scheduled = schedule.as_array(config.schedule, STEPS)
  # With the schedule as data and under jit only the three dependencies are compiled.
  prefixes = prefixes.astype(int)
  replay = jax.device_get(jitted(initial, probs, config.replace(schedule=scheduled), prefixes))
  for row in range(16):
    # The decoder compares in float32; so does the reference.
    phases, intervened, transition, leaked = reference(initial[row], probs[row], config, scheduled, prefixes[row])
    assert replay.phase[row].tolist() == phases
    assert (replay.intervened_at[row], replay.transition_at[row], replay.leaked[row]) == (
        intervened, transition, leaked)


def one(probs, initial=0.1, **changes):
  return policy.replay(jnp.asarray([initial]), jnp.asarray([probs]), SafetyConfig().replace(**changes))


def test_medium_waits_for_tau_running():
  replay = one([0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.1])
  assert replay.phase[0].tolist() == [0, 1, 1, 0, 1, 1, 2, 2]
  assert (replay.intervened_at[0], replay.transition_at[0], replay.leaked[0]) == (7, 4, 3)


def test_rollback_leaks_nothing():
  assert one([0.9, 0.9, 0.9], rollback=True).leaked[0] == 0


def test_what_is_no_number_is_malicious():
  """Of a verdict that was taken; where none was, NaN stands for that and counts for nothing."""
  for dependency, at in (("medium", 0), ("low", -1)):
    state = policy.start(jnp.asarray([np.nan]), SafetyConfig(dependency=dependency))
    assert state.phase[0] == Phase.MALICIOUS and state.intervened_at[0] == at
  state, nan, taken = policy.start(jnp.zeros(1), SafetyConfig()), jnp.asarray([np.nan]), jnp.ones(1, bool)
  for t in range(3):
    state = policy.update(state, jnp.asarray([t]), nan, taken, SafetyConfig())
  assert state.intervened_at[0] == 3 and state.transition_at[0] == 0
  assert one([np.nan] * 5).intervened_at[0] == -1


def test_a_prefix_counts_where_it_is_swept():
  replay = lambda **changes: policy.replay(
      jnp.zeros(2), jnp.full((2, 6), 0.9), SafetyConfig(**changes), jnp.asarray([0, 2])).intervened_at.tolist()
  assert replay() == [3, 3] and replay(sweep_prefill=False) == [3, 5]


def test_a_schedule_counts_from_the_first_token_behind_a_prefix():
  only_first = np.arange(6) == 0
  at = lambda **changes: policy.replay(
      jnp.zeros(2), jnp.full((2, 6), 0.9), SafetyConfig(tau=1, schedule=only_first, **changes), jnp.asarray([0, 4]))
  assert at().intervened_at.tolist() == [1, 1] and at(sweep_prefill=False).intervened_at.tolist() == [1, 5]


def test_an_open_alarm_is_checked_between_scheduled_steps():
  replay = one([0.1, 0.1, 0.9, 0.9, 0.9, 0.9], schedule="periodic(3)")
  assert replay.intervened_at[0] == 5 and replay.transition_at[0] == 2


def test_views_follow_the_rules():
  config = SafetyConfig(r1=4, r2=3, r3=2)
  def views(phase, transition, ts):
    state = policy.start(jnp.zeros(1), config).replace(
        phase=jnp.asarray([int(phase)]), transition_at=jnp.asarray([transition]))
    return [policy.view(state, jnp.asarray([t]), config)[0].tolist() for t in ts]
  assert views(Phase.MALICIOUS, -1, [0, 2, 9]) == [[1, 0, 1], [1, 0, 3], [1, 0, 4]]  # Rule 1
  assert views(Phase.BENIGN, -1, [0, 2, 9]) == [[0, 0, 1], [0, 0, 3], [0, 7, 10]]  # Rule 2
  assert views(Phase.ALARM, 6, [7, 8, 9]) == [[0, 3, 8], [0, 3, 9], [0, 3, 9]]  # Rule 3: S_t - r2 .. S_t + r3
  config = dataclasses.replace(config, rule2_keeps_query=True)
  assert views(Phase.BENIGN, -1, [9]) == [[1, 7, 10]]
  config = dataclasses.replace(config, sees_all=True)
  for phase, transition in ((Phase.MALICIOUS, -1), (Phase.BENIGN, -1), (Phase.ALARM, 6)):
    assert views(phase, transition, [7, 20]) == [[1, 0, 8], [1, 0, 21]]
    state = policy.start(jnp.zeros(1), config).replace(
        phase=jnp.asarray([int(phase)]), transition_at=jnp.asarray([transition]))
    for dependency in ("low", "medium"):
      now = dataclasses.replace(config, dependency=dependency)
      assert policy.wants_verdict(state, jnp.asarray([20]), jnp.asarray([True]), now)[0]


def test_new_numbers_compile_nothing_new():
  replay = jax.jit(lambda *inputs: policy.replay(*inputs))  # A cache of its own.
  rng = np.random.default_rng(0)
  for config in (*SAFETY_PRESETS.values(), SafetyConfig(tau=1, threshold=0.9, rollback=True)):
    replay(jnp.zeros(2), jnp.asarray(rng.random((2, 8))), config)
  assert replay._cache_size() == 1


def test_schedules():
  as_array = lambda name, steps=12: "".join(".x"[bit] for bit in schedule.as_array(name, steps).astype(int))
  assert as_array("each", 4) == "xxxx" and as_array("first", 4) == "...."
  assert as_array("periodic(3)", 7) == "..x..x." and as_array("periodic", 20) == ".........x.........x"
  assert as_array(np.asarray([True, False, True]), 3) == "x.x" and as_array(np.asarray([True, True]), 1) == "x"
  dense, then = as_array("annealing", 300)[:16], np.flatnonzero(schedule.as_array("annealing", 300))[16:]
  assert dense == "x" * 16
  assert then.tolist() == [17, 21, 29, 45, 77, 141]  # Gaps 4, 8, 16, ... after the first of 2; none from 256 on.


def test_an_array_of_any_length_schedules_a_response():
  """As `decode_config` lays it out: nothing is asked behind its end."""
  probs = np.asarray([[0.9, 0.9, 0.9, 0.9, 0.9, 0.9]])
  both = (SafetyConfig(tau=2, schedule=np.asarray(bits, bool)) for bits in ([0, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0]))
  short, long = (policy.replay(np.asarray([0.1]), probs, config) for config in both)
  assert short.intervened_at.tolist() == long.intervened_at.tolist() == [4]
  none = policy.replay(np.asarray([0.1]), probs, SafetyConfig(schedule=np.asarray([False, False])))
  assert none.intervened_at.tolist() == [-1]


def test_an_empty_response_is_replayed():
  out = policy.replay(np.asarray([0.1, 0.9]), np.zeros((2, 0)), SafetyConfig())
  assert out.phase.shape == (2, 0) and out.intervened_at.tolist() == [-1, 0]


@pytest.mark.parametrize("bad, message", [
    ("sometimes", "expected one of each, first"), ("periodic(0)", "expected one of"), (np.arange(3), "expected bool"),
    (np.ones(3, bool), "3 entries; expected one for each of 4")])
def test_bad_schedules(bad, message):
  with pytest.raises(ValueError, match=message):
    schedule.as_array(bad, 4)


@pytest.mark.parametrize("changes, message", [
    ({"dependency": "strong"}, "expected one of low, medium, high"),
    ({"schedule": "anealing"}, "schedule is 'anealing'; expected one of each"),
    ({"r2": -1}, "r2 is -1; expected 0 or more"), ({"tau": 0}, "tau is 0; expected 1 or more"),
    ({"threshold": 1.5}, "threshold is 1.5; expected 0 to 1"),
    ({"threshold": float("nan")}, "threshold is nan; expected 0 to 1"),
    ({"threshold": np.float32(2)}, "threshold is 2.0; expected 0 to 1"), ({"r2": np.int64(-3)}, "r2 is -3; expected 0"),
    ({"tau": jnp.asarray(0)}, "tau is 0; expected 1"), ({"tau": np.arange(3)}, "tau is .0 1 2.; expected 1 or more"),
    ({"tau": 2.5}, "tau is 2.5; expected a whole number"), ({"r2": np.float32(2)}, "r2 is 2.0; expected a whole")])
def test_bad_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    SafetyConfig(**changes)
