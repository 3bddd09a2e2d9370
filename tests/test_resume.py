"""Resuming: whatever stopped a run, the same call ends with the same files, bit for bit."""
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from engine import contents, files, metrics, recipe

from transferlab import checkpoint, data, resume, stage, train
from transferlab.backbones.weights import load_weights, save_weights
from transferlab.optim import Optim
from transferlab.train import fit

# What is random in a run is in this one: order, augmentation, dropout, drop-path; checkpoints lie within epochs.
ASKED = recipe(augmentation="flip", drop_path=0.3, checkpoint_every="4 steps", class_weights="balanced",
               optim=Optim(lr=1e-2, warmup="3 steps"), micro_batch=4)


class Stopped(Exception):
  """Stands for whatever ends a process between two steps."""


class Compiled:
  """A compiled step that stops the run before its n-th call, counted over all stages."""

  def __init__(self, step, clock):
    self.step, self.clock = step, clock

  def __call__(self, *args):
    self.clock["calls"] += 1
    if self.clock["calls"] == self.clock["stop"]:
      raise Stopped
    return self.step(*args)

  def __getattr__(self, name):
    return getattr(self.step, name)


@pytest.fixture(scope="module")
def compiled_once():
  return {}


@pytest.fixture
def clock(monkeypatch, compiled_once):
  """{"stop": step}; programs are kept, as all runs here share two of them."""
  clock = {"calls": 0, "stop": 0}
  compile_step = stage.compile_step
  def cached(step, run, *args, **kwargs):
    key = str(jax.tree.structure(run.trainable))
    if key not in compiled_once:
      compiled_once[key] = compile_step(step, run, *args, **kwargs)
    return Compiled(compiled_once[key], clock)
  monkeypatch.setattr(stage, "compile_step", cached)
  return clock


METHODS = {"lora": {}, "full": {"probe_first": True}}


@pytest.fixture(scope="module")
def whole(tiny_weights, tiny_task, tmp_path_factory):
  """{method: workdir} of runs that nothing stopped."""
  made = {}
  def run(method):
    if method not in made:
      made[method] = tmp_path_factory.mktemp("whole") / method
      fit(tiny_weights, method, tiny_task, ASKED, options=METHODS[method], workdir=made[method], quiet=True)
    return made[method]
  return run


def ledger(workdir):
  return {k: v for k, v in json.loads((workdir / "result.json").read_text()).items() if k != "seconds"}


def assert_same_run(workdir, wanted):
  assert (workdir / "adapter.safetensors").read_bytes() == (wanted / "adapter.safetensors").read_bytes()
  assert metrics(workdir) == metrics(wanted)
  assert ledger(workdir) == ledger(wanted)
  assert (workdir / "config.json").read_bytes() == (wanted / "config.json").read_bytes()


@pytest.mark.parametrize("method, stop, says", [
    ("lora", 2, ["fresh run"]),                                          # before the first checkpoint
    ("lora", 7, ["resumed at step 4 of 15"]),                            # within an epoch, 2 steps after a checkpoint
    ("full", 7, ["resumed at step 4 of 15", "stage 1: fresh run"]),      # in the first of two stages
    ("full", 25, ["resumed at step 15 of 15", "stage 1: resumed at step 8 of 15"])])  # in the second
def test_stopped_between_steps(whole, clock, tiny_weights, tiny_task, tmp_path, capsys, method, stop, says):
  wanted = whole(method)
  again = lambda: fit(tiny_weights, method, tiny_task, ASKED, options=METHODS[method], workdir=tmp_path / "run")
  clock.update(calls=0, stop=stop)
  with pytest.raises(Stopped):
    again()
  assert not {"adapter.safetensors", "result.json"} & files(tmp_path / "run")
  clock["stop"] = 0
  capsys.readouterr()
  again()
  assert [line for line in capsys.readouterr().err.splitlines() if "run" in line or "resumed" in line] == says
  assert_same_run(tmp_path / "run", wanted)


