"""Many tasks served on one pass of ViT-B/16, against one task, random weights.

    python benchmarks/shared.py [--tasks=19] [--batch=32] [--rounds=5]

Each task is a linear head, or an InCA adapter, at a site of its own choice of the 13 block outputs and the final norm;
the one task that is compared with reads the deepest of these. Programs take turns in one process; ratios are of the
best seconds, of the median seconds, and of the process's least CPU seconds, which other programs disturb least.
"""
import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts; JAX_PLATFORMS=cuda for a GPU

import jax  # noqa: E402
import numpy as np  # noqa: E402

from transferlab import backbones, methods, shared  # noqa: E402
from transferlab.backbones.spec import Preprocessing  # noqa: E402
from transferlab.cost import flops  # noqa: E402


def heads(spec, name: str, count: int, classes: int) -> tuple[dict, dict]:
  """({task: method}, {task: (trainable, state)}): the first reads the final norm, the others block outputs in turn."""
  option = {"linear": "site", "inca": "sites"}[name]
  sites = ["norm", *(f"block_{k % spec.depth:02d}/out" for k in range(count - 1))]
  chosen = {f"task {k}": methods.build(name, spec, **{option: site}) for k, site in enumerate(sites)}
  keys = jax.random.split(jax.random.key(0), count)
  return chosen, {task: method.init(key, {}, classes) for key, (task, method) in zip(keys, chosen.items())}


def race(calls: dict, rounds: int) -> dict[str, np.ndarray]:
  """{name: [rounds, 2]}, wall and CPU seconds of each call; the order turns around from round to round."""
  seconds = {name: [] for name in calls}
  for k in range(rounds + 1):  # the first touches memory for the first time
    for name in list(calls)[::1 if k % 2 else -1]:
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(calls[name]())
      seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  return {name: np.array(found[1:]) for name, found in seconds.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--backbone", default="vit_b16")
  parser.add_argument("--tasks", type=int, default=19)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  spec = backbones.architecture(args.backbone)
  backbone = backbones.build(spec)
  frozen = jax.jit(backbone.init)(jax.random.key(0))
  S = spec.image_size
  images = jax.device_put(np.random.default_rng(0).integers(0, 256, (args.batch, S, S, 3), np.uint8))
  calls, counted = {}, {}
  for name in ("linear", "inca"):
    chosen, arrays = heads(spec, name, args.tasks, args.classes)
    for count in (1, args.tasks):
      few = list(chosen)[:count]
      run = shared.make_predict({task: chosen[task] for task in few}, backbone, Preprocessing(S))
      given = {task: arrays[task] for task in few}
      compiled = run.lower(given, frozen, images).compile()
      calls[name, count] = lambda compiled=compiled, given=given: compiled(given, frozen, images)
      counted[name, count] = flops(compiled)
  seconds = race(calls, args.rounds)
  print(f"{spec.name}, {S} px, batch {args.batch}, float32, {args.classes} classes each; jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {args.rounds} rounds\n")
  print(f"{'':30}{'of one task:':>15}\n{'head':8}{'tasks':>6}{'best s':>8}{'median':>8}{'best':>9}{'median':>8}"
        f"{'CPU':>8}{'FLOPs':>8}")
  for (name, count), found in seconds.items():
    (best, median, cpu), one = figures(found), figures(seconds[name, 1])
    ratios = best / one[0], median / one[1], cpu / one[2], counted[name, count] / counted[name, 1]
    print(f"{name:8}{count:6}{best:8.3f}{median:8.3f}{ratios[0]:9.3f}" + "".join(f"{r:8.3f}" for r in ratios[1:]))


def figures(seconds: np.ndarray) -> tuple:
  """Best and median wall seconds, least CPU seconds."""
  return seconds[:, 0].min(), np.median(seconds[:, 0]), seconds[:, 1].min()


if __name__ == "__main__":
  main()
