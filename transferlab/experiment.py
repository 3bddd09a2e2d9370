"""From a configuration to a run: what `transferlab train` does, callable from Python.

A configuration is an ml_collections ConfigDict (or a dict) with the keys of `Experiment`, those of `recipe.Recipe`, and
the method's own options under `options`.
"""
import ast
import dataclasses
import re
import traceback
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections

from transferlab import config as config_lib
from transferlab import data, methods, tree
from transferlab.backbones.weights import Weights, load_weights, with_logits
from transferlab.progress import say
from transferlab.recipe import Recipe
from transferlab.train import Fit, adapted, fit
from transferlab.tree import nearest


@dataclass(frozen=True)
class Experiment:
  """What to train on what.

  Fields:
    data: a source: "folder:/path", "domains:/path?test_domain=sketch", "list:/path?train=a.txt", "csv:/file", "digits",
      or a task of a suite, "vtab/dtd".
    data_dir: where the data sets of the suites lie, "" for $TFDS_DATA_DIR or else ~/tensorflow_datasets.
    backbone: a zoo name, a weights file or folder, or "hf:owner/name".
    architecture: what the weights are expected to be, "" to infer it.
    image_size: pixels, 0 for the weights' own; the position table is resampled.
    preprocessing: changes to the weights' own, "interpolation=bilinear,crop=squash", for files that store none.
    logits: a ResNet's own classifier becomes part of it, so that Head2Toe reads its logits too.
    download: allow a zoo entry to be fetched.
    tokenizer: of a CLIP, its file or folder, "" for what lies beside the weights.
    truncate: of a CLIP, cut texts that are too long instead of refusing them.
    method: a registered name; its options are under `options`.
    features: folder of an activation cache to train from, "" to train from images; what is missing is written first.
  """
  data: str = ""
  data_dir: str = ""
  backbone: str = "vit_formula64"
  architecture: str = ""
  image_size: int = 0
  preprocessing: str = ""
  logits: bool = False
  download: bool = False
  tokenizer: str = ""
  truncate: bool = False
  method: str = "linear"
  features: str = ""


# Starting points: small heads take large steps, whole backbones small ones.
LEARNING_RATES = {"linear": 1e-2, "mlp3": 3e-3, "full": 3e-5, "bitfit": 3e-3, "lora": 1e-3, "ssf": 5e-3, "dtl": 3e-3,
                  "dtl_plus": 3e-3, "dtl_plus_star": 3e-3, "inca": 3e-3, "open_inca": 3e-3, "all_features": 1e-2,
                  "head2toe": 1e-2, "head2toe_layers": 1e-2, "head2toe_given": 1e-2, "head2toe_ft": 1e-4,
                  "miro": 5e-5, "coop": 1e-2, "clip_adapter": 1e-2, "maple": 3e-3, "dpl": 3e-3}
LR_FACTORS = {"head2toe_ft": (("classifier/.*", 100.0),), "miro": (("variance/.*", 10.0),)}  # theirs is the backbone's
# Of a recipe, what is told of every run, default or not.
TOLD = ("duration", "batch_size", "optim/name", "optim/lr", "optim/schedule", "optim/warmup", "optim/weight_decay",
        "augmentation", "drop_path", "drop_last", "select")


def defaults(method: str = "linear", **changes) -> ml_collections.ConfigDict:
  """Every key with its default, the method's options included; `changes` are keys of the first level.

  The learning rate is a starting point that suits the method, not a tuned result.
  """
  if method not in methods.METHODS:
    raise ValueError(f"method {method!r} is unknown; nearest: {', '.join(nearest(method, methods.METHODS))}; "
                     f"all: {', '.join(sorted(methods.METHODS))}")
  values = {**dataclasses.asdict(Experiment(method=method)), **dataclasses.asdict(Recipe()),
            "options": methods.options_of(method)}
  config = ml_collections.ConfigDict(values, convert_dict=True)
  config.optim.lr, config.optim.lr_factors = LEARNING_RATES.get(method, 1e-3), LR_FACTORS.get(method, ())
  for key, value in changes.items():
    if key not in config:
      raise ValueError(f"config has no key {key!r}; nearest: {', '.join(nearest(key, config))}")
    config[key] = value
  return config


