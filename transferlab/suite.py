"""A suite of tasks, one run after another: every task that is present, with every seed.

    workdir/<task>/seed_<seed>/     each a run as `train.fit` leaves it

The same command goes on after an interruption: finished runs are not repeated, a run that was cut is resumed. Tasks
that are absent are reported and left out; a run that fails is reported and the next one starts. Several processes train
each run together; what fails in only some of them ends all.
"""
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from transferlab import data, distributed, experiment
from transferlab.data import entries
from transferlab.progress import say
from transferlab.report import pixels_from
from transferlab.tree import nearest


PATIENCE = 20.0  # seconds that a process which failed waits for the others to fail as well


class Outcome(NamedTuple):
  """What became of a suite: runs that stand, as ledger rows with their `path`; a line per absent task and per failure.
  """
  rows: list[dict]
  absent: list[str]
  failed: list[str]


def run(suite: str, config: str, workdir, overrides: Mapping[str, str] | None = None, seeds: Sequence[int] = (0, 1, 2),
        quiet: bool = False) -> Outcome:
  """Trains on all tasks of a suite that are in the data directory.

  Args:
    suite: a name of `data.SUITES`.
    config: a config file with its arguments, "configs/vtab.py:method=dtl". It has to take the arguments `task`, which
      is given the task's name, and `seed`.
    workdir: where the runs go.
    overrides: as for `experiment.load`, the same for all runs.
    seeds: of which each task is trained with each.

  Raises:
    ValueError: before the first run: an unknown suite, a configuration that cannot be read, no task present.
  """
  tell: Callable[[str], None] = (lambda message: None) if quiet else say
  configs, present, absent = opened(suite, config, overrides, seeds, tell)
  folders = {(name, seed): folder_of(workdir, name) / f"seed_{seed}" for name in present for seed in seeds}
  one = lambda run: {**experiment.run(configs[run], folders[run], quiet).result, "path": str(folders[run])}
  rows, failed = each({f"{run[0]}, seed {run[1]}": functools.partial(one, run) for run in folders}, tell)
  return Outcome(rows, absent, failed)


def opened(suite: str, config: str, overrides: Mapping[str, str] | None, seeds: Sequence[int], tell: Callable
           ) -> tuple[dict, list[str], list[str]]:
  """({(task, seed): configuration}, names of the tasks that are present, a line for each that is not); see `run`."""
  if suite not in data.SUITES:
    raise ValueError(f"suite {suite!r} is unknown; nearest: {nearest(suite, data.SUITES)[0]}; all: "
                     f"{', '.join(data.SUITES)}")
  configs = {(name, seed): _load(config, overrides, name, seed) for name in data.SUITES[suite] for seed in seeds}
  present, absent = distributed.agree(_sources(data.SUITES[suite], configs, seeds[0]))
  for line in absent:
    tell(f"left out: {line}")
  if not present:
    raise ValueError(f"none of the {len(absent)} tasks of {suite} can be read; first: {absent[0]}")
  if len({pixels_from(name, source) for name, source in present.items()}) > 1:
    tell(f"the tasks differ in where their pixels come from ({', '.join(f'{n}: {s}' for n, s in present.items())}); "
         "they will not be averaged; choose one with the argument source= of the configuration")
  tell(f"{suite}: {len(present)} of {len(data.SUITES[suite])} tasks, seeds {', '.join(map(str, seeds))}")
  return configs, list(present), absent


def folder_of(workdir, name: str) -> Path:
  """A task's folder."""
  return Path(workdir) / name.replace("/", "_")


def each(calls: Mapping[str, Callable], tell: Callable) -> tuple[list, list[str]]:
  """What the calls return, and a line for each that failed, which does not stop the next.

  Of several processes, which all call this alike, no other can go on where only some fail: there the error is raised.
  """
  done, failed = [], []
  for number, (what, call) in enumerate(calls.items(), 1):
    tell(f"{number}/{len(calls)} {what}")
    try:
      done.append(call())
    except (ValueError, RuntimeError, OSError) as error:  # what a user can mend; the next task may be fine
      def give_up(_, error=error):
        raise error
      distributed.meet(f"failed {what}", None, give_up, PATIENCE)
      failed.append(f"{what}: {' '.join(str(error).split())}")
      tell(f"failed: {failed[-1]}")
  return done, failed


def _load(config: str, overrides: Mapping[str, str] | None, name: str, seed: int):
  """The configuration of one run, checked as far as it can be without its data."""
  given = config.partition(":")[2]
  for argument in ("task", "seed"):
    if f",{argument}=" in f",{given}":
      raise ValueError(f"{config} names a {argument}; expected none, --suite and --seeds set it")
  found = experiment.load(experiment.with_arguments(config, f"task={name},seed={seed}"), dict(overrides or {}))
  read, _, recipe = experiment.parse(found)
  if read.data.partition("?")[0] != name:
    raise ValueError(f"{config} with task={name} reads data {found.data!r}; expected {name}; use the suite's own "
                     "config file")
  if recipe.seed != seed:
    raise ValueError(f"{config} with seed={seed} trains with seed {recipe.seed}; expected {seed}; leave config.seed to "
                     "--seeds, and let the config file pass its argument on")
  return found


def _sources(names: Sequence[str], configs: Mapping, seed: int) -> tuple[dict[str, str], list[str]]:
  """The form of each task that is there, and one line for each whose files are missing or not whole."""
  present, absent = {}, []
  for name in names:
    config = configs[name, seed]
    wanted = dict(parse_qsl(config.data.partition("?")[2])).get("source", "")
    try:
      present[name] = str(entries.choose(data.ENTRIES[name], entries.data_directory(config.data_dir), wanted))
    except (data.DataError, OSError) as error:
      absent.append(" ".join(str(error).split()))
  return present, absent
