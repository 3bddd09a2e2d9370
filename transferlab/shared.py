"""Several tasks served on one pass of a frozen backbone (Dukler et al. 2023, arXiv 2303.04105, name this as what a
fixed backbone permits; the rest is ours).

Each task was trained on its own. A head only reads, so all heads take their activations from the same pass, which is
computed no further than the deepest site that one of them reads: XLA drops what nobody looks at. A method that writes
late, such as dtl (Fu et al. 2024, arXiv 2312.07856, serve tasks so), shares the blocks below its first write, and each
of its tasks computes those above for itself.
"""
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import Weights
from transferlab.checkpoint import Adapter, check_backbone, load_adapter
from transferlab.features import cacheable, reads_only
from transferlab.method import Context, Method, collect, forward, needed, settled
from transferlab.serve import in_batches, weights_of
from transferlab.step import to_inputs


class SharedClassifier(NamedTuple):
  """Calling it with uint8 RGB images, or files, gives {task: probabilities [N, C]}; columns are `tasks[task]`."""
  tasks: dict  # {task: class names}
  preprocessing: Preprocessing
  weights: Weights
  deepest: str  # the last site that a task reads, where the shared pass ends
  logits: Callable  # preprocessed images [B, S, S, 3] on 0 … 255, weight [B] or None -> {task: logits [B, C]}

  def __call__(self, images: Iterable, batch_size: int = 32) -> dict[str, np.ndarray]:
    """Images of any size, uint8 [H, W, 3] or paths, to probabilities float32 [N, C] of each task."""
    found = {task: [np.zeros((0, len(names)), np.float32)] for task, names in self.tasks.items()}
    for batch, rows in in_batches(images, self.preprocessing, batch_size):
      weight = (np.arange(len(batch)) < rows).astype(np.float32)
      for task, logits in self.logits(batch, weight).items():
        found[task].append(np.asarray(jax.nn.softmax(logits, axis=-1))[:rows])
    return {task: np.concatenate(parts) for task, parts in found.items()}

  by_task = __call__


def load_many(adapters, weights=None) -> SharedClassifier:
  """Loads adapters of several tasks onto one backbone.

  Args:
    adapters: paths of adapter files, or {task: path}. Without names of yours, tasks go by the names they were trained
      under, or, where two of these are the same, by the files' names or paths.
    weights: Weights, or a source for `load_weights`; adapters on a zoo backbone find their own.

  Raises:
    ValueError: an adapter of other weights or another preprocessing than the first, or one that shares nothing, as it
      changes what the backbone computes from its first block on: lora, full.
  """
  paths = list(adapters.values() if isinstance(adapters, Mapping) else map(os.fspath, adapters))
  if not paths:
    raise ValueError("no adapters given; expected at least one file")
  found = [load_adapter(path) for path in paths]
  names = list(adapters) if isinstance(adapters, Mapping) else _names(paths, found)
  for path, adapter in zip(paths, found):
    _check_same(path, adapter, paths[0], found[0])
  weights = weights_of(paths[0], found[0], weights)
  for path, adapter in zip(paths, found):
    check_backbone(adapter, weights)
    if not cacheable(adapter.method, weights.spec):
      raise ValueError(f"{path} holds {adapter.method.name!r}, which changes what the backbone computes and says "
                       "nothing of what it reads before, so that it cannot share a pass; serve it on its own. Those "
                       "that only read share one (linear, inca, …), those that write late its first blocks (dtl, …)")
  methods = {name: adapter.method for name, adapter in zip(names, found)}
  backbone = backbones.build(weights.spec)
  run = make_predict(methods, backbone, found[0].preprocessing)
  heads = {name: (adapter.trainable, adapter.state) for name, adapter in zip(names, found)}
  known = lambda method, trainable, state: settled(
      method, backbone, trainable, state, method.prepare(weights.params, state))
  own = {name: needed(method, known(method, *heads[name]), weights.spec.depth, cached=True)
         for name, method in methods.items() if method.prompts}
  frozen = weights.params if weights.spec.family != "clip" else {
      name: leaf for name, leaf in weights.params.items() if name.startswith("image")}
  heads, own, frozen = put_once((heads, own, frozen))
  read = {read.site for method in methods.values() for read in method.reads.values()}
  deepest = [site for site in backbones.sites(weights.spec) if site in read][-1]
  return SharedClassifier({name: adapter.class_names for name, adapter in zip(names, found)}, found[0].preprocessing,
                          weights, deepest, lambda images, weight=None: run(heads, frozen, images, own, weight))


