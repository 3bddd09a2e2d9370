"""QLoRA: low-rank updates beside frozen dense layers that are kept in 4 bits (Dettmers et al. 2023, arXiv 2305.14314).

    y = dequantised(W) x + b + (alpha / R) B A dropout(x)

On a CLIP both towers are adapted, the text tower runs over the class prompts in every step, and logits are cosines: the
baseline "CLIP + QLoRA" of MLAI-Yonsei/LFA. On a ViT the image tower is all there is, with a linear classifier.

The four dense layers of every block are quantised, `nf4.py`; embeddings, norms, biases and the two projections into the
joint space stay as they are. `prepare` does it once per run or loaded adapter, and the same weights give the same bits,
so that the adapter file holds A and B alone. The backbone's own product with such a kernel is replaced at its site by
one that makes the kernel anew; what it would have been is never computed, XLA removes it. A training step on CLIP
ViT-B/16 at batch 32 with 65 classes peaks at 3102 MiB, with base="none" at 4020 (benchmarks/qlora.py).

Ours: q, k and v share a dropout mask, as they share their input, where peft draws one for each; the image projection
stays in full precision like the text's, which alone is left out by transformers' default. It does not merge: kernel and
update together do not fit 4 bits.
"""
import jax
import jax.numpy as jnp

from transferlab import prompts, tree
from transferlab.method import Method
from transferlab.methods import classifier, clip_text as ct, nf4
from transferlab.methods.coop import keep_texts, texts_of

# The parts of each dense layer, side by side in what it puts out; LoRA's targets by name.
_PARTS = {"qkv": ("q", "k", "v"), "proj": ("out",), "fc1": ("fc1",), "fc2": ("fc2",)}
_TARGETS = tuple(name for names in _PARTS.values() for name in names)


