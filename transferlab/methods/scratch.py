"""Training from scratch: the whole network from random weights, to see what the pre-training is worth.

A linear probe's accuracy minus this one's is the domain affinity of Evci et al. (2022, arXiv 2201.03529): how near the
pre-training lies to a task. There the figures of a ResNet from scratch are VTAB's, and those of a ViT have no source
that we know.
"""
import jax

from transferlab import backbones
from transferlab.method import Method
from transferlab.methods.full import full


def scratch(spec) -> Method:
  """`full`, but from parameters drawn anew from the run's seed; of the weights only the shapes count.

  It needs many more steps than fine-tuning. Merges into a plain backbone. A ResNet with batch norm is refused: its
  statistics never train here, and without the pre-training's it has none.
  """
  inner, draw = full(spec), backbones.build(spec).init

  def init(rng, frozen, num_classes):
    del frozen
    of_backbone, of_head = jax.random.split(rng)
    return inner.init(of_head, draw(of_backbone), num_classes)

  return inner._replace(name="scratch", options={}, init=init)
