"""The preprocessing that belongs to a backbone's weights, on the host: resize, crop, normalise.

Resizing is Pillow's own, so that its filters (antialiased, rounded to 8 bits) are the ones the weights were made with.
"""
import numpy as np
from PIL import Image

from transferlab.backbones.spec import Preprocessing


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
  """uint8 [H, W, 3] -> uint8 [S, S, 3], S = `preprocessing.image_size`.

  Both sides become floor(S / crop_fraction) pixels with "squash", which ignores the aspect ratio; with "center" the
  shorter one does, the longer side rounded down. Then the centre is cut, as torchvision's Resize and CenterCrop do.
  """
  size = preprocessing.image_size
  height, width = image.shape[:2]
  if preprocessing.crop == "center" and max(height, width) > 16 * min(height, width):
    # Only the centre of such a strip is looked at; resized whole it could take any amount of memory.
    keep = 16 * min(height, width)
    top, left = max(0, height - keep) // 2, max(0, width - keep) // 2
    image = image[top:top + keep, left:left + keep]
    height, width = image.shape[:2]
  short = int(size / preprocessing.crop_fraction)
  scaled = max(short, short * height // min(height, width)), max(short, short * width // min(height, width))
  if preprocessing.crop == "squash":
    scaled = short, short
  image = resize(image, *scaled, preprocessing.interpolation)
  top, left = (round((side - size) / 2) for side in scaled)
  return image[top:top + size, left:left + size]  # [S, S, 3]


def resize(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
  """uint8 [H, W, 3] -> uint8 [height, width, 3] by Pillow's filter of that name."""
  filter_ = Image.Resampling[interpolation.upper()]
  return np.asarray(Image.fromarray(image).resize((width, height), filter_))


def normalise(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
  """Pixels on the 0..255 scale [..., 3] -> float32 (x / 255 - mean) / std. The train step does the same on device."""
  mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
  return (np.asarray(images, np.float32) / np.float32(255) - mean) / std
