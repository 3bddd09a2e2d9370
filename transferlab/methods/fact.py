"""FacT: the updates of all dense layers of a network as one factorised tensor (Jie and Deng 2023, arXiv 2212.03145;
JieShibo/PETL-ViT @ 026e4f1, FacT/fact_tt.py and fact_tk.py).

    W <- W + s U Sigma V         U [D, R] and V [R, D] shared by the network, Sigma of the layer

The query, key, value and output projections are D x D; fc1 and fc2 are four such pieces side by side (the MLP's width
over D), so a block has twelve. Two forms of Sigma:

* "fact_tt" (tensor train): free in every layer.
* "fact_tk" (Tucker): slices of a core [R, R, R], mixed by a column of weights for each of the network's D x D pieces.

Both are linear in the layers' inputs, so that they merge exactly into plain weights. Training acts on activations, x U
Sigma V: no gradient of a whole matrix is computed, and dropout has its place between Sigma and V.

Where widths differ between stages, in a Swin, every stage has its own U and V, and the core is the network's. This is
our reading: the paper reports a Swin-B with 0.14 million parameters, but no code of it was released. At rank 16 we
count 135,168 for "fact_tt" and 70,144 for "fact_tk"; at rank 32 the latter has 164,864.
"""
import functools
import itertools

import jax
import jax.numpy as jnp

from transferlab import tree
from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods.fact_layers import dense, project, project_hidden

_PLACES = ("qkv", "proj", "fc1", "fc2")


def fact_tt(spec, *, rank: int = 16, scale: float = 1.0, dropout: float = 0.1) -> Method:
  """FacT in tensor-train form.

  Args:
    spec: the backbone's spec.
    rank: R; the paper chooses 4, 8 or 16 per task.
    scale: the factor s; the paper chooses it per task from 0.01 to 100.
    dropout: between Sigma and V.

  Trainable: {"fact": {"stage_0": {"u": [D, R], "v": [R, D]}, "block_00": {"qkv": [R, 3R], "proj": [R, R], "fc1": [R,
  4R], "fc2": [4R, R]}, …}, "classifier"}: 61,440 on ViT-B without the classifier. U and Sigma are uniform within
  1 / sqrt(fan-in), V is zero: training starts from the frozen model. Merges.
  """
  pieces = _pieces(spec)

  def init_cores(rng):
    shapes = {"qkv": (rank, 3 * rank), "proj": (rank, rank), "fc1": (rank, pieces * rank), "fc2": (pieces * rank, rank)}
    keys = jax.random.split(rng, (spec.depth, len(shapes)))
    return {f"block_{i:02d}": {place: classifier.uniform(keys[i, j], shape, shape[0])
                               for j, (place, shape) in enumerate(shapes.items())} for i in range(spec.depth)}

  sigma = lambda fact, block, place: fact[block][place]
  return _fact("fact_tt", spec, rank, scale, dropout, {}, init_cores, sigma)


def fact_tk(spec, *, rank: int = 16, scale: float = 1.0, dropout: float = 0.1, compat: str | None = None) -> Method:
  """FacT in Tucker form.

  Args:
    spec: the backbone's spec.
    rank: R; the paper chooses 16 or 32 per task.
    scale: the factor s; the paper chooses it per task from 0.01 to 100.
    dropout: between Sigma and V.
    compat: None gives each piece of fc1 and fc2 a slice of its own. "released" reads them as the released code does,
      which writes entry b of slice j at b * 4 + j and takes it from j * R + b; for parameters that were trained so.

  Trainable: {"fact": {"stage_0": {"u": [D, R], "v": [R, D]}, "core": [R, R, R], "mix": [R, 12 L]}, "classifier"}:
  30,976 on ViT-B without the classifier, 86,528 at rank 32. Core and mix are Xavier-uniform, U is uniform within
  1 / sqrt(D), V is zero: training starts from the frozen model. Merges.
  """
  if compat not in (None, "released"):
    raise ValueError(f"compat is {compat!r}; expected None or 'released'")
  pieces = _pieces(spec)
  columns = {"qkv": (0, 3), "proj": (3, 4), "fc1": (4, 4 + pieces), "fc2": (4 + pieces, 4 + 2 * pieces)}
  per_block = 4 + 2 * pieces

  def init_cores(rng):
    rng_core, rng_mix = jax.random.split(rng)
    n = per_block * spec.depth
    return {"core": _uniform(rng_core, (rank,) * 3, 3 ** 0.5 / rank),
            "mix": _uniform(rng_mix, (rank, n), (6 / (rank + n)) ** 0.5)}

  def sigma(fact, block, place):
    first, last = (per_block * int(block.rsplit("_", 1)[1]) + column for column in columns[place])
    scrambled = compat == "released" and place in ("fc1", "fc2")
    flat = jnp.einsum("abc,cn->abn" if scrambled else "abc,cn->anb", fact["core"], fact["mix"][:, first:last])
    flat = flat.reshape(rank, -1)                    # [R, nR]
    return flat.T if place == "fc2" else flat

  return _fact("fact_tk", spec, rank, scale, dropout, {"compat": compat}, init_cores, sigma)


