"""Training: `fit` adapts frozen weights to a task, chooses on validation, opens test once, and leaves a workdir.

    workdir/config.json             what was asked for, resolved
    workdir/metrics.jsonl           a line per log and per evaluation
    workdir/checkpoints/stage_0/    to resume from, the last two
    workdir/lock                    held by the run that is there now
    workdir/adapter.safetensors     the result
    workdir/result.json             one ledger row
    workdir/tensorboard/            the scalars again, where tensorboardX is installed (the [log] extra)
"""
import contextlib
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import data, devices, distributed, methods, search
from transferlab import features as features_lib
from transferlab.backbones.weights import Weights, image_tower
from transferlab.checkpoint import load_adapter, save_adapter, versions
from transferlab.method import Method, classes, sizes, stages
from transferlab.methods.clip_text import SLOT
from transferlab.progress import Progress, say
from transferlab.recipe import Recipe, changed, places
from transferlab.stage import Stage
from transferlab.workdir import Workdir


class Fit(NamedTuple):
  """What `fit` returns. `result` is the ledger row; `adapter` the file's path, None without a workdir."""
  method: Method
  trainable: dict
  state: dict
  result: dict
  adapter: Path | None


def fit(weights: Weights, method: str | Method, task: data.Task, recipe: Recipe = Recipe(), *,
        options: dict | None = None, workdir=None, features="", quiet: bool = False) -> Fit:
  """Adapts frozen weights to a task.

  Args:
    weights: from `load_weights`.
    method: a registered name with `options`, or a Method.
    task: trains on its split "train", chooses on "val" if there is one, and reports "test" once, at the end.
    workdir: where to leave the run; an interrupted run there with the same configuration is resumed, bit for bit, and a
      finished one is returned as it is. None keeps everything in memory.
    features: folder of an activation cache to train from, see `transferlab.features`; what is missing there is written
      first. A method that writes into the backbone trains from what it reads below its first written block; stages
      that say nothing of that train from images all the same.
    quiet: no messages.

  Raises:
    ValueError: anything about the request, before the first step.
    stage.NotFinite: with the step and the last good checkpoint.
    preemption.Preempted: with a checkpoint of the step that was finished, where signals are `preemption.handled`.
  """
  began = time.monotonic()
  tell = (lambda message: None) if quiet else say
  check_arguments(weights, task, tell)
  distributed.compare("request", {"recipe": dataclasses.asdict(recipe), "options": options or {},
                                  "features": bool(features), "workdir": workdir is not None})
  weights = adapted(weights, method if isinstance(method, str) else method.name)
  first = methods.build(method, weights.spec, **(options or {})) if isinstance(method, str) else method
  check_texts(first, weights, task.class_names)
  if features:
    features_lib.check(first, weights.spec, recipe)
    task = features_lib.verified(features, weights, first.reads, task, recipe)
  else:
    features_lib.check_without(first, recipe)
  # A run that may be finished is recognised before its images are decoded, unless some of them may be left out.
  early = recipe.bad_images == "skip" or workdir is None or not distributed.agree(
      (Path(workdir) / "result.json").exists())
  whole, task = task, readable(task, recipe.bad_images, tell, quiet) if early else task
  asked = request(weights, method if isinstance(method, str) else first.name, first.options, task, recipe, whole,
                  bool(features))
  distributed.compare("run", asked)
  folder = None if workdir is None else Workdir(workdir, asked)
  if folder and isinstance(method, str) and (finished := finished_run(folder)):
    tell(f"finished run: {folder.path}")
    return finished
  task = task if early else readable(task, recipe.bad_images, tell, quiet)
  tell(f"{asked['method']} on {weights.name}: {weights.preprocessing.describe()}")
  tell(f"{task.name}: " + ", ".join(f"{name} {len(split)}" for name, split in task.splits.items())
       + f", {len(task.class_names)} classes")
  if features:
    features_lib.write(features_lib.of_recipe(features, recipe), weights, first.reads, task.splits,
                       **places(recipe), quiet=quiet)
  with contextlib.closing(folder) if folder else contextlib.nullcontext():
    last = train_stages(first, weights, task, recipe, folder, quiet, features)
    return conclude(asked, weights, task, last, folder, began)


