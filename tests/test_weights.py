"""Weights on a mesh: read straight onto it, tensor by tensor, from whatever holds them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_export import case_folder
from test_gguf import write_gguf
from test_train import small_config

from saess_jax import adapters, checkpoint, hf, model, pretrained, sharding, train, weights
from saess_jax.config import LoraConfig, MeshConfig, ProbeConfig, RolloutConfig, SafetyConfig, TrainConfig, model_config
from saess_jax.export import export_hf

ROOT = pathlib.Path(__file__).parent.parent
MESH = MeshConfig(2, 2, 2)


def assert_placed(placed, params, config, mesh):
  """The same values, each on its shards."""
  assert jax.tree.map(lambda leaf: leaf.sharding, placed) == weights.placement(config, mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_onto_a_mesh_equals_onto_the_host(form, dtype, tmp_path):
  path = write_gguf(tmp_path / "tiny.gguf") if form == "gguf" else case_folder(tmp_path / "qwen2", "qwen2")
  mesh = sharding.make_mesh(MESH)
  host, placed = hf.load_pretrained(str(path), dtype), hf.load_pretrained(str(path), dtype, mesh)
  assert placed.config == host.config
  mean = placed.params.pop("cls_embedding"), host.params.pop("cls_embedding")
  np.testing.assert_allclose(*(np.float32(x) for x in mean), rtol=2**-7, atol=1e-6)  # A sum in another order.
  places = weights.placement(host.config, mesh)
  assert mean[0].sharding == places.pop("cls_embedding")
  assert jax.tree.map(lambda leaf: leaf.sharding, placed.params) == places
  jax.tree.map(np.testing.assert_array_equal, placed.params, host.params)
  up = placed.params["layers_0"]["mlp"]["up"]["kernel"]
  assert up.addressable_shards[0].data.size * 4 == up.size  # Over fsdp and tensor.


def test_research_takes_folders_and_files(tmp_path):
  plain, mesh = case_folder(tmp_path / "plain"), sharding.make_mesh(MESH)
  loaded, safety = hf.load_pretrained(str(plain)), SafetyConfig(tau=7)
  trained = loaded.params | {"cls_embedding": np.ones(64, np.float32)}
  export_hf(tmp_path / "saess", loaded.config, trained, loaded.tokenizer, safety)
  for path, params, settings in (
      (plain, loaded.params, SafetyConfig()), (tmp_path / "saess", trained, safety),
      (write_gguf(tmp_path / "tiny.gguf"), loaded.params, SafetyConfig())):
    llama, ours, tokenizer, found = pretrained.load_for_research(path)
    assert llama.config == loaded.config and found == settings and tokenizer.eos_token_id is not None
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ours))
    jax.tree.map(np.testing.assert_array_equal, ours, params)
  assert_placed(pretrained.load_for_research(tmp_path / "saess", mesh=mesh)[1], trained, loaded.config, mesh)
  with pytest.raises(FileNotFoundError, match="'/nowhere' does not exist"):
    pretrained.load_for_research("/nowhere")


def test_research_in_bfloat16(tmp_path):
  mesh, loaded = sharding.make_mesh(MESH), hf.load_pretrained(str(case_folder(tmp_path / "plain")))
  trained = loaded.params | {"cls_embedding": np.ones(64, np.float32)}
  export_hf(tmp_path / "saess", loaded.config, trained, loaded.tokenizer, SafetyConfig())
  rounded = {**jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), trained), "cls_head": trained["cls_head"]}
  for place in (None, mesh):
    llama, params, *_ = pretrained.load_for_research(tmp_path / "saess", mesh=place, dtype="bfloat16")
    assert llama.config == loaded.config.replace(dtype="bfloat16", param_dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert jax.tree.map(lambda leaf: leaf.dtype, params) == jax.tree.map(lambda leaf: leaf.dtype, rounded)
  with pytest.raises(ValueError, match="float16"):
    pretrained.load_for_research(tmp_path / "saess", dtype="float16")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "rows.jsonl"
  path.write_text("\n".join(json.dumps({
      "prompt": f"{'bad' if i % 2 else 'good'} request {i}", "response": f"answer {i}",
      "label": "malicious" if i % 2 else "benign"}) for i in range(64)))
  return path


@pytest.mark.slow  # Two runs of training.
@pytest.mark.parametrize("changes", [
    {}, {"lora": LoraConfig(rank=2), "frozen_layers": 1},
    {"model_overrides": {"vocab_size": 260, "tie_embeddings": False}, "frozen_layers": 1},
], ids=["all", "lora_above_a_frozen_layer", "a_head_above_frozen_embeddings"])
def test_another_run_s_weights_never_lie_on_one_device(changes, rows, tmp_path):
  config = small_config(
      rows, max_steps=2, eval_every=0, probes=ProbeConfig(per_sequence=0), rollouts=RolloutConfig(enabled=False),
      mesh=MESH, **changes)
  train.train_and_evaluate(config, tmp_path / "run")
  trained = checkpoint.Saved(tmp_path / "run").restore_trainable(2)
  _, base, _ = pretrained.load_base(config)
  stacked = model.stack_layers(base, config.frozen_layers) | trained["params"]
  stacked = model.resize_vocab(stacked, 260)
  if "lora" in trained:
    assert np.abs(trained["lora"]["layers"]["mlp"]["up"]["b"]).max() > 0
    stacked = adapters.merge_lora(stacked, trained["lora"])
  expected = model.unstack_layers(jax.device_get(stacked))

  before = {id(array) for array in jax.live_arrays()}
  shape, params, _ = pretrained.load_base(TrainConfig(model="", weights=str(tmp_path / "run")))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
  if not config.frozen_layers:  # (Random ones that were frozen, and merged ones, share a CPU device's memory.)
    assert not [array.shape for array in jax.live_arrays() if id(array) not in before and array.size > 10]
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  stack = model.stack_layers(params)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stack))

  mesh = sharding.make_mesh(MESH)
  llama, placed, _, safety = pretrained.load_for_research(tmp_path / "run", mesh=mesh)
  assert safety == config.safety and llama.config == shape
  assert jax.tree.map(lambda leaf: leaf.sharding, placed) == weights.placement(shape, mesh)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), placed, expected)


# --- How much memory the host needs ---

MEASURE = """
import json, resource, sys
import jax
from saess_jax import hf, sharding
from saess_jax.config import MeshConfig
mesh, placed = sharding.make_mesh(MeshConfig(1, 4, 2)), 0
if len(sys.argv) > 1:
  params = hf.load_pretrained(sys.argv[1], "bfloat16", mesh).params
  placed = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "placed": placed}))