def test_stopped_after_the_last_step(whole, clock, tiny_weights, tiny_task, tmp_path, monkeypatch):
  """Between the last checkpoint and the adapter: nothing is trained again."""
  wanted = whole("lora")
  again = lambda: fit(tiny_weights, "lora", tiny_task, ASKED, workdir=tmp_path / "run", quiet=True)
  with monkeypatch.context() as patch:
    patch.setattr(train, "save_adapter", lambda *args, **kwargs: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
      again()
  (tmp_path / "run" / ".adapter.safetensors.abc123").write_bytes(b"half")  # as a kill within the write leaves
  clock.update(calls=0, stop=1)
  again()
  assert clock["calls"] == 0 and not [name for name in files(tmp_path / "run") if "abc123" in name]
  assert_same_run(tmp_path / "run", wanted)


def test_a_torn_line_and_rows_after_the_checkpoint(whole, clock, tiny_weights, tiny_task, tmp_path):
  wanted = whole("lora")
  again = lambda: fit(tiny_weights, "lora", tiny_task, ASKED, workdir=tmp_path / "run", quiet=True)
  clock.update(calls=0, stop=12)
  with pytest.raises(Stopped):
    again()
  with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
    file.write('{"stage": 0, "step": 12, "lo')
  assert [row["step"] for row in metrics_until_torn(tmp_path / "run")][-1] == 11  # after the checkpoint of step 8
  clock["stop"] = 0
  again()
  assert_same_run(tmp_path / "run", wanted)


def metrics_until_torn(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()[:-1]]


def test_other_positions_in_the_data_are_seen(whole, clock, tiny_weights, tiny_task, tmp_path, monkeypatch):
  """The comparison has teeth: a resumed run that starts its epoch anew ends elsewhere."""
  monkeypatch.setattr(data.TrainLoader, "set_state", lambda self, state: None)
  wanted = whole("lora")
  again = lambda: fit(tiny_weights, "lora", tiny_task, ASKED, workdir=tmp_path / "run", quiet=True)
  clock.update(calls=0, stop=7)
  with pytest.raises(Stopped):
    again()
  clock["stop"] = 0
  again()
  assert (tmp_path / "run" / "adapter.safetensors").read_bytes() != (wanted / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_is_returned_as_it_is(whole, clock, tiny_weights, tiny_task, method, capsys):
  workdir = whole(method)
  before = {name: (workdir / name).stat().st_mtime_ns for name in files(workdir) if (workdir / name).is_file()}
  def read(row):
    raise AssertionError("test was opened again")
  sealed = dataclasses.replace(tiny_task.splits["test"], read=read)
  task = dataclasses.replace(tiny_task, splits={**tiny_task.splits, "test": sealed})
  clock.update(calls=0, stop=1)
  run = fit(tiny_weights, method, task, ASKED, options=METHODS[method], workdir=workdir)
  assert "finished run" in capsys.readouterr().err
  assert run.result == json.loads((workdir / "result.json").read_text()) and run.adapter.exists()
  assert jax.tree.structure(run.trainable) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.trainable))
  after = {name: (workdir / name).stat().st_mtime_ns for name in files(workdir) if (workdir / name).is_file()}
  assert before == after


def test_a_finished_run_without_its_adapter_writes_it_again(whole, clock, tiny_weights, tiny_task, tmp_path):
  shutil.copytree(whole("lora"), tmp_path / "run")
  (tmp_path / "run" / "adapter.safetensors").unlink()
  clock.update(calls=0, stop=1)
  fit(tiny_weights, "lora", tiny_task, ASKED, workdir=tmp_path / "run", quiet=True)
  assert_same_run(tmp_path / "run", whole("lora"))


@pytest.mark.parametrize("changes, says", [
    (dict(recipe=dataclasses.replace(ASKED, seed=1)), "recipe.seed: 0 -> 1"),
    (dict(recipe=dataclasses.replace(ASKED, optim=Optim(lr=1e-3, warmup="3 steps"))), "recipe.optim.lr: 0.01 -> 0.001"),
    (dict(method="dtl"), "method: 'lora' -> 'dtl'"), (dict(options={"rank": 4}), "options.rank: 8 -> 4")])
def test_the_workdir_of_another_run(whole, tiny_weights, tiny_task, changes, says):
  workdir = whole("lora")
  before = contents(workdir)
  asked = {"method": "lora", "recipe": ASKED, "options": None, **changes}
  with pytest.raises(ValueError, match="another configuration .*give another --workdir") as error:
    fit(tiny_weights, asked["method"], tiny_task, asked["recipe"], options=asked["options"], workdir=workdir)
  assert says in str(error.value)
  assert before == contents(workdir)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_workdir_with_another_programs_config(tiny_weights, tiny_task, tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match="config.json that no run wrote"):
    fit(tiny_weights, "linear", tiny_task, ASKED, workdir=tmp_path, quiet=True)
  assert files(tmp_path) == {"config.json"}


