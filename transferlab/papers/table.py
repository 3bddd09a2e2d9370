"""Tables of a paper's numbers beside ours; the two stand beside each other and are never averaged together."""
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from transferlab import data, metrics, report
from transferlab.progress import show_table
from transferlab.report import Score


class Table(NamedTuple):
  """A table as it is printed.

  Fields:
    title: what it is, and its source.
    header: names of the columns.
    formats: how numbers of each column are printed, ".1f"; "" as they are.
    rows: cells are text, numbers, `report.Score` or None, an empty one.
    averages: more rows, below a line.
    remarks: one line each.
  """
  title: str
  header: list[str]
  formats: list[str]
  rows: list[list]
  averages: list[list]
  remarks: list[str]

  def plain(self) -> dict:
    """As JSON has it: rows are {column: value}, scores {"mean", "std", "seeds"}, empty cells left out."""
    value = lambda cell: cell._asdict() if isinstance(cell, Score) else cell
    row = lambda cells: {name: value(cell) for name, cell in zip(self.header, cells) if cell is not None}
    return {"title": self.title, "rows": [row(cells) for cells in self.rows],
            "averages": [row(cells) for cells in self.averages], "remarks": self.remarks}

  def show(self) -> None:
    shown = RichTable(title=escape(self.title), box=box.SIMPLE)
    for i, name in enumerate(self.header):
      numbers = any(not isinstance(row[i], (str, type(None))) for row in self.rows)
      shown.add_column(escape(name), justify="right" if numbers else "left")
    for i, rows in enumerate((self.rows, self.averages)):
      if i:
        shown.add_section()
      for row in rows:
        shown.add_row(*(escape(_text(cell, form)) for cell, form in zip(row, self.formats)))
    show_table(shown)
    for remark in self.remarks:
      print(f"remark: {remark}")


def _text(cell, form: str) -> str:
  if cell is None or isinstance(cell, str):
    return cell or ""
  if isinstance(cell, Score):
    return format(cell.mean, form) + ("" if cell.std is None else f"±{format(cell.std, form)}")
  return format(cell, form)


def numbers(paper: str) -> dict:
  """What a paper printed, from the package's own file."""
  return json.loads(resources.files("transferlab.papers").joinpath(f"{paper}.json").read_text())


def accuracies(title: str, suite: str, printed: Mapping[str, Mapping[str, float]], names: Mapping[str, str],
               rows: Sequence[dict], called: Callable[[dict], str | None], told: Sequence[str], *, split: str = "test",
               allow: Sequence[str] = ()) -> Table:
  """Methods by tasks in per cent, as a paper printed them, and below each task ours where there are runs.

  Args:
    title: of the table.
    suite: the name of the suite that the tasks are; its groups are averaged, too.
    printed: method -> {task: per cent}.
    names: task -> what the paper calls it, in its order.
    rows: of our runs, `report.read`; those on other tasks, or of methods without a name here, are left out and counted.
    called: a row -> the paper's name of its method, or None.
    told: fields of rows that remarks name, such as "options.target_size"; "registered" is our name of the method.
    split, allow: as of `report.report`, whose rules say which runs are averaged.

  Raises:
    ValueError: rows, but none that belongs here; runs that must not be averaged, see `report.Unlike`.
  """
  ours = [{**row, "method": called(row), "registered": row["method"]} for row in rows
          if row["task"] in names and called(row)]
  if rows and not ours:
    raise ValueError(f"none of {len(rows)} runs belongs into this table (methods {', '.join(_all(rows, 'method'))}; "
                     f"tasks {', '.join(_all(rows, 'task')[:4])}); expected {', '.join(printed)} on tasks of {suite}")
  found, remarks = scores_of(ours, suite, split, allow) if ours else (report.Report({}, {}, "", []), [])
  methods = list(dict.fromkeys([*printed, *found.scores]))
  cells = []
  for task, name in names.items():
    cells.append([name, "paper", *(printed.get(method, {}).get(task) for method in methods)])
    scores = [found.scores.get(method, {}).get(task) for method in methods]
    if any(scores):
      cells.append([name, "ours", *(score and percent(score) for score in scores)])
  averages = _averages(printed, found, methods, names)
  left_out = len(rows) - len(ours)
  remarks += [f"{left_out} runs of other methods or tasks are left out"] * bool(left_out)
  remarks += [f"ours, {method}: " + "; ".join(f"{field} {', '.join(_all(mine, field))}" for field in told if _all(
      mine, field)) for method in found.scores if (mine := [row for row in ours if row["method"] == method])]
  return Table(title, ["task", "whose", *methods], ["", ""] + [".1f"] * len(methods), cells, averages, remarks)


def scores_of(rows: Sequence[dict], suite: str, split: str, allow: Sequence[str]) -> tuple[report.Report, list[str]]:
  """Our scores and averages; no averages, and a remark, where tasks are too unlike."""
  try:
    found = report.report(rows, suite, split, allow=allow)
    return found, list(found.remarks)
  except report.Unlike as error:
    found = report.report(rows, suite, split, allow=allow, average=False)
    return found, [*found.remarks, f"ours are not averaged: {error}"]


def _averages(printed: Mapping, found: report.Report, methods: Sequence[str], names: Mapping[str, str]) -> list[list]:
  """Rows of averages, of the paper's numbers and of ours, each only over what it has."""
  groups = {task: data.ENTRIES[task].group for task in names}
  paper = {method: metrics.averages(values, groups) for method, values in printed.items()}
  ours = {method: {name: 100 * value for name, value in values.items()} for method, values in found.averages.items()}
  return [[label, whose, *(each.get(method, {}).get(label) for method in methods)]
          for whose, each in (("paper", paper), ("ours", ours))
          for label in dict.fromkeys(name for values in each.values() for name in values)]


def percent(score: Score) -> Score:
  """A share as per cent."""
  return Score(100 * score.mean, None if score.std is None else 100 * score.std, score.seeds)


def _all(rows: Sequence[dict], field: str) -> list[str]:
  """The different values of a dotted field, as text."""
  values = [report.value(row, field) for row in rows]
  return list(dict.fromkeys(value if isinstance(value, str) else json.dumps(value) for value in values
                            if value is not None))
