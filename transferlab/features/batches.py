"""Training from a cache: when it may be, and the batches, in the order that images would have."""
import contextlib
import dataclasses

import jax.numpy as jnp

from transferlab import data, devices, distributed, methods
from transferlab import recipe as recipes
from transferlab.backbones.weights import Weights
from transferlab.data.augment import Augmentation
from transferlab.features.cache import Cache, Features, complete
from transferlab.features.fill import write
from transferlab.method import Method
from transferlab.recipe import Recipe, augmentation, places


def of_recipe(folder, recipe: Recipe) -> Cache:
  """The cache that a recipe trains from."""
  chosen = dataclasses.replace(augmentation(recipe), label_smoothing=0.0)  # acts on labels
  return Cache(str(folder), recipe.cache_dtype, jnp.dtype(devices.compute_dtype(recipe.dtype)).name, recipe.views,
               *((chosen, recipe.drop_path, recipe.seed) if recipe.views else ()))


def reads_only(method: Method, spec) -> bool:
  """Whether a method leaves the backbone's computation as it is and says what it reads of it."""
  return method.writes_from == spec.depth and bool(method.reads)


def cacheable(method: Method, spec) -> bool:
  """Whether a method can train from a cache: it says what it reads, be that all that it needs of the backbone or, if it
  writes into it, what it needs of the blocks below the first that depends on what trains."""
  return bool(method.reads) and 0 < method.writes_from <= spec.depth


def check(method: Method, spec, recipe: Recipe = Recipe()) -> None:
  """Raises `ValueError` where training from a cache would not be the training that is asked for."""
  if not cacheable(method, spec):
    able = [name for name, each in methods.by_default(spec).items() if cacheable(each, spec)]
    raise ValueError(f"{method.name} writes into the backbone from block {method.writes_from} of {spec.depth} on and "
                     "says nothing of what it reads below, so that no activations can be kept for it; these train from "
                     f"a cache: {', '.join(able)}, by their default options; or train without features")
  chosen = dataclasses.replace(augmentation(recipe), label_smoothing=0.0)
  if chosen.mixup or chosen.cutmix:
    raise ValueError(f"augmentation {recipe.augmentation!r} mixes the images of a batch, so that their activations "
                     "cannot be kept; use one that does not mix, or train without features")
  random = f"augmentation {recipe.augmentation!r} is random" if chosen != Augmentation() else (
      f"drop_path {recipe.drop_path} is random" if recipe.drop_path else "")
  if random and not recipe.views:
    raise ValueError(f"{random}, so that images have no one activation to keep; keep several with views=4, or use "
                     "augmentation='none' and drop_path=0, or train without features")
  if recipe.views and not random:
    raise ValueError(f"views is {recipe.views} and nothing is random; expected 0, or an augmentation such as 'flip'")


def check_without(method: Method, recipe: Recipe) -> None:
  """Raises `ValueError` where training without a cache would leave a part of the recipe undone."""
  if recipe.views or recipe.cache_dtype != "float32":
    raise ValueError(f"views is {recipe.views} and cache_dtype {recipe.cache_dtype!r}, which belong to a cache, and "
                     f"{method.name} trains from images; give a folder as features to a method that says what it "
                     "reads, such as linear or dtl, or leave them at 0 and 'float32'")


def verified(folder, weights: Weights, reads: dict, task: data.Task, recipe: Recipe) -> data.Task:
  """The task, those of its splits marked as readable whose activations are all kept: their images are not needed."""
  cache, kept = of_recipe(folder, recipe), []
  for name, split in task.splits.items():
    with contextlib.suppress(data.BadImage):  # among the first images, which are part of the key
      if complete(cache, weights, reads, name, split):
        kept.append(name)
  marked = {name: dataclasses.replace(task.splits[name], verified=True) for name in distributed.agree(kept)}
  return dataclasses.replace(task, splits={**task.splits, **marked})


def train_loader(features: Features, task: data.Task, weights: Weights, recipe: Recipe, mesh=None) -> data.TrainLoader:
  """As `recipe.train_loader`, batches of activations."""
  return recipes.train_loader(recipe, task, weights.preprocessing, features.take, mesh)


def eval_loader(features: Features, split: data.Split, weights: Weights, batch_size: int, own=None) -> data.EvalLoader:
  """As `data.eval_loader`, batches of activations."""
  return data.eval_loader(split, weights.preprocessing, batch_size=batch_size, own=own,
                          activations=lambda rows, epoch: features.take(rows))


def loaders(folder, weights: Weights, reads: dict, task: data.Task, recipe: Recipe, *, evaluate=None,
            mesh=None, quiet: bool = False) -> tuple[data.TrainLoader, dict[str, data.EvalLoader]]:
  """Batches of activations for everything that a task is trained and evaluated on; what is missing is written first.

  Args:
    folder: of the cache.
    reads: {slot: Read} of the method.
    task: its images have to be readable where they are not all cached.
    recipe: see `check`, which is the caller's to call.
    evaluate: names of the splits to evaluate on, without augmentation; all but "train" by default.
    mesh: of which the batches are this process's rows, where several share it.

  Returns:
    (batches of "train" without end, {name: batches of a split, once}).
  """
  cache = of_recipe(folder, recipe)
  names = [name for name in task.splits if name != "train"] if evaluate is None else evaluate
  write(cache, weights, reads, {name: split for name, split in task.splits.items() if name == "train" or name in names},
        **places(recipe), quiet=quiet)
  plain = dataclasses.replace(cache, views=0)
  if cache.views and "train" in names:
    write(plain, weights, reads, {"train": task.splits["train"]}, **places(recipe), quiet=quiet)
  rows = max(recipe.batch_size, 32)
  own = mesh and devices.own_rows(mesh, rows)
  of_split = lambda name: eval_loader(
      Features(plain, weights, reads, name, task.splits[name]), task.splits[name], weights, rows, own)
  train = train_loader(Features(cache, weights, reads, "train", task.splits["train"]), task, weights, recipe, mesh)
  return train, {name: of_split(name) for name in names}
