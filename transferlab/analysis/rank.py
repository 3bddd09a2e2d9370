"""How many directions CLIP's features take up, layer by layer, and those that LFA makes of them: what its poster starts
from (MLAI-Yonsei/LFA).

The effective rank of features [N, D] is the exponential of the entropy of their singular values, divided by their sum
(Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality"): 1 if all lie on a line through the
origin, min(N, D) if all directions count alike. Which rank the poster means is not known. Here it is given twice, of
the features as they are, which share a large mean, and with their mean taken away.

Layers are what LFA attends to: class tokens and end-of-text tokens behind every block, through their tower's last norm.
Its aggregate is z of every image and s of every class, see `methods/layer_attention.py`; beside it the last layer by
the same matrix of values, and CLIP's own projection, which are as wide.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from transferlab import backbones, data, methods, plots, serve
from transferlab.backbones.weights import Weights
from transferlab.method import Context, classes, forward
from transferlab.methods import layer_attention as la
from transferlab.plots import Plane, Point
from transferlab.progress import Progress
from transferlab.step import to_inputs

TOWERS = {"image": "images", "text": "class names"}
KINDS = {False: "as they are", True: "mean taken away"}
BATCH = 64  # images at once


class Features(NamedTuple):
  """Vectors of one tower.

  Fields:
    tower: of `TOWERS`.
    name: what they are.
    layer: of the tower, from 1; None if they are made of layers.
    values: [N, D].
  """
  tower: str
  name: str
  layer: int | None
  values: np.ndarray


def effective_rank(features, centred: bool = False) -> float:
  """Of [N, D]; 0 of zeros."""
  features = np.asarray(features, np.float64)
  features = features - features.mean(axis=0) if centred else features
  values = np.linalg.svd(features, compute_uv=False)
  if not values.sum():
    return 0.0
  shares = values[values > 0] / values.sum()
  return float(np.exp(-np.sum(shares * np.log(shares))))


def rank(rows: Sequence[dict], folder, allow: Sequence[str] = (), *, weights: Weights, task: data.Task,
         split: str = "test", images: int = 2000) -> tuple[list[Path], list[str]]:
  """Effective ranks as a table, lfa_rank_table.csv, and a picture, lfa_rank.

  Args:
    rows: of `report.read`; every LFA run among them adds its aggregate. None are needed.
    allow: not heeded, runs stand side by side.
    weights: of a CLIP. Without a tokenizer, texts' layers are left out.
    task: images and class names; of its split `split` so many `images`, evenly spaced, or all if it has fewer.

  Raises:
    ValueError: no CLIP, a split that the task lacks, runs of which none is LFA's or one is on other weights.
  """
  if weights.spec.family != "clip":
    raise ValueError(f"{weights.name} is a {weights.spec.family}; the figure is of the towers of a CLIP, give one with "
                     "--backbone")
  if split not in task.splits:
    raise ValueError(f"{task.name} has no split {split!r}; expected one of {', '.join(task.splits)}")
  if images < 2:
    raise ValueError(f"images is {images}; expected 2 or more")
  mine = [row for row in rows if row["method"] == "lfa"]
  if rows and not mine:
    raise ValueError(f"none of {len(rows)} runs is LFA's; give such runs, or none to see CLIP's layers alone")
  whole = task.splits[split]
  part = whole.select(np.unique(np.linspace(0, len(whole) - 1, min(images, len(whole))).round().astype(int)))
  found = _layers(weights, task, part)
  for row in mine:
    name = "LFA" if len(mine) == 1 else f"LFA, {Path(row['path']).name}"
    found += _aggregates(name, Path(row["path"]) / "adapter.safetensors", weights, part)
  return _written(found, folder, f"{weights.name} on {task.name}, {split}")


def _layers(weights: Weights, task: data.Task, split: data.Split) -> list[Features]:
  """The layers of a plain CLIP, and its projections; of texts if it has a tokenizer."""
  method = methods.build("lfa", weights.spec, templates=task.templates or "a photo of a {}.")
  known = classes(method, task.class_names if weights.tokenizer else len(task.class_names), weights.tokenizer)
  image, text = _carried(weights, weights.preprocessing, method, *method.init(jax.random.key(0), weights.params, known),
                         split)
  found = []
  for tower, layers in {"image": image, "text": text.mean(axis=1)}.items():                        # [N, L, D]
    if tower == "text" and weights.tokenizer is None:
      continue
    projection = np.asarray(weights.params[f"{tower}_projection"]["kernel"])
    found += [Features(tower, "CLIP, layers", i + 1, layers[:, i]) for i in range(layers.shape[1])]
    found.append(Features(tower, "CLIP, projected", None, layers[:, -1] @ projection))
  return found


def _aggregates(name: str, adapter: Path, weights: Weights, split: data.Split) -> list[Features]:
  """What a trained LFA makes of all layers, and of each tower's last one."""
  of = serve.load(adapter, weights)
  image, text = _carried(of.weights, of.preprocessing, of.method, of.trainable, of.state, split)
  base = {tower: weights.params[f"{tower}_projection"]["kernel"] for tower in TOWERS}
  mix = jax.jit(la.mixtures)
  mixed = {"aggregate": mix(of.trainable, image, text, base),
           "values of the last layer": mix(of.trainable, image[:, -1:], text[:, :, -1:], base)}
  return [Features(tower, f"{name}, {what}", None, np.asarray(values)) for what, both in mixed.items()
          for tower, values in zip(TOWERS, both)]


