"""Features of Head2Toe: pooling, normalisation, scores and selection as pure functions (Evci et al. 2022, arXiv
2201.03529; google-research/head2toe @ 6277f63, called "the code" here).

An activation is average-pooled to about `target` numbers and flattened; the layers' vectors lie side by side, and
`Layout` knows which feature belongs to which layer.
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLS_MODES = ("normal", "only_cls", "nopool_cls")
PER_FEATURE_EPS = 1e-5  # the code's


class Layout(NamedTuple):
  """Where each layer's features lie among the N of all layers.

  Fields:
    names: of the layers, in their order.
    sizes: number of features of each.
  """
  names: tuple[str, ...]
  sizes: tuple[int, ...]

  @property
  def total(self) -> int:
    return sum(self.sizes)

  def layer_of(self, indices):
    """Position in `names` of the layer of each feature: indices [K] among all N -> [K] int32."""
    return jnp.searchsorted(jnp.cumsum(jnp.asarray(self.sizes)), indices, side="right").astype(jnp.int32)

  def split(self, indices) -> dict[str, np.ndarray]:
    """{layer: indices within it}, in the order given; on the host, for reports. Layers with none have an empty one."""
    indices, ends = np.asarray(indices), np.cumsum(self.sizes)
    starts = ends - self.sizes
    return {name: indices[(indices >= a) & (indices < b)] - a for name, a, b in zip(self.names, starts, ends)}


# --- Pooling --------------------------------------------------------------------------------------------------------

def average(x, window: int):
  """Average pooling over all axes between the first and the last, stride = window, an incomplete border left out.

  Args:
    x: tokens [B, T, C] or a map [B, H, W, C].
    window: its side in tokens or pixels; 0 is the mean over all of them.

  Returns:
    [B, N], positions in row-major order, channels fastest; float32 at least.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  B, *places, C = x.shape
  if not window:
    return x.mean(axis=tuple(range(1, x.ndim - 1)))
  for axis, length in enumerate(places, 1):
    count = length // window
    x = jax.lax.slice_in_dim(x, 0, count * window, axis=axis)
    x = x.reshape(*x.shape[:axis], count, window, *x.shape[axis + 1:]).mean(axis=axis + 1)
  return x.reshape(B, -1)


def window_for(shape: tuple[int, ...], target: int) -> int:
  """The window that pools [B, T, C] or a square [B, W, W, C] to about `target` numbers; 0 for the mean.

  The target is no limit: windows are rounded down, so results are mostly larger, up to 2.7 times in ResNet-50.
  """
  *_, length, C = shape
  if C >= target:
    return 0
  if len(shape) == 3:
    return int(length / (target / C))
  return length // math.isqrt(target // C)  # 0, the mean, where there are fewer positions than wanted


def pool(x, target: int, cls: str = "normal"):
  """Pools an activation to about `target` numbers, by `window_for`.

  Args:
    x: tokens [B, T, C], a map [B, W, W, C], or a vector [B, C] or [B, 1, C], which passes whatever the target.
    cls: of tokens whose first is the class token: "normal" pools it with the others, "only_cls" takes it alone,
      "nopool_cls" puts it in front of the pooled others.

  Returns:
    [B, N] float32.
  """
  if x.ndim == 2 or (x.ndim == 3 and x.shape[1] == 1):
    return average(x.reshape(x.shape[0], 1, -1), 1)
  if x.ndim == 4 or cls == "normal":
    return average(x, window_for(x.shape, target))
  first, rest = average(x[:, :1], 1), x[:, 1:]
  if cls == "only_cls":
    return first
  return jnp.concatenate([first, average(rest, window_for(rest.shape, target))], axis=-1)


# --- Normalisation --------------------------------------------------------------------------------------------------

def length(x, axis: int = -1):
  """||x|| along an axis, which stays with size 1; 1 for zero vectors, so that it can divide, with finite gradients."""
  squares = jnp.sum(x * x, axis=axis, keepdims=True)
  return jnp.sqrt(jnp.where(squares > 0, squares, 1))


def unit(x, axis: int = -1):
  """x / ||x|| along an axis, without an epsilon as in the code; zero vectors stay zero."""
  return x / length(x, axis)


def unit_per_layer(x, layers, count: int):
  """`unit` of each layer's share of selected features.

  Args:
    x: [B, K].
    layers: [K], which of `count` layers each feature belongs to, in any order.
  """
  squares = jax.ops.segment_sum((x * x).T, layers, count)         # [count, B]
  return x / jnp.sqrt(jnp.where(squares > 0, squares, 1))[layers].T  # [B, K]


def standardise(x, mean=None, variance=None):
  """(x - mean) / sqrt(variance + 1e-5) of each feature, the code's "per_feature".

  Args:
    x: [B, N].
    mean, variance: [N]; by default those of x itself. The code always takes the latter, the batch or the set that it
      happens to hold, so that training and test are scaled apart; pass the training set's to have them alike.
  """
  mean = x.mean(axis=0) if mean is None else mean
  variance = jnp.mean((x - mean) ** 2, axis=0) if variance is None else variance
  return (x - mean) / jnp.sqrt(variance + PER_FEATURE_EPS)


# --- Scores and selection -------------------------------------------------------------------------------------------

def score(kernel):
  """Relevance of each feature: kernel [N, C] -> [N], the sum of its squared weights. (The slides say the norm, which
  ranks alike.)"""
  return jnp.sum(kernel * kernel, axis=-1)


def count_of(fraction: float, total: int) -> int:
  """Number of features kept, rounded down."""
  return int(fraction * total)


def select(scores, count: int):
  """Indices [count] int32 of the largest scores [N] of all layers together, best first; ties go to the lower index."""
  return jax.lax.top_k(scores, count)[1]
