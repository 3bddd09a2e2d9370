"""Which features Head2Toe kept, read from the adapters of finished runs (Evci et al. 2022, arXiv 2201.03529): how many
come from each layer, how many two tasks share, and how one task's features serve another.

Each function takes rows of `report.read`, writes CSV files and pictures into a folder, and returns the files and lines
to print.
"""
import functools
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transferlab import backbones, config, data, plots, report
from transferlab.checkpoint import Adapter, load_adapter
from transferlab.methods.head2toe import layout_of
from transferlab.methods.head2toe_features import Layout

SELECTING = ("head2toe", "head2toe_ft")
LAYOUT = ("sites", "target_size", "cls")  # options that say which features there are
SAME = ("backbone_hash", "image_size", "preprocessing")  # what all runs of one picture share


class Selected(NamedTuple):
  """What a run kept.

  Fields:
    task, seed, path: whose features they are.
    kept: [K] different indices among all features.
    layout: whose indices they are.
    backbone: hash of its weights.
    options: of the method.
  """
  task: str
  seed: int
  path: str
  kept: np.ndarray
  layout: Layout
  backbone: str
  options: dict


@functools.cache
def _layout(spec, sites, target_size: int, cls: str) -> Layout:
  return layout_of(spec, sites=sites, target_size=target_size, cls=cls)


def layout_of_run(row: dict) -> Layout:
  """The layers that a run reads, by its adapter."""
  return _layout_of(load_adapter(Path(row["path"]) / "adapter.safetensors"))


def _layout_of(adapter: Adapter) -> Layout:
  spec = config.fill(backbones.FAMILIES[adapter.backbone["spec"]["family"]][0], adapter.backbone["spec"], "spec")
  return _layout(spec, *(adapter.method.options[name] for name in LAYOUT))


def read_adapter(path) -> Selected:
  """The features that an adapter file of a Head2Toe run holds.

  Raises:
    ValueError: no adapter, one of another method, or a damaged one.
  """
  adapter = load_adapter(path)
  method, state = adapter.method, adapter.state
  if method.name not in SELECTING or "kept" not in state:
    raise ValueError(f"{path} is an adapter of {method.name}; expected one that has selected features, of "
                     f"{' or '.join(SELECTING)}")
  layout, kept = _layout_of(adapter), np.asarray(state["kept"])
  if not kept.size or kept.min() < 0 or kept.max() >= layout.total or len(np.unique(kept)) < len(kept):
    raise ValueError(f"{path} keeps features that cannot be: expected different numbers from 0 to {layout.total - 1}; "
                     "the file is damaged, train again")
  seed = report.value(adapter.header, "recipe.seed")
  return Selected(adapter.header.get("task", ""), seed, str(path), kept, layout, adapter.backbone["hash"],
                  method.options)


def read(rows: Sequence[dict]) -> list[Selected]:
  """The features of all Head2Toe runs among `rows`, tasks in the order of their suite.

  Raises:
    ValueError: none among them, a task's seed twice, or an adapter that is missing, damaged or of another run.
  """
  mine = [row for row in rows if row["method"] in SELECTING and row["options"].get("fraction") != 1]
  if not mine:
    methods = ", ".join(dict.fromkeys(row["method"] for row in rows)) or "none"
    raise ValueError(f"no run selects features among {len(rows)} (methods: {methods}); expected runs of "
                     f"{' or '.join(SELECTING)}")
  found, seen = [], {}
  for row in mine:
    selected = read_adapter(Path(row["path"]) / "adapter.safetensors")
    key = (row["task"], row["recipe"].get("seed"))
    if (selected.task, selected.seed) != key or selected.backbone != row.get("backbone_hash"):
      raise ValueError(f"{row['path']}: the adapter is of task {selected.task!r}, seed {selected.seed}, and the result "
                       f"of {key[0]!r}, seed {key[1]}, or their backbones differ; expected the files of one run")
    if key in seen:
      raise ValueError(f"{key[0]}, seed {key[1]} is there twice, in {seen[key]} and {row['path']}; give one of them")
    seen[key] = row["path"]
    found.append(selected)
  order = in_order([each.task for each in found])
  return sorted(found, key=lambda each: (order.index(each.task), each.seed))


