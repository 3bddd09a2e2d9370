"""Several processes of one run on this machine, for tests: real ones, on loopback, each with CPU devices of its own.

    ended = hosts.run(["train", "--config=…", "--workdir=…"])            # the transferlab command
    ended = hosts.run("import jax; print(jax.device_count())")            # source text
    ended = hosts.run(in_each, str(tmp_path), 3)                          # a function at the top of a test file
    assert [code for code, *_ in ended] == [0, 0]

Of more than one process the command gets --distributed and its flags, and source and functions run after
`distributed.connect`, as the verbs do. With processes=1 nothing is connected: the same program as one process.
"""
import contextlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CONNECT = "from transferlab import distributed; distributed.connect({coordinator!r}, {processes}, {process}, {timeout})"


def run(program, *args, processes: int = 2, devices: int = 2, timeout: float = 120, **how
        ) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of each process; all are killed after `timeout` seconds, then their codes are -9.

  See `start` for the rest. A failure of one is no exception here: look at the codes.
  """
  with start(program, *args, processes=processes, devices=devices, **how) as started:
    return started.ended(timeout)


@contextlib.contextmanager
def start(program, *args, processes: int = 2, devices: int = 2, env: dict | None = None, each: dict | None = None,
          connect: bool = True):
  """Starts the processes and gives `Started`; at the end of the context those still running are killed.

  Args:
    program: list of the command's arguments, verb first; or Python source; or a function at the top of a module that
      lies in tests/, called in each process with `args`, which have to be plain (`repr` is passed on).
    devices: CPU devices of each process.
    env: further environment of all processes; a value of None takes a variable away.
    each: {place: {flag: value}} of what single processes are told otherwise: "coordinator", "processes", "process",
      "timeout", and "env" for environment; "args", a list of further flags, for the command.
    connect: False to leave connecting to the program.
  """
  coordinator = f"127.0.0.1:{free_port()}"
  with tempfile.TemporaryDirectory() as folder:
    popens, outputs = [], []
    try:
      for place in range(processes):
        told = {"coordinator": coordinator, "processes": processes, "process": place, "timeout": 60,
                **(each or {}).get(place, {})}
        outputs.append([Path(folder) / f"{place}.{name}" for name in ("out", "err")])
        with outputs[-1][0].open("wb") as out, outputs[-1][1].open("wb") as err:
          popens.append(subprocess.Popen(
              command(program, args, told, connect and processes > 1), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
              env=environment(devices, {**(env or {}), **told.get("env", {})}), start_new_session=True))
      yield Started(popens, outputs)
    finally:
      for popen in popens:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(popen.pid, signal.SIGKILL)  # children too, such as data workers
        popen.wait()


class Started:
  """Running processes: `popens` in the order of their places."""

  def __init__(self, popens: list[subprocess.Popen], outputs: list):
    self.popens, self.outputs = popens, outputs

  def text(self, place: int) -> tuple[str, str]:
    """(stdout, stderr) of a process so far."""
    return tuple(path.read_text(errors="replace") for path in self.outputs[place])

  def wait_for(self, text: str, place: int = 0, timeout: float = 60) -> None:
    """Waits until a process has printed this, on stdout or stderr; `AssertionError` if it ends or time is up before."""
    until = time.monotonic() + timeout
    while not any(text in stream for stream in self.text(place)):
      assert self.popens[place].poll() is None and time.monotonic() < until, (text, self.text(place))
      time.sleep(0.02)

  def signal(self, place: int, number: int = signal.SIGKILL) -> None:
    """Sends a process a signal."""
    self.popens[place].send_signal(number)

  def ended(self, timeout: float = 120) -> list[tuple[int, str, str]]:
    """Waits for all processes; (exit code, stdout, stderr) of each, -9 of those that had to be killed at `timeout`."""
    until = time.monotonic() + timeout
    for popen in self.popens:
      try:
        popen.wait(max(0, until - time.monotonic()))
      except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()
    return [(popen.returncode, *self.text(place)) for place, popen in enumerate(self.popens)]


def command(program, args: tuple, told: dict, connect: bool) -> list[str]:
  """The command line of a process that was told this."""
  if isinstance(program, list):
    flags = [f"--{name}={told[name]}" for name in ("coordinator", "processes", "process")]
    flags = ["--distributed", *flags, f"--connect_timeout={told['timeout']}"] if connect else []
    return [sys.executable, "-m", "transferlab.cli", *program, *flags, *told.get("args", [])]
  lines = [CONNECT.format(**told)] if connect else []
  if callable(program):
    module = Path(inspect.getfile(program)).stem
    lines += [f"import {module}", f"{module}.{program.__name__}(*{args!r})"]
  else:
    lines += [program]
  return [sys.executable, "-c", "\n".join(lines)]


def environment(devices: int, changes: dict) -> dict[str, str]:
  """That of this process, on CPU with so many devices, and with tests/ on the path."""
  found = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1",
           "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
  return {name: value for name, value in {**found, **changes}.items() if value is not None}


def free_port() -> int:
  """A port that nobody listens on now."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]
