"""VTAB-1k as images already extracted, with lists of them: the form that NOAH, SSF, FacT and their successors share.

A task is a folder with `train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`, whose lines are
`images/train800val200/000000.jpg 5`: a path below that folder and a label.
"""
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from transferlab.data import tfds
from transferlab.data.entries import Source
from transferlab.data.lists import published_list, read_list, text_lines
from transferlab.data.tasks import DataError, Split

ROOTS = ("vtab-1k", "vtab", "")  # folders of a data directory that may hold the tasks' folders
PARTS = ("train800", "val200", "train800val200", "test")
WHOLE, PIECES = "train800val200", {"train800", "val200"}
NAME_FILES = ("classnames.txt", "labels.txt")  # one class name per line; the published folders have none


def find(data_dir: Path, folders: Sequence[str]) -> list[Source]:
  """The folders of one task, under any of its names, that lie in a data directory."""
  found = []
  for root in ROOTS:
    for folder in (data_dir / root / name for name in folders):
      lists = _lists(folder)
      # Outside a folder for VTAB-1k, `data_dir/dtd` without lists is TFDS's, and no half of this form.
      if lists or root and folder.is_dir():
        found.append(Source("list", folder, problem=_problem(folder, lists), remark=_remark(lists)))
  return found


def part(source: Source, name: str, num_classes: int) -> Split:
  """One part of a task, in the order of its list.

  Unless both have a list, train800 and val200 are the first 800 and the last 200 lines of train800val200.

  Raises:
    DataError: see `published_list`; train800 and val200 together are not train800val200.
  """
  folder, lists = source.path, _lists(source.path)
  if name in lists and (name not in PIECES or lists >= PIECES):
    split = published_list(_list(folder, name), folder, name, num_classes)
    if name != "test" and lists >= {*PIECES, WHOLE}:
      _check_pieces(folder)
    return split
  if name == WHOLE:
    return tfds.concatenate(name, part(source, "train800", num_classes), part(source, "val200", num_classes))
  path = _list(folder, WHOLE)
  whole = published_list(path, folder, WHOLE, num_classes)
  if len(whole) != 1000:
    raise DataError(f"{path} has {len(whole)} lines; expected 1000, to be cut into train800 and val200; take the "
                    "published list, or add train800.txt and val200.txt")
  return whole.select(range(800) if name == "train800" else range(800, 1000), name)


def class_names(source: Source) -> tuple[str, ...]:
  """The names that lie beside the lists; () if none do."""
  for path in (source.path / name for name in NAME_FILES):
    if path.is_file():
      return tuple(line.strip() for line in text_lines(path, "one class name per line") if line.strip())
  return ()


def _check_pieces(folder: Path) -> None:
  """The final training must not see other examples than the choice was made on."""
  rows = {name: {(PurePosixPath(file), label) for file, label in read_list(_list(folder, name))}
          for name in (WHOLE, *PIECES)}
  if others := sorted(rows[WHOLE] ^ set.union(*(rows[name] for name in PIECES))):
    file, label = others[0]
    where = "train800val200.txt" if others[0] in rows[WHOLE] else "train800.txt and val200.txt"
    raise DataError(f"{folder}: train800val200.txt is not train800.txt and val200.txt together; {len(others)} lines "
                    f"differ, {file} {label} is only in {where}; take the published lists, all three")


def _list(folder: Path, name: str) -> Path:
  return folder / f"{name}.txt"


def _lists(folder: Path) -> set[str]:
  return {name for name in PARTS if _list(folder, name).is_file()}


def _problem(folder: Path, lists: set[str]) -> str:
  if "test" in lists and ("train800val200" in lists or lists >= PIECES):
    return ""
  found = ", ".join(f"{name}.txt" for name in PARTS if name in lists) or "no list"
  return (f"{folder} has {found}; expected train800val200.txt (or train800.txt and val200.txt) and test.txt; copy the "
          "missing lists there")


def _remark(lists: set[str]) -> str:
  cut = "; train800 and val200 are cut from train800val200.txt" if not lists >= PIECES else ""
  return f"extracted images, whose pixels may differ from TFDS's{cut}"
