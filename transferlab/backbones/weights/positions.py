"""Position tables at another resolution.

Bicubic (Keys, a = -0.5), half-pixel centres, widened when shrinking: what timm's resample_abs_pos_embed computes, and
PIL's BICUBIC on a float image. Google's vit_jax zooms bilinearly with aligned corners (scipy.ndimage.zoom, order 1)
instead; one rule is kept here so that a resolution has one meaning whatever file the weights came from.
"""
import numpy as np


def _keys(x: np.ndarray) -> np.ndarray:
  x = np.abs(x)
  return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


def resize_matrix(old: int, new: int) -> np.ndarray:
  """Weights [new, old] of a one-dimensional bicubic resize; rows sum to one, also at the border."""
  scale = old / new
  centres = (np.arange(new) + 0.5) * scale - 0.5                                                    # [new]
  weights = _keys((np.arange(old)[None] - centres[:, None]) / max(scale, 1.0))                      # [new, old]
  return weights / weights.sum(axis=1, keepdims=True)


def resample_positions(pos: np.ndarray, side: int, prefix: int) -> np.ndarray:
  """A position table for a square grid of another size.

  Args:
    pos: [1, prefix + g*g, D], rows of prefix tokens first, then patches row by row.
    side: patches per side of the new grid.
    prefix: number of rows that belong to no patch (the class token); they are kept as they are.

  Returns:
    [1, prefix + side*side, D] float32.
  """
  g, D = round((pos.shape[1] - prefix) ** 0.5), pos.shape[-1]
  if g == side:
    return pos
  matrix = resize_matrix(g, side)                                                                   # [side, g]
  grid = pos[0, prefix:].reshape(g, g, D).astype(np.float64)
  grid = np.einsum("ag,bh,ghd->abd", matrix, matrix, grid, optimize=True).reshape(1, side * side, D)
  return np.concatenate([pos[:, :prefix], grid.astype(np.float32)], axis=1)
