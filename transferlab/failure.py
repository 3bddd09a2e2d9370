"""When one of several processes fails, all end: with its message, and within seconds, whatever they are waiting for.

Left to itself, JAX lets the others wait in a collective, or at its own end for minutes. Here the one that fails leaves
its reason in the store of keys that JAX's processes share, where a thread of each other one looks every second. A
process that is killed says nothing: whoever waits for its data fails in its place, or JAX misses its heartbeat and
aborts all.
"""
import atexit
import contextlib
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax

LOOK = 1.0  # seconds between looks whether another process has failed
FAREWELL = 5.0  # seconds that process 0, which holds the store, stays for the others to look
PART = 100.0  # seconds within which processes that end with a status all have to do so
EVER = 7 * 24 * 3600  # seconds that a process that has done its part waits for the others
REASON, SEEN, END = "transferlab/failed", "transferlab/seen", "transferlab/end"
LOST = re.compile(r"Connection (reset|closed)|Socket closed|Broken pipe|remote process|heartbeat", re.IGNORECASE)


class Team(NamedTuple):
  """Processes that end together: the place of this one, the names of their hosts, and what gives the store of keys."""
  place: int
  names: list[str]
  store: Callable[[], Any]

  def who(self, place: int) -> str:
    return f"process {place} of {len(self.names)} ({self.names[place]})"


_team: Team | None = None
_leaving = threading.Lock()  # whoever ends the process takes it and never gives it back
_quitting = threading.Lock()  # as well
_parted = threading.Event()


def watch(place: int, names: list[str], store: Callable[[], Any]) -> None:
  """From here on a failure of one is one of all: an exception that nobody catches ends all, and a process that has done
  its part waits for the others. `SystemExit` is no failure: all raise it, or none."""
  global _team
  _team, shown = Team(place, names, store), sys.excepthook

  def uncaught(kind, error, trace):
    if not _heard():  # else it is what another one's end has caused
      shown(kind, error, trace)
    if issubclass(kind, KeyboardInterrupt):
      fail("stopped", 130)
    fail(": ".join(filter(None, (kind.__name__, " ".join(str(error).split())))))

  def listen():
    while not _parted.wait(LOOK):
      if heard := _heard():
        _leaving.acquire()
        _exit(*heard)

  def end():  # before JAX's own, which waits for minutes only
    if not _parted.is_set():
      _wait(EVER, "the others do not end")
    listener.join()

  sys.excepthook = uncaught
  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  atexit.register(end)


def fail(reason: str, code: int = 1, others: int = 1) -> None:
  """Ends this process with exit code `code` and a line that says who failed and why, all others with `others` and that
  line.

  The first failure is the one that all report. Does nothing where there are no others.
  """
  if _team is None:
    return
  _leaving.acquire()
  if LOST.search(reason):
    reason += "; another process is gone, perhaps killed: look at its host"
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one failed before
    _team.store().key_value_set(REASON, json.dumps([_team.place, reason, others]))
  _exit(*(_heard() or (_team.place, reason))[:2], code)


def part(code: int) -> None:
  """To be called before ending with an exit code that is no failure, such as that of a preemption; a failure after all
  where the others do not do the same soon."""
  if _team and not _parted.is_set():
    _wait(PART, f"ended with status {code} and the others did not", code)


def quit(code: int) -> NoReturn:
  """As `part`, and then ends this process, whatever its threads are doing, with its output written."""
  _quitting.acquire()
  part(code)
  _leaving.acquire()
  _end(code)


def _wait(seconds: float, otherwise: str, code: int = 1) -> None:
  """Waits until all processes have come to their ends, and goes on listening meanwhile."""
  try:
    if store := _team.store():
      store.wait_at_barrier(END, int(1000 * seconds))
  except jax.errors.JaxRuntimeError as error:
    fail(otherwise if "DEADLINE_EXCEEDED" in str(error) else " ".join(str(error).split()), code, code)
  _parted.set()


def _heard() -> tuple[int, str, int] | None:
  """(process, reason, exit code of the others) of the failure that was told first."""
  try:
    return tuple(json.loads(_team.store().key_value_try_get(REASON)))
  except (jax.errors.JaxRuntimeError, AttributeError):  # none, or JAX has shut down
    return None


def _exit(place: int, reason: str, code: int) -> None:
  """Says who failed and why, and ends this process, whatever its threads are doing."""
  if not reason.startswith("process "):  # which one, and where, is not said yet
    reason = f"{_team.who(place)}{' failed' * (place != _team.place)}: {reason}"
  for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {reason}\n")):
    with contextlib.suppress(OSError, ValueError):
      stream.write(text)
      stream.flush()
  _end(code)


def _end(code: int) -> NoReturn:
  """Ends this process; process 0 when the others are about to."""
  for child in multiprocessing.active_children():
    child.terminate()
  with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):
    store, until = _team.store(), time.monotonic() + FAREWELL
    store.key_value_set(f"{SEEN}/{_team.place}", "")
    while _team.place == 0 and time.monotonic() < until and len(store.key_value_dir_get(SEEN)) < len(_team.names):
      time.sleep(LOOK / 20)
  os._exit(code)
