"""What a run keeps.

  config.json, data.json, base.json    what it is a run of (runs.py)
  checkpoints/STEP/    orbax: state (step, trainable weights, optimizer, rng), its checksums, iterator, config
  checkpoints/STEP.damaged/    a step that could not be read when the run was resumed; may be deleted
  rollouts.jsonl       the base model's completions of the training prompts
  tensorboard/         events
  lock                 empty; locked while a process trains there
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers, multihost

from saess_jax import checksums, cluster, damage, events, staging
from saess_jax.config import TrainConfig


class SaveFailed(RuntimeError):
  """A checkpoint that could not be written."""


class Saved:
  """The checkpoints of one run, to be read: whatever is at work there meanwhile, nothing of it is touched."""

  def __init__(self, workdir: str | pathlib.Path):
    self.folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    self._handlers = {
        "state": ocp.StandardCheckpointHandler(), "checksums": ocp.JsonCheckpointHandler(),
        "iterator": ocp.JsonCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}

  def steps(self) -> list[int]:
    """Those whose writing was completed, in order."""
    return sorted(int(entry.name) for entry in self.folder.glob("[0-9]*") if entry.name.isdigit())

  def latest_step(self) -> int | None:
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step that validated best, the later one of equals; the latest if none was validated."""
    figures = {step: _figure(metrics) for step in self.steps() if (metrics := self._metrics(step)) is not None}
    return max(figures, key=lambda step: (figures[step], step), default=self.latest_step())

  def _metrics(self, step: int) -> dict[str, float] | None:
    """What a validation of `step` found; None where there was none, or where that can't be read."""
    try:
      return json.loads((self.folder / str(step) / "metrics" / "metrics").read_text())
    except (FileNotFoundError, ValueError):
      return None

  def fingerprint(self, step: int) -> str:
    """Tells the state of `step` from any other's, wherever the files are: of its checksums. Raises damage.Damaged."""
    folder = self.folder / str(step)
    with damage.named(folder):
      saved = self._handlers["checksums"].restore(folder / "checksums")
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()[:16]

  def restore_trainable(self, step: int, place: Callable[[Any], Any] | None = None) -> Any:
    """The trainable weights of `step` alone, as they were saved: numpy arrays, or read straight onto devices.

    Args:
      place: the tree of what was saved (leaves with a shape) -> its shardings.

    Raises:
      damage.Damaged: as `Checkpoints.restore`; the other steps are named.
    """
    folder = self.folder / str(step)
    others = ", ".join(str(other) for other in self.steps() if other != step)
    with cluster.together(f"reading {folder}"), damage.named(
        folder, f" Load another step: {others}." if others else ""):
      stored = self._stored(step)["trainable"]
      wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
      how = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), wanted)
      if place is not None:
        how = jax.tree.map(
            lambda leaf, at: ocp.ArrayRestoreArgs(sharding=at, global_shape=leaf.shape, dtype=leaf.dtype), wanted,
            place(wanted))
      # By the handler: what orbax has around it waits for all processes, whatever became of the others' reading.
      restored = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=ocp.args.PyTreeRestore(
          item={"trainable": wanted}, restore_args={"trainable": how}, partial_restore=True))
      checksums.compare(restored, self._handlers["checksums"].restore(folder / "checksums"))
    return restored["trainable"]

  def _stored(self, step: int) -> Any:
    """The tree of a step's state; its leaves have a shape and a dtype."""
    return self._handlers["state"].metadata(self.folder / str(step) / "state").tree


