"""Peak memory of a training step of QLoRA, as XLA reckons it, beside LoRA on float kernels. Nothing is executed.

    python benchmarks/qlora.py                 ViT-B/16, 224 px, batch 32, 65 classes of 10 tokens each, float32
    python benchmarks/qlora.py --remat         blocks computed again in the backward pass

Rows: `lora` on the image tower alone with a classifier; QLoRA's form on both towers with kernels as they are; with
4-bit kernels, multiplied in float32 and, as by default, in bfloat16. Peaks are arguments, temporaries and outputs of
the compiled step less what is donated (`cost.peak_bytes`), AdamW's moments among them; "frozen" are the arguments that
do not train. Exits with an error if 4 bits do not take less than the same form without, or the default not less than
`lora`.
"""
import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts; another backend plans memory in its own way

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from transferlab import backbones, cost, methods  # noqa: E402
from transferlab.method import classes  # noqa: E402
from transferlab.methods import clip_text  # noqa: E402

ROWS = {"lora, image tower": {}, "qlora, base=none": {"base": "none"}, "qlora, float32": {"compute": "float32"},
        "qlora": {}}


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--backbone", default="clip_vit_b16")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--classes", type=int, default=65)
  parser.add_argument("--tokens", type=int, default=10, help="of the longest class prompt")
  parser.add_argument("--remat", action="store_true")
  return parser.parse_args()


def made(row: str, spec, args):
  """(method, the spec that it adapts); its texts are as long as real ones, which shapes alone do not tell."""
  name = row.partition(",")[0]
  method = methods.build(name, spec, **ROWS[row])
  ids = jax.ShapeDtypeStruct((args.classes, args.tokens), jnp.int32)
  def prepare(frozen, state):
    return {**method.prepare(frozen, state), clip_text.SLOT: jnp.zeros(ids.shape, ids.dtype)}
  return (method._replace(prepare=prepare) if method.prompts else method), methods.adapted(name, spec)


def frozen_bytes(method, spec, count: int) -> int:
  """Of what a step takes and does not train."""
  params = backbones.abstract_params(spec)
  _, state = jax.eval_shape(lambda rng: method.init(rng, params, classes(method, count)), jax.random.key(0))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(method.prepare, params, state)))


def main() -> None:
  args = arguments()
  whole = backbones.architecture(args.backbone)
  print(f"{whole.name}, {whole.image_size} px, batch {args.batch}, {args.classes} classes of {args.tokens} tokens, "
        f"remat {args.remat}; jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
  print(f"{'method':20}{'TFLOP':>8}{'frozen MiB':>12}{'peak MiB':>10}")
  peaks = {}
  for row in ROWS:
    method, spec = made(row, whole, args)
    step = cost.of_training(spec, method, args.classes, batch_size=args.batch, remat=args.remat)
    peaks[row] = step.train_peak_bytes
    print(f"{row:20}{step.train_flops / 1e12:8.2f}{frozen_bytes(method, spec, args.classes) / 2**20:12.0f}"
          f"{step.train_peak_bytes / 2**20:10.0f}", flush=True)
  lora, plain, wide, quantised = peaks.values()
  if max(wide, quantised) >= plain or quantised >= lora:
    sys.exit("over the target: QLoRA takes no less than LoRA")


if __name__ == "__main__":
  main()
