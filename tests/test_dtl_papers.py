"""Tables and figures of DTL: its numbers, ours beside them, M-sensitivity from sweeps, and what is refused."""
import csv
import json

import pytest
from engine import row

from transferlab import analysis, cli, cost, data, papers, report
from transferlab.papers import dtl, dtl_costs
from transferlab.papers.table import numbers
from transferlab.progress import Progress
from transferlab.report import Score

VTAB = data.SUITES["vtab1k"]
KNOWN = numbers("dtl")


def cells(table, whose) -> dict[str, dict]:
  """{task: {method: cell}} of the rows of "paper" or "ours"."""
  return {cells[0]: dict(zip(table.header[2:], cells[2:])) for cells in table.rows if cells[1] == whose}


# --- The paper's numbers --------------------------------------------------------------------------------------------

def test_numbers_are_those_collected(shared):
  source = json.loads((shared / "papers" / "dtl.json").read_text())
  assert tuple(KNOWN["tasks"].values()) == tuple(f"vtab/{name}" for name in source["tasks"]) == VTAB
  assert KNOWN["units"] == source["table1_minimal_structural_units"]
  for method, values in source["table2_vtab_vitb16"].items():
    mine = KNOWN["table2"][method]
    assert mine["accuracy"] == list(values["acc"].values())
    assert [mine[each] for each in ("params", "memory", "average")] == [
        values[each] for each in ("params_M", "gpu_mem_GB", "average")]
  for method, values in source["table3_vtab_swinb"].items():
    assert sorted(KNOWN["table3"][method].values()) == sorted(values.values())
  targets = {"imagenet": "val", "imagenet_sketch": "sketch", "imagenet_v2": "v2", "imagenet_a": "a", "imagenet_r": "r"}
  for method, values in source["table4_domain_generalization_vitb16"].items():
    assert dict(zip(KNOWN["targets"].values(), KNOWN["table4"][method])) == {
        f"imagenet/{targets[name]}": value for name, value in values.items()}
  assert [list(each.values()) for each in KNOWN["table5"]] == [
      [each[key] for key in ("rank", "swish", "dwconv", "avg")] for each in source["table5_ablation_vtab_avg"]]
  assert KNOWN["table6"] == {method: list(values.values())
                             for method, values in source["table6_throughput_img_per_s"].items()}


def test_printed_averages_are_means_of_group_means():
  _, table = papers.tables("dtl/table2")
  averages = {label: dict(zip(table.header[2:], values)) for label, _, *values in table.averages}
  for method, values in KNOWN["table2"].items():
    assert averages["mean of 3 group means"][method] == pytest.approx(values["average"], abs=0.11), method
  for method, values in KNOWN["table3"].items():
    groups = [values[group] for group in ("natural", "specialized", "structured")]
    assert sum(groups) / 3 == pytest.approx(values["average"], abs=0.11), method


# --- What methods cost ----------------------------------------------------------------------------------------------

COUNTS = {  # the means over tasks are those of the released scripts' sizes
    "vit": {"Full": 85_798_656, "Linear": 0, "BitFit": 102_912, "VPT": 9_216 * 61, "LST": 2_376_492, "LoRA": 294_912,
            "AdaptFormer": 156_768, "NOAH": 371_290, "FacT": 68_985, "SSF": 205_824, "DTL": 36_864, "DTL+": 50_728,
            "DTL+*": 50_728},
    "swin": {"Full": 86_743_224, "Linear": 0, "BitFit": 200_760, "VPT": 12_032 * 13, "FacT": 134_953, "DTL": 90_112,
             "DTL+": 128_512, "DTL+*": 144_256}}


@pytest.mark.parametrize("table, family", [("table2", "vit"), ("table3", "swin")])
def test_parameters_are_counted_from_shapes(table, family):
  costs, _ = papers.tables(f"dtl/{table}")
  found = {each[0]: each for each in costs.rows}
  assert list(found) == list(KNOWN[table]) == list(COUNTS[family])
  for method, count in COUNTS[family].items():
    assert 1e6 * found[method][costs.header.index("ours (M)")] == pytest.approx(count, abs=1), method
    printed = found[method][costs.header.index("#param (M)")]
    assert method == "NOAH" or count / 1e6 == pytest.approx(printed, abs=0.0051 if printed < 80 else 0.051), method
  assert found["DTL"][costs.header.index("ours (MiB)")] is None
  assert any("--measure" in remark for remark in costs.remarks)


