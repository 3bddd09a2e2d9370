"""Training K heads on one task: through the stages of their method, in chunks that fit the memory."""
import functools
import time
from collections import OrderedDict
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import data, devices
from transferlab.backbones.weights import Weights
from transferlab.heads.program import choose, start_heads
from transferlab.heads.scores import Scores, Trained, joined
from transferlab.heads.shared import Lane, Shared
from transferlab.method import Method
from transferlab.progress import Progress
from transferlab.recipe import Recipe, augmentation


def train_heads(method: Method, weights: Weights, task: data.Task, recipe: Recipe, heads, *, folds=None, loaders=None,
                memory_limit: int | None = None, mesh=None, keep_logits: bool = False, keep_trainables: bool = True,
                finished: Callable | None = None, quiet: bool = False) -> Trained:
  """Trains K heads through all stages of a method, and scores them on rows that they did not train on.

  Args:
    task: with the splits "train" and, without folds, "val"; images that cannot be read were left out before.
    recipe: of all heads; `optim.lr` and `optim.weight_decay` are the heads' own. `select="best"` keeps each score of
      its best evaluation, and hands the best parameters to the next stage; with folds it is always the last.
    heads: of `Head`, K of them, all with the same options to vary.
    folds: int [N], the fold of each training row; a head is validated on the rows of its own, without augmentation.
    loaders: (train loader, {split: evaluation loader}) to take batches from, of cached activations say; with folds the
      split "train" is among them. By default images are decoded and run through the backbone.
    memory_limit: bytes of one device, by default what is available.
    mesh: by default all devices of the recipe share out the batch, and with cached activations the heads. Of a mesh
      that several processes share, all of them call this alike, with loaders of their own rows (`features.loaders` of
      the same mesh), and all get all of the result.
    keep_logits: keep the logits of the validation rows.
    keep_trainables: False where only scores are wanted: K copies of a backbone are large.
    finished: called with (first, chunk) after each chunk: the place of its first head, and what `train_heads` would
      return of it alone.

  An epoch is that of all training rows, with folds too; masked rows make a batch smaller, not an epoch shorter.

  Raises:
    ValueError: a split "test", nothing to validate on, heads that the method cannot vary, too little memory for one.
  """
  heads = tuple(heads)
  check(method, task, recipe, heads, folds)
  shared = Shared(weights, task, recipe, len(heads), folds=folds, loaders=loaders, memory_limit=memory_limit, mesh=mesh,
                  keep_logits=keep_logits, keep_trainables=keep_trainables, quiet=quiet)
  try:
    return train(shared, [Lane(number, head, method) for number, head in enumerate(heads)], finished=finished)
  finally:
    shared.loader.close()


def check(method: Method, task: data.Task, recipe: Recipe, heads: tuple, folds) -> None:
  """Raises `ValueError` for what cannot be trained side by side, before anything is computed."""
  if "test" in task.splits:
    raise ValueError(f"task {task.name!r} has a split 'test'; selection never sees it, pass the task without it")
  needed = ("train",) if folds is not None else ("train", "val")
  if missing := [name for name in needed if name not in task.splits]:
    raise ValueError(f"task {task.name!r} has no split {missing[0]!r}; expected train and val, or train and folds")
  if method.search:
    raise ValueError(f"{method.name} searches between its stages, which heads trained side by side cannot; train it by "
                     "itself and sweep over what it finds")
  if method.prompts and method.then:
    raise ValueError(f"{method.name} with options {method.options} has a stage whose text features depend on what each "
                     "head learns before, which heads trained side by side cannot share; train it by itself")
  if not heads:
    raise ValueError("heads is empty; expected at least one Head")
  for head in heads:
    if not (head.lr > 0 and head.weight_decay >= 0 and 0 <= head.seed < 2**32):
      raise ValueError(f"{head} has an lr of 0 or less, a negative weight_decay or a seed outside 0 … 2^32 - 1")
    if set(head.vary) != set(heads[0].vary):
      raise ValueError(f"heads vary {sorted(heads[0].vary)} and {sorted(head.vary)}; expected the same options in all")
    if unknown := [name for name in head.vary if name not in method.varies]:
      raise ValueError(f"{method.name} cannot vary {unknown[0]!r} in one program; it can "
                       f"{', '.join(method.varies) or 'nothing beside lr, weight_decay, seed and fold'}")
  known = {-1} if folds is None else set(np.unique(folds).tolist())
  if folds is not None and (np.shape(folds) != (len(task.splits["train"]),) or min(known) < 0):
    raise ValueError(f"folds are {list(np.shape(folds))} from {min(known)}; expected a number from 0 for each of the "
                     f"{len(task.splits['train'])} training rows")
  if strange := [head.fold for head in heads if head.fold not in known]:
    raise ValueError(f"a head holds out fold {strange[0]}; expected one of {', '.join(map(str, sorted(known)))}")
  mixing = augmentation(recipe)
  if folds is not None and (mixing.mixup or mixing.cutmix):
    raise ValueError("mixup and cutmix mix held-out rows into the others; use another augmentation with folds")


def train(shared: Shared, lanes: list[Lane], stage: int = 0, finished: Callable | None = None) -> Trained:
  """Trains lanes from a stage to the last one, in as many chunks as that stage needs."""
  size = shared.chunk_size(stage, lanes[0], len(lanes))
  parts = []
  for first in range(0, len(lanes), size):
    full = [lanes[min(k, len(lanes) - 1)] for k in range(first, first + size)]  # filled up with copies of the last
    parts.append(train_chunk(shared, full, stage).cut(len(lanes) - first))
    if finished:
      finished(first, parts[-1])
  return joined(parts)


