"""What parallel heads gain: adapters on all sites from one forward pass, and a whole grid as one program.

    python benchmarks/heads.py                        both, CPU
    python benchmarks/heads.py --parts=grid --classes=10
    python benchmarks/heads.py --device=gpu           bfloat16 backbone, batch 128

adapters: 13 InCA adapters on ViT-B/16 (random weights, 224 px) in one streamed step, against the frozen forward pass.
grid: Head2Toe on cached features of ViT-B/16, 2 learning rates x 2 coefficients x 8 fractions in 5 folds. Its runs one
after another are 160 of two stages each; as a program a stage has 20 heads, and the second stage the fractions as
members. A step of each kind is timed, batches and all, in turn; a run has equally many of every kind, so that the
ratio of the sums is the ratio of the whole, compilation apart. Features are noise: time does not depend on them.
"""
import argparse
import os
import time


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--parts", default="adapters,grid")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--batch", type=int, help="of the adapters; default: 32 on cpu, 128 on gpu")
  parser.add_argument("--target_size", type=int, default=512)
  parser.add_argument("--classes", type=int, default=47)
  parser.add_argument("--images", type=int, default=1000)
  return parser.parse_args()


ARGS = arguments()
os.environ.setdefault("JAX_PLATFORMS", {"cpu": "cpu", "gpu": "cuda"}[ARGS.device])  # before jax starts

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from transferlab import backbones, cost, devices, features, methods  # noqa: E402
from transferlab.backbones.spec import Preprocessing  # noqa: E402
from transferlab.heads import Head  # noqa: E402
from transferlab.heads.program import make_heads_step, settings, start_heads  # noqa: E402
from transferlab.optim import Optim, make_optimiser  # noqa: E402
from transferlab.step import compile_step, make_step, start, to_inputs  # noqa: E402

DTYPE = {"cpu": jnp.float32, "gpu": jnp.bfloat16}[ARGS.device]
STEPS = 1000  # of a schedule that nobody follows to its end
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
FOLDS, RATES, COEFFICIENTS, ROWS = 5, (0.1, 0.01), (1e-4, 1e-5), 128
MESH = devices.make_mesh(1)


def race(calls: dict, rounds: int) -> dict:
  """{name: seconds [rounds]}, one call of each in turn, after one that compiles and touches memory."""
  for call in calls.values():
    jax.block_until_ready(call())
  found = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      began = time.perf_counter()
      jax.block_until_ready(call())
      found[name].append(time.perf_counter() - began)
  return {name: np.array(seconds) for name, seconds in found.items()}


def stepper(compiled, run, *others, batch):
  """Calls a compiled step again and again; the run is donated. `batch` fetches one."""
  box = [run]
  def call():
    box[0], logs = compiled(box[0], *others, batch())
    return logs
  return call


# --- 13 adapters from one forward pass --------------------------------------------------------------------------------

def adapters() -> None:
  spec, rows = backbones.architecture("vit_b16"), ARGS.batch or {"cpu": 32, "gpu": 128}[ARGS.device]
  backbone, method, size = backbones.build(spec, DTYPE), methods.build("inca", spec), Preprocessing(spec.image_size)
  params = jax.jit(backbone.init)(jax.random.key(0))
  frozen = jax.tree.map(lambda leaf: leaf.astype(DTYPE), params)
  image = np.random.default_rng(0).integers(0, 256, (rows, *backbones.image_shape(spec)), np.uint8)
  batch = jax.device_put({"image": image, "label": np.arange(rows, dtype=np.int32) % ARGS.classes,
                          "weight": np.ones(rows, np.float32)})
  forward = jax.jit(lambda frozen, images: backbone.apply(frozen, to_inputs(images, size))[0])
  forward = forward.lower(frozen, batch["image"]).compile()
  trainable, state = method.init(jax.random.key(1), params, ARGS.classes)
  optimiser = make_optimiser(Optim(), lambda step: 1e-3, trainable)
  run = start(trainable, state, optimiser)
  step = compile_step(make_step(method, backbone, optimiser, size, ARGS.classes), run, frozen, batch)
  flops = cost.flops(step) / cost.flops(forward)
  seconds = race({"forward": lambda: forward(frozen, batch["image"]),
                  "step": stepper(step, run, frozen, batch=lambda: batch)}, ARGS.rounds)
  each = seconds["step"] / seconds["forward"]
  print(f"adapters: {len(method.reads)} of InCA on {spec.name}, batch {rows}, {jnp.dtype(DTYPE).name}, {ARGS.classes} "
        f"classes\n  frozen forward pass {seconds['forward'].min():.3f} s at best, {np.median(seconds['forward']):.3f} "
        f"median; training step {seconds['step'].min():.3f}, {np.median(seconds['step']):.3f}\n"
        f"  ratio {seconds['step'].min() / seconds['forward'].min():.3f} of the best, {np.median(each):.3f} median of "
        f"the rounds; FLOPs {flops:.3f}; peak {cost.peak_bytes(step) / 2**20:.0f} MiB")


