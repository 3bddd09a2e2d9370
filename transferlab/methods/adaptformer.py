"""AdaptFormer: a bottleneck beside the MLP (Chen et al. 2022, arXiv 2205.13535; ShoufaChen/AdaptFormer,
models/vit_image.py):

    z <- z + DropPath(MLP(LN z)) + s (W_up dropout(relu(W_down z + b_down)) + b_up)

The bottleneck reads the residual stream before the norm, its bias is scaled by s too, and drop-path leaves it alone.
The released runs on images also put a batch norm without parameters before the classifier; VTAB tables do not.
"""
import jax
import jax.numpy as jnp

from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods.adapter import block_key, check_dim


def adaptformer(spec, *, dim: int = 8, scale: float = 0.1, dropout: float = 0.1, bias: bool = True) -> Method:
  """AdaptFormer in every block.

  Args:
    spec: the backbone's spec.
    dim: width R of the bottleneck.
    scale: the factor s (JieShibo/PETL-ViT chooses it per task from 0.01 to 10).
    dropout: on the bottleneck, behind its activation.
    bias: False leaves both biases out, as PETL-ViT does: 147,456 parameters on ViT-B.

  Trainable: {"adaptformer": {"block_00": {"down": {"kernel": [D, R], "bias": [R]}, "up": {"kernel": [R, D], "bias":
  [D]}}, …}, "classifier"}: 156,768 on ViT-B without the classifier. W_down is Kaiming-uniform, the rest zero: training
  starts from the frozen model. Does not merge: the bottleneck is not linear.
  """
  widths = check_dim(spec, dim)

  def init_block(rng, D):
    down = {"kernel": classifier.uniform(rng, (D, dim), D)}
    up = {"kernel": jnp.zeros((dim, D))}
    if bias:
      down["bias"], up["bias"] = jnp.zeros(dim), jnp.zeros(D)
    return {"down": down, "up": up}

  def init(rng, frozen, num_classes):
    rng_head, *keys = jax.random.split(rng, 1 + spec.depth)
    blocks = {f"block_{i:02d}": init_block(keys[i], D) for i, D in enumerate(widths)}
    return {"adaptformer": blocks, "classifier": classifier.init(rng_head, spec.width, num_classes)}, {}

  def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"] if bias else x @ layer["kernel"]

  def visit(trainable, ctx):
    def visitor(carry, site, y, x):
      block, _, place = site.partition("/")
      if place != "mlp":
        return carry, y
      layers = trainable["adaptformer"][block]
      low = jax.nn.relu(dense(layers["down"], x))                                            # [B, T, R]
      low = classifier.dropout(block_key(ctx, block), dropout, low, ctx.train)
      return carry, y + (scale * dense(layers["up"], low)).astype(y.dtype)                   # [B, T, D]
    return visitor

  options = {"dim": dim, "scale": scale, "dropout": dropout, "bias": bias}
  return Method(name="adaptformer", options=options, init=init, visit=visit, readout=classifier.readout, writes_from=0)
