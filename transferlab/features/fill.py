"""The pass of the backbone over the images: one program computes all activations that are missing. Several processes
share out the images of each batch, and the first one looks at the disk and writes."""
import contextlib
import shutil
from pathlib import Path

import jax
import numpy as np

from transferlab import backbones, data, devices, distributed, sharding, storage
from transferlab.backbones.weights import Weights
from transferlab.features.cache import Cache, columns, stores
from transferlab.features.store import DTYPES, Column, Store
from transferlab.method import chain, collect, drop_path
from transferlab.progress import Progress, say
from transferlab.step import keeping_barriers, to_inputs


def write(cache: Cache, weights: Weights, reads: dict, splits: dict[str, data.Split], *, batch_size: int = 64,
          device_count: int = 0, shard: int = 1, shard_patterns=(), dry_run: bool = False, quiet: bool = False) -> None:
  """Keeps what is missing of the activations of splits; an interrupted writing goes on.

  Args:
    reads: {slot: Read} of a method.
    splits: {name: split}; "train" has the cache's views. Images have to be readable.
    batch_size: images at once.
    device_count: devices to use, 0 for all.
    shard, shard_patterns: as of a recipe.
    dry_run: only says the size.

  Raises:
    ValueError: the disk has less room than is needed; something that lies there is damaged.
  """
  wanted = columns(weights.spec, reads)
  distinct = sorted(set(wanted.values()))
  found = {name: stores(cache, weights, name, split) for name, split in splits.items()}
  left = distributed.agree({name: [sum((store.rows - store.standing(column)) * store.bytes([column])
                                       for column in distinct) for store in of_views]
                            for name, of_views in found.items()})
  for name, of_views in found.items():
    if not quiet and (any(left[name]) or dry_run):
      views, each = f" in {len(of_views)} views" * (len(of_views) > 1), of_views[0].bytes(distinct)
      size = sum(store.rows for store in of_views) * each
      say(f"cache of {name}: {len(splits[name])} images{views}, {len(distinct)} activations, {each:,} bytes per image "
          f"in {cache.dtype}; {_size(size)}, of which {_size(sum(left[name]))} are missing, in {cache.folder}")
  if dry_run:
    return
  storage.check_shared(cache.folder, "feature cache")
  if not any(map(any, left.values())):
    return
  _check_room(cache.folder, sum(map(sum, left.values())))
  forward = _Pass(cache, weights, reads, devices.sharing(device_count, shard), shard_patterns)
  for name, of_views in found.items():
    for view, store, missing in zip(cache.views_of(name), of_views, left[name]):
      if missing:
        forward.fill(store, wanted, splits[name], view, batch_size, quiet)
  distributed.barrier("features")
  _check_shared([store for of_views in found.values() for store in of_views], distinct)


def _size(count: int) -> str:
  return next(f"{count / unit:.3g} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
              if count >= unit or unit == 1)


def _check_room(folder: str, needed: int) -> None:
  whole = Path(folder).absolute()
  existing = next(path for path in (whole, *whole.parents) if path.exists())
  if not existing.is_dir():
    raise ValueError(f"{existing} is a file; expected a folder for the activations, or a place where one can be made; "
                     "give another one")
  free = shutil.disk_usage(existing).free
  if free < needed:
    raise ValueError(f"{folder} has {_size(free)} free and the activations need {_size(needed)}; free some space, give "
                     "a folder on another disk, or keep them in bfloat16, which halves them")


def _check_shared(written: list[Store], distinct: list[Column]) -> None:
  """Raises `ValueError` in a process that does not find what the first one wrote."""
  for store in () if distributed.first() else written:
    store.refresh()
    if store.missing(distinct):
      raise ValueError(f"{store.path} lacks here what the first process wrote there; give a folder on storage that all "
                       "processes share")


class _Pass:
  """The backbone on its devices, with one program for each set of activations that is missing somewhere."""

  def __init__(self, cache: Cache, weights: Weights, reads: dict, mesh, patterns):
    self.cache, self.weights, self.reads, self.programs = cache, weights, reads, {}
    self.mesh, self.compute = mesh, DTYPES[cache.compute]
    self.split = sharding.plan(weights.params, mesh, patterns)
    self.params = sharding.place(weights.params, weights.params, self.compute, mesh, self.split)

  def program(self, missing: dict[str, str], rate: float):
    """(params, images [B, S, S, 3], seed, first row) -> {file: [B, …]}; `missing` has the slot of each file."""
    asked = (*sorted(missing), rate)
    if asked not in self.programs:
      chosen, weights = {name: self.reads[slot] for name, slot in missing.items()}, self.weights
      backbone = backbones.build(weights.spec, self.compute, self.split)
      def run(params, images, seed, start):
        visit = collect(chosen, params)
        if rate:
          visit = chain(drop_path(jax.random.fold_in(jax.random.key(seed), start), rate, weights.spec.depth), visit)
        kept = backbone.apply(params, to_inputs(images, weights.preprocessing), visit, {})[1]
        return {name: value.astype(DTYPES[self.cache.dtype]) for name, value in kept.items()}
      self.programs[asked] = jax.jit(run, **keeping_barriers(backbone))
    return self.programs[asked]

  def fill(self, store: Store, wanted: dict[str, Column], split: data.Split, view: int | None, batch_size: int,
           quiet: bool) -> None:
    """Runs over a split, from the first row on that is missing."""
    seed = 0 if view is None else int(np.random.SeedSequence([self.cache.seed, view]).generate_state(1)[0])
    loader = data.eval_loader(split, self.weights.preprocessing, batch_size=batch_size, cache=False, seed=seed,
                              augmentation="none" if view is None else self.cache.augmentation,
                              own=devices.own_rows(self.mesh, batch_size))
    with contextlib.ExitStack() as stack:
      writer = stack.enter_context(store.writer(list(wanted.values()))) if distributed.first() else None
      done, names = distributed.agree(writer and (writer.done, [column.name for column in writer.columns]))
      missing = {column.name: slot for slot, column in wanted.items() if column.name in names}
      run = self.program(missing, 0.0 if view is None else self.cache.drop_path)
      what = f"activations of {split.name}" + ("" if view is None else f", view {view + 1} of {self.cache.views}")
      progress = stack.enter_context(Progress(len(split), what, done=done, quiet=quiet))
      for number, batch in enumerate(loader.batches(done // batch_size) if missing else (), done // batch_size):
        first = number * batch_size
        images = devices.put_batch({"image": batch["image"], "weight": batch["weight"]}, self.mesh)["image"]
        values = devices.whole(run(self.params, images, np.uint32(seed), np.int32(first)))
        rows = slice(max(done - first, 0), min(len(split) - first, batch_size))
        if writer:
          writer.append({name: value[rows] for name, value in values.items()})
        progress.update(rows.stop - rows.start)
