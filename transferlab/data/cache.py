"""The pass over all images before step 1: finds those that cannot be read, keeps the pixels if they fit in memory."""
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from transferlab.backbones.spec import Preprocessing
from transferlab.data.image import preprocess
from transferlab.data.tasks import BadImage, DataError, Split

CACHE_BYTES = 2**30  # what "auto" may keep per loader
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes and resizes without holding Python's lock
Progress = Callable[[int, int], None]  # called with (images done, images in all)


@dataclass(frozen=True)
class Examples:
  """The readable rows of a split, with their pixels if kept.

  Attributes:
    split: the split without its unreadable images.
    rows: int32 [N], where each of them stood in the split that was given.
    images: [N, S, S, 3] preprocessed, or N originals uint8 [H, W, 3], or None: read from the files as needed.
    problems: one line per image left out.
  """
  split: Split
  rows: np.ndarray
  images: np.ndarray | Sequence[np.ndarray] | None
  problems: tuple[str, ...]

  def image(self, row: int) -> np.ndarray:
    return self.split.picture(row) if self.images is None else self.images[row]


def check_images(split: Split, bad_images: str = "error", progress: Progress | None = None
                 ) -> tuple[Split, tuple[str, ...]]:
  """Decodes every image once; returns the split without the unreadable ones, and one line for each of those.

  A loader given the result streams without a pass of its own.

  Raises:
    BadImage: with `bad_images="error"`, after the whole pass, so that the count is known.
    DataError: nothing readable is left.
  """
  examples = load(split, None, cache=False, bad_images=bad_images, progress=progress)
  return examples.split, examples.problems


def read_once(split: Split, bad_images: str = "error", progress: Progress | None = None
              ) -> tuple[Split, tuple[str, ...]]:
  """As `check_images`, and the split that comes back reads from memory if the originals take at most `CACHE_BYTES`.

  A split known to be readable, such as arrays in memory, comes back as it is.
  """
  if split.verified:
    return split, ()
  examples = load(split, None, cache="auto", bad_images=bad_images, progress=progress)
  if examples.images is None:
    return examples.split, examples.problems
  return replace(examples.split, read=_Kept(examples.images)), examples.problems


@dataclass(frozen=True)
class _Kept:
  """Reads row i from decoded images."""
  images: Sequence[np.ndarray]

  def __call__(self, row: int) -> np.ndarray:
    return self.images[row]


def load(split: Split, preprocessing: Preprocessing | None, *, cache: bool | str, bad_images: str = "error",
         progress: Progress | None = None, budget: int = CACHE_BYTES) -> Examples:
  """The pass; see `Examples` for what comes back.

  Args:
    preprocessing: keep images of this form; None keeps the originals.
    cache: keep the pixels: True, False, or "auto", if they take at most `budget` bytes.
    bad_images: "error" or "skip".
  """
  if bad_images not in ("error", "skip") or cache not in (True, False, "auto"):
    raise ValueError(f"bad_images is {bad_images!r} and cache {cache!r}; expected 'error' or 'skip', and True, False "
                     "or 'auto'")
  if not len(split):
    raise DataError(f"split {split.name!r} has no image; expected at least one")
  size = len(split) * 3 * preprocessing.image_size**2 * np.dtype(preprocessing.pixels).itemsize if preprocessing else 0
  keep = cache is True or cache == "auto" and size <= budget
  if not keep and split.verified:
    return Examples(split, np.arange(len(split), dtype=np.int32), None, ())
  # Preprocessed images go into one array at once; a list stacked at the end would need the memory twice.
  whole = preprocessing and (len(split), *[preprocessing.image_size] * 2, 3)
  kept = np.empty(whole, preprocessing.pixels) if keep and preprocessing else []
  rows, problems, used = [], [], 0
  for row, image in enumerate(_decode_all(split, preprocessing if keep else None, progress)):
    if isinstance(image, BadImage):
      problems.append(str(image))
      continue
    if keep and preprocessing:
      kept[len(rows)] = image
    elif keep:
      kept.append(image)
      used += image.nbytes
      if cache == "auto" and used > budget:  # the size of originals shows only now
        keep = False
        kept.clear()
    rows.append(row)
  _report(split, problems, bad_images)
  split = replace(split.select(rows) if problems else split, verified=True)
  return Examples(split, np.array(rows, np.int32), kept[:len(rows)] if keep else None, tuple(problems))


def _decode_all(split: Split, preprocessing: Preprocessing | None, progress: Progress | None
                ) -> Iterator[np.ndarray | BadImage]:
  def one(row: int) -> np.ndarray | BadImage:
    try:
      image = split.picture(row) if preprocessing else split.read(row)
    except BadImage as e:
      return e
    return preprocess(image, preprocessing) if preprocessing else image

  with ThreadPoolExecutor(THREADS) as pool:
    for start in range(0, len(split), 256):  # `map` hands out all its work at once; in parts, few images are in flight
      stop = min(start + 256, len(split))
      yield from pool.map(one, range(start, stop))
      if progress:
        progress(stop, len(split))


def _report(split: Split, problems: list[str], bad_images: str) -> None:
  if len(problems) == len(split):
    raise DataError(f"none of the {len(split)} images of split {split.name!r} can be read; first: {problems[0]}")
  if problems and bad_images == "error":
    raise BadImage(f"{len(problems)} of {len(split)} images of split {split.name!r} cannot be read; first: "
                   f"{problems[0]}; replace or remove them, or leave them out with --bad_images=skip")
