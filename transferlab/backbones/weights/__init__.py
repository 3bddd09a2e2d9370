"""Pretrained weights: files of Google, timm, Hugging Face, Microsoft, OpenAI and our own, as parameters of ours.

    weights = load_weights("vit_formula64")                                   # bundled
    weights = load_weights("B_16.npz", architecture="vit_b16", image_size=384)
    weights = load_weights("hf:timm/vit_base_patch16_224.augreg_in21k")       # with the [hub] extra
    weights = load_weights("ViT-B-16.pt")                                     # a CLIP
    features, _ = build(weights.spec).apply(weights.params, images)           # images as weights.preprocessing says

Every file is read without torch and without pickle (`files.py`, `torch_files.py`), its layout recognised by names and
its variant inferred from shapes (`layouts.py`, `resnets.py`, `swins.py`, `clips.py`), its parameters renamed by tables
that also serve the way back (`names.py`).

GELU: Google's own code computes the tanh form; timm, and with it most adaptation papers, runs the same files with the
exact one. Exact is the default; `gelu="tanh"` gives what Google's code gives.
"""
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from transferlab import backbones
from transferlab.backbones.clip_spec import CLIPSpec
from transferlab.backbones.spec import Preprocessing, ResNetSpec, SwinSpec, ViTSpec
from transferlab.backbones.weights import clips, files, layouts, preprocess, resnets, swins, torch_files
from transferlab.backbones.weights.convert import convert
from transferlab.backbones.weights.export import export_timm, save_weights
from transferlab.backbones.weights.files import WeightsError
from transferlab.backbones.weights.origin import Origin, locate
from transferlab.backbones.weights.positions import resample_positions
from transferlab.tokenizer import Tokenizer, find as find_tokenizer
from transferlab.tree import flatten

__all__ = ["Weights", "WeightsError", "export_timm", "image_tower", "load_weights", "resample_positions",
           "save_weights", "weights_hash", "with_logits"]

log = logging.getLogger(__name__)


class Weights(NamedTuple):
  """A backbone's parameters and what belongs to them.

  Fields:
    spec: the network they fit.
    params: nested dict of float32 numpy arrays, named as in `backbones/vit.py` and its siblings.
    head: the file's classifier {"kernel": [D, C], "bias": [C]}, or None. The original ImageNet-21k release adds
      "pre_logits" {"kernel": [D, D], "bias": [D]}: logits = tanh(features @ kernel + bias) @ head.
    preprocessing: how pixels become the input.
    name: zoo name, or the file's or folder's.
    source: where they came from, for logs; never an absolute path.
    hash: `weights_hash` of the parameters as loaded, before any resampling of positions.
    tokenizer: texts -> ids [n, T] int32 of a CLIP whose tokenizer is known, else None.
    image_hash: of a CLIP, the `hash` of its image tower.
  """
  spec: ViTSpec | ResNetSpec | SwinSpec | CLIPSpec
  params: dict
  head: dict | None
  preprocessing: Preprocessing
  name: str
  source: str
  hash: str
  tokenizer: Callable | None = None
  image_hash: str = ""


def load_weights(source, *, architecture: str | None = None, image_size: int | None = None,
                 preprocessing: Preprocessing | None = None, heads: int | tuple[int, int] | None = None,
                 gelu: str | None = None, groups: int | None = None, download: bool = False, tokenizer=None,
                 truncate: bool = False) -> Weights:
  """Loads pretrained weights.

  Args:
    source: a zoo name, a .npz, .safetensors, .pth or .pt file, a folder of Hugging Face, timm or open_clip
      (config.json, model.safetensors or its shards, preprocessor_config.json), or "hf:owner/name",
      "hf:owner/name@revision".
    architecture: what the file must be, e.g. "vit_b16"; None takes what it is.
    image_size: resolution to run at; another than the file's resamples the position table (`positions.py`). A Swin
      has none and takes any size at which its windows stay as they are.
    preprocessing: used instead of the one beside the weights.
    heads: attention heads, where neither the file nor a known width tells them; of a CLIP a pair, those of its image
      and of its text tower.
    gelu: "erf", "tanh" or "quick" instead of the layout's form.
    groups: of a ResNet's group norm, which no file tells; 32 if None, as in every published BiT.
    download: whether a zoo name may be fetched from the network; "hf:…" is a request to fetch in itself.
    tokenizer: of a CLIP, its file or folder, see `tokenizer.Tokenizer`; None takes what lies beside the weights.
    truncate: whether that tokenizer cuts texts that are too long instead of refusing them.

  Raises:
    WeightsError: no such source; a damaged, malicious or unknown file; another variant than asked for; parameters
      missing, unexpected or mis-shaped. One line, naming the file.
  """
  origin = locate(source, download)
  try:
    weights = _load(origin, architecture, image_size, preprocessing, heads, gelu, groups)
    return weights._replace(tokenizer=_tokenizer(origin, weights.spec, tokenizer, truncate))
  except ValueError as error:
    named = str(error).startswith((origin.path.name, origin.source))
    raise WeightsError(str(error) if named else f"{origin.source}: {error}") from error


