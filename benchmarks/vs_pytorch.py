"""Our training steps against the same steps in plain PyTorch (`pytorch_vit.py`), with the same weights, in turn.

    python benchmarks/vs_pytorch.py                                ViT-B/16, 224 px, batch 32, float32, CPU
    python benchmarks/vs_pytorch.py --methods=dtl,full --rounds=9
    python benchmarks/vs_pytorch.py --backbone=vit_s16 --batch=8 --rounds=1
    python benchmarks/vs_pytorch.py --device=gpu                   bfloat16, batch 128
    python benchmarks/vs_pytorch.py --compile                      torch.compile on their side

PyTorch is no dependency of this package: `pip install torch`, its CPU build is enough.

A step starts from uint8 images in memory and does forward, backward and AdamW; `forward` is the frozen backbone alone.
Both use all cores and the defaults of their libraries; AdamW is fused on their side. Ours also returns the gradient's
norm and watches for NaN. Logits are compared before, losses of all steps afterwards: LoRA's differ by its dropout, each
library drawing its own. The two take turns, the first one changing from round to round. Ratios are ours / theirs, of
the best and of the median times and of the process's CPU time. Run it on an idle machine: where others want the cores,
it flatters ours, as PyTorch's threads wait for each other after every operation, spinning. The rates of a matrix
product, the MLP's first, tell what lies in the libraries that multiply and not in what is written here: PyTorch's
wheels for CPU use MKL, which on AMD processors can be half as fast.
"""
import argparse
import os
import sys
import time


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--backbone", default="vit_b16", help="a ViT")
  parser.add_argument("--batch", type=int, help="default: 32 on cpu, 128 on gpu")
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--methods", default="forward,linear,dtl,lora,full")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--compile", action="store_true", help="torch.compile for PyTorch")
  return parser.parse_args()


ARGS = arguments()
os.environ.setdefault("JAX_PLATFORMS", {"cpu": "cpu", "gpu": "cuda"}[ARGS.device])  # before jax starts
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch

try:
  import torch
