"""What all chunks and stages of a training of parallel heads share: batches, frozen parameters, compiled programs."""
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, config, cost, data, devices, distributed
from transferlab.heads.program import Head, chunk_size, make_heads_scores, make_heads_step, run_shapes, settings
from transferlab.method import Method, classes, needed
from transferlab.optim import schedule
from transferlab.progress import say
from transferlab.recipe import train_loader
from transferlab.step import compile_step
from transferlab.stage import criterion


class Lane(NamedTuple):
  """A head on its way through the stages: its place among all, its method of this stage, whether it is still finite."""
  number: int
  head: Head
  method: Method
  finite: bool = True


class Shared:
  """Batches, frozen parameters and compiled programs."""

  def __init__(self, weights, task, recipe, count, *, folds, loaders, memory_limit, mesh, keep_logits, keep_trainables,
               quiet):
    self.weights, self.task, self.recipe = weights, task, recipe
    self.folds = None if folds is None else np.asarray(folds, np.int32)
    self.keep_logits, self.keep_trainables, self.quiet = keep_logits, keep_trainables, quiet
    self.tell = (lambda message: None) if quiet else say
    free = cost.available_bytes() - cost.held_bytes() if memory_limit is None else memory_limit
    self.limit = min(distributed.gather(free))
    self.num_classes, self.split = len(task.class_names), "val" if folds is None else "train"
    given, mesh = mesh, mesh or devices.make_mesh(recipe.devices or None)
    self.loader, rest = loaders or (train_loader(recipe, task, weights.preprocessing, None, mesh), {})
    rows = max(recipe.batch_size, 32)
    self.eval_loader = rest.get(self.split) if loaders else data.eval_loader(
        task.splits[self.split], weights.preprocessing, batch_size=rows, own=devices.own_rows(mesh, rows))
    if self.eval_loader is None:
      raise ValueError(f"loaders have {', '.join(rest) or 'nothing'} to evaluate on; expected {self.split!r}")
    self.position = self.loader.get_state()
    first = next(iter(self.loader))
    self.cached = "activations" in first
    if given is None and self.cached:
      mesh = devices.make_mesh(mesh.size, math.gcd(mesh.size, count))
    own = devices.own_rows(mesh, self.loader.rows_per_step)
    if own and len(first["weight"]) != own[1] - own[0]:
      raise ValueError(f"loaders give this process {len(first['weight'])} rows of a batch; expected its own "
                       f"{own[1] - own[0]}; make the loaders and train the heads with the same mesh")
    self.mesh, self.sharding = mesh, devices.along_heads(mesh)
    self.first = self.put(first)
    self.backbone, self.frozen = backbones.build(weights.spec, devices.compute_dtype(recipe.dtype)), {}
    per_epoch, B = self.loader.steps_per_epoch, self.loader.rows_per_step
    self.total = config.resolve_steps(recipe.duration, per_epoch, B, None, "duration", positive=True)
    steps = lambda name: config.resolve_steps(getattr(recipe, name), per_epoch, B, self.total, name, positive=True)
    self.best = recipe.select == "best" and folds is None
    self.evaluate_every = steps("evaluate_every") if self.best else self.total
    self.log_every = steps("log_every")
    self.by_domain = criterion(recipe, task) == "mean_over_domains"
    self.rates, self.programs, self.peak = {}, {}, 0

  def put(self, batch: dict) -> dict:
    """A batch on the devices, with the fold of each row where there are folds."""
    if self.folds is not None:
      batch = {**batch, "fold": self.folds[batch["index"]]}  # filling, row -1, weighs nothing
    return devices.put_batch(batch, self.mesh)

  def chunk_size(self, stage: int, lane: Lane, count: int) -> int:
    """How many of `count` heads train at once in this stage; says so."""
    peak = lambda size: cost.peak_bytes(self.program(stage, lane, size)[0])
    size = chunk_size(count, peak, self.limit, self.mesh.shape["heads"])
    chunks = -(-count // size)
    if not stage or chunks > 1:  # a later stage needs no line for each chunk, unless that is cut once more
      self.tell(f"{f'stage {stage}: ' if stage else ''}{count} heads in {chunks} chunk{'s' * (chunks > 1)} of {size}, "
                f"peak {peak(size) / 2**20:.1f} MiB of {self.limit / 2**20:.1f}")
    self.peak = max(self.peak, peak(size))
    return size

  def program(self, stage: int, lane: Lane, size: int):
    """(compiled step, evaluation) of `size` heads like this one; the chunks of a stage share it."""
    if (stage, size) not in self.programs:
      rows, groups = len(self.first["weight"]), devices.groups(self.mesh)
      if self.recipe.micro_batch < 0:
        fewest = self.mesh.shape["heads"]
        _, parts = cost.largest_that_fits(lambda parts: self.compile(lane, fewest, parts), rows, groups, self.limit)
      else:
        parts = cost.parts(rows, self.recipe.micro_batch or rows, groups)
      domains = self.eval_loader.split.domains
      scores = make_heads_scores(lane.method, self.backbone, self.weights.preprocessing,
                                 1 if domains is None else int(domains.max()) + 1)
      self.programs[stage, size] = self.compile(lane, size, parts), scores
    return self.programs[stage, size]

  def compile(self, lane: Lane, size: int, parts: int):
    """The step of `size` heads in `parts` micro-batches, compiled for shapes alone."""
    recipe, method = self.recipe, lane.method
    step = make_heads_step(
        method, self.backbone, recipe.optim, self.weights.preprocessing, self.num_classes, self.sharding,
        drop_path=recipe.drop_path, remat=recipe.remat, micro_batches=parts,
        domains=self.task.splits["train"].domain_count,
        rows=self.loader.rows_per_step)
    shapes = run_shapes(method, self.weights.params, self.num_classes, recipe.optim, size)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding), shapes)
    return compile_step(step, shapes, self.settings([lane.head] * size), self.frozen_of(method), self.first,
                        remat=recipe.remat)

  def classes(self, method: Method):
    """What a method's init is to know of the classes."""
    return classes(method, self.task.class_names, self.weights.tokenizer)

  def frozen_of(self, method: Method) -> dict:
    """What a method sees of the backbone, on the devices; what several stages see is there once."""
    params = self.weights.params
    if method.prompts and not self.frozen:  # one stage alone; its state does not depend on the seed
      params = method.prepare(params, method.init(jax.random.key(0), params, self.classes(method))[1])
    elif method.prompts:
      return self.frozen
    found = needed(method, params, self.weights.spec.depth, self.cached)
    if self.recipe.shard != 1 and (found or not self.cached):
      raise ValueError(f"heads that train side by side need the whole backbone on every device, and shard is "
                       f"{self.recipe.shard}; set shard=1, train them one by one, or from cached activations with a "
                       "method that only reads")
    for name in found.keys() - self.frozen.keys():
      new = devices.cast({name: found[name]}, self.weights.params, self.backbone.dtype)
      self.frozen |= devices.replicate(new, self.mesh)
    return {name: self.frozen[name] for name in found}

  def settings(self, heads: list[Head]) -> dict:
    """What the programs need to know of these heads, on the devices."""
    def rates(lr):
      if lr not in self.rates:
        rate = schedule(dataclasses.replace(self.recipe.optim, lr=lr), self.total, self.loader.steps_per_epoch,
                        self.loader.rows_per_step)
        steps = jnp.arange(self.total)
        self.rates[lr] = np.asarray(jax.vmap(lambda step: jnp.asarray(rate(step), jnp.float32))(steps))
      return self.rates[lr]
    labels = self.task.splits["train"].labels
    weights = lambda fold: data.class_weights(labels if fold < 0 else labels[self.folds != fold], self.num_classes)
    found = settings(heads, rates, weights if self.recipe.class_weights == "balanced" else None)
    return devices.put(found, self.sharding)
