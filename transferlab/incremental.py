"""Class-incremental learning: the classes of a task come in steps, and one Open-InCA adapter learns all of them.

    workdir/config.json         what was asked for
    workdir/step_01/ …          of every step: config.json, metrics.jsonl, checkpoints/, adapter.safetensors
    workdir/joint/              the run on all classes at once, if it is asked for
    workdir/incremental.json    the result

Step 1 trains a whole Open-InCA adapter on its classes. Later steps train the rows of their own classes, on images of
these classes alone: no image of an earlier step is kept, shared weights and old rows stay bit for bit. So an old
class's logits never change, and what is lost on old classes is lost to new ones that outbid them.

That InCA's adapters "can be incrementally modified" is the paper's (Dukler et al. 2023, arXiv 2303.04105); its protocol
was not at hand, this one is ours, in the form that is usual for Split CIFAR-100 (10 steps of 10 classes).
"""
import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from transferlab import data, experiment, methods, serve
from transferlab.backbones.weights import Weights
from transferlab.checkpoint import load_adapter, save_adapter, versions, write_adapter
from transferlab.evaluate import collect_members
from transferlab.files import write_json
from transferlab.method import Method
from transferlab.methods.growing import OVER, grow, join
from transferlab.methods.inca import keep_classes
from transferlab.progress import say, show_table
from transferlab.recipe import Recipe
from transferlab.stage import Stage
from transferlab.train import fit, readable, request
from transferlab.tree import nearest
from transferlab.workdir import Workdir


def learn(weights: Weights, task: data.Task, recipe: Recipe, steps: int, workdir, *, options: dict | None = None,
          order_seed: int = 0, over: str = "new", split: str = "test", joint: bool = False,
          quiet: bool = False) -> dict[str, Any]:
  """Learns a task's classes in steps. An interrupted protocol goes on where it stopped, a finished one is returned.

  Args:
    recipe: of every step; its duration counts the images of the step. Validation images are not used: each step ends
      at its last training step, whatever `select` says.
    steps: S; the classes are dealt out as evenly as possible.
    options: of `open_inca`. With several sites the logits are combined as by `combine`, nothing is chosen.
    order_seed: of the order of classes.
    over: what the cross-entropy of the later steps is over, "new" classes or "all" classes seen so far, see `grow`.
    split: whose accuracies are reported, "test" or "val". It is opened once, at the end.
    joint: also train on all classes at once, with the same recipe, for comparison.

  Returns:
    What incremental.json holds: the request, "blocks" (class names of each step), `scores`, "joint" (an accuracy or
    None), "adapter" (of all classes, a plain Open-InCA adapter).

  Raises:
    ValueError: anything about the request, before the first step.
  """
  began, folder, tell = time.monotonic(), Path(workdir), (lambda message: None) if quiet else say
  whole, method = task, methods.build("open_inca", weights.spec, **(options or {}))
  _check(task, recipe, steps, over, split)
  if order_seed < 0:
    raise ValueError(f"order_seed is {order_seed}; expected 0 or more")
  recipe = dataclasses.replace(recipe, select="last")
  task = readable(task, recipe.bad_images, tell, quiet)
  asked = {**request(weights, method.name, method.options, task, recipe, whole), "steps": steps,
           "order_seed": order_seed, "over": over, "split": split}
  Workdir(folder, asked)
  known = folder / "incremental.json"
  result = json.loads(known.read_text()) if known.exists() else None
  if result and (result["joint"] is not None or not joint):
    tell(f"finished: {folder}")
    return result
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", asked)

  blocks = class_blocks(task.class_names, steps, order_seed)
  trainable, names = None, ()
  for step, block in enumerate(blocks, 1):
    tell(f"step {step} of {steps}: {len(block)} classes")
    adapter, names = folder / f"step_{step:02d}" / "adapter.safetensors", (*names, *block)
    part = restrict(task, block if over == "new" else names, block)
    notes = {"step": step, "steps": steps, "over": over}
    trainable = _step(weights, part, recipe, method, trainable, names, adapter, notes, quiet)
  ordered = task.relabel(names)
  result = {
      **asked, "blocks": [list(block) for block in blocks], "protocol": _protocol(asked),
      **scores(*_logits(adapter, weights, ordered, split), blocks), "joint": None,
      "adapter": str(adapter.relative_to(folder)), "versions": versions()}
  if joint:
    run = fit(weights, "open_inca", restrict(ordered, names, names), recipe, options=options, workdir=folder / "joint",
              quiet=quiet)
    result["joint"] = scores(*_logits(run.adapter, weights, ordered, split), [names])["last"]
  result["seconds"] = round(time.monotonic() - began, 2)
  write_json(known, result)
  return result


