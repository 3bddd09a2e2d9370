"""How others name and lay out a CLIP's parameters, as tables of `names.py`.

    layout            projections  q, k, v       text tower                      source
    native            (in, out)    one [D, 3D]   text/…                          `backbones/clip.py`
    openai            (in, out)    one [3D, D]   transformer., ln_final, …       openai/CLIP model.py
    open_clip         (in, out)    one [3D, D]   the same, or each under "text." open_clip model.py
    huggingface_clip  (out, in)    three [D, D]  text_model.                     transformers modeling_clip.py
"""
from transferlab.backbones import abstract_params
from transferlab.backbones.clip_spec import CLIPSpec
from transferlab.backbones.spec import ViTSpec
from transferlab.backbones.weights import names
from transferlab.backbones.weights.names import Rule, Transform
from transferlab.tree import flatten

HF = "huggingface_clip"
_CLS = Transform(lambda a: a[0][None, None], lambda x, heads: (x[0, 0],))  # [D] <-> [1, 1, D]
_POS = Transform(lambda a: a[0][None], lambda x, heads: (x[0],))           # [T, D] <-> [1, T, D]
_OPENAI = {
    "image/patch_kernel": "visual.conv1.weight", "image/cls": "visual.class_embedding",
    "image/pos": "visual.positional_embedding", "image/embed_norm": "visual.ln_pre", "image/norm": "visual.ln_post",
    "image_projection/kernel": "visual.proj", "text/tokens": "token_embedding.weight",
    "text/pos": "positional_embedding", "text/norm": "ln_final", "text_projection/kernel": "text_projection",
    "logit_scale": "logit_scale"}
_HF = {
    "image/patch_kernel": "vision_model.embeddings.patch_embedding.weight",
    "image/cls": "vision_model.embeddings.class_embedding",
    "image/pos": "vision_model.embeddings.position_embedding.weight",
    "image/embed_norm": "vision_model.pre_layrnorm",  # spelt so, without the e
    "image/norm": "vision_model.post_layernorm", "image_projection/kernel": "visual_projection.weight",
    "text/tokens": "text_model.embeddings.token_embedding.weight",
    "text/pos": "text_model.embeddings.position_embedding.weight", "text/norm": "text_model.final_layer_norm",
    "text_projection/kernel": "text_projection.weight", "logit_scale": "logit_scale"}
_OPENAI_PARTS = {"ln1": "ln_1", "ln2": "ln_2", "qkv": "attn.in_proj", "proj": "attn.out_proj", "fc1": "mlp.c_fc",
                 "fc2": "mlp.c_proj"}
_HF_PARTS = {"ln1": "layer_norm1", "ln2": "layer_norm2", "proj": "self_attn.out_proj", "fc1": "mlp.fc1",
             "fc2": "mlp.fc2"}
_TRANSFORMS = {"image/patch_kernel": names.CONVOLUTION, "image/cls": _CLS, "image/pos": _POS}


def table(layout: str, spec: CLIPSpec | ViTSpec) -> tuple[Rule, ...]:
  """The rows of a layout for each of the spec's parameters; a ViT's are those of the image tower."""
  prefix = "image/" if spec.family == "vit" else ""
  return tuple(rule(layout, prefix + name)._replace(native=name) for name in flatten(abstract_params(spec)))


def rule(layout: str, native: str) -> Rule:
  """The row of one of a CLIP's parameters, e.g. "text/block_03/ln2/scale"."""
  where, _, leaf = native.rpartition("/")
  ending = "bias" if leaf == "bias" else "weight"
  if "/block_" in where:
    return _in_block(layout, native, *where.split("/"), ending)
  known = _HF if layout == HF else _OPENAI
  if where in known:  # a norm
    return Rule(native, (f"{known[where]}.{ending}",), names.SAME)
  transposed = layout == HF and leaf == "kernel"
  return Rule(native, (known[native],), names.TRANSPOSED if transposed else _TRANSFORMS.get(native, names.SAME))


def block(layout: str, tower: str, index) -> str:
  """A layout's name of block `index` of the "image" or the "text" tower."""
  if layout == HF:
    return f"{'vision' if tower == 'image' else 'text'}_model.encoder.layers.{index}"
  return f"{'visual.' if tower == 'image' else ''}transformer.resblocks.{index}"


def _in_block(layout: str, native: str, tower: str, name: str, part: str, ending: str) -> Rule:
  there = block(layout, tower, int(name.removeprefix("block_")))
  kernel = ending == "weight" and not part.startswith("ln")
  if layout == HF and part == "qkv":
    foreign = tuple(f"{there}.self_attn.{p}_proj.{ending}" for p in "qkv")
    return Rule(native, foreign, names.THREE_TRANSPOSED if kernel else names.THREE)
  joint = "_" if part == "qkv" else "."
  foreign = f"{there}.{(_HF_PARTS if layout == HF else _OPENAI_PARTS)[part]}{joint}{ending}"
  return Rule(native, (foreign,), names.TRANSPOSED if kernel else names.SAME)
