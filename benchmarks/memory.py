"""How much host memory Head2Toe takes where the features are many: ResNet-50 v2 with its logits, T = 8192, N = 467,688.

    python benchmarks/memory.py                       1,000 images, 100 classes, from an activation cache
    python benchmarks/memory.py --parts=streamed      without one: the backbone runs in every step
    python benchmarks/memory.py --target_size=512 --images=100 --steps=2

Each part is a process of its own, on random weights and noise: `cache` runs the backbone over the images and keeps the
activations, `train` trains both stages from them with the recipe of configs/head2toe.py, checkpoints and test included.
Printed are the most that was resident, the most that was the process's own (the rest is mapped files: libraries, and
the cache, whose pages the kernel drops when it needs room), and what XLA says of the steps beforehand.
"""
import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "head2toe.py"


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
  parser.add_argument("--parts", default="cache,train", help="of cache, train, streamed")
  parser.add_argument("--folder", default="", help="where the cache and the runs go; a temporary one by default")
  parser.add_argument("--target_size", type=int, default=8192)
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--images", type=int, default=1000)
  parser.add_argument("--steps", type=int, default=16, help="of each stage")
  parser.add_argument("--fraction", default="0.01", help="one, or several as (0.01,0.1)")
  parser.add_argument("--inside", default="", help=argparse.SUPPRESS)  # the part that this process is
  return parser.parse_args()


class Watch(threading.Thread):
  """Notes the largest RssAnon of this process, in bytes."""

  def __init__(self):
    super().__init__(daemon=True)
    self.own = 0

  def run(self):
    while True:
      text = Path("/proc/self/status").read_text()
      self.own = max(self.own, 1024 * int(re.search(r"RssAnon:\s+(\d+)", text).group(1)))
      time.sleep(0.005)


def part(args) -> None:
  """One part, in this process."""
  watch = Watch()
  watch.start()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts
  import numpy as np

  from transferlab import backbones, data, experiment, features, methods, train, tree
  from transferlab.backbones.weights import Weights, weights_hash

  config = experiment.load(f"{CONFIG}:method=head2toe", {
      "duration": f"{args.steps} steps", "options.target_size": str(args.target_size), "log_every": "100 percent",
      "options.fraction": args.fraction, "devices": "1"})
  _, options, recipe = experiment.parse(config)
  rng, spec = np.random.default_rng(0), backbones.architecture("resnet50_v2", classes=1000)
  shapes = tree.flatten(backbones.abstract_params(spec))
  draw = lambda name, shape: np.float32(rng.standard_normal(shape, np.float32) * np.prod(shape[:-1]) ** -0.5 if len(
      shape) > 1 else np.ones(shape) * name.endswith(("scale", "var")))
  params = tree.unflatten({name: draw(name, leaf.shape) for name, leaf in shapes.items()})
  weights = Weights(spec, params, None, backbones.spec.Preprocessing(224), spec.name, "random",
                    weights_hash(params, spec))
  images = rng.integers(0, 256, (args.images + 200, 224, 224, 3), np.uint8)
  splits = {"train": range(args.images), "test": range(args.images, args.images + 200)}
  task = data.arrays(images, np.arange(len(images)) % args.classes, [str(c) for c in range(args.classes)], splits,
                     val_fraction=0, name="noise")
  cache = "" if args.inside == "streamed" else f"{args.folder}/features"
  if args.inside == "cache":
    reads = methods.build("head2toe", spec, **options).reads
    features.write(features.of_recipe(cache, recipe), weights, reads, task.splits)
  else:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
      train.fit(weights, "head2toe", task, recipe, options=options, features=cache, workdir=f"{folder}/run")
  most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(f"{args.inside}: {most / 1e9:.2f} GB resident at most, {watch.own / 1e9:.2f} GB its own at most", flush=True)


def main() -> None:
  args = arguments()
  if args.inside:
    part(args)
    return
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.folder or temporary
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in args.parts.split(","):
      own = [f"--{key}={value}" for key, value in vars(args).items() if key not in ("inside", "folder")]
      began = time.monotonic()
      done = subprocess.run([sys.executable, __file__, *own, f"--folder={folder}", f"--inside={name}"])
      if done.returncode:
        sys.exit(done.returncode)
      print(f"{name}: {time.monotonic() - began:.0f} seconds", flush=True)


if __name__ == "__main__":
  main()
