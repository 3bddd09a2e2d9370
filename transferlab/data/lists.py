"""Tasks from text: list files of `path label` lines, and CSV tables."""
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transferlab.data.files import FileReader
from transferlab.data.split import ALIASES, complete
from transferlab.data.tasks import DataError, Split, Task, _some

IMAGE_COLUMNS = ("image", "file", "path", "filename", "file_name", "filepath", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "class_name")
MAX_CLASSES = 1_000_000
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


def list_files(root: str | os.PathLike, train: str | None = None, val: str | None = None, test: str | None = None,
               class_names: Sequence[str] | None = None, val_fraction: float = 0.2, test_fraction: float = 0.2,
               seed: int = 0) -> Task:
  """Text files of `path label` lines, the format of the NOAH, SSF and CoOp splits.

  Paths are relative to `root` and may contain spaces: the label is what follows the last one. Labels are class
  indices from 0, or class names. Missing splits are cut from train as `split.complete` says.

  Args:
    root: folder of the images; list files are looked for in it, too.
    train, val, test: list files. With none given, those of `train.txt`, `val.txt`, `test.txt` that exist.
    class_names: names by index; default the indices as text, or the label names sorted.
  """
  root = Path(root).expanduser()
  given = {"train": train, "val": val, "test": test}
  if not any(given.values()):
    given = {name: f"{name}.txt" for name in given if (root / f"{name}.txt").is_file()}
    if not given:
      raise DataError(f"no list file given and no train.txt, val.txt or test.txt in {root}; name one, as in "
                      f"list:{root}?train=files.txt")
  rows, splits = [], {}
  for name, file in given.items():
    if file:
      lines = _read_list(root / file)
      splits[name] = np.arange(len(rows), len(rows) + len(lines))
      rows += lines
  return _table_task(root.resolve().name, root, rows, splits, class_names, val_fraction, test_fraction, seed)


def csv_file(path: str | os.PathLike, image_column: str | None = None, label_column: str | None = None,
             split_column: str | None = None, root: str | os.PathLike | None = None,
             class_names: Sequence[str] | None = None, val_fraction: float = 0.2, test_fraction: float = 0.2,
             seed: int = 0) -> Task:
  """A table with a header: one column of image files, one of labels, and optionally one of split names.

  Columns that are not named are found by their headers (image, file, path, filename ...; label, class, target ...;
  split, set ...), in any case. The separator is a comma, semicolon or tab. Image paths are relative to `root`, by
  default the folder of the table. Without a split column the split is automatic.
  """
  path = Path(path).expanduser()
  header, records = _read_csv(path)
  image = _column(path, header, image_column, IMAGE_COLUMNS, "image_column")
  label = _column(path, header, label_column, LABEL_COLUMNS, "label_column")
  split = _column(path, header, split_column, SPLIT_COLUMNS, "split_column", needed=split_column is not None)
  for line, record in records:
    if len(record) != len(header) or not record[image] or not record[label]:
      raise DataError(f"{path} line {line} has {len(record)} fields ({_some(record)}); expected {len(header)} as in "
                      "the header, with an image and a label")
  rows = [(record[image], record[label]) for _, record in records]
  if split is None:
    splits = {"train": np.arange(len(rows))}
  else:
    names = np.array([_split_name(path, line, record[split]) for line, record in records])
    splits = {name: np.flatnonzero(names == name) for name in ("train", "val", "test") if name in names}
  root = path.parent if root is None else Path(root).expanduser()
  return _table_task(path.stem, root, rows, splits, class_names, val_fraction, test_fraction, seed)


def _read_list(path: Path) -> list[tuple[str, str]]:
  try:
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` also cuts at rarer characters
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"cannot read the list {path} ({e}); expected a text file of `path label` lines") from None
  rows = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      fields = line.rsplit(maxsplit=1)
      if len(fields) != 2:
        raise DataError(f"{path} line {number} is {line.strip()!r}; expected `path label`, separated by a space")
      rows.append((fields[0].strip(), fields[1]))
  if not rows:
    raise DataError(f"the list {path} is empty; expected `path label` lines")
  return rows


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"cannot read the table {path} ({e}); expected a CSV file with a header") from None
  first = text.partition("\n")[0]
  separator = max(",;\t", key=first.count)
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
  lines = [(reader.line_num, [field.strip() for field in record]) for record in reader if any(record)]
  if len(lines) < 2:
    raise DataError(f"the table {path} has {len(lines)} lines; expected a header and at least one image")
  return lines[0][1], lines[1:]


def _column(path: Path, header: list[str], wanted: str | None, usual: tuple[str, ...], option: str,
            needed: bool = True) -> int | None:
  names = [name.lower() for name in header]
  found = [i for u in ((wanted.lower(),) if wanted else usual) for i, name in enumerate(names) if name == u]
  if not found and needed:
    what = repr(wanted) if wanted else f"{', '.join(usual)}"
    raise DataError(f"{path} has the columns {_some(header)}; expected {what}; say which with {option}=")
  return found[0] if found else None


def _split_name(path: Path, line: int, value: str) -> str:
  if value.lower() not in ALIASES:
    raise DataError(f"{path} line {line} is in split {value!r}; expected train, val or test")
  return ALIASES[value.lower()]


def _table_task(name: str, root: Path, rows: list[tuple[str, str]], splits: dict[str, np.ndarray],
                class_names: Sequence[str] | None, val_fraction: float, test_fraction: float, seed: int) -> Task:
  files, texts = zip(*rows)
  paths = tuple(str(root / file) for file in files)
  if not any(map(os.path.exists, paths[:100])):  # a single lost file is named later, with all that cannot be read
    raise DataError(f"{paths[0]} does not exist, nor do the files listed next; expected paths relative to {root}; "
                    "give the folder of the images as root")
  labels, class_names = index_labels(texts, class_names)
  everything = Split("all", tuple(Path(f).as_posix() for f in files), labels, FileReader(paths))
  splits = complete(splits, labels, class_names, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
  return Task(name, class_names, {k: everything.select(v, k) for k, v in splits.items()})


def index_labels(labels: Sequence[str], class_names: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
  """Labels as text -> class indices int [N] and the class names.

  If every label is a whole number they are indices (unless they are the very class names); otherwise they are names.
  Indices are not checked here: `Task.check` names the example whose label is out of range.
  """
  names = None if class_names is None else tuple(str(n) for n in class_names)
  whole = all(text.lstrip("-").isdecimal() for text in labels)
  if whole and not (names and set(labels) <= set(names)):
    indices = np.array([int(text) for text in labels])
    if indices.max() >= MAX_CLASSES:
      raise DataError(f"label {indices.max()} is too large for a class index; expected 0..C-1 or class names; "
                      "is this the right column?")
    return indices, names or tuple(str(i) for i in range(max(indices.max() + 1, 0)))
  names = names or tuple(sorted(set(labels)))
  unknown = sorted(set(labels) - set(names))
  if unknown:
    raise DataError(f"labels {_some(unknown)} are not among the {len(names)} class names ({_some(names)}); "
                    "correct the labels or name all classes")
  table = {name: i for i, name in enumerate(names)}
  return np.array([table[text] for text in labels], np.int32), names
