"""Damaged checkpoints, changed data, a full disk: the run goes on as if nothing had been, or says what is wrong.

`tests/chaos.py` does the same to whole processes, with kills at random moments.
"""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train import ROOT, scalars, small_config

from saess_jax import checkpoint, checksums, damage, events, pretrained, runs, train
from saess_jax.config import MeshConfig, RolloutConfig, TrainConfig
from saess_jax.data import rollouts

# Of a damaged checkpoint orbax leaves reads behind that it never awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "rows.csv"
  path.write_text("prompt,response,label\n" + "".join(
      f"{'bad' if i % 2 else 'good'} request {i},answer {i},{i % 2}\n" for i in range(64)))
  return path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  """An undisturbed run of 6 steps with checkpoints 3 and 6, on a 2 x 2 x 2 mesh."""
  workdir = tmp_path_factory.mktemp("run")
  config = small_config(data, rollouts=RolloutConfig(enabled=False), mesh=MeshConfig(2, 2, 2))
  return config, workdir, train.train_and_evaluate(config, workdir)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_saved_again(finished, tmp_path, capsys):
  """The losses of the resumed run are bitwise those of the undisturbed one."""
  config, workdir, validated = finished
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "tensorboard")
  (tmp_path / "run" / "checkpoints" / "6" / "state" / "_METADATA").unlink()
  assert train.train_and_evaluate(config, tmp_path / "run") == validated
  said = capsys.readouterr()
  assert "checkpoints/6 is damaged" in said.err and "kept as 6.damaged; going on from step 3." in said.err
  assert "Resuming at step 3." in said.out
  resumed, whole = scalars(tmp_path / "run"), scalars(workdir)
  assert {step for tag, step in resumed if tag == "train/loss"} == {4, 5, 6}
  assert all(resumed[key] == whole[key] for key in resumed)
  assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "6", "6.damaged"]
  # The new checkpoint 6 is whole.
  manager = checkpoint.Checkpoints(tmp_path / "run")
  assert manager.restore_newest(abstract(manager))[0] == 6
  manager.close()


def abstract(manager):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      manager._stored(3))


