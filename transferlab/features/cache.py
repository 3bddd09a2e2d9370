"""What is kept of which images, under which key, and the rows of it: on the device, in memory, or mapped from the disk.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, data
from transferlab.backbones.weights import Weights
from transferlab.data.augment import Augmentation
from transferlab.features.store import DTYPES, Column, Store
from transferlab.method import collect

RESIDENT_BYTES = 2**30  # what a split may take of the host's memory; a larger one stays on the disk, mapped


@dataclass(frozen=True)
class Cache:
  """Where activations are kept, and how they are made.

  Fields:
    folder: of all activations, of any backbone and data.
    dtype: that they are kept in, "float32" or "bfloat16".
    compute: the backbone's, "float32" or "bfloat16".
    views: number of augmented copies of the training split, 0 for the images as they are.
    augmentation, drop_path, seed: of the views.
  """
  folder: str
  dtype: str = "float32"
  compute: str = "float32"
  views: int = 0
  augmentation: Augmentation = Augmentation()
  drop_path: float = 0.0
  seed: int = 0

  def __post_init__(self):
    for name in ("dtype", "compute"):
      if getattr(self, name) not in DTYPES:
        raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(DTYPES)}")

  def views_of(self, name: str) -> list[int | None]:
    """The views of a task's split; None stands for the images as they are."""
    return list(range(self.views)) if self.views and name == "train" else [None]


def identity(cache: Cache, weights: Weights, split: data.Split) -> dict:
  """What a split's activations are of, the view apart; its first images are read."""
  return {"weights": weights.hash, "image_size": weights.spec.image_size,
          "preprocessing": weights.preprocessing.to_dict(), "split": split.hash(), "pixels": split.fingerprint(),
          "dtype": cache.dtype, "compute": cache.compute}


def stores(cache: Cache, weights: Weights, name: str, split: data.Split) -> list[Store]:
  """The stores of the views of a task's split."""
  base = identity(cache, weights, split)
  of_view = lambda view: {"augmentation": dataclasses.asdict(cache.augmentation), "drop_path": cache.drop_path,
                          "seed": cache.seed, "view": view}
  return [Store(cache.folder, base if view is None else {**base, **of_view(view)}, len(split), cache.dtype)
          for view in cache.views_of(name)]


def activation_shapes(spec, reads: dict, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
  """{slot: shape [B, …] of what is read}; nothing is computed."""
  return dict(_shapes(spec, tuple(reads.items()), batch))


@functools.lru_cache(maxsize=64)
def _shapes(spec, reads: tuple, batch: int) -> dict:
  image = jax.ShapeDtypeStruct((batch, *backbones.image_shape(spec)), jnp.float32)
  run = lambda params, images: backbones.build(spec).apply(params, images, collect(dict(reads), params), {})[1]
  return jax.eval_shape(run, backbones.abstract_params(spec), image)


def columns(spec, reads: dict) -> dict[str, Column]:
  """{slot: what is kept for it}."""
  return {slot: Column(reads[slot].site, reads[slot].how, shape.shape[1:])
          for slot, shape in activation_shapes(spec, reads).items()}


def bytes_per_image(spec, reads: dict, dtype: str = "float32") -> int:
  """What the cache holds, and a step reads, of one image; activations that slots share count once."""
  return sum(math.prod(column.shape) for column in set(columns(spec, reads).values())) * DTYPES[dtype].itemsize


def complete(cache: Cache, weights: Weights, reads: dict, name: str, split: data.Split) -> bool:
  """Whether nothing of a task's split is missing."""
  wanted = columns(weights.spec, reads).values()
  return not any(store.missing(wanted) for store in stores(cache, weights, name, split))


class Features:
  """The activations of a task's split, N rows in its order, all of them written.

  Attributes:
    bytes_per_image: of one view.
    resident: whether they are kept in the device's memory, where rows are then gathered: if they fill at most a third
      of an accelerator's, or `RESIDENT_BYTES` of the host's. Others stay on the disk, mapped.
  """

  def __init__(self, cache: Cache, weights: Weights, reads: dict, name: str, split: data.Split):
    found, wanted = stores(cache, weights, name, split), columns(weights.spec, reads)
    self._rows, self.bytes_per_image = found[0].rows, found[0].bytes(set(wanted.values()))
    device = jax.local_devices()[0]
    stats = device.platform != "cpu" and device.memory_stats() or {"bytes_limit": 3 * RESIDENT_BYTES}
    self.resident = len(found) * len(self) * self.bytes_per_image <= stats["bytes_limit"] / 3
    kept = [{column: self._kept(store, column) for column in set(wanted.values())} for store in found]
    self._views = [{slot: view[column] for slot, column in wanted.items()} for view in kept]
    self._gather = jax.jit(lambda tables, rows: {slot: table[rows] for slot, table in tables.items()})

  def _kept(self, store: Store, column: Column):
    values = store.open(column)
    if not self.resident:
      return values
    store.check(column, values)
    return jax.device_put(np.array(values), jax.local_devices()[0])

  def __len__(self) -> int:
    return self._rows

  def take(self, rows, view: int = 0) -> dict:
    """{slot: [B, …]} of `rows` [B]; on the device if they are resident, else on the host."""
    tables = self._views[view % len(self._views)]
    return self._gather(tables, rows) if self.resident else {slot: table[rows] for slot, table in tables.items()}
