"""Structured pruning: a narrow copy of a ViT's blocks, made of the rows and columns that carry most weight.

The paper (Sung et al. 2022, arXiv 2206.06522) starts its side network from a pruned backbone and ranks by Fisher
information or by magnitude; the released code, for other networks than ViTs, walks from layer to layer, keeps what has
the largest L1 norm, q, k and v alike, and chooses anew after every layer, so that what is kept of a residual stream
changes along it. Ours: what is ranked is a dimension, by the L1 norm of all weights that lead into it or out of it.

* Of the residual stream the same dimensions are kept throughout the network, ranked over all blocks given.
* Every head keeps as many of its own dimensions, the same in q, k and v; their weights outside of the kept stream do
  not count. So with the MLP's hidden dimensions.

What is kept stays in its order; of equal ones the first is kept.
"""
import functools

import jax
import jax.numpy as jnp


def prune(params: dict, names: list[str], heads: int, reduction: int) -> dict:
  """A pruned copy of some blocks and of the final norm.

  Args:
    params: a ViT's parameters.
    names: of the blocks.
    heads: number of heads H, which stays.
    reduction: by which the widths of the stream, of a head and of the MLP are divided; it divides each.

  Returns:
    {"side": {block: parameters, as the backbone's}, "norm": {"scale": [d], "bias": [d]}}, float32.
  """
  stream = _largest(sum(_stream_weight(params[name]) for name in names), reduction)  # [d]
  return {"side": {name: _block(params[name], stream, heads, reduction) for name in names},
          "norm": _rows(params["norm"], stream)}


def _norm_of(weights, axis):
  """L1 norm over some axes."""
  return jnp.sum(jnp.abs(jnp.asarray(weights, jnp.float32)), axis=axis)


@jax.jit
def _stream_weight(block: dict):
  """[D], of what a block reads from each dimension of the stream and writes into it."""
  return (_norm_of(block["qkv"]["kernel"], 1) + _norm_of(block["fc1"]["kernel"], 1) +
          _norm_of(block["proj"]["kernel"], 0) + _norm_of(block["fc2"]["kernel"], 0))


def _largest(weights, reduction: int):
  """Places of the largest N / reduction of […, N], in their order."""
  return jnp.sort(jax.lax.top_k(weights, weights.shape[-1] // reduction)[1], axis=-1)


def _rows(layer: dict, kept) -> dict:
  return {name: jnp.asarray(leaf, jnp.float32)[kept] for name, leaf in layer.items()}


@functools.partial(jax.jit, static_argnums=(2, 3))  # compiled once for all blocks
def _block(block: dict, stream, heads: int, reduction: int) -> dict:
  """One block, pruned; `stream` [d] are the kept dimensions of the residual stream."""
  part = lambda layer, leaf, *shape: jnp.asarray(block[layer][leaf], jnp.float32).reshape(*shape)
  D, d = len(block["proj"]["bias"]), len(stream)
  qkv = part("qkv", "kernel", D, 3, heads, -1)[stream]                      # [d, 3, H, D/H]
  proj = part("proj", "kernel", heads, D // heads, D)[:, :, stream]         # [H, D/H, d]
  inner = _largest(_norm_of(qkv, (0, 1)) + _norm_of(proj, 2), reduction)    # [H, d/H]
  fc1, fc2 = part("fc1", "kernel", D, -1)[stream], part("fc2", "kernel", -1, D)[:, stream]
  hidden = _largest(_norm_of(fc1, 0) + _norm_of(fc2, 1), reduction)

  pruned = {
      "ln1": _rows(block["ln1"], stream), "ln2": _rows(block["ln2"], stream),
      "qkv": {"kernel": jnp.take_along_axis(qkv, inner[None, None], axis=3).reshape(d, 3 * d)},
      "proj": {"kernel": jnp.take_along_axis(proj, inner[:, :, None], axis=1).reshape(d, d),
               "bias": part("proj", "bias", D)[stream]},
      "fc1": {"kernel": fc1[:, hidden], "bias": part("fc1", "bias", -1)[hidden]},
      "fc2": {"kernel": fc2[hidden], "bias": part("fc2", "bias", D)[stream]}}
  if "bias" in block["qkv"]:
    bias = part("qkv", "bias", 3, heads, -1)
    pruned["qkv"]["bias"] = jnp.take_along_axis(bias, inner[None], axis=2).reshape(3 * d)
  return pruned
