"""Choosing among classifiers, on numbers small enough to do by hand; and against scikit-learn's scores."""
import numpy as np
import pytest
from sklearn import metrics as oracle

from transferlab import ensembles

LABELS = np.array([0, 0, 1, 1])


def sure(*predictions, by=1.0):
  """Logits [N, 2] that predict these classes, all equally sure."""
  return by * np.eye(2)[list(predictions)]


def noisy(members=6, rows=60, classes=4, seed=0):
  """Members of different quality whose mistakes differ, and labels."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, rows)
  return {f"m{i}": (0.4 + 0.2 * i) * np.eye(classes)[labels] + rng.standard_normal((rows, classes))
          for i in rng.permutation(members)}, labels


def mean(logits, weights):
  return sum(weight * logits[member] for member, weight in weights.items()) / sum(weights.values())


def test_score_is_accuracy_and_cross_entropy():
  logits, labels = noisy()
  for each in logits.values():
    probabilities = np.exp(each) / np.exp(each).sum(1, keepdims=True)
    wanted = oracle.accuracy_score(labels, each.argmax(1)), oracle.log_loss(labels, probabilities)
    np.testing.assert_allclose(ensembles.score(each, labels), wanted, rtol=1e-12)
  assert ensembles.score(np.float32([[1e4, 0]] * 4), LABELS) == (0.5, 5000.0)  # no overflow, float32 or not


def test_ranks_by_accuracy_then_loss_then_order():
  logits = {"half": sure(0, 1, 1, 0), "late": sure(0, 0, 1, 0), "surer, and wrong": sure(0, 0, 1, 0, by=9),
            "all": sure(0, 0, 1, 1, by=0.1), "later": sure(0, 0, 1, 0)}
  assert ensembles.ranked(logits, LABELS) == ["all", "late", "later", "surer, and wrong", "half"]


@pytest.mark.parametrize("k, chosen", [(1, {"b": 1}), (2, {"a": 1, "b": 1}), (3, {"a": 1, "b": 1, "c": 1}),
                                       (9, {"a": 1, "b": 1, "c": 1})])
def test_top_k(k, chosen):
  found = ensembles.top_k({"a": sure(0, 0, 1, 0), "b": sure(0, 0, 1, 1), "c": sure(1, 1, 1, 0)}, LABELS, k)
  assert found == chosen and list(found) == list(chosen)


def test_greedy_by_hand():
  """Best first, "a"; with "c" the mean is right everywhere."""
  a = np.array([[2.0, 0], [2, 0], [0, 2], [1, 0]])
  b = np.array([[0.0, 1], [0, 1], [0, 1], [0, 1]])
  c = np.array([[0.0, 1], [1, 0], [1, 0], [0, 2]])
  logits = {"a": a, "b": b, "c": c}
  assert [ensembles.score(each, LABELS)[0] for each in logits.values()] == [0.75, 0.5, 0.5]
  assert ensembles.score(a + c, LABELS)[0] == 1.0
  assert ensembles.greedy(logits, LABELS, rounds=2) == {"a": 1, "c": 1}


def test_greedy_takes_a_member_again_where_that_helps():
  """The member "a" is right about both rows, and nearly undecided about the second, where "b" is sure; one "b" in two
  would be wrong about the first, one in three is not."""
  logits = {"b": np.array([[0, 1.5], [0, 9.0]]), "a": np.array([[1.0, 0], [0, 0.1]])}
  assert ensembles.greedy(logits, np.array([0, 1]), rounds=3) == {"b": 1, "a": 2}


def exhaustive(logits, labels, rounds):
  """Greedy selection once more, by whole means."""
  taken, best = [], None
  for _ in range(rounds):
    tried = {m: ensembles.score(np.mean([logits[t] for t in [*taken, m]], axis=0), labels) for m in logits}
    taken.append(max(tried, key=lambda m: (tried[m][0], -tried[m][1])))
    if best is None or (tried[taken[-1]][0], -tried[taken[-1]][1]) > best[0]:
      best = (tried[taken[-1]][0], -tried[taken[-1]][1]), list(taken)
  return {m: best[1].count(m) for m in logits if m in best[1]}


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_never_worse_than_the_best_member(seed):
  logits, labels = noisy(seed=seed)
  chosen = ensembles.greedy(logits, labels)
  assert chosen == exhaustive(logits, labels, 10) and sum(chosen.values()) <= 10
  found = ensembles.score(mean(logits, chosen), labels)
  alone = min((-accuracy, loss) for accuracy, loss in (ensembles.score(each, labels) for each in logits.values()))
  assert (-found[0], found[1]) <= (alone[0], alone[1] + 1e-12)
  assert list(chosen) == [member for member in logits if member in chosen]


def test_one_round_is_the_best_member():
  logits, labels = noisy()
  assert ensembles.greedy(logits, labels, rounds=1) == ensembles.top_k(logits, labels, 1)


def test_examples_count_by_their_weights():
  """Three images of one domain and one of another: a domain counts as much as the other, however few its images."""
  labels, weights = np.array([0, 0, 0, 1]), np.array([1, 1, 1, 3]) / 3
  logits = {"large": sure(0, 0, 0, 0), "small": sure(0, 1, 1, 1)}
  assert [ensembles.score(each, labels, weights)[0] for each in logits.values()] == pytest.approx([1 / 2, 2 / 3])
  assert ensembles.ranked(logits, labels) == ["large", "small"]
  assert ensembles.ranked(logits, labels, weights) == ["small", "large"]
  assert ensembles.top_k(logits, labels, 1, weights) == ensembles.greedy(logits, labels, 1, weights) == {"small": 1}
