"""CoOp's eleven few-shot tasks, in the layout of its DATASETS.md (github.com/KaiyangZhou/CoOp).

Nine sets have their split in `split_zhou_<Name>.json`: {"train": [[image path, label, class name], …], "val", "test"}.
FGVC-Aircraft has its official lists of variants, ImageNet its folders. Of train, `shots` images per class are drawn,
and then, with the same generator, at most 4 of val; CoOp's seeds are 1 to 3. The draws that CoOp itself has kept in
`split_fewshot/*.pkl` are never read: they are pickles, which may run anything.

On ImageNet, CoOp draws from the files in the order that the disk gives them. Here they are sorted, so that those draws
are others; and its val is its test there, so that there is no val here.
"""
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from transferlab.data import imagenet
from transferlab.data.entries import Entry, Source
from transferlab.data.fewshot import PHASES, few_shot, read_class_names
from transferlab.data.files import FileReader
from transferlab.data.lists import leaves, missing_files, text_lines
from transferlab.data.tasks import DataError, Split, some
from transferlab.data.templates import TEMPLATES, readable

Rows = dict[str, list[tuple[str, int, str]]]  # split -> (image path, label, class name) of its examples


@dataclass(frozen=True)
class Layout:
  """One set of CoOp's.

  Attributes:
    dataset: our name for it.
    folder: below the data directory.
    split: <Name> of split_zhou_<Name>.json; "" for the official lists of FGVC-Aircraft.
    images: what image paths are relative to, below `folder`.
    parts: folders that `images` consists of; () for the folder itself.
  """
  dataset: str
  folder: str
  split: str
  images: str
  parts: tuple[str, ...] = ()

  @property
  def files(self) -> tuple[str, ...]:
    """Names of the files that hold the split."""
    if self.split:
      return (f"split_zhou_{self.split}.json",)
    return ("variants.txt", *(f"images_variant_{part}.txt" for part in ("train", "val", "test")))

  @property
  def image_folders(self) -> tuple[str, ...]:
    """The folders that have to be there, below `folder`."""
    return self.parts or (self.images,)


def _find(layout: Layout, data_dir: Path) -> list[Source]:
  """Present if a split file or an image folder is there, usable if all of both are."""
  folder = data_dir / layout.folder
  missing = [name for name in layout.files if not (folder / name).is_file()]
  missing_images = [name for name in layout.image_folders if not (folder / name).is_dir()]
  if len(missing) == len(layout.files) and len(missing_images) == len(layout.image_folders):
    return []
  lost = missing + missing_images
  problem = f"{folder} has no {', '.join(lost)}; complete it as CoOp's DATASETS.md says" if lost else ""
  if layout.split:
    return [Source("split_zhou", folder / layout.files[0], problem=problem)]
  return [Source("list", folder, problem=problem)]


def _part(layout: Layout, source: Source, part: str, shots: int = 16, seed: int = 1) -> Split:
  def whole(name: str) -> Split:
    files, labels, _ = zip(*rows[name])
    return Split(name, files, np.array(labels, np.int32), FileReader(tuple(str(root / file) for file in files)))

  rows = _rows(layout, source)
  root = (source.path.parent if layout.split else source.path) / layout.images
  split = whole("train" if part == "val" else part)
  if part != "test":
    generator = random.Random(seed)
    split = few_shot(split, shots, generator)
  if part == "val":
    split = few_shot(whole("val"), min(shots, 4), generator)
  if missing := missing_files(root, split.keys):
    raise DataError(f"{source.path} names {split.keys[missing[0]]}, which is not in {root} ({len(missing)} of "
                    f"{len(split)} {part} images are missing); complete the images")
  return split


def _class_names(layout: Layout, source: Source) -> tuple[str, ...]:
  names = {label: name for rows in _rows(layout, source).values() for _, label, name in rows}
  return readable((names[label] for label in sorted(names)), layout.dataset)


def _rows(layout: Layout, source: Source) -> Rows:
  if not layout.split:
    return _variants(source.path)
  status = source.path.stat()
  return dict(_read_json(source.path, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1)  # train, val, test and the class names of one task each ask for it
def _read_json(path: Path, modified: int, size: int) -> MappingProxyType:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as e:
    raise DataError(f"{path} is no JSON ({e}); was it cut short? fetch it again") from None
  if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in ("train", "val", "test")):
    raise DataError(f"{path} holds {_kind(content)}; expected an object with the lists train, val and test")
  rows = {part: [_row(path, part, i, row) for i, row in enumerate(content[part])] for part in ("train", "val", "test")}
  for part, found in rows.items():
    if not found:
      raise DataError(f"{path}: {part} is empty; expected [image path, label, class name] lists; fetch it again")
  _check_labels(path, rows)
  return MappingProxyType(rows)


