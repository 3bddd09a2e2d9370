"""Mixup and CutMix on a batch, with soft labels, in timm's convention: one lambda per batch, partner = mirrored row.

Mixup: Zhang et al. 2018, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899. Convention: timm's mixup.py at
066e490, mode "batch", every batch mixed, the two alternating at random when both are on.
"""
import numpy as np


def smooth_one_hot(labels: np.ndarray, num_classes: int, smoothing: float = 0.0) -> np.ndarray:
  """int [B] -> float32 [B, C]: 1 - s + s/C at the label, s/C elsewhere."""
  soft = np.full((len(labels), num_classes), smoothing / num_classes, np.float32)  # [B, C]
  soft[np.arange(len(labels)), labels] += 1 - smoothing
  return soft


def mix(images: np.ndarray, soft_labels: np.ndarray, rng: np.random.Generator, mixup_alpha: float,
        cutmix_alpha: float) -> tuple[np.ndarray, np.ndarray]:
  """float32 [B, H, W, 3] and [B, C] -> the same, each row mixed with row B-1-i; an alpha of 0 is off."""
  if not mixup_alpha and not cutmix_alpha:
    return images, soft_labels
  cut = bool(cutmix_alpha) and (not mixup_alpha or rng.random() < 0.5)
  if cut:
    images, lam = cutmix(images, float(rng.beta(cutmix_alpha, cutmix_alpha)), rng)
  else:
    lam = float(rng.beta(mixup_alpha, mixup_alpha))
    images = mixup(images, lam)
  return images, mixup(soft_labels, lam)


def mixup(values: np.ndarray, lam: float) -> np.ndarray:
  """float32 [B, ...] -> lam * row i + (1 - lam) * row B-1-i."""
  return np.float32(lam) * values + np.float32(1 - lam) * values[::-1]


def cutmix(images: np.ndarray, lam: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
  """Pastes one box of about (1 - lam) of the area from row B-1-i into row i; returns lam as the area really left."""
  height, width = images.shape[1:3]
  top, bottom, left, right = cut_box(height, width, lam, rng)
  mixed = images.copy()
  mixed[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
  return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def cut_box(height: int, width: int, lam: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
  """top, bottom, left, right of a box with sides sqrt(1 - lam), its centre anywhere, cut off at the border."""
  side = np.sqrt(1 - lam)
  half_h, half_w = int(height * side) // 2, int(width * side) // 2
  y, x = int(rng.integers(height)), int(rng.integers(width))
  return max(y - half_h, 0), min(y + half_h, height), max(x - half_w, 0), min(x + half_w, width)