def arguments(text: str | None, **known) -> ml_collections.ConfigDict:
  """Arguments of a config file, "data=digits,method=dtl", over their defaults; a name that is not known is an error."""
  values = dict(known)
  for part in filter(None, re.split(r",(?=\w+=)", text or "")):
    name, equals, value = part.partition("=")
    if not equals or name not in known:
      raise ValueError(f"config argument {part!r} is not understood; expected name=value with a name of "
                       f"{', '.join(known)}; nearest: {nearest(name, known)[0]}")
    values[name] = _parsed(f"config argument {name}", value, known[name])
  return ml_collections.ConfigDict(values)


def published(arg: ml_collections.ConfigDict, prefix: str, *options: str) -> str:
  """The data of a suite's task, "vtab/dtd?phase=final", from a config file's arguments: `task`, and those in `options`.

  A task without a slash is one of those under `prefix`.
  """
  name = arg.task if "/" in arg.task else f"{prefix}/{arg.task}"
  return f"{name}?{'&'.join(f'{option}={arg[option]}' for option in options)}"


def load(text: str, overrides: dict[str, str] | None = None) -> ml_collections.ConfigDict:
  """The configuration of a file, "configs/folder.py:data=digits", changed by overrides such as {"optim.lr": "1e-3"}.

  The file is a Python script and is run: its `get_config` receives what follows the colon.

  Raises:
    ValueError: no such file, an error in it with its line, a key the configuration lacks, a value of another type.
  """
  config = _script(text, lambda script, *given: ml_collections.ConfigDict(script["get_config"](*given)))
  for key, value in (overrides or {}).items():
    change(config, key, value)
  return config


def with_arguments(text: str, more: str) -> str:
  """A config file's name with further arguments; of a name that is given twice the last counts."""
  given = text.partition(":")[2]
  return f"{text}{',' if given and more else ':' * (':' not in text and bool(more))}{more}"


def load_grid(text: str) -> dict[str, list]:
  """The grid that a config file offers to sweeps, {"optim.lr": [1e-2, 1e-3]}: what its `get_grid` returns for the same
  text that its `get_config` receives; empty if it has none. Errors as of `load`."""
  grid = _script(text, lambda script, *given: script.get("get_grid", lambda *_: {})(*given))
  if not isinstance(grid, dict) or not all(isinstance(values, (list, tuple)) for values in grid.values()):
    raise ValueError(f"get_grid of {text.partition(':')[0]} returned {grid!r}; expected a list of values for each key")
  return {key: list(values) for key, values in grid.items()}


def _script(text: str, call: Callable):
  """Runs a config file, and returns `call` of its names and, if there is a colon, of what follows that."""
  path, colon, arguments_ = text.partition(":")
  if not Path(path).is_file():
    raise ValueError(f"config file {path!r} does not exist; expected a Python file with get_config, e.g. "
                     "configs/folder.py")
  try:
    script = {"__file__": path, "__name__": "config"}
    exec(compile(Path(path).read_text(), path, "exec"), script)
    return call(script, *([arguments_] if colon else []))
  except ValueError:
    raise
  except Exception as error:  # a script may fail in any way
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path} line {lines[-1]}" if lines else path
    raise ValueError(f"config file {where}: {type(error).__name__}: {error}; correct the file") from error