def largest(step):
  return max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(step):
  """One bit, of whatever array it is."""
  content = bytearray(largest(step).read_bytes())
  content[len(content) // 2] ^= 1
  largest(step).write_bytes(bytes(content))


def riddle(step):
  """A bit in every kilobyte of every file of arrays, the weights' among them."""
  for path in (step / "state").rglob("d/*"):
    content = bytearray(path.read_bytes())
    for at in range(1023, len(content), 1024):
      content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [
    lambda step: os.truncate(largest(step), largest(step).stat().st_size // 2),
    flip,  # Storage does not see it: the checksums do.
    lambda step: shutil.rmtree(step / "state"),
    lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    lambda step: os.truncate(step / "iterator" / "metadata", 3),
    lambda step: shutil.rmtree(step / "checksums"),
    lambda step: (shutil.rmtree(step), step.mkdir()),
], ids=["cut", "flipped", "no arrays", "no manifest", "cut iterator", "no checksums", "empty"])
def test_every_damage_is_seen(finished, tmp_path, capsys, harm):
  shutil.copytree(finished[1] / "checkpoints", tmp_path / "checkpoints")
  harm(tmp_path / "checkpoints" / "6")
  manager = checkpoint.Checkpoints(tmp_path)
  step, state, iterator = manager.restore_newest(abstract(manager))
  assert (step, int(state["step"]), iterator) == (3, 3, {"next_index": 3} | iterator)
  said = capsys.readouterr().err
  assert said.startswith(str(tmp_path / "checkpoints" / "6 is damaged (")) and len(said) < 600, said
  assert manager.steps() == [3] and manager.latest_step() == manager.best_step() == 3
  manager.close()


def test_a_workdir_s_own_folder_is_no_run_by_an_empty_name(finished, monkeypatch):
  monkeypatch.chdir(finished[1])
  assert runs.is_run(".") and not runs.is_run("")


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_memory_that_runs_out_is_no_damage(error, tmp_path):
  with pytest.raises(type(error)), damage.named(tmp_path):
    raise error


@pytest.mark.parametrize("harm", [riddle, lambda step: shutil.rmtree(step / "state")])
def test_research_is_told_which_steps_are_left(finished, tmp_path, harm):
  shutil.copytree(finished[1], tmp_path / "run")
  assert pretrained.load_for_research(tmp_path / "run", step=6)
  harm(tmp_path / "run" / "checkpoints" / "6")
  with pytest.raises(damage.Damaged, match="checkpoints/6 is damaged .*Load another step: 3"):
    pretrained.load_for_research(tmp_path / "run", step=6)
  assert pretrained.load_for_research(tmp_path / "run", step=3)


def test_bad_metrics_cost_a_step_its_place_as_best_only(finished, tmp_path, capsys):
  shutil.copytree(finished[1] / "checkpoints", tmp_path / "checkpoints")
  os.truncate(tmp_path / "checkpoints" / "6" / "metrics" / "metrics", 0)
  manager = checkpoint.Checkpoints(tmp_path)
  assert manager.restore_newest(abstract(manager))[0] == 6 and manager.best_step() == 3
  assert "no longer counts as the best one" in capsys.readouterr().err
  manager.close()


def test_who_reads_a_run_touches_nothing(finished, tmp_path):
  """Neither what is being written there, nor what only the run itself may mend."""
  folder = shutil.copytree(finished[1] / "checkpoints", tmp_path / "checkpoints")
  os.truncate(folder / "6" / "metrics" / "metrics", 0)
  shutil.copytree(folder / "6", folder / f"9{ocp.utils.TMP_DIR_SUFFIX}")
  seen = lambda: [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))]
  before = seen()
  saved = checkpoint.Saved(tmp_path)
  assert saved.steps() == [3, 6] and saved.latest_step() == 6 and saved.best_step() == 3
  assert saved.restore_trainable(6) and before == seen()
  nothing = checkpoint.Saved(tmp_path / "elsewhere")
  assert nothing.steps() == [] and nothing.best_step() is None and not (tmp_path / "elsewhere").exists()


def test_what_a_killed_save_left_goes_when_the_run_goes_on(finished, tmp_path, capsys):
  shutil.copytree(finished[1] / "checkpoints", tmp_path / "checkpoints")
  partial = tmp_path / "checkpoints" / f"9{ocp.utils.TMP_DIR_SUFFIX}"
  shutil.copytree(tmp_path / "checkpoints" / "6", partial)
  checkpoint.Checkpoints(tmp_path).close()
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
  assert f"{partial} was left by a process that did not finish it: deleted." in capsys.readouterr().err


@pytest.mark.parametrize("validated", [
    [{"cls_accuracy": value, "lm_loss": value} for value in (0.9, 0.5, 0.7)],
    [{"dpo_accuracy": value} for value in (0.9, 0.5, 0.7)], [{"lm_loss": value} for value in (1.0, 3.0, 2.0)]])
def test_the_best_step_stays_beside_the_last(tmp_path, validated):
  manager = checkpoint.Checkpoints(tmp_path, keep_last=1)
  for step, metrics in enumerate(validated, start=1):
    manager.save(step, {"w": jnp.ones(3)}, {"next_index": step}, TrainConfig(), metrics)
  manager.close()
  assert manager.steps() == [1, 3] and checkpoint.Saved(tmp_path).best_step() == 1


