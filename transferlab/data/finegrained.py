"""Fine-grained sets, as class folders or as TFDS prepares them: ImageNet-to-Sketch, and the eleven recalled for InCA.

ImageNet-to-Sketch is the five sets of Piggyback (Mallya et al., arXiv 1801.06519; sizes as published there), whose
folders hold birds and cars cropped to their bounding boxes. Those of TFDS are not cropped, which a remark says.

"inca11" is the list of eleven that we recall for InCA (arXiv 2303.04105). Its paper was not at hand, its splits are not
known to us: these are the sets' official ones, and their average is not the paper's.

Parts: "test"; "trainval", everything else, which the final training takes; for tuning "train" and "val", which are the
set's own or else a stratified cut of trainval, 20 % with seed 0. EuroSAT has no split at all: its test is such a cut.
"""
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from transferlab.data import tfds
from transferlab.data.builders import Builder
from transferlab.data.entries import Entry, Source
from transferlab.data.folders import split_folders, subfolders, image_folder
from transferlab.data.split import stratified
from transferlab.data.tasks import DataError, Split, Task
from transferlab.data.templates import TEMPLATES, readable

CUT = 0.2  # share of a validation or test split that a set does not bring
PHASES = {"final": {"train": "trainval", "test": "test"}, "tune": {"train": "train", "val": "val"}}
UNCROPPED = "whole images; those published with ImageNet-to-Sketch are cropped to the bounding box"


@dataclass(frozen=True)
class FineGrained:
  """One set.

  Attributes:
    dataset: our name for it.
    folders: usual names below the data directory, with train/, test/ and perhaps val/ in them.
    num_classes: None where unknown to us.
    trainval, test: published numbers of images, None where unknown to us.
    builder: TFDS's, None if it has none.
    key: the feature that names an example there.
    splits: TFDS's names of train, val and test, "" for one that is to be cut.
    whole: folders that hold the classes themselves, of a set without splits.
    cropped: the published folder of images cropped to bounding boxes; other sources get a remark.
  """
  dataset: str
  folders: tuple[str, ...]
  num_classes: int | None = None
  trainval: int | None = None
  test: int | None = None
  builder: Builder | None = None
  key: str = ""
  splits: tuple[str, str, str] = ("train", "", "test")
  whole: tuple[str, ...] = ()
  cropped: str = ""

  def find(self, data_dir: Path) -> list[Source]:
    """Folders first: who made them wants them read. See `Entry.find`."""
    found = [source for folder in self.folders for source in _folder(data_dir / folder)]
    found += [Source("folder", data_dir / name) for name in self.whole
              if (data_dir / name).is_dir() and len(subfolders(data_dir / name)) == self.num_classes]
    found += tfds.find(data_dir, *self.builder) if self.builder else []
    if self.cropped:
      found = [replace(source, remark="; ".join(filter(None, (source.remark, UNCROPPED)))) for source in found]
      found = _folder(data_dir / self.cropped) + found
    return sorted(found, key=lambda source: bool(source.problem))

  def part(self, source: Source, part: str) -> Split:
    """trainval, train, val or test; see `Entry.part`."""
    own = partial(self._from_folder if source.format == "folder" else self._from_tfds, source)
    if part == "test":
      return own("test")
    train, val = own("train"), own("val")
    if part == "trainval":
      return train if val is None else tfds.concatenate(part, train, val)
    if val is None:
      train, val = _cut(train, "val")
    return train if part == "train" else val

  def class_names(self, source: Source) -> tuple[str, ...]:
    """By label."""
    names = _image_folder(source).class_names if source.format == "folder" else tfds.class_names(source)
    return readable(names, self.dataset)

  def _from_folder(self, source: Source, name: str) -> Split | None:
    return _image_folder(source).splits.get(name)

  def _from_tfds(self, source: Source, name: str) -> Split | None:
    train, val, test = self.splits
    official = {"train": train, "val": val, "test": test}[name]
    rows = range(tfds.sizes(source).get(official or train, 0))
    read = partial(tfds.examples, source, rows=rows, name=name, label=tfds.stored_label, key=self.key)
    if name == "val" and not val:
      return None
    if test:
      return read(official)
    return _cut(read(train), "test")[name == "test"]


def _image_folder(source: Source) -> Task:
  """Its splits, with val only if it is there; test is cut where there is none."""
  return image_folder(source.path, val_fraction=0, test_fraction=CUT, seed=0)


