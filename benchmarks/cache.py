"""An epoch that trains from cached activations, against one that runs the backbone.

    python benchmarks/cache.py                                   ViT-B/16, 224 px, float32, CPU
    python benchmarks/cache.py --cases=linear,inca --rounds=5
    python benchmarks/cache.py --device=gpu                      a bfloat16 backbone

The measure is the frozen forward pass alone, the least that an epoch over images takes: images are in memory, nothing
is decoded, no head is trained. Cached epochs are whole: batches in the loader's order, gathered from the cache, put on
the device, a step with forward, backward and Adam. Their activations are random numbers in a cache written for the
purpose, in memory up to 1 GiB and mapped from the disk beyond, as always. Everything is timed per image and in turn,
round after round, so that other programs on the machine disturb all alike. Ratios are those of the best and of the
median times and of the process's CPU time, which others disturb least.
"""
import argparse
import os
import tempfile
import time


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--backbone", default="vit_b16")
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--cases", default="linear,head2toe,cls_of_all,inca")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the cache")
  parser.add_argument("--gigabytes", type=float, default=1.0, help="of activations, of each case")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--folder", help="where to write them; default: a temporary one")
  return parser.parse_args()


ARGS = arguments()
os.environ.setdefault("JAX_PLATFORMS", {"cpu": "cpu", "gpu": "cuda"}[ARGS.device])  # before jax starts

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from transferlab import backbones, cost, data, devices, features, methods, step as steps  # noqa: E402
from transferlab.backbones.spec import Preprocessing  # noqa: E402
from transferlab.backbones.weights import Weights  # noqa: E402
from transferlab.features.cache import stores  # noqa: E402
from transferlab.optim import Optim, make_optimiser  # noqa: E402
from transferlab.recipe import Recipe  # noqa: E402

SPEC = backbones.architecture(ARGS.backbone)
WANTED = {"linear": 50, "head2toe": 50, "cls_of_all": 50, "inca": 10}  # times as fast as the backbone
BATCH = {"linear": 128, "head2toe": 128, "cls_of_all": 128, "inca": 32}
FORWARD = {"cpu": 32, "gpu": 128}[ARGS.device]


def method_of(case: str):
  """`cls_of_all` stands for LFA: a linear classifier on the class tokens of all blocks."""
  if case == "cls_of_all":
    sites = tuple(f"block_{i:02d}/out" for i in range(SPEC.depth))
    return methods.build("all_features", SPEC, sites=sites, cls="only_cls", penalty="none")
  return methods.build(case, SPEC, **({"target_size": 8192} if case == "head2toe" else {}))


def written(folder: str, case: str, method):
  """(features, split) of random activations, so many that the cache has the size that is asked for."""
  each = features.bytes_per_image(SPEC, method.reads, ARGS.dtype)
  count = int(min(max(ARGS.gigabytes * 1e9 / each, 2 * BATCH[case]), 20_000)) // BATCH[case] * BATCH[case]
  images, labels = np.zeros((count, 1, 1), np.uint8), np.arange(count) % ARGS.classes
  split = data.arrays(images, labels, splits={"train": range(count)}, val_fraction=0, test_fraction=0).splits["train"]
  weights = Weights(SPEC, {}, None, Preprocessing(SPEC.image_size), SPEC.name, "random", case)
  cache = features.Cache(folder, ARGS.dtype)
  store, rng = stores(cache, weights, "train", split)[0], np.random.default_rng(0)
  columns = sorted(set(features.columns(SPEC, method.reads).values()))
  with store.writer(columns) as writer:
    for start in range(0, count, 32):
      rows = min(32, count - start)
      writer.append({column.name: rng.random((rows, *column.shape), np.float32).astype(store.dtype)
                     for column in writer.columns})
  return features.Features(cache, weights, method.reads, "train", split), split, weights


