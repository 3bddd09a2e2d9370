"""Configurations: durations, and plain dataclasses filled strictly from nested dicts."""
import dataclasses
import re
from typing import Any

from transferlab.tree import nearest

UNITS = ("steps", "epochs", "examples", "percent")


def resolve_steps(duration: str, steps_per_epoch: int, batch_size: int, total_steps: int | None = None,
                  name: str = "duration") -> int:
  """Number of training steps of a duration such as "500 steps", "20 epochs", "10000 examples" or "5 percent" of the run."""
  found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(duration))
  unit = found and next((u for u in UNITS if found.group(2) in (u, u[:-1])), None)
  if not unit:
    raise ValueError(f"{name} is {duration!r}; expected a number and a unit, e.g. '20 epochs', '500 steps', "
                     "'10000 examples' or '5 percent'")
  number = float(found.group(1))
  if unit == "percent" and total_steps is None:
    raise ValueError(f"{name} is {duration!r}, but percents are of the whole run; use steps, epochs or examples")
  steps = {"steps": number, "epochs": number * steps_per_epoch, "examples": number / batch_size,
           "percent": number / 100 * (total_steps or 0)}[unit]
  return round(steps)


def fill(cls, values: dict, where: str = "config") -> Any:
  """An instance of the dataclass `cls` from a dict; nested dataclasses are filled likewise, lists become tuples.

  Raises:
    ValueError: a key that `cls` lacks, naming the nearest valid ones, or a value of another type.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}
  filled = {}
  for key, value in values.items():
    if key not in fields:
      raise ValueError(f"{where} has no key {key!r}; nearest: {', '.join(nearest(key, fields))}; all: {', '.join(fields)}")
    default = fields[key].default
    if dataclasses.is_dataclass(default) and not dataclasses.is_dataclass(value):
      value = fill(type(default), value, f"{where}.{key}")
    elif isinstance(default, bool) != isinstance(value, bool) and default is not None and value is not None:
      raise ValueError(f"{where}.{key} is {value!r}; expected {type(default).__name__}, such as {default!r}")
    elif isinstance(default, float) and isinstance(value, int):
      value = float(value)
    elif isinstance(default, tuple):
      value = _tuples(value)
    elif isinstance(default, (int, float, str)) and not isinstance(value, type(default)):
      raise ValueError(f"{where}.{key} is {value!r}; expected {type(default).__name__}, such as {default!r}")
    filled[key] = value
  return cls(**filled)


def _tuples(value):
  return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


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
