"""Losses over a padded batch: `weight` 0 marks rows that do not count, so sums are divided by the weights' sum."""
import jax.numpy as jnp
import optax


def targets(batch: dict, num_classes: int, smoothing: float = 0.0):
  """Target distributions [B, C]: the batch's own `soft_label` if it has one, else its smoothed labels."""
  if "soft_label" in batch:
    return batch["soft_label"]
  one_hot = jnp.asarray(batch["label"][:, None] == jnp.arange(num_classes), jnp.float32)  # [B, C]
  return optax.smooth_labels(one_hot, smoothing) if smoothing else one_hot


def cross_entropy(logits, batch: dict):
  """Mean cross-entropy of logits [B, C] against `batch["target"]` [B, C], weighted by `batch["weight"]` [B]."""
  each = optax.softmax_cross_entropy(logits, batch["target"])  # [B]
  return jnp.sum(each * batch["weight"]) / jnp.maximum(jnp.sum(batch["weight"]), 1e-12)
