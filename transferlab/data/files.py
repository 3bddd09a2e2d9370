"""From an image file to uint8 RGB pixels, with Pillow, the same on every machine.

What is decided here: the EXIF orientation is applied; transparent pixels show a white background; 16-bit grey is scaled
to 8 bit (Pillow's own conversion would clip it); the first frame stands for an animation; nothing is guessed from a
damaged file.
"""
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from transferlab.data.tasks import BadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# The content decides, whatever the suffix says. Pillow's other readers stay out: some start programs (Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 89_478_485  # Pillow's own bound for a "decompression bomb": 256 MiB of RGB


def decode(path: str | os.PathLike, content: bytes | None = None) -> np.ndarray:
  """Reads one image file, or its `content` that is already in memory and called `path`, as uint8 RGB [H, W, 3].

  Raises `BadImage` as `picture` does.
  """
  return np.array(picture(path, content))  # [H, W, 3]


def picture(path: str | os.PathLike, content: bytes | None = None) -> Image.Image:
  """`decode` before Pillow's pixels become an array, for those who resize them at once.

  Raises:
    BadImage: the file is missing, empty, not an image, cut short, too large, or of a pixel type without a meaning as
      a picture (32-bit integers beyond 16 bit, floats).
  """
  try:
    with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{path}: {image.width}x{image.height} pixels; expected at most {MAX_PIXELS}; shrink the image")
      image.load()
      return _to_rgb(_upright(image), path)
  except BadImage:
    raise
  except FileNotFoundError:
    raise BadImage(f"{path}: no such file") from None
  except UnidentifiedImageError:
    start = _start_of(path, content)
    raise BadImage(f"{path}: not an image ({start}); expected {', '.join(SUFFIXES)} content") from None
  # Pillow's readers raise these for damaged files, SyntaxError for broken PNG and EOFError for cut TIFF among them.
  except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, Image.DecompressionBombError) as e:
    raise BadImage(f"{path}: cannot be decoded ({' '.join(str(e).split()) or type(e).__name__})") from None


@dataclass(frozen=True)
class FileReader:
  """Row i is the image file `paths[i]`."""
  paths: tuple[str, ...]

  def __call__(self, row: int) -> np.ndarray:
    return decode(self.paths[row])

  def picture(self, row: int) -> Image.Image:
    return picture(self.paths[row])


def is_image(name: str) -> bool:
  """By suffix, upper case included. Hidden files, such as the `._photo.jpg` a Mac leaves behind, are none."""
  return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _upright(image: Image.Image) -> Image.Image:
  try:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image
  except Exception:  # noqa: BLE001  a damaged EXIF block fails in many ways, and the pixels are fine without it
    return image


def _to_rgb(image: Image.Image, path: str | os.PathLike) -> Image.Image:
  if image.mode.startswith("I"):
    return _grey16_to_rgb(np.asarray(image), path)
  if image.mode == "F":
    raise BadImage(f"{path}: pixels are floats, whose range is unknown; save the image with 8 or 16 bits")
  if image.has_transparency_data:
    rgba = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
  return image if image.mode == "RGB" else image.convert("RGB")


def _grey16_to_rgb(grey: np.ndarray, path: str | os.PathLike) -> Image.Image:
  grey = grey.astype(np.int64)  # [H, W]
  if grey.min() < 0 or grey.max() > 65535:
    raise BadImage(f"{path}: pixels from {grey.min()} to {grey.max()}; expected 8 or 16 bits")
  grey = ((grey + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, to the nearest
  return Image.fromarray(grey).convert("RGB")


def _start_of(path: str | os.PathLike, content: bytes | None) -> str:
  if content is None:
    with Path(path).open("rb") as file:
      content = file.read(12)
  start = content[:12]
  return f"it starts with {start!r}" if start else "the file is empty"
