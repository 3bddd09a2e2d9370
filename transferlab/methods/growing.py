"""Open-InCA that learns new classes beside old ones which stay as they are: class-incremental learning.

A class of Open-InCA has rows of its own, its query and its column of the head, and classes meet only in the softmax. So
the rows of new classes train alone while everything else is held fixed, and the old classes' logits cannot change. That
adapters "can be incrementally modified" is said in the paper (Dukler et al. 2023, arXiv 2303.04105); its protocol was
not at hand, training new rows only is recalled, and the two losses are our reading.
"""
import jax.numpy as jnp

from transferlab import tree
from transferlab.method import Method
from transferlab.methods.inca import add_classes, keep_classes

OVER = ("new", "all")


def grow(method: Method, old: dict, over: str = "new") -> Method:
  """A method that trains the rows of new classes for an Open-InCA adapter.

  Args:
    method: the `open_inca` that `old` belongs to.
    old: its trainable, of C' classes; it becomes the state.
    over: the classes that the cross-entropy, and the logits, are over: "new", labels and columns count from the first
      new class; or "all", the old ones, fixed, before the new ones.

  Trainable: {"adapters": {site: {"query": [n, D]}}, "classifier": {site: {"kernel": [D, n], "bias": [n]}}} for n new
  classes. `join` makes one adapter of both.

  Raises:
    ValueError: another method, or an unknown `over`.
  """
  if method.name != "open_inca":
    raise ValueError(f"method is {method.name!r}; expected 'open_inca', whose classes have rows of their own")
  if over not in OVER:
    raise ValueError(f"over is {over!r}; expected one of {', '.join(OVER)}")
  known = _classes(old)

  def init(rng, frozen, num_classes):
    count = num_classes if over == "new" else num_classes - known
    grown = keep_classes(add_classes(old, rng, count), range(known, known + count))
    return tree.unflatten({name: leaf for name, leaf in tree.flatten(grown).items() if _is_row(name)}), old

  def whole(trainable, ctx):
    if over == "all":
      return join(ctx.state, trainable)
    return tree.unflatten({**tree.flatten(ctx.state), **tree.flatten(trainable)})

  return method._replace(
      init=init, choose=None,
      visit=lambda trainable, ctx: method.visit(whole(trainable, ctx), ctx),
      readout=lambda trainable, features, carry, ctx: method.readout(whole(trainable, ctx), features, carry, ctx),
      loss=lambda trainable, outputs, ctx: method.loss(whole(trainable, ctx), outputs, ctx))


def join(old: dict, rows: dict) -> dict:
  """The trainable of `open_inca` with the old classes first; the old numbers are kept bit for bit."""
  old = tree.flatten(old)
  grown = {name: jnp.concatenate([old[name], leaf], axis=0 if name.endswith("/query") else -1)
           for name, leaf in tree.flatten(rows).items()}
  return tree.unflatten({**old, **grown})


def _is_row(name: str) -> bool:
  return name.startswith("classifier/") or name.endswith("/query")


def _classes(trainable: dict) -> int:
  """Classes of an `open_inca`, C."""
  return next(leaf.shape[0] for name, leaf in tree.flatten(trainable).items() if name.endswith("/query"))
