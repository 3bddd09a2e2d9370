"""Pre-trains the bundled backbone on generated images. With the default arguments this is the recipe of the stored file:

    python -m transferlab.pretraining.train --out=vit_formula64.safetensors

Three losses share one forward pass over two views per image: which formulas made it (class labels of figure and texture),
which other view is of the same image (Chen et al. 2020, arXiv 2002.05709), and what the view looks like (`descriptors`).
For most of the run the network sees a random half of the patches, as in Li et al. 2022 (arXiv 2212.00794): twice the steps
for the same time, and another augmentation.
"""
import functools
import pathlib
import time
import zlib

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transferlab.backbones import build
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.spec import ViTSpec
from transferlab.pretraining import augment
from transferlab.pretraining import descriptors
from transferlab.pretraining import generate
from transferlab.pretraining import store

SPEC = ViTSpec("vit_formula64", image_size=64, patch_size=8, width=192, depth=6, heads=3, mlp_width=768)
PREPROCESSING = Preprocessing(64)
TEMPERATURE = 0.2


def init(key, spec):
  """{"backbone": …, "heads": …}; heads read class token and mean patch token side by side, [2D]."""
  keys = iter(jax.random.split(key, 8))
  def dense(inputs, outputs, scale=1.0):
    kernel = jax.random.normal(next(keys), (inputs, outputs)) * scale * inputs ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}
  D = 2 * spec.width
  heads = {"shape": dense(D, generate.SHAPES, 0.1), "texture": dense(D, generate.TEXTURES, 0.1),
           "describe": dense(D, descriptors.SIZE, 0.1), "hidden": dense(D, D), "project": dense(D, 128)}
  return {"backbone": build(spec).init(next(keys)), "heads": heads}


def encode(net, params, images, key, keep: int):
  """Class token and mean patch token of the last norm, [B, 2D], from `keep` random patches per image."""
  prefix, patches = net.spec.prefix_tokens, net.spec.tokens - net.spec.prefix_tokens
  def visit(carry, site, y, x):
    del x
    if site == "embed" and keep < patches:
      chosen = jax.random.uniform(key, (len(y), patches)).argsort(-1)[:, :keep]                # [B, keep]
      y = jnp.concatenate([y[:, :prefix], jnp.take_along_axis(y[:, prefix:], chosen[..., None], 1)], 1)
    return (y if site == "norm" else carry), y
  tokens = net.apply(params, images, visit, None)[1]                                           # [B, 1+keep, D]
  return jnp.concatenate([tokens[:, 0], tokens[:, prefix:].mean(1)], -1)


def class_loss(logits, labels, smoothing: float = 0.1):
  """Mean cross-entropy over the images that have a label (-1 is none)."""
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
  known = labels >= 0
  return jnp.where(known, optax.softmax_cross_entropy(logits, targets), 0).sum() / jnp.maximum(known.sum(), 1)


