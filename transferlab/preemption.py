"""Preemption: a run that a scheduler stops (SIGTERM) ends so that the same command takes it up, bit for bit.

While steps are trained, the finished one is saved first. Elsewhere there is nothing to save: while images are read or
heads trained side by side, the program ends at once, nothing being half written. Either way it ends with exit code 75.

Of several processes it is enough that one is told. Where they train one run, JAX finds the step that all of them can
save (`reached_preemption_sync_point`); where each trains its own, each saves that.
"""
import contextlib
import faulthandler
import itertools
import os
import select
import signal
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from transferlab import distributed, failure
from transferlab.progress import say
from transferlab.signals import CODE, NUMBERS, Preempted, said, state

LOOK = 1.0  # seconds between looks whether another process was told
TOLD = "transferlab/preempted"  # in the store of keys that the processes share

_steps = itertools.count(1)  # of all runs of this process: JAX wants a number that grows


def listen() -> None:
  """Takes the signals of a process that `distributed.connect` has joined to others; of one by itself,
  `signals.handled` does."""
  if not distributed.store() or state.taken:
    return
  state.taken = True
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  # JAX's own handler, in C++, has to stay: it starts the search for a step. No handler of Python's can call it, and
  # while the main thread waits for other processes none would run; `faulthandler` writes into a pipe and calls it.
  faulthandler.register(signal.SIGTERM, file=writing, all_threads=False, chain=True)
  for number in NUMBERS[1:]:
    signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  threading.Thread(target=_hear, args=(reading,), daemon=True).start()


def _hear(reading: int) -> None:
  """Waits for a signal, here or in another process, and ends all processes where none of them trains."""
  while not state.asked:
    if select.select([reading], [], [], LOOK)[0]:
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was told too
        distributed.store().key_value_set(TOLD, "")
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):  # none was, or JAX has shut down
      state.asked = distributed.store().key_value_try_get(TOLD) == ""
  if not state.waits:
    leave("the same command goes on from what is saved")


@contextlib.contextmanager
def saving():
  """Inside, a signal waits for the caller, which asks `due` after every step, saves it if so, and calls `leave`."""
  state.waits = True
  try:
    yield
  finally:
    state.waits = False
  if any(distributed.gather(state.asked)):
    leave("all steps are saved, the same command goes on from there")


def due() -> bool:
  """Whether to save the step that was finished, and to end; all processes ask equally often."""
  if distributed.hosts()[1] > 1:
    return multihost_utils.reached_preemption_sync_point(next(_steps))
  return state.asked


def leave(what: str) -> NoReturn:
  """Says what became of the run and ends the program; of several processes all together, wherever they are: those that
  train runs of their own save these first."""
  if not distributed.store():
    raise Preempted(what)
  say(said(what))
  failure.quit(CODE)
