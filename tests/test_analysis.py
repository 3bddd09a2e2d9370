"""What Head2Toe runs show: features by layer, overlap, transfer, curves and affinity; pictures; and what is refused."""
import csv
import json
import statistics
import sys

import numpy as np
import pytest
from conftest import ROOT
from engine import files, row

from transferlab import analysis, cli, experiment, methods, plots, report
from transferlab.analysis import selected
from transferlab.checkpoint import load_adapter, save_adapter
from transferlab.method import Context, forward
from transferlab.methods.head2toe import layout_of

SITES = ("block_00/out", "block_02/out", "pooled")  # 64, 64 and 16 features at T = 64
OPTIONS = {"sites": SITES, "target_size": 64, "fraction": 0.05}
N, K = 144, 7
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def leave(tiny_weights):
  """leave(folder, task, seed, kept, **options): what a run that kept these features, or the first, leaves on disk."""
  def make(folder, task, seed, kept=None, **changes):
    options = {**OPTIONS, **changes}
    spec = tiny_weights.spec
    total = layout_of(spec, sites=options["sites"], target_size=options["target_size"]).total
    stage = methods.build("head2toe", spec, **options).then({"classifier": {"kernel": np.zeros((total, 3))}}, {})
    kept = range(int(options["fraction"] * total)) if kept is None else kept
    trainable = {"classifier": {"kernel": np.ones((len(kept), 3), np.float32), "bias": np.zeros(3, np.float32)}}
    folder.mkdir(parents=True)
    made = row(task, seed, 0.5, "head2toe", options=json.loads(json.dumps(stage.options)),
               backbone_hash=tiny_weights.hash)
    save_adapter(folder / "adapter.safetensors", stage, trainable, {"kept": np.array(kept, np.int32)},
                 weights=tiny_weights, class_names=CLASSES, notes={"task": task, "recipe": made["recipe"]})
    (folder / "result.json").write_text(json.dumps({**made, "path": None}))
    return folder
  return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory, leave):
  """Two seeds of vtab/svhn and one of vtab/dtd, with known features."""
  root = tmp_path_factory.mktemp("runs")
  leave(root / "svhn0", "vtab/svhn", 0, [0, 1, 2, 63, 64, 127, 128])
  leave(root / "svhn1", "vtab/svhn", 1, [0, 1, 2, 3, 4, 5, 143])
  leave(root / "dtd0", "vtab/dtd", 0, [143, 0, 128, 129, 130, 131, 132])
  return root


def table(path) -> list[list[str]]:
  return list(csv.reader(open(path)))


# --- Features by layer ----------------------------------------------------------------------------------------------

def test_features_are_counted_by_layer(runs, tmp_path):
  written, remarks = analysis.figure("head2toe/layers", report.read(runs), tmp_path)
  assert files(tmp_path) == {path.name for path in written} == {
      "head2toe_layers_counts.csv", "head2toe_layers.csv", "head2toe_layers.png"}
  assert table(tmp_path / "head2toe_layers_counts.csv") == [
      ["task", "seed", "features", "kept", *SITES], ["vtab/dtd", "0", "144", "7", "1", "0", "6"],
      ["vtab/svhn", "0", "144", "7", "4", "2", "1"], ["vtab/svhn", "1", "144", "7", "6", "0", "1"]]
  head, dtd, svhn = table(tmp_path / "head2toe_layers.csv")
  assert head == ["task \\ layer", *SITES]
  assert [float(x) for x in dtd[1:]] == pytest.approx([1 / 7, 0, 6 / 7])
  assert [float(x) for x in svhn[1:]] == pytest.approx([5 / 7, 1 / 7, 1 / 7])
  assert remarks[0] == "vtab/dtd: 7 of 144 features kept; most from pooled 86%, block_00/out 14%, block_02/out 0%"


def test_layers_compare_tasks_of_different_t_but_not_of_different_layers(runs, leave, tmp_path):
  leave(tmp_path / "wide", "vtab/pets", 0, target_size=128)
  found, _ = analysis.figure("head2toe/layers", report.read([runs, tmp_path / "wide"]), tmp_path / "out")
  assert "vtab/pets" in {line[0] for line in table(found[0])}
  leave(tmp_path / "fewer", "vtab/pets", 1, sites=SITES[1:])
  with pytest.raises(ValueError, match="different layouts .sites: .*give runs of one layout"):
    analysis.figure("head2toe/layers", report.read([runs, tmp_path / "fewer"]), tmp_path / "out")


