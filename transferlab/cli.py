"""The `transferlab` command: every verb is a thin call into the library."""
import csv
import errno
import json
import os
import re
import sys
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

USAGE = """usage: transferlab VERB [--flag=value …]      (transferlab VERB --help lists a verb's flags)

  train     --config=configs/folder.py:data=folder:/images,method=dtl --workdir=runs/mine
  train     --config=configs/vtab.py:method=dtl --suite=vtab1k --data_dir=/data --workdir=runs/vtab
  report    runs/vtab
  eval      --adapter=runs/mine/adapter.safetensors --data=folder:/images
  predict   --adapter=runs/mine/adapter.safetensors --out=predictions.csv image.jpg folder/
  predict   --adapter=runs/mine/adapter.safetensors --table=photos.csv --out=predicted.csv
  info      --backbone=vit_b16 --method=dtl --num_classes=100
  convert   --backbone=weights.npz --out=weights.safetensors
  merge     --adapter=runs/mine/adapter.safetensors --out=merged.safetensors
  data      --data=folder:/images
  data      list|check|prepare vtab1k coop/dtd --data_dir=/data
"""


def _flags(**strings) -> flags.FlagValues:
  """A verb's own flags; each keyword is a string flag with (default, help)."""
  values = flags.FlagValues()
  for name, (default, text) in strings.items():
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(type(default),
                                                                                                flags.DEFINE_string)
    define(name, default, text, flag_values=values)
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
  values.set_gnu_getopt()  # flags may follow file names
  return values


def _parse(values: flags.FlagValues, argv: list[str], verb: str, files: bool = False) -> list[str]:
  """Positional arguments, where the verb takes `files`; prints help and exits if asked."""
  rest = values(argv)[1:]
  if values.help:
    print(f"transferlab {verb}: {VERBS[verb].__doc__}\n")
    for name in values:
      if name not in ("help", "h"):
        print(f"  --{name}  {values[name].help} (default: {values[name].default!r})")
    raise SystemExit(0)
  if rest and not files:
    raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
  return rest


def _required(values, *names: str) -> None:
  for name in names:
    if not values[name].value:
      raise ValueError(f"--{name} is missing: {values[name].help}")


_BACKBONE = (None, "zoo name, weights file or folder, or hf:owner/name")


def train(argv: list[str]) -> None:
  """Trains a method as a config file says, on one task or on a suite."""
  values = _flags(workdir=("", "folder for what the run leaves"),
                  suite=("", "train on every task of this suite that is present, one after another"),
                  seeds=("0,1,2", "seeds for each task of the suite"),
                  data_dir=("", "folder of the data sets of suites; same as --config.data_dir"),
                  config=("", "config file, its arguments after a colon; --config.KEY=value changes any key"),
                  bad_images=("", "error, or skip images that cannot be read; same as --config.bad_images"),
                  micro_batch=("", "images computed at once, or auto for as many as fit; same as --config.micro_batch"))
  overrides, rest = {}, []
  for argument in argv:
    if found := re.fullmatch(r"--?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL):
      if found[2] is None:
        raise ValueError(f"{argument} has no value; expected {argument}=value")
      overrides[found[1]] = found[2]
    else:
      rest.append(argument)
  _parse(values, rest, "train")
  _required(values, "config", "workdir")
  overrides |= {name: values[name].value for name in ("bad_images", "micro_batch", "data_dir") if values[name].value}
  if overrides.get("micro_batch") == "auto":
    overrides["micro_batch"] = "-1"
  if values.suite:
    _train_suite(values, overrides)
    return
  from transferlab import experiment
  run = experiment.run(experiment.load(values.config, overrides), values.workdir)
  print(run.adapter)


def _train_suite(values: flags.FlagValues, overrides: dict[str, str]) -> None:
  from transferlab import report as report_lib
  from transferlab import suite
  seeds = _words(values.seeds)
  if not seeds or not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) != len(seeds):
    raise ValueError(f"--seeds is {values.seeds!r}; expected different whole numbers, such as 0,1,2")
  outcome = suite.run(values.suite, values.config, values.workdir, overrides, [int(seed) for seed in seeds])
  if outcome.rows:
    split = "test" if all(row["test"] for row in outcome.rows) else "val"
    report_lib.show(report_lib.report(outcome.rows, values.suite, split), f"{split} accuracy")
  for line in outcome.absent:
    print(f"left out: {line}")
  if outcome.failed:
    raise ValueError(f"{len(outcome.failed)} runs failed, first {outcome.failed[0]}; the same command tries them again")


def _words(text: str) -> list[str]:
  return [word.strip() for word in text.split(",") if word.strip()]