def _load(origin: Origin, wanted, image_size, preprocessing, heads, gelu, groups) -> Weights:
  asked = [backbones.architecture(name) for name in (wanted, origin.entry and origin.entry.architecture) if name]
  layout, spec = _recognise(origin, asked, heads, gelu, groups)
  for other in asked:
    _check_variant(origin.path.name, spec, other)
  params, head = convert(layout, spec)
  digest = weights_hash(params, spec)
  if origin.entry and origin.entry.hash and origin.entry.hash != digest:
    raise WeightsError(f"the hash is {digest[:16]}…; the zoo's {origin.name} has {origin.entry.hash[:16]}…: these are "
                       "other weights, or a damaged file: fetch it again")
  preprocessing = _preprocessing(origin, layout, spec, image_size, preprocessing)
  if preprocessing.image_size != spec.image_size:
    log.info("%s: made for %d px, runs at %d px", origin.name, spec.image_size, preprocessing.image_size)
    spec = spec.at_resolution(preprocessing.image_size)
  tower = params.get("image", params)
  image_hash = weights_hash(tower, spec.image) if spec.family == "clip" else ""
  if "pos" in tower:
    tower["pos"] = resample_positions(tower["pos"], spec.grid[0], spec.prefix_tokens)
  log.info("%s: %s, %s layout, %s; hash %s", origin.name, spec.name, layout.name, preprocessing.describe(), digest[:12])
  source = f"{origin.source} ({layout.source})" if layout.source else origin.source
  return Weights(spec, params, head, preprocessing, origin.name, source, digest, image_hash=image_hash)


def _tokenizer(origin: Origin, spec, given, truncate: bool) -> Callable | None:
  """A CLIP's: the one given, or what lies beside its weights, None if nothing does."""
  if spec.family != "clip":
    if given is not None or truncate:
      what = "an image tower alone" if spec.family == "vit" and spec.embed_norm else f"a {spec.name}"
      raise WeightsError(f"tokenizer and truncate belong to a CLIP, and this is {what}; leave them out")
    return None
  where = find_tokenizer(origin.path.parent) if given is None else given
  return where and functools.partial(Tokenizer(where, spec.vocabulary, spec.context), truncate=truncate)


def _recognise(origin: Origin, asked: list, heads, gelu, groups):
  """The layout and spec of the file, a ResNet's, a Swin's, a CLIP's or a ViT's."""
  arrays, metadata = _read(origin)
  if found := resnets.recognise(arrays, metadata, origin.config, groups):
    if heads or gelu:
      raise WeightsError(f"heads and gelu belong to a ViT, and this is a {found[1].name}; leave them out")
    return found
  if found := swins.recognise(arrays, metadata, origin.config, gelu):
    if heads or groups:
      raise WeightsError(f"heads and groups belong to other backbones, and this is a {found[1].name}; leave them out")
    return found
  torch = origin.path.suffix in torch_files.SUFFIXES
  if found := clips.recognise(arrays, metadata, origin.config, origin.preprocessor, torch=torch, heads=heads, gelu=gelu,
                              asked=next(iter(asked), None)):
    if groups:
      raise WeightsError(f"groups belongs to a ResNet with group norm, and this is a {found[1].name}; leave it out")
    return found
  if groups:
    raise WeightsError("groups belongs to a ResNet with group norm, and this is none; leave it out")
  layout = layouts.recognise(arrays, metadata, origin.config, origin.preprocessor)
  if heads is None and asked and "heads" not in layout.facts:
    heads = _heads_of(layout, asked[0], origin.path.name)
  return layout, layouts.infer(layout, heads, gelu)


