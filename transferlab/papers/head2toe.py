"""Tables of Head2Toe (Evci et al. 2022, arXiv 2201.03529): what the slides of the authors' talk print, beside ours.

The paper's own tables were not at hand. Of the cost table the slides print fraction, number of features, classes and
three ratios; T and the number of steps are deduced from them, its formulas were found by fitting, and some cells of the
slides' text are damaged: `head2toe.json` names those.
"""
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transferlab import backbones, choice, tree
from transferlab.methods.head2toe import layout_of
from transferlab.methods.head2toe_features import count_of
from transferlab.papers.table import Table, accuracies, numbers

PAPER = "head2toe"
RATIOS = {"flops_vs_ft": "FLOPs/FT", "size_vs_ft": "size/FT", "size_vs_linear": "size/linear"}
EXAMPLES, BATCH = 1000, 128
ALL_FRACTIONS = 1.18  # of the steps of one fraction: what the slides add for trying the others
STEM_SIDE = 115       # as the count takes it, of 230 padded pixels; the network's own map has 112
BACKBONES = {"resnet50": "ResNet-50", "vit_b16": "ViT-B/16"}
TOLD = ("backbone", "image_size", "options.target_size", "options.fraction", "options.coefficient", "registered",
        "options.sites", "options.normalisation", "steps", "recipe.optim.lr", "recipe.optim.name", "seed", "protocol")


class Cost(NamedTuple):
  """Of Head2Toe on one task, as ratios; fields are named as in the slides' table, see `RATIOS`."""
  flops_vs_ft: float
  size_vs_ft: float
  size_vs_linear: float


def resnet50(classes: int = 0):
  """The backbone of the cost table; `classes=1000` with the logits that Head2Toe reads."""
  return backbones.architecture("resnet50_v2", classes=classes)


@functools.cache
def forward_flops() -> int:
  """Operations of one image of 224 px in ResNet-50: 8,198,243,776.

  The count is RigL's (google-research/rigl): a multiplication and an addition per weight and position of every
  convolution, one operation per output for its ReLU, without the classifier; a convolution of stride 2 on an image with
  three pixels of border, padded once more, has a map of 115. That the table uses it is deduced from its numbers.
  """
  shapes, total = backbones.sites(resnet50()), 0
  for name, (h, w, D, out) in _kernels().items():
    side = STEM_SIDE if name == "stem" else shapes[name].shape[1]
    total += side * side * out * (2 * h * w * D + 1)
  return total


def parameters() -> int:
  """Of ResNet-50, as that count has them: the convolutions' weights and a bias per channel; 23,481,472."""
  return sum(h * w * D * out + out for h, w, D, out in _kernels().values())


def _kernels() -> dict[str, tuple[int, int, int, int]]:
  """{convolution: (h, w, D, D')}."""
  shapes = tree.flatten(backbones.abstract_params(resnet50()))
  return {name.removesuffix("/kernel"): leaf.shape for name, leaf in shapes.items() if name.endswith("/kernel")}


def cost(features: int, classes: int, fraction: float, steps: int, *, width: int, flops: int, size: int) -> Cost:
  """The ratios of one task.

  Head2Toe keeps K = int(fraction * N) rows of C weights and a mask of N bits, in words of 32 bits; a linear head has
  D * C weights, fine-tuning the backbone's too. Head2Toe computes the features once and trains a head on all N of them,
  forward and its weights' gradient, 2 NC operations each; a step of fine-tuning costs three forward passes.

  Args:
    features, classes, fraction, steps: N, C, the share of features kept, training steps of either method.
    width: D of the backbone's features.
    flops: of its forward pass, per image.
    size: number of its parameters.
  """
  kept, linear = count_of(fraction, features), width * classes
  stored = kept * classes + features / 32
  heads = ALL_FRACTIONS * steps * BATCH * 2 * (2 * features * classes)
  tuned = 3 * steps * BATCH * (flops + 2 * linear)
  return Cost((EXAMPLES * flops + heads) / tuned, stored / (size + linear), stored / linear)


def costs() -> dict[str, tuple[dict, Cost]]:
  """task, as the slides call it -> (row of the slides, recomputed)."""
  spec, rows = resnet50(classes=1000), numbers(PAPER)["cost"]["rows"]
  flops, size = forward_flops(), parameters()
  features = {T: layout_of(spec, target_size=T).total for T in sorted({row["target_size"] for row in rows})}
  return {row["task"]: (row, cost(features[row["target_size"]], row["classes"], row["fraction"], row["steps"],
                                  width=spec.width, flops=flops, size=size)) for row in rows}


