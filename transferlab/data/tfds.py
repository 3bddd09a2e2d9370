"""Sets that TensorFlow Datasets has prepared, read without TensorFlow and without a network.

`<data_dir>/<builder>/<version>/` holds dataset_info.json, features.json, names of labels, and the shards of each split,
as array_record or as TFRecord. Either gives a record's bytes, TFDS turns them into features; so both forms give the
same examples in the same order, those of `tfds.data_source`. Images stay encoded until a split reads them: labels come
at thousands a second.
"""
import bisect
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from transferlab.data import tfrecord
from transferlab.data.entries import Source
from transferlab.data.files import decode
from transferlab.data.tasks import DataError, Split, some
from transferlab.data.tfds_info import Info
from transferlab.data.tfds_info import find as find
from transferlab.data.tfds_info import sizes as sizes

OPEN_FILES = 256  # of one split in one process; ImageNet has 1,024, as many as a process may usually open


def class_names(source: Source, feature: str = "label") -> tuple[str, ...]:
  """Names by label, as stored beside the shards; "0", "1", ... where the set has none."""
  features = _features(source.path)
  if feature not in features or not hasattr(features[feature], "names"):
    raise DataError(f"{source.path} has no labels {feature!r}; found {some(sorted(features))}; is it another version?")
  return tuple(features[feature].names)


def records(source: Source, split: str) -> "Records":
  """The examples of one TFDS split; raises `DataError` if there is no such split or no file is where it should be."""
  if source.problem:
    raise DataError(source.problem)
  info = Info.read(source.path)
  if split not in info.shards:
    raise DataError(f"{source} in {source.path} has no split {split!r}; found {some(info.shards)}; prepare it again")
  return Records(os.fspath(source.path), source.format, split, info.files(source.format, split), info.shards[split])


class Records(Sequence):
  """Examples of one split in file order, as dicts of features with images as encoded bytes; row -> dict.

  Files are opened at the first use, in each process anew. Reading raises `DataError` that names the file and the
  record if they are missing, cut short or damaged.
  """

  def __init__(self, folder: str, format: str, split: str, files: tuple[str, ...], lengths: tuple[int, ...]):
    self.folder, self.format, self.split = folder, format, split
    self._files, self._lengths, self._ends = files, lengths, tuple(accumulate(lengths))
    self._opened = None, None

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, row: int) -> dict:
    shard, record = self._place(row)
    process, reader = self._opened
    if process != os.getpid():  # none yet, or a parent's, whose threads do not survive a fork
      reader = _Reader(self.folder, self.format)
      self._opened = os.getpid(), reader
    try:
      return reader(self._files[shard], self._lengths[shard], record)
    except DataError:
      raise
    except Exception as e:  # noqa: BLE001  the C++ reader, protobuf and TFDS raise errors of many types on damaged data
      raise DataError(f"{self.where(row)} cannot be read ({' '.join(str(e).split())[:200] or type(e).__name__}); "
                      "copy the file again, or prepare the data set again") from None

  def where(self, row: int) -> str:
    """File and number of an example, for messages."""
    shard, record = self._place(row)
    return f"{self._files[shard]}: record {record}"

  def _place(self, row: int) -> tuple[int, int]:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    shard = bisect.bisect_right(self._ends, row)
    return shard, row - (self._ends[shard] - self._lengths[shard])

  def __getstate__(self) -> dict:
    return {**self.__dict__, "_opened": (None, None)}


class _Reader:
  """(path of a shard, how many records it should have, which one) -> its features."""

  def __init__(self, folder: str, format: str):
    import tensorflow_datasets as tfds
    self._features = _features(folder)
    self._undecoded = {name: tfds.decode.SkipDecoding() for name, feature in self._features.items()
                       if isinstance(feature, tfds.features.Image)}
    # TFRecord files are not held open, and their index is small.
    self._open = {"array_record": functools.lru_cache(OPEN_FILES)(_array_record),
                  "tfrecord": functools.cache(_tfrecord)}[format]

  def __call__(self, path: str, length: int, record: int) -> dict:
    found, read = self._open(path)
    if found != length:  # past its end, array_record reads empty records without a word
      raise DataError(f"{path} has {found} records; dataset_info.json expects {length}; copy the folder again, or "
                      "prepare the data set again")
    example = self._features.deserialize_example_np(read(record), decoders=self._undecoded)
    if lacking := sorted(name for name, value in example.items() if value is None):
      raise ValueError(f"it lacks {some(lacking)}")
    return example


def _array_record(path: str) -> tuple[int, Callable[[int], bytes]]:
  """How many records a file has, and a function that reads one."""
  from array_record.python.array_record_module import ArrayRecordReader
  reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
  if not reader.num_records():
    reader.read([0])  # raises what is wrong with the file, which opening does not
  return reader.num_records(), lambda record: reader.read([record])[0]