def test_a_full_disk_loses_nothing(whole, tiny_weights, tiny_task, tmp_path, monkeypatch):
  wanted = whole("lora")
  again = lambda: fit(tiny_weights, "lora", tiny_task, ASKED, workdir=tmp_path / "run", quiet=True)
  save = resume.ocp.Checkpointer.save
  def full(writer, target, **kwargs):
    if int(target.name) >= 8:
      raise OSError(28, "No space left on device")
    return save(writer, target, **kwargs)
  with monkeypatch.context() as patch:
    patch.setattr(resume.ocp.Checkpointer, "save", full)
    with pytest.raises(OSError, match="step 8 cannot be written .*No space left.* free some space there and run"):
      again()
  assert not {"adapter.safetensors", "result.json"} & files(tmp_path / "run")
  again()
  assert_same_run(tmp_path / "run", wanted)


# kill -9 at chosen moments; at random ones in test_preemption.py

def killed_run(workdir: str, moment: str) -> None:
  """In a process of its own: a run that kills itself, at a moment or after some seconds.

  "whole" lets it live, and runs another to compare with.
  """
  kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
  def before(module, name, when=lambda *args: True):
    original = getattr(module, name)
    def wrapped(*args, **kwargs):
      if when(*args):
        kill()
      return original(*args, **kwargs)
    setattr(module, name, wrapped)
  kind, _, value = moment.partition(":")
  if kind == "checkpoint":  # some milliseconds into writing one
    save = resume.Checkpoints.save
    def timed(self, step, *args):
      if step >= 4:
        threading.Timer(float(value), kill).start()
      save(self, step, *args)
    resume.Checkpoints.save = timed
  elif kind == "adapter":   # half of it is written
    write = Path.write_bytes
    def half(path, content):
      write(path, content[:len(content) // 2])
      kill()
    Path.write_bytes = half
  elif kind == "replace":   # all of it is written, under a name that is not yet its own
    before(os, "replace", lambda source, target: str(target).endswith(value))
  elif kind == "step":
    before(train.Workdir, "log", lambda folder, row: row["step"] == int(value))
  elif kind == "seconds":
    threading.Timer(float(value), kill).start()
  weights = load_weights(Path(workdir).with_name("tiny.safetensors"))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (64, 16, 16, 3), np.uint8)
  splits = {"train": range(40), "val": range(40, 50), "test": range(50, 64)}
  task = data.arrays(images, np.arange(64) % 4, list("abcd"), splits)
  asked = dataclasses.replace(ASKED, duration="6 epochs", checkpoint_every="2 steps")
  fit(weights, "linear", task, asked, workdir=workdir)
  if moment == "whole":
    fit(weights, "linear", task, asked, workdir=Path(workdir).with_name("whole"), quiet=True)


def kill_and_resume(workdir: Path, weights, moments) -> None:
  """Runs, kills and resumes in one workdir; then lets it end, and compares with a run that nobody killed."""
  save_weights(weights, workdir.with_name("tiny.safetensors"))
  alive = 0
  for moment in [*moments, "whole"]:
    found = start_run(workdir, moment)
    assert found.returncode in (0, -signal.SIGKILL), found.stderr
    alive += found.returncode == 0
    if moment == "whole":
      assert found.returncode == 0
      assert "resumed at step" in found.stderr or "finished run" in found.stderr
    elif (workdir / "adapter.safetensors").exists():
      checkpoint.load_adapter(workdir / "adapter.safetensors")  # whole or absent
  assert alive <= 1 + sum(moment.startswith("seconds") for moment in moments), "a kill came too late to count"
  assert_same_run(workdir, workdir.with_name("whole"))
  assert not [name for name in files(workdir) if name.startswith(".")]


def start_run(workdir: Path, moment: str):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}
  command = [sys.executable, "-c", f"import test_resume; test_resume.killed_run({str(workdir)!r}, {moment!r})"]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def moments(seed: int) -> list[str]:
  """Points of a run in order, the random ones drawn from a seed that the test prints.

  Seconds are few enough to fall before the end of a run on any machine, a checkpoint's before the step that follows.
  """
  draw = random.Random(seed)
  some = [f"checkpoint:{draw.uniform(0, 0.04):.3f}", f"step:{draw.randrange(24, 29)}", "adapter"]
  more = ["replace:adapter.safetensors", "replace:result.json", "replace:config.json", "replace:metrics.jsonl"]
  while len(some) < 12:
    some.insert(0, draw.choice([f"checkpoint:{draw.uniform(0, 0.04):.3f}", f"seconds:{draw.uniform(0, 2):.2f}"]))
  return some + more


@pytest.mark.full
def test_kill_9_many_times(tmp_path, tiny_weights):
  seed = int(time.time())
  print(f"seed {seed}: {moments(seed)}")
  kill_and_resume(tmp_path / "run", tiny_weights, moments(seed))
