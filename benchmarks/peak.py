"""Peak memory of a training step of every method, as XLA reckons it, against full fine-tuning. Nothing is executed.

    python benchmarks/peak.py                              ViT-B/16, 224 px, batch 32, float32, 100 classes
    python benchmarks/peak.py --methods=linear,dtl,lora
    python benchmarks/peak.py --backbone=swin_b

Peak: arguments, temporaries and outputs of the compiled step (images, frozen and trained parameters and Adam's moments
among them), less what is donated, see `cost.peak_bytes`. Shares are of `full` without remat. With remat the backward
pass makes the activations of adapted blocks again, and on CPU XLA schedules for memory; methods that only read have no
such block, and for some of them that other schedule is the worse one. FLOPs of the step, as XLA counts them, are in
forward passes of the plain backbone, without remat. Options are the methods' defaults; of a method in several stages,
marked *, it is the first. Exits with an error if a target is missed.
"""
import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts; another backend plans memory in its own way

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from transferlab import backbones, cost, methods  # noqa: E402
from transferlab.method import sizes  # noqa: E402

# Most of full's peak without remat that a step may take: (backbone, method, with remat).
WANTED = {("vit_b16", "linear", False): 0.15, ("vit_b16", "dtl", False): 0.40, ("vit_b16", "dtl", True): 0.20,
          ("vit_b16", "lora", False): 0.70}


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--backbone", default="vit_b16")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--methods", default="", help="default: all that fit the backbone")
  return parser.parse_args()


def forward_flops(spec, batch: int) -> float:
  """Of the plain backbone on a batch."""
  images = jax.ShapeDtypeStruct((batch, *backbones.image_shape(spec)), jnp.float32)
  run = jax.jit(lambda params, images: backbones.build(spec).apply(params, images)[0])
  return cost.flops(run.lower(backbones.abstract_params(spec), images).compile())


def row(name: str, method, spec, args, whole: int, once: float) -> tuple[str, bool]:
  """A line of the table, and whether it misses a target. `whole` bytes are full's peak, `once` a forward's FLOPs."""
  size = sizes(method, backbones.abstract_params(spec), args.classes).trainable_without_classifier
  text, missed = f"{name + '*' * bool(method.then):17}{size:13,}", False
  for remat in (False, True):
    step = cost.of_training(spec, method, args.classes, batch_size=args.batch, remat=remat)
    share, most = step.train_peak_bytes / whole, WANTED.get((spec.name, name, remat))
    text += "" if remat else f"{step.train_flops / once:10.2f}"
    verdict = f"<= {most:.2f} {'met' if share <= most else 'MISSED'}" if most else ""
    text += f"{step.train_peak_bytes / 2**20:9.0f}{share:8.2f}  {verdict:14}"
    missed |= "MISSED" in verdict
  return text.rstrip(), missed


def main() -> None:
  args = arguments()
  spec = backbones.architecture(args.backbone)
  names = args.methods.split(",") if args.methods else [name for name in methods.METHODS if methods.fits(name, spec)]
  built = {name: methods.build(name, spec) for name in names}  # an unknown name, before anything is compiled
  print(f"{spec.name}, {spec.image_size} px, batch {args.batch}, float32, {args.classes} classes; "
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
  whole = cost.of_training(spec, methods.build("full", spec), args.classes, batch_size=args.batch).train_peak_bytes
  once = forward_flops(spec, args.batch)
  print(f"full without remat: {whole / 2**20:.0f} MiB; forward pass: {once / 1e12:.2f} TFLOP\n")
  print(f"{'':17}{'parameters':>13}{'FLOPs':>10}{'peak,':>9}{'share':>8}{'':16}{'remat,':>9}{'share':>8}")
  print(f"{'method':17}{'without head':>13}{'/ forward':>10}{'MiB':>9}{'of full':>8}  {'wanted':14}{'MiB':>9}"
        f"{'of full':>8}  wanted")
  missed = []
  for name, method in built.items():
    text, misses = row(name, method, spec, args, whole, once)
    missed += [name] * misses
    print(text, flush=True)
  if missed:
    sys.exit(f"over the target: {', '.join(missed)}")


if __name__ == "__main__":
  main()
