"""Tasks from text files: lines of `path label`, or one file of paths per class."""
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from transferlab.data.files import FileReader
from transferlab.data.split import ALIASES, complete
from transferlab.data.tasks import DataError, Split, Task, some

MAX_CLASSES = 1_000_000


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
      lines = read_list(root / file)
      splits[name] = np.arange(len(rows), len(rows) + len(lines))
      rows += lines
  return text_task(root.resolve().name, root, rows, splits, class_names, val_fraction, test_fraction, seed)


def class_lists(path: str | os.PathLike, root: str | os.PathLike | None = None, val_fraction: float = 0.2,
                test_fraction: float = 0.2, seed: int = 0) -> Task:
  """A folder with one text file per class, `rose.txt`, `tulip.txt`, of one image path per line.

  The name of the file is that of the class. Paths are relative to `root`, by default the folder of the lists; blank
  lines are passed over. The split is automatic, and a line that repeats another counts once.

  Raises:
    DataError: no such file, an empty one, files that are named like splits, an image in two classes.
  """
  folder = Path(path).expanduser()
  lists = sorted(folder.glob("[!.]*.[tT][xX][tT]")) if folder.is_dir() else []
  if not lists:
    found = "holds no .txt file" if folder.is_dir() else "is no folder"
    raise DataError(f"{folder} {found}; expected a folder with one text file per class, rose.txt, tulip.txt, of one "
                    "image path per line")
  if all(file.stem.lower() in ALIASES for file in lists):
    raise DataError(f"{folder} holds {some(file.name for file in lists)}, which are named like splits; expected one "
                    f"file per class; if their lines are `path label`, write list:{path}")
  rows = []
  for file in lists:
    lines = _lines(file)
    if not lines:
      raise DataError(f"class {file.stem!r} has no image: {file} is empty; add image paths or remove the file")
    rows += [(line.strip(), file.stem) for _, line in lines]
  return text_task(folder.resolve().name, folder if root is None else Path(root).expanduser(), rows,
                   {"train": np.arange(len(rows))}, sorted({file.stem for file in lists}), val_fraction, test_fraction,
                   seed)


def read_list(path: Path) -> list[tuple[str, str]]:
  """The (path, label) of every line `path label` that is not blank; the label is what follows the last space."""
  rows = []
  for number, line in _lines(path):
    fields = line.rsplit(maxsplit=1)
    if len(fields) != 2:
      raise DataError(f"{path} line {number} is {line.strip()!r}; expected `path label`, separated by a space")
    rows.append((fields[0].strip(), fields[1]))
  if not rows:
    raise DataError(f"the list {path} is empty; expected `path label` lines")
  return rows


def line_number(path: Path, row: int) -> int:
  """The line, from 1, that gave row `row` of `read_list`; for messages."""
  return _lines(path)[row][0]


def published_list(path: Path, root: Path, name: str, num_classes: int) -> Split:
  """A list file as published, of image paths below `root` and class indices, as the split `name` in its order.

  Raises:
    DataError: a line that is none, a label out of range, an image that is not there or that has two labels, a path
      that leaves `root`.
  """
  files, texts = zip(*read_list(path))
  index = {str(label): label for label in range(num_classes)}
  for row, (file, text) in enumerate(zip(files, texts)):
    if text not in index:
      raise DataError(f"{path} line {line_number(path, row)} has the label {text!r}; expected a whole number from 0 to "
                      f"{num_classes - 1}; correct the list or take the published one")
    if leaves(file):
      raise DataError(f"{path} line {line_number(path, row)} names {file!r}; expected a path below {root}")
  if missing := missing_files(root, files):
    line = line_number(path, missing[0])
    raise DataError(f"{path} line {line} names {files[missing[0]]}, which is not in {root} ({len(missing)} of "
                    f"{len(files)} images are missing); complete the images")
  keys, first = tuple(PurePosixPath(file).as_posix() for file in files), {}
  for row, (key, text) in enumerate(zip(keys, texts)):
    if texts[before := first.setdefault(key, row)] != text:
      raise DataError(f"{path} gives {key} the label {texts[before]} in line {line_number(path, before)} and {text} in "
                      f"line {line_number(path, row)}; expected one label per image; correct the list or take the "
                      "published one")
  return Split(name, keys, [index[text] for text in texts], FileReader(tuple(str(root / key) for key in keys)))


