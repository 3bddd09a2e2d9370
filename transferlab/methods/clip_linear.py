"""Linear probes of CLIP: its own projections into the joint space train, from CLIP's values, and classes stay texts.

Two systems of one name (MLAI-Yonsei/LFA): domain generalisation trains both projections (LPCLIP), few-shot learning
that of images alone, against texts computed once, with dropout.
"""
import jax
import jax.numpy as jnp

from transferlab import prompts
from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods import clip_text as ct
from transferlab.methods.lfa import image_reads, text_visit

FORMS = {"dg": ("image_projection", "text_projection"), "fewshot": ("image_projection",)}  # what trains
DROPOUT = {"dg": 0.0, "fewshot": 0.2}


def clip_linear(spec, *, form: str = "dg", templates: str | tuple = "a photo of a {}.", layer: int = -1,
                dropout: float | None = None) -> Method:
  """Linear probe of a CLIP; cosine logits.

  Args:
    spec: of a CLIP.
    form: "dg" trains both projections, "fewshot" that of images.
    templates: as of `zero_shot`, several as an ensemble.
    layer: block of the image tower whose class token is read, through the tower's last norm; -1 the last. Texts are
      read at their last block.
    dropout: on the normalised vectors of both, in training; None is the form's own: none in "dg", 0.2 in "fewshot".

  Trainable: {"image_projection": {"kernel": [D, d]}} and in "dg" {"text_projection": {"kernel": [Dt, d]}}, without
  biases: 655,360 and 393,216 parameters on ViT-B/16. State: {"prompts": ids [C T, context]}.
  """
  if form not in FORMS:
    raise ValueError(f"form is {form!r}; expected {' or '.join(map(repr, FORMS))}")
  if not (layer == -1 or 0 <= layer < spec.depth):
    raise ValueError(f"layer is {layer}; expected -1 for the last, or 0 to {spec.depth - 1}")
  each = prompts.templates(templates)
  rate = DROPOUT[form] if dropout is None else dropout
  image, text = f"image/block_{layer % spec.depth:02d}/out", f"text/block_{spec.text_depth - 1:02d}/out"

  def init(rng, frozen, classes):
    return {name: {"kernel": jnp.array(frozen[name]["kernel"], jnp.float32)} for name in FORMS[form]}, dict(classes)

  def prepare(frozen, state):
    texts = ct.encode(spec, frozen, state[ct.SLOT], text_visit(spec))[1][text]  # [C T, Dt]
    if form == "fewshot":
      texts = ct.ensemble(texts @ frozen["text_projection"]["kernel"], len(each))                  # [C, d]
    return ct.without_text(frozen, classes=texts)

  def readout(trainable, features, carry, ctx):
    images = ct.unit(carry["image"].astype(jnp.float32) @ trainable["image_projection"]["kernel"])  # [B, d]
    texts = ctx.frozen["classes"].astype(jnp.float32)
    if form == "dg":
      texts = ct.ensemble(texts @ trainable["text_projection"]["kernel"], len(each))                # [C, d]
    drop = lambda i, x: classifier.dropout(ctx.rng if ctx.rng is None else jax.random.fold_in(ctx.rng, i), rate, x,
                                           ctx.train)
    return jnp.exp(ctx.frozen["logit_scale"].astype(jnp.float32)) * drop(1, images) @ drop(2, texts).T

  return Method(
      name="clip_linear", init=init, prepare=prepare, readout=readout, writes_from=spec.depth,
      options={"form": form, "templates": templates, "layer": layer, "dropout": dropout},
      prompts=ct.class_prompts(spec, each), reads={"image": image_reads(spec, spec.depth)[image]})
