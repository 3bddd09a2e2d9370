"""Sweeps: train a grid of configurations, choose one on validation, train that with several seeds and open test once.

    workdir/config.json        what was asked for, the grid apart
    workdir/sweep.jsonl        the ledger: a row for every grid point, and for every member of its method; of several
                               processes each writes its own, sweep.1.jsonl and so on, and all of them count
    workdir/best.json          the choice
    workdir/final/seed_<n>/    runs of the choice, as `train.fit` leaves them

Points that differ in numbers only train side by side, see `grid.py` and `heads.py`; each trains as `train.fit` would,
except that all see the images in one order, that of the configuration's seed. The test split is taken away before
anything else. An interrupted sweep goes on where its ledger ends, and a larger grid adds to it.

Several processes share out the groups or, of fewer groups than processes, their points, and then the seeds; each trains
its own alone. A sweep goes on with any number of them: what is in a ledger stands, whoever wrote it.
"""
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from transferlab import choice, data, dealing, devices, distributed, experiment, features, methods, suite as suite_lib
from transferlab import grid as grid_lib
from transferlab.checkpoint import versions
from transferlab.choice import Candidate, Ledger
from transferlab.files import write_json
from transferlab.heads import Head, Score, Trained, train_heads
from transferlab.methods.over_sites import over_sites
from transferlab.progress import say
from transferlab.recipe import Recipe
from transferlab.stage import criterion
from transferlab.train import adapted, check_arguments, check_texts, readable, request

WHERE = ("data", "data_dir", "backbone", "download", "features")  # where things lie is no part of what they are


class Outcome(NamedTuple):
  """What `run` returns.

  Fields:
    candidates: the chosen one first, those that diverged last.
    criterion: what their score is, "accuracy" or "mean_over_domains".
    rows: of the ledger, those of this grid.
    finals: ledger rows of the final runs, each with its `path`.
  """
  candidates: list[Candidate]
  criterion: str
  rows: list[dict]
  finals: list[dict]

  @property
  def best(self) -> Candidate:
    """The candidate that was chosen."""
    return self.candidates[0]


def run(config, grid: Mapping[str, Sequence], workdir, *, folds: int = 0, contiguous: bool = False, final=None,
        seeds: Sequence[int] = (0, 1, 2), quiet: bool = False) -> Outcome:
  """Trains all points of a grid, chooses, and trains the choice.

  Args:
    config: from `experiment.load` or `experiment.defaults`; with `features` what says what it reads trains from there.
    grid: {key of the configuration: values or their texts}, from `grid.parse` or `experiment.load_grid`. Points that
      differ in their seed only are averaged.
    workdir: belongs to one configuration; its grid may grow.
    folds: parts of the training split that are held out in turn, and whose mean accuracy is a point's score; a val
      split plays no part then. 0 trains on all of it and scores on the val split, as the recipe's `select` says.
    contiguous: folds are consecutive rows; otherwise every class is dealt out evenly.
    final: configuration of the final runs, by default `config`, or a function of the seed; the choice is set in it. It
      trains on all of its training split, to the last step unless it has a val split of its own to choose a step on.
    seeds: of the final runs, () for none.

  Raises:
    ValueError: about the request, before the first step; that every candidate diverged; that the final runs are there
      and of another choice, which a smaller grid made: their folder has to be deleted.
  """
  if len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
    raise ValueError(f"seeds are {list(seeds)}; expected different whole numbers from 0 to {2**32 - 1}, such as "
                     "0, 1, 2")
  tell = (lambda message: None) if quiet else say
  sweep = Sweep(config, grid_lib.points(config, grid), folds, contiguous, quiet)
  distributed.compare("sweep", {**sweep.asked, "seeds": list(seeds), "points": [p.values for p in sweep.points],
                                "hash": choice.point_hash({"points": sweep.hashes})})
  ledger = Ledger(workdir, sweep.asked)
  sweep.fill(ledger)
  rows = [ledger.rows[key] for key in sweep.hashes]
  found = choice.candidates([point.values for point in sweep.points], rows, sweep.criterion)
  tell(f"chosen of {len(found)}: {found[0]}; val {sweep.criterion} {found[0].score:.4f}")
  changes = sweep.changes(found[0])
  if distributed.first():
    write_json(ledger.folder.path / "best.json", {
        **found[0]._asdict(), "criterion": sweep.criterion, "candidates": len(found),
        "config": grid_lib.changed(config, changes).to_dict()})
  base = lambda seed: config if final is None else final(seed) if isinstance(final, Callable) else final
  finals = train_finals({ledger.folder.path / "final" / f"seed_{seed}": grid_lib.changed(
      base(seed), {**changes, "seed": seed}) for seed in seeds}, tell, quiet)
  return Outcome(found, sweep.criterion, [row for point in rows for row in point], finals)


