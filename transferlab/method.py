"""A method is a few pure functions around a frozen backbone, and calling one is `forward`.

    frozen' = weights(trainable, frozen)
    features, carry = backbone(frozen', images, visit(trainable, ctx), carry)
    logits = readout(trainable, features, carry, ctx)

Only `trainable` is ever differentiated. A method made of several stages names in `then` the method that follows it.
"""
from typing import Any, NamedTuple
from collections.abc import Callable

import jax
import jax.numpy as jnp

from transferlab import losses
from transferlab.backbones import Backbone, ignore


class Read(NamedTuple):
  """One activation a method reads: a site, and how its tokens are reduced ("tokens" keeps all; "cls", "mean")."""
  site: str
  reduce: str = "tokens"


class Context(NamedTuple):
  """What a method's functions may use beside its trainable.

  Fields:
    batch: label [B] int32, target [B, C] (one-hot, smoothed or mixed), weight [B] (0 marks padding), domain [B] if any;
      empty when predicting.
    state: arrays the method needs and does not train.
    frozen: the backbone's parameters.
    reference: sites of a second, frozen pass, if the method asks for one.
    rng: key for dropout and the like, None unless training.
    train: whether this is a training step.
  """
  batch: dict = {}
  state: dict = {}
  frozen: dict = {}
  reference: dict = {}
  rng: Any = None
  train: bool = False


class Outputs(NamedTuple):
  """Of one forward pass."""
  logits: Any    # [B, C] float32
  features: Any  # [B, D]
  carry: Any     # the visitor's last carry


class Method(NamedTuple):
  """An adaptation method for one backbone.

  Fields:
    name: its registered name.
    options: its options as plain data; with the name they rebuild it.
    init: (rng, frozen, num_classes) -> trainable, state.
    weights: (trainable, frozen) -> frozen', parameters rewritten before the call.
    visit: (trainable, ctx) -> visitor of the forward pass.
    carry: the visitor's first carry.
    readout: (trainable, features [B, D], carry, ctx) -> logits [B, C] float32.
    loss: (trainable, outputs, ctx) -> scalar.
    reads: {slot: Read}, what a run from cached activations needs.
    reference: sites of a second, frozen pass that ctx shall hold.
    writes_from: index of the first block whose computation depends on trainable; the depth if none does.
    merge: (trainable, frozen) -> frozen', the same classifier on a plain backbone; None where mathematics forbids it.
    frozen: False if the method never looks at the frozen parameters after init, so that no second copy is kept.
    then: (trainable, state) -> the Method of the next stage, or None.
  """
  name: str
  options: dict
  init: Callable
  readout: Callable
  writes_from: int
  weights: Callable = lambda trainable, frozen: frozen
  visit: Callable = lambda trainable, ctx: ignore
  carry: Any = ()
  loss: Callable = lambda trainable, outputs, ctx: losses.cross_entropy(outputs.logits, ctx.batch)
  reads: dict = {}
  reference: tuple = ()
  merge: Callable | None = None
  frozen: bool = True
  then: Callable | None = None


def record(*names: str):
  """A visitor that collects sites into its carry, a dict; all of them when no names are given. Start with `carry={}`.

  Recorded activations do not hand gradients back: what reads them cannot train what made them.
  """
  def visit(carry, site, y, x):
    del x
    if y is not None and (not names or site in names):
      carry = {**carry, site: jax.lax.stop_gradient(y)}
    return carry, y
  return visit


def replay(visit, carry, activations: dict):
  """Visits cached sites in order; returns the carry and the last site's value, which enters the backbone at `start`."""
  y = None
  for site, value in activations.items():
    carry, y = visit(carry, site, value, None)
  return carry, y


def drop_path(rng, rate: float, depth: int):
  """Stochastic depth (Huang et al. 2016) as a visitor.

  Each branch of a sample is dropped with a rate that grows linearly from 0 at the first block to `rate` at the last;
  kept branches are scaled by 1 / keep. Attention and MLP draw apart; a ResNet's block has one branch.
  """
  def visit(carry, site, y, x):
    del x
    block, _, place = site.partition("/")
    if place not in ("attn", "mlp", "branch"):
      return carry, y
    index = int(block.rsplit("_", 1)[1])
    keep = 1 - rate * index / max(depth - 1, 1)
    if keep == 1:
      return carry, y
    key = jax.random.fold_in(rng, 2 * index + (place == "mlp"))
    kept = jax.random.bernoulli(key, keep, (y.shape[0],) + (1,) * (y.ndim - 1))
    return carry, jnp.where(kept, y / jnp.asarray(keep, y.dtype), jnp.zeros((), y.dtype))
  return visit


def chain(*visitors):
  """Visitors one after the other at every site, each seeing what the one before returned; they share one carry."""
  def visit(carry, site, y, x):
    for visitor in visitors:
      carry, y = visitor(carry, site, y, x)
    return carry, y
  return visit


def forward(method: Method, backbone: Backbone, trainable, images, ctx: Context, *, drop_path_rate: float = 0.0,
            remat: bool = False) -> Outputs:
  """One forward pass of an adapted backbone.

  Args:
    images: [B, S, S, 3] normalised.
    drop_path_rate: stochastic depth of the last block; acts in training only.
    remat: recompute the adapted blocks in the backward pass instead of keeping their activations.
  """
  if method.reference:
    _, seen = backbone.apply(ctx.frozen, images, record(*method.reference), {})
    ctx = ctx._replace(reference=seen)
  visit = method.visit(trainable, ctx)
  if ctx.train and drop_path_rate:
    visit = chain(drop_path(jax.random.fold_in(ctx.rng, 0), drop_path_rate, backbone.spec.depth), visit)
  features, carry = backbone.apply(method.weights(trainable, ctx.frozen), images, visit, method.carry,
                                   remat_from=method.writes_from if remat else None)
  return Outputs(method.readout(trainable, features, carry, ctx), features, carry)


def predict(method: Method, backbone: Backbone, trainable, state, frozen, images):
  """Logits [B, C] float32 of normalised images [B, S, S, 3]."""
  return forward(method, backbone, trainable, images, Context(state=state, frozen=frozen)).logits


def stages(method: Method, train: Callable) -> list:
  """Runs a method's stages in order: `train(method)` returns (trainable, state), from which the next stage is made.

  Returns:
    [(method, trainable, state)], one entry per stage; the last one is the result.
  """
  results = []
  while method is not None:
    trainable, state = train(method)
    results.append((method, trainable, state))
    method = method.then(trainable, state) if method.then else None
  return results


class Sizes(NamedTuple):
  """Numbers of parameters."""
  trainable: int
  trainable_without_classifier: int
  state: int
  frozen: int


def sizes(method: Method, frozen, num_classes: int) -> Sizes:
  """Numbers of parameters, from shapes alone; `frozen` may hold arrays or shapes."""
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  init = lambda rng, params: method.init(rng, params, num_classes)
  trainable, state = jax.eval_shape(init, jax.random.key(0), frozen)
  return Sizes(count(trainable), count({k: v for k, v in trainable.items() if k != "classifier"}), count(state),
               count(frozen))
