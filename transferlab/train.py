"""Training: `fit` adapts frozen weights to a task, chooses on validation, opens test once, and leaves a workdir.

    workdir/config.json             what was asked for, resolved
    workdir/metrics.jsonl           a line per log and per evaluation
    workdir/checkpoints/stage_0/    to resume from
    workdir/adapter.safetensors     the result
    workdir/result.json             one ledger row
    workdir/tensorboard/            the scalars again, where tensorboardX is installed (the [log] extra)
"""
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transferlab import backbones, config, cost, data, devices, ensembles, methods
from transferlab import features as features_lib
from transferlab.backbones.weights import Weights
from transferlab.checkpoint import Checkpoints, load_adapter, save_adapter, versions
from transferlab.evaluate import collect_members, evaluate, make_predict, make_predict_members
from transferlab.method import Method, sizes, stages
from transferlab.optim import make_optimiser, schedule
from transferlab.progress import Progress, say
from transferlab.recipe import Recipe, train_loader
from transferlab.step import compile_step, make_step, start
from transferlab.workdir import Workdir


class Fit(NamedTuple):
  """What `fit` returns. `result` is the ledger row; `adapter` the file's path, None without a workdir."""
  method: Method
  trainable: dict
  state: dict
  result: dict
  adapter: Path | None


class NotFinite(RuntimeError):
  """The loss, a gradient or a parameter became NaN or infinite."""


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
      first. Stages that write into the backbone train from images all the same.
    quiet: no messages.

  Raises:
    ValueError: anything about the request, before the first step.
    NotFinite: with the step and the last good checkpoint.
  """
  began = time.monotonic()
  tell = (lambda message: None) if quiet else say
  check_arguments(weights, task, tell)
  first = methods.build(method, weights.spec, **(options or {})) if isinstance(method, str) else method
  if features:
    features_lib.check(first, weights.spec, recipe)
    task = features_lib.verified(features, weights, first.reads, task, recipe)
  else:
    features_lib.check_without(first, recipe)
  # A run that may be finished is recognised before its images are decoded, unless some of them may be left out.
  early = recipe.bad_images == "skip" or workdir is None or not (Path(workdir) / "result.json").exists()
  whole, task = task, readable(task, recipe.bad_images, tell, quiet) if early else task
  asked = request(weights, method if isinstance(method, str) else first.name, first.options, task, recipe, whole,
                  bool(features))
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
                       device_count=recipe.devices, quiet=quiet)
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


def train_stages(first: Method, weights: Weights, task: data.Task, recipe: Recipe, folder: Workdir | None,
                 quiet: bool, features="") -> "Stage":
  """Trains the stages of a method one after the other, without the test split; returns the last one, with its choice
  among its members."""
  selection = dataclasses.replace(task, splits={k: v for k, v in task.splits.items() if k in ("train", "val")})
  last = None
  def train(method: Method):
    nonlocal last
    index, last = 0 if last is None else last.index + 1, None  # moments and batches of the stage before make room
    last = Stage(method, weights, selection, recipe, folder, index, quiet, features).train()
    return last.trainable, last.state
  stages(first, train)
  last.settle()
  return last


def conclude(asked: dict, weights: Weights, task: data.Task, last: "Stage", folder: Workdir | None,
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
    save_adapter(adapter, last.method, last.trainable, last.state, weights=weights, class_names=task.class_names,
                 notes=notes)
    result = folder.finish(result)
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
  if result is None or not path.exists():
    return None
  adapter = load_adapter(path)
  return Fit(adapter.method, adapter.trainable, adapter.state, result, path)


def ledger_row(asked: dict, weights: Weights, task: data.Task, last: "Stage", test) -> dict:
  """Everything a comparison of runs needs: what was asked for, scores, sizes, costs, and hashes of what went in.

  Of a method that trains members side by side: `members`, each one's validation scores, and `chosen`, the options that
  the choice among them changed. Sizes are of what was chosen, costs of training them all.
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


