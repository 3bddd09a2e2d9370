"""Files written whole or not at all."""
import contextlib
import json
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def atomic(path):
  """Yields a temporary path beside `path` that replaces it only when the block ends well."""
  path = Path(path)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
  with atomic(path) as temporary:
    Path(temporary).write_text(json.dumps(value, indent=1) + "\n")