def _fact(name, spec, rank, scale, dropout, options, init_cores, sigma) -> Method:
  """What both forms share; sigma(fact, block, place) is a layer's core [R or 4R, R … 4R]."""
  if not 1 <= rank <= spec.width:
    raise ValueError(f"rank is {rank}; expected 1 to the width, {spec.width}")
  shapes = [spec.block(i) for i in range(spec.depth)]
  widths = {f"stage_{shape.stage}": shape.width for shape in shapes}

  def init(rng, frozen, num_classes):
    rng_head, rng_cores, *keys = jax.random.split(rng, 2 + len(widths))
    shared = {stage: {"u": classifier.uniform(key, (D, rank), D), "v": jnp.zeros((rank, D))}
              for key, (stage, D) in zip(keys, widths.items())}
    return {"fact": {**shared, **init_cores(rng_cores)},
            "classifier": classifier.init(rng_head, spec.width, num_classes)}, {}

  def factors(fact, block, place, through, drop=lambda low: low):
    """low [N, nR] and v [nR, nD], whose product the layer adds to its output; `through` takes its inputs through U."""
    shared = fact[f"stage_{shapes[_index(block)].stage}"]
    low = drop(through(shared["u"]) @ sigma(fact, block, place))
    return low, jnp.kron(jnp.eye(low.shape[1] // rank), scale * shared["v"])

  def visit(trainable, ctx):
    def visitor(carry, site, y, x):
      block, _, place = site.partition("/")
      if place not in _PLACES:
        return carry, y
      n = 1 + len(_PLACES) * _index(block) + _PLACES.index(place)
      key = None if ctx.rng is None else jax.random.fold_in(ctx.rng, n)
      drop = lambda low: classifier.dropout(key, dropout, low, ctx.train)
      through = lambda u: project_hidden(spec.gelu, x, carry, u) if place == "fc2" else project(x, u)
      low, v = factors(trainable["fact"], block, place, through, drop)
      y = dense(x, ctx.frozen[block][place], low, v)                  # [B, T, …], in the place of the frozen layer's
      return (y if place == "fc1" else ()), y
    return visitor

  def merge(trainable, frozen):
    changes = {}
    for block, place in itertools.product((f"block_{i:02d}" for i in range(spec.depth)), _PLACES):
      kernel = frozen[block][place]["kernel"]
      through = functools.partial(project, jnp.eye(len(kernel)))  # a linear map's matrix is its value on the identity
      low, v = factors(trainable["fact"], block, place, through)
      changes[f"{block}/{place}/kernel"] = (kernel.astype(jnp.float32) + low @ v).astype(kernel.dtype)
    return tree.merge(frozen, tree.unflatten(changes))

  options = {"rank": rank, "scale": scale, "dropout": dropout, **options}
  return Method(name=name, options=options, init=init, visit=visit, merge=merge, readout=classifier.readout,
                writes_from=0)


def _index(block: str) -> int:
  return int(block.rsplit("_", 1)[1])


def _pieces(spec) -> int:
  """D x D pieces of fc1, the same in every block."""
  shape = spec.block(0)
  return shape.mlp_width // shape.width


def _uniform(rng, shape, bound: float):
  return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
