"""Figures 1 and 3 of DTL (Fu et al. 2024, arXiv 2312.07856) as tables and, where a file is given, as pictures: accuracy
against parameters and memory, and accuracy over the number of shots."""
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from transferlab import plots, report
from transferlab.papers.dtl import PAPER, called, of_groups
from transferlab.papers.table import Table, numbers, percent, scores_of
from transferlab.plots import Plane, Point
from transferlab.report import Score

SHOTS = (1, 2, 4, 8, 16)
AVERAGE = "average of the five"
# What a step's peak depends on beside its method and task.
OF_A_PEAK = ("recipe.batch_size", "recipe.remat", "recipe.micro_batch", "cached", "image_size", "dtype", "device",
             "devices")


def trade_off(rows: Sequence[dict] = (), *, out: str = "", split: str = "test", allow: Sequence[str] = ()
              ) -> list[Table]:
  """Figure 1: average accuracy on VTAB-1k against parameters and memory; of our runs on ViT, XLA's peak bytes of a
  training step."""
  known = numbers(PAPER)
  tasks = set(known["tasks"].values())
  ours = [{**row, "method": called(row)} for row in rows if row["task"] in tasks and called(row)]
  if rows and not ours:
    raise ValueError(f"none of {len(rows)} runs belongs into figure 1; expected methods of the paper, on a ViT and "
                     "tasks of vtab1k")
  found, remarks = scores_of(ours, "vtab1k", split, allow) if ours else (report.Report({}, {}, "", []), [])
  costs, unlike = _costs(ours, allow)
  cells, remarks = [], remarks + unlike
  for name in dict.fromkeys([*known["table2"], *found.scores]):
    printed = known["table2"].get(name, {})
    label, value = of_groups(found.averages.get(name, {}))
    cells.append([name, *(printed.get(field) for field in ("params", "memory", "average")),
                  *costs.get(name, (None, None)), value, label])
  table = Table(f"DTL, figure 1, ViT-B/16 on VTAB-1k. {known['source']}",
                ["method", "#param (M)", "memory (GB)", "average", "ours (M)", "ours (MiB)", "ours", "ours is"],
                ["", ".2f", ".1f", ".1f", ".3f", ".0f", ".1f", ""], cells, [], remarks)
  return [_drawn(table, out, _trade_off_planes(cells), lines=False, columns=2)]


def _costs(ours: Sequence[dict], allow: Sequence[str]) -> tuple[dict[str, tuple], list[str]]:
  """{method: (million parameters, MiB of a step)}, means over its runs, and remarks. There is no mean of peaks that are
  not of like steps, and no cost that a run does not have."""
  groups: dict[str, list[dict]] = {}
  for row in ours:
    groups.setdefault(row["method"], []).append(row)
  unlike = lambda what, rows: _unlike(f"the peaks of {what}", rows, allow)
  apart = {method: found for method, rows in groups.items() if (found := unlike(method, rows))}
  remarks = [f"{found}: left out" for found in apart.values()]
  if found := unlike("the methods", [rows[0] for method, rows in groups.items() if method not in apart]):
    remarks.append(f"{found}: they do not compare")
  def mean(rows, field, unit):
    values = [row.get(field) for row in rows]
    return None if None in values else statistics.fmean(values) / unit
  return {method: (mean(rows, "trainable_without_classifier", 1e6),
                   None if method in apart else mean(rows, "train_peak_bytes", 2**20))
          for method, rows in groups.items()}, remarks


def _unlike(what: str, rows: Sequence[dict], allow: Sequence[str]) -> str:
  """In what the steps of runs differ, "" in nothing that their peaks depend on."""
  try:
    report.check_alike(what, rows, OF_A_PEAK, allow)
  except report.Unlike as error:
    return str(error).partition("; these are not")[0]
  return ""


def _trade_off_planes(cells: list[list]) -> list[Plane]:
  """The paper's two planes, and ours where there are runs. Full's parameters would leave all others in a corner."""
  made = []
  for whose, y, axes in (("paper", 3, ((1, "#param, M"), (2, "GPU memory, GB"))),
                         ("ours", 6, ((4, "parameters, M"), (5, "peak of a step, MiB")))):
    for x, xlabel in axes:
      series = {row[0]: [Point(row[x], row[y])] for row in cells
                if None not in (row[x], row[y]) and (row[0] != "Full" or "param" not in xlabel)}
      made.append(Plane(f"{whose}: {xlabel.partition(',')[0]}", xlabel, "average accuracy, per cent", series))
  return made


def few_shot(rows: Sequence[dict] = (), *, out: str = "", split: str = "test", allow: Sequence[str] = ()
             ) -> list[Table]:
  """Figure 3: accuracy over the number of shots on five fine-grained sets and their average, of our runs; the paper's
  points are in a picture only."""
  known = numbers(PAPER)
  names, remarks = {task: name for name, task in known["shots"].items()}, [known["lost"]["figure3"]]
  ours = [({**row, "method": called(row)}, int(shots[1])) for row in rows if row["task"] in names and called(row)
          and (shots := re.search(r"\bshots (\d+)", row["protocol"]))]
  if rows and not ours:
    raise ValueError(f"none of {len(rows)} runs belongs into figure 3; expected methods of the paper on tasks of "
                     "fewshot5, from configs/fewshot.py")
  lines: dict[tuple[str, str], dict[int, Score]] = {}  # (set, method): {shots: score}
  for k in sorted({shots for _, shots in ours}):
    found, more = scores_of([row for row, shots in ours if shots == k], "fewshot5", split, allow)
    remarks += [f"{k} shots: {remark}" for remark in more]
    for method, scores in found.scores.items():
      for task, score in scores.items():
        lines.setdefault((names[task], method), {})[k] = percent(score)
      if mean := found.averages[method].get("mean of 5 tasks"):
        lines.setdefault((AVERAGE, method), {})[k] = Score(100 * mean, None, 1)
  shown = sorted({*SHOTS, *(k for line in lines.values() for k in line)})
  order = [*known["shots"], AVERAGE]
  cells = [[*key, *(line.get(k) for k in shown)] for key, line in sorted(
      lines.items(), key=lambda item: order.index(item[0][0]))]
  ahead = {k: lines[AVERAGE, "DTL+"][k].mean - lines[AVERAGE, "FacT"][k].mean for k in shown
           if all(k in lines.get((AVERAGE, method), {}) for method in ("DTL+", "FacT"))}
  remarks += [f"ours, DTL+ less FacT: {', '.join(f'{gap:+.1f} at {k}' for k, gap in ahead.items())}"] * bool(ahead)
  remarks += [f"{len(rows) - len(ours)} runs of other methods or tasks are left out"] * (len(ours) < len(rows))
  table = Table(f"DTL, figure 3, few shots, ViT-B/16: our accuracy in per cent at so many images of a class. "
                f"{known['source']}", ["set", "method", *map(str, shown)], ["", "", *[".1f"] * len(shown)], cells, [],
                remarks)
  return [_drawn(table, out, [Plane(name, "shots", "accuracy, per cent", {
      method: [Point(k, score.mean, score.std) for k, score in line.items()]
      for (each, method), line in lines.items() if each == name}) for name in order])]


def _drawn(table: Table, out: str, found: Sequence[Plane], **how) -> Table:
  """The table, after drawing it where a file is given; that and its CSV are remarked."""
  if not out:
    return table
  files = plots.planes(Path(out).with_suffix(""), found, title=table.title.partition(".")[0], **how)
  return table._replace(remarks=[*table.remarks, *(f"written: {file}" for file in files)])
