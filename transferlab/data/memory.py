"""Tasks in memory: arrays of your own, and scikit-learn's handwritten digits, which need no download."""
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transferlab.data.lists import index_labels
from transferlab.data.split import complete
from transferlab.data.tasks import SPLITS, DataError, Split, Task, some


@dataclass(frozen=True)
class ArrayReader:
  """Row i of uint8 images [N, H, W] (grey), [N, H, W, 1] or [N, H, W, 3]."""
  images: np.ndarray

  def __call__(self, row: int) -> np.ndarray:
    image = self.images[row]
    return np.ascontiguousarray(np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3)))


def arrays(images: np.ndarray, labels: Sequence, class_names: Sequence[str] | None = None,
           splits: Mapping[str, Iterable[int]] | None = None, val_fraction: float = 0.2, test_fraction: float = 0.2,
           seed: int = 0, name: str = "arrays") -> Task:
  """Images uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] with N labels (class indices or names).

  Args:
    splits: name -> rows, some of train, val, test; default everything, split automatically. What is missing is cut from
      train as `split.complete` says.

  Raises:
    DataError: images that are not uint8 (floats have no agreed range: 0..1, -1..1 and 0..255 are all in use), not of a
      shape above, or not as many as labels; an unknown split name.
  """
  images = np.asarray(images)
  if images.dtype != np.uint8:
    hint = "multiply by 255 and round if they run from 0 to 1" if images.dtype.kind == "f" else "scale to 0..255"
    raise DataError(f"images are {images.dtype}; expected uint8 from 0 to 255; {hint}, then .astype('uint8')")
  if not (images.ndim == 3 or images.ndim == 4 and images.shape[3] in (1, 3)) or 0 in images.shape:
    raise DataError(f"images have shape {list(images.shape)}; expected [N, H, W], [N, H, W, 1] or [N, H, W, 3]; "
                    "move the channels to the end with np.moveaxis if they come first")
  if len(labels) != len(images):
    raise DataError(f"found {len(images)} images and {len(labels)} labels; expected one label per image")
  if np.asarray(labels).dtype.kind == "f":
    raise DataError(f"labels are {np.asarray(labels).dtype}; expected whole numbers from 0, or class names")
  labels, class_names = index_labels([str(label) for label in labels], class_names)
  splits = {"train": range(len(images))} if splits is None else splits
  unknown = [k for k in splits if k not in SPLITS]
  if unknown:
    raise DataError(f"splits has {some(unknown)}; expected some of {', '.join(SPLITS)}")
  splits = {k: np.asarray(list(splits[k]), np.int64) for k in SPLITS if k in splits}
  for k, rows in splits.items():
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(images):
      raise DataError(f"split {k!r} has rows {rows.min()}..{rows.max()}; expected 0..{len(images) - 1}")
  splits = complete(splits, labels, class_names, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
  # The checksum makes the split's hash depend on the pixels: positions alone would be the same for any array.
  keys = tuple(f"{row:06d}-{zlib.crc32(np.ascontiguousarray(image)):08x}" for row, image in enumerate(images))
  everything = Split("all", keys, labels, ArrayReader(images), verified=True)
  return Task(name, class_names, {k: everything.select(rows, k) for k, rows in splits.items()})


def digits(seed: int = 0) -> Task:
  """scikit-learn's 1,797 handwritten digits, grey 8x8: train 1000, val 200, test 597, stratified.

  The source's levels 0..16 become 0..255; enlarging is left to the backbone's preprocessing.
  Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
  """
  from sklearn import datasets, model_selection  # half a second of import that other tasks do not need
  data = datasets.load_digits()
  images = np.round(data.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
  rows, test = model_selection.train_test_split(np.arange(len(images)), test_size=597, stratify=data.target,
                                                random_state=seed)
  train, val = model_selection.train_test_split(rows, test_size=200, stratify=data.target[rows], random_state=seed)
  splits = {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}
  return arrays(images, data.target, splits=splits, name="digits")
