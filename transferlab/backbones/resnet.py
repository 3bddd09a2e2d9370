"""ResNet with bottleneck blocks as a fold over named sites, in two versions:

* 1, "v1.5" (He et al. 2016, arXiv 1512.03385; stride on the 3x3 convolution, as timm and torchvision build it);
* 2, pre-activation (He et al. 2016, arXiv 1603.05027), with batch norm (timm resnetv2) or as BiT with group norm and
  standardised kernels (Kolesnikov et al. 2020, arXiv 1912.11370).

Sites, in order; maps are [B, H, W, D], blocks are numbered through all stages:

    stem/conv  stem/out  block_00/{in conv1/in conv1 conv2/in conv2 conv3/in conv3 shortcut branch out}  block_01/…
    norm (version 2)  pooled  logits (where the spec has classes)

`convK/in` is what a convolution takes, after norm and ReLU; that of the 3x3 convolution has its border of zeros, as
Head2Toe taps it. `branch` is the residual branch as it joins the stream (drop-path acts there). Batch norm is always in
its inference form: mean and var are frozen parameters like others, which no method trains.
"""
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from transferlab.backbones.gathering import meet
from transferlab.backbones.spec import ResNetSpec
from transferlab.backbones.vit import Dense, ignore

_STANDARDISE_EPS = 1e-8  # timm's ScaledStdConv of BiT; big_transfer has 1e-10


def pad(x, border: int, value: float = 0.0):
  """[B, H, W, D] with a border of so many pixels."""
  return jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)), constant_values=value)


def standardise(kernel):
  """[h, w, D, D'] with mean 0 and variance 1 of each output channel."""
  kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
  return kernel * lax.rsqrt(jnp.mean(kernel * kernel, axis=(0, 1, 2), keepdims=True) + _STANDARDISE_EPS)


