"""ResNets in files: timm's `resnet` (the names of torchvision) and `resnetv2`, BiT's `.npz`, and our own.

    layout          kernels        norms                                   source
    native          [h, w, D, D']  scale, bias, mean, var                  `backbones/resnet.py`
    timm_resnet     [D', D, h, w]  weight, bias, running_mean, running_var timm resnet.py
    timm_resnetv2   [D', D, h, w]  the same; group norm: weight, bias      timm resnetv2.py
    bit             [h, w, D, D']  gamma, beta                             big_transfer models.py

Sizes are inferred from shapes. What shapes do not show is the layout's convention: batch norm eps 1e-5, stride on the
3x3 convolution (timm; the first version of 2015 had it on the 1x1 before), 32 groups of group norm unless the caller
or an export of ours says otherwise. Counters of batches are left out.
"""
import re

import numpy as np

from transferlab.backbones import ARCHITECTURES, abstract_params
from transferlab.backbones.spec import Preprocessing, ResNetSpec
from transferlab.backbones.weights import layouts, names, preprocess
from transferlab.backbones.weights.files import WeightsError, parse_json
from transferlab.backbones.weights.layouts import Layout
from transferlab.tree import flatten

BIT_GROUPS = 32
_MARKS = {"timm_resnet": "conv1.weight", "timm_resnetv2": "stem.conv.weight",
          "bit": "resnet/root_block/standardized_conv2d/kernel"}
_TIMM_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_BIT_LEAVES = {"kernel": "standardized_conv2d/kernel", "scale": "group_norm/gamma", "bias": "group_norm/beta"}


def npz_parameters(found: list[str]) -> dict[str, str]:
  """{name in an npz: name to return} of the parameters of BiT's or Google's ViT's file."""
  if _MARKS["bit"] in found:
    return {name: name for name in found if name.startswith("resnet/")}
  return layouts.google_parameters(found)


def recognise(arrays: dict[str, np.ndarray], metadata: dict, config: dict,
              groups: int | None = None) -> tuple[Layout, ResNetSpec] | None:
  """The layout and spec of a ResNet's file, None if there is none in it; arguments are as in `layouts.recognise`."""
  with layouts.stored("the configuration"):
    if "transferlab" in metadata:
      return layouts.native(arrays, metadata, "resnet")
    kind = next((kind for kind, mark in _MARKS.items() if mark in arrays), None)
    if kind is None or (kind == "timm_resnet" and "layer1.0.conv1.weight" not in arrays):
      return None
    config = config or parse_json(metadata.get("timm_config", "{}"), "the file's header")
    spec = _infer(kind, arrays, config, groups)
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}
    return Layout(kind, arrays, table(kind, spec), {}, lambda size: preprocess.from_timm(config, size)), spec


def table(kind: str, spec: ResNetSpec) -> tuple[names.Rule, ...]:
  """The rows of a layout for each of the spec's parameters, but for a classifier among them."""
  kernel = names.SAME if kind == "bit" else names.CONVOLUTION
  rule = lambda name: names.Rule(name, (_foreign(kind, spec, name),), kernel if name.endswith("kernel") else names.SAME)
  return tuple(rule(name) for name in flatten(abstract_params(spec)) if name[:5] != "head/")


def _foreign(kind: str, spec: ResNetSpec, name: str) -> str:
  """A layout's name of our parameter, e.g. "block_03/norm2/scale"."""
  *where, part, leaf = name.split("/")
  ending = (_BIT_LEAVES if kind == "bit" else _TIMM_LEAVES)[leaf]
  if not where:
    outer = {"timm_resnet": {"stem": "conv1.", "stem_norm": "bn1."},
             "timm_resnetv2": {"stem": "stem.conv.", "norm": "norm."},
             "bit": {"stem": "resnet/root_block/", "norm": "resnet/"}}
    return outer[kind][part] + ending
  index = int(where[0].removeprefix("block_"))
  stage = spec.stage(index)
  unit = index - sum(spec.stages[:stage])
  if kind == "bit":
    inner = {"shortcut": "a/proj"}.get(part) or "abc"[int(part[-1]) - 1]
    return f"resnet/block{stage + 1}/unit{unit + 1:02d}/{inner}/{ending}"
  if kind == "timm_resnet":
    inner = {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}.get(part) or part.replace("norm", "bn")
    return f"layer{stage + 1}.{unit}.{inner}.{ending}"
  return f"stages.{stage}.blocks.{unit}.{'downsample.conv' if part == 'shortcut' else part}.{ending}"


