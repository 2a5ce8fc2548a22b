"""One part of the method taken away or turned, on the embedded test split: `--config configs/eval_ablation.py:NAME`.

  full            nothing changed
  no_attention    no strategic attention: [CLS] always sees the query and all of the response so far
  no_decoding     no strategic decoding: verdicts are kept and nothing is done about them
  windows         the initial verdict changes nothing: what windows stop by themselves, under attacks on them too
  high            an intervention is a fixed refusal that ends the response
  each, first, periodic, annealing    when [CLS] is asked again (first: never, on no prefix either); one attack more,
                  late_142, has a prefix as long as annealing looks
  r_N             r1 = r2 = r3 = N
  tau_N           malicious verdicts running before the refusal goes in
  threshold_N     the verdict's threshold, in percent

Each has a --workdir of its own and goes on where it was stopped. Two are compared by
`python -m saess_jax.evaluation OUT_A OUT_B`.
"""

import re

from saess_jax.config import EvalConfig, to_config_dict

CHANGES = {
    "full": {},
    "no_attention": dict(sees_all=True),
    "no_decoding": dict(dependency="low"),
    "windows": dict(heeds_query=False),
    "high": dict(dependency="high"),
    "first": dict(schedule="first", sweep_prefill=False),
    **{name: dict(schedule=name) for name in ("each", "periodic", "annealing")},
}
LATE = "late_142"  # Annealing checks the 142nd token last.
ON_WINDOWS = ("filler", "filler_prefill_10", "filler_own_20", LATE, "fake_refusal")
NUMBERS = {
    "r": lambda n: dict(r1=n, r2=n, r3=n), "tau": lambda n: dict(tau=n), "threshold": lambda n: dict(threshold=n / 100)}


def get_config(name="full"):
  number = re.fullmatch(r"(r|tau|threshold)_(\d{1,4})", name)
  if name not in CHANGES and not number:
    raise ValueError(f"ablation is {name!r}; expected one of {', '.join(CHANGES)}, r_N, tau_N or threshold_N.")
  changes = NUMBERS[number[1]](int(number[2])) if number else CHANGES[name]
  attacks = ("direct", "prefill_10", "prefill_40", "prefill_own_10")
  attacks += (LATE,) * ("schedule" in changes) + ON_WINDOWS * ("heeds_query" in changes)
  config = to_config_dict(EvalConfig(models=("saess",), attacks=attacks, max_new_tokens=48))
  config.safety.update(changes)
  return config
