"""What a task is: named splits of images with integer labels, the class names, and the checks that run before step 1.

A `Split` knows its examples by stable names and reads one image at a time; it holds no pixels itself unless its reader
does. Everything here is plain data that pickles, so that the loader's worker processes can receive it.
"""
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "val", "test")


class DataError(ValueError):
  """Wrong or unusable data; one line that says what was found, what was expected and what to do."""


class BadImage(DataError):
  """One image that cannot be read; the message names the file and the cause."""


@dataclass(frozen=True, eq=False)
class Split:
  """N labelled images.

  Attributes:
    name: "train", "val" or "test".
    keys: N stable names (path below the root, or position and checksum for arrays); they enter the split's hash.
    labels: int32 [N], the index of each example's class.
    read: row -> uint8 RGB image [H, W, 3]; raises `BadImage`. It has to pickle.
    domains: int32 [N] or None.
    verified: every image is known to decode, so that a streaming loader need not try them all first.
  """
  name: str
  keys: tuple[str, ...]
  labels: np.ndarray
  read: Callable[[int], np.ndarray]
  domains: np.ndarray | None = None
  verified: bool = False

  def __post_init__(self):
    for field in ("labels", "domains"):
      values = getattr(self, field)
      if values is None:
        continue
      values = np.asarray(values)
      if values.shape != (len(self.keys),) or (len(values) and not np.issubdtype(values.dtype, np.integer)):
        raise DataError(f"{field} of split {self.name!r} are {values.dtype} {list(values.shape)}; "
                        f"expected whole numbers [{len(self.keys)}], one per image")
      object.__setattr__(self, field, values.astype(np.int32))

  def __len__(self) -> int:
    return len(self.keys)

  @property
  def domain_count(self) -> int:
    """Number of domains that it has images of, 1 if it does not tell domains apart."""
    return 1 if self.domains is None else len(set(self.domains.tolist()))

  def select(self, rows: Iterable[int], name: str | None = None) -> "Split":
    """The examples at `rows`, in that order, under `name` (default: this split's name)."""
    rows = np.asarray(rows, dtype=np.int64).reshape(-1)
    read = self.read
    if isinstance(read, _Subset):  # a selection of a selection stays one look-up deep
      read, source_rows = read.read, read.rows[rows]
    else:
      source_rows = rows
    return dataclasses.replace(
        self, name=name or self.name, keys=tuple(self.keys[i] for i in rows), labels=self.labels[rows],
        read=_Subset(read, source_rows), domains=None if self.domains is None else self.domains[rows])

  def picture(self, row: int):
    """What `read` gives, for who resizes it: as Pillow's image, where the reader has it, two copies are saved."""
    return _picture(self.read, row)

  def hash(self) -> str:
    """16 hex digits of SHA-256 over keys and labels, in order: which examples these are, not what their pixels are."""
    digest = hashlib.sha256()
    for key, label in zip(self.keys, self.labels.tolist()):
      digest.update(f"{key}\t{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]

  def fingerprint(self, count: int = 32) -> str:
    """16 hex digits of SHA-256 over the decoded pixels of the first `count` images.

    The same file names with re-encoded pictures have the same `hash()` and another fingerprint; the difference is worth
    ten points of accuracy on CIFAR-100 (github.com/visinf/adapter_plus, issue 3).
    """
    digest = hashlib.sha256()
    for row in range(min(count, len(self))):
      image = self.read(row)  # [H, W, 3]
      digest.update(repr(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Subset:
  """Reads row i of a selection as row `rows[i]` of what was selected from."""
  read: Callable[[int], np.ndarray]
  rows: np.ndarray

  def __call__(self, row: int) -> np.ndarray:
    return self.read(int(self.rows[row]))

  def picture(self, row: int):
    return _picture(self.read, int(self.rows[row]))


def _picture(read: Callable[[int], np.ndarray], row: int):
  return getattr(read, "picture", read)(row)


@dataclass(frozen=True)
class Task:
  """Splits that share one list of classes (and, for domain generalisation, of domains).

  Attributes:
    domain_names: by domain index, where the splits have domains.
    source: the form the data lay in, "array_record cifar100:3.0.2"; "" for data of one's own.
    protocol: the published protocol that the splits follow; "" for data of one's own. Published subsets are taken as
      they are: a class without an image is a remark there, not an error.
    draw: what a seed drew of the splits, "seed 1": rows of other draws have other splits by design.
    templates: texts with {} for the class name, for backbones with a text tower.
    test_classes: the classes that the test split is evaluated among; () for all.
  """
  name: str
  class_names: tuple[str, ...]
  splits: dict[str, Split]
  domain_names: tuple[str, ...] = ()
  source: str = ""
  protocol: str = ""
  draw: str = ""
  templates: tuple[str, ...] = ()
  test_classes: tuple[int, ...] = ()

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def split_hash(self) -> str:
    """16 hex digits over the hashes of all splits, by name."""
    text = "\n".join(f"{name}\t{self.splits[name].hash()}" for name in sorted(self.splits))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def describe(self) -> str:
    """One line per split for logs: name, images, images per class, hash."""
    lines = [f"{self.name}: {self.num_classes} classes, split hash {self.split_hash()}"]
    for name, split in self.splits.items():
      counts = np.bincount(split.labels[split.labels >= 0], minlength=self.num_classes)
      lines.append(f"  {name:<5} {len(split):>7} images, {counts.min()}-{counts.max()} per class, hash {split.hash()}")
    return "\n".join(lines)

  def relabel(self, class_names: Iterable[str]) -> "Task":
    """The same images with labels that index `class_names`, matched by name: the class order of a trained head."""
    class_names = tuple(class_names)
    unknown = [name for name in self.class_names if name not in class_names]
    if unknown:
      raise DataError(f"task {self.name!r} has classes {some(unknown)} that are not among the {len(class_names)} "
                      f"expected ones ({some(class_names)}); rename or remove these classes")
    table = np.array([class_names.index(name) for name in self.class_names], np.int32)
    splits = {k: dataclasses.replace(s, labels=table[s.labels]) for k, s in self.splits.items()}
    return dataclasses.replace(self, class_names=class_names, splits=splits,
                               test_classes=tuple(sorted(table[list(self.test_classes)].tolist())))

  def check(self, splits: Iterable[str] | None = None) -> list[str]:
    """Raises `DataError` at the first thing that would spoil a run; returns remarks that need not stop it.

    Args:
      splits: the splits in use; default all. With "train" among them every class must have a training image, and a
        test split must show every class (not so between domains, where a class may be missing from one, nor in
        published subsets).
    """
    names = tuple(self.splits if splits is None else splits)
    _check_class_names(self)
    for name in names:
      if name not in self.splits:
        raise DataError(f"task {self.name!r} has no split {name!r}; found {some(self.splits)}")
      _check_split(self, self.splits[name])
    remarks = _differ_in_case_only(self.class_names)
    for name in names if "train" in names else ():
      missing = self._missing(name)
      if missing and name == "train" and not self.protocol:
        hint = "; labels count from 0" if missing[0] == self.class_names[0] else ""
        raise DataError(f"task {self.name!r}: no training image of {some(missing)}; expected at least one for each of "
                        f"the {self.num_classes} classes{hint}; add images or remove the class")
      if missing and name == "test" and not self.domain_names and not self.protocol:
        raise DataError(f"task {self.name!r}: train and test differ in classes, no test image of {some(missing)}; "
                        f"expected the same {self.num_classes} classes; add test images or remove the class from both")
      if missing:
        remarks.append(f"no {name} image of {some(missing)}")
    remarks += self._overlaps(names)
    return remarks

  def _missing(self, name: str) -> list[str]:
    present = set(self.splits[name].labels.tolist())
    return [c for i, c in enumerate(self.class_names) if i not in present]

  def _overlaps(self, names: Iterable[str]) -> list[str]:
    keys = {name: set(self.splits[name].keys) for name in names}
    pairs = [(a, b, len(keys[a] & keys[b])) for a, b in itertools.combinations(keys, 2)]
    return [f"{shared} images are in both {a} and {b}" for a, b, shared in pairs if shared]


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Weights float32 [C] inverse to class frequency, N / (C * count); their mean over the examples is 1.

  Raises `DataError` for a class without examples, whose weight would be infinite.
  """
  counts = np.bincount(np.asarray(labels), minlength=num_classes)
  if len(counts) != num_classes or counts.min() == 0:
    raise DataError(f"class weights need labels 0..{num_classes - 1}, each at least once; "
                    f"found counts {counts.tolist()}; add images or remove the class")
  return (counts.sum() / (num_classes * counts)).astype(np.float32)


def _check_class_names(task: Task) -> None:
  names = task.class_names
  if len(names) < 2:
    raise DataError(f"task {task.name!r} has {len(names)} class ({some(names)}); expected at least two; "
                    "is the folder given one level too deep?")
  if len(set(names)) != len(names):
    twice = [n for n in dict.fromkeys(names) if names.count(n) > 1]
    raise DataError(f"task {task.name!r} names {some(twice)} more than once; class names must differ")


def _differ_in_case_only(names: Iterable[str]) -> list[str]:
  """A remark, not an error: letters of the alphabet are such classes."""
  by_lower = {}
  for name in names:
    by_lower.setdefault(name.lower(), []).append(name)
  return [f"classes {some(same)} differ only in case; if they are one class, rename one of them"
          for same in by_lower.values() if len(same) > 1]


def _check_split(task: Task, split: Split) -> None:
  if not len(split):
    raise DataError(f"split {split.name!r} of task {task.name!r} has no image; expected at least one; "
                    "add images or leave the split out")
  wrong = np.flatnonzero((split.labels < 0) | (split.labels >= task.num_classes))
  if len(wrong):
    row = wrong[0]
    raise DataError(f"label {split.labels[row]} of {split.keys[row]!r} in split {split.name!r} is outside "
                    f"0..{task.num_classes - 1} ({task.num_classes} classes; {len(wrong)} such labels); "
                    "correct the labels or name all classes")


def some(names: Iterable[str], limit: int = 5) -> str:
  """'a', 'b', ... for error messages that stay on one line."""
  names = [repr(str(n)) for n in names]
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more