def in_order(tasks: Sequence[str]) -> list[str]:
  """Each task once, those of suites first and as these have them."""
  return list(dict.fromkeys([task for task in data.ENTRIES if task in tasks] + list(tasks)))


def _same(found: Sequence[Selected], fields: Sequence[str], what: str) -> None:
  """Refuses runs whose features are not the same; `fields` are of the layout, or "backbone"."""
  get = lambda each, field: each.backbone if field == "backbone" else getattr(each.layout, field)
  for each in found[1:]:
    for field in fields:
      if get(each, field) != get(found[0], field):
        options = config.changes(*({name: run.options[name] for name in LAYOUT} for run in (found[0], each)))
        raise ValueError(f"{found[0].path} and {each.path} have features of different layouts "
                         f"({'; '.join(options) or 'other backbones'}); {what}: give runs of one layout")


def _by_task(found: Sequence[Selected]) -> dict[str, list[Selected]]:
  return {task: list(group) for task, group in itertools.groupby(found, key=lambda each: each.task)}


def tested(rows: Sequence[dict]) -> list[dict]:
  """The rows, if all have a test score, which figures of accuracies show."""
  if without := [row["path"] for row in rows if not row["test"]]:
    raise ValueError(f"{without[0]} has no test score; give final runs, the figure shows test accuracies")
  return list(rows)


def _mean(values: Sequence[float]) -> float:
  return statistics.fmean(values) if values else float("nan")


