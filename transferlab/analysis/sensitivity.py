"""DTL's accuracy, memory and time by M, the block after which it first writes (Fu et al. 2024, arXiv 2312.07856, figure
4): from the ledgers of sweeps over options.first_write."""
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transferlab import choice, plots, report
from transferlab.analysis.accuracy import alike_but, alike_tasks
from transferlab.analysis.selected import in_order
from transferlab.papers.table import numbers
from transferlab.plots import Plane, Point

OPTION, METHODS = "first_write", ("dtl", "dtl_plus")


class Place(NamedTuple):
  """What training with one M gave on a task.

  Fields:
    accuracy, spread: per cent, the mean over seeds and its standard deviation, None of one seed.
    peak, seconds: bytes and duration of a training step.
    heads: how many such a step trains at once.
    from_cache: whether from cached activations.
  """
  accuracy: float
  spread: float | None
  peak: float
  seconds: float
  heads: int
  from_cache: bool


def ledgers(paths: Sequence) -> list[dict]:
  """The rows of all sweeps in and below folders, each with the `path` of its ledger and its line there.

  Raises:
    ValueError: no sweep, or a ledger that no sweep wrote.
  """
  folders = sorted({file.parent for path in paths for file in Path(path).rglob("sweep*.jsonl")})
  if not folders:
    raise ValueError(f"no sweep in {', '.join(map(str, paths))}; expected folders with sweep.jsonl, which "
                     "`transferlab sweep` leaves")
  rows = []
  for file, number, row in (line for folder in folders for line in choice.lines(folder)):
    try:
      rows.append({**row, "path": f"{file} line {number}", "options": dict(row["options"]), "val": dict(row["val"])})
    except (ValueError, KeyError, TypeError):
      raise choice.no_row(file, number) from None
  return rows


def sensitivity(rows: Sequence[dict], folder, allow: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
  """Validation accuracy, XLA's peak bytes and seconds of a training step against M, task by task, and the means.

  Args:
    rows: of `ledgers`.

  Raises:
    ValueError: no sweep over M among them, or one of an earlier version, whose rows lack costs.
    Unlike: points that differ in more than M and the seed.
  """
  mine = [row for row in rows if row["method"] in METHODS and OPTION in row["options"]]
  diverged = [row for row in mine if row["val"].get("accuracy") is None]
  mine = [row for row in mine if row not in diverged]
  if len({row["options"][OPTION] for row in mine}) < 2:
    raise ValueError(f"{len(mine)} of {len(rows)} points are DTL's, of fewer than two values of options.{OPTION}; "
                     f"sweep --grid=\"options.{OPTION}=1,2,3\", see configs/dtl_ablation.py")
  if old := next((row for row in mine if not row.get("step_seconds") or "heads" not in row), None):
    raise ValueError(f"{old['path']} has no seconds of a step; expected a sweep of two steps or more, by this version; "
                     "run it again in another folder")
  alike_but(OPTION, mine, allow)
  found = {key: _places(key, mine, allow) for key in _keys(mine)}
  for method in dict.fromkeys(method for method, _ in found):
    _add_mean(method, found, [row for row in mine if row["method"] == method], allow)
  remarks = [f"left out, as it diverged: {row['path']}" for row in diverged] + _remarks(found)
  if len(devices := dict.fromkeys(row["device"] for row in mine)) > 1:
    remarks.append(f"points are of several devices, {', '.join(devices)}: their peaks and times do not compare")
  several = len({method for method, _ in found}) > 1
  series = {f"{method}, {task}" if several else task: places for (method, task), places in found.items()}
  return _written(Path(folder) / "dtl_sensitivity", series), remarks


def _keys(rows: Sequence[dict]) -> list[tuple[str, str]]:
  """(method, task) of the rows, tasks in the order of their suite."""
  there = {(row["method"], row["task"]) for row in rows}
  return [(method, task) for method in METHODS for task in in_order([row["task"] for row in rows])
          if (method, task) in there]


def _places(key: tuple[str, str], rows: Sequence[dict], allow: Sequence[str]) -> dict[int, Place]:
  """{M: what it gave} of one method on one task."""
  method, task = key
  groups = {}
  for row in rows:
    if (row["method"], row["task"]) == key:
      groups.setdefault(row["options"][OPTION], []).append(row)
  made = {}
  for M, group in sorted(groups.items()):
    score = report.report(group, split="val", allow=allow, average=False).scores[method][task]
    made[M] = Place(100 * score.mean, score.std and 100 * score.std,
                    statistics.fmean(row["train_peak_bytes"] for row in group),
                    statistics.fmean(row["step_seconds"] for row in group),
                    group[0]["heads"], any(row.get("from_cache") for row in group))
  return made


def _add_mean(method: str, found: dict, rows: Sequence[dict], allow: Sequence[str]) -> None:
  """Adds the mean over a method's tasks, where there are several, of which all have the same M."""
  lines = [places for (name, _), places in found.items() if name == method]
  if len(lines) < 2 or len({tuple(places) for places in lines}) > 1:
    return
  alike_tasks(f"the tasks of {method}", rows, allow)
  mean = lambda M, field: statistics.fmean(getattr(places[M], field) for places in lines)
  found[method, f"mean of {len(lines)} tasks"] = {
      M: Place(mean(M, "accuracy"), None, mean(M, "peak"), mean(M, "seconds"), place.heads, place.from_cache)
      for M, place in lines[0].items()}


def _remarks(found: dict[tuple[str, str], dict[int, Place]]) -> list[str]:
  """A line for every M of the last line of a method, its mean or only task; and what costs are of."""
  last = {method: (task, places) for (method, task), places in found.items()}
  lines = [f"{method}, {task}, M = {M}: val accuracy {place.accuracy:.1f}, peak {place.peak / 2**20:.1f} MiB, step "
           f"{1000 * place.seconds:.1f} ms" for method, (task, places) in last.items() for M, place in places.items()]
  every = [place for places in found.values() for place in places.values()]
  if (most := max(place.heads for place in every)) > 1:
    lines.append(f"a step trains up to {most} heads at once, peaks and times are theirs together; sweep over M alone "
                 "for those of one")
  if any(place.from_cache for place in every):
    lines.append("steps start from cached activations where M lets them: peaks and times are not those of images")
  text = ", ".join(f"{value} at M = {M}" for M, value in numbers("dtl")["figure4"].items())
  return [*lines, f"the paper's text has test accuracies averaged over VTAB-1k, {text}"]


def _written(path: Path, series: dict[str, dict[int, Place]]) -> list[Path]:
  """The table, a row for each M; the picture and its points."""
  rows = [[name, M, place.accuracy, place.spread, round(place.peak), place.seconds, place.heads]
          for name, places in series.items() for M, place in places.items()]
  table = plots.table(f"{path}_table.csv", ["series", "M", "val accuracy, per cent", "spread over seeds", "peak bytes",
                                            "seconds of a step", "heads"], rows)
  line = lambda value: {name: [value(M, place) for M, place in places.items()] for name, places in series.items()}
  planes = [Plane("accuracy", "M", "validation accuracy, per cent",
                  line(lambda M, place: Point(M, place.accuracy, place.spread))),
            Plane("memory", "M", "peak of a step, MiB", line(lambda M, place: Point(M, place.peak / 2**20))),
            Plane("time", "M", "step, ms", line(lambda M, place: Point(M, 1000 * place.seconds)))]
  return [table, *plots.planes(path, planes, title="DTL by M, the block after which it first writes")]