def with_logits(weights: Weights) -> Weights:
  """A ResNet's weights with their classifier inside the backbone, so that "logits" is a site (Head2Toe taps it)."""
  if weights.spec.family != "resnet" or not weights.head:
    raise WeightsError(f"{weights.name}: expected a ResNet's weights with their classifier; "
                       f"found {weights.spec.name} {'with' if weights.head else 'without'} one")
  spec = dataclasses.replace(weights.spec, classes=len(weights.head["bias"]))
  params = {**weights.params, "head": weights.head}
  return weights._replace(spec=spec, params=params, head=None, hash=weights_hash(params, spec))


def image_tower(weights: Weights) -> Weights:
  """A CLIP's image tower, up to the norm of its class token: a ViT, for what needs no text. Its hash is that of a file
  with this tower alone, whatever resolution it runs at."""
  params, spec = weights.params["image"], weights.spec.image
  return weights._replace(spec=spec, params=params, hash=weights.image_hash or weights_hash(params, spec),
                          tokenizer=None, image_hash="")


def weights_hash(params: dict, spec) -> str:
  """SHA-256 (hex) of a backbone: names, shapes and float32 bytes in order of names, and what shapes do not show.

  The same weights hash equal from every layout; another GELU form, epsilon, pooling or number of heads differs.
  """
  digest = hashlib.sha256(f"{spec.family} {spec.hidden}".encode())
  for name, value in sorted(flatten(params).items()):
    value = np.asarray(value, np.float32, order="C")
    digest.update(f"\n{name} {list(value.shape)}\n".encode())
    digest.update(value.data.cast("B") if value.size else b"")
  return digest.hexdigest()


def _read(origin: Origin):
  if origin.path.suffix == ".npz":
    return files.read_npz(origin.path, resnets.npz_parameters), {}
  if origin.path.suffix in torch_files.SUFFIXES:
    return torch_files.read_torch(origin.path), {}
  return files.read_sharded(origin.path) if origin.path.suffix == ".json" else files.read_safetensors(origin.path)


def _heads_of(layout: layouts.Layout, asked: ViTSpec, file: str) -> int | None:
  """The asked architecture's heads, for a file whose shapes show none; None if another known width tells them."""
  D = layouts.width(layout)
  if D not in {spec.width for spec in backbones.ARCHITECTURES.values() if spec.family == "vit"}:
    raise WeightsError(f"{file} is a ViT of width {D}; you asked for {asked.name}, which has width {asked.width}")
  return asked.heads if D == asked.width else None


def _check_variant(file: str, spec, asked):
  if spec.sizes != asked.sizes:
    name = layouts.variant(spec) if spec.family == "vit" else spec.name
    raise WeightsError(f"{file} is a {name} ({spec.sizes}); you asked for {asked.name} ({asked.sizes})")
  if spec.name != asked.name and spec.name in backbones.ARCHITECTURES:  # CLIP's L/14 was trained at two resolutions
    raise WeightsError(f"{file} is a {spec.name} for {spec.image_size} px; you asked for {asked.name}, for "
                       f"{asked.image_size} px")


def _preprocessing(origin: Origin, layout: layouts.Layout, spec, image_size, given) -> Preprocessing:
  target = spec.image_size if image_size is None else image_size
  if target < 1 or target % spec.patch_size:
    raise WeightsError(f"image_size is {image_size}; expected a multiple of the patch size {spec.patch_size}")
  if given is not None:
    if given.image_size != target:
      raise WeightsError(f"the preprocessing given is for {given.image_size} px, the weights for {target} px; pass "
                         f"image_size={given.image_size} to resample the position table")
    return given
  with layouts.stored("the preprocessing"):
    found = origin.entry and origin.entry.preprocessing or layout.preprocessing(target)
  if found is None:
    found = preprocess.assumed(layout.name, target)
    log.warning("%s: no preprocessing is stored with these weights; assumed %s's: %s. Pass preprocessing= to change it",
                origin.name, layout.name, found.describe())
  return dataclasses.replace(found, image_size=target)
