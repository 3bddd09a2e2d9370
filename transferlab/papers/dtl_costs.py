"""Tables 1, 2, 3 and 6 of DTL (Fu et al. 2024, arXiv 2312.07856) on what methods cost: structural units, parameters,
memory and throughput, the paper's and ours.

Parameters are counted from shapes. Where released code chooses sizes per task, they are the mean over VTAB-1k's 19
tasks. Peak bytes are XLA's of a compiled training step and throughput is timed, both only when asked for.
"""
import functools
import json
import re
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, cost, devices, methods, tree
from transferlab.method import predict, sizes
from transferlab.papers import recipes
from transferlab.papers.table import Table, numbers
from transferlab.progress import Progress

PAPER = "dtl"
CLASSES, BATCH = 100, 32
ARCHITECTURES = {"vit": "vit_b16", "swin": "swin_b"}
METHODS = {"Full": "full", "Linear": "linear", "BitFit": "bitfit", "VPT": "vpt_deep", "LST": "lst", "LoRA": "lora",
           "AdaptFormer": "adaptformer", "NOAH": "noah", "FacT": "fact_tk", "SSF": "ssf", "DTL": "dtl",
           "DTL+": "dtl_plus", "DTL+*": "dtl_plus_star"}
PROMPTS = {"vit": 61, "swin": 13}  # of VPT-deep, whose lengths are chosen per task: #param over that of one prompt
# Sizes differ between tasks, and are those published for this method; FacT's on Swin are ViT's.
PER_TASK = {"noah": "noah", "fact_tk": "fact_tk", "dtl_plus": "dtl_plus", "dtl_plus_star": "dtl_plus"}
MEANS = {"VPT": "deep, with the mean number of prompts that #param stands for",
         "NOAH": "mean of the 19 published sub-nets, with prompts that its code trains to no effect; the paper's count "
                 "may have 100 rows of positions for them, too",
         "FacT": "FacT-TK, mean of 19 tasks; no code for Swin was released: there ranks are ViT's, and every stage has "
                 "factors of its own",
         "DTL+": "mean over the kernels of 19 tasks",
         "DTL+*": "mean over DTL+'s kernels; no script of it was released"}
# Method: (pattern of the arrays that are a unit each, what that is).
UNITS = {"LoRA": (r"lora/.*/a", "pairs A, B of q and v; NOAH's form, with one for q, k and v, has 12"),
         "NOAH": (r"prompts/block_.*|lora/.*/a|adapter/.*/down/kernel", "prompts, LoRA and adapter of every block"),
         "FacT": (r"fact/mix", "columns of the Tucker form, 12 D x D pieces of a block; they lie in 4 arrays"),
         "SSF": (r"ssf/.*", "scales and shifts, counted apart: 74 pairs"),
         "DTL": (r"side/.*/a", "pairs A, B"), "DTL+": (r"side/.*/(a|kernel)", "pairs A, B, and one convolution")}


def units(rows: Sequence[dict] = (), **options) -> list[Table]:
  """Table 1: minimal structural units on ViT-B/16, ours counted from the arrays that are trained."""
  del options
  known, spec, cells = numbers(PAPER), backbones.architecture(ARCHITECTURES["vit"]), []
  for name, (pattern, what) in UNITS.items():
    shapes = tree.flatten(_shapes(METHODS[name], spec))
    found = [leaf.shape for path, leaf in shapes.items() if re.fullmatch(pattern, path)]
    count = sum(shape[1] for shape in found) if name == "FacT" else len(found)
    cells.append([name, known["units"][name], count, sum(not path.startswith("classifier") for path in shapes), what])
  return [Table(f"DTL, table 1, minimal structural units on ViT-B/16. {known['source']}",
                ["method", "paper", "ours", "trained arrays", "counted are"], [""] * 5, cells, [],
                ["the runs given are not used here"] * bool(rows))]


def _shapes(method: str, spec):
  """Shapes of what a method trains on a backbone."""
  params = backbones.abstract_params(spec)
  built = methods.build(method, spec)
  return jax.eval_shape(lambda rng, frozen: built.init(rng, frozen, CLASSES), jax.random.key(0), params)[0]


def parameters(name: str, family: str) -> float:
  """Of a method of the paper without the classifier, the mean over VTAB-1k's tasks where sizes differ between them."""
  method, spec = METHODS[name], backbones.architecture(ARCHITECTURES[family])
  return statistics.fmean(_count(method, spec, json.dumps(options)) for options in _sizes_by_task(method, family))


def _sizes_by_task(method: str, family: str) -> list[dict]:
  """The options that say how large a method is: of every task, or once for all."""
  if method == "vpt_deep":
    return [{"prompts": PROMPTS[family]}]
  if method not in PER_TASK:
    return [{}]
  family = "vit" if method == "fact_tk" else family
  found = [recipes.find(PER_TASK[method], task, family).changes for task in numbers(PAPER)["tasks"].values()]
  return [{key.removeprefix("options."): value for key, value in changes.items() if key.startswith("options.")}
          for changes in found]