def test_structural_units_are_the_papers():
  table, = papers.tables("dtl/table1", [row()])
  assert [each[1] for each in table.rows] == [each[2] for each in table.rows] == [24, 36, 144, 148, 12, 13]
  assert "the runs given are not used here" in table.remarks


def test_peak_bytes_are_measured_when_asked_for(monkeypatch):
  """Each method's step once, as shares of full fine-tuning."""
  asked = []
  def of_training(spec, method, classes, *, batch_size):
    asked.append((spec.name, method.name, classes, batch_size))
    return cost.StepCost(0.0, 2**30 * (4 if method.name == "full" else 1))
  monkeypatch.setattr(cost, "of_training", of_training)
  costs, _ = papers.tables("dtl/table3", measure=True)
  assert asked == [("swin_b", dtl_costs.METHODS[name], 100, 32) for name in KNOWN["table3"]]
  assert [each[-2:] for each in costs.rows[:2]] == [[4096, 100], [1024, 25]]


def test_throughput_is_timed_when_asked_for(monkeypatch):
  table, = papers.tables("dtl/table6")
  assert table.rows[0] == ["Full", 161, None, 636, None, 952, None]
  with Progress(1, "timing", quiet=True) as progress:
    found = list(dtl_costs.images_per_second("dtl", (3,), progress, backbone="vit_tiny_test", seconds=0.0))
    assert len(found) == progress.done == 1 and found[0] > 0
  monkeypatch.setattr(dtl_costs, "images_per_second", lambda method, batches, progress: [10 * B for B in batches])
  table, = papers.tables("dtl/table6", measure=True)
  assert table.rows[0] == ["Full", 161, 10, 636, 40, 952, 160] and len(table.rows) == 6


# --- Accuracies -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, options, name", [
    ("dtl", {"rank": 2, "activation": "swish", "beta": 100.0, "readout": "mean"}, "DTL"),
    ("dtl", {"rank": 2, "activation": "identity"}, "DTL, identity"),
    ("dtl_plus", {"rank": 4, "readout": "cls"}, "DTL+, rank 4, cls"), ("dtl_plus_star", {"rank": 2}, "DTL+*"),
    ("linear", {"site": "pooled"}, "Linear"), ("linear", {"site": "block_05/out"}, None),
    ("fact_tk", {}, "FacT"), ("adapter", {}, "Adapter"), ("head2toe", {}, None)])
def test_runs_are_called_as_the_paper_calls_them(method, options, name):
  assert dtl.called(row(method=method, options=options)) == name


def ours() -> list[dict]:
  """Runs on the ViT, and one on a Swin, whose own rank is 4."""
  return [row("vtab/dtd", 0, 0.5), row("vtab/dtd", 1, 0.7), row("vtab/svhn", 0, 0.25, "fact_tk", options={"rank": 16}),
          row("vtab/dtd", 0, 0.9, backbone="swin_base.pth", options={"rank": 4})]


def test_ours_stand_beside_the_papers_by_backbone():
  alone, both = papers.tables("dtl/table2")[1], papers.tables("dtl/table2", ours())[1]
  assert cells(both, "paper") == cells(alone, "paper")
  mine = cells(both, "ours")
  assert mine["DTD"]["DTL"] == Score(pytest.approx(60), pytest.approx(14.142, abs=1e-3), 2)
  assert mine["SVHN"]["FacT"].mean == 25 and set(mine) == {"DTD", "SVHN"}
  assert "1 runs of other methods or tasks are left out" in both.remarks
  swin = papers.tables("dtl/table3", ours())[1]
  assert cells(swin, "ours")["DTD"]["DTL"].mean == 90 and not cells(swin, "paper")
  assert ["mean of 3 group means", "paper"] == swin.averages[0][:2] and swin.averages[0][-1] == 78.6
  with pytest.raises(ValueError, match="none of 1 runs belongs into this table"):
    papers.tables("dtl/table3", ours()[:1])