def layers(rows: Sequence[dict], folder, allow: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
  """How many of the kept features come from each layer, by task: the counts of every run, and a heat map of the shares,
  averaged over seeds. T may differ between tasks, the layers may not."""
  del allow
  found = read(rows)
  _same(found, ["names", "backbone"], "a layer that some lack has no share there, another network's is another")
  names = found[0].layout.names
  counts = [[len(part) for part in run.layout.split(run.kept).values()] for run in found]
  files = [plots.table(Path(folder) / "head2toe_layers_counts.csv", ["task", "seed", "features", "kept", *names], (
      [run.task, run.seed, run.layout.total, len(run.kept), *row] for run, row in zip(found, counts)))]
  shares, remarks = {}, []
  for task, runs in _by_task(found).items():
    each = [np.array(row) / len(run.kept) for run, row in zip(found, counts) if run.task == task]
    shares[task] = np.mean(each, axis=0)  # [layers]
    most = ", ".join(f"{names[i]} {shares[task][i]:.0%}" for i in np.argsort(-shares[task], kind="stable")[:3])
    kept = ", ".join(dict.fromkeys(f"{len(run.kept):,} of {run.layout.total:,}" for run in runs))
    remarks.append(f"{task}: {kept} features kept; most from {most}")
  return files + plots.heat_map(
      Path(folder) / "head2toe_layers", list(shares.values()), list(shares), names, xlabel="layer", ylabel="task",
      title="Layers that Head2Toe's features come from", label="share of the kept features",
      limits=(0, None)), remarks


def overlap(rows: Sequence[dict], folder, allow: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
  """How many features two tasks share: of the smaller of both sets, and of their union (Jaccard).

  A cell is the mean over all pairs of a run of one task and a run of the other; on the diagonal over pairs of seeds,
  missing where there is one: what two runs of one task share is the most to expect of two tasks.
  """
  del allow
  found = read(rows)
  _same(found, ["names", "sizes", "backbone"], "the same number is another feature in each")
  groups = _by_task(found)
  smaller, union, chance = ({} for _ in range(3))
  for a, b in itertools.product(groups, repeat=2):
    pairs = [(x, y) for x in groups[a] for y in groups[b] if x is not y]
    shared = [len(np.intersect1d(x.kept, y.kept, assume_unique=True)) for x, y in pairs]
    sizes = [sorted((len(x.kept), len(y.kept))) for x, y in pairs]
    smaller[a, b] = _mean([n / least for n, (least, _) in zip(shared, sizes)])
    union[a, b] = _mean([n / (least + most - n) for n, (least, most) in zip(shared, sizes)])
    chance[a, b] = _mean([most / found[0].layout.total for _, most in sizes])
  files, tasks, N = [], list(groups), len(groups)
  for name, values, label in (("overlap", smaller, "shared / smaller set"), ("jaccard", union, "shared / union")):
    files += plots.heat_map(
        Path(folder) / f"head2toe_{name}", np.reshape(list(values.values()), (N, N)), tasks, tasks, xlabel="task",
        ylabel="task", title=f"Features that two tasks share ({label})", label=label, limits=(0, 1), digits=2)
  apart = [value for (a, b), value in smaller.items() if a != b]
  within = [value for (a, b), value in smaller.items() if a == b and not np.isnan(value)]
  remarks = [f"two tasks share {statistics.fmean(apart):.1%} of the smaller set on average, random sets would "
             f"{statistics.fmean(value for (a, b), value in chance.items() if a != b):.1%}"] if apart else []
  remarks += [f"two seeds of one task share {statistics.fmean(within):.1%}"] if within else []
  return files, remarks or ["a single run has nothing to share features with"]


def transfer(rows: Sequence[dict], folder, allow: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
  """Accuracy of each task (columns) on features that others (rows) selected: runs of `head2toe_given`, and on the
  diagonal those of `head2toe`, whose features are their own."""
  given = [{**row, "method": row["options"]["source"], "options": {
      **row["options"], "kept": len(row["options"]["kept"])}} for row in rows if row["method"] == "head2toe_given"]
  if not given or not all(row["method"] for row in given):
    raise ValueError(f"{len(given)} of {len(rows)} runs are of head2toe_given, with the task whose features they take; "
                     "train some with configs/head2toe.py:task=B,given=A/adapter.safetensors")
  own = [{**row, "method": row["task"]} for row in rows if row["method"] == "head2toe"]
  tested([*own, *given])
  report.check_alike("the runs", [*own, *given], SAME, allow)
  for task in dict.fromkeys(row["task"] for row in given):
    on_task = [row for row in (*own, *given) if row["task"] == task]
    report.check_alike(f"the runs on {task}", on_task, ["protocol"], allow)
  scores = report.report([*own, *given], allow=allow, average=False).scores
  targets, sources = (in_order([row[field] for row in (*given, *own)]) for field in ("task", "method"))
  percent = {(a, b): 100 * scores[a][b].mean for a in sources for b in targets if b in scores[a]}
  values = np.array([[percent.get((a, b), np.nan) for b in targets] for a in sources])
  change = values - [percent.get((b, b), np.nan) for b in targets]
  files = plots.heat_map(
      Path(folder) / "head2toe_transfer", values, sources, targets, xlabel="trained on", ylabel="features of",
      title="Tasks on each other's features: test accuracy, per cent", digits=1, colours=change,
      label="points against own features")
  remarks = []
  for a, row in zip(sources, change):
    others = [value for b, value in zip(targets, row) if a != b and np.isfinite(value)]
    if others:
      remarks.append(f"features of {a}: {statistics.fmean(others):+.1f} points against the task's own, mean of "
                     f"{len(others)} {'task' if len(others) == 1 else 'tasks'}")
  return files, remarks


def given(path) -> dict:
  """Options of `head2toe_given` that train another task on the features of an adapter file."""
  found = read_adapter(path)
  same = {name: found.options[name] for name in (*LAYOUT, "normalisation", "compat")}
  return {**same, "kept": tuple(found.kept.tolist()), "total": found.layout.total, "source": found.task}
