"""Helpers of the tests of training, resuming, adapters and the command line."""
import dataclasses
import json

import numpy as np
from PIL import Image

from transferlab import backbones, data, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import Weights, weights_hash
from transferlab.optim import Optim
from transferlab.train import Recipe


def recipe(**changes) -> Recipe:
  """15 steps on the tiny task's 40 images, on one device."""
  base = dict(duration="3 epochs", batch_size=8, optim=Optim(lr=1e-2), log_every="1 steps", devices=1)
  return Recipe(**{**base, **changes})


def colours() -> data.Task:
  """An easy task: 40, 10 and 14 images [16, 16, 3] of 4 classes that differ in colour."""
  rng, labels = np.random.default_rng(0), np.arange(64) % 4
  centres = np.array([[60, 60, 60], [200, 60, 60], [60, 200, 60], [60, 60, 200]])
  images = rng.normal(centres[labels][:, None, None], 30, (64, 16, 16, 3)).clip(0, 255).astype(np.uint8)
  splits = {"train": range(40), "val": range(40, 50), "test": range(50, 64)}
  return data.arrays(images, labels, ["grey", "red", "green", "blue"], splits, name="colours")


def small_weights() -> Weights:
  """A ViT of two blocks with random parameters, the same in every process."""
  spec = dataclasses.replace(backbones.architecture("vit_tiny_test"), depth=2)
  rng, shapes = np.random.default_rng(0), tree.flatten(backbones.abstract_params(spec))
  draw = lambda name, shape: name.endswith("scale") + 0.2 * rng.standard_normal(shape, np.float32)
  params = tree.unflatten({name: draw(name, leaf.shape) for name, leaf in shapes.items()})
  return Weights(spec, params, None, Preprocessing(spec.image_size), spec.name, "random", weights_hash(params, spec))


def metrics(workdir) -> list[dict]:
  """Rows of metrics.jsonl without what a clock put in them."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != "examples_per_second"} for row in rows]


def write_images(root, classes=("ant", "bee", "cat"), count=8, seed=0, suffix=".jpg"):
  """`root/<class>/<i>.jpg`: noise around a colour of the class, of an odd size."""
  rng = np.random.default_rng(seed)
  for c, name in enumerate(classes):
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      image = rng.normal(60 + 150 * np.eye(3)[c % 3], 25, (19, 23, 3))
      Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}{suffix}")
  return root


def files(folder) -> set[str]:
  """Everything below a folder; empty if there is no folder."""
  return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.exists() else set()


def contents(folder) -> dict[str, bytes]:
  """Every file below a folder with its bytes."""
  return {name: (folder / name).read_bytes() for name in files(folder) if (folder / name).is_file()}


def row(task="vtab/dtd", seed=0, accuracy=0.5, method="dtl", **changes) -> dict:
  """A ledger row as `train.fit` leaves it, as far as reports read it."""
  scores = {"accuracy": accuracy, "mean_per_class": accuracy / 2, "loss": 1.0, "examples": 10}
  made = {
      "backbone": "vit", "backbone_hash": "b0", "image_size": 224, "preprocessing": {"crop": "squash", "mean": [0.5]},
      "method": method, "options": {"rank": 2}, "task": task, "source": f"array_record {task}:3.0.1",
      "protocol": "VTAB-1k, final; last, test once", "draw": "", "split_hash": f"h {task}", "pixels": f"p {task}",
      "recipe": {"duration": "100 epochs", "batch_size": 32, "augmentation": "none", "select": "last", "seed": seed,
                 "optim": {"lr": 1e-3}},
      "steps": 3100, "dtype": "float32", "val": None, "test": scores, "versions": {"jax": "0.10.2"}, "device": "cpu",
      "path": f"runs/{method}/{task}/{seed}"}
  return {**made, **changes}
