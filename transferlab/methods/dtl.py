"""DTL: disentangled transfer learning, a compact side network that is written back late (Fu et al. 2024, arXiv
2312.07856; heekhero/DTL @ bf6c51e).

A side stream h gathers a low-rank read of the raw residual stream entering each block, h += (z A_i) B_i. After blocks
M … L (numbered from 1) a gated copy joins the stream, z += h * sigmoid(beta * h). The first M blocks see no trainable
value, so nothing is kept for a backward pass through them.
"""
import jax
import jax.numpy as jnp

from transferlab.method import Method, Read
from transferlab.methods import classifier


def dtl(spec, *, rank: int = 2, first_write: int | None = None, beta: float = 100.0, readout: str = "mean") -> Method:
  """DTL.

  Args:
    spec: the backbone's spec.
    rank: R of each block's pair, 2 in the paper for ViT.
    first_write: the paper's M, 1 … L: the first write happens after block M, so block index M is the first whose input
      changes. Default: half the depth plus one, 7 for ViT-B.
    beta: sharpness of the gate; 100 in the paper. Nearly ReLU, but with slope 1/2 at 0, where h starts.
    readout: "mean" pools the patch tokens and then applies the frozen final norm, as the released code does; "cls"
      reads the backbone's own features, as the baselines do.

  Trainable: {"side": {"block_00": {"a": [D, R], "b": [R, D]}, …}, "classifier"}: 36,864 on ViT-B without the
  classifier. A is uniform in ±1/sqrt(D), B zero: training starts from the frozen model. Does not merge: h is a second
  stream.
  """
  D, L, prefix = spec.width, spec.depth, spec.prefix_tokens
  M = L // 2 + 1 if first_write is None else first_write
  if not 1 <= M <= L:
    raise ValueError(f"first_write is {M}; expected 1 to the depth, {L}")
  if not 1 <= rank <= D:
    raise ValueError(f"rank is {rank}; expected 1 to the width, {D}")
  if readout not in ("mean", "cls"):
    raise ValueError(f"readout is {readout!r}; expected 'mean' or 'cls'")

  def init(rng, frozen, num_classes):
    rng_head, *keys = jax.random.split(rng, 1 + L)
    bound = D ** -0.5
    side = {f"block_{i:02d}": {"a": jax.random.uniform(keys[i], (D, rank), minval=-bound, maxval=bound),
                               "b": jnp.zeros((rank, D))} for i in range(L)}
    return {"side": side, "classifier": classifier.init(rng_head, D, num_classes)}, {}

  def visit(trainable, ctx):
    def visitor(h, site, y, x):
      block, _, place = site.partition("/")
      if place == "in":
        pair = trainable["side"][block]
        low = y @ pair["a"] @ pair["b"]                                   # [B, T, D]
        return (low if h is None else h + low), y
      if place == "out" and int(block.rsplit("_", 1)[1]) >= M - 1:
        return h, y + (h * jax.nn.sigmoid(beta * h)).astype(y.dtype)      # [B, T, D]
      if site == "pre_norm" and readout == "mean":
        return h, y[:, prefix:].mean(axis=1, keepdims=True)               # [B, 1, D]
      return h, y
    return visitor

  reads = {}
  if M < spec.depth:  # written behind the last block, no block is left to enter from a cache
    reads = {f"block_{i:02d}/in": Read(f"block_{i:02d}/in") for i in range(M)}
    reads["trunk"] = Read(f"block_{M - 1:02d}/out")
  return Method(
      name="dtl", options={"rank": rank, "first_write": M, "beta": beta, "readout": readout},
      init=init, visit=visit, carry=None, readout=classifier.readout, writes_from=M,
      reads=reads)
