"""Tables of papers: Head2Toe's costs recomputed, its accuracies beside ours, and what is refused."""
import json

import pytest
from engine import row

from transferlab import cli, data, papers
from transferlab.papers import head2toe
from transferlab.papers.table import numbers
from transferlab.report import Score

VTAB = data.SUITES["vtab1k"]
KNOWN = numbers("head2toe")


@pytest.fixture(scope="module")
def costs():
  return head2toe.costs()


def cells(table, whose) -> dict[str, dict]:
  """{task: {method: cell}} of the rows of "paper" or "ours"."""
  return {cells[0]: dict(zip(table.header[2:], cells[2:])) for cells in table.rows if cells[1] == whose}


# --- Costs ----------------------------------------------------------------------------------------------------------

def test_flops_and_parameters_of_resnet50_are_the_tables():
  assert head2toe.forward_flops() == 8_198_243_776
  assert head2toe.parameters() == 23_481_472


def test_every_undamaged_cost_agrees_to_the_printed_digits(costs):
  agreeing = dict.fromkeys(head2toe.RATIOS, 0)
  for task, (printed, found) in costs.items():
    for name in head2toe.RATIOS:
      same = f"{getattr(found, name):.6f}" == f"{printed[name]:.6f}"
      assert same == (name not in printed.get("damaged", ())), (task, name)
      agreeing[name] += same
  assert agreeing == {"flops_vs_ft": 17, "size_vs_ft": 12, "size_vs_linear": 7}


def test_average_costs_agree_to_the_printed_digits(costs):
  for name, printed in KNOWN["cost"]["average"].items():
    mean = sum(getattr(found, name) for _, found in costs.values()) / 19
    assert f"{mean:.6f}" == f"{printed:.6f}", name


def test_costs_use_our_own_count_of_features_and_vtabs_classes(costs):
  layouts = {T: head2toe.layout_of(head2toe.resnet50(classes=1000), target_size=T).total for T in (512, 8192, 24576)}
  assert len(costs) == 19
  for task, (printed, _) in costs.items():
    assert printed["features"] == layouts[printed["target_size"]]
    assert printed["classes"] == data.ENTRIES[KNOWN["tasks"][task]].num_classes


def test_cost_by_hand():
  found = head2toe.cost(64, 2, 0.5, 10, width=4, flops=1000, size=100)
  assert found.size_vs_linear == pytest.approx((32 * 2 + 2) / 8)
  assert found.size_vs_ft == pytest.approx(66 / 108)
  assert found.flops_vs_ft == pytest.approx((1000 * 1000 + 1.18 * 1280 * 4 * 128) / (3 * 1280 * 1016))


def test_cost_table_marks_what_the_slides_text_damaged(monkeypatch, costs):
  monkeypatch.setattr(head2toe, "costs", lambda: costs)
  table, = papers.tables("head2toe/cost")
  shown = {row["task"]: row for row in table.plain()["rows"]}
  assert shown["Camelyon"]["slide's text is damaged"] == "size/FT, size/linear"
  assert shown["Camelyon"]["size/FT"] == 0 and f"{shown['Camelyon']['size/FT recomputed']:.6f}" == "0.000092"
  assert "slide's text is damaged" not in shown["Caltech101"]
  assert sum("slide's text is damaged" in each for each in shown.values()) == 12
  assert table.plain()["averages"][0]["size/linear"] == 5.674742


# --- Accuracies -----------------------------------------------------------------------------------------------------

def test_numbers_are_those_of_the_collected_tables(shared):
  source = json.loads((shared / "papers" / "head2toe.json").read_text())
  assert list(KNOWN["tasks"]) == source["task_order"] and tuple(KNOWN["tasks"].values()) == VTAB
  for backbone in ("resnet50", "vit_b16"):
    methods = source[f"vtab1k_{backbone}"]
    assert list(KNOWN["accuracy"][backbone]) == list(methods)
    for method, values in KNOWN["accuracy"][backbone].items():
      assert dict(zip(KNOWN["tasks"], values)) == methods[method]["accuracy"]


@pytest.mark.parametrize("backbone, methods", [("resnet50", 7), ("vit_b16", 9)])
def test_tables_without_runs_are_the_slides(backbone, methods):
  table, = papers.tables(f"head2toe/{backbone}")
  assert len(table.rows) == 19 and len(table.header) == 2 + methods
  assert not cells(table, "ours")
  plain, groups, *each = table.averages
  assert plain[:2] == ["mean of 19 tasks", "paper"] and groups[0] == "mean of 3 group means"
  assert [label for label, *_ in each] == ["natural", "specialized", "structured"]
  for method, mean in zip(table.header[2:], plain[2:]):
    assert f"{mean:.1f}" == f"{KNOWN['mean'][backbone][method]:.1f}", method


