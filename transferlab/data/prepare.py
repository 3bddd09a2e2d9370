"""`transferlab data prepare`: each TFDS builder that the tasks need, one after the other, each in a process of its own.

TensorFlow stays out of this process; what one builder runs into does not stop the others.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transferlab.data import tfds
from transferlab.data.entries import Entry
from transferlab.data.tasks import DataError
from transferlab.data.tfds_info import FORMATS

SAY_EVERY = 60.0  # seconds between signs of life, where no progress bar can be drawn
# For the process that prepares: silence, no accelerator, and no look-up of Google Cloud's credentials.
ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "NO_GCE_CHECK": "true",
               "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Outcome:
  """What came of one builder, or of an entry that TFDS does not have.

  Attributes:
    name: "dtd:3.0.1", or the entry's name.
    tasks: names of the entries that need it.
    state: "prepared", "already there" or "failed".
    text: where it lies, or what went wrong and what to do; one line.
  """
  name: str
  tasks: tuple[str, ...]
  state: str
  text: str


def prepare(entries: Sequence[Entry], data_dir: Path, download: bool = False, file_format: str = "array_record",
            bars: bool = False, say: Callable[[str], None] = lambda line: None) -> Iterator[Outcome]:
  """Prepares what is not there yet, and yields what came of each builder as soon as it is known.

  Args:
    data_dir: made if it does not exist. Archives fetched by hand are looked for in its downloads/manual.
    download: fetch the archives that are not there.
    bars: TFDS draws its progress bars on standard error.
    say: gets a line when a builder starts, and now and then, without `bars`.

  Raises:
    DataError: unknown `file_format`, or nothing can be written there.
  """
  if file_format not in FORMATS:
    raise DataError(f"file_format is {file_format!r}; expected {' or '.join(FORMATS)}")
  with _writing(data_dir):
    data_dir.mkdir(parents=True, exist_ok=True)
  for entry in entries:
    if not entry.builders:
      yield _elsewhere(entry, data_dir)
  for builder in dict.fromkeys(builder for entry in entries for builder in entry.builders):
    tasks = tuple(entry.name for entry in entries if builder in entry.builders)
    yield Outcome(builder, tasks, *_builder(builder, data_dir, download, file_format, bars, say))


@contextlib.contextmanager
def _writing(data_dir: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise DataError(f"cannot write to data directory {data_dir} ({error.strerror}); give another --data_dir") from None


def _elsewhere(entry: Entry, data_dir: Path) -> Outcome:
  usable = [source for source in entry.find(data_dir) if not source.problem]
  if usable:
    return Outcome(entry.name, (entry.name,), "already there", f"{usable[0]} in {usable[0].path}")
  how = "; ".join(filter(None, (entry.how, entry.layout and f"expected {entry.layout} in {data_dir}")))
  return Outcome(entry.name, (entry.name,), "failed", f"TFDS does not have it; {how}")


def _builder(builder: str, data_dir: Path, download: bool, file_format: str, bars: bool,
             say: Callable[[str], None]) -> tuple[str, str]:
  """State and text of an `Outcome`."""
  name, _, version = builder.partition(":")
  folder = data_dir / name / version
  if folder.exists():
    found = [source for source in tfds.find(data_dir, name, version) if source.path == folder]
    if problem := next((source.problem for source in found if source.problem), ""):
      return "failed", problem
    return "already there", f"{' and '.join(source.format for source in found)} in {folder}"
  with _writing(data_dir), tempfile.TemporaryFile(dir=data_dir):  # only now: what is there needs no writing
    pass
  say(f"{builder}: preparing in {folder}")
  command = [*_command(), name, version, str(data_dir), f"--file_format={file_format}",
             *["--download"] * download, *["--bars"] * bars]
  problem = _run(command, builder, bars, say)
  return ("failed", problem) if problem else ("prepared", f"{file_format} in {folder}{_leftover(folder)}")


def _command() -> list[str]:
  return [sys.executable, "-m", "transferlab.data.prepare_one"]


def _run(command: list[str], builder: str, bars: bool, say: Callable[[str], None]) -> str:
  """Runs a process that ends with {"problem": ...} on standard output; returns the problem, "" for none.

  It has a session of its own, so that Ctrl-C reaches it once, through here, and it can tidy up.
  """
  start = time.monotonic()
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=None if bars else subprocess.PIPE, text=True,
                        errors="replace", start_new_session=True, env={**os.environ, **ENVIRONMENT}) as process:
    while True:
      try:
        out, err = process.communicate(timeout=SAY_EVERY)
        break
      except subprocess.TimeoutExpired:
        if not bars:
          say(f"{builder}: still preparing, {(time.monotonic() - start) / 60:.0f} min")
      except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
  if os.environ.get("TRANSFERLAB_TRACEBACK") and err:
    print(err, file=sys.stderr)
  try:
    return str(json.loads(out.splitlines()[-1])["problem"])
  except (IndexError, ValueError, KeyError, TypeError):
    words = " ".join((err or "").splitlines()[-1:])
    ended = f"by signal {-process.returncode}" if process.returncode < 0 else f"with status {process.returncode}"
    return (f"the preparing process ended {ended} without a result{words and f' ({words})'}; is there enough memory? "
            "run the same command again; TRANSFERLAB_TRACEBACK=1 shows all it said")


def _leftover(folder: Path) -> str:
  """A remark on what interrupted preparations of this version left."""
  left = sorted(folder.parent.glob(f"incomplete.*_{folder.name}"))
  return f"; {left[0]} is left from a preparation that did not finish; delete it" if left else ""
