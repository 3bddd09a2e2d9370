"""`from_string`, which the command line's `--data=` goes through, and plain image files to predict on."""
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable
from urllib.parse import parse_qsl

import numpy as np

from transferlab.data import suites
from transferlab.data.entries import open_entry
from transferlab.data.fewshot import few_shot
from transferlab.data.files import SUFFIXES, FileReader
from transferlab.data.folders import domain_folder, find_images, image_folder, nearest
from transferlab.data.lists import class_lists, list_files
from transferlab.data.memory import digits
from transferlab.data.tables import csv_file
from transferlab.data.tasks import DataError, Split, Task, some


def from_string(text: str, data_dir: str | os.PathLike = "", **options) -> Task:
  """'digits', 'folder:/path', 'domains:/path?test_domain=sketch', 'list:/path?train=a.txt&test=b.txt',
  'classes:/path/of/lists?root=/images', 'csv:/file.csv', or a task of a suite: 'vtab/dtd?phase=tune', looked for in
  `data_dir`.

  What follows `?` are arguments of the constructor, as `options` are, and win over them; 'domains:' also takes the
  short `test=`. All take `shots=` and `shots_seed=`, which draw so many training images of every class; validation and
  test images stay whole. (Few-shot suites have their own `shots`.)
  """
  head, _, query = text.partition("?")
  if head in suites.ENTRIES or head.split("/")[0] in suites.PREFIXES:
    return _suite_task(text, head, query, data_dir)
  kind, _, path = head.partition(":")
  if kind not in KINDS:
    hint = f"; did you mean 'folder:{text}'?" if os.path.isdir(head) else nearest(kind, KINDS)
    kinds = ", ".join(f"{k}:<path>" for k in KINDS if k != "digits")
    raise DataError(f"data {text!r} is of no known kind; expected {kinds}, digits, or a task of a suite such as "
                    f"vtab/dtd{hint}")
  make = KINDS[kind]
  parameters = inspect.signature(make).parameters
  if ("root" in parameters or "path" in parameters) != bool(path):
    raise DataError(f"data {text!r}: expected {kind + ':<path>' if not path else kind + ' without a path'}")
  given = dict(parse_qsl(query, keep_blank_values=True))
  if kind == "domains" and "test" in given:
    given["test_domain"] = given.pop("test")
  arguments = {k: v for k, v in options.items() if k in parameters}
  for key, value in given.items():
    arguments[key] = _argument(text, key, value, [*list(parameters.values())[bool(path):], *SAMPLING.values()])
  sampling = {key: arguments.pop(key) for key in SAMPLING if key in arguments}
  missing = [p.name for p in list(parameters.values())[bool(path):] if p.default is p.empty and p.name not in arguments]
  if missing:
    raise DataError(f"data {text!r} lacks {missing[0]}; write {kind}:{path}?{missing[0]}=...")
  return _sampled(make(*([path] if path else []), **arguments), **sampling)


KINDS: dict[str, Callable[..., Task]] = {
    "digits": digits, "folder": image_folder, "domains": domain_folder, "list": list_files,
    "classes": class_lists, "csv": csv_file}


def _suite_task(text: str, name: str, query: str, data_dir: str | os.PathLike) -> Task:
  if name not in suites.ENTRIES:
    near = [n for n in suites.ENTRIES if n.split("/")[0] == name.split("/")[0]]
    raise DataError(f"data {text!r}: no task {name!r}; expected {', '.join(near)}{nearest(name, near)}")
  entry = suites.ENTRIES[name]
  own = list(inspect.signature(open_entry).parameters.values())[2:-1] + list(entry.options.values())
  sampling = {} if "shots" in entry.options else SAMPLING
  given = dict(parse_qsl(query, keep_blank_values=True))
  given = {key: _argument(text, key, value, [*own, *sampling.values()]) for key, value in given.items()}
  task = open_entry(entry, data_dir, **{key: value for key, value in given.items() if key not in sampling})
  return _sampled(task, **{key: value for key, value in given.items() if key in sampling})


def _sampled(task: Task, shots: int = 0, shots_seed: int = 0) -> Task:
  """The task with `shots` training images per class. Its name and its protocol say so; the seed is a `draw`, over which
  results are averaged.
  """
  if shots == 0 and shots_seed == 0:
    return task
  if shots == 0:
    raise DataError(f"shots_seed is {shots_seed} without shots; expected ?shots=16&shots_seed={shots_seed}")
  if "train" not in task.splits:
    raise DataError(f"task {task.name!r} has no training images to draw {shots} per class from; found the splits "
                    f"{some(task.splits)}")
  drawn = few_shot(task.splits["train"], shots, shots_seed)
  return dataclasses.replace(
      task, name=f"{task.name}, {shots} shots", splits={**task.splits, "train": drawn},
      protocol=task.protocol and f"{task.protocol}, {shots} shots",
      draw=", ".join(filter(None, (task.draw, f"shots seed {shots_seed}"))))


SAMPLING = dict(list(inspect.signature(_sampled).parameters.items())[1:])


def _argument(text: str, key: str, value: str, parameters: list[inspect.Parameter]) -> str | int | float | bool:
  types = {p.name: p.annotation for p in parameters if p.name != "class_names"}  # a list does not fit into a word
  if key not in types:
    raise DataError(f"data {text!r}: {key!r} is no option; expected {', '.join(types)}{nearest(key, types)}")
  if types[key] is bool:
    if value.lower() not in ("true", "false"):
      raise DataError(f"data {text!r}: {key} is {value!r}; expected true or false")
    return value.lower() == "true"
  if types[key] not in (int, float):
    return value
  try:
    return types[key](value)
  except ValueError:
    raise DataError(f"data {text!r}: {key} is {value!r}; expected a number") from None


def image_files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> Split:
  """Files, and folders with all images below them, as a split to predict on; its labels are all 0 and mean nothing."""
  paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  found = []
  for path in paths:
    found += find_images(path) if os.path.isdir(path) else [os.fspath(path)]
  if not found:
    raise DataError(f"no image in {some(paths)}; expected image files or folders with {', '.join(SUFFIXES)} files")
  return Split("test", tuple(found), np.zeros(len(found), np.int32), FileReader(tuple(found)))
