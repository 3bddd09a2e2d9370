"""LoRA: low-rank updates of the attention projections (Hu et al. 2022, arXiv 2106.09685), in the two forms the ViT
literature calls "LoRA r=8, 294,912 parameters":

* "qv": a pair of its own for the query and the value columns (JieShibo/PETL-ViT, binary_adapter).
* "fused": one pair over the fused projection, so that q, k and v share A (ZhangYuanhan-AI/NOAH).

The same trainable can act on activations, y + scale * (x A) B, or on weights, W + scale * A B. Activations are cheaper
to train (the weight form differentiates whole matrices) and allow dropout; weights are what `merge` writes.
"""
import jax
import jax.numpy as jnp

from transferlab import tree
from transferlab.method import Method
from transferlab.methods import classifier

_COLUMNS = {"q": 0, "k": 1, "v": 2}  # order of the fused projection


def lora(spec, *, rank: int = 8, form: str = "qv", scale: float = 1.0, dropout: float = 0.1, space: str = "activations",
         compat: str | None = None) -> Method:
  """LoRA on the fused q, k, v projection of every block.

  Args:
    spec: the backbone's spec.
    rank: R.
    form: "qv" or "fused".
    scale: factor on the update (PETL-ViT chooses it per task from 0.01 to 10; NOAH has none, 1).
    dropout: on the bottleneck in "qv", on the input in "fused", as the originals do; needs space="activations".
    space: "activations" or "weights".
    compat: None starts B at zero, so that training starts from the frozen model. "noah" draws A and B from a normal of
      std 0.02, as NOAH's model-wide initialisation does by overwriting LoRA's own; "fused" only.

  Trainable: {"lora": {"block_00": {"q": {"a": [D, R], "b": [R, D]}, "v": …}}, "classifier"}; "fused" has one pair
  {"qkv": {"a": [D, R], "b": [R, 3D]}} per block. Merges.
  """
  if form not in ("qv", "fused") or space not in ("activations", "weights") or compat not in (None, "noah"):
    raise ValueError(f"form {form!r}, space {space!r}, compat {compat!r}; expected form 'qv' or 'fused', space "
                     "'activations' or 'weights', compat None or 'noah'")
  widths = [spec.block(i).width for i in range(spec.depth)]
  if not 1 <= rank <= min(widths):
    raise ValueError(f"rank is {rank}; expected 1 to the smallest block's width, {min(widths)}")
  if dropout and space == "weights":
    raise ValueError(f"dropout {dropout} acts on activations; set dropout=0 with space='weights'")
  if compat == "noah" and form != "fused":
    raise ValueError("compat='noah' is the initialisation of form='fused'; set form='fused'")

  pairs = {"q": 1, "v": 1} if form == "qv" else {"qkv": 3}  # output width of each pair over D

  def init_pair(rng, D, width):
    rng_a, rng_b = jax.random.split(rng)
    if compat == "noah":
      return {"a": 0.02 * jax.random.normal(rng_a, (D, rank)), "b": 0.02 * jax.random.normal(rng_b, (rank, width))}
    return {"a": classifier.uniform(rng_a, (D, rank), D), "b": jnp.zeros((rank, width))}

  def init(rng, frozen, num_classes):
    rng_head, rng = jax.random.split(rng)
    keys = jax.random.split(rng, (spec.depth, len(pairs)))
    blocks = {f"block_{i:02d}": {name: init_pair(keys[i, j], D, n * D) for j, (name, n) in enumerate(pairs.items())}
              for i, D in enumerate(widths)}
    return {"lora": blocks, "classifier": classifier.init(rng_head, spec.width, num_classes)}, {}

  def place(updates: dict):
    """Updates of q and v [..., D], or of all three [..., 3D], as an update of the fused projection [..., 3D]."""
    if form == "fused":
      return updates["qkv"]
    zero = jnp.zeros_like(updates["q"])
    return jnp.concatenate([updates.get(name, zero) for name in _COLUMNS], axis=-1)

  def visit(trainable, ctx):
    def visitor(carry, site, y, x):
      block, _, place_ = site.partition("/")
      if place_ != "qkv":
        return carry, y
      updates = {}
      for j, (name, pair) in enumerate(sorted(trainable["lora"][block].items())):
        rng = None if ctx.rng is None else jax.random.fold_in(ctx.rng, 1 + 2 * int(block.rsplit("_", 1)[1]) + j)
        if form == "fused":
          low = classifier.dropout(rng, dropout, x, ctx.train) @ pair["a"]  # [B, T, R]
        else:
          low = classifier.dropout(rng, dropout, x @ pair["a"], ctx.train)  # [B, T, R]
        updates[name] = scale * (low @ pair["b"])
      return carry, y + place(updates).astype(y.dtype)                      # [B, T, 3D]
    return visitor

  def merge(trainable, frozen):
    changes = {}
    for block, block_pairs in trainable["lora"].items():
      update = place({name: scale * (pair["a"] @ pair["b"]) for name, pair in block_pairs.items()})  # [D, 3D]
      kernel = frozen[block]["qkv"]["kernel"]
      changes[f"{block}/qkv/kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return tree.merge(frozen, tree.unflatten(changes))

  options = {"rank": rank, "form": form, "scale": scale, "dropout": dropout, "space": space, "compat": compat}
  way = {"visit": visit} if space == "activations" else {"weights": merge}
  return Method(name="lora", options=options, init=init, merge=merge, readout=classifier.readout, writes_from=0, **way)
