"""Several processes on one machine, over CPU collectives: they train, save and stop as one does."""

import dataclasses
import functools
import http.server
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_train import ONE, ROOT, scalars, small_config

from saess_jax import checkpoint, cluster, train
from saess_jax.config import MeshConfig, OptimizerConfig, RolloutConfig

# One process adds up a batch's rows in one sum, several add up parts: float32 rounding, grown over the steps by Adam,
# which divides by the gradient's size. Measured: 3e-6 for losses near 5.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "rows.csv"
  path.write_text("prompt,response,label\n" + "".join(
      f"{'bad' if i % 2 else 'good'} request {i},answer {i},{i % 2}\n" for i in range(64)))
  return path


def config_of(data, **changes):
  return small_config(data, rollouts=RolloutConfig(tokens=6, batch_size=16, max_prompts=16), **changes)


def launch(config, workdir, count, envs=({},)):
  """`count` processes of train.py; `envs` are added to their environments in turn."""
  file = workdir.parent / f"{workdir.name}.py"
  file.write_text(
      "from saess_jax import config\n"
      f"def get_config():\n  return config.to_config_dict(config.from_config_dict(config.TrainConfig, "
      f"{dataclasses.asdict(config)!r}))\n")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  runs = []
  for index in range(count):
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    if count > 1:
      env |= {
          "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count),
          "JAX_PROCESS_ID": str(index)}
    runs.append(subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--config", file, "--workdir", workdir], cwd=ROOT,
        env=env | envs[index % len(envs)], stdout=(workdir.parent / f"{workdir.name}.{index}.log").open("w"),
        stderr=subprocess.STDOUT))
  return runs


def finish(runs, workdir, timeout=240):
  """Exit codes and outputs."""
  deadline = time.time() + timeout
  try:
    codes = [run.wait(max(deadline - time.time(), 1)) for run in runs]
  finally:
    for run in runs:
      run.kill()
  return codes, [(workdir.parent / f"{workdir.name}.{index}.log").read_text() for index in range(len(runs))]


def losses(workdir):
  return {key: value for key, value in scalars(workdir).items() if "loss" in key[0]}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
  """What one process with one device gives."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  codes, output = finish(launch(config_of(data), workdir, 1), workdir)
  assert codes == [0], output[0][-3000:]
  return workdir


@pytest.fixture(scope="module")
def four(data, tmp_path_factory):
  """A run of four processes, parameters split over all of them."""
  workdir = tmp_path_factory.mktemp("four") / "run"
  codes, output = finish(launch(config_of(data), workdir, 4), workdir)
  assert codes == [0] * 4, "\n\n".join(text[-2000:] for text in output)
  return workdir


def test_four_processes_train_as_one(alone, four):
  expected, found = losses(alone), losses(four)
  assert found.keys() == expected.keys() and {step for _, step in found} == {1, 2, 3, 4, 5, 6}
  for key, value in expected.items():
    assert found[key] == pytest.approx(value, abs=TOLERANCE), key
  assert (four / "rollouts.jsonl").read_text() == (alone / "rollouts.jsonl").read_text()
  assert len(list((four / "tensorboard").iterdir())) == 1  # The first process's.


@pytest.mark.parametrize("mesh", [ONE, MeshConfig(1, 2, 1), MeshConfig(2, 2, 2)])
def test_what_four_processes_saved_is_restored_by_fewer_and_more_devices(data, four, tmp_path, mesh, monkeypatch):
  """Bit by bit: the checkpoint holds a checksum of every array, which is compared with what was restored."""
  shutil.copytree(four, tmp_path / "run")
  config = config_of(data)
  devices = np.prod(dataclasses.astuple(mesh))
  monkeypatch.setattr(train.sharding, "make_mesh", functools.partial(
      train.sharding.make_mesh, devices=train.jax.devices()[:devices]))
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  shutil.rmtree(tmp_path / "run" / "tensorboard")
  config = dataclasses.replace(config, mesh=mesh)
  (tmp_path / "run" / "config.json").unlink()  # Another mesh is another config.
  train.train_and_evaluate(config, tmp_path / "run")
  expected, found = losses(four), losses(tmp_path / "run")
  assert {step for _, step in found} == {4, 5, 6}
  for key, value in found.items():
    assert value == pytest.approx(expected[key], abs=TOLERANCE), key


def test_two_processes_stop_at_the_same_step_and_resume_bitwise(data, tmp_path):
  config = config_of(data, epochs=100, max_steps=100, eval_every=0, save_every=1000)
  workdir = tmp_path / "run"
  runs = launch(config, workdir, 2)
  deadline = time.time() + 120
  while "train:   1%" not in (tmp_path / "run.0.log").read_text() and time.time() < deadline:
    time.sleep(0.05)
  runs[1].send_signal(signal.SIGTERM)  # Not the first, which writes.
  codes, output = finish(runs, workdir)
  assert codes == [0, 0], output
  (stopped,) = checkpoint.Checkpoints(workdir).steps()
  assert 0 < stopped < 100
  assert all(f"SIGTERM: saved step {stopped}" in text for text in output)
  codes, output = finish(launch(config, workdir, 2), workdir)
  assert codes == [0, 0] and f"Resuming at step {stopped}." in output[0]

  undisturbed = tmp_path / "undisturbed"
  assert finish(launch(config, undisturbed, 2), undisturbed)[0] == [0, 0]
  assert losses(workdir) == losses(undisturbed)
