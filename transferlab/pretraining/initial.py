"""Initial weights that already see: what a short run would spend its first hundreds of steps on.

Patches enter as their discrete cosine transform in opponent colours, evened out against the 1/f spectrum of images;
positions as sines and cosines (Vaswani et al. 2017, in two dimensions); queries equal keys and values are undone by the
projection, as in trained transformers (Trockman and Kolter 2023, arXiv 2305.09828). The constants were set by
looking at the spread of activations over the blocks.
"""
import jax
import jax.numpy as jnp
import numpy as np

from transferlab.backbones import build

OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [0.5, -1, 0.5]]).T / np.sqrt([3, 2, 1.5])  # [3 RGB, 3], orthonormal


def cosines(size: int):
  """Orthonormal DCT-II basis [S positions, S frequencies]."""
  k = np.arange(size)
  basis = np.cos(np.pi * (k[:, None] + 0.5) * k / size) * np.sqrt(2 / size)
  basis[:, 0] /= np.sqrt(2)
  return basis


def patch_kernel(size: int, width: int):
  """[S, S, 3, D]: the lowest D products of cosine, cosine and opponent colour, gains growing with frequency."""
  basis = cosines(size)
  full = np.einsum("yu,xv,cd->yxcuvd", basis, basis, OPPONENT).reshape(size, size, 3, -1)
  u, v, d = (z.ravel() for z in np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij"))
  gain = np.hypot(u, v) + 0.5
  order = np.argsort(gain + 2 * (d > 0), kind="stable")[:width]
  kernel = np.zeros((size, size, 3, width))
  kernel[..., :len(order)] = full[..., order] * (np.minimum(gain, 6) * np.where(d > 0, 2, 1))[order] * 4 / size
  return kernel


def positions(rows: int, columns: int, width: int, scale: float):
  """[rows*columns, D], a quarter each of sin and cos of the row and of the column."""
  frequency = np.pi / 2 * 2.0 ** (-np.arange(width // 4) * 5 / (width // 4)) * 1.2
  y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
  angles = [z.reshape(-1, 1) * frequency for z in (y, x)]
  return scale * np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], -1)


def structured(key, spec):
  """Parameters of `spec` with these patches, positions and attention; everything else as the backbone has it."""
  params = build(spec).init(key)
  D, H = spec.width, spec.heads
  params["patch_kernel"] = jnp.asarray(patch_kernel(spec.patch_size, D), jnp.float32)
  pos = np.concatenate([np.zeros((spec.prefix_tokens, D)), positions(*spec.grid, D, 0.3)])
  params["pos"] = params["pos"] + jnp.asarray(pos[None], jnp.float32)
  orthogonal = jax.nn.initializers.orthogonal()
  for i in range(spec.depth):
    block = params[f"block_{i:02d}"]
    keys = jax.random.split(jax.random.fold_in(key, i), H + 1)
    match = jnp.concatenate([orthogonal(k, (D, D))[:, :D // H] for k in keys[:H]], -1)           # [D, D]
    value = orthogonal(keys[H], (D, D))
    block["qkv"]["kernel"] = 0.5 * block["qkv"]["kernel"] + jnp.concatenate([0.7 * match, 0.7 * match, 0.5 * value], -1)
    block["proj"]["kernel"] = 0.5 * block["proj"]["kernel"] - 0.5 * value.T
    block["fc2"]["kernel"] = 0.5 * block["fc2"]["kernel"]
  return params
