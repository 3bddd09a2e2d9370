"""MIRO: fine-tuning that keeps the features of several depths near those of the frozen backbone (Cha et al. 2022,
arXiv 2203.10789; khanrc/miro).

    loss = CE + weight * sum_l 1/2 mean[(f_l - f0_l)^2 / var_l + log var_l],    var_l = softplus(b_l) + 1e-5

f are the features of the backbone that trains, f0 of the frozen one, all tokens of them: the patches before class token
and positions, and what leaves the blocks at every quarter of the depth. Every channel has a variance of its own; the
mean of f0 given f is f itself. A variational bound of the mutual information of both, hence the name.
"""
import math

import jax
import jax.numpy as jnp

from transferlab import losses
from transferlab.method import Method, Read, collect
from transferlab.methods import classifier

_LEAST, _FIRST = 1e-5, 0.1  # of a variance: added to it, and at initialisation


def miro(spec, *, weight: float = 1.0, dropout: float = 0.0) -> Method:
  """Regularised fine-tuning of a ViT, or of a CLIP's image tower with its projection.

  Args:
    spec: the backbone's spec; on a CLIP no text is needed.
    weight: of the regulariser, 0.01 to 1 in the paper's search; 1 on CLIP in all that the poster compares with.
    dropout: on the feature before the classifier.

  Trainable: {"backbone": the parameters of the tower, "classifier": {"kernel": [D, C], "bias": [C]}, "variance":
  {"patch": {"bias": [D]}, "block_02": …}}; of a CLIP {"backbone": {"image": …, "image_projection": …}}, and D of the
  classifier is the joint width d. Variances start at 0.1; the original gives them 10 times the rate, as
  `experiment.LR_FACTORS` does. Merges on a ViT. On a CLIP it does not: there a plain classifier reads what comes before
  the projection.

  A step runs the frozen backbone, too, and keeps it in memory.
  """
  if not weight >= 0:
    raise ValueError(f"weight is {weight}; expected 0 or more")
  clip = spec.family == "clip"
  layers = ["patch", *(f"block_{i:02d}" for i in quarters(spec.depth))]
  site = lambda layer: "image/" * clip + (layer if layer == "patch" else f"{layer}/out")

  def tower(frozen):
    return {name: frozen[name] for name in ("image", "image_projection")} if clip else frozen

  def init(rng, frozen, num_classes):
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tower(frozen))
    start = math.log(math.expm1(_FIRST - _LEAST))
    variance = {layer: {"bias": jnp.full((spec.width,), start)} for layer in layers}
    head = classifier.init(rng, spec.embed_width if clip else spec.width, num_classes)
    return {"backbone": copy, "classifier": head, "variance": variance}, {}

  def readout(trainable, features, carry, ctx):
    features = features.image if clip else features
    return classifier.apply(trainable["classifier"], classifier.dropout(ctx.rng, dropout, features, ctx.train))

  def finish(trainable, carry, ctx):
    return {layer: distances(carry[layer], ctx.reference[site(layer)], trainable["variance"][layer]["bias"])
            for layer in layers}  # [B] each

  def loss(trainable, outputs, ctx):
    rows = ctx.batch["weight"]
    regulariser = jnp.sum(sum(outputs.carry.values()) * rows) / jnp.maximum(jnp.sum(rows), 1e-12)
    return losses.cross_entropy(outputs.logits, ctx.batch) + weight * regulariser

  def weights(trainable, frozen):
    return trainable["backbone"]

  reads = {layer: Read(site(layer)) for layer in layers}
  return Method(
      name="miro", options={"weight": weight, "dropout": dropout}, init=init, weights=weights,
      prepare=lambda frozen, state: tower(frozen), visit=lambda trainable, ctx: collect(reads, ctx.frozen, stop=False),
      carry={}, finish=finish, readout=readout, loss=loss, reference=tuple(map(site, layers)),
      merge=None if clip else weights, writes_from=0)


def quarters(depth: int) -> list[int]:
  """The blocks, from 0, that end every quarter of a backbone: 2, 5, 8 and 11 of 12; fewer where it has fewer than 4."""
  return sorted({math.ceil(depth * k / 4) - 1 for k in (1, 2, 3, 4)})


def distances(found, frozen, b):
  """What the features [B, T, D] or [B, …, D] of a layer add to the loss of each example [B], float32."""
  variance = jax.nn.softplus(b) + _LEAST
  squares = jnp.square(found.astype(jnp.float32) - frozen.astype(jnp.float32))
  return 0.5 * jnp.mean(squares / variance + jnp.log(variance), axis=range(1, found.ndim))
