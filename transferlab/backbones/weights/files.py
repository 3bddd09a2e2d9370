"""Checkpoint files read without executing anything: `.npz` and `.safetensors`; `torch_files.py` has `.pth`.

Neither format needs pickle, and no array that would need it is read. A size that a file claims is compared with what
the file holds before memory is taken; checksums are verified where the format has them (`.npz`), finiteness everywhere.
Every way in which a file can be bad ends in one line of `WeightsError`: what was found, what was expected, what to do.
"""
import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from transferlab.files import atomic

MAX_BYTES = 32 << 30    # of one file's arrays: four times ViT-G/14 in float32
MAX_EXPANSION = 64      # a compressed file may grow this much; weights compress by 1.1, a zero head by much more
MAX_JSON_BYTES = 64 << 20

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (zipfile.BadZipFile, zlib.error, safetensors.SafetensorError, EOFError, OSError, ValueError, RuntimeError,
           NotImplementedError, SyntaxError, MemoryError, OverflowError)


class WeightsError(ValueError):
  """Weights that cannot be used, in one line: what was found, what was expected, what to do."""


@contextlib.contextmanager
def reading(path: Path, kind: str):
  """Turns what a damaged file makes of the code inside into one line about that file."""
  try:
    yield
  except WeightsError:
    raise
  except _DAMAGE as error:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    raise WeightsError(f"{path.name} ({path.stat().st_size} bytes) is not a readable {kind} file: {reason}. It is cut, "
                       "damaged or of another kind: fetch it again and compare its size with the source's") from error


def read_npz(path, select: Callable[[list[str]], dict[str, str]] = lambda names: {n: n for n in names}):
  """Reads arrays of an `.npz` file.

  Args:
    path: the file.
    select: all names in the file -> {name in the file: name to return}; arrays that it leaves out are not read.

  Returns:
    {name: array of the file's shape}, float32 for any float; integers (counters) stay as they are.

  Raises:
    WeightsError: the file is cut or damaged, claims sizes it does not hold, or holds objects.
  """
  path = Path(path)
  with reading(path, "npz"), zipfile.ZipFile(path) as archive:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) != len(archive.infolist()) or not all(i.filename.endswith(".npy") for i in members.values()):
      raise WeightsError(f"{path.name} is a zip archive but not an npz file: expected only .npy members, each name "
                         f"once; found {', '.join(i.filename for i in archive.infolist()[:3])}")
    wanted = select(list(members))
    claimed, size = sum(members[name].file_size for name in wanted), path.stat().st_size
    if claimed > min(MAX_BYTES, max(1 << 30, MAX_EXPANSION * size)):
      raise WeightsError(f"{path.name} has {size} bytes and claims to unpack to {claimed}; refused as implausible")
    return {short: numbers(short, _read_member(archive, members[name], path.name)) for name, short in wanted.items()}


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: str) -> np.ndarray:
  with archive.open(member) as stream:
    version = np.lib.format.read_magic(stream)
    if version not in _NPY_HEADERS:
      raise WeightsError(f"{file}: {member.filename} has npy version {version}; expected 1.0 or 2.0")
    shape, column_major, dtype = _NPY_HEADERS[version](stream)
    if dtype.hasobject:
      raise WeightsError(f"{file}: {member.filename} holds Python objects; reading them could run code. Refused: "
                         "expected arrays of floating-point numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or nbytes > member.file_size:
      raise WeightsError(f"{file}: {member.filename} claims shape {list(shape)} of {dtype} ({nbytes} bytes) but holds "
                         f"at most {member.file_size}; the header is wrong: fetch the file again")
    data = stream.read()  # to the end, which is where zipfile compares the checksum
  if len(data) != nbytes:
    raise WeightsError(f"{file}: {member.filename} holds {len(data)} bytes; its shape {list(shape)} of {dtype} needs "
                       f"{nbytes}")
  return np.frombuffer(data, dtype).reshape(shape, order="F" if column_major else "C")


def numbers(name: str, array: np.ndarray) -> np.ndarray:
  """Any floats as float32, integers untouched; objects, empty arrays and numbers that are not finite are refused."""
  if array.dtype == np.dtype("V2"):  # how numpy stores bfloat16, which it does not know: the upper half of a float32
    array = (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  if array.size and array.dtype.kind in "iub":
    return array
  if not array.size or (array.dtype.kind != "f" and array.dtype.name != "bfloat16"):
    raise WeightsError(f"{name} holds {array.dtype} {list(array.shape)}; expected floating-point numbers")
  with np.errstate(over="ignore"):
    array = np.asarray(array, np.float32)
  if not np.isfinite(array).all():
    raise WeightsError(f"{name} {list(array.shape)} has numbers that are not finite in float32; the file is damaged or "
                       "was saved from a run that diverged")
  return array


def read_safetensors(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads a `.safetensors` file: ({name: array}, its header's metadata); arrays and errors as `read_npz`."""
  path = Path(path)
  arrays = {}
  with reading(path, "safetensors"), safetensors.safe_open(path, framework="np") as file:
    for name in file.keys():
      try:
        array = file.get_tensor(name)
      except (AttributeError, TypeError) as error:  # a dtype that numpy lacks, such as 8-bit floats
        dtype = file.get_slice(name).get_dtype()
        raise WeightsError(f"{name} holds {dtype}; expected 16-, 32- or 64-bit floats") from error
      arrays[name] = numbers(name, array)
    return arrays, dict(file.metadata() or {})


def read_sharded(index) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads the shards that a `model.safetensors.index.json` names, all in its own folder; as `read_safetensors`."""
  index = Path(index)
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise WeightsError(f"{index.name} has no weight_map; expected {{parameter: shard file}}")
  arrays = {}
  for shard in sorted(set(map(str, where.values()))):
    if Path(shard).name != shard or not shard.endswith(".safetensors"):
      raise WeightsError(f"{index.name} points to {shard!r}; expected a .safetensors file in the same folder")
    if not (index.parent / shard).is_file():
      raise WeightsError(f"{index.name} names {shard}, which is not in the folder; fetch all shards")
    found, _ = read_safetensors(index.parent / shard)
    if wrong := [name for name in found if where.get(name) != shard]:
      raise WeightsError(f"{shard} holds {wrong[0]}, which {index.name} does not place there: files of two versions")
    arrays |= found
  if missing := [name for name in where if name not in arrays]:
    raise WeightsError(f"{index.name} lists {missing[0]} and {len(missing) - 1} more that no shard holds; fetch the "
                       "shards again")
  return arrays, {}


def read_json(path) -> dict:
  """A JSON object from a file; WeightsError when it is none."""
  path = Path(path)
  if path.stat().st_size > MAX_JSON_BYTES:
    raise WeightsError(f"{path.name} has {path.stat().st_size} bytes; a configuration has at most {MAX_JSON_BYTES}")
  return parse_json(path.read_bytes(), path.name)


def parse_json(text: str | bytes, what: str) -> dict:
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"{what} is not JSON: {str(error)[:100]}") from error
  if not isinstance(value, dict):
    raise WeightsError(f"{what} is a JSON {type(value).__name__}; expected an object")
  return value


def write_safetensors(path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
  """Writes a `.safetensors` file whole or not at all: to a temporary file beside it, then renamed."""
  arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
  return _write(path, lambda temporary: safetensors.numpy.save_file(arrays, temporary, metadata))


def write_json(path, value: dict) -> Path:
  """Writes JSON whole or not at all."""
  return _write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def _write(path, write: Callable[[Path], object]) -> Path:
  path = Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
      write(Path(temporary))
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise WeightsError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
  return path
