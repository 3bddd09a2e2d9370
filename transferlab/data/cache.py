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


def read_once(split: Split, bad_images: str = "error", progress: Progress | None = None,
              hosts: tuple[int, int] = (0, 1), gather: Callable | None = None) -> tuple[Split, tuple[str, ...]]:
  """As `check_images`, and the split that comes back reads from memory if the originals take at most `CACHE_BYTES`.

  A split known to be readable, such as arrays in memory, comes back as it is.

  Args:
    hosts, gather: place and number of the processes that share the pass, and value -> [the value of each]. All learn
      of the same problems; only a split that then lies in memory is decoded whole by each of them.
  """
  if split.verified:
    return split, ()
  if hosts[1] > 1:
    return _read_together(split, bad_images, progress, hosts, gather)
  examples = load(split, None, cache="auto", bad_images=bad_images, progress=progress)
  if examples.images is None:
    return examples.split, examples.problems
  return replace(examples.split, read=_Kept(examples.images)), examples.problems


def _read_together(split: Split, bad_images: str, progress: Progress | None, hosts: tuple[int, int],
                   gather: Callable) -> tuple[Split, tuple[str, ...]]:
  """`read_once` of one of several processes."""
  place, count = hosts
  N, kept, problems, size = len(split), {}, [], 0
  own = range(place, N, count)
  shown = progress and (lambda done, _: progress(min(done * count, N), N))
  for row, image in zip(own, _decode_all(split, None, shown, own)):
    if isinstance(image, BadImage):
      problems.append((row, str(image)))
      continue
    size += image.nbytes
    if size <= CACHE_BYTES:
      kept[row] = image
    else:
      kept.clear()
  found = gather({"problems": problems, "bytes": size})
  lost = dict(sorted(problem for each in found for problem in map(tuple, each["problems"])))
  problems, rows = tuple(lost.values()), [row for row in range(N) if row not in lost]
  _report(split, problems, bad_images)
  whole = replace(split.select(rows) if lost else split, verified=True)
  if sum(each["bytes"] for each in found) > CACHE_BYTES:
    return whole, problems
  others = [row for row in rows if row % count != place]
  for row, image in zip(others, _decode_all(split, None, None, others)):
    if isinstance(image, BadImage):  # another process could read it
      raise image
    kept[row] = image
  return replace(whole, read=_Kept([kept[row] for row in rows])), problems


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


def _decode_all(split: Split, preprocessing: Preprocessing | None, progress: Progress | None,
                rows: Sequence[int] | None = None) -> Iterator[np.ndarray | BadImage]:
  """The images of `rows`, by default of all, in order; what was raised in place of one that cannot be read."""
  def one(row: int) -> np.ndarray | BadImage:
    try:
      image = split.picture(row) if preprocessing else split.read(row)
    except BadImage as e:
      return e
    return preprocess(image, preprocessing) if preprocessing else image

  rows = range(len(split)) if rows is None else rows
  with ThreadPoolExecutor(THREADS) as pool:
    for start in range(0, len(rows), 256):  # `map` hands out all its work at once; in parts, few images are in flight
      stop = min(start + 256, len(rows))
      yield from pool.map(one, rows[start:stop])
      if progress:
        progress(stop, len(rows))


def _report(split: Split, problems: Sequence[str], bad_images: str) -> None:
  if len(problems) == len(split):
    raise DataError(f"none of the {len(split)} images of split {split.name!r} can be read; first: {problems[0]}")
  if problems and bad_images == "error":
    raise BadImage(f"{len(problems)} of {len(split)} images of split {split.name!r} cannot be read; first: "
                   f"{problems[0]}; replace or remove them, or leave them out with --bad_images=skip")