def _folder(path: Path) -> list[Source]:
  """A folder with train/ and test/; with one of them it is half a set, without both it is something else."""
  try:
    splits = split_folders(path) if path.is_dir() else {}
  except DataError as error:
    return [Source("folder", path, problem=str(error))]
  if not {"train", "test"} & set(splits):
    return []
  missing = [name for name in ("train", "test") if name not in splits]
  problem = f"{path} has no {missing[0]}/ with class folders; expected train/ and test/; complete it" if missing else ""
  return [Source("folder", path, problem=problem)]


def _cut(split: Split, name: str) -> tuple[Split, Split]:
  """Train and `name`, the same for ever; a class too small to be cut stays in train."""
  rows = stratified(split.labels, np.arange(len(split)), {name: CUT}, (), seed=0, strict=False)
  return split.select(rows["train"], "train"), split.select(rows[name], name)


CUB = FineGrained("cub200", ("cub200", "CUB_200_2011", "cub"), 200, 5994, 5794,
                  Builder("caltech_birds2011", "0.2.0"), "image/filename")
CARS = FineGrained("stanford_cars", ("stanford_cars", "stanford-cars", "cars"), 196, 8144, 8041,
                   Builder("cars196", "2.1.0", "2."), "id")
FLOWERS = FineGrained("oxford_flowers", ("flowers", "oxford_flowers", "flowers102"), 102, 2040, 6149,
                      Builder("oxford_flowers102", "2.1.1", "2."), "file_name", ("train", "validation", "test"))

IMAGENET_TO_SKETCH = (
    replace(CUB, cropped="cubs_cropped"),
    replace(CARS, cropped="stanford_cars_cropped"),
    FLOWERS,
    FineGrained("wikiart", ("wikiart", "WikiArt"), 195, 42129, 10628),
    FineGrained("sketches", ("sketches",), 250, 16000, 4000),
)
INCA = (
    CUB,
    FineGrained("dtd", ("dtd",), 47, 3760, 1880, Builder("dtd", "3.0.1", "3."), "file_name",
                ("train", "validation", "test")),
    FineGrained("eurosat", ("eurosat", "EuroSAT"), 10, 21600, 5400, Builder("eurosat/rgb", "2.0.0", "2."), "filename",
                ("train", "", ""), whole=("eurosat/2750", "EuroSAT_RGB")),
    FineGrained("fgvc_aircraft", ("fgvc_aircraft", "fgvc-aircraft", "aircraft"), 100, 6667, 3333),
    FineGrained("flood_depth", ("flood_depth", "flooddepth", "flood-depth")),
    FineGrained("herbarium", ("herbarium", "herbarium2019", "herbarium-2019-fgvc6")),
    FineGrained("mit67", ("mit67", "MIT-67", "mit_indoor_67", "indoor67"), 67, 5360, 1340),
    FLOWERS,
    FineGrained("oxford_pets", ("oxford_pets", "oxford-pets", "pets"), 37, 3680, 3669,
                Builder("oxford_iiit_pet", "4.0.0", "3."), "file_name"),
    CARS,
    FineGrained("stanford_dogs", ("stanford_dogs", "stanford-dogs", "dogs"), 120, 12000, 8580,
                Builder("stanford_dogs", "0.2.0"), "image/filename"),
)


def _entry(prefix: str, protocol: str, how: str, task: FineGrained) -> Entry:
  ways = [f"{task.cropped or task.folders[0]}/{{train,test}}/<class>/*", *(f"{name}/<class>/*" for name in task.whole)]
  if task.builder:
    ways.append(f"{task.builder.name}/{task.builder.pinned}/ as TFDS prepares it")
  return Entry(
      f"{prefix}/{task.dataset}", protocol, task.find, task.part, task.class_names, PHASES,
      num_classes=task.num_classes, counts={k: n for k, n in (("trainval", task.trainval), ("test", task.test)) if n},
      builders=(str(task.builder),) if task.builder else (), layout=" or ".join(ways), how=how,
      templates=TEMPLATES.get(task.dataset, ()))


ENTRIES: tuple[Entry, ...] = (
    *(_entry("i2s", "ImageNet-to-Sketch", "github.com/arunmallya/piggyback links to the published folders", task)
      for task in IMAGENET_TO_SKETCH),
    *(_entry("inca", "official splits of a recalled list of sets", "sort the official splits into such folders", task)
      for task in INCA))
SUITES: dict[str, tuple[str, ...]] = {
    "imagenet_to_sketch": tuple(entry.name for entry in ENTRIES if entry.name.startswith("i2s/")),
    "inca11": tuple(entry.name for entry in ENTRIES if entry.name.startswith("inca/"))}
