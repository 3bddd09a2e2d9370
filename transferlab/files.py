"""Files written whole or not at all."""
import contextlib
import json
import os
import tempfile
from pathlib import Path


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
