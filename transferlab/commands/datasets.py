"""`transferlab data`: checks a data source of one's own; lists, checks and prepares published tasks."""
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transferlab import data
from transferlab.data import inventory, prepare as preparation
from transferlab.data.entries import Entry, data_directory
from transferlab.data.inventory import Row
from transferlab.progress import Progress, say
from transferlab.train import readable

WIDE = 140  # columns of a terminal from which a table reads better than lines
FORM = 40  # characters of a form
COLOURS = {"absent": "dim", "present": "", "checked": "green", "changed": "yellow", "problem": "red"}
FLAGS = {"list": ("data_dir", "json"), "check": ("data_dir", "json", "accept"),
         "prepare": ("data_dir", "download", "file_format"), "--data=...": ("data", "data_dir")}


def run(words: Sequence[str], data_dir: str = "", **flags) -> bool:
  """What `transferlab data WORDS --FLAGS` does; returns False if something is wrong with the data.

  Args:
    words: an action and names of tasks or suites, or nothing, with the flag `data`.
  """
  action, names = (words[0], words[1:]) if words else ("--data=...", [])
  if action not in FLAGS or words and "data" in flags:
    raise ValueError(f"transferlab data {' '.join(words)}: expected --data=folder:/images, or list, check or prepare "
                     "and names of tasks or suites")
  if wrong := [flag for flag in flags if flag not in FLAGS[action]]:
    raise ValueError(f"transferlab data {action} takes no --{wrong[0]}; it takes --{', --'.join(FLAGS[action])}")
  if not words:
    return describe(flags["data"], data_dir)
  entries, folder = inventory.select(names), data_directory(data_dir)
  if action == "prepare":
    if not names:
      raise data.DataError(f"nothing to prepare; name tasks or suites: {', '.join(data.SUITES)}, or a task such as "
                           f"{entries[0].name}")
    return prepare(entries, folder, **flags)
  return take_stock(entries, folder, check=action == "check", **flags)


def describe(source: str, data_dir: str) -> bool:
  """Prints the splits of one source, "folder:/images" or "vtab/dtd", after reading every image; returns whether all
  can be read.
  """
  task = data.from_string(source, data_dir)
  for remark in task.check():
    print(f"remark: {remark}")
  given, task = task, readable(task, "skip", print, quiet=False)
  print(task.describe())
  print("\n".join(f"  {name} pixels {split.fingerprint()}" for name, split in task.splits.items()))
  return all(len(split) == len(given.splits[name]) for name, split in task.splits.items())


def take_stock(entries: Sequence[Entry], folder: Path, check: bool, accept: bool = False, json: bool = False) -> bool:
  """Prints a row per task; returns whether all that is there is in order. Raises `DataError` without a folder."""
  if not folder.is_dir():
    raise data.DataError(f"data directory {folder} {'is a file' if folder.exists() else 'does not exist'}; expected "
                         "the folder of the data sets; give it as --data_dir=, or in $TFDS_DATA_DIR")
  rows = []
  with Progress(len(entries), "checking", quiet=not check) as progress:
    for row in inventory.checked(entries, folder, accept) if check else inventory.listed(entries, folder):
      rows.append(row)
      progress.update(note=row.task)
  if json:
    print(dumps([asdict(row) for row in rows], indent=1))
  else:
    _print(rows, folder)
  return not any(row.wrong for row in rows)


def prepare(entries: Sequence[Entry], folder: Path, download: bool = False, file_format: str = "array_record") -> bool:
  """Prepares with TFDS, printing a line for each builder; returns whether none failed."""
  failed = done = 0
  for outcome in preparation.prepare(entries, folder, download, file_format, bars=sys.stderr.isatty(), say=say):
    done += 1
    failed += outcome.state == "failed"
    print(f"{outcome.name}: {outcome.state}: {outcome.text}", flush=True)
  print(f"{done - failed} of {done} are in {folder}"
        + (f"; {failed} failed: the same command tries those again" if failed else ""))
  return not failed


def _print(rows: Sequence[Row], folder: Path) -> None:
  console = Console()
  cells = [(row.task, row.state, _shortened(row.source), _counts(row), row.hash, row.pixels, "; ".join(row.notes))
           for row in rows]
  titles = ("task", "state", "form", "images found/expected", "split hash", "first pixels", "notes")
  if console.is_terminal and console.width >= WIDE:
    table = Table(*titles, box=box.SIMPLE, padding=(0, 1))
    for row, texts in zip(rows, cells):
      table.add_row(*map(escape, texts), style=COLOURS[row.state])
    console.print(table)
  else:
    print("\n".join(_aligned([titles, *cells])))
  states = [row.state for row in rows]
  print(f"{folder}: " + ", ".join(f"{states.count(state)} {state}" for state in COLOURS if state in states))


def _shortened(text: str) -> str:
  """A form of many builders, all six of DomainNet, would push the other columns out of sight."""
  return text if len(text) <= FORM else f"{text[:FORM - 1]}…"


def _counts(row: Row) -> str:
  """"train 800/800": found and expected, ? for what is not known."""
  return " ".join(f"{part} {'?' if found is None else found}/{'?' if expected is None else expected}"
                  for part, (found, expected) in row.counts.items())


def _aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
  """Columns padded to their widest text, the last one as long as it is."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  for line in lines:
    yield "  ".join(text.ljust(width) for text, width in zip(line[:-1], widths)) + f"  {line[-1]}".rstrip()
