"""NOAH's networks: prompts, LoRA and adapters together, each with a size of its own in every block (Zhang et al. 2022,
arXiv 2206.04673; ZhangYuanhan-AI/NOAH @ e9c55f3, called "the code" here).

    z <- [z without prompts ; p_i]                  prompts, at the end; where there are none, those found stay
    q, k, v <- W h + b + (dropout(h) A_i) B_i       LoRA, one A for all three; h is the normed input of attention
    z <- z + y + W_up q(W_down y + b_down) + b_up   adapter; y is what drop-path leaves of the MLP, q the quick GELU

`noah` is one such network, `noah_search` finds one: a supernet of the largest sizes, in which every smaller network is
made of leading slices. There slices are masks, so that one compiled program serves them all.
"""
import math

import jax
import jax.numpy as jnp

from transferlab import backbones
from transferlab.method import Context, Method
from transferlab.methods import classifier

KINDS = ("prompts", "lora", "adapter")
_STD = 0.02  # of weights, by the code's model-wide initialisation


def noah(spec, *, prompts: int | tuple = 5, lora: int | tuple = 5, adapter: int | tuple = 5, dropout: float = 0.1,
         compat: str | None = None) -> Method:
  """A network of given sizes.

  Args:
    spec: the backbone's spec, a ViT. Nothing is published for windows.
    prompts, lora, adapter: number of prompts P, rank R of LoRA and width N of the adapter in every block, [L]; one
      number is meant for all blocks, 0 is none. The networks that the authors found differ from task to task: on VTAB
      each size is 1, 5 or 10, and 5.7, 5.4 and 5.3 in the mean. The default, 5, is the middle one; no paper has it.
    dropout: on prompts, on LoRA's input and on the adapter's bottleneck.
    compat: None starts LoRA's B and the adapter's W_up at zero. "noah" draws all weights of both from a normal of std
      0.02, as the code's model-wide initialisation does by overwriting their own. It also creates what the code trains
      without using it: prompts of the whole model with a position table, which the first block replaces. Their gradient
      is zero.

  Trainable: {"prompts": {"block_00": [P, D], …}, "lora": {"block_00": {"a": [D, R], "b": [R, 3D]}, …}, "adapter":
  {"block_00": {"down": {"kernel": [D, N], "bias": [N]}, "up": {"kernel": [N, D], "bias": [D]}}, …}, "classifier"}, and
  with compat="noah" {"unused": {"prompts", "positions": [P, D] of the first block}}. Blocks of size 0 have no leaf.

  The mean over the 19 networks of VTAB is 360,134 parameters without the classifier on ViT-B; 371,290 with the unused
  ones; the code, 442,512, counts all 100 rows of the position table.

  Prompts are Xavier-uniform over [P, D], ±sqrt(6 / (D (P + 1))); the code trains every network inside a supernet of 100
  and takes that bound, ±0.0088, for all. Training does not start from the frozen model, prompts are attended to from
  the first step on. Does not merge: prompts are more tokens and the adapter's bottleneck is not linear (`lora` alone
  does).
  """
  sizes = check(spec, {"prompts": prompts, "lora": lora, "adapter": adapter}, compat)
  if not any(map(any, sizes.values())):
    raise ValueError("prompts, lora and adapter are 0 in all blocks; give one of them a size, or use method 'linear'")
  return Method(
      name="noah", options={**sizes, "dropout": dropout, "compat": compat},
      init=lambda rng, frozen, num_classes: (start(spec, rng, sizes, num_classes, compat), {}),
      visit=lambda trainable, ctx: visitor(spec, trainable, ctx, dropout), readout=classifier.readout,
      writes_from=min(i for i in range(spec.depth) if any(each[i] for each in sizes.values())))


def check(spec, sizes: dict, compat) -> dict[str, tuple]:
  """{kind: sizes of all blocks}, of what a user wrote."""
  if compat not in (None, "noah"):
    raise ValueError(f"compat is {compat!r}; expected None or 'noah'")
  found = {}
  for kind, each in sizes.items():
    each = (each,) * spec.depth if isinstance(each, int) else tuple(each)
    if len(each) != spec.depth or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in each):
      raise ValueError(f"{kind} is {sizes[kind]}; expected a whole number from 0, or one for each of the {spec.depth} "
                       f"blocks of {spec.name}")
    found[kind] = each
  return found


def count(spec, sizes: dict) -> int:
  """Trainable parameters of a network without the classifier and what is unused."""
  D = spec.width
  return sum(D * p + 4 * D * r + (2 * D * n + n + D) * (n > 0) for p, r, n in zip(*(sizes[kind] for kind in KINDS)))


