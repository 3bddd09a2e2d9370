"""VPT: visual prompt tuning (Jia et al. 2022, arXiv 2203.12119; KMnP/vpt @ 4410440). P learned tokens take part in
attention beside an image's own.

* Shallow: prompts enter before block 0, behind the class token and after positions are added, and travel along.
* Deep: every block has prompts of its own, in place of what the block before has made of its.

On ViT no read-out sees prompts: it takes the class token, or the mean of the patch tokens. On Swin a prompt takes part
in every window, with relative bias 0 and unmasked, and the answers of the windows' attention are averaged; a patch
merging takes it four times side by side; and what leaves the last block counts in the mean that is the feature.

Behind its block's attention a deep prompt is thrown away. So deep prompts join where attention reads, normalised by the
block's own norm, and leave where it has answered: residual stream and MLP have no rows for them. Only those of Swin's
last block, which the feature contains, go the whole way. With 50 prompts on ViT-B/16 (224 px, batch 32, CPU) a step
takes 2.27 forward passes of the plain backbone and 4208 MiB so, 2.59 and 4539 MiB with the rows.

Prompts start uniform in ±sqrt(6 / (3 p^2 + D)), p the patch size, D the width of the first block, ±0.0625 on ViT-B/16;
weight decay acts on them. What differs from the released code: dropout draws apart for each image in every block, not
in the first alone; the classifier starts as everywhere here, not with a std of sqrt(2 / C) and a bias of -log 99.
Drop-path, which the original has none of, leaves the answers to travelling prompts on Swin alone.

Neither merges: prompts are tokens, and no weight of a plain backbone holds a token.
"""
import jax
import jax.numpy as jnp

from transferlab.backbones import normalise
from transferlab.method import Method
from transferlab.methods import classifier


def vpt_shallow(spec, *, prompts: int = 50, dropout: float = 0.1, compat: str | None = None) -> Method:
  """VPT-shallow.

  Args:
    spec: the backbone's spec, a ViT or a Swin.
    prompts: P. The paper chooses it per task on validation among 1, 5, 10, 50, 100 …
    dropout: on the prompts, in training.
    compat: None keeps prompts with their image. "released", for Swin: window w of image b gets the prompts of image
      (b nW + w) mod B, and answers go back the same way, as in the released code, which orders windows by image and
      their prompts by window. An image's logits then depend on the rest of its batch, padding included: by up to 0.08
      on a golden's weights and three images.

  Trainable: {"prompts": {"block_00": [P, D]}, "classifier"}: 768 P on ViT-B, 128 P on Swin-B, without the classifier.
  """
  if compat not in (None, "released") or (compat and spec.family != "swin"):
    raise ValueError(f"compat is {compat!r}; expected None, or 'released' on a Swin; {spec.name} is a {spec.family}")
  stream = _swin_stream(prompts, compat == "released") if spec.family == "swin" else _vit_stream(spec, prompts)

  def visit(trainable, ctx):
    def visitor(carry, site, y, x):
      if site == "block_00/in":
        return carry, _insert(y, _draw(trainable, ctx, "block_00", y, dropout), spec.prefix_tokens)
      return stream(carry, site, y, x)
    return visitor

  options = {"prompts": prompts, "dropout": dropout, "compat": compat}
  return _method("vpt_shallow", spec, options, ("block_00",), visit)


def vpt_deep(spec, *, prompts: int = 50, dropout: float = 0.1) -> Method:
  """VPT-deep.

  Args:
    spec: the backbone's spec, a ViT or a Swin.
    prompts: P of each block. The paper chooses it per task on validation among 1, 5, 10, 50, 100 …; the sizes it gives
      mean 61 on ViT-B and 13 on Swin-B.
    dropout: on the prompts, in training.

  Trainable: {"prompts": {"block_00": [P, D], …}, "classifier"}: 9,216 P on ViT-B, 12,032 P on Swin-B, without the
  classifier.
  """
  blocks = tuple(f"block_{i:02d}" for i in range(spec.depth))
  swin = spec.family == "swin"
  stream = _swin_stream(prompts)

  def visit(trainable, ctx):
    def visitor(carry, site, y, x):
      block, _, place = site.partition("/")
      if block not in blocks:
        return carry, y
      if swin and block == blocks[-1]:
        if place == "in":
          return carry, _insert(y, _draw(trainable, ctx, block, y, dropout))
        return stream(carry, site, y, x)
      if place == ("windows" if swin else "ln1"):
        norm = ctx.frozen[block]["ln1"]
        own = normalise(_draw(trainable, ctx, block, y, dropout), norm["scale"], norm["bias"], spec.norm_eps)
        return carry, _insert(y, own[:, None] if swin else own, spec.prefix_tokens)
      if place == "bias":
        return carry, _padded(y, prompts)
      if place == "proj":
        return carry, _remove(y, prompts, spec.prefix_tokens)[1]
      return carry, y
    return visitor

  return _method("vpt_deep", spec, {"prompts": prompts, "dropout": dropout}, blocks, visit)


