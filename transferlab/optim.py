"""Optimisers and learning-rate schedules, all optax; this file only names and combines them."""
import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transferlab import tree
from transferlab.config import resolve_steps

OPTIMISERS = ("sgd", "adam", "adamw", "adam_keras")
# By default: biases, norms, learned tokens and positions.
NO_DECAY = ((r"(.*/)?(bias|scale|cls|pos|patch_bias|relative_bias|query)", 0.0),)
SCHEDULES = ("constant", "cosine", "dtl", "noah", "vpt", "coop")


@dataclass(frozen=True)
class Optim:
  """How parameters move.

  Fields:
    name: "adamw" (decoupled decay), "adam" or "sgd" (decay added to the gradient, as torch does), or "adam_keras",
      which is "adam" with `eps` where Keras adds it; Keras' default is 1e-7.
    lr: peak learning rate.
    schedule: "constant" and "cosine" change every step, after a linear warm-up from 0. The others are constant within
      an epoch and reproduce released code: "dtl" (DTL and SSF: the last 10 epochs idle at 1e-8), "noah" (NOAH and
      FacT), "vpt" and "coop" (CoOp, MaPLe and LFA: the first epoch at 1e-5); their warm-up is part of them.
    warmup: duration of the warm-up; the per-epoch schedules take it in epochs, 0 for the released number.
    weight_decay: strength of the decay.
    decay: ordered (pattern, factor) pairs on parameter names, first match wins, 1 where none matches.
    lr_factors: likewise for the learning rate.
    clip: largest global norm of the gradient, 0 for none.
    momentum, b1, b2, eps: of SGD and Adam.
  """
  name: str = "adamw"
  lr: float = 1e-3
  schedule: str = "cosine"
  warmup: str = "0 steps"
  weight_decay: float = 0.05
  decay: tuple = NO_DECAY
  lr_factors: tuple = ()
  clip: float = 0.0
  momentum: float = 0.9
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8

  def __post_init__(self):
    if self.name not in OPTIMISERS:
      raise ValueError(f"optimiser {self.name!r} is unknown; expected one of {', '.join(OPTIMISERS)}")
    if self.schedule not in SCHEDULES:
      raise ValueError(f"schedule {self.schedule!r} is unknown; expected one of {', '.join(SCHEDULES)}")
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and 0 <= self.momentum < 1):
      raise ValueError(f"b1 {self.b1}, b2 {self.b2} and momentum {self.momentum} must be at least 0 and below 1")
    if not self.lr > 0:
      raise ValueError(f"lr is {self.lr}; expected a number above 0")
    for name in ("weight_decay", "clip", "momentum", "b1", "b2", "eps"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")


def timm_epochs(lr, epochs, *, warmup=10, warmup_lr=0.0, min_lr=0.0, cooldown=0, delay=0):
  """Rates of `epochs` epochs of timm's cosine scheduler, whose cosine clock includes the warm-up.

  The last `cooldown` epochs stay at `min_lr`; with `delay` every epoch has the rate of `delay` epochs before.
  """
  length = epochs - cooldown
  rates = []
  for epoch in range(epochs):
    t = max(epoch - delay, 0)
    if t < warmup:
      rates.append(warmup_lr + t * (lr - warmup_lr) / warmup)
    else:
      rates.append(min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(t, length) / length)) / 2)
  return np.array(rates)


def vpt_epochs(lr, epochs, *, warmup=10):
  """Rates of VPT's schedule: linear from 0, then a cosine to 0 whose clock starts after the warm-up (KMnP/vpt)."""
  t = np.arange(epochs)
  return np.where(t < warmup, lr * t / warmup, lr * (1 + np.cos(np.pi * (t - warmup) / max(epochs - warmup, 1))) / 2)


def coop_epochs(lr, epochs, *, warmup=1):
  """Rates of CoOp's schedule: 1e-5 during the warm-up, then a cosine whose clock starts there and whose length is that
  of the whole run, so that it never ends at 0 (KaiyangZhou/Dassl.pytorch at c61a1b5, optim/lr_scheduler.py)."""
  t = np.arange(epochs)
  return np.where(t < warmup, 1e-5, lr * (1 + np.cos(np.pi * (t - warmup) / epochs)) / 2)


