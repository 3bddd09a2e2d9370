"""DPL: domain tokens in the prompts, made from the images of a domain (Zhang et al. 2021, arXiv 2111.12853;
shogi880/DPLCLIP, and the form that MLAI-Yonsei/LFA compares with).

    [start] [N tokens of the domain] "a photo of a {name}." [end],    tokens = mean over the domain's rows of MLP(f)

f is the projected image feature, not normalised. The text tower runs over D C prompts in a training step of D domains,
and over C when predicting, whatever the number of images.
"""
import jax
import jax.numpy as jnp

from transferlab import losses, prompts
from transferlab.backbones import at_end
from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods import clip_text as ct
from transferlab.methods.coop import keep_texts, texts_of

_OUT = -1e9  # a logit that no softmax sees; finite, since its target is 0


def dpl(spec, *, tokens: int = 16, width: int = 512, depth: int = 3, dropout: float = 0.1,
        template: str = "a photo of a {}.", predict: str = "batch", compat: str | None = None) -> Method:
  """Domain prompts from an MLP on the frozen image features; cosine logits.

  Args:
    spec: of a CLIP.
    tokens: N.
    width, depth: of the MLP's hidden layers, and how many linear layers it has, two at least.
    dropout: behind every linear layer but the last, before the ReLU.
    template: of a class, behind the domain tokens. The original's is "{}.", without "a photo of a".
    predict: "batch" takes a batch for images of one domain and makes its tokens from all of them, as published: what is
      predicted for an image depends on the others. "image" makes each image's tokens from that image alone, as a batch
      of one does: predictions of an image are always the same, but C texts run through the tower for every image.
      Training is the same. Nobody knows the domain of an image that is to be classified, or of a validation batch.
    compat: None compares an image with the C prompts of its own domain. "released" takes the softmax over all D C
      prompts with labels in the first C columns, as both repositories do, so that only prompts of the first domain (the
      one with the lowest id) are ever right; it needs every domain in every batch, see `recipe.per_domain`.

  Trainable: {"mlp": {"layer_0": {"kernel": [d, width], "bias": [width]}, …, "layer_2": {"kernel": [width, N Dt], …}}},
  4,727,808 parameters on ViT-B/16; kernels start Xavier-uniform, biases at 0.01. State: {"prompts": ids [C, context]}.
  Without domain ids a batch is one domain. Micro-batches are refused: their means are not the batch's.
  """
  template = prompts.templates(template)[0]
  if predict not in ("batch", "image") or compat not in (None, "released"):
    raise ValueError(f"predict is {predict!r} and compat {compat!r}; expected predict 'batch' or 'image', and compat "
                     "None or 'released'")
  if not 1 <= tokens <= spec.context - 2 or width < 1 or depth < 2:
    raise ValueError(f"tokens is {tokens}, width {width}, depth {depth}; expected 1 to {spec.context - 2} tokens, a "
                     "width of 1 or more and a depth of 2 or more")

  def init(rng, frozen, classes):
    return {"mlp": _init(rng, [spec.embed_width, *[width] * (depth - 1), tokens * spec.text_width])}, dict(classes)

  def visit(trainable, ctx):
    def visitor(carry, site, y, x):
      if site == "image/projected":
        carry = {**carry, "image": jax.lax.stop_gradient(y)}
      elif site == "text/embed":  # C texts come in and K C leave: those of every group have its tokens
        group, count = _groups(ctx, len(carry["image"]), predict)
        made = _mlp(trainable["mlp"], carry["image"].astype(jnp.float32), dropout, ctx)  # [B, N Dt]
        y = _enter(y, _means(made, group, count, ctx).reshape(count, tokens, -1))        # [K C, T, Dt]
      elif site == "text/pooled":
        ids = texts_of(ctx)
        y = at_end(x, jnp.tile(ids, (len(x) // len(ids), 1)))                            # [K C, Dt]
      return carry, y
    return visitor

  def readout(trainable, features, carry, ctx):
    B = len(carry["image"])
    group, count = _groups(ctx, B, predict)
    logits = _every(features, carry, ctx).reshape(B, count, -1)
    return jnp.take_along_axis(logits, group[:, None, None], axis=1)[:, 0]

  options = {"tokens": tokens, "width": width, "depth": depth, "dropout": dropout, "template": template,
             "predict": predict, "compat": compat}
  placeholders = "X " * tokens  # each is one token, in whose place one of a domain's enters
  return Method(
      name="dpl", options=options, init=init, visit=visit, carry={}, readout=readout, writes_from=spec.depth,
      prompts=ct.class_prompts(spec, (placeholders + template,)), prepare=keep_texts, texts=texts_of,
      reads=ct.projected_image(), whole_batch=True, **({"loss": _released} if compat else {}))


def _init(rng, sizes: list[int]) -> dict:
  """Linear layers from each size to the next."""
  xavier = jax.nn.initializers.glorot_uniform()
  return {f"layer_{i}": {"kernel": xavier(key, (into, out)), "bias": jnp.full((out,), 0.01)}
          for i, (key, into, out) in enumerate(zip(jax.random.split(rng, len(sizes) - 1), sizes, sizes[1:]))}


def _every(features, carry, ctx):
  """Logits [B, K C] of all prompts, those of a group together."""
  return ct.cosine_logits(carry["image"], features.text, ctx.frozen["logit_scale"])


def _released(trainable, outputs, ctx):
  """The loss with all prompts of all domains as classes, of which the first C are right ones."""
  logits, target = _every(outputs.features, outputs.carry, ctx), ctx.batch["target"]
  B, C = target.shape
  group, count = _groups(ctx, B)
  there = jnp.repeat(_members(group, count, ctx).any(axis=0), C)  # [K C]
  target = jnp.pad(target, ((0, 0), (0, logits.shape[1] - C)))
  return losses.cross_entropy(jnp.where(there, logits, _OUT), {**ctx.batch, "target": target})


def _groups(ctx, rows: int, predict: str = "batch"):
  """(group of each row [B] int32, their number K): the training domains, all rows together, or each by itself.

  Where the engine does not tell how many domains there are, there may be as many as rows.
  """
  if ctx.train and "domain" in ctx.batch:
    count, real = min(ctx.domains or rows, rows), ctx.batch["weight"] > 0
    # Padding has domain 0, which need not be a domain of training: it joins one that is there.
    domain = jnp.where(real, ctx.batch["domain"], jnp.max(jnp.where(real, ctx.batch["domain"], 0)))
    return jnp.unique(domain, return_inverse=True, size=count)[1].reshape(-1), count
  if not ctx.train and predict == "image":
    return jnp.arange(rows), rows
  return jnp.zeros(rows, jnp.int32), 1


def _members(group, count: int, ctx):
  """[B, K] bool: the rows that count, by their group."""
  real = ctx.batch["weight"] > 0 if "weight" in ctx.batch else jnp.ones(len(group), bool)
  return (group[:, None] == jnp.arange(count)) & real[:, None]


def _means(x, group, count: int, ctx):
  """Means over the rows x [B, …] of every group, [K, …]; 0 for one without rows."""
  members = _members(group, count, ctx).astype(jnp.float32)
  return members.T @ x / jnp.maximum(members.sum(axis=0), 1)[:, None]


def _mlp(layers: dict, x, rate: float, ctx):
  """[B, d] -> [B, N Dt]."""
  for i in range(len(layers)):
    if i:
      key = None if ctx.rng is None else jax.random.fold_in(ctx.rng, i)
      x = jax.nn.relu(classifier.dropout(key, rate, x, ctx.train))
    x = x @ layers[f"layer_{i}"]["kernel"] + layers[f"layer_{i}"]["bias"]
  return x


def _enter(texts, learned):
  """Embedded texts [C, T, Dt] with learned tokens [K, N, Dt] behind their start: [K C, T, Dt]."""
  (C, T, D), (K, N, _) = texts.shape, learned.shape
  texts = jnp.broadcast_to(texts, (K, C, T, D))
  learned = jnp.broadcast_to(learned[:, None], (K, C, N, D)).astype(texts.dtype)
  return jnp.concatenate([texts[:, :, :1], learned, texts[:, :, 1 + N:]], axis=2).reshape(K * C, T, D)
