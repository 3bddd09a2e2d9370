"""A run's folder on disk: whose it is, its log, its result. What lies there is listed in `train.py`."""
import contextlib
import json
import tempfile
from pathlib import Path

from transferlab import config, distributed, storage, tree
from transferlab.files import atomic, write_json
from transferlab.progress import say


PLACES = ("recipe.devices:", "recipe.shard:", "recipe.shard_patterns:")  # where a run computes is no part of what it is


class Workdir:
  """A run's folder. It belongs to one configuration; another one is refused with the differences.

  Nothing is written before `begin`, so that a request which is refused leaves nothing behind to undo; from then until
  `close` no other run can take the folder. Of several processes the first one writes.
  """

  def __init__(self, path, asked: dict):
    self.path, self.asked, self.board, self.lock = Path(path), asked, None, None
    whole = self.path.absolute()
    existing = next(folder for folder in (whole, *whole.parents) if folder.exists())
    try:
      with tempfile.TemporaryFile(dir=existing):  # says now, not after training, that nothing can be written
        pass
      known = self.path / "config.json"
      found = json.loads(known.read_text()) if known.exists() else asked
    except OSError as error:
      raise ValueError(f"cannot write to workdir {path} ({error.strerror}); choose a folder you may write to") from None
    except ValueError:
      found = None
    if not isinstance(found, dict):
      raise ValueError(f"workdir {path} has a config.json that no run wrote; give another --workdir")
    if different := [change for change in config.changes(found, asked) if not change.startswith(PLACES)]:
      raise ValueError(f"workdir {path} holds a run with another configuration ({'; '.join(different[:4])}); give "
                       "another --workdir, or delete it to start over")
    storage.check_shared(self.path, "workdir")

  def begin(self) -> None:
    """Takes the folder, once everything is known to fit; all processes call this.

    Raises:
      ValueError: another run has it.
    """
    if distributed.first():
      self._take()
    distributed.barrier("the folder is taken")

  def _take(self) -> None:
    self.path.mkdir(parents=True, exist_ok=True)
    self.lock = self.lock or storage.lock(self.path, "workdir", say)
    write_json(self.path / "config.json", self.asked)
    for name in ("config.json", "metrics.jsonl", "adapter.safetensors", "result.json"):
      for left_over in self.path.glob(f".{name}.*"):  # of a write that was killed
        left_over.unlink()
    with contextlib.suppress(ImportError):
      from tensorboardX import SummaryWriter
      self.board = self.board or SummaryWriter(str(self.path / "tensorboard"), flush_secs=10)

  def close(self) -> None:
    """Lets another run take the folder, its log being written."""
    for each in (self.board, self.lock):
      if each:
        each.close()
    self.board = self.lock = None

  def result(self) -> dict | None:
    """The ledger row of a finished run, the same in all processes, which call this together."""
    path = self.path / "result.json"
    return distributed.agree(json.loads(path.read_text()) if distributed.first() and path.exists() else None)

  def finish(self, result: dict) -> dict:
    """Writes the ledger row once; a finished run's row stays as it is."""
    known = self.result()
    if known is None and distributed.first():
      write_json(self.path / "result.json", result)
    return known or result

  def log(self, row: dict) -> None:
    if not distributed.first():
      return
    with open(self.path / "metrics.jsonl", "a") as file:
      file.write(json.dumps(row) + "\n")
    for name, value in tree.flatten(row).items() if self.board else ():
      if name not in ("stage", "step"):
        self.board.add_scalar(f"stage_{row['stage']}/{name}", value, row["step"])

  def truncate(self, stage: int, step: int) -> None:
    """Drops a stage's lines of metrics.jsonl that come after its checkpoint, and a last line that was cut."""
    path = self.path / "metrics.jsonl"
    if not path.exists() or not distributed.first():
      return
    kept = []
    for line in path.read_text().splitlines():
      with contextlib.suppress(ValueError):
        row = json.loads(line)
        if row["stage"] != stage or row["step"] <= step:
          kept.append(line + "\n")
    with atomic(path) as temporary:
      Path(temporary).write_text("".join(kept))
