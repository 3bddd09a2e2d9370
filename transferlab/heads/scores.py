"""What K parallel heads reach: scores on the validation rows, the best of each, and results of chunks put together."""
import math
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np

from transferlab.method import Method
from transferlab.heads.program import Head


class Score(NamedTuple):
  """Of one head, or of one member of it, on the validation rows.

  What became NaN or infinite has accuracy 0 and loss inf, the worst there is. `mean_over_domains` is None unless the
  rows are of several domains; `step` is when it was measured.
  """
  accuracy: float
  loss: float
  mean_over_domains: float | None
  examples: int
  step: int


class Trained(NamedTuple):
  """What `train_heads` returns.

  Fields:
    method: of the last stage. Heads share it in form: what differs between them its read-out takes from the state.
    heads: K of them.
    trainable, state: of the last step, leaves [K, …] on the host; None where they were not to be kept.
    scores: of each head {member: Score}, the members in the method's order; {"": Score} of a method without members.
    chunks: how many heads trained at once.
    peak_bytes: of the largest program, on one device.
    logits: {split: [K, members, N, C]} of the last step, float32, if they were to be kept.
    step_seconds: of a training step of the last stage, with the loading of its batch, the mean over its steps and
      chunks; None if it has but one.
  """
  method: Method
  heads: tuple[Head, ...]
  trainable: Any
  state: Any
  scores: list[dict[str, Score]]
  chunks: list[int]
  peak_bytes: int
  logits: dict[str, np.ndarray] | None
  step_seconds: float | None = None

  def cut(self, count: int) -> "Trained":
    """The first `count` heads, as one chunk."""
    first = lambda tree: jax.tree.map(lambda leaf: leaf[:count], tree)
    heads = self.heads[:count]
    return self._replace(heads=heads, trainable=first(self.trainable), state=first(self.state),
                         scores=self.scores[:count], chunks=[len(heads)], logits=first(self.logits))


def joined(parts: list[Trained]) -> Trained:
  """Chunks one after the other."""
  if len(parts) == 1:
    return parts[0]
  join = lambda name: jax.tree.map(lambda *leaves: np.concatenate(leaves), *[getattr(part, name) for part in parts])
  return parts[0]._replace(
      heads=sum((part.heads for part in parts), ()), scores=sum((part.scores for part in parts), []),
      chunks=sum((part.chunks for part in parts), []), peak_bytes=max(part.peak_bytes for part in parts),
      step_seconds=parts[0].step_seconds and statistics.fmean(part.step_seconds for part in parts),
      **{name: join(name) for name in ("trainable", "state", "logits")})


def score(sums, step: int) -> Score:
  """Of sums [G, 3] by domain: correct predictions, negative log-likelihoods, rows."""
  right, loss, count = sums.sum(axis=0).tolist()
  shown = sums[sums[:, 2] > 0]
  several, finite = len(shown) > 1, math.isfinite(loss)
  mean = float((shown[:, 0] / shown[:, 2]).mean()) if several else None
  if not finite:
    return Score(0.0, math.inf, 0.0 if several else None, int(count), step)
  return Score(right / count, loss / count, mean, int(count), step)


class Scores:
  """Of K heads and their members, evaluation by evaluation: the best of each, or the last.

  Args:
    best: keep the best; of equal ones that with the lower loss.
    by_domain: the mean over domains decides.
  """

  def __init__(self, best: bool, by_domain: bool):
    self.best, self.by_domain, self.found = best, by_domain, {}

  def add(self, sums: dict, step: int) -> np.ndarray:
    """Takes {member: sums [K, G, 3]}; says of which heads the read-out, member "", is the best so far, bool [K]."""
    before, self.found = self.found, {}
    for member, of_heads in sums.items():
      now = [score(each, step) for each in of_heads]
      self.found[member] = [self.chosen(*pair) for pair in zip(before[member], now)] if before else now
    return np.array([each.step == step for each in self.found[""]])

  def chosen(self, old: Score, new: Score) -> Score:
    """What is not finite once stays so: a training that broke down has no good moment to return to."""
    if not math.isfinite(old.loss):
      return old
    rank = lambda each: (each.mean_over_domains if self.by_domain else each.accuracy, -each.loss)
    return new if not self.best or not math.isfinite(new.loss) or rank(new) > rank(old) else old

  def of_heads(self, finite) -> list[dict[str, Score]]:
    """[K] {member: Score}; heads that are not `finite` [K] have the worst."""
    members = [member for member in self.found if member] or [""]
    worst = lambda each: Score(0.0, math.inf, each.mean_over_domains and 0.0, each.examples, each.step)
    return [{member: self.found[member][k] if fine else worst(self.found[member][k]) for member in members}
            for k, fine in enumerate(finite)]