def test_layers_of_different_networks_are_no_picture(runs, tmp_path, monkeypatch):
  mixed = [each._replace(backbone="other") if i else each for i, each in enumerate(selected.read(report.read(runs)))]
  monkeypatch.setattr(selected, "read", lambda rows: mixed)
  with pytest.raises(ValueError, match="other backbones"):
    analysis.figure("head2toe/layers", [], tmp_path)


# --- Overlap --------------------------------------------------------------------------------------------------------

def test_overlap_is_over_the_smaller_set_and_over_the_union(runs, tmp_path):
  _, remarks = analysis.figure("head2toe/overlap", report.read(runs), tmp_path)
  head, dtd, svhn = table(tmp_path / "head2toe_overlap.csv")
  assert head == ["task \\ task", "vtab/dtd", "vtab/svhn"]
  assert dtd[1] == ""  # one seed has nobody to share with
  assert float(dtd[2]) == float(svhn[1]) == pytest.approx((2 / 7 + 2 / 7) / 2)
  assert float(svhn[2]) == pytest.approx(3 / 7)
  jaccard = table(tmp_path / "head2toe_jaccard.csv")
  assert float(jaccard[1][2]) == pytest.approx(2 / 12) and float(jaccard[2][2]) == pytest.approx(3 / 11)
  assert remarks == ["two tasks share 28.6% of the smaller set on average, random sets would 4.9%",
                     "two seeds of one task share 42.9%"]


def test_overlap_of_different_layouts_or_backbones_is_refused(runs, leave, tmp_path):
  leave(tmp_path / "wide", "vtab/pets", 0, target_size=128)
  with pytest.raises(ValueError, match="target_size: 64 -> 128.; the same number is another feature"):
    analysis.figure("head2toe/overlap", report.read([runs, tmp_path / "wide"]), tmp_path)
  other = [each._replace(backbone="other") if i else each for i, each in enumerate(selected.read(report.read(runs)))]
  with pytest.raises(ValueError, match="other backbones"):
    selected._same(other, ["backbone"], "")


# --- Transfer -------------------------------------------------------------------------------------------------------

def test_given_features_are_those_of_the_adapter(runs, tiny_weights):
  options = analysis.given(runs / "svhn0" / "adapter.safetensors")
  assert options == {"kept": (0, 1, 2, 63, 64, 127, 128), "total": N, "source": "vtab/svhn", "sites": SITES,
                     "target_size": 64, "cls": "normal", "normalisation": "unit", "compat": None}
  method = methods.build("head2toe_given", tiny_weights.spec, **options)
  trainable, state = method.init(np.zeros(2, np.uint32), {}, 5)
  assert state["kept"].tolist() == list(options["kept"]) and trainable["classifier"]["kernel"].shape == (7, 5)


def test_the_config_takes_over_the_features_of_an_adapter(runs):
  path = runs / "svhn0" / "adapter.safetensors"
  text = f"{ROOT}/configs/head2toe.py:task=pets,given={path}"
  asked, options, recipe = experiment.parse(experiment.load(text))
  assert asked.method == "head2toe_given" and options == analysis.given(path)
  assert recipe == experiment.parse(experiment.load(f"{ROOT}/configs/head2toe.py:task=pets"))[2]
  assert set(experiment.load_grid(text)) == {"optim.lr", "duration"}
  with pytest.raises(ValueError, match="given is for method=head2toe, not full"):
    experiment.load(f"{text},method=full")


