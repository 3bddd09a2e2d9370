"""Tables 2 to 5 of DTL (Fu et al. 2024, arXiv 2312.07856): accuracies as printed, beside ours; its costs, see
`dtl_costs`, and figures, `dtl_figures`, have modules of their own.

Printed averages are means of VTAB's three group means. What the text of the paper lost is named in `dtl.json`.
"""
import functools
from collections.abc import Sequence

from transferlab import report
from transferlab.papers import recipes
from transferlab.papers.dtl_costs import costs
from transferlab.papers.table import Table, accuracies, numbers, scores_of

PAPER = "dtl"
NAMES = {"full": "Full", "linear": "Linear", "bitfit": "BitFit", "vpt_deep": "VPT", "vpt_shallow": "VPT-shallow",
         "lst": "LST", "lora": "LoRA", "adapter": "Adapter", "adaptformer": "AdaptFormer", "noah": "NOAH",
         "fact_tk": "FacT", "fact_tt": "FacT-TT", "ssf": "SSF", "dtl": "DTL", "dtl_plus": "DTL+",
         "dtl_plus_star": "DTL+*"}
FAMILIES = {"table2": "vit", "table3": "swin"}
RANKS = {"vit": 2, "swin": 4}
OF_AN_ABLATION = ("options.first_read", "options.first_write")  # the size of a convolution is a task's own
TOLD = ("backbone", "image_size", "registered", "options.rank", "options.first_write", "options.kernel",
        "options.form", "options.scale", "options.dim", "options.prompts", "steps", "recipe.optim.lr",
        "recipe.optim.schedule", "dtype", "seed", "protocol")


def called(row: dict, family: str = "vit") -> str | None:
  """The paper's name of a run's method, None of one that it does not have, or on a backbone of another family. Of
  DTL's, what the paper ablates stands behind the name: "DTL, identity"."""
  method, options = row["method"], row["options"]
  if recipes.family_of(row["backbone"]) != family:
    return None
  if method == "linear" and options.get("site", "pooled") != "pooled":
    return None
  name = NAMES.get(method)
  if not method.startswith("dtl"):
    return name
  usual = {"rank": RANKS[family], "activation": "swish", "beta": 100, "readout": "mean"}
  changed = {option: options[option] for option, value in usual.items() if options.get(option, value) != value}
  return ", ".join([name, *(value if isinstance(value, str) else f"{option} {value:g}"
                            for option, value in changed.items())])


def vtab(table: str, rows: Sequence[dict] = (), *, measure: bool = False, **options) -> list[Table]:
  """"table2", ViT-B/16, or "table3", Swin-B: costs, and accuracies on VTAB-1k.

  Which table a run is of says the name of its backbone, see `recipes.family_of`. Of Swin-B the paper prints averages
  alone. With `measure` a step of each method is compiled.
  """
  known, family = numbers(PAPER), FAMILIES[table]
  printed = {method: dict(zip(known["tasks"].values(), values.get("accuracy", ())))
             for method, values in known[table].items()}
  names = {task: name for name, task in known["tasks"].items()}
  title = (f"DTL, table {table[-1]}, {recipes.BACKBONES[family]}, VTAB-1k: accuracy in per cent. "
           f"{known['source']}")
  found = accuracies(title, "vtab1k", printed, names, rows, functools.partial(called, family=family),
                     TOLD, **options)
  if family == "swin":
    found = _with_averages(found, known[table])
  remarks = ["the paper's average is the mean of the three group means; computed from its rounded accuracies, as here, "
             "it differs by up to 0.1"] * (family == "vit")
  return [costs(table, family, measure=measure), found._replace(remarks=[*remarks, *found.remarks])]


def _with_averages(found: Table, printed: dict) -> Table:
  """Table 3 has group means and their mean, and nothing to compute them from."""
  labels = {"mean of 3 group means": "average", **{group: group for group in ("natural", "specialized", "structured")}}
  rows = [[label, "paper", *(printed.get(method, {}).get(field) for method in found.header[2:])]
          for label, field in labels.items()]
  filled = [cells for cells in found.rows if any(cell is not None for cell in cells[2:])]
  return found._replace(rows=filled, averages=[*rows, *found.averages])


def domains(rows: Sequence[dict] = (), **options) -> list[Table]:
  """Table 4: ViT-B/16 trained on 16 images of every ImageNet class, tested on ImageNet and four shifts of it."""
  known = numbers(PAPER)
  names = {task: name for name, task in known["targets"].items()}
  printed = {method: dict(zip(names, values)) for method, values in known["table4"].items()}
  found = accuracies(f"DTL, table 4, domain generalisation: accuracy in per cent. {known['source']}", "imagenet_shift",
                     printed, names, rows, called, TOLD, **options)
  remarks = ["DTL and DTL+ have a rate and a run of their own for every target, the others one model for all, with "
             "another normalisation and augmentation: the gap is not of like against like"]
  return [found._replace(remarks=[*remarks, *found.remarks])]


def ablation(rows: Sequence[dict] = (), *, split: str = "test", allow: Sequence[str] = ()) -> list[Table]:
  """Table 5: rank, gate and convolution, as the average on VTAB-1k; ours by the options of runs of dtl and dtl_plus on
  a ViT. Those of a row share M, too."""
  known = numbers(PAPER)
  printed = {(row["rank"], row["swish"], row["dwconv"]): row["average"] for row in known["table5"]}
  tasks = set(known["tasks"].values())
  ours = [(key, row) for row in rows if row["task"] in tasks and (key := _ablated(row))]
  if rows and not ours:
    raise ValueError(f"none of {len(rows)} runs belongs into table 5; expected runs of dtl or dtl_plus on a ViT and "
                     "tasks of vtab1k, see configs/dtl_ablation.py")
  keys = list(dict.fromkeys([*printed, *(key for key, _ in ours)]))
  label = {key: f"rank {key[0]}" + ", swish" * key[1] + ", DWConv" * key[2] for key in keys}
  averages, remarks = {}, [known["lost"]["table5"]]
  if ours:
    found, more = scores_of([{**row, "method": label[key]} for key, row in ours], "vtab1k", split, allow)
    averages, remarks = found.averages, remarks + more
    for key in keys:
      report.check_alike(label[key], [row for own, row in ours if own == key], OF_AN_ABLATION, allow)
  cells = []
  for key in keys:
    name, value = of_groups(averages.get(label[key], {}))
    cells.append([key[0], *("yes" if each else "no" for each in key[1:]), printed.get(key), value, name])
  return [Table(f"DTL, table 5, ablations on VTAB-1k, ViT-B/16: accuracy in per cent. {known['source']}",
                ["rank", "swish", "DWConv", "paper", "ours", "ours is"], ["", "", "", ".1f", ".1f", ""], cells, [],
                remarks + [f"{len(rows) - len(ours)} runs of other methods or tasks are left out"] * (
                    len(ours) < len(rows)))]


def of_groups(averages: dict[str, float]) -> tuple[str | None, float | None]:
  """Name and value in per cent of the mean of group means, the paper's average, among those of a report."""
  return next(((name, 100 * value) for name, value in averages.items() if "group means" in name), (None, None))


def _ablated(row: dict) -> tuple[int, bool, bool] | None:
  """(rank, whether the gate is swish, whether there is a convolution) of a run; None of one that the table is not of.
  """
  options = row["options"]
  if called({**row, "options": {}}) not in ("DTL", "DTL+") or options.get("beta", 100) != 100 or options.get(
      "readout", "mean") != "mean":
    return None
  return options.get("rank"), options.get("activation", "swish") == "swish", row["method"] == "dtl_plus"
