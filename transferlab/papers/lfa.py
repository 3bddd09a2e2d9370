"""Tables of LFA (MLAI-Yonsei/LFA; OpenReview Q0tfRYadhc) as its poster prints them, beside ours: 16-shot accuracies on
CoOp's eleven sets, and domain generalisation on five; what methods cost is in `lfa_costs`.

Which cells of the poster's text are unsure is named in `lfa.json`. A trial of domain generalisation has splits and
hyper-parameters of its own; its accuracies are averaged over test domains, then over trials, as DomainBed does
(collect_results.py of facebookresearch/DomainBed): ± is the standard error over trials, with n in the variance.
"""
import statistics
from collections.abc import Sequence

from transferlab import data, report
from transferlab.papers import domainbed
from transferlab.papers.table import Table, accuracies, numbers, scores_of
from transferlab.report import Score

PAPER = "lfa"
SHOTS = 16
BASES = {"": "CLIP", None: "CLIP", "none": "CLIP", "coop": "CoOp", "clip_adapter": "CLIP-Adapter", "maple": "MaPLe",
         "qlora": "QLoRA"}
FEWSHOT = {"zero_shot": "Zero-Shot CLIP", "clip_linear": "LinearProbing CLIP", "coop": "CoOp",
           "clip_adapter": "CLIP-Adapter", "maple": "MaPLe"}
DG = {"clip_linear": "LinearProbing CLIP", "dpl": "ZS-CLIP(PC) + DPL", "qlora": "ZS-CLIP(PC) + QLoRA", "miro": "MIRO"}
PROMPTS = {"{}": "ZS-CLIP(C)", "a photo of a {}": "ZS-CLIP(PC)"}
# What a method is like in either protocol; a run with others goes by a name that says so.
USUAL = {"lfa": {"beta": 0.9, "rank": None, "layers": None},
         "coop": {"tokens": 16, "position": "end", "class_specific": False, "words": ""}}
TOLD = ("backbone", "image_size", "registered", "options.base", "options.init", "options.dropout", "options.templates",
        "steps", "recipe.optim.lr", "recipe.optim.schedule", "recipe.batch_size", "dtype", "seed", "protocol")
OF_A_DATA_SET = ("recipe.duration", "recipe.batch_size")  # a set's own as published: EuroSAT, ImageNet


def few_shot(rows: Sequence[dict] = (), *, split: str = "test", allow: Sequence[str] = ()) -> list[Table]:
  """16 shots on CoOp's eleven sets."""
  known = numbers(PAPER)
  printed = {method: dict(zip(known["tasks"].values(), values)) for method, values in known["fewshot"].items()}
  names = {task: name for name, task in known["tasks"].items()}
  for method, task in dict.fromkeys((called(row), row["task"]) for row in rows):
    mine = [row for row in rows if (called(row), row["task"]) == (method, task)]
    report.check_alike(f"{method} on {task}", mine, OF_A_DATA_SET if method else (), allow)
  found = accuracies(f"LFA, {SHOTS} shots, CLIP ViT-B/16: accuracy in per cent. {known['source']}", "coop11", printed,
                     names, rows, called, TOLD, split=split, allow=(*allow, *OF_A_DATA_SET))
  return [found._replace(formats=["", "", *[".2f"] * (len(found.header) - 2)],
                         remarks=[*known["unsure"], *found.remarks])]


def called(row: dict) -> str | None:
  """The poster's name of a few-shot run's method, None of one that it does not have or that had another number of
  shots."""
  method, options = row["method"], row["options"]
  if method != "zero_shot" and f"shots {SHOTS}" not in row["protocol"].replace(";", ",").split(", "):
    return None
  if method == "clip_linear" and options.get("form") != "fewshot":
    return None
  if method == "lfa":
    base = BASES.get(options.get("base"))
    return base and _with_options(f"{base} + LFA", "lfa", options, {"init": "random", "dropout": 0.2})
  return method in FEWSHOT and _with_options(FEWSHOT[method], method, options) or None


def called_dg(row: dict) -> str | None:
  """Likewise of a run of domain generalisation."""
  method, options = row["method"], row["options"]
  if method == "zero_shot":
    templates = options.get("templates")
    return PROMPTS.get(templates[0] if isinstance(templates, list) and len(templates) == 1 else str(templates))
  if method == "clip_linear" and options.get("form") != "dg":
    return None
  if method == "lfa":
    base = BASES.get(options.get("base"))
    name = "ZS-CLIP(PC)" + f" + {base}" * (base != "CLIP") + " + LFA"
    return base and _with_options(name, "lfa", options, {"init": "clip", "dropout": 0.0})
  return DG.get(method)


