"""Pre-training images by formula: textures, figures, colours, light and occlusion.

Every image is a function of (seed, index). It is a background with no, one or several figures. The main figure, drawn
last, and the background's texture carry class labels; -1 stands for "none". Look at some:

    python -m transferlab.pretraining.generate --out=sheet.png
"""
import functools
import multiprocessing
import os

from absl import app
from absl import flags
import numpy as np
from PIL import Image

from transferlab.pretraining import fields
from transferlab.pretraining import shapes

SIZE = 80            # canvas; training cuts 64 px views from it
TEXTURES = 320       # classes: 20 of each of the 16 texture families
SHAPES = 448         # classes: 32 of each of the 14 places in the list of shape families
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@functools.lru_cache(maxsize=64)
def blur_matrix(size: int, sigma: float):
  """Rows are Gaussian weights: `m @ image @ m.T` blurs [S, S]."""
  d = np.arange(size)[:, None] - np.arange(size)[None, :]
  m = np.exp(-0.5 * (d / sigma) ** 2)
  return (m / m.sum(1, keepdims=True)).astype(np.float32)


def blur(image, sigma: float):
  """Gaussian blur of [S, S] or [S, S, C]; sigma is rounded to quarters so that the matrices are few."""
  m = blur_matrix(len(image), max(round(sigma * 4), 1) / 4)
  if image.ndim == 2:
    return m @ image @ m.T
  return np.stack([m @ image[..., c] @ m.T for c in range(image.shape[-1])], -1)


def colours(rng, count: int):
  """A palette [count, 3] in [0, 1]: hues near one another, opposed, or free; often pale; sometimes grey."""
  scheme = rng.choice(5, p=[0.3, 0.15, 0.25, 0.15, 0.15])
  base = rng.uniform()
  hue = base + (rng.normal(0, 0.05, count), rng.integers(0, 2, count) / 2 + rng.normal(0, 0.03, count),
                rng.uniform(0, 1, count), rng.integers(0, 3, count) / 3, rng.normal(0, 0.05, count))[scheme]
  saturation = np.zeros(count) if scheme == 4 else np.clip(rng.beta(1.4, 1.6) + rng.normal(0, 0.2, count), 0, 1)
  value = rng.beta(1.2, 0.9, count) if rng.random() < 0.7 else np.linspace(*rng.uniform(0, 1, 2), count)
  wheel = np.abs(np.mod(hue[:, None] + np.array([0, 2 / 3, 1 / 3]), 1) * 6 - 3) - 1            # hue to RGB
  return (value[:, None] * (1 - saturation[:, None] * (1 - np.clip(wheel, 0, 1)))).astype(np.float32)


def ramp(rng, field):
  """Colours [S, S, 3] of a scalar field [S, S], through two to five stops, stepped or smooth."""
  stops = colours(rng, int(rng.integers(2, 6)))
  position = np.linspace(0, 1, 256) if rng.random() < 0.8 else np.round(np.linspace(0, 1, 256) * 4) / 4
  table = np.stack([np.interp(position, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)], -1)
  return table.astype(np.float32)[np.clip(field * 255, 0, 255).astype(np.uint8)]


def lit(image, height, rng, strength: float):
  """The image as a relief of `height` [S, S] under a light from somewhere."""
  gy, gx = np.gradient(height)
  angle = rng.uniform(0, 2 * np.pi)
  shade = (np.cos(angle) * gx + np.sin(angle) * gy) * np.float32(strength)
  return image * (1 + shade / np.sqrt(1 + shade * shade))[..., None]


def gradient(rng, size: int):
  """A linear or radial slope [S, S] in [0, 1]."""
  x, y = fields.grid(size)
  if rng.random() < 0.6:
    angle = rng.choice([0.5 * np.pi, rng.uniform(0, 2 * np.pi)])
    return fields.unit(np.cos(angle) * x + np.sin(angle) * y)
  return fields.unit(np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)))


def plain(rng, size: int):
  """Backgrounds without a label [S, S, 3]: one colour, a slope, a horizon, or something out of focus."""
  kind = rng.choice(5, p=[0.35, 0.2, 0.15, 0.2, 0.1])
  if kind == 0:
    return np.broadcast_to(colours(rng, 1), (size, size, 3)).copy()
  if kind == 1:
    return ramp(rng, gradient(rng, size))
  if kind == 2:
    y = fields.grid(size)[1] + 0.05 * fields.power_noise(rng, size, 2)
    sky, ground = ramp(rng, gradient(rng, size)), ramp(rng, fields.unit(fields.power_noise(rng, size, 1.5)))
    return np.where((y < rng.uniform(-0.4, 0.6))[..., None], sky, ground)
  noise = fields.unit(fields.power_noise(rng, size, rng.uniform(1, 3)))
  return ramp(rng, noise) if kind == 3 else blur(ramp(rng, noise > 0.5), rng.uniform(3, 8))


def textured(seed: int, label: int, rng, size: int):
  field = fields.texture(seed, label, rng, size)
  if rng.random() < 0.15:
    field = 1 - field
  image = ramp(rng, field)
  return lit(image, field, rng, fields.log_uniform(rng, 1, 8)) if rng.random() < 0.4 else image


