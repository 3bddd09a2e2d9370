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
