"""Whose file is this, and which ViT is in it? Recognised by names, inferred from shapes, settled by configuration.

`recognise` turns a checkpoint into a `Layout`: its arrays under the names that a table of `names.py` knows, and the
facts about the network that shapes cannot show (heads, LayerNorm epsilon, GELU form, pooling). `infer` makes the spec.
"""
import contextlib
import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from transferlab import config as configs
from transferlab.backbones import ARCHITECTURES, FAMILIES, abstract_params
from transferlab.backbones.spec import Preprocessing, ViTSpec
from transferlab.backbones.weights import names, preprocess
from transferlab.backbones.weights.files import WeightsError, parse_json
from transferlab.tree import flatten

MAX_DEPTH = 256
_GOOGLE_PREFIXES = ("", "params/", "opt/target/", "target/")
HF_GELUS = {"gelu": "erf", "gelu_python": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh",
            "quick_gelu": "quick"}
_TIMM_GELUS = {None: "erf", "gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}
_TIMM_HIDDEN = ("pool_include_prefix", "norm_layer", "block_fn", "attn_layer", "mlp_layer")
UNSUPPORTED = {  # parts of names that belong to relatives of the plain ViT -> what they are
    "MAPHead": "a pooling by attention (MAP head)", "attn_pool": "a pooling by attention",
    ".ls1.": "layer scale", "gamma_1": "layer scale", "layer_scale": "layer scale", "w12": "a SwiGLU MLP",
    "fc1_g": "a SwiGLU MLP", "reg_token": "register tokens", "register": "register tokens",
    "q_norm": "normalised queries", "dist_token": "a distillation token", "distillation": "a distillation token",
    "visual.": "a CLIP under names of its own", "vision_model": "a CLIP under names of its own", "img/": "two towers",
    "decoder": "a decoder", "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "conv_root": "a ResNet stem", "layer1.": "a ResNet"}


class Layout(NamedTuple):
  """A recognised checkpoint.

  Fields:
    name: "native", "google", "timm", "huggingface", or one of `resnets.py` and `swins.py`.
    arrays: {name as in `rules`: float32 array}; consumed by the conversion.
    rules: the table of names.
    facts: fields of the spec that the file or its configuration states.
    preprocessing: image_size -> Preprocessing or None, from the file's own configuration.
    ignored: names that were left out on purpose.
    source: what the file itself says of its origin.
  """
  name: str
  arrays: dict[str, np.ndarray]
  rules: tuple[names.Rule, ...]
  facts: dict
  preprocessing: object
  ignored: tuple[str, ...] = ()
  source: str = ""


def google_parameters(found: list[str]) -> dict[str, str]:
  """{name in an npz: name without the prefix} of its parameters; optimiser state is left out."""
  for prefix in _GOOGLE_PREFIXES:
    if f"{prefix}embedding/kernel" in found:
      return {name: name[len(prefix):] for name in found if name.startswith(prefix)}
  raise WeightsError(f"no ViT of Google's among the {len(found)} arrays ({', '.join(found[:3])}, …): expected "
                     f"embedding/kernel, possibly after {', '.join(_GOOGLE_PREFIXES[1:])}{hint(found)}")


def hint(found) -> str:
  """What names that no ViT has may belong to, as the end of a sentence."""
  found = list(found)
  what = sorted({meaning for part, meaning in UNSUPPORTED.items() if any(part in name for name in found)})
  return f"; its names show {', '.join(what)}, which is not supported here" if what else ""


@contextlib.contextmanager
def stored(what: str):
  """Turns what an odd configuration makes of the code inside into one line about that configuration."""
  try:
    yield
  except WeightsError:
    raise
  except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
    raise WeightsError(f"{what} stored with these weights cannot be used: {type(error).__name__}: {error}") from error


def recognise(arrays: dict[str, np.ndarray], metadata: dict, config: dict, preprocessor: dict | None) -> Layout:
  """The layout of a file's arrays; `config` and `preprocessor` are the JSON files beside it, {} and None without."""
  with stored("the configuration"):
    return _recognise(arrays, metadata, config, preprocessor)


def _recognise(arrays, metadata, config, preprocessor) -> Layout:
  if "transferlab" in metadata:
    return _native(arrays, parse_json(metadata["transferlab"], "the file's header"))
  if "embedding/kernel" in arrays:
    return _google(arrays)
  if "patch_embed.proj.weight" in arrays:
    return _timm(arrays, config or parse_json(metadata.get("timm_config", "{}"), "the file's header"))
  for prefix in ("vit.", ""):
    if f"{prefix}embeddings.patch_embeddings.projection.weight" in arrays:
      return _huggingface(arrays, prefix, config, preprocessor)
  raise WeightsError(f"no ViT found among the {len(arrays)} parameters ({', '.join(list(arrays)[:3])}, …): expected "
                     f"the names of timm, of Hugging Face's ViT or of transferlab{hint(arrays)}")


def _native(arrays, header: dict) -> Layout:
  if "method" in header:
    raise WeightsError("this is an adapter, not a backbone; give it with --adapter and its backbone with --backbone")
  facts = ViTSpec(**header["spec"]).to_dict()
  preprocessing = Preprocessing.from_dict(header["preprocessing"])
  return Layout("native", arrays, names.native(), facts, lambda size: preprocessing,
                source=str(header.get("source", "")))


def native(arrays, metadata: dict, family: str) -> tuple[Layout, object] | None:
  """The layout and spec of a file of ours with a ResNet, a Swin or a CLIP; None if it holds another family, or is not
  ours."""
  header = parse_json(metadata.get("transferlab", "{}"), "the file's header")
  if not isinstance(header.get("spec"), dict) or header["spec"].get("family") != family:
    return None
  spec = configs.fill(FAMILIES[family][0], header["spec"], "spec")
  if (depth := max(spec.depth, getattr(spec, "text_depth", 0))) > MAX_DEPTH:
    raise WeightsError(f"the header names {depth} blocks; expected at most {MAX_DEPTH}")
  preprocessing = Preprocessing.from_dict(header["preprocessing"])
  rules = tuple(names.Rule(name, (name,), names.SAME) for name in flatten(abstract_params(spec)))
  return Layout("native", arrays, rules, {}, lambda size: preprocessing, source=str(header.get("source", ""))), spec


def _google(arrays) -> Layout:
  if any("MAPHead" in name for name in arrays):
    raise WeightsError("these weights pool by attention (MAP head, as big_vision's G/14 and SigLIP); expected a "
                       "class token or mean pooling")
  for name in [n for n in arrays if n.startswith("Transformer/encoderblock/")]:  # scan: one array of all blocks
    if len(arrays[name]) > MAX_DEPTH:
      raise WeightsError(f"{name} stacks {len(arrays[name])} blocks; expected at most {MAX_DEPTH}")
    for i, block in enumerate(arrays.pop(name)):
      arrays[name.replace("encoderblock", f"encoderblock_{i}", 1)] = block
  old = any("/MlpBlock_3/" in name for name in arrays)
  facts = {"norm_eps": 1e-6, "gelu": "erf", "pool": "cls" if "cls" in arrays else "mean"}
  query = arrays.get(f"Transformer/encoderblock_0/MultiHeadDotProductAttention_{int(old)}/query/kernel")
  if query is not None and query.ndim == 3:
    facts["heads"] = query.shape[1]
  return Layout("google", arrays, names.google(old), facts, lambda size: None)


def _timm(arrays, config: dict) -> Layout:
  arguments = config.get("model_args") or {}
  if "_rpn_" in str(config.get("architecture")):
    raise WeightsError(f"{config['architecture']} normalises after each branch (rpn); only pre-norm ViTs are supported")
  if odd := [f"{name}={arguments[name]!r}" for name in _TIMM_HIDDEN if arguments.get(name)]:
    raise WeightsError(f"timm's {', '.join(odd)} changes the network and shows in no name; not supported")
  pooling = arguments.get("global_pool", config.get("global_pool")) or "token"
  if pooling not in ("token", "avg"):
    raise WeightsError(f"timm's global_pool {pooling!r} is not supported; expected 'token' or 'avg'")
  if (activation := arguments.get("act_layer")) not in _TIMM_GELUS:
    raise WeightsError(f"timm's act_layer {activation!r} is not supported; expected gelu, gelu_tanh or quick_gelu")
  norm = "fc_norm" if "fc_norm.weight" in arrays else "norm"
  clip = "norm_pre.weight" in arrays  # timm builds CLIP's image towers with torch's own eps
  quick = "_clip_quickgelu_" in str(config.get("architecture")) and activation is None
  facts = {"norm_eps": 1e-5 if clip else 1e-6, "gelu": "quick" if quick else _TIMM_GELUS[activation]}
  after = "cls" if pooling == "token" and "cls_token" in arrays else "mean"
  facts["pool"] = "mean_before_norm" if norm == "fc_norm" else after
  if "num_heads" in arguments:
    facts["heads"] = arguments["num_heads"]
  ours = config.get("transferlab") or {}  # what timm's configuration has no field for, by `export_timm`
  facts |= {name: kind(ours[name]) for name, kind in (("name", str), ("norm_eps", float)) if name in ours}
  return Layout("timm", arrays, names.timm(norm, clip), facts, lambda size: preprocess.from_timm(config, size))


def _huggingface(arrays, prefix: str, config: dict, preprocessor: dict | None) -> Layout:
  if (kind := config.get("model_type", "vit")) != "vit":
    raise WeightsError(f"config.json describes a {kind!r}; expected model_type 'vit'{hint(arrays)}")
  activation = config.get("hidden_act", "gelu")
  if activation not in HF_GELUS:
    raise WeightsError(f"hidden_act {activation!r} is not supported; expected one of {', '.join(HF_GELUS)}")
  # transformers writes only what differs from ViTConfig's defaults, so absent fields have those, not ours.
  facts = {"norm_eps": float(config.get("layer_norm_eps", 1e-12)), "gelu": HF_GELUS[activation], "pool": "cls"}
  if config:
    facts["heads"] = config.get("num_attention_heads", 12)
  ignored = tuple(n for n in arrays if n.startswith(f"{prefix}pooler.") or n == f"{prefix}embeddings.mask_token")
  arrays = {name: array for name, array in arrays.items() if name not in ignored}
  read = lambda size: None if preprocessor is None else preprocess.from_huggingface(preprocessor, size)
  return Layout("huggingface", arrays, names.huggingface(prefix), facts, read, ignored)


def infer(layout: Layout, heads: int | None = None, gelu: str | None = None) -> ViTSpec:
  """The spec of a file: sizes from shapes, the rest from `layout.facts` and the arguments.

  A position table without a row for the class token gets one of zeros: adding it changes nothing.
  """
  D, patch = _patch(layout)
  block = next(rule for rule in layout.rules if rule.native == "block_{i:02d}/fc1/kernel")
  mlp = _get(layout, block.at(0), 2)[-1]
  pattern = re.escape(block.foreign[0].replace("{i:02d}", "{i}")).replace(re.escape("{i}"), r"(\d+)")
  depth = 1 + max(int(m[1]) for name in layout.arrays if (m := re.fullmatch(pattern, name)))
  if depth > MAX_DEPTH:
    raise WeightsError(f"the file names block {depth - 1}; expected at most {MAX_DEPTH} blocks")
  facts = dict(layout.facts)
  embed_norm, patch_bias = (any(r.native == name and r.foreign[0] in layout.arrays for r in layout.rules)
                            for name in ("embed_norm/scale", "patch_bias"))
  heads = _heads(facts.get("heads"), heads, D, mlp)
  if not 0 < facts["norm_eps"] < 1:
    raise WeightsError(f"the configuration says LayerNorm eps {facts['norm_eps']}; expected a small positive number")
  class_token, side = _positions(layout)
  try:
    spec = ViTSpec("vit", side * patch, patch, D, depth, heads, mlp, class_token, facts["pool"], facts["norm_eps"],
                   gelu or facts["gelu"], _find(layout, "block_{i:02d}/qkv/bias").at(0).foreign[0] in layout.arrays,
                   patch_bias or not embed_norm, embed_norm)
  except (TypeError, ValueError) as error:
    raise WeightsError(f"no ViT can be made of this: {error}") from error
  spec = dataclasses.replace(spec, name=facts.get("name") or variant(spec))
  if wrong := [f"{field} {facts[field]!r} and {value!r}" for field, value in spec.to_dict().items()
               if layout.name == "native" and field != "gelu" and value != facts[field]]:
    raise WeightsError(f"the file's header and its arrays disagree: {', '.join(wrong)}")
  return spec


def variant(spec: ViTSpec) -> str:
  """The name of the architecture with these sizes, or of the CLIP with this image tower, or one made of the sizes:
  "vit_w48_d3_p8"."""
  towers = {name: other.image if other.family == "clip" else other for name, other in ARCHITECTURES.items()}
  return next((name for name, other in towers.items() if other.sizes == spec.sizes),
              f"{'clip' if spec.embed_norm else 'vit'}_w{spec.width}_d{spec.depth}_p{spec.patch_size}")


def mlp_ratio(mlp_width: int, width: int) -> float:
  """The ratio from which int(width * ratio) gives the MLP's width again."""
  ratio = mlp_width / width
  return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def _heads(stated, asked: int | None, D: int, mlp: int) -> int:
  """Heads show in no shape but Google's: the file's own word, then the caller's, then the width of a known ViT."""
  known = {(s.width, s.mlp_width): s.heads for s in ARCHITECTURES.values() if s.family == "vit"}
  if asked is not None and stated is not None and asked != stated:
    raise WeightsError(f"you asked for {asked} attention heads; the file has {stated}")
  heads = next((h for h in (stated, asked, known.get((D, mlp))) if h is not None), None)
  if heads is None:
    raise WeightsError(f"the number of attention heads cannot be told from width {D} and MLP width {mlp}; pass heads= "
                       "or an architecture=")
  if not isinstance(heads, int) or heads < 1:
    raise WeightsError(f"the number of attention heads is {heads!r}; expected a positive whole number")
  return heads


def _find(layout: Layout, native: str) -> names.Rule:
  return next(rule for rule in layout.rules if rule.native == native)


def _get(layout: Layout, rule: names.Rule, ndim: int) -> tuple[int, ...]:
  name = rule.foreign[0]
  if name not in layout.arrays:
    raise WeightsError(f"{name} is missing, although the file looks like {layout.name}'s{hint(layout.arrays)}")
  if (array := layout.arrays[name]).ndim != ndim:
    raise WeightsError(f"{name} has shape {list(array.shape)}; expected {ndim} dimensions")
  return rule.transform.load([array]).shape


def width(layout: Layout) -> int:
  """The width D of a recognised file."""
  return _patch(layout)[0]


def _patch(layout: Layout) -> tuple[int, int]:
  p, q, channels, D = _get(layout, _find(layout, "patch_kernel"), 4)
  if p != q or channels != 3:
    raise WeightsError(f"the patch embedding takes {p} x {q} patches of {channels} channels; expected square patches "
                       f"of an RGB image{hint(layout.arrays)}")
  return D, p


def _positions(layout: Layout) -> tuple[bool, int]:
  rule = _find(layout, "pos")
  rows = _get(layout, rule, 3)[1]
  class_token = _find(layout, "cls").foreign[0] in layout.arrays
  if class_token and math.isqrt(rows) ** 2 == rows:
    table = layout.arrays[rule.foreign[0]]
    layout.arrays[rule.foreign[0]] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    rows += 1
  side = math.isqrt(max(rows - class_token, 0))
  if not side or side * side + class_token != rows:
    expected = "a square grid" + " and a class token" * class_token
    raise WeightsError(f"{rule.foreign[0]} has {rows} rows; expected {expected} (rectangular tables are not supported)"
                       f"{hint(layout.arrays)}")
  return class_token, side
