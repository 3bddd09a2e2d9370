"""What a step costs, by XLA's own analysis of the compiled program; nothing is executed and no weights are needed."""
import contextlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transferlab import backbones, devices, distributed, features, sharding
from transferlab.backbones.spec import Preprocessing
from transferlab.collectives import collectives
from transferlab.method import Method, classes, needed, predict, sizes
from transferlab.optim import Optim, make_optimiser
from transferlab.step import compile_step, inputs_of, make_step, start


class StepCost(NamedTuple):
  """Of one training step."""
  train_flops: float
  train_peak_bytes: int


class DeviceCost(NamedTuple):
  """Of one training step, on each of the devices that share it.

  Fields:
    frozen_bytes: of the frozen parameters that it holds.
    run_bytes: of what trains and what the optimiser keeps of it.
    temporary_bytes: of all that comes and goes in a step, gathered parameters among it.
    peak_bytes: of these and the batch.
    flops: its own.
    received: {kind: bytes from other devices}, see `collectives`.
  """
  frozen_bytes: int
  run_bytes: int
  temporary_bytes: int
  peak_bytes: int
  flops: float
  received: dict[str, int]


def peak_bytes(compiled) -> int:
  """Arguments + temporaries + outputs - aliases. (`peak_memory_in_bytes` leaves temporaries out on CPU.)"""
  m = compiled.memory_analysis()
  return int(m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes)


def flops(compiled) -> float:
  """Floating-point operations XLA counts in a compiled program."""
  analysis = compiled.cost_analysis()
  return float((analysis[0] if isinstance(analysis, list) else analysis).get("flops", float("nan")))


def of_step(compiled, parts: int = 1) -> StepCost:
  """Of a step in `parts` micro-batches, which are a loop, and XLA counts a loop's body once."""
  return StepCost(parts * flops(compiled), peak_bytes(compiled))


def parts(rows: int, micro_batch: int, device_count: int = 1) -> int:
  """Number of micro-batches of `micro_batch` rows in a batch of `rows`; both have to divide."""
  if micro_batch > rows or rows % micro_batch or micro_batch % device_count:
    raise ValueError(f"micro_batch {micro_batch} does not cut a batch of {rows} on {device_count} devices into equal "
                     f"parts; valid: {', '.join(map(str, divisors(rows, device_count)))}")
  return rows // micro_batch


def divisors(rows: int, device_count: int = 1) -> list[int]:
  """Micro-batches that fit a batch, largest first."""
  return [n for n in range(rows, 0, -1) if rows % n == 0 and n % device_count == 0]