def add_figure(image, seed: int, label: int, rng, main: bool):
  """The image with one figure of shape class `label` upon it."""
  size = len(image)
  mask, inner = shapes.shape(seed, label, rng, shapes.pose(rng, main), size)
  kind = rng.choice(5, p=[0.3, 0.3, 0.1, 0.2, 0.1])
  if kind == 0:
    paint = np.broadcast_to(colours(rng, 1), image.shape)
  elif kind == 1:
    paint = ramp(rng, inner)
  elif kind == 2:
    paint = ramp(rng, gradient(rng, size))
  elif kind == 3:
    paint = ramp(rng, fields.texture(seed, int(rng.integers(TEXTURES)), rng, size))
  else:
    paint = ramp(rng, np.clip(inner + 0.15 * fields.power_noise(rng, size, 1.5), 0, 1))
  # A figure that nobody could tell from its ground teaches nothing: push it towards black or white.
  weight = mask[..., None]
  contrast = np.abs((paint - image) * weight).sum() / max(weight.sum() * 3, 1e-6)
  if contrast < 0.2:
    target = 1.0 if (image * weight).sum() < 1.5 * weight.sum() else 0.0
    paint = paint + (target - paint) * 0.6
  if rng.random() < 0.4:
    paint = lit(paint, blur(mask * (1 - 0.5 * inner), rng.uniform(0.5, 5)), rng, fields.log_uniform(rng, 2, 12))
  if rng.random() < 0.3:  # shadow on what lies below
    shadow = np.roll(blur(mask, rng.uniform(1, 3)), tuple(rng.integers(-5, 6, 2)), (0, 1))
    image = image * (1 - rng.uniform(0.2, 0.7) * shadow[..., None])
  return image + (np.clip(paint, 0, 1) - image) * weight


def camera(image, rng):
  """Exposure, slope of light, blur, noise. [S, S, 3] float to uint8."""
  size = len(image)
  if rng.random() < 0.3:
    image = image * (1 - rng.uniform(0, 0.7) * gradient(rng, size))[..., None]
  if rng.random() < 0.12:
    image = np.broadcast_to((image @ LUMA)[..., None], image.shape)
  soft = rng.random()
  if soft < 0.65:
    image = blur(image, fields.log_uniform(rng, 0.4, 1.6) if soft < 0.5 else rng.uniform(1.6, 4))
  if rng.random() < 0.25:
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.08))
  return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def image(seed: int, index: int, size: int = SIZE):
  """Image `index` of the endless set `seed`.

  Returns:
    uint8 [S, S, 3], and labels int (shape in [-1, SHAPES), texture in [-1, TEXTURES)).
  """
  rng = np.random.default_rng([seed, 0, index])
  # 0 texture, 1 figure on plain ground, 2 figure on texture, 3 crowd on either.
  scene = rng.choice(4, p=[0.3, 0.4, 0.15, 0.15])
  shape_label, texture_label = int(rng.integers(SHAPES)), int(rng.integers(TEXTURES))
  if scene == 1 or scene == 3 and rng.random() < 0.7:
    texture_label, canvas = -1, plain(rng, size)
  else:
    canvas = textured(seed, texture_label, rng, size)
  if scene == 0:
    return camera(canvas, rng), (-1, texture_label)
  for _ in range(int(rng.integers(1, 5)) if scene == 3 else 0):
    canvas = add_figure(canvas, seed, int(rng.integers(SHAPES)), rng, main=False)
  canvas = add_figure(canvas, seed, shape_label, rng, main=True)
  return camera(canvas, rng), (shape_label, texture_label)


def _chunk(job):
  seed, start, stop, size = job
  pairs = [image(seed, i, size) for i in range(start, stop)]
  return np.stack([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.int32)


def images(seed: int, start: int, stop: int, size: int = SIZE, workers: int = 0, report=None):
  """Images `start` to `stop`, the same for any number of worker processes (0: one per core).

  Returns:
    uint8 [N, S, S, 3] and labels int32 [N, 2].
  """
  jobs = [(seed, i, min(i + 256, stop), size) for i in range(start, stop, 256)]
  pictures, labels = np.empty((stop - start, size, size, 3), np.uint8), np.empty((stop - start, 2), np.int32)
  workers = workers or os.cpu_count()
  with multiprocessing.get_context("spawn").Pool(workers) if len(jobs) > 1 and workers > 1 else _Serial() as pool:
    for (_, begin, end, _), (x, y) in zip(jobs, pool.imap(_chunk, jobs)):
      pictures[begin - start:end - start], labels[begin - start:end - start] = x, y
      if report:
        report(end - start, stop - start)
  return pictures, labels


class _Serial:
  """The part of a process pool that `images` uses, in this process."""
  __enter__ = lambda self: self
  __exit__ = lambda self, *error: None
  imap = staticmethod(map)


def sheet(seed: int, count: int, size: int = SIZE):
  """The first `count` images side by side, uint8 [rows*S, columns*S, 3]."""
  columns = int(np.ceil(count ** 0.5))
  pictures = images(seed, 0, count, size, workers=1)[0]
  pictures = np.concatenate([pictures, np.zeros((-count % columns, size, size, 3), np.uint8)])
  return pictures.reshape(-1, columns, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * size, 3)


def main(_):
  Image.fromarray(sheet(_SEED.value, _COUNT.value)).save(_OUT.value)
  print(f"{_COUNT.value} images of seed {_SEED.value} in {_OUT.value}")


if __name__ == "__main__":
  _OUT = flags.DEFINE_string("out", "sheet.png", "Where to write the contact sheet.")
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of the set.")
  _COUNT = flags.DEFINE_integer("count", 144, "Number of images.")
  app.run(main)
