"""CLIPs in files: OpenAI's archives and state dicts, open_clip's, Hugging Face's folders, and our own.

Names are in `clip_names.py`, and sizes are inferred from shapes; heads and the form of GELU show in none. The
configuration tells them, and what it leaves out has its library's defaults. Without one, heads are 64 wide as in every
published CLIP, unless the caller knows better; GELU is OpenAI's quick one in a .pt file and open_clip's exact one in a
.safetensors file, since the two share their names and OpenAI wrote none of the latter. An image tower without a text
tower is a ViT.
"""
import dataclasses
import logging
import math
import re
from typing import NamedTuple

import numpy as np

from transferlab.backbones import ARCHITECTURES
from transferlab.backbones.clip_spec import CLIPSpec
from transferlab.backbones.spec import ViTSpec
from transferlab.backbones.weights import layouts, preprocess
from transferlab.backbones.weights.clip_names import HF, block, rule, table
from transferlab.backbones.weights.files import WeightsError
from transferlab.backbones.weights.layouts import Layout

HEAD_WIDTH = 64
NORM_EPS = 1e-5
_IMAGES = ("visual.class_embedding", "vision_model.embeddings.class_embedding")
_COMPUTED = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
_TEXT_ONLY = ("image_projection/kernel", "logit_scale")  # what an image tower alone has no use for
_OTHERS = {  # parts of names that belong to CLIP's relatives -> what they show
    "visual.attnpool.": "a ResNet as its image tower", "visual.layer1.": "a ResNet as its image tower",
    "visual.trunk.": "an image tower of timm's", "visual.blocks.": "EVA's image tower",
    "visual.attn_pool": "a pooling by attention", "vision_model.head.": "a pooling by attention",
    "patch_embedding.bias": "SigLIP's embedding", "logit_bias": "SigLIP's loss", "text_decoder.": "a decoder of text",
    "text.transformer.embeddings.": "a text tower of Hugging Face's", ".ls_1.": "layer scale"}
_OPEN_CLIP_USUAL = {"pool_type": ("tok", "argmax"), "act_kwargs": (), "norm_kwargs": (), "no_causal_mask": (),
                    "global_average_pool": (), "embed_cls": ()}
log = logging.getLogger(__name__)


class _Facts(NamedTuple):
  """What a configuration says; None where it says nothing."""
  gelu: str
  norm_eps: float = NORM_EPS
  heads: int | None = None
  text_heads: int | None = None
  end: int | None = None  # the id at which texts are read


def recognise(arrays: dict[str, np.ndarray], metadata: dict, config: dict, preprocessor: dict | None, *,
              torch: bool = False, heads=None, gelu: str | None = None, asked=None):
  """The layout and spec of a CLIP's file, None if there is none in it.

  Args:
    arrays, metadata, config, preprocessor: as in `layouts.recognise`; `config` may be open_clip's.
    torch: whether the file is a .pt or .pth.
    heads: of the image tower, or a pair, of both towers, where the file tells none.
    gelu: instead of what the file tells.
    asked: the spec that the caller expects, whose heads serve a file of the same width.

  Returns:
    (Layout, CLIPSpec), or (Layout, ViTSpec) of an image tower without a text tower.
  """
  with layouts.stored("the configuration"):
    if "transferlab" in metadata:
      return _native(arrays, metadata, heads, gelu)
    arrays = {name.removeprefix("module."): array for name, array in arrays.items()}  # of open_clip's parallel training
    if not any(name.startswith(("visual.", "vision_model.", "text_model.")) for name in arrays):
      return None
    _refuse_others(arrays, config)
    whose, facts = _origin(arrays, config, torch)
    ignored = tuple(name for name in arrays if name.split(".")[-1] in _COMPUTED)
    arrays = {name.removeprefix("text."): array for name, array in arrays.items() if name not in ignored}
    spec = _infer(whose, arrays, facts._replace(gelu=gelu or facts.gelu), heads, asked)
    if spec.family == "vit":
      alone = tuple(name for native in _TEXT_ONLY if (name := rule(whose, native).foreign[0]) in arrays)
      arrays, ignored = {n: array for n, array in arrays.items() if n not in alone}, ignored + alone
    read = {HF: lambda size: preprocess.from_huggingface_clip(preprocessor, size), "openai": preprocess.of_clip,
            "open_clip": lambda size: preprocess.from_open_clip(config, size)}[whose]
    return Layout(whose, arrays, table(whose, spec), {}, read, ignored), spec


