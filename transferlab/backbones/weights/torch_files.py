"""State dicts of `torch.save` and modules of `torch.jit.save` (`.pth`, `.pt`), read without torch, unpickling nothing.

Such a file is a zip archive: `data.pkl` says which tensors there are, see `torch_pickle.py`, and `data/0`, `data/1`, …
are the numbers of their storages. Of a TorchScript archive, such as OpenAI's CLIP, nothing else is opened, its code,
which is deflated, least of all. What a tensor needs is compared with what its storage holds, and with the size of the
file, before anything is read.
"""
import logging
import math
import zipfile
from pathlib import Path

import numpy as np

from transferlab.backbones.weights import files
from transferlab.backbones.weights.files import WeightsError
from transferlab.backbones.weights.torch_pickle import CONVERT, Machine, Module, Tensor

SUFFIXES = (".pth", ".pt")
MAX_PROGRAM_BYTES = 4 << 20  # of data.pkl; 300 tensors take 40 kB
MAX_NESTING = 64  # of TorchScript's modules; CLIP's are 6 deep
_WRAPPERS = ("model", "state_dict")  # where checkpoints keep the state dict
log = logging.getLogger(__name__)


def read_torch(path) -> dict[str, np.ndarray]:
  """Reads the state dict of a `.pth` or `.pt` file.

  Args:
    path: a zip archive of `torch.save`, which holds {name: tensor}, or such a dict under "model" or "state_dict"; or
      one of `torch.jit.save`, whose tensors then have the names of a state dict.

  Returns:
    {name: array of the file's shape}, float32 for any float; integers and bools stay as they are.

  Raises:
    WeightsError: the file is cut or damaged, claims sizes it does not hold, is of the form before torch 1.6, or holds
      anything but dicts of tensors.
  """
  path = Path(path)
  if not zipfile.is_zipfile(path):
    raise WeightsError(f"{path.name} ({path.stat().st_size} bytes) is refused: expected the zip archive of torch.save; "
                       "it is an older pickle (before torch 1.6), which could run code, or cut. Fetch it again. "
                       f"{CONVERT}")
  with files.reading(path, "torch"), zipfile.ZipFile(path) as archive:
    members = _members(archive, path)
    machine = Machine(path.name, {name: info.file_size for name, info in members.items()})
    found = _state_dict(machine.run(_read(archive, members["data.pkl"])), path.name)
    claimed = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in found.values())
    if claimed > min(files.MAX_BYTES, max(1 << 30, files.MAX_EXPANSION * path.stat().st_size)):
      raise WeightsError(f"{path.name} has {path.stat().st_size} bytes and claims {claimed} of tensors; refused as "
                         "implausible")
    keys = {tensor.storage.key for tensor in found.values()}
    stored = {key: _read(archive, members[f"data/{key}"]) for key in keys}
    return {name: files.numbers(name, _array(tensor, stored[tensor.storage.key])) for name, tensor in found.items()}


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
  """{name without the archive's folder: member}, whose names and sizes are plausible; nothing is unpacked to disk."""
  infos, size = archive.infolist(), path.stat().st_size
  folder = infos[0].filename.partition("/")[0] if infos else ""
  odd = [i.filename for i in infos if not i.filename.startswith(f"{folder}/") or "\\" in i.filename
         or {"", ".", ".."} & set(i.filename.split("/"))]
  members = {info.filename.removeprefix(f"{folder}/"): info for info in infos}
  if odd or len(members) != len(infos) or "data.pkl" not in members:
    what = repr(odd[0]) if odd else ", ".join(i.filename for i in infos[:3]) or "nothing"
    raise WeightsError(f"{path.name} is refused: expected an archive of torch.save, one folder with data.pkl, "
                       f"data/0, …, each name once; found {what[:200]}. {CONVERT}")
  claimed = sum(info.file_size for info in infos if info.compress_type == zipfile.ZIP_STORED)
  if claimed > size:
    raise WeightsError(f"{path.name} has {size} bytes and claims to hold {claimed}; refused as implausible")
  if (program := members["data.pkl"].file_size) > MAX_PROGRAM_BYTES:
    raise WeightsError(f"{path.name} describes its tensors in {program} bytes; expected at most {MAX_PROGRAM_BYTES}. "
                       f"{CONVERT}")
  if "byteorder" in members and (order := _read(archive, members["byteorder"])) != b"little":
    raise WeightsError(f"{path.name} has the byte order {order[:20]!r}; expected little. {CONVERT}")
  return members


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
  if member.compress_type != zipfile.ZIP_STORED:  # so that nothing grows when it is read
    raise WeightsError(f"{Path(archive.filename).name}: {member.filename} is compressed, which torch never does with "
                       f"it; refused. {CONVERT}")
  return archive.read(member)  # to its end, which is where zipfile compares the checksum


def _state_dict(found, file: str) -> dict[str, Tensor]:
  """The dict of tensors in what a file holds."""
  named = lambda name: isinstance(name, str) and name.isprintable()
  found = _tensors(found, file) if isinstance(found, Module) else found
  for _ in range(len(_WRAPPERS) + 1):
    if not isinstance(found, dict) or not found:
      break
    wrong = [name for name, value in found.items() if not named(name) or not isinstance(value, Tensor)]
    if not wrong:
      return found
    inner = next((name for name in _WRAPPERS if isinstance(found.get(name), dict)), None)
    if inner is None:
      raise WeightsError(f"{file} holds {str(wrong[0])[:60]!r}, which is no tensor; expected a state dict, {{name: "
                         f"tensor}}, possibly under {' or '.join(map(repr, _WRAPPERS))}. {CONVERT}")
    if left := [str(name)[:60] for name in found if name != inner]:
      log.info("%s: of its parts only %r is read; left out: %s", file, inner, ", ".join(left[:9]))
    found = found[inner]
  raise WeightsError(f"{file} holds no state dict, {{name: tensor}}. {CONVERT}")


def _tensors(module: Module, file: str) -> dict[str, Tensor]:
  """The tensors of a module and of those within, "visual.ln_pre.weight"; each module is looked into once."""
  found, left, seen = {}, [("", module)], set()
  while left:
    prefix, module = left.pop()
    if id(module) in seen:  # or one that holds itself would have no end
      continue
    seen.add(id(module))
    if prefix.count(".") > MAX_NESTING:
      raise WeightsError(f"{file} holds modules within modules, more than {MAX_NESTING} deep; refused as implausible")
    found |= {prefix + name: value for name, value in module.items() if isinstance(value, Tensor)}
    left += [(f"{prefix}{name}.", value) for name, value in module.items() if isinstance(value, Module)]
  return found


def _array(tensor: Tensor, data: bytes) -> np.ndarray:
  flat = np.frombuffer(data, tensor.storage.dtype)[tensor.offset:]
  strides = [step * flat.itemsize for step in tensor.strides]
  return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