def run(config: Any, workdir, **protocol) -> dict[str, Any]:
  """`learn` as a configuration says, see `experiment`; its method has to be open_inca."""
  asked, options, recipe = experiment.parse(config)
  if asked.method != "open_inca":
    raise ValueError(f"method is {asked.method!r}; expected open_inca, whose classes have rows of their own")
  if asked.features:
    raise ValueError(f"features is {asked.features!r}; expected none, the steps train from images")
  task = data.from_string(asked.data, asked.data_dir)
  return learn(experiment.weights_of(asked), task, recipe, workdir=workdir, options=options, **protocol)


def _check(task: data.Task, recipe: Recipe, steps: int, over: str, split: str) -> None:
  """Refuses what cannot be learned in so many steps, or not be scored."""
  task.check()
  if over not in OVER:
    raise ValueError(f"over is {over!r}; expected one of {', '.join(OVER)}")
  if recipe.views or recipe.cache_dtype != "float32":
    raise ValueError(f"views is {recipe.views} and cache_dtype {recipe.cache_dtype!r}, which belong to a cache; the "
                     "steps train from images, leave them at 0 and 'float32'")
  if over == "all" and recipe.class_weights != "none":
    raise ValueError(f"class_weights is {recipe.class_weights!r} and over 'all'; expected 'none', as a step has no "
                     "image of the old classes to weigh")
  most = len(task.class_names) // 2 if over == "new" else len(task.class_names) - 1
  if not 2 <= steps <= most:
    raise ValueError(f"steps is {steps}; expected 2 to {most} for {len(task.class_names)} classes: "
                     + ("every step" if over == "new" else "the first") + " needs two of them")
  if split not in ("test", "val") or split not in task.splits or "train" not in task.splits:
    raise ValueError(f"split is {split!r} and {task.name!r} has {', '.join(task.splits)}; expected 'test' or 'val', "
                     "and a split 'train'")
  if task.test_classes:
    raise ValueError(f"{task.name!r} is tested among {len(task.test_classes)} of its classes; expected a task that is "
                     "tested among all")
  if missing := sorted(set(range(len(task.class_names))) - set(task.splits[split].labels.tolist())):
    raise ValueError(f"no {split} image of {task.class_names[missing[0]]!r}; expected one of every class, to score "
                     "each step")


def class_blocks(class_names, steps: int, order_seed: int) -> list[tuple[str, ...]]:
  """The classes of each step, in a random order of their own; the same on every machine."""
  # Sorting uniform draws, rather than `permutation`, whose stream numpy may change.
  draws = np.random.Generator(np.random.PCG64(order_seed)).random(len(class_names))
  return [tuple(class_names[c] for c in block) for block in np.array_split(np.argsort(draws, kind="stable"), steps)]


def restrict(task: data.Task, names, block) -> data.Task:
  """The training images of the classes `block`, with labels that index `names`."""
  table = np.array([names.index(name) if name in block else -1 for name in task.class_names], np.int32)
  train = task.splits["train"]
  train = train.select(np.flatnonzero(table[train.labels] >= 0))
  return dataclasses.replace(task, name=f"{task.name}, {', '.join(block[:3])}, …", class_names=tuple(names),
                             splits={"train": dataclasses.replace(train, labels=table[train.labels])})


def _step(weights: Weights, task: data.Task, recipe: Recipe, method: Method, old: dict | None, names, adapter: Path,
          notes: dict, quiet: bool) -> dict:
  """Trains one step, unless its adapter is there; returns the trainable of all classes so far."""
  asked = {**request(weights, method.name, method.options, task, recipe, task), **notes}
  folder = Workdir(adapter.parent, asked)
  if not adapter.exists():
    stage = Stage(method if old is None else grow(method, old, notes["over"]), weights, task, recipe, folder, 0, quiet)
    with contextlib.closing(folder):
      trained = jax.device_get(stage.train().trainable)
      save_adapter(adapter, method, trained if old is None else join(old, trained), {}, weights=weights,
                   class_names=names, notes={"task": task.name, "recipe": asked["recipe"], "incremental": notes})
  return load_adapter(adapter).trainable


def _logits(adapter: Path, weights: Weights, task: data.Task, split: str):
  """Logits [N, C] and labels [N] of a split, by an adapter file whose classes are the task's."""
  classifier = serve.load(adapter, weights)
  loader = data.eval_loader(task.splits[split], classifier.preprocessing, batch_size=64)
  logits, labels = collect_members(lambda images: {"": classifier.logits(images)}, loader)
  return logits[""], labels


