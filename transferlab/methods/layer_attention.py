"""LFA's head: an image and the texts of the classes meet in one vector each, a mixture of all layers of their tower
(MLAI-Yonsei/LFA; of the paper, OpenReview Q0tfRYadhc, only the abstract was at hand, so that this follows the code).

With h_l the image's class token behind block l, h_cl a text's end token, both through their tower's own last norm, and
a softmax over layers:

    image        q = h_L Q        a_l = softmax <q, h_l K> / sqrt(d)              z  = sum a_l h_l V
    text self    q_c = h_cL Qs    a_cl = softmax <q_c, h_cl Ks> / sqrt(d)         s_c  = sum a_cl h_cl Vs
    text cross   q, the image's   p_bcl = softmax <q_b, h_cl Kc> / sqrt(d)        t_bc = sum p_bcl h_cl Vc
    logits_bc = scale (beta cos(z_b, t_bc) + (1 - beta) cos(z_b, s_c))

One head, no bias, no residual, no projection behind it. Of several templates s and t are means, taken before they are
normalised. t_bc, a vector for every image and class, is never formed: its product with z is sum p_l <z, v_l>, and its
square p^T G p with the Gram matrix G of the v of class c.

Arrays: {"image": {"q", "k", "v": [D, d]}, "text_self": {"q", "k", "v": [Dt, d]}, "text_cross": {"k", "v": [Dt, d]}}:
2,490,368 numbers on ViT-B/16. In the low-rank form each is {"down": [D, R], "up": [R, d]} beside a frozen matrix.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transferlab.methods import classifier
from transferlab.methods.clip_text import unit

MATRICES = {"image": "qkv", "text_self": "qkv", "text_cross": "kv"}
INITS = ("clip", "random")
RANK_DROPOUT = 0.25  # behind `up`, in training


class Attention(NamedTuple):
  """What each layer counts, sums of 1 over L."""
  image: Any       # [B, L]
  text_self: Any   # [C, T, L]
  text_cross: Any  # [B, C, T, L]


def init(rng, image, text, how: str = "random", rank: int | None = None) -> dict:
  """The eight matrices before training.

  Args:
    image, text: CLIP's projections [D, d] and [Dt, d].
    how: "clip", all are copies of the projections, so that attention starts peaked at layers like the last one (the
      released code's for domain generalisation); "random", only the values are, and the others are uniform within
      1/sqrt(D) as torch's Linear, so that all layers start alike (the one for few-shot tasks).
    rank: R of the low-rank form, whose factors are both torch's Linears: it does not start at the projections.
  """
  def matrix(key, name: str, base):
    base = jnp.asarray(base, jnp.float32)
    if rank:
      down, up = jax.random.split(key)
      return {"down": classifier.uniform(down, (base.shape[0], rank), base.shape[0]),
              "up": classifier.uniform(up, (rank, base.shape[1]), rank)}
    return base if how == "clip" or name == "v" else classifier.uniform(key, base.shape, base.shape[0])
  keys = iter(jax.random.split(rng, 8))
  return {branch: {name: matrix(next(keys), name, image if branch == "image" else text) for name in names}
          for branch, names in MATRICES.items()}


def _projection(trainable: dict, base: dict | None, rng):
  """(branch, name, x [..., D]) -> [..., d], x by that matrix."""
  def project(branch: str, name: str, x):
    matrix = trainable[branch][name]
    if not isinstance(matrix, dict):
      return x @ matrix
    added = x @ matrix["down"] @ matrix["up"]
    if rng is not None:
      place = list(MATRICES).index(branch) * 3 + "qkv".index(name)
      added = classifier.dropout(jax.random.fold_in(rng, place), RANK_DROPOUT, added, True)
    frozen = jax.lax.stop_gradient(base["image" if branch == "image" else "text"]).astype(jnp.float32)
    return x @ frozen + added
  return project


def _over_layers(q, k):
  """softmax_l <q, k_l> / sqrt(d) of q [..., d] and k [..., L, d]: [..., L]."""
  return jax.nn.softmax(jnp.einsum("...d,...ld->...l", q * q.shape[-1] ** -0.5, k), axis=-1)


def _across(q, k):
  """The same of every image's q [B, d] with every text's k [C, T, L, d]: [C, T, L, B], in which nothing is moved."""
  return jax.nn.softmax(jnp.einsum("ctld,bd->ctlb", k, q * q.shape[-1] ** -0.5), axis=2)


def attention(trainable: dict, image, text, base: dict | None = None) -> Attention:
  """What the layers count for each image, class and pair of them; arguments as of `logits`."""
  project, image, text = _projection(trainable, base, None), image.astype(jnp.float32), text.astype(jnp.float32)
  q = project("image", "q", image[:, -1])
  return Attention(
      _over_layers(q, project("image", "k", image)),
      _over_layers(project("text_self", "q", text[..., -1, :]), project("text_self", "k", text)),
      jnp.moveaxis(_across(q, project("text_cross", "k", text)), -1, 0))


def logits(trainable: dict, image, text, scale, beta: float = 0.9, *, adapt=None, base: dict | None = None, rng=None):
  """Logits of images against classes.

  Args:
    trainable: the eight matrices, see above.
    image: [B, L, D], the layers of images; the last one asks.
    text: [C, T, L, Dt], the layers of each class's T texts.
    scale: what cosines are multiplied by.
    beta: share of the cross path.
    adapt: a function z [B, d] -> [B, d] between the mixture and its normalisation, the query q staying as it is.
    base: {"image": [D, d], "text": [Dt, d]}, the frozen matrices of the low-rank form.
    rng: for the dropout of the low-rank form, None for none.

  Returns:
    [B, C] float32.
  """
  project, image, text = _projection(trainable, base, rng), image.astype(jnp.float32), text.astype(jnp.float32)
  q, z, s = _mixtures(project, image, text)
  z = unit(adapt(z) if adapt else z)
  cross = cross_cosines(q, z, project("text_cross", "k", text), project("text_cross", "v", text))
  return scale * (beta * cross + (1 - beta) * (z @ unit(s).T))


def mixtures(trainable: dict, image, text, base: dict | None = None):
  """(z [B, d], s [C, d]), what images and texts become by their own attention, not normalised; arguments as of
  `logits`."""
  return _mixtures(_projection(trainable, base, None), image.astype(jnp.float32), text.astype(jnp.float32))[1:]


def _mixtures(project, image, text):
  """(q [B, d], z [B, d], s [C, d])."""
  q = project("image", "q", image[:, -1])                                                         # [B, d]
  a = _over_layers(q, project("image", "k", image))                                               # [B, L]
  z = jnp.einsum("bl,bld->bd", a, project("image", "v", image))                                   # [B, d]
  a = _over_layers(project("text_self", "q", text[..., -1, :]), project("text_self", "k", text))  # [C, T, L]
  s = jnp.einsum("ctl,ctld->cd", a / a.shape[1], project("text_self", "v", text))                 # [C, d]
  return q, z, s


def cross_cosines(q, z, k, v):
  """cos(z_b, t_bc) without t.

  Args:
    q, z: [B, d] of images, z of length 1.
    k, v: [C, T, L, d] of classes.

  Returns:
    [B, C].
  """
  C, T, L, d = v.shape
  p, v = _across(q, k).reshape(C, T * L, -1), v.reshape(C, T * L, d)  # templates add up; their number cancels
  # The square of a sum is as exact as its terms: 10 bits of TF32 would show in the cosine.
  gram = jnp.einsum("cmd,cnd->cmn", v, v, precision=jax.lax.Precision.HIGHEST)
  square = jnp.sum(p * jnp.einsum("cmn,cnb->cmb", gram, p, precision=jax.lax.Precision.HIGHEST), axis=1)  # [C, B]
  inner = jnp.sum(p * jnp.einsum("cmd,bd->cmb", v, z), axis=1)                                            # [C, B]
  return (inner * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).T
