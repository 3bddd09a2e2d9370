"""The weights to start with, by name: `architecture.training`. Any other file loads too, by its path.

"ViT-B/16 ImageNet-21k" is two different files in the literature: DTL and FacT adapt the original release, SSF the
AugReg one. They have two names here and are never mixed. Preprocessing is that of timm's copies
(timm vision_transformer.py, swin_transformer.py, default_cfgs); of CLIPs, whose copies hold both towers, OpenAI's.
Hashes are those of `weights_hash`, and None where this project has not had the file in its hands.
"""
from typing import NamedTuple

from transferlab.backbones.spec import Preprocessing


class ZooEntry(NamedTuple):
  """One set of weights.

  Fields:
    source: "hf:owner/name", or "bundled:file" inside the package.
    architecture: name in `ARCHITECTURES`, checked against the file; None takes what the file says.
    preprocessing: how pixels become the input; None takes what the file says.
    data: what they were trained on, and how.
    head: the classifier that comes with them, and whether the whole network was fine-tuned for it.
    hash: `weights_hash` they must have, or None if unknown.
  """
  source: str
  architecture: str | None
  preprocessing: Preprocessing | None
  data: str
  head: str
  hash: str | None = None


_HALF = Preprocessing(224, "bicubic", "center", 0.9)
_IMAGENET = Preprocessing(224, "bicubic", "center", 0.9, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = Preprocessing(224, "bicubic", "center", 1.0, (0.48145466, 0.4578275, 0.40821073),
                      (0.26862954, 0.26130258, 0.27577711))
_OPENAI = "400 million images with their texts from the internet, contrastively (Radford et al. 2021)"
_TEXTS = "none; a text tower instead"
_AUGREG = "ImageNet-21k, supervised, 300 epochs (AugReg, Steiner et al. 2021)"
_ORIGINAL = "ImageNet-21k, supervised (Dosovitskiy et al. 2021)"
_HEAD_21K = "21,843 classes of the pre-training"

ZOO: dict[str, ZooEntry] = {
    "vit_formula64": ZooEntry(
        "bundled:vit_formula64.safetensors", None, None,
        "images that this project generates from formulas; no photographs", "none",
        "ee21c9bcc9940c8602bfa70b96de61960cf3b1307bb7aba51ca0af17ed11c924"),
    "vit_ti16.augreg_in21k": ZooEntry(
        "hf:timm/vit_tiny_patch16_224.augreg_in21k", "vit_ti16", _HALF, _AUGREG, _HEAD_21K),
    "vit_s16.augreg_in21k": ZooEntry(
        "hf:timm/vit_small_patch16_224.augreg_in21k", "vit_s16", _HALF, _AUGREG, _HEAD_21K),
    "vit_b32.augreg_in21k": ZooEntry(
        "hf:timm/vit_base_patch32_224.augreg_in21k", "vit_b32", _HALF, _AUGREG, _HEAD_21K),
    "vit_b16.augreg_in21k": ZooEntry(  # Google: augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz
        "hf:timm/vit_base_patch16_224.augreg_in21k", "vit_b16", _HALF, f"{_AUGREG}; what SSF adapts", _HEAD_21K),
    "vit_b16.orig_in21k": ZooEntry(    # Google: imagenet21k/ViT-B_16.npz
        "hf:timm/vit_base_patch16_224.orig_in21k", "vit_b16", _HALF, f"{_ORIGINAL}; what DTL and FacT adapt",
        "none in timm's copy; Google's file has 21,843 classes behind a tanh layer"),
    "vit_b16.augreg2_in21k_ft_in1k": ZooEntry(
        "hf:timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "vit_b16", _HALF,
        f"{_AUGREG}, then fine-tuned on ImageNet-1k by timm", "1,000 ImageNet classes, fine-tuned with all weights"),
    "vit_b16.mae": ZooEntry(
        "hf:timm/vit_base_patch16_224.mae", "vit_b16", _IMAGENET,
        "ImageNet-1k, no labels, masked autoencoder (He et al. 2022)", "none"),
    "vit_b16.dino": ZooEntry(
        "hf:timm/vit_base_patch16_224.dino", "vit_b16", _IMAGENET,
        "ImageNet-1k, no labels, self-distillation (Caron et al. 2021)", "none"),
    "vit_l16.augreg_in21k": ZooEntry(
        "hf:timm/vit_large_patch16_224.augreg_in21k", "vit_l16", _HALF, _AUGREG, _HEAD_21K),
    "vit_h14.orig_in21k": ZooEntry(
        "hf:timm/vit_huge_patch14_224.orig_in21k", "vit_h14", _HALF, _ORIGINAL, "none in timm's copy"),
    "swin_b.ms_in22k": ZooEntry(       # Microsoft: swin_base_patch4_window7_224_22k.pth
        "hf:timm/swin_base_patch4_window7_224.ms_in22k", "swin_b", _IMAGENET,
        "ImageNet-22k, supervised (Liu et al. 2021); what DTL adapts, with mean = std = 0.5",
        "21,841 classes of the pre-training"),
    "clip_vit_b32.openai": ZooEntry(
        "hf:timm/vit_base_patch32_clip_224.openai", "clip_vit_b32", _CLIP, _OPENAI, _TEXTS),
    "clip_vit_b16.openai": ZooEntry(
        "hf:timm/vit_base_patch16_clip_224.openai", "clip_vit_b16", _CLIP, f"{_OPENAI}; what LFA adapts", _TEXTS),
    "clip_vit_l14.openai": ZooEntry(
        "hf:timm/vit_large_patch14_clip_224.openai", "clip_vit_l14", _CLIP, _OPENAI, _TEXTS),
}
