"""Preemption and checkpoints: SIGTERM ends a run so that the same command takes it up, bit for bit, in one process and
in two, and with another number of them; what is cut short or damaged is never taken for a whole checkpoint."""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts
import jax
import numpy as np
import pytest
from engine import colours, contents, metrics, recipe, small_weights, write_images

from transferlab import cli, distributed, files, preemption, resume, stage, storage, train, tree
from transferlab.checkpoint import load_adapter
from transferlab.optim import Optim
from transferlab.signals import CODE, Preempted, handled, state
from transferlab.train import fit
from transferlab.workdir import Workdir

# What is random in a run is in this one; it saves at steps 5 and 10 only.
ASKED = recipe(devices=0, duration="15 steps", augmentation="flip", checkpoint_every="5 steps",
               evaluate_every="4 steps", optim=Optim(name="sgd", lr=1e-2, warmup="3 steps"))

PROGRAMS = {}  # of a device count and number of processes; all runs here have the same


def run(workdir, quiet=True):
  """A run that shares its programs with those before it."""
  compile_step, make_predict = stage.compile_step, stage.make_predict
  def once(make, *args, **kwargs):
    key = make.__name__, distributed.hosts(), len(jax.local_devices())
    if key not in PROGRAMS:
      PROGRAMS[key] = make(*args, **kwargs)
    return PROGRAMS[key]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stage, "compile_step", functools.partial(once, compile_step))
    patch.setattr(stage, "make_predict", functools.partial(once, make_predict))
    return fit(small_weights(), "linear", colours(), ASKED, workdir=workdir, quiet=quiet)


def on(count: int, patch) -> None:
  """Lets this process have so many of its devices only."""
  found = jax.local_devices
  patch.setattr(jax, "local_devices", lambda **which: found(**which)[:count])


def left(workdir) -> tuple:
  """What a run leaves, without what a clock put in it."""
  row = json.loads((workdir / "result.json").read_text())
  return {**contents(workdir)}["adapter.safetensors"], metrics(workdir), {**row, "seconds": 0}


def steps(workdir) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints" / "stage_0").iterdir())


def signal_at(step: int):
  """`Workdir.log` that sends this process a signal with the row of a step."""
  log = Workdir.log
  def logged(folder, row):
    log(folder, row)
    if row["step"] == step and "loss" in row:
      os.kill(os.getpid(), signal.SIGTERM)
  return logged


# --- One process ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Workdir of a run that nothing stopped, on the four devices of this process."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  run(workdir)
  return workdir


@pytest.fixture(scope="module")
def preempted(tmp_path_factory):
  """(workdir, error) of a run on one device that was told to stop at step 7."""
  workdir = tmp_path_factory.mktemp("preempted") / "run"
  with pytest.MonkeyPatch.context() as patch:
    on(1, patch)
    patch.setattr(Workdir, "log", signal_at(7))
    with pytest.raises(Preempted) as error, handled():
      run(workdir)
  return workdir, error.value


def test_the_step_that_was_finished_is_saved(preempted):
  workdir, error = preempted
  assert error.code == CODE == 75 and isinstance(error, SystemExit) and not isinstance(error, Exception)
  assert steps(workdir) == [5, 7] and metrics(workdir)[-1]["step"] == 7
  assert not (workdir / "result.json").exists()


def test_a_run_that_is_taken_up_is_as_if_nothing_had_stopped_it(whole, tmp_path, monkeypatch, capsys):
  with monkeypatch.context() as patch, pytest.raises(Preempted):
    patch.setattr(Workdir, "log", signal_at(8))  # a step that is validated too
    with handled():
      run(tmp_path / "run", quiet=False)
  said = capsys.readouterr().err
  assert "preempted: a checkpoint of step 8 is written, the same command resumes; exit code 75" in said
  run(tmp_path / "run", quiet=False)
  assert "resumed at step 8 of 15" in capsys.readouterr().err
  assert left(tmp_path / "run") == left(whole)


