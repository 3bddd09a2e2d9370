"""What LFA and its baselines cost on CLIP ViT-B/16: the efficiency table of LFA's poster, and ours.

Parameters are counted from shapes. Peak bytes of a training step, and its seconds, are taken only when asked for: both
depend on the number of classes, where the text tower runs in every step or its features are kept.
"""
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, cost, data, devices, methods
from transferlab.backbones.spec import Preprocessing
from transferlab.method import classes, needed, sizes
from transferlab.optim import Optim, make_optimiser
from transferlab.papers.lfa import PAPER
from transferlab.papers.table import Table, numbers
from transferlab.progress import Progress
from transferlab.step import compile_step, make_step, start
from transferlab.testing import made_up_ids

BACKBONE, BATCH, STEPS = "clip_vit_b16", 32, 300
DG = "a photo of a {}"
METHODS = {"LinearProbing CLIP": ("clip_linear", {"form": "dg", "templates": DG}), "CLIP + DPL": ("dpl", {}),
           "CLIP + QLoRA": ("qlora", {"templates": DG}),
           "CLIP + LFA": ("lfa", {"init": "clip", "dropout": 0.0, "templates": DG})}


def efficiency(rows: Sequence[dict] = (), *, measure: bool = False, **options) -> list[Table]:
  """Parameters; memory, training time and inference time on five sets, the poster's and with `measure` ours."""
  del options
  known = numbers(PAPER)
  printed, ours = known["efficiency"], {}
  if measure:
    with Progress(len(printed) * len(known["classes"]), "measuring training steps") as progress:
      for name in printed:
        for each, count in known["classes"].items():
          ours[name, each] = step(name, count, len(data.SUITES[known["suites"][each]]) - 1)  # all but one train
          progress.update(1, f"{name}, {each}")
  tables = [parameters(rows)]
  for what, title, form in (("memory", "peak memory in MB", ".0f"), ("training", f"seconds of {STEPS} steps", ".0f"),
                            ("inference", "seconds of inference", ".0f")):
    cells = []
    for i, each in enumerate(known["classes"]):
      cells.append([each, "paper", *(values[what][i] for values in printed.values())])
      if measure and what != "inference":
        cells.append([each, "ours", *(ours[name, each][what] for name in printed)])
    tables.append(Table(f"LFA, efficiency, {title}. {known['source']}", ["data set", "whose", *printed],
                        ["", "", *[form] * len(printed)], cells, [], _remarks(what, measure)))
  return tables


def _remarks(what: str, measure: bool) -> list[str]:
  said = ["in the poster DPL's on DomainNet are of batches of 8"]
  if what == "inference":
    return [*said, "whole test sets, with their loading"]
  if what == "training":
    said.append("the poster's include the loading of images, and linear probing and LFA keep features of files")
  if not measure:
    return [*said, "ours: --measure, which compiles and runs a step of each; some minutes on an accelerator, up to an "
            "hour on a CPU"]
  own = {"memory": "XLA's arguments and temporaries in MB of 10^6 bytes", "training": "the best of 3 steps, nothing "
         f"else, times {STEPS}; none where a step does not fit the memory"}[what]
  dtype = jnp.dtype(devices.compute_dtype("auto")).name
  return [*said, f"ours: {own}; {BATCH} images of all training domains together, {dtype}, "
          f"{jax.devices()[0].device_kind}, random weights, made-up class names of two tokens"]


def parameters(rows: Sequence[dict] = ()) -> Table:
  """Numbers of trained parameters, the poster's, those of the released configuration, and ours."""
  known, spec, cells = numbers(PAPER), backbones.architecture(BACKBONE), []
  for name, values in known["efficiency"].items():
    method, options = METHODS[name]
    count = sizes(methods.build(method, spec, **options), backbones.abstract_params(spec), 65).trainable
    cells.append([name, values["average"], values["parameters"], values["code"] / 1e3, count / 1e3])
  remarks = ["the poster's 553K of QLoRA are not those of the released configuration; R = 2 on all six dense layers or "
             "R = 6 on q, k and v would have them"] + ["the runs given are not used here"] * bool(rows)
  return Table(f"LFA, efficiency, learnable parameters in thousands. {known['source']}",
               ["method", "average accuracy", "paper", "released code", "ours"], ["", ".1f", ".0f", ".3f", ".3f"],
               cells, [], remarks)


def step(name: str, num_classes: int, domains: int, backbone: str = BACKBONE, batch: int = BATCH) -> dict:
  """{"memory": peak in MB of a training step, "training": seconds of `STEPS` steps, None where it does not fit}.

  Args:
    name: of the poster's methods.
    num_classes, domains: C, and the number of training domains, whose images alternate.
  """
  spec, dtype = backbones.architecture(backbone), devices.compute_dtype("auto")
  method, options = METHODS[name]
  built = methods.build(method, spec, **options)
  rng = np.random.default_rng(0)
  draw = lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32)  # values cost nothing
  params = jax.tree.map(draw, backbones.abstract_params(spec))
  known = classes(built, num_classes, lambda texts: made_up_ids(spec, texts))
  trainable, state = built.init(jax.random.key(0), params, known)
  frozen = devices.cast(needed(built, built.prepare(params, state), spec.depth), params, dtype)
  optimiser = make_optimiser(Optim(name="sgd", schedule="constant", weight_decay=0.0), lambda step: 1e-6, trainable)
  run = start(*jax.tree.map(jnp.array, (trainable, state)), optimiser)
  images = {"image": jnp.zeros((batch, spec.image_size, spec.image_size, 3), jnp.uint8),
            "label": jnp.arange(batch, dtype=jnp.int32) % num_classes, "weight": jnp.ones(batch),
            "domain": jnp.arange(batch, dtype=jnp.int32) % domains}
  made = make_step(built, backbones.build(spec, dtype), optimiser, Preprocessing(spec.image_size), num_classes,
                   domains=domains)
  compiled = compile_step(made, run, frozen, images)
  peak = cost.peak_bytes(compiled)
  return {"memory": peak / 1e6, "training": STEPS * _seconds(compiled, run, frozen, images) if
          peak <= cost.available_bytes() else None}


def _seconds(compiled, run, *others) -> float:
  """Of the best of 3 steps, after one."""
  times = []
  for _ in range(4):
    began = time.monotonic()
    run, _ = jax.block_until_ready(compiled(run, *others))
    times.append(time.monotonic() - began)
  return min(times[1:])
