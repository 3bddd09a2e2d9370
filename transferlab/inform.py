"""What `transferlab info` tells: sizes and costs of any backbone and method from shapes alone, and sites."""
import ast
import re

from transferlab import backbones, cost, methods
from transferlab.backbones import zoo
from transferlab.backbones.weights import load_weights
from transferlab.tree import nearest


def find(backbone: str, image_size: int | None = None):
  """(spec, preprocessing or None) of an architecture, a zoo entry (neither needs weights) or a weights file."""
  if backbone in backbones.ARCHITECTURES:
    spec, preprocessing = backbones.architecture(backbone), None
  elif backbone in zoo.ZOO and zoo.ZOO[backbone].architecture in backbones.ARCHITECTURES:
    spec, preprocessing = backbones.architecture(zoo.ZOO[backbone].architecture), zoo.ZOO[backbone].preprocessing
  else:
    try:
      weights = load_weights(backbone, image_size=image_size)
    except ValueError as error:
      known = [*backbones.ARCHITECTURES, *zoo.ZOO]
      raise ValueError(f"{error}; nearest names: {', '.join(nearest(backbone, known))}") from None
    return weights.spec, weights.preprocessing
  return (spec.at_resolution(image_size) if image_size else spec), preprocessing


def site_shapes(spec) -> dict[str, tuple]:
  """{site: shape for one image}."""
  return {name: leaf.shape for name, leaf in backbones.sites(spec).items()}


def options(text: str) -> dict:
  """"rank=4,form=fused" as a dict; values are Python literals or plain words."""
  found = {}
  for part in filter(None, re.split(r",(?=\s*\w+=)", text)):
    name, equals, value = part.partition("=")
    if not equals:
      raise ValueError(f"option {part!r} is not understood; expected name=value, e.g. rank=4")
    try:
      found[name.strip()] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[name.strip()] = value
  return found


def costs(spec, method: str | None, method_options: dict, num_classes: int, *, batch_size: int = 32,
          remat: bool = False) -> list[dict]:
  """A row per method, see `cost.of`; all methods that fit, with their defaults, if `method` is None."""
  if method is None and method_options:
    raise ValueError("options belong to one method; give --method")
  names = [method] if method else [name for name in methods.METHODS if methods.fits(name, spec)]
  row = lambda name: cost.of(spec, methods.build(name, spec, **method_options), num_classes, batch_size=batch_size,
                             remat=remat)
  return [{"method": name, "backbone": spec.name, **row(name)} for name in names]
