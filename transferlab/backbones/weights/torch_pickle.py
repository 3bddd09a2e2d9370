"""The program inside a file of `torch.save` or `torch.jit.save`, run without pickle: it builds dicts of inert records.

`data.pkl` is a program of pickle's stack machine. `Machine` knows the few operations that a state dict needs:
containers, text, numbers, references to storages, two calls that rebuild a tensor, and objects of TorchScript, whose
class (`__torch__.…`) is a name here and whose code is never read. No module is imported and nothing of the file's is
called, so whatever else a file asks for can only be refused.
"""
import math
import pickletools
import re
from typing import NamedTuple

import numpy as np

from transferlab.backbones.weights.files import WeightsError

CONVERT = ("Convert it where you trust it: state = torch.load(path, weights_only=True); "
           "safetensors.torch.save_file(state.get('model', state), 'model.safetensors')")
_DTYPES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "V2", "DoubleStorage": "<f8",
           "LongStorage": "<i8", "IntStorage": "<i4", "BoolStorage": "?"}
_GLOBALS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
            *(f"torch {kind}" for kind in _DTYPES))
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MAX_DIMENSIONS = 16
_SCRIPTED = re.compile(r"__torch__(\.\w+)* \w+", re.ASCII)


class Global(NamedTuple):
  """One of `_GLOBALS`, without its module, or "__torch__" for any class of TorchScript's; a name and no more."""
  name: str


class Module(dict):
  """The attributes of one of TorchScript's objects: tensors, modules and plain values."""


class Storage(NamedTuple):
  """Numbers of the file: the member `data/<key>` with `count` of them."""
  key: str
  dtype: np.dtype
  count: int


