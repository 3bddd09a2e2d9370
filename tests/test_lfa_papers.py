"""Tables of LFA: its poster's numbers, ours beside them, trials of domain generalisation, and what methods cost."""
import json
import statistics

import jax
import pytest
from engine import row

from transferlab import cli, cost, data, papers, report
from transferlab.papers import lfa, lfa_costs
from transferlab.papers.table import numbers
from transferlab.report import Score

KNOWN = numbers("lfa")
FEW = "CoOp few-shot, final: train=train val=val test=test, shots 16; last, test once"
DG = "DomainBed, final: train=train val=val test=test; best on val, mean over domains, test once"


def few(task, accuracy, method="lfa", seed=1, shots=16, **changes):
  options = {"init": "random", "dropout": 0.2, "beta": 0.9, "base": "none"} if method == "lfa" else {}
  return row(task, seed, accuracy, method, **{"options": options, "draw": f"seed {seed}",
                                              "protocol": FEW.replace("16", str(shots)), **changes})


def dg(domain, trial, accuracy, method="lfa", suite="pacs", lr=1e-3, **changes):
  options = {"init": "clip", "dropout": 0.0, "beta": 0.9, "base": "none"} if method == "lfa" else {}
  made = row(f"{suite}/{domain}", trial, accuracy, method, options=options, draw=f"trial {trial}", protocol=DG,
             split_hash=f"{domain} {trial}")
  made["recipe"] = {**made["recipe"], "optim": {"lr": lr}}
  return {**made, **changes}


def cells(table, whose) -> dict[str, dict]:
  return {cells[0]: dict(zip(table.header[2:], cells[2:])) for cells in table.rows if cells[1] == whose}


# --- The poster's numbers -------------------------------------------------------------------------------------------

def test_numbers_are_those_collected(shared):
  source = json.loads((shared / "papers" / "lfa.json").read_text())
  for each in source["few_shot"]:
    assert dict(zip(KNOWN["tasks"], KNOWN["fewshot"][each["method"]])) == each["accuracy"]
  for each in source["domain_generalization"]:
    assert dict(zip(KNOWN["suites"], KNOWN["dg"][each["model"]])) == each["accuracy"]
    errors = KNOWN["plus_minus"].get(each["model"])
    assert (errors and dict(zip(KNOWN["suites"], errors))) == each["plus_minus"]
    assert (each["model"] in KNOWN["copied"]) == each["copied_from_literature"]
  costs = source["efficiency"]
  for i, name in enumerate(costs["columns"]):
    mine = KNOWN["efficiency"][name]
    assert (mine["average"], mine["parameters"], mine["code"]) == (
        costs["accuracy_average"][i], costs["learnable_params_thousand_from_repo_image"][name],
        costs["learnable_params_exact_from_code"][name])
    for what, field in (("memory", "peak_memory_mb_batch32"), ("training", "training_time_300_steps_seconds"),
                        ("inference", "inference_time_seconds")):
      assert dict(zip(KNOWN["classes"], mine[what])) == {each: values[i] for each, values in costs[field].items()}


def test_printed_averages_are_those_of_the_poster(shared):
  source = json.loads((shared / "papers" / "lfa.json").read_text())
  table, = papers.tables("lfa/fewshot")
  (name, whose, *averages), = table.averages
  assert (name, whose) == ("mean of 11 tasks", "paper")
  assert averages == [pytest.approx(each["average"], abs=0.006) for each in source["few_shot"]]
  table, = papers.tables("lfa/dg")
  assert [each[-1] for each in table.rows] == [
      pytest.approx(each["average"], abs=0.051) for each in source["domain_generalization"]]


# --- Few shots ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("run, name", [
    (few("coop/dtd", 0.5), "CLIP + LFA"), (few("coop/dtd", 0.5, shots=4), None),
    (few("coop/dtd", 0.5, options={"base": "maple"}), "MaPLe + LFA"),
    (few("coop/dtd", 0.5, options={"base": "none", "init": "clip", "rank": 2}), "CLIP + LFA, rank 2, init clip"),
    (few("coop/dtd", 0.5, "zero_shot", shots=1), "Zero-Shot CLIP"), (few("coop/dtd", 0.5, "dtl"), None),
    (few("coop/dtd", 0.5, "clip_linear", options={"form": "fewshot"}), "LinearProbing CLIP"),
    (few("coop/dtd", 0.5, "clip_linear", options={"form": "dg"}), None),
    (few("coop/dtd", 0.5, "coop", options={"tokens": 16, "class_specific": True}), "CoOp, class_specific True")])