def test_domains():
  table, = papers.tables("dtl/table4", [row("imagenet/a", seed, 0.2, "dtl_plus") for seed in range(3)])
  assert cells(table, "paper")["-A"]["NOAH"] == 11.9
  assert cells(table, "ours")["-A"]["DTL+"] == Score(pytest.approx(20), pytest.approx(0), 3)


def test_ablations_are_told_apart_by_their_options():
  options = {(2, False): {"rank": 2, "activation": "identity"}, (2, True): {"rank": 2, "activation": "swish"},
             (8, True): {"rank": 8, "activation": "swish"}}
  rows = [row(task, 0, value, method, options=options[key]) for task in VTAB for method, key, value in (
      ("dtl", (2, False), 0.1), ("dtl", (2, True), 0.2), ("dtl_plus", (2, True), 0.3), ("dtl_plus", (8, True), 0.4))]
  table, = papers.tables("dtl/table5", [*rows, row(method="linear")])
  shown = {tuple(each[:3]): each[3:] for each in table.rows}
  name = "mean of 3 group means"
  assert shown[2, "no", "no"] == [76.0, pytest.approx(10), name]
  assert shown[2, "yes", "no"] == [76.7, pytest.approx(20), name]
  assert shown[2, "yes", "yes"] == [77.7, pytest.approx(30), name]
  assert shown[8, "yes", "yes"] == [None, pytest.approx(40), name]
  assert shown[4, "yes", "yes"] == [77.6, None, None] and len(shown) == 6
  assert "tick marks" in table.remarks[0] and "1 runs of other methods or tasks are left out" in table.remarks
  with pytest.raises(ValueError, match="none of 1 runs belongs into table 5"):
    papers.tables("dtl/table5", [row(method="linear")])
  with pytest.raises(report.Unlike, match="rank 2, swish on vtab/dtd differ in options.first_write"):
    papers.tables("dtl/table5", [row(seed=seed, options={"rank": 2, "first_write": 7 - seed}) for seed in (0, 1)])
  by_m = [row(task, options={"rank": 2, "first_write": M}) for task, M in (("vtab/dtd", 7), ("vtab/svhn", 3))]
  with pytest.raises(report.Unlike, match="rank 2, swish differ in options.first_write"):
    papers.tables("dtl/table5", by_m)
  strangers = [row(options={"rank": 2, "readout": "cls"}), row(options={"rank": 2, "beta": 1.0}),
               row(options={"rank": 4}, backbone="swin_base.pth")]
  assert "3 runs of other methods or tasks are left out" in papers.tables("dtl/table5", [*rows, *strangers])[0].remarks


# --- Figures 1 and 3 ------------------------------------------------------------------------------------------------

def test_accuracy_against_costs(tmp_path):
  rows = [row(task, 0, 0.8, trainable_without_classifier=36_864, train_peak_bytes=2**30) for task in VTAB]
  table, = papers.tables("dtl/figure1", rows, out=str(tmp_path / "one.png"))
  found = {each[0]: each[1:] for each in table.rows}
  assert found["DTL"] == [0.04, 1.6, 76.7, pytest.approx(0.036864), 1024, pytest.approx(80), "mean of 3 group means"]
  assert found["Full"] == [85.8, 4.7, 68.9, None, None, None, None]
  written = list(csv.reader(open(tmp_path / "one.csv")))
  assert ["paper: GPU memory", "Full", "", "4.7", "68.9", ""] in written
  assert ["paper: #param", "Linear", "", "0.0", "57.6", ""] in written
  assert not [line for line in written if line[:2] == ["paper: #param", "Full"]]
  assert [line[:2] for line in written if line[0].startswith("ours")] == [["ours: parameters", "DTL"], [
      "ours: peak of a step", "DTL"]]
  assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_peaks_of_unlike_steps_are_not_averaged(tmp_path):
  run = lambda task, method="dtl", peak=2**30, **changes: row(
      task, 0, 0.8, method, trainable_without_classifier=0, train_peak_bytes=peak, **changes)
  rows = [run("vtab/dtd"), run("vtab/svhn", peak=2**20, cached={"dtype": "float32", "views": 0}),
          run("vtab/dtd", "linear"), run("vtab/dtd", "bitfit", devices=2), row("vtab/dtd", 0, 0.8, "ssf")]
  table, = papers.tables("dtl/figure1", rows, out=str(tmp_path / "one.png"))
  found = {each[0]: each[4:6] for each in table.rows}
  assert found["DTL"] == [0, None] and found["Linear"] == [0, 1024] and found["SSF"] == [None, None]
  assert any(line.startswith("the peaks of DTL differ in cached") and line.endswith("left out")
             for line in table.remarks)
  assert any(line.startswith("the peaks of the methods differ in devices") and line.endswith("do not compare")
             for line in table.remarks)
  written = [line[:2] for line in csv.reader(open(tmp_path / "one.csv"))]
  assert ["ours: parameters", "DTL"] in written and ["ours: peak of a step", "DTL"] not in written
  assert papers.tables("dtl/figure1", rows[:2], allow=("cached",))[0].rows[-3][5] == 512.5