def leaves(file: str) -> bool:
  """Whether a relative path from a third party's file would lead out of the folder it is relative to."""
  path = PureWindowsPath(file)  # knows both kinds of slashes, and drives
  return not file.strip() or bool(path.anchor) or ".." in path.parts or "\0" in file


def missing_files(root: Path, files: Iterable[str]) -> list[int]:
  """Rows whose file does not exist, by listing each folder once: looking up 70,000 files one by one takes long."""
  inside, rows = {}, []
  for row, file in enumerate(files):
    parent, name = os.path.split(file)
    if parent not in inside:
      inside[parent] = set(os.listdir(root / parent)) if (root / parent).is_dir() else set()
    if name not in inside[parent]:
      rows.append(row)
  return rows


def _lines(path: Path) -> list[tuple[int, str]]:
  lines = text_lines(path, "a text file with one image per line")
  return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def text_lines(path: Path, expected: str) -> list[str]:
  """The lines of a file in UTF-8, without their ends; raises `DataError`, which says what was `expected`."""
  text = read_text(path, expected).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
  return text.removesuffix("\n").split("\n") if text else []  # `splitlines` also cuts at rarer characters


def read_text(path: Path, expected: str) -> str:
  """A file in UTF-8, with its byte order mark and line ends; raises `DataError`."""
  try:
    content = path.read_bytes()
  except OSError as e:
    raise DataError(f"cannot read {path} ({e.strerror}); expected {expected}") from None
  if b"\0" in content[:1000]:
    raise DataError(f"{path} is UTF-16 or no text; expected {expected} in UTF-8; save it again with the encoding UTF-8 "
                    "(spreadsheets call it CSV UTF-8)")
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as e:
    line = content[:e.start].count(b"\n") + 1
    found = content[e.start:e.start + 1]
    raise DataError(f"{path} line {line} is not UTF-8 ({found!r}); expected {expected} in UTF-8; save it again with "
                    "the encoding UTF-8 (spreadsheets call it CSV UTF-8)") from None


def slashes(file: str) -> str:
  """A path as written on Windows in the form that all systems read, so that a split has the same hash on all."""
  return file.replace("\\", "/")


def text_task(name: str, root: Path, rows: list[tuple[str, str]], splits: dict[str, np.ndarray],
              class_names: Sequence[str] | None, val_fraction: float, test_fraction: float, seed: int) -> Task:
  """The task of (path below `root`, label as text) pairs; what of the splits is missing is cut from train."""
  files, texts = tuple(PurePosixPath(slashes(file)).as_posix() for file, _ in rows), [text for _, text in rows]
  paths = tuple(str(root / file) for file in files)
  if not any(map(os.path.exists, paths[:100])):  # a single lost file is named later, with all that cannot be read
    raise DataError(f"{paths[0]} does not exist, nor do the files listed next; expected paths relative to {root}; "
                    "give the folder of the images as root")
  _one_label_each(name, files, texts)
  labels, class_names = index_labels(texts, class_names)
  everything = Split("all", files, labels, FileReader(paths))
  if "val" not in splits and "train" in splits:  # one copy in train and one in val would spoil the choice
    first = {files[row]: row for row in reversed(splits["train"].tolist())}
    splits = {**splits, "train": np.array(sorted(first.values()))}
  splits = complete(splits, labels, class_names, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
  return Task(name, class_names, {k: everything.select(v, k) for k, v in splits.items()})


def _one_label_each(name: str, files: Sequence[str], labels: Sequence[str]) -> None:
  known = {}
  for file, label in zip(files, labels):
    if known.setdefault(file, label) != label:
      raise DataError(f"{name}: {file!r} is in two classes, {known[file]!r} and {label!r}; expected one; remove it "
                      "from the other")


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
    raise DataError(f"labels {some(unknown)} are not among the {len(names)} class names ({some(names)}); "
                    "correct the labels or name all classes")
  table = {name: i for i, name in enumerate(names)}
  return np.array([table[text] for text in labels], np.int32), names
