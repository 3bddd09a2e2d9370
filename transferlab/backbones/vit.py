"""Vision Transformer as a fold over named sites (Dosovitskiy et al. 2021, arXiv 2010.11929).

Every place of interest is one line, `carry, y = visit(carry, site, y, x)`: `y` is what the operation put out and `x`
what it took in. A visitor may look, return another `y`, or hand a value on in `carry`. Sites, in order:

    patch  embed  embed_norm  block_00/{in ln1 qkv bias proj attn mid ln2 fc1 fc2 mlp out}  block_01/…
    pre_norm  norm  pooled

`attn` and `mlp` are the branches as they join the residual stream (drop-path acts there); `proj` and `fc2` the same
values as outputs of their dense layers. `bias` is the additive attention bias: a text tower's causal mask, else None
unless a visitor supplies one. `embed_norm` is there where the spec has that norm, as CLIP's. A visitor at `pre_norm`
may return [B, 1, D], which is then normalised and used as the feature.

Speed on CPU decides three things here: attention runs as explicit einsums in [B, H, T, d], dense layers run on
[B*T, D], and GELU uses erf, not erfc. Memory decides what the backward pass finds: the input of a GELU and of a norm,
from which it computes the rest again, and the attention weights. For ViT-B/16 at batch 32 on CPU, temporaries of `full`
fall from 7957 to 4783 MiB and of `dtl` from 3737 to 2077, and a block with its gradients takes 8 % less CPU time.
"""
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from transferlab.backbones.gathering import meet
from transferlab.backbones.spec import ViTSpec


def ignore(carry, site, y, x):
  """The visitor that does nothing."""
  del site, x
  return carry, y


@functools.partial(jax.checkpoint, static_argnums=1)
def gelu(x, form: str):
  """GELU in the form the weights were trained with: exact ("erf"), "tanh", or CLIP's "quick"."""
  if form == "erf":
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))
  return jax.nn.gelu(x, approximate=True) if form == "tanh" else x * jax.nn.sigmoid(1.702 * x)


@jax.custom_vjp
def softmax(x):
  """Softmax of the last axis in float32, whose backward pass needs the result alone. Left to itself XLA keeps the
  exponentials and their sums, spread out to x's shape, beside it: 1365 MiB of the 7957 above."""
  return jax.nn.softmax(x.astype(jnp.float32), axis=-1)


def _softmax_forward(x):
  y = softmax(x)
  return y, (y, jnp.zeros((), x.dtype))


