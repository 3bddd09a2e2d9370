"""What a backbone is, as plain data: its shape, its sites' geometry and the preprocessing that belongs to its weights.

Nothing here imports jax, so that data workers and command-line help stay light. Every number a method or a loader may
need about a backbone is a field or a method of its spec; the arithmetic itself lives in `vit.py` and its siblings.
"""
import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

PILLOW_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
INTERPOLATIONS = (*PILLOW_FILTERS, "bilinear_tf1")
CROPS = ("squash", "center")
GELUS = ("erf", "tanh", "quick")
POOLS = ("cls", "mean", "mean_before_norm")


@dataclass(frozen=True)
class Preprocessing:
  """How pixels become the input of a particular set of weights. It belongs to the weights, never to the data.

  `crop="squash"` resizes both sides to `image_size / crop_fraction`, ignoring the aspect ratio, `crop="center"` the
  shorter side; then the centre is cut. `mean` and `std` are on the [0, 1] scale, one per RGB channel.
  `interpolation` is one of Pillow's filters, or "bilinear_tf1", TensorFlow 1's bilinear resize without antialiasing or
  half-pixel centres, which the code of several papers has.
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

  @property
  def pixels(self) -> str:
    """Type of the resized pixels, on 0 … 255: Pillow rounds to "uint8", TensorFlow leaves "float32"."""
    return "uint8" if self.interpolation in PILLOW_FILTERS else "float32"

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
  heads: int             # 0 in a ResNet, as is mlp_width
  mlp_width: int
  grid: tuple[int, int]  # patch rows and columns at the block's input
  stage: int             # blocks of one stage share width and grid; a ViT has one stage


@dataclass(frozen=True)
class ViTSpec:
  """A Vision Transformer (Dosovitskiy et al. 2021), pre-norm, any size.

  `pool` is what becomes the feature vector: "cls" the class token after the final norm, "mean" the mean of the
  normalised patch tokens (big_vision), "mean_before_norm" the norm of the patch tokens' mean (timm's fc_norm).
  CLIP's image tower has no `patch_bias`, and an `embed_norm` between the positions and the first block.
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
  patch_bias: bool = True
  embed_norm: bool = False
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

  @property
  def statistics(self) -> bool:
    """Whether there are parameters "mean" and "var" of a batch norm, which gradients must leave alone."""
    return False

  @property
  def sizes(self) -> str:
    """What distinguishes architectures, in words."""
    return (f"width {self.width}, {self.depth} blocks, {self.heads} heads, MLP {self.mlp_width}, "
            f"patch {self.patch_size}" + ", a norm of its embeddings" * self.embed_norm)

  @property
  def hidden(self) -> str:
    """What parameters do not show, for `weights_hash`."""
    return f"eps={self.norm_eps!r} gelu={self.gelu} pool={self.pool} heads={self.heads}"

  def at_resolution(self, image_size: int) -> "ViTSpec":
    """The same network for another image size; the weights' position table has to be resampled to match."""
    return dataclasses.replace(self, image_size=image_size)

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)


