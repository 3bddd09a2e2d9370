"""VTAB-1k: 19 tasks with 800 training, 200 validation images and the full test sets.

Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark"
(arXiv:1910.04867). Slices, derived labels and thresholds are those of its code, github.com/google-research/
task_adaptation at d7630d3. A task is read from TFDS's prepared data, or from extracted images with lists.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np

from transferlab.data import tfds, vtab_lists
from transferlab.data.entries import Entry, Source
from transferlab.data.tasks import Split

# A label is the index of the last threshold below the distance. CLEVR's first and last and KITTI's first are bounds
# that no distance crosses; if one does, the label is out of range, which `Task.check` reports.
CLEVR_THRESHOLDS = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_THRESHOLDS = (-100.0, 8.0, 20.0, 999.0)
KITTI_VEHICLES = 3  # types below: car, van, truck
NO_VEHICLE = 1000.0  # the distance if there is none

PHASES = {"final": {"train": "train800val200", "test": "test"}, "tune": {"train": "train800", "val": "val200"}}


def clevr_count(example: Mapping) -> int:
  """Number of objects less 3, the fewest there are (task_adaptation `clevr.py`, count_all)."""
  return len(example["objects"]["size"]) - 3


def clevr_distance(example: Mapping) -> int:
  """Bin of the nearest object's depth, the third of its `pixel_coords` (`clevr.py`, closest_object_distance)."""
  return _last_below(CLEVR_THRESHOLDS, _third(example["objects"]["pixel_coords"]).min(initial=np.inf))


def kitti_distance(example: Mapping) -> int:
  """Bin of the nearest vehicle's distance in metres, the third of its `location`
  (`kitti.py`, closest_vehicle_distance)."""
  vehicles = np.asarray(example["objects"]["type"]) < KITTI_VEHICLES  # [objects]
  return _last_below(KITTI_THRESHOLDS, _third(example["objects"]["location"])[vehicles].min(initial=NO_VEHICLE))


