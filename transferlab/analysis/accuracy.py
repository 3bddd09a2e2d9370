"""Head2Toe's accuracy against what it may depend on: T, the number of tapped layers, and how far a task lies from the
pre-training (Evci et al. 2022, arXiv 2201.03529).

Each function takes rows of `report.read`, writes CSV files and pictures into a folder, and returns the files and lines
to print.
"""
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from transferlab import plots, report
from transferlab.analysis.selected import in_order, layout_of_run, tested
from transferlab.papers.head2toe import PAPER, BACKBONES, called
from transferlab.papers.table import numbers

AFFINITY = ("Head2Toe", "Linear", "Scratch")


def _against(option: str, at: Callable[[dict], int | None], xlabel: str, name: str, log: bool, rows: Sequence[dict],
             folder, allow: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
  """Test accuracy against a number that an option of the runs gives.

  Args:
    option: what differs between the runs; everything else that averaged runs share is the same, or allowed.
    at: a row -> its x, None for a run that does not belong here.
    xlabel, name, log: of the picture.
  """
  mine = [{**row, "method": called(row)} for row in rows if option in row["options"] and called(row)]
  groups = {}
  for row in mine:
    if (x := at(row)) is not None:
      groups.setdefault(x, []).append(row)
  if len(groups) < 2:
    raise ValueError(f"the {len(mine)} runs that have options.{option}, of {len(rows)}, give {len(groups)} values of "
                     f"{xlabel}; expected runs that differ in it")
  mine = tested([row for x in sorted(groups) for row in groups[x]])
  alike_but(option, mine, allow)
  found = {x: report.report(groups[x], allow=allow, average=False).scores for x in sorted(groups)}
  methods, tasks = list(dict.fromkeys(row["method"] for row in mine)), in_order([row["task"] for row in mine])
  series, remarks = {}, []
  for method in methods:
    lines = {task: [plots.Point(x, 100 * score.mean, score.std and 100 * score.std) for x, scores in found.items()
                    if (score := scores.get(method, {}).get(task))] for task in tasks}
    lines = {task: line for task, line in lines.items() if line}
    if len(methods) == 1 or len(lines) == 1:
      series |= {task if len(methods) == 1 else f"{method}, {task}": line for task, line in lines.items()}
    if len(lines) > 1:
      name_ = f"{method}, mean of {len(lines)} tasks"
      try:
        alike_tasks(f"the tasks of {method}", [row for row in mine if row["method"] == method], allow)
        _add_mean(name_, lines, xlabel, series, remarks)
      except report.Unlike as error:
        remarks.append(f"{name_}: left out, {error}")
  if not series:
    raise ValueError("; ".join(remarks) + "; give the runs of one method to see them task by task")
  return plots.points(Path(folder) / name, series, title=f"Accuracy against {xlabel}", xlabel=xlabel,
                      ylabel="test accuracy, per cent", lines=True, log=log), remarks


def _add_mean(name: str, lines: dict[str, list[plots.Point]], xlabel: str, series: dict, remarks: list[str]) -> None:
  """Adds the mean of several tasks' lines to a picture's, or the remark that there is none."""
  places = {tuple(point.x for point in line) for line in lines.values()}
  if len(places) > 1:
    remarks.append(f"{name}: left out, the tasks have runs at different {xlabel}")
    return
  series[name] = [plots.Point(column[0].x, statistics.fmean(point.y for point in column))
                  for column in zip(*lines.values())]
  remarks.append(f"{name}: " + ", ".join(f"{point.y:.1f} at {point.x}" for point in series[name]))


def alike_but(option: str, rows: Sequence[dict], allow: Sequence[str]) -> None:
  """Runs of one method on one task differ in nothing but an option and the seed."""
  groups = {}
  for row in rows:
    stripped = {**row, "options": {name: value for name, value in row["options"].items() if name != option},
                "recipe": {name: value for name, value in row["recipe"].items() if name != "seed"}}
    groups.setdefault((row["method"], row["task"]), []).append(stripped)
  fields = [field for field in report.OF_A_TASK if field not in report.OF_A_DRAW]
  for (method, task), group in groups.items():
    report.check_alike(f"{method} on {task}", group, fields, allow)


def alike_tasks(what: str, rows: Sequence[dict], allow: Sequence[str]) -> None:
  """Tasks that enter a mean share what a suite's average asks for."""
  rows = [{**row, "pixels_from": report.pixels_from(row["task"], row["source"])} for row in rows]
  report.check_alike(what, rows, report.OF_A_SUITE, allow)


def _taps(row: dict) -> int:
  """Number of layers that a run reads."""
  sites = row["options"]["sites"]
  return len(layout_of_run(row).names) if sites == "paper" else 1 if isinstance(sites, str) else len(sites)


def _target_size(row: dict) -> int | None:
  """T, which the slides' Linear, reading a vector, does not heed."""
  return None if row["method"] == "Linear" else row["options"]["target_size"]


taps = partial(_against, "sites", _taps, "tapped layers", "head2toe_taps", False)
target_size = partial(_against, "target_size", _target_size, "target size T", "head2toe_target_size", True)


def affinity(rows: Sequence[dict], folder, allow: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
  """Gain of Head2Toe over linear against domain affinity, linear less scratch, both in points of accuracy: the slides'
  two backbones, and ours for the tasks that have runs of all three."""
  known = numbers(PAPER)
  series = {f"slides, {BACKBONES[backbone]}": _gains({method: dict(zip(known["tasks"], values[method]))
                                                 for method in AFFINITY})
            for backbone, values in known["accuracy"].items()}
  if rows:
    series["ours"] = _gains(_ours(rows, allow))
  remarks = []
  for name, found in series.items():
    x, y = np.array([(point.x, point.y) for point in found]).T
    correlation = f"Pearson correlation {np.corrcoef(x, y)[0, 1]:+.2f}" if len(found) > 2 else "too few to correlate"
    remarks.append(f"{name}: {len(found)} tasks, mean gain {y.mean():+.1f} points, {correlation}")
  return plots.points(Path(folder) / "head2toe_affinity", series, title="Gain of Head2Toe against domain affinity",
                      xlabel="domain affinity: linear - scratch, points",
                      ylabel="gain: Head2Toe - linear, points"), remarks


def _ours(rows: Sequence[dict], allow: Sequence[str]) -> dict[str, dict[str, float]]:
  """{method: {task: per cent}} of the three methods."""
  mine = [{**row, "method": called(row)} for row in rows if called(row) in AFFINITY]
  tested(mine)
  lacking = [method for method in AFFINITY if method not in {row["method"] for row in mine}]
  if lacking:
    raise ValueError(f"no run of {', '.join(lacking)} among {len(rows)}; affinity needs linear, scratch and head2toe "
                     "runs of the same tasks")
  for task in {row["task"] for row in mine}:
    report.check_alike(f"the methods on {task}", [row for row in mine if row["task"] == task],
                       ("backbone_hash", "image_size", "preprocessing", "protocol"), allow)
  names = {task: name for name, task in numbers(PAPER)["tasks"].items()}
  scores = report.report(mine, allow=allow, average=False).scores
  return {method: {names.get(task, task): 100 * score.mean for task, score in scores[method].items()}
          for method in AFFINITY}


def _gains(accuracy: dict[str, dict[str, float]]) -> list[plots.Point]:
  """A point for every task that all three methods have."""
  best, linear, scratch = (accuracy[method] for method in AFFINITY)
  tasks = [task for task in linear if task in best and task in scratch]
  if not tasks:
    raise ValueError(f"no task has runs of all of {', '.join(AFFINITY)}; expected the same tasks for each")
  return [plots.Point(linear[task] - scratch[task], best[task] - linear[task], label=task) for task in tasks]
