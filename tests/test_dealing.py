"""Several processes, one sweep or one training of many heads: shares, ledgers, what a lost process leaves, and parallel
heads on devices of two processes. One pair of real processes does all that needs two."""
import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import hosts
import jax
import numpy as np
import pytest
from engine import colours, recipe, write_images

from transferlab import (choice, dealing, devices, distributed, experiment, features, grid, methods, storage, sweep,
                         tree)
from transferlab.backbones.weights import load_weights, save_weights
from transferlab.heads import Head, Score, Trained, train_heads
from transferlab.suite import each

CONFIG = '''
from transferlab.experiment import defaults

def get_config(text):
  config = defaults("linear", data=f"folder:{text}/images", backbone=f"{text}/tiny.safetensors")
  config.duration, config.batch_size, config.evaluate_every = "6 steps", 6, "3 steps"
  return config
'''
GRID = {"optim.lr": [3e-3, 3e-2], "options.site": ["pooled", "block_01/out"]}
FIVE = {"optim.lr": [0.1, 0.2, 0.3, 0.4, 0.5]}
HEADS = [Head(lr, decay, seed) for lr in (1e-3, 1e-2, 3e-2) for decay, seed in ((0.0, 0), (0.1, 1))]


# --- Shares -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("groups, count, wanted", [
    ([[0, 1, 2, 3]], 2, [[(0, [0, 1])], [(0, [2, 3])]]),
    ([[0, 2], [1, 3, 4]], 2, [[(1, [1, 3, 4])], [(0, [0, 2])]]),
    ([[0], [1, 2, 3], [], [4, 5]], 2, [[(1, [1, 2, 3])], [(0, [0]), (3, [4, 5])]]),
    ([[0, 1, 2], [3, 4]], 3, [[(0, [0, 1])], [(0, [2]), (1, [3])], [(1, [4])]]),
    ([[7]], 3, [[(0, [7])], [], []]), ([[], []], 2, [[], []]), ([[1], [0, 2]], 1, [[(0, [1]), (1, [0, 2])]])])
def test_every_point_is_dealt_to_one_process(groups, count, wanted):
  assert dealing.shares(groups, count) == wanted


# --- Ledgers ----------------------------------------------------------------------------------------------------------

def entry(key, member="", count=1, **more):
  return {"point_hash": key, "member": member, "member_count": count, **more}


def written(file, *rows, end="\n"):
  file.parent.mkdir(exist_ok=True)
  file.write_text("\n".join(map(json.dumps, rows)) + end)


def test_ledgers_of_all_processes_are_read_and_only_the_own_is_written(tmp_path, monkeypatch):
  first, second = tmp_path / "sweep.jsonl", tmp_path / "sweep.1.jsonl"
  written(first, entry("a", by=0), entry("half", "x", 2))
  written(second, entry("a", by=1), entry("b", by=1))
  written(tmp_path / "sweep_old.jsonl", entry("c"))
  before = second.read_text()
  ledger = choice.Ledger(tmp_path, {})
  assert set(ledger.rows) == {"a", "b"} and [len(rows) for rows in ledger.rows.values()] == [1, 1]
  ledger.add([entry("d")])
  assert second.read_text() == before and set(choice.Ledger(tmp_path, {}).rows) == {"a", "b", "d"}
  monkeypatch.setattr(distributed, "hosts", lambda: (1, 2))
  monkeypatch.setattr(storage, "check_shared", lambda *_: None)
  ledger = choice.Ledger(tmp_path, {})
  ledger.add([entry("e")])
  assert [line.row["point_hash"] for line in choice.lines(tmp_path)].count("a") == 1
  assert set(choice.Ledger(tmp_path, {}).rows) == {"a", "b", "d", "e"} and ledger.path == second


def test_a_last_line_that_was_cut_is_dropped_and_others_are_not(tmp_path):
  file = tmp_path / "sweep.1.jsonl"
  written(file, entry("a"), entry("b"), end='\n{"point_hash": "c", "mem')
  assert [line.row["point_hash"] for line in choice.lines(tmp_path)] == ["a", "b"]
  written(file, entry("a"), [1], entry("b"))
  with pytest.raises(ValueError, match="sweep.1.jsonl line 2 is no row of a sweep"):
    choice.lines(tmp_path)


