"""The processes of one run: on the hosts of a TPU pod slice, the tasks of a SLURM step, or started by hand.

They run the same program over one mesh and share one workdir. What only one of them may write the first writes, while
the others wait; what goes wrong on one is raised on all, so that none waits for another that has gone.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # Of a step of srun, not of sbatch.
_SHUTDOWN_SECONDS = 60  # A process that ends on an error waits so long for the others, which may be in a step.
_MESSAGE_BYTES = 2048  # Of an error that the other processes are told.
_within = contextvars.ContextVar("within", default=False)


class PeerFailed(RuntimeError):
  """Another process of the run raised an error; `kind` is the name of its type."""

  def __init__(self, said: str, kind: str):
    super().__init__(said)
    self.kind = kind


def start() -> None:
  """Joins the other processes of the run where the environment shows some; call it before anything else of jax.

  A coordinator named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID goes first, then a SLURM step of
  several tasks, then a TPU slice of several hosts (GKE's variables, GCE's metadata server). A single machine starts
  nothing.

  Raises:
    ValueError: only some of the three variables are set, or they do not fit together.
  """
  # It would take SIGTERM for itself, and the process would not end by it before the training loop looks for it.
  jax.config.update("jax_enable_preemption_service", False)
  by_hand = [name for name in _VARIABLES if os.environ.get(name)]
  if set(by_hand) & {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}:
    address, count, index = _coordinator()
    if count > 1:
      jax.distributed.initialize(
          address, count, index, shutdown_timeout_seconds=_SHUTDOWN_SECONDS, cluster_detection_method="deactivate")
  elif _slurm_tasks() > 1 or _tpu_hosts() > 1:
    jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
  elif by_hand:
    _coordinator()  # An address alone, and nothing that shows who the others are.


def _coordinator() -> tuple[str, int, int]:
  given = {name: os.environ.get(name, "") for name in _VARIABLES}
  said = ", ".join(f"{name}={value!r}" for name, value in given.items())
  address, count, index = given.values()
  if not (count.isdecimal() and index.isdecimal() and int(index) < int(count) and address.rpartition(":")[2].isdecimal()
          and ":" in address):
    raise ValueError(
        f"{said}: expected all three or none, such as host0:8476, 4 and an index from 0 to 3, another one in each "
        "process.")
  return address, int(count), int(index)


def _slurm_tasks() -> int:
  return int(os.environ.get("SLURM_NTASKS", 1)) if all(name in os.environ for name in _SLURM) else 1


def _tpu_hosts() -> int:
  """Hosts of all slices of this TPU; 1 where there is none, or where JAX_PLATFORMS leaves it out."""
  platforms = jax.config.jax_platforms
  if platforms and "tpu" not in platforms:
    return 1
  slices = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
  names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
  if names is None and "TPU_SKIP_MDS_QUERY" not in os.environ:  # jax sets it where it finds no chips.
    names = _metadata("worker-network-endpoints")
  return slices * len((names or "").split(","))


def _metadata(key: str) -> str | None:
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
      f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=10) as answer:
      return answer.read().decode()
  except urllib.error.URLError:  # Not a machine of GCE, or not one of a TPU.
    return None


@contextlib.contextmanager
def together(what: str) -> Iterator[bool]:
  """A block that all processes leave together: all in order, or all with an error. Costs one small collective.

  A block within another costs none: it is left when the outer one is. Else a process that fails before it would meet
  the others' exchange of the inner block with its own of the outer one.

  Args:
    what: what the block does, for the error: "reading the data".

  Yields:
    Whether this is the first process, the one that writes what all share.

  Raises:
    PeerFailed: the block went well here and failed elsewhere. A process whose own block failed raises its own error.
  """
  if _within.get():
    yield jax.process_index() == 0
    return
  error, entered = None, _within.set(True)
  try:
    yield jax.process_index() == 0
  except Exception as raised:
    error = raised
  finally:
    _within.reset(entered)
  said = [] if jax.process_count() == 1 else _exchange(f"{type(error).__name__}: {error}" if error else "")
  if error:
    raise error
  for process, message in enumerate(said):
    if message:
      raise PeerFailed(
          f"Process {process} of {len(said)} failed while {what}: {message}", kind=message.partition(":")[0])


def agree(what: str, seen: str) -> None:
  """Raises ValueError, on all processes, unless each has seen the same."""
  said = [seen] if jax.process_count() == 1 else _exchange(seen)
  if len(set(said)) > 1:
    raise ValueError(
        f"The processes see different {what}: " + "; ".join(
            f"process {process} sees {other or 'none'}" for process, other in enumerate(said)) +
        ". Wait until the file system shows all hosts the same, and give the command again.")


def _exchange(message: str) -> list[str]:
  """The message of every process, cut to _MESSAGE_BYTES."""
  sent = np.zeros(_MESSAGE_BYTES, np.uint8)
  encoded = np.frombuffer(message.encode()[:_MESSAGE_BYTES], np.uint8)
  sent[:len(encoded)] = encoded
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(sent)]


def first_then_rest(what: str, work: Callable[[], T]) -> T:
  """What `work` gives on this process; it runs on the first one alone, then on the others, which find things done."""
  for turn in (True, False):
    with together(what) as first:
      if first == turn:
        done = work()
  return done
