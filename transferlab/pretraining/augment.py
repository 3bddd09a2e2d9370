"""A random view of every image, made on the device: a crop as two small matrix products, then a colour map.

No flips: mirror twins are different figures here, as they are among letters and digits.
"""
import jax
import jax.numpy as jnp

GREY = jnp.array([0.299, 0.587, 0.114])


def resampling(start, length, source: int, target: int):
  """Matrices that cut [start, start + length) from `source` pixels into `target`: triangle filter, antialiased.

  Args:
    start, length: [B], in source pixels.

  Returns:
    [B, target, source], rows sum to 1.
  """
  step = length / target                                                                       # [B]
  centre = start[:, None] + (jnp.arange(target) + 0.5) * step[:, None] - 0.5                   # [B, target]
  reach = jnp.maximum(step, 1)[:, None, None]
  weights = jnp.maximum(0, 1 - jnp.abs(jnp.arange(source) - centre[..., None]) / reach)
  return weights / weights.sum(-1, keepdims=True)


def crops(key, images, size: int, smallest: float):
  """Random resized crops, area uniform in [smallest, 1], height to width within 3/4 and 4/3.

  Args:
    images: [B, S, S, 3].

  Returns:
    [B, size, size, 3].
  """
  B, S = images.shape[:2]
  area, aspect, top, left = jax.random.uniform(key, (4, B))
  side = S * jnp.sqrt(smallest + (1 - smallest) * area)
  stretch = jnp.exp((aspect - 0.5) * jnp.log(4 / 3))
  height, width = jnp.minimum(side * stretch, S), jnp.minimum(side / stretch, S)
  rows, columns = resampling(top * (S - height), height, S, size), resampling(left * (S - width), width, S, size)
  return jnp.einsum("btsc,bus->btuc", jnp.einsum("bts,bsxc->btxc", rows, images), columns)


def recolour(key, images, strength: float):
  """Brightness, contrast, saturation, hue and sometimes grey. [B, S, S, 3] in [0, 1], kept there."""
  B = len(images)
  keys = jax.random.split(key, 3)
  brightness, contrast, saturation = 1 + strength * jax.random.uniform(keys[0], (3, B, 1, 1, 1), minval=-1, maxval=1)
  saturation = jnp.where(jax.random.uniform(keys[1], (B, 1, 1, 1)) < 0.4 * strength, 0, saturation)
  angle = jax.random.uniform(keys[2], (B, 1, 1), minval=-1, maxval=1) * strength * 0.8
  # Rotation about the grey axis (Rodrigues): colours keep their brightness, greys stay grey.
  axis = jnp.full((3,), 3 ** -0.5)
  cross = jnp.cross(jnp.eye(3), axis)
  rotation = jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross + (1 - jnp.cos(angle)) * jnp.outer(axis, axis)
  images = jnp.einsum("bhwc,bcd->bhwd", images * brightness, rotation)
  grey = (images @ GREY)[..., None]
  images = grey + saturation * (images - grey)
  mean = images.mean((1, 2, 3), keepdims=True)
  return jnp.clip(mean + contrast * (images - mean), 0, 1)


def views(key, images, size: int, smallest: float = 0.4, strength: float = 0.4, noise: float = 0.03):
  """One random view of each image. uint8 [B, S, S, 3] -> float32 [B, size, size, 3] in [-1, 1]."""
  crop_key, colour_key, noise_key = jax.random.split(key, 3)
  images = crops(crop_key, images.astype(jnp.float32) / 255, size, smallest)
  images = recolour(colour_key, images, strength)
  return 2 * images - 1 + noise * jax.random.normal(noise_key, images.shape)
