"""Trains a small CLIP of one's own on folders of images, whose captions are class names in templates.

    python -m transferlab.pretraining.contrastive --weights=vit.safetensors --tokenizer=bpe_simple_vocab_16e6.txt.gz \
        --data="folder:/images/photo=a photo of a {}" --data="folder:/images/cartoon=a cartoon of a {}" --out=clip

The image tower starts from the weights of a ViT, the text tower from random ones. The loss is CLIP's (Radford et al.
2021, figure 3) for captions that repeat: all images of a batch with the same caption are each other's positives, as in
UniCL (Yang et al. 2022, arXiv 2204.03610, equation 2). A few thousand images make no CLIP; they make one small enough
to run everything that is built on a CLIP from end to end.
"""
import functools
import time
from typing import NamedTuple

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transferlab import data
from transferlab.backbones import Towers, build
from transferlab.backbones.clip_spec import CLIPSpec
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import Weights, load_weights, save_weights
from transferlab.pretraining import augment
from transferlab.tokenizer import Tokenizer

VOCABULARY = 8192  # tokens, the first merges of a file; rarer words take more of them
MARGIN = 1.2  # images are kept so much larger than the network's, so that crops do not enlarge them


class Pairs(NamedTuple):
  """Images and their captions: pictures uint8 [N, S, S, 3], caption [N], ids [captions, T]."""
  pictures: np.ndarray
  caption: np.ndarray
  ids: np.ndarray


def clip_of(vit: Weights, image_size: int, *, text_width: int = 128, text_depth: int = 4,
            embed_width: int = 128) -> CLIPSpec:
  """The spec of a CLIP whose image tower has a ViT's size."""
  spec = vit.spec
  return CLIPSpec("clip_small", image_size, spec.patch_size, spec.width, spec.depth, spec.heads, spec.mlp_width,
                  text_width, text_depth, text_width // 64, 4 * text_width, embed_width, VOCABULARY,
                  norm_eps=spec.norm_eps, gelu=spec.gelu)


def init(key, spec: CLIPSpec, vit: Weights, images) -> dict:
  """Parameters of a CLIP that computes, at first, nearly the image features of a ViT.

  A CLIP has no bias of patches, which positions take up, and a norm before the first block, whose scale and bias are
  fitted, channel by channel, so that it gives back the tokens of `images` [B, S, S, 3].
  """
  params = dict(jax.jit(build(spec).init)(key))
  tower = {name: leaf for name, leaf in vit.params.items() if name != "patch_bias"}
  patches = np.arange(spec.image.tokens)[:, None] >= spec.prefix_tokens
  tower["pos"] = vit.params["pos"] + patches * vit.params["patch_bias"]
  tower["embed_norm"] = {"scale": jnp.ones(spec.width), "bias": jnp.zeros(spec.width)}
  params["image"] = tower
  keep = lambda carry, site, y, x: ((y, x) if site == "image/embed_norm" else carry, y)
  normed, tokens = build(spec).apply(params, images, keep, None)[1]                            # [B, T, D] each
  normed, tokens = normed.reshape(-1, spec.width), tokens.reshape(-1, spec.width)
  scale = ((normed - normed.mean(0)) * (tokens - tokens.mean(0))).mean(0) / normed.var(0)
  tower["embed_norm"] = {"scale": scale, "bias": tokens.mean(0) - scale * normed.mean(0)}
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def loss(params, clip, images, ids, caption):
  """Symmetric cross-entropy of images [B, S, S, 3] and their texts [B, T], in both directions; captions [B] tell which
  texts are equal."""
  features, _ = clip.apply(params, Towers(images, ids))
  image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in features)
  logits = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0))) * image @ text.T        # [B, B]
  same = (caption[:, None] == caption[None]).astype(jnp.float32)
  targets = same / same.sum(axis=1, keepdims=True)
  both = [optax.softmax_cross_entropy(each, targets) for each in (logits, logits.T)]
  return (both[0] + both[1]).mean() / 2


def optimiser(steps: int, rate: float, image_rate: float, decay: float = 0.05):
  """AdamW with a cosine; the image tower, which is trained already, has a rate of its own."""
  def of(peak):
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 20, 1), steps)
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    return optax.adamw(schedule, b2=0.98, weight_decay=decay, mask=matrices)
  names = lambda params: {name: "image" if name == "image" else "text" for name in params}
  return optax.chain(optax.clip_by_global_norm(1.0),
                     optax.multi_transform({"image": of(image_rate), "text": of(rate)}, names))