def test_sigusr1_after_the_last_step_ends_the_run_before_the_test_split(whole, tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(Preempted):
    save = resume.Checkpoints.save
    patch.setattr(resume.Checkpoints, "save", lambda self, step, *args: (
        save(self, step, *args), step == 15 and os.kill(os.getpid(), signal.SIGUSR1)))
    with handled():
      run(tmp_path / "run")
  assert steps(tmp_path / "run") == [10, 15] and not (tmp_path / "run" / "result.json").exists()
  run(tmp_path / "run")
  assert left(tmp_path / "run") == left(whole)


def test_outside_of_training_the_program_ends_at_once(tmp_path, monkeypatch, capsys):
  """By the command, while images are read; a run without a workdir has nothing to wait for either."""
  before = signal.getsignal(signal.SIGTERM)
  reads = train.data.read_once
  monkeypatch.setattr(train.data, "read_once", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), reads(*args))[1])
  images = write_images(tmp_path / "images")
  with pytest.raises(SystemExit) as error:
    cli.main(["transferlab", "train", "--config=configs/folder.py:data=folder:" + str(images),
              f"--workdir={tmp_path / 'run'}"])
  assert error.value.code == 75 and not (tmp_path / "run").exists()
  assert capsys.readouterr().err.splitlines()[-1] == (
      "preempted: the same command goes on from what is saved; exit code 75")
  assert signal.getsignal(signal.SIGTERM) is before and not state.waits


def test_who_goes_on_after_failures_does_not_go_on_after_this():
  from transferlab import suite
  with pytest.raises(Preempted):
    suite.each({"a": lambda: preemption.leave("gone"), "b": lambda: pytest.fail("went on")}, lambda line: None)


# --- Two processes -------------------------------------------------------------------------------------------------

def first_pair(folder: str) -> None:
  """Trains together, then each alone, in folders that are not shared, and together again until process 1 is told."""
  folder, place = Path(folder), jax.process_index()
  preemption.LOOK = 60  # process 0 shall hear of it by JAX alone
  preemption.listen()
  run(folder / "together")
  with distributed.alone():
    own, save = folder / f"alone_{place}", stage.Stage.save
    def saves(self, checkpoints, done):
      save(self, checkpoints, done)
      if done == 10:
        raise InterruptedError
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
      patch.setattr(stage.Stage, "save", saves)
      run(own)
    shutil.copytree(own, folder / f"left_alone_{place}")
    run(own)
  (folder / str(place)).mkdir()
  os.chdir(folder / str(place))
  storage.PATIENCE = 0.2
  with pytest.raises(ValueError) as error:
    Workdir("run", {}).begin()
  (folder / f"blind_{place}").write_text(str(error.value))
  log, told = Workdir.log, []
  def slow(workdir, row):
    log(workdir, row)
    if place == 1 and row["step"] == 3 and not told:
      told.append(os.kill(os.getpid(), signal.SIGTERM))
    time.sleep(0.15 * bool(told or place == 0 and row["step"] >= 3))
  Workdir.log = slow
  run(folder / "preempted", quiet=False)


def second_pair(folder: str) -> None:
  """Takes up what two processes and what one left; then process 0 trains alone and the other one is told, and idle."""
  preemption.listen()
  run(Path(folder) / "preempted", quiet=False)
  run(Path(folder) / "of_one", quiet=False)
  with distributed.alone():
    if jax.process_index():
      print("idle", flush=True)
      time.sleep(60)
    log = Workdir.log
    Workdir.log = lambda workdir, row: (log(workdir, row), time.sleep(0.5))
    run(Path(folder) / "alone_told")


@pytest.fixture(scope="module")
def pairs(preempted, tmp_path_factory):
  """(folder, what the first two processes ended with, what the second two did)."""
  folder = tmp_path_factory.mktemp("pairs")
  first = hosts.run(first_pair, str(folder))
  assert (folder / "preempted").exists(), first
  shutil.copytree(folder / "preempted", folder / "of_two")
  shutil.copytree(preempted[0], folder / "of_one")
  with hosts.start(second_pair, str(folder)) as started:
    started.wait_for("idle", 1)
    while not (folder / "alone_told" / "metrics.jsonl").exists():
      time.sleep(0.02)
    started.signal(1, signal.SIGTERM)
    return folder, first, started.ended()


def test_two_processes_save_the_same_step_and_end_with_75(pairs):
  folder, first, _ = pairs
  assert [code for code, *_ in first] == [75, 75], first
  assert "preempted: a checkpoint of step" in first[0][2] and "preempted" not in first[1][2]  # one speaks for both
  assert "error" not in first[0][2] + first[1][2]
  found = steps(folder / "of_two")
  assert 3 <= found[-1] < 15 and files.flaw(folder / "of_two" / "checkpoints" / "stage_0" / str(found[-1])) == ""