def _softmax_backward(saved, gradient):
  y, like = saved
  inner = jnp.sum(y * gradient, axis=-1, keepdims=True)
  return ((y * (gradient - inner)).astype(like.dtype),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def attention(qkv, heads: int, bias):
  """Multi-head self-attention of fused projections.

  Args:
    qkv: [B, T, 3D], columns ordered q, k, v, then head.
    heads: number of heads H.
    bias: None, or an additive bias broadcastable to [B, H, T, T].

  Returns:
    [B, T, D], heads side by side.
  """
  B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
  q, k, v = qkv.reshape(B, T, 3, heads, D // heads).transpose(2, 0, 3, 1, 4)  # 3 x [B, H, T, d]
  scores = jnp.einsum("bhqd,bhkd->bhqk", q * (D // heads) ** -0.5, k)         # [B, H, T, T]
  if bias is not None:
    scores = scores + bias
  weights = softmax(scores).astype(v.dtype)
  return jnp.einsum("bhqk,bhkd->bhqd", weights, v).transpose(0, 2, 1, 3).reshape(B, T, D)


@functools.partial(jax.checkpoint, static_argnums=3)
def normalise(x, scale, bias, eps: float):
  """Layer norm of the last axis. The variance is taken of x - mean, since E[x^2] - E[x]^2 loses digits."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * (lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale) + bias


class LayerNorm(nn.Module):
  """Layer norm with a scale and a bias."""
  eps: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return normalise(x, scale, bias, self.eps).astype(self.dtype)


class Dense(nn.Module):
  """Linear map of the last axis, computed on a matrix."""
  features: int
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), unbox=False)
    kernel = jax.tree.map(lambda leaf: leaf.astype(self.dtype), kernel)  # before it is gathered
    y = meet(jnp.matmul, x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


class Block(nn.Module):
  """Pre-norm transformer block."""
  spec: ViTSpec
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry, x, visit, block: str, bias=None):
    spec, dtype = self.spec, self.dtype
    norm = lambda name: LayerNorm(spec.norm_eps, dtype, name=name)
    D = spec.width

    carry, x = visit(carry, f"{block}/in", x, x)                                                   # [B, T, D]
    h = norm("ln1")(x)
    carry, h = visit(carry, f"{block}/ln1", h, x)                                                  # [B, T, D]
    carry, qkv = visit(carry, f"{block}/qkv", Dense(3 * D, spec.qkv_bias, dtype, name="qkv")(h), h)  # [B, T, 3D]
    carry, bias = visit(carry, f"{block}/bias", bias, h)
    a = attention(qkv, spec.heads, bias)                                                           # [B, T, D]
    carry, y = visit(carry, f"{block}/proj", Dense(D, dtype=dtype, name="proj")(a), a)             # [B, T, D]
    carry, y = visit(carry, f"{block}/attn", y, x)                                                 # [B, T, D]
    carry, mid = visit(carry, f"{block}/mid", x + y, x)                                            # [B, T, D]

    h = norm("ln2")(mid)
    carry, h = visit(carry, f"{block}/ln2", h, mid)                                                # [B, T, D]
    carry, f = visit(carry, f"{block}/fc1", Dense(spec.mlp_width, dtype=dtype, name="fc1")(h), h)  # [B, T, 4D]
    g = gelu(f, spec.gelu)
    carry, y = visit(carry, f"{block}/fc2", Dense(D, dtype=dtype, name="fc2")(g), g)               # [B, T, D]
    carry, y = visit(carry, f"{block}/mlp", y, mid)                                                # [B, T, D]
    return visit(carry, f"{block}/out", mid + y, mid)                                              # carry, [B, T, D]


def embed_patches(images, kernel, bias, spec):
  """Images [B, S, S, 3] as tokens [B, T, D], one per patch in rows; kernel [p, p, 3, D]."""
  B, p, (rows, columns), D = images.shape[0], spec.patch_size, spec.grid, kernel.shape[-1]
  if images.shape[1:] != (rows * p, columns * p, 3):
    raise ValueError(f"images have shape {images.shape}; {spec.name} takes [B, {rows * p}, {columns * p}, 3]. "
                     "Resize them, or load the weights at their resolution (load_weights(..., image_size=...))")
  x = images.reshape(B, rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B * rows * columns, p * p * 3)
  return (x @ kernel.reshape(-1, D).astype(x.dtype) + bias.astype(x.dtype)).reshape(B, rows * columns, D)


class ViT(nn.Module):
  """The fold. `inputs` are normalised images [B, S, S, 3], or tokens [B, T, D] entering block `start` if start > 0."""
  spec: ViTSpec
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs, visit=ignore, carry=(), *, start: int = 0, remat_from: int | None = None):
    spec = self.spec
    if start:
      x = inputs.astype(self.dtype)
    else:
      carry, x = self.embed(inputs.astype(self.dtype), visit, carry)  # [B, T, D]
    for i in range(start, spec.depth):
      checkpointed = remat_from is not None and i >= remat_from
      block = nn.remat(Block, static_argnums=(3, 4)) if checkpointed else Block
      name = f"block_{i:02d}"
      carry, x = block(spec, self.dtype, name=name)(carry, x, visit, name)
    return self.pool(x, visit, carry)

  def embed(self, images, visit, carry):
    spec, p, B, D = self.spec, self.spec.patch_size, images.shape[0], self.spec.width
    kernel = self.param("patch_kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), (p, p, 3, D))
    bias = self.param("patch_bias", nn.initializers.zeros, (D,)) if spec.patch_bias else jnp.zeros((D,))
    x = embed_patches(images, kernel, bias, spec)
    carry, x = visit(carry, "patch", x, images)                       # [B, T-1, D]
    if spec.class_token:
      cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, D))
      x = jnp.concatenate([jnp.broadcast_to(cls, (B, 1, D)).astype(x.dtype), x], axis=1)
    pos = self.param("pos", nn.initializers.normal(0.02), (1, spec.tokens, D))
    carry, x = visit(carry, "embed", x + pos.astype(x.dtype), x)      # [B, T, D]
    if not spec.embed_norm:
      return carry, x
    norm = LayerNorm(spec.norm_eps, self.dtype, name="embed_norm")
    return visit(carry, "embed_norm", norm(x), x)                     # carry, [B, T, D]

  def pool(self, x, visit, carry):
    spec = self.spec
    carry, x = visit(carry, "pre_norm", x, x)                         # [B, T, D] or [B, 1, D]
    if spec.pool == "mean_before_norm" and x.shape[1] > 1:
      x = x[:, spec.prefix_tokens:].mean(axis=1, keepdims=True)
    norm = LayerNorm(spec.norm_eps, self.dtype, name="norm")
    carry, x = visit(carry, "norm", norm(x), x)                       # [B, T, D] or [B, 1, D]
    single = x.shape[1] == 1 or spec.pool == "cls"
    pooled = x[:, 0] if single else x[:, spec.prefix_tokens:].mean(axis=1)
    carry, pooled = visit(carry, "pooled", pooled, x)                 # [B, D]
    return pooled, carry