"""


def measure(*arguments) -> dict[str, int]:
  """Peak memory of a process that imports the package, makes a mesh of 8 fake devices, and loads a folder if given."""
  # Through a shell, whose child it is: a process begins with the peak of the one that started it, here pytest's.
  run = subprocess.run(
      ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", MEASURE, *arguments], check=True, cwd=ROOT,
      stdout=subprocess.PIPE, text=True,
      env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"})
  return json.loads(run.stdout.splitlines()[-1])


def write_llama2_7b_of(layers: int, folder: pathlib.Path) -> int:
  """A checkpoint of Llama2-7B's widths in bfloat16, five tensors a file; returns the bytes of its largest tensor."""
  config = model_config("llama2_7b", num_layers=layers)
  case_folder(folder)  # For its tokenizer.
  (folder / "model.safetensors").unlink()
  (folder / "config.json").write_text(json.dumps({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
      "intermediate_size": 11008, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32,
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False}))
  planned = [(name, shape) for name, _, shape in weights.plan(config, weights.HF_NAMES).values()]
  noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
  weight_map, largest = {}, 0
  for number, start in enumerate(range(0, len(planned), 5)):
    tensors = {name: np.resize(noise, shape) for name, shape in planned[start:start + 5]}
    largest = max(largest, *(tensor.nbytes for tensor in tensors.values()))
    safetensors.numpy.save_file(tensors, folder / f"model-{number:05d}.safetensors")
    weight_map |= dict.fromkeys(tensors, f"model-{number:05d}.safetensors")
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return largest


@pytest.mark.slow
def test_the_host_holds_three_of_the_largest_tensor_at_most(tmp_path):
  """Fake CPU devices hold their shards in the host's memory too: what they hold is subtracted from the peak.

  So is the peak of a process that only imports the package and makes the mesh.
  """
  largest = write_llama2_7b_of(3, tmp_path / "seven")
  idle, loading = measure(), measure(tmp_path / "seven")
  extra = loading["peak"] - loading["placed"] - idle["peak"]
  print({name: f"{size / 2**20:,.0f} MiB" for name, size in (
      ("peak", loading["peak"]), ("placed", loading["placed"]), ("idle", idle["peak"]), ("extra", extra),
      ("largest", largest))})
  assert largest == 32000 * 4096 * 2 and loading["placed"] > 1.7e9 and idle["placed"] == 0
  assert 0 < extra < 3 * largest + 100 * 2**20  # The whole model would be 1.7 GB.