def available_bytes() -> int:
  """Memory of one device of this process that a program may use."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return int(0.95 * stats["bytes_limit"])
  limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  with contextlib.suppress(OSError, StopIteration):
    with open("/proc/meminfo") as file:
      limits.append(1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")))
  with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" if it has none
    limits.append(int(open("/sys/fs/cgroup/memory.max").read()))
  return int(0.8 * min(limits))


def held_bytes() -> int:
  """Memory of an accelerator that arrays hold, cached activations say; 0 on CPU, where it is no longer available."""
  return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0))


def largest_that_fits(compiled: Callable[[int], Any], rows: int, device_count: int = 1, limit: int | None = None):
  """(compiled step, number of parts) of the largest micro-batch whose peak stays below `limit` bytes, by default what
  each process has."""
  limit = min(distributed.gather(available_bytes())) if limit is None else limit
  for micro_batch in divisors(rows, device_count):
    step = compiled(rows // micro_batch)
    if peak_bytes(step) <= limit:
      return step, rows // micro_batch
  raise ValueError(f"one example needs {peak_bytes(step) / 2**20:.0f} MiB and the device has {limit / 2**20:.0f}; set "
                   "remat=True, or use a smaller backbone, a smaller image_size or a method that trains less")


def image_batch(spec, rows: int) -> dict:
  """Shapes of a batch of images."""
  size = (spec.image_size, spec.image_size, 3)
  return {"image": jax.ShapeDtypeStruct((rows, *size), jnp.uint8), "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
          "weight": jax.ShapeDtypeStruct((rows,), jnp.float32)}


def of_training(spec, method: Method, num_classes: int, *, batch_size: int = 32, dtype=jnp.float32,
                remat: bool = False, cached: bool = False) -> StepCost:
  """Of one training step on a backbone, from shapes alone; arguments as of `of`."""
  how = {"batch_size": batch_size, "dtype": dtype, "remat": remat, "cached": cached}
  return of_step(compile_training(spec, method, num_classes, **how))


def compile_training(spec, method: Method, num_classes: int, *, batch_size: int = 32, dtype=jnp.float32,
                     remat: bool = False, cached: bool = False, mesh=None, patterns=()):
  """The compiled training step of a backbone, from shapes alone; arguments as of `of`.

  Args:
    batch_size: of all devices together.
    mesh: from `devices.make_mesh`; its devices split the batch, and those of its axis `shard` the backbone, see
      `sharding`. By default the program is for one device.
    patterns: of `sharding.plan`.
  """
  how = {"batch_size": batch_size, "dtype": dtype, "remat": remat, "cached": cached, "mesh": mesh, "patterns": patterns}
  return compile_step(*training_step(spec, method, num_classes, **how), remat=remat)


def training_step(spec, method: Method, num_classes: int, *, batch_size: int, dtype, remat: bool, cached: bool = False,
                  mesh=None, patterns=()) -> tuple:
  """(step, run, frozen, batch): what `compile_training` compiles, and the shapes that it takes."""
  run, frozen, batch = _arguments(spec, method, num_classes, batch_size, dtype, cached)
  split = {}
  if mesh is not None:
    split = sharding.plan(backbones.abstract_params(spec), mesh, patterns)
    run, frozen, batch = _placed(run, frozen, batch, mesh, split)
  optimiser = make_optimiser(Optim(), lambda step: 1e-3, run.trainable)
  step = make_step(method, backbones.build(spec, dtype, split), optimiser, Preprocessing(spec.image_size), num_classes,
                   remat=remat)
  return step, run, frozen, batch


def on_devices(spec, method: Method, num_classes: int, *, mesh, patterns=(), **how) -> DeviceCost:
  """Of one training step on several devices, from shapes alone; arguments as of `compile_training`."""
  step = compile_training(spec, method, num_classes, mesh=mesh, patterns=patterns, **how)
  (run, frozen, _), _ = step.args_info
  split = sharding.plan(backbones.abstract_params(spec), mesh, patterns)
  def held(tree, places) -> int:
    size = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, tree, places)))
  kept = held(frozen, sharding.of_frozen(frozen, mesh, split)), held(run, sharding.of_run(run, mesh, split))
  return DeviceCost(*kept, int(step.memory_analysis().temp_size_in_bytes), peak_bytes(step), flops(step),
                    collectives(step))


def _placed(run, frozen: dict, batch: dict, mesh, split: dict) -> tuple:
  """The shapes of what a step takes, each with its place on the devices."""
  at = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
  frozen = jax.tree.map(at, frozen, sharding.of_frozen(frozen, mesh, split))
  batch = jax.tree.map(lambda leaf: at(leaf, devices.along_batch(mesh)), batch)
  return jax.tree.map(at, run, sharding.of_run(run, mesh, split)), frozen, batch


def _arguments(spec, method: Method, num_classes: int, batch_size: int, dtype, cached: bool) -> tuple:
  """Shapes of what a step takes: (run, frozen, batch)."""
  whole = backbones.abstract_params(spec)
  init = lambda rng, params: method.init(rng, params, classes(method, num_classes))
  trainable, state = jax.eval_shape(init, jax.random.key(0), whole)
  prepared = jax.eval_shape(method.prepare, whole, state)
  kept = needed(method, prepared, spec.depth, cached)
  frozen = jax.eval_shape(lambda kept, whole: devices.cast(kept, whole, dtype), kept, whole)
  optimiser = make_optimiser(Optim(), lambda step: 1e-3, trainable)
  run = jax.eval_shape(lambda t, s: start(t, s, optimiser), trainable, state)
  batch = image_batch(spec, batch_size)
  if cached:
    del batch["image"]
    batch["activations"] = features.activation_shapes(spec, method.reads, batch_size)
  return run, frozen, batch


def of(spec, method: Method, num_classes: int, *, batch_size: int = 32, dtype=jnp.float32, remat: bool = False,
       cached: bool = False) -> dict:
  """Sizes and costs of a method on a backbone, from shapes alone; of its first stage if it has several.

  Args:
    dtype: in which the backbone computes, and its frozen parameters are.
    cached: the costs of training from cached activations, float32, without the part of the backbone that they stand
      for; the method has to be one that says what it reads, see `features.cacheable`.

  Returns:
    trainable, trainable_without_classifier, state, frozen: numbers of parameters; forward_flops and train_flops of one
    batch; train_peak_bytes of the compiled step; adapter_bytes of the arrays in the adapter file; with `cached`,
    bytes_per_image that a step reads.
  """
  run, frozen, batch = _arguments(spec, method, num_classes, batch_size, dtype, cached)
  backbone, preprocessing = backbones.build(spec, dtype), Preprocessing(spec.image_size)
  inputs = {name: batch[name] for name in ("image", "activations") if name in batch}
  forward = jax.jit(lambda t, s, f, inputs: predict(method, backbone, t, s, f, inputs_of(inputs, preprocessing)))
  compiled = forward.lower(run.trainable, run.state, frozen, inputs).compile()
  step = of_training(spec, method, num_classes, batch_size=batch_size, dtype=dtype, remat=remat, cached=cached)
  saved = jax.tree.leaves((run.trainable, run.state))
  return {**sizes(method, backbones.abstract_params(spec), num_classes)._asdict(), "forward_flops": flops(compiled),
          **step._asdict(), "adapter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in saved),
          "batch_size": batch_size, "remat": remat,
          **({"bytes_per_image": features.bytes_per_image(spec, method.reads)} if cached else {})}
