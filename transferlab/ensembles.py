"""Choosing among classifiers that were trained side by side, from their logits on a validation split: how good each is,
the best k, and greedy forward selection. Plain numpy; a choice is {member: weight}, weights whole numbers.

Give validation logits, never the test's: what is chosen on a split looks better on it than it is.
"""
from collections.abc import Mapping

import numpy as np

Logits = Mapping[str, np.ndarray]  # {member: [N, C]}


def score(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
  """(accuracy, mean cross-entropy) of logits [N, C] for labels [N]; examples count by their weights [N], if given."""
  shifted = np.asarray(logits, np.float64) - logits.max(axis=-1, keepdims=True)
  each = np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(labels)), labels]  # [N]
  return float(np.average(logits.argmax(axis=-1) == labels, weights=weights)), float(np.average(each, weights=weights))


def ranked(logits: Logits, labels: np.ndarray, weights: np.ndarray | None = None) -> list[str]:
  """Members from the best to the worst: by accuracy, of equal ones by the lower loss, then as they come."""
  scores = {member: score(each, labels, weights) for member, each in logits.items()}
  return sorted(logits, key=lambda member: (-scores[member][0], scores[member][1]))  # sorting is stable


def top_k(logits: Logits, labels: np.ndarray, k: int, weights: np.ndarray | None = None) -> dict[str, int]:
  """The k best members, or all if there are fewer, each once, as they come in `logits`."""
  chosen = set(ranked(logits, labels, weights)[:k])
  return {member: 1 for member in logits if member in chosen}


def greedy(logits: Logits, labels: np.ndarray, rounds: int = 10, weights: np.ndarray | None = None) -> dict[str, int]:
  """Greedy forward selection with replacement on the mean of logits (Caruana et al. 2004, ICML, "Ensemble selection
  from libraries of models", on the mean of predictions there).

  Starts with the best member. Each round adds the member, again perhaps, with which the ensemble is best. The shortest
  of the best ensembles on the way is the choice: on these labels it is never worse than the best member.

  Args:
    rounds: the most members, counted as often as they are taken. (Our choice.)

  Returns:
    {member: how often it was taken}, as they come in `logits`.
  """
  total, taken, found = 0.0, [], []
  for size in range(1, rounds + 1):
    scores = {member: score((total + each) / size, labels, weights) for member, each in logits.items()}
    best = min(scores, key=lambda member: (-scores[member][0], scores[member][1]))
    total, taken = total + np.asarray(logits[best], np.float64), [*taken, best]
    found.append((-scores[best][0], scores[best][1], size))
  chosen = taken[:min(found)[2]]
  return {member: chosen.count(member) for member in logits if member in chosen}
