"""Folders that several processes or several runs use: seen by all hosts, and taken by one run at a time."""
import os
import socket
import time
import uuid
from pathlib import Path

from transferlab import distributed

PATIENCE = 10.0  # seconds in which a file has to reach the other hosts


def check_shared(folder, what: str) -> None:
  """Makes sure that a folder, which is made if it is not there, is the same one for all processes; all of them call
  this. `what` it is, such as "workdir".

  Raises:
    ValueError: naming the hosts that see another one.
  """
  if distributed.hosts()[1] == 1:
    return
  # A name of its own each time: network storage remembers for a while that a file was not there.
  token = Path(folder) / distributed.agree(f".shared.{uuid.uuid4().hex}")
  if distributed.first():
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch()
  distributed.barrier("a token is written")
  until = time.monotonic() + PATIENCE
  while not (seen := _seen(token)) and time.monotonic() < until:
    time.sleep(0.05)
  found = distributed.gather([f"{Path(folder).absolute()} on {socket.gethostname()} (process "
                              f"{distributed.hosts()[0]})", seen])
  if distributed.first():
    token.unlink(missing_ok=True)
  if blind := [where for where, seen in found if not seen]:
    raise ValueError(f"{what} {', '.join(blind)} is not the same folder as {found[0][0]}, where a file was written "
                     "that is not seen there; put it on storage that all hosts share, under one absolute path")


def _seen(token: Path) -> bool:
  try:
    return token.name in os.listdir(token.parent)  # makes network storage look again
  except OSError:
    return False


def lock(folder, what: str, tell):
  """Takes a folder for one run until the file that is returned is closed or this process dies; None where the storage
  knows no locks, which `tell` is told.

  Raises:
    ValueError: another run has it.
  """
  try:
    import fcntl
  except ImportError:  # Windows
    return None
  file = open(Path(folder) / "lock", "a+")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    holder = file.read().strip() or "another run"
    file.close()
    raise ValueError(f"{what} {folder} is in use by {holder}; wait for its end, stop it, or give another "
                     "--workdir") from None
  except OSError as error:
    file.close()
    tell(f"{what} {folder} is on storage without locks ({error.strerror}): make sure that no other run writes there")
    return None
  file.truncate(0)
  file.write(f"a run with process number (pid) {os.getpid()} on {socket.gethostname()}\n")
  file.flush()
  return file
