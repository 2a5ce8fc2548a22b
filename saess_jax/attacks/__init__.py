"""Attacks by name: "direct"; "prefill_N", "prefill_own_N" for N tokens; "gcg_N", "gcg_victim_N", "gcg_cls_N" for N
steps; "autodan_N", "autodan_cls_N" for N generations.
"""

from __future__ import annotations

import re

from saess_jax.attacks.autodan import AutoDan, AutoDanCls
from saess_jax.attacks.base import Attack, Attempt, Target, Weights
from saess_jax.attacks.direct import Direct
from saess_jax.attacks.gcg import Gcg, GcgCls, GcgVictim
from saess_jax.attacks.prefill import Prefill, PrefillOwn

__all__ = ["ATTACKS", "Attack", "Attempt", "Target", "Weights", "make_attack"]

# A name, with N for a number of at least 1 -> what makes the attack, given that number if there is one.
ATTACKS = {
    "direct": Direct, "prefill_N": Prefill, "prefill_own_N": PrefillOwn,
    "gcg_N": Gcg, "gcg_victim_N": GcgVictim, "gcg_cls_N": GcgCls,
    "autodan_N": AutoDan, "autodan_cls_N": AutoDanCls}


def make_attack(name: str) -> Attack:
  """"prefill_10" -> Prefill(10).

  Raises:
    ValueError: no attack of that name.
  """
  number = re.fullmatch(r"(.*_)([1-9]\d{0,3})", name)
  family = f"{number[1]}N" if number else name
  if family not in ATTACKS or family.endswith("_N") != bool(number):
    raise ValueError(f"attack is {name!r}; expected one of {', '.join(ATTACKS)}, with a number for N.")
  return ATTACKS[family](int(number[2])) if number else ATTACKS[family]()
