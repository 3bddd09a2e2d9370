"""`transferlab report`: averages of runs, tables of papers beside them, and figures."""
import json

from absl import flags

from transferlab.commands.flags import BACKBONE, define, parse, required, words

# Of figures that run a backbone over images.
IMAGES = {"backbone": BACKBONE, "tokenizer": ("", "a CLIP's, file or folder, unless it lies beside the weights"),
          "data": ("", "with --figure=lfa/rank: the images, e.g. folder:/images, or a task such as vtab/dtd"),
          "data_dir": ("", "folder of the data sets of suites"), "images": (2000, "how many of --split to look at")}


def report(argv: list[str]) -> None:
  """Averages finished runs, over seeds and over tasks, and refuses to average unlike ones."""
  values = define(suite=("", "suite to average over; by default the smallest that has the tasks"),
                  split=("test", "test or val"), score=("accuracy", "accuracy, mean_per_class or loss"),
                  allow=("", "fields that may differ all the same, e.g. recipe.optim,dtype"),
                  average=(True, "over tasks, too; --noaverage shows unlike ones beside each other"),
                  paper=("", "a paper's table, with or without runs beside it, e.g. head2toe/vit_b16"),
                  figure=("", "what the runs show, as CSV and picture in --out, e.g. head2toe/layers"),
                  measure=(False, "with --paper=dtl/table2, table3, table6 or lfa/efficiency: measure ours on this "
                           "machine, minutes"),
                  out=("", "folder for --figure; picture for --paper=dtl/figure1 or figure3"), **IMAGES,
                  json=(False, "print one JSON object"))
  folders = parse(values, argv, report, files=True)
  if values.paper or values.figure:
    _one_of(values)
    (_paper if values.paper else _figure)(values, folders)
    return
  if strangers := [name for name in IMAGES if values[name].present]:
    raise ValueError(f"--{strangers[0]} is for --figure=lfa/rank; leave it out")
  if not folders:
    raise ValueError("no runs given; name their folders, or one above them")
  from transferlab import report as report_lib
  found = report_lib.report(report_lib.read(folders), values.suite, values.split, values.score, words(values.allow),
                            values.average)
  if values.json:
    scores = {method: {task: score._asdict() for task, score in each.items()} for method, each in found.scores.items()}
    print(json.dumps({**found._asdict(), "scores": scores}))
    return
  report_lib.show(found, f"{values.split} {values.score}")


def _one_of(values: flags.FlagValues) -> None:
  """Refuses flags that a paper's table or a figure does not heed."""
  from transferlab import analysis
  of_all = ("suite", "score", "average", "split", "out", "figure", "measure", *IMAGES)
  known = ("paper", "split", "out", "measure") if values.paper else ("out", "figure")
  if values.figure in analysis.ON_IMAGES:
    known = (*known, "split", *IMAGES)
  if strangers := [name for name in of_all if values[name].present and name not in known]:
    what = "--paper" if values.paper else f"--figure={values.figure}"
    raise ValueError(f"--{strangers[0]} is not for {what}; leave it out")


def _paper(values: flags.FlagValues, folders: list[str]) -> None:
  from transferlab import papers
  from transferlab.report import read
  tables = papers.tables(values.paper, read(folders) if folders else (), split=values.split, allow=words(values.allow),
                         measure=values.measure, out=values.out)
  if values.json:
    print(json.dumps([table.plain() for table in tables]))
    return
  for table in tables:
    table.show()


def _figure(values: flags.FlagValues, folders: list[str]) -> None:
  from transferlab import analysis
  from transferlab.report import read
  required(values, "out")
  if not folders and values.figure in analysis.FIGURES and values.figure not in analysis.WITHOUT_RUNS:
    raise ValueError("no runs given; name their folders, or one above them")
  rows = (analysis.ledgers if values.figure in analysis.OF_SWEEPS else read)(folders) if folders else ()
  given = _on_images(values) if values.figure in analysis.ON_IMAGES else {}
  files, remarks = analysis.figure(values.figure, rows, values.out, words(values.allow), **given)
  if values.json:
    print(json.dumps({"files": list(map(str, files)), "remarks": remarks}))
    return
  print(*(f"remark: {line}" for line in remarks), *files, sep="\n")


def _on_images(values: flags.FlagValues) -> dict:
  """The weights and the images that a figure is of."""
  from transferlab import data
  from transferlab.backbones.weights import load_weights
  required(values, "backbone", "data")
  return {"task": data.from_string(values.data, values.data_dir), "split": values.split, "images": values.images,
          "weights": load_weights(values.backbone, tokenizer=values.tokenizer or None)}