def _carried(weights: Weights, preprocessing, method, trainable, state, split: data.Split) -> tuple:
  """The layers that an LFA attends to: of images [N, L, D], of texts [C, T, L, Dt]."""
  backbone, frozen = backbones.build(weights.spec), jax.device_put(method.prepare(weights.params, state))
  @jax.jit
  def run(trainable, state, frozen, images):
    inputs = to_inputs(images, preprocessing)
    return forward(method, backbone, trainable, inputs, Context(state=state, frozen=frozen)).carry
  found = []
  loader = data.eval_loader(split, preprocessing, batch_size=min(BATCH, len(split)))
  with Progress(len(split), f"layers of {split.name}") as progress:
    for batch in loader:
      carry = jax.device_get(run(trainable, state, frozen, batch["image"]))
      found.append(carry["image"][batch["weight"] > 0])
      progress.update(len(found[-1]))
  return np.concatenate(found), carry["text"]


def _written(found: list[Features], folder, title: str) -> tuple[list[Path], list[str]]:
  """The table, the picture with its points, and a line for every tower."""
  ranks = [[effective_rank(each.values, centred) for centred in KINDS] for each in found]
  header = ["tower", "features", "layer", "vectors", "width", *(f"effective rank, {kind}" for kind in KINDS.values())]
  files = [plots.table(Path(folder) / "lfa_rank_table.csv", header, (
      [each.tower, each.name, each.layer, *each.values.shape, *pair] for each, pair in zip(found, ranks)))]
  planes, remarks = [], []
  for tower, what in TOWERS.items():
    mine = [(each, pair) for each, pair in zip(found, ranks) if each.tower == tower]
    if not mine:
      continue
    depth = max(each.layer or 1 for each, _ in mine)
    for i, kind in enumerate(KINDS.values()):
      series: dict[str, list[Point]] = {}
      for each, pair in mine:  # what has no layer of its own is a line across all of them
        places = [each.layer] if each.layer else sorted({1, depth})
        series.setdefault(each.name, []).extend(Point(x, pair[i]) for x in places)
      planes.append(Plane(f"{len(mine[0][0].values)} {what}, {kind}", "layer", "effective rank", series))
    layers = [pair[1] for each, pair in mine if each.layer]
    others = "; ".join(f"{each.name} {pair[1]:.1f}" for each, pair in mine if not each.layer)
    remarks.append(f"{what}, mean taken away: " + "; ".join(filter(None, (
        layers and f"layers {', '.join(f'{value:.1f}' for value in layers)}", others))))
  return files + plots.planes(Path(folder) / "lfa_rank", planes, title=f"Effective rank of features, {title}",
                              columns=2), remarks