def start(spec, rng, sizes: dict, num_classes: int, compat: str | None) -> dict:
  """Initial parameters of a network, see `noah`."""
  D = spec.width
  keys = dict(zip(("classifier", "unused", *KINDS), jax.random.split(rng, 5)))

  def rows(rng, P):
    bound = math.sqrt(6 / (D * (P + 1)))
    return jax.random.uniform(rng, (P, D), minval=-bound, maxval=bound)

  def pair(rng, R):
    of_a, of_b = jax.random.split(rng)
    if compat == "noah":
      return {"a": _STD * jax.random.normal(of_a, (D, R)), "b": _STD * jax.random.normal(of_b, (R, 3 * D))}
    return {"a": classifier.uniform(of_a, (D, R), D), "b": jnp.zeros((R, 3 * D))}

  def bottleneck(rng, N):
    down, up = jax.random.split(rng)
    kernel = _STD * jax.random.normal(up, (N, D)) if compat == "noah" else jnp.zeros((N, D))
    return {"down": {"kernel": _STD * jax.random.normal(down, (D, N)), "bias": jnp.zeros(N)},
            "up": {"kernel": kernel, "bias": jnp.zeros(D)}}

  made = {kind: {f"block_{i:02d}": make(jax.random.fold_in(keys[kind], i), n) for i, n in enumerate(sizes[kind]) if n}
          for kind, make in zip(KINDS, (rows, pair, bottleneck))}
  made = {kind: blocks for kind, blocks in made.items() if blocks}
  if compat == "noah" and sizes["prompts"][0]:
    of_prompts, of_positions = jax.random.split(keys["unused"])
    P = sizes["prompts"][0]
    made["unused"] = {"prompts": rows(of_prompts, P), "positions": rows(of_positions, P)}
  return {**made, "classifier": classifier.init(keys["classifier"], D, num_classes)}


def visitor(spec, trainable: dict, ctx: Context, dropout: float, sizes: dict | None = None):
  """The visitor of a network.

  Args:
    sizes: {kind: [L] int32}, arrays: the network of so many leading rows, ranks and units alone, by masks; shapes stay
      those of `trainable`. None for all of them.
  """
  modules = _Modules(spec.tokens, ctx, dropout, sizes)

  def visit(carry, site, y, x):
    if site == "pre_norm":
      return carry, y[:, :spec.tokens]  # what pools all tokens shall not pool prompts
    block, _, place = site.partition("/")
    if place == "bias":
      return carry, modules.attend(y, _index(block), x)
    kind = {"in": "prompts", "qkv": "lora", "mlp": "adapter"}.get(place)
    parameters = trainable.get(kind, {}).get(block)
    if parameters is None:
      return carry, y
    i = _index(block)
    if kind == "lora":
      return carry, modules.update(y, i, x, parameters)
    return carry, (modules.enter if kind == "prompts" else modules.adapt)(y, i, parameters)
  return visit


class _Modules:
  """What is done in block i, to T tokens of the backbone and P prompts behind them."""

  def __init__(self, tokens: int, ctx: Context, dropout: float, sizes: dict | None):
    self.tokens, self.ctx, self.dropout, self.sizes = tokens, ctx, dropout, sizes
    self.visible = None if sizes is None else _visible(sizes["prompts"])

  def enter(self, y, i: int, rows):
    """Prompts [P, D] replace those that y ends with; with size 0 those stay."""
    own = jnp.broadcast_to(rows, (len(y), *rows.shape)).astype(y.dtype)
    own = self.drop(own, i, "prompts")                                                      # [B, P, D]
    found = y[:, self.tokens:]
    if self.sizes is not None and found.shape[1]:
      own = jnp.where(self.sizes["prompts"][i] > 0, own, found)
    return jnp.concatenate([y[:, :self.tokens], own], axis=1)                               # [B, T + P, D]

  def attend(self, bias, i: int, h):
    """The bias of attention, minus infinity towards prompts that are masked."""
    if self.sizes is None or h.shape[1] == self.tokens:
      return bias
    seen = jnp.arange(h.shape[1]) < self.tokens + self.visible[i]
    hidden = jnp.where(seen, 0.0, -jnp.inf).astype(h.dtype)[None, None, None]               # [1, 1, 1, T + P]
    return hidden if bias is None else bias + hidden

  def update(self, y, i: int, h, pair: dict):
    """LoRA on the fused projection y of the normed tokens h."""
    low = self.leading(self.drop(h, i, "lora") @ pair["a"], i, "lora")                      # [B, T + P, R]
    return y + (low @ pair["b"]).astype(y.dtype)                                            # [B, T + P, 3D]

  def adapt(self, y, i: int, layers: dict):
    """The adapter on the MLP's branch y."""
    down, up = layers["down"], layers["up"]
    low = backbones.gelu(y @ down["kernel"] + down["bias"], "quick")                        # [B, T + P, N]
    low = self.leading(self.drop(low, i, "adapter"), i, "adapter") @ up["kernel"]
    bias = up["bias"] if self.sizes is None else up["bias"] * (self.sizes["adapter"][i] > 0)
    return y + (low + bias).astype(y.dtype)                                                 # [B, T + P, D]

  def drop(self, x, i: int, kind: str):
    rng = self.ctx.rng
    key = None if rng is None else jax.random.fold_in(rng, 2 + len(KINDS) * i + KINDS.index(kind))
    return classifier.dropout(key, self.dropout, x, self.ctx.train)

  def leading(self, low, i: int, kind: str):
    """The leading units of [B, T + P, N], zeros for the others."""
    if self.sizes is None:
      return low
    return jnp.where(jnp.arange(low.shape[-1]) < self.sizes[kind][i], low, jnp.zeros((), low.dtype))


def _index(block: str) -> int:
  return int(block.rsplit("_", 1)[1])


def _visible(prompts) -> list:
  """Number of prompts that each block attends to: its own, or where it has none those it finds."""
  found = [prompts[0]]
  for own in prompts[1:]:
    found.append(jnp.where(own > 0, own, found[-1]))
  return found
