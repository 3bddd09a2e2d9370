"""From rows of a split to batches: what the loaders have grain do. All of it pickles, for the worker processes."""
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from transferlab.backbones.spec import Preprocessing
from transferlab.data.augment import Augmentation, augment
from transferlab.data.cache import Examples
from transferlab.data.mix import mix, smooth_one_hot
from transferlab.data.tasks import DataError, Split

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rows:
  """What grain reads: place in `rows` -> the arrays of one example."""
  examples: Examples
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, place: int) -> dict:
    split, row = self.examples.split, self.rows[place]
    example = {"image": self.examples.image(row), "label": split.labels[row], "weight": np.float32(1),
               "index": self.examples.rows[row]}
    return example if split.domains is None else {**example, "domain": split.domains[row]}


@dataclass(frozen=True)
class Augment:
  """Turns an example's image into one of the backbone's size."""
  preprocessing: Preprocessing
  augmentation: Augmentation
  resized: bool

  def __call__(self, example: dict, rng: np.random.Generator) -> dict:
    return {**example, "image": augment(example["image"], self.augmentation, self.preprocessing, rng, self.resized)}


@dataclass(frozen=True)
class Collate:
  """Stacks examples and fills up to `batch_size` rows with zeros (index: -1)."""
  batch_size: int

  def __call__(self, examples: list[dict]) -> Batch:
    return _filled({name: np.stack([e[name] for e in examples]) for name in examples[0]}, self.batch_size)


@dataclass(frozen=True)
class CollateRows:
  """What `Collate` makes of rows of a split, without the images."""
  split: Split
  batch_size: int

  def __call__(self, rows: list[int]) -> Batch:
    rows, split = np.array(rows, np.int32), self.split
    batch = {"label": split.labels[rows], "weight": np.ones(len(rows), np.float32), "index": rows}
    return _filled(batch if split.domains is None else {**batch, "domain": split.domains[rows]}, self.batch_size)


@dataclass(frozen=True)
class Attach:
  """Adds the activations of a batch's rows; filling takes those of row 0."""
  activations: Callable[[np.ndarray, int], dict]
  per_epoch: int

  def __call__(self, step: int, batch: Batch) -> Batch:
    return {**batch, "activations": self.activations(np.maximum(batch["index"], 0), step // self.per_epoch)}


@dataclass(frozen=True)
class Batches:
  """What grain reads in the end: step -> `own` rows of a batch, of every stream `size` rows, one after the other.

  Fields:
    streams: endless grain datasets of examples, or of rows.
    size: rows of each stream in a batch.
    rows: in an epoch of the one stream, after which the last batch ends early; None if batches run on.
    steps: in an epoch; of an evaluation, all there are.
    own: (first, end) of the rows that are made, (0, size of the batch) for all; those beyond the batch are filling.
    collate: of lists of examples.
    endless: whether there is an epoch after the last.
  """
  streams: tuple
  size: int
  rows: int | None
  steps: int
  own: tuple[int, int]
  collate: Callable
  endless: bool

  def __len__(self) -> int:
    return sys.maxsize if self.endless else self.steps

  def __getitem__(self, step: int) -> Batch:
    if self.rows is None:
      start, count = step * self.size, self.size
    else:
      epoch, step = divmod(step, self.steps)
      start, count = epoch * self.rows + step * self.size, min(self.size, self.rows - step * self.size)
    places = [(stream, start + place) for stream in self.streams for place in range(count)][slice(*self.own)]
    if places:
      return self.collate([stream[place] for stream, place in places])
    batch = self.collate([self.streams[0][start]])  # for its shapes
    return {**batch, "weight": np.zeros_like(batch["weight"]), "index": np.full_like(batch["index"], -1)}


@dataclass(frozen=True)
class Cut:
  """Some rows of a batch."""
  first: int
  end: int

  def __call__(self, batch: Batch) -> Batch:
    return {name: values[self.first:self.end] for name, values in batch.items()}


def _filled(batch: Batch, batch_size: int) -> Batch:
  missing = batch_size - len(batch["weight"])
  if not missing:
    return batch
  return {name: np.concatenate([v, np.full((missing, *v.shape[1:]), -1 if name == "index" else 0, v.dtype)])
          for name, v in batch.items()}


@dataclass(frozen=True)
class Mix:
  """Adds `soft_label` and mixes the real rows among themselves; filling stays zero."""
  augmentation: Augmentation
  num_classes: int

  def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
    a, real = self.augmentation, int(batch["weight"].sum())
    soft = np.zeros((len(batch["label"]), self.num_classes), np.float32)  # [B, C]
    soft[:real] = smooth_one_hot(batch["label"][:real], self.num_classes, a.label_smoothing)
    if not (a.mixup or a.cutmix):
      return {**batch, "soft_label": soft}
    image = batch["image"]                                                # [B, S, S, 3]
    image[:real], soft[:real] = mix(image[:real], soft[:real], rng, a.mixup, a.cutmix)
    return {**batch, "image": image, "soft_label": soft}


def check_domains(split: Split, batch_size: int) -> None:
  """Raises `DataError` where a split cannot give `batch_size` rows of every domain."""
  if split.domains is None:
    raise DataError(f"split {split.name!r} has no domains, and one batch of every domain is asked for; use data with "
                    "domains, or per_domain=False")
  domains, counts = np.unique(split.domains, return_counts=True)
  if not 1 <= batch_size <= counts.min():
    such = split.keys[np.flatnonzero(split.domains == domains[counts.argmin()])[0]]
    raise DataError(f"batch_size {batch_size} of every domain does not suit split {split.name!r}, whose smallest "
                    f"domain (of {such!r}) has {counts.min()} images; expected 1..{counts.min()}; lower batch_size")
