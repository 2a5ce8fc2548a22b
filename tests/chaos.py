"""Harms a tiny run in every way we know, lets it go on, and compares its losses with those of an undisturbed one.

  python tests/chaos.py --seed 0          (make chaos: the same)

Prints a table in Markdown. A kill is SIGKILL at a random moment of the part of the run that it is aimed at; one run
takes them all, each after the restart that followed the one before. "Losses equal": every event that any of the run's
processes wrote, of all steps, bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tensorboardX.proto import event_pb2

ROOT = pathlib.Path(__file__).parent.parent
ROWS = 480
LONG, SHORT = 900, 40  # Steps of the run that is killed, and of the others.
CONFIG = """
from saess_jax.config import *

def get_config():
  return to_config_dict(TrainConfig(
      model="tiny", model_overrides={{"vocab_size": 260}},
      data=DataConfig(source={source!r}, max_length=128, max_response=12, buckets=(128,), batch_size=4),
      probes=ProbeConfig(per_sequence=2), rollouts=RolloutConfig(tokens=40, batch_size=16),
      optimizer=OptimizerConfig(learning_rate=1e-3), epochs=20, max_steps={steps}, eval_every=20, save_every=10))
"""


class Chaos:
  """A folder with data, configs and undisturbed runs, and what was found so far."""

  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder, self.rng, self.rows = folder, random.Random(seed), []
    self.data = folder / "rows.csv"
    self.data.write_text("prompt,response,label\n" + "".join(
        f"{'bad' if i % 2 else 'good'} request {i},answer {i},{i % 2}\n" for i in range(ROWS)))
    for steps in (LONG, SHORT):
      (folder / f"{steps}.py").write_text(CONFIG.format(source=str(self.data), steps=steps))
    # The restarts would spend most of their time compiling the same programs.
    self.env = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

  def command(self, name: str, steps: int) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--config", str(self.folder / f"{steps}.py"), "--workdir",
            str(self.folder / name)]

  @contextlib.contextmanager
  def running(self, name: str, steps: int):
    """A started run: the process, and what it has said so far as a function."""
    log = self.folder / f"{name}.log"
    with log.open("w") as file:
      run = subprocess.Popen(self.command(name, steps), cwd=ROOT, env=self.env, stdout=file, stderr=file)
    try:
      yield run, log.read_text
    finally:
      run.kill()
      run.wait()

  def finish(self, name: str, steps: int) -> tuple[int, str]:
    with self.running(name, steps) as (run, said):
      run.wait(timeout=300)
    return run.returncode, said()

  def equal(self, name: str, steps: int) -> str:
    """Whether the run wrote the undisturbed one's events, all and no others."""
    found, expected = (read_events(self.folder / of / "tensorboard") for of in (name, f"undisturbed_{steps}"))
    different = sorted({step for tag, step in found if found[tag, step] != expected.get((tag, step))})
    missing = sorted({step for tag, step in expected.keys() - found.keys()})
    if different or missing:
      return f"**no** (differ: {different[:3]}, missing: {missing[:3]})"
    return "yes"

  def report(self, fault: str, moments: str, happened: str, equal: str) -> None:
    self.rows.append((fault, moments, happened, equal))
    print(f"| {fault} | {moments} | {happened} | {equal} |", flush=True)


def read_events(folder: pathlib.Path) -> dict[tuple[str, int], set[float]]:
  """{(tag, step): values} of all files in `folder`; a last record that was cut short is left out."""
  found: dict[tuple[str, int], set[float]] = {}
  for file in folder.iterdir():
    blob, at = file.read_bytes(), 0
    while at + 12 <= len(blob):
      (size,) = struct.unpack("<Q", blob[at : at + 8])
      if at + 16 + size > len(blob):
        break
      event = event_pb2.Event.FromString(blob[at + 12 : at + 12 + size])
      at += 16 + size
      for value in event.summary.value:
        found.setdefault((value.tag, event.step), set()).add(value.simple_value)
  return found


