"""TFRecord files: found, read, and every kind of damage named."""
import numpy as np
import pytest
from fake_tfds import frame

from transferlab.data import tfrecord
from transferlab.data.tasks import DataError

DATA = [b"", b"a", b"label 3", bytes(range(256)) * 5, b"\xff" * 511, b"\x00" * 512, b"last" * 200]


@pytest.fixture
def path(tmp_path):
  (tmp_path / "file").write_bytes(b"".join(map(frame, DATA)))
  return tmp_path / "file"


@pytest.mark.parametrize("data, crc", [  # RFC 3720, B.4, and the usual check value
    (b"123456789", 0xE3069283), (b"\x00" * 32, 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C), (b"", 0)])
def test_checksums_are_the_published_ones(data, crc):
  assert tfrecord.crc32c(data) == crc


def test_checksums_equal_those_taken_bit_by_bit():
  rng = np.random.default_rng(0)
  for size in [*range(0, 70), 511, 512, 513, 1023, 1024, 1025, 3000]:
    data, crc = rng.bytes(size), 0xFFFFFFFF
    for byte in data:
      crc ^= byte
      for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert tfrecord.crc32c(data) == crc ^ 0xFFFFFFFF, size


def test_records_come_back_in_any_order(path):
  index = tfrecord.index(path)
  assert index.shape == (len(DATA), 2) and index.dtype == np.int64
  for record in (6, 0, 3, 5, 1, 4, 2):
    assert tfrecord.read(path, record, *index[record]) == DATA[record]


def test_an_empty_file_has_no_records(tmp_path):
  (tmp_path / "empty").write_bytes(b"")
  assert tfrecord.index(tmp_path / "empty").shape == (0, 2)


def test_any_flipped_bit_is_found_and_its_record_named(path):
  """Whichever byte of record 2 or 3 is damaged: its length, a checksum, its data."""
  content, start, end = path.read_bytes(), 16 + 17, 16 + 17 + 16 + len(DATA[2]) + 16 + len(DATA[3])
  second = start + 16 + len(DATA[2])
  for at in [*range(start, second + 40), *range(second + 40, end, 61), end - 1]:
    damaged = bytearray(content)
    damaged[at] ^= 1 << at % 8
    path.write_bytes(damaged)
    record = 2 if at < second else 3
    with pytest.raises(DataError, match=rf"file.*record {record} .*(damaged|cut short)|cut short in record {record}"):
      for row, place in enumerate(tfrecord.index(path)):
        tfrecord.read(path, row, *place)


def test_a_file_cut_short_anywhere_is_found(path):
  content = path.read_bytes()
  ends = np.cumsum([len(frame(data)) for data in DATA])
  for size in set(range(0, len(content), 41)) - set(ends.tolist()) - {0}:
    path.write_bytes(content[:size])
    record = np.searchsorted(ends, size)
    with pytest.raises(DataError, match=rf"cut short in record {record}, after {size} bytes; copy"):
      tfrecord.index(path)


def test_a_file_that_is_gone_or_shrank_since_is_named(path):
  index = tfrecord.index(path)
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(DataError, match="cut short in record 6"):
    tfrecord.read(path, 6, *index[6])
  path.unlink()
  with pytest.raises(DataError, match="record 6 cannot be read .No such file"):
    tfrecord.read(path, 6, *index[6])
  with pytest.raises(DataError, match="file: cannot be read .No such file"):
    tfrecord.index(path)