def test_group_means_are_those_of_the_collected_tables(shared):
  source = json.loads((shared / "papers" / "head2toe.json").read_text())
  for backbone in ("resnet50", "vit_b16"):
    table, = papers.tables(f"head2toe/{backbone}")
    means = {label: dict(zip(table.header[2:], values)) for label, _, *values in table.averages}
    for method, found in source[f"vtab1k_{backbone}"].items():
      for group, value in found["group_means_recomputed"].items():
        assert means[group.lower()][method] == pytest.approx(value, abs=1e-3)


def ours() -> list[dict]:
  options = {"sites": "paper", "target_size": 512, "fraction": 0.01}
  return [row("vtab/dtd", 0, 0.5, "head2toe", options=options), row("vtab/dtd", 1, 0.7, "head2toe", options=options),
          row("vtab/svhn", 0, 0.25, "linear", options={"site": "pooled"})]


def test_ours_stand_beside_the_slides_and_change_none_of_their_numbers():
  alone, = papers.tables("head2toe/vit_b16")
  table, = papers.tables("head2toe/vit_b16", ours())
  assert cells(table, "paper") == cells(alone, "paper")
  assert [each for each in table.averages if each[1] == "paper"] == alone.averages
  mine = cells(table, "ours")
  assert set(mine) == {"DTD", "SVHN"}
  assert mine["DTD"]["Head2Toe"] == Score(pytest.approx(60), pytest.approx(14.142, abs=1e-3), 2)
  assert mine["SVHN"]["Linear"] == Score(pytest.approx(25), None, 1)
  assert [method for method, cell in mine["SVHN"].items() if cell] == ["Linear"]


def test_averages_of_ours_are_only_of_what_was_run():
  table, = papers.tables("head2toe/vit_b16", ours())
  mine = {label: dict(zip(table.header[2:], values)) for label, whose, *values in table.averages if whose == "ours"}
  assert mine["mean of 1 of 19 tasks"] == {**dict.fromkeys(table.header[2:]), "Head2Toe": pytest.approx(60),
                                           "Linear": pytest.approx(25)}
  assert "mean of 19 tasks" not in mine
  whole = [row(task, 0, 0.5, "head2toe", options={}) for task in VTAB]
  table, = papers.tables("head2toe/vit_b16", whole)
  assert ["mean of 19 tasks", "ours"] in [each[:2] for each in table.averages]


def test_remarks_say_what_ours_are():
  table, = papers.tables("head2toe/vit_b16", [*ours(), row(method="dtl"), row("flowers")])
  text = "\n".join(table.remarks)
  assert "ours, Head2Toe: backbone vit; image_size 224; options.target_size 512; options.fraction 0.01" in text
  assert "2 runs of other methods or tasks are left out" in text
  mixed = [row("vtab/dtd", 0, 0.5, "linear", options={}), row("vtab/svhn", 0, 0.5, "all_features", options={
      "sites": "pooled", "penalty": "none"})]
  table, = papers.tables("head2toe/vit_b16", mixed)
  assert any("ours, Linear: " in each and "registered linear, all_features" in each for each in table.remarks)
  assert "Head2Toe lacks vtab/cifar100" in text


def test_unlike_runs_are_shown_and_not_averaged():
  rows = [*ours(), row("vtab/pets", 0, 0.5, "head2toe", image_size=384,
                       options={"sites": "paper", "target_size": 512, "fraction": 0.01})]
  table, = papers.tables("head2toe/vit_b16", rows)
  assert cells(table, "ours")["Pets"]["Head2Toe"].mean == 50
  assert not [each for each in table.averages if each[1] == "ours"]
  assert any("ours are not averaged: the tasks of Head2Toe differ in image_size" in each for each in table.remarks)
  table, = papers.tables("head2toe/vit_b16", rows, allow=["image_size"])
  assert [each for each in table.averages if each[1] == "ours"]
  with pytest.raises(ValueError, match="Head2Toe on vtab/dtd differ in options.*target_size: 512 -> 8192"):
    papers.tables("head2toe/vit_b16", [ours()[0], {**ours()[1], "options": {"target_size": 8192}}])


