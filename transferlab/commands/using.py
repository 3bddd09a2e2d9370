"""`transferlab eval` and `predict`: adapters in use, heads of weights, and CLIPs."""
import csv
import json
import os
import sys
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transferlab.commands.flags import BACKBONE, DISTRIBUTED, define, join, parse, required, words

WITHOUT_ADAPTER = {
    "classes": ("", "names of the classes, dog,cat or a JSON list; in a head's order, or what a CLIP is to tell apart"),
    "templates": ("", "a CLIP's texts with {} for the class name, with | between several"),
    "tokenizer": ("", "a CLIP's tokenizer, file or folder, unless it lies beside the weights"),
    "truncate": (False, "cut a CLIP's texts that are too long instead of refusing them"),
    "preprocessing": ("", "changes to the weights' own, e.g. crop=squash,std=1/1/1")}


def evaluate(argv: list[str]) -> None:
  """Counts the predictions of an adapter, of the head that weights carry, or of a CLIP that knows classes by their
  names, those of the data if none are given."""
  values = define(adapter=("", "adapter.safetensors of a run; without it the weights' own head, or a CLIP"),
                  backbone=BACKBONE, data=("", "what to evaluate on, e.g. folder:/images, or a task such as vtab/dtd"),
                  data_dir=("", "folder of the data sets of suites"),
                  split=("test", "train, val, test, or all of them"), **WITHOUT_ADAPTER,
                  out=("", "folder for confusion.csv and confusion.png; the adapter's own by default"),
                  batch_size=(64, "images at once"),
                  bad_images=("error", "error, or skip to leave out images that cannot be read"),
                  json=(False, "print one JSON object"), **DISTRIBUTED)
  parse(values, argv, evaluate)
  required(values, "data")
  join(values, evaluate)
  from transferlab import data, distributed, serve
  from transferlab.evaluate import write_confusion
  task = data.from_string(values.data, values.data_dir)
  _check(values)
  classifier = serve.load(values.adapter, values.backbone) if values.adapter else _of_weights(values, task)
  found = serve.evaluate(classifier, task, values.split, batch_size=values.batch_size, bad_images=values.bad_images)
  each = dict(zip(classifier.class_names, found.per_class.tolist()))
  if values.json:
    print(json.dumps({"accuracy": found.accuracy, "mean_per_class": found.mean_per_class, "loss": found.loss,
                      "examples": int(found.confusion.sum()), "per_class": {k: v for k, v in each.items() if v == v}}))
  else:
    table = Table("class", "images", "accuracy")
    for i, (name, value) in enumerate(each.items()):
      table.add_row(escape(name), str(int(found.confusion[i].sum())), f"{value:.4f}")
    Console().print(table)
    print(f"accuracy {found.accuracy:.4f}   mean per class {found.mean_per_class:.4f}   loss {found.loss:.4f}   "
          f"images {int(found.confusion.sum())}")
  out = values.out or (values.adapter and Path(values.adapter).parent)
  if out and distributed.first():
    written = write_confusion(found, classifier.class_names, out)
    print(*written, sep="\n", file=sys.stderr if values.json else sys.stdout)


def _check(values: flags.FlagValues) -> None:
  """Raises `ValueError` for flags that do not go with --adapter."""
  given = [name for name in WITHOUT_ADAPTER if values[name].value]
  if values.adapter and given:
    raise ValueError(f"--{given[0]} does not go with --adapter, which has class names, texts and preprocessing of its "
                     "own; leave it out")


def _of_weights(values: flags.FlagValues, task=None):
  """The classifier that weights carry, or a CLIP with class names and templates, by default a task's."""
  from transferlab import serve
  from transferlab.backbones.weights import load_weights
  if not values.backbone:
    raise ValueError("neither an adapter nor weights are given; give --adapter, or --backbone for the head it carries")
  weights = load_weights(values.backbone, tokenizer=values.tokenizer or None, truncate=values.truncate)
  names, templates = _class_names(values.classes), values.templates.split("|") if values.templates else None
  if weights.spec.family == "clip" and task:
    names, templates = names or task.class_names, templates or task.templates
  return serve.load(None, weights, class_names=names, templates=templates, preprocessing=values.preprocessing)


