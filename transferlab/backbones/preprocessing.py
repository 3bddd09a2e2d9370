"""How pixels become a backbone's input, as plain data; others import it from `backbones.spec`."""
import dataclasses
from dataclasses import dataclass

PILLOW_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
INTERPOLATIONS = (*PILLOW_FILTERS, "bilinear_tf1")
CROPS = ("squash", "center")


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