def test_runs_are_called_as_the_poster_calls_them(run, name):
  assert lfa.called(run) == name


def test_few_shots_of_ours_stand_beside_the_posters():
  of_set = lambda duration, batch: {**row()["recipe"], "duration": duration, "batch_size": batch, "seed": 1}
  rows = [few("coop/dtd", 0.5, seed=1), few("coop/dtd", 0.7, seed=2), few("coop/dtd", 0.1, "dtl"),
          few("coop/eurosat", 0.8, recipe=of_set("200 epochs", 32)),
          few("coop/imagenet", 0.6, recipe=of_set("40 epochs", 256))]
  table, = papers.tables("lfa/fewshot", rows)
  mine = cells(table, "ours")
  assert mine["DTD"]["CLIP + LFA"] == Score(pytest.approx(60), pytest.approx(14.142, abs=1e-3), 2)
  assert cells(table, "paper")["DTD"]["CoOp"] == 69.6 and set(mine) == {"DTD", "EuroSAT", "ImageNet"}
  assert [["mean of 3 of 11 tasks", "ours"], pytest.approx((60 + 80 + 60) / 3)] == [
      table.averages[1][:2], table.averages[1][4]]
  assert "1 runs of other methods or tasks are left out" in table.remarks
  with pytest.raises(report.Unlike, match="CLIP . LFA on coop/dtd differ in recipe.duration"):
    papers.tables("lfa/fewshot", [rows[0], few("coop/dtd", 0.7, seed=2, recipe={**of_set("9 epochs", 32), "seed": 2})])


# --- Domain generalisation ------------------------------------------------------------------------------------------

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")


def test_trials_are_averaged_over_domains_first():
  """The error is that of trials, as DomainBed computes it; a trial that lacks a domain is left out."""
  values = {0: (0.2, 0.4, 0.6, 0.8), 1: (0.3, 0.5, 0.7, 0.9), 2: (0.3, 0.3, 0.3, 0.3)}
  rows = [dg(domain, trial, value, lr=10.0**-(3 + trial)) for trial, each in values.items()
          for domain, value in zip(DOMAINS, each)]
  means = [100 * statistics.fmean(each) for each in values.values()]
  wanted = Score(pytest.approx(statistics.fmean(means)), pytest.approx(statistics.pstdev(means) / 3**0.5), 3)
  table, = papers.tables("lfa/dg", [*rows, dg("sketch", 3, 0.9), row()])
  assert cells(table, "ours")["ZS-CLIP(PC) + LFA"] == {
      **dict.fromkeys((*KNOWN["suites"], "average")), "PACS": wanted}
  assert cells(table, "paper")["ZS-CLIP(PC) + LFA"]["PACS"] == Score(96.1, 0.0, 3)
  assert "ZS-CLIP(PC) + LFA: 1 trials of pacs lack test domains and are left out" in table.remarks
  assert "1 runs of other methods or tasks are left out" in table.remarks


def test_averages_need_all_five_sets():
  rows = [dg(domain, 0, 0.5, "zero_shot", suite, options={"templates": ["a photo of a {}"]})
          for suite in KNOWN["suites"].values() for name in data.SUITES[suite] for domain in [name.partition("/")[2]]]
  table, = papers.tables("lfa/dg", rows)
  assert cells(table, "ours")["ZS-CLIP(PC)"]["average"] == 50
  assert cells(table, "ours")["ZS-CLIP(PC)"]["VLCS"] == Score(50, None, 1)
  (found,) = [each for each in papers.tables("lfa/dg", rows[:4])[0].rows if each[1] == "ours"]
  assert found[-1] is None


@pytest.mark.parametrize("method, options, name", [
    ("lfa", {"base": "qlora", "init": "clip"}, "ZS-CLIP(PC) + QLoRA + LFA"),
    ("zero_shot", {"templates": "{}"}, "ZS-CLIP(C)"),
    ("lfa", {"init": "random"}, "ZS-CLIP(PC) + LFA, init random"), ("dpl", {"tokens": 4}, "ZS-CLIP(PC) + DPL"),
    ("zero_shot", {"templates": ["a {}", "the {}"]}, None), ("clip_linear", {"form": "dg"}, "LinearProbing CLIP"),
    ("clip_linear", {"form": "fewshot"}, None), ("miro", {}, "MIRO"), ("lora", {}, None)])
def test_methods_of_domain_generalisation(method, options, name):
  assert lfa.called_dg(row(method=method, options=options)) == name