def cost_table(rows: Sequence[dict] = (), **options) -> list[Table]:
  """FLOPs and sizes of Head2Toe on ResNet-50, the slides' and recomputed; it has nothing of ours in it."""
  del options
  printed, found = numbers(PAPER), costs()
  header, formats = ["task", "fraction", "T", "N", "C", "steps"], ["", "g", "", "", "", ""]
  for name in RATIOS.values():
    header, formats = [*header, name, f"{name} recomputed"], [*formats, ".6f", ".6f"]
  cells = []
  for task, (row, ours) in found.items():
    both = [cell for name in RATIOS for cell in (row[name], getattr(ours, name))]
    damaged = ", ".join(RATIOS[name] for name in row.get("damaged", ()))
    cells.append([task, row["fraction"], row["target_size"], row["features"], row["classes"], row["steps"], *both,
                  damaged or None])
  average = [cell for name in RATIOS for cell in (
      printed["cost"]["average"][name], statistics.fmean(getattr(ours, name) for _, ours in found.values()))]
  remarks = [f"ResNet-50 without classifier has {forward_flops():,} FLOPs per image, forward, and {parameters():,} "
             "parameters, counted from its shapes", "T, steps and the formulas are deduced from the printed numbers",
             "of the damaged cells, dSpr-Loc's may be a typo"] + ["the runs given are not used here"] * bool(rows)
  return [Table(f"Head2Toe, ResNet-50: costs against fine-tuning (FT) and a linear head. {printed['source']}", [
      *header, "slide's text is damaged"], [*formats, ""], cells, [["average", *[None] * 5, *average, None]], remarks)]


def called(row: dict) -> str | None:
  """The slides' name of a run's method, or None. Their Linear has features of length 1, ours may be `linear`'s own, but
  not of another activation; their Head2Toe-FT+ is a choice between two methods, so a run of it is the final one of a
  sweep of both."""
  method, options = row["method"], row["options"]
  if method == "linear":
    return "Linear" if options.get("site", "pooled") == "pooled" else None
  if method == "all_features":
    if options.get("sites") in ("pooled", ["pooled"]):
      return "Linear" if options.get("penalty") == "none" else None
    return {"l1": "+All-l1", "l2": "+All-l2", "l21": "+All-l2,1"}.get(options.get("penalty"), "+All")
  if method == "head2toe_ft" and options.get("sites") in ("pooled", ["pooled"]):
    return "Fine-tuning"  # the paper's; `full` does not scale features to length 1
  if method in ("head2toe", "head2toe_ft") and _chosen_by_a_sweep(row):
    return "Head2Toe-FT+"
  return {"head2toe": "Head2Toe", "head2toe_ft": "Head2Toe-FT", "full": "Fine-tuning",
          "scratch": "Scratch", "head2toe_layers": "whole layers"}.get(method)


def _chosen_by_a_sweep(row: dict) -> bool:
  """Whether a run's method was chosen of the two: it lies in the folder `final` of a sweep that had both, and no third.
  """
  folder = Path(row["path"]).parent
  try:
    lines = choice.lines(folder.parent) if folder.name == "final" else ()
    return {line.row["method"] for line in lines} == {"head2toe", "head2toe_ft"}
  except (OSError, ValueError, KeyError, TypeError):
    return False


def accuracy_table(backbone: str, rows: Sequence[dict] = (), **options) -> list[Table]:
  """The 19 tasks of VTAB-1k for "resnet50" or "vit_b16", the slides' numbers and ours."""
  known = numbers(PAPER)
  order = list(known["tasks"].values())
  printed = {method: dict(zip(order, values)) for method, values in known["accuracy"][backbone].items()}
  names = {task: name for name, task in known["tasks"].items()}
  found = accuracies(f"Head2Toe, {BACKBONES[backbone]}, VTAB-1k: accuracy in per cent. {known['source']}", "vtab1k",
                     printed, names, rows, called, TOLD, **options)
  remarks = ["of the means, the slides print that of 19 tasks"]
  remarks += ["the slides' Scratch is taken from the VTAB paper"] if backbone == "resnet50" else []
  return [found._replace(remarks=[*remarks, *found.remarks])]
