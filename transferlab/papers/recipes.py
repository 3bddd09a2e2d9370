"""Published hyper-parameters, `protocol=paper` of a config file: what they change for a method, a task and a backbone.

They are those of released code, collected in `dtl_recipes.json` and, of what LFA compares on CLIP, `lfa_recipes.json`:
lr, decay and what decays, schedule, drop-path, batch size and epochs, augmentation, options of the method. What a
paper's code does and a configuration cannot say, or what we leave to the weights (their normalisation), is told when
the configuration is made. Nothing is filled in: a method without published values for a task is an error. What looks
damaged among the collected values is named there, too.
"""
import functools
import json
from importlib import resources
from pathlib import PurePath
from typing import Any, NamedTuple

from transferlab import data, experiment
from transferlab.progress import say

FILES = ("dtl_recipes", "lfa_recipes")
BACKBONES = {"vit": "ViT-B/16", "swin": "Swin-B", "clip": "CLIP ViT-B/16"}  # what they were published for
# Of a config file: "paper" as protocol; "vit", "swin" or "clip", by default by the backbone's name; "chosen" as rates
# where the paper chooses them on validation; what LFA stands on as base, "coop".
ARGUMENTS = {"protocol": "", "family": "", "rates": "published", "base": ""}


class Published(NamedTuple):
  """What is published for a method on a task.

  Fields:
    values_of: the task and the backbone, "vtab/dtd on ViT-B/16".
    protocol, source: whose it is, and the repository.
    changes: {key of a configuration: value}.
    grid: {key: values} of what the paper chooses on validation; without it `changes` are complete.
    normalisation: of the images, as changes to a preprocessing; "" for what belongs to the weights.
    remarks: what a configuration does not say, one line each.
  """
  values_of: str
  protocol: str
  source: str
  changes: dict[str, Any]
  grid: dict[str, list]
  normalisation: str
  remarks: list[str]


@functools.cache
def collected() -> dict:
  """The content of all files: "protocols" by name, and "recipes"."""
  found = [json.loads(resources.files("transferlab.papers").joinpath(f"{name}.json").read_text()) for name in FILES]
  return {"protocols": {name: values for each in found for name, values in each["protocols"].items()},
          "recipes": [recipe for each in found for recipe in each["recipes"]]}


def family_of(backbone: str) -> str:
  """"swin", "resnet", "clip" or "vit", by the name of a backbone: of the zoo, a file, or "hf:owner/name"."""
  name = PurePath(backbone).name.lower()
  if name.startswith("clip"):
    return "clip"
  return "swin" if "swin" in name else "resnet" if name.startswith(("resnet", "bit_")) else "vit"


def find(method: str, task: str, family: str = "vit", *, shots: int = 0, chosen: bool = False) -> Published:
  """The published hyper-parameters.

  Args:
    method: its registered name; "lfa+coop" of LFA on a trained CoOp.
    task: "vtab/dtd", "fewshot/oxford_pets", "imagenet/sketch", "coop/dtd" or "pacs/sketch".
    family: of the backbone, "vit", "swin" or "clip".
    shots: of a few-shot task, whose rates depend on it.
    chosen: what the paper chooses on validation, its grid; else what it gives for the task.

  Raises:
    ValueError: nothing is published; the message names what is.
  """
  suite, _, name = task.partition("/")
  mine = [each for each in collected()["recipes"]
          if method in each["methods"] and suite in each["suites"] and family in each["families"]]
  key = f"{name}/{shots}" if shots else name
  for each in mine:
    tasks = each.get("tasks")  # without, values are the same for all
    if ("grid" in each) == chosen and (not tasks or key in tasks):
      values_of = f"{task}{f' with {shots} shots' * bool(shots)} on {BACKBONES[family]}"
      return _published(each, dict(zip(each["columns"], tasks[key])) if tasks else {}, values_of)
  raise ValueError(_absent(method, suite, f"{name} with {shots} shots" if shots else name, family, chosen))


def _published(recipe: dict, own: dict, values_of: str) -> Published:
  """One of the collected recipes, with a task's own values."""
  common = collected()["protocols"][recipe["protocol"]]
  changes = {**common["changes"], **recipe["changes"], **own}
  grid = dict(recipe.get("grid", {}))
  if "base_lr" in grid:  # of batches of 256
    grid = {"optim.lr": [rate * changes["batch_size"] / 256 for rate in grid.pop("base_lr")], **grid}
  return Published(values_of, recipe["protocol"], common["source"], changes, grid,
                   recipe.get("normalisation", common["normalisation"]),
                   [*recipe.get("remarks", ()), *common["remarks"]])


