"""How much of a step's time is arithmetic that has to be done.

    python benchmarks/step.py                                  ViT-B/16, 224 px, batch 32, float32, CPU
    python benchmarks/step.py --methods=forward,dtl --rounds=9
    python benchmarks/step.py --device=gpu                     bfloat16, batch 128
    python benchmarks/step.py --parts                          where a block's time goes

efficiency = needed FLOPs / (seconds x matmul rate). The rate is that of the MLP's first product, [B*T, D] x [D, 4D],
measured in turn with the steps in the same process, so that figures of different machines, and of one machine on
different days, can be compared. Three efficiencies are printed: of the best times, of the medians, and of the
process's CPU time, which other programs on the machine disturb least and which does not see an idle core.
"""
import argparse
import os
import time


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--backbone", default="vit_b16")
  parser.add_argument("--batch", type=int, help="default: 32 on cpu, 128 on gpu")
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--methods", default="forward,linear,lora,dtl,full")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--remat", action="store_true", help="recompute adapted blocks in the backward pass")
  parser.add_argument("--parts", action="store_true", help="time the parts of a block instead of whole steps")
  return parser.parse_args()


ARGS = arguments()
os.environ.setdefault("JAX_PLATFORMS", {"cpu": "cpu", "gpu": "cuda"}[ARGS.device])  # before jax starts

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from transferlab import backbones, cost, methods  # noqa: E402
from transferlab.backbones import vit  # noqa: E402
from transferlab.backbones.spec import Preprocessing  # noqa: E402
from transferlab.step import compile_step, make_step, start  # noqa: E402

BATCH = ARGS.batch or {"cpu": 32, "gpu": 128}[ARGS.device]
DTYPE = {"cpu": jnp.float32, "gpu": jnp.bfloat16}[ARGS.device]


# --- What has to be computed --------------------------------------------------------------------------------

def dense_flops(spec) -> float:
  """The four linear maps of a block: q, k, v (D x 3D), proj (D x D), fc1 and fc2 (D x 4D), on B*T rows."""
  D = spec.width
  return 2 * BATCH * spec.tokens * D * (3 * D + D + 2 * spec.mlp_width)


def attention_flops(spec) -> float:
  """Of a block: q k^T and weights v, each T x T x D per image."""
  return 2 * 2 * BATCH * spec.tokens ** 2 * spec.width


def needed_flops(spec, method=None) -> float:
  """FLOPs of matrix products that a forward pass (method None) or a training step cannot do without.

  Forward: patches, and the dense maps and attention of every block. Backward: a block whose input depends on something
  trainable hands a gradient to its input, which costs each dense map once more and attention twice, as both factors
  of its products depend on the input. Where the weights train too, their gradients cost the dense maps a third time,
  and the patches theirs once more. Below 1 % and left out: classifier, low-rank pairs, element-wise work, optimiser.
  """
  patches = 2 * BATCH * spec.grid[0] * spec.grid[1] * 3 * spec.patch_size ** 2 * spec.width
  dense, attention = dense_flops(spec), attention_flops(spec)
  flops = patches + spec.depth * (dense + attention)
  if method is not None:
    flops += (spec.depth - method.writes_from) * (dense + 2 * attention)
    if method.name == "full":
      flops += spec.depth * dense + patches
  return flops


# --- Timing -------------------------------------------------------------------------------------------------

class Clock:
  """Wall and CPU seconds of repeated calls."""

  def __init__(self, call):
    self.call, self.wall, self.cpu = call, [], []
    jax.block_until_ready(call())  # compiles, and touches memory for the first time

  def tick(self, times: int = 1) -> None:
    for _ in range(times):
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(self.call())
      self.wall.append(time.perf_counter() - wall)
      self.cpu.append(time.process_time() - cpu)

  def seconds(self):
    """Best wall, median wall, best CPU."""
    return np.array([min(self.wall), np.median(self.wall), min(self.cpu)])


