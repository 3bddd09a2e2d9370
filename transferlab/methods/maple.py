"""MaPLe: learned tokens in both towers of a CLIP, the image tower's made from the text tower's (Khattak et al. 2023,
arXiv 2210.03117; muzairkhattak/multimodal-prompt-learning, trainers/maple.py and clip/model.py).

n tokens of the text, directly behind its start, are learned at `text/embed` and anew at the input of blocks 1 … J-1;
linear maps, one for each depth, make of them n tokens for images: appended to the patches after positions are added and
before the norm in front of the blocks, and replaced at the input of blocks 1 … J-1. Later blocks keep what they have.
Of "a photo of a {name}." the first two words are learned, starting from themselves; "of a" stays. Logits are CLIP's
cosines; both towers run in every step, the text tower over the C prompts, whatever the batch.

The released code trains in float16; here the backbone computes in the run's type, and what trains is float32.
"""
import jax
import jax.numpy as jnp
import numpy as np

from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods import clip_text as ct
from transferlab.methods.coop import keep_texts, texts_of


def maple(spec, *, tokens: int = 2, depth: int = 9, words: str = "a photo of a") -> Method:
  """MaPLe.

  Args:
    spec: of a CLIP.
    tokens: n.
    depth: J, how many inputs of blocks get learned tokens. 9 in the paper, 3 in its cross-dataset runs.
    words: in front of the class name; the first n tokens are replaced, and the first prompts start as these. "" has n
      placeholders there and starts from a normal of std 0.02.

  Trainable: {"context": [n, Dt], "projection": {"kernel": [Dt, D], "bias": [D]}, and for each of block_01 …
  block_{J-1} {"context", "projection"}}: 3,555,072 on ViT-B/16, with J = 3 1,185,024. Deep contexts start normal of
  std 0.02, projections uniform in ±1/sqrt(Dt), those of all deep ones from one draw. State: {"prompts": ids
  [C, context]}. Does not merge: tokens are no weights.

  Raises:
    ValueError: an option is out of range.
  """
  words = " ".join(words.replace("_", " ").split())
  _check(spec, tokens, depth, words)
  Dt, deep = spec.text_width, [f"block_{i:02d}" for i in range(1, depth)]

  def init(rng, frozen, classes):
    rng, rng_first, rng_deep = jax.random.split(rng, 3)
    keys = jax.random.split(rng, depth)
    normal = lambda key: 0.02 * jax.random.normal(key, (tokens, Dt))
    of_words = lambda ids: jnp.asarray(frozen["text"]["tokens"][ids], jnp.float32)
    first = of_words(np.asarray(classes[ct.SLOT])[0, 1:1 + tokens]) if words else normal(keys[0])
    copied = _linear(rng_deep, Dt, spec.width)
    blocks = {block: {"context": normal(key), "projection": dict(copied)} for block, key in zip(deep, keys[1:])}
    return ({"context": first, "projection": _linear(rng_first, Dt, spec.width), **blocks},
            {ct.SLOT: classes[ct.SLOT]})

  return Method(
      name="maple", options={"tokens": tokens, "depth": depth, "words": words}, init=init,
      prompts=ct.class_prompts(spec, (f"{words or ' '.join('X' * tokens)} {{}}.",)), prepare=keep_texts,
      texts=texts_of, fixed_texts=True, visit=lambda trainable, ctx: visitor(trainable), writes_from=0,
      readout=lambda trainable, features, carry, ctx: ct.cosine_logits(features.image, features.text,
                                                                      ctx.frozen["logit_scale"]))


def visitor(trainable: dict):
  """What puts MaPLe's tokens into both towers; it leaves the carry and all other sites alone."""
  def visit(carry, site, y, x):
    del x
    tower, place = site.split("/", 1)
    if place == "embed":
      return carry, _text(y, trainable) if tower == "text" else _image(y, trainable, y.shape[1])
    block, _, at = place.partition("/")
    if at != "in" or block not in trainable:
      return carry, y
    own = trainable[block]
    return carry, _text(y, own) if tower == "text" else _image(y, own, y.shape[1] - len(own["context"]))
  return visit


def _text(y, own: dict):
  """Tokens y [P, T, Dt] with the learned ones behind the start."""
  n = len(own["context"])
  context = jnp.broadcast_to(own["context"], (len(y), *own["context"].shape)).astype(y.dtype)
  return jnp.concatenate([y[:, :1], context, y[:, 1 + n:]], axis=1)              # [P, T, Dt]


def _image(y, own: dict, keep: int):
  """The first `keep` of the tokens y [B, T, D], and the learned ones behind them."""
  context = own["context"] @ own["projection"]["kernel"] + own["projection"]["bias"]           # [n, D]
  context = jnp.broadcast_to(context, (len(y), *context.shape)).astype(y.dtype)
  return jnp.concatenate([y[:, :keep], context], axis=1)                         # [B, keep + n, D]


def _linear(rng, width: int, features: int) -> dict:
  """A linear map as torch starts one."""
  rng_kernel, rng_bias = jax.random.split(rng)
  return {"kernel": classifier.uniform(rng_kernel, (width, features), width),
          "bias": classifier.uniform(rng_bias, (features,), width)}


def _check(spec, tokens: int, depth: int, words: str) -> None:
  if not 1 <= tokens <= spec.context - 4:  # start, one of the name, ".", end
    raise ValueError(f"tokens is {tokens}; expected 1 to {spec.context - 4}, to leave room for a name in "
                     f"{spec.context}")
  if words and tokens > len(words.split()):
    raise ValueError(f"tokens is {tokens} and words are {words!r}; expected at least as many words, or words=''")
  shallow = min(spec.depth, spec.text_depth)
  if not 1 <= depth <= shallow:
    raise ValueError(f"depth is {depth}; expected 1 to {shallow}, the blocks of {spec.name}'s shallower tower")