def report(argv: list[str]) -> None:
  """Averages finished runs, over seeds and over tasks, and refuses to average unlike ones."""
  values = _flags(suite=("", "suite to average over; by default the smallest that has the tasks"),
                  split=("test", "test or val"), score=("accuracy", "accuracy, mean_per_class or loss"),
                  allow=("", "fields that may differ all the same, e.g. recipe.optim,device"),
                  json=(False, "print one JSON object"))
  folders = _parse(values, argv, "report", files=True)
  if not folders:
    raise ValueError("no runs given; name their folders, or one above them")
  from transferlab import report as report_lib
  found = report_lib.report(report_lib.read(folders), values.suite, values.split, values.score, _words(values.allow))
  if values.json:
    scores = {method: {task: score._asdict() for task, score in each.items()} for method, each in found.scores.items()}
    print(json.dumps({**found._asdict(), "scores": scores}))
    return
  report_lib.show(found, f"{values.split} {values.score}")


def evaluate(argv: list[str]) -> None:
  """Counts the predictions of an adapter, or of the head that weights carry."""
  values = _flags(adapter=("", "adapter.safetensors of a run; without it the head that the weights carry is evaluated"),
                  backbone=_BACKBONE, data=("", "what to evaluate on, e.g. folder:/images, or a task such as vtab/dtd"),
                  data_dir=("", "folder of the data sets of suites"),
                  split=("test", "train, val, test, or all of them"),
                  classes=("", "JSON list of the head's class names"),
                  preprocessing=("", "changes to the weights' own, e.g. crop=squash,std=1/1/1; heads only"),
                  out=("", "folder for confusion.csv and confusion.png; the adapter's own by default"),
                  batch_size=(64, "images at once"),
                  bad_images=("error", "error, or skip to leave out images that cannot be read"),
                  json=(False, "print one JSON object"))
  _parse(values, argv, "eval")
  _required(values, "data")
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
  """Writes file, class and probability of images as CSV, or adds them to the rows of a table."""
  values = _flags(adapter=("", "adapter.safetensors of a run"), backbone=_BACKBONE,
                  out=("", "CSV file; standard output if empty"), top=(1, "classes per image"),
                  table=("", "CSV file with a column of images, to copy to --out with the predictions in new columns"),
                  image_column=("", "that column's name, unless it is a usual one such as image or file"),
                  root=("", "folder of the table's images, by default the table's own"),
                  batch_size=(32, "images at once"),
                  bad_images=("error", "error, or skip to leave out images that cannot be read"))
  paths = _parse(values, argv, "predict", files=True)
  _required(values, "adapter")
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
  classifier = serve.load(values.adapter, values.backbone)
  rows = serve.predict_files(classifier, split.keys, top=values.top, batch_size=values.batch_size,
                             bad_images=values.bad_images)
  def write(file):
    writer = csv.writer(file)
    writer.writerow(["file", "class", "probability"])
    writer.writerows((name, label, f"{probability:.6f}") for name, label, probability in rows)
  if values.out:
    with atomic(values.out) as temporary, open(temporary, "w", newline="") as file:
      write(file)
  else:
    write(sys.stdout)


def _predict_table(values: flags.FlagValues, paths: list[str]) -> None:
  if paths:
    raise ValueError(f"unexpected argument {paths[0]!r}; the images are those of the table")
  if not values.out:
    raise ValueError("--out is missing: the file for the table with its predictions")
  from transferlab import data, serve
  table = data.read_table(values.table)
  serve.predict_table(serve.load(values.adapter, values.backbone), table, values.out,
                      image_column=values.image_column or None, root=values.root or None, top=values.top,
                      batch_size=values.batch_size, bad_images=values.bad_images)


def info(argv: list[str]) -> None:
  """Shows what methods cost on a backbone, or its sites, from shapes alone."""
  values = _flags(backbone=("vit_b16", "architecture, zoo name or weights file"),
                  method=("", "method; all of them if empty"),
                  options=("", "the method's options, e.g. rank=4,form=fused"), num_classes=(100, "C"),
                  batch_size=(32, "images per step"), image_size=(0, "pixels, 0 for the backbone's own"),
                  remat=(False, "recompute adapted blocks"), sites=(False, "list the backbone's sites with shapes"),
                  json=(False, "print one JSON object"))
  _parse(values, argv, "info")
  from transferlab import inform
  spec, preprocessing = inform.find(values.backbone, values.image_size or None)
  if values.sites:
    sites = {name: list(shape) for name, shape in inform.site_shapes(spec).items()}
    if values.json:
      print(json.dumps(sites))
      return
    table = Table("site", "shape [B, …]")
    for name, shape in sites.items():
      table.add_row(name, str(shape))
    Console().print(table)
    return
  rows = inform.costs(spec, values.method or None, inform.options(values.options), values.num_classes,
                      batch_size=values.batch_size, remat=values.remat)
  if values.json:
    print(json.dumps(rows[0] if values.method else rows))
    return
  print(f"{spec}\n{preprocessing.describe() if preprocessing else 'preprocessing comes with the weights'}")
  table = Table("method", "trainable", "without classifier", "forward GFLOP", "train GFLOP", "peak MiB", "adapter kB")
  for row in rows:
    table.add_row(row["method"], f"{row['trainable']:,}", f"{row['trainable_without_classifier']:,}",
                  f"{row['forward_flops'] / 1e9:.1f}", f"{row['train_flops'] / 1e9:.1f}",
                  f"{row['train_peak_bytes'] / 2**20:.0f}", f"{row['adapter_bytes'] / 1e3:.0f}")
  Console().print(table)
  print(f"{rows[0]['frozen']:,} frozen parameters; a step of {values.batch_size} images, {values.num_classes} classes")


