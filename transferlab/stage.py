"""A stage: one method trained for one duration, from the newest checkpoint or from the start; `train.fit` runs them."""
import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, config, cost, data, devices, ensembles, preemption, sharding
from transferlab import features as features_lib
from transferlab.backbones.weights import Weights
from transferlab.evaluate import collect_members, evaluate, make_predict, make_predict_members
from transferlab.method import Method, classes, needed
from transferlab.optim import make_optimiser, schedule
from transferlab.progress import Progress, say
from transferlab.recipe import Recipe, mesh_of, places, train_loader
from transferlab.resume import Checkpoints
from transferlab.step import compile_step, make_step, start


class NotFinite(RuntimeError):
  """The loss, a gradient or a parameter became NaN or infinite."""


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


class Stage:
  """One method trained for one duration; most runs are a single stage."""

  def __init__(self, method: Method, weights: Weights, task, recipe: Recipe, folder, index: int, quiet: bool,
               features=""):
    self.method, self.task, self.recipe, self.folder, self.index = method, task, recipe, folder, index
    self.quiet, self.tell = quiet, (lambda message: None) if quiet else say
    self.preprocessing, self.num_classes = weights.preprocessing, len(task.class_names)
    self.mesh = mesh_of(recipe)
    split = sharding.plan(weights.params, self.mesh, recipe.shard_patterns)
    self.dtype = devices.compute_dtype(recipe.dtype)
    self.backbone = backbones.build(weights.spec, self.dtype, split)
    self.weights, self.cache = weights, None
    if features and features_lib.cacheable(method, weights.spec):
      self.cache = features_lib.of_recipe(features, recipe)
    elif features:
      self.tell(f"stage {index}: {method.name} says nothing of what it reads and trains from images")
    self.loader = self.train_loader()
    self.val_loader = self.eval_loader(task.splits["val"]) if "val" in task.splits else None
    self.criterion = criterion(recipe, task)
    per_epoch, B = self.loader.steps_per_epoch, self.loader.rows_per_step
    self.total = config.resolve_steps(recipe.duration, per_epoch, B, None, "duration", positive=True)
    steps = lambda name: config.resolve_steps(getattr(recipe, name), per_epoch, B, self.total, name, positive=True)
    self.log_every, self.evaluate_every = steps("log_every"), steps("evaluate_every")
    self.checkpoint_every = steps("checkpoint_every")

    known = classes(method, task.class_names, weights.tokenizer)
    with devices.on_host() if split else contextlib.nullcontext():
      trainable, state = method.init(jax.random.key(recipe.seed), weights.params, known)
      if not jax.tree.leaves(trainable):
        self.total = 0  # there is nothing to train
      self.rate = schedule(recipe.optim, max(self.total, 1), per_epoch, B)
      self.optimiser = make_optimiser(recipe.optim, self.rate, trainable)
      # The frozen parameters are cast once; a method that trains the backbone itself keeps no second copy of it.
      prepared = method.prepare(weights.params, state)
      # The run is donated in every step: its arrays are copies, whatever init took from the frozen parameters.
      run = start(*jax.tree.map(jnp.array, (trainable, state)), self.optimiser)
    kept = needed(method, prepared, weights.spec.depth, cached=self.cache is not None)
    self.frozen = sharding.place(kept, weights.params, self.dtype, self.mesh, split)
    self.run = jax.tree.map(devices.put, run, sharding.of_run(run, self.mesh, split))
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
                       class_weights=class_weights, domains=self.task.splits["train"].domain_count,
                       rows=self.loader.rows_per_step)
      return compile_step(step, self.run, self.frozen, batch, remat=recipe.remat)
    rows = len(batch["weight"])
    if not self.index and (said := devices.padding(self.loader.rows_per_step, self.mesh)):
      self.tell(said)
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
    """Batches of images, or of activations where there is a cache."""
    activations = self.kept(self.cache, "train", self.task.splits["train"]).take if self.cache else None
    return train_loader(self.recipe, self.task, self.preprocessing, activations, self.mesh)

  def kept(self, cache, name: str, split: data.Split) -> features_lib.Features:
    """A split's activations; those that an earlier stage did not read are written now."""
    features_lib.write(cache, self.weights, self.method.reads, {name: split}, **places(self.recipe), quiet=self.quiet)
    return features_lib.Features(cache, self.weights, self.method.reads, name, split)

  def eval_loader(self, split):
    """As `train_loader`, every example of a split once and never augmented."""
    rows = max(self.recipe.batch_size, 32)
    own = devices.own_rows(self.mesh, rows)
    if self.cache:
      plain = dataclasses.replace(self.cache, views=0)  # whatever name the split goes by
      return features_lib.eval_loader(self.kept(plain, split.name, split), split, self.weights, rows, own)
    return data.eval_loader(split, self.preprocessing, batch_size=rows, own=own)

  def scores(self, trainable, state, loader, among=()) -> dict:
    """The ledger's numbers of a trainable on what a loader holds."""
    found = evaluate(lambda inputs, weight: self.predict(trainable, state, self.frozen, inputs, weight), loader,
                     self.num_classes, among=among, mesh=self.mesh, quiet=self.quiet)
    return scores(found, self.task.domain_names, among)

  def train(self) -> "Stage":
    """Trains from the newest checkpoint, or from the start, to the end; then holds the chosen trainable and state.

    Raises:
      NotFinite: with the last good checkpoint.
      preemption.Preempted: with a checkpoint of the step that was finished.
    """
    if not self.total:
      return self.without_training()
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
    with (preemption.saving() if checkpoints else contextlib.nullcontext(),
          Progress(self.total, "training", done=done, quiet=self.quiet) as progress):
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
        leaves = bool(checkpoints) and preemption.due()
        if leaves:
          self.check_finite(checkpoints)
        if checkpoints and (last or leaves or done % self.checkpoint_every == 0):
          self.save(checkpoints, done)
        if leaves:
          self.folder.close()
          preemption.leave(f"a checkpoint of step {done} is written, the same command resumes")
        progress.update()
        if not last:  # after saving, so that the saved position is that of the finished steps
          batch = devices.put_batch(next(batches), self.mesh)
    self.loader.close()
    if checkpoints:
      checkpoints.close()
    self.choose()
    return self

  def without_training(self) -> "Stage":
    """For a method with nothing to train: its scores, and no checkpoint."""
    self.cost = cost.StepCost(0, 0)
    if self.folder:
      self.folder.begin()
      self.folder.truncate(self.index, 0)
    if self.val_loader:
      with Progress(1, "validating", quiet=self.quiet) as progress:
        self.validate(0, progress)
    self.choose()
    return self

  def log(self, row: dict) -> None:
    """A line of metrics.jsonl, where there is a workdir."""
    if self.folder:
      self.folder.log({"stage": self.index, **row})

  def validate(self, done: int, progress: Progress) -> None:
    """Scores the run as it stands, and keeps it if it is the best so far."""
    found = self.scores(self.run.trainable, self.run.state, self.val_loader)
    self.log({"step": done, "val": found})
    progress.update(0, f"val accuracy {found['accuracy']:.4f}")
    rank = lambda val: (val[self.criterion], -val["loss"])
    if self.recipe.select == "last" or not self.best or rank(found) > rank(self.best["val"]):
      self.best = {"step": done, "val": found}
      if self.keeps_best:
        self.best["trainable"] = jax.tree.map(jnp.copy, self.run.trainable)

  def choose(self) -> None:
    """Takes the parameters that the recipe selects."""
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
    domains, weights = self.val_loader.split.domains, None
    if self.criterion == "mean_over_domains":
      weights = 1 / np.bincount(domains)[domains]  # every domain counts the same
    members = {name: dict(zip(("accuracy", "loss"), ensembles.score(logits[name], labels, weights))) for name in names}
    for name, found in members.items():
      self.tell(f"{name}: val accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}")
    self.choice = {"members": members}
    if method.choose:
      self.method, self.trainable, self.state = method.choose(self.trainable, self.state, logits, labels, weights)
      chosen = {name: value for name, value in self.method.options.items() if method.options[name] != value}
      self.choice["chosen"] = chosen
      self.tell("chosen: " + ", ".join(f"{name}={value}" for name, value in chosen.items()))
      self.predict = make_predict(self.method, self.backbone, self.preprocessing)
      self.val = self.scores(self.trainable, self.state, self.val_loader)

  def check_finite(self, checkpoints) -> None:
    """Raises `NotFinite` if any step so far was not."""
    bad = int(self.run.nan_step)
    if bad >= 0:
      good = checkpoints.last if checkpoints else None
      where = f"the last good checkpoint is of step {good}" if good is not None else "there is no checkpoint yet"
      raise NotFinite(f"loss, gradient or parameters are not finite at step {bad}; {where}. Lower optim.lr, set "
                      "optim.clip=1.0, or use dtype='float32', in another workdir")

  def save(self, checkpoints: Checkpoints, done: int) -> None:
    """Writes a checkpoint of the finished steps."""
    notes = {"loader": self.loader.get_state(), "best": {k: v for k, v in self.best.items() if k != "trainable"}}
    checkpoints.save(done, self.kept_arrays(), notes)

  def kept_arrays(self) -> dict:
    """What a checkpoint holds."""
    best = {"best": self.best.get("trainable", self.run.trainable)} if self.keeps_best else {}
    return {"run": self.run, **best}

  def restore(self, checkpoints: Checkpoints) -> int:
    """Takes up the newest checkpoint, if there is one; returns the number of finished steps."""
    found = checkpoints.restore(self.kept_arrays(), self.tell)
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