def _tfrecord(path: str) -> tuple[int, Callable[[int], bytes]]:
  """As `_array_record`."""
  places = tfrecord.index(path)
  return len(places), lambda record: tfrecord.read(path, record, *places[record].tolist())


def examples(source: Source, split: str, rows: Sequence[int] | range, name: str, label: Callable[[dict], int],
             key: str | None, image: str = "image", scale: int = 1) -> Split:
  """A `Split` of some rows of a TFDS split. Labels and keys are read now, pixels as needed.

  Args:
    rows: positions in file order, the order that TFDS's own slices such as train[:800] go by.
    name: of the new split.
    label: features of an example -> class.
    key: text feature that tells examples apart within their TFDS split; None takes checksums of the images (see
      `_checksum`), for sets without one.
    image: feature with the image; grey becomes RGB.
    scale: pixels are multiplied by it, up to 255.

  Raises:
    DataError: a missing or damaged file, a row beyond the end, a feature that is not there.
  """
  found, rows = records(source, split), np.asarray(rows, np.int64)
  if len(rows) and not 0 <= rows.min() <= rows.max() < len(found):
    raise DataError(f"{source} in {source.path} has {len(found)} examples in {split!r}; rows {rows.min()} to "
                    f"{rows.max()} are wanted; complete the data set")
  keys, labels = [], []
  for row in rows.tolist():
    example = found[row]
    try:
      labels.append(int(label(example)))
      keys.append(_checksum(example[image], found.where(row)) if key is None else f"{split}/{_text(example[key])}")
    except KeyError as e:
      raise DataError(f"{found.where(row)} has no feature {e}; found {some(sorted(example))}; "
                      "is it another version?") from None
  return Split(name, tuple(keys), np.array(labels, np.int32), _Images(found, rows, image, scale))


def stored_label(example: Mapping, feature: str = "label") -> int:
  """A label as the set has it, for `examples`."""
  return int(example[feature])


def concatenate(name: str, *splits: Split) -> Split:
  """One split after the other."""
  domains = None if any(split.domains is None for split in splits) else np.concatenate([s.domains for s in splits])
  ends = tuple(accumulate(map(len, splits)))
  return Split(name, tuple(key for split in splits for key in split.keys), np.concatenate([s.labels for s in splits]),
               _Joined(tuple(split.read for split in splits), ends), domains, all(split.verified for split in splits))


@dataclass(frozen=True)
class _Images:
  """Row i is the image of record `rows[i]`."""
  records: Records
  rows: np.ndarray
  image: str
  scale: int

  def __call__(self, row: int) -> np.ndarray:
    row = int(self.rows[row])
    pixels = decode(self.records.where(row), self.records[row][self.image])  # [H, W, 3]
    return pixels if self.scale == 1 else np.minimum(pixels.astype(np.int64) * self.scale, 255).astype(np.uint8)


@dataclass(frozen=True)
class _Joined:
  """Row i of several readers, one after the other, that end before the rows `ends`."""
  reads: tuple[Callable[[int], np.ndarray], ...]
  ends: tuple[int, ...]

  def __call__(self, row: int) -> np.ndarray:
    part = bisect.bisect_right(self.ends, row)
    return self.reads[part](row - (self.ends[part - 1] if part else 0))


def _checksum(content: bytes, where: str) -> str:
  """A key made of the image. TFDS stores JPEG files as they came; PNG files are often its own, and then their bytes
  depend on who wrote them while their pixels do not (a JPEG's pixels in turn depend on the decoder, and take long).
  """
  if content.startswith(b"\xff\xd8"):
    return f"jpeg:{hashlib.sha256(content).hexdigest()[:16]}"
  pixels = decode(where, content)
  return f"pixels:{hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]}"


def _text(value: bytes | str | int) -> str:
  return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _features(folder: str | Path):
  """TFDS's features of a prepared folder. TFDS imports the classes that are named there: only its own are let in."""
  import tensorflow_datasets as tfds

  def check(node: dict) -> dict:
    for name in map(node.get, ("pythonClassName", "python_class_name", "type")):
      if isinstance(name, str) and "." in name and not name.startswith("tensorflow_datasets."):
        raise ValueError(f"{name!r} is no feature of TFDS")
    return node

  try:
    for file in ("features.json", "dataset_info.json"):  # the second may describe features too
      json.loads((Path(folder) / file).read_text("utf-8"), object_hook=check)
    return tfds.builder_from_directory(os.fspath(folder)).info.features
  except Exception as e:  # noqa: BLE001  TFDS raises errors of many types on a damaged description
    raise DataError(f"{folder}: its description by TFDS cannot be read ({' '.join(str(e).split())[:200]}); copy "
                    "features.json and dataset_info.json again, or prepare the set again") from None