except ImportError:
  sys.exit("PyTorch is not installed; this benchmark alone needs it: pip install torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytorch_vit  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from transferlab import backbones, methods  # noqa: E402
from transferlab.backbones.spec import Preprocessing  # noqa: E402
from transferlab.method import predict  # noqa: E402
from transferlab.step import compile_step, make_step, start, to_inputs  # noqa: E402

SPEC = backbones.architecture(ARGS.backbone)
BATCH = ARGS.batch or {"cpu": 32, "gpu": 128}[ARGS.device]
DTYPE = {"cpu": jnp.float32, "gpu": jnp.bfloat16}[ARGS.device]
DEVICE = {"cpu": "cpu", "gpu": "cuda"}[ARGS.device]
THEIR_DTYPE = {"cpu": torch.float32, "gpu": torch.bfloat16}[ARGS.device]
AGREE = {"cpu": 1e-4, "gpu": 5e-2}[ARGS.device]  # of logits around 1, in float32 or bfloat16
RATE, DECAY = 1e-4, 0.05


def moved(params, seed: int):
  """With noise, so that no bias is 0 and no pair without effect."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(x + 0.02 * rng.standard_normal(x.shape, np.float32)), params)


def our_step(method, run, frozen, batch):
  """A call that takes a step and returns its loss, not yet waited for."""
  optimiser = optax.adamw(RATE, weight_decay=DECAY)
  backbone = backbones.build(SPEC, DTYPE)
  box, kept = [start(*run, optimiser)], jax.tree.map(lambda x: x.astype(DTYPE), frozen) if method.frozen else {}
  compiled = compile_step(make_step(method, backbone, optimiser, Preprocessing(SPEC.image_size), ARGS.classes), box[0],
                          kept, batch)
  def call():
    box[0], logs = compiled(box[0], kept, batch)  # the run is donated
    return logs["loss"]
  return call


def their_inputs(images):
  """uint8 [B, S, S, 3] -> normalised [B, 3, S, S]."""
  return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def their_step(model, images, labels):
  """The same of a PyTorch model. On a GPU, what is frozen is stored in bfloat16 and the rest computed in it."""
  model.train().to(DEVICE)
  if ARGS.device == "gpu":
    for parameter in model.parameters():
      parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
  trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
  optimiser = torch.optim.AdamW(trained, RATE, weight_decay=DECAY, fused=True)
  run = torch.compile(model) if ARGS.compile else model
  def call():
    optimiser.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=ARGS.device == "gpu"):
      loss = F.cross_entropy(run(their_inputs(images)).float(), labels)
    loss.backward()
    optimiser.step()
    return loss.detach()
  return call


def their_logits(model, images):
  """float32 [B, C]."""
  model.eval().to(DEVICE)
  with torch.inference_mode():
    return model(their_inputs(images)).float().cpu().numpy()


def pair(name: str, frozen, batch):
  """(call of ours, call of theirs, largest difference of logits) of a training step, or of the forward pass."""
  images = torch.from_numpy(np.array(batch["image"])).to(DEVICE)
  labels = torch.from_numpy(np.array(batch["label"])).long().to(DEVICE)
  if name == "forward":
    return forward(frozen, batch["image"], images)
  method = methods.build(name, SPEC)
  trainable, state = method.init(jax.random.key(1), frozen, ARGS.classes)
  trainable = moved(trainable, 2)
  model = pytorch_vit.model(name, SPEC, method.options, frozen, trainable)
  backbone = backbones.build(SPEC)
  run = jax.jit(lambda t, f, x: predict(method, backbone, t, state, f, to_inputs(x, Preprocessing(SPEC.image_size))))
  difference = np.abs(run(trainable, frozen, batch["image"]) - their_logits(model, images)).max()
  return our_step(method, (trainable, state), frozen, batch), their_step(model, images, labels), difference


def forward(frozen, images, their_images):
  """As `pair`, of the features that the frozen backbone makes."""
  backbone = backbones.build(SPEC, DTYPE)
  params = jax.tree.map(lambda x: x.astype(DTYPE), frozen)
  run = jax.jit(lambda params, x: backbone.apply(params, to_inputs(x, Preprocessing(SPEC.image_size)))[0])
  vit = pytorch_vit.ViT(SPEC).requires_grad_(False).eval()
  pytorch_vit.load(vit, frozen)
  vit = vit.to(DEVICE, THEIR_DTYPE)
  compiled = torch.compile(vit) if ARGS.compile else vit
  def theirs():
    with torch.inference_mode():
      return compiled(their_inputs(their_images).to(THEIR_DTYPE))
  difference = np.abs(np.asarray(run(params, images), np.float32) - theirs().float().cpu().numpy()).max()
  return lambda: run(params, images), theirs, difference


def timed(call):
  """(result, wall and CPU seconds) of a call, waited for."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(call())  # which leaves a tensor alone
  if ARGS.device == "gpu":
    torch.cuda.synchronize()
  return result, (time.perf_counter() - wall, time.process_time() - cpu)


def race(calls):
  """([2, rounds, 2] wall and CPU seconds of ours and theirs, [2, 1 + rounds] losses); a first round does not count."""
  seconds, losses = ([], []), ([], [])
  for k in range(ARGS.rounds + 1):
    for i in ((0, 1), (1, 0))[k % 2]:
      result, took = timed(calls[i])
      seconds[i].append(took)
      losses[i].append(float(result.mean()))  # of the forward pass, this is of the features, and says nothing
  return np.array(seconds)[:, 1:], np.array(losses)


def rates() -> list[float]:
  """FLOP/s of the MLP's first product at best, ours and theirs."""
  rng, rows = np.random.default_rng(0), BATCH * SPEC.tokens
  arrays = [rng.standard_normal(shape, np.float32) for shape in ((rows, SPEC.width), (SPEC.width, SPEC.mlp_width))]
  product, (x, w) = jax.jit(jnp.matmul), [jnp.asarray(array, DTYPE) for array in arrays]
  their_x, their_w = [torch.from_numpy(array).to(DEVICE, THEIR_DTYPE) for array in arrays]
  times = {"cpu": 1, "gpu": 50}[ARGS.device]  # a launch takes as long as a product there
  calls = (lambda: [product(x, w) for _ in range(times)]), (lambda: [their_x @ their_w for _ in range(times)])
  best = [min(timed(call)[1][0] for _ in range(10)) for call in calls]
  return [2 * times * rows * w.size / seconds for seconds in best]


def main() -> None:
  if SPEC.family != "vit" or not SPEC.class_token:
    sys.exit(f"{SPEC.name} is no ViT with a class token; expected one, such as vit_b16")
  if ARGS.device == "gpu" and not torch.cuda.is_available():
    sys.exit("this PyTorch sees no GPU; install its CUDA build, or leave --device=gpu out")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  print(f"{SPEC.name}, {SPEC.image_size} px, batch {BATCH}, {jnp.dtype(DTYPE).name}, {ARGS.classes} classes; "
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}"
        f"{' compiled' if ARGS.compile else ''}, {torch.get_num_threads()} threads, {ARGS.rounds} rounds")
  print("matrix product: ours {:.0f}, torch {:.0f} GFLOP/s\n".format(*(rate / 1e9 for rate in rates())))
  rng, S = np.random.default_rng(0), SPEC.image_size
  batch = {"image": jnp.asarray(rng.integers(0, 256, (BATCH, S, S, 3), np.uint8)),
           "label": jnp.arange(BATCH, dtype=jnp.int32) % ARGS.classes, "weight": jnp.ones(BATCH)}
  frozen = moved(jax.jit(backbones.build(SPEC).init)(jax.random.key(0)), 1)
  print(f"{'':9}{'logits':>10}{'losses':>9}{'ours, s':>10}{'':8}{'torch, s':>10}{'':8}{'ours / torch':>15}")
  print(f"{'what':9}{'differ by':>10}{'by':>9}{'best':>10}{'median':>8}{'best':>10}{'median':>8}{'best':>9}"
        f"{'median':>8}{'CPU':>7}")
  for name in ARGS.methods.split(","):
    ours, theirs, difference = pair(name, frozen, batch)
    seconds, losses = race((ours, theirs))
    (best, cpu), median = seconds.min(axis=1).T, np.median(seconds[..., 0], axis=1)
    ratios = best[0] / best[1], median[0] / median[1], cpu[0] / cpu[1]
    apart = "-" if name == "forward" else f"{np.abs(losses[0] - losses[1]).max():.0e}"
    print(f"{name:9}{difference:10.0e}{apart:>9}{best[0]:10.3f}{median[0]:8.3f}{best[1]:10.3f}{median[1]:8.3f}"
          f"{ratios[0]:9.2f}{ratios[1]:8.2f}{ratios[2]:7.2f}{'' if difference < AGREE else '  NOT THE SAME'}",
          flush=True)


if __name__ == "__main__":
  main()
