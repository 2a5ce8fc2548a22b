"""Several processes on one machine, over CPU collectives: they train, save and stop as one does."""

import dataclasses
import functools
import http.server
import os
import resource
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
from xla_flags import CHEAP

from saess_jax import checkpoint, cluster, train
from saess_jax.config import MeshConfig, RolloutConfig

# One process adds up a batch's rows in one sum, several add up parts: float32 rounding, grown over the steps by Adam,
# which divides by the gradient's size.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "rows.csv"
  path.write_text("prompt,response,label\n" + "".join(
      f"{'bad' if i % 2 else 'good'} request {i},answer {i},{i % 2}\n" for i in range(64)))
  return path


def config_of(data, **changes):
  return small_config(data, rollouts=RolloutConfig(tokens=6, batch_size=16, max_prompts=16), **changes)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
  """What one of the processes compiled the later ones read."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    yield


def launch(config, workdir, count, envs=({},), file_bytes=(), cwd=ROOT):
  """`count` processes of train.py; `envs` are added to their environments in turn. The first may write files of
  `file_bytes[0]` at most, and so on.
  """
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
    env = os.environ | {"XLA_FLAGS": CHEAP, "JAX_PLATFORMS": "cpu"}
    if count > 1:
      env |= {
          "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count),
          "JAX_PROCESS_ID": str(index)}
    runs.append(subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--config", file, "--workdir", workdir], cwd=cwd,
        env=env | envs[index % len(envs)], stdout=(workdir.parent / f"{workdir.name}.{index}.log").open("w"),
        preexec_fn=functools.partial(
            resource.setrlimit, resource.RLIMIT_FSIZE, (file_bytes[index],) * 2) if file_bytes else None,
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


@pytest.mark.slow  # Four starts of a process on two cores.
def test_four_processes_train_as_one(alone, four):
  expected, found = losses(alone), losses(four)
  assert found.keys() == expected.keys() and {step for _, step in found} == {1, 2, 3, 4, 5, 6}
  for key, value in expected.items():
    assert found[key] == pytest.approx(value, abs=TOLERANCE), key
  assert (four / "rollouts.jsonl").read_text() == (alone / "rollouts.jsonl").read_text()
  assert len(list((four / "tensorboard").iterdir())) == 1  # The first process's.


@pytest.mark.slow
def test_processes_that_share_rows_train_as_one(alone, data, tmp_path):
  """The tensor axis goes over both: each reads all rows."""
  config = config_of(data, mesh=MeshConfig(1, 1, 2))
  codes, output = finish(launch(config, tmp_path / "run", 2), tmp_path / "run")
  assert codes == [0, 0], "\n\n".join(text[-2000:] for text in output)
  expected, found = losses(alone), losses(tmp_path / "run")
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    assert found[key] == pytest.approx(value, abs=TOLERANCE), key


@pytest.mark.slow
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


@pytest.mark.slow  # Three starts of two processes.
def test_two_processes_stop_at_the_same_step_and_resume_bitwise(data, tmp_path):
  config = config_of(data, epochs=100, max_steps=30, eval_every=0, save_every=1000)
  workdir = tmp_path / "run"
  runs = launch(config, workdir, 2)
  deadline = time.time() + 120
  while "train:   3%" not in (tmp_path / "run.0.log").read_text() and time.time() < deadline:
    time.sleep(0.05)
  runs[1].send_signal(signal.SIGTERM)  # Not the first, which writes.
  codes, output = finish(runs, workdir)
  assert codes == [0, 0], output
  (stopped,) = checkpoint.Saved(workdir).steps()
  assert 0 < stopped < 30
  assert all(f"Stopped: saved step {stopped};" in text for text in output)
  codes, output = finish(launch(config, workdir, 2), workdir)
  assert codes == [0, 0] and f"Resuming at step {stopped}." in output[0]

  undisturbed = tmp_path / "undisturbed"
  assert finish(launch(config, undisturbed, 2), undisturbed)[0] == [0, 0]
  assert losses(workdir) == losses(undisturbed)


@pytest.mark.slow
def test_a_file_that_only_one_process_reads_is_damaged(data, tmp_path):
  """Both fall back to the step before, and end as if nothing had been."""
  workdir, harmed = tmp_path / "run", tmp_path / "harmed"
  assert finish(launch(config_of(data), workdir, 2), workdir)[0] == [0, 0]
  shutil.copytree(workdir, harmed)
  arrays = (harmed / "checkpoints" / "6" / "state" / "ocdbt.process_1" / "d").iterdir()
  os.truncate(max(arrays, key=lambda path: path.stat().st_size), 0)
  codes, output = finish(launch(config_of(data), harmed, 2), harmed)
  assert codes == [0, 0], output
  assert "Process 1 of 2 failed while reading" in output[0] and "going on from step 3." in output[0]
  assert losses(harmed) == losses(workdir)
  assert (harmed / "checkpoints" / "6.damaged").exists()


@pytest.mark.slow  # Two minutes, most of them until the first process is told.
def test_one_process_that_cannot_write_its_part_ends_all(data, tmp_path):
  """Orbax alone would let both wait for each other for twenty minutes."""
  workdir = tmp_path / "run"
  codes, output = finish(launch(config_of(data), workdir, 2, file_bytes=(resource.RLIM_INFINITY, 2**16)), workdir)
  assert codes[0] and codes[1] == 1
  assert "SaveFailed: Checkpoint 3 could not be written" in output[1] and "File too large" in output[1]
  assert "another task died" in output[0]
  codes, output = finish(launch(config_of(data), workdir, 2), workdir)
  assert codes == [0, 0], output


def script(code, envs):
  """Runs `code` in a process for each of `envs`; exit codes and outputs. The cluster is started before it."""
  runs = [
      subprocess.Popen(
          [sys.executable, "-c", f"from saess_jax import cluster\ncluster.start()\nimport jax\n{code}"], cwd=ROOT,
          env=os.environ | {"XLA_FLAGS": CHEAP, "JAX_PLATFORMS": "cpu"} | env, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT, text=True)
      for env in envs]
  try:
    output = [run.communicate(timeout=100)[0] for run in runs]
  finally:
    for run in runs:
      run.kill()
  return [run.returncode for run in runs], output


def by_hand(count, port):
  return [{"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
          for i in range(count)]


def slurm(index, tasks):
  return {
      "SLURM_JOB_ID": "4242", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
      "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}


@pytest.mark.parametrize("envs, count", [
    ([slurm(0, 2), slurm(1, 2)], 2),
    ([slurm(0, 1)], 1),
    ([{"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}], 1),  # sbatch, no srun.
    ([{}], 1),
])
def test_a_slurm_step_of_several_tasks_starts_together_and_a_single_machine_starts_nothing(envs, count):
  codes, output = script("print(jax.process_count(), jax.distributed.is_initialized())", envs)
  assert codes == [0] * len(envs), output
  assert all(text.splitlines()[-1] == f"{count} {count > 1}" for text in output)


def test_what_goes_wrong_on_one_process_ends_all():
  code = (
      "with cluster.together('reading the data') as first:\n"
      "  if jax.process_index() == 1:\n"
      "    raise FileNotFoundError('rows.csv is not here')\n")
  began = time.time()
  codes, output = script(code, by_hand(3, 47811))
  assert codes == [1, 1, 1] and time.time() - began < 90
  assert "FileNotFoundError: rows.csv is not here" in output[1].splitlines()[-1]
  for text in (output[0], output[2]):
    assert "PeerFailed: Process 1 of 3 failed while reading the data: FileNotFoundError: rows.csv" in text


def test_a_block_within_another_is_left_with_it():
  """Else the first process would take what the second says of the outer block for an answer about the inner one."""
  code = (
      "with cluster.together('reading'):\n"
      "  if jax.process_index() == 1:\n"
      "    raise FileNotFoundError('rows.csv is not here')\n"
      "  with cluster.together('looking') as first:\n"
      "    assert first\n"
      "  print('on with it')\n")
  codes, output = script(code, by_hand(2, 47815))
  assert codes == [1, 1] and "on with it" in output[0]
  assert "PeerFailed: Process 1 of 2 failed while reading: FileNotFoundError: rows.csv is not here" in output[0]


def test_processes_that_see_different_things_stop():
  code = "cluster.agree('names', 'same')\ncluster.agree('steps in here', ('3, 6', '')[jax.process_index()])\n"
  codes, output = script(code, by_hand(2, 47813))
  assert codes == [1, 1]
  for text in output:
    assert "different steps in here: process 0 sees 3, 6; process 1 sees none. Wait until" in text.splitlines()[-1]


def test_the_first_process_goes_first():
  code = (
      "import time\n"
      "def work():\n"
      "  began = time.time()\n"
      "  if jax.process_index() == 0: time.sleep(2)\n"
      "  return began, time.time()\n"
      "print(*cluster.first_then_rest('work', work))\n")
  codes, output = script(code, by_hand(2, 47812))
  assert codes == [0, 0], output
  (_, ended), (began, _) = (map(float, text.splitlines()[-1].split()) for text in output)
  assert began >= ended


@pytest.mark.parametrize("sizes, rows", [
    ((1, 1, 2), [[0, 1, 2, 3, 4, 5, 6, 7]] * 2), ((1, 2, 1), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ((1, 2, 2), [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2)])
def test_each_process_reads_the_rows_that_its_devices_hold(sizes, rows):
  code = (
      "import numpy as np\n"
      "from saess_jax import config, sharding\n"
      f"mesh = sharding.make_mesh(config.MeshConfig(*{sizes}))\n"
      "rows = sharding.rows_here(mesh, 8)\n"
      "batch = jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), np.float32(rows), (8,))\n"
      "one = jax.jit(lambda x, wishes: ((x * 2.0 ** jax.numpy.arange(8)).sum(), wishes.any()))\n"
      "wishes = sharding.one_a_device(mesh, jax.process_index() == jax.process_count() - 1)\n"
      "print(rows, *map(float, one(batch, wishes)))\n")
  codes, output = script(code, by_hand(len(rows), 47820 + sum(sizes)))
  assert codes == [0] * len(rows), output
  total = sum(i * 2.0 ** i for i in range(8))  # In this order, and the same everywhere.
  assert [text.splitlines()[-1] for text in output] == [f"{mine} {total} 1.0" for mine in rows]


def test_devices_of_two_processes_may_stand_in_any_order():
  """As on a TPU, where neighbours in a ring may belong to different hosts."""
  code = (
      "import numpy as np\n"
      "from saess_jax import sharding\n"
      "mesh = jax.sharding.Mesh(np.asarray(jax.devices())[[2, 0, 3, 1]].reshape(1, 4, 1), sharding.AXES)\n"
      "rows = sharding.rows_here(mesh, 8)\n"
      "here, place = np.float32([rows, rows]).T, sharding.batch_sharding(mesh)\n"
      "batch = jax.make_array_from_process_local_data(place, here, (8, 2))\n"
      "one = jax.jit(lambda x, wishes: ((x[:, 1] * 2.0 ** jax.numpy.arange(8)).sum(), wishes.sum()))\n"
      "print(rows, *map(float, one(batch, sharding.one_a_device(mesh, jax.process_index() == 1))))\n")
  devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  codes, output = script(code, [env | devices for env in by_hand(2, 47827)])
  assert codes == [0, 0], output
  total = sum(i * 2.0 ** i for i in range(8))
  assert [text.splitlines()[-1] for text in output] == [f"{mine} {total} 2.0" for mine in ([2, 3, 6, 7], [0, 1, 4, 5])]


@pytest.mark.parametrize("env", [
    {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
    {"JAX_COORDINATOR_ADDRESS": "host:1"},
    {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
    {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
    {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
])
def test_half_a_coordinator_is_refused(env, monkeypatch):
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS='.*expected all three or none"):
    cluster.start()


@pytest.mark.parametrize("env, served, hosts", [
    ({"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, None, 4),  # GKE.
    ({"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, None, 4),
    ({"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "a"}, None, 1),
    ({}, "10.0.0.1,10.0.0.2", 2),  # GCE.
    ({}, "10.0.0.1", 1),
    ({"TPU_SKIP_MDS_QUERY": "1"}, "10.0.0.1,10.0.0.2", 1),  # No chips, says jax.
    ({"JAX_PLATFORMS": "cpu"}, "10.0.0.1,10.0.0.2", 1),
])
def test_hosts_of_a_tpu(env, served, hosts, monkeypatch):
  """Read from the variables of GKE, or from a metadata server as on GCE."""
  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      found = served and self.path.endswith("/attributes/worker-network-endpoints")
      self.send_response(200 if found and self.headers["Metadata-Flavor"] == "Google" else 404)
      self.end_headers()
      self.wfile.write((served or "").encode())

    def log_message(self, *_):
      pass

  server = http.server.HTTPServer(("localhost", 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  platforms = cluster.jax.config.jax_platforms
  cluster.jax.config.update("jax_platforms", env.get("JAX_PLATFORMS", "tpu,cpu"))
  try:
    assert cluster._tpu_hosts() == hosts
  finally:
    cluster.jax.config.update("jax_platforms", platforms)
    server.shutdown()


@pytest.mark.slow
def test_a_run_to_begin_from_that_only_one_process_reads_stops_both(data, tmp_path):
  first = config_of(data, max_steps=1, save_every=1)
  assert finish(launch(first, tmp_path / "before", 1), tmp_path / "before")[0] == [0]
  shutil.copytree(tmp_path / "before", tmp_path / "harmed")
  arrays = (tmp_path / "harmed" / "checkpoints" / "1" / "state" / "ocdbt.process_0" / "d").iterdir()
  os.truncate(max(arrays, key=lambda path: path.stat().st_size), 0)
  envs, began = by_hand(2, 47817), time.time()
  (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
  (tmp_path / "a" / "start").symlink_to(tmp_path / "before")
  (tmp_path / "b" / "start").symlink_to(tmp_path / "harmed")
  config = dataclasses.replace(first, model="", model_overrides={}, weights="start", seed=1)
  runs = [launch(config, tmp_path / f"run{i}", 1, [env], cwd=tmp_path / folder)[0]
          for i, (env, folder) in enumerate(zip(envs, "ab"))]
  (codes_a, output_a), (codes_b, output_b) = (finish([run], tmp_path / f"run{i}") for i, run in enumerate(runs))
  assert (codes_a, codes_b) == ([1], [2]) and time.time() - began < 100
  assert "PeerFailed: Process 1 of 2 failed while reading and checking weights: Damaged" in output_a[0]
  assert "Load another step" in output_b[0] or "start/checkpoints/1" in output_b[0]
  assert not (tmp_path / "run0").exists()


@pytest.mark.slow
def test_processes_with_different_configs_or_folders_stop_before_work(data, tmp_path):
  def failed(*workdirs):
    runs = [launch(config_of(data, seed=seed), tmp_path / workdir, 1, [env])[0]
            for (workdir, seed), env in zip(workdirs, by_hand(2, 47813))]
    codes, output = zip(*(finish([run], tmp_path / workdir) for run, (workdir, _) in zip(runs, workdirs)))
    assert codes == ([1], [2])  # A line for the user there, a traceback here.
    assert "PeerFailed: Process 1 of 2 failed while claiming the workdir: ValueError" in output[0][0]
    return output[1][0]

  said = failed(("mine", 0), ("other", 0))
  assert "is not there on process 1; give a --workdir on a file system that all hosts share" in said
  assert not (tmp_path / "other").exists()
  (tmp_path / "link").symlink_to(tmp_path / "shared")
  said = failed(("shared", 0), ("link", 1))
  assert "holds another run: seed is 1 now and 0 there" in said
  assert not (tmp_path / "shared" / "data").exists()