def test_rows_that_do_not_appear_are_asked_for_on_shared_storage(tmp_path):
  with pytest.raises(ValueError, match="lacks 2 points that other processes trained; .*storage that they share"):
    choice.Ledger(tmp_path, {}).refresh(["a", "b"], patience=0)


# --- Two processes ----------------------------------------------------------------------------------------------------

def config(place, **changes):
  return grid.changed(experiment.load(f"{place}/config.py:{place}"), changes)


def heads_on(mesh, place, cache, of_loaders=None):
  """Six probes on a mesh, of cached activations; a second stage goes on from each one's best."""
  weights, task, how = load_weights(f"{place}/tiny.safetensors"), colours(), recipe(devices=0, duration="1 epochs")
  del task.splits["test"]
  probe = methods.build("linear", weights.spec)
  def then(trainable, state):
    assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(trainable))
    return probe._replace(init=lambda *_: (jax.tree.map(lambda leaf: 2 * leaf, trainable), state))
  made = features.loaders(f"{place}/{cache}", weights, probe.reads, task, how, evaluate=("val",),
                          mesh=of_loaders or mesh, quiet=True)
  return train_heads(probe._replace(then=then), weights, task, how, HEADS, loaders=made, mesh=mesh, keep_logits=True,
                     quiet=True)


CASES = {"heads over both": 4, "batch over both": 2}


def plain(trained) -> dict:
  """What there is to compare."""
  scores = {f"score/{k}": np.array([score.accuracy, score.loss, score.examples, score.step])
            for k, members in enumerate(trained.scores) for score in members.values()}
  return {**tree.flatten({"trainable": trained.trainable, "state": trained.state}), **scores,
          "logits": trained.logits["val"]}


def fake_heads(method, weights, task, recipe, heads, *, finished, **_):
  """Stands for `train_heads`: chunks of one head."""
  for k, head in enumerate(heads):
    finished(k, Trained(method, (head,), None, None, [{"": Score(head.lr, 1.0, None, 6, 6)}], [1], 7, None, 0.5))
    print(f"trained {head.lr}", flush=True)
    if len(heads) == 2 and os.environ.get("PLACE") == "1":  # the second process is lost after its first chunk
      os.kill(os.getpid(), signal.SIGKILL)


def in_each(place):
  """What both processes do."""
  here, _ = distributed.hosts()
  for case, heads in CASES.items():
    found = heads_on(devices.make_mesh(heads=heads), place, "joint")
    np.savez(f"{place}/{case}.{here}.npz", **plain(found))
  try:
    heads_on(devices.make_mesh(heads=2), place, "joint", devices.make_mesh(heads=4))
  except ValueError as error:
    print(f"refused: {error}")

  outcome = sweep.run(config(place, features=f"{place}/features"), GRID, f"{place}/sweep", seeds=(0, 1))
  Path(f"{place}/outcome.{here}.json").write_text(json.dumps([outcome.candidates, outcome.rows, outcome.finals]))

  def fails():
    raise ValueError("both fail")
  print(each({"one": fails, "two": lambda: 2}, lambda line: None))
  try:
    sweep.run(config(place, batch_size=5 + here), FIVE, f"{place}/unlike", seeds=())
  except ValueError as error:
    print(f"unlike: {error}")
  sweep.train_heads = fake_heads
  sweep.run(config(place), {"optim.lr": [1.0]}, f"{place}/one", seeds=())
  sweep.run(config(place), FIVE, f"{place}/lost", seeds=())


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_weights):
  place = tmp_path_factory.mktemp("place")
  write_images(place / "images", count=10)
  save_weights(tiny_weights, place / "tiny.safetensors")
  (place / "config.py").write_text(CONFIG)
  return place


@pytest.fixture(scope="module")
def pair(place):
  """What two processes with two devices each said; the second one was killed, and then the first."""
  with hosts.start(in_each, str(place), each={k: {"env": {"PLACE": str(k)}} for k in range(2)}) as started:
    started.popens[1].wait(240)
    started.wait_for("trained 0.3")
    started.signal(0)
    ended = started.ended()
  assert [code for code, *_ in ended] == [-9, -9], ended
  return ended


@pytest.fixture(scope="module")
def one_device(place):
  return heads_on(devices.make_mesh(1), place, "alone")