def _native(arrays: dict, metadata: dict, heads, gelu: str | None):
  """Of a file of ours, whose header knows everything."""
  if (found := layouts.native(arrays, metadata, "clip")) is None:
    return None
  layout, spec = found
  if heads not in (None, known := (spec.heads, spec.text_heads)):
    raise WeightsError(f"you asked for attention heads {heads}; the file has {known}, of images and of texts")
  return layout, dataclasses.replace(spec, gelu=gelu or spec.gelu)


def _refuse_others(arrays: dict, config: dict) -> None:
  if (kind := config.get("model_type", "clip")) not in ("clip", "clip_vision_model", "clip_text_model"):
    raise WeightsError(f"config.json describes a {kind!r}; expected model_type 'clip' or 'clip_vision_model'")
  if found := sorted({what for part, what in _OTHERS.items() if any(part in name for name in arrays)}):
    raise WeightsError(f"this CLIP has {', '.join(found)}, which is not supported; expected a ViT and CLIP's own text "
                       "tower, as in the CLIPs named ViT-B/16 and alike")
  if not any(mark in arrays for mark in _IMAGES):
    alone = "text_model.final_layer_norm.weight" in arrays
    raise WeightsError(f"{'this is a text tower alone' if alone else 'this looks like a CLIP without an image tower'}; "
                       f"expected {' or '.join(_IMAGES)}")


def _origin(arrays: dict, config: dict, torch: bool) -> tuple[str, _Facts]:
  """(layout, what is known of the network) of a file with an image tower."""
  if _IMAGES[1] in arrays:
    return HF, _of_huggingface(config)
  if "model_cfg" in config:
    return "open_clip", _of_open_clip(config["model_cfg"])
  if "input_resolution" in arrays:
    return "openai", _Facts("quick")
  openai = torch and "text.token_embedding.weight" not in arrays
  log.warning("nothing in this file tells whether its GELU is CLIP's quick one or the exact one; assumed %s. Put "
              "open_clip_config.json beside it, or pass gelu=", "the quick one, as OpenAI's" if openai else
              "the exact one, as open_clip's")
  return ("openai", _Facts("quick")) if openai else ("open_clip", _Facts("erf"))