def qlora(spec, *, rank: int = 4, alpha: float = 4.0, dropout: float = 0.25, targets: tuple = ("q", "k", "v", "out"),
          base: str = "nf4", compute: str = "bfloat16", templates: str | tuple = "a photo of a {}") -> Method:
  """QLoRA.

  Args:
    spec: of a CLIP or a ViT.
    rank: R.
    alpha: updates are scaled by alpha / R.
    dropout: on the inputs of A.
    targets: of q, k, v, out (of attention), fc1, fc2.
    base: "nf4", or "none" for plain LoRA in the same form on kernels as they are.
    compute: "bfloat16" or "float32", in which products with 4-bit kernels are taken.
    templates: one or several texts with {} for the class name, CLIP only; of several, class vectors are `ct.ensemble`.

  Trainable: {"lora": {"image": {"block_00": {"q": {"a": [D, R], "b": [R, D]}, …}}, "text": …}}, on a ViT {"lora":
  {"block_00": …}, "classifier"}: 491,520 on CLIP ViT-B/16. (The 553K of LFA's poster are R = 2 on all six targets, or
  R = 6 on q, k, v.) A is Kaiming-uniform, B zero: training starts from the quantised model. State: {"prompts": ids
  [C T, context]}.

  The visitor leaves the carry alone; without a train flag there is no dropout.

  Raises:
    ValueError: an option is out of range.
  """
  clip = spec.family == "clip"
  towers = {"image/": spec.image, "text/": spec.text} if clip else {"": spec}
  blocks = {f"{name}block_{i:02d}": tower for name, tower in towers.items() for i in range(tower.depth)}
  sites = [f"{block}/{place}" for block in blocks for place in _PARTS]
  _check(rank, min(tower.width for tower in towers.values()), targets, base, compute)
  each = prompts.templates(templates)

  def init(rng, frozen, classes):
    rng_head, rng = jax.random.split(rng)
    keys = iter(jax.random.split(rng, len(blocks) * len(targets)))
    pairs = {f"{block}/{name}": _pair(next(keys), rank, *_shape(name, tower.width, tower.mlp_width))
             for block, tower in blocks.items() for name in targets}
    if clip:
      return {"lora": tree.unflatten(pairs)}, dict(classes)
    return {"lora": tree.unflatten(pairs), "classifier": classifier.init(rng_head, spec.width, classes)}, {}

  def prepare(frozen, state):
    frozen = keep_texts(frozen, state) if clip else frozen
    if base == "none":
      return frozen
    kept = tree.flatten(frozen)
    packed = {site: nf4.quantise(kept.pop(f"{site}/kernel"), len(_PARTS[site.rpartition("/")[2]])) for site in sites}
    return {**tree.unflatten(kept), "nf4": packed}

  def weights(trainable, frozen):
    if base == "none":
      return frozen
    kept = tree.flatten({name: leaf for name, leaf in frozen.items() if name != "nf4"})
    # Of the right shape, for flax; nobody looks at what they give.
    unused = {f"{site}/kernel": jnp.zeros(nf4.shape(packed)) for site, packed in frozen["nf4"].items()}
    return tree.unflatten({**kept, **unused})

  def visit(trainable, ctx):
    pairs, frozen = tree.flatten(trainable["lora"]), tree.flatten(ctx.frozen)
    def visitor(carry, site, y, x):
      block, _, place = site.rpartition("/")
      if block not in blocks or place not in _PARTS:
        return carry, y
      dtype = y.dtype
      if base == "nf4":
        y = nf4.dense(compute, x, ctx.frozen["nf4"][site], frozen.get(f"{site}/bias"))
      own = {name: [pairs[f"{block}/{name}/{k}"] for k in "ab"] for name in _PARTS[place] if name in targets}
      if not own:  # of fc1 a GELU follows and another product of this kind: it need not be kept in a wider type
        return carry, y if place == "fc1" else y.astype(dtype)
      rng = None if ctx.rng is None else jax.random.fold_in(ctx.rng, 1 + sites.index(site))
      # Kept for the backward pass are x and the sum; left to itself XLA keeps the mask, what it leaves of x for each
      # part, and both addends.
      update = jax.checkpoint(lambda rng, x, own: alpha / rank * _update(
          classifier.dropout(rng, dropout, x, ctx.train), own, _PARTS[place]))
      return carry, jax.lax.optimization_barrier(y.astype(dtype) + update(rng, x, own).astype(dtype))
    return visitor

  def readout(trainable, features, carry, ctx):
    texts = ct.ensemble(features.text, len(each))                      # [C, d]
    return ct.cosine_logits(features.image, texts, ctx.frozen["logit_scale"])

  options = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets, "base": base, "compute": compute,
             "templates": templates}
  of_clip = {"prompts": ct.class_prompts(spec, each), "texts": texts_of, "fixed_texts": True,
             "readout": readout} if clip else {}
  return Method(**{"name": "qlora", "options": options, "init": init, "prepare": prepare, "weights": weights,
                   "visit": visit, "readout": classifier.readout, "writes_from": 0, **of_clip})


def _shape(target: str, D: int, hidden: int) -> tuple[int, int]:
  """Inputs and outputs of a target in a block of width D."""
  return (hidden if target == "fc2" else D), (hidden if target == "fc1" else D)


def _pair(rng, rank: int, I: int, O: int) -> dict:
  return {"a": classifier.uniform(rng, (I, rank), I), "b": jnp.zeros((rank, O))}


def _update(x, own: dict, parts: tuple):
  """The updates x A B of the parts of a dense layer, side by side; x [..., I], own {part: (A [I, R], B [R, O])}, zero
  for parts that have none."""
  low = jnp.split(x @ jnp.concatenate([a for a, _ in own.values()], axis=1), len(own), axis=-1)   # n x [..., R]
  found = {name: each @ b for each, (name, (_, b)) in zip(low, own.items())}
  zero = jnp.zeros_like(next(iter(found.values())))
  return jnp.concatenate([found.get(name, zero) for name in parts], axis=-1)


def _check(rank: int, width: int, targets, base: str, compute: str) -> None:
  if not 1 <= rank <= width:
    raise ValueError(f"rank is {rank}; expected 1 to the smallest tower's width, {width}")
  if not targets or len(set(targets)) < len(targets) or not set(targets) <= set(_TARGETS):
    raise ValueError(f"targets are {', '.join(map(repr, targets)) or 'none'}; expected some of {', '.join(_TARGETS)}, "
                     "each once")
  if base not in ("nf4", "none") or compute not in ("bfloat16", "float32"):
    raise ValueError(f"base {base!r}, compute {compute!r}; expected base 'nf4' or 'none', compute 'bfloat16' or "
                     "'float32'")
