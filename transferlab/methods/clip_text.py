"""What methods on both towers of a CLIP share: class prompts, features of texts, and logits as cosines.

Texts lie by class: of T templates, rows c T … c T + T - 1 are those of class c.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, prompts
from transferlab.backbones import Towers
from transferlab.method import Prompts, Read

SLOT = "prompts"  # of class prompts, in what `Method.prompts` gives and in a state
CHUNK = 128       # texts that run through the tower at once where that is done once per run; bounds its memory


def class_prompts(spec, templates: tuple) -> Prompts:
  """The texts of every class, {SLOT: [C T strings]}; raises what `prompts.fill` does."""
  return Prompts(lambda names: {SLOT: prompts.fill(templates, names)}, spec.context)


def cut(ids):
  """Ids [P, T] without what stands behind the end of the longest text, which changes nothing, the attention being
  causal: class prompts are some 10 tokens of 77. Ids whose ends are not known, traced ones and the zeros that stand for
  texts where only shapes matter, stay as long as they are."""
  if isinstance(ids, jax.core.Tracer) or not np.any(ids):
    return ids
  ids = np.asarray(ids)
  return ids[:, :int(ids.argmax(axis=-1).max()) + 1]


def collect_nothing(frozen, ids):
  """The visitor of `encode` that leaves a text tower as it is."""
  del frozen, ids
  return backbones.ignore


def encode(spec, frozen, ids, make_visit=collect_nothing, chunk: int = CHUNK):
  """Features of texts by the frozen text tower, for `Method.prepare`: once per run, outside of jit.

  Args:
    frozen: parameters of the CLIP; of them "text" and "text_projection" are used.
    ids: [P, T].
    make_visit: (frozen, ids [p, T]) -> visitor of sites text/…, whose carry is a dict of arrays [p, …], first {}. One
      object for equal visitors spares a compilation.
    chunk: texts computed at once, 0 for all of them.

  Returns:
    (projections [P, d], not normalised; the carry, {name: [P, …]}).
  """
  params, ids = {name: frozen[name] for name in ("text", "text_projection")}, cut(ids)
  run, P = _encoder(spec, make_visit), len(ids)
  chunk = min(chunk or P, P)
  padded = jnp.pad(ids, ((0, -P % chunk), (0, 0)), mode="edge")  # one program for all chunks
  params = jax.device_put(params) if len(padded) > chunk else params
  parts = [run(params, padded[i:i + chunk]) for i in range(0, len(padded), chunk)]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:P], *parts)


@functools.lru_cache(maxsize=16)
def _encoder(spec, make_visit):
  backbone = backbones.build(spec)
  def run(params, ids):
    towers, carry = backbone.apply(params, Towers(None, ids), make_visit(params, ids), {})
    return towers.text, carry
  return jax.jit(run)


def without_text(frozen: dict, **more) -> dict:
  """Frozen parameters without the text tower, which is not needed once `more` is computed."""
  return {name: leaf for name, leaf in frozen.items() if name not in ("text", "text_projection")} | more


def unit(x):
  """Vectors of length 1 along the last axis, float32; zero stays zero."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def ensemble(texts, count: int):
  """Projections of texts [C T, d] of T = `count` templates -> [C, d] of length 1: each is normalised, then their mean,
  as the CLIP paper's prompt ensembles (openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb)."""
  return unit(jnp.mean(unit(texts.reshape(-1, count, texts.shape[-1])), axis=1))


def cosine_logits(images, texts, logit_scale):
  """exp(logit_scale) times the cosines of images [B, d] and texts [C, d]: logits [B, C] float32."""
  return jnp.exp(logit_scale.astype(jnp.float32)) * (unit(images) @ unit(texts).T)


def projected_image() -> dict:
  """The `reads` of a method that sees of an image its projection [B, d] alone, as carry["image"]."""
  return {"image": Read("image/projected")}
