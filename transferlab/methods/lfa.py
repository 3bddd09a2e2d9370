"""LFA: layer-wise feature aggregation on a frozen CLIP (MLAI-Yonsei/LFA; OpenReview Q0tfRYadhc). The head is in
`layer_attention.py`; here is what it attends to, and when that is computed.

Layers are the outputs of all blocks, not the embeddings, each through its tower's one last norm: of an image the class
token, of a text the end token. Texts are the same in every step, so that their layers are computed once per run, and
the text tower is dropped. Of an image a run from an activation cache needs L vectors and no tower.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transferlab import prompts
from transferlab.backbones import at_end, normalise
from transferlab.method import Context, Method, Outputs, Read, collect
from transferlab.methods import classifier
from transferlab.methods import clip_text as ct
from transferlab.methods import layer_attention as la
from transferlab.methods import lfa_on


def lfa(spec, *, templates: str | tuple = "a photo of a {}.", init: str = "random", beta: float = 0.9,
        dropout: float = 0.2, rank: int | None = None, layers: int | None = None, base: str = "none",
        base_options: tuple = (), base_recipe: tuple = ()) -> Method:
  """Attention over the layers of both towers. The defaults are the few-shot protocol's.

  That of domain generalisation is templates="a photo of a {}" (no period), init="clip", dropout=0.

  Args:
    spec: of a CLIP.
    templates: one or several texts with {} for the class name; vectors of several are averaged before they are
      normalised, unlike `zero_shot`'s.
    init: "clip" or "random", see `layer_attention.init`.
    beta: share of the cosine with the text as the image sees it; the rest is that with the text's own mixture.
    dropout: of the layers' features, element by element, in training; queries, keys and values see the same ones. The
      code draws for one class at a time in some systems and for all at once in others, which is the same.
    rank: R of the low-rank form, a change of CLIP's projections, which stay frozen; None for whole matrices.
    layers: how many of the last layers are attended to; None for all.
    base: "coop", "clip_adapter", "maple" or "qlora", which trains first and is then frozen, see `lfa_on.py`; "none".
      CoOp and MaPLe bring a prompt of their own in place of `templates`, the others share these.
    base_options: options of the base, (("tokens", 4), ("position", "front")).
    base_recipe: changes of the base's own recipe, (("duration", "50 epochs"), ("lr", 1e-3)); names of
      `lfa_on.CHANGES`.

  Trainable: the eight matrices, 3 D d + 5 Dt d numbers, or with a rank 3 R (D + d) + 5 R (Dt + d). State: {"prompts":
  ids [C T, context]}; with a base the base's state, and what it trained under "base". Reads only; does not merge.

  Raises:
    ValueError: an option out of its range; a rank with init="random".
  """
  _check(spec, init, beta, rank, layers)
  each, count = prompts.templates(templates), layers or max(spec.depth, spec.text_depth)
  first = lfa_on.base_of(spec, base, base_options, base_recipe, each)
  reads = image_reads(spec, count)

  def init_(rng, frozen, classes):
    bases = (frozen[f"{tower}_projection"]["kernel"] for tower in ("image", "text"))
    return la.init(rng, *bases, init, rank), dict(classes)

  def prepare(frozen, state):
    found, images = lfa_on.texts(spec, first, frozen, state, text_visit(spec))
    kept = {"text_projection": frozen["text_projection"]} if rank else {}
    return {**images, "text_layers": by_class(found, len(each), count), **kept}

  def finish(trainable, carry, ctx):
    return {"image": jnp.stack([carry[slot] for slot in reads], axis=1), "text": ctx.frozen["text_layers"]}

  def readout(trainable, features, carry, ctx):
    rng = jax.random.split(ctx.rng, 3) if ctx.train else (None,) * 3
    image, text = (classifier.dropout(key, dropout, jax.lax.stop_gradient(carry[tower]).astype(jnp.float32), ctx.train)
                   for key, tower in zip(rng, ("image", "text")))
    scale = jnp.exp(jax.lax.stop_gradient(ctx.frozen["logit_scale"]).astype(jnp.float32))
    return la.logits(trainable, image, text, scale, beta, adapt=lfa_on.adapt(first, ctx), base=_base(rank, ctx.frozen),
                     rng=rng[2])

  head = Method(
      name="lfa", options={"templates": templates, "init": init, "beta": beta, "dropout": dropout, "rank": rank,
                           "layers": layers, "base": base, "base_options": base_options, "base_recipe": base_recipe},
      init=init_, prompts=ct.class_prompts(spec, each), prepare=prepare, reads=reads, finish=finish, readout=readout,
      writes_from=spec.depth)
  return lfa_on.stages(spec, first, head, base_recipe) if first else head


def _check(spec, init: str, beta: float, rank, layers) -> None:
  if init not in la.INITS:
    raise ValueError(f"init is {init!r}; expected one of {', '.join(la.INITS)}")
  if not 0 <= beta <= 1:
    raise ValueError(f"beta is {beta}; expected a number from 0 to 1")
  if rank is not None and rank < 1:
    raise ValueError(f"rank is {rank}; expected 1 or more, or None for whole matrices")
  if rank and init != "clip":
    raise ValueError(f"rank is {rank} with init={init!r}; a low rank changes CLIP's projections, set init='clip'")
  most = max(spec.depth, spec.text_depth)
  if layers is not None and not 1 <= layers <= most:
    raise ValueError(f"layers is {layers}; expected 1 to {most}, or None for all of {spec.name}")


def _base(rank, frozen: dict) -> dict | None:
  """The frozen matrices of the low-rank form."""
  return {tower: frozen[f"{tower}_projection"]["kernel"] for tower in ("image", "text")} if rank else None


# --- Layers ---------------------------------------------------------------------------------------------------------

def image_reads(spec, count: int) -> dict[str, Read]:
  """The `reads` of the last `count` layers of images: {site: its class token [B, D] through the tower's last norm}."""
  def reduce(y, frozen):
    norm = frozen["image"]["norm"]
    return normalise(y[:, 0], norm["scale"], norm["bias"], spec.norm_eps)
  sites = [f"image/block_{i:02d}/out" for i in range(max(spec.depth - count, 0), spec.depth)]
  return {site: Read(site, "class token, normalised", reduce) for site in sites}


@functools.cache
def text_visit(spec):
  """What `clip_text.encode` takes, (frozen, ids [P, T]) -> the visitor that collects the layers of texts, {site: end
  token [P, Dt] through the tower's last norm}."""
  sites = [f"text/block_{i:02d}/out" for i in range(spec.text_depth)]
  def make_visit(frozen, ids):
    norm = frozen["text"]["norm"]
    reduce = lambda y, _: normalise(at_end(y, ids), norm["scale"], norm["bias"], spec.norm_eps)
    return collect({site: Read(site, "end token, normalised", reduce) for site in sites}, frozen)
  return make_visit


def by_class(found: dict, templates: int, count: int):
  """The last `count` layers that `text_visit` collected of C T texts, as [C, T, L, Dt]."""
  stacked = jnp.stack([found[site] for site in sorted(found)[-count:]], axis=1)   # [C T, L, Dt]
  return stacked.reshape(-1, templates, *stacked.shape[1:])


# --- What it looks at -----------------------------------------------------------------------------------------------

class Explanation(NamedTuple):
  """Of a batch of images.

  Fields:
    logits, last: [B, C], of all layers, and of the same matrices with nothing but each tower's last layer.
    attention: what each layer counts for an image, a class and both.
  """
  logits: Any
  last: Any
  attention: la.Attention


def explain(method: Method, trainable, outputs: Outputs, ctx: Context) -> Explanation:
  """Why LFA says what it says: the qualitative table of its poster.

  Args:
    outputs: of `method.forward` with the same trainable and ctx, predicting.
  """
  image, text = outputs.carry["image"], outputs.carry["text"]
  last = method.readout(trainable, None, {"image": image[:, -1:], "text": text[:, :, -1:]}, ctx)
  found = la.attention(trainable, image, text, _base(method.options["rank"], ctx.frozen))
  return Explanation(outputs.logits, last, found)
