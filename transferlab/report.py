"""Tables from the ledger: rows of finished runs, averaged over seeds and then over tasks, where they are alike.

A row is a run's result.json. Averages of unlike rows are how wrong tables come about (inputs normalised differently,
JPEG copies against original pixels, 5,000 steps against 15,000), so they are refused, with the field that differs.
"""
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from transferlab import config, data, metrics
from transferlab.progress import show_table
from transferlab.tree import nearest

# What rows of one task and method share; only the seed, and what it draws, may differ.
OF_A_TASK = ("backbone_hash", "image_size", "preprocessing", "method", "options", "protocol", "recipe", "steps",
             "dtype", "form", "split_hash", "pixels")
OF_A_DRAW = ("form", "split_hash", "pixels")  # of these, what a seed that draws the splits may change
# What tasks that enter one average share. Learning rates and a method's options may be a task's own, as published.
OF_A_SUITE = ("backbone_hash", "image_size", "preprocessing", "method", "protocol", "recipe.duration",
              "recipe.batch_size", "recipe.per_domain", "recipe.augmentation", "recipe.select", "dtype", "pixels_from")
# Different libraries are no reason to refuse, but one to say so.
REMARKED = ("versions", "device")
SCORES = ("accuracy", "mean_per_class", "loss")


class Unlike(ValueError):
  """Rows that must not be averaged; says which field differs, and between which runs."""


class Score(NamedTuple):
  """A method's score on a task: mean and standard deviation (ddof 1; None of one seed) over `seeds` runs."""
  mean: float
  std: float | None
  seeds: int


class Report(NamedTuple):
  """What `report` returns.

  Fields:
    scores: method -> task -> Score.
    averages: method -> name of the average, "mean of 19 tasks" -> value.
    suite: name of the suite that the tasks belong to, "" for none.
    remarks: one line each: single seeds, missing tasks, differing versions.
  """
  scores: dict[str, dict[str, Score]]
  averages: dict[str, dict[str, float]]
  suite: str
  remarks: list[str]