def change(config: ml_collections.ConfigDict, key: str, value) -> None:
  """Sets one dotted key to a value or its text; the value it has gives the type, an option's is what its method takes.
  """
  *groups, last = key.split(".")
  group = config
  for name in groups:
    group = group[name] if isinstance(group, ml_collections.ConfigDict) and name in group else None
  if not isinstance(group, ml_collections.ConfigDict) or last not in group:
    known = [name.replace("/", ".") for name in tree.flatten(config.to_dict())]
    raise ValueError(f"config has no key {key!r}; nearest: {', '.join(tree.nearest(key, known))}")
  if isinstance(group[last], ml_collections.ConfigDict):
    own = ", ".join(f"{key}.{name}" for name in group[last])
    raise ValueError(f"config.{key} is {value!r}; expected keys of its own: {own}")
  method = methods.METHODS.get(config.get("method")) if groups == ["options"] else None
  kind = typing.get_type_hints(method).get(last) if method else None
  with group.ignore_type():  # an option may take several
    group[last] = _parsed(f"config.{key}", value, group[last], kind)


def _parsed(name: str, value, old, kind=None):
  """A value, or its text, of the type `kind`, by default that of `old`: strings as they are, else a Python literal, or
  a plain word where `old` is None."""
  if isinstance(value, str):
    if kind is str or isinstance(old, str) and kind is None:
      return value
    try:
      found = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
      value = value if isinstance(found, dict) else found  # no option takes one, and "{}" is a template
    except (ValueError, SyntaxError):
      pass
  if kind is None and (old is None or value is None):
    return value
  return config_lib.typed(name, value, kind or type(config_lib.tuples(old)), old)


def parse(config) -> tuple[Experiment, dict, Recipe]:
  """(experiment, the method's options, recipe) of a configuration; every unknown key is an error naming the nearest."""
  values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  options = values.pop("options", {})
  mine = {f.name for f in dataclasses.fields(Experiment)}
  recipe = {f.name for f in dataclasses.fields(Recipe)}
  for key in values:
    if key not in mine | recipe:
      raise ValueError(f"config has no key {key!r}; nearest: {', '.join(nearest(key, mine | recipe))}; options of the "
                       "method go under options")
  experiment = config_lib.fill(Experiment, {k: v for k, v in values.items() if k in mine})
  if not experiment.data:
    raise ValueError("config.data is empty; give --config.data=folder:/path (or digits, domains:, list:, csv:, "
                     "vtab/dtd)")
  return experiment, options, config_lib.fill(Recipe, {k: v for k, v in values.items() if k in recipe})


def described(recipe: Recipe, options: dict) -> str:
  """What a recipe is in the first place, what else it has unlike the default one, and the options, in a line."""
  values, usual = (tree.flatten(dataclasses.asdict(each)) for each in (recipe, Recipe()))
  shown = {name: value for name, value in values.items() if name in TOLD or value != usual[name]}
  shown |= {f"options/{name}": value for name, value in options.items()}
  return ", ".join(f"{name.replace('/', '.')} {value}" for name, value in shown.items())


def weights_of(experiment: Experiment) -> Weights:
  """The weights that an experiment asks for, at its resolution and with its preprocessing."""
  weights = load_weights(experiment.backbone, architecture=experiment.architecture or None,
                         image_size=experiment.image_size or None, download=experiment.download,
                         tokenizer=experiment.tokenizer or None, truncate=experiment.truncate)
  weights = weights._replace(preprocessing=weights.preprocessing.changed(experiment.preprocessing))
  weights = with_logits(weights) if experiment.logits else weights
  return adapted(weights, experiment.method)


def run(config: Any, workdir=None, quiet: bool = False) -> Fit:
  """Loads weights and data and trains; see `train.fit`. The recipe is told first, the whole of it in config.json."""
  experiment, options, recipe = parse(config)
  if not quiet:
    say(f"recipe: {described(recipe, options)}")
  task = data.from_string(experiment.data, experiment.data_dir)
  return fit(weights_of(experiment), experiment.method, task, recipe, options=options, workdir=workdir,
             features=experiment.features, quiet=quiet)