def scores(evaluation, domain_names=(), among=()) -> dict:
  """An evaluation's numbers for the ledger; by domain where there are several, and `among` how many classes if not all.
  """
  found = {"accuracy": evaluation.accuracy, "mean_per_class": evaluation.mean_per_class, "loss": evaluation.loss,
           "examples": int(evaluation.confusion.sum())}
  names = dict(enumerate(domain_names))
  by_domain = {names.get(d, str(d)): accuracy for d, accuracy in evaluation.per_domain.items()}
  if len(by_domain) > 1:
    found |= {"domains": by_domain, "mean_over_domains": sum(by_domain.values()) / len(by_domain)}
  return {**found, "among": len(among)} if among else found


def criterion(recipe: Recipe, task: data.Task) -> str:
  """The score of the validation split that `select` goes by."""
  domains = task.splits["val"].domains if recipe.per_domain and "val" in task.splits else None
  return "accuracy" if domains is None or len(set(domains.tolist())) < 2 else "mean_over_domains"


def readable(task: data.Task, bad_images: str, tell, quiet: bool) -> data.Task:
  """The task without images that cannot be read; each is named. With bad_images="error" the first such split stops.

  This is the one time that the files of a small task are decoded: its splits read from memory afterwards.
  All splits are decoded, test included: whether files decode is no result, and it has to be known before training.
  """
  splits, skipped = {}, 0
  for name, split in task.splits.items():
    with Progress(len(split), f"checking {name}", quiet=quiet) as progress:
      seen = lambda done, total, progress=progress: progress.update(done - progress.done)
      splits[name], problems = data.read_once(split, bad_images, seen)
    for problem in problems:
      tell(f"skipped: {problem}")
    skipped += len(problems)
  task = dataclasses.replace(task, splits=splits)
  if skipped:
    task.check()  # a class may have lost its last image
  return task


