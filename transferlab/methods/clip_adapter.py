"""CLIP-Adapter (Gao et al. 2021, arXiv 2110.04544; gaopengcuhk/CLIP-Adapter): a bottleneck on the projected image
feature, blended with what it was; classes are frozen prompts.

    f' = ratio A(f) + (1 - ratio) f,    A(f) = relu(relu(f W1) W2),    f not normalised

The original's bottleneck is a quarter of its ResNet's 1024; here it is of the joint width.
"""
import jax

from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods import clip_text as ct
from transferlab.methods import zero_shot as zs


def clip_adapter(spec, *, templates: str | tuple = "a photo of a {}.", ratio: float = 0.2,
                 reduction: int = 4) -> Method:
  """CLIP-Adapter on the image side; cosine logits.

  Args:
    spec: of a CLIP.
    templates: as of `zero_shot`.
    ratio: of the adapted feature in the blend.
    reduction: the joint width d over the bottleneck's.

  Trainable: {"adapter": {"down": [d, d / reduction], "up": [d / reduction, d]}}, without biases: 131,072 parameters on
  ViT-B/16; both start as torch starts linear layers. State: {"prompts": ids [C T, context]}.
  """
  d = spec.embed_width
  if not 1 <= reduction <= d or not 0 <= ratio <= 1:
    raise ValueError(f"ratio is {ratio} and reduction {reduction}; expected a ratio from 0 to 1 and a reduction from 1 "
                     f"to the joint width, {d}")

  def init(rng, frozen, classes):
    keys, inner = jax.random.split(rng), d // reduction
    shapes = {"down": (d, inner), "up": (inner, d)}
    drawn = {name: classifier.uniform(key, shape, shape[0]) for key, (name, shape) in zip(keys, shapes.items())}
    return {"adapter": drawn}, dict(classes)

  def readout(trainable, features, carry, ctx):
    images = blend(trainable["adapter"], carry["image"].astype("float32"), ratio)  # [B, d]
    return ct.cosine_logits(images, ctx.frozen["classes"], ctx.frozen["logit_scale"])

  return zs.zero_shot(spec, templates=templates)._replace(
      name="clip_adapter", options={"templates": templates, "ratio": ratio, "reduction": reduction}, init=init,
      readout=readout)


def blend(adapter: dict, x, ratio: float):
  """Adapted features [B, d] of un-normalised ones, float32."""
  adapted = jax.nn.relu(jax.nn.relu(x @ adapter["down"]) @ adapter["up"])
  return ratio * adapted + (1 - ratio) * x
