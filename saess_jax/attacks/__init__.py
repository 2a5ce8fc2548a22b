"""Attacks by name; N and B stand for numbers, PATH for a file."""

from __future__ import annotations

import functools
import re

from saess_jax.attacks import encodings, templates
from saess_jax.attacks.autodan import AutoDan, AutoDanCls
from saess_jax.attacks.base import Attack, Attempt, Target, Weights
from saess_jax.attacks.direct import Direct
from saess_jax.attacks.files import File
from saess_jax.attacks.gcg import Gcg, GcgCls, GcgVictim
from saess_jax.attacks.past import Past
from saess_jax.attacks.persuasion import Persuasion
from saess_jax.attacks.prefill import Prefill, PrefillOwn
from saess_jax.attacks.sampling import Sampling
from saess_jax.attacks.soft_prompt import SoftPrompt
from saess_jax.attacks.translation import Translation
from saess_jax.attacks.trigger import FakeRefusal, Filler, FillerOwn, FillerPrefill, Injection, Late
from saess_jax.attacks.turns import ManyShot, MultiTurn

__all__ = ["ATTACKS", "Attack", "Attempt", "Target", "Weights", "make_attack"]

# A name, with N and B for numbers of at least 1 or PATH for a file -> what makes the attack, given these if there are.
ATTACKS = {
    "direct": Direct, "prefill_N": Prefill, "prefill_own_N": PrefillOwn, "sampling": Sampling, "sampling_N": Sampling,
    "nested": templates.nested, "roleplay": templates.roleplay, "suppression": templates.suppression,
    "splitting": templates.Splitting, "past": Past, "translation": Translation,
    "persuasion": Persuasion, "persuasion_N": Persuasion,
    **{name: functools.partial(encodings.Encoded, name) for name in encodings.WRITINGS},
    "homoglyphs_N": encodings.WorstWords, "many_shot_N": ManyShot, "multi_turn_N": MultiTurn, "filler": Filler,
    "filler_prefill_N": FillerPrefill, "filler_own_N": FillerOwn, "late_N": Late, "fake_refusal": FakeRefusal,
    "injection": Injection,
    "gcg_N": Gcg, "gcg_victim_N": GcgVictim, "gcg_cls_N": GcgCls,
    "gcg_NxB": Gcg, "gcg_victim_NxB": GcgVictim, "gcg_cls_NxB": GcgCls,
    "autodan_N": AutoDan, "autodan_cls_N": AutoDanCls, "soft_prompt_N": SoftPrompt,
    "file:PATH": File,
}


def make_attack(name: str) -> Attack:
  """"prefill_10" -> Prefill(10), "gcg_500x512" -> Gcg(500, 512).

  Raises:
    ValueError: no attack of that name, or a number that it does not take; what reading a file raises.
  """
  kind, _, path = name.partition(":")
  if path and f"{kind}:PATH" in ATTACKS:
    return ATTACKS[f"{kind}:PATH"](path)
  numbers = re.fullmatch(r"(.*_)([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", name)
  family = f"{numbers[1]}N{'xB' if numbers[3] else ''}" if numbers else name
  if family not in ATTACKS or family.endswith(("_N", "_NxB")) != bool(numbers) or ":" in family:
    raise ValueError(
        f"attack is {name!r}; expected one of {', '.join(ATTACKS)}, with a number (of tokens, attempts, turns, steps) "
        "for N, and of candidates a step for B.")
  return ATTACKS[family](*(int(number) for number in numbers.groups()[1:] if number) if numbers else ())