class Cached:
  """Epochs of one case."""

  def __init__(self, folder: str, case: str):
    method = method_of(case)
    self.kept, split, weights = written(folder, case, method)
    task = data.Task(case, tuple(map(str, range(ARGS.classes))), {"train": split})
    self.loader = features.train_loader(self.kept, task, weights, Recipe(batch_size=BATCH[case]))
    self.mesh = devices.make_mesh(1)
    params = backbones.abstract_params(SPEC)  # heads look at shapes only
    trainable, state = method.init(jax.random.key(0), params, ARGS.classes)
    optimiser = make_optimiser(Optim(), lambda step: 1e-3, trainable)
    self.run = steps.start(*jax.tree.map(jnp.array, (trainable, state)), optimiser)
    step = steps.make_step(method, None, optimiser, weights.preprocessing, ARGS.classes)
    batch = devices.put_batch(next(self.loader), self.mesh)
    self.step = steps.compile_step(step, self.run, {}, batch)
    self.cost = cost.of_step(self.step)

  def epoch(self) -> np.ndarray:
    """Per image: seconds of an epoch, CPU seconds of it, seconds of its steps alone on one batch."""
    count, clock, cpu = self.loader.steps_per_epoch, time.perf_counter(), time.process_time()
    for _ in range(count):
      batch = devices.put_batch(next(self.loader), self.mesh)
      self.run, _ = self.step(self.run, {}, batch)
    jax.block_until_ready(self.run)
    whole, cpu, clock = time.perf_counter() - clock, time.process_time() - cpu, time.perf_counter()
    for _ in range(count):
      self.run, _ = self.step(self.run, {}, batch)
    jax.block_until_ready(self.run)
    return np.array([whole, cpu, time.perf_counter() - clock]) / (count * self.loader.rows_per_step)


def forward():
  """A function that runs the frozen backbone on one batch and returns seconds per image."""
  dtype = {"cpu": jnp.float32, "gpu": jnp.bfloat16}[ARGS.device]
  backbone, rng = backbones.build(SPEC, dtype), np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype)
  params = jax.tree.map(draw, backbones.abstract_params(SPEC))
  images = jax.device_put(rng.integers(0, 256, (FORWARD, SPEC.image_size, SPEC.image_size, 3), np.uint8))
  run = jax.jit(lambda params, images: backbone.apply(
      params, steps.to_inputs(images, Preprocessing(SPEC.image_size)).astype(dtype))[0])
  run(params, images).block_until_ready()
  def once() -> np.ndarray:
    clock, cpu = time.perf_counter(), time.process_time()
    run(params, images).block_until_ready()
    return np.array([time.perf_counter() - clock, time.process_time() - cpu]) / FORWARD
  return once


def main() -> None:
  load, cases = os.getloadavg()[0], ARGS.cases.split(",")
  with tempfile.TemporaryDirectory() as made:
    image, epochs = forward(), {case: Cached(ARGS.folder or made, case) for case in cases}
    seconds = {name: [] for name in ("forward", *cases)}
    for _ in range(ARGS.rounds + 1):  # the first is for warming up
      for case in cases:
        seconds["forward"].append(image())
        seconds[case].append(epochs[case].epoch())
    first = {name: len(cases) if name == "forward" else 1 for name in seconds}
    report(load, epochs, {name: np.array(each[first[name]:]) for name, each in seconds.items()})
    for case in cases:
      epochs[case].loader.close()


def report(load: float, epochs: dict[str, Cached], seconds: dict[str, np.ndarray]) -> None:
  best, median = seconds["forward"].min(axis=0), np.median(seconds["forward"], axis=0)
  print(f"{SPEC.name}, {ARGS.classes} classes, {ARGS.dtype} cache, {ARGS.rounds} rounds; {os.cpu_count()} cores, load "
        f"before {load:.1f}\nforward pass, ms an image: {1e3 * best[0]:.2f} at best, {1e3 * median[0]:.2f} in the "
        f"median, {1e3 * median[1]:.2f} of CPU time\n")
  names = ("images", "batch", "kB/image", "where", "us/image", "step alone", "best", "median", "CPU time", "wanted",
           "MiB")
  print(f"{'':12}" + "".join(f"{name:>11}" for name in names))
  for case, cached in epochs.items():
    kept, rounds = cached.kept, seconds[case]
    where = "memory" if kept.resident else "disk"
    share = lambda whole, part: f"1/{whole / part:.0f}"
    shown = (len(kept), BATCH[case], f"{kept.bytes_per_image / 1e3:,.0f}", where, f"{1e6 * rounds[:, 0].min():.0f}",
             f"{1e6 * rounds[:, 2].min():.0f}", share(best[0], rounds[:, 0].min()),
             share(median[0], np.median(rounds[:, 0])), share(median[1], np.median(rounds[:, 1])),
             f"1/{WANTED[case]}", f"{cached.cost.train_peak_bytes / 2**20:.0f}")
    print(f"{case:12}" + "".join(f"{value:>11}" for value in shown))


if __name__ == "__main__":
  main()