def test_a_head_on_given_features_is_head2toes_own(tiny_weights, runs):
  """Same features, same parameters, same logits as of the run that selected them."""
  own = load_adapter(runs / "svhn0" / "adapter.safetensors")
  spec = tiny_weights.spec
  given = methods.build("head2toe_given", spec, **analysis.given(runs / "svhn0" / "adapter.safetensors"))
  rng = np.random.default_rng(0)
  carry = {name: rng.normal(size=(2, size)).astype(np.float32) for name, size in zip(*layout_of(
      spec, sites=SITES, target_size=64))}
  head = {"classifier": {"kernel": rng.normal(size=(K, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}}
  each = [forward(method, None, head, carry, Context(state=own.state)).logits for method in (own.method, given)]
  np.testing.assert_array_equal(*each)
  everything = methods.build("head2toe_given", spec, sites=SITES, target_size=64)
  assert everything.init(np.zeros(2, np.uint32), {}, 3)[0]["classifier"]["kernel"].shape == (N, 3)


def test_a_head_has_as_many_features_as_are_given(tiny_spec):
  kept = tuple(range(61))  # of 112; as a share, int(61 / 112 * 112), they would be 60
  method = methods.build("head2toe_given", tiny_spec, kept=kept, target_size=48,
                         sites=("block_00/out", "block_01/out", "pooled"))
  assert method.init(np.zeros(2, np.uint32), {}, 3)[0]["classifier"]["kernel"].shape == (61, 3)


@pytest.mark.parametrize("kept, found", [((0, 0), "a number twice"), ((144,), "144"), ((-1,), "-1"), ((1.5,), "1.5"),
                                         ((True,), "True")])
def test_given_features_that_cannot_be_are_refused(tiny_spec, kept, found):
  with pytest.raises(ValueError, match=f"kept holds {found}; expected different whole numbers from 0 to 143"):
    methods.build("head2toe_given", tiny_spec, kept=kept, sites=SITES, target_size=64)


@pytest.mark.parametrize("changes", [{"target_size": 128}, {"sites": SITES[:2]}, {"sites": "paper"}])
def test_indices_of_another_layout_are_refused(tiny_weights, runs, changes):
  """They would be in range, and be other features."""
  options = analysis.given(runs / "svhn0" / "adapter.safetensors")
  with pytest.raises(ValueError, match="kept counts among 144 features and .* has .* with these options; expected"):
    methods.build("head2toe_given", tiny_weights.spec, **{**options, "kept": (0, 1), **changes})


def given_row(target, source, accuracy, seed=0, kept=(1, 2)) -> dict:
  return row(target, seed, accuracy, "head2toe_given", options={**OPTIONS, "kept": list(kept), "source": source})


def test_transfer_has_sources_in_rows_and_own_features_on_the_diagonal(tmp_path):
  rows = [row("vtab/dtd", 0, 0.6, "head2toe", options=OPTIONS), row("vtab/svhn", 0, 0.8, "head2toe", options=OPTIONS),
          given_row("vtab/dtd", "vtab/svhn", 0.5), given_row("vtab/dtd", "vtab/svhn", 0.4, 1, kept=(3, 4)),
          given_row("vtab/svhn", "vtab/dtd", 0.7), row("vtab/dtd", 0, 0.1, "linear")]
  _, remarks = analysis.figure("head2toe/transfer", rows, tmp_path)
  assert table(tmp_path / "head2toe_transfer.csv") == [
      ["features of \\ trained on", "vtab/dtd", "vtab/svhn"], ["vtab/dtd", "60.0", "70.0"],
      ["vtab/svhn", "45.0", "80.0"]]
  assert remarks == ["features of vtab/dtd: -10.0 points against the task's own, mean of 1 task",
                     "features of vtab/svhn: -15.0 points against the task's own, mean of 1 task"]


def test_transfer_refuses_what_it_cannot_place(tmp_path):
  with pytest.raises(ValueError, match="0 of 1 runs are of head2toe_given"):
    analysis.figure("head2toe/transfer", [row()], tmp_path)
  with pytest.raises(ValueError, match="seed 0 is there twice"):
    analysis.figure("head2toe/transfer", [given_row("vtab/dtd", "vtab/svhn", 0.5)] * 2, tmp_path)
  own, else_ = (row(task, 0, 0.6, "head2toe", options=OPTIONS) for task in ("vtab/dtd", "vtab/svhn"))
  for other, message in (({**else_, "backbone_hash": "b1"}, "the runs differ in backbone_hash"),
                         ({**own, "protocol": "folds"}, "the runs on vtab/dtd differ in protocol")):
    with pytest.raises(report.Unlike, match=message):
      analysis.figure("head2toe/transfer", [given_row("vtab/dtd", "vtab/svhn", 0.5), other], tmp_path)


# --- What the features are read from --------------------------------------------------------------------------------

def test_runs_without_features_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no run selects features among 1 .methods: dtl.; expected runs of head2toe or"):
    analysis.figure("head2toe/layers", [row()], tmp_path)


def test_the_same_task_and_seed_twice_is_refused(runs, leave, tmp_path):
  leave(tmp_path / "again", "vtab/dtd", 0, [0, 1, 2, 3, 4, 5, 6])
  with pytest.raises(ValueError, match="vtab/dtd, seed 0 is there twice, in .*dtd0 and .*again"):
    analysis.figure("head2toe/overlap", report.read([runs, tmp_path]), tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5, 144], [0, 1, 2, 3, 4, 5, -1], [0, 1, 2, 3, 4, 5, 5]])
