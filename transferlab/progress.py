"""What the user sees: progress of long work, a bar on a terminal, a plain line now and then elsewhere; and tables."""
import contextlib
import sys
import time

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_EVERY = 10.0  # seconds between plain lines
WIDE = 200  # columns of text where nothing says how many there are, a pipe or a file


_prefix: str | None = ""  # of all lines; None where another process speaks for this one


@contextlib.contextmanager
def speaker(prefix: str | None):
  """Inside, lines start with `prefix`, or are left out if it is None."""
  global _prefix
  before, _prefix = _prefix, prefix
  try:
    yield
  finally:
    _prefix = before


def say(message: str) -> None:
  """A line for the user, on standard error so that tables and CSV on standard output stay clean."""
  if _prefix is not None:
    print(_prefix + message, file=sys.stderr, flush=True)


def show_table(table: Table) -> None:
  """Prints a table on standard output. On a narrow terminal it loses its frame, and cells that are still too long go on
  below, so that no digit is lost."""
  console = Console()
  console = console if console.is_terminal else Console(width=WIDE)
  if Measurement.get(console, console.options.update(max_width=10 * WIDE), table).maximum > console.width:
    table.box, table.padding, table.show_edge = box.SIMPLE, 0, False
  for column in table.columns:
    column.overflow = "fold"
  console.print(table)


class Progress:
  """`with Progress(total, "training") as p: p.update(note="loss 0.12")`; shows nothing when `quiet`."""

  def __init__(self, total: int, what: str, *, done: int = 0, quiet: bool = False):
    self.total, self.what, self.done, self.quiet = total, what, done, quiet
    self.note, self.last = "", time.monotonic()
    self.bar, self.said = None, None

  def __enter__(self):
    console = Console(stderr=True)
    if not self.quiet and console.is_terminal and _prefix == "":
      self.bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                     TextColumn("{task.fields[note]}"), console=console)
      self.bar.start()
      self.task = self.bar.add_task(self.what, total=self.total, completed=self.done, note="")
    return self

  def __exit__(self, *_):
    if self.bar:
      self.bar.stop()
    elif self.said not in (None, self.done):
      say(f"{self.what} {self.done}/{self.total} {self.note}".rstrip())

  def update(self, count: int = 1, note: str | None = None) -> None:
    """`count` more are done; a plain line appears at most every ten seconds, and at the end if there was one."""
    self.done += count
    self.note = self.note if note is None else note
    if self.bar:
      self.bar.update(self.task, completed=self.done, note=self.note)
    elif not self.quiet and time.monotonic() - self.last > LINE_EVERY:
      self.last, self.said = time.monotonic(), self.done
      say(f"{self.what} {self.done}/{self.total} {self.note}".rstrip())
