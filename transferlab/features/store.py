"""The activation cache on disk: a folder per split of images, a file per activation, rows in the split's order.

    FOLDER/<key>/header.json           what the activations are of, and how many rows of each stand
    FOLDER/<key>/<site>-<how>-….npy    [N, …], float32, or the bits of bfloat16 as uint16

Files grow by shards of rows. A shard counts once its bytes are on the disk and the header, which is replaced as a
whole, holds its checksum. So a writer that was killed has lost one shard at most; what it wrote beyond is overwritten.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from transferlab.files import write_json

SHARD = 512  # rows
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}


class Column(NamedTuple):
  """One kept activation.

  Fields:
    site, how: which, see `method.Read`; methods that read the same share it.
    shape: of one row.
  """
  site: str
  how: str
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    """The file's, without its ending."""
    digest = hashlib.sha256(f"{self.site}\t{self.how}".encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', f'{self.site}-{self.how}')[:60]}-{digest}"


def key(identity: dict) -> str:
  """16 hex digits of what activations are of."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Store:
  """The activations of `rows` images.

  Args:
    folder: of the whole cache.
    identity: plain data that says what the activations are of; another identity is another store.
    dtype: "float32" or "bfloat16", part of the identity.

  Raises:
    ValueError: what lies there is damaged.
  """

  def __init__(self, folder, identity: dict, rows: int, dtype: str):
    self.identity = json.loads(json.dumps(identity))  # as it will be read back
    self.path, self.rows, self.dtype = Path(folder) / key(identity), rows, DTYPES[dtype]
    self.disk_dtype = np.dtype(np.uint16) if dtype == "bfloat16" else self.dtype
    self.refresh()

  def refresh(self) -> None:
    """Reads the header again: another process may have written."""
    file = self.path / "header.json"
    header = {"shard": SHARD, "columns": {}}
    if file.exists():
      try:
        header = json.loads(file.read_text())
        if (header["of"], header["rows"]) != (self.identity, self.rows) or not (
            isinstance(header["shard"], int) and header["shard"] >= 1) or not all(
            isinstance(sums, list) for sums in header["columns"].values()):
          raise ValueError
      except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: found another header than this cache had; {self._remedy()}") from None
    self.shard, self.sums = header["shard"], header["columns"]

  def _remedy(self) -> str:
    return f"delete {self.path} and run again, it is then written anew"

  def standing(self, column: Column) -> int:
    """Rows of a column that stand."""
    return min(self.rows, self.shard * len(self.sums.get(column.name, ())))

  def missing(self, columns: Iterable[Column]) -> list[Column]:
    """The columns that are not whole."""
    return [column for column in columns if self.standing(column) < self.rows]

  def bytes(self, columns: Iterable[Column]) -> int:
    """Of one row of these columns."""
    return sum(int(np.prod(column.shape)) for column in columns) * self.dtype.itemsize

  def open(self, column: Column) -> np.ndarray:
    """A whole column [N, …], mapped from its file; its bytes are read when they are used.

    Raises:
      ValueError: it is not whole yet, or the file is short or another one.
    """
    file, shape = self._file(column), (self.rows, *column.shape)
    if self.missing([column]):
      raise ValueError(f"{file} has {self.standing(column)} of {self.rows} rows; write the others first, with "
                       "`transferlab features`")
    try:
      found = np.lib.format.open_memmap(file, mode="r")
      what = f"{found.dtype} {list(found.shape)} in {file.stat().st_size} bytes"
    except (OSError, ValueError) as error:
      found, what = None, " ".join(str(error).split())
    if found is None or (found.shape, found.dtype) != (shape, self.disk_dtype) or not found.flags.c_contiguous:
      raise ValueError(f"{file} is damaged: found {what}; expected {self.disk_dtype} {list(shape)}; {self._remedy()}")
    return np.asarray(found).view(self.dtype)

  def check(self, column: Column, values: np.ndarray) -> None:
    """Raises `ValueError` if the bytes of a whole column are not those that were written."""
    for number, wanted in enumerate(self.sums[column.name]):
      if zlib.crc32(_bits(values[self.shard * number:self.shard * (number + 1)])) != wanted:
        raise ValueError(f"{self._file(column)} is damaged: rows from {self.shard * number} on have another checksum "
                         f"than when they were written; {self._remedy()}")

  def _file(self, column: Column) -> Path:
    return self.path / f"{column.name}.npy"

  @contextlib.contextmanager
  def writer(self, columns: list[Column]):
    """Yields a `Writer` that goes on where the first of the columns ends; one process writes at a time."""
    self.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      lock = stack.enter_context(open(self.path / "lock", "w"))
      with contextlib.suppress(ImportError):  # Windows has none: there, write from one process
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process that holds it
      self.refresh()
      yield Writer(self, self.missing(columns), stack)

  def commit(self, sums: dict[str, int]) -> None:
    """Adds a shard's checksums to the header."""
    for name, value in sums.items():
      self.sums.setdefault(name, []).append(value)
    write_json(self.path / "header.json",
               {"of": self.identity, "rows": self.rows, "shard": self.shard, "columns": self.sums})


class Writer:
  """Appends rows to columns of a store.

  Attributes:
    columns: those that were still missing once no other process wrote.
    done: rows that stand in all of them; the next rows are `append`ed from here.
  """

  def __init__(self, store: Store, columns: list[Column], stack: contextlib.ExitStack):
    self.store, self.columns = store, columns
    self.done = min((store.standing(column) for column in columns), default=store.rows)
    self.files, self.sums = {}, {}
    for column in columns:
      store.sums[column.name] = store.sums.get(column.name, [])[:self.done // store.shard]
    store.commit({})  # before files are cut
    for column in columns:
      self.files[column.name] = stack.enter_context(self._at_the_end(column))
      self.sums[column.name] = 0

  def _at_the_end(self, column: Column):
    store = self.store
    path, descr = store._file(column), np.lib.format.dtype_to_descr(store.disk_dtype)
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        start, {"descr": descr, "fortran_order": False, "shape": (store.rows, *column.shape)})
    end = len(start.getvalue()) + self.done * store.bytes([column])
    if self.done and (not path.exists() or path.stat().st_size < end):
      raise ValueError(f"{path} is damaged: it ends before row {self.done}; {store._remedy()}")
    file = open(path, "r+b" if self.done else "wb")
    file.write(start.getvalue())
    file.seek(end)
    return file

  def append(self, values: dict[str, np.ndarray]) -> None:
    """The next rows of every column, {name: [n, …]}."""
    count = len(next(iter(values.values())))
    start = 0
    while start < count:
      stop = min(count, start + self.store.shard - self.done % self.store.shard)
      for name, rows in values.items():
        bits = _bits(rows[start:stop])
        self.files[name].write(bits)
        self.sums[name] = zlib.crc32(bits, self.sums[name])
      self.done += stop - start
      start = stop
      if self.done % self.store.shard == 0 or self.done == self.store.rows:
        self._commit()

  def _commit(self) -> None:
    for file in self.files.values():
      file.flush()
      os.fsync(file.fileno())
    self.store.commit(self.sums)
    self.sums = dict.fromkeys(self.sums, 0)


def _bits(rows: np.ndarray) -> memoryview:
  return np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data