def normal(seed: int, *shape, dtype=None, scale: float = 1.0):
  return scale * jax.random.normal(jax.random.key(seed), shape, dtype or DTYPE)


def matmul(spec):
  """(clock, FLOPs) of the product that sets the rate."""
  calls = 1 if ARGS.device == "cpu" else 20  # a GPU takes 0.2 ms for one: launching it would count
  x, w = normal(0, BATCH * spec.tokens, spec.width), normal(1, spec.width, spec.mlp_width, scale=spec.width ** -0.5)
  product = jax.jit(jnp.matmul)
  return Clock(lambda: [product(x, w) for _ in range(calls)]), calls * 2 * x.shape[0] * w.size


def step_clock(name: str, spec, frozen):
  """(clock, needed FLOPs, peak bytes) of the forward pass or of a method's training step."""
  backbone, S = backbones.build(spec, DTYPE), spec.image_size
  rng = np.random.default_rng(0)
  batch = {"image": jnp.asarray(rng.integers(0, 256, (BATCH, S, S, 3), np.uint8)),
           "label": jnp.arange(BATCH, dtype=jnp.int32) % ARGS.classes, "weight": jnp.ones(BATCH)}
  if name == "forward":
    images = normal(2, BATCH, S, S, 3)
    compiled = jax.jit(lambda frozen, images: backbone.apply(frozen, images)[0]).lower(frozen, images).compile()
    return Clock(lambda: compiled(frozen, images)), needed_flops(spec), cost.peak_bytes(compiled)

  method = methods.build(name, spec)
  trainable, state = method.init(jax.random.key(3), jax.tree.map(lambda w: w.astype(jnp.float32), frozen), ARGS.classes)
  optimiser = optax.adamw(1e-5)
  box = [start(trainable, state, optimiser)]
  kept = frozen if method.frozen else {}
  step = make_step(method, backbone, optimiser, Preprocessing(S), ARGS.classes, remat=ARGS.remat)
  compiled = compile_step(step, box[0], kept, batch, remat=ARGS.remat)
  def call():
    box[0], logs = compiled(box[0], kept, batch)  # the run is donated
    return logs
  return Clock(call), needed_flops(spec, method), cost.peak_bytes(compiled)


def race(clocks, rate_clock) -> None:
  for _ in range(ARGS.rounds):
    for clock in clocks:
      rate_clock.tick(5)
      clock.tick()


# --- Tables -------------------------------------------------------------------------------------------------

def heading(spec) -> None:
  print(f"{spec.name}, {spec.image_size} px, batch {BATCH}, {jnp.dtype(DTYPE).name}, {ARGS.classes} classes"
        f"{', remat' if ARGS.remat else ''}; jax {jax.__version__} on {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} cores, {ARGS.rounds} rounds")


def steps(spec) -> None:
  frozen = jax.tree.map(lambda w: w.astype(DTYPE), jax.jit(backbones.build(spec).init)(jax.random.key(0)))
  rate_clock, flops = matmul(spec)
  rows = {name: step_clock(name, spec, frozen) for name in ARGS.methods.split(",")}
  race([clock for clock, _, _ in rows.values()], rate_clock)
  rate = flops / rate_clock.seconds()  # by best, by median, by CPU second
  print(f"matmul rate: {rate[0] / 1e9:.0f} GFLOP/s at best, {rate[1] / 1e9:.0f} in the median\n")
  print(f"{'':10}{'needed':>9}{'seconds':>9}{'':>9}{'efficiency':>12}{'':>9}{'':>10}{'peak':>9}   of the forward pass")
  print(f"{'what':10}{'TFLOP':>9}{'best':>9}{'median':>9}{'best':>12}{'median':>9}{'CPU time':>10}{'MiB':>9}"
        f"{'best':>8}{'median':>8}{'CPU':>7}")
  forward = rows["forward"][0].seconds() if "forward" in rows else None
  for name, (clock, needed, peak) in rows.items():
    seconds = clock.seconds()
    best, median, cpu = 100 * needed / (seconds * rate)
    ratios = "" if forward is None else "{:8.2f}{:8.2f}{:7.2f}".format(*seconds / forward)
    print(f"{name:10}{needed / 1e12:9.2f}{seconds[0]:9.3f}{seconds[1]:9.3f}{best:11.0f}%{median:8.0f}%"
          f"{f'{cpu:9.0f}%' if ARGS.device == 'cpu' else '-':>10}{peak / 2**20:9.0f}{ratios}")