def few(task, shots, accuracy, method, seed=0):
  protocol = f"NOAH few-shot, final: train=train, shots {shots}; best on val, test once"
  return row(f"fewshot/{task}", seed, accuracy, method, protocol=protocol)


def test_accuracy_over_shots(tmp_path):
  sets = ("fgvc_aircraft", "food101", "oxford_flowers102", "oxford_pets", "stanford_cars")
  rows = [few(task, shots, value, method) for task in sets for shots, method, value in (
      (1, "dtl_plus", 0.5), (1, "fact_tk", 0.4), (16, "dtl_plus", 0.9), (16, "fact_tk", 0.85))]
  rows += [few("oxford_pets", 1, 0.7, "dtl_plus", seed=1), few("food101", 4, 0.6, "dtl"), row()]
  table, = papers.tables("dtl/figure3", rows, out=str(tmp_path / "three.png"))
  shown = {tuple(each[:2]): dict(zip(table.header[2:], each[2:])) for each in table.rows}
  assert table.header[2:] == ["1", "2", "4", "8", "16"]
  assert shown["Pets", "DTL+"]["1"] == Score(pytest.approx(60), pytest.approx(14.142, abs=1e-3), 2)
  assert shown["Food-101", "DTL"] == {"1": None, "2": None, "4": Score(60, None, 1), "8": None, "16": None}
  assert shown["average of the five", "FacT"]["16"].mean == pytest.approx(85)
  assert ("average of the five", "DTL") not in shown
  assert "ours, DTL+ less FacT: +12.0 at 1, +5.0 at 16" in table.remarks
  written = list(csv.reader(open(tmp_path / "three.csv")))
  assert ["Cars", "FacT", "", "16", "85.0", ""] in written and len({line[0] for line in written}) == 7
  assert (tmp_path / "three.png").exists()
  with pytest.raises(ValueError, match="none of 1 runs belongs into figure 3"):
    papers.tables("dtl/figure3", [row()])


# --- M --------------------------------------------------------------------------------------------------------------

def point(M, accuracy, task="vtab/dtd", method="dtl", seed=0, **changes) -> dict:
  """A row of a sweep's ledger."""
  costs = {"train_peak_bytes": (13 - M) * 2**20, "step_seconds": (20 - M) / 1000, "heads": 1, "from_cache": False}
  made = row(task, seed, accuracy, method, options={"rank": 2, "first_write": M}, **{**costs, **changes})
  return {**made, "val": made["test"], "test": None, "point_hash": f"{M} {seed}", "path": f"line {M}"}


def table_of(folder) -> list[list[str]]:
  return list(csv.reader(open(folder / "dtl_sensitivity_table.csv")))


