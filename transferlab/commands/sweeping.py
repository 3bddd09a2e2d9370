"""`transferlab sweep`."""
from absl import flags

from transferlab.commands.flags import DISTRIBUTED, config_changes, define, join, parse, required, seeds
from transferlab.commands.training import conclude


def sweep(argv: list[str]) -> None:
  """Trains a grid of configurations, chooses one on validation, trains it with several seeds and tests it once each."""
  values = define(workdir=("", "folder for what the sweep leaves"),
                  config=("", "config file, its arguments after a colon; --config.KEY=value changes any key"),
                  grid=("", "KEY=VALUE,VALUE;KEY+KEY=(VALUE,VALUE),(VALUE,VALUE);… of configuration keys, joined ones "
                            "vary together; by default the config file's own"),
                  folds=(0, "parts of the training split that are held out in turn; 0 to choose on the val split"),
                  contiguous=(False, "folds are consecutive images, as in Head2Toe's protocol; else stratified"),
                  features=("", "folder of cached activations; same as --config.features"),
                  final=("", "further arguments of the config file for the final runs, e.g. phase=final"),
                  nofinal=(False, "stop after the choice"), seeds=("0,1,2", "of the final runs"),
                  suite=("", "sweep every task of this suite that is present, each with a choice of its own"),
                  data_dir=("", "folder of the data sets of suites; same as --config.data_dir"), **DISTRIBUTED)
  overrides, rest = config_changes(argv)
  parse(values, rest, sweep)
  required(values, "config", "workdir")
  overrides |= {name: values[name].value for name in ("features", "data_dir") if values[name].value}
  from transferlab import grid as grid_lib
  how = {"folds": values.folds, "contiguous": values.contiguous, "seeds": [] if values.nofinal else seeds(values.seeds)}
  grid = grid_lib.parse(values.grid)
  join(values, sweep, overrides)
  if values.suite:
    _suite(values, grid, overrides, how)
    return
  from transferlab import experiment
  from transferlab import sweep as sweep_lib
  config = experiment.load(values.config, overrides)
  final = experiment.load(experiment.with_arguments(values.config, values.final), overrides)
  outcome = sweep_lib.run(config, grid or experiment.load_grid(values.config), values.workdir, final=final, **how)
  _show(outcome)
  conclude("", outcome.finals, [], [])


def _suite(values: flags.FlagValues, grid: dict, overrides: dict[str, str], how: dict) -> None:
  from transferlab import sweep as sweep_lib
  found = sweep_lib.run_suite(values.suite, values.config, grid, values.workdir, overrides, final=values.final, **how)
  for outcome in found.outcomes.values():
    _show(outcome)
  finals = [row for outcome in found.outcomes.values() for row in outcome.finals]
  chosen = {key for outcome in found.outcomes.values() for key in outcome.best.values}
  # Each task has its own choice, by its validation scores: that is the protocol, and no reason not to average.
  conclude(values.suite, finals, found.absent, found.failed, tuple(f"recipe.{key}" for key in sorted(chosen)))


def _show(outcome) -> None:
  from transferlab import choice
  choice.show(outcome.candidates, outcome.criterion, f"{outcome.rows[0]['task']}: the grid")
