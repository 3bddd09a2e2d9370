"""Preprocessing out of other libraries' configurations. It belongs to the weights, so it is read from beside them.

Where a file says nothing, the convention of its layout is assumed, and the caller logs that it was:
  google        vit_jax's evaluation: squash to S x S bilinearly, [-1, 1] (vit_jax input_pipeline.py). DTL and FacT
                squash with PIL's bicubic instead: preprocessing=Preprocessing(S, "bicubic").
  timm          bicubic, shorter side to S / 0.9, centre crop, mean = std = 0.5 (timm vision_transformer.py, _cfg).
  timm_resnet   bilinear, shorter side to S / 0.875, centre crop, ImageNet's mean and std (timm resnet.py, _cfg).
  timm_resnetv2 the same with mean = std = 0.5 (timm resnetv2.py, _cfg).
  timm_swin     bicubic, shorter side to S / 0.9, centre crop, ImageNet's mean and std (timm swin_transformer.py, _cfg);
                swin the same. DTL squashes with PIL's bicubic and has mean = std = 0.5 instead.
  bit           as google (big_transfer's evaluation, at a resolution that it chooses by data set).
  huggingface   ViTImageProcessor's defaults: squash bilinearly, mean = std = 0.5.
  openai        bicubic, shorter side to S, centre crop, mean and std of CLIP's own images (openai/CLIP clip.py);
                open_clip and huggingface_clip the same.
"""
import math

from transferlab.backbones.spec import CROPS, PILLOW_FILTERS, Preprocessing
from transferlab.backbones.weights.files import WeightsError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CLIPS = ("openai", "open_clip", "huggingface_clip")
_PIL_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL.Image.Resampling, by value


def assumed(layout: str, image_size: int) -> Preprocessing:
  """The convention of a layout, for files that carry none."""
  if layout in _CLIPS:
    return of_clip(image_size)
  if layout == "timm":
    return Preprocessing(image_size, "bicubic", "center", 0.9)
  if layout in ("timm_swin", "swin"):
    return Preprocessing(image_size, "bicubic", "center", 0.9, IMAGENET_MEAN, IMAGENET_STD)
  if layout == "timm_resnet":
    return Preprocessing(image_size, "bilinear", "center", 0.875, IMAGENET_MEAN, IMAGENET_STD)
  if layout == "timm_resnetv2":
    return Preprocessing(image_size, "bilinear", "center", 0.875)
  return Preprocessing(image_size, "bilinear" if layout in ("google", "huggingface", "bit") else "bicubic")


def from_timm(config: dict, image_size: int) -> Preprocessing | None:
  """Of a timm hub `config.json` (`pretrained_cfg`, in old files the fields themselves); None without mean and std.

  timm resizes the shorter side to floor(S / crop_pct) and cuts the centre.
  """
  config = config.get("pretrained_cfg") or config
  if "mean" not in config or "std" not in config:
    return None
  mode = config.get("crop_mode") or "center"
  fraction = float(config.get("crop_pct") or 0.875)  # timm's DEFAULT_CROP_PCT
  if mode not in CROPS or (mode == "squash" and fraction < 1):
    raise WeightsError(f"timm's crop_mode {mode!r} with crop_pct {fraction:g} is not supported; pass preprocessing=")
  return Preprocessing(image_size, config.get("interpolation") or "bicubic", mode, fraction,
                       tuple(map(float, config["mean"])), tuple(map(float, config["std"])))


def from_huggingface(config: dict, image_size: int) -> Preprocessing:
  """Of a Hugging Face `preprocessor_config.json`; fields that it leaves out have ViTImageProcessor's defaults."""
  factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1
  if not math.isclose(factor, 1 / 255, rel_tol=1e-4):
    raise WeightsError(f"preprocessor_config.json rescales by {factor}; expected 1/255: pass preprocessing=")
  code = config.get("resample", 2)
  if not isinstance(code, int) or not 0 <= code < len(_PIL_FILTERS):
    raise WeightsError(f"preprocessor_config.json has resample {code!r}; expected one of PIL's codes, 0 to 5")
  mean, std = ((0, 0, 0), (1, 1, 1)) if not config.get("do_normalize", True) else (
      config.get("image_mean", (0.5,) * 3), config.get("image_std", (0.5,) * 3))
  side = lambda value: value.get("shortest_edge", value.get("height")) if isinstance(value, dict) else value
  size, crop, fraction = config.get("size"), "squash", 1.0
  cut = side(config.get("crop_size", size))
  if isinstance(size, dict) and "shortest_edge" in size:
    crop, fraction = "center", cut / side(size)
  elif config.get("do_center_crop") and cut != side(size):
    raise WeightsError(f"preprocessor_config.json squashes to {side(size)} and then cuts {cut}; pass preprocessing=")
  return Preprocessing(image_size, _PIL_FILTERS[code], crop, fraction, tuple(map(float, mean)), tuple(map(float, std)))


def of_clip(image_size: int) -> Preprocessing:
  """That of OpenAI's CLIP."""
  return Preprocessing(image_size, "bicubic", "center", 1.0, CLIP_MEAN, CLIP_STD)


def from_huggingface_clip(config: dict | None, image_size: int) -> Preprocessing | None:
  """Of a `preprocessor_config.json` beside a CLIP; fields that it leaves out have CLIPImageProcessor's defaults, and a
  size that is a number is of the shorter side. None without the file."""
  if config is None:
    return None
  config = {"resample": 3, "do_center_crop": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": 224,
            "crop_size": 224} | config
  if not isinstance(config["size"], dict):
    config["size"] = {"shortest_edge": config["size"]}
  return from_huggingface(config, image_size)


def from_open_clip(config: dict, image_size: int) -> Preprocessing | None:
  """Of open_clip_config.json; what its `preprocess_cfg` leaves out is as in OpenAI's. None without any."""
  config = config.get("preprocess_cfg")
  if config is None:
    return None
  mode = config.get("resize_mode") or "shortest"
  if mode not in ("shortest", "squash"):
    raise WeightsError(f"open_clip's resize_mode {mode!r} is not supported; pass preprocessing=")
  return Preprocessing(image_size, config.get("interpolation") or "bicubic", "center" if mode == "shortest" else mode,
                       1.0, tuple(map(float, config.get("mean") or CLIP_MEAN)),
                       tuple(map(float, config.get("std") or CLIP_STD)))


def to_timm(preprocessing: Preprocessing) -> dict:
  """timm's `pretrained_cfg` of a Preprocessing; inverse of `from_timm`."""
  if preprocessing.interpolation not in PILLOW_FILTERS:
    raise WeightsError(f"timm has no interpolation {preprocessing.interpolation!r}; expected one of "
                       f"{', '.join(PILLOW_FILTERS)}: deploy the adapter, or pass preprocessing= with bilinear")
  return {"input_size": [3, preprocessing.image_size, preprocessing.image_size], "fixed_input_size": True,
          "interpolation": preprocessing.interpolation, "crop_pct": preprocessing.crop_fraction,
          "crop_mode": preprocessing.crop, "mean": list(preprocessing.mean), "std": list(preprocessing.std)}
