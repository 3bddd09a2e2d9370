"""Four small tasks of real images, one of each kind, to try a method on in minutes: the suite "mini".

They lie as plain folders: `cifar10_jpeg/{train,test}/<class>`, `dtd10/{train,test}/<class>` (ten of DTD's textures),
`coil20` with lists of files by azimuth in eight bins, and `pacs70/<domain>/<class>` (PACS, sketch held out). Numbers on
them say whether something works, not how good it is: they are parts of their data sets and belong in no table.
"""
from collections.abc import Callable
from pathlib import Path

from transferlab.data.entries import Entry, Source
from transferlab.data.folders import domain_folder, image_folder
from transferlab.data.lists import list_files
from transferlab.data.tasks import Split, Task

PHASES = {"final": {"train": "train", "test": "test"}, "tune": {"train": "train80", "val": "train20"}}


def _folders(path: Path, cut: float) -> Task:
  return image_folder(path, val_fraction=cut)


def _azimuths(path: Path, cut: float) -> Task:
  return list_files(path, train="azimuth_train.txt", test="azimuth_test.txt", val_fraction=cut)


def _without_sketch(path: Path, cut: float) -> Task:
  return domain_folder(path, "sketch", val_fraction=cut)


def _entry(name: str, folder: str, holds: str, num_classes: int, counts: dict[str, int],
           read: Callable[[Path, float], Task], domain_names: tuple[str, ...] = ()) -> Entry:
  """A task with train and test; the phase "tune" cuts train 80/20, stratified, and leaves test alone."""
  def part(source: Source, part: str) -> Split:
    task = read(source.path, 0.0 if part in ("train", "test") else 0.2)
    return task.splits[{"train80": "train", "train20": "val"}.get(part, part)]
  return Entry(name, "mini", _finder(folder, holds), part, lambda source: read(source.path, 0.0).class_names, PHASES,
               num_classes=num_classes, counts=counts, domain_names=domain_names, layout=f"{folder}/{holds}")


def _finder(folder: str, holds: str) -> Callable[[Path], list[Source]]:
  def find(data_dir: Path) -> list[Source]:
    path = data_dir / folder
    if not path.is_dir():
      return []
    problem = "" if (path / holds).exists() else f"{path} has no {holds}; complete it"
    return [Source("list" if holds.endswith(".txt") else "folder", path, problem=problem)]
  return find


ENTRIES: tuple[Entry, ...] = (
    _entry("mini/cifar10", "cifar10_jpeg", "train", 10, {"train": 1000, "test": 4000}, _folders),
    _entry("mini/dtd10", "dtd10", "train", 10, {"train": 300, "test": 200}, _folders),
    _entry("mini/coil_azimuth", "coil20", "azimuth_train.txt", 8, {"train": 360, "test": 360}, _azimuths),
    _entry("mini/pacs", "pacs70", "sketch", 7, {"train": 1470, "test": 490}, _without_sketch,
           ("art_painting", "cartoon", "photo", "sketch")))
SUITES: dict[str, tuple[str, ...]] = {"mini": tuple(entry.name for entry in ENTRIES)}
