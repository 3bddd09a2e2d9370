"""Few-shot tasks: k images of every class, and the five fine-grained sets with NOAH's published lists.

NOAH (github.com/ZhangYuanhan-AI/NOAH, data/few-shot) publishes lists for 1, 2, 4, 8 and 16 shots with seeds 0 to 2,
which DTL and others use: `train_meta.list.num_shot_<shots>.seed_<seed>`, `val_meta.list` and `test_meta.list`, of lines
`path label`. The lists are taken as they are: that of pets with 1 shot has each of its 37 images twice.
"""
import os
import random
import re
from functools import partial
from pathlib import Path

from transferlab.data.entries import Entry, Source
from transferlab.data.lists import leaves, published_list, read_list, text_lines
from transferlab.data.tasks import DataError, Split
from transferlab.data.templates import TEMPLATES, readable

# Where lists are looked for, below the data directory: beside the images, in NOAH's own tree, in the one of DTL.
BASES = ("", "few-shot", "few-shot_split", "FGFS", "FGFS/few-shot_split")
TRAIN_LIST = re.compile(r"train_meta\.list\.num_shot_(\d+)\.seed_(\d+)")
PHASES = {"final": {"train": "train", "val": "val", "test": "test"}, "tune": {"train": "train", "val": "val"}}


def few_shot(split: Split, shots: int, seed: int | random.Random) -> Split:
  """`shots` images of every class, all of a class that has fewer; 0 keeps the split whole.

  Drawn as Dassl draws them, whose sampler CoOp uses (`generate_fewshot_dataset`): classes in the order of their first
  image, each with `random.sample` from its images in their order, one generator of Python's throughout. CoOp seeds that
  generator at its start; that nothing draws from it before the data set does is read from its code, not verified by
  running it. A class with fewer images than `shots` is filled up by repetition in some revisions of Dassl and not in
  others; here it is not.

  Args:
    seed: a number, or the generator itself where several splits are drawn one after another.
  """
  if shots < 0:
    raise DataError(f"shots is {shots}; expected a number of images per class, or 0 for all")
  if shots == 0:
    return split
  generator = seed if isinstance(seed, random.Random) else random.Random(seed)
  rows = {}
  for row, label in enumerate(split.labels.tolist()):
    rows.setdefault(label, []).append(row)
  return split.select([row for members in rows.values()
                       for row in (generator.sample(members, shots) if len(members) >= shots else members)])


def _find(folders: tuple[str, ...], data_dir: Path) -> list[Source]:
  found = []
  for base in BASES:
    for folder in folders:
      lists = data_dir / base / folder / "annotations"
      if any(lists.glob("*_meta.list*")):
        found.append(Source("list", lists, problem=_problem(lists, folders)))
  return sorted(found, key=lambda source: bool(source.problem))


def _problem(lists: Path, folders: tuple[str, ...]) -> str:
  for name in ("val_meta.list", "test_meta.list"):
    if not (lists / name).is_file():
      return f"{lists} has no {name}; copy all of NOAH's lists"
  if not draws(lists):
    return f"{lists} has no train_meta.list.num_shot_*.seed_*; copy all of NOAH's lists"
  try:
    images = _images(lists, folders)
  except DataError as error:  # a test list that cannot be read
    return str(error)
  if images is None:
    return (f"the images of {lists} are neither beside it nor in a folder {' or '.join(folders)} next to it (images/ "
            "or jpg/ below it, or none); put them there")
  return ""


def _images(lists: Path, folders: tuple[str, ...]) -> Path | None:
  """The folder that the test list's first image is relative to."""
  image = read_list(lists / "test_meta.list")[0][0]
  own = lists.parent
  for folder in (own, *(top / name for top in (own.parent, own.parent.parent) for name in folders)):
    for inner in ("images", "jpg", ""):
      if not leaves(image) and (folder / inner / image).is_file():
        return folder / inner
  return None


def _part(folders: tuple[str, ...], num_classes: int, source: Source, part: str, shots: int = 16, seed: int = 0
          ) -> Split:
  path = source.path / (f"train_meta.list.num_shot_{shots}.seed_{seed}" if part == "train" else f"{part}_meta.list")
  if not path.is_file():
    raise DataError(f"{source.path} has no {path.name}; it has {_listed(source.path)}; choose among these, or sample "
                    "from another source with ?shots=")
  return published_list(path, _images(source.path, folders), part, num_classes)


def draws(lists: Path) -> list[tuple[int, int]]:
  """The (shots, seed) that a folder has training lists for, sorted."""
  names = os.listdir(lists) if lists.is_dir() else ()
  return sorted((int(match[1]), int(match[2])) for match in map(TRAIN_LIST.fullmatch, names) if match)


def _listed(lists: Path) -> str:
  """'shots=1 with seed 0, 1, 2; shots=2 with ...'"""
  seeds = {}
  for shots, seed in draws(lists):
    seeds.setdefault(shots, []).append(seed)
  return "; ".join(f"shots={shots} with seed {', '.join(map(str, seeds[shots]))}" for shots in seeds)


def _class_names(dataset: str, num_classes: int, source: Source) -> tuple[str, ...]:
  """The lines of classnames.txt, beside the lists or above; without such a file the labels as text."""
  for path in (source.path / "classnames.txt", source.path.parent / "classnames.txt"):
    if path.is_file():
      return readable(read_class_names(path, num_classes), dataset)
  return tuple(map(str, range(num_classes)))


def read_class_names(path: Path, num_classes: int) -> tuple[str, ...]:
  """One class name per line, in the order of the labels."""
  names = tuple(line.strip() for line in text_lines(path, "one class name per line") if line.strip())
  if len(names) != num_classes:
    raise DataError(f"{path} has {len(names)} class names; expected {num_classes}, one per line, in the order of the "
                    "labels")
  return names


def _entry(name: str, folders: tuple[str, ...], num_classes: int, test: int) -> Entry:
  dataset = "oxford_flowers" if name == "oxford_flowers102" else name
  return Entry(
      f"fewshot/{name}", "NOAH few-shot", partial(_find, folders), partial(_part, folders, num_classes),
      partial(_class_names, dataset, num_classes), PHASES, num_classes=num_classes, counts={"test": test},
      layout=f"{folders[0]}/annotations/test_meta.list, alone or in few-shot/ or FGFS/few-shot_split/, and its images",
      how=f"the lists are in data/few-shot of github.com/ZhangYuanhan-AI/NOAH; for CoOp's split see coop/{dataset}",
      templates=TEMPLATES[dataset])


# NOAH's own folder (misspelt for cars), then CoOp's, where NOAH expects the images. The numbers of test images are
# those of CoOp's table and fit the sizes of NOAH's files.
ENTRIES: tuple[Entry, ...] = (
    _entry("fgvc_aircraft", ("fgvc-aircraft", "fgvc_aircraft"), 100, 3333),
    _entry("food101", ("food101", "food-101"), 101, 30300),
    _entry("oxford_flowers102", ("oxford-flowers102", "oxford_flowers"), 102, 2463),
    _entry("oxford_pets", ("oxford-pets", "oxford_pets"), 37, 3669),
    _entry("stanford_cars", ("standford-cars", "stanford_cars"), 196, 8041))
SUITES: dict[str, tuple[str, ...]] = {"fewshot5": tuple(entry.name for entry in ENTRIES)}
