"""Every file under configs/ builds the dataclass it is for."""

import dataclasses
import pathlib
import runpy

import numpy as np
import pytest

from saess_jax import preflight, schedule, sharding
from saess_jax.config import EvalConfig, RopeScaling, TrainConfig, from_config_dict, model_config, to_config_dict

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_config_file(path):
  values = runpy.run_path(str(path))["get_config"]()
  kind = EvalConfig if path.stem.startswith("eval") else TrainConfig
  config = from_config_dict(kind, values)
  assert to_config_dict(config) == values
  if kind is TrainConfig:
    preflight.check(config, sharding.make_mesh(config.mesh))


def test_rope_scaling_as_json_has_it():
  shape = model_config("tiny", rope_scaling={"factor": 4.0})
  assert shape.rope_scaling == RopeScaling(factor=4.0) and hash(shape)


@pytest.mark.parametrize("name, changed", [
    ("full", {}), ("no_decoding", {"dependency": "low"}), ("annealing", {"schedule": "annealing"}),
    ("first", {"schedule": "first", "sweep_prefill": False}),
    ("no_attention", {"sees_all": True}), ("windows", {"heeds_query": False}),
    ("r_5", {"r1": 5, "r2": 5, "r3": 5}), ("tau_1", {"tau": 1}), ("threshold_40", {"threshold": 0.4})])
def test_ablations(name, changed):
  values = runpy.run_path(str(ROOT / "configs" / "eval_ablation.py"))["get_config"](name)
  safety = from_config_dict(EvalConfig, values).safety
  assert {key: value for key, value in safety.items() if value is not None} == changed


@pytest.mark.parametrize("name", ["each", "first", "periodic", "annealing", "windows", "full"])
def test_an_ablation_of_the_schedule_meets_a_prefix_as_long_as_annealing_looks(name):
  values = runpy.run_path(str(ROOT / "configs" / "eval_ablation.py"))["get_config"](name)
  late = [attack for attack in values.attacks if attack.startswith("late_")]
  assert len(late) == (name != "full")
  checked = np.flatnonzero(schedule.as_array("annealing", 4096))
  assert all(int(attack.removeprefix("late_")) == checked[-1] + 1 for attack in late)


@pytest.mark.parametrize("name, objective, depth", [("sft", "sft", 0), ("augmented", "sft", 24), ("dpo", "dpo", 0)])
def test_rivals(name, objective, depth):
  values = runpy.run_path(str(ROOT / "configs" / "smollm2_rivals.py"))["get_config"](name)
  config = from_config_dict(TrainConfig, values)
  preflight.check(config, sharding.make_mesh(config.mesh))
  assert (config.objective, config.data.refusal_depth) == (objective, depth)


def test_the_adapter_goes_on_with_what_all_weights_learned():
  stage = runpy.run_path(str(ROOT / "configs" / "smollm2_135m.py"))["get_config"]
  weights, adapter = (from_config_dict(TrainConfig, stage(name)) for name in ("weights", "adapter"))
  preflight.check(adapter, sharding.make_mesh(adapter.mesh))
  assert (weights.lora.rank, adapter.lora.rank) == (0, 32)
  assert (weights.data, weights.safety) == (adapter.data, adapter.safety) and weights.seed != adapter.seed
  assert dataclasses.replace(adapter.rollouts, max_prompts=weights.rollouts.max_prompts) == weights.rollouts
  with pytest.raises(ValueError, match="stage is 'sft'; expected one of weights, adapter"):
    stage("sft")


def test_a_rival_that_does_not_exist():
  with pytest.raises(ValueError, match="rival is 'ppo'; expected one of sft, augmented, dpo"):
    runpy.run_path(str(ROOT / "configs" / "smollm2_rivals.py"))["get_config"]("ppo")


def test_an_ablation_that_does_not_exist():
  with pytest.raises(ValueError, match="ablation is 'r_many'; expected one of full, no_attention.*r_N, tau_N"):
    runpy.run_path(str(ROOT / "configs" / "eval_ablation.py"))["get_config"]("r_many")