def _with_options(name: str, method: str, options: dict, more: dict | None = None) -> str:
  """A name with the options that are not the usual ones behind it."""
  usual = {**USUAL.get(method, {}), **(more or {})}
  changed = {option: options[option] for option, value in usual.items() if options.get(option, value) != value}
  return ", ".join([name, *(f"{option} {value}" for option, value in changed.items())])


def domains(rows: Sequence[dict] = (), *, split: str = "test", allow: Sequence[str] = ()) -> list[Table]:
  """Domain generalisation on five sets, chosen on training domains; ours by `trials`."""
  known = numbers(PAPER)
  suites = known["suites"]
  of = {task: suite for suite in suites.values() for task in data.SUITES[suite]}
  ours = [{**row, "method": called_dg(row), "registered": row["method"]} for row in rows
          if row["task"] in of and called_dg(row)]
  if rows and not ours:
    raise ValueError(f"none of {len(rows)} runs belongs into this table; expected methods of LFA's comparison on "
                     f"{', '.join(suites.values())}, see configs/domain_generalization.py")
  found: dict[str, dict[str, Score]] = {}
  remarks = []
  for name, suite in suites.items():
    mine = [row for row in ours if of[row["task"]] == suite]
    if not mine:
      continue
    own = drawn(mine, suite)
    alike, more = scores_of(mine, suite, split, (*allow, *own))  # refuses what must not be averaged
    more = [line for line in more if line not in {f"allowed to differ: {field}" for field in own - set(allow)}]
    for method in (method for method, averages in alike.averages.items() if averages):
      score, left = trials([row for row in mine if row["method"] == method], suite, split)
      found.setdefault(method, {}).update({name: score} if score else {})
      more += [f"{method}: {left} trials of {suite} lack test domains and are left out"] * bool(left)
    remarks += [line for line in more if line not in remarks]
  cells = []
  for method in dict.fromkeys([*known["dg"], *found]):
    printed = dict(zip(suites, known["dg"].get(method, ())))
    errors = dict(zip(suites, known["plus_minus"].get(method, ())))
    shown = {name: Score(value, errors[name], 3) if errors else value for name, value in printed.items()}
    for whose, scores in (("paper", shown), ("ours", found.get(method))):
      cells += [_line(method, whose, scores, suites)] if scores else []
  left_out = len(rows) - len(ours)
  return [Table(
      f"LFA, domain generalisation, CLIP ViT-B/16: accuracy in per cent. {known['source']}",
      ["model", "whose", *suites, "average"], ["", ""] + [".1f"] * (len(suites) + 1), cells, [],
      [f"copied from the literature by the poster: {', '.join(known['copied'])}", "±: standard error over trials",
       "ours: what a trial draws, the rate for instance, may differ between trials and test domains",
       *remarks, *[f"{left_out} runs of other methods or tasks are left out"] * bool(left_out)])]


def drawn(rows: Sequence[dict], suite: str) -> set[str]:
  """Fields of rows that a trial draws for these methods."""
  keys = {key for method in {row["registered"] for row in rows} & set(domainbed.SEARCHED)
          for key in domainbed.draw(method, suite, 0, 0)}
  return {key if key.startswith("options.") else f"recipe.{key}" for key in keys}


def trials(rows: Sequence[dict], suite: str, split: str) -> tuple[Score | None, int]:
  """(mean and standard error over trials in per cent, number of trials that lack a test domain and are left out) of
  one method; `Score.seeds` is the number of trials."""
  by_trial = {}
  for row in rows:
    by_trial.setdefault(row.get("draw", ""), {})[row["task"]] = 100 * row[split]["accuracy"]
  means = [statistics.fmean(scores.values()) for scores in by_trial.values() if len(scores) == len(data.SUITES[suite])]
  error = statistics.pstdev(means) / len(means) ** 0.5 if len(means) > 1 else None
  return Score(statistics.fmean(means), error, len(means)) if means else None, len(by_trial) - len(means)


def _line(method: str, whose: str, scores: dict, suites) -> list:
  """A row of the table; the average is that of all sets, none if one is missing."""
  values = [score.mean if isinstance(score, Score) else score for score in scores.values()]
  average = statistics.fmean(values) if len(values) == len(suites) else None
  return [method, whose, *(scores.get(name) for name in suites), average]