def train_finals(configs: dict[Path, Any], tell: Callable, quiet: bool) -> list[dict]:
  """The ledger rows of the final runs, each with its `path`; processes take turns, each trains its own alone.

  Args:
    configs: {folder: configuration}.
  """
  if not configs:
    return []
  place, count = distributed.hosts()
  def work() -> None:
    for path in list(configs)[place::count]:
      tell(f"final run: {path}")
      experiment.run(configs[path], path, quiet)
  if len(configs) < count:
    tell(f"{len(configs)} final runs for {count} processes: {count - len(configs)} wait")
  done = lambda: sum((path / "result.json").exists() for path in configs)
  dealing.apart("finals", work, lambda other: tell(
      f"waiting for process {other}: {done()} of {len(configs)} final runs are finished"))
  return [{**json.loads((path / "result.json").read_text()), "path": str(path)} for path in configs]


class Sweep:
  """A grid on its task.

  Attributes:
    points, groups: of `grid.py`.
    hashes: by point, of all that its scores depend on.
    asked: what a workdir belongs to.
    criterion: the score to choose by.
  """

  def __init__(self, config, points: list[grid_lib.Point], folds: int, contiguous: bool, quiet: bool):
    self.points, self.quiet, self.tell = points, quiet, (lambda message: None) if quiet else say
    first, _, self.recipe = experiment.parse(config)
    self.features = first.features
    self.task, whole = opened(first, self.recipe, bool(folds), self.tell, quiet)
    train = self.task.splits["train"]
    self.folds, how = None, {"folds": folds}
    if not folds:
      how["val_pixels"] = self.task.splits["val"].fingerprint()
    else:
      how |= {"contiguous": contiguous, "fold_seed": self.recipe.seed}
      self.folds = data.folds(train.labels, folds, self.task.class_names, seed=self.recipe.seed, contiguous=contiguous)
    sources = [dataclasses.replace(point.experiment, method="") for point in points]
    loaded = {source: experiment.weights_of(source) for source in dict.fromkeys(sources)}
    check_arguments(loaded[sources[0]], self.task, self.tell)
    # Of a CLIP, methods adapt the whole or the image tower.
    family = lambda source, point: methods.adapted(point.experiment.method, loaded[source].spec).family
    sources = [(source, family(source, point)) for source, point in zip(sources, points)]
    weights = {source: adapted(loaded[source[0]], point.experiment.method)
               for source, point in dict(zip(sources, points)).items()}
    self.groups = grid_lib.group(points, [weights[source] for source in sources], len(self.task.class_names))
    for group in self.groups:
      self.check(group)
    built = {number: method for group in self.groups for number, method in group.methods.items()}
    base = {source: request(each, "", {}, self.task, self.recipe, whole) for source, each in weights.items()}
    on = lambda recipe: f"{folds} {'contiguous' if contiguous else 'stratified'} folds of train" if folds else (
        f"{recipe.select} on val")
    asked = [{**base[source], **how, "method": built[number].name, "options": built[number].options,
              "protocol": "; ".join(filter(None, (base[source]["protocol"], on(points[number].recipe)))),
              "recipe": dataclasses.asdict(points[number].recipe), "dtype": computed_in(points[number].recipe)}
             for number, source in enumerate(sources)]
    self.rows = json.loads(json.dumps(asked))
    self.hashes = [choice.point_hash(row) for row in self.rows]
    if len(set(self.hashes)) < len(points):
      twice = next(point.values for point, key in zip(points, self.hashes) if self.hashes.count(key) > 1)
      raise ValueError(f"several points of the grid are the same training as {twice}; leave the others out")
    self.asked = {**how, "task": self.task.name, "split_hash": self.task.split_hash(), "pixels": train.fingerprint(),
                  "config": {key: value for key, value in config.to_dict().items() if key not in WHERE},
                  "backbone": Path(first.backbone).name}
    scored = dataclasses.replace(self.task, splits={"val": train if folds else self.task.splits["val"]})
    self.criterion = criterion(self.recipe, scored)

  def fill(self, ledger: Ledger) -> None:
    """Trains what the ledger lacks, and notes it there, chunk by chunk; of several processes each trains its share."""
    left = set(distributed.agree([number for number, key in enumerate(self.hashes) if key not in ledger.rows]))
    each = 1 if self.folds is None else self.rows[0]["folds"]
    self.tell(f"{len(self.points)} grid points in {len(self.groups)} group{'s'[:len(self.groups) != 1]}, {len(left)} "
              f"to train, {'scored on val' if each == 1 else f'{each} folds'}: {len(left) * each} heads")
    ledger.begin()
    place, count = distributed.hosts()
    shares = dealing.shares([[n for n in group.methods if n in left] for group in self.groups], count)
    if count > 1:
      sizes = [sum(len(points) for _, points in share) for share in shares]
      self.tell(f"points for processes 0 to {count - 1}: {', '.join(map(str, sizes))}"
                + f"; {sizes.count(0)} of them have nothing to train and wait" * (0 in sizes))
    def work() -> None:
      for number, points in shares[place]:
        group = self.groups[number]
        self.tell(f"group {number + 1} of {len(self.groups)}: {len(points)} points of {group.sites[0].name}")
        self.train(group, points, each, ledger)
    def waiting(other: int) -> None:
      ledger.refresh()
      self.tell(f"waiting for process {other}: {len(ledger.rows.keys() & set(self.hashes))} of {len(self.points)} grid "
                "points are trained")
    dealing.apart("points", work, waiting)
    if count > 1:
      ledger.refresh(self.hashes)

  def train(self, group: grid_lib.Group, missing: list[int], each: int, ledger: Ledger) -> None:
    """Trains the missing points of a group, with as many heads for `each` as there are folds."""
    method = group.sites[0] if len(group.sites) == 1 else over_sites(group.sites)
    recipe = dataclasses.replace(self.points[missing[0]].recipe, seed=self.recipe.seed)
    of = lambda number: self.points[number].recipe
    heads = [Head(of(number).optim.lr, of(number).optim.weight_decay, of(number).seed, group.vary[number], fold)
             for number in missing for fold in (range(each) if self.folds is not None else (-1,))]
    scores, clock, done, at_once = [], time.monotonic(), 0, 0

    def finished(_, chunk: Trained) -> None:
      nonlocal clock, done, at_once
      scores.extend(chunk.scores)
      at_once = at_once or len(chunk.heads)  # the first chunk is full, and the last one runs as if it were
      step = {"heads": at_once, "from_cache": loaders is not None, "train_peak_bytes": chunk.peak_bytes,
              "step_seconds": chunk.step_seconds and round(chunk.step_seconds, 6)}
      whole = missing[done:len(scores) // each]  # a chunk may end between the folds of a point
      if not whole:
        return
      seconds = round((time.monotonic() - clock) / len(whole), 2)
      own = lambda place: scores[place * each:(place + 1) * each]
      ledger.add([row for place, number in enumerate(whole, done)
                  for row in self.rows_of(number, group, own(place), {**step, "seconds": seconds})])
      clock, done = time.monotonic(), done + len(whole)

    loaders = self.loaders(group, method, recipe)
    train_heads(method, group.weights, self.task, recipe, heads, folds=self.folds, loaders=loaders,
                keep_trainables=False, finished=finished, quiet=self.quiet)

  def cached(self, group: grid_lib.Group) -> bool:
    """Whether a group trains from a cache: not without one, nor by a method of which a stage says not what it reads."""
    return bool(self.features) and all(features.cacheable(stage, group.weights.spec)
                                       for stage in grid_lib.stages(group.sites[0], group.weights))

  def check(self, group: grid_lib.Group) -> None:
    """Raises `ValueError` where a group cannot train as it is asked to, from the cache or without."""
    check_texts(group.sites[0], group.weights, self.task.class_names)
    recipe = self.points[next(iter(group.methods))].recipe
    if self.cached(group):
      features.check(group.sites[0], group.weights.spec, recipe)
    else:
      features.check_without(group.sites[0], recipe)

  def loaders(self, group: grid_lib.Group, method, recipe: Recipe):
    """Batches of cached activations; None for a group that trains without."""
    if not self.cached(group):
      return None
    weights = group.weights
    return features.loaders(self.features, weights, method.reads, self.task, recipe,
                            evaluate=("val" if self.folds is None else "train",), quiet=self.quiet)

  def rows_of(self, number: int, group: grid_lib.Group, scores: list[dict[str, Score]], costs: dict) -> list[dict]:
    """A ledger row for each member of a point, from the scores of its folds. Of its costs, `seconds` are its share of
    all that its chunk took, the others are of a step of so many `heads` at once."""
    by_fold = {member: [choice.plain(score[member]) for score in scores] for member in scores[0]}
    return [{
        **self.rows[number], "point_hash": self.hashes[number], "values": self.points[number].values,
        "member": member, "member_count": len(by_fold), "test": None, "seed": self.points[number].recipe.seed,
        "val": choice.over_folds(found, self.criterion), "by_fold": found, "group": group.name, **costs,
        "device": jax.local_devices()[0].device_kind, "versions": versions(),
    } for member, found in by_fold.items()]

  def changes(self, chosen: Candidate) -> dict:
    """What a candidate changes of the configuration."""
    group = next(group for group in self.groups if chosen.point in group.methods)
    method, changes = group.methods[chosen.point], dict(chosen.values)
    if chosen.member:
      last = grid_lib.stages(method, group.weights)[-1]  # the one that has the members
      if not last.member_options:
        raise ValueError(f"{method.name} has members and no member_options: {chosen.member!r} cannot be trained alone; "
                         "add them to the method")
      changes |= {f"options.{name}": value for name, value in last.member_options(chosen.member).items()}
    return changes if features.cacheable(method, group.weights.spec) else {**changes, "features": ""}


def computed_in(recipe: Recipe) -> str:
  """The type that a backbone computes in on this machine: a sweep that goes on elsewhere does not mix two."""
  return jax.numpy.dtype(devices.compute_dtype(recipe.dtype)).name


def opened(source: experiment.Experiment, recipe: Recipe, folds: bool, tell, quiet: bool
           ) -> tuple[data.Task, data.Task]:
  """The task with the splits that a sweep may see; and the same before unreadable images were left out."""
  task = data.from_string(source.data, source.data_dir)
  needed = ("train",) if folds else ("train", "val")
  if missing := [name for name in needed if name not in task.splits]:
    raise ValueError(f"task {task.name!r} has splits {', '.join(task.splits)} and no {missing[0]!r} to choose on; give "
                     "folds=5, or a phase of the task that has one, such as phase=tune")
  task = dataclasses.replace(task, splits={name: task.splits[name] for name in needed})
  return readable(task, recipe.bad_images, tell, quiet), task


class SuiteOutcome(NamedTuple):
  """What became of a suite: {task: Outcome}, and a line for each task that is absent and for each that failed."""
  outcomes: dict[str, Outcome]
  absent: list[str]
  failed: list[str]


def run_suite(suite: str, config: str, grid: Mapping[str, Sequence] | None, workdir,
              overrides: Mapping[str, str] | None = None, *, final: str = "", seeds: Sequence[int] = (0, 1, 2),
              quiet: bool = False, **how) -> SuiteOutcome:
  """A sweep of every task of a suite that is there, each with a choice of its own; arguments as of `suite.run`. Where a
  seed draws the images, the choice is made on those of the first.

  Args:
    grid: None for the one that the config file offers for each task.
    final: arguments of the config file for the final runs, "phase=final".
    how: as of `run`.
  """
  tell = (lambda message: None) if quiet else say
  configs, present, absent = suite_lib.opened(suite, config, overrides, seeds or (0,), tell)
  last = suite_lib.opened(suite, experiment.with_arguments(config, final), overrides, seeds or (0,), lambda _: None)[0]
  first = (*seeds, 0)[0]
  def one(name: str) -> tuple[str, Outcome]:
    own = grid or experiment.load_grid(experiment.with_arguments(config, f"task={name},seed={first}"))
    return name, run(configs[name, first], own, suite_lib.folder_of(workdir, name), seeds=seeds, quiet=quiet,
                     final=lambda seed: last[name, seed], **how)
  done, failed = suite_lib.each({name: functools.partial(one, name) for name in present}, tell)
  return SuiteOutcome(dict(done), absent, failed)