@dataclass(frozen=True)
class ResNetSpec:
  """A ResNet of bottleneck blocks; `resnet.py` has the versions and their papers.

  Fields:
    stages: number of blocks of each stage.
    widths: channels that leave each stage; a block's inner width is a quarter.
    stem_width: channels of the 7x7 convolution.
    version: 1 (v1.5) or 2 (pre-activation).
    norm: "batch" with frozen statistics, or "group" (BiT), which goes with standardised kernels.
    groups: of group norm, 0 with batch norm; shown by no file, 32 in every published BiT.
    classes: of the pre-training's classifier, if the site "logits" is to exist; 0 leaves it out (`with_logits`).
  """
  name: str
  image_size: int
  stages: tuple[int, ...]
  widths: tuple[int, ...]
  stem_width: int = 64
  version: int = 1
  norm: str = "batch"
  groups: int = 0
  norm_eps: float = 1e-5
  classes: int = 0
  family: str = "resnet"
  # What a ResNet has not: attention heads, an MLP, patches (any image size will do), tokens of their own.
  heads: ClassVar[int] = 0
  mlp_width: ClassVar[int] = 0
  patch_size: ClassVar[int] = 1
  prefix_tokens: ClassVar[int] = 0

  def __post_init__(self):
    if not self.stages or len(self.stages) != len(self.widths) or min(self.stages) < 1:
      raise ValueError(f"stages {self.stages} and widths {self.widths} must be as many, with a block each at least")
    if min(self.widths) < 4 or any(width % 4 for width in self.widths):
      raise ValueError(f"widths are {self.widths}; expected multiples of 4")
    if (self.version, self.norm) not in ((1, "batch"), (2, "batch"), (2, "group")):
      raise ValueError(f"version {self.version!r} with norm {self.norm!r} is unknown; expected 1 with 'batch', or 2 "
                       "with 'batch' or 'group'")
    inner = (self.stem_width, *self.widths, *(width // 4 for width in self.widths))
    if self.norm == "group" and (self.groups < 1 or any(width % self.groups for width in inner)):
      raise ValueError(f"groups is {self.groups}; expected a divisor of all widths, {sorted(set(inner))}")
    if self.norm == "batch" and self.groups:
      raise ValueError(f"groups is {self.groups}; expected 0 with batch norm")

  @property
  def width(self) -> int:
    """D of the features."""
    return self.widths[-1]

  @property
  def depth(self) -> int:
    """Blocks of all stages together."""
    return sum(self.stages)

  @property
  def statistics(self) -> bool:
    """Whether there are parameters "mean" and "var" that gradients must leave alone."""
    return self.norm == "batch"

  def stage(self, index: int) -> int:
    """The stage of block `index`, both 0-based."""
    return next(s for s in range(len(self.stages)) if index < sum(self.stages[:s + 1]))

  def first(self, index: int) -> bool:
    """Whether the block is the first of its stage."""
    return index == sum(self.stages[:self.stage(index)])

  def stride(self, index: int) -> int:
    return 2 if self.first(index) and self.stage(index) else 1

  def mid(self, index: int) -> int:
    """Inner width of a block."""
    return self.widths[self.stage(index)] // 4

  def block(self, index: int) -> BlockShape:
    """Shape of block `index`; its grid is the map that enters it."""
    side, stage = -(-self.image_size // 4), self.stage(index)
    for _ in range(stage - (self.first(index) and stage > 0)):
      side = -(-side // 2)
    return BlockShape(self.widths[stage], 0, 0, (side, side), stage)

  @property
  def sizes(self) -> str:
    """What distinguishes architectures, in words."""
    norm = f"group norm in {self.groups} groups" if self.norm == "group" else "batch norm"
    return f"version {self.version}, {norm}, stages {self.stages}, widths {self.widths}, stem {self.stem_width}"

  @property
  def hidden(self) -> str:
    """What parameters do not show, for `weights_hash`."""
    return f"eps={self.norm_eps!r} version={self.version} norm={self.norm} groups={self.groups}"

  def at_resolution(self, image_size: int) -> "ResNetSpec":
    """The same network for another image size; the parameters fit any."""
    return dataclasses.replace(self, image_size=image_size)

  def to_dict(self) -> dict:
    """As JSON gives it back: tuples are lists."""
    return {**dataclasses.asdict(self), "stages": list(self.stages), "widths": list(self.widths)}


@dataclass(frozen=True)
class SwinSpec:
  """A Swin Transformer (Liu et al. 2021), version 1: relative-position bias, shifted windows, patch merging.

  Fields:
    embed_width: D of the first stage; it doubles from stage to stage.
    stages: number of blocks of each stage.
    stage_heads: attention heads of each stage.
    window: w; where a stage's map is smaller, the whole map is the window.
  """
  name: str
  image_size: int
  patch_size: int
  embed_width: int
  stages: tuple[int, ...]
  stage_heads: tuple[int, ...]
  window: int = 7
  mlp_ratio: float = 4.0
  norm_eps: float = 1e-5
  gelu: str = "erf"
  qkv_bias: bool = True
  family: str = "swin"
  pool: ClassVar[str] = "mean"
  prefix_tokens: ClassVar[int] = 0  # there is no class token
  statistics: ClassVar[bool] = False

  def __post_init__(self):
    if not self.stages or len(self.stages) != len(self.stage_heads) or min(self.stages) < 1:
      raise ValueError(f"stages {self.stages} and stage_heads {self.stage_heads} must be as many, with a block each at "
                       "least")
    if self.gelu not in GELUS:
      raise ValueError(f"gelu {self.gelu!r} is unknown; expected one of {', '.join(GELUS)}")
    for stage, heads in enumerate(self.stage_heads):
      if heads < 1 or self.width_of(stage) % heads:
        raise ValueError(f"width {self.width_of(stage)} of stage {stage} is not a multiple of its heads, {heads}")
    step = self.patch_size * 2 ** (len(self.stages) - 1)
    sides = [self.grid_of(stage)[0] for stage in range(len(self.stages))]
    if self.image_size < step or self.image_size % step or any(s > self.window and s % self.window for s in sides):
      raise ValueError(f"image_size is {self.image_size}; expected one that windows of {self.window} fill in every "
                       f"stage, such as {step * self.window}")

  @property
  def width(self) -> int:
    """D of the features."""
    return self.width_of(len(self.stages) - 1)

  @property
  def depth(self) -> int:
    """Blocks of all stages together."""
    return sum(self.stages)

  @property
  def heads(self) -> int:
    """Of the last stage."""
    return self.stage_heads[-1]

  @property
  def grid(self) -> tuple[int, int]:
    """Patches of the first stage."""
    return self.grid_of(0)

  def width_of(self, stage: int) -> int:
    """D of a stage's tokens."""
    return self.embed_width * 2 ** stage

  def grid_of(self, stage: int) -> tuple[int, int]:
    """Rows and columns of a stage's map, in tokens."""
    side = self.image_size // self.patch_size // 2 ** stage
    return side, side

  def stage(self, index: int) -> int:
    """The stage of block `index`, both 0-based."""
    return next(s for s in range(len(self.stages)) if index < sum(self.stages[:s + 1]))

  def first(self, index: int) -> bool:
    """Whether the block is the first of its stage."""
    return index == sum(self.stages[:self.stage(index)])

  def window_of(self, index: int) -> tuple[int, int]:
    """(w, shift) of block `index`: every second block of a stage is shifted by half a window, unless that is the map.
    """
    stage = self.stage(index)
    side = self.grid_of(stage)[0]
    odd = (index - sum(self.stages[:stage])) % 2
    return (side, 0) if side <= self.window else (self.window, self.window // 2 * odd)

  def block(self, index: int) -> BlockShape:
    """Shape of block `index`."""
    stage = self.stage(index)
    D = self.width_of(stage)
    return BlockShape(D, self.stage_heads[stage], int(self.mlp_ratio * D), self.grid_of(stage), stage)

  @property
  def sizes(self) -> str:
    """What distinguishes architectures, in words."""
    return (f"width {self.embed_width}, stages {self.stages}, heads {self.stage_heads}, window {self.window}, "
            f"MLP {self.mlp_ratio:g}x, patch {self.patch_size}")

  @property
  def hidden(self) -> str:
    """What parameters do not show, for `weights_hash`."""
    return f"eps={self.norm_eps!r} gelu={self.gelu} heads={self.stage_heads} window={self.window}"

  def at_resolution(self, image_size: int) -> "SwinSpec":
    """The same network for another image size, where every stage keeps its window and with it its bias table.

    Raises:
      ValueError: a stage's window would be another one.
    """
    other = dataclasses.replace(self, image_size=image_size)
    windows = lambda spec: [spec.window_of(i)[0] for i in range(spec.depth)]
    if windows(other) != windows(self):
      raise ValueError(f"image_size {image_size} changes the windows of {self.name} from {windows(self)} to "
                       f"{windows(other)}, for which its bias tables have no rows; expected {self.image_size}, or a "
                       "multiple of it")
    return other

  def to_dict(self) -> dict:
    """As JSON gives it back: tuples are lists."""
    return {**dataclasses.asdict(self), "stages": list(self.stages), "stage_heads": list(self.stage_heads)}