def train_chunk(shared: Shared, lanes: list[Lane], stage: int) -> Trained:
  """Trains lanes that fit together through this stage, and then through those that follow."""
  method = lanes[0].method
  step, evaluate = shared.program(stage, lanes[0], len(lanes))
  heads, frozen = shared.settings([lane.head for lane in lanes]), shared.frozen_of(method)
  run, best, scores = start(shared, lanes), None, Scores(shared.best, shared.by_domain)
  what = f"training {len({lane.number for lane in lanes})} heads" + (f", stage {stage}" if stage else "")
  shared.loader.set_state(shared.position)
  batches, logits, clock = iter(shared.loader), None, Clock()
  with Progress(shared.total, what, quiet=shared.quiet) as progress:
    for done in range(1, shared.total + 1):
      run, logs = step(run, heads, frozen, shared.put(next(batches)))
      last = done == shared.total
      if last or done % shared.log_every == 0:  # waits for the devices, so that batches never pile up before them
        progress.update(0, f"median loss {np.median(devices.whole(logs['loss'])):.4f}")
      judging = shared.best and done % shared.evaluate_every == 0 or last and (shared.best or not method.then)
      if done == 1 or judging or last:
        clock.stop(run, done)
      if judging:
        keep = last and shared.keep_logits and not method.then
        sums, logits = measure(shared, functools.partial(evaluate, run.trainable, run.state, heads, frozen), keep)
        better = scores.add(sums, done)
        if method.then and shared.best:
          best = choose(better, run.trainable, run.trainable if best is None else best)
      if done == 1 or judging:
        clock.start()
      progress.update()
  lanes = judged(shared, lanes, devices.whole(run.nan_step), stage)
  trainable = run.trainable if best is None else best
  if method.then:
    ended = trainable, run.state
    ended = ended if shared.sharding.is_fully_addressable else devices.whole(ended)
    of = lambda k: jax.tree.map(lambda leaf: jnp.asarray(leaf[k]), ended)
    lanes = [lane._replace(method=lane.method.then(*of(k))) for k, lane in enumerate(lanes)]
    del run, best, trainable, ended  # before the next stage takes its memory
    return train(shared, lanes, stage + 1)
  arrays = devices.whole((run.trainable, run.state)) if shared.keep_trainables else (None, None)
  return Trained(method, tuple(lane.head for lane in lanes), *arrays,
                 scores.of_heads([lane.finite for lane in lanes]), [len(lanes)], shared.peak, logits,
                 clock.seconds_per_step())


class Clock:
  """Times training steps, without the first one and without what is computed between them."""

  def __init__(self):
    self.seconds, self.steps, self.since = 0.0, 0, None

  def start(self) -> None:
    self.since = time.monotonic()

  def stop(self, run, done: int) -> None:
    """After step `done`, for whose end it waits."""
    jax.block_until_ready(run.nan_step)
    if self.since is not None:
      self.seconds, self.steps = self.seconds + time.monotonic() - self.since, done - 1

  def seconds_per_step(self) -> float | None:
    """The mean; None of a run of one step."""
    return self.seconds / self.steps if self.steps else None


def start(shared: Shared, lanes: list[Lane]):
  """The runs of these lanes before the first step, on the devices."""
  known = shared.classes(lanes[0].method)  # its texts are the same for all lanes
  made = [lane.method.init(jax.random.key(lane.head.seed), shared.weights.params, known) for lane in lanes]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)  # copies: the run is donated in every step
  return devices.put(start_heads(*stacked, shared.recipe.optim), shared.sharding)


def measure(shared: Shared, of_batch: Callable, keep: bool):
  """({member: sums [K, G, 3]} over the validation rows, {split: logits [K, members, N, C]} or None)."""
  sums, logits = {}, {}
  for batch in shared.eval_loader:
    put = shared.put(batch)
    each = OrderedDict((member, found if keep else found[:1]) for member, found in of_batch(put).items())
    each, weight = devices.whole((each, put["weight"]))
    for member, (found, *values) in each.items():
      sums[member] = sums.get(member, 0) + found.astype(np.float64)
      if keep:
        logits.setdefault(member, []).append(values[0][:, weight > 0])
  if not keep:
    return sums, None
  members = [member for member in logits if member] or [""]
  return sums, {shared.split: np.stack([np.concatenate(logits[member], axis=1) for member in members], axis=1)}


def judged(shared: Shared, lanes: list[Lane], nan_steps, stage: int) -> list[Lane]:
  """Lanes with what became of them; those that broke down are named, once each."""
  # Members train apart from each other: in the end each is judged by its own validation loss.
  apart, said = bool(lanes[0].method.members and not lanes[0].method.then), {}
  for lane, step in zip(lanes, nan_steps.tolist()):
    if step >= 0 and lane.number not in said:
      head = lane.head
      said[lane.number] = (f"head {lane.number} (lr {head.lr:g}, weight decay {head.weight_decay:g}"
                           + "".join(f", {name} {value:g}" for name, value in head.vary.items())
                           + f") is not finite from step {step}{f' of stage {stage}' if stage else ''} on; "
                           + ("those of its members score worst that are not" if apart else "it scores worst"))
      shared.tell(said[lane.number])
  return [lane._replace(finite=lane.finite and (step < 0 or apart)) for lane, step in zip(lanes, nan_steps)]
