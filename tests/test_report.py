"""Averages of ledger rows: numbers by hand, and what is refused."""
import copy
import json
import statistics

import pytest
from engine import row

from transferlab import data, report

VTAB = data.SUITES["vtab1k"]


def changed(source: dict, name: str, value) -> dict:
  """A deep copy with one dotted field set."""
  made = copy.deepcopy(source)
  *groups, last = name.split(".")
  inner = made
  for group in groups:
    inner = inner[group]
  inner[last] = value
  return made


def test_mean_and_deviation_over_seeds():
  values = [0.5, 0.6, 0.9]
  found = report.report([row(seed=i, accuracy=v) for i, v in enumerate(values)])
  score = found.scores["dtl"]["vtab/dtd"]
  assert score == (pytest.approx(2 / 3), pytest.approx(statistics.stdev(values)), 3)
  halved = report.report([row(seed=i, accuracy=v) for i, v in enumerate(values)], score="mean_per_class")
  assert halved.scores["dtl"]["vtab/dtd"].mean == pytest.approx(1 / 3)


def test_a_single_seed_has_no_deviation_and_is_marked():
  found = report.report([row()])
  assert found.scores["dtl"]["vtab/dtd"] == (0.5, None, 1)
  assert "dtl: a single seed for vtab/dtd" in found.remarks


def test_whole_suite_has_both_averages():
  groups = {name: data.ENTRIES[name].group for name in VTAB}
  value = {"natural": 0.9, "specialized": 0.6, "structured": 0.3}
  found = report.report([row(task, accuracy=value[groups[task]]) for task in VTAB])
  assert found.suite == "vtab1k"
  assert found.averages["dtl"]["mean of 19 tasks"] == pytest.approx((7 * 0.9 + 4 * 0.6 + 8 * 0.3) / 19)
  assert found.averages["dtl"]["mean of 3 group means"] == pytest.approx(0.6)


def test_an_incomplete_suite_says_what_is_missing():
  found = report.report([row(task) for task in VTAB if task != "vtab/dtd"], "vtab1k")
  assert "mean of 19 tasks" not in found.averages["dtl"]
  assert any("18 of 19" in name for name in found.averages["dtl"])
  assert "dtl lacks vtab/dtd" in found.remarks


@pytest.mark.parametrize("name, value", [
    ("backbone_hash", "b1"), ("image_size", 384), ("preprocessing.mean", [0.4]), ("options.rank", 4),
    ("protocol", "VTAB-1k, tune"), ("recipe.duration", "50 epochs"), ("recipe.optim.lr", 1e-2), ("steps", 15000),
    ("dtype", "bfloat16"), ("source", "list"), ("split_hash", "other"), ("pixels", "other")])
def test_unlike_seeds_of_a_task_are_refused_with_the_field(name, value):
  rows = [row(seed=0), changed(row(seed=1), name, value)]
  field = {"source": "form"}.get(name, name)
  with pytest.raises(report.Unlike, match=rf"dtl on vtab/dtd differ in {field}: .*runs/dtl/vtab/dtd/0 against .*/1"):
    report.report(rows)


@pytest.mark.parametrize("name, value", [
    ("backbone_hash", "b1"), ("image_size", 384), ("preprocessing.crop", "center"), ("protocol", "VTAB-1k, tune"),
    ("recipe.duration", "50 epochs"), ("recipe.batch_size", 64), ("recipe.augmentation", "flip"),
    ("dtype", "bfloat16"), ("source", "list")])
def test_unlike_tasks_are_refused_with_the_field(name, value):
  rows = [row("vtab/dtd"), changed(row("vtab/svhn"), name, value)]
  field = {"source": "pixels_from"}.get(name, name)
  with pytest.raises(report.Unlike, match=rf"the tasks of dtl differ in {field}: "):
    report.report(rows)


def test_tasks_may_have_learning_rates_and_options_of_their_own():
  report.report([row("vtab/dtd"), changed(changed(row("vtab/svhn"), "recipe.optim.lr", 1e-2), "options.rank", 4)])


def test_both_file_formats_of_tfds_are_one_form():
  report.report([row(seed=0), row(seed=1, source="tfrecord vtab/dtd:3.0.1")])
  with pytest.raises(report.Unlike, match="form: 'tfds vtab/dtd:3.0.1' -> 'tfds vtab/dtd:3.0.2'"):
    report.report([row(seed=0), row(seed=1, source="tfrecord vtab/dtd:3.0.2")])


