"""CLIP as a fold over named sites: an image tower, then a text tower (Radford et al. 2021, openai/CLIP model.py).

Sites, in order; those of `vit.py` under "image/", and the text tower's:

    image/{patch embed embed_norm block_00/… pre_norm norm pooled projected}
    text/{embed block_00/… norm pooled projected}

The image tower runs first, so that a text visitor may use what the carry took from images. `text/embed` are the tokens'
embeddings before positions are added: prompts enter there, in place of placeholders, because the end of a text is found
in the ids. `text/block_00/bias` is the causal mask. `projected` are the un-normalised vectors in the joint space.
"""
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from transferlab.backbones.clip_spec import CLIPSpec, TextSpec
from transferlab.backbones.gathering import meet
from transferlab.backbones.vit import Block, Dense, LayerNorm, ViT, ignore


class Towers(NamedTuple):
  """Something of each tower: what enters, or what comes out.

  Inputs: images [B, S, S, 3], or tokens [B, T, D] that enter block `start`; token ids [P, T] int32. Either may be None,
  and its tower then does not run. Features: projections [B, d] and [P, d], not normalised.
  """
  image: Any = None
  text: Any = None


def under(tower: str, visit):
  """A visitor for the fold of one tower, which knows its sites without the tower's name."""
  return lambda carry, site, y, x: visit(carry, f"{tower}/{site}", y, x)


class TextTower(nn.Module):
  """The fold over a text's tokens, ids [P, T] of at most `context` tokens."""
  spec: TextSpec
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids, visit=ignore, carry=(), remat: bool = False):
    spec, D, T = self.spec, self.spec.width, ids.shape[1]
    table = self.param("tokens", nn.initializers.normal(0.02), (spec.vocabulary, D), unbox=False)
    x = meet(lambda ids, table: table[ids], ids, table).astype(self.dtype)
    carry, x = visit(carry, "embed", x, ids)                                               # [P, T, D]
    pos = self.param("pos", nn.initializers.normal(0.01), (spec.context, D))
    x = x + pos[:T].astype(x.dtype)
    causal = jnp.where(jnp.tril(jnp.ones((T, T), bool)), 0.0, -jnp.inf)[None, None]        # [1, 1, T, T]
    block = nn.remat(Block, static_argnums=(3, 4)) if remat else Block
    for i in range(spec.depth):
      name = f"block_{i:02d}"
      carry, x = block(spec, self.dtype, name=name)(carry, x, visit, name, causal)
    norm = LayerNorm(spec.norm_eps, self.dtype, name="norm")
    carry, x = visit(carry, "norm", norm(x), x)                                            # [P, T, D]
    carry, pooled = visit(carry, "pooled", at_end(x, ids), x)                              # [P, D]
    return pooled, carry


def at_end(x, ids):
  """The tokens x [P, T, D] at the ends of their texts, [P, D]. The end's id is the largest of the vocabulary, and it is
  looked for in the ids, whatever a visitor has put in their place."""
  return x[jnp.arange(len(ids)), jnp.argmax(ids, axis=-1)]


class CLIP(nn.Module):
  """The fold over both towers. `inputs` are `Towers`, or images alone."""
  spec: CLIPSpec
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs, visit=ignore, carry=(), *, start: int = 0, remat_from: int | None = None):
    spec, dtype = self.spec, self.dtype
    images, ids = inputs if isinstance(inputs, Towers) else (inputs, None)
    image = text = None
    if images is not None:
      tower = ViT(spec.image, dtype, name="image")
      image, carry = tower(images, under("image", visit), carry, start=start, remat_from=remat_from)
      image = Dense(spec.embed_width, False, dtype, name="image_projection")(pooled := image)
      carry, image = visit(carry, "image/projected", image, pooled)                        # [B, d]
    if ids is not None:
      tower = TextTower(spec.text, dtype, name="text")
      text, carry = tower(ids, under("text", visit), carry, remat_from is not None)
      text = Dense(spec.embed_width, False, dtype, name="text_projection")(pooled := text)
      carry, text = visit(carry, "text/projected", text, pooled)                           # [P, d]
    if self.is_initializing():  # of cosines; what multiplies them is its exponential
      self.param("logit_scale", nn.initializers.constant(jnp.log(1 / 0.07)), ())
    return Towers(image, text), carry
