"""MLP-3: three dense layers on one activation of the frozen backbone, a baseline of InCA (Dukler et al. 2023).

That the paper has such a baseline is recalled, and confirmed by nothing read. Our choices: the same activation as the
linear probe's, GELU between the layers, the activation's own width, no norm, no dropout, initial values.
"""
import jax
import jax.numpy as jnp

from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods.linear import feature


def mlp3(spec, *, site: str = "pooled", tokens: str = "cls") -> Method:
  """Two hidden layers and the classifier, logits = W3 gelu(W2 gelu(W1 x + b1) + b2) + b3.

  Args:
    spec: the backbone's spec.
    site, tokens: what is read, [B, D]; as of `linear`.

  Trainable: {"hidden": {"0", "1": {"kernel": [D, D] Xavier-uniform, "bias": [D] zeros}}, "classifier"}, that is
  2 D (D + 1) parameters without the classifier. Does not merge.
  """
  read, width = feature(spec, site, tokens)

  def init(rng, frozen, num_classes):
    keys = jax.random.split(rng, 3)
    matrix = jax.nn.initializers.glorot_uniform()
    hidden = {str(i): {"kernel": matrix(keys[i], (width, width)), "bias": jnp.zeros(width)} for i in range(2)}
    return {"hidden": hidden, "classifier": classifier.init(keys[2], width, num_classes)}, {}

  def readout(trainable, features, carry, ctx):
    x = carry["features"].astype(jnp.float32)                                  # [B, D]
    for name in ("0", "1"):
      layer = trainable["hidden"][name]
      x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"], approximate=False)  # [B, D]
    return classifier.apply(trainable["classifier"], x)

  return Method(name="mlp3", options={"site": site, "tokens": tokens}, init=init, readout=readout,
                reads={"features": read}, writes_from=spec.depth)
