"""Backbones: frozen networks as folds over named sites. Shape letters are the same in the whole library:

B batch, T tokens, D width, H attention heads, L blocks, C classes, R rank, P prompts, N features, K parallel heads.
"""
import dataclasses
import functools
from typing import Any, NamedTuple
from collections.abc import Callable

import jax
import jax.numpy as jnp

from transferlab.backbones.clip import CLIP, Towers, at_end as at_end
from transferlab.backbones.clip_spec import CLIPSpec
from transferlab.backbones.gathering import divided
from transferlab.backbones.resnet import ResNet
from transferlab.backbones.spec import ResNetSpec, SwinSpec, ViTSpec
from transferlab.backbones.swin import Swin
from transferlab.backbones.vit import ViT, attention as attention, gelu as gelu, ignore, normalise as normalise

# family: the class of its specs, the module that computes it
FAMILIES = {"vit": (ViTSpec, ViT), "resnet": (ResNetSpec, ResNet), "swin": (SwinSpec, Swin),
            "clip": (CLIPSpec, CLIP)}


class Backbone(NamedTuple):
  """A network ready to be called.

  Fields:
    spec: its shape, as plain data.
    init: rng -> params, random weights.
    apply: (params, inputs, visit, carry, *, start=0, remat_from=None) -> (features [B, D], carry). `inputs` are
      normalised images [B, S, S, 3], or with start > 0 the tokens or the map that left the block before. Blocks from
      `remat_from` on are recomputed in the backward pass. A CLIP takes and gives `Towers`; its start and remat_from are
      the image tower's, and with remat_from all of the text tower is recomputed, too.
    dtype: that it computes in.
    split: {name: NamedSharding} of the parameters that devices divide among themselves.
  """
  spec: Any
  init: Callable
  apply: Callable
  dtype: Any = jnp.float32
  split: dict = {}


def build(spec, dtype=jnp.float32, split: dict | None = None) -> Backbone:
  """The backbone of a spec, computing in `dtype` (parameters are cast on use).

  Args:
    split: {name: NamedSharding} of the parameters that devices divide among themselves, see `sharding.plan`; none by
      default.
  """
  module = FAMILIES[spec.family][1](spec, dtype)

  def init(rng):
    return module.init(rng, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example(spec)))["params"]

  def apply(params, inputs, visit=ignore, carry=(), *, start=0, remat_from=None):
    return module.apply({"params": divided(params, split or {})}, inputs, visit, carry, start=start,
                        remat_from=remat_from)

  return Backbone(spec, init, apply, dtype, split or {})


def image_shape(spec) -> tuple[int, int, int]:
  """[S, S, 3] of an image that a backbone takes."""
  return spec.image_size, spec.image_size, 3


def example(spec, batch: int = 1):
  """Shapes of what enters a backbone: images, and for a CLIP as many texts."""
  images = jax.ShapeDtypeStruct((batch, *image_shape(spec)), jnp.float32)
  texts = (batch, spec.context) if spec.family == "clip" else None
  return Towers(images, jax.ShapeDtypeStruct(texts, jnp.int32)) if texts else images


@functools.lru_cache(maxsize=64)
def abstract_params(spec):
  """Shapes and dtypes of a backbone's parameters, nothing computed."""
  return jax.eval_shape(build(spec).init, jax.random.key(0))


