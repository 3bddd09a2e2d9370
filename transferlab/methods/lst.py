"""LST: ladder side-tuning (Sung et al. 2022, arXiv 2206.06522; ylsung/Ladder-Side-Tuning @ 1798e82), read for a ViT.

    s = D_0(embed)                                                 [B, T, d],  d = D / reduction
    s = block'_i(g_i s + (1 - g_i) D_{i+1}(z_i)),  i = 0 … L-1     z_i: what leaves block i of the backbone, not normed
    features = U(LN(s)),  g_i = sigmoid(alpha_i / 0.1)             [B, D]

A transformer of the backbone's depth and heads, but narrower by the reduction, runs beside it and only reads. Gradients
never enter the backbone; of it the backward pass needs the z_i alone.

The released code is for T5, BART and CLIP-ViL's BERT, so for a ViT this is a reading. From the code: all widths of the
side network divided by the reduction, gates of temperature 0.1 that start at 1/2, a downsample with bias for the
embeddings and one for each layer, a last norm and an upsample, the start from pruned weights. In favour of keeping all
twelve layers: they give the 2.38 M parameters that DTL's paper prints for LST on ViT-B/16. Ours: side blocks of the
backbone's pre-norm form, the class token as read-out, that the backbone's final norm plays no part, and how it is
pruned, see `lst_pruning.py`.
"""
import functools

import jax
import jax.numpy as jnp

from transferlab import tree
from transferlab.backbones import attention, gelu, normalise
from transferlab.method import Method, Read
from transferlab.methods import classifier
from transferlab.methods.lst_pruning import prune

TEMPERATURE = 0.1  # of the gates


def lst(spec, *, reduction: int = 8, init: str = "pruned", readout: str = "cls", layers: tuple | None = None) -> Method:
  """LST.

  Args:
    spec: the backbone's spec.
    reduction: D / d; it has to divide the widths of a head and of the MLP.
    init: of the side blocks and the last norm, "pruned" from the backbone's own, or "random": Xavier-uniform. The
      downsamples and the upsample start as torch starts a dense layer, uniform in ±1/sqrt(fan-in), the gates at 1/2.
    readout: the token of s that is classified, "cls", or the "mean" of the patches'; the mean where there is no class
      token.
    layers: blocks of the backbone that the ladder has a rung for, counted from 0; default all. Of T5's twelve the
      paper's scripts leave 0, 4 and 8 out.

  Trainable: {"down": {"embed", "block_00", …: {"kernel": [D, d], "bias": [d]}}, "alpha": [L], "side": {"block_00": as
  in the backbone, …}, "norm": {"scale": [d], "bias": [d]}, "up": {"kernel": [d, D], "bias": [D]}, "classifier"}:
  2,376,492 on ViT-B/16 without the classifier. Does not merge: it is a second network.

  Raises:
    ValueError: an option out of its range.
  """
  layers = tuple(range(spec.depth)) if layers is None else layers
  _check(spec, reduction, init, readout, layers)
  D, d, prefix = spec.width, spec.width // reduction, spec.prefix_tokens
  names = [f"block_{i:02d}" for i in layers]

  def start(rng, frozen, num_classes):
    rng_head, rng_side, rng_up, *rngs = jax.random.split(rng, 4 + len(names))
    pruned = lambda frozen: prune(frozen, names, spec.heads, reduction)
    network = pruned(frozen) if init == "pruned" else _random(rng_side, jax.eval_shape(pruned, frozen))
    down = {slot: _dense_init(key, D, d) for slot, key in zip(("embed", *names), rngs)}
    return {"down": down, "alpha": jnp.zeros(len(names)), **network, "up": _dense_init(rng_up, d, D),
            "classifier": classifier.init(rng_head, D, num_classes)}, {}

  def finish(trainable, carry, ctx):
    """{slot: [B, T, D]} -> features [B, D]."""
    down = lambda slot: _dense(trainable["down"][slot], carry[slot].astype(trainable["alpha"].dtype))
    gates = jax.nn.sigmoid(trainable["alpha"] / TEMPERATURE)                     # [L]
    s = down("embed")                                                            # [B, T, d]
    for k, name in enumerate(names):
      s = _block(trainable["side"][name], gates[k] * s + (1 - gates[k]) * down(name), spec)
    s = s[:, :1] if prefix and readout == "cls" else s[:, prefix:]
    norm = trainable["norm"]
    s = normalise(s, norm["scale"], norm["bias"], spec.norm_eps).mean(axis=1)    # [B, d]; U is affine: the mean first
    return _dense(trainable["up"], s)

  return Method(
      name="lst", options={"reduction": reduction, "init": init, "readout": readout, "layers": layers}, init=start,
      finish=finish, readout=lambda trainable, features, carry, ctx: classifier.apply(trainable["classifier"], carry),
      reads={"embed": Read("embed_norm" if spec.embed_norm else "embed"),
             **{name: Read(f"{name}/out") for name in names}}, writes_from=spec.depth)


