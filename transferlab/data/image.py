"""The preprocessing that belongs to a backbone's weights, on the host: resize, crop, normalise.

Resizing is Pillow's own, so that its filters (antialiased, rounded to 8 bits) are the ones the weights were made with;
or, for comparison with papers whose code ran on it, TensorFlow 1's, whose results stay fractions on the 0..255 scale.
"""
import numpy as np
from PIL import Image

from transferlab.backbones.spec import PILLOW_FILTERS, Preprocessing


Picture = np.ndarray | Image.Image  # uint8 RGB [H, W, 3], or Pillow's of mode RGB


def preprocess(image: Picture, preprocessing: Preprocessing) -> np.ndarray:
  """[H, W, 3] -> [S, S, 3] of type `preprocessing.pixels`, S = `preprocessing.image_size`.

  Both sides become floor(S / crop_fraction) pixels with "squash", which ignores the aspect ratio; with "center" the
  shorter one does, the longer side rounded down. Then the centre is cut, as torchvision's Resize and CenterCrop do.
  """
  size = preprocessing.image_size
  height, width = shape(image)
  if preprocessing.crop == "center" and max(height, width) > 16 * min(height, width):
    # Only the centre of such a strip is looked at; resized whole it could take any amount of memory.
    keep = 16 * min(height, width)
    height, width, top, left = (min(height, keep), min(width, keep), max(0, height - keep) // 2,
                                max(0, width - keep) // 2)
    image = cut(image, top, left, height, width)
  short = int(size / preprocessing.crop_fraction)
  scaled = max(short, short * height // min(height, width)), max(short, short * width // min(height, width))
  if preprocessing.crop == "squash":
    scaled = short, short
  image = resize(image, *scaled, preprocessing.interpolation)
  top, left = (round((side - size) / 2) for side in scaled)
  return image[top:top + size, left:left + size]  # [S, S, 3]


def shape(image: Picture) -> tuple[int, int]:
  """H, W."""
  return image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]


def cut(image: Picture, top: int, left: int, height: int, width: int) -> Picture:
  """[height, width, 3] from row `top` and column `left` on."""
  if isinstance(image, Image.Image):
    return image.crop((left, top, left + width, top + height))
  return image[top:top + height, left:left + width]


def resize(image: Picture, height: int, width: int, interpolation: str) -> np.ndarray:
  """[H, W, 3] -> [height, width, 3] on 0..255: uint8 by Pillow's filter of that name, or float32 by "bilinear_tf1"."""
  if interpolation not in PILLOW_FILTERS:
    return resize_tf1(np.asarray(image), height, width)
  picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
  return np.asarray(picture.resize((width, height), Image.Resampling[interpolation.upper()]))


def resize_tf1(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """[H, W, C] -> float32 [height, width, C] as TensorFlow 1's `resize_bilinear` with its default arguments.

  Output pixel i lies at i * (old side / new side), between the two pixels beside it: corners, not centres, and so a
  shift of up to half a pixel towards the top left; nothing is averaged when shrinking. `tf.compat.v1.image.
  resize_bilinear` does this still; `tf.image.resize` of TensorFlow 2 and jax do not.
  """
  top, bottom, down = _neighbours(image.shape[0], height)
  left, right, across = _neighbours(image.shape[1], width)
  down, across = down[:, None, None], across[:, None]
  def row(rows):  # [height, width, C]
    a, b = image[np.ix_(rows, left)].astype(np.float32), image[np.ix_(rows, right)].astype(np.float32)
    return a + (b - a) * across
  upper = row(top)
  return upper + (row(bottom) - upper) * down


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Of each of `new` pixels, the two of `old` around it and its distance from the first, in float32 as TensorFlow's."""
  place = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
  first = place.astype(np.int32)
  return first, np.minimum(first + 1, old - 1), place - first.astype(np.float32)


def normalise(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
  """Pixels on the 0..255 scale [..., 3] -> float32 (x / 255 - mean) / std. The train step does the same on device."""
  mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
  return (np.asarray(images, np.float32) / np.float32(255) - mean) / std
