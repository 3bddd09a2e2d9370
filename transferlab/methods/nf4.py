"""NF4: frozen kernels in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314; laid out as bitsandbytes does).

A row of a kernel is cut into blocks of 64 numbers. Of each block its largest magnitude is kept, and of each number the
nearest of 16 levels between -1 and 1, the quantiles of a normal: 4 bits, two numbers in a byte. Double quantisation
then stores the magnitudes, less their mean, in 8 bits: the nearest of 256 levels that lie densest around 0 (a "dynamic"
map, Dettmers 2016, arXiv 1511.04561), times the largest of 256 neighbours. That is 4.13 bits a number for float32's 32.

`dense` makes the kernel anew in the forward and in the backward pass, so that it is nowhere kept as floats.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK, GROUP = 64, 256  # numbers that share a magnitude; magnitudes that share a scale

# Appendix E of the paper.
LEVELS = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def _dynamic_levels() -> np.ndarray:
  """The 256 levels of magnitudes, ascending: of each sign 2^i in the i-th of seven decades, at the centres of as many
  equal parts of its upper nine tenths; with them 0 and 1."""
  centres = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2 ** i) + 0.5) / 2 ** i) for i in range(7)]
  positive = np.concatenate(centres)
  return np.sort(np.concatenate([-positive, [0.0], positive, [1.0]])).astype(np.float32)


DYNAMIC_LEVELS = _dynamic_levels()


@functools.partial(jax.jit, static_argnames="parts")
def quantise(kernel, parts: int = 1) -> dict:
  """A kernel [I, O] in 4 bits; I O a multiple of 64 times `parts`, I even.

  Args:
    parts: matrices that lie side by side in the kernel, as q, k and v do; each has its own mean magnitude.

  Returns:
    {"codes": uint8 [O, I / 2], the first of two numbers in the high bits, in the order of torch's (out, in) weights;
    "magnitudes": uint8 [parts, M] of blocks; "scales": float32 [parts, ceil(M / 256)]; "offset": float32 [parts, 1]}.
  """
  I, O = kernel.shape
  if I % 2 or I * O % (BLOCK * parts):
    raise ValueError(f"a kernel of {I} x {O} does not cut into {parts} x blocks of {BLOCK} numbers; use base='none'")
  blocks = kernel.T.astype(jnp.float32).reshape(-1, BLOCK)                        # [parts M, 64]
  largest = jnp.max(jnp.abs(blocks), axis=1)                                      # [parts M]
  codes = _nearest(LEVELS, blocks / _not_zero(largest)[:, None]).reshape(O, I // 2, 2)
  magnitudes = largest.reshape(parts, -1)                                         # [parts, M]
  offset = jnp.mean(magnitudes, axis=1, keepdims=True)
  M = magnitudes.shape[1]
  centred = jnp.pad(magnitudes - offset, ((0, 0), (0, -M % GROUP))).reshape(parts, -1, GROUP)
  scales = jnp.max(jnp.abs(centred), axis=2)                                      # [parts, ceil(M / 256)]
  stored = _nearest(DYNAMIC_LEVELS, centred / _not_zero(scales)[..., None]).reshape(parts, -1)[:, :M]
  return {"codes": codes[..., 0] << 4 | codes[..., 1], "magnitudes": stored, "scales": scales, "offset": offset}


def dequantise(packed: dict):
  """What `quantise` keeps of a kernel [I, O], as float32 [O, I]."""
  codes, stored = packed["codes"], packed["magnitudes"]
  levels = jnp.asarray(LEVELS)[jnp.stack([codes >> 4, codes & 15], axis=-1)]      # [O, I / 2, 2]
  scales = jnp.repeat(packed["scales"], GROUP, axis=1)[:, :stored.shape[1]]
  magnitudes = jnp.asarray(DYNAMIC_LEVELS)[stored] * scales + packed["offset"]    # [parts, M]
  return (levels.reshape(-1, BLOCK) * magnitudes.reshape(-1, 1)).reshape(len(codes), -1)


def shape(packed: dict) -> tuple[int, int]:
  """(I, O) of a quantised kernel."""
  O, half = packed["codes"].shape
  return 2 * half, O


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(dtype, x, packed: dict, bias):
  """x W + b with a quantised kernel W.

  Args:
    dtype: that x and W are rounded to and multiplied in, as is the result; sums are in float32.
    x: inputs [..., I].
    packed: of `quantise`; frozen, like the bias no gradient is computed.
    bias: [O], or None.

  Returns:
    [..., O] in `dtype`.
  """
  packed, x = lax.optimization_barrier((packed, x))  # else XLA makes the kernels of all layers at once, to begin with
  y = _product(x, dequantise(packed), dtype, contract=1)
  return (y if bias is None else y + bias).astype(dtype)


def _dense_forward(dtype, x, packed, bias):
  return dense(dtype, x, packed, bias), (packed, jnp.zeros((), x.dtype))


def _dense_backward(dtype, saved, dy):
  (packed, like), dy = lax.optimization_barrier((saved, dy))  # else the forward pass keeps its own until now
  return _product(dy, dequantise(packed), dtype, contract=0).astype(like.dtype), None, None


dense.defvjp(_dense_forward, _dense_backward)


def _product(x, weight, dtype, contract: int):
  """x [..., n] times weight [O, I] over its axis `contract`, of matrices, rounded to `dtype` first; float32."""
  flat = x.reshape(-1, x.shape[-1]).astype(dtype)
  dimensions = (((1,), (contract,)), ((), ()))
  y = lax.dot_general(flat, weight.astype(dtype), dimensions, preferred_element_type=jnp.float32)
  return y.reshape(*x.shape[:-1], -1)


def _nearest(levels: np.ndarray, x):
  """Index of the nearest of ascending levels, the lower one of two that are as near; uint8."""
  return jnp.searchsorted(jnp.asarray((levels[:-1] + levels[1:]) / 2), x).astype(jnp.uint8)


def _not_zero(x):
  return jnp.where(x == 0, 1, x)  # a block of zeros is zeros divided by anything