def _class_names(text: str):
  """Those of "dog,cat", of a JSON list or of a file with one, None for none."""
  if not text:
    return None
  listed = text.lstrip().startswith("[")
  if not (listed or text.endswith(".json") or os.path.isfile(text)):
    names = [name.strip() for name in text.split(",")]
    if "" in names:
      raise ValueError(f"--classes: class {names.index('')} has no name; expected one between all commas: dog,cat")
    return names
  where = "--classes" if listed else text
  try:
    names = json.loads(text if listed else Path(text).read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"class names cannot be read from {where} ({error}); expected a JSON list, in the head's "
                     "order") from None
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"{where} holds no list of strings; expected a JSON list of class names in the head's order")
  return names


def predict(argv: list[str]) -> None:
  """Writes file, class and probability of images as CSV, or adds them to the rows of a table; of several tasks on one
  pass of their backbone. Without an adapter the weights' own head predicts, or a CLIP that is given --classes."""
  values = define(adapter=("", "adapter.safetensors of a run, or several with commas between them"), backbone=BACKBONE,
                  **WITHOUT_ADAPTER, out=("", "CSV file; standard output if empty"), top=(1, "classes per image"),
                  table=("", "CSV file with a column of images, to copy to --out with the predictions in new columns"),
                  image_column=("", "that column's name, unless it is a usual one such as image or file"),
                  root=("", "folder of the table's images, by default the table's own"),
                  explain=("", "folder for what LFA looks at in each image: numbers and a picture"),
                  batch_size=(32, "images at once"),
                  bad_images=("error", "error, or skip to leave out images that cannot be read"))
  paths = parse(values, argv, predict, files=True)
  if not values.backbone:
    required(values, "adapter")
  _check(values)
  if values.table:
    _predict_table(values, paths)
    return
  if not paths:
    raise ValueError("no images given; name image files or folders after the flags, or a table with --table=")
  if values.image_column or values.root:
    raise ValueError("--image_column and --root are for --table=")
  from transferlab import data, serve
  from transferlab.files import atomic
  split = data.image_files(paths)
  classifier = _classifier(values)
  if values.explain:
    _explain(values, classifier, split.keys)
  rows = serve.predict_files(classifier, split.keys, top=values.top, batch_size=values.batch_size,
                             bad_images=values.bad_images)
  def write(file):
    writer = csv.writer(file)
    writer.writerow(["file", *["task"] * (len(classifier.tasks) > 1), "class", "probability"])
    writer.writerows((*names, f"{probability:.6f}") for *names, probability in rows)
  if values.out:
    with atomic(values.out) as temporary, open(temporary, "w", newline="") as file:
      write(file)
  else:
    write(sys.stdout)


def _explain(values: flags.FlagValues, classifier, files) -> None:
  from transferlab import explain
  from transferlab.progress import say
  if len(classifier.tasks) > 1:
    raise ValueError("--explain is for one adapter; give them one after the other")
  written = explain.write(classifier, files, values.explain, batch_size=values.batch_size, bad_images=values.bad_images)
  say(f"{len(written)} files in {values.explain}: what LFA looks at")


def _classifier(values: flags.FlagValues):
  """Of one adapter, of several, or of weights alone."""
  from transferlab import serve
  if not values.adapter:
    return _of_weights(values)
  paths = [values.adapter] if os.path.isfile(values.adapter) else words(values.adapter)
  if len(paths) < 2:
    return serve.load(values.adapter, values.backbone)
  from transferlab import shared
  from transferlab.progress import say
  found = shared.load_many(paths, values.backbone)
  say(f"{', '.join(found.tasks)}: {len(paths)} tasks on one pass of {found.weights.name}, up to {found.deepest}")
  return found


def _predict_table(values: flags.FlagValues, paths: list[str]) -> None:
  if paths:
    raise ValueError(f"unexpected argument {paths[0]!r}; the images are those of the table")
  if values.explain:
    raise ValueError("--explain is for images; name them instead of --table")
  if not values.out:
    raise ValueError("--out is missing: the file for the table with its predictions")
  from transferlab import data, serve
  table = data.read_table(values.table)
  serve.predict_table(_classifier(values), table, values.out,
                      image_column=values.image_column or None, root=values.root or None, top=values.top,
                      batch_size=values.batch_size, bad_images=values.bad_images)
