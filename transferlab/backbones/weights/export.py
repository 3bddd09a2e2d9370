"""Weights written back: in timm's names, for others, and in ours.

A timm export is a folder (`model.safetensors`, `config.json`) that `timm.create_model("local-dir:…")` opens, or one
file with the same configuration in its header. Either way the file is whole or absent. timm has no text towers: of a
CLIP it gets the image tower, up to the norm of its class token.
"""
import json
import logging
from pathlib import Path

import numpy as np

from transferlab.backbones import abstract_params
from transferlab.backbones.spec import Preprocessing, ViTSpec
from transferlab.backbones.weights import layouts, names, preprocess, resnets, swins
from transferlab.backbones.weights.files import WeightsError, write_json, write_safetensors
from transferlab.tree import difference, flatten

log = logging.getLogger(__name__)
_TIMM_NAMES = {  # timm needs a name it has registered; model_args then overrides each of its sizes
    "vit_ti16": "vit_tiny_patch16_224", "vit_s16": "vit_small_patch16_224", "vit_s32": "vit_small_patch32_224",
    "vit_b16": "vit_base_patch16_224", "vit_b32": "vit_base_patch32_224", "vit_b8": "vit_base_patch8_224",
    "vit_l16": "vit_large_patch16_224", "vit_l32": "vit_large_patch32_224", "vit_h14": "vit_huge_patch14_224",
    "vit_g14": "vit_giant_patch14_224", "vit_gigantic14": "vit_gigantic_patch14_224",
    "clip_vit_b32": "vit_base_patch32_clip_224", "clip_vit_b16": "vit_base_patch16_clip_224",
    "clip_vit_l14": "vit_large_patch14_clip_224", "clip_vit_l14_336": "vit_large_patch14_clip_336",
    "clip_vit_bigg14": "vit_gigantic_patch14_clip_224"}
_TIMM_EPS = {False: 1e-6, True: 1e-5}  # by whether it is a CLIP's image tower
_TIMM_ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}


def export_timm(weights, path, spec: ViTSpec | None = None, head: dict | None = None,
                preprocessing: Preprocessing | None = None) -> Path:
  """Writes weights with timm's names: fused qkv, dense kernels (out, in), patch kernel [D, 3, p, p].

  Args:
    weights: a `Weights`, whose spec, head and preprocessing are used where the arguments are None, or a parameter tree
      (merged weights; numpy or jax arrays).
    path: a file that ends in .safetensors, or a folder for model.safetensors and config.json.
    spec: the backbone's spec; a bare tree needs it.
    head: {"kernel": [D, C], "bias": [C]}, or None.
    preprocessing: stored as timm's pretrained_cfg.

  Returns:
    The path of the file with the weights.

  Raises:
    WeightsError: parameters do not fit the spec, or the path cannot be written.
  """
  spec, params, head, preprocessing = _parts(weights, spec, head, preprocessing)
  path = Path(path)
  file = path if path.suffix == ".safetensors" else path / "model.safetensors"
  if spec.family == "clip":
    log.warning("%s: timm's names hold its image tower alone, without text tower and projections", spec.name)
    spec, params = spec.image, {n.removeprefix("image/"): v for n, v in params.items() if n.startswith("image/")}
  write = {"vit": _timm_vit, "resnet": _timm_resnet, "swin": swins.timm_arrays}[spec.family]
  arrays, num_classes = write(spec, params, head)
  config = timm_config(spec, num_classes, preprocessing)
  write_safetensors(file, arrays, {"format": "pt", "timm_config": json.dumps(config)})
  if file != path:
    write_json(path / "config.json", config)
  return file


def _timm_resnet(spec, params: dict, head: dict | None):
  """(arrays, number of classes); a classifier inside the backbone (`with_logits`) is the head."""
  inside = {name.removeprefix("head/"): value for name, value in params.items() if name.startswith("head/")}
  head = head or inside
  layout = "timm_resnet" if spec.version == 1 else "timm_resnetv2"
  arrays = names.from_native(names.expand(resnets.table(layout, spec), 0),
                             {name: value for name, value in params.items() if not name.startswith("head/")}, 0)
  arrays |= names.from_native(names.expand(names.HEADS[layout], 0), head, 0)
  return arrays, len(head["bias"]) if head else 0


