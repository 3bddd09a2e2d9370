"""Steps of methods on backbones, compiled for so many devices from shapes alone, and counted."""
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transferlab import backbones, cost, devices, methods
from transferlab.collectives import collectives
from transferlab.method import sizes
from transferlab.progress import Progress
from transferlab.scale import machines
from transferlab.scale.traffic import traffic

BACKBONES = ("vit_b16", "vit_l16", "vit_gigantic14")
METHODS = ("linear", "inca", "lfa", "dtl", "lora", "full")
# Where a method needs texts: the CLIP whose image tower is of the same size.
CLIPS = {"vit_b32": "clip_vit_b32", "vit_b16": "clip_vit_b16", "vit_l16": "clip_vit_l14",
         "vit_gigantic14": "clip_vit_bigg14", "vit_tiny_test": "clip_tiny_test"}


class Row(NamedTuple):
  """A compiled step, counted on one of its devices.

  Fields:
    backbone, method: names.
    devices, shard: their number, and how many share a backbone, 1 for a copy on each.
    batch: images per device.
    trainable: number of parameters.
    shared: bytes of a backbone, and of its optimiser if it trains, that devices can share.
    moved: bytes to and from its memory, with a backbone in bfloat16; see `traffic`.
    flops: FLOPs; None, as the peak, if the compiler says that the step does not fit.
    peak: bytes held at most.
    received: {kind: bytes from other devices}, see `collectives`.
  """
  backbone: str
  method: str
  devices: int
  shard: int
  batch: int
  trainable: int
  shared: int
  moved: float
  flops: float | None
  peak: int | None
  received: dict[str, int]

  def fits(self, on: machines.Machine) -> bool:
    return self.peak is not None and self.peak <= on.usable

  def times(self, on: machines.Machine, efficiency: float) -> machines.Times | None:
    """Seconds of its parts, whether or not it fits; None if it was not compiled."""
    return None if self.flops is None else machines.times(
        on, self.devices, self.flops, self.moved, sum(self.received.values()), efficiency)


class Setting(NamedTuple):
  """What all steps of a table share.

  Fields:
    batch: images per device.
    num_classes: C.
    remat: adapted blocks are computed again in the backward pass.
    slice: a TPU slice to compile for, "v5e:2x4"; "" for CPU devices.
  """
  batch: int = 8
  num_classes: int = 100
  remat: bool = False
  slice: str = ""

  @property
  def dtype(self) -> str:
    """In which backbones compute."""
    return "bfloat16" if self.slice else "float32"


def chosen(names: Sequence[str] = BACKBONES, wanted: Sequence[str] = ()) -> list[tuple[str, str]]:
  """[(backbone, method)] of a table; a CLIP stands in for a backbone where a method needs texts.

  Args:
    names: of backbones.
    wanted: names of methods; empty for those of `METHODS` that work on each.

  Raises:
    ValueError: a name that is unknown, or a method that works on a backbone in no form.
  """
  pairs = []
  for name in names:
    spec = backbones.architecture(name)
    for method in wanted or METHODS:
      own = name if method not in methods.METHODS or methods.fits(method, spec) else CLIPS.get(name, name)
      if wanted:
        methods.build(method, backbones.architecture(own))  # raises what is wrong
      if wanted or methods.fits(method, backbones.architecture(own)):
        pairs.append((own, method))
  return pairs


@functools.cache
def _built(backbone: str, method: str) -> tuple:
  """(spec of what a method adapts, the method)."""
  spec = backbones.architecture(backbone)
  return methods.adapted(method, spec), methods.build(method, spec)


def uncounted(backbone: str, method: str, setting: Setting) -> Row:
  """What is the same of a step on however many devices."""
  spec, built = _built(backbone, method)
  found = sizes(built, backbones.abstract_params(spec), setting.num_classes)
  # What devices can share of a backbone that trains, in float32: parameters, gradients and AdamW's two moments.
  shared = found.frozen * (jnp.dtype(setting.dtype).itemsize if built.frozen else 16)
  step = cost.training_step(spec, built, setting.num_classes, batch_size=setting.batch, dtype=jnp.bfloat16,
                            remat=setting.remat)
  return Row(backbone, method, 0, 0, setting.batch, found.trainable, shared, traffic(*step), None, None, {})


def counted(row: Row, count: int, shard: int, setting: Setting, among=None) -> Row:
  """A row of `uncounted` on `count` devices, in groups of `shard` that share a backbone.

  Args:
    among: devices of which they are the first, see `devices.topology`; those of this process by default.
  """
  row, mesh = row._replace(devices=count, shard=shard), devices.make_mesh(count, shard=shard, among=among)
  spec, built = _built(row.backbone, row.method)
  try:
    step = cost.compile_training(spec, built, setting.num_classes, mesh=mesh, batch_size=count * setting.batch,
                                 dtype=jnp.dtype(setting.dtype), remat=setting.remat)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return row
  found = row._replace(flops=cost.flops(step), peak=cost.peak_bytes(step), received=collectives(step))
  if shard == 1:
    return found
  # What is gathered is written before it is read; of a backbone that trains each device changes its own part alone,
  # which without gradients is 12 of the 16 bytes that can be shared.
  changed = 0 if built.frozen else 2 * row.shared * 12 / 16
  gathered = found.received.get("all-gather", 0) * 2 / jnp.dtype(setting.dtype).itemsize
  return found._replace(moved=row.moved - changed * (1 - 1 / shard) + gathered)


def rows(pairs: Sequence[tuple[str, str]], counts: Sequence[int], on: Iterable[machines.Machine],
         setting: Setting = Setting(), *, shard: int = 0, quiet: bool = False) -> list[Row]:
  """A row for each backbone, method and number of devices; and where a machine does not hold it, one more with the
  fewest devices that have to share the backbone, or with those that come closest.

  Args:
    pairs: (backbone, method), see `chosen`.
    counts: numbers of devices.
    shard: how many devices share a backbone, where there are as many; 0 for more than one only where needed.
  """
  among = devices.topology(setting.slice) if setting.slice else None
  for count in counts:  # before minutes of compiling
    devices.make_mesh(count, shard=min(shard or 1, count), among=among)
  found: list[Row] = []
  with Progress(len(pairs) * len(counts), "compiling steps", quiet=quiet) as progress:
    for backbone, method in pairs:
      row = uncounted(backbone, method, setting)
      for count in counts:
        progress.update(0, f"{method} on {backbone}, {count} devices")
        compiled = functools.partial(counted, row, count, setting=setting, among=among)
        one = compiled(min(shard or 1, count))
        found += [one] if shard else [one, *_shared(one, on, compiled)]
        progress.update()
  return found


def _shared(one: Row, on: Iterable[machines.Machine], compiled: Callable[[int], Row]) -> list[Row]:
  """Rows whose backbone is shared, of the machines that need it."""
  tried, kept = {1: one}, {}
  for machine in on:
    for size in (size for size in range(1, one.devices + 1) if one.devices % size == 0):
      # What is kept at least; more while a device computes with what the others have.
      least = 0 if one.peak is None else one.peak - one.shared * (1 - 1 / size)
      if least > machine.usable:
        continue
      try:
        tried[size] = tried.get(size) or compiled(size)
      except ValueError as error:
        if "does not divide" not in str(error):
          raise
      if size in tried and tried[size].fits(machine):
        kept[size] = tried[size]
        break
    else:
      known = [row for row in tried.values() if row.peak is not None and row.shard > 1]
      kept |= {row.shard: row for row in sorted(known, key=lambda row: row.peak)[:1]}
  return [kept[size] for size in sorted(kept) if size > 1]
