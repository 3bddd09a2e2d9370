"""A suite: every task that is present, with every seed; what is absent or fails does not stop the rest."""
import json
import shutil

import pytest
from engine import contents, write_images

from transferlab import cli, data, suite
from transferlab.backbones.weights import save_weights
from transferlab.data.entries import Entry, Source

CONFIG = '''
from transferlab.experiment import arguments, defaults

def get_config(text=None):
  arg = arguments(text, task="", method="linear", backbone="", seed=0)
  config = defaults(arg.method, data=arg.task, backbone=arg.backbone, seed=arg.seed, devices=1)
  config.duration, config.batch_size, config.evaluate_every = "6 steps", 4, "6 steps"
  return config
'''


def toy(name: str, group: str) -> Entry:
  """A task that lies in data_dir/<name> as an image folder."""
  def find(data_dir):
    folder = data_dir / name
    return [Source("folder", folder, problem="" if any(folder.glob("*/*.jpg")) else f"{folder} is empty; fill it")
            ] if folder.is_dir() else []
  def part(source, part):
    return data.image_folder(source.path).splits[part]
  return Entry(f"toy/{name}", "toy", find, part, lambda source: data.image_folder(source.path).class_names,
               {"final": {"train": "train", "test": "test"}}, group, 3, layout=f"{name}/<class>/*.jpg")


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_weights):
  """Two of the suite's three tasks in data/, one in each group; a configuration; a backbone."""
  for name, group in (("one", "x"), ("two", "x"), ("three", "y")):
    monkeypatch.setitem(data.ENTRIES, f"toy/{name}", toy(name, group))
  monkeypatch.setitem(data.SUITES, "toys", ("toy/one", "toy/two", "toy/three"))
  for seed, name in enumerate(("one", "three")):
    write_images(tmp_path / "data" / name, seed=seed)
  save_weights(tiny_weights, tmp_path / "tiny.safetensors")
  (tmp_path / "config.py").write_text(CONFIG)
  return tmp_path


def config(place) -> str:
  return f"{place / 'config.py'}:backbone={place / 'tiny.safetensors'}"


def run(place, **changes):
  arguments = {"suite": "toys", "config": config(place), "workdir": place / "runs", "seeds": (0, 1), "quiet": True,
               "overrides": {"data_dir": str(place / "data")}, **changes}
  return suite.run(**arguments)


def test_present_tasks_are_run_with_every_seed_and_absent_ones_reported(place):
  outcome = run(place)
  assert [(row["task"], row["seed"]) for row in outcome.rows] == [
      ("toy/one", 0), ("toy/one", 1), ("toy/three", 0), ("toy/three", 1)]
  assert len(outcome.absent) == 1 and "toy/two is not in" in outcome.absent[0] and not outcome.failed
  row = json.loads((place / "runs" / "toy_three" / "seed_1" / "result.json").read_text())
  assert row["source"] == "folder" and row["protocol"].startswith("toy, final: train=train test=test; last")


def test_a_second_call_repeats_nothing_and_adds_what_came(place):
  run(place, seeds=(0,))
  before = contents(place / "runs")
  write_images(place / "data" / "two", seed=2)
  outcome = run(place, seeds=(0,))
  after = contents(place / "runs")
  assert len(outcome.rows) == 3 and {name: after[name] for name in before} == before


def test_a_failing_task_does_not_stop_the_others(place):
  (place / "data" / "one" / "ant" / "0.jpg").write_bytes(b"no image")
  outcome = run(place, seeds=(0,))
  assert [row["task"] for row in outcome.rows] == ["toy/three"]
  assert len(outcome.failed) == 1 and outcome.failed[0].startswith("toy/one, seed 0: ")
  assert "not an image" in outcome.failed[0]


def test_a_task_that_is_not_whole_is_left_out_with_the_reason(place):
  for folder in (place / "data" / "one").iterdir():
    shutil.rmtree(folder)
  outcome = run(place, seeds=(0,))
  assert any("one is empty; fill it" in line for line in outcome.absent)


@pytest.mark.parametrize("changes, message", [
    ({"suite": "toyss"}, "suite 'toyss' is unknown; nearest: toys"),
    ({"overrides": {"data_dir": "/nowhere"}}, "none of the 3 tasks of toys .*first: toy/one: data directory /nowhere"),
    ({"overrides": {"data_dir": "/nowhere", "seed": "5"}}, "with seed=0 trains with seed 5; .*leave config.seed to"),
    ({"overrides": {"optim.lrr": "1"}}, "no key 'optim.lrr'")])
def test_mistakes_stop_before_the_first_run(place, changes, message):
  with pytest.raises(ValueError, match=message):
    run(place, **changes)
  assert not (place / "runs").exists()


def test_a_config_that_is_not_the_suites_is_refused(place):
  (place / "other.py").write_text(CONFIG.replace("data=arg.task", "data='digits'"))
  with pytest.raises(ValueError, match="reads data 'digits'; expected toy/one"):
    run(place, config=str(place / "other.py"))
  with pytest.raises(ValueError, match="names a task; expected none"):
    run(place, config=config(place) + ",task=toy/one")


def test_command_prints_the_table_and_the_report_prints_it_again(place, capsys):
  command = ["transferlab", "train", f"--config={config(place)}", "--suite=toys", "--seeds=0,1",
             f"--data_dir={place / 'data'}", f"--workdir={place / 'runs'}"]
  cli.main(command)
  out = capsys.readouterr().out
  assert "toy/one" in out and "± " in out and "mean of 2 of 3 tasks" in out and "left out: toy/two is not in" in out
  cli.main(["transferlab", "report", str(place / "runs"), "--json"])
  found = json.loads(capsys.readouterr().out)
  assert found["suite"] == "toys" and found["scores"]["linear"]["toy/three"]["seeds"] == 2
  assert found["averages"]["linear"]["x, 1 of 2 tasks"] == found["scores"]["linear"]["toy/one"]["mean"]


@pytest.mark.parametrize("seeds", ["", "a", "1,1", "-1"])
def test_seeds_are_checked(place, capsys, seeds):
  with pytest.raises(SystemExit):
    cli.main(["transferlab", "train", f"--config={config(place)}", "--suite=toys", f"--seeds={seeds}",
              f"--workdir={place / 'runs'}"])
  assert "--seeds is" in capsys.readouterr().err