def test_features_that_no_run_keeps_are_refused(leave, tmp_path, kept):
  leave(tmp_path / "run", "vtab/dtd", 0, kept)
  with pytest.raises(ValueError, match="keeps features that cannot be: expected different numbers from 0 to 143"):
    selected.read(report.read(tmp_path))


def test_adapters_that_are_cut_missing_or_of_others_are_refused(runs, leave, tmp_path):
  leave(tmp_path / "run", "vtab/dtd", 0)
  adapter = tmp_path / "run" / "adapter.safetensors"
  whole = adapter.read_bytes()
  adapter.write_bytes((runs / "svhn1" / "adapter.safetensors").read_bytes())
  with pytest.raises(ValueError, match="the adapter is of task 'vtab/svhn', seed 1, and the result of 'vtab/dtd'"):
    selected.read(report.read(tmp_path))
  adapter.write_bytes(whole[:-10])
  with pytest.raises(ValueError, match="not a readable safetensors file"):
    selected.read(report.read(tmp_path))
  adapter.unlink()
  with pytest.raises(ValueError, match="no such file"):
    selected.read(report.read(tmp_path))


def test_adapters_of_other_methods_give_no_features(tiny_weights, tmp_path):
  method = methods.build("linear", tiny_weights.spec)
  trainable = {"classifier": {"kernel": np.ones((16, 3), np.float32), "bias": np.zeros(3, np.float32)}}
  save_adapter(tmp_path / "a.safetensors", method, trainable, {}, weights=tiny_weights, class_names=CLASSES)
  with pytest.raises(ValueError, match="is an adapter of linear; expected one that has selected features"):
    analysis.given(tmp_path / "a.safetensors")


# --- Curves ---------------------------------------------------------------------------------------------------------

def at(T, accuracy, task="vtab/dtd", seed=0, method="head2toe", sites=SITES, **changes) -> dict:
  options = {"sites": list(sites), "target_size": T, "coefficient": 1e-4, **changes}
  return row(task, seed, accuracy, method, options=options, path=f"{task}/{T}/{len(sites)}/{seed}")


def test_accuracy_against_t_has_a_line_per_task_and_their_mean(tmp_path):
  rows = [at(512, 0.4), at(512, 0.6, seed=1), at(8192, 0.8), at(512, 0.7, "vtab/svhn"), at(8192, 0.6, "vtab/svhn"),
          row("vtab/dtd", 0, 0.1, "linear"), at(64, 0.1, method="all_features", sites=["pooled"])]
  found, remarks = analysis.figure("head2toe/target_size", rows, tmp_path)
  assert [path.name for path in found] == ["head2toe_target_size.csv", "head2toe_target_size.png"]
  head, *lines = table(found[0])
  assert head == ["series", "label", "target size T", "test accuracy, per cent", "spread"]
  mean = "Head2Toe, mean of 2 tasks"
  assert [(name, float(x), pytest.approx(float(y))) for name, _, x, y, _ in lines] == [
      ("vtab/dtd", 512, 50), ("vtab/dtd", 8192, 80), ("vtab/svhn", 512, 70), ("vtab/svhn", 8192, 60),
      (mean, 512, 60), (mean, 8192, 70)]
  assert float(lines[0][4]) == pytest.approx(100 * statistics.stdev([0.4, 0.6]))
  assert remarks == ["Head2Toe, mean of 2 tasks: 60.0 at 512, 70.0 at 8192"]


