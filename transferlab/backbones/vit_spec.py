"""What a Vision Transformer is, as plain data, and what the families share; others import it from `backbones.spec`."""
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

GELUS = ("erf", "tanh", "quick")
POOLS = ("cls", "mean", "mean_before_norm")


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