def test_no_whole_checkpoint_is_an_error_and_nothing_is_renamed(finished, tmp_path):
  config, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  folder = tmp_path / "run" / "checkpoints"
  for step in ("3", "6"):
    (folder / step / "state" / "_METADATA").unlink()
  before = sorted(folder.rglob("*"))
  with pytest.raises(damage.Damaged, match=f"No checkpoint in {folder} can be read.*/6 is damaged.*/3 is damaged"):
    train.train_and_evaluate(config, tmp_path / "run")
  assert before == sorted(folder.rglob("*"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_checksums_see_any_element_and_no_mesh(dtype):
  x = (jnp.arange(64 * 6) % 100).reshape(8, 8, 6).astype(dtype)
  whole = checksums.of({"x": x})
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
  spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b")))
  assert checksums.of({"x": spread}) == whole
  for index in [(0, 0, 0), (3, 2, 1), (7, 7, 5)]:
    assert checksums.of({"x": x.at[index].add(1)}) != whole
  assert checksums.of({"x": x[::-1]}) != whole


@pytest.mark.parametrize("change, message", [
    (("answer 8,", "other answer,"), r"train had \d+ rows and has \d+ others"),
    (("good request 0,answer 0,0\n", ""), r"had \d+ rows and has \d+[.;]"),
])
def test_changed_data_is_refused_untouched(finished, data, tmp_path, change, message):
  config, workdir, validated = finished
  shutil.copytree(workdir, tmp_path / "run")
  before, content = sorted((p, p.stat().st_mtime) for p in (tmp_path / "run").rglob("*")), data.read_text()
  data.write_text(content.replace(*change))
  try:
    with pytest.raises(ValueError, match=f"The data of .*rows.csv changed since the run in .*{message}"):
      train.train_and_evaluate(config, tmp_path / "run")
  finally:
    data.write_text(content)
  assert before == sorted((p, p.stat().st_mtime) for p in (tmp_path / "run").rglob("*"))


FULL = """
import jax.numpy as jnp, sys
from saess_jax import checkpoint, checksums, events
from saess_jax.config import TrainConfig
import pathlib
folder = pathlib.Path(sys.argv[1])
manager, log = checkpoint.Checkpoints(folder, keep_last=9), events.Events(folder / "tensorboard", 0)
noise = __import__("numpy").random.default_rng(0)
try:
  for step in range(1, 9):
    log.write({"loss": 1.0}, step)
    state = {"w": jnp.asarray(noise.random(200_000), jnp.float32)}
    manager.save(step, state, {"next_index": step}, TrainConfig(), None, log)
  manager.close()
except checkpoint.SaveFailed as error:
  print("SAID", error)
print("WHOLE", checkpoint.Saved(folder).steps())
"""


def test_a_full_disk_is_one_clear_error_and_the_last_good_checkpoint_stays(tmp_path):
  command = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path}"
  if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
    pytest.skip("A small tmpfs cannot be mounted here.")
  run = subprocess.run(["unshare", "-rm", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100)
  said = next(line for line in run.stdout.splitlines() if line.startswith("SAID"))
  whole = json.loads(run.stdout.rpartition("WHOLE")[2])
  assert whole and f"Checkpoint {whole[-1] + 1} could not be written to {tmp_path}/checkpoints" in said
  assert f"of 4 MiB are free; the last good one is step {whole[-1]}." in said


def test_events_are_on_the_disk_once_flushed_and_old_steps_stay(tmp_path):
  first = events.Events(tmp_path / "tensorboard", 0)
  for step in (1, 2, 3):
    first.write({"train/loss": step / 2}, step)
  first.flush()  # And never closed: the process is killed here.
  second = events.Events(tmp_path / "tensorboard", 2)
  second.write({"train/loss": 1.5}, 3)
  second.close()
  assert scalars(tmp_path) == {("train/loss", 1): 0.5, ("train/loss", 2): 1.0, ("train/loss", 3): 1.5}


def test_interrupted_rollouts_end_as_undisturbed_ones(tmp_path):
  """`sample` gives what depends on a prompt's place, as the real one does."""
  prompts = [f"p{i}" for i in range(300)]
  sample = lambda chunk: [[i, len(chunk)] for i, _ in enumerate(chunk)]
  rollouts.complete(tmp_path / "whole.jsonl", prompts, sample)
  whole = (tmp_path / "whole.jsonl").read_bytes()
  assert len(rollouts.read(tmp_path / "whole.jsonl")) == 300
  for cut in (0, 1, 5000, len(whole) // 2, len(whole) - 1):
    (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
    rollouts.complete(tmp_path / "cut.jsonl", prompts, sample)
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
