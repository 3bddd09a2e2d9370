"""Tiny copies of TFDS's data sets, prepared by TFDS itself under their real names, versions and features.

Only the examples are invented: `_split_generators` is replaced, everything else is TFDS's own code, so that what a test
reads is laid out as users have it. Needs neither a network nor TensorFlow: TFRecord files are framed here.
"""
import functools
import io
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

# Leaf features whose values decide a derived label: drawn from these ranges, elsewhere from -1 to 1.
RANGES = {"pixel_coords": (6, 12), "location": (-2, 40)}
# Elements of a sequence, low to high; elsewhere 0 to 4.
LENGTHS = {"clevr/objects": (3, 10)}
SIDES = (40, 72)  # pixels of an image without a fixed size
NAMED = ("cifar100", "stanford_dogs")  # their class names come with the data, while it is prepared


def prepare(builder: str, data_dir: str | Path, counts: dict[str, int], file_format: str = "array_record",
            num_shards: int = 1, version: str | None = None, seed: int = 0,
            change: Callable[[str, int, dict], dict] | None = None) -> Path:
  """Prepares a copy with random examples; no two images and no two texts at the top level are alike.

  Args:
    builder: TFDS's name, "cifar100" or "domainnet/real".
    data_dir: gets <builder>/<version>/.
    counts: split -> number of examples, at least `num_shards` each.
    file_format: "array_record" or "tfrecord".
    version: what the folder and dataset_info.json shall say; default the version that TFDS has.
    change: (split, index, example) -> the example to store instead; for labels that a test chooses.

  Returns:
    The prepared folder, <data_dir>/<builder>/<version>.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import file_adapters

  def examples(made, split, count):
    rng = np.random.default_rng([seed, *f"{builder}/{split}".encode()])
    for i in range(count):
      example = {name: _value(feature, f"{made.name}/{name}", f"{split}_{i:05d}", rng)
                 for name, feature in made.info.features.items()}
      yield f"{split}{i}", change(split, i, example) if change else example

  with tempfile.TemporaryDirectory() as scratch:
    made = tfds.builder(builder, data_dir=scratch, file_format=file_format)
    if builder in NAMED:
      for name, feature in made.info.features.items():
        if isinstance(feature, tfds.features.ClassLabel):
          feature.names = [f"{name} {i}" for i in range(feature.num_classes)]
    made._split_generators = lambda *_, **__: {s: examples(made, s, n) for s, n in counts.items()}
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards, manual_dir=scratch)
    with (mock.patch.object(file_adapters.TfRecordFileAdapter, "write_examples", _write_tfrecord),
          mock.patch.object(sys, "stdout", io.StringIO()), mock.patch.object(sys, "stderr", io.StringIO())):
      made.download_and_prepare(download_config=config)
    folder = Path(data_dir) / builder / (version or str(made.version))
    shutil.copytree(made.data_dir, folder)
  if version:
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "version": version}))
  return folder


def _value(feature, path: str, stem: str, rng: np.random.Generator):
  """A random value for one feature, in a form that it encodes; `path` is dataset/name, `stem` tells examples apart."""
  import tensorflow_datasets as tfds

  kind, name = type(feature).__name__, path.split("/")[-1]
  if kind == "Image":
    return _image(feature, path, rng)
  if kind == "Text":
    return f"{stem}_{rng.integers(10**6)}.png"
  if kind == "ClassLabel":
    return int(rng.integers(feature.num_classes))
  if kind == "BBoxFeature":
    (top, bottom), (left, right) = np.sort(rng.random((2, 2))).tolist()
    return tfds.features.BBox(ymin=top, xmin=left, ymax=bottom, xmax=right)
  if kind == "Sequence":
    low, high = LENGTHS.get(path, (0, 4))
    inner = feature.feature.items()  # a dict of features, in all the sets at hand
    return [{k: _value(f, f"{path}/{k}", stem, rng) for k, f in inner} for _ in range(rng.integers(low, high + 1))]
  low, high = RANGES.get(name, (-1, 1))
  return rng.uniform(low, high, feature.shape).astype(np.float32)


def _image(feature, path: str, rng: np.random.Generator) -> bytes:
  """Random squares of 8 pixels, encoded as the data set's own images are or may be; dSprites has 0 and 1 only."""
  height, width = (side or int(rng.integers(*SIDES)) for side in feature.shape[:2])
  channels = feature.shape[2]
  top = 2 if path.startswith("dsprites/") else 256
  blocks = rng.integers(0, top, (-(-height // 8), -(-width // 8), channels), np.uint8)
  pixels = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
  photograph = channels == 3 and None in feature.shape
  file = io.BytesIO()
  Image.fromarray(pixels if channels == 3 else pixels[:, :, 0]).save(file, "JPEG" if photograph else "PNG")
  return file.getvalue()


def _write_tfrecord(path, iterator: Iterable[tuple[object, bytes]]) -> None:
  """In place of TFDS's writer, which needs TensorFlow."""
  Path(path).write_bytes(b"".join(frame(example) for _, example in iterator))


def frame(data: bytes) -> bytes:
  """One record of a TFRecord file: its length and its data, each followed by its masked checksum."""
  length = struct.pack("<Q", len(data))
  return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def _masked(data: bytes) -> int:
  table, crc = _table(), 0xFFFFFFFF
  for byte in data:
    crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _table() -> tuple[int, ...]:
  """CRC-32C (Castagnoli), reflected polynomial 0x82F63B78, byte by byte; the reader under test has its own way."""
  table = []
  for byte in range(256):
    for _ in range(8):
      byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    table.append(byte)
  return tuple(table)