def sites(spec, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
  """Every site of a backbone in order, with the shape of what it puts out; sites without a value, and biases of
  attention, which are the same for all images, are left out."""
  def run(params, images):
    return build(spec).apply(params, images, record, {})[1]
  names = []
  def record(carry, site, y, x):
    del x
    if y is None or site.endswith("/bias"):
      return carry, y
    names.append(site)
    return {**carry, site: y}, y
  shapes = jax.eval_shape(run, abstract_params(spec), example(spec, batch))
  return {name: shapes[name] for name in names}


# Width, depth, heads, MLP width. B, L, H: Dosovitskiy et al. 2021 table 1; Ti, S: Touvron et al. 2021; g, G: Zhai et
# al. 2022 table 2.
_SIZES = {
  "ti": (192, 12, 3, 768), "s": (384, 12, 6, 1536), "b": (768, 12, 12, 3072), "l": (1024, 24, 16, 4096),
  "h": (1280, 32, 16, 5120), "g": (1408, 40, 16, 6144), "G": (1664, 48, 16, 8192),
}


def _vit(name: str, size: str, patch: int, image_size: int = 224) -> ViTSpec:
  width, depth, heads, mlp_width = _SIZES[size]
  return ViTSpec(name, image_size, patch, width, depth, heads, mlp_width)


# "vit_g14" and "vit_G14" differ by case in the literature; file systems and shells do not all keep it, so G is called
# "gigantic" here, as in timm.
ARCHITECTURES: dict[str, Any] = {name: _vit(name, size, patch) for name, size, patch in (
    ("vit_ti16", "ti", 16), ("vit_s16", "s", 16), ("vit_s32", "s", 32), ("vit_b16", "b", 16), ("vit_b32", "b", 32),
    ("vit_b8", "b", 8), ("vit_l16", "l", 16), ("vit_l32", "l", 32), ("vit_h14", "h", 14), ("vit_h16", "h", 16),
    ("vit_g14", "g", 14), ("vit_gigantic14", "G", 14))}
ARCHITECTURES["vit_tiny_test"] = ViTSpec("vit_tiny_test", 16, 4, 16, 3, 2, 32)  # small enough for tests of every config

for _name, _width, _deep in (("t", 96, 6), ("s", 96, 18), ("b", 128, 18), ("l", 192, 18)):  # Liu et al. 2021, 3.3
  _heads = tuple(_width // 32 * 2 ** _stage for _stage in range(4))
  ARCHITECTURES[f"swin_{_name}"] = SwinSpec(f"swin_{_name}", 224, 4, _width, (2, 2, _deep, 2), _heads)
ARCHITECTURES["swin_tiny_test"] = SwinSpec("swin_tiny_test", 16, 2, 8, (2, 2), (2, 4), 4)

# Radford et al. 2021, tables 19 and 20; the text tower's heads are 64 wide, too.
for _name, _size, _patch, _side, _text, _embed in (("b32", "b", 32, 224, 512, 512), ("b16", "b", 16, 224, 512, 512),
                                                   ("l14", "l", 14, 224, 768, 768),
                                                   ("l14_336", "l", 14, 336, 768, 768)):
  ARCHITECTURES[f"clip_vit_{_name}"] = CLIPSpec(
      f"clip_vit_{_name}", _side, _patch, *_SIZES[_size], _text, 12, _text // 64, 4 * _text, _embed)
ARCHITECTURES["clip_vit_bigg14"] = CLIPSpec(  # mlfoundations/open_clip, model_configs/ViT-bigG-14.json
    "clip_vit_bigg14", 224, 14, *_SIZES["G"], 1280, 32, 20, 5120, 1280, gelu="erf")
ARCHITECTURES["clip_tiny_test"] = CLIPSpec("clip_tiny_test", 16, 4, 16, 3, 2, 32, 24, 2, 2, 48, 12, 64, 16)

_RESNETS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # He et al. 2016 table 1
_WIDTHS = (256, 512, 1024, 2048)
for _blocks, _stages in _RESNETS.items():
  ARCHITECTURES[f"resnet{_blocks}"] = ResNetSpec(f"resnet{_blocks}", 224, _stages, _WIDTHS)
  ARCHITECTURES[f"resnet{_blocks}_v2"] = ResNetSpec(f"resnet{_blocks}_v2", 224, _stages, _WIDTHS, version=2)
for _blocks, _times in ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4)):  # Kolesnikov et al. 2020 section 3
  _name = f"bit_r{_blocks}x{_times}"
  ARCHITECTURES[_name] = ResNetSpec(_name, 224, _RESNETS[_blocks], tuple(_times * width for width in _WIDTHS),
                                    64 * _times, 2, "group", 32)


def architecture(name: str, **changes):
  """The spec of a named architecture, e.g. `architecture("vit_b16", image_size=384)`."""
  from transferlab.tree import nearest
  if name not in ARCHITECTURES:
    raise ValueError(f"backbone {name!r} is unknown; nearest: {', '.join(nearest(name, ARCHITECTURES))}; "
                     f"all: {', '.join(ARCHITECTURES)}")
  return dataclasses.replace(ARCHITECTURES[name], **changes)