def _infer(kind: str, arrays: dict, config: dict, groups: int | None) -> ResNetSpec:
  pattern, expand = {
      "timm_resnet": (r"layer(\d+)\.(\d+)\.", "layer{}.{}.conv3.weight"),
      "timm_resnetv2": (r"stages\.(\d+)\.blocks\.(\d+)\.", "stages.{}.blocks.{}.conv3.weight"),
      "bit": (r"resnet/block(\d+)/unit(\d+)/", "resnet/block{}/unit{:02d}/c/standardized_conv2d/kernel")}[kind]
  base = 0 if kind == "timm_resnetv2" else 1  # what stages count from
  found = {(int(m[1]), int(m[2])) for name in arrays if (m := re.match(pattern, name))}
  if len(found) > layouts.MAX_DEPTH:
    raise WeightsError(f"the file names {len(found)} blocks; expected at most {layouts.MAX_DEPTH}")
  count = lambda stage: sum(s == stage for s, _ in found)
  last = max((s for s, _ in found), default=base)
  stages = tuple(count(s) for s in range(base, min(last, layouts.MAX_DEPTH) + 1))
  first = 1 if kind == "bit" else 0  # what blocks count from
  out = -1 if kind == "bit" else 0   # the axis of a kernel's output channels
  widths = tuple(_kernel(arrays, expand.format(s + base, first)).shape[out] for s in range(len(stages)))
  stem = _kernel(arrays, _MARKS[kind]).shape[out]
  ours, version = config.get("transferlab") or {}, 1 if kind == "timm_resnet" else 2
  batch = kind == "timm_resnet" or (kind == "timm_resnetv2" and "norm.running_mean" in arrays)
  if batch and groups:
    raise WeightsError(f"groups is {groups}, and this file has batch norm; leave groups out")
  groups = 0 if batch else groups or int(ours.get("groups", BIT_GROUPS))
  size = (config.get("pretrained_cfg") or config).get("input_size") or (3, 224, 224)
  try:
    spec = ResNetSpec("resnet", int(size[-1]), stages, widths, stem, version, "batch" if batch else "group", groups)
  except (TypeError, ValueError) as error:
    raise WeightsError(f"no ResNet of bottleneck blocks can be made of this: {error}"
                       + ("" if batch else "; pass groups=")) from error
  return named(spec)


def named(spec: ResNetSpec) -> ResNetSpec:
  """The spec under its architecture's name, or one made of its sizes: "resnet_v2_d5_w128"."""
  made = f"resnet_v{spec.version}_d{spec.depth}_w{spec.width}"
  name = next((name for name, other in ARCHITECTURES.items() if other.sizes == spec.sizes), made)
  return ResNetSpec(**{**spec.__dict__, "name": name})


def _kernel(arrays: dict, name: str) -> np.ndarray:
  if name not in arrays:
    raise WeightsError(f"{name} is missing; expected a ResNet of bottleneck blocks with a plain 7x7 stem (blocks of "
                       "two 3x3 convolutions, as in ResNet-18 and -34, and other stems are not supported)")
  if arrays[name].ndim != 4:
    raise WeightsError(f"{name} has shape {list(arrays[name].shape)}; expected 4 dimensions")
  return arrays[name]


def timm_config(spec: ResNetSpec, num_classes: int, preprocessing: Preprocessing | None) -> dict:
  """The config.json of a timm hub folder; inverse of what `recognise` reads."""
  kind = {1: "resnet50", 2: "resnetv2_50" if spec.norm == "batch" else "resnetv2_50x1_bit"}[spec.version]
  arguments = {"layers": list(spec.stages)}
  if spec.version == 2:
    arguments |= {"channels": list(spec.widths), "stem_chs": spec.stem_width}
  first, head = ("conv1", "fc") if spec.version == 1 else ("stem.conv", "head.fc")
  config = {"architecture": kind, "num_classes": num_classes, "num_features": spec.width, "global_pool": "avg",
            "model_args": arguments, "transferlab": {"groups": spec.groups},
            "pretrained_cfg": {"num_classes": num_classes, "first_conv": first, "classifier": head,
                               "input_size": [3, spec.image_size, spec.image_size]}}
  if preprocessing:
    config["pretrained_cfg"] |= preprocess.to_timm(preprocessing)
  return config