@functools.cache
def _count(method: str, spec, options: str) -> int:
  built = methods.build(method, spec, **json.loads(options))
  return sizes(built, backbones.abstract_params(spec), CLASSES).trainable_without_classifier


def costs(table: str, family: str, *, measure: bool = False) -> Table:
  """Parameters and memory of tables 2 and 3. With `measure` a training step of each method is compiled, of its default
  size where sizes differ between tasks."""
  known, spec = numbers(PAPER), backbones.architecture(ARCHITECTURES[family])
  printed, peaks = known[table], {}
  if measure:
    with Progress(len(printed), f"compiling training steps of {spec.name}") as progress:
      for name in printed:
        options = {"prompts": PROMPTS[family]} if name == "VPT" else {}
        built = methods.build(METHODS[name], spec, **options)
        peaks[name] = cost.of_training(spec, built, CLASSES, batch_size=BATCH).train_peak_bytes
        progress.update(1, name)
  cells = []
  for name, values in printed.items():
    own = [peaks[name] / 2**20, 100 * peaks[name] / peaks["Full"]] if measure else [None, None]
    cells.append([name, values["average"], values["params"], parameters(name, family) / 1e6, values["memory"],
                  100 * values["memory"] / printed["Full"]["memory"], *own])
  remarks = [f"{name}: {what}" for name, what in MEANS.items() if name in printed]
  remarks.append(f"ours: XLA's peak bytes of a step of {BATCH} images in float32 on {jax.default_backend()}, {CLASSES} "
                 "classes; the paper's is a GPU's footprint in mixed precision: compare the shares of Full" if measure
                 else "peak bytes of our training steps: --measure, which compiles them, some minutes on a CPU")
  return Table(f"DTL, table {table[-1]}, {recipes.BACKBONES[family]}: costs without the classifier. {known['source']}",
               ["method", "average", "#param (M)", "ours (M)", "memory (GB)", "% of Full", "ours (MiB)",
                "% of Full, ours"], ["", ".1f", ".2f", ".3f", ".1f", ".0f", ".0f", ".0f"], cells, [], remarks)


def throughput(rows: Sequence[dict] = (), *, measure: bool = False, **options) -> list[Table]:
  """Table 6: images per second of inference on ViT-B/16 at batches of 1, 4 and 16; ours with `measure`."""
  del options
  known, sizes_ = numbers(PAPER), (1, 4, 16)
  ours = {}
  if measure:
    with Progress(len(known["table6"]) * len(sizes_), "timing inference") as progress:
      for name in known["table6"]:
        ours[name] = list(images_per_second(METHODS[name], sizes_, progress))
  header = ["method", *(f"{B}, {whose}" for B in sizes_ for whose in ("paper", "ours"))]
  cells = [[name, *(cell for i, value in enumerate(values) for cell in (value, ours[name][i] if ours else None))]
           for name, values in known["table6"].items()]
  remarks = ["the paper's are of one NVIDIA 3090 in mixed precision"]
  remarks.append(f"ours: the best of several calls on {jax.devices()[0].device_kind}, "
                 f"{jnp.dtype(devices.compute_dtype('auto')).name}, {CLASSES} classes; NOAH has prompts, LoRA and "
                 "adapter of size 5 in every block" if measure else "ours: --measure, which times them on this machine")
  remarks += ["the runs given are not used here"] * bool(rows)
  return [Table(f"DTL, table 6, images per second at batch size. {known['source']}", header,
                ["", *["", ".1f"] * len(sizes_)], cells, [], remarks)]


def images_per_second(method: str, batches: Sequence[int], progress: Progress, backbone: str = ARCHITECTURES["vit"],
                      seconds: float = 1.0):
  """Of inference at each batch size: the best of 3 calls at least, and of as many as fit `seconds`."""
  spec, dtype = backbones.architecture(backbone), devices.compute_dtype("auto")
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype)  # values cost nothing
  frozen = jax.tree.map(draw, backbones.abstract_params(spec))
  built = methods.build(method, spec)
  trainable, state = built.init(jax.random.key(0), frozen, CLASSES)
  run = jax.jit(functools.partial(predict, built, backbones.build(spec, dtype)))
  kept = frozen if built.frozen else {}
  for B in batches:
    images = jnp.zeros((B, spec.image_size, spec.image_size, 3), dtype)
    call = lambda images=images: jax.block_until_ready(run(trainable, state, kept, images))
    call()  # compiles
    times, end = [], time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end:
      began = time.monotonic()
      call()
      times.append(time.monotonic() - began)
    progress.update(1, f"{method}, batch {B}")
    yield B / min(times)
