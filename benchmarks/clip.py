"""What a training step of LFA costs beside a linear probe of the same CLIP, from images and from cached layers.

    python benchmarks/clip.py                     peaks: ViT-B/16, 224 px, batch 32, 65 classes, float32; compiles only
    python benchmarks/clip.py --rounds=5          and seconds of steps on random weights, measured in turn
    python benchmarks/clip.py --backbone=clip_vit_b32 --batch=8

Peaks are arguments, temporaries and outputs of the compiled step less what is donated (`cost.peak_bytes`), AdamW's
moments among them. Times are compared by the best ones, and by CPU time, which other programs on the machine disturb
least. The text tower runs once per run, before the first step, in all of these. Below: 1,000 classes at
batch 256 from cached layers, beside the form of the cross path that forms a vector for every image and class. Exits
with an error if a target is missed.
"""
import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts; another backend plans memory in its own way

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from transferlab import backbones, cost, features, methods  # noqa: E402
from transferlab.backbones.spec import Preprocessing  # noqa: E402
from transferlab.method import classes, needed  # noqa: E402
from transferlab.methods import layer_attention  # noqa: E402
from transferlab.step import compile_step, make_step, start  # noqa: E402
from transferlab.testing import made_up_ids  # noqa: E402

REFERENCE = ("clip_linear", False)  # a method, and whether it trains from cached activations
ROWS = (REFERENCE, ("lfa", False), ("clip_linear", True), ("lfa", True))
PEAK = {("lfa", False): 1.10, ("lfa", True): 0.25}  # most of the reference's
TIME = {("lfa", False): 1.10, ("lfa", True): 0.05}
CROSS = 0.5e9  # bytes, 1,000 classes and batch 256


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--backbone", default="clip_vit_b16")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--classes", type=int, default=65)
  parser.add_argument("--rounds", type=int, default=0, help="of timed steps; 0 times nothing")
  return parser.parse_args()


def drawn(shapes):
  """Arrays of these shapes, small normal numbers."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)
  return jax.tree.map(draw, shapes)


def step_of(name: str, cached: bool, spec, params, args):
  """A call that takes a training step on random weights."""
  method, S, B = methods.build(name, spec), spec.image_size, args.batch
  known = classes(method, args.classes, lambda texts: made_up_ids(spec, texts))
  trainable, state = method.init(jax.random.key(0), params, known)
  frozen = jax.tree.map(jnp.asarray, needed(method, method.prepare(params, state), spec.depth, cached))
  batch = {"label": jnp.arange(B, dtype=jnp.int32) % args.classes, "weight": jnp.ones(B)}
  if cached:
    batch["activations"] = drawn(features.activation_shapes(spec, method.reads, B))
  else:
    batch["image"] = jnp.asarray(np.random.default_rng(1).integers(0, 256, (B, S, S, 3), np.uint8))
  optimiser = optax.adamw(1e-5)
  box = [start(*jax.tree.map(jnp.array, (trainable, state)), optimiser)]  # the run is donated
  compiled = compile_step(make_step(method, backbones.build(spec), optimiser, Preprocessing(S), args.classes), box[0],
                          frozen, batch)
  def call():
    box[0], logs = compiled(box[0], frozen, batch)
    jax.block_until_ready(logs)
  return call


def seconds(spec, args) -> dict:
  """{row: [best, median, least of the process's CPU time]} of steps measured in turn."""
  params = drawn(backbones.abstract_params(spec))
  calls = {row: step_of(*row, spec, params, args) for row in ROWS}
  found = {row: [] for row in ROWS}
  for call in calls.values():
    call()  # touches memory for the first time
  for _ in range(args.rounds):
    for row, call in calls.items():
      for _ in range(10 if row[1] else 1):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        found[row].append((time.perf_counter() - wall, time.process_time() - cpu))
  return {row: np.array([*np.quantile(times, (0, 0.5), axis=0)[:, 0], np.min(times, axis=0)[1]])
          for row, times in found.items()}


def verdict(share: float, most: float | None) -> str:
  return f"<= {most:.2f} {'met' if share <= most else 'MISSED'}" if most else ""


def naive(q, z, k, v):
  """`layer_attention.cross_cosines` with all its vectors formed, [B, C, d]."""
  p = jax.nn.softmax(jnp.einsum("bd,ctld->bctl", q * q.shape[-1] ** -0.5, k), axis=-1)
  t = jnp.einsum("bctl,ctld->bcd", p, v)
  return jnp.einsum("bd,bcd->bc", z, t * jax.lax.rsqrt(jnp.sum(t * t, axis=-1, keepdims=True)))


def thousand(spec) -> str:
  """Prints the peaks of both forms of the cross path; returns what it misses."""
  peak = lambda: cost.of_training(spec, methods.build("lfa", spec), 1000, batch_size=256, cached=True).train_peak_bytes
  gram = peak()
  own, layer_attention.cross_cosines = layer_attention.cross_cosines, naive
  formed = peak()
  layer_attention.cross_cosines = own
  word = "met" if gram <= CROSS else "MISSED"
  print(f"\nlfa, 1,000 classes, batch 256, cached: {gram / 1e9:.2f} GB, <= {CROSS / 1e9} {word}; with a vector for "
        f"every image and class {formed / 1e9:.2f} GB")
  return "1,000 classes" if word == "MISSED" else ""


def main() -> None:
  args = arguments()
  spec = backbones.architecture(args.backbone)
  print(f"{spec.name}, {spec.image_size} px, batch {args.batch}, float32, {args.classes} classes; jax "
        f"{jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {args.rounds} rounds\n")
  costs = {row: cost.of_training(spec, methods.build(row[0], spec), args.classes, batch_size=args.batch, cached=row[1])
           for row in ROWS}
  times, name = seconds(spec, args) if args.rounds else {}, REFERENCE[0]
  print(f"{'method':20}{'GFLOP':>8}{'MiB':>6}{'of ' + name:>15}  {'wanted':14}"
        + f"{'best s':>8}{'median s':>10}{'CPU s':>8}{'of ' + name:>15}, by CPU  wanted" * bool(times))
  missed = []
  for row, step in costs.items():
    what, share = row[0] + ", cached" * row[1], step.train_peak_bytes / costs[REFERENCE].train_peak_bytes
    text = f"{what:20}{step.train_flops / 1e9:8.0f}{step.train_peak_bytes / 2**20:6.0f}{share:15.2f}  "
    text += f"{verdict(share, PEAK.get(row)):14}"
    if times:
      shares = times[row] / times[REFERENCE]
      text += "{:8.3f}{:10.3f}{:8.3f}".format(*times[row])
      text += f"{shares[0]:15.3f}{shares[2]:8.3f}  {verdict(shares[0], TIME.get(row))}"
    missed += [what] * ("MISSED" in text)
    print(text.rstrip(), flush=True)
  if missed := [*missed, *filter(None, [thousand(spec)])]:
    sys.exit(f"over the target: {', '.join(missed)}")


if __name__ == "__main__":
  main()