@pytest.mark.parametrize("case", CASES)
def test_heads_on_devices_of_two_processes_end_where_they_end_on_one(place, pair, one_device, case):
  wanted = plain(one_device)
  assert wanted["logits"].shape == (6, 1, 10, 4)
  for here in range(2):
    found = np.load(place / f"{case}.{here}.npz")
    assert set(found) == set(wanted)
    for key, value in wanted.items():
      np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=key)


def test_loaders_of_another_mesh_are_refused(pair):
  for _, out, _ in pair:
    assert "refused: loaders give this process 8 rows of a batch; expected its own 4; make the loaders and" in out


def test_two_processes_share_out_a_sweep_and_choose_the_same(place, pair, tmp_path):
  alone = sweep.run(config(place), GRID, tmp_path / "sweep", seeds=(), quiet=True)
  parts = [[json.loads(line)["values"] for line in (place / "sweep" / name).read_text().splitlines()]
           for name in ("sweep.jsonl", "sweep.1.jsonl")]
  values = [row["values"] for row in alone.rows]
  assert parts == [values[:2], values[2:]]
  found = [json.loads((place / f"outcome.{here}.json").read_text()) for here in range(2)]
  assert found[0] == found[1]
  candidates, rows, finals = found[0]
  for row, wanted in zip(rows, alone.rows, strict=True):
    assert (row["point_hash"], row["val"]["accuracy"]) == (wanted["point_hash"], wanted["val"]["accuracy"])
    assert row["val"]["loss"] == pytest.approx(wanted["val"]["loss"], abs=1e-6) and row["heads"] == 2
  assert [values for values, *_ in candidates] == [candidate.values for candidate in alone.candidates]
  assert json.loads((place / "sweep" / "best.json").read_text())["values"] == alone.best.values
  assert [row["seed"] for row in finals] == [0, 1]
  assert finals[0]["val"]["accuracy"] == alone.best.score and finals[0]["devices"] == 2


def test_processes_say_what_they_do(pair):
  (_, _, first), (_, _, second) = pair
  assert "points for processes 0 to 1: 2, 2" in first and "points for" not in second
  assert "points for processes 0 to 1: 1, 0; 1 of them have nothing to train and wait" in first
  assert "[0] group 1 of 1: 2 points of linear" in first and "[1] group 1 of 1: 2 points of linear" in second
  assert "[1] final run" in second and second.count("] final run") == 1 == first.count("] final run")


def test_who_waits_says_for_whom(place, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sweep, "train_heads", fake_heads)
  whole = sweep.run(config(place), FIVE, tmp_path / "whole", seeds=(), quiet=True)
  def meet(name, value, waiting):
    waiting(1)
    shutil.copy(tmp_path / "whole" / "sweep.jsonl", tmp_path / "shared" / "sweep.1.jsonl")
  for module in (sweep, dealing):
    monkeypatch.setattr(module, "distributed", SimpleNamespace(
        hosts=lambda: (0, 2), agree=lambda value: value, compare=lambda *_: None, first=lambda: True, meet=meet,
        alone=contextlib.nullcontext))
  found = sweep.run(config(place), FIVE, tmp_path / "shared", seeds=())
  assert "waiting for process 1: 3 of 5 grid points are trained" in capsys.readouterr().err
  assert found.candidates == whole.candidates


def test_processes_that_are_asked_for_different_sweeps_are_told_so(place, pair):
  for _, out, _ in pair:
    line, = (line for line in out.splitlines() if line.startswith("unlike: process 1 of 2 ("))
    assert "in its sweep (" in line and "batch_size: 5 -> 6" in line and "lr" not in line
  assert not (place / "unlike").exists()


def test_what_fails_everywhere_does_not_stop_the_next(pair):
  for _, out, _ in pair:
    assert "([2], ['one: both fail'])" in out


def test_a_sweep_takes_over_what_a_lost_process_left(place, pair, capsys, monkeypatch):
  trained = [[line for line in out.splitlines() if line.startswith("trained")] for _, out, _ in pair]
  assert trained == [["trained 1.0", "trained 0.1", "trained 0.2", "trained 0.3"], ["trained 0.4"]]
  monkeypatch.setattr(sweep, "train_heads", fake_heads)
  outcome = sweep.run(config(place), FIVE, place / "lost", seeds=(), quiet=True)
  assert capsys.readouterr().out.splitlines() == ["trained 0.5"]
  assert outcome.best.values == {"optim.lr": 0.5} and len(outcome.rows) == 5
