"""Head2Toe that selects whole layers instead of features: what choosing features one by one is worth."""
import jax
import jax.numpy as jnp

from transferlab.method import Method
from transferlab.methods.head2toe import two_stages
from transferlab.methods.head2toe_features import Layout


def layer_means(scores, layout: Layout):
  """Each feature's score [N] replaced by the mean of its layer's."""
  layers = layout.layer_of(jnp.arange(layout.total))
  sums = jax.ops.segment_sum(scores, layers, len(layout.sizes))  # [layers]
  return (sums / jnp.asarray(layout.sizes))[layers]


def head2toe_layers(spec, *, fraction: float | tuple = 0.1, coefficient: float = 1e-4, sites: str | tuple = "paper",
                    target_size: int = 512, cls: str = "normal", normalisation: str = "unit",
                    compat: str | None = None) -> Method:
  """Head2Toe with layers ranked by the mean score of their features.

  Args:
    fraction: share of all features that stay, as of `head2toe`, so that both keep equally many: the best layers, and of
      the layer at the limit as many features as still fit, its first ones.
    spec, coefficient, sites, target_size, cls, normalisation, compat: as of `head2toe`, which this is otherwise.

  The original code has the mean of a layer as one of its scores and takes the largest of all features' scores, as here.
  That this is the comparison the paper makes between features and layers is our reading; so is the budget in features.
  A layer has about `target_size` of them or more, and a smaller fraction than target_size / N keeps a part of one.
  """
  return two_stages(spec, "head2toe_layers", {
      "fraction": fraction, "coefficient": coefficient, "sites": sites, "target_size": target_size, "cls": cls,
      "normalisation": normalisation, "compat": compat}, rank=layer_means)
