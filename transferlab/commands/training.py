"""`transferlab train`."""
from absl import flags

from transferlab.commands.flags import DISTRIBUTED, config_changes, define, join, parse, required, seeds


def train(argv: list[str]) -> None:
  """Trains a method as a config file says, on one task or on a suite."""
  values = define(workdir=("", "folder for what the run leaves"),
                  suite=("", "train on every task of this suite that is present, one after another"),
                  seeds=("0,1,2", "seeds for each task of the suite"),
                  data_dir=("", "folder of the data sets of suites; same as --config.data_dir"),
                  config=("", "config file, its arguments after a colon; --config.KEY=value changes any key"),
                  bad_images=("", "error, or skip images that cannot be read; same as --config.bad_images"),
                  micro_batch=("", "images computed at once, or auto for as many as fit; same as --config.micro_batch"),
                  **DISTRIBUTED)
  overrides, rest = config_changes(argv)
  parse(values, rest, train)
  required(values, "config", "workdir")
  overrides |= {name: values[name].value for name in ("bad_images", "micro_batch", "data_dir") if values[name].value}
  if overrides.get("micro_batch") == "auto":
    overrides["micro_batch"] = "-1"
  join(values, train, overrides)
  if values.suite:
    _train_suite(values, overrides)
    return
  from transferlab import experiment
  run = experiment.run(experiment.load(values.config, overrides), values.workdir)
  print(run.adapter)


def _train_suite(values: flags.FlagValues, overrides: dict[str, str]) -> None:
  from transferlab import suite
  outcome = suite.run(values.suite, values.config, values.workdir, overrides, seeds(values.seeds))
  conclude(values.suite, outcome.rows, outcome.absent, outcome.failed)


def conclude(suite: str, rows: list[dict], absent: list[str], failed: list[str], allow: tuple = ()) -> None:
  """Prints the averages of a suite's runs where they are alike, and what is missing; raises if any failed."""
  from transferlab import report as report_lib
  if rows:
    split = "test" if all(row["test"] for row in rows) else "val"
    try:
      found = report_lib.report(rows, suite, split, allow=allow)
    except report_lib.Unlike as error:
      found = report_lib.report(rows, suite, split, allow=allow, average=False)
      found = found._replace(remarks=[*found.remarks, f"not averaged: {error}"])
    report_lib.show(found, f"{split} accuracy")
  for line in absent:
    print(f"left out: {line}")
  if failed:
    raise ValueError(f"{len(failed)} runs failed, first {failed[0]}; the same command tries them again")
