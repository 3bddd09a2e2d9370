"""The suite "mini" on real images, where they are: what the tasks hold, and that a method learns something on each."""
import json

import pytest

from transferlab import cli, data


@pytest.fixture(scope="module")
def images(request):
  shared = request.getfixturevalue("shared") / "data"
  if not all((shared / name).is_dir() for name in ("cifar10_jpeg", "dtd10", "coil20", "pacs70")):
    pytest.skip("the real images of the suite mini are not in ../shared/data")
  return shared


@pytest.mark.parametrize("name", data.SUITES["mini"])
def test_tasks_open_in_both_phases(images, name):
  final, tune = (data.from_string(f"{name}?phase={phase}", images) for phase in ("final", "tune"))
  assert set(final.splits) == {"train", "test"} and set(tune.splits) == {"train", "val"}
  assert final.check() == [] and tune.check() == []
  trained = set(tune.splits["train"].keys) | set(tune.splits["val"].keys)
  assert trained == set(final.splits["train"].keys) and not trained & set(final.splits["test"].keys)
  assert len(tune.splits["val"]) == pytest.approx(0.2 * len(trained), abs=10)


def test_half_a_task_is_named(images, tmp_path):
  (tmp_path / "dtd10" / "test").mkdir(parents=True)
  with pytest.raises(data.DataError, match="mini/dtd10: .*dtd10 has no train; complete it"):
    data.from_string("mini/dtd10", tmp_path)
  (tmp_path / "pacs70").symlink_to(images / "dtd10")
  with pytest.raises(data.DataError, match="mini/pacs: .*pacs70 has no sketch"):
    data.from_string("mini/pacs", tmp_path)


def test_suite_runs_on_real_images(images, tmp_path, capsys):
  """A few steps on the bundled backbone; texture and pose need more than chance would give."""
  cli.main(["transferlab", "train", "--config=configs/vtab.py:counts=expected", "--suite=mini", "--seeds=0",
            f"--data_dir={images}", f"--workdir={tmp_path}", "--config.duration=60 steps",
            "--config.image_size=16", "--config.devices=1"])
  capsys.readouterr()
  cli.main(["transferlab", "report", str(tmp_path), "--json"])
  found = json.loads(capsys.readouterr().out)
  scores = {task: score["mean"] for task, score in found["scores"]["linear"].items()}
  assert scores["mini/dtd10"] > 0.2 and scores["mini/cifar10"] > 0.2 and scores["mini/coil_azimuth"] > 0.2
  assert set(scores) == set(data.SUITES["mini"]) and "mean of 4 tasks" in found["averages"]["linear"]
  row = json.loads((tmp_path / "mini_pacs" / "seed_0" / "result.json").read_text())
  assert row["preprocessing"]["crop"] == "squash" and row["split_hash"] and row["pixels"]
