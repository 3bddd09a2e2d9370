"""BitFit: only the biases train (Ben Zaken et al. 2022, arXiv 2106.10199; for ViT as "bias" of KMnP/vpt's solver)."""
import jax.numpy as jnp

from transferlab import tree
from transferlab.method import Method
from transferlab.methods import classifier


def bitfit(spec) -> Method:
  """Every parameter whose name contains "bias" trains: of dense layers, norms and the patch embedding.

  102,912 parameters on ViT-B/16 without the classifier. Merges.
  """
  def init(rng, frozen, num_classes):
    biases = {name: jnp.array(leaf, copy=True) for name, leaf in tree.flatten(frozen).items() if "bias" in name}
    return {"biases": tree.unflatten(biases), "classifier": classifier.init(rng, spec.width, num_classes)}, {}

  weights = lambda trainable, frozen: tree.merge(frozen, trainable["biases"])
  return Method(name="bitfit", options={}, init=init, weights=weights, merge=weights, readout=classifier.readout,
                writes_from=0)
