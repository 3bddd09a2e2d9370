"""Configurations: durations, and plain dataclasses filled strictly from nested dicts."""
import dataclasses
import re
import types
import typing
from typing import Any

from transferlab.tree import nearest

UNITS = ("steps", "epochs", "examples", "percent")


def resolve_steps(duration: str, steps_per_epoch: int, batch_size: int, total_steps: int | None = None,
                  name: str = "duration", positive: bool = False) -> int:
  """Number of training steps of a duration: "500 steps", "20 epochs", "10000 examples" or "5 percent" of the run.

  With `positive` a duration of 0 is an error, and a short one is at least one step.
  """
  found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(duration))
  unit = found and next((u for u in UNITS if found.group(2) in (u, u[:-1])), None)
  if not unit:
    raise ValueError(f"{name} is {duration!r}; expected a number and a unit, e.g. '20 epochs', '500 steps', "
                     "'10000 examples' or '5 percent'")
  number = float(found.group(1))
  if positive and not number:
    raise ValueError(f"{name} is {duration!r}; expected more than 0")
  if unit == "percent" and total_steps is None:
    raise ValueError(f"{name} is {duration!r}, but percents are of the whole run; use steps, epochs or examples")
  steps = {"steps": number, "epochs": number * steps_per_epoch, "examples": number / batch_size,
           "percent": number / 100 * (total_steps or 0)}[unit]
  return max(round(steps), int(positive))


def fill(cls, values: dict, where: str = "config") -> Any:
  """An instance of the dataclass `cls` from a dict; nested dataclasses are filled likewise, lists become tuples.

  Raises:
    ValueError: a key that `cls` lacks, naming the nearest valid ones, or a value of another type.
  """
  fields, kinds = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
  filled = {}
  for key, value in values.items():
    if key not in fields:
      raise ValueError(f"{where} has no key {key!r}; nearest: {', '.join(nearest(key, fields))}; "
                       f"all: {', '.join(fields)}")
    default = fields[key].default
    if dataclasses.is_dataclass(default) and not isinstance(value, type(default)):
      if not isinstance(value, dict):
        raise ValueError(f"{where}.{key} is {value!r}; expected keys of its own: "
                         f"{', '.join(f.name for f in dataclasses.fields(default))}")
      value = fill(type(default), value, f"{where}.{key}")
    example = None if default is dataclasses.MISSING else default
    filled[key] = typed(f"{where}.{key}", value, kinds[key], example)
  return cls(**filled)


def typed(name: str, value, kind, example=None):
  """`value` as the annotation `kind` wants it: whole numbers serve as float, lists as tuples, True as bool only.

  Raises:
    ValueError: a value of another type; the message shows `example`, the default.
  """
  kinds = [typing.get_origin(k) or k for k in (typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,))]
  value = tuples(value)
  if float in kinds and isinstance(value, int) and not isinstance(value, bool) and int not in kinds:
    value = float(value)
  if not any(isinstance(value, k) and not (isinstance(value, bool) and k is int) for k in kinds):
    expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
    such_as = "" if example is None else f", such as {example!r}"
    raise ValueError(f"{name} is {value!r}; expected {expected}{such_as}")
  return value


def tuples(value):
  """Lists, and lists in lists, as tuples: what JSON and configurations make of them."""
  return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def changes(old: dict, new: dict, prefix: str = "") -> list[str]:
  """Where two nested dicts differ, as "optim.lr: 0.001 -> 0.01"."""
  found = []
  for key in dict.fromkeys([*old, *new]):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      found += changes(a, b, f"{prefix}{key}.")
    elif a != b:
      found.append(f"{prefix}{key}: {a!r} -> {b!r}")
  return found
