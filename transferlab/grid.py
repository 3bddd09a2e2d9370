"""A sweep's grid: its points, and which of them one program can train side by side."""
import copy
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from transferlab import experiment, methods
from transferlab.backbones.weights import Weights
from transferlab.features import activation_shapes
from transferlab.method import Method, classes
from transferlab.recipe import Recipe

OF_THE_TASK = ("data", "data_dir")  # scores of different images say nothing about which setting is better


class Point(NamedTuple):
  """A point of the grid.

  Fields:
    values: {key: value} of the grid's keys.
    config: the configuration with them.
    experiment, options, recipe: its parts, as `experiment.parse` gives them.
  """
  values: dict[str, Any]
  config: Any
  experiment: experiment.Experiment
  options: dict
  recipe: Recipe


class Group(NamedTuple):
  """Points that one program trains side by side.

  Fields:
    name: 8 hex digits, a hash of what they share.
    weights: the backbone.
    methods: {number of a point: its method}.
    sites: a method for each site, all of equal shapes; most groups have one.
    vary: {number of a point: what its `ctx.vary` holds}; with several sites "member" is the place of its own.
  """
  name: str
  weights: Weights
  methods: dict[int, Method]
  sites: tuple[Method, ...]
  vary: dict[int, dict]


def parse(text: str) -> dict[str, list[str]]:
  """{key: texts of its values} of "optim.lr=1e-3,1e-2;options.fraction=0.1,(0.01,0.02)".

  A comma within brackets belongs to its value. Keys that vary together are joined, and so are their values:
  "optim.lr+batch_size=(1e-3,32),(1e-4,16)".
  """
  grid = {}
  for part in filter(None, (part.strip() for part in text.split(";"))):
    key, equals, values = (word.strip() for word in part.partition("="))
    parts = _at_commas(values)
    if not equals or not key or not all(parts):
      raise ValueError(f"grid has {part!r}; expected KEY=VALUE,VALUE with no value empty, such as optim.lr=1e-3,1e-2; "
                       "keys are separated by semicolons")
    if key in grid:
      raise ValueError(f"grid has {key} twice; give all its values at once")
    grid[key] = parts
  return grid


def _at_commas(text: str) -> list[str]:
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def changed(config, values: Mapping[str, Any]):
  """A copy of a configuration with other values, or their texts; another method keeps the options that it has, too."""
  new = copy.deepcopy(config)
  for key in sorted(values, key=lambda key: key != "method"):  # options are those of the new method
    if key == "method" and values[key] != new.method:
      options = experiment.defaults(values[key]).options
      kept = {name: value for name, value in new.options.items() if name in options}
      with options.ignore_type():
        options.update(kept)
      new.options = options
    experiment.change(new, key, values[key])
  return new


def points(config, grid: Mapping[str, Sequence]) -> list[Point]:
  """All points of a grid, {key: values or their texts}; the first key varies slowest. A key may be several that vary
  together, "optim.lr+batch_size", whose values are as many, (1e-3, 32).

  Raises:
    ValueError: an empty grid, a key that the configuration lacks or that names the task, a value that does not suit,
      the same point twice.
  """
  if not grid:
    raise ValueError("the grid is empty; give --grid='optim.lr=1e-3,1e-2', or a config file with get_grid")
  for key, values in grid.items():
    if set(key.split("+")) & set(OF_THE_TASK):
      raise ValueError(f"grid over {key}: scores of different tasks are not compared; sweep each task, or all tasks of "
                       "a suite with --suite")
    if isinstance(values, str) or not len(values):
      raise ValueError(f"grid.{key} is {values!r}; expected a list of values")
  found, seen = [], {}
  for values in itertools.product(*grid.values()):
    given = _apart(dict(zip(grid, values)))
    new = changed(config, given)
    text = json.dumps(new.to_dict(), sort_keys=True)
    shown = ", ".join(f"{key}={value}" for key, value in given.items())
    if text in seen:
      raise ValueError(f"grid has a point twice: {seen[text]} and {shown}; leave one out")
    seen[text] = shown
    found.append(Point({key: _value(new, key) for key in given}, new, *experiment.parse(new)))
  return found


def _apart(given: Mapping[str, Any]) -> dict[str, Any]:
  """{key: value} with joint keys taken apart."""
  found = {}
  for key, value in given.items():
    keys = key.split("+")
    if isinstance(value, str) and len(keys) > 1:
      value = _at_commas(value.strip()[1:-1])
    values = [value] if len(keys) == 1 else value
    if not isinstance(values, (list, tuple)) or len(values) != len(keys):
      raise ValueError(f"grid.{key} has the value {given[key]!r}; expected {len(keys)} in brackets, one for each key")
    if again := [each for each in keys if each in found]:
      raise ValueError(f"grid has {again[0]} twice; give all its values at once")
    found |= dict(zip(keys, values))
  return found


def _value(config, key: str):
  for name in key.split("."):
    config = config[name]
  return config


def group(points: Sequence[Point], weights: Sequence[Weights], num_classes: int) -> list[Group]:
  """Points that differ only in what parallel heads may differ in, together, in the order of the grid.

  That is: learning rate, weight decay, seed, the options that the method `varies`, and its `site` as long as shapes
  stay the same.

  Args:
    weights: of each point.
  """
  built, groups = {}, {}
  for number, (point, own) in enumerate(zip(points, weights)):
    same = own.spec, own.hash, point.experiment.method, json.dumps(point.options, sort_keys=True)
    if same not in built:
      built[same] = methods.build(point.experiment.method, own.spec, **point.options)
    method = built[same]
    groups.setdefault(_shared(point, method, own, num_classes), []).append((number, method, own))
  return [_joined(key, members) for key, members in groups.items()]


def stages(method: Method, weights: Weights) -> list[Method]:
  """The stages of a method, to ask what they read, write and choose from; that is the same whatever they learn, and for
  any number of classes."""
  follows = method.then and method.then(*method.init(jax.random.key(0), weights.params, classes(method, 2)))
  return [method, *(stages(follows, weights) if follows else ())]


def _joined(key: str, members: list[tuple[int, Method, Weights]]) -> Group:
  name = hashlib.sha256(key.encode()).hexdigest()[:8]
  sites = {}
  for _, method, _ in members:  # of those that vary only in numbers the first stands for all
    sites.setdefault(method.options.get("site"), method)
  vary = {number: {option: method.options[option] for option in method.varies} for number, method, _ in members}
  if len(sites) > 1:
    for number, method, _ in members:
      vary[number]["member"] = list(sites).index(method.options["site"])
  return Group(name, members[0][2], {number: method for number, method, _ in members}, tuple(sites.values()), vary)


def _shared(point: Point, method: Method, weights: Weights, num_classes: int) -> str:
  """What the points of a group have in common, as text."""
  values = point.config.to_dict()
  del values["seed"], values["optim"]["lr"], values["optim"]["weight_decay"]
  free = {*method.varies, *(["site"] if method.visit is None else [])}
  values["options"] = {name: value for name, value in method.options.items() if name not in free}
  init = lambda rng, params: method.init(rng, params, classes(method, num_classes))
  made = jax.eval_shape(init, jax.random.key(0), weights.params)
  read = activation_shapes(weights.spec, method.reads)
  shapes = [str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)) for tree in (made, read)]
  return json.dumps([values, weights.hash, weights.preprocessing.to_dict(), shapes], sort_keys=True)
