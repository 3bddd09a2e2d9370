"""Losses over a padded batch: `weight` 0 marks rows that do not count, so sums are divided by the weights' sum."""
import jax
import jax.numpy as jnp
import optax


def targets(batch: dict, num_classes: int):
  """Targets [B, C]: the batch's own `soft_label` if its labels are mixed or smoothed, else one-hot labels."""
  if "soft_label" in batch:
    return batch["soft_label"]
  return jax.nn.one_hot(batch["label"], num_classes)  # [B, C]


def cross_entropy(logits, batch: dict):
  """Mean cross-entropy of logits [B, C] against `batch["target"]` [B, C], weighted by `batch["weight"]` [B]."""
  each = optax.softmax_cross_entropy(logits, batch["target"])  # [B]
  return jnp.sum(each * batch["weight"]) / jnp.maximum(jnp.sum(batch["weight"]), 1e-12)


# Penalties of a kernel [N, C]. Gradients at zeros are zero, neither NaN nor the 1 that jax gives |x| there.

def l1(kernel):
  """Sum of |w|."""
  return jnp.sum(kernel * jnp.sign(kernel))


def l2(kernel):
  """Sum of w^2, without a half."""
  return jnp.sum(kernel * kernel)


def l21(kernel):
  """Group lasso: the sum over rows of their norms (Yuan & Lin 2006). A row whose squares are all 0 in its dtype, below
  about 1e-23 in float32, counts as zero and gets gradient zero."""
  squares = jnp.sum(kernel * kernel, axis=-1)
  alive = squares > 0
  return jnp.sum(jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1)), 0))


PENALTIES = {"none": lambda kernel: 0.0, "l1": l1, "l2": l2, "l21": l21}