def _timm_vit(spec, params: dict, head: dict | None):
  if head and "pre_logits" in head:
    log.warning("the head is left out: it has a tanh layer (pre_logits), which timm's ViT has not")
    head = None
  if spec.norm_eps != (usual := _TIMM_EPS[spec.embed_norm]):
    log.warning("timm builds this ViT with LayerNorm eps %g; these weights use %g, which the configuration keeps",
                usual, spec.norm_eps)
  norm = "fc_norm" if spec.pool == "mean_before_norm" else "norm"
  rules = names.expand(names.timm(norm, spec.embed_norm), spec.depth)
  arrays = names.from_native(rules, params, spec.heads)
  arrays |= names.from_native(names.expand(names.HEADS["timm"], 0), head or {}, spec.heads)
  return arrays, len(head["bias"]) if head else 0


def timm_config(spec: ViTSpec, num_classes: int, preprocessing: Preprocessing | None) -> dict:
  """The config.json of a timm hub folder; "transferlab" holds what timm has no field for."""
  if spec.family != "vit":
    return {"resnet": resnets, "swin": swins}[spec.family].timm_config(spec, num_classes, preprocessing)
  pooling = "token" if spec.pool == "cls" else "avg"
  usual = "vit_base_patch16_clip_224" if spec.embed_norm else "vit_base_patch16_224"
  config = {
      "architecture": _TIMM_NAMES.get(spec.name, usual),
      "num_classes": num_classes, "num_features": spec.width, "global_pool": pooling,
      "model_args": {
          "img_size": spec.image_size, "patch_size": spec.patch_size, "embed_dim": spec.width, "depth": spec.depth,
          "num_heads": spec.heads, "mlp_ratio": layouts.mlp_ratio(spec.mlp_width, spec.width),
          "qkv_bias": spec.qkv_bias, "class_token": spec.class_token, "global_pool": pooling,
          **({"pre_norm": True} if spec.embed_norm else {}),
          "fc_norm": spec.pool == "mean_before_norm", "act_layer": _TIMM_ACTIVATIONS[spec.gelu]},
      "transferlab": {"name": spec.name, "norm_eps": spec.norm_eps},
      "pretrained_cfg": {"num_classes": num_classes, "first_conv": "patch_embed.proj", "classifier": "head"}}
  if preprocessing:
    config["pretrained_cfg"] |= preprocess.to_timm(preprocessing)
  return config


def save_weights(weights, path, spec: ViTSpec | None = None, head: dict | None = None,
                 preprocessing: Preprocessing | None = None, source: str = "", dtype=np.float32) -> Path:
  """Writes weights with our own names and spec, preprocessing and source in the header, as `load_weights` reads them.

  Arguments are as in `export_timm`; `source` says where the weights come from. A shorter float as `dtype` (np.float16)
  halves the file and is cast to float32 on loading, so the hash is that of the rounded values.
  """
  spec, params, head, preprocessing = _parts(weights, spec, head, preprocessing)
  if preprocessing is None:
    raise WeightsError("weights are stored with their preprocessing; pass preprocessing=")
  arrays = params | {f"head/{name}": value for name, value in flatten(head or {}).items()}
  header = {"spec": spec.to_dict(), "preprocessing": preprocessing.to_dict(), "source": source}
  with np.errstate(over="ignore"):
    arrays = {name: np.asarray(value, dtype) for name, value in arrays.items()}
  if bad := [name for name, value in arrays.items() if not np.isfinite(value.astype(np.float32)).all()]:
    raise WeightsError(f"{bad[0]} is not finite as {np.dtype(dtype)}; store float32, or look where it diverged")
  return write_safetensors(path, arrays, {"transferlab": json.dumps(header)})


def _parts(weights, spec, head, preprocessing):
  if hasattr(weights, "params"):
    spec, head, preprocessing = spec or weights.spec, head or weights.head, preprocessing or weights.preprocessing
    weights = weights.params
  if spec is None:
    raise WeightsError("a bare parameter tree needs its spec; pass spec=")
  params = {name: np.asarray(value, np.float32) for name, value in flatten(weights).items()}
  if problem := difference(params, flatten(abstract_params(spec))):
    raise WeightsError(f"the parameters are not those of {spec.name} at {spec.image_size} px: {problem}")
  return spec, params, head, preprocessing