def read(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[dict]:
  """The rows of all runs in and below folders; each gets its `path`.

  Raises:
    ValueError: no finished run, or a result.json that no run wrote.
  """
  paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  files = sorted({file for path in paths for file in Path(path).rglob("result.json")})
  if not files:
    raise ValueError(f"no finished run in {', '.join(map(str, paths))}; expected folders with result.json, which "
                     "`transferlab train` leaves")
  rows = []
  for file in files:
    try:
      row = json.loads(file.read_text())
    except (OSError, ValueError) as error:
      raise ValueError(f"{file} cannot be read ({error}); expected the row of a finished run") from None
    known = isinstance(row, dict) and {"backbone", "method", "options", "task", "source", "protocol", "recipe",
                                       "test"} <= set(row)
    if not known or not isinstance(row["options"], dict) or not isinstance(row["recipe"], dict):
      raise ValueError(f"{file} is no row of a run; expected what `transferlab train` writes")
    rows.append({**row, "path": str(file.parent)})
  return rows


def report(rows: Sequence[dict], suite: str = "", split: str = "test", score: str = "accuracy",
           allow: Sequence[str] = (), average: bool = True) -> Report:
  """Scores by method and task, and the suite's averages.

  Args:
    rows: from `read`.
    suite: a name of `data.SUITES`; by default the smallest that has all the tasks.
    split: "test" or "val".
    score: "accuracy", "mean_per_class" or "loss".
    allow: fields that may differ all the same, such as "recipe.optim"; the remarks name them.
    average: over tasks, too; without, tasks and methods stand beside each other unlike as they may be.

  Raises:
    Unlike: rows differ in a field that they have to share, or are the same run twice.
    ValueError: an unknown suite, split or score; rows without it.
  """
  if split not in ("val", "test") or score not in SCORES:
    raise ValueError(f"split is {split!r} and score {score!r}; expected val or test, and one of {', '.join(SCORES)}")
  rows = [{**row, "form": _form(row["source"]), "pixels_from": pixels_from(row["task"], row["source"])} for row in rows]
  tasks = list(dict.fromkeys(row["task"] for row in rows))
  suite = suite or _suite_of(tasks)
  names = _tasks_of(suite) if suite else tasks
  if strangers := [task for task in tasks if task not in names]:
    raise ValueError(f"tasks {', '.join(strangers)} are not in suite {suite!r}; report them apart")
  scores, averages, remarks = {}, {}, []
  for method in dict.fromkeys(row["method"] for row in rows):
    mine = [row for row in rows if row["method"] == method]
    groups = {task: [row for row in mine if row["task"] == task] for task in names}
    groups = {task: group for task, group in groups.items() if group}
    for task, group in groups.items():
      _check_task(f"{method} on {task}", group, allow)
    scores[method] = {task: _score(group, split, score) for task, group in groups.items()}
    averages[method] = {}
    if average:
      check_alike(f"the tasks of {method}", [group[0] for group in groups.values()], OF_A_SUITE, allow)
      averages[method] = _averages(suite, names, {task: found.mean for task, found in scores[method].items()})
    remarks += _remarks(method, names, scores[method])
  if average:
    _check_methods(rows, tasks, allow)
  remarks += [f"{name} differ between the runs" for name in REMARKED if len({_text(row, name) for row in rows}) > 1]
  remarks += [f"allowed to differ: {name}" for name in allow]
  return Report(scores, averages, suite, remarks)


def show(found: Report, title: str) -> None:
  """Prints tasks by methods, the averages below a line, then the remarks."""
  table = Table("task", *found.scores, title=f"{found.suite + ': ' if found.suite else ''}{title}")
  for task in dict.fromkeys(task for scores in found.scores.values() for task in scores):
    table.add_row(escape(task), *(_cell(scores.get(task)) for scores in found.scores.values()))
  table.add_section()
  for name in dict.fromkeys(name for averages in found.averages.values() for name in averages):
    table.add_row(name, *(f"{averages[name]:.4f}" if name in averages else "" for averages in found.averages.values()))
  show_table(table)
  for remark in found.remarks:
    print(f"remark: {remark}")


def _cell(score: Score | None) -> str:
  if score is None:
    return ""
  return f"{score.mean:.4f}" + (f" ± {score.std:.4f} ({score.seeds})" if score.std is not None else " (1)")


def _check_task(what: str, rows: list[dict], allow: Sequence[str]) -> None:
  """Rows of one method on one task."""
  rows = [{**row, "recipe": {k: v for k, v in row["recipe"].items() if k != "seed"}, "seed": row["recipe"].get("seed")}
          for row in rows]
  check_alike(what, rows, [name for name in OF_A_TASK if name not in OF_A_DRAW], allow)
  _check_images(what, rows, allow)
  seen = {}
  for row in rows:
    key = (row["seed"], row.get("draw", ""))
    if key in seen:
      raise Unlike(f"{what}: seed {key[0]} is there twice, in {seen[key]} and {row['path']}; report one of them")
    seen[key] = row["path"]


def _check_methods(rows: list[dict], tasks: list[str], allow: Sequence[str]) -> None:
  """Methods are compared on the same inputs; their recipes are their own."""
  fields = [name for name in OF_A_SUITE if name != "method" and not name.startswith("recipe")]
  check_alike("the methods", list({row["method"]: row for row in reversed(rows)}.values())[::-1], fields, allow)
  for task in tasks:
    _check_images(f"the methods on {task}", [row for row in rows if row["task"] == task], allow)


def _check_images(what: str, rows: list[dict], allow: Sequence[str]) -> None:
  """A draw's rows have the same images, whoever trained on them; other draws have others by design."""
  for draw in dict.fromkeys(row.get("draw", "") for row in rows):
    check_alike(what, [row for row in rows if row.get("draw", "") == draw], OF_A_DRAW, allow)


def check_alike(what: str, rows: list[dict], fields: Iterable[str], allow: Sequence[str]) -> None:
  """Raises `Unlike` where rows differ in one of the dotted fields; `allow` holds starts of what may differ."""
  for row in rows[1:]:
    for name in fields:
      if _text(row, name) == _text(rows[0], name):
        continue
      changes = config.changes(_as_dict(name, rows[0]), _as_dict(name, row))
      left = [change for change in changes if not any(change.startswith(field) for field in allow)]
      if left:
        raise Unlike(f"{what} differ in {'; '.join(left[:3])} ({rows[0]['path']} against {row['path']}); these are not "
                     f"averaged; report them apart, or say --allow={name}")


def value(row: dict, name: str):
  """A dotted field of a row, "options.rank"; None if it has none."""
  for part in name.split("."):
    row = row.get(part) if isinstance(row, dict) else None
  return row


def _text(row: dict, name: str) -> str:
  return json.dumps(value(row, name), sort_keys=True)


def _as_dict(name: str, row: dict) -> dict:
  return {name: value(row, name)}


def _form(source: str) -> str:
  """TFDS's two file formats hold the same examples."""
  form, _, version = source.partition(" ")
  return f"tfds {version}" if form in ("array_record", "tfrecord") else form


def pixels_from(task: str, source: str) -> str:
  """VTAB-1k's extracted images are often JPEG copies of the arrays that TFDS has: ten points on CIFAR-100."""
  return "extracted copies" if task.startswith("vtab/") and _form(source) == "list" else "originals"


def _suite_of(tasks: Sequence[str]) -> str:
  fitting = [name for name, members in data.SUITES.items() if set(tasks) <= set(members)]
  return min(fitting, key=lambda name: len(data.SUITES[name])) if fitting else ""


def _tasks_of(suite: str) -> tuple[str, ...]:
  if suite not in data.SUITES:
    raise ValueError(f"suite {suite!r} is unknown; nearest: {nearest(suite, data.SUITES)[0]}; all: "
                     f"{', '.join(data.SUITES)}")
  return data.SUITES[suite]


def _score(rows: list[dict], split: str, score: str) -> Score:
  for row in rows:
    if not row[split]:
      raise ValueError(f"{row['path']} has no {split} score; runs that tune have val only, those without val split "
                       f"have test only; give --split={'val' if split == 'test' else 'test'}")
  values = [row[split][score] for row in rows]
  return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _averages(suite: str, names: Sequence[str], means: dict[str, float]) -> dict[str, float]:
  groups = {name: data.ENTRIES[name].group if suite else "" for name in names}
  return metrics.averages(means, groups)


def _remarks(method: str, names: Sequence[str], scores: dict[str, Score]) -> list[str]:
  missing = [name for name in names if name not in scores]
  single = [name for name, score in scores.items() if score.seeds == 1]
  return ([f"{method} lacks {', '.join(missing)}"] if missing else []) + (
      [f"{method}: a single seed for {', '.join(single)}"] if single else [])
