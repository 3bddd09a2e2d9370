"""The preprocessing that belongs to a backbone's weights, on the host: resize, crop, normalise.

Resizing is Pillow's own, so that its filters (antialiased, rounded to 8 bits) are the ones the weights were made with.
"""
import numpy as np
from PIL import Image

from transferlab.backbones.spec import Preprocessing


Picture = np.ndarray | Image.Image  # uint8 RGB [H, W, 3], or Pillow's of mode RGB


def preprocess(image: Picture, preprocessing: Preprocessing) -> np.ndarray:
  """[H, W, 3] -> uint8 [S, S, 3], S = `preprocessing.image_size`.

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
  """[H, W, 3] -> uint8 [height, width, 3] by Pillow's filter of that name."""
  picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
  return np.asarray(picture.resize((width, height), Image.Resampling[interpolation.upper()]))


def normalise(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
  """Pixels on the 0..255 scale [..., 3] -> float32 (x / 255 - mean) / std. The train step does the same on device."""
  mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
  return (np.asarray(images, np.float32) / np.float32(255) - mean) / std