class Stage:
  """One method trained for one duration; most runs are a single stage."""

  def __init__(self, method: Method, weights: Weights, task, recipe: Recipe, folder, index: int, quiet: bool,
               features=""):
    self.method, self.task, self.recipe, self.folder, self.index = method, task, recipe, folder, index
    self.quiet, self.tell = quiet, (lambda message: None) if quiet else say
    self.preprocessing, self.num_classes = weights.preprocessing, len(task.class_names)
    self.mesh = devices.make_mesh(recipe.devices or None)
    self.dtype = devices.compute_dtype(recipe.dtype)
    self.backbone = backbones.build(weights.spec, self.dtype)
    self.weights, self.cache = weights, None
    if features and features_lib.cacheable(method, weights.spec):
      self.cache = features_lib.of_recipe(features, recipe)
    elif features:
      self.tell(f"stage {index}: {method.name} writes into the backbone and trains from images")
    self.loader = self.train_loader()
    self.val_loader = self.eval_loader(task.splits["val"]) if "val" in task.splits else None
    self.criterion = criterion(recipe, task)
    per_epoch, B = self.loader.steps_per_epoch, self.loader.rows_per_step
    self.total = config.resolve_steps(recipe.duration, per_epoch, B, None, "duration", positive=True)
    steps = lambda name: config.resolve_steps(getattr(recipe, name), per_epoch, B, self.total, name, positive=True)
    self.log_every, self.evaluate_every = steps("log_every"), steps("evaluate_every")
    self.checkpoint_every = steps("checkpoint_every")

    trainable, state = method.init(jax.random.key(recipe.seed), weights.params, self.num_classes)
    self.rate = schedule(recipe.optim, self.total, per_epoch, B)
    self.optimiser = make_optimiser(recipe.optim, self.rate, trainable)
    # The frozen parameters are cast once; a method that trains the backbone itself keeps no second copy of it.
    cast = lambda leaf: jnp.asarray(leaf, self.dtype)
    self.frozen = devices.replicate(jax.tree.map(cast, weights.params) if method.frozen and not self.cache else {},
                                    self.mesh)
    # The run is donated in every step: its arrays are copies, whatever init took from the frozen parameters.
    self.run = devices.replicate(start(*jax.tree.map(jnp.array, (trainable, state)), self.optimiser), self.mesh)
    self.predict = make_predict(method, self.backbone, self.preprocessing)
    self.best: dict[str, Any] = {}
    self.keeps_best = self.val_loader is not None and recipe.select == "best"  # else the last is chosen anyhow
    self.val, self.selected_step, self.choice = None, self.total, {}

  def compile(self, batch):
    """Compiles the step, choosing the micro-batch, and notes its cost."""
    recipe = self.recipe
    class_weights = None
    if recipe.class_weights == "balanced":
      class_weights = data.class_weights(self.task.splits["train"].labels, self.num_classes)
    def compiled(micro_batches: int):
      step = make_step(self.method, self.backbone, self.optimiser, self.preprocessing, self.num_classes,
                       seed=recipe.seed, drop_path=recipe.drop_path, remat=recipe.remat, micro_batches=micro_batches,
                       class_weights=class_weights)
      return compile_step(step, self.run, self.frozen, batch, remat=recipe.remat)
    rows = len(batch["weight"])
    if recipe.micro_batch < 0:
      step, parts = cost.largest_that_fits(compiled, rows, self.mesh.size)
    else:
      parts = cost.parts(rows, recipe.micro_batch or rows, self.mesh.size)
      step = compiled(parts)
    self.cost = cost.of_step(step, parts)
    self.tell(f"a step: {rows} images on {self.mesh.size} device(s) in {parts} part(s), "
              f"peak {self.cost.train_peak_bytes / 2**20:.1f} MiB")
    return step

  def train_loader(self) -> data.TrainLoader:
    activations = self.kept(self.cache, "train", self.task.splits["train"]).take if self.cache else None
    return train_loader(self.recipe, self.task, self.preprocessing, activations)

  def kept(self, cache, name: str, split: data.Split) -> features_lib.Features:
    """A split's activations; those that an earlier stage did not read are written now."""
    features_lib.write(cache, self.weights, self.method.reads, {name: split}, device_count=self.recipe.devices,
                       quiet=self.quiet)
    return features_lib.Features(cache, self.weights, self.method.reads, name, split)

  def eval_loader(self, split):
    if self.cache:
      plain = dataclasses.replace(self.cache, views=0)  # whatever name the split goes by
      return features_lib.eval_loader(self.kept(plain, split.name, split), split, self.weights,
                                      max(self.recipe.batch_size, 32))
    return data.eval_loader(split, self.preprocessing, batch_size=max(self.recipe.batch_size, 32))

  def scores(self, trainable, state, loader, among=()) -> dict:
    found = evaluate(lambda images: self.predict(trainable, state, self.frozen, images), loader, self.num_classes,
                     among=among, mesh=self.mesh, quiet=self.quiet)
    return scores(found, self.task.domain_names, among)

  def train(self) -> "Stage":
    """Trains from the newest checkpoint, or from the start, to the end; then holds the chosen trainable and state."""
    batches = iter(self.loader)
    batch = devices.put_batch(next(batches), self.mesh)
    step = self.compile(batch)
    checkpoints, done = None, 0
    if self.folder:
      self.folder.begin()
      checkpoints = Checkpoints(self.folder.path / "checkpoints" / f"stage_{self.index}")
      done = self.restore(checkpoints)
    if 0 < done < self.total:
      batch = devices.put_batch(next(batches), self.mesh)
    clock, since = time.monotonic(), done
    with Progress(self.total, "training", done=done, quiet=self.quiet) as progress:
      while done < self.total:
        self.run, metrics = step(self.run, self.frozen, batch)
        done += 1
        last = done == self.total
        if last or any(done % every == 0 for every in (self.log_every, self.evaluate_every, self.checkpoint_every)):
          self.check_finite(checkpoints)
        if last or done % self.log_every == 0:
          shown = (done - since) * self.loader.rows_per_step
          row = {"step": done, "loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"]),
                 "lr": float(self.rate(done - 1)),
                 "examples_per_second": round(shown / (time.monotonic() - clock), 1)}
          clock, since = time.monotonic(), done
          self.log(row)
          progress.update(0, f"loss {row['loss']:.4f}")
        if self.val_loader and (last or done % self.evaluate_every == 0):
          self.validate(done, progress)
        if checkpoints and (last or done % self.checkpoint_every == 0):
          self.save(checkpoints, done)
        progress.update()
        if not last:  # after saving, so that the saved position is that of the finished steps
          batch = devices.put_batch(next(batches), self.mesh)
    self.loader.close()
    if checkpoints:
      checkpoints.close()
    self.choose()
    return self

  def log(self, row: dict) -> None:
    if self.folder:
      self.folder.log({"stage": self.index, **row})

  def validate(self, done: int, progress: Progress) -> None:
    found = self.scores(self.run.trainable, self.run.state, self.val_loader)
    self.log({"step": done, "val": found})
    progress.update(0, f"val accuracy {found['accuracy']:.4f}")
    rank = lambda val: (val[self.criterion], -val["loss"])
    if self.recipe.select == "last" or not self.best or rank(found) > rank(self.best["val"]):
      self.best = {"step": done, "val": found}
      if self.keeps_best:
        self.best["trainable"] = jax.tree.map(jnp.copy, self.run.trainable)

  def choose(self) -> None:
    self.trainable, self.state = self.run.trainable, self.run.state
    if self.best:
      self.val, self.selected_step = self.best["val"], self.best["step"]
      self.trainable = self.best.get("trainable", self.trainable)

  def settle(self) -> None:
    """Scores the members of a method that has some on the validation split, and chooses among them where it does."""
    method = self.method
    if not self.val_loader or not method.members:
      if method.choose:
        self.tell(f"{method.name} chooses on a validation split and there is none: nothing is chosen")
      return
    run = make_predict_members(method, self.backbone, self.preprocessing)
    logits, labels = collect_members(lambda inputs: run(self.trainable, self.state, self.frozen, inputs),
                                     self.val_loader, self.mesh)
    names = sorted(logits, key=lambda name: list(method.reads).index(name) if name in method.reads else -1)
    members = {name: dict(zip(("accuracy", "loss"), ensembles.score(logits[name], labels))) for name in names}
    for name, found in members.items():
      self.tell(f"{name}: val accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}")
    self.choice = {"members": members}
    if method.choose:
      self.method, self.trainable, self.state = method.choose(self.trainable, self.state, logits, labels)
      chosen = {name: value for name, value in self.method.options.items() if method.options[name] != value}
      self.choice["chosen"] = chosen
      self.tell("chosen: " + ", ".join(f"{name}={value}" for name, value in chosen.items()))
      self.predict = make_predict(self.method, self.backbone, self.preprocessing)
      self.val = self.scores(self.trainable, self.state, self.val_loader)

  def check_finite(self, checkpoints) -> None:
    bad = int(self.run.nan_step)
    if bad >= 0:
      good = checkpoints.manager.latest_step() if checkpoints else None
      where = f"the last good checkpoint is of step {good}" if good is not None else "there is no checkpoint yet"
      raise NotFinite(f"loss, gradient or parameters are not finite at step {bad}; {where}. Lower optim.lr, set "
                      "optim.clip=1.0, or use dtype='float32', in another workdir")

  def save(self, checkpoints: Checkpoints, done: int) -> None:
    notes = {"loader": self.loader.get_state(), "best": {k: v for k, v in self.best.items() if k != "trainable"}}
    checkpoints.save(done, self.kept_arrays(), notes)

  def kept_arrays(self) -> dict:
    """What a checkpoint holds."""
    best = {"best": self.best.get("trainable", self.run.trainable)} if self.keeps_best else {}
    return {"run": self.run, **best}

  def restore(self, checkpoints: Checkpoints) -> int:
    """Takes up the newest checkpoint, if there is one; returns the number of finished steps."""
    found = checkpoints.restore(self.kept_arrays())
    self.folder.truncate(self.index, found[0] if found else 0)
    stage = f"stage {self.index}: " if self.index else ""
    if not found:
      self.tell(f"{stage}fresh run")
      return 0
    step, arrays, notes = found
    self.run = arrays["run"]
    if notes["best"]:
      self.best = notes["best"] | ({"trainable": arrays["best"]} if self.keeps_best else {})
    self.loader.set_state(notes["loader"])
    self.tell(f"{stage}resumed at step {step} of {self.total}")
    return step
