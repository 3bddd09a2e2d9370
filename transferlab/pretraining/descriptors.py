"""What a view looks like, in numbers computed by hand: colour and edge histograms. Regressing them costs next to nothing and
keeps in the features what class labels would let the network forget.

Histograms of oriented gradients: Dalal and Triggs 2005; as pre-training targets, Wei et al. 2021 (arXiv 2112.09133); colour
histograms: Swain and Ballard 1991.
"""
import jax.numpy as jnp

from transferlab.pretraining.augment import GREY

ORIENTATIONS = 8
LEVELS = 4     # per channel of the colour histogram
SIZE = LEVELS ** 3 + 4 * 3 + ORIENTATIONS * (16 + 4)


def bins(values, count: int):
  """Soft assignment of values in [0, 1] to `count` levels. [...] -> [..., count], sums to 1."""
  centres = jnp.arange(count) / (count - 1)
  return jnp.maximum(0, 1 - jnp.abs(values[..., None] - centres) * (count - 1))


def pool(values, cells: int):
  """Mean over a grid of cells. [B, H, W, N] -> [B, cells*cells*N]."""
  B, H, W, N = values.shape
  return values.reshape(B, cells, H // cells, cells, W // cells, N).mean((2, 4)).reshape(B, -1)


def oriented(grey, cells: int):
  """Histograms of gradient orientation per cell, weighted by gradient length, square-rooted. -> [B, cells*cells*8]."""
  gx = jnp.pad(grey[:, :, 2:] - grey[:, :, :-2], ((0, 0), (0, 0), (1, 1)))
  gy = jnp.pad(grey[:, 2:] - grey[:, :-2], ((0, 0), (1, 1), (0, 0)))
  length = jnp.sqrt(gx * gx + gy * gy + 1e-8)
  turn = jnp.mod(jnp.arctan2(gy, gx) / jnp.pi, 1) * ORIENTATIONS                               # [B, H, W] in [0, 8]
  distance = jnp.abs(turn[..., None] - jnp.arange(ORIENTATIONS))
  weight = jnp.maximum(0, 1 - jnp.minimum(distance, ORIENTATIONS - distance))
  return jnp.sqrt(pool(weight * length[..., None], cells) + 1e-6)


def describe(images):
  """Descriptors [B, SIZE] of views [B, S, S, 3] in [-1, 1]."""
  images = jnp.clip(images[:, ::2, ::2] * 0.25 + images[:, 1::2, ::2] * 0.25 + images[:, ::2, 1::2] * 0.25
                    + images[:, 1::2, 1::2] * 0.25, -1, 1) / 2 + 0.5                           # [B, S/2, S/2, 3]
  r, g, b = (bins(images[..., c], LEVELS) for c in range(3))
  colour = jnp.einsum("bhwi,bhwj,bhwk->bijk", r, g, b) / (images.shape[1] * images.shape[2])
  grey = images @ GREY
  return jnp.concatenate([jnp.sqrt(colour.reshape(len(images), -1) + 1e-6), pool(images, 2),
                          oriented(grey, 4), oriented(grey, 2)], -1)
