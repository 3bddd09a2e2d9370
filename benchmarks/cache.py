"""An epoch that trains from cached activations, against one that runs the backbone.

    python benchmarks/cache.py                                   ViT-B/16, 224 px, float32, CPU
    python benchmarks/cache.py --cases=linear,inca --rounds=5
    python benchmarks/cache.py --cases=dtl --gigabytes=0.5
    python benchmarks/cache.py --device=gpu                      a bfloat16 backbone

The measure is the frozen forward pass alone, the least that an epoch over images takes: images are in memory, nothing
is decoded, no head is trained. For `dtl`, whose cache ends below its first write and whose steps compute the blocks
above, it is its own training step on images. Cached epochs are whole: batches in the loader's order, gathered from the
cache, put on the device, a step with forward, backward and Adam. Their activations are random numbers in a cache
written for the purpose, in memory up to 1 GiB and mapped from the disk beyond, as always. Everything is timed per image
and in turn, round after round, so that other programs on the machine disturb all alike. Ratios are those of the best
and of the median times and of the process's CPU time, which others disturb least.
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
  parser.add_argument("--cases", default="linear,head2toe,cls_of_all,inca,dtl")
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
from transferlab.method import needed  # noqa: E402
from transferlab.optim import Optim, make_optimiser  # noqa: E402
from transferlab.recipe import Recipe  # noqa: E402

SPEC = backbones.architecture(ARGS.backbone)
WANTED = {"linear": 1 / 50, "head2toe": 1 / 50, "cls_of_all": 1 / 50, "inca": 1 / 10, "dtl": 0.75}  # of the measure
BATCH = {"linear": 128, "head2toe": 128, "cls_of_all": 128, "inca": 32, "dtl": 32}
MEASURE = {"dtl": "dtl, streamed"}  # of other cases the forward pass
FORWARD = {"cpu": 32, "gpu": 128}[ARGS.device]
DTYPE = {"cpu": jnp.float32, "gpu": jnp.bfloat16}[ARGS.device]


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


class Training:
  """Training steps of one method, from whatever its batches hold."""

  def __init__(self, method, params, batch: dict, preprocessing: Preprocessing):
    self.frozen = needed(method, params, SPEC.depth, cached="activations" in batch)
    trainable, state = method.init(jax.random.key(0), params, ARGS.classes)
    optimiser = make_optimiser(Optim(), lambda step: 1e-3, trainable)
    self.run = steps.start(*jax.tree.map(jnp.array, (trainable, state)), optimiser)
    step = steps.make_step(method, backbones.build(SPEC, DTYPE), optimiser, preprocessing, ARGS.classes)
    self.mesh = devices.make_mesh(1)
    self.batch = devices.put_batch(batch, self.mesh)
    self.step = steps.compile_step(step, self.run, self.frozen, self.batch)
    self.cost = cost.of_step(self.step)

  def seconds(self, batches) -> np.ndarray:
    """Wall and CPU seconds per image of a step on each of `batches`."""
    clock, cpu, rows = time.perf_counter(), time.process_time(), 0
    for batch in batches:
      rows += len(batch["weight"])
      self.run, _ = self.step(self.run, self.frozen, devices.put_batch(batch, self.mesh))
    jax.block_until_ready(self.run)
    return np.array([time.perf_counter() - clock, time.process_time() - cpu]) / rows


class Cached:
  """Epochs of one case."""

  def __init__(self, folder: str, case: str, params):
    method = method_of(case)
    self.kept, split, weights = written(folder, case, method)
    task = data.Task(case, tuple(map(str, range(ARGS.classes))), {"train": split})
    self.loader = features.train_loader(self.kept, task, weights, Recipe(batch_size=BATCH[case]))
    self.training = Training(method, params, next(self.loader), weights.preprocessing)

  def epoch(self) -> np.ndarray:
    """Per image: seconds of an epoch, CPU seconds of it, seconds of its steps alone on one batch."""
    count = self.loader.steps_per_epoch
    whole = self.training.seconds(next(self.loader) for _ in range(count))
    return np.append(whole, self.training.seconds([self.training.batch] * count)[0])


def streamed(case: str, params):
  """A function that trains one step on a batch of images and returns seconds and CPU seconds per image."""
  rows, rng = BATCH[case], np.random.default_rng(0)
  batch = {"image": rng.integers(0, 256, (rows, SPEC.image_size, SPEC.image_size, 3), np.uint8),
           "label": np.zeros(rows, np.int32), "weight": np.ones(rows, np.float32)}
  training = Training(method_of(case), params, batch, Preprocessing(SPEC.image_size))
  return lambda: training.seconds([batch])


def forward(params):
  """A function that runs the frozen backbone on one batch and returns seconds and CPU seconds per image."""
  backbone, rng = backbones.build(SPEC, DTYPE), np.random.default_rng(0)
  images = jax.device_put(rng.integers(0, 256, (FORWARD, SPEC.image_size, SPEC.image_size, 3), np.uint8))
  run = jax.jit(lambda params, images: backbone.apply(
      params, steps.to_inputs(images, Preprocessing(SPEC.image_size)).astype(DTYPE))[0])
  run(params, images).block_until_ready()
  def once() -> np.ndarray:
    clock, cpu = time.perf_counter(), time.process_time()
    run(params, images).block_until_ready()
    return np.array([time.perf_counter() - clock, time.process_time() - cpu]) / FORWARD
  return once


def main() -> None:
  load, cases, rng = os.getloadavg()[0], ARGS.cases.split(","), np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), DTYPE)
  params = jax.tree.map(draw, backbones.abstract_params(SPEC))
  of = {case: MEASURE.get(case, "forward") for case in cases}
  with tempfile.TemporaryDirectory() as made:
    measures = {name: forward(params) if name == "forward" else streamed(name.split(",")[0], params)
                for name in dict.fromkeys(of.values())}
    epochs = {case: Cached(ARGS.folder or made, case, params) for case in cases}
    seconds = {name: [] for name in (*measures, *cases)}
    for number in range(ARGS.rounds + 1):
      for case in cases:
        found = measures[of[case]](), epochs[case].epoch()
        if number:  # the first is for warming up
          seconds[of[case]].append(found[0])
          seconds[case].append(found[1])
    report(load, epochs, of, {name: np.array(each) for name, each in seconds.items()})
    for case in cases:
      epochs[case].loader.close()


def report(load: float, epochs: dict[str, Cached], of: dict[str, str], seconds: dict[str, np.ndarray]) -> None:
  print(f"{SPEC.name}, {ARGS.classes} classes, {ARGS.dtype} cache, {ARGS.rounds} rounds; {os.cpu_count()} cores, load "
        f"before {load:.1f}")
  for name in dict.fromkeys(of.values()):
    best, median = seconds[name].min(axis=0), np.median(seconds[name], axis=0)
    print(f"{name}, ms an image: {1e3 * best[0]:.2f} at best, {1e3 * median[0]:.2f} in the median, "
          f"{1e3 * median[1]:.2f} of CPU time")
  names = ("images", "batch", "kB/image", "where", "us/image", "step alone", "best", "median", "CPU time", "wanted",
           "MiB")
  print(f"\n{'':12}" + "".join(f"{name:>11}" for name in names))
  for case, cached in epochs.items():
    kept, rounds, whole = cached.kept, seconds[case], seconds[of[case]]
    where = "memory" if kept.resident else "disk"
    share = lambda part: f"{part:.2f}" if part > 0.2 else f"1/{1 / part:.0f}"
    shown = (len(kept), BATCH[case], f"{kept.bytes_per_image / 1e3:,.0f}", where, f"{1e6 * rounds[:, 0].min():.0f}",
             f"{1e6 * rounds[:, 2].min():.0f}", share(rounds[:, 0].min() / whole[:, 0].min()),
             share(np.median(rounds[:, 0]) / np.median(whole[:, 0])),
             share(np.median(rounds[:, 1]) / np.median(whole[:, 1])), share(WANTED[case]),
             f"{cached.training.cost.train_peak_bytes / 2**20:.0f}")
    print(f"{case:12}" + "".join(f"{value:>11}" for value in shown))


if __name__ == "__main__":
  main()
