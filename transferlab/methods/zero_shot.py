"""Zero-shot CLIP (Radford et al. 2021): an image belongs to the class whose prompt is nearest. Nothing trains."""
from transferlab import prompts
from transferlab.method import Method
from transferlab.methods import clip_text as ct


def zero_shot(spec, *, templates: str | tuple = "a photo of a {}.") -> Method:
  """Cosine logits against frozen class prompts.

  Args:
    spec: of a CLIP.
    templates: one or several texts with {} for the class name; "{}" alone is the domain-generalisation tables' (C),
      "a photo of a {}" their (PC). Of several the class vector is the mean of their normalised vectors, normalised.

  Trainable: {}. State: {"prompts": ids [C T, context]}.
  """
  each = prompts.templates(templates)

  def prepare(frozen, state):
    texts, _ = ct.encode(spec, frozen, state[ct.SLOT])                  # [C T, d]
    return ct.without_text(frozen, classes=ct.ensemble(texts, len(each)))

  return Method(
      name="zero_shot", options={"templates": templates}, init=lambda rng, frozen, classes: ({}, dict(classes)),
      prompts=ct.class_prompts(spec, each), prepare=prepare, reads=ct.projected_image(), writes_from=spec.depth,
      readout=lambda trainable, features, carry, ctx: ct.cosine_logits(
          carry["image"], ctx.frozen["classes"], ctx.frozen["logit_scale"]))
