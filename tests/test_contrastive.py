"""A CLIP of one's own: it starts from a ViT's features, and its loss knows equal captions."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import colours

from transferlab import tree
from transferlab.backbones import Towers, build
from transferlab.pretraining import contrastive


@pytest.fixture(scope="module")
def small(tiny_weights):
  spec = contrastive.clip_of(tiny_weights, 16, text_width=64, text_depth=1, embed_width=8)
  images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
  return spec, contrastive.init(jax.random.key(0), spec, tiny_weights, images), images


def test_the_image_tower_starts_near_the_vit(small, tiny_weights):
  spec, params, images = small
  keep = lambda site: lambda carry, name, y, x: (y if name == site else carry, y)
  ours = build(spec).apply(params, images, keep("image/embed_norm"), None)[1]
  theirs = build(tiny_weights.spec).apply(tiny_weights.params, images, keep("embed"), None)[1]
  left = jnp.square(ours - theirs).mean() / theirs.var(axis=(0, 1)).mean()
  assert left < 0.2, "of the tokens' variance, the norm before the first block changes more than a fifth"


def test_loss_is_zero_where_equal_captions_are_together(small):
  """Four images of two captions: with perfect features what is left is the entropy of the targets, log 2."""
  spec, params, _ = small
  vectors = jnp.eye(2)[jnp.array([0, 0, 1, 1])]
  class Perfect:
    apply = staticmethod(lambda params, inputs: (Towers(vectors, vectors), ()))
  scale = {"logit_scale": jnp.log(100.0)}
  caption = jnp.array([7, 7, 3, 3])
  assert contrastive.loss(scale, Perfect, None, None, caption) == pytest.approx(np.log(2), abs=1e-5)
  assert contrastive.loss(scale, Perfect, None, None, jnp.array([7, 3, 7, 3])) > 20


def test_training_moves_both_towers(small, tiny_weights, capsys):
  spec, start, _ = small
  train = colours().splits["train"]
  ids = np.array([[1, 10 + c, spec.vocabulary - 1] for c in range(4)], np.int32)
  found = contrastive.Pairs(np.stack([train.read(i) for i in range(8)]), train.labels[:8].astype(np.int32), ids)
  params = contrastive.train(spec, tiny_weights, found, steps=2, batch=8, rate=1e-3, image_rate=1e-3)
  assert "step 2/2  loss" in capsys.readouterr().out
  for name in ("image/block_00/qkv/kernel", "text/block_00/qkv/kernel", "text/tokens", "logit_scale"):
    before, after = (tree.flatten(each)[name] for each in (start, params))
    assert np.isfinite(after).all() and not np.array_equal(before, after), name