# --- Head2Toe's grid --------------------------------------------------------------------------------------------------

class Features:
  """Cached activations in memory, as they come from the loader: ROWS random rows of all, with their folds."""

  def __init__(self, spec, reads):
    rng = np.random.default_rng(0)
    shapes = features.activation_shapes(spec, reads, ARGS.images)
    self.kept = {slot: rng.standard_normal(shape.shape, np.float32) for slot, shape in shapes.items()}
    self.label = rng.integers(0, ARGS.classes, ARGS.images).astype(np.int32)
    self.fold, self.rng = (np.arange(ARGS.images) % FOLDS).astype(np.int32), rng

  def batch(self) -> dict:
    rows = self.rng.integers(0, ARGS.images, ROWS)
    return devices.put_batch({"activations": {slot: values[rows] for slot, values in self.kept.items()},
                              "label": self.label[rows], "fold": self.fold[rows],
                              "weight": np.ones(ROWS, np.float32)}, MESH)


def one_run(method, optim, batch):
  """A step of `fit`'s."""
  trainable, state = method.init(jax.random.key(0), {}, ARGS.classes)
  optimiser = make_optimiser(optim, lambda step: 1e-3, trainable)
  run = start(*jax.tree.map(jnp.array, (trainable, state)), optimiser)
  step = make_step(method, None, optimiser, None, ARGS.classes, vary={"coefficient": 1e-4})
  return stepper(compile_step(step, run, {}, batch()), run, {}, batch=batch)


def all_heads(of_head, heads, optim, batch):
  """(a step of all heads, peak bytes); `of_head` gives the Method of each."""
  made = [of_head(k).init(jax.random.key(k), {}, ARGS.classes) for k in range(len(heads))]
  along = devices.along_heads(MESH)
  run = jax.device_put(start_heads(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *made), optim), along)
  known = jax.device_put(settings(heads, lambda lr: np.full(STEPS, lr, np.float32)), along)
  step = compile_step(make_heads_step(of_head(0), None, optim, None, ARGS.classes, along), run, known, {}, batch())
  return stepper(step, run, known, {}, batch=batch), cost.peak_bytes(step)


def grid() -> None:
  spec, optim = backbones.architecture("vit_b16"), Optim("adam_keras", eps=1e-7, weight_decay=0.0)
  build = lambda fraction: methods.build("head2toe", spec, fraction=fraction, target_size=ARGS.target_size)
  whole = build(FRACTIONS)
  kept = Features(spec, whole.reads)
  heads = [Head(lr, 0.0, 0, {"coefficient": coefficient}, fold)
           for lr in RATES for coefficient in COEFFICIENTS for fold in range(FOLDS)]
  N = sum(values.shape[1] for values in kept.kept.values())
  scored = lambda seed: whole.init(jax.random.key(seed), {}, ARGS.classes)  # any kernel selects something
  second = {k: whole.then(*scored(k)) for k in range(len(heads))}
  calls = {"first, 1": one_run(whole, optim, kept.batch)}
  calls |= {f"second, {f}": one_run(build(f).then(*scored(0)), optim, kept.batch) for f in FRACTIONS}
  calls["first, all"], first_peak = all_heads(lambda k: whole, heads, optim, kept.batch)
  calls["second, all"], second_peak = all_heads(second.__getitem__, heads, optim, kept.batch)
  seconds = {name: np.median(found) for name, found in race(calls, ARGS.rounds).items()}
  apart = len(heads) * (len(FRACTIONS) * seconds["first, 1"] + sum(seconds[f"second, {f}"] for f in FRACTIONS))
  shared = len(heads) * (seconds["first, 1"] + sum(seconds[f"second, {f}"] for f in FRACTIONS))
  together = seconds["first, all"] + seconds["second, all"]
  print(f"grid: Head2Toe on {spec.name}, T = {ARGS.target_size}, N = {N:,}, batch {ROWS}, {ARGS.classes} classes, "
        f"{len(heads)} heads x {len(FRACTIONS)} fractions, two programs, peak {first_peak / 2**20:.0f} and "
        f"{second_peak / 2**20:.0f} MiB")
  for name, value in seconds.items():
    print(f"  a step of {name:15} {1e3 * value:9.1f} ms, median")
  print(f"  for each step of the schedule: {apart:.2f} s one run after another, {together:.3f} s as programs, "
        f"{apart / together:.1f} times faster\n"
        f"  against runs that share the first stage of their fractions: {shared / together:.1f} times")


if __name__ == "__main__":
  print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {ARGS.rounds} rounds, load "
        f"{os.getloadavg()[0]:.1f}")
  for part in ARGS.parts.split(","):
    {"adapters": adapters, "grid": grid}[part]()