class Conv(nn.Module):
  """Convolution without bias or padding."""
  features: int
  size: int
  stride: int = 1
  standardised: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape, unbox=False)

    def convolve(x, kernel):
      if self.standardised:
        kernel = standardise(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
      return lax.conv_general_dilated(x, kernel.astype(self.dtype), (self.stride, self.stride), "VALID",
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return meet(convolve, x, kernel)


class Norm(nn.Module):
  """Batch norm by fixed statistics, or group norm; computed in float32."""
  spec: ResNetSpec
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    spec, D = self.spec, x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (D,))
    bias = self.param("bias", nn.initializers.zeros, (D,))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if spec.norm == "batch":
      x = x - self.param("mean", nn.initializers.zeros, (D,))
      x = x * (lax.rsqrt(self.param("var", nn.initializers.ones, (D,)) + spec.norm_eps) * scale) + bias
      return x.astype(self.dtype)
    groups = x.reshape(*x.shape[:3], spec.groups, D // spec.groups)                     # [B, H, W, G, D/G]
    groups = groups - jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
    variance = jnp.mean(groups * groups, axis=(1, 2, 4), keepdims=True)
    x = (groups * lax.rsqrt(variance + spec.norm_eps)).reshape(x.shape)
    return (x * scale + bias).astype(self.dtype)


class Block(nn.Module):
  """Bottleneck block: 1x1, 3x3 with the stride, 1x1; D is the width of the stage, D' of the stage before."""
  spec: ResNetSpec
  index: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry, x, visit, block: str):
    spec, shape = self.spec, self.spec.block(self.index)
    D, mid, first, stride = shape.width, spec.mid(self.index), spec.first(self.index), spec.stride(self.index)
    conv = lambda name, *sizes: Conv(*sizes, standardised=spec.norm == "group", dtype=self.dtype, name=name)
    norm = lambda name, h: Norm(spec, self.dtype, name=name)(h)
    before = lambda name, h: nn.relu(norm(name, h)) if spec.version == 2 else h  # of a convolution
    after = lambda name, h: h if spec.version == 2 else norm(name, h)

    carry, x = visit(carry, f"{block}/in", x, x)                                        # [B, H, W, D']
    carry, h = visit(carry, f"{block}/conv1/in", before("norm1", x), x)                 # [B, H, W, D']
    shortcut = x
    if first and (spec.version == 2 or stride > 1 or x.shape[-1] != D):
      shortcut = after("shortcut_norm", conv("shortcut", D, 1, stride)(h))
    carry, y = visit(carry, f"{block}/conv1", conv("conv1", mid, 1)(h), h)              # [B, H, W, D/4]
    y = nn.relu(norm("norm2" if spec.version == 2 else "norm1", y))
    carry, h = visit(carry, f"{block}/conv2/in", pad(y, 1), y)                          # [B, H+2, W+2, D/4]
    carry, y = visit(carry, f"{block}/conv2", conv("conv2", mid, 3, stride)(h), h)      # [B, H/s, W/s, D/4]
    y = nn.relu(norm("norm3" if spec.version == 2 else "norm2", y))
    carry, h = visit(carry, f"{block}/conv3/in", y, y)                                  # [B, H/s, W/s, D/4]
    carry, y = visit(carry, f"{block}/conv3", conv("conv3", D, 1)(h), h)                # [B, H/s, W/s, D]
    carry, shortcut = visit(carry, f"{block}/shortcut", shortcut, x)                    # [B, H/s, W/s, D]
    carry, y = visit(carry, f"{block}/branch", after("norm3", y), x)                    # [B, H/s, W/s, D]
    out = shortcut + y
    return visit(carry, f"{block}/out", out if spec.version == 2 else nn.relu(out), x)  # carry, [B, H/s, W/s, D]


class ResNet(nn.Module):
  """The fold. `inputs` are normalised images [B, S, S, 3], or the map [B, H, W, D'] entering block `start` if > 0."""
  spec: ResNetSpec
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs, visit=ignore, carry=(), *, start: int = 0, remat_from: int | None = None):
    spec, x = self.spec, inputs.astype(self.dtype)
    if not start:
      carry, x = self.stem(x, visit, carry)                                             # [B, S/4, S/4, D']
    for i in range(start, spec.depth):
      checkpointed = remat_from is not None and i >= remat_from
      block = nn.remat(Block, static_argnums=(3, 4)) if checkpointed else Block
      name = f"block_{i:02d}"
      carry, x = block(spec, i, self.dtype, name=name)(carry, x, visit, name)
    if spec.version == 2:
      carry, x = visit(carry, "norm", nn.relu(Norm(spec, self.dtype, name="norm")(x)), x)
    carry, pooled = visit(carry, "pooled", x.mean(axis=(1, 2)), x)                      # [B, D]
    if spec.classes:
      logits = Dense(spec.classes, dtype=self.dtype, name="head")(pooled)
      carry, _ = visit(carry, "logits", logits, pooled)                                 # [B, classes]
    return pooled, carry

  def stem(self, images, visit, carry):
    spec = self.spec
    side = spec.image_size
    if images.shape[1:] != (side, side, 3):
      raise ValueError(f"images have shape {images.shape}; {spec.name} takes [B, {side}, {side}, 3] here. Resize them, "
                       "or load the weights at their resolution (load_weights(..., image_size=...))")
    standardised = spec.norm == "group"
    conv = Conv(spec.stem_width, 7, 2, standardised, self.dtype, name="stem")
    carry, x = visit(carry, "stem/conv", conv(pad(images, 3)), images)                  # [B, S/2, S/2, D']
    if spec.version == 1:
      x = nn.relu(Norm(spec, self.dtype, name="stem_norm")(x))
    # BiT pads with zeros before it pools, although its stem has no ReLU; the others leave the border out.
    x = nn.max_pool(pad(x, 1, 0.0 if standardised else -jnp.inf), (3, 3), (2, 2))
    return visit(carry, "stem/out", x, images)                                          # carry, [B, S/4, S/4, D']