def test_accuracy_against_the_number_of_layers(tmp_path, leave, tiny_spec):
  leave(tmp_path / "run", "vtab/dtd", 0, sites="paper", fraction=0.02)
  whole, = report.read(tmp_path)
  two = {**whole, "options": {**whole["options"], "sites": ["block_00/out", "pooled"]}, "path": "elsewhere"}
  one = {**whole, "options": {**whole["options"], "sites": "pooled"}, "path": "nowhere"}
  found, _ = analysis.figure("head2toe/taps", [whole, one, two], tmp_path / "out")
  _, *lines = table(found[0])
  assert [int(x) for _, _, x, _, _ in lines] == [1, 2, 3 + 4 * tiny_spec.depth + 2]


def test_curves_of_several_methods_are_means(tmp_path):
  rows = [at(T, 0.5, task, method=method, **({"penalty": "l1"} if method == "all_features" else {}))
          for T in (512, 8192) for task in ("vtab/dtd", "vtab/svhn") for method in ("head2toe", "all_features")]
  found, _ = analysis.figure("head2toe/target_size", rows, tmp_path)
  assert {line[0] for line in table(found[0])[1:]} == {"Head2Toe, mean of 2 tasks", "+All-l1, mean of 2 tasks"}


def test_a_mean_over_tasks_is_of_the_same_places_only(tmp_path):
  rows = [at(512, 0.4), at(8192, 0.8), at(512, 0.7, "vtab/svhn")]
  found, remarks = analysis.figure("head2toe/target_size", rows, tmp_path)
  assert {line[0] for line in table(found[0])[1:]} == {"vtab/dtd", "vtab/svhn"}
  assert remarks == [
      "Head2Toe, mean of 2 tasks: left out, the tasks have runs at different target size T"]


def test_a_mean_over_tasks_is_of_alike_ones_only(tmp_path):
  rows = [at(T, 0.5, task) for T in (512, 8192) for task in ("vtab/dtd", "vtab/svhn")]
  rows = [{**each, "backbone_hash": "b1"} if each["task"] == "vtab/svhn" else each for each in rows]
  found, remarks = analysis.figure("head2toe/target_size", rows, tmp_path)
  assert {line[0] for line in table(found[0])[1:]} == {"vtab/dtd", "vtab/svhn"}
  assert "mean of 2 tasks: left out, the tasks of Head2Toe differ in backbone_hash" in remarks[0]
  remarks = analysis.figure("head2toe/target_size", rows, tmp_path, ["backbone_hash"])[1]
  assert remarks == ["Head2Toe, mean of 2 tasks: 50.0 at 512, 50.0 at 8192"]


def test_runs_that_differ_in_more_than_the_curve_shows_are_refused(tmp_path):
  with pytest.raises(ValueError, match="give 1 values of target size T; expected runs that differ in it"):
    analysis.figure("head2toe/target_size", [at(512, 0.5)], tmp_path)
  with pytest.raises(ValueError, match="Head2Toe on vtab/dtd differ in options.coefficient"):
    analysis.figure("head2toe/target_size", [at(512, 0.5), at(8192, 0.5, coefficient=1e-5)], tmp_path)
  analysis.figure("head2toe/target_size", [at(512, 0.5), at(8192, 0.5, coefficient=1e-5)], tmp_path,
                  ["options.coefficient"])
  other = [at(512, 0.5), {**at(8192, 0.5), "backbone_hash": "b1"}]
  with pytest.raises(ValueError, match="differ in backbone_hash"):
    analysis.figure("head2toe/target_size", other, tmp_path)
  with pytest.raises(ValueError, match="seed 0 is there twice"):
    analysis.figure("head2toe/target_size", [at(512, 0.5), at(512, 0.6), at(8192, 0.5)], tmp_path)


def test_figures_of_accuracies_want_test_scores(tmp_path):
  tuned = {**at(512, 0.5), "test": None, "path": "tuned"}
  for name in ("head2toe/target_size", "head2toe/taps"):
    with pytest.raises(ValueError, match="tuned has no test score.*give final runs"):
      analysis.figure(name, [tuned, at(8192, 0.5, sites=SITES[1:])], tmp_path)
  for name in ("head2toe/transfer", "head2toe/affinity"):
    with pytest.raises(ValueError, match="tuned has no test score"):
      analysis.figure(name, [tuned, given_row("vtab/dtd", "vtab/svhn", 0.5)], tmp_path)


# --- Affinity -------------------------------------------------------------------------------------------------------

