"""How to train, as plain data: every number of a run that is not the method's own."""
import dataclasses
from dataclasses import dataclass

from transferlab import config, data, devices
from transferlab.data.augment import preset
from transferlab.optim import Optim


@dataclass(frozen=True)
class Recipe:
  """How to train. Durations are strings: "20 epochs", "500 steps", "10000 examples", "5 percent" of the run.

  Fields:
    duration: of each stage that has none of its own.
    batch_size: global, whatever the number of devices; with `per_domain`, of every training domain.
    optim: see `optim.Optim`.
    augmentation: a preset's name, see `data.Augmentation`.
    drop_path: stochastic depth of the last block; it acts in frozen blocks too.
    label_smoothing: share of the target spread over all classes.
    class_weights: "none", or "balanced" so that every class counts the same.
    per_domain: a step takes `batch_size` images of every training domain, as DomainBed does, and `select` goes by the
      mean of the domains' validation accuracies.
    reshuffle: every epoch has an order of its own; False keeps the first epoch's for all.
    drop_last: leave the last partial batch of each epoch out, as the papers do; else it is padded.
    dtype: of the backbone's computation, "float32", "bfloat16" or "auto" (float32 on CPU, else bfloat16). Heads and
      trainables are float32.
    remat: recompute adapted blocks in the backward pass: less memory, more time.
    micro_batch: rows computed at once, 0 for the whole batch, -1 for the largest that fits the device's memory.
    select: "best" keeps the parameters with the best validation accuracy (of equals, with the lowest validation loss),
      "last" the last ones.
    evaluate_every, checkpoint_every, log_every: durations.
    bad_images: "error", or "skip" to go on without images that cannot be read.
    workers: processes that decode images, 0 for none.
    devices: number of devices, 0 for all.
    shard: number of devices that share one copy of the backbone, which then need not fit one; it has to divide their
      number. 1 keeps a copy on each, 0 shares one among all. A backbone that trains is shared, too.
    shard_patterns: which dimension of a parameter is split, ((".*/fc1/kernel", 1), ("text/tokens", None)), None for a
      parameter that is whole on every device; the first that matches counts, then those of `sharding.PATTERNS`.
    views: with cached activations, the number of augmented copies of the training images to keep, on which epochs train
      in turn; 0 keeps the images as they are.
    cache_dtype: with cached activations, what they are kept in, "float32" or "bfloat16".
    seed: of initialisation, order, augmentation and dropout.
  """
  duration: str = "20 epochs"
  batch_size: int = 32
  optim: Optim = Optim()
  augmentation: str = "none"
  drop_path: float = 0.0
  label_smoothing: float = 0.0
  class_weights: str = "none"
  per_domain: bool = False
  reshuffle: bool = True
  drop_last: bool = True
  dtype: str = "auto"
  remat: bool = False
  micro_batch: int = 0
  select: str = "best"
  evaluate_every: str = "1 epoch"
  checkpoint_every: str = "5 epochs"
  log_every: str = "50 steps"
  bad_images: str = "error"
  workers: int = 0
  devices: int = 0
  shard: int = 1
  shard_patterns: tuple = ()
  views: int = 0
  cache_dtype: str = "float32"
  seed: int = 0

  def __post_init__(self):
    choices = {"class_weights": ("none", "balanced"), "select": ("best", "last"), "bad_images": ("error", "skip"),
               "dtype": ("auto", "float32", "bfloat16"), "cache_dtype": ("float32", "bfloat16")}
    for name, valid in choices.items():
      if getattr(self, name) not in valid:
        raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(valid)}")
    for name, least in {"batch_size": 1, "micro_batch": -1, "workers": 0, "devices": 0, "shard": 0, "views": 0,
                        "seed": 0}.items():
      if getattr(self, name) < least:
        raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
    for name in ("drop_path", "label_smoothing"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; expected a number from 0 to below 1")
    if self.shard_patterns and self.shard == 1:
      raise ValueError("shard_patterns say how devices share a backbone, and with shard=1 each has its own; set shard, "
                       "or leave them out")
    preset(self.augmentation)
    for name in ("duration", "evaluate_every", "checkpoint_every", "log_every"):  # for the errors; steps come later
      config.resolve_steps(getattr(self, name), 1, 1, None if name == "duration" else 1, name, positive=True)


def changed(recipe: Recipe, changes: dict) -> Recipe:
  """The recipe with some fields replaced, {"duration": "500 epochs", "optim": {"lr": 5e-4}}."""
  optim = dataclasses.replace(recipe.optim, **changes.get("optim", {}))
  return dataclasses.replace(recipe, **{**changes, "optim": optim})


def mesh_of(recipe: Recipe):
  """The devices that a recipe asks for."""
  return devices.sharing(recipe.devices, recipe.shard)


def places(recipe: Recipe) -> dict:
  """The same for `features.write`."""
  return {"device_count": recipe.devices, "shard": recipe.shard, "shard_patterns": recipe.shard_patterns}


def augmentation(recipe: Recipe) -> data.Augmentation:
  """The recipe's preset, with its label smoothing unless the recipe sets one."""
  chosen = preset(recipe.augmentation)
  return dataclasses.replace(chosen, label_smoothing=recipe.label_smoothing or chosen.label_smoothing)


def train_loader(recipe: Recipe, task: data.Task, preprocessing, activations=None, mesh=None) -> data.TrainLoader:
  """The batches that a recipe asks for, of a task's split "train", preprocessed as the weights want it; of cached
  activations where they are given, see `data.train_loader`; of a mesh that several processes share, their own rows."""
  split = task.splits["train"]
  by_domain = recipe.per_domain and split.domains is not None
  rows = recipe.batch_size * (len(set(split.domains.tolist())) if by_domain else 1)
  return data.train_loader(
      split, preprocessing, batch_size=recipe.batch_size, seed=recipe.seed,
      augmentation=augmentation(recipe), drop_last=recipe.drop_last, num_classes=len(task.class_names),
      workers=recipe.workers, per_domain=recipe.per_domain, reshuffle=recipe.reshuffle, activations=activations,
      own=mesh and devices.own_rows(mesh, rows))
