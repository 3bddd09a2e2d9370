"""Several processes as one run, on one machine or many: JAX's own distributed runtime, and who does what in it.

Every process runs the same program on its own devices; arrays span all of them. The first process alone writes results
and speaks; all of them write their part of a checkpoint. Inside `alone` each process works for itself. What becomes of
the others when one fails says `failure.py`.
"""
import collections
import contextlib
import json
import os
import platform
import re
import socket
import threading
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from transferlab import config, failure, progress, rendezvous

HEARTBEAT = 30  # seconds without a sign of life after which JAX takes a process for dead, and ends all
JOIN = 120  # seconds for JAX to join processes that have met

_scope = threading.local()
_calls: collections.Counter = collections.Counter()  # of `meet`, by name
_for_good = contextlib.ExitStack()  # a process that is muted stays so


def connect(coordinator: str = "", processes: int = 0, process: int = -1, timeout: float = 300) -> None:
  """Joins the other processes of a run; to be called before anything touches JAX's devices.

  Process 0 says then how many there are, of which devices and where; the others are mute, but for their errors.

  Args:
    coordinator: "host:port" where process 0 runs, and a port there that is free and open to the others.
    processes: how many there are.
    process: which one this is, from 0. None of the three is given on TPU pods, SLURM, Open MPI and Kubernetes, where
      JAX finds them.
    timeout: seconds to wait for the others.

  Raises:
    ValueError: some of the three are missing or impossible, or processes differ in them, in their versions or in their
      devices.
    RuntimeError: the others did not come in time.
  """
  if jax.distributed.is_initialized():
    raise RuntimeError("this process is connected already; call connect once, before anything else")
  if timeout <= 0:
    raise ValueError(f"the time to wait for other processes is {timeout} s; expected more than 0")
  coordinator, processes, process = _told(coordinator, processes, process, timeout)
  names = [socket.gethostname()]
  if processes > 1:
    names = rendezvous.meet(coordinator, processes, process, timeout)
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=JOIN,
                               heartbeat_timeout_seconds=HEARTBEAT)
    failure.watch(process, names, store)
    if process:
      _for_good.enter_context(progress.speaker(None))
    compare("versions", _versions())
  count, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
  compare("devices", {"count": count, "kind": kind})
  if processes > 1:
    _greet()
  where = [name + f" ({names.count(name)} processes)" * (names.count(name) > 1) for name in dict.fromkeys(names)]
  progress.say(f"{processes} process{'es' * (processes > 1)} x {count} device{'s' * (count > 1)} ({kind}) on "
               + ", ".join(where[:16]) + f" and {len(where) - 16} other hosts" * (len(where) > 16))


def _greet() -> None:
  """A first sum over all devices, now that all are here: on CPU, those who meet in a collective for the first time wait
  30 s for each other and then fail, and later on one may be busy for longer."""
  everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), ("all",)), jax.sharding.PartitionSpec("all"))
  one = lambda index: np.ones(1, np.float32)
  jax.jit(jnp.sum)(jax.make_array_from_callback((jax.device_count(),), everywhere, one)).block_until_ready()


def _told(coordinator: str, processes: int, process: int, timeout: float) -> tuple[str, int, int]:
  """Address, number and place, as given or as JAX finds them where it knows the cluster."""
  given = {"coordinator": bool(coordinator), "processes": processes != 0, "process": process != -1}
  if not any(given.values()):
    from jax._src.clusters import ClusterEnv  # what `initialize` asks; there is no public name
    found = ClusterEnv.auto_detect_unset_distributed_params(os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None,
                                                            None, int(timeout))
    if None in found[:3]:
      raise ValueError("no TPU pod, SLURM step, Open MPI or Kubernetes job is found that says which processes belong "
                       "together; give --coordinator=HOST:PORT (where process 0 runs), --processes and --process, or "
                       "start with srun or mpirun")
    coordinator, processes, process = found[:3]
  elif missing := [name for name, there in given.items() if not there]:
    raise ValueError(f"--{missing[0]} is missing; give --coordinator, --processes and --process, or none of them where "
                     "the cluster says it")
  if processes < 1:
    raise ValueError(f"--processes is {processes}; expected their number, 1 or more")
  rendezvous.address(coordinator)
  if not 0 <= process < processes:
    with contextlib.suppress(RuntimeError, ValueError):  # process 0, if it is there, shall not wait for the right one
      rendezvous.meet(coordinator, processes, max(process, processes), min(timeout, 2.0))
    raise ValueError(f"--process is {process} of {processes} processes; expected 0 … {processes - 1}")
  return coordinator, processes, process


