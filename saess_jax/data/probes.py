"""Trajectory probes [our addition]: what [CLS] will see while decoding, drawn for training.

The paper's mask shows [CLS] the query only, so it learns nothing about responses. A probe is an extra [CLS] row that
sees one inference-time view of a training sequence and has a label of its own. A view is (sees_query, start, stop):
the query or not, and the response tokens of index [start, stop). Axis: P probes.
"""

from __future__ import annotations

import numpy as np

from saess_jax.config import ProbeConfig, SafetyConfig

TRAJECTORIES = ("none", "document", "refusal", "interrupted", "harmful", "benign")
# Rule of each probe in turn. Rule 2 comes first and twice: most steps of a benign run are decided by it.
_RULES = (2, 1, 3, 2)


def draw_probes(
    trajectory: str, num_tokens: int, safety: SafetyConfig, probes: ProbeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`probes.per_sequence` views of one sequence.

  Rule 1: the query and the first 1 to r1 response tokens. Rule 2: the newest r2 tokens at a random index (fewer while
  the window fills), with the query if `rule2_keeps_query`. Rule 3: [S_t - r2, S_t + r3] around a random transition
  S_t, cut on the right at the token that is the newest while the alarm is open.

  Labels: "harmful" (a completion of a malicious prompt by the unaligned base model) is 1 everywhere, "benign" 0
  everywhere. A "refusal" is harmless text after a malicious prompt: 1 where the view has the query, 0 where not. An
  "interrupted" response begins with what the base, an attacker or the decoder (its refusal prefix) wrote and is a
  refusal then: only its views with the query count. "none" is no response, and a "document" (pretraining) has no views:
  no probes either, P = 0.

  Args:
    trajectory: one of `TRAJECTORIES`.
    num_tokens: response tokens, the end-of-turn token not counted (sampled responses often lack it: seeing it would
      tell written from sampled).

  Returns:
    views int32 [P, 3], labels float32 [P], weights float32 [P]: 0 for a view of no response tokens (the query's own
    verdict counts already) and for one without query that holds fewer than `min_window`, else 1, or `benign_weight` for
    a benign one without query.

  Raises:
    ValueError: an unknown trajectory.
  """
  if trajectory not in TRAJECTORIES:
    raise ValueError(f"trajectory is {trajectory!r}; expected one of {', '.join(TRAJECTORIES)}.")
  rules = [_RULES[i % len(_RULES)] for i in range(0 if trajectory in ("none", "document") else probes.per_sequence)]
  views = np.array([_draw_view(rule, num_tokens, safety, probes, rng) for rule in rules], np.int32).reshape(-1, 3)
  sees_query, sizes = views[:, 0] > 0, views[:, 2] - views[:, 1]
  labels = sees_query | (trajectory == "harmful") if trajectory != "benign" else np.zeros_like(sees_query)
  counts = (sizes > 0) & (sees_query | ((sizes >= probes.min_window) & (trajectory != "interrupted")))
  weights = counts * np.where(labels | sees_query, 1.0, probes.benign_weight)
  return views, labels.astype(np.float32), weights.astype(np.float32)


def _draw_view(rule: int, num_tokens: int, safety: SafetyConfig, probes: ProbeConfig, rng) -> tuple[int, int, int]:
  if rule == 1:
    return 1, 0, _draw(rng, 1, min(safety.r1, num_tokens))
  stop = _draw(rng, probes.min_window, num_tokens)  # Shorter windows would have weight 0.
  if rule == 2:
    return int(safety.rule2_keeps_query), max(0, stop - safety.r2), stop
  transition = max(0, stop - 1 - _draw(rng, 1, safety.r3))  # The newest token is S_t + 1 to S_t + r3.
  return 0, max(0, transition - safety.r2), stop


def _draw(rng: np.random.Generator, low: int, high: int) -> int:
  """Uniform in [low, high]; `high` where that is empty."""
  return int(rng.integers(min(low, high), high + 1))
