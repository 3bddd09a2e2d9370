"""Augmentation of one image, with an explicit generator: crop, flip, colour, RandAugment, erasing; and the presets.

An `Augmentation` says what is done; `augment` does it in timm's order: random crop (or the weights' preprocessing),
flip, colour jitter, grey, RandAugment, erasing. Mixing works on batches and is in `mix.py`.
"""
import difflib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from transferlab.backbones.spec import INTERPOLATIONS, Preprocessing
from transferlab.data.image import cut, preprocess, resize, shape
from transferlab.data.randaugment import parse_policy, rand_augment

Range = tuple[float, float]  # low, high


@dataclass(frozen=True)
class Augmentation:
  """What happens to training images; the default is nothing.

  The defaults of the ranges are those of torchvision and timm, which the papers' code uses.
  """
  random_resized_crop: bool = False             # replaces the preprocessing's resize and crop
  scale: Range = (0.08, 1.0)                    # area of the crop
  ratio: Range = (3 / 4, 4 / 3)                 # width / height of the crop
  crop_interpolation: str | None = None         # None: the preprocessing's
  flip: bool = False                            # left-right, probability 1/2
  color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
  grayscale: float = 0.0                        # probability
  randaugment: str | None = None                # as timm writes it: 'rand-m9-mstd0.5-inc1'
  random_erasing: float = 0.0                   # probability
  mixup: float = 0.0                            # alpha of the Beta distribution, 0: off
  cutmix: float = 0.0
  label_smoothing: float = 0.0

  def __post_init__(self):
    for name in ("grayscale", "random_erasing", "label_smoothing"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name} is {getattr(self, name)}; expected a number from 0 to 1")
    if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
      raise ValueError(f"scale {self.scale} and ratio {self.ratio} must be (low, high), above 0, scale at most 1")
    if len(self.color_jitter) != 4 or min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
      raise ValueError(f"color_jitter is {self.color_jitter}; expected four numbers from 0, the last (hue) at most 0.5")
    if min(self.mixup, self.cutmix) < 0:
      raise ValueError(f"mixup {self.mixup} and cutmix {self.cutmix} must be 0 (off) or more")
    if self.crop_interpolation not in (None, *INTERPOLATIONS):
      raise ValueError(f"crop_interpolation {self.crop_interpolation!r} is unknown; expected one of "
                       f"{', '.join(INTERPOLATIONS)}")
    if self.randaugment is not None:
      parse_policy(self.randaugment)

  @property
  def soft_labels(self) -> bool:
    """Batches carry `soft_label`."""
    return bool(self.mixup or self.cutmix or self.label_smoothing)

  @property
  def eight_bit(self) -> bool:
    """Pillow's operations take part, which know 8 bits only."""
    return bool(any(self.color_jitter) or self.grayscale or self.randaugment)

  @property
  def floats(self) -> bool:
    """Batches carry float32 pixels: what mixing and erasing write is not on the uint8 grid."""
    return bool(self.mixup or self.cutmix or self.random_erasing)


PRESETS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "crop_flip": Augmentation(random_resized_crop=True, flip=True),
    # NOAH's and DTL's few-shot suites.
    "fewshot": Augmentation(random_resized_crop=True, crop_interpolation="bicubic", flip=True,
                            randaugment="rand-m9-mstd0.5-inc1"),
    # DomainBed's training transform, which LFA and MIRO use.
    "domainbed": Augmentation(random_resized_crop=True, scale=(0.7, 1.0), crop_interpolation="bilinear", flip=True,
                              color_jitter=(0.3, 0.3, 0.3, 0.3), grayscale=0.1),
    # timm's default with mixing, as NOAH's few-shot and domain-generalisation baselines run it.
    "timm": Augmentation(random_resized_crop=True, crop_interpolation="bicubic", flip=True,
                         randaugment="rand-m9-mstd0.5-inc1", random_erasing=0.25, mixup=0.8, cutmix=1.0,
                         label_smoothing=0.1),
}


def preset(name: str) -> Augmentation:
  """The augmentation of that name; `ValueError` names the nearest."""
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, 1)
    raise ValueError(f"augmentation {name!r} is unknown; expected one of {', '.join(PRESETS)}"
                     + (f"; did you mean {near[0]!r}?" if near else ""))
  return PRESETS[name]