def test_unlike_trials_are_refused():
  """A trial has its own rate and batch; its images, preprocessing and number of steps are those of the others."""
  with pytest.raises(report.Unlike, match="LFA on pacs/sketch differ in steps"):
    papers.tables("lfa/dg", [dg("sketch", 0, 0.5), dg("sketch", 1, 0.5, steps=300)])
  two = [dg("sketch", 0, 0.5), dg("photo", 0, 0.5, preprocessing={"crop": "center"})]
  table, = papers.tables("lfa/dg", [*two, dg("cartoon", 0, 0.1), dg("art_painting", 0, 0.1)])
  assert not cells(table, "ours")
  assert any("not averaged: the tasks of ZS-CLIP(PC) + LFA differ in preproc" in each for each in table.remarks)
  table, = papers.tables("lfa/dg", [*two, dg("cartoon", 0, 0.1), dg("art_painting", 0, 0.1)], allow=["preprocessing"])
  assert cells(table, "ours")["ZS-CLIP(PC) + LFA"]["PACS"].mean == pytest.approx(30)
  with pytest.raises(report.Unlike, match="QLoRA on pacs/sketch differ in options.rank"):
    papers.tables("lfa/dg", [dg("sketch", 0, 0.5, "dpl", options={"tokens": 16}),
                             dg("sketch", 1, 0.5, "dpl", options={"tokens": 4}),
                             *(dg("sketch", trial, 0.5, "qlora", options={"rank": trial + 2}) for trial in (0, 1))])
  with pytest.raises(report.Unlike, match="seed 0 is there twice"):
    papers.tables("lfa/dg", [dg("sketch", 0, 0.5), dg("sketch", 0, 0.6)])
  with pytest.raises(ValueError, match="none of 1 runs belongs into this table; expected methods of LFA's comparison"):
    papers.tables("lfa/dg", [row()])


# --- Costs ----------------------------------------------------------------------------------------------------------

def test_parameters_are_those_of_the_released_code():
  first, memory, training, inference = papers.tables("lfa/efficiency", [row()])
  assert {each[0]: each[-1] for each in first.rows} == {
      "LinearProbing CLIP": 655.360, "CLIP + DPL": 4727.808, "CLIP + QLoRA": 491.520, "CLIP + LFA": 2490.368}
  assert all(each[3] == each[4] for each in first.rows) and "the runs given are not used here" in first.remarks
  for table in (memory, training, inference):
    assert len(table.rows) == 5 and all(each[1] == "paper" for each in table.rows)
  assert cells(memory, "paper")["OfficeHome"]["CLIP + LFA"] == 1870
  assert any("--measure" in each for each in training.remarks)


def test_steps_are_measured_when_asked_for(monkeypatch):
  asked = []
  def step(name, classes, domains):
    asked.append((name, classes, domains))
    return {"memory": 1.0, "training": None if classes == 345 else 2.0}
  monkeypatch.setattr(lfa_costs, "step", step)
  _, memory, training, inference = papers.tables("lfa/efficiency", measure=True)
  assert len(asked) == 20 and ("CLIP + DPL", 345, 5) in asked and ("CLIP + LFA", 7, 3) in asked
  assert cells(memory, "ours")["PACS"] == dict.fromkeys(KNOWN["efficiency"], 1.0)
  assert cells(training, "ours")["DomainNet"] == dict.fromkeys(KNOWN["efficiency"])
  assert not cells(inference, "ours")


def test_a_step_is_compiled_and_timed(monkeypatch):
  found = lfa_costs.step("LinearProbing CLIP", 4, 2, backbone="clip_tiny_test", batch=4)
  assert 0 < found["memory"] < 10 and found["training"] > 0
  monkeypatch.setattr(cost, "available_bytes", lambda: 1)
  monkeypatch.setattr(lfa_costs, "compile_step", lambda *arguments: jax.jit(lambda x: x).lower(1.0).compile())
  assert lfa_costs.step("LinearProbing CLIP", 4, 2, backbone="clip_tiny_test", batch=4)["training"] is None


def test_the_command_prints_trials(tmp_path, capsys):
  for i, domain in enumerate(DOMAINS):
    (tmp_path / str(i)).mkdir()
    (tmp_path / str(i) / "result.json").write_text(json.dumps(dg(domain, 0, 0.5)))
  cli.main(["transferlab", "report", str(tmp_path), "--paper=lfa/dg", "--json"])
  table, = json.loads(capsys.readouterr().out)
  ours, = [each for each in table["rows"] if each["whose"] == "ours"]
  assert ours == {"model": "ZS-CLIP(PC) + LFA", "whose": "ours", "PACS": {"mean": 50.0, "std": None, "seeds": 1}}