def _check(spec, reduction: int, init: str, readout: str, layers: tuple) -> None:
  head = spec.width // spec.heads
  if reduction < 1 or head % reduction or spec.mlp_width % reduction:
    raise ValueError(f"reduction is {reduction}; expected a divisor of the width of a head, {head}, and of the MLP, "
                     f"{spec.mlp_width}")
  if init not in ("pruned", "random") or readout not in ("cls", "mean"):
    raise ValueError(f"init {init!r}, readout {readout!r}; expected init 'pruned' or 'random', readout 'cls' or 'mean'")
  if not layers or layers != tuple(i for i in range(spec.depth) if i in layers):
    raise ValueError(f"layers is {layers}; expected numbers of blocks, 0 to {spec.depth - 1}, in order")


def _dense_init(rng, fan_in: int, fan_out: int) -> dict:
  """As torch starts a dense layer."""
  drawn = classifier.uniform(rng, (1 + fan_in, fan_out), fan_in)
  return {"kernel": drawn[1:], "bias": drawn[0]}


def _random(rng, shapes: dict) -> dict:
  """Side blocks and norm that owe nothing to the backbone."""
  def draw(key, name, shape):
    if name.endswith("kernel"):
      return jax.nn.initializers.glorot_uniform()(key, shape)
    return jnp.ones(shape) if name.endswith("scale") else jnp.zeros(shape)
  leaves = tree.flatten(shapes)
  keys = jax.random.split(rng, len(leaves))
  return tree.unflatten({name: draw(key, name, leaf.shape) for key, (name, leaf) in zip(keys, leaves.items())})


def _dense(layer: dict, x):
  """[…, N] -> […, N'], computed on a matrix."""
  y = x.reshape(-1, x.shape[-1]) @ layer["kernel"]
  return (y + layer["bias"] if "bias" in layer else y).reshape(*x.shape[:-1], -1)


def _block(params: dict, x, spec):
  """A pre-norm block with the backbone's heads, eps and GELU, [B, T, d] -> [B, T, d]."""
  norm = lambda name, x: normalise(x, params[name]["scale"], params[name]["bias"], spec.norm_eps)
  x = x + _dense(params["proj"], _attend(_dense(params["qkv"], norm("ln1", x)), spec.heads))
  return x + _dense(params["fc2"], gelu(_dense(params["fc1"], norm("ln2", x)), spec.gelu))


@functools.partial(jax.checkpoint, static_argnums=1)
def _attend(qkv, heads: int):
  """Attention whose backward pass starts from q, k and v. The weights are as large as the backbone's, [B, H, T, T], and
  cheap to have again: on ViT-B/16 at batch 32 a step with remat peaks at 1394 MiB, with the weights kept at 1864, and
  takes 2 % more CPU time."""
  return attention(qkv, heads, None)