def augment(image: np.ndarray, augmentation: Augmentation, preprocessing: Preprocessing, rng: np.random.Generator,
            resized: bool = False) -> np.ndarray:
  """uint8 [H, W, 3] -> uint8 [S, S, 3], or float32 on the 0..255 scale where `augmentation.floats` or the resize is.

  `resized` says that `image` went through `preprocess` already.
  """
  a = augmentation
  if a.random_resized_crop:
    image = random_resized_crop(image, preprocessing.image_size, rng, a.scale, a.ratio,
                                a.crop_interpolation or preprocessing.interpolation)
  elif not resized:
    image = preprocess(image, preprocessing)
  if a.flip and rng.random() < 0.5:
    image = image[:, ::-1]
  if any(a.color_jitter):
    image = color_jitter(image, rng, *a.color_jitter)
  if a.grayscale and rng.random() < a.grayscale:
    image = grayscale(image)
  if a.randaugment:
    fill = tuple(min(255, round(255 * m)) for m in preprocessing.mean)
    image = rand_augment(np.ascontiguousarray(image), parse_policy(a.randaugment), rng, fill,
                         a.crop_interpolation or preprocessing.interpolation)
  if not a.floats:
    return image  # [S, S, 3]
  image = image.astype(np.float32)
  if a.random_erasing and rng.random() < a.random_erasing:
    image = random_erasing(image, rng, preprocessing)
  return image  # [S, S, 3]


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator, scale: Range = (0.08, 1.0),
                        ratio: Range = (3 / 4, 4 / 3), interpolation: str = "bicubic") -> np.ndarray:
  """A random part of uint8 [H, W, 3], resized to [size, size, 3]."""
  box = crop_box(*shape(image), rng, scale, ratio)
  return resize(cut(image, *box), size, size, interpolation)


def crop_box(height: int, width: int, rng: np.random.Generator, scale: Range, ratio: Range
             ) -> tuple[int, int, int, int]:
  """top, left, height, width: area uniform in `scale`, log aspect uniform, as torchvision's RandomResizedCrop.

  After ten boxes that do not fit, the largest central one whose aspect is in `ratio`.
  """
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  return (height - h) // 2, (width - w) // 2, h, w


def color_jitter(image: np.ndarray, rng: np.random.Generator, brightness: float, contrast: float, saturation: float,
                 hue: float) -> np.ndarray:
  """uint8 [H, W, 3] -> the same; factors uniform in 1 +- strength (hue: a shift in +- strength turns), random order."""
  picture = Image.fromarray(np.ascontiguousarray(image))
  enhancers = ((ImageEnhance.Brightness, brightness), (ImageEnhance.Contrast, contrast),
               (ImageEnhance.Color, saturation))
  for step in rng.permutation(4):
    if step == 3 and hue:
      picture = _shift_hue(picture, rng.uniform(-hue, hue))
    elif step < 3 and enhancers[step][1]:
      enhancer, strength = enhancers[step]
      picture = enhancer(picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
  return np.asarray(picture)


def _shift_hue(picture: Image.Image, turns: float) -> Image.Image:
  hsv = np.array(picture.convert("HSV"))  # [H, W, 3]
  hsv[..., 0] += np.uint8(int(turns * 255) % 256)  # uint8 wraps around, as hue does
  return Image.fromarray(hsv, "HSV").convert("RGB")


def grayscale(image: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3] -> its luma (ITU-R 601) in all three channels."""
  return np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L").convert("RGB"))


def random_erasing(image: np.ndarray, rng: np.random.Generator, preprocessing: Preprocessing,
                   area: Range = (0.02, 1 / 3), ratio: Range = (0.3, 1 / 0.3)) -> np.ndarray:
  """Fills one box of float32 [H, W, 3] with noise that is standard normal once the pixels are normalised.

  Zhong et al. 2020, arXiv 1708.04896, in timm's "pixel" mode (random_erasing.py at 066e490). Noise is on the 0..255
  scale and may leave it. No box is drawn after ten that do not fit.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    target = height * width * rng.uniform(*area)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if h < height and w < width:
      top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
      noise = rng.standard_normal((h, w, 3), dtype=np.float32)
      image = image.copy()
      image[top:top + h, left:left + w] = 255 * (np.float32(preprocessing.mean) + np.float32(preprocessing.std) * noise)
      return image
  return image
