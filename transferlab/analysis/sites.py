"""How well each activation serves each task: the validation accuracy of every adapter that InCA trained side by side
(Dukler et al. 2023, arXiv 2303.04105, whose abstract speaks of surveying a network's representations in this way)."""
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transferlab import plots, report
from transferlab.analysis.selected import SAME, in_order

METHODS = ("inca", "open_inca")


def sites(rows: Sequence[dict], folder, allow: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
  """Task x site, mean over seeds, from the `members` of runs with a validation split; a line for each task's best site.

  Raises:
    ValueError: no such run among `rows`.
    Unlike: runs that must not stand in one picture.
  """
  mine = [row for row in rows if row["method"] in METHODS and row.get("members")]
  if not mine:
    raise ValueError(f"none of {len(rows)} runs has scores of its sites; expected runs of {' or '.join(METHODS)} on "
                     "tasks with a validation split")
  report.report(mine, split="val", allow=allow, average=False)  # refuses unlike runs of one task, and one seed twice
  report.check_alike("the runs", mine, SAME, allow)
  columns = list(dict.fromkeys(site for row in mine for site in row["members"]))
  lines = [(task, method) for task in in_order([row["task"] for row in mine]) for method in METHODS]
  groups = {line: [row for row in mine if (row["task"], row["method"]) == line] for line in lines}
  groups = {line: group for line, group in groups.items() if group}
  both = len({row["method"] for row in mine}) > 1
  names = [f"{task}, {method}" if both else task for task, method in groups]
  values = np.full((len(groups), len(columns)), np.nan)
  remarks = []
  for i, group in enumerate(groups.values()):
    for j, site in enumerate(columns):
      found = [row["members"][site]["accuracy"] for row in group if site in row["members"]]
      values[i, j] = statistics.fmean(found) if found else np.nan
    best = int(np.nanargmax(values[i]))
    remarks.append(f"{names[i]}: best at {columns[best]}, {values[i, best]:.4f} on validation, mean of {len(group)} "
                   f"seed{'s' * (len(group) > 1)}")
  return plots.heat_map(Path(folder) / "inca_sites", values, names, columns, title="Accuracy of each site's adapter",
                        xlabel="site", ylabel="task", label="validation accuracy", digits=2), remarks