@pytest.mark.parametrize("method, options, name", [
    ("linear", {"site": "pooled"}, "Linear"), ("linear", {"site": "block_05/out"}, None),
    ("all_features", {"sites": "pooled", "penalty": "l21"}, None),
    ("all_features", {"sites": "pooled", "penalty": "none"}, "Linear"),
    ("all_features", {"sites": ["pooled"], "penalty": "none"}, "Linear"),
    ("all_features", {"sites": "paper", "penalty": "l2"}, "+All-l2"),
    ("all_features", {"sites": "paper", "penalty": "l1"}, "+All-l1"),
    ("all_features", {"sites": "paper", "penalty": "l21"}, "+All-l2,1"),
    ("all_features", {"sites": "paper", "penalty": "none"}, "+All"), ("head2toe", {"sites": "paper"}, "Head2Toe"),
    ("head2toe_ft", {"sites": "paper"}, "Head2Toe-FT"), ("head2toe_ft", {"sites": "pooled"}, "Fine-tuning"),
    ("full", {}, "Fine-tuning"), ("scratch", {}, "Scratch"), ("head2toe_layers", {}, "whole layers"), ("dtl", {}, None),
    ("head2toe_given", {"sites": "paper"}, None)])
def test_runs_are_called_as_the_slides_call_them(method, options, name):
  assert head2toe.called({"method": method, "options": options, "path": "final/seed_0"}) == name


def test_a_method_that_a_sweep_chose_is_head2toe_ft_plus(tmp_path):
  (tmp_path / "final" / "seed_0").mkdir(parents=True)
  ours = {"method": "head2toe_ft", "options": {"sites": "paper"}, "path": str(tmp_path / "final" / "seed_0")}
  ledger = lambda *names: "".join(json.dumps({"method": name, "point_hash": name}) + "\n" for name in names)
  for text, name in ((ledger("head2toe_ft"), "Head2Toe-FT"), ("[]", "Head2Toe-FT"), ("{", "Head2Toe-FT"), (
      ledger("head2toe", "head2toe_ft", "linear"), "Head2Toe-FT"), (ledger("head2toe", "head2toe_ft"), "Head2Toe-FT+")):
    (tmp_path / "sweep.jsonl").write_text(text)
    assert head2toe.called(ours) == name
  assert head2toe.called({**ours, "method": "head2toe"}) == "Head2Toe-FT+"
  assert head2toe.called({**ours, "path": str(tmp_path / "other" / "seed_0")}) == "Head2Toe-FT"


def test_what_does_not_belong_is_refused():
  with pytest.raises(ValueError, match="none of 1 runs belongs into this table .methods dtl; "):
    papers.tables("head2toe/vit_b16", [row()])
  with pytest.raises(ValueError, match="'head2toe/vitb16' is unknown; nearest: head2toe/vit_b16; all: head2toe/cost, "):
    papers.tables("head2toe/vitb16")


# --- The command ----------------------------------------------------------------------------------------------------

def test_the_command_prints_tables_with_and_without_runs(tmp_path, capsys):
  for i, each in enumerate(ours()):
    (tmp_path / str(i)).mkdir()
    (tmp_path / str(i) / "result.json").write_text(json.dumps(each))
  cli.main(["transferlab", "report", str(tmp_path), "--paper=head2toe/vit_b16"])
  lines = capsys.readouterr().out.splitlines()
  dtd = [line.split() for line in lines if line.split()[:1] == ["DTD"]]
  assert dtd[0] == ["DTD", "paper", "53.6", "64.3", "64.9", "64.9", "64.5", "13.1", "54.1", "53.5", "63.8"]
  assert dtd[1] == ["DTD", "ours", "60.0±14.1"]
  cli.main(["transferlab", "report", "--paper=head2toe/resnet50", "--json"])
  table, = json.loads(capsys.readouterr().out)
  assert len(table["rows"]) == 19 and table["rows"][0]["Head2Toe"] == 47.1
  cli.main(["transferlab", "report", str(tmp_path), "--paper=head2toe/vit_b16", "--json"])
  table, = json.loads(capsys.readouterr().out)
  assert {"mean": 25.0, "std": None, "seeds": 1} in [each.get("Linear") for each in table["rows"]]


@pytest.mark.parametrize("flags, message", [
    (["--paper=head2toe"], "paper 'head2toe' is unknown"),
    (["--paper=head2toe/cost", "--suite=vtab1k"], "--suite is not for --paper"),
    (["--paper=head2toe/cost", "--figure=head2toe/layers"], "--figure is not for --paper"),
    (["--figure=head2toe/layers", "--split=val", "--out=x"], "--split is not for --figure"),
    (["--figure=head2toe/layers"], "--out is missing"),
    (["--figure=head2toe/layer", "--out=x"], "figure 'head2toe/layer' is unknown; nearest: head2toe/layers"),
    (["--figure=head2toe/layers", "--out=x"], "no runs given")])
def test_the_command_refuses_in_one_line(flags, message, capsys):
  with pytest.raises(SystemExit):
    cli.main(["transferlab", "report", *flags])
  error, = capsys.readouterr().err.splitlines()
  assert message in error
