"""`transferlab report`: averages of runs, tables of papers beside them, and figures."""
import json

from absl import flags

from transferlab.commands.flags import define, parse, required, words


def report(argv: list[str]) -> None:
  """Averages finished runs, over seeds and over tasks, and refuses to average unlike ones."""
  values = define(suite=("", "suite to average over; by default the smallest that has the tasks"),
                  split=("test", "test or val"), score=("accuracy", "accuracy, mean_per_class or loss"),
                  allow=("", "fields that may differ all the same, e.g. recipe.optim,dtype"),
                  average=(True, "over tasks, too; --noaverage shows unlike ones beside each other"),
                  paper=("", "a paper's table, with or without runs beside it, e.g. head2toe/vit_b16"),
                  figure=("", "what the runs show, as CSV and picture in --out, e.g. head2toe/layers"),
                  measure=(False, "with --paper=dtl/table2, table3 or table6: measure ours on this machine, minutes"),
                  out=("", "folder for --figure; picture for --paper=dtl/figure1 or figure3"),
                  json=(False, "print one JSON object"))
  folders = parse(values, argv, report, files=True)
  if values.paper or values.figure:
    _one_of(values)
    (_paper if values.paper else _figure)(values, folders)
    return
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
  given = [name for name in ("suite", "score", "average", "split", "out", "figure", "measure") if values[name].present]
  known = ("paper", "split", "out", "measure") if values.paper else ("out", "figure")
  if strangers := [name for name in given if name not in known]:
    raise ValueError(f"--{strangers[0]} is not for --{'paper' if values.paper else 'figure'}; leave it out")


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
  files, remarks = analysis.figure(values.figure, rows, values.out, words(values.allow))
  if values.json:
    print(json.dumps({"files": list(map(str, files)), "remarks": remarks}))
    return
  print(*(f"remark: {line}" for line in remarks), *files, sep="\n")
