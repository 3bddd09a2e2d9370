"""ImageNet as the source of a shift: train on a few images of every class, test on ImageNet's validation images or on
those of ImageNet-V2, -Sketch, -A or -R.

NOAH and DTL train on 16 images per class (seeds 0 to 2) and decide among all 1,000 classes everywhere: "imagenet/a" and
"imagenet/r". The 200 classes that these two sets have are the only candidates in "imagenet/a_masked" and
"imagenet/r_masked", as in the sets' own papers. Labels are places among the sorted WordNet names of ImageNet's 1,000
classes, which the folders of ImageNet-V2 are called by already.
"""
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transferlab.data import builders, tfds
from transferlab.data.builders import Builder
from transferlab.data.entries import Entry, Source
from transferlab.data.fewshot import few_shot
from transferlab.data.files import FileReader
from transferlab.data.folders import subfolders, find_images
from transferlab.data.lists import published_list, text_lines
from transferlab.data.tasks import DataError, Split, some
from transferlab.data.templates import TEMPLATES

# Of TFDS's copy so many examples are read to draw few shots from: they are stored shuffled, labels beside pixels, and
# all of them are 140 GB. Of the smallest class, 732 images, 57 are expected among them.
DRAWN_FROM = 100_000
LISTS = "imagenet/annotations"  # where NOAH's lists lie


class _Set(NamedTuple):
  """A set as TFDS has it, and the folders in a data directory where it may lie instead; CoOp's names among them."""
  builder: Builder
  split: str
  folders: tuple[str, ...]
  size: int


TRAIN = _Set(Builder("imagenet2012", "5.1.0", "5."), "train", ("imagenet/train", "imagenet/images/train"), 1_281_167)
TESTS = {
    "val": _Set(TRAIN.builder, "validation", ("imagenet/val", "imagenet/images/val"), 50_000),
    "v2": _Set(Builder("imagenet_v2/matched-frequency", "3.0.0", "3."), "test",
               ("imagenetv2-matched-frequency-format-val", "imagenetv2/imagenetv2-matched-frequency-format-val"),
               10_000),
    "sketch": _Set(Builder("imagenet_sketch", "1.0.0"), "test", ("imagenet-sketch/images", "imagenet-sketch"), 50_889),
    "a": _Set(Builder("imagenet_a", "0.1.0"), "test", ("imagenet-a", "imagenet-adversarial/imagenet-a"), 7_500),
    "r": _Set(Builder("imagenet_r", "0.2.0"), "test", ("imagenet-r", "imagenet-rendition/imagenet-r"), 30_000),
}


def _find(test: _Set, data_dir: Path) -> list[Source]:
  """NOAH's lists first, since who has them wants the published images; then TFDS's sets; then folders."""
  folders = [_folder(data_dir, wanted) for wanted in (TRAIN, test)]
  found = builders.find(data_dir, dict.fromkeys((TRAIN.builder, test.builder)))
  if all(folders):
    listed = [Source("list", data_dir)] if _lists(data_dir) else []
    found = [*listed, *found, Source("folder", data_dir)]
  elif any(folders):
    there, lacking = (TRAIN, test) if folders[0] else (test, TRAIN)
    found.append(Source("folder", data_dir, problem=(
        f"{_folder(data_dir, there)} is there, but neither {' nor '.join(lacking.folders)} is in {data_dir} with a "
        "folder per class; add it")))
  return sorted(found, key=lambda source: bool(source.problem))


def _folder(data_dir: Path, wanted: _Set) -> Path | None:
  """Where a set's class folders are."""
  return next((data_dir / name for name in wanted.folders if _classes(data_dir / name)), None)


def _classes(folder: Path) -> dict[str, Path]:
  """Class folders by name: n01440764, or 0 to 999 in ImageNet-V2. Whatever else lies there is passed over."""
  found = subfolders(folder) if folder.is_dir() else {}
  return {name: path for name, path in found.items() if re.fullmatch(r"n\d{8}|\d{1,3}", name)}


def _lists(data_dir: Path) -> list[str]:
  return sorted(path.name for path in (data_dir / LISTS).glob("train_meta.list.num_shot_*.seed_*"))


