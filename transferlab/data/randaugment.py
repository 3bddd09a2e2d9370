"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) with the operations and severities of timm.

Facts from timm's auto_augment.py at 066e490 (levels 0..10, fifteen operations of the "increasing" set, each layer drawn
with replacement and applied with probability 1/2, Gaussian noise on the level): 'rand-m9-mstd0.5-inc1' is two layers at
level 9 +- 0.5.
"""
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_LEVEL = 10.0


class Policy(NamedTuple):
  level: float
  layers: int
  noise: float  # standard deviation of the level


def parse_policy(text: str) -> Policy:
  """'rand-m9-mstd0.5-inc1' -> Policy(9, 2, 0.5): `m` level, `n` layers (2), `mstd` noise (0), `inc1` mandatory.

  Raises `ValueError` for anything else, also for policies without inc1: their posterize and solarize grow weaker as the
  level rises, which nobody wants.
  """
  fields = {}
  for part in text.split("-")[1:]:
    match = re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part)
    fields[match[1] if match else part] = match[2] if match else None
  if not text.startswith("rand-") or None in fields.values() or fields.get("inc") != "1" or "m" not in fields:
    raise ValueError(f"randaugment {text!r} is not understood; expected rand-m<level>[-n<layers>][-mstd<noise>]-inc1, "
                     "such as 'rand-m9-mstd0.5-inc1'")
  policy = Policy(float(fields["m"]), int(fields.get("n", 2)), float(fields.get("mstd", 0)))
  if policy.level > MAX_LEVEL:
    raise ValueError(f"randaugment {text!r} asks for level {policy.level:g}; expected 0 to {MAX_LEVEL:g}")
  return policy


def rand_augment(image: np.ndarray, policy: Policy, rng: np.random.Generator,
                 fill: tuple[int, int, int] = (128, 128, 128), interpolation: str = "bicubic") -> np.ndarray:
  """uint8 [H, W, 3] -> uint8 [H, W, 3].

  Args:
    fill: colour of what a shift, shear or turn uncovers; the weights' mean colour.
    interpolation: filter of these; "nearest", "bilinear", else bicubic, as Pillow has no other for them.
  """
  resample = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}.get(
      interpolation, Image.Resampling.BICUBIC)
  picture = Image.fromarray(image)
  for choice in rng.integers(len(OPERATIONS), size=policy.layers):
    if rng.random() < 0.5:
      level = float(np.clip(rng.normal(policy.level, policy.noise), 0, MAX_LEVEL))
      picture = apply_operation(picture, OPERATIONS[choice], level, rng, fill, resample)
  return np.asarray(picture)


def apply_operation(picture: Image.Image, name: str, level: float, rng: np.random.Generator,
                    fill: tuple[int, int, int], resample: Image.Resampling) -> Image.Image:
  """One named operation at `level` in 0..10; `rng` only draws the sign, for the operations that have one."""
  part = level / MAX_LEVEL
  if name in _PLAIN:
    return _PLAIN[name](picture)
  if name == "posterize":
    return ImageOps.posterize(picture, 4 - int(4 * part)) if 4 - int(4 * part) else _black(picture)
  if name == "solarize":
    return ImageOps.solarize(picture, 256 - int(256 * part))
  if name == "solarize_add":  # only the dark half brightens
    return picture.point([min(255, v + int(110 * part)) if v < 128 else v for v in range(256)] * 3)
  sign = 1 if rng.random() < 0.5 else -1
  if name in _ENHANCERS:
    return _ENHANCERS[name](picture).enhance(max(0.1, 1 + sign * 0.9 * part))
  if name == "rotate":
    return picture.rotate(sign * 30 * part, resample=resample, fillcolor=fill)
  matrix = {"shear_x": (1, sign * 0.3 * part, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, sign * 0.3 * part, 1, 0),
            "translate_x": (1, 0, sign * 0.45 * part * picture.width, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, sign * 0.45 * part * picture.height)}[name]
  return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)


def _black(picture: Image.Image) -> Image.Image:
  return Image.new(picture.mode, picture.size)  # no bits kept; Pillow's posterize starts at one


_PLAIN = {"auto_contrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}
_ENHANCERS = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "brightness": ImageEnhance.Brightness,
              "sharpness": ImageEnhance.Sharpness}
OPERATIONS = (*_PLAIN, "rotate", "posterize", "solarize", "solarize_add", *_ENHANCERS, "shear_x", "shear_y",
              "translate_x", "translate_y")
