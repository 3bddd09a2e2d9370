"""Images per second through the loaders, against the bare cost of decoding and resizing the same files.

    python benchmarks/loader.py                             1,000 JPEGs of 500x375 pixels, made in a temporary folder
    python benchmarks/loader.py --data=/my/images           a folder with one sub-folder per class
    python benchmarks/loader.py --workers=0,2,4 --rounds=9

The measure is one thread that opens each file with Pillow and resizes it to 224x224, and nothing else: no check, no
orientation, no array, no batch. The same on all threads says what the machine's cores are worth together. Loaders
stream (cache=False) and are timed once they run, their start apart. Then the time from `image_folder` to the first
training batch of the same files, all decoded and kept (cache="auto"), against the bare work on as many threads.

Everything is timed in turn in one process, round after round, so that other programs on the machine disturb all alike;
the ratios are those of the best and of the median times. Run it on an idle machine all the same.
"""
import argparse
import itertools
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain  # noqa: F401  with jax it takes a second to import, which belongs to no loader
import numpy as np
from PIL import Image

from transferlab import data
from transferlab.backbones.spec import Preprocessing
from transferlab.data import cache

WARM = 4  # batches before the clock starts: workers are then in step, and no batch lies ready


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--data", help="a folder with one sub-folder per class; default: images made for the purpose")
  parser.add_argument("--images", type=int, default=1000, help="how many to make")
  parser.add_argument("--size", type=int, default=224, help="pixels to resize to")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--workers", default="0,2", help="numbers of worker processes")
  parser.add_argument("--rounds", type=int, default=5)
  return parser.parse_args()


def make_images(folder: Path, count: int) -> None:
  """`count` JPEGs [375, 500, 3] in two classes: crops of noise that is weaker with each octave, about 80 kB each."""
  rng, height, width = np.random.default_rng(0), 1500, 2000
  field = np.full((height, width, 3), 120, np.float32)
  for octave in range(3, 12):
    for channel in range(3):
      noise = rng.normal(0, 60 * 0.8**(octave - 3), (2**octave * 3 // 4, 2**octave)).astype(np.float32)
      field[..., channel] += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
  field = field.clip(0, 255).astype(np.uint8)
  for i in range(count):
    top, left = rng.integers(height - 375), rng.integers(width - 500)
    path = folder / "ab"[i % 2] / f"{i:05d}.jpg"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(field[top:top + 375, left:left + 500]).save(path, quality=90)


def bare(paths: list[str], size: int, threads: int) -> float:
  """Seconds of decoding and resizing them all."""
  def one(path: str) -> None:
    with Image.open(path) as image:
      (image if image.mode == "RGB" else image.convert("RGB")).resize((size, size), Image.Resampling.BICUBIC)

  start = time.perf_counter()
  with ThreadPoolExecutor(threads) as pool:
    list(pool.map(one, paths))
  return time.perf_counter() - start


def streamed(what: str, split: data.Split, preprocessing: Preprocessing, batch: int, workers: int
             ) -> tuple[float, float]:
  """(seconds to the first batch, seconds per image once it runs) of about one epoch of the "train" or "eval" loader."""
  start = time.perf_counter()
  options = {"batch_size": batch, "workers": workers, "cache": False}
  batches = iter(data.train_loader(split, preprocessing, seed=0, **options) if what == "train" else
                 data.eval_loader(split, preprocessing, **options))
  next(batches)
  first = time.perf_counter() - start
  for _ in range(WARM - 1):
    next(batches)
  count = len(split) // batch - WARM
  start = time.perf_counter()
  for _ in range(count):
    next(batches)
  seconds = (time.perf_counter() - start) / (count * batch)
  batches.close()
  return first, seconds


def kept(folder: str, preprocessing: Preprocessing, batch: int) -> float:
  """Seconds from the folder's name to the first batch, with all its images decoded and in memory."""
  start = time.perf_counter()
  task = data.image_folder(folder, val_fraction=0, test_fraction=0)
  loader = data.train_loader(task.splits["train"], preprocessing, batch_size=batch, seed=0)
  next(loader)
  seconds = time.perf_counter() - start
  loader.close()
  return seconds


def measure(args, folder: str) -> tuple[int, dict[str, list[float]], dict[str, list[float]]]:
  """Number of images; name -> seconds per image of each round; name -> seconds to the first batch of each round."""
  preprocessing = Preprocessing(args.size)
  split, _ = data.check_images(data.image_folder(folder, val_fraction=0, test_fraction=0).splits["train"])
  paths, every = [str(Path(folder) / key) for key in split.keys], f"bare, {cache.THREADS} threads"
  if len(paths) // args.batch <= WARM:
    raise SystemExit(f"{len(paths)} images make {len(paths) // args.batch} batches; expected more than {WARM}")
  rates, firsts = {}, {}
  for _ in range(args.rounds):
    for name, threads in (("bare, 1 thread", 1), (every, cache.THREADS)):
      rates.setdefault(name, []).append(bare(paths, args.size, threads) / len(paths))
    for what, workers in itertools.product(("train", "eval"), map(int, args.workers.split(","))):
      first, seconds = streamed(what, split, preprocessing, args.batch, workers)
      rates.setdefault(f"{what}_loader, {workers} workers", []).append(seconds)
      if what == "train":
        firsts.setdefault(f"streamed, {workers} workers", []).append(first)
    firsts.setdefault("all kept", []).append(kept(folder, preprocessing, args.batch))
    firsts.setdefault(every, []).append(bare(paths, args.size, cache.THREADS))
  return len(paths), rates, firsts


def report(args, load: float, count: int, rates: dict[str, list[float]], firsts: dict[str, list[float]]) -> None:
  one, every = rates["bare, 1 thread"], firsts[f"bare, {cache.THREADS} threads"]
  print(f"{count} images to {args.size} px, batches of {args.batch}, {args.rounds} rounds; {os.cpu_count()} cores, "
        f"load before {load:.1f}\n")
  print(f"{'':26}{'images/s':>10}{'':>10}{'of bare, 1 thread':>20}")
  print(f"{'streaming':26}{'best':>10}{'median':>10}{'best':>10}{'median':>10}")
  for name, seconds in rates.items():
    print(f"{name:26}{1 / min(seconds):10.0f}{1 / np.median(seconds):10.0f}"
          f"{min(one) / min(seconds):10.2f}{np.median(one) / np.median(seconds):10.2f}")
  print(f"\n{'':26}{'seconds':>10}{'':>10}{'of bare, all threads':>20}")
  print(f"{'to the first batch':26}{'best':>10}{'median':>10}{'best':>10}{'median':>10}")
  for name, seconds in firsts.items():
    print(f"{name:26}{min(seconds):10.2f}{np.median(seconds):10.2f}"
          f"{min(seconds) / min(every):10.2f}{np.median(seconds) / np.median(every):10.2f}")


def main() -> None:
  args, load = arguments(), os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as made:
    if not args.data:
      make_images(Path(made), args.images)
    report(args, load, *measure(args, args.data or made))


if __name__ == "__main__":  # worker processes import this file
  main()