def _versions() -> dict[str, str]:
  """Of Python, of this package and of all that it requires."""
  required = [line for line in metadata.requires("transferlab") if "extra ==" not in line]
  names = ["transferlab", "jaxlib", *(re.match(r"[\w.-]+", line)[0] for line in required)]
  return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def store():
  """JAX's store of keys, which all processes share and which has no public name; None where there is one process."""
  from jax._src.distributed import global_state
  return global_state.client


def hosts() -> tuple[int, int]:
  """(this process's place, number of processes) of those that work together here; (0, 1) inside `alone`."""
  if getattr(_scope, "alone", False) or not jax.distributed.is_initialized():
    return 0, 1
  return jax.process_index(), jax.process_count()


def first() -> bool:
  """Whether this process is the one that writes and speaks."""
  return hosts()[0] == 0


@contextlib.contextmanager
def alone():
  """Inside, this process works with its own devices only, writes its own files and waits for nobody."""
  before, _scope.alone = getattr(_scope, "alone", False), True
  try:
    with progress.speaker(f"[{jax.process_index()}] " if jax.process_count() > 1 else ""):
      yield
  finally:
    _scope.alone = before


def agree(value):
  """The first process's `value`, plain data as JSON has it, in all processes, which wait here for each other."""
  if hosts()[1] == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  padded = np.zeros(size, np.uint8)
  if first():
    padded[:] = text
  return json.loads(multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes().decode())


def gather(value) -> list:
  """The `value` of every process, plain data as JSON has it, in their order; all of them wait here for each other."""
  if hosts()[1] == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(text))))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[:len(text)] = text
  rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if hosts()[1] > 1:
    multihost_utils.sync_global_devices(name)


def meet(name: str, value, waiting: Callable[[int], None] = lambda place: None, patience: float = 30) -> list:
  """As `gather`, without the devices, whose collectives have time limits: waits however long the others work alone.

  While one is awaited, `waiting` is called every `patience` seconds with its place, and may raise to give up.

  Args:
    name: the same in all processes, which call it equally often.
  """
  place, count = hosts()
  if count == 1:
    return [value]
  _calls[name] += 1
  key, found = f"transferlab/meet/{name}/{_calls[name]}", []
  store().key_value_set(f"{key}/{place}", json.dumps(value))
  while len(found) < count:
    try:
      found.append(json.loads(store().blocking_key_value_get(f"{key}/{len(found)}", int(1000 * patience))))
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
      waiting(len(found))
  return found


def compare(what: str, facts: dict) -> None:
  """Raises `ValueError` in all processes unless all of them give the same facts, naming one that differs and its host.

  Nothing is computed on the devices, and every process has to come here, however late.

  Args:
    what: they have to have in common, in a word: "versions", "run".
    facts: plain data as JSON has it, nested or not.
  """
  place, count = hosts()
  if count == 1:
    return
  wait = lambda other: progress.say(f"waiting for process {other} of {count}, to compare {what}")
  told = meet("compare", [socket.gethostname(), {"about": what, **facts}], wait)
  texts = [json.dumps(facts, sort_keys=True) for _, facts in told]
  usual = texts.index(max(texts, key=texts.count))  # of two that differ the first one is
  for other, (name, found) in enumerate(told):
    if different := config.changes(told[usual][1], found):
      raise ValueError(f"process {other} of {count} ({name}) differs from process {usual} ({told[usual][0]}) in its "
                       f"{what} ({usual} -> {other}): {'; '.join(different[:4])}; give all processes the same")