def test_two_processes_take_up_what_two_left_bit_for_bit(pairs):
  folder, _, second = pairs
  assert "resumed at step" in second[0][2]
  assert left(folder / "preempted") == left(folder / "together")


def test_one_that_is_told_ends_all_and_who_trains_alone_saves_first(pairs):
  folder, _, second = pairs
  assert [code for code, *_ in second] == [75, 75], second
  saved = steps(folder / "alone_told")[-1]
  assert f"[0] preempted: a checkpoint of step {saved} is written" in second[0][2]
  assert "[1] preempted: the same command goes on from what is saved; exit code 75" in second[1][2]
  assert not (folder / "alone_told" / "result.json").exists()


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_processes_takes_up_what_two_left(pairs, whole, tmp_path, monkeypatch, capsys, count):
  shutil.copytree(pairs[0] / "of_two", tmp_path / "run")
  on(count, monkeypatch)
  run(tmp_path / "run", quiet=False)
  assert "resumed at step" in capsys.readouterr().err
  assert_close(tmp_path / "run", whole)


def test_two_processes_take_up_what_one_left(pairs, whole):
  assert "resumed at step 7 of 15" in pairs[2][0][2]
  assert_close(pairs[0] / "of_one", whole)
  assert_close(pairs[0] / "together", whole)


def test_processes_that_work_alone_save_and_any_number_takes_it_up(pairs, whole, capsys):
  for place in range(2):
    assert_close(pairs[0] / f"alone_{place}", whole)
  run(pairs[0] / "left_alone_1", quiet=False)
  assert "resumed at step 10 of 15" in capsys.readouterr().err
  assert_close(pairs[0] / "left_alone_1", whole)


def test_a_folder_that_is_not_shared_names_the_host(pairs):
  for place in range(2):
    said = (pairs[0] / f"blind_{place}").read_text()
    assert said.startswith("workdir /") and "(process 1) is not the same folder as /" in said
    assert "storage that all hosts share" in said


def assert_close(workdir, wanted) -> None:
  """Equal trainables and rows, but for the order of sums."""
  mine, other = load_adapter(workdir / "adapter.safetensors"), load_adapter(wanted / "adapter.safetensors")
  for (name, a), b in zip(tree.flatten(mine.trainable).items(), tree.flatten(other.trainable).values()):
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=0, err_msg=name)
  assert [row["step"] for row in metrics(workdir)] == [row["step"] for row in metrics(wanted)]


# --- Whole or not at all -------------------------------------------------------------------------------------------

