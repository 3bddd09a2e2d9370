"""Full fine-tuning: the backbone itself trains, starting from the frozen weights.

The statistics of a batch norm stay as they are: they would follow the gradient, and a variance could become negative.
"""
import jax
import jax.numpy as jnp

from transferlab import tree
from transferlab.method import Method
from transferlab.methods import classifier, linear


def full(spec, *, probe_first: bool = False) -> Method:
  """Full fine-tuning.

  Args:
    spec: the backbone's spec.
    probe_first: train a linear probe first and start from its classifier, which keeps the pre-trained features from
      being distorted while the classifier is still random (LP-FT, Kumar et al. 2022, arXiv 2202.10054). Two stages.
  """
  def trained(frozen):
    if not spec.statistics:
      return frozen
    return tree.unflatten({name: leaf for name, leaf in tree.flatten(frozen).items()
                           if name.rsplit("/", 1)[-1] not in ("mean", "var")})

  def method(start=None) -> Method:
    def init(rng, frozen, num_classes):
      head = classifier.init(rng, spec.width, num_classes) if start is None else start
      copy = lambda params: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
      return {"backbone": copy(trained(frozen)), "classifier": copy(head)}, {}

    def weights(trainable, frozen):
      return tree.merge(frozen, trainable["backbone"]) if spec.statistics else trainable["backbone"]

    return Method(name="full", options={"probe_first": probe_first}, init=init, weights=weights, merge=weights,
                  readout=classifier.readout, writes_from=0, frozen=spec.statistics)

  if not probe_first:
    return method()
  probe = linear.linear(spec)
  return probe._replace(name="full", options={"probe_first": True}, merge=None,
                        then=lambda trainable, state: method(trainable["classifier"]))
