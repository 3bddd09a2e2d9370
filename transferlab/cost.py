"""What a step costs, by XLA's own analysis of the compiled program; nothing is executed and no weights are needed."""
import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transferlab import backbones
from transferlab.backbones.spec import Preprocessing
from transferlab.method import Method, predict, sizes
from transferlab.optim import Optim, make_optimiser
from transferlab.step import compile_step, make_step, start, to_inputs


class StepCost(NamedTuple):
  """Of one training step."""
  train_flops: float
  train_peak_bytes: int


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
  """Memory of one device that a program may use."""
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return int(0.95 * stats["bytes_limit"])
  limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  with contextlib.suppress(OSError, StopIteration):
    with open("/proc/meminfo") as file:
      limits.append(1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")))
  with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" if it has none
    limits.append(int(open("/sys/fs/cgroup/memory.max").read()))
  return int(0.8 * min(limits))


def largest_that_fits(compiled: Callable[[int], Any], rows: int, device_count: int = 1, limit: int | None = None):
  """(compiled step, number of parts) of the largest micro-batch whose peak stays below `limit` bytes."""
  limit = available_bytes() if limit is None else limit
  for micro_batch in divisors(rows, device_count):
    step = compiled(rows // micro_batch)
    if peak_bytes(step) <= limit:
      return step, rows // micro_batch
  raise ValueError(f"one example needs {peak_bytes(step) / 2**20:.0f} MiB and the device has {limit / 2**20:.0f}; set "
                   "remat=True, or use a smaller backbone, a smaller image_size or a method that trains less")


def of(spec, method: Method, num_classes: int, *, batch_size: int = 32, dtype=jnp.float32, remat: bool = False) -> dict:
  """Sizes and costs of a method on a backbone, from shapes alone.

  Returns:
    trainable, trainable_without_classifier, state, frozen: numbers of parameters; forward_flops and train_flops of one
    batch; train_peak_bytes of the compiled step; adapter_bytes of the arrays in the adapter file.
  """
  backbone = backbones.build(spec, dtype)
  preprocessing = Preprocessing(spec.image_size)
  whole = jax.eval_shape(lambda p: p, backbones.abstract_params(spec))
  frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), whole) if method.frozen else {}
  trainable, state = jax.eval_shape(lambda rng, p: method.init(rng, p, num_classes), jax.random.key(0), whole)
  optimiser = make_optimiser(Optim(), lambda step: 1e-3, trainable)
  run = jax.eval_shape(lambda t, s: start(t, s, optimiser), trainable, state)
  B, S = batch_size, spec.image_size
  batch = {"image": jax.ShapeDtypeStruct((B, S, S, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((B,), jnp.int32),
           "weight": jax.ShapeDtypeStruct((B,), jnp.float32)}
  step = make_step(method, backbone, optimiser, preprocessing, num_classes, remat=remat)
  step = compile_step(step, run, frozen, batch, remat=remat)
  forward = jax.jit(lambda t, s, f, images: predict(method, backbone, t, s, f, to_inputs(images, preprocessing)))
  compiled = forward.lower(trainable, state, frozen, batch["image"]).compile()
  saved = jax.tree.leaves((trainable, state))
  return {**sizes(method, whole, num_classes)._asdict(), "forward_flops": flops(compiled), **of_step(step)._asdict(),
          "adapter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in saved), "batch_size": B, "remat": remat}
