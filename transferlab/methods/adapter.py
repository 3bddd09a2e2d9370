"""Adapter behind the MLP (after Houlsby et al. 2019, arXiv 1902.00751), in the form that VTAB tables report
(ZhangYuanhan-AI/NOAH @ e9c55f3):

    z <- z + A(DropPath(MLP(LN z))),   A(y) = y + W_up q(W_down y + b_down) + b_up,   q(t) = t sigmoid(1.702 t)
"""
import jax
import jax.numpy as jnp

from transferlab import backbones
from transferlab.method import Method
from transferlab.methods import classifier

_STD = 0.02  # of the weights, by NOAH's model-wide initialisation


def adapter(spec, *, dim: int = 8, dropout: float = 0.1, compat: str | None = None) -> Method:
  """A bottleneck in every block, inside the branch of the MLP: it takes what drop-path leaves of the MLP's output.

  Args:
    spec: the backbone's spec.
    dim: width R of the bottleneck.
    dropout: on the bottleneck, behind its activation.
    compat: None starts W_up at zero, so that training starts from the frozen model. "noah" draws both weights from a
      normal of std 0.02, as NOAH's model-wide initialisation does by overwriting the adapter's own.

  Trainable: {"adapter": {"block_00": {"down": {"kernel": [D, R], "bias": [R]}, "up": {"kernel": [R, D], "bias": [D]}},
  …}, "classifier"}: 156,768 on ViT-B without the classifier. Does not merge: the bottleneck is not linear.
  """
  if compat not in (None, "noah"):
    raise ValueError(f"compat is {compat!r}; expected None or 'noah'")
  widths = check_dim(spec, dim)

  def init_block(rng, D):
    down, up = jax.random.split(rng)
    kernel = _STD * jax.random.normal(up, (dim, D)) if compat == "noah" else jnp.zeros((dim, D))
    return {"down": {"kernel": _STD * jax.random.normal(down, (D, dim)), "bias": jnp.zeros(dim)},
            "up": {"kernel": kernel, "bias": jnp.zeros(D)}}

  def init(rng, frozen, num_classes):
    rng_head, *keys = jax.random.split(rng, 1 + spec.depth)
    blocks = {f"block_{i:02d}": init_block(keys[i], D) for i, D in enumerate(widths)}
    return {"adapter": blocks, "classifier": classifier.init(rng_head, spec.width, num_classes)}, {}

  def visit(trainable, ctx):
    def visitor(carry, site, y, x):
      block, _, place = site.partition("/")
      if place != "mlp":
        return carry, y
      down, up = (trainable["adapter"][block][part] for part in ("down", "up"))
      low = backbones.gelu(y @ down["kernel"] + down["bias"], "quick")                       # [B, T, R]
      low = classifier.dropout(block_key(ctx, block), dropout, low, ctx.train)
      return carry, y + (low @ up["kernel"] + up["bias"]).astype(y.dtype)                    # [B, T, D]
    return visitor

  return Method(name="adapter", options={"dim": dim, "dropout": dropout, "compat": compat}, init=init, visit=visit,
                readout=classifier.readout, writes_from=0)


def check_dim(spec, dim: int) -> list[int]:
  """The width of each block, none of which a bottleneck of `dim` exceeds."""
  widths = [spec.block(i).width for i in range(spec.depth)]
  if not 1 <= dim <= min(widths):
    raise ValueError(f"dim is {dim}; expected 1 to the smallest block's width, {min(widths)}")
  return widths


def block_key(ctx, block: str):
  """A key of a block's own, "block_03"; None unless training."""
  return None if ctx.rng is None else jax.random.fold_in(ctx.rng, 1 + int(block.rsplit("_", 1)[1]))