class Checkpoints(Saved):
  """Those of the run at work in `workdir`, which alone makes one: the newest few, and the one that validated best."""

  def __init__(self, workdir: str | pathlib.Path, keep_last: int = 2):
    super().__init__(workdir)
    keep = checkpoint_managers.preservation_policy
    self._writing: int | None = None  # The step that is being written, or was last.
    with cluster.together("looking at what an earlier process left") as first:
      if first:
        self._clear()
    options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(barrier_sync_fn=_wait_for_others), best_fn=_figure,
        preservation_policy=keep.AnyPreservationPolicy([
            keep.LatestN(keep_last),
            keep.BestN(get_metric_fn=_figure, n=1, keep_checkpoints_without_metrics=False)]))
    self._manager = ocp.CheckpointManager(self.folder, item_handlers=self._handlers, options=options)

  def _clear(self) -> None:
    """Deletes steps that were not written to their end, and damaged metrics: orbax reads all metrics first, and would
    stop at bad ones; a step is whole without, though never the best.
    """
    for path in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
      shutil.rmtree(path)
      print(f"{path} was left by a process that did not finish it: deleted.", file=sys.stderr)
    for step in self.steps():
      path = self.folder / str(step) / "metrics" / "metrics"
      if path.exists() and self._metrics(step) is None:
        shutil.rmtree(path.parent)
        print(f"{path} is damaged; that step no longer counts as the best one.", file=sys.stderr)

  def latest_step(self) -> int | None:
    """The newest one, that which is being written counted."""
    return self._manager.latest_step()

  def save(
      self, step: int, state: Any, iterator: dict[str, Any], config: TrainConfig, metrics: dict[str, float] | None,
      written: events.Events | None = None
  ) -> None:
    """Starts writing in the background; `close` waits for it. A step that is there already is left as it is.

    Args:
      written: flushed before, so that no step behind a checkpoint lacks its events.

    Raises:
      SaveFailed: of this step, or of the one before, whose writing had gone on since then.
    """
    try:
      self._manager.wait_until_finished()
      self._writing = step
      if written is not None:
        written.flush()
      if step in self._manager.all_steps():
        return
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), checksums=ocp.args.JsonSave(checksums.of(state)),
          iterator=ocp.args.JsonSave(iterator), config=ocp.args.JsonSave(dataclasses.asdict(config))))
    except Exception as error:  # Whatever the file system or orbax says.
      raise self._failure(step if self._writing is None else self._writing, error) from None

  def is_validated(self, step: int) -> bool:
    """Whether metrics were saved with `step`, as all processes see it. Raises ValueError where they differ."""
    found = self._metrics(step) is not None
    cluster.agree(f"metrics of step {step} in {self.folder}", "some" if found else "")
    return found

  def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """What a validation of `step` found, which was saved without: a run that was stopped there did not wait for it."""
    with cluster.together(f"writing the metrics of step {step}") as first:
      if first:
        folder = self.folder / str(step) / "metrics"
        folder.mkdir(exist_ok=True)
        staging.write_text(folder / "metrics", json.dumps(metrics))
    self._manager.reload()

  def _failure(self, step: int, error: Exception) -> SaveFailed:
    disk = shutil.disk_usage(self.folder)
    whole = [other for other in self.steps() if other != step]
    last = f"the last good one is step {whole[-1]}" if whole else "there is none before it"
    return SaveFailed(
        f"Checkpoint {step} could not be written to {self.folder}, where {disk.free / 2**20:,.0f} of "
        f"{disk.total / 2**20:,.0f} MiB are free; {last}. Make room there, then give the same command to go on from "
        f"it. The cause: {damage.first_line(error)}")

  def restore_newest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
    """The newest step that is whole, of those that `steps` names: its number, state and iterator's state.

    Damaged steps above it are named on stderr and renamed to STEP.damaged, out of the way of that step's next save.
    All processes take the same step.

    Raises:
      damage.Damaged: none is whole; nothing is renamed.
      ValueError: as `restore`.
    """
    damaged: dict[int, Exception] = {}
    for step in reversed(self.steps()):
      try:
        state, iterator = self.restore(step, abstract_state)
      except (damage.Damaged, cluster.PeerFailed) as error:
        if isinstance(error, cluster.PeerFailed) and error.kind != damage.Damaged.__name__:
          raise  # What ends that process says nothing of the file.
        damaged[step] = error
      else:
        self._set_aside(damaged, step)
        return step, state, iterator
    raise damage.Damaged(
        f"No checkpoint in {self.folder} can be read. " + " ".join(map(str, damaged.values())) + " Put a copy of one "
        "there, or delete the folder to train from the beginning.")

  def _set_aside(self, damaged: dict[int, Exception], used: int) -> None:
    if not damaged:
      return
    with cluster.together("setting damaged checkpoints aside") as first:
      for step, error in damaged.items() if first else ():
        aside = self.folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        print(f"{error} It is kept as {aside.name}; going on from step {used}.", file=sys.stderr)
    self._manager.reload()

  def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """The state and the iterator's state of `step`.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct, with shardings to place the arrays on a mesh.

    Raises:
      damage.Damaged: a file is missing or cut short, or an array is not what was saved; PeerFailed where only another
        process finds it so.
      ValueError: the checkpoint is of another model or optimizer; the first array that differs is named.
    """
    folder = self.folder / str(step)
    # By the handlers, not by the manager: its barrier after reading is not reached by a process that cannot read.
    with cluster.together(f"reading {folder}"):
      with damage.named(folder):
        stored = _shapes(self._stored(step))
      expected = _shapes(abstract_state)
      for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
          raise ValueError(
              f"{folder} is a checkpoint of another model: {name} is {stored.get(name, 'absent')} there, and "
              f"{expected.get(name, 'absent')} in this model. Give the config it was made with.")
      with damage.named(folder):
        state = self._handlers["state"].restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))
        saved, iterator = (self._handlers[name].restore(folder / name) for name in ("checksums", "iterator"))
    with damage.named(folder):
      checksums.compare(state, saved)  # Over all devices, so that each process finds the same.
    return state, iterator

  def close(self) -> None:
    """Waits for what is being written. Raises SaveFailed if that fails."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(self._writing, error) from None
    finally:
      self._manager.close()


def _figure(metrics: dict[str, float]) -> float:
  """By which steps are compared: CLS accuracy, or what a rival's validation has in its place."""
  return metrics.get("cls_accuracy", metrics.get("dpo_accuracy", -metrics.get("lm_loss", 0.0)))


def _wait_for_others(key: str, timeout_ms: int) -> None:
  """Orbax's barrier between the processes that write a checkpoint, for those whose own part went well.

  On its way out of an error orbax waits too, for others that wait for this process elsewhere: 20 minutes on both sides.
  A process that fails at once is missed by jax's coordination service, which ends the others.
  """
  if sys.exc_info()[1] is None:
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in checksums.named(tree).items()}
