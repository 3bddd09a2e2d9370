"""Checkpoints to resume from: written by orbax, all processes their part, and taken up only while they are whole."""
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from transferlab import devices, distributed
from transferlab.files import SEAL, flaw, seal, write_json

ALONE = "alone.npz"  # arrays of a process that works for itself among others, for which orbax knows no way


class Checkpoints:
  """The last two checkpoints of a run, a folder for each, named by its step. All processes that share the run call all
  of this together, and each writes its part.

  A checkpoint counts once it is sealed (`files.seal`), the last thing that is done to it, and only while all its files
  are as they were then: what is cut short or damaged is never taken for a whole one. Another number of processes or
  devices may take it up.
  """

  def __init__(self, folder):
    self.folder = Path(folder).absolute()
    self.last: int | None = None  # step of the newest one
    self.writer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

  def save(self, step: int, arrays, notes: dict) -> None:
    """Saves a pytree of arrays and a dict of plain data.

    Raises:
      OSError: it cannot be written, the disk being full for example; the checkpoints before it stay as they are.
    """
    target = self.folder / str(step)
    try:
      if distributed.first():
        self.folder.mkdir(parents=True, exist_ok=True)
      distributed.barrier("a folder for checkpoints")
      if jax.process_count() > distributed.hosts()[1]:
        _write_alone(target, arrays, notes)
      else:
        self.writer.save(target, force=True, args=ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes)))
      if distributed.first():
        seal(target)
        for old in self.steps()[:-2]:
          _remove(self.folder / str(old))
    except (OSError, ValueError, RuntimeError) as error:  # the last two: tensorstore's, for what the disk refuses
      reason = " ".join(str(error).split())[:200]
      raise OSError(f"the checkpoint of step {step} cannot be written to {self.folder} ({reason}); those before it are "
                    "whole: free some space there and run the same command again, it resumes") from error
    distributed.barrier("a checkpoint is sealed")
    self.last = step

  def steps(self) -> list[int]:
    """Steps of which something lies in the folder, in order."""
    return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal() and path.is_dir())

  def restore(self, like, tell=lambda message: None):
    """(step, arrays, notes) of the newest whole checkpoint, or None; `like` gives structure, shapes and shardings.

    What else lies there is removed, and `tell` is given a line for each checkpoint that is not whole.

    Raises:
      ValueError: there are checkpoints and all are damaged, or the whole one does not fit.
    """
    self.last = distributed.agree(self._newest(tell) if distributed.first() else None)
    if self.last is None:
      return None
    source = self.folder / str(self.last)
    if jax.process_count() > distributed.hosts()[1] and not (source / ALONE).exists():
      # orbax waits in it for all processes of JAX, the others of which do something else.
      raise ValueError(f"the checkpoint of step {self.last} in {self.folder} is not of a process that worked alone "
                       "among others, as this one does; run the same command as one process, which takes it up, or "
                       "delete that folder to train this run from the start")
    try:
      if (source / ALONE).exists():
        return self.last, *_read_alone(source, like)
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
      found = self.writer.restore(source, args=ocp.args.Composite(
          arrays=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
      reason = " ".join(str(error).split())[:200]
      raise ValueError(f"the checkpoint of step {self.last} in {self.folder} does not fit this run ({reason}); it may "
                       "be of another version: delete that folder to train from the start") from error
    return self.last, found["arrays"], found["notes"]

  def _newest(self, tell) -> int | None:
    """The step of the newest whole checkpoint; removes everything that is none."""
    flaws = {step: flaw(self.folder / str(step)) for step in self.steps()}
    whole = [step for step, wrong in flaws.items() if not wrong]
    sealed = lambda step: (self.folder / str(step) / SEAL).exists()
    damaged = [f"step {step}: {wrong}" for step, wrong in flaws.items() if wrong and sealed(step)]
    if damaged and not whole:
      raise ValueError(f"no checkpoint in {self.folder} is whole ({'; '.join(damaged)}); put its files back, or delete "
                       "that folder to train from the start")
    for step, wrong in flaws.items():
      if wrong:
        tell(f"the checkpoint of step {step} is not whole and is left out: {wrong}")
    for path in self.folder.glob("*"):
      if path.name not in map(str, whole):
        _remove(path)
    return max(whole, default=None)

  def close(self) -> None:
    self.writer.close()


def _write_alone(target: Path, arrays, notes: dict) -> None:
  _remove(target)
  target.mkdir()
  leaves = jax.device_get(jax.tree.leaves(arrays))
  np.savez(target / ALONE, *leaves)
  write_json(target / "notes.json", notes)


def _read_alone(source: Path, like):
  """(arrays, notes) of what `_write_alone` wrote, for any number of processes."""
  leaves, structure = jax.tree.flatten(like)
  with np.load(source / ALONE, allow_pickle=False) as file:
    found = [file[f"arr_{place}"] for place in range(len(file.files))]
  if [leaf.shape for leaf in found] != [leaf.shape for leaf in leaves]:
    raise ValueError(f"{len(found)} arrays, expected {len(leaves)} of other shapes")
  # np.savez keeps the bytes of a bfloat16 and forgets its name.
  put = [devices.put(value.view(leaf.dtype), leaf.sharding) for value, leaf in zip(found, leaves)]
  return jax.tree.unflatten(structure, put), json.loads((source / "notes.json").read_text())


def _remove(path: Path) -> None:
  """Removes a checkpoint, its seal first, or whatever else is in its place."""
  if path.is_dir():
    (path / SEAL).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)