def scores(logits: np.ndarray, labels: np.ndarray, blocks) -> dict[str, Any]:
  """Accuracies after every step, from the last adapter alone: what it says of the classes seen by step k is what the
  adapter of step k said, as rows never change afterwards.

  Args:
    logits: [N, C], columns in the order of `blocks`.
    labels: [N].
    blocks: class names of each of S steps.

  Returns:
    "matrix": [k][j], accuracy after step k on the images of step j <= k among all classes seen by then;
    "seen": [k], on all images of these classes; "own": [j], of step j's images among the classes of step j alone;
    "average": mean of "seen" (the average incremental accuracy of Rebuffi et al. 2017, first step included); "last":
    the last of "seen"; "forgetting": mean over steps but the last of the best accuracy before minus that at the end
    (Chaudhry et al. 2018), 0 for a single step.
  """
  ends = np.cumsum([len(block) for block in blocks])
  step_of = np.searchsorted(ends, labels, side="right")                                 # [N]
  right = np.stack([logits[:, :end].argmax(-1) == labels for end in ends])              # [S, N]
  matrix = [[float(right[k, step_of == j].mean()) for j in range(k + 1)] for k in range(len(ends))]
  seen = [float(right[k, step_of <= k].mean()) for k in range(len(ends))]
  among = [logits[step_of == j, end - len(blocks[j]):end].argmax(-1) + end - len(blocks[j]) for j, end in
           enumerate(ends)]
  own = [float((found == labels[step_of == j]).mean()) for j, found in enumerate(among)]
  lost = [max(row[j] for row in matrix[j:-1]) - matrix[-1][j] for j in range(len(ends) - 1)]
  return {"matrix": matrix, "seen": seen, "own": own, "average": float(np.mean(seen)), "last": seen[-1],
          "forgetting": float(np.mean(lost)) if lost else 0.0}


def select_classes(adapter, out, *, keep=(), drop=()) -> None:
  """Writes an Open-InCA adapter with some of its classes alone; their logits stay what they are.

  Scores in the file's notes, which are of all classes, are left out.

  Args:
    adapter, out: paths of adapter files.
    keep: names of classes to keep, in this order; or
    drop: of those to remove.

  Raises:
    ValueError: another method, an unknown class, one twice, fewer than two that stay; nothing is written then.
  """
  found = load_adapter(adapter)
  if found.method.name != "open_inca":
    raise ValueError(f"{adapter} holds {found.method.name!r}; expected open_inca, whose classes have rows of their "
                     "own; others are trained again without the class")
  known = found.class_names
  for name in (*keep, *drop):
    if name not in known:
      raise ValueError(f"{adapter} has no class {name!r}; nearest: {', '.join(nearest(name, known))}")
  if bool(keep) == bool(drop):
    raise ValueError("expected classes to keep or classes to drop, one of both")
  names = list(keep) or [name for name in known if name not in drop]
  if len(names) < 2 or len(set(names)) < len(names):
    raise ValueError(f"{', '.join(map(repr, names)) or 'no class'} would stay; expected at least two, each once")
  if os.path.exists(out) and os.path.samefile(adapter, out):
    raise ValueError(f"{out} is the adapter that is read; give another file, the adapter stays as it is")
  header = {field: value for field, value in found.header.items() if field not in ("val", "test")}
  trainable = jax.device_get(keep_classes(found.trainable, [known.index(name) for name in names]))
  write_adapter(out, {**header, "class_names": names}, trainable, found.state)


def _protocol(asked: dict) -> str:
  own = asked["protocol"] and asked["protocol"] + "; "
  return (f"{own}class-incremental in {asked['steps']} steps, class order of seed {asked['order_seed']}; later steps "
          f"train the rows of their own classes on images of these alone, cross-entropy over {asked['over']} classes; "
          f"fixed duration, last step; {asked['split']} once, for these accuracies only")


def show(result: dict[str, Any]) -> None:
  """The accuracies as a table: a row per step, a column per step whose classes are asked for."""
  table = Table("after step", "classes", *(f"of {j}" for j in range(1, result["steps"] + 1)), "all seen")
  classes = np.cumsum([len(block) for block in result["blocks"]])
  percent = lambda value: f"{100 * value:.1f}"
  for k, (row, seen) in enumerate(zip(result["matrix"], result["seen"])):
    cells = [*map(percent, row), *[""] * (result["steps"] - len(row))]
    table.add_row(str(k + 1), str(classes[k]), *cells, percent(seen))
  table.add_row("among own", "", *map(percent, result["own"]), "")
  show_table(table)
  joint = "" if result["joint"] is None else f"   joint training {result['joint']:.4f}"
  print(f"average {result['average']:.4f}   last {result['last']:.4f}   forgetting {result['forgetting']:.4f}{joint}\n"
        f"{result['protocol']}")