def convert(argv: list[str]) -> None:
  """Writes weights in timm's names."""
  values = _flags(backbone=_BACKBONE, out=("", "file or folder to write"),
                  architecture=("", "what it is expected to be"),
                  image_size=(0, "resample the position table to this size"), download=(False, "fetch a zoo entry"))
  _parse(values, argv, "convert")
  _required(values, "backbone", "out")
  from transferlab.backbones.weights import export_timm, load_weights
  weights = load_weights(values.backbone, architecture=values.architecture or None,
                         image_size=values.image_size or None, download=values.download)
  export_timm(weights, values.out)
  print(values.out)


def merge(argv: list[str]) -> None:
  """Writes the adapted backbone as plain weights with a head."""
  values = _flags(adapter=("", "adapter.safetensors of a run"), backbone=_BACKBONE, out=("", "file or folder to write"),
                  tolerance=(1e-3, "largest difference of logits allowed on a probe batch"))
  _parse(values, argv, "merge")
  _required(values, "adapter", "out")
  from transferlab import serve
  difference = serve.merge(serve.load(values.adapter, values.backbone), values.out, tolerance=values.tolerance)
  print(f"{values.out}: largest difference of logits {difference:.2e}; class names in {serve.classes_file(values.out)}")


def data_verb(argv: list[str]) -> None:
  """Checks a source of images (--data), or lists, checks or prepares published tasks (list, check, prepare NAME …)."""
  values = _flags(data=("", "what to check, e.g. folder:/images; all others are for list, check, prepare"),
                  data_dir=("", "folder of the data sets; $TFDS_DATA_DIR if empty, or else ~/tensorflow_datasets"),
                  accept=(False, "check: what is there now is right, whatever was found before"),
                  json=(False, "list, check: print one JSON list"),
                  download=(False, "prepare: fetch what is not there"),
                  file_format=("array_record", "prepare: array_record or tfrecord"))
  words = _parse(values, argv, "data", files=True)
  if not words:
    _required(values, "data")
  from transferlab import data_command
  given = {name: values[name].value for name in values if values[name].present}
  if not data_command.run(words, **given):
    raise SystemExit(1)


VERBS = {"train": train, "report": report, "eval": evaluate, "predict": predict, "info": info, "convert": convert,
         "merge": merge, "data": data_verb}


def main(argv: list[str] | None = None) -> None:
  """Runs a verb. What the user can mend is one line on standard error; TRANSFERLAB_TRACEBACK=1 shows its origin."""
  argv = list(sys.argv if argv is None else argv)
  if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
    print(USAGE)
    raise SystemExit(0 if len(argv) > 1 else 2)
  verb = argv[1]
  try:
    if verb not in VERBS:
      from transferlab.tree import nearest
      raise ValueError(f"verb {verb!r} is unknown; nearest: {nearest(verb, VERBS)[0]}; all: {', '.join(VERBS)}")
    VERBS[verb]([f"transferlab {verb}", *argv[2:]])
  except (ValueError, OSError, RuntimeError, flags.Error) as error:
    if os.environ.get("TRANSFERLAB_TRACEBACK"):
      raise
    hint = ""
    if isinstance(error, flags.UnrecognizedFlagError):
      hint = f"; transferlab {verb} --help lists the flags"
      hint += ", configuration keys are --config.NAME" * (verb == "train")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      hint = "; free some space and run the same command again" + ", it resumes" * (verb == "train")
    print("error: " + " ".join(str(error).split()) + hint, file=sys.stderr)
    raise SystemExit(1) from None
  except KeyboardInterrupt:
    print("stopped" + "; the same command resumes from the last checkpoint" * (verb == "train"), file=sys.stderr)
    raise SystemExit(130) from None


if __name__ == "__main__":
  main()