def damages(folder: Path):
  """(name, what was done) of every file below a folder, gone, cut at several lengths, and with one bit turned; each is
  put back afterwards."""
  for path in sorted(path for path in folder.rglob("*") if path.is_file()):
    before = path.read_bytes()
    path.unlink()
    yield path.relative_to(folder).as_posix(), "gone"
    for length in sorted({0, 1, len(before) // 2, len(before) - 1} - {len(before), -1}):
      path.write_bytes(before[:length])
      yield path.relative_to(folder).as_posix(), f"cut to {length} of {len(before)} bytes"
    for place in {0, len(before) // 2} if before else ():
      path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1:])
      yield path.relative_to(folder).as_posix(), f"bit turned in byte {place}"
    path.write_bytes(before)


def test_every_damage_of_every_file_is_seen(preempted):
  folder, seen = preempted[0] / "checkpoints" / "stage_0" / "7", set()
  seal = (folder / files.SEAL).read_bytes()[:-1]  # without the newline at its end it says the same
  for name, what in damages(folder):
    assert files.flaw(folder) or (folder / name).read_bytes() == seal, f"{name} {what}"
    seen.add(name)
  assert files.flaw(folder) == "" and len(seen) > 8 and files.SEAL in seen


@pytest.mark.parametrize("damage, says", [
    ("seal", "it was interrupted"), ("gone", "arrays/_METADATA is missing"),
    ("cut", "arrays/_METADATA has 5 bytes, expected"), ("turned", "the bytes of arrays/_METADATA have changed"),
    ("seal cut", "whole.json is damaged")])
def test_the_checkpoint_before_a_damaged_one_is_taken_up(preempted, tmp_path, monkeypatch, damage, says):
  shutil.copytree(preempted[0], tmp_path / "run")
  folder = tmp_path / "run" / "checkpoints" / "stage_0"
  spoil(folder / "7", damage)
  (folder / "9.orbax-checkpoint-tmp").mkdir()
  monkeypatch.setattr(resume.ocp.Checkpointer, "restore", lambda self, path, args: {"arrays": path.name, "notes": {}})
  told = []
  assert resume.Checkpoints(folder).restore({}, told.append) == (5, "5", {})
  assert len(told) == 1 and f"the checkpoint of step 7 is not whole and is left out: {says}" in told[0]
  assert steps(tmp_path / "run") == [5]


def spoil(folder: Path, damage: str) -> None:
  file = folder / (files.SEAL if damage.startswith("seal") else "arrays/_METADATA")
  before = file.read_bytes()
  if damage in ("gone", "seal"):
    file.unlink()
  else:
    file.write_bytes(before[:5] if damage.endswith("cut") else before[:-1] + b"?")


def test_damage_of_all_checkpoints_is_an_error_that_says_what_to_do(preempted, tmp_path):
  shutil.copytree(preempted[0], tmp_path / "run")
  folder = tmp_path / "run" / "checkpoints" / "stage_0"
  spoil(folder / "7", "cut")
  spoil(folder / "5", "gone")
  before = contents(folder)
  with pytest.raises(ValueError, match="no checkpoint in .* is whole .*step 5: arrays/_METADATA is missing; step 7: .*"
                                       "delete that folder to train from the start"):
    resume.Checkpoints(folder).restore({})
  assert contents(folder) == before  # nothing is taken away from who may mend it


def test_a_checkpoint_that_does_not_fit_says_so(preempted):
  checkpoints = resume.Checkpoints(preempted[0] / "checkpoints" / "stage_0")
  with pytest.raises(ValueError, match="the checkpoint of step 7 in .* does not fit this run .*delete that folder"):
    checkpoints.restore({"run": {"other": jax.numpy.zeros(3)}})


def test_kill_at_random_moments(tmp_path):
  """The script, with few of its kills; it prints the seed."""
  done = subprocess.run([sys.executable, Path(__file__).with_name("kill.py"), "--kills=5"], capture_output=True,
                        text=True, timeout=500, env=hosts.environment(1, {"TMPDIR": str(tmp_path)}))
  assert done.returncode == 0, done.stdout + done.stderr
  print(done.stdout)


# --- Workdirs ------------------------------------------------------------------------------------------------------

def test_a_run_goes_on_on_other_devices(tmp_path):
  asked = lambda **changes: {"recipe": {"devices": 1, "shard": 1, "seed": 0, **changes}}
  for changes in ({}, {"devices": 4, "shard": 2}):
    folder = Workdir(tmp_path / "run", asked(**changes))
    folder.begin()
    folder.close()
  with pytest.raises(ValueError, match="another configuration \\(recipe.seed: 0 -> 1\\); give"):
    Workdir(tmp_path / "run", asked(devices=2, seed=1))


def test_a_workdir_has_one_run_at_a_time(tmp_path):
  first, second = (Workdir(tmp_path / "run", {"a": 1}) for _ in range(2))
  first.begin()
  first.begin()  # of its next stage
  holder = rf"a run with process number \(pid\) {os.getpid()} on "
  with pytest.raises(ValueError, match=f"in use by {holder}.*give another --workdir"):
    second.begin()
  first.close()
  second.begin()
  second.close()


def test_a_run_that_fails_gives_its_workdir_back(tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(InterruptedError) as kept:  # with all that its frames hold
    patch.setattr(Workdir, "log", lambda *args: (_ for _ in ()).throw(InterruptedError))
    run(tmp_path / "run")
  assert kept.traceback
  Workdir(tmp_path / "run", json.loads((tmp_path / "run" / "config.json").read_text())).begin()


def test_storage_without_locks_is_said(tmp_path, monkeypatch):
  import fcntl
  monkeypatch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
  told = []
  assert storage.lock(tmp_path, "workdir", told.append) is None
  assert "without locks (Operation not supported)" in told[0]