def _part(test: _Set, source: Source, part: str, shots: int = 16, seed: int = 0) -> Split:
  """One part: "train" with `shots` images per class (0: all) drawn with `seed`, or "test"."""
  wanted = TRAIN if part == "train" else test
  if source.version:
    prepared = builders.one(source, wanted.builder)
    count = tfds.sizes(prepared).get(wanted.split, 0)
    rows = range(min(count, DRAWN_FROM) if part == "train" and 0 < shots <= 16 else count)
    split = tfds.examples(prepared, wanted.split, rows, part, tfds.stored_label, key="file_name")
  elif source.format == "list" and part == "train":
    return _listed(source.path, shots, seed)
  else:
    split = _read(_folder(source.path, wanted), tuple(_classes(_folder(source.path, TRAIN))), part)
  return few_shot(split, shots, seed) if part == "train" else split


def _listed(data_dir: Path, shots: int, seed: int) -> Split:
  """NOAH's list for so many shots and this seed; its images are relative to the training folder."""
  name, root = f"train_meta.list.num_shot_{shots}.seed_{seed}", _folder(data_dir, TRAIN)
  if name not in _lists(data_dir):
    raise DataError(f"{data_dir / LISTS} has no {name}; found {some(_lists(data_dir), 20)}; choose one of these, or "
                    "draw from the folders with ?source=folder")
  wnids = tuple(_classes(root))
  path = data_dir / LISTS / name
  split = published_list(path, root, "train", len(wnids))
  for image, label in zip(split.keys, split.labels.tolist()):
    if image.split("/")[0] != wnids[label]:
      raise DataError(f"{path} gives {image!r} the label {label}, which is {wnids[label]} in {root}; expected the "
                      "place of its folder among all; complete the folders or fetch the list again")
  return split


def _read(folder: Path, wnids: tuple[str, ...], part: str) -> Split:
  """Every image below the class folders of one set, by label."""
  labels = {wnid: i for i, wnid in enumerate(wnids)} | {str(i): i for i in range(len(wnids))}
  classes = _classes(folder)
  if unknown := [name for name in classes if name not in labels]:
    raise DataError(f"{folder} has the class folder {unknown[0]!r}, which is none of the {len(wnids)} of ImageNet's "
                    "training images; complete those, or remove it")
  keys, paths, found = [], [], []
  for name, class_folder in sorted(classes.items(), key=lambda item: labels[item[0]]):
    images = find_images(class_folder)
    paths += images
    keys += [f"{name}/{Path(image).relative_to(class_folder).as_posix()}" for image in images]
    found += [labels[name]] * len(images)
  return Split(part, tuple(keys), np.array(found, np.int32), FileReader(tuple(paths)))


def class_names(source: Source) -> tuple[str, ...]:
  """By label: the names in CoOp's imagenet/classnames.txt, lines "n01440764 tench", or else the WordNet names."""
  if source.version:
    wnids = tfds.class_names(builders.one(source, TRAIN.builder))
  else:
    wnids = tuple(_classes(_folder(source.path, TRAIN)))
  path = source.path / "imagenet" / "classnames.txt"
  if not path.is_file():
    return wnids
  lines = text_lines(path, "lines such as `n01440764 tench`")
  names = {wnid: name.strip() for wnid, _, name in (line.strip().partition(" ") for line in lines)}
  if unnamed := [wnid for wnid in wnids if not names.get(wnid)]:
    raise DataError(f"{path} names {len(wnids) - len(unnamed)} of {len(wnids)} classes; {unnamed[0]} is missing; "
                    "expected lines such as `n01440764 tench`; complete or remove the file")
  used = [names[wnid] for wnid in wnids]
  # CLIP's names call a few pairs of classes alike; here names tell classes apart.
  return tuple(name if used.count(name) == 1 else f"{name} ({wnid})" for wnid, name in zip(wnids, used))


def _entry(name: str, test: _Set, masked: bool = False) -> Entry:
  return Entry(
      f"imagenet/{name}", "ImageNet shift" + masked * ", among the classes present", partial(_find, test),
      partial(_part, test), class_names, {"final": {"train": "train", "test": "test"}}, num_classes=1000,
      counts={"test": test.size}, builders=tuple(dict.fromkeys((str(TRAIN.builder), str(test.builder)))),
      layout=f"{TRAIN.folders[0]}/n*/*.JPEG and {test.folders[0]}/",
      how="ImageNet is had from image-net.org with an account; CoOp's DATASETS.md says where to get the others",
      templates=TEMPLATES["imagenet"], masked=masked)


ENTRIES: tuple[Entry, ...] = (*(_entry(name, test) for name, test in TESTS.items()),
                              *(_entry(f"{name}_masked", TESTS[name], masked=True) for name in ("a", "r")))
SUITES: dict[str, tuple[str, ...]] = {"imagenet_shift": tuple(f"imagenet/{name}" for name in TESTS)}
