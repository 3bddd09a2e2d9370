"""What a published data set was when it was last checked, kept beside it in `<data_dir>/.transferlab/<task>.json`.

A set that has changed since (an update, a lost file, images written anew) is noticed by `transferlab data check`, and a
change of its examples also when the task is opened. Forms of a set are recorded apart, under their format.
"""
import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from transferlab.data.tasks import DataError, Split
from transferlab.files import write_json

FOLDER = ".transferlab"


@dataclass(frozen=True)
class Part:
  """Number of images, `Split.hash()`, and `Split.fingerprint()` or "" where the pixels were not read."""
  count: int
  hash: str
  pixels: str = ""


@dataclass(frozen=True)
class Record:
  """A set at one time.

  Attributes:
    source: "array_record dtd:3.0.1".
    hash: over all parts.
    parts: by name.
    date: of the check, UTC.
    library: version of transferlab that made it.
  """
  source: str
  hash: str
  parts: Mapping[str, Part]
  date: str = ""
  library: str = ""

  def stamped(self) -> "Record":
    """With today's date and this library's version."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Record(self.source, self.hash, self.parts, today, metadata.version("transferlab"))


def path(data_dir: Path, task: str) -> Path:
  """Where the record of a task lies."""
  return data_dir / FOLDER / f"{task.replace('/', '__')}.json"


def read(data_dir: Path, task: str, form: str) -> Record | None:
  """The record of a task in one format, None if there is none. Raises `DataError` if the file is not one."""
  value = _read(path(data_dir, task)).get(form)
  try:
    return value and Record(**{**value, "parts": {name: Part(**part) for name, part in value["parts"].items()}})
  except (TypeError, KeyError, AttributeError):
    raise _unreadable(path(data_dir, task), f"{form} has other fields") from None


def write(data_dir: Path, task: str, form: str, record: Record) -> str:
  """Keeps a record, beside those of other formats; returns a remark if nothing can be written there."""
  file = path(data_dir, task)
  try:
    others = _read(file)
  except DataError:
    others = {}
  try:
    file.parent.mkdir(exist_ok=True)
    write_json(file, {**others, form: asdict(record)})
  except (OSError, ValueError) as error:
    return f"not recorded, so that changes go unnoticed ({' '.join(str(error).split())})"
  return ""


def differences(old: Mapping[str, Part], new: Mapping[str, Part]) -> list[str]:
  """A few words on each part that is in both and not the same."""
  found = []
  for name in (name for name in new if name in old):
    was, now = old[name], new[name]
    if was.count != now.count:
      found.append(f"{name} has {now.count} images, had {was.count}")
    elif was.hash != now.hash:
      found.append(f"{name} hash is {now.hash}, was {was.hash}")
    elif was.pixels and now.pixels and was.pixels != now.pixels:
      found.append(f"{name} pixels are {now.pixels}, were {was.pixels}")
  return found


def refuse_changed(data_dir: Path, task: str, form: str, splits: Mapping[str, Split]) -> None:
  """Raises `DataError` if parts (name -> split) have other examples than at the last check; reads no image."""
  if (old := read(data_dir, task, form)) is None:
    return
  changes = differences(old.parts, {name: Part(len(split), split.hash()) for name, split in splits.items()})
  if changes:
    raise DataError(f"{task} in {data_dir} has changed since {old.date}: {'; '.join(changes)}; {mend(data_dir, task)}")


def mend(data_dir: Path, task: str) -> str:
  """What to do about a set that has changed."""
  return f"restore it, or if that was meant: transferlab data check {task} --data_dir={data_dir} --accept"


def _read(file: Path) -> dict:
  try:
    value = json.loads(file.read_text("utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (OSError, ValueError) as error:
    raise _unreadable(file, " ".join(str(error).split())) from None
  if not isinstance(value, dict):
    raise _unreadable(file, f"it holds a {type(value).__name__}")
  return value


def _unreadable(file: Path, why: str) -> DataError:
  return DataError(f"the record {file} cannot be read ({why}); expected one that `transferlab data check` wrote; "
                   "delete it and check the set again")
