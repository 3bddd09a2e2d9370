"""Several processes as one run, on one machine or many: JAX's own distributed runtime, and who does what in it.

Every process runs the same program on its own devices; arrays span all of them. The first process alone writes results
and speaks; all of them write their part of a checkpoint. Inside `alone` each process works for itself.
"""
import contextlib
import json
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from transferlab import progress

_scope = threading.local()


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


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if hosts()[1] > 1:
    multihost_utils.sync_global_devices(name)
