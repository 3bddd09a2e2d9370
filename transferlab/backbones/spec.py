"""What a backbone is, as plain data: its shape, its sites' geometry and the preprocessing that belongs to its weights.

Nothing here imports jax, so that data workers and command-line help stay light. Every number a method or a loader may
need about a backbone is a field or a method of its spec; the arithmetic itself lives in `vit.py` and its siblings.
"""
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROPS = ("squash", "center")
GELUS = ("erf", "tanh", "quick")
POOLS = ("cls", "mean", "mean_before_norm")


@dataclass(frozen=True)
class Preprocessing:
  """How pixels become the input of a particular set of weights. It belongs to the weights, never to the data.

  `crop="squash"` resizes both sides to `image_size / crop_fraction`, ignoring the aspect ratio, `crop="center"` the
  shorter side; then the centre is cut. `mean` and `std` are on the [0, 1] scale, one per RGB channel.
  """
  image_size: int
  interpolation: str = "bicubic"
  crop: str = "squash"
  crop_fraction: float = 1.0
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __post_init__(self):
    if not isinstance(self.image_size, int) or self.image_size < 1:
      raise ValueError(f"image_size is {self.image_size!r}; expected a positive whole number of pixels")
    if self.interpolation not in INTERPOLATIONS:
      raise ValueError(f"interpolation {self.interpolation!r} is unknown; expected one of {', '.join(INTERPOLATIONS)}")
    if self.crop not in CROPS:
      raise ValueError(f"crop {self.crop!r} is unknown; expected one of {', '.join(CROPS)}")
    if not 0 < self.crop_fraction <= 1:
      raise ValueError(f"crop_fraction is {self.crop_fraction}; expected a number in (0, 1]")
    if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
      raise ValueError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")

  def describe(self) -> str:
    """One line for logs: '224 px, bicubic, squash, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)'."""
    whole = self.crop == "squash" and self.crop_fraction == 1
    crop = self.crop if whole else f"{self.crop} crop {self.crop_fraction:g}"
    return f"{self.image_size} px, {self.interpolation}, {crop}, mean {tuple(self.mean)}, std {tuple(self.std)}"

  def changed(self, text: str) -> "Preprocessing":
    """With some fields replaced, "interpolation=bilinear,crop=squash"; for files that store no preprocessing."""
    fields = {f.name: f for f in dataclasses.fields(self) if f.name != "image_size"}
    changes = {}
    for part in filter(None, text.split(",")):
      name, equals, value = part.partition("=")
      if not equals or name not in fields:
        raise ValueError(f"preprocessing {part!r} is not understood; expected name=value with a name of "
                         f"{', '.join(fields)} (mean and std as 0.5/0.5/0.5)")
      try:
        changes[name] = {"mean": _triple, "std": _triple, "crop_fraction": float}.get(name, str)(value)
      except ValueError:
        raise ValueError(f"preprocessing {part!r}: {value!r} is not a number") from None
    return dataclasses.replace(self, **changes)

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict) -> "Preprocessing":
    fields = dict(fields)
    for name in ("mean", "std"):
      if name in fields:
        fields[name] = tuple(float(x) for x in fields[name])
    return cls(**fields)


def _triple(text: str) -> tuple[float, ...]:
  return tuple(float(x) for x in text.split("/"))


class BlockShape(NamedTuple):
  """Geometry of one block, for methods that add parameters per block."""
  width: int
  heads: int
  mlp_width: int
  grid: tuple[int, int]  # patch rows and columns at the block's input
  stage: int             # blocks of one stage share width and grid; a ViT has one stage


@dataclass(frozen=True)
class ViTSpec:
  """A Vision Transformer (Dosovitskiy et al. 2021), pre-norm, any size.

  `pool` is what becomes the feature vector: "cls" the class token after the final norm, "mean" the mean of the
  normalised patch tokens (big_vision), "mean_before_norm" the norm of the patch tokens' mean (timm's fc_norm).
  """
  name: str
  image_size: int
  patch_size: int
  width: int
  depth: int
  heads: int
  mlp_width: int
  class_token: bool = True
  pool: str = "cls"
  norm_eps: float = 1e-6
  gelu: str = "erf"
  qkv_bias: bool = True
  family: str = "vit"

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
    if self.width % self.heads:
      raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
    if self.gelu not in GELUS:
      raise ValueError(f"gelu {self.gelu!r} is unknown; expected one of {', '.join(GELUS)}")
    if self.pool not in POOLS:
      raise ValueError(f"pool {self.pool!r} is unknown; expected one of {', '.join(POOLS)}")
    if self.pool == "cls" and not self.class_token:
      raise ValueError("pool 'cls' needs class_token=True; a model without one pools by 'mean' or 'mean_before_norm'")

  @property
  def grid(self) -> tuple[int, int]:
    side = self.image_size // self.patch_size
    return side, side

  @property
  def prefix_tokens(self) -> int:
    """Tokens before the patches: 1 with a class token, else 0."""
    return int(self.class_token)

  @property
  def tokens(self) -> int:
    return self.grid[0] * self.grid[1] + self.prefix_tokens

  def block(self, index: int) -> BlockShape:
    """Shape of block `index`, 0-based; the same for all blocks of a ViT."""
    del index
    return BlockShape(self.width, self.heads, self.mlp_width, self.grid, 0)

  def at_resolution(self, image_size: int) -> "ViTSpec":
    """The same network for another image size; the weights' position table has to be resampled to match."""
    return dataclasses.replace(self, image_size=image_size)

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)
