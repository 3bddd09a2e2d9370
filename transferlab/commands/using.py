"""`transferlab eval` and `predict`: adapters in use."""
import csv
import json
import sys
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transferlab.commands.flags import BACKBONE, define, parse, required, words


def evaluate(argv: list[str]) -> None:
  """Counts the predictions of an adapter, or of the head that weights carry."""
  values = define(adapter=("", "adapter.safetensors of a run; without it the head that the weights carry is evaluated"),
                  backbone=BACKBONE, data=("", "what to evaluate on, e.g. folder:/images, or a task such as vtab/dtd"),
                  data_dir=("", "folder of the data sets of suites"),
                  split=("test", "train, val, test, or all of them"),
                  classes=("", "JSON list of the head's class names"),
                  preprocessing=("", "changes to the weights' own, e.g. crop=squash,std=1/1/1; heads only"),
                  out=("", "folder for confusion.csv and confusion.png; the adapter's own by default"),
                  batch_size=(64, "images at once"),
                  bad_images=("error", "error, or skip to leave out images that cannot be read"),
                  json=(False, "print one JSON object"))
  parse(values, argv, evaluate)
  required(values, "data")
  from transferlab import data, serve
  from transferlab.evaluate import write_confusion
  task = data.from_string(values.data, values.data_dir)
  classifier = serve.load(values.adapter or None, values.backbone, class_names=_class_names(values.classes),
                          preprocessing=values.preprocessing)
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
  if out:
    written = write_confusion(found, classifier.class_names, out)
    print(*written, sep="\n", file=sys.stderr if values.json else sys.stdout)


def _class_names(path: str):
  if not path:
    return None
  try:
    names = json.loads(Path(path).read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"class names cannot be read from {path} ({error}); expected a JSON list, in the head's "
                     "order") from None
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"{path} holds no list of strings; expected a JSON list of class names in the head's order")
  return names


def predict(argv: list[str]) -> None:
  """Writes file, class and probability of images as CSV, or adds them to the rows of a table; of several tasks on one
  pass of their backbone."""
  values = define(adapter=("", "adapter.safetensors of a run, or several with commas between them"), backbone=BACKBONE,
                  out=("", "CSV file; standard output if empty"), top=(1, "classes per image"),
                  table=("", "CSV file with a column of images, to copy to --out with the predictions in new columns"),
                  image_column=("", "that column's name, unless it is a usual one such as image or file"),
                  root=("", "folder of the table's images, by default the table's own"),
                  batch_size=(32, "images at once"),
                  bad_images=("error", "error, or skip to leave out images that cannot be read"))
  paths = parse(values, argv, predict, files=True)
  required(values, "adapter")
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


def _classifier(values: flags.FlagValues):
  """Of one adapter, or of several."""
  from transferlab import serve
  paths = [values.adapter] if Path(values.adapter).is_file() else words(values.adapter)
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
  if not values.out:
    raise ValueError("--out is missing: the file for the table with its predictions")
  from transferlab import data, serve
  table = data.read_table(values.table)
  serve.predict_table(_classifier(values), table, values.out,
                      image_column=values.image_column or None, root=values.root or None, top=values.top,
                      batch_size=values.batch_size, bad_images=values.bad_images)