def put_once(tree):
  """A pytree on the device; an array that it holds several times, as tasks do the text tower that they run, is there
  once."""
  there = {}
  def put(leaf):
    if id(leaf) not in there:
      there[id(leaf)] = jax.device_put(leaf)
    return there[id(leaf)]
  return jax.tree.map(put, tree)


def make_predict(methods: dict[str, Method], backbone: backbones.Backbone, preprocessing: Preprocessing) -> Callable:
  """A jitted ({task: (trainable, state)}, frozen, images [B, S, S, 3] on 0 … 255, own={}, weight=None) -> {task: logits
  [B, C] float32}; `own` has {task: frozen parameters} of methods on a CLIP, which keep text features of their own, and
  weight [B] is 0 for padding.

  What several methods read at one site, reduced alike, is collected once. Tasks of one method that writes, with equal
  options, take turns in a loop: 19 on ViT-B/16 at batch 32 need 153 MiB of temporaries above what they share, side by
  side 3004, and compile in a third of the time, and neither takes less time per image.
  """
  reads = {(read.site, read.how): read for method in methods.values() for read in method.reads.values()}

  def run(heads, frozen, images, own=None, weight=None):
    own, batch = own or {}, {} if weight is None else {"weight": weight}
    _, seen = backbone.apply(frozen, to_inputs(images, preprocessing), collect(reads, frozen), {})
    activations = lambda method: {slot: seen[read.site, read.how] for slot, read in method.reads.items()}
    logits, writing = {}, {}
    for task, method in methods.items():
      trainable, state = heads[task]
      if reads_only(method, backbone.spec):
        texts = backbone if method.texts else None
        context = Context(batch, state, own.get(task, {}))
        logits[task] = forward(method, texts, trainable, activations(method), context).logits
      else:
        writing.setdefault(_form(method, trainable, state), []).append(task)
    for tasks in writing.values():
      method = methods[tasks[0]]
      found = _in_turn(method, backbone, [heads[task] for task in tasks], activations(method), frozen)
      logits |= dict(zip(tasks, found))
    return {task: logits[task] for task in methods}
  return jax.jit(run)


def _form(method: Method, trainable: dict, state) -> str:
  """Text that is equal for tasks that one program can serve, whatever the number of their classes."""
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), (_without_classifier(trainable), state))
  return json.dumps([method.name, method.options, str(shapes)])


def _without_classifier(trainable: dict) -> dict:
  return {name: leaves for name, leaves in trainable.items() if name != "classifier"}


def _in_turn(method: Method, backbone: backbones.Backbone, heads: list, activations: dict, frozen) -> list:
  """Logits [B, C] of tasks of one form that go on from the same activations; C may be another for each."""
  unread = method._replace(readout=lambda trainable, features, carry, ctx: (features, carry))
  def one(head):
    trainable, state = head
    return forward(unread, backbone, trainable, activations, Context(state=state, frozen=frozen)).logits
  bodies = [(_without_classifier(trainable), state) for trainable, state in heads]
  found = jax.lax.map(one, jax.tree.map(lambda *leaves: jnp.stack(leaves), *bodies))
  of = lambda k: jax.tree.map(lambda leaf: leaf[k], found)
  return [method.readout(trainable, *of(k), Context(state=state, frozen=frozen))
          for k, (trainable, state) in enumerate(heads)]


def _names(paths: list[str], adapters: list[Adapter]) -> list[str]:
  """A name for each task, all different."""
  trained_as = [adapter.header.get("task") for adapter in adapters]
  for names in (trained_as, [Path(path).stem for path in paths], paths):
    if all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names):
      return names
  twice = next(path for path in paths if paths.count(path) > 1)
  raise ValueError(f"{twice} is given twice; expected one adapter per task")


def _check_same(path, adapter: Adapter, first_path, first: Adapter) -> None:
  """Refuses an adapter of other weights, or with other images, than the first one."""
  mine, other = adapter.backbone["hash"], first.backbone["hash"]
  if mine != other:
    raise ValueError(f"{path} was trained on weights with hash {mine[:12]} and {first_path} with {other[:12]}; one "
                     "pass needs one backbone: serve them apart, or train them on the same weights")
  mine, other = adapter.preprocessing.to_dict(), first.preprocessing.to_dict()
  different = [f"{field} {mine[field]} and {other[field]}" for field in other if mine[field] != other[field]]
  if different:
    raise ValueError(f"{path} and {first_path} prepare images differently: {', '.join(different)}; one pass needs one "
                     "image: serve them apart, or train them with the same preprocessing")
