"""CoOp: learned context tokens in the text of every class (Zhou et al. 2022, arXiv 2109.01134; KaiyangZhou/CoOp,
trainers/coop.py).

A class prompt is "X X … X {name}."; the embeddings of its M placeholders are replaced by learned ones before positions
are added, at `text/embed`. Where a text ends is found in the ids of the placeholders' text, never in embeddings. Logits
are CLIP's cosines. The image tower is frozen: a run may read its projections from a cache, and its step then holds no
image tower. The text tower runs over the C prompts in every step, whatever the batch, cut behind the longest prompt.
With many classes a run wants remat: a step with 1,000 prompts of 26 tokens on ViT-B/16 has 6,189 MiB of temporaries
(CPU, from a cache), and 1,495 with it.

The released code trains in float16, context included; here the backbone computes in the run's type and what trains is
float32. It ignores class_specific together with initial words; here every class starts from them.
"""
import jax
import jax.numpy as jnp
import numpy as np

from transferlab.method import Method, Prompts, chain, collect
from transferlab.methods import clip_text as ct

POSITIONS = ("end", "middle", "front")


def coop(spec, *, tokens: int | None = None, position: str = "end", class_specific: bool = False,
         words: str = "") -> Method:
  """CoOp.

  Args:
    spec: of a CLIP.
    tokens: M. Default: as many as `words`, or 16.
    position: of the class name: "end", behind the context; "middle", between its halves; "front", before it.
    class_specific: a context of its own for every class (CSC), instead of one for all.
    words: what the context starts from, such as "a photo of a", each one token; "" for a normal of std 0.02.

  Trainable: {"context": [M, Dt], or [C, M, Dt] if class-specific}: 8,192 on ViT-B/16. State: {"prompts": ids
  [C, context]}, and the names' "lengths" [C] in tokens if they are not at the end. Does not merge: tokens are no
  weights.

  Raises:
    ValueError: an option is out of range; in `init`, `words` are not M tokens.
  """
  words = " ".join(words.replace("_", " ").split())
  M = tokens if tokens is not None else len(words.split()) or 16
  _check(spec, M, position, words)
  reads = ct.projected_image()

  def init(rng, frozen, classes):
    ids = classes[ct.SLOT]
    shape = (len(ids), M, spec.text_width) if class_specific else (M, spec.text_width)
    state = {ct.SLOT: ids}
    if position != "end":
      state["lengths"] = np.argmax(classes["names"], axis=-1).astype(np.int32) - 1  # without the start
    if not words:
      return {"context": 0.02 * jax.random.normal(rng, shape)}, state
    start = frozen["text"]["tokens"][_of_words(words, M, classes["words"][0])]      # [M, Dt]
    return {"context": jnp.broadcast_to(jnp.asarray(start, jnp.float32), shape)}, state

  return Method(
      name="coop", options={"tokens": M, "position": position, "class_specific": class_specific, "words": words},
      init=init, prompts=_prompts(spec, M, position, words), prepare=keep_texts, texts=texts_of, fixed_texts=True,
      reads=reads, carry={},
      visit=lambda trainable, ctx: chain(collect(reads, ctx.frozen), visitor(trainable, ctx.state, position)),
      readout=lambda trainable, features, carry, ctx: ct.cosine_logits(carry["image"], features.text,
                                                                      ctx.frozen["logit_scale"]),
      writes_from=spec.depth)


def visitor(trainable: dict, state: dict, position: str = "end"):
  """What puts the context into the text tower at `text/embed`; it leaves the carry and all other sites alone.

  Args:
    trainable, state: CoOp's, for the texts `state["prompts"]`.
    position: CoOp's option.
  """
  context = trainable["context"]
  M = context.shape[-2]

  def visit(carry, site, y, x):
    del x
    if site != "text/embed":
      return carry, y
    own = jnp.broadcast_to(context, (len(y), *context.shape[-2:])).astype(y.dtype)
    y = jnp.concatenate([y[:, :1], own, y[:, 1 + M:]], axis=1)                  # [C, T, Dt], names at the end
    if position == "end":
      return carry, y
    source = _sources(y.shape[1], M, M // 2 if position == "middle" else 0, state["lengths"])
    return carry, jnp.take_along_axis(y, source[..., None], axis=1)             # [C, T, Dt]
  return visit


def keep_texts(frozen, state):
  """`Method.prepare` of methods whose text tower runs in every step: its ids, as long as the longest text."""
  return {**frozen, ct.SLOT: ct.cut(state[ct.SLOT])}


def texts_of(ctx):
  """`Method.texts` after `keep_texts`: ids [C, T]."""
  return ctx.frozen[ct.SLOT]


def _sources(T: int, M: int, before: int, lengths):
  """Where tokens of a prompt are taken from, [C, T]: `before` of the M learned ones are put before the name, and a
  prompt with the name at its end has all of them there. lengths [C] of names."""
  t, name = jnp.arange(T)[None], lengths[:, None]
  of_name = (t > before) & (t <= before + name)
  of_rest = (t > before + name) & (t <= M + name)
  return jnp.where(of_name, t + M - before, jnp.where(of_rest, t - name, t))


def _check(spec, M: int, position: str, words: str) -> None:
  if position not in POSITIONS:
    raise ValueError(f"position is {position!r}; expected one of {', '.join(map(repr, POSITIONS))}")
  if not 1 <= M <= spec.context - 4:  # start, one of the name, ".", end
    raise ValueError(f"tokens is {M}; expected 1 to {spec.context - 4}, to leave room for a name in {spec.context}")
  if words and M != len(words.split()):
    raise ValueError(f"tokens is {M} and words are {words!r}; expected one token for each word, or one of the options")


def _prompts(spec, M: int, position: str, words: str) -> Prompts:
  texts, names = (ct.class_prompts(spec, (template,)) for template in (" ".join("X" * M) + " {}.", "{}"))
  def strings(class_names) -> dict:
    found = texts.strings(class_names)
    if position != "end":
      found["names"] = names.strings(class_names)[ct.SLOT]
    return {**found, "words": [words]} if words else found
  return Prompts(strings, spec.context)


def _of_words(words: str, M: int, ids) -> np.ndarray:
  """The M tokens [M] of words, whose ids [T] have a start and an end around them."""
  found = int(np.argmax(ids)) - 1
  if np.any(ids) and found != M:
    raise ValueError(f"words {words!r} are {found} tokens; expected {M}, one for each word; choose plainer words")
  return np.asarray(ids)[1:1 + M]
