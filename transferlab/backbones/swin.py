"""Swin Transformer as a fold over named sites (Liu et al. 2021, arXiv 2103.14030).

Sites, in order; T tokens of the stage's map in rows, nW windows of t = w*w tokens, blocks numbered through all stages:

    patch  embed  block_00/{in ln1 windows qkv bias proj attn mid ln2 fc1 fc2 mlp out}  block_01/…
    merge_1/{in cat norm out}  block_02/…  pre_norm  norm  pooled

`windows` [B, nW, t, D] are the rolled and cut tokens; `qkv` and `proj` keep that layout. `bias` [1 or nW, H, t, t]
holds relative positions and, where windows are shifted, the mask. `merge_s` halves the map before stage s; its `cat`
[B, T/4, 4D] are 2 x 2 neighbours side by side. All other sites are [B, T, D], as in `vit.py`.

Only windows and merges know the map, so a visitor may let more than T tokens travel: it takes its own off at `ln1` and
`merge_s/in`, and puts them back at `attn` and `merge_s/cat`. What stands in `windows` may be longer, too, if `bias` is.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transferlab.backbones.spec import SwinSpec
from transferlab.backbones.vit import Dense, LayerNorm, attention, embed_patches, gelu, ignore

_MASKED = -100.0  # of the released code; softmax makes 4e-44 of it


def cut(x, grid: tuple[int, int], window: int, shift: int = 0):
  """Tokens [B, T, D] of a map, rolled up and left by `shift`, as windows [B, nW, t, D]."""
  B, D, (rows, columns), w = x.shape[0], x.shape[-1], grid, window
  x = x.reshape(B, rows, columns, D)
  x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
  x = x.reshape(B, rows // w, w, columns // w, w, D).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(B, -1, w * w, D)


def join(windows, grid: tuple[int, int], window: int, shift: int = 0):
  """Inverse of `cut`."""
  B, D, (rows, columns), w = windows.shape[0], windows.shape[-1], grid, window
  x = windows.reshape(B, rows // w, columns // w, w, w, D).transpose(0, 1, 3, 2, 4, 5).reshape(B, rows, columns, D)
  x = jnp.roll(x, (shift, shift), (1, 2)) if shift else x
  return x.reshape(B, rows * columns, D)


def relative_index(window: int) -> np.ndarray:
  """[t, t], the row of the bias table for each pair of a window's tokens."""
  y, x = np.divmod(np.arange(window * window), window)
  return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def shift_mask(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
  """[nW, t, t]: 0 between tokens of a window that are neighbours on the map, -100 between those that the roll brought
  together."""
  (rows, columns), w = grid, window
  part = lambda n: np.searchsorted([n - w, n - shift], np.arange(n), side="right")  # 0, 1, 2 along one side
  region = 3 * part(rows)[:, None] + part(columns)
  region = region.reshape(rows // w, w, columns // w, w).transpose(0, 2, 1, 3).reshape(-1, w * w)
  return np.where(region[:, :, None] == region[:, None, :], 0.0, _MASKED).astype(np.float32)


class Block(nn.Module):
  """Pre-norm transformer block whose attention stays within windows."""
  spec: SwinSpec
  index: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry, x, visit, block: str):
    spec, dtype, shape = self.spec, self.dtype, self.spec.block(self.index)
    D, H, grid = shape.width, shape.heads, shape.grid
    window, shift = spec.window_of(self.index)
    norm = lambda name: LayerNorm(spec.norm_eps, dtype, name=name)

    carry, x = visit(carry, f"{block}/in", x, x)                                                   # [B, T, D]
    h = norm("ln1")(x)
    carry, h = visit(carry, f"{block}/ln1", h, x)                                                  # [B, T, D]
    carry, h = visit(carry, f"{block}/windows", cut(h, grid, window, shift), h)                    # [B, nW, t, D]
    carry, qkv = visit(carry, f"{block}/qkv", Dense(3 * D, spec.qkv_bias, dtype, name="qkv")(h), h)  # [B, nW, t, 3D]
    carry, bias = visit(carry, f"{block}/bias", self.bias(H, grid, window, shift), h)              # [1|nW, H, t, t]
    a = jax.vmap(attention, (0, None, None))(qkv, H, bias)                                         # [B, nW, t, D]
    carry, y = visit(carry, f"{block}/proj", Dense(D, dtype=dtype, name="proj")(a), a)             # [B, nW, t, D]
    carry, y = visit(carry, f"{block}/attn", join(y, grid, window, shift), x)                      # [B, T, D]
    carry, mid = visit(carry, f"{block}/mid", x + y, x)                                            # [B, T, D]

    h = norm("ln2")(mid)
    carry, h = visit(carry, f"{block}/ln2", h, mid)                                                # [B, T, D]
    carry, f = visit(carry, f"{block}/fc1", Dense(shape.mlp_width, dtype=dtype, name="fc1")(h), h)  # [B, T, 4D]
    g = gelu(f, spec.gelu)
    carry, y = visit(carry, f"{block}/fc2", Dense(D, dtype=dtype, name="fc2")(g), g)               # [B, T, D]
    carry, y = visit(carry, f"{block}/mlp", y, mid)                                                # [B, T, D]
    return visit(carry, f"{block}/out", mid + y, mid)                                              # carry, [B, T, D]

  def bias(self, heads: int, grid, window: int, shift: int):
    """Relative positions, and the mask of shifted windows [1 or nW, H, t, t]."""
    table = self.param("relative_bias", nn.initializers.truncated_normal(0.02), ((2 * window - 1) ** 2, heads))
    bias = table[relative_index(window)].transpose(2, 0, 1)[None]                                  # [1, H, t, t]
    return bias + shift_mask(grid, window, shift)[:, None] if shift else bias


class Merge(nn.Module):
  """Halves the map and doubles the width: 2 x 2 neighbours, norm, linear map."""
  spec: SwinSpec
  stage: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry, x, visit, merge: str):
    carry, x = visit(carry, f"{merge}/in", x, x)                                                   # [B, T, D]
    (rows, columns), B, D = self.spec.grid_of(self.stage - 1), x.shape[0], x.shape[-1]
    # Neighbours in the order above-left, below-left, above-right, below-right.
    cat = x.reshape(B, rows // 2, 2, columns // 2, 2, D).transpose(0, 1, 3, 4, 2, 5).reshape(B, -1, 4 * D)
    carry, cat = visit(carry, f"{merge}/cat", cat, x)                                              # [B, T/4, 4D]
    h = LayerNorm(self.spec.norm_eps, self.dtype, name="norm")(cat)
    carry, h = visit(carry, f"{merge}/norm", h, cat)                                               # [B, T/4, 4D]
    y = Dense(2 * D, False, self.dtype, name="reduction")(h)
    return visit(carry, f"{merge}/out", y, h)                                                      # carry, [B, T/4, 2D]


class Swin(nn.Module):
  """The fold. `inputs` are normalised images [B, S, S, 3], or the tokens [B, T, D] that left block `start` - 1 if
  start > 0; a merge between the two blocks is still to come."""
  spec: SwinSpec
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs, visit=ignore, carry=(), *, start: int = 0, remat_from: int | None = None):
    spec, x = self.spec, inputs.astype(self.dtype)
    if not start:
      carry, x = self.embed(x, visit, carry)                                                       # [B, T, D]
    for i in range(start, spec.depth):
      checkpointed = remat_from is not None and i >= remat_from
      block, merge = (nn.remat(kind, static_argnums=(3, 4)) if checkpointed else kind for kind in (Block, Merge))
      stage = spec.stage(i)
      if stage and spec.first(i):
        carry, x = merge(spec, stage, self.dtype, name=f"merge_{stage}")(carry, x, visit, f"merge_{stage}")
      name = f"block_{i:02d}"
      carry, x = block(spec, i, self.dtype, name=name)(carry, x, visit, name)
    carry, x = visit(carry, "pre_norm", x, x)                                                      # [B, T or 1, D]
    carry, x = visit(carry, "norm", LayerNorm(spec.norm_eps, self.dtype, name="norm")(x), x)       # [B, T or 1, D]
    carry, pooled = visit(carry, "pooled", x.mean(axis=1), x)                                      # [B, D]
    return pooled, carry

  def embed(self, images, visit, carry):
    """(carry, tokens [B, T, D] of the first stage) of images [B, S, S, 3]."""
    spec, p, D = self.spec, self.spec.patch_size, self.spec.embed_width
    kernel = self.param("patch_kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), (p, p, 3, D))
    bias = self.param("patch_bias", nn.initializers.zeros, (D,))
    x = embed_patches(images, kernel, bias, spec)
    carry, x = visit(carry, "patch", x, images)                                                    # [B, T, D]
    norm = LayerNorm(spec.norm_eps, self.dtype, name="patch_norm")
    return visit(carry, "embed", norm(x), x)                                                       # carry, [B, T, D]
