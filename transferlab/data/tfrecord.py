"""TFRecord files without TensorFlow: where each record lies, and its bytes, checked.

A file is a row of records: the length of the data as 8 bytes, a checksum of these, the data, a checksum of the data;
little-endian. The checksums are CRC-32C, rotated and shifted by a constant (tensorflow/core/lib/io/record_writer.h).
Both are checked, always: a flipped bit in a label would train on without a sign.
"""
import functools
import os
import struct

import numpy as np

from transferlab.data.tasks import DataError

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed
_WIDTH = 512  # bytes that one pass of `crc32c` takes together; its tables then fit a core's cache


def index(path: str | os.PathLike) -> np.ndarray:
  """Where the data of each record starts and how many bytes it has, int64 [N, 2], by a walk over the lengths alone.

  Raises `DataError` for a file that is missing, cut short, or damaged in a length.
  """
  found, position, size = [], 0, _size(path)
  with open(path, "rb", buffering=4096) as file:
    while position < size:
      file.seek(position)
      head = file.read(12)
      length, crc = struct.unpack("<QI", head) if len(head) == 12 else (size, 0)
      if len(head) == 12 and crc != _masked(head[:8]):
        raise DataError(f"{path}: the length of record {len(found)} is damaged (its checksum differs); {_AGAIN}")
      if position + 16 + length > size:
        raise DataError(f"{path}: cut short in record {len(found)}, after {size} bytes; {_AGAIN}")
      found.append((position + 12, length))
      position += 16 + length
  return np.array(found, np.int64).reshape(-1, 2)


def read(path: str | os.PathLike, record: int, start: int, length: int) -> bytes:
  """The data of one record of an `index`; raises `DataError` that names the file and the record if it is damaged."""
  try:
    with open(path, "rb", buffering=0) as file:
      content = os.pread(file.fileno(), length + 4, start)
  except OSError as e:
    raise DataError(f"{path}: record {record} cannot be read ({e.strerror}); {_AGAIN}") from None
  data, crc = content[:length], content[length:]
  if len(crc) < 4:
    raise DataError(f"{path}: cut short in record {record}; {_AGAIN}")
  if struct.unpack("<I", crc)[0] != _masked(data):
    raise DataError(f"{path}: record {record} is damaged (the checksum of its {length} bytes differs); {_AGAIN}")
  return data


_AGAIN = "copy the file again, or prepare the data set again"


def _size(path: str | os.PathLike) -> int:
  try:
    return os.path.getsize(path)
  except OSError as e:
    raise DataError(f"{path}: cannot be read ({e.strerror}); {_AGAIN}") from None


def _masked(data: bytes) -> int:
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
  """CRC-32C (RFC 3720) in numpy, about 1 ms for 200 kB: no package at hand offers it.

  A checksum is linear: the remainder of 512 bytes is the exclusive or of one table entry per byte, which numpy looks up
  for all bytes at once. Only the step from one row of 512 bytes to the next is taken one after another.
  """
  if len(data) < 32:
    crc = 0xFFFFFFFF
    for byte in data:
      crc = _bytewise()[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
  table, offsets, (a, b, c, d) = _tables()
  padded = np.zeros(-(-len(data) // _WIDTH) * _WIDTH, np.uint8)  # zeros in front leave a remainder of zero as it is
  padded[-len(data):] = np.frombuffer(data, np.uint8)
  padded[-len(data):][:4] ^= 0xFF  # the same as starting with all bits set
  rows = padded.reshape(-1, _WIDTH) + offsets
  crc = 0
  for remainder in np.bitwise_xor.reduce(table[rows], axis=1).tolist():
    crc = remainder ^ a[crc & 0xFF] ^ b[crc >> 8 & 0xFF] ^ c[crc >> 16 & 0xFF] ^ d[crc >> 24]
  return crc ^ 0xFFFFFFFF


@functools.cache
def _bytewise() -> list[int]:
  """Remainder of each byte."""
  table = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    table = np.where(table & 1, table >> 1 ^ _POLYNOMIAL, table >> 1)
  return table.tolist()


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
  """Remainders uint32 [512 * 256] of each byte at each place of a row, where places start, the first four places."""
  step = np.array(_bytewise(), np.uint32)
  table = np.empty((_WIDTH, 256), np.uint32)
  table[-1] = step
  for place in range(_WIDTH - 2, -1, -1):  # one more zero byte behind it
    table[place] = table[place + 1] >> 8 ^ step[table[place + 1] & 0xFF]
  return table.ravel(), np.arange(_WIDTH) * 256, table[:4].tolist()
