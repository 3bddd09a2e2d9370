"""Swin Transformers in files: timm's names and those of microsoft/Swin-Transformer, which older versions of timm share.

    layout      merge before stage s           classifier   source
    timm_swin   layers.{s}.downsample          head.fc      timm swin_transformer.py, 0.9 and later
    swin        layers.{s-1}.downsample        head         microsoft/Swin-Transformer; timm before 0.9

Widths, blocks, heads and windows show in shapes. The image size shows where the last maps are smaller than the window,
whose bias tables then have their size, and in the masks of shifted windows that old files hold; else the configuration
tells it, else it is the one at which the last map is one window (224 with windows of 7, 384 with 12), and a line in the
log says so. Position indices and masks are computed, and left out here.
"""
import logging
import math
import re
from typing import NamedTuple

import numpy as np

from transferlab.backbones import ARCHITECTURES, abstract_params
from transferlab.backbones.spec import Preprocessing, SwinSpec
from transferlab.backbones.weights import layouts, names, preprocess
from transferlab.backbones.weights.files import WeightsError, parse_json
from transferlab.backbones.weights.layouts import Layout
from transferlab.tree import flatten

_MARK = "layers.0.blocks.0.attn.qkv.weight"
_COMPUTED = (".relative_position_index", ".attn_mask")
_PLACES = {"ln1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "ln2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_MAX_STAGES = 8  # widths double from one to the next
_TIMM_HIDDEN = ("always_partition", "norm_layer", "embed_layer", "head_dim")
_TIMM_NAMES = {f"swin_{letter}": f"swin_{size}_patch4_window7_224"
               for letter, size in (("t", "tiny"), ("s", "small"), ("b", "base"), ("l", "large"))}
log = logging.getLogger(__name__)


class _Stage(NamedTuple):
  """What the arrays of one stage show: blocks, heads, and the side of its windows."""
  blocks: int
  heads: int
  window: int


def recognise(arrays: dict[str, np.ndarray], metadata: dict, config: dict,
              gelu: str | None = None) -> tuple[Layout, SwinSpec] | None:
  """The layout and spec of a Swin's file, None if there is none in it; arguments are as in `layouts.recognise`."""
  with layouts.stored("the configuration"):
    if "transferlab" in metadata or _MARK not in arrays:
      return layouts.native(arrays, metadata, "swin")
    if any(".cpb_mlp." in name or name.endswith(".logit_scale") for name in arrays):
      raise WeightsError("this is a Swin V2 (cosine attention, positions by a small network); expected version 1")
    config = config or parse_json(metadata.get("timm_config", "{}"), "the file's header")
    _check(config)
    after = "layers.0.downsample.reduction.weight" in arrays
    kind = "timm_swin" if "head.fc.weight" in arrays or not after and "head.weight" not in arrays else "swin"
    spec = _infer(kind, arrays, config, gelu)
    arrays = {name: array for name, array in arrays.items() if not name.endswith(_COMPUTED)}
    return Layout(kind, arrays, table(spec, after), {}, lambda size: preprocess.from_timm(config, size)), spec


def _check(config: dict) -> None:
  arguments = config.get("model_args") or {}
  if odd := [f"{name}={arguments[name]!r}" for name in _TIMM_HIDDEN if arguments.get(name)]:
    raise WeightsError(f"timm's {', '.join(odd)} changes the network and shows in no name; not supported")
  if (pooling := config.get("global_pool") or "avg") != "avg":
    raise WeightsError(f"timm's global_pool {pooling!r} is not supported on a Swin; expected 'avg'")


def table(spec: SwinSpec, merge_after: bool = False) -> tuple[names.Rule, ...]:
  """The rows of timm's layout for each of the spec's parameters; `merge_after` counts merges from the stage before."""
  def rule(name):
    kernel = names.CONVOLUTION if name == "patch_kernel" else names.TRANSPOSED
    transform = kernel if name.endswith("kernel") else names.SAME
    return names.Rule(name, (_foreign(spec, name, int(merge_after)),), transform)
  return tuple(map(rule, flatten(abstract_params(spec))))


def _foreign(spec: SwinSpec, name: str, after: int) -> str:
  """timm's name of our parameter, e.g. "block_03/ln2/scale"."""
  outer = {"patch_kernel": "patch_embed.proj.weight", "patch_bias": "patch_embed.proj.bias"}
  if name in outer:
    return outer[name]
  *where, leaf = name.split("/")
  ending = "bias" if leaf == "bias" else "weight"
  if len(where) == 1 and leaf != "relative_bias":
    return f"{'patch_embed.norm' if where[0] == 'patch_norm' else 'norm'}.{ending}"
  part, index = where[0].split("_")
  if part == "merge":
    return f"layers.{int(index) - after}.downsample.{where[1]}.{ending}"
  stage = spec.stage(int(index))
  block = f"layers.{stage}.blocks.{int(index) - sum(spec.stages[:stage])}"
  return f"{block}.attn.relative_position_bias_table" if leaf == "relative_bias" else (
      f"{block}.{_PLACES[where[1]]}.{ending}")


def _infer(kind: str, arrays: dict, config: dict, gelu: str | None) -> SwinSpec:
  ours = config.get("transferlab") or {}  # what timm's configuration has no field for, by `export_timm`
  D, channels, patch, other = _shape(arrays, "patch_embed.proj.weight", 4)
  if channels != 3 or patch != other:
    raise WeightsError(f"the patch embedding takes {patch} x {other} patches of {channels} channels; expected square "
                       "patches of an RGB image")
  found = {(int(m[1]), int(m[2])) for name in arrays if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
  count = 1 + max(stage for stage, _ in found)
  if len(found) > layouts.MAX_DEPTH or count > _MAX_STAGES:
    raise WeightsError(f"the file names {len(found)} blocks in {count} stages; expected at most {layouts.MAX_DEPTH} in "
                       f"{_MAX_STAGES}")
  stages = [_stage(arrays, s, sum(stage == s for stage, _ in found)) for s in range(count)]
  size, known = _image_size(arrays, patch, stages, config)
  hidden = _shape(arrays, "layers.0.blocks.0.mlp.fc1.weight", 2)[0]
  try:
    spec = SwinSpec("swin", size, patch, D, tuple(s.blocks for s in stages), tuple(s.heads for s in stages),
                    max(s.window for s in stages), layouts.mlp_ratio(hidden, D), float(ours.get("norm_eps", 1e-5)),
                    gelu or ours.get("gelu", "erf"), _MARK.replace("weight", "bias") in arrays)
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise WeightsError(f"no Swin can be made of this: {error}") from error
  if not known:
    log.info("nothing in this %s tells its image size; assumed %d px, at which the last map is one window of %d",
             kind, size, spec.window)
  return named(spec, ours.get("name"))


def _stage(arrays: dict, stage: int, blocks: int) -> _Stage:
  name = f"layers.{stage}.blocks.0.attn.relative_position_bias_table"
  rows, heads = _shape(arrays, name, 2)
  side = math.isqrt(rows)
  if side * side != rows or side % 2 == 0:
    raise WeightsError(f"{name} has {rows} rows; expected (2w-1)^2 of a square window of side w")
  return _Stage(blocks, heads, (side + 1) // 2)


def _image_size(arrays: dict, patch: int, stages: list[_Stage], config: dict) -> tuple[int, bool]:
  """(the side of the images, whether anything tells it)."""
  largest = max(stage.window for stage in stages)
  for s, stage in enumerate(stages):
    mask = next((arrays[name] for i in range(stage.blocks) if (name := f"layers.{s}.blocks.{i}.attn_mask") in arrays),
                None)  # [nW, t, t]
    if mask is not None:
      return math.isqrt(len(mask)) * stage.window * patch * 2 ** s, True
    if stage.window < largest:  # the whole map
      return stage.window * patch * 2 ** s, True
  stated = (config.get("model_args") or {}).get("img_size")
  stated = stated or (config.get("pretrained_cfg") or config).get("input_size")
  if stated:
    return int(stated if isinstance(stated, (int, float)) else stated[-1]), True
  return largest * patch * 2 ** (len(stages) - 1), False


def _shape(arrays: dict, name: str, ndim: int) -> tuple[int, ...]:
  if name not in arrays:
    raise WeightsError(f"{name} is missing, although the file looks like a Swin's")
  if arrays[name].ndim != ndim:
    raise WeightsError(f"{name} has shape {list(arrays[name].shape)}; expected {ndim} dimensions")
  return arrays[name].shape


def named(spec: SwinSpec, name: str | None = None) -> SwinSpec:
  """The spec under a given name, its architecture's, or one made of its sizes: "swin_w8_d2-1-2-1"."""
  made = f"swin_w{spec.embed_width}_d{'-'.join(map(str, spec.stages))}"
  name = name or next((name for name, other in ARCHITECTURES.items() if other.sizes == spec.sizes), made)
  return SwinSpec(**{**spec.__dict__, "name": str(name)})


def timm_arrays(spec: SwinSpec, params: dict, head: dict | None):
  """(arrays under the names of timm 0.9 and later, number of classes)."""
  if spec.norm_eps != 1e-5 or spec.gelu != "erf":
    log.warning("timm builds this Swin with LayerNorm eps 1e-5 and exact GELU; these weights use %g and %s, which the "
                "configuration keeps", spec.norm_eps, spec.gelu)
  arrays = names.from_native(names.expand(table(spec), 0), params, 0)
  arrays |= names.from_native(names.expand(names.HEADS["timm_swin"], 0), head or {}, 0)
  return arrays, len(head["bias"]) if head else 0


def timm_config(spec: SwinSpec, num_classes: int, preprocessing: Preprocessing | None) -> dict:
  """The config.json of a timm hub folder; "transferlab" holds what timm has no field for."""
  config = {
      "architecture": _TIMM_NAMES.get(spec.name, "swin_base_patch4_window7_224"), "num_classes": num_classes,
      "num_features": spec.width, "global_pool": "avg",
      "model_args": {
          "img_size": spec.image_size, "patch_size": spec.patch_size, "embed_dim": spec.embed_width,
          "depths": list(spec.stages), "num_heads": list(spec.stage_heads), "window_size": spec.window,
          "mlp_ratio": spec.mlp_ratio, "qkv_bias": spec.qkv_bias},
      "transferlab": {"name": spec.name, "norm_eps": spec.norm_eps, "gelu": spec.gelu},
      "pretrained_cfg": {"num_classes": num_classes, "first_conv": "patch_embed.proj", "classifier": "head.fc",
                         "input_size": [3, spec.image_size, spec.image_size]}}
  if preprocessing:
    config["pretrained_cfg"] |= preprocess.to_timm(preprocessing)
  return config