def parts(spec) -> None:
  """The parts of one block on their own: forward, and forward with all gradients. They add up to more than the block,
  as XLA fuses the element-wise ones into their neighbours there."""
  T, D, N = spec.tokens, spec.width, BATCH * spec.tokens
  x = normal(4, BATCH, T, D)

  def module(layer, *inputs):
    """A linen module as a function of its parameters and inputs, those parameters, its inputs."""
    params = layer.init(jax.random.key(5), *inputs)
    return layer.apply, (params, *inputs)

  whole = vit.ViT(spec.__class__(**{**spec.to_dict(), "depth": 2}), DTYPE)
  params = whole.init(jax.random.key(6), normal(7, 1, spec.image_size, spec.image_size, 3))
  block = lambda params, x: whole.apply(params, x, vit.ignore, (), start=1)[0]
  dense = lambda wide, narrow: 2 * N * wide * narrow
  table = {  # name: (function, its inputs, FLOPs of its products)
      "dense qkv": (*module(vit.Dense(3 * D, dtype=DTYPE), x), dense(D, 3 * D)),
      "attention": (lambda qkv: vit.attention(qkv, spec.heads, None), (normal(8, BATCH, T, 3 * D),),
                    attention_flops(spec)),
      "dense proj": (*module(vit.Dense(D, dtype=DTYPE), x), dense(D, D)),
      "layer norm": (*module(vit.LayerNorm(spec.norm_eps, DTYPE), x), 0),
      "dense fc1": (*module(vit.Dense(spec.mlp_width, dtype=DTYPE), x), dense(D, spec.mlp_width)),
      "gelu": (lambda f: vit.gelu(f, spec.gelu), (normal(9, BATCH, T, spec.mlp_width),), 0),
      "dense fc2": (*module(vit.Dense(D, dtype=DTYPE), normal(10, BATCH, T, spec.mlp_width)),
                    dense(spec.mlp_width, D)),
      "block": (block, (params, x), dense_flops(spec) + attention_flops(spec))}

  def with_gradient(run):
    def both(*inputs):
      y, back = jax.vjp(run, *inputs)
      return back(y)
    return both

  rate_clock, flops = matmul(spec)
  clock = lambda run, inputs: Clock(lambda f=jax.jit(run): f(*inputs))
  clocks = {name: (clock(run, inputs), clock(with_gradient(run), inputs)) for name, (run, inputs, _) in table.items()}
  race([clock for pair in clocks.values() for clock in pair], rate_clock)
  rate = flops / rate_clock.seconds()
  print(f"matmul rate: {rate[0] / 1e9:.0f} GFLOP/s at best, {rate[1] / 1e9:.0f} in the median\n")
  print("milliseconds; 'products' is what its matrix products take at the matmul rate; a block has two norms\n")
  print(f"{'':12}{'forward':>9}{'products':>10}{'CPU':>9}{'with gradient':>16}{'products':>10}{'CPU':>9}")
  for name, (_, _, needed) in table.items():
    (f, _, f_cpu), (g, _, g_cpu) = (1e3 * clock.seconds() for clock in clocks[name])
    products = 1e3 * needed / rate[0]
    print(f"{name:12}{f:9.1f}{products:10.1f}{f_cpu:9.1f}{g:16.1f}{3 * products:10.1f}{g_cpu:9.1f}")


if __name__ == "__main__":
  spec = backbones.architecture(ARGS.backbone)
  heading(spec)
  (parts if ARGS.parts else steps)(spec)