def pairs(sources, tokenizer, size: int) -> Pairs:
  """All images of [(data source, template)], preprocessed to `size` pixels, with one caption for each class of each."""
  pictures, caption, texts = [], [], []
  for source, template in sources:
    task = data.from_string(source)
    for split in task.splits.values():
      for i in range(len(split)):
        pictures.append(data.preprocess(split.read(i), Preprocessing(size)))
        caption.append(len(texts) + int(split.labels[i]))
    texts += [template.format(name.replace("_", " ")) for name in task.class_names]
  distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
  caption = np.array([distinct[texts[number]] for number in caption], np.int32)
  ids = tokenizer(list(distinct))
  return Pairs(np.stack(pictures), caption, ids[:, :int(ids.argmax(-1).max()) + 1])


def train(spec: CLIPSpec, vit: Weights, found: Pairs, *, steps: int, batch: int, rate: float, image_rate: float,
          seed: int = 0) -> dict:
  """Trains and returns the parameters."""
  clip, tx = build(spec), optimiser(steps, rate, image_rate)
  rng, key = np.random.default_rng(seed), jax.random.key(seed)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, key, pictures, ids, caption):
    images = augment.views(key, pictures, spec.image_size, strength=0.2, noise=0.0)            # [B, S, S, 3]
    flip = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(len(images), 1, 1, 1))
    images = jnp.where(flip, images[:, :, ::-1], images)
    value, gradient = jax.value_and_grad(loss)(params, clip, images, ids, caption)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  first = augment.views(key, found.pictures[:64], spec.image_size, strength=0.0, noise=0.0)
  params = init(key, spec, vit, first)
  state, order, began = tx.init(params), np.empty(0, np.int64), time.time()
  for i in range(steps):
    if len(order) < batch:
      order = np.concatenate([order, rng.permutation(len(found.pictures))])
    rows, order = order[:batch], order[batch:]
    caption = found.caption[rows]
    params, state, value = step(params, state, jax.random.fold_in(key, i), found.pictures[rows], found.ids[caption],
                                caption)
    if i % 20 == 19 or i == steps - 1:
      if not np.isfinite(value):
        raise FloatingPointError(f"step {i + 1}: the loss is {float(value)}; lower --rate and --image_rate")
      print(f"step {i + 1}/{steps}  loss {float(value):.4f}  {time.time() - began:.0f} s", flush=True)
  return params


def main(_):
  sources = [tuple(text.rsplit("=", 1)) for text in _DATA.value]
  if wrong := [each for each in sources if len(each) != 2 or "{}" not in each[1]]:
    raise app.UsageError(f"--data is {'='.join(wrong[0])!r}; expected SOURCE=TEMPLATE with {{}} for the class name, as "
                         "in 'folder:/images=a photo of a {}'")
  vit = load_weights(_WEIGHTS.value, image_size=_SIZE.value)
  spec = clip_of(vit, _SIZE.value)
  found = pairs(sources, Tokenizer(_TOKENIZER.value, spec.vocabulary, spec.context), int(MARGIN * _SIZE.value))
  print(f"{len(found.pictures)} images, {len(found.ids)} captions")
  params = train(spec, vit, found, steps=_STEPS.value, batch=_BATCH.value, rate=_RATE.value,
                 image_rate=_IMAGE_RATE.value, seed=_SEED.value)
  source = f"transferlab.pretraining.contrastive: {_STEPS.value} steps of {_BATCH.value}, {len(found.pictures)} images"
  save_weights(jax.device_get(params), _OUT.value, spec, preprocessing=Preprocessing(_SIZE.value), source=source)
  print(f"weights in {_OUT.value}")


if __name__ == "__main__":
  _WEIGHTS = flags.DEFINE_string("weights", None, "A ViT to start the image tower from.", required=True)
  _TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer's file or folder.", required=True)
  _DATA = flags.DEFINE_multi_string("data", None, "SOURCE=TEMPLATE; may be repeated.", required=True)
  _OUT = flags.DEFINE_string("out", None, "Where to write the weights (safetensors).", required=True)
  _SIZE = flags.DEFINE_integer("size", 80, "Side of the images in pixels.")
  _STEPS = flags.DEFINE_integer("steps", 400, "Optimiser steps.")
  _BATCH = flags.DEFINE_integer("batch", 96, "Images per step.")
  _RATE = flags.DEFINE_float("rate", 1e-3, "Peak learning rate of all but the image tower.")
  _IMAGE_RATE = flags.DEFINE_float("image_rate", 1e-4, "Peak learning rate of the image tower.")
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of initial weights, order and views.")
  app.run(main)
