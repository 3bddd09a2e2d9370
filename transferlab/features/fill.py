"""The pass of the backbone over the images: one program computes all activations that are missing."""
import shutil
from pathlib import Path

import jax
import numpy as np

from transferlab import backbones, data, devices
from transferlab.backbones.weights import Weights
from transferlab.features.cache import Cache, columns, stores
from transferlab.features.store import DTYPES, Column, Store
from transferlab.method import chain, collect, drop_path
from transferlab.progress import Progress, say
from transferlab.step import to_inputs


def write(cache: Cache, weights: Weights, reads: dict, splits: dict[str, data.Split], *, batch_size: int = 64,
          device_count: int = 0, dry_run: bool = False, quiet: bool = False) -> None:
  """Keeps what is missing of the activations of splits; an interrupted writing goes on.

  Args:
    reads: {slot: Read} of a method.
    splits: {name: split}; "train" has the cache's views. Images have to be readable.
    batch_size: images at once.
    device_count: devices to use, 0 for all.
    dry_run: only says the size.

  Raises:
    ValueError: the disk has less room than is needed; something that lies there is damaged.
  """
  wanted = columns(weights.spec, reads)
  distinct = sorted(set(wanted.values()))
  found = {name: stores(cache, weights, name, split) for name, split in splits.items()}
  left = {name: sum((store.rows - store.standing(column)) * store.bytes([column])
                    for store in of_views for column in distinct) for name, of_views in found.items()}
  for name, of_views in found.items():
    if not quiet and (left[name] or dry_run):
      views, each = f" in {len(of_views)} views" * (len(of_views) > 1), of_views[0].bytes(distinct)
      size = sum(store.rows for store in of_views) * each
      say(f"cache of {name}: {len(splits[name])} images{views}, {len(distinct)} activations, {each:,} bytes per image "
          f"in {cache.dtype}; {_size(size)}, of which {_size(left[name])} are missing, in {cache.folder}")
  if dry_run:
    return
  if not any(left.values()):
    return
  _check_room(cache.folder, sum(left.values()))
  forward = _Pass(cache, weights, reads, device_count)
  for name, of_views in found.items():
    for view, store in zip(cache.views_of(name), of_views):
      if store.missing(distinct):
        forward.fill(store, wanted, splits[name], view, batch_size, quiet)


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


class _Pass:
  """The backbone on its devices, with one program for each set of activations that is missing somewhere."""

  def __init__(self, cache: Cache, weights: Weights, reads: dict, device_count: int):
    self.cache, self.weights, self.reads, self.programs = cache, weights, reads, {}
    self.mesh, self.compute = devices.make_mesh(device_count or None), DTYPES[cache.compute]
    self.params = devices.replicate(devices.cast(weights.params, weights.params, self.compute), self.mesh)

  def program(self, missing: dict[str, str], rate: float):
    """(params, images [B, S, S, 3], seed, first row) -> {file: [B, …]}; `missing` has the slot of each file."""
    asked = (*sorted(missing), rate)
    if asked not in self.programs:
      chosen, weights = {name: self.reads[slot] for name, slot in missing.items()}, self.weights
      backbone = backbones.build(weights.spec, self.compute)
      def run(params, images, seed, start):
        visit = collect(chosen, params)
        if rate:
          visit = chain(drop_path(jax.random.fold_in(jax.random.key(seed), start), rate, weights.spec.depth), visit)
        kept = backbone.apply(params, to_inputs(images, weights.preprocessing), visit, {})[1]
        return {name: value.astype(DTYPES[self.cache.dtype]) for name, value in kept.items()}
      self.programs[asked] = jax.jit(run)
    return self.programs[asked]

  def fill(self, store: Store, wanted: dict[str, Column], split: data.Split, view: int | None, batch_size: int,
           quiet: bool) -> None:
    """Runs over a split, from the first row on that is missing."""
    seed = 0 if view is None else int(np.random.SeedSequence([self.cache.seed, view]).generate_state(1)[0])
    loader = data.eval_loader(split, self.weights.preprocessing, batch_size=batch_size, cache=False, seed=seed,
                              augmentation="none" if view is None else self.cache.augmentation)
    with store.writer(list(wanted.values())) as writer:
      missing = {column.name: slot for slot, column in wanted.items() if column in writer.columns}
      run = self.program(missing, 0.0 if view is None else self.cache.drop_path)
      what = f"activations of {split.name}" + ("" if view is None else f", view {view + 1} of {self.cache.views}")
      with Progress(len(split), what, done=writer.done, quiet=quiet) as progress:
        for batch in loader.batches(writer.done // batch_size) if missing else ():
          rows = batch["index"] >= writer.done
          images = devices.put_batch({"image": batch["image"], "weight": batch["weight"]}, self.mesh)["image"]
          values = jax.device_get(run(self.params, images, np.uint32(seed), batch["index"][0]))
          writer.append({name: value[:len(rows)][rows] for name, value in values.items()})
          progress.update(int(rows.sum()))
