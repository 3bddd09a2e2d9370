"""Metrics as sums and counts: a confusion matrix adds up over batches of any size, means are taken once at the end."""
from collections.abc import Collection, Mapping

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


def averages(scores: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
  """The averages of a suite by name: over its tasks, over the means of its groups, and those means.

  VTAB-1k is published with either of the first two, up to three points apart: Head2Toe prints the mean of the 19 tasks,
  NOAH, SSF, FacT and DTL the mean of the 3 group means. An average that leaves tasks out says so: "mean of 17 of 19
  tasks", "structured, 6 of 8 tasks".

  Args:
    scores: task -> score, of the tasks that were run.
    groups: task -> group, of all tasks of the suite; with a single group there is nothing more to average over.

  Raises:
    ValueError: a score of a task that the suite has not.
  """
  if unknown := sorted(set(scores) - set(groups)):
    raise ValueError(f"scores of {unknown}, which are not among the suite's tasks {list(groups)}")
  if not scores:
    return {}
  done = [task for task in groups if task in scores]
  found = {f"mean of {_out_of(done, groups)} tasks": _mean(scores, done)}
  names = list(dict.fromkeys(groups.values()))
  if len(names) == 1:
    return found
  by_group, named = {}, {}
  for name in names:
    members = [task for task in groups if groups[task] == name]
    run = [task for task in members if task in scores]
    if run:
      by_group[name] = _mean(scores, run)
      named[name if len(run) == len(members) else f"{name}, {_out_of(run, members)} tasks"] = by_group[name]
  complete = "" if len(done) == len(groups) else f", {_out_of(done, groups)} tasks"
  found[f"mean of {_out_of(by_group, names)} group means{complete}"] = _mean(by_group, by_group)
  return {**found, **named}


def _out_of(some: Collection[str], whole: Collection[str]) -> str:
  return f"{len(whole)}" if len(some) == len(whole) else f"{len(some)} of {len(whole)}"


def _mean(scores: Mapping[str, float], names: Collection[str]) -> float:
  return float(np.mean([scores[name] for name in names]))
