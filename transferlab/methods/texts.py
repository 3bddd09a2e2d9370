"""What methods on a CLIP share: texts without their padding, and logits as cosines."""
import jax
import jax.numpy as jnp
import numpy as np


def cut(ids):
  """Ids [P, T] without the tokens behind the end of the longest text, [P, T'].

  The text tower is causal, so that nothing behind the end reaches it: of ViT-B/16's 77 tokens a class prompt has some 8
  and one with CoOp's 16 learned tokens some 24. To be called outside jit. Ids whose values are not known, tracers or
  the zeros that stand for texts where only shapes matter, stay whole.
  """
  if isinstance(ids, jax.core.Tracer) or not np.any(ids):
    return ids
  return ids[:, :int(np.argmax(ids, axis=-1).max()) + 1]


def cosine_logits(image, text, logit_scale):
  """Logits [B, C] float32, exp(logit_scale) times the cosines of images [B, d] and texts [C, d]."""
  return jnp.exp(logit_scale.astype(jnp.float32)) * (unit(image) @ unit(text).T)


def unit(x):
  """Vectors [..., d] of length 1, float32 whatever the backbone computes in."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