def _method(name: str, spec, options: dict, blocks, visit) -> Method:
  """The method whose prompts enter at `blocks`."""
  P = options["prompts"]
  if P < 1:
    raise ValueError(f"prompts is {P}; expected 1 or more")

  def init(rng, frozen, num_classes):
    rng_head, *keys = jax.random.split(rng, 1 + len(blocks))
    bound = (6 / (3 * spec.patch_size ** 2 + spec.block(0).width)) ** 0.5
    own = {block: jax.random.uniform(key, (P, spec.block(int(block[6:])).width), minval=-bound, maxval=bound)
           for key, block in zip(keys, blocks)}
    return {"prompts": own, "classifier": classifier.init(rng_head, spec.width, num_classes)}, {}

  return Method(name=name, options=options, init=init, visit=visit, readout=classifier.readout, writes_from=0)


def _draw(trainable, ctx, block: str, y, dropout: float):
  """A block's prompts for the batch of `y`: [B, P, D] with dropout, else [1, P, D]."""
  own = trainable["prompts"][block][None]
  if not ctx.train or not dropout:
    return own
  rng = jax.random.fold_in(ctx.rng, 1 + int(block[6:]))
  return classifier.dropout(rng, dropout, jnp.broadcast_to(own, (y.shape[0], *own.shape[1:])), ctx.train)


def _insert(y, prompts, at: int = 0):
  """Prompts, broadcast to [..., P, D], behind the first `at` of the tokens y [..., T, D]."""
  prompts = jnp.broadcast_to(prompts, (*y.shape[:-2], *prompts.shape[-2:])).astype(y.dtype)
  return jnp.concatenate([y[..., :at, :], prompts, y[..., at:, :]], axis=-2)                   # [..., P + T, D]


def _remove(y, count: int, at: int = 0):
  """Inverse of `_insert`: (prompts [..., P, D], tokens [..., T, D])."""
  return y[..., at:at + count, :], jnp.concatenate([y[..., :at, :], y[..., at + count:, :]], axis=-2)


def _padded(bias, count: int):
  """An additive attention bias [..., t, t], or None, with zeros for prompts in front."""
  return None if bias is None else jnp.pad(bias, [(0, 0)] * (bias.ndim - 2) + [(count, 0)] * 2)


def _vit_stream(spec, count: int):
  """Visitor for prompts that are in the residual stream of a ViT: the final norm does not see them."""
  def visitor(carry, site, y, x):
    del x
    return carry, _remove(y, count, spec.prefix_tokens)[1] if site == "pre_norm" else y
  return visitor


def _swin_stream(count: int, mixed: bool = False):
  """Visitor for prompts that are in the residual stream of a Swin. While the map is cut or merged they are the carry.

  Args:
    mixed: hand prompts to windows, and their answers back, in the order of the released code.
  """
  def visitor(carry, site, y, x):
    del x
    block, _, place = site.partition("/")
    if place == "ln1" or (place == "in" and block.startswith("merge")):
      return _remove(y, count)                                               # carry [B, P, D], [B, T, D]
    if place == "windows":
      B, windows = y.shape[:2]
      own = jnp.tile(carry, (windows, 1, 1)).reshape(B, windows, *carry.shape[1:]) if mixed else carry[:, None]
      return (), _insert(y, own)                                             # [B, nW, P + t, D]
    if place == "bias":
      return carry, _padded(y, count)
    if place == "proj":
      answers, y = _remove(y, count)                                         # [B, nW, P, D], [B, nW, t, D]
      if mixed:
        answers = answers.reshape(-1, answers.shape[0], *answers.shape[2:]).swapaxes(0, 1)
      return answers.mean(axis=1), y
    if place == "attn":
      return (), _insert(y, carry)                                           # [B, P + T, D]
    if place == "cat":
      return (), _insert(y, jnp.tile(carry, 4))                              # [B, P + T/4, 4D]
    return carry, y
  return visitor
