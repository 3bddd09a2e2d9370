"""Many tasks served on one pass of ViT-B/16, against one task, random weights.

    python benchmarks/shared.py [--heads=linear,inca,dtl] [--tasks=19] [--batch=32] [--rounds=5]

Each task is a linear head, or an InCA adapter, at a site of its own choice of the 13 block outputs and the final norm;
the one task that is compared with reads the deepest of these. Tasks of `dtl` share the blocks below its first write and
compute those above each for itself: the column "each" is the time of a task among the others against that of a task on
its own, for which 0.447 is the share of ViT-B's blocks and 0.55 the paper's figure. Programs take turns in one process;
ratios are of the best seconds, of the median seconds, and of the process's least CPU seconds, which other programs
disturb least. XLA counts the FLOPs of one round of a loop, so that those of many `dtl` tasks are not shown.
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
  """({task: method}, {task: (trainable, state)}): the first head reads the final norm, others block outputs in turn."""
  option, sites = {"linear": "site", "inca": "sites"}.get(name), [f"block_{k:02d}/out" for k in range(spec.depth)]
  sites = ["norm", *(sites[k % spec.depth] for k in range(count - 1))]
  build = lambda site: methods.build(name, spec, **({option: site} if option else {}))
  chosen = {f"task {k}": build(site) for k, site in enumerate(sites)}
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
  parser.add_argument("--heads", default="linear,inca,dtl")
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
  for name in args.heads.split(","):
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
  print(f"{'':30}{'of one task:':>33}{'each:':>24}\n{'head':8}{'tasks':>6}{'best s':>8}{'median':>8}{'FLOPs':>9}"
        + 2 * f"{'best':>8}{'median':>8}{'CPU':>8}")
  for (name, count), found in seconds.items():
    (best, median, _), ratios = figures(found), np.divide(figures(found), figures(seconds[name, 1]))
    counts = "" if name == "dtl" and count > 1 else f"{counted[name, count] / counted[name, 1]:.3f}"
    print(f"{name:8}{count:6}{best:8.3f}{median:8.3f}{counts:>9}"
          + "".join(f"{ratio:8.3f}" for ratio in (*ratios, *(ratios / count))))


def figures(seconds: np.ndarray) -> tuple:
  """Best and median wall seconds, least CPU seconds."""
  return seconds[:, 0].min(), np.median(seconds[:, 0]), seconds[:, 1].min()


if __name__ == "__main__":
  main()
