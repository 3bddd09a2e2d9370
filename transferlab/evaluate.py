"""Evaluation: every example counts once, the last partial batch included."""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from transferlab import backbones, data, devices, metrics, plots
from transferlab.backbones.spec import Preprocessing
from transferlab.method import Context, Method, forward, predict
from transferlab.progress import Progress
from transferlab.step import keeping_barriers, to_inputs


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
  """A jitted (trainable, state, frozen, inputs, weight=None) -> logits [B, C] float32; inputs are images [B, S, S, 3]
  on 0 … 255, or cached activations {slot: [B, …]}; weight [B] is 0 for padding."""
  return jax.jit(lambda trainable, state, frozen, inputs, weight=None: predict(
      method, backbone, trainable, state, frozen,
      inputs if isinstance(inputs, dict) else to_inputs(inputs, preprocessing), weight), **keeping_barriers(backbone))


def make_predict_members(method: Method, backbone: backbones.Backbone, preprocessing: Preprocessing) -> Callable:
  """As `make_predict`, of a method that has members: (…) -> {member: logits [B, C] float32}."""
  return jax.jit(lambda trainable, state, frozen, inputs: method.members(forward(
      method, backbone, trainable, inputs if isinstance(inputs, dict) else to_inputs(inputs, preprocessing),
      Context(state=state, frozen=frozen))), **keeping_barriers(backbone))


def known_of(batch: dict) -> dict:
  """What counting needs of a batch: label, weight, and domain if there are several."""
  return {name: batch[name] for name in ("label", "weight", "domain") if name in batch}


def collect_members(logits_of: Callable, loader: data.EvalLoader, mesh=None) -> tuple[dict, np.ndarray]:
  """Logits of every member for every example that a loader holds, to choose among members.

  Args:
    logits_of: images [B, S, S, 3] uint8, or cached activations {slot: [B, …]} -> {member: [B, C]}.
    loader, mesh: as of `evaluate`.

  Returns:
    {member: [N, C] float32}, by name, and labels [N].
  """
  mesh = mesh or devices.make_mesh(1)
  logits, labels = [], []
  for batch in loader:
    put = devices.put_batch(batch, mesh)
    found, known = devices.whole((logits_of(put["activations" if "activations" in put else "image"]), known_of(put)))
    rows = known["weight"] > 0
    logits.append({member: each[rows] for member, each in found.items()})
    labels.append(known["label"][rows])
  return {member: np.concatenate([each[member] for each in logits]) for member in logits[0]}, np.concatenate(labels)


def evaluate(logits_of: Callable, loader: data.EvalLoader, num_classes: int, *, among: Sequence[int] = (), mesh=None,
             quiet: bool = True) -> Evaluation:
  """Counts the predictions for everything a loader holds.

  Args:
    logits_of: (images [B, S, S, 3] uint8, or cached activations {slot: [B, …]}, whichever the batches hold, weight [B]
      with 0 for padding) -> logits [B, C]; called with batches of one size.
    loader: from `data.eval_loader`, or over cached activations.
    num_classes: C.
    among: the classes that compete, by index; the logits of others count as minus infinity. () for all.
    mesh: where batches go; one device by default. Where several processes share it, each loads its own rows of every
      batch, and all of them count all of it.
  """
  mesh = mesh or devices.make_mesh(1)
  counts, losses, total = np.zeros((num_classes, num_classes), np.int64), 0.0, 0
  of_split = loader.split.domains
  domains = np.zeros((0 if of_split is None else of_split.max() + 1, 2), np.int64)
  outside = np.setdiff1d(np.arange(num_classes), among) if among else []
  with Progress(len(loader), f"evaluating {loader.split.name}", quiet=quiet) as progress:
    for batch in loader:
      put = devices.put_batch(batch, mesh)
      inputs = put["activations" if "activations" in put else "image"]
      logits, known = devices.whole((logits_of(inputs, put["weight"]), known_of(put)))
      rows = known["weight"] > 0
      logits = logits[rows]  # [b, C]
      if len(outside):
        logits = logits.copy()
        logits[:, outside] = -np.inf
      labels, predictions = known["label"][rows], logits.argmax(-1)
      counts += metrics.confusion(labels, predictions, num_classes)
      if "domain" in known:
        np.add.at(domains, known["domain"][rows], np.stack([predictions == labels, np.ones_like(labels)], axis=-1))
      shifted = logits - logits.max(-1, keepdims=True)
      log_likelihood = shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(-1))
      losses, total = losses - float(log_likelihood.sum()), total + len(labels)
      progress.update()
  return Evaluation(counts, losses / max(total, 1), domains)


def write_confusion(evaluation: Evaluation, class_names, folder) -> list[Path]:
  """Writes `confusion.csv` (true classes in rows) and, where matplotlib is installed, `confusion.png`."""
  share = evaluation.confusion / np.maximum(evaluation.confusion.sum(axis=1, keepdims=True), 1)
  return plots.heat_map(Path(folder) / "confusion", evaluation.confusion, class_names, class_names, colours=share,
                        title=f"accuracy {evaluation.accuracy:.1%}", xlabel="predicted", ylabel="true",
                        label="share of the true class", limits=(0, 1))
