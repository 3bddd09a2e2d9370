"""The table and picture of InCA's sites, from rows of finished runs."""
import csv
import json

import pytest
from engine import row

from transferlab import analysis, cli, report


def run(task, seed, members, method="inca", **changes):
  members = {site: {"accuracy": accuracy, "loss": 1.0} for site, accuracy in members.items()}
  made = row(task, seed, 0.5, method, **{"options": {"sites": "block_.*/out", "combine": "best"}, **changes})
  return {**made, "val": {**made["test"]}, "members": members} if members else made


ROWS = [run("vtab/svhn", 0, {"block_00/out": 0.2, "norm": 0.6}),
        run("vtab/svhn", 1, {"block_00/out": 0.4, "norm": 0.9}),
        run("vtab/dtd", 0, {"block_00/out": 0.7, "norm": 0.1})]


def table(folder) -> list[list[str]]:
  return list(csv.reader(open(folder / "inca_sites.csv")))


def test_task_by_site(tmp_path):
  """Means over seeds, tasks as their suite has them; runs of other methods, or without validation, are left aside."""
  others = [row("vtab/dtd", 0, 0.5, "linear"), run("vtab/dtd", 0, {})]
  written, remarks = analysis.figure("inca/sites", [*ROWS, *others], tmp_path)
  assert table(tmp_path) == [["task \\ site", "block_00/out", "norm"], ["vtab/dtd", "0.7", "0.1"],
                             ["vtab/svhn", "0.30000000000000004", "0.75"]]
  assert remarks == ["vtab/dtd: best at block_00/out, 0.7000 on validation, mean of 1 seed",
                     "vtab/svhn: best at norm, 0.7500 on validation, mean of 2 seeds"]
  assert written[0] == tmp_path / "inca_sites.csv"
  if len(written) > 1:  # where matplotlib is
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_both_methods_and_missing_sites(tmp_path):
  opened = run("vtab/dtd", 0, {"norm": 0.3, "block_01/out": 0.8}, "open_inca")
  analysis.figure("inca/sites", [*ROWS, opened], tmp_path)
  assert table(tmp_path)[1:3] == [["vtab/dtd, inca", "0.7", "0.1", ""], ["vtab/dtd, open_inca", "", "0.3", "0.8"]]


def test_unlike_runs_are_refused(tmp_path):
  with pytest.raises(report.Unlike, match="inca on vtab/svhn differ in options.sites"):
    analysis.figure("inca/sites", [*ROWS, run("vtab/svhn", 2, {"norm": 0.1}, options={"sites": "norm"})], tmp_path)
  with pytest.raises(report.Unlike, match="backbone_hash"):
    analysis.figure("inca/sites", [*ROWS, run("vtab/eurosat", 0, {"norm": 0.1}, backbone_hash="other")], tmp_path)
  with pytest.raises(report.Unlike, match="seed 0 is there twice"):
    analysis.figure("inca/sites", [*ROWS, ROWS[0]], tmp_path)
  with pytest.raises(ValueError, match="none of 1 runs has scores of its sites"):
    analysis.figure("inca/sites", [row()], tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys):
  for i, each in enumerate(ROWS):
    (tmp_path / f"run{i}").mkdir()
    (tmp_path / f"run{i}" / "result.json").write_text(json.dumps({**each, "path": None}))
  cli.main(["transferlab", "report", str(tmp_path), "--figure=inca/sites", f"--out={tmp_path / 'out'}"])
  printed = capsys.readouterr().out
  assert "remark: vtab/svhn: best at norm" in printed and str(tmp_path / "out" / "inca_sites.csv") in printed
