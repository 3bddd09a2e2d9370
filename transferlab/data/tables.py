"""CSV tables as people have them: read with their quirks, as a task or to predict on, and written back."""
import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transferlab.data.lists import read_text, slashes, text_task
from transferlab.data.split import ALIASES
from transferlab.data.tasks import DataError, Task, some

IMAGE_COLUMNS = ("image", "file", "path", "filename", "file_name", "filepath", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "class_name")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


@dataclass(frozen=True)
class Table:
  """The cells of a CSV file as they stand there, and what it takes to write them back in the same form.

  Attributes:
    rows: as many cells each as the header has; a row of empty cells is kept.
    lines: the line of the file on which each row ends, for messages.
    separator, newline, encoding: as found.
  """
  path: Path
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  lines: tuple[int, ...]
  separator: str
  newline: str
  encoding: str

  def column(self, wanted: str | None, usual: Sequence[str], option: str, needed: bool = True) -> int | None:
    """Where the column called `wanted` is, by default the first of the `usual` names that there is, in any case."""
    names = [name.strip().lower() for name in self.header]
    found = [name for name in ((wanted.strip().lower(),) if wanted else usual) if name in names]
    if not found and needed:
      what = repr(wanted) if wanted else ", ".join(usual)
      raise DataError(f"{self.path} has the columns {some(self.header)}; expected {what}; say which with {option}=")
    if found and names.count(found[0]) > 1:
      raise DataError(f"{self.path} has {names.count(found[0])} columns called {found[0]!r}; expected one; rename the "
                      f"others, or say which column with {option}=")
    return names.index(found[0]) if found else None

  def images(self, image_column: str | None = None, root: str | os.PathLike | None = None) -> list[str]:
    """The image file of each row, "" where its cell is empty; relative to `root`, by default the table's folder."""
    column, root = self.column(image_column, IMAGE_COLUMNS, "image_column"), self.root(root)
    cells = [slashes(row[column].strip()) for row in self.rows]
    return [str(root / cell) if cell else "" for cell in cells]

  def root(self, root: str | os.PathLike | None = None) -> Path:
    """The folder that image files are relative to."""
    return self.path.parent if root is None else Path(root).expanduser()

  def write(self, path: str | os.PathLike, names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """All rows in order, with the columns `names` added at the end; `cells` has their values, row by row."""
    with open(path, "w", encoding=self.encoding, newline="") as file:
      writer = csv.writer(file, delimiter=self.separator, lineterminator=self.newline)
      writer.writerow([*self.header, *names])
      writer.writerows([*row, *added] for row, added in zip(self.rows, cells, strict=True))


def csv_file(path: str | os.PathLike, image_column: str | None = None, label_column: str | None = None,
             split_column: str | None = None, root: str | os.PathLike | None = None,
             class_names: Sequence[str] | None = None, val_fraction: float = 0.2, test_fraction: float = 0.2,
             seed: int = 0) -> Task:
  """A table with a header: one column of image files, one of labels, and optionally one of split names.

  Columns that are not named are found by their headers (image, file, path, filename ...; label, class, target ...;
  split, set ...), in any case. The separator is a comma, semicolon or tab. Image paths are relative to `root`, by
  default the folder of the table; a backslash in them is a slash, as in tables from Windows. Without a split column the
  split is automatic, and a row that repeats another counts once.

  Raises:
    DataError: not UTF-8, a column that is not there or there twice, a row with other than the header's number of
      cells or without an image or a label, one image with two labels.
  """
  table = read_table(path)
  image = table.column(image_column, IMAGE_COLUMNS, "image_column")
  label = table.column(label_column, LABEL_COLUMNS, "label_column")
  split = table.column(split_column, SPLIT_COLUMNS, "split_column", needed=split_column is not None)
  used = [(line, [cell.strip() for cell in row]) for line, row in zip(table.lines, table.rows)
          if any(map(str.strip, row))]
  for line, row in used:
    if not row[image] or not row[label]:
      raise DataError(f"{table.path} line {line} has no {'label' if row[image] else 'image'} ({some(row)}); expected "
                      "both in every row; complete the row or remove it")
  if split is None:
    splits = {"train": np.arange(len(used))}
  else:
    names = np.array([_split_name(table.path, line, row[split]) for line, row in used])
    splits = {name: np.flatnonzero(names == name) for name in ("train", "val", "test") if name in names}
  rows = [(row[image], row[label]) for _, row in used]
  return text_task(table.path.stem, table.root(root), rows, splits, class_names, val_fraction, test_fraction, seed)


def read_table(path: str | os.PathLike) -> Table:
  """A CSV file in UTF-8, with or without a byte order mark, with a header, separated by comma, semicolon or tab.

  Raises:
    DataError: not readable or not UTF-8, a quote that is not closed, no row, a row with too few or too many cells.
  """
  path = Path(path).expanduser()
  text = read_text(path, "a CSV file with a header")
  marked = text.startswith("\ufeff")
  text = text.removeprefix("\ufeff")
  separator = max(",;\t", key=lambda s: _cells_of_first_row(text, s))
  reader, lines, rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), [], []
  try:
    for row in reader:
      if any(map(str.strip, row)) or rows and len(row) == len(rows[0]):
        lines.append(reader.line_num)
        rows.append(tuple(row))
  except csv.Error as e:
    raise DataError(f"{path} line {reader.line_num} is not CSV ({e}); expected quotes in pairs, and doubled within a "
                    "quoted cell") from None
  if not any(any(map(str.strip, row)) for row in rows[1:]):
    raise DataError(f"the table {path} has {len(rows)} lines; expected a header and at least one image")
  for line, row in zip(lines, rows):
    if len(row) != len(rows[0]):
      raise DataError(f"{path} line {line} has {len(row)} cells ({some(row)}); expected {len(rows[0])} as in the "
                      "header; put a cell that contains the separator in quotes")
  return Table(path, rows[0], tuple(rows[1:]), tuple(lines[1:]), separator, "\r\n" if "\r\n" in text else "\n",
               "utf-8-sig" if marked else "utf-8")


def _cells_of_first_row(text: str, separator: str) -> int:
  """Counted as CSV, since a quoted name may hold any separator."""
  return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), ()))


def _split_name(path: Path, line: int, value: str) -> str:
  if value.lower() not in ALIASES:
    raise DataError(f"{path} line {line} is in split {value!r}; expected train, val or test")
  return ALIASES[value.lower()]
