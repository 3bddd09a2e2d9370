"""What a view looks like, in numbers computed by hand: colour and edge histograms, of the view and of every patch.

Regressing them costs next to nothing and keeps in the features what class labels would let the network forget.

Histograms of oriented gradients: Dalal and Triggs 2005; as pre-training targets, Wei et al. 2021 (arXiv 2112.09133);
colour histograms: Swain and Ballard 1991.
"""
import jax.numpy as jnp

from transferlab.pretraining.augment import GREY

ORIENTATIONS = 8
LEVELS = 4          # per channel of the colour histogram
EDGES = (2, 4, 4)   # cells per side at full, half and quarter resolution
SIZE = LEVELS ** 3 + 4 * LEVELS * 3 + ORIENTATIONS * sum(cells ** 2 + 1 for cells in EDGES)
PATCH_SIZE = LEVELS ** 3 + 2 * ORIENTATIONS


def halve(images):
  """Mean of 2 x 2 pixels. [B, H, W, C] -> [B, H/2, W/2, C]."""
  return (images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2]) / 4


def bins(values, count: int):
  """Soft assignment of values in [0, 1] to `count` levels. [...] -> [..., count], sums to 1."""
  centres = jnp.arange(count) / (count - 1)
  return jnp.maximum(0, 1 - jnp.abs(values[..., None] - centres) * (count - 1))


def pool(values, cells: int):
  """Mean over a grid of cells. [B, H, W, N] -> [B, cells*cells, N]."""
  B, H, W, N = values.shape
  return values.reshape(B, cells, H // cells, cells, W // cells, N).mean((2, 4)).reshape(B, cells * cells, N)


def edges(grey):
  """Gradient length by orientation, [B, H, W] -> [B, H, W, 8]."""
  gx = jnp.pad(grey[:, :, 2:] - grey[:, :, :-2], ((0, 0), (0, 0), (1, 1)))
  gy = jnp.pad(grey[:, 2:] - grey[:, :-2], ((0, 0), (1, 1), (0, 0)))
  length = jnp.sqrt(gx * gx + gy * gy + 1e-8)
  turn = jnp.mod(jnp.arctan2(gy, gx) / jnp.pi, 1) * ORIENTATIONS                               # [B, H, W] in [0, 8]
  distance = jnp.abs(turn[..., None] - jnp.arange(ORIENTATIONS))
  return jnp.maximum(0, 1 - jnp.minimum(distance, ORIENTATIONS - distance)) * length[..., None]


def describe(images, patches: int):
  """Descriptors of views.

  Args:
    images: [B, S, S, 3] in about [-1, 1].
    patches: patch rows of the network, N.

  Returns:
    [B, SIZE] of the whole view, [B, N*N, PATCH_SIZE] of its patches.
  """
  full = jnp.clip(images / 2 + 0.5, 0, 1)
  half = halve(full)
  quarter = halve(half)
  r, g, b = (bins(half[..., c], LEVELS) for c in range(3))                                     # [B, S/2, S/2, 4]
  joint = (r[..., :, None, None] * g[..., None, :, None] * b[..., None, None, :]).reshape(*r.shape[:3], -1)
  maps = [edges(image @ GREY) for image in (full, half, quarter)]
  flat = lambda x: jnp.sqrt(x + 1e-6).reshape(len(images), -1)
  view = [flat(pool(joint, 1)), flat(pool(jnp.concatenate([r, g, b], -1), 2))]
  for cells, edge in zip(EDGES, maps):
    view += [flat(pool(edge, cells)), flat(pool(edge, 1))]
  local = jnp.sqrt(jnp.concatenate([pool(x, patches) for x in (joint, maps[0], maps[1])], -1) + 1e-6)
  return jnp.concatenate(view, -1), local