def test_affinity_of_the_slides(tmp_path, shared):
  found, remarks = analysis.figure("head2toe/affinity", [], tmp_path)
  source = json.loads((shared / "papers" / "head2toe.json").read_text())
  lines = [line for line in table(found[0]) if line[0] == "slides, ResNet-50"]
  assert {name: round(float(x), 1) for _, name, x, _, _ in lines} == source["domain_affinity"]["resnet50"]
  svhn, = (float(y) for _, name, _, y, _ in lines if name == "SVHN")
  assert svhn == pytest.approx(84.1 - 47.5)
  assert remarks == ["slides, ResNet-50: 19 tasks, mean gain +8.8 points, Pearson correlation -0.75",
                     "slides, ViT-B/16: 19 tasks, mean gain +10.4 points, Pearson correlation -0.29"]


def test_affinity_of_ours_is_of_the_tasks_that_have_all_three(tmp_path):
  scores = {"linear": (0.5, 0.4), "scratch": (0.1, 0.6), "head2toe": (0.6, 0.9)}
  rows = [row(task, 0, value, method) for method, values in scores.items()
          for task, value in zip(("vtab/dtd", "vtab/svhn"), values)] + [row("vtab/pets", 0, 0.5, "linear")]
  found, remarks = analysis.figure("head2toe/affinity", rows, tmp_path)
  assert [[name, round(float(x), 6), round(float(y), 6)] for series, name, x, y, _ in table(found[0])
          if series == "ours"] == [["DTD", 40, 10], ["SVHN", -20, 50]]
  assert remarks[-1] == "ours: 2 tasks, mean gain +30.0 points, too few to correlate"
  with pytest.raises(ValueError, match="no run of Scratch among 4"):
    analysis.figure("head2toe/affinity", [each for each in rows if each["method"] != "scratch"][:4], tmp_path)
  with pytest.raises(ValueError, match="the methods on vtab/dtd differ in image_size"):
    analysis.figure("head2toe/affinity", [{**rows[0], "image_size": 8}, *rows[1:]], tmp_path)
  with pytest.raises(ValueError, match="no task has runs of all of Head2Toe, Linear, Scratch"):
    analysis.figure("head2toe/affinity", [rows[0], rows[3], rows[4]], tmp_path)


# --- Pictures -------------------------------------------------------------------------------------------------------

def test_numbers_are_written_where_matplotlib_is_missing(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  assert plots.heat_map(tmp_path / "a" / "map", [[1, np.nan]], ["r"], ["x", "y"]) == [tmp_path / "a" / "map.csv"]
  assert plots.points(tmp_path / "p", {"s": [plots.Point(1, 2)]}) == [tmp_path / "p.csv"]
  assert capsys.readouterr().err.count("no picture: it needs matplotlib") == 2
  assert table(tmp_path / "a" / "map.csv") == [["", "x", "y"], ["r", "1.0", ""]]
  assert files(tmp_path) == {"a", "a/map.csv", "p.csv"}


def test_pictures_take_any_names_and_missing_values(tmp_path):
  names = ["$x_1$ <b>", "a" * 60]
  plots.heat_map(tmp_path / "m", [[1, np.nan], [3, 4]], names, names, title=names[0], digits=1)
  plots.heat_map(tmp_path / "none", np.full((2, 2), np.nan), names, names, digits=1)
  plots.points(tmp_path / "p", {names[0]: [plots.Point(1, 2, label=names[0])], "none": []}, log=True, lines=True)
  assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("m", "none", "p"))


def test_pictures_of_nothing_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"values are \[1, 2\]; expected \[1, 1\]"):
    plots.heat_map(tmp_path / "m", [[1, 2]], ["r"], ["x"])
  with pytest.raises(ValueError, match="no point"):
    plots.points(tmp_path / "p", {"s": []})
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="cannot write to .*file"):
    plots.table(tmp_path / "file" / "t.csv", [], [])
  assert files(tmp_path) == {"file"}


def test_the_command_writes_and_names_the_files(runs, tmp_path, capsys):
  cli.main(["transferlab", "report", str(runs), "--figure=head2toe/layers", f"--out={tmp_path}"])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("remark: vtab/dtd: 7 of 144") and lines[-1] == str(tmp_path / "head2toe_layers.png")
  cli.main(["transferlab", "report", str(runs), "--figure=head2toe/layers", f"--out={tmp_path}", "--json"])
  assert json.loads(capsys.readouterr().out)["files"] == lines[2:]
