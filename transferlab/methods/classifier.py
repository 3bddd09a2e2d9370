"""The classifier: the last linear map to the C logits. Every method trains one; the papers' "#param" leaves it out."""
import jax
import jax.numpy as jnp


def init(rng, width: int, num_classes: int) -> dict:
  """{"kernel": [D, C] normal of std 0.02, "bias": [C] zeros}, as DTL, SSF and NOAH start theirs."""
  return {"kernel": 0.02 * jax.random.normal(rng, (width, num_classes)), "bias": jnp.zeros((num_classes,))}


def apply(classifier: dict, features):
  """[B, D] -> logits [B, C], float32 whatever the backbone computes in."""
  return features.astype(jnp.float32) @ classifier["kernel"] + classifier["bias"]


def readout(trainable, features, carry, ctx):
  """The read-out of every method that classifies the backbone's own features."""
  del carry, ctx
  return apply(trainable["classifier"], features)


def uniform(rng, shape, fan_in: int):
  """Numbers as torch.nn.Linear starts a layer of `fan_in` inputs, uniform within 1 / sqrt(fan_in)."""
  bound = fan_in ** -0.5  # Kaiming-uniform with a = sqrt(5)
  return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)


def dropout(rng, rate: float, x, train: bool):
  """Inverted dropout; does nothing unless training."""
  if not train or not rate:
    return x
  return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))
