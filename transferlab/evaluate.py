"""Evaluation: every example counts once, the last partial batch included."""
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from transferlab import backbones, data, devices, metrics
from transferlab.files import atomic
from transferlab.backbones.spec import Preprocessing
from transferlab.method import Method, predict
from transferlab.progress import Progress, say
from transferlab.step import to_inputs


class Evaluation(NamedTuple):
  """Sums over a split.

  Fields:
    confusion: [C, C], true classes in rows.
    loss: mean cross-entropy.
    domains: [D, 2], correct predictions and examples of each domain; D is 0 where the split has no domains.
  """
  confusion: np.ndarray
  loss: float
  domains: np.ndarray = np.zeros((0, 2), np.int64)

  @property
  def accuracy(self) -> float:
    return metrics.accuracy(self.confusion)

  @property
  def mean_per_class(self) -> float:
    return metrics.mean_per_class_accuracy(self.confusion)

  def plus(self, other: "Evaluation") -> "Evaluation":
    """Both together."""
    a, b = self.confusion.sum(), other.confusion.sum()
    domains = np.zeros((max(len(self.domains), len(other.domains)), 2), np.int64)
    for each in (self.domains, other.domains):
      domains[:len(each)] += each
    return Evaluation(self.confusion + other.confusion, (self.loss * a + other.loss * b) / max(a + b, 1), domains)

  @property
  def per_class(self) -> np.ndarray:
    """[C], NaN for classes without examples."""
    return metrics.per_class_accuracy(self.confusion)

  @property
  def per_domain(self) -> dict[int, float]:
    """Accuracy by domain, of the domains that have examples."""
    return {d: float(correct / count) for d, (correct, count) in enumerate(self.domains) if count}


def make_predict(method: Method, backbone: backbones.Backbone, preprocessing: Preprocessing) -> Callable:
  """A jitted (trainable, state, frozen, inputs) -> logits [B, C] float32; inputs are images [B, S, S, 3] on 0 … 255, or
  cached activations {slot: [B, …]}."""
  return jax.jit(lambda trainable, state, frozen, inputs: predict(
      method, backbone, trainable, state, frozen,
      inputs if isinstance(inputs, dict) else to_inputs(inputs, preprocessing)))


def evaluate(logits_of: Callable, loader: data.EvalLoader, num_classes: int, *, among: Sequence[int] = (), mesh=None,
             quiet: bool = True) -> Evaluation:
  """Counts the predictions for everything a loader holds.

  Args:
    logits_of: images [B, S, S, 3] uint8, or cached activations {slot: [B, …]}, whichever the batches hold -> logits
      [B, C]; called with batches of one size.
    loader: from `data.eval_loader`, or over cached activations.
    num_classes: C.
    among: the classes that compete, by index; the logits of others count as minus infinity. () for all.
    mesh: where batches go; one device by default.
  """
  mesh = mesh or devices.make_mesh(1)
  counts, losses, total = np.zeros((num_classes, num_classes), np.int64), 0.0, 0
  of_split = loader.split.domains
  domains = np.zeros((0 if of_split is None else of_split.max() + 1, 2), np.int64)
  outside = np.setdiff1d(np.arange(num_classes), among) if among else []
  with Progress(len(loader), f"evaluating {loader.split.name}", quiet=quiet) as progress:
    for batch in loader:
      rows = batch["weight"] > 0
      inputs = devices.put_batch(batch, mesh)["activations" if "activations" in batch else "image"]
      logits = np.asarray(logits_of(inputs))[:len(rows)][rows]  # [b, C]
      if len(outside):
        logits = logits.copy()
        logits[:, outside] = -np.inf
      labels, predictions = batch["label"][rows], logits.argmax(-1)
      counts += metrics.confusion(labels, predictions, num_classes)
      if "domain" in batch:
        np.add.at(domains, batch["domain"][rows], np.stack([predictions == labels, np.ones_like(labels)], axis=-1))
      shifted = logits - logits.max(-1, keepdims=True)
      log_likelihood = shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(-1))
      losses, total = losses - float(log_likelihood.sum()), total + len(labels)
      progress.update()
  return Evaluation(counts, losses / max(total, 1), domains)


def write_confusion(evaluation: Evaluation, class_names, folder) -> list[Path]:
  """Writes `confusion.csv` (true classes in rows) and, where matplotlib is installed, `confusion.png`."""
  folder = Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"cannot write to {folder} ({error.strerror}); give a folder that you may write to") from None
  table, picture = folder / "confusion.csv", folder / "confusion.png"
  with atomic(table) as temporary, open(temporary, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["true \\ predicted", *class_names])
    writer.writerows([name, *map(int, row)] for name, row in zip(class_names, evaluation.confusion))
  try:
    from matplotlib.figure import Figure
  except ImportError:
    say("no picture: it needs matplotlib, pip install 'transferlab[plot]'")
    return [table]
  share = evaluation.confusion / np.maximum(evaluation.confusion.sum(axis=1, keepdims=True), 1)
  side = min(max(4, 0.28 * len(class_names) + 2), 24)
  figure = Figure(figsize=(side, side), layout="constrained")
  axes = figure.subplots()
  image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis")
  axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {evaluation.accuracy:.1%}")
  if len(class_names) <= 60:
    plain = {"fontsize": 8, "parse_math": False}  # "$" is part of a name
    axes.set_xticks(range(len(class_names)), class_names, rotation=90, **plain)
    axes.set_yticks(range(len(class_names)), class_names, **plain)
  figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
  with atomic(picture) as temporary:
    figure.savefig(temporary, format="png", dpi=120)
  return [table, picture]