def _of_open_clip(model: dict) -> _Facts:
  """Of `model_cfg` in open_clip_config.json; what it leaves out has open_clip's defaults."""
  vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
  if odd := [f"{name}={part[name]!r}" for part in (vision, text) for name, usual in _OPEN_CLIP_USUAL.items()
             if part.get(name) and part[name] not in usual]:
    raise WeightsError(f"open_clip's {', '.join(odd)} changes the network and shows in no name; not supported")
  return _Facts("quick" if model.get("quick_gelu") else "erf", NORM_EPS,
                vision.get("width", 768) // vision.get("head_width", HEAD_WIDTH), text.get("heads", 8))


def _of_huggingface(config: dict) -> _Facts:
  """Of config.json; transformers writes only what differs from CLIPConfig's defaults."""
  if not config:
    log.warning("no config.json beside these weights; assumed as OpenAI's: quick GELU, heads %d wide", HEAD_WIDTH)
    return _Facts("quick")
  part = lambda name: (config.get(f"{name}_config") or {}) | (config.get(f"{name}_config_dict") or {})
  vision, text = part("vision"), part("text")
  if config.get("model_type") == "clip_vision_model":
    vision = text = config
  both = lambda field, default: {tower.get(field, default) for tower in (vision, text)}
  gelus, epsilons = both("hidden_act", "quick_gelu"), both("layer_norm_eps", NORM_EPS)
  if unknown := sorted(str(name) for name in gelus if name not in layouts.HF_GELUS):
    raise WeightsError(f"hidden_act {unknown[0]!r} is not supported; expected one of {', '.join(layouts.HF_GELUS)}")
  if len(gelus) > 1 or len(epsilons) > 1:
    raise WeightsError(f"the towers have hidden_act {sorted(gelus)} and layer_norm_eps {sorted(epsilons)}; expected "
                       "one of each for both")
  return _Facts(layouts.HF_GELUS[gelus.pop()], float(epsilons.pop()), vision.get("num_attention_heads", 12),
                text.get("num_attention_heads", 8), text.get("eos_token_id"))


# --- What shapes say ------------------------------------------------------------------------------------------------

def _infer(whose: str, arrays: dict, facts: _Facts, heads, asked) -> CLIPSpec | ViTSpec:
  if not 0 < facts.norm_eps < 1:
    raise WeightsError(f"the configuration says LayerNorm eps {facts.norm_eps}; expected a small positive number")
  told, text_told = heads if isinstance(heads, tuple) else (heads, None)
  image_size, patch, D = _image(whose, arrays)
  depth, mlp = _blocks(whose, arrays, "image")
  H = _heads("image", D, facts.heads, told, getattr(asked, "width", None), getattr(asked, "heads", None))
  shape = (image_size, patch, D, depth, H, mlp)
  if rule(whose, "text/tokens").foreign[0] not in arrays:
    spec = ViTSpec("vit", *shape, norm_eps=facts.norm_eps, gelu=facts.gelu, patch_bias=False, embed_norm=True)
    return dataclasses.replace(spec, name=layouts.variant(spec))
  vocabulary, width = _shape(whose, arrays, "text/tokens", 2)
  depth, mlp = _blocks(whose, arrays, "text")
  H = _heads("text", width, facts.text_heads, text_told, getattr(asked, "text_width", None),
             getattr(asked, "text_heads", None))
  if facts.end not in (None, 2, vocabulary - 1):  # 2 is how older configurations say: at the largest id
    raise WeightsError(f"config.json reads texts at token {facts.end!r}; expected the last of the vocabulary, "
                       f"{vocabulary - 1}")
  joint, context = _shape(whose, arrays, "text_projection/kernel", 2)[1], _shape(whose, arrays, "text/pos", 2)[0]
  return _named(CLIPSpec("clip", *shape, width, depth, H, mlp, joint, vocabulary, context, facts.norm_eps, facts.gelu))


def _image(whose: str, arrays: dict) -> tuple[int, int, int]:
  """(image size, patch size, width) of the image tower."""
  p, q, channels, D = _shape(whose, arrays, "image/patch_kernel", 4)
  if p != q or channels != 3:
    raise WeightsError(f"the patch embedding takes {p} x {q} patches of {channels} channels; expected square patches "
                       "of an RGB image")
  rows = _shape(whose, arrays, "image/pos", 2)[1]
  side = math.isqrt(rows - 1)
  if not side or side * side + 1 != rows:
    raise WeightsError(f"the position table has {rows} rows; expected a square grid and a class token")
  return side * p, p, D


def _blocks(whose: str, arrays: dict, tower: str) -> tuple[int, int]:
  """(number of blocks, width of their MLPs) of a tower."""
  pattern = re.compile(re.escape(block(whose, tower, "#")).replace(r"\#", r"(\d{1,9})") + r"\.")
  last = max((int(m[1]) for name in arrays if (m := pattern.match(name))), default=-1)
  if not 0 <= last < layouts.MAX_DEPTH:
    raise WeightsError(f"the {tower} tower has {last + 1} blocks; expected 1 to {layouts.MAX_DEPTH}")
  return last + 1, _shape(whose, arrays, f"{tower}/block_00/fc1/kernel", 2)[1]


def _heads(tower: str, width: int, stated, told: int | None, asked_width: int | None, asked: int | None) -> int:
  """Attention heads: the configuration's word, then the caller's, then that of the architecture he asked for if it has
  this width, then heads of the usual width."""
  if None not in (stated, told) and stated != told:
    raise WeightsError(f"you asked for {told} attention heads in the {tower} tower; the configuration has {stated}")
  usual = None if width % HEAD_WIDTH else width // HEAD_WIDTH
  heads = next((h for h in (stated, told, asked if asked_width == width else None, usual) if h is not None), None)
  if heads is None:
    raise WeightsError(f"the attention heads of the {tower} tower cannot be told from its width {width}, no multiple "
                       f"of {HEAD_WIDTH}; pass heads=(of images, of texts) or an architecture=")
  if type(heads) is not int or heads < 1 or width % heads:
    raise WeightsError(f"the {tower} tower of width {width} is to have {heads!r} attention heads; expected a divisor "
                       "of the width")
  return heads


def _named(spec: CLIPSpec) -> CLIPSpec:
  """The spec under its architecture's name, or one made of its sizes: "clip_w128_d2_p8"."""
  same = [name for name, other in ARCHITECTURES.items() if other.sizes == spec.sizes]
  exact = [name for name in same if ARCHITECTURES[name].image_size == spec.image_size]
  made = f"clip_w{spec.width}_d{spec.depth}_p{spec.patch_size}"
  return dataclasses.replace(spec, name=next(iter(exact + same), made))


def _shape(whose: str, arrays: dict, native: str, ndim: int) -> tuple[int, ...]:
  """The shape that a parameter will have here, of a file's array of `ndim` dimensions."""
  row = rule(whose, native)
  name = row.foreign[0]
  if name not in arrays:
    raise WeightsError(f"{name} is missing, although the file looks like a CLIP's")
  if (array := arrays[name]).ndim != ndim:
    raise WeightsError(f"{name} has shape {list(array.shape)}; expected {ndim} dimensions")
  return row.transform.load([array]).shape