def check_arguments(weights: Weights, task: data.Task, tell) -> None:
  """Raises `ValueError` for what is no weights or no task that can be trained on; tells what is odd about the task."""
  for name, value, kind, maker in (("weights", weights, Weights, "load_weights(...)"),
                                   ("task", task, data.Task, "image_folder(...)")):
    if not isinstance(value, kind):
      raise ValueError(f"{name} is {value!r}; expected what {maker} returns")
  for message in task.check() or ():
    tell(message)
  if "train" not in task.splits:
    raise ValueError(f"task {task.name!r} has splits {', '.join(task.splits)}; training needs 'train'")


def adapted(weights: Weights, method: str) -> Weights:
  """The part of the weights that a registered method adapts: of a CLIP the image tower, if it needs no text."""
  return weights if methods.adapted(method, weights.spec) is weights.spec else image_tower(weights)


def check_texts(method: Method, weights: Weights, class_names) -> None:
  """Raises `ValueError` for class names that a method cannot make texts of, before anything is read."""
  if method.prompts is None:
    return
  if weights.tokenizer is None:
    raise ValueError(f"{method.name} reads class names as texts, and {weights.name} came without a tokenizer; give its "
                     "file or folder as tokenizer (--tokenizer=, --config.tokenizer=): tokenizer.json, vocab.json with "
                     "merges.txt, or OpenAI's bpe_simple_vocab_16e6.txt.gz")
  ids, seen = classes(method, class_names, weights.tokenizer).get(SLOT), {}
  for name, row in zip(class_names, () if ids is None else np.reshape(ids, (len(class_names), -1))):
    if (other := seen.setdefault(row.tobytes(), name)) != name:  # only cutting does that
      raise ValueError(f"the texts of the classes {other!r} and {name!r} are the same once cut, and nothing could tell "
                       "them apart; shorten the template or the names")


def train_stages(first: Method, weights: Weights, task: data.Task, recipe: Recipe, folder: Workdir | None,
                 quiet: bool, features="") -> Stage:
  """Trains the stages of a method one after the other, without the test split; returns the last one, with its choice
  among its members."""
  selection = dataclasses.replace(task, splits={k: v for k, v in task.splits.items() if k in ("train", "val")})
  last = None
  def train(method: Method):
    nonlocal last
    index, last = 0 if last is None else last.index + 1, None  # moments and batches of the stage before make room
    search.check(method, selection.splits)
    last = Stage(method, weights, selection, changed(recipe, method.recipe), folder, index, quiet, features).train()
    search.search(last)
    return last.trainable, last.state
  trained = stages(first, train)
  last.settle()
  if any(method.search for method, *_ in trained):
    last.choice = {**last.choice, "chosen": last.method.options}
  return last


def conclude(asked: dict, weights: Weights, task: data.Task, last: Stage, folder: Workdir | None,
             began: float) -> Fit:
  """Opens the test split, once, and writes the adapter and the ledger row."""
  test, adapter = None, None
  if "test" in task.splits:
    known = folder and folder.result()  # a finished run keeps its numbers: the test split is opened once
    test = known["test"] if known else last.scores(
        last.trainable, last.state, last.eval_loader(task.splits["test"]), task.test_classes)
  result = ledger_row(asked, weights, task, last, test)
  result["seconds"] = round(time.monotonic() - began, 2)
  if folder:
    adapter = folder.path / "adapter.safetensors"
    notes = {**{key: asked[key] for key in ("task", "split_hash", "recipe")}, "val": last.val, "test": test}
    arrays = devices.whole((last.trainable, last.state))
    if distributed.first():
      save_adapter(adapter, last.method, *arrays, weights=weights, class_names=task.class_names,
                   notes=notes)
    result = folder.finish(result)
    distributed.barrier("result")
  for name in ("val", "test"):
    if result[name]:
      last.tell(f"{name} accuracy {result[name]['accuracy']:.4f}, mean per class {result[name]['mean_per_class']:.4f}")
  return Fit(last.method, last.trainable, last.state, result, adapter)


