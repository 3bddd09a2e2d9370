"""What a CLIP is, as plain data: an image tower, a text tower, and the space they meet in (Radford et al. 2021)."""
import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

from transferlab.backbones.spec import GELUS, BlockShape, ViTSpec

MAX_CONTEXT = 1024  # tokens; every published CLIP has 77


@dataclass(frozen=True)
class TextSpec:
  """A text tower: a pre-norm transformer with a causal mask, read at the end-of-text token."""
  vocabulary: int
  context: int
  width: int
  depth: int
  heads: int
  mlp_width: int
  norm_eps: float = 1e-5
  gelu: str = "quick"
  qkv_bias: ClassVar[bool] = True


@dataclass(frozen=True)
class CLIPSpec:
  """A CLIP with a ViT as its image tower; openai/CLIP's model.py. Fields without "text" are the image tower's.

  Fields:
    vocabulary: V of the tokenizer; its last two are the start and the end of a text.
    context: tokens of a text, start and end included.
    embed_width: d of the space of both towers' projections.
  """
  name: str
  image_size: int
  patch_size: int
  width: int
  depth: int
  heads: int
  mlp_width: int
  text_width: int
  text_depth: int
  text_heads: int
  text_mlp_width: int
  embed_width: int
  vocabulary: int = 49408
  context: int = 77
  norm_eps: float = 1e-5
  gelu: str = "quick"
  family: str = "clip"
  pool: ClassVar[str] = "cls"
  prefix_tokens: ClassVar[int] = 1
  statistics: ClassVar[bool] = False

  def __post_init__(self):
    if self.gelu not in GELUS:
      raise ValueError(f"gelu {self.gelu!r} is unknown; expected one of {', '.join(GELUS)}")
    if self.text_width % self.text_heads:
      raise ValueError(f"text_width {self.text_width} is not a multiple of text_heads {self.text_heads}")
    if not 3 <= self.context <= MAX_CONTEXT:
      raise ValueError(f"context is {self.context}; expected 3 to {MAX_CONTEXT} tokens")
    assert self.image  # raises what is wrong with it

  @functools.cached_property
  def image(self) -> ViTSpec:
    """The image tower alone: what methods that need no text adapt."""
    return ViTSpec(self.name, self.image_size, self.patch_size, self.width, self.depth, self.heads, self.mlp_width,
                   norm_eps=self.norm_eps, gelu=self.gelu, patch_bias=False, embed_norm=True)

  @functools.cached_property
  def text(self) -> TextSpec:
    return TextSpec(self.vocabulary, self.context, self.text_width, self.text_depth, self.text_heads,
                    self.text_mlp_width, self.norm_eps, self.gelu)

  @property
  def grid(self) -> tuple[int, int]:
    return self.image.grid

  def block(self, index: int) -> BlockShape:
    """Shape of block `index` of the image tower."""
    return self.image.block(index)

  @property
  def sizes(self) -> str:
    """What distinguishes architectures, in words."""
    return (f"image tower: {self.image.sizes}; text tower: width {self.text_width}, {self.text_depth} blocks, "
            f"{self.text_heads} heads, MLP {self.text_mlp_width}; joint width {self.embed_width}")

  @property
  def hidden(self) -> str:
    """What parameters do not show, for `weights_hash`."""
    return f"eps={self.norm_eps!r} gelu={self.gelu} heads={self.heads} text_heads={self.text_heads}"

  def at_resolution(self, image_size: int) -> "CLIPSpec":
    """The same network for another image size; the position table has to be resampled to match."""
    return dataclasses.replace(self, image_size=image_size)

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)