def epoch_rates(name: str, lr: float, epochs: int, warmup: int = 0) -> np.ndarray:
  """Learning rates [epochs] of a released per-epoch schedule; a warm-up of 0 epochs stands for the released one's."""
  if name == "coop":
    return coop_epochs(lr, epochs, warmup=warmup or 1)
  warmup = warmup or 10
  if name == "vpt":
    return vpt_epochs(lr, epochs, warmup=warmup)
  if name == "noah":
    return timm_epochs(lr, epochs, warmup=warmup, warmup_lr=1e-6, min_lr=1e-5, delay=1)
  if epochs <= 10:
    raise ValueError(f"schedule 'dtl' ends with 10 idle epochs and the run has {epochs}; train longer (the paper: 110) "
                     "or use schedule='cosine'")
  return timm_epochs(lr, epochs, warmup=warmup, warmup_lr=1e-7, min_lr=1e-8, cooldown=10)


def schedule(optim: Optim, total_steps: int, steps_per_epoch: int, batch_size: int):
  """Step -> learning rate."""
  warmup = resolve_steps(optim.warmup, steps_per_epoch, batch_size, total_steps, "warmup")
  if optim.schedule == "constant":
    return optax.linear_schedule(0.0, optim.lr, warmup) if warmup else optax.constant_schedule(optim.lr)
  if optim.schedule == "cosine":
    if not warmup:
      return optax.cosine_decay_schedule(optim.lr, total_steps)
    return optax.warmup_cosine_decay_schedule(0.0, optim.lr, warmup, max(total_steps, warmup + 1))
  epochs = -(-total_steps // steps_per_epoch)
  rates = jnp.asarray(epoch_rates(optim.schedule, optim.lr, epochs, round(warmup / steps_per_epoch)), jnp.float32)
  return lambda step: rates[jnp.minimum(step // steps_per_epoch, epochs - 1)]


def scale_by_keras_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Adam with eps added to the root of the uncorrected second moment, Kingma & Ba's "epsilon hat" (2015, section 2).

  It is optax's with eps / sqrt(1 - b2^t) at step t: at first 32 times as much, for b2 = 0.999.
  """
  hat = lambda count: eps / jnp.sqrt(1 - b2 ** (count + 1.0))
  return optax.inject_hyperparams(optax.scale_by_adam, static_args=("b1", "b2", "eps_root"))(b1, b2, hat)


def make_optimiser(optim: Optim, rate, trainable, weight_decay=None) -> optax.GradientTransformation:
  """The optax transformation of an `Optim`.

  Args:
    rate: a schedule, step -> learning rate.
    trainable: gives the names that patterns address.
    weight_decay: replaces the `Optim`'s own; parallel heads have theirs, a traced number.
  """
  weight_decay = optim.weight_decay if weight_decay is None else weight_decay
  # A default that finds nothing to spare is no mistake of the user's, unlike a pattern that was asked for.
  spare = [row for row in NO_DECAY if any(re.fullmatch(row[0], name) for name in tree.flatten(trainable))]
  patterns = spare if optim.decay == NO_DECAY else optim.decay
  decay = jax.tree.map(lambda factor: factor * weight_decay, tree.match(patterns, trainable, 1.0))
  factors = tree.match(optim.lr_factors, trainable, 1.0)
  decayed = optax.stateless(lambda updates, params: jax.tree.map(lambda u, p, d: u + d * p, updates, params, decay))
  scaled = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))
  adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
  core = {"adamw": (adam, decayed), "adam": (decayed, adam), "sgd": (decayed, optax.trace(optim.momentum)),
          "adam_keras": (decayed, scale_by_keras_adam(optim.b1, optim.b2, optim.eps))}[optim.name]
  clip = (optax.clip_by_global_norm(optim.clip),) if optim.clip else ()
  return optax.chain(*clip, *core, scaled, optax.scale_by_learning_rate(rate))
