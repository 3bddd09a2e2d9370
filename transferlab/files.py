"""Files written whole or not at all, and folders of files that are known to be whole."""
import contextlib
import json
import os
import tempfile
import zlib
from pathlib import Path

SEAL = "whole.json"


@contextlib.contextmanager
def atomic(path):
  """Yields a temporary path beside `path` that replaces it only when the block ends well.

  Raises:
    ValueError: nothing can be written there.
  """
  path = Path(path)
  if path.is_dir():
    raise ValueError(f"cannot write {path}: it is a folder; give the name of a file")
  try:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  except OSError as error:
    raise ValueError(f"cannot write {path} ({error.strerror}); give a path in a folder that exists and that you may "
                     "write to") from None
  os.close(handle)
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)


def write_json(path, value) -> None:
  """Writes plain data as JSON, whole or not at all."""
  with atomic(path) as temporary:
    Path(temporary).write_text(json.dumps(value, indent=1) + "\n")


def seal(folder) -> None:
  """Notes size and CRC-32 of every file below a folder in its `whole.json`, the last file to be written there: a folder
  without it was interrupted."""
  folder = Path(folder)
  files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
  write_json(folder / SEAL, {path.relative_to(folder).as_posix(): _measured(path) for path in files})


def flaw(folder) -> str:
  """What is wrong with a folder that should be sealed, "" if nothing: all its files have the bytes they were left with.

  Raises:
    OSError: a file is there and cannot be read.
  """
  folder = Path(folder)
  try:
    known = json.loads((folder / SEAL).read_bytes())
    for name, wanted in known.items():
      found = _measured(folder / name)
      if found[0] != wanted[0]:
        return f"{name} has {found[0]} bytes, expected {wanted[0]}"
      if found != wanted:
        return f"the bytes of {name} have changed"
  except FileNotFoundError as error:
    name = Path(error.filename).relative_to(folder).as_posix()
    return "it was interrupted" if name == SEAL else f"{name} is missing"
  except (ValueError, AttributeError, TypeError, LookupError):
    return f"{SEAL} is damaged"
  return ""


def _measured(path: Path) -> list[int]:
  """[bytes, CRC-32] of a file."""
  size = crc = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 20):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]
