"""Kills a training with SIGKILL at random moments, resumes it each time, and compares what it ends with, bit for bit,
with a training that nobody killed.

    python tests/kill.py --kills=50            # --seed=… draws the moments that an earlier call has printed

It saves after every step. Moments are drawn of four kinds: some seconds after the start, the instant after so many
files have appeared among the checkpoints, a few milliseconds later, and the instant the adapter or the result appears.
A life is a fork of this process, which has imported everything and touched nothing; programs are compiled once.
"""
import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402
from engine import colours, metrics, recipe, small_weights  # noqa: E402

from transferlab.files import SEAL  # noqa: E402
from transferlab.optim import Optim  # noqa: E402
from transferlab.train import fit  # noqa: E402

ASKED = recipe(duration="10 steps", checkpoint_every="1 steps", evaluate_every="3 steps", augmentation="flip",
               optim=Optim(lr=1e-2, warmup="3 steps"))
ENDS = (".adapter", "adapter", ".result", "result")  # of a training: how names begin that appear then


def life(workdir: Path) -> int:
  """Starts the training in a process of its own; returns its number."""
  if child := os.fork():
    return child
  log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(log, 1)
  os.dup2(log, 2)
  code = 1
  try:
    for name, value in {"jax_compilation_cache_dir": str(workdir.parent / "programs"),
                        "jax_persistent_cache_min_compile_time_secs": 0,
                        "jax_persistent_cache_min_entry_size_bytes": -1, "jax_num_cpu_devices": 1}.items():
      jax.config.update(name, value)
    fit(small_weights(), "linear", colours(), ASKED, workdir=workdir)
    code = 0
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)


def moment(draw: random.Random, workdir: Path):
  """(what it is, function without arguments that tells whether it has come)."""
  kind = draw.choice(["seconds", "files", "files", "later", "later", "end"])
  if kind == "seconds":
    after = draw.uniform(0, 2)
    until = time.monotonic() + after
    return f"{after:.2f} seconds", lambda: time.monotonic() > until
  if kind == "end":
    name = draw.choice(ENDS)
    return f"{name} appears", lambda: workdir.exists() and any(each.startswith(name) for each in os.listdir(workdir))
  checkpoints = workdir / "checkpoints"
  count, seen, new = draw.randrange(1, 150), set(everything(checkpoints)), set()
  after = draw.uniform(0, 0.005) if kind == "later" else 0

  def appeared() -> bool:
    new.update({*everything(checkpoints)} - seen)
    if len(new) < count:
      return False
    time.sleep(after)
    return True
  return f"{count} files and {1000 * after:.1f} ms", appeared


def everything(folder: Path) -> list[str]:
  """Names of all that lies below a folder, which may vanish meanwhile."""
  found = []
  with contextlib.suppress(FileNotFoundError):
    for root, folders, files in os.walk(folder):
      found += [os.path.join(root, name) for name in folders + files]
  return found


def ended(child: int, reached=lambda: False) -> int | None:
  """Exit code of a life that comes to its end; None if it is killed before, at a moment."""
  while not reached():
    found, status = os.waitpid(child, os.WNOHANG)
    if found:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.0005)
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return None


def left(workdir: Path) -> tuple:
  """What a training leaves, without what a clock put in it."""
  row = json.loads((workdir / "result.json").read_text())
  return (workdir / "adapter.safetensors").read_bytes(), metrics(workdir), {**row, "seconds": 0}


def main(kills: int, seed: int, folder: Path) -> None:
  """Raises `SystemExit` with a line where a training does not end as the one that nobody killed."""
  draw, whole = random.Random(seed), folder / "whole"
  print(f"{kills} kills, seed {seed}", flush=True)
  if ended(life(whole)) != 0:
    raise SystemExit(whole.with_suffix(".log").read_text())
  wanted, done, runs, torn = left(whole), 0, 0, 0
  while done < kills or not runs:
    runs, code = runs + 1, None
    workdir = folder / f"run_{runs}"
    while code is None:
      what, reached = moment(draw, workdir)
      code = ended(life(workdir), reached if done < kills else lambda: False)
      if code is None:
        done += 1
        steps = [path for path in (workdir / "checkpoints" / "stage_0").glob("*") if not (path / SEAL).exists()]
        torn += bool(steps)
        print(f"kill {done} of run {runs} when {what}; cut short: {', '.join(path.name for path in steps) or 'none'}",
              flush=True)
    said = workdir.with_suffix(".log").read_text()
    if code or "Traceback" in said or left(workdir) != wanted:
      raise SystemExit(f"run {runs} ended with code {code} and "
                       f"{'something else than' if not code else 'not as'} the run that nobody killed: {said[-3000:]}")
  print(f"{done} kills, {torn} of them within a checkpoint; {runs} runs ended as one that nobody killed, bit for bit")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=int(time.time()))
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    main(given.kills, given.seed, Path(scratch))
  sys.exit()