def _kind(content) -> str:
  return f"an object with {some(content)}" if isinstance(content, dict) else repr(content)[:60]


def _row(path: Path, part: str, index: int, row) -> tuple[str, int, str]:
  if not (isinstance(row, list) and len(row) == 3 and type(row[0]) is str and type(row[1]) is int
          and type(row[2]) is str and row[1] >= 0 and row[2].strip()):
    raise DataError(f"{path}: {part}[{index}] is {repr(row)[:80]}; expected [image path, label from 0, class name]")
  if leaves(row[0]):
    raise DataError(f"{path}: {part}[{index}] names {row[0]!r}, which leaves the folder of the images; expected a "
                    "relative path; is the file to be trusted?")
  return tuple(row)


def _check_labels(path: Path, rows: Rows) -> None:
  names = {}
  for part, found in rows.items():
    for index, (_, label, name) in enumerate(found):
      if names.setdefault(label, name) != name:
        raise DataError(f"{path}: {part}[{index}] calls class {label} {name!r}; elsewhere it is {names[label]!r}; "
                        "expected one name per label")
  if max(names) != len(names) - 1:
    lost = next(label for label in range(max(names)) if label not in names)
    raise DataError(f"{path} has {len(names)} labels up to {max(names)} and none of {lost}; expected all of 0..C-1")


def _variants(folder: Path) -> Rows:
  """FGVC-Aircraft's own lists, lines `image variant`; a label is the variant's line in variants.txt."""
  names = read_class_names(folder / "variants.txt", 100)
  labels = {name: i for i, name in enumerate(names)}
  rows = {}
  for part in ("train", "val", "test"):
    path, rows[part] = folder / f"images_variant_{part}.txt", []
    for number, line in enumerate(text_lines(path, "lines of image number and variant"), 1):
      image, _, name = line.strip().partition(" ")
      if name not in labels or leaves(image):
        raise DataError(f"{path} line {number} is {line[:80]!r}; expected an image number and a name of variants.txt")
      rows[part].append((f"{image}.jpg", labels[name], name))
  return rows


def _entry(layout: Layout, num_classes: int, test: int) -> Entry:
  return Entry(
      f"coop/{layout.dataset}", "CoOp few-shot", partial(_find, layout), partial(_part, layout),
      partial(_class_names, layout), PHASES, num_classes=num_classes, counts={"test": test},
      layout=f"{layout.folder}/ with {', '.join((*layout.files, *layout.image_folders))}",
      how="CoOp's DATASETS.md says where to get it", templates=TEMPLATES[layout.dataset])


def _imagenet() -> Entry:
  """Of our ImageNet the form with folders, tested on the validation images."""
  entry = next(entry for entry in imagenet.ENTRIES if entry.name == "imagenet/val")
  return replace(entry, name="coop/imagenet", protocol="CoOp few-shot", find=partial(_unlisted, entry.find),
                 part=partial(entry.part, seed=1))


def _unlisted(find: Callable[[Path], list[Source]], data_dir: Path) -> list[Source]:
  return [source for source in find(data_dir) if source.format != "list"]  # NOAH's lists are other draws


# Classes and test images as in the appendix of the CoOp paper (arXiv 2109.01134).
ENTRIES: tuple[Entry, ...] = (
    _imagenet(),
    _entry(Layout("caltech101", "caltech-101", "Caltech101", "101_ObjectCategories"), 100, 2465),
    _entry(Layout("oxford_pets", "oxford_pets", "OxfordPets", "images"), 37, 3669),
    _entry(Layout("stanford_cars", "stanford_cars", "StanfordCars", "", ("cars_train", "cars_test")), 196, 8041),
    _entry(Layout("oxford_flowers", "oxford_flowers", "OxfordFlowers", "jpg"), 102, 2463),
    _entry(Layout("food101", "food-101", "Food101", "images"), 101, 30300),
    _entry(Layout("fgvc_aircraft", "fgvc_aircraft", "", "images"), 100, 3333),
    _entry(Layout("sun397", "sun397", "SUN397", "SUN397"), 397, 19850),
    _entry(Layout("dtd", "dtd", "DescribableTextures", "images"), 47, 1692),
    _entry(Layout("eurosat", "eurosat", "EuroSAT", "2750"), 10, 8100),
    _entry(Layout("ucf101", "ucf101", "UCF101", "UCF-101-midframes"), 101, 3783))
SUITES: dict[str, tuple[str, ...]] = {"coop11": tuple(entry.name for entry in ENTRIES)}
