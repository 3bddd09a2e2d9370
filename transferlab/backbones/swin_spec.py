"""What a Swin Transformer is, as plain data; others import it from `backbones.spec`."""
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from transferlab.backbones.vit_spec import GELUS, BlockShape


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