def steps_in(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def is_saving(workdir: pathlib.Path) -> bool:
  return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def wait_for(run: subprocess.Popen, seen: Callable[[], bool]) -> bool:
  """Whether it was seen before the run ended."""
  while run.poll() is None:
    if seen():
      return True
    time.sleep(0.002)
  return False


def kills(chaos: Chaos, count: int) -> None:
  """One run, killed `count` times: in its start, the preparation of data, the rollouts, its steps and its saves."""
  name, workdir = "killed", chaos.folder / "killed"
  parts = ["data"] * 3 + ["start"] * 2 + ["rollouts"] * 3
  rest = count - len(parts)
  parts += chaos.rng.sample(["steps"] * (rest // 2) + ["save"] * (rest - rest // 2), rest)
  reached: dict[str, list[str]] = {}
  unfinished = lambda: set((workdir / "data").rglob("incomplete*"))
  sights = {  # What the kill waits for, and the longest it waits from there.
      "start": (lambda said, before: True, 8.0),
      "data": (lambda said, before: unfinished() - before, 0.05),
      "rollouts": (lambda said, before: "rollouts:" in said, 2.0),
      "steps": (lambda said, before: "loss=" in said, 2.0),
      "save": (lambda said, before: "loss=" in said and is_saving(workdir), 0.1)}
  for part in parts:
    before, (sight, window) = unfinished(), sights[part]
    with chaos.running(name, LONG) as (run, said):
      while run.poll() is None and not (sight(said(), before) or (part != "save" and "loss=" in said())):
        time.sleep(0.002)
      time.sleep(chaos.rng.uniform(0, window))
      if run.poll() is not None:
        raise SystemExit(f"The run ended before a kill in {part}:\n{said()[-2000:]}")
      run.kill()
      if "loss=" in said() and part != "save":
        part = "steps"  # What was aimed at had passed.
    saving = " in a save" if is_saving(workdir) else ""
    lines = workdir / "rollouts.jsonl"
    found = {"rollouts": f"{lines.read_bytes().count(10) if lines.exists() else 0} rollouts written"}
    where = f"step {max(steps_in(workdir), default=0)}{saving}"
    reached.setdefault(part, []).append(found.get(part, where))
  code, said = chaos.finish(name, LONG)
  equal = chaos.equal(name, LONG) if code == 0 else f"**no** (exit {code}: {said[-500:]})"
  names = {
      "start": "in the first 8 s of the process", "data": "while the data was prepared",
      "rollouts": "while rollouts were sampled", "steps": "in the steps", "save": "while a checkpoint was written"}
  for part, where in names.items():
    if part not in reached:  # On a fast machine what was aimed at may have passed each time.
      continue
    kept = {"steps", "save", "rollouts"} & {part} and f"; left behind: {', '.join(reached[part])}"
    chaos.report(f"kill -9 {where}", str(len(reached[part])), f"the next start went on{kept or ''}", equal)


def terminations(chaos: Chaos) -> None:
  for where, sight in (("in the steps", lambda _: True), ("while a checkpoint was written", is_saving)):
    workdir = chaos.folder / f"terminated {where}".replace(" ", "_")
    with chaos.running(workdir.name, SHORT) as (run, said):
      while run.poll() is None and not ("loss=" in said() and sight(workdir)):
        time.sleep(0.002)
      time.sleep(chaos.rng.uniform(0, 0.1))
      run.send_signal(signal.SIGTERM)
      run.wait(timeout=60)
    stopped, code = max(steps_in(workdir)), run.returncode
    final, _ = chaos.finish(workdir.name, SHORT)
    happened = f"saved step {stopped}, exit {code}; the next start went on from it"
    equal = "**no**" if code or final else chaos.equal(workdir.name, SHORT)
    chaos.report(f"SIGTERM {where}", "1", happened, equal)


def damages(chaos: Chaos) -> None:
  """The newest checkpoint of a run that stopped half way."""
  source = chaos.folder / "half"
  with chaos.running(source.name, SHORT) as (run, _):
    wait_for(run, lambda: len(steps_in(source)) > 1)
    run.kill()
  for path in (source / "checkpoints").glob("*tmp*"):
    shutil.rmtree(path)

  def arrays(step):
    return max((path for path in (step / "state").rglob("d/*")), key=lambda path: path.stat().st_size)

  def halve(step):
    os.truncate(arrays(step), arrays(step).stat().st_size // 2)

  def flip(step):
    content = bytearray(arrays(step).read_bytes())
    content[chaos.rng.randrange(len(content))] ^= 1 << chaos.rng.randrange(8)
    arrays(step).write_bytes(bytes(content))

  def all_of_them(step):
    for other in step.parent.iterdir():
      shutil.rmtree(other / "state")

  faults = {
      "the largest file of arrays cut to half": halve,
      "one bit of it flipped": flip,
      "a metadata file gone": lambda step: (step / "state" / "_METADATA").unlink(),
      "an empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
      "the metrics file empty": lambda step: os.truncate(step / "metrics" / "metrics", 0),
      "the arrays of all checkpoints gone": all_of_them,
  }
  for number, (fault, harm) in enumerate(faults.items()):
    workdir = chaos.folder / f"damaged_{number}"
    shutil.copytree(source, workdir)
    newest = max(steps_in(workdir))
    harm(workdir / "checkpoints" / str(newest))
    code, said = chaos.finish(workdir.name, SHORT)
    damage = [line for line in said.splitlines() if "damaged" in line and "Error" not in line.split("(")[0][:20]]
    if code:
      happened, equal = f"exit {code}: {_last_error(said, workdir)}", "–"
    else:
      resumed = said.partition("Resuming at step ")[2].partition(".")[0]
      happened = f"of step {newest}; {'said so, ' if damage else ''}went on from step {resumed}, exit 0"
      equal = chaos.equal(workdir.name, SHORT)
    chaos.report(f"newest checkpoint: {fault}", "1", happened, equal)


def changed_data(chaos: Chaos) -> None:
  workdir, before = chaos.folder / "changed", chaos.data.read_text()
  shutil.copytree(chaos.folder / "half", workdir)
  stamps = {path: path.stat().st_mtime for path in workdir.rglob("*")}
  chaos.data.write_text(before.replace("answer 8,", "another answer 8,"))
  code, said = chaos.finish(workdir.name, SHORT)
  untouched = stamps == {path: path.stat().st_mtime for path in workdir.rglob("*")}
  chaos.data.write_text(before)
  again, _ = chaos.finish(workdir.name, SHORT)
  chaos.report(
      "a row of the data file changed", "1",
      f"exit {code}: {_last_error(said, workdir)} Workdir {'untouched' if untouched else '**changed**'}; with the row "
      f"put back exit {again}", chaos.equal(workdir.name, SHORT) if not again else "**no**")


def full_disk(chaos: Chaos) -> None:
  """A workdir on a tmpfs that the first checkpoint fills, or a later one; then it grows, and the run goes on."""
  workdir = chaos.folder / "full"
  workdir.mkdir()
  script = chaos.folder / "full.sh"
  command = " ".join(chaos.command("full", SHORT))
  script.write_text(f"""
mount -t tmpfs -o size=SIZE tmpfs {workdir} || exit 99
{command}
echo "EXIT $?"
mount -o remount,size=64m {workdir}
{command}
echo "EXIT $?"
cp -r {workdir} {chaos.folder}/full_kept
""")
  for size in ("1m", "2m"):
    shutil.rmtree(chaos.folder / "full_kept", ignore_errors=True)
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script.read_text().replace("SIZE", size)], cwd=ROOT, env=chaos.env,
        capture_output=True, text=True, errors="replace")
    said = run.stdout + run.stderr
    if run.returncode == 99 or "EXIT" not in run.stdout:
      chaos.report(f"disk full (tmpfs of {size})", "0", "not tried: no tmpfs can be mounted here", "–")
      return
    first, second = (int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("EXIT"))
    resumed = run.stdout.partition("Resuming at step ")[2].partition(".")[0]
    (chaos.folder / "full_kept").rename(chaos.folder / f"full_{size}")
    chaos.report(
        f"disk full (tmpfs of {size[0]} MiB)", "1", f"exit {first}: {_last_error(said, workdir)} With room: exit "
        f"{second}, {f'from step {resumed}' if resumed else 'from the beginning'}",
        chaos.equal(f"full_{size}", SHORT) if not second else "**no**")


def _last_error(said: str, workdir: pathlib.Path) -> str:
  """The last line that says what ended a run, with the folder's name for its path."""
  lines = [line for line in said.splitlines() if line.startswith(("train.py: error: ", "SaveFailed: ", "saess_jax."))]
  line = lines[-1] if lines else said[-200:]
  return "`" + line.replace(str(workdir), "RUN").replace(str(workdir.parent) + "/", "").replace("|", "/") + "`"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--folder", help="kept afterwards; a temporary one by default")
  args = parser.parse_args()
  began = time.time()
  with contextlib.ExitStack() as stack:
    folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
    chaos = Chaos(pathlib.Path(folder).absolute(), args.seed)
    for steps in (LONG, SHORT):
      code, said = chaos.finish(f"undisturbed_{steps}", steps)
      if code:
        raise SystemExit(said[-3000:])
    print("| fault | moments | what happened | losses equal |\n|---|---|---|---|", flush=True)
    kills(chaos, args.kills)
    terminations(chaos)
    damages(chaos)
    changed_data(chaos)
    full_disk(chaos)
  print(f"\nSeed {args.seed}, {time.time() - began:.0f} s.")
  return any("**" in cell for row in chaos.rows for cell in row)


if __name__ == "__main__":
  sys.exit(main())
