"""A recognised file's arrays as parameters of a backbone, once their names and shapes are what the spec asks for."""
import logging

import numpy as np

from transferlab.backbones import abstract_params
from transferlab.backbones.weights import layouts, names
from transferlab.backbones.weights.files import WeightsError
from transferlab.tree import difference, flatten, unflatten

log = logging.getLogger(__name__)


def convert(layout: layouts.Layout, spec) -> tuple[dict, dict | None]:
  """(parameters, classifier or None); the arrays leave `layout` on the way.

  Raises:
    WeightsError: parameters missing, unexpected or mis-shaped, or no floating-point numbers.
  """
  shapes = {name: leaf.shape for name, leaf in flatten(abstract_params(spec)).items()}
  rules = {name: rule for name, rule in names.expand(layout.rules, spec.depth).items() if name in shapes}
  expected = names.foreign_shapes(rules, shapes, spec.heads)
  head_rules, head_expected = _head(layout, spec)
  if problem := difference(layout.arrays, expected | head_expected):
    relatives = layouts.hint(n for n in layout.arrays if n not in expected) if spec.family == "vit" else ""
    raise WeightsError(f"the parameters are not those of a {spec.name} in {layout.name}'s layout: {problem}{relatives}")
  if counters := [f"{n} {a.dtype}" for n, a in layout.arrays.items() if a.dtype != np.float32]:
    raise WeightsError(f"expected floating-point parameters; found {', '.join(counters[:3])} (quantised files are not "
                       "supported)")
  if layout.ignored:
    log.info("left out, as no backbone uses them here: %s", ", ".join(layout.ignored))
  head = unflatten(names.to_native(head_rules, layout.arrays)) or None
  return unflatten(names.to_native(rules, layout.arrays)), head


def _head(layout: layouts.Layout, spec):
  """The rules and shapes of the classifier a file has; a part without the others counts as missing."""
  if spec.family == "resnet" and spec.classes:  # it lies inside the backbone
    return {}, {}
  rules = names.expand(names.HEADS.get(layout.name, ()), 0)
  shape = lambda name: getattr(layout.arrays.get(rules[name].foreign[0]) if name in rules else None, "shape", None)
  pre, bias = shape("pre_logits/bias"), shape("bias")
  if not any(shape(name) for name in rules):
    return {}, {}
  width = pre[0] if pre else spec.width
  outputs_first = layout.name.startswith(("timm", "huggingface", "swin"))
  classes = bias[0] if bias else (shape("kernel") or (0,))[0 if outputs_first else -1]
  shapes = {"kernel": (width, classes), "bias": (classes,)}
  if any(shape(name) for name in rules if name.startswith("pre_logits")):
    shapes |= {"pre_logits/kernel": (spec.width, width), "pre_logits/bias": (width,)}
  rules = {name: rules[name] for name in shapes}
  return rules, names.foreign_shapes(rules, shapes, spec.heads)