def _absent(method: str, suite: str, task: str, family: str, chosen: bool) -> str:
  """What is not published, and what is instead."""
  there = [each for each in collected()["recipes"] if suite in each["suites"] and family in each["families"]]
  mine = [each for each in there if method in each["methods"]]
  parts = [f"{method} has no published hyper-parameters for {task} of {suite} on {BACKBONES.get(family, family)}"]
  if not mine:
    names = ", ".join(dict.fromkeys(name for each in there for name in each["methods"]))
    return f"{parts[0]}; published there are {names or 'none'}; without protocol=paper it has a starting point of ours"
  if known := [name for each in mine for name in each.get("tasks", ())]:
    parts.append(f"published are {', '.join(known)}")
  if chosen:
    parts.append("leave rates=chosen out")
  elif any("grid" in each for each in mine):
    parts.append("its protocol chooses them on validation: sweep with the arguments rates=chosen,phase=tune and "
                 "--final=phase=final")
  return "; ".join(parts)


def asked(arg) -> bool:
  """Whether a config file's arguments ask for a paper's protocol."""
  if arg.protocol not in ("", "paper"):
    raise ValueError(f"config argument protocol is {arg.protocol!r}; expected paper, or nothing for ours")
  if arg.rates not in ("published", "chosen") or arg.family not in ("", *BACKBONES):
    raise ValueError(f"config arguments family {arg.family!r}, rates {arg.rates!r}; expected family "
                     f"{', '.join(BACKBONES)}, and rates published or chosen")
  if not arg.protocol and (arg.family or arg.base or arg.rates != "published"):
    raise ValueError("config arguments family, rates and base are for protocol=paper; add it, or leave them out")
  return arg.protocol == "paper"


def called(arg) -> str:
  """What a method goes by here: "lfa", or "lfa+coop" where it stands on another."""
  return f"{arg.method}+{arg.base}" if arg.base else arg.method


def of_arguments(arg, data: str, shots: int = 0) -> Published:
  """What the arguments of a config file ask for on its data, "vtab/dtd?phase=final"; see `ARGUMENTS`, `find`."""
  method = called(arg)
  only = {family for each in collected()["recipes"] if method in each["methods"] for family in each["families"]}
  # A CLIP's file may go by the name of its image tower, ViT-B-16.pt.
  family = arg.family or ("clip" if only == {"clip"} else family_of(arg.backbone))
  return find(method, data.partition("?")[0], family, shots=shots, chosen=arg.rates == "chosen")


def set_templates(config) -> None:
  """Gives a method that has the option `templates` those of its task."""
  entry = data.ENTRIES.get(config.data.partition("?")[0])
  if "templates" in config.options and entry and entry.templates:
    experiment.change(config, "options.templates", entry.templates[0] if len(entry.templates) == 1 else entry.templates)


def apply(config, published: Published, compat: str = "") -> None:
  """Changes a configuration, and tells what it cannot say; of a grid it takes each first value, until a sweep or the
  command line chooses. With compat="released" images are normalised as published, and a method that has such an option
  does what the released code does."""
  if compat not in ("", "released"):
    raise ValueError(f"config argument compat is {compat!r}; expected released, or nothing")
  for key, value in {**published.changes, **{key: values[0] for key, values in published.grid.items()}}.items():
    experiment.change(config, key, value)
  changes = ",".join(filter(None, (config.preprocessing, published.normalisation)))
  if compat:
    config.preprocessing = changes
    if "compat" in config.options:
      experiment.change(config, "options.compat", compat)
  told = list(published.remarks)
  if published.grid:
    told.insert(0, f"{', '.join(published.grid)} are chosen on validation, by a sweep or as --config.KEY=")
  told.insert(0, f"values are those of {published.values_of}, whatever else --config.KEY= changes")
  if published.normalisation and not compat:
    told.append(f"images are normalised by {published.normalisation}; here by what belongs to the weights, unless "
                f"--config.preprocessing={changes}")
  for line in told:
    _tell(f"{config.method}, protocol of {published.protocol} ({published.source}): {line}")


_tell = functools.cache(say)  # once, however many tasks and seeds a suite has
