"""`transferlab train` and `report`."""
import json
import re

from absl import flags

from transferlab.commands.flags import define, parse, required, words


def train(argv: list[str]) -> None:
  """Trains a method as a config file says, on one task or on a suite."""
  values = define(workdir=("", "folder for what the run leaves"),
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
  parse(values, rest, train)
  required(values, "config", "workdir")
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
  seeds = words(values.seeds)
  if not seeds or not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) != len(seeds):
    raise ValueError(f"--seeds is {values.seeds!r}; expected different whole numbers, such as 0,1,2")
  outcome = suite.run(values.suite, values.config, values.workdir, overrides, [int(seed) for seed in seeds])
  if outcome.rows:
    split = "test" if all(row["test"] for row in outcome.rows) else "val"
    try:
      found = report_lib.report(outcome.rows, values.suite, split)
    except report_lib.Unlike as error:
      found = report_lib.report(outcome.rows, values.suite, split, average=False)
      found = found._replace(remarks=[*found.remarks, f"not averaged: {error}"])
    report_lib.show(found, f"{split} accuracy")
  for line in outcome.absent:
    print(f"left out: {line}")
  if outcome.failed:
    raise ValueError(f"{len(outcome.failed)} runs failed, first {outcome.failed[0]}; the same command tries them again")


def report(argv: list[str]) -> None:
  """Averages finished runs, over seeds and over tasks, and refuses to average unlike ones."""
  values = define(suite=("", "suite to average over; by default the smallest that has the tasks"),
                  split=("test", "test or val"), score=("accuracy", "accuracy, mean_per_class or loss"),
                  allow=("", "fields that may differ all the same, e.g. recipe.optim,dtype"),
                  average=(True, "over tasks, too; --noaverage shows unlike ones beside each other"),
                  json=(False, "print one JSON object"))
  folders = parse(values, argv, report, files=True)
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