def test_sensitivity_to_m(tmp_path):
  rows = [point(7, 0.5), point(7, 0.7, seed=1), point(1, 0.25), point(1, 0.5, "vtab/svhn"), point(7, 1.0, "vtab/svhn")]
  files, remarks = analysis.figure("dtl/sensitivity", rows, tmp_path)
  found = {(line[0], line[1]): line[2:] for line in table_of(tmp_path)[1:]}
  assert found["vtab/dtd", "1"] == ["25.0", "", str(12 * 2**20), "0.019", "1"]
  assert float(found["vtab/dtd", "7"][0]) == pytest.approx(60) and float(found["vtab/dtd", "7"][1]) == pytest.approx(
      14.142, abs=1e-3)
  assert [float(value) for value in found["mean of 2 tasks", "7"][0:1]] == [pytest.approx(80)] and len(found) == 6
  assert "dtl, mean of 2 tasks, M = 1: val accuracy 37.5, peak 12.0 MiB, step 19.0 ms" in remarks
  assert "75.9 at M = 12, 76.7 at M = 11" in remarks[-1] and len(remarks) == 3
  points = list(csv.reader(open(tmp_path / "dtl_sensitivity.csv")))
  assert ["time", "vtab/svhn", "", "7", "13.0", ""] in points and ["memory", "vtab/dtd", "", "1", "12.0", ""] in points
  assert {file.name for file in files} == {f"dtl_sensitivity{end}" for end in ("_table.csv", ".csv", ".png")}


def test_sensitivity_says_what_its_costs_are_of(tmp_path):
  rows = [point(1, 0.5, heads=3, from_cache=True), point(2, 0.6, heads=3, device="gpu"), point(3, 0.5)]
  rows[2]["val"]["accuracy"] = None
  remarks = analysis.figure("dtl/sensitivity", rows, tmp_path)[1]
  assert remarks[0] == "left out, as it diverged: line 3"
  assert any("up to 3 heads at once" in each for each in remarks)
  assert any("from cached activations" in each for each in remarks)
  assert remarks[-1] == "points are of several devices, cpu, gpu: their peaks and times do not compare"
  both = [point(M, 0.5, method=method) for M in (1, 2) for method in ("dtl", "dtl_plus")]
  analysis.figure("dtl/sensitivity", both, tmp_path)
  assert [line[0] for line in table_of(tmp_path)[1:]] == ["dtl, vtab/dtd"] * 2 + ["dtl_plus, vtab/dtd"] * 2


@pytest.mark.parametrize("rows, message", [
    ([point(7, 0.5), point(7, 0.6, seed=1)], "2 of 2 points are DTL's, of fewer than two values of options.first_w"),
    ([point(7, 0.5), point(6, 0.5, step_seconds=None)], "line 6 has no seconds of a step"),
    ([point(7, 0.5), point(6, 0.5, image_size=64)], "dtl on vtab/dtd differ in image_size"),
    ([point(7, 0.5), point(6, 0.5), point(6, 0.5)], "seed 0 is there twice")])
def test_sensitivity_refuses(rows, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    analysis.figure("dtl/sensitivity", rows, tmp_path)
  assert not list(tmp_path.iterdir())


# --- The command ----------------------------------------------------------------------------------------------------

def test_the_command_reads_ledgers_of_sweeps(tmp_path, capsys):
  for M in (1, 2):
    (tmp_path / f"sweep{M}").mkdir()
    (tmp_path / f"sweep{M}" / "sweep.jsonl").write_text(json.dumps(point(M, 0.5)) + "\n")
  cli.main(["transferlab", "report", str(tmp_path), "--figure=dtl/sensitivity", f"--out={tmp_path / 'out'}"])
  assert "remark: dtl, vtab/dtd, M = 2: val accuracy 50.0, peak 11.0 MiB" in capsys.readouterr().out
  (tmp_path / "sweep1" / "sweep.jsonl").write_text("{}\n")
  for folder, message in ((tmp_path, "sweep.jsonl line 1 is no row of a sweep"), (tmp_path / "out", "no sweep in ")):
    with pytest.raises(SystemExit):
      cli.main(["transferlab", "report", str(folder), "--figure=dtl/sensitivity", "--out=x"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--paper=head2toe/cost", "--measure"], "--measure is not for --paper=head2toe/cost; it is for dtl/table2"),
    (["--paper=dtl/table2", "--out=x.png"], "--out is not for --paper=dtl/table2; it is for dtl/figure1, dtl/figure3"),
    (["--figure=dtl/sensitivity", "--out=x", "--measure"], "--measure is not for --figure"),
    (["--figure=dtl/sensitivity", "--out=x"], "no runs given")])
def test_the_command_refuses_in_one_line(flags, message, capsys):
  with pytest.raises(SystemExit):
    cli.main(["transferlab", "report", *flags])
  error, = capsys.readouterr().err.splitlines()
  assert message in error
