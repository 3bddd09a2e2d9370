"""DTL: disentangled transfer learning, a compact side network that is written back late (Fu et al. 2024, arXiv
2312.07856; heekhero/DTL @ bf6c51e).

A side stream h gathers a low-rank read of the raw residual stream entering each block, h += (z A_i) B_i. After blocks
M … L (numbered from 1) a gated copy joins the stream, z += h * sigmoid(beta * h); in DTL+ it goes through a depthwise
convolution over the map of patches first, which the class token passes by. The first M blocks see no trainable value,
so nothing is kept for a backward pass through them. In Swin h restarts with every stage.

h is never kept: its reads z A_i [B, T, R] are, and h is the product of all of them side by side with all B_i. It is
formed where it is written, and again in the backward pass. Reads and h are float32 whatever the backbone computes in,
as h is a sum over blocks; what is written takes the stream's type.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transferlab.method import Method, Read
from transferlab.methods import classifier
from transferlab.methods.dtl_conv import depthwise


def dtl(spec, *, rank: int | None = None, first_read: int | None = None, first_write: int | None = None,
        beta: float = 100.0, activation: str = "swish", readout: str = "mean") -> Method:
  """DTL.

  Args:
    spec: the backbone's spec, a ViT or a Swin.
    rank: R of each block's pair. Default: the paper's, 2 for ViT and 4 for Swin.
    first_read: index, from 0, of the first block whose input is read. Default: 0 for ViT; for Swin the first block of
      the second half of its stages, 4 for Swin-B.
    first_write: the paper's M, 1 … L: the first write happens after block M, so block index M is the first whose input
      changes. Default: after half of the blocks that are read and one more, 7 for ViT-B and 15 for Swin-B.
    beta: sharpness of the gate; 100 in the paper. Nearly ReLU, but with slope 1/2 at 0, where h starts.
    activation: "swish", the gate; "identity" writes h itself (the paper's table 5).
    readout: "mean" pools the patch tokens and then applies the frozen final norm, as the released code does; for Swin
      norm comes first, its own order. "cls" reads the backbone's own features, as the baselines do.

  Trainable: {"side": {"block_00": {"a": [D, R], "b": [R, D]}, …}, "classifier"}: 36,864 on ViT-B, 90,112 on Swin-B
  without the classifier. A is uniform in ±1/sqrt(D), B zero: training starts from the frozen model. A block of a stage
  without a write has no pair, as nothing would train it. Does not merge: h is a second stream.

  Raises:
    ValueError: an option is out of range.
  """
  return _side_network("dtl", spec, rank=rank, first_read=first_read, first_write=first_write, beta=beta,
                       activation=activation, readout=readout)


def dtl_plus(spec, *, rank: int | None = None, first_read: int | None = None, first_write: int | None = None,
             beta: float = 100.0, activation: str = "swish", kernel: int = 5, readout: str = "mean") -> Method:
  """DTL+: what is written is convolved over the map of patches, each channel by its own filter.

  Args:
    kernel: side k of the filter. The released scripts choose 3, 4 or 5 per task on VTAB, 3 for few shots and domain
      generalisation, 5 on Swin.
    The others are `dtl`'s.

  Trainable: as in `dtl`, and "stage_0": {"kernel": [k, k, D]} in "side", uniform in ±1/k, one for all blocks of a stage
  that write: 56,064 on ViT-B, 128,512 on Swin-B, without the classifier.
  """
  if kernel < 1:
    raise ValueError(f"kernel is {kernel}; expected 1 or more; without a convolution the method is dtl")
  return _side_network("dtl_plus", spec, rank=rank, first_read=first_read, first_write=first_write, beta=beta,
                       activation=activation, kernel=kernel, readout=readout)


def dtl_plus_star(spec, *, rank: int | None = None, beta: float = 100.0, activation: str = "swish", kernel: int = 5,
                  readout: str = "mean") -> Method:
  """DTL+*: `dtl_plus` that reads from the first block on and writes after every block, M = 1.

  It saves no memory, and on Swin all stages take part: 144,256 on Swin-B without the classifier.
  """
  method = dtl_plus(spec, rank=rank, first_read=0, first_write=1, beta=beta, activation=activation, kernel=kernel,
                    readout=readout)
  fixed = ("first_read", "first_write")
  return method._replace(name="dtl_plus_star", options={k: v for k, v in method.options.items() if k not in fixed})


class _Plan(NamedTuple):
  """A side network on a backbone.

  Fields:
    mean: whether patch tokens are averaged before the final norm.
    kernel: None without a convolution.
    summed: {block that reads: the blocks whose reads make up h there}.
    writers: blocks after which h is written.
  """
  spec: Any
  rank: int
  gate: Callable
  mean: bool
  kernel: int | None
  summed: dict
  writers: range


def _side_network(name: str, spec, *, rank, first_read, first_write, beta, activation, readout, kernel=None) -> Method:
  """The three methods."""
  L, swin, stage = spec.depth, spec.family == "swin", _stages(spec)
  rank = (4 if swin else 2) if rank is None else rank
  first_read = stage.index((stage[-1] + 1) // 2) if first_read is None else first_read
  M = first_read + (L - first_read) // 2 + 1 if first_write is None else first_write
  _check(spec, first_read, M, beta, activation, readout)
  # h restarts with every stage: a read serves if its stage has a write, and h sums the stage's reads.
  readers = [i for i in range(first_read, L) if stage[i] in stage[M - 1:]]
  width = spec.block(readers[0]).width
  if not 1 <= rank <= width:
    raise ValueError(f"rank is {rank}; expected 1 to the width, {width}")
  gate = functools.partial(_swish, beta) if activation == "swish" else _identity
  plan = _Plan(spec, rank, gate, readout == "mean" and not swin, kernel,
               {i: [j for j in readers if stage[j] == stage[i] and j <= i] for i in readers}, range(M - 1, L))

  reads = {}
  if M < L:  # written behind the last block, no block is left to enter from a cache
    reads = {f"{_block(i)}/in": Read(f"{_block(i)}/in") for i in readers if i < M}
    reads["trunk"] = Read(f"{_block(M - 1)}/out")
  options = {"rank": rank, "first_read": first_read, "first_write": M, "beta": beta, "activation": activation,
             **({"kernel": kernel} if kernel else {}), "readout": readout}
  return Method(name=name, options=options, init=functools.partial(_init, plan), carry=(), reads=reads, writes_from=M,
                visit=lambda trainable, ctx: _visitor(plan, trainable["side"]), readout=classifier.readout)


def _init(plan: _Plan, rng, frozen, num_classes: int):
  del frozen
  spec, kernel, stage = plan.spec, plan.kernel, _stages(plan.spec)
  rng_head, *keys = jax.random.split(rng, 1 + spec.depth)
  side = {}
  for i in plan.summed:
    D = spec.block(i).width
    side[_block(i)] = {"a": classifier.uniform(keys[i], (D, plan.rank), D), "b": jnp.zeros((plan.rank, D))}
  for i in sorted({stage.index(stage[j]) for j in plan.writers}) if kernel else ():
    shape = kernel, kernel, spec.block(i).width
    filters = classifier.uniform(jax.random.fold_in(keys[i], 1), shape, kernel * kernel)
    side[f"stage_{stage[i]}"] = {"kernel": filters}
  return {"side": side, "classifier": classifier.init(rng_head, spec.width, num_classes)}, {}


def _visitor(plan: _Plan, side: dict):
  """Its carry is the reads of the stage so far, [B, T, R] each."""
  reading = {f"{_block(i)}/in": i for i in plan.summed}
  writing = {f"{_block(i)}/out": i for i in plan.writers}
  def visit(lows, site, y, x):
    del x
    if site in reading:
      i = reading[site]
      low = y.astype(jnp.float32) @ side[_block(i)]["a"]                         # [B, T, R]
      return (low,) if plan.summed[i] == [i] else (*lows, low), y
    if site in writing:
      i, shape = writing[site], plan.spec.block(writing[site])
      bs = [side[_block(j)]["b"] for j in plan.summed[i]]
      filters = side[f"stage_{shape.stage}"]["kernel"] if plan.kernel else None
      return lows, y + _written(lows, bs, filters, plan.gate, shape.grid).astype(y.dtype)
    if site == "pre_norm" and plan.mean:
      return lows, y[:, plan.spec.prefix_tokens:].mean(axis=1, keepdims=True)    # [B, 1, D]
    return lows, y
  return visit


def _check(spec, first_read: int, first_write: int, beta: float, activation: str, readout: str) -> None:
  L = spec.depth
  if not 0 <= first_read < L:
    raise ValueError(f"first_read is {first_read}; expected 0 to the last block, {L - 1}")
  if not first_read < first_write <= L:
    raise ValueError(f"first_write is {first_write}; expected {first_read + 1} to the depth, {L}, with first_read "
                     f"{first_read}")
  if not beta > 0:
    raise ValueError(f"beta is {beta}; expected a number above 0")
  if activation not in ("swish", "identity"):
    raise ValueError(f"activation is {activation!r}; expected 'swish' or 'identity'")
  if readout not in ("mean", "cls"):
    raise ValueError(f"readout is {readout!r}; expected 'mean' or 'cls'")
  if readout == "cls" and spec.family == "swin":
    raise ValueError(f"readout is 'cls' and {spec.name} has no class token; expected 'mean'")


def _block(index: int) -> str:
  return f"block_{index:02d}"


def _stages(spec) -> list[int]:
  """The stage of every block."""
  return [spec.block(i).stage for i in range(spec.depth)]


def _swish(beta: float, h):
  return h * jax.nn.sigmoid(beta * h)


def _identity(h):
  return h


@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _written(lows, bs, filters, gate, grid: tuple[int, int]):
  """What joins the stream [B, T, D] from reads [B, T, R] and their B's [R, D]; the backward pass finds these alone."""
  u = gate(jnp.concatenate(lows, axis=-1) @ jnp.concatenate(bs))          # [B, T, D]
  if filters is None:
    return u
  (B, T, D), (rows, columns) = u.shape, grid
  prefix = T - rows * columns
  patches = depthwise(u[:, prefix:].reshape(B, rows, columns, D), filters)
  return jnp.concatenate([u[:, :prefix], patches.reshape(B, -1, D)], axis=1)