def test_a_seed_may_draw_other_splits_but_not_the_same_draw():
  report.report([row(seed=0, draw="seed 0"), row(seed=1, draw="seed 1", split_hash="other", pixels="other")])
  same = [row(seed=0, draw="seed 1"), row(seed=1, draw="seed 1", split_hash="other")]
  with pytest.raises(report.Unlike, match="split_hash"):
    report.report(same)
  with pytest.raises(report.Unlike, match="split_hash"):
    report.report([*same, row(seed=2, draw="seed 2", split_hash="third")])


def test_methods_are_compared_on_the_same_inputs_only():
  report.report([row(), changed(row(method="lora"), "recipe.duration", "20 epochs")])
  with pytest.raises(report.Unlike, match="the methods differ in backbone_hash"):
    report.report([row(), row(method="lora", backbone_hash="b1")])
  for name in ("split_hash", "pixels"):
    with pytest.raises(report.Unlike, match=f"the methods on vtab/dtd differ in {name}"):
      report.report([row(), row("vtab/svhn"), row(method="lora", **{name: "other"})])
  drawn = {"draw": "seed 1", "split_hash": "drawn", "pixels": "drawn"}
  report.report([row(), row(seed=1, **drawn), row(method="lora"), row(method="lora", seed=1, **drawn)])


def test_unlike_tasks_stand_beside_each_other_where_nothing_is_averaged():
  found = report.report([row("vtab/dtd"), row("vtab/svhn", image_size=384)], average=False)
  assert set(found.scores["dtl"]) == {"vtab/dtd", "vtab/svhn"} and found.averages == {"dtl": {}}
  with pytest.raises(report.Unlike):
    report.report([row(seed=0), row(seed=1, image_size=384)], average=False)


@pytest.mark.parametrize("task, source, where", [
    ("vtab/dtd", "list", "extracted copies"), ("vtab/dtd", "list (extracted images)", "extracted copies"),
    ("vtab/dtd", "tfrecord dtd:3.0.1", "originals"), ("mini/coil_azimuth", "list", "originals"),
    ("mine", "", "originals")])
def test_extracted_copies_are_told_from_originals(task, source, where):
  assert report.pixels_from(task, source) == where


def test_what_is_allowed_to_differ_is_named():
  rows = [row(seed=0), changed(row(seed=1), "recipe.optim.lr", 1e-2)]
  assert "allowed to differ: recipe.optim" in report.report(rows, allow=["recipe.optim"]).remarks
  with pytest.raises(report.Unlike):
    report.report([rows[0], changed(rows[1], "recipe.duration", "1 epoch")], allow=["recipe.optim"])


def test_the_same_seed_twice_is_refused():
  with pytest.raises(report.Unlike, match="seed 0 is there twice, in runs/dtl/vtab/dtd/0 and elsewhere"):
    report.report([row(), row(path="elsewhere")])


def test_other_libraries_are_remarked():
  found = report.report([row(seed=0), row(seed=1, versions={"jax": "0.11"})])
  assert "versions differ between the runs" in found.remarks


def test_split_and_suite_are_checked():
  with pytest.raises(ValueError, match="has no val score.*--split=test"):
    report.report([row()], split="val")
  with pytest.raises(ValueError, match="suite 'vtab' is unknown; nearest: vtab1k"):
    report.report([row()], "vtab")
  with pytest.raises(ValueError, match="tasks flowers are not in suite 'vtab1k'"):
    report.report([row("flowers")], "vtab1k")
  assert report.report([row("flowers"), row("birds")]).averages["dtl"]["mean of 2 tasks"] == 0.5


def test_rows_are_read_from_below_folders(tmp_path):
  for name in ("a/x", "b"):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "result.json").write_text(json.dumps(row()))
  assert [r["path"] for r in report.read(tmp_path)] == [str(tmp_path / "a/x"), str(tmp_path / "b")]
  assert len(report.read([tmp_path, tmp_path / "b"])) == 2
  with pytest.raises(ValueError, match="no finished run in .*result.json"):
    report.read(tmp_path / "a/x/none")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"method": "dtl"}', json.dumps(
    {name: value for name, value in row().items() if name != "backbone"})])
def test_a_result_that_no_run_wrote_is_named(tmp_path, text):
  (tmp_path / "result.json").write_text(text)
  with pytest.raises(ValueError, match="result.json"):
    report.read(tmp_path)