def binned(example: Mapping, feature: str, originals: int, bins: int) -> int:
  """A stored label in groups of `originals / bins`, 2.5 for one: then three and two by turns (`dsprites.py`)."""
  return int(example[feature] // (originals / bins))


def _third(coordinates: np.ndarray) -> np.ndarray:
  return np.asarray(coordinates).reshape(-1, 3)[:, 2]  # a scene without objects may come as [0]


def _last_below(thresholds: tuple[float, ...], distance: float) -> int:
  """Index of the last threshold < distance, -1 if there is none; a distance equal to one is not above it."""
  return int(np.searchsorted(thresholds, distance, side="left")) - 1


@dataclass(frozen=True)
class Start:
  """Where a slice begins in a TFDS split of n examples: at the sum of ⌊tenths · n / 10⌋."""
  split: str
  tenths: tuple[int, ...] = ()

  def rows(self, n: int, count: int | None = None) -> range:
    """`count` rows, or all that follow; fewer where the split ends, which `Entry.counts` reports."""
    start = sum(n * tenths // 10 for tenths in self.tenths)
    return range(start, n if count is None else min(start + count, n))


@dataclass(frozen=True)
class Vtab:
  """One of the 19 tasks.

  Attributes:
    builder, pinned: TFDS's name and the version that this TFDS prepares.
    accepted: start of other versions with the same examples, which the benchmark's own version allows.
    num_classes, test_count: as published.
    key: the feature that names an example; None: none does.
    folders: names of the folder with lists, in published repositories.
    val, test: where val200 and test begin; train800 is the start of "train".
    label: example -> class index.
    names: by class, where labels are derived; () takes those of the prepared data.
    scale: what pixels are multiplied by.
    benchmark: the version that the benchmark names, "3.*", where the pinned one is newer.
  """
  name: str
  group: str
  builder: str
  pinned: str
  accepted: str
  num_classes: int
  test_count: int
  key: str | None
  folders: tuple[str, ...]
  val: Start
  test: Start = Start("test")
  label: Callable[[Mapping], int] = tfds.stored_label
  names: tuple[str, ...] = ()
  scale: int = 1
  benchmark: str = "*"

  def find(self, data_dir: Path) -> list[Source]:
    """TFDS's forms, then those with lists; see `Entry.find`."""
    found = tfds.find(data_dir, self.builder, self.pinned, self.accepted)
    return [self._remarked(source) for source in found] + vtab_lists.find(data_dir, self.folders)

  def part(self, source: Source, part: str) -> Split:
    """train800, val200, train800val200 (the two in this order) or test; see `Entry.part`."""
    if source.format == "list":
      return vtab_lists.part(source, part, self.num_classes)
    if part == "train800val200":
      return tfds.concatenate(part, self.part(source, "train800"), self.part(source, "val200"))
    start, count = {"train800": (Start("train"), 800), "val200": (self.val, 200), "test": (self.test, None)}[part]
    rows = start.rows(tfds.sizes(source).get(start.split, 0), count)
    return tfds.examples(source, start.split, rows, part, self.label, self.key, scale=self.scale)

  def class_names(self, source: Source) -> tuple[str, ...]:
    """By label; numbers as text where nothing names the classes."""
    if source.format != "list":
      return self.names or tfds.class_names(source)
    return vtab_lists.class_names(source) or self.names or tuple(str(label) for label in range(self.num_classes))

  def entry(self) -> Entry:
    counts = {"train800": 800, "val200": 200, "train800val200": 1000, "test": self.test_count}
    layout = f"{self.builder}/{self.pinned}/ as TFDS prepares it, or vtab-1k/{self.folders[0]}/ with train800val200.txt"
    return Entry(f"vtab/{self.name}", "VTAB-1k", self.find, self.part, self.class_names, PHASES, self.group,
                 self.num_classes, counts, builders=(f"{self.builder}:{self.pinned}",), layout=layout)

  def _remarked(self, source: Source) -> Source:
    if fnmatch(source.version.rpartition(":")[2], self.benchmark):
      return source
    newer = f"the benchmark has {self.builder} {self.benchmark}"
    return replace(source, remark="; ".join(filter(None, (source.remark, newer))))


def _clevr(name: str, label: Callable, names: tuple[str, ...]) -> Vtab:
  return Vtab(name, "structured", "clevr", "3.1.0", "3.", len(names), 15000, "file_name", (name,),
              Start("train", (9,)), Start("validation"), label, names)


def _dsprites(name: str, folder: str, feature: str, originals: int, noun: str) -> Vtab:
  label = partial(binned, feature=feature, originals=originals, bins=16)
  return Vtab(name, "structured", "dsprites", "2.0.0", "2.", 16, 73728, None, (folder,),
              Start("train", (8,)), Start("train", (8, 1)), label, tuple(f"{noun} {i}" for i in range(16)), scale=255)


def _smallnorb(name: str, folder: str, feature: str, degrees: range) -> Vtab:
  return Vtab(name, "structured", "smallnorb", "2.0.0", "2.", len(degrees), 12150, None, (folder,),
              Start("test"), Start("test", (5,)), partial(tfds.stored_label, feature=feature),
              tuple(f"{angle} degrees" for angle in degrees))


# In the order of the published tables.
TASKS = (
    Vtab("cifar100", "natural", "cifar100", "3.0.2", "3.", 100, 10000, "id", ("cifar", "cifar100"),
         Start("train", (9,))),
    # Its file names start again in every class: no keys.
    Vtab("caltech101", "natural", "caltech101", "3.0.2", "3.", 102, 6084, None, ("caltech101",), Start("train", (9,))),
    Vtab("dtd", "natural", "dtd", "3.0.1", "3.", 47, 1880, "file_name", ("dtd",), Start("validation")),
    Vtab("flowers102", "natural", "oxford_flowers102", "2.1.1", "2.", 102, 6149, "file_name", ("oxford_flowers102",),
         Start("validation")),
    Vtab("pets", "natural", "oxford_iiit_pet", "4.0.0", "3.", 37, 3669, "file_name", ("oxford_iiit_pet",),
         Start("train", (8,)), benchmark="3.*"),
    Vtab("svhn", "natural", "svhn_cropped", "3.1.0", "3.", 10, 26032, "id", ("svhn",), Start("train", (9,))),
    Vtab("sun397", "natural", "sun397/tfds", "4.0.0", "4.", 397, 21750, "file_name", ("sun397",), Start("validation")),
    Vtab("camelyon", "specialized", "patch_camelyon", "2.0.0", "2.", 2, 32768, "id", ("patch_camelyon",),
         Start("validation")),
    Vtab("eurosat", "specialized", "eurosat/rgb", "2.0.0", "2.", 10, 5400, "filename", ("eurosat",),
         Start("train", (6,)), Start("train", (6, 2))),
    Vtab("resisc45", "specialized", "resisc45", "3.0.0", "3.", 45, 6300, "filename", ("resisc45",),
         Start("train", (6,)), Start("train", (6, 2))),
    Vtab("retinopathy", "specialized", "diabetic_retinopathy_detection/btgraham-300", "3.0.0", "3.", 5, 42670, "name",
         ("diabetic_retinopathy",), Start("validation")),
    _clevr("clevr_count", clevr_count, tuple(f"{count} objects" for count in range(3, 11))),
    _clevr("clevr_dist", clevr_distance, ("up to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "over 10")),
    Vtab("dmlab", "structured", "dmlab", "2.0.1", "", 6, 22735, "filename", ("dmlab",), Start("validation")),
    Vtab("kitti_dist", "structured", "kitti", "3.3.0", "3.", 4, 711, "image/file_name", ("kitti",),
         Start("validation"), label=kitti_distance, names=("up to 8 m", "8 to 20 m", "over 20 m", "no vehicle"),
         benchmark="3.1.0"),
    _dsprites("dspr_loc", "dsprites_loc", "label_x_position", 32, "location"),
    _dsprites("dspr_ori", "dsprites_ori", "label_orientation", 40, "orientation"),
    _smallnorb("snorb_azim", "smallnorb_azi", "label_azimuth", range(0, 360, 20)),
    _smallnorb("snorb_ele", "smallnorb_ele", "label_elevation", range(30, 75, 5)),
)

ENTRIES: tuple[Entry, ...] = tuple(task.entry() for task in TASKS)
SUITES: dict[str, tuple[str, ...]] = {"vtab1k": tuple(entry.name for entry in ENTRIES)}
