"""Averages of a suite: their names, and the figures that papers print."""
import pytest

from transferlab import data, metrics

GROUPS = {name: data.ENTRIES[name].group for name in data.SUITES["vtab1k"]}
SSF = [69.0, 92.6, 75.1, 99.4, 91.8, 90.2, 52.9, 87.4, 95.9, 87.4, 75.5, 75.9, 62.3, 53.3, 80.6, 77.3, 54.9, 29.5, 37.9]
HEAD2TOE = [47.1, 88.8, 67.6, 85.6, 87.6, 84.1, 32.9, 82.1, 94.3, 76.0, 74.1, 55.3, 59.5, 43.9, 72.3, 64.9, 51.1, 39.6,
            43.1]


def test_averages_by_hand():
  groups = {"a": "x", "b": "x", "c": "x", "d": "y"}
  assert metrics.averages({"a": 1, "b": 2, "c": 6, "d": 9}, groups) == {
      "mean of 4 tasks": 4.5, "mean of 2 group means": 6.0, "x": 3.0, "y": 9.0}


def test_published_averages():
  """The group-wise one of SSF as the DTL paper prints it (arXiv:2312.07856, table 2), Head2Toe's plain one."""
  ssf = metrics.averages(dict(zip(GROUPS, SSF)), GROUPS)
  assert round(ssf["mean of 3 group means"], 1) == 75.7
  assert round(ssf["mean of 19 tasks"], 1) == 73.1
  head2toe = metrics.averages(dict(zip(GROUPS, HEAD2TOE)), GROUPS)
  assert round(head2toe["mean of 19 tasks"], 1) == 65.8
  assert round(head2toe["mean of 3 group means"], 1) == 68.6
  assert set(ssf) == {"mean of 19 tasks", "mean of 3 group means", "natural", "specialized", "structured"}


def test_an_incomplete_average_has_another_name():
  scores = dict(zip(GROUPS, SSF))
  whole = metrics.averages(scores, GROUPS)
  del scores["vtab/snorb_ele"], scores["vtab/dmlab"]
  part = metrics.averages(scores, GROUPS)
  assert list(part) == ["mean of 17 of 19 tasks", "mean of 3 group means, 17 of 19 tasks", "natural", "specialized",
                        "structured, 6 of 8 tasks"]
  assert part["natural"] == whole["natural"]
  assert not {name for name in part if part[name] != whole.get(name)} & set(whole)


def test_an_absent_group_is_no_zero():
  found = metrics.averages({"a": 1.0, "c": 3.0}, {"a": "x", "b": "y", "c": "z"})
  assert found == {"mean of 2 of 3 tasks": 2.0, "mean of 2 of 3 group means, 2 of 3 tasks": 2.0, "x": 1.0, "z": 3.0}


def test_one_group_has_one_average():
  assert metrics.averages({"a": 1.0}, {"a": "", "b": ""}) == {"mean of 1 of 2 tasks": 1.0}
  assert metrics.averages({}, {"a": "x"}) == {}


def test_a_score_of_another_suite_is_an_error():
  with pytest.raises(ValueError, match="'c'.*not among"):
    metrics.averages({"a": 1.0, "c": 1.0}, {"a": "x", "b": "y"})