def request(weights: Weights, method: str, options: dict, task: data.Task, recipe: Recipe, whole: data.Task,
            cached: bool = False) -> dict:
  """What is asked for, as JSON has it; `whole` is the task with the images that could not be read.

  A cache in float32 without views gives the result that images give, so that only others enter the protocol.
  """
  lost = {name: len(split) - len(task.splits[name]) for name, split in whole.splits.items()}
  without = [f"without {count} unreadable {name} images" for name, count in lost.items() if count]
  kept = [f"activations in {recipe.cache_dtype}"] if recipe.cache_dtype != "float32" else []
  kept += [f"{recipe.augmentation} in {recipe.views} views"] if recipe.views else []
  asked = {"backbone": weights.name, "backbone_hash": weights.hash, "image_size": weights.spec.image_size,
           "preprocessing": weights.preprocessing.to_dict(), "method": method, "options": options,
           "task": task.name, "source": task.source, "draw": task.draw,
           "protocol": ", ".join(filter(None, (task.protocol, *without, *kept))), "split_hash": task.split_hash(),
           "pixels": task.splits["train"].fingerprint(), "recipe": dataclasses.asdict(recipe)}
  if cached:
    asked["cached"] = {"dtype": recipe.cache_dtype, "views": recipe.views}
  return json.loads(json.dumps(asked))  # tuples become lists, as they will be when read back


def finished_run(folder: Workdir) -> Fit | None:
  """The run that stands in a folder, if it came to its end."""
  result, path = folder.result(), folder.path / "adapter.safetensors"
  if result is None or not distributed.agree(path.exists()):
    return None
  adapter = load_adapter(path)
  return Fit(adapter.method, adapter.trainable, adapter.state, result, path)


def ledger_row(asked: dict, weights: Weights, task: data.Task, last: Stage, test) -> dict:
  """Everything a comparison of runs needs: what was asked for, scores, sizes, costs, and hashes of what went in.

  Of a method that trains members side by side: `members`, each one's validation scores, and `chosen`, the options that
  the choice among them changed; of one that searches, `chosen` are all options of what was found. Sizes are of what was
  chosen, costs of training them all, or of the last stage.
  """
  count = sizes(last.method, weights.params, len(task.class_names))
  over = ", mean over domains" if last.criterion != "accuracy" else ""
  chosen = f"{last.recipe.select} on val{over}" if last.val else "last"
  return {
      **asked, "class_names": list(task.class_names), "val": last.val, "test": test,
      "protocol": "; ".join(filter(None, (asked["protocol"], f"{chosen}, test once"))), "seed": last.recipe.seed,
      "steps": last.total, "selected_step": last.selected_step, **last.choice,
      "trainable": count.trainable, "trainable_without_classifier": count.trainable_without_classifier,
      "train_peak_bytes": last.cost.train_peak_bytes, "train_flops": last.cost.train_flops,
      "examples": {name: len(split) for name, split in task.splits.items()},
      "config_hash": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16],
      "dtype": jnp.dtype(last.dtype).name, "device": jax.devices()[0].device_kind, "devices": last.mesh.size,
      "versions": versions()}


def readable(task: data.Task, bad_images: str, tell, quiet: bool) -> data.Task:
  """The task without images that cannot be read; each is named. With bad_images="error" the first such split stops.

  This is the one time that the files of a small task are decoded: its splits read from memory afterwards.
  All splits are decoded, test included: whether files decode is no result, and it has to be known before training.
  """
  sizes = {name: len(split) for name, split in task.splits.items()}
  distributed.compare("data", {"task": task.name, "images": sizes, "split_hash": task.split_hash(),
                               "bad_images": bad_images})
  splits, skipped = {}, 0
  for name, split in task.splits.items():
    with Progress(len(split), f"checking {name}", quiet=quiet) as progress:
      seen = lambda done, total, progress=progress: progress.update(done - progress.done)
      splits[name], problems = data.read_once(split, bad_images, seen, distributed.hosts(), distributed.gather)
    for problem in problems:
      tell(f"skipped: {problem}")
    skipped += len(problems)
  task = dataclasses.replace(task, splits=splits)
  if skipped:
    task.check()  # a class may have lost its last image
  return task