def contrast_loss(z):
  """Normalised temperature-scaled cross-entropy; row i of z [2B, N] and row i + B are views of one image."""
  z = z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-6)
  scores = z @ z.T / TEMPERATURE - 1e9 * jnp.eye(len(z))
  partner = jnp.roll(jnp.arange(len(z)), len(z) // 2)
  return optax.softmax_cross_entropy_with_integer_labels(scores, partner).mean()


def losses(params, net, key, images, labels, keep: int):
  """The three losses by name. `images` uint8 [B, S, S, 3], `labels` [B, 2]."""
  keys = jax.random.split(key, 3)
  views = jnp.concatenate([augment.views(k, images, net.spec.image_size) for k in keys[:2]])  # [2B, 64, 64, 3]
  h = encode(net, params["backbone"], views, keys[2], keep)
  dense = lambda name, x: x @ params["heads"][name]["kernel"] + params["heads"][name]["bias"]
  labels = jnp.concatenate([labels, labels])
  target = jax.lax.stop_gradient(descriptors.describe(views))
  target = (target - target.mean(0)) / (target.std(0) + 1e-3)
  return {"classes": class_loss(dense("shape", h), labels[:, 0]) + class_loss(dense("texture", h), labels[:, 1]),
          "contrast": contrast_loss(dense("project", jax.nn.gelu(dense("hidden", h)))),
          "describe": jnp.square(dense("describe", h) - target).mean()}


def optimiser(steps: int, rate: float, decay: float):
  schedule = optax.warmup_cosine_decay_schedule(0, rate, max(steps // 20, 1), steps, 0.01 * rate)
  matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=decay, mask=matrices))


def make_step(net, tx, weights: dict):
  @functools.partial(jax.jit, static_argnames="keep", donate_argnums=(0, 1))
  def step(params, state, key, images, labels, *, keep):
    def total(params):
      parts = losses(params, net, key, images, labels, keep)
      return sum(weights[name] * parts[name] for name in parts), parts
    (_, parts), grads = jax.value_and_grad(total, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, parts
  return step


def pool(seed: int, count: int, cache: str | None = None):
  """The training images, uint8 [count, S, S, 3], and labels [count, 2]; kept in `cache` under a name that tells its recipe."""
  sources = b"".join(sorted(path.read_bytes() for path in pathlib.Path(__file__).parent.glob("*s.py")) + [
      pathlib.Path(generate.__file__).read_bytes()])
  files = [pathlib.Path(cache) / f"{name}-{seed}-{count}-{zlib.crc32(sources):08x}.npy" for name in ("images", "labels")] if cache else []
  if files and all(file.exists() for file in files):
    return tuple(np.load(file) for file in files)
  began = time.time()
  def report(done, total):
    if done % 10240 == 0 or done == total:
      print(f"generated {done}/{total} images, {time.time() - began:.0f} s", flush=True)
  arrays = generate.images(seed, 0, count, report=report)
  for file, array in zip(files, arrays):
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, array)
  return arrays


def train(arrays, *, spec=SPEC, steps: int, batch: int, keep: float, whole: float, rate: float, decay: float,
          weights: dict, seed: int, save=None, every: int = 500):
  """Runs the recipe. `arrays` as `pool` returns them. Returns the backbone's parameters.

  Args:
    keep: share of patches seen, until the last `whole` share of the steps, which see all.
    weights: of the losses, by name.
    save: called with the backbone's parameters every `every` steps.
  """
  net, tx = build(spec), optimiser(steps, rate, decay)
  params = init(jax.random.key(seed), spec)
  state, step = tx.init(params), make_step(net, tx, weights)
  pictures, labels = arrays
  patches = spec.tokens - spec.prefix_tokens
  order, rng, began = np.empty(0, np.int64), np.random.default_rng(seed), time.time()
  for i in range(steps):
    if len(order) < batch:
      order = np.concatenate([order, rng.permutation(len(pictures))])
    chosen, order = order[:batch], order[batch:]
    seen = patches if i >= steps * (1 - whole) else max(round(patches * keep), 1)
    key = jax.random.fold_in(jax.random.key(seed + 1), i)
    params, state, parts = step(params, state, key, pictures[chosen], labels[chosen], keep=seen)
    if i % 50 == 49 or i == steps - 1:
      parts = {name: float(part) for name, part in parts.items()}
      if not all(np.isfinite(list(parts.values()))):
        raise FloatingPointError(f"step {i + 1}: {parts}")
      print(f"step {i + 1}/{steps}  " + "  ".join(f"{name} {part:.3f}" for name, part in parts.items())
            + f"  {seen} patches  {time.time() - began:.0f} s", flush=True)
    if save and (i + 1) % every == 0:
      save(params["backbone"])
  return params["backbone"]


def main(_):
  weights = {"classes": _CLASSES.value, "contrast": _CONTRAST.value, "describe": _DESCRIBE.value}
  arrays = pool(_SEED.value, _IMAGES.value, _CACHE.value)
  source = (f"transferlab.pretraining.train: {_STEPS.value} steps of {_BATCH.value} x 2 views, {_IMAGES.value} generated images, "
            f"seed {_SEED.value}, loss weights {weights}")
  save = lambda params: store.write(_OUT.value, jax.device_get(params), SPEC, PREPROCESSING, source)
  save(train(arrays, steps=_STEPS.value, batch=_BATCH.value, keep=_KEEP.value, whole=_WHOLE.value, rate=_RATE.value,
             decay=_DECAY.value, weights=weights, seed=_SEED.value, save=save))
  print(f"weights in {_OUT.value}")


if __name__ == "__main__":
  _OUT = flags.DEFINE_string("out", None, "Where to write the weights (safetensors).", required=True)
  _CACHE = flags.DEFINE_string("cache", None, "Folder that keeps the generated images between runs (1.9 GB); none if not given.")
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of images, initial weights and views.")
  _IMAGES = flags.DEFINE_integer("images", 100_000, "Number of distinct images.")
  _STEPS = flags.DEFINE_integer("steps", 3000, "Optimiser steps.")
  _BATCH = flags.DEFINE_integer("batch", 128, "Images per step; two views each.")
  _KEEP = flags.DEFINE_float("keep", 0.5, "Share of patches seen before the last steps.")
  _WHOLE = flags.DEFINE_float("whole", 0.15, "Share of steps, at the end, that see all patches.")
  _RATE = flags.DEFINE_float("rate", 1e-3, "Peak learning rate.")
  _DECAY = flags.DEFINE_float("decay", 0.05, "Weight decay of matrices.")
  _CLASSES = flags.DEFINE_float("classes", 1.0, "Weight of the class loss.")
  _CONTRAST = flags.DEFINE_float("contrast", 1.0, "Weight of the contrastive loss.")
  _DESCRIBE = flags.DEFINE_float("describe", 1.0, "Weight of the descriptor loss.")
  app.run(main)
