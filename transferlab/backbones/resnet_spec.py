"""What a ResNet is, as plain data; others import it from `backbones.spec`."""
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from transferlab.backbones.vit_spec import BlockShape


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
