"""Pre-trains the bundled backbone on generated images. The default arguments are the recipe of the stored file:

    python -m transferlab.pretraining.train --out=vit_formula64.safetensors

Two kinds of loss share a forward pass: which formulas made the image (class and family of figure and texture), and what
the view and its patches look like (`descriptors`). For most of the run the network sees a random half of the patches,
as in Li et al. 2022 (arXiv 2212.00794): more steps for the same time, and another augmentation.
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
from transferlab.backbones.weights import save_weights
from transferlab.pretraining import augment
from transferlab.pretraining import descriptors
from transferlab.pretraining import fields
from transferlab.pretraining import generate
from transferlab.pretraining import initial
from transferlab.pretraining import shapes

SPEC = ViTSpec("vit_formula64", image_size=64, patch_size=8, width=192, depth=6, heads=3, mlp_width=768)
PREPROCESSING = Preprocessing(64)


def init(key, spec, structured: bool = True):
  """{"backbone": …, "heads": …}; class token and mean patch token have heads of their own, [2, D, N]: both learn."""
  keys = iter(jax.random.split(key, 8))
  def dense(*shape, scale=1.0):
    return {"kernel": jax.random.normal(next(keys), shape) * scale * shape[-2] ** -0.5, "bias": jnp.zeros(shape[-1])}
  D = spec.width
  heads = {"shape": dense(2, D, generate.SHAPES, scale=0.1), "texture": dense(2, D, generate.TEXTURES, scale=0.1),
           "view": dense(2, D, descriptors.SIZE, scale=0.1), "patch": dense(D, descriptors.PATCH_SIZE, scale=0.1)}
  key = next(keys)
  return {"backbone": initial.structured(key, spec) if structured else build(spec).init(key), "heads": heads}


def encode(net, params, images, chosen):
  """Tokens of the last norm, [B, 1+K, D], when the network sees only the patches `chosen` [B, K] of each image."""
  prefix = net.spec.prefix_tokens
  def visit(carry, site, y, x):
    del x
    if site == "embed" and chosen.shape[1] < y.shape[1] - prefix:
      y = jnp.concatenate([y[:, :prefix], jnp.take_along_axis(y[:, prefix:], chosen[..., None], 1)], 1)
    return (y if site == "norm" else carry), y
  return net.apply(params, images, visit, None)[1]


def family_matrix(families, classes: int):
  """Which family a class is of, one-hot [classes, families]; a family listed twice is one."""
  names = sorted({family.__name__ for family in families})
  own = [names.index(families[label % len(families)].__name__) for label in range(classes)]
  return np.eye(len(names), dtype=np.float32)[own]


def class_loss(logits, labels, families, smoothing: float = 0.1):
  """Cross-entropy of the class plus that of its family, averaged over the images that have a label (-1 is none).

  Families are there for the first hundreds of steps, when single classes are still out of reach.
  """
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
  family = jnp.log(jax.nn.softmax(logits) @ families + 1e-9)                                   # [B, families]
  loss = optax.softmax_cross_entropy(logits, targets) - (jnp.asarray(families)[labels] * family).sum(-1)
  known = labels >= 0
  return jnp.where(known, loss, 0).sum() / jnp.maximum(known.sum(), 1)


SHAPE_FAMILIES = family_matrix(shapes.FAMILIES, generate.SHAPES)
TEXTURE_FAMILIES = family_matrix(fields.FAMILIES, generate.TEXTURES)


def regression_loss(predicted, target):
  """Mean squared error of targets brought to mean 0 and deviation 1 over the batch; the last axis is the descriptor."""
  axes = tuple(range(target.ndim - 1))
  target = jax.lax.stop_gradient((target - target.mean(axes)) / (target.std(axes) + 1e-2))
  return jnp.square(predicted - target).mean()


def losses(params, net, key, images, labels, keep: int):
  """The losses by name. `images` uint8 [B, S, S, 3], `labels` [B, 2], `keep` patches are seen."""
  spec, heads = net.spec, params["heads"]
  view_key, patch_key = jax.random.split(key)
  views = augment.views(view_key, images, spec.image_size)                                     # [B, 64, 64, 3]
  patches = spec.tokens - spec.prefix_tokens
  chosen = jnp.broadcast_to(jnp.arange(patches), (len(views), patches))
  if keep < patches:
    chosen = jax.random.uniform(patch_key, chosen.shape).argsort(-1)[:, :keep]                 # [B, K]
  tokens = encode(net, params["backbone"], views, chosen)                                      # [B, 1+K, D]
  local = tokens[:, spec.prefix_tokens:]
  pooled = jnp.stack([tokens[:, 0], local.mean(1)])                                            # [2, B, D]
  view_target, patch_target = descriptors.describe(views, spec.grid[0])
  patch_target = jnp.take_along_axis(patch_target, chosen[..., None], 1)                       # [B, K, PATCH_SIZE]
  both = lambda name: heads[name]["bias"] + jnp.einsum("sbd,sdn->sbn", pooled, heads[name]["kernel"])
  classes = lambda name, column, families: sum(class_loss(x, labels[:, column], families) for x in both(name)) / 2
  return {"shapes": classes("shape", 0, SHAPE_FAMILIES), "textures": classes("texture", 1, TEXTURE_FAMILIES),
          "views": regression_loss(both("view"), jnp.stack([view_target] * 2)),
          "patches": regression_loss(local @ heads["patch"]["kernel"] + heads["patch"]["bias"], patch_target)}


def optimiser(steps: int, rate: float, decay: float, warmup: int = 100, cooldown: float = 0.25):
  """AdamW; the rate rises over `warmup` steps, stays, and falls to nothing over the last `cooldown` share of them."""
  schedule = lambda i: rate * jnp.minimum(jnp.minimum((i + 1) / warmup, 1.0), (steps - i) / (steps * cooldown))
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
  """The training images, uint8 [count, S, S, 3], and labels [count, 2].

  With a folder `cache` they are kept there, under a name that changes with the generator's source.
  """
  sources = b"".join(pathlib.Path(module.__file__).read_bytes() for module in (fields, shapes, generate))
  name = f"{seed}-{count}-{zlib.crc32(sources):08x}.npy"
  files = [pathlib.Path(cache) / f"{kind}-{name}" for kind in ("images", "labels")] if cache else []
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
          weights: dict, seed: int, structured: bool = True, save=None, every: int = 500):
  """Runs the recipe. `arrays` as `pool` returns them. Returns the backbone's parameters.

  Args:
    keep: share of patches seen, until the last `whole` share of the steps, which see all.
    weights: of the losses, by name.
    save: called with the backbone's parameters every `every` steps.
  """
  net, tx = build(spec), optimiser(steps, rate, decay)
  params = init(jax.random.key(seed), spec, structured)
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
  classes, describe = _CLASSES.value, _DESCRIBE.value
  weights = {"shapes": classes, "textures": classes, "views": describe, "patches": describe}
  arrays = pool(_SEED.value, _IMAGES.value, _CACHE.value)
  source = (f"transferlab.pretraining.train: {_STEPS.value} steps of {_BATCH.value}, {_IMAGES.value} "
            f"generated images, seed {_SEED.value}, loss weights {weights}")
  save = lambda params: save_weights(
      jax.device_get(params), _OUT.value, SPEC, preprocessing=PREPROCESSING, source=source, dtype=np.float16)
  save(train(arrays, steps=_STEPS.value, batch=_BATCH.value, keep=_KEEP.value, whole=_WHOLE.value, rate=_RATE.value,
             decay=_DECAY.value, weights=weights, seed=_SEED.value, structured=_STRUCTURED.value, save=save))
  print(f"weights in {_OUT.value}")


if __name__ == "__main__":
  _OUT = flags.DEFINE_string("out", None, "Where to write the weights (safetensors).", required=True)
  _CACHE = flags.DEFINE_string("cache", None, "Folder that keeps the generated images for another run (1.2 GB).")
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of images, initial weights and views.")
  _IMAGES = flags.DEFINE_integer("images", 64_000, "Number of distinct images.")
  _STEPS = flags.DEFINE_integer("steps", 2000, "Optimiser steps.")
  _BATCH = flags.DEFINE_integer("batch", 96, "Images per step.")
  _KEEP = flags.DEFINE_float("keep", 0.5, "Share of patches seen before the last steps.")
  _WHOLE = flags.DEFINE_float("whole", 0.1, "Share of steps, at the end, that see all patches.")
  _RATE = flags.DEFINE_float("rate", 1e-3, "Peak learning rate.")
  _DECAY = flags.DEFINE_float("decay", 0.05, "Weight decay of matrices.")
  _CLASSES = flags.DEFINE_float("classes", 0.5, "Weight of the two class losses.")
  _DESCRIBE = flags.DEFINE_float("describe", 5.0, "Weight of the two descriptor losses.")
  _STRUCTURED = flags.DEFINE_bool("structured", True, "Start from the weights of `initial` instead of random ones.")
  app.run(main)