class Tensor(NamedTuple):
  """A window on a storage, in elements; it lies within."""
  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Machine:
  """Pickle's stack machine, as far as state dicts go.

  Args:
    file: name for errors.
    sizes: {"data/0": bytes} of the archive's members.

  Its stack holds dicts, lists, tuples, texts, numbers and the records above. Every error is a WeightsError.
  """

  def __init__(self, file: str, sizes: dict[str, int]):
    self.file, self.sizes = file, sizes
    self.stack, self.marks, self.memo = [], [], {}

  def run(self, program: bytes):
    """What the program leaves on the stack."""
    for operation, argument, _ in pickletools.genops(program):  # which checks lengths, and stops at STOP
      self.step(operation.name, argument)
    return self.pop()

  def step(self, name: str, argument) -> None:
    """One operation of the program; those that no state dict needs are refused."""
    match name:
      case "PROTO" | "STOP":
        pass
      case _ if name in _VALUES:
        self.stack.append(argument)
      case _ if name in _CONSTANTS:
        self.stack.append(_CONSTANTS[name])
      case "EMPTY_DICT" | "EMPTY_LIST":
        self.stack.append({} if name == "EMPTY_DICT" else [])
      case "MARK":
        self.marks.append(len(self.stack))
      case "TUPLE":
        self.stack.append(tuple(self.since_mark()))
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        self.stack.append(tuple(self.take(int(name[-1]))))
      case "APPEND" | "APPENDS":
        items = self.take(1) if name == "APPEND" else self.since_mark()
        self.top(list).extend(items)
      case "SETITEM" | "SETITEMS":
        self.set_items(self.take(2) if name == "SETITEM" else self.since_mark())
      case "BINPUT" | "LONG_BINPUT":
        self.memo[argument] = self.top(object)
      case "BINGET" | "LONG_BINGET" if argument in self.memo:
        self.stack.append(self.memo[argument])
      case "GLOBAL":
        self.stack.append(self.name(argument))
      case "BINPERSID":
        self.stack.append(self.storage(self.pop()))
      case "REDUCE":
        self.stack.append(self.call(*self.take(2)))
      case "NEWOBJ" if self.take(2) == [Global("__torch__"), ()]:
        self.stack.append(Module())
      case "BUILD":  # attributes; those that torch hangs on an ordered dict are the versions of its modules
        self.build(self.pop())
      case _:
        raise self.refused(f"needs the operation {name}")

  def refused(self, what: str) -> WeightsError:
    """The error of a program that does what no state dict does."""
    return WeightsError(f"{self.file} is refused: it {what}, which no state dict does. {CONVERT}")

  def damaged(self, what: str) -> WeightsError:
    """The error of numbers that contradict each other."""
    return WeightsError(f"{self.file}: {what}; it is damaged or made to mislead: fetch it again")

  def take(self, count: int) -> list:
    """The last `count` values, taken off the stack."""
    start = len(self.stack) - count
    if start < (self.marks[-1] if self.marks else 0):
      raise self.refused("takes more than it has put down")
    items = self.stack[start:]
    del self.stack[start:]
    return items

  def pop(self):
    """The last value, taken off the stack."""
    return self.take(1)[0]

  def since_mark(self) -> list:
    """The values since the last mark, taken off the stack with it."""
    if not self.marks:
      raise self.refused("takes more than it has put down")
    return self.take(len(self.stack) - self.marks.pop())

  def top(self, kind: type):
    """The last value, left where it is."""
    if not self.stack or not isinstance(self.stack[-1], kind):
      found = type(self.stack[-1]).__name__ if self.stack else "nothing"
      raise self.refused(f"treats {found} as a {kind.__name__}")
    return self.stack[-1]

  def set_items(self, items: list) -> None:
    """Puts keys and values, in turn, into the dict on top of the stack."""
    names = items[::2]
    if len(items) % 2 or not all(isinstance(name, (str, int)) for name in names):
      raise self.refused("has a dict whose keys are neither texts nor whole numbers")
    if isinstance(self.top(dict), Module):
      raise self.refused("treats a module as a dict")
    self.top(dict).update(zip(names, items[1::2], strict=True))

  def build(self, attributes) -> None:
    """Gives the object on top of the stack its attributes, if it is a module; a dict needs none."""
    if isinstance(self.top(dict), Module):
      if type(attributes) is not dict or not all(isinstance(name, str) for name in attributes):
        raise self.refused("gives a module attributes without names")
      self.top(Module).update(attributes)

  def name(self, asked: str) -> Global:
    """The record that stands for one of the few names a state dict may ask for."""
    if _SCRIPTED.fullmatch(asked):
      return Global("__torch__")
    if asked not in _GLOBALS:
      raise self.refused(f"asks for {asked.replace(' ', '.')[:80]!r} and could run code with it")
    return Global(asked.partition(" ")[2])

  def storage(self, reference) -> Storage:
    """Of a reference ("storage", its kind, key, device, number of elements)."""
    match reference:
      case ("storage", Global(kind), str(key), _, int(count)) if kind in _DTYPES and f"data/{key}" in self.sizes:
        dtype, held = np.dtype(_DTYPES[kind]), self.sizes[f"data/{key}"]
        if held != count * dtype.itemsize:
          raise self.damaged(f"data/{key} holds {held} bytes and should hold {count} numbers of {dtype.itemsize}")
        return Storage(key, dtype, count)
    raise self.refused("refers to a storage that it does not hold")

  def call(self, function, arguments):
    """What the calls of a state dict make: an ordered dict, a parameter's tensor, a tensor."""
    match function, arguments:
      case Global("OrderedDict"), ():
        return {}
      case Global("_rebuild_parameter"), (Tensor() as tensor, _, _):
        return tensor
      case Global("_rebuild_tensor_v2"), (Storage() as storage, offset, tuple(shape), tuple(strides), _, *rest):
        if not any(rest):  # hooks, and marks of conjugated or negated views
          return self.tensor(storage, offset, shape, strides)
    raise self.refused("calls something that rebuilds no tensor")

  def tensor(self, storage: Storage, offset, shape: tuple, strides: tuple) -> Tensor:
    whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if whole and len(shape) == len(strides) <= _MAX_DIMENSIONS and 0 < math.prod(shape) <= storage.count:
      if offset + sum((n - 1) * step for n, step in zip(shape, strides)) < storage.count:
        return Tensor(storage, offset, shape, strides)
    raise self.damaged(f"a tensor of shape {str(list(shape))[:80]} at {str(offset)[:20]} does not lie within data/"
                       f"{storage.key}, which holds {storage.count} numbers")
