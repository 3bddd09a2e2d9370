"""Metrics as sums and counts: a confusion matrix adds up over batches of any size, means are taken once at the end."""
import numpy as np


def confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts [C, C]: rows are true classes, columns predicted ones."""
  counts = np.zeros((num_classes, num_classes), np.int64)
  np.add.at(counts, (labels, predictions), 1)
  return counts


def accuracy(counts: np.ndarray) -> float:
  """Share of examples on the diagonal of a confusion matrix [C, C]; NaN if it is empty."""
  total = counts.sum()
  return float(np.trace(counts) / total) if total else float("nan")


def per_class_accuracy(counts: np.ndarray) -> np.ndarray:
  """Recall of every class [C]; NaN for classes without examples."""
  total = counts.sum(axis=1)
  return np.where(total > 0, np.diag(counts) / np.maximum(total, 1), np.nan)


def mean_per_class_accuracy(counts: np.ndarray) -> float:
  """Mean recall of the classes that have examples."""
  each = per_class_accuracy(counts)
  return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")
