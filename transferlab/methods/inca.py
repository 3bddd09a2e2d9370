"""InCA and Open-InCA: cross-attention adapters on many activations of a frozen backbone, all trained in parallel from
one forward pass (Dukler et al. 2023, arXiv 2303.04105). `cross_attention.py` holds one adapter and says what is known
of the paper; of the rest, stated in its abstracts: adapters are isolated from the backbone and trained in parallel, and
are combined or selected afterwards, the single best one being comparable to full fine-tuning already. Our own choices:
the sites, the loss, the rules of combining, selection by validation accuracy, everything else below.

The loss is the sum, not the mean, of the adapters' own mean losses: the adapters share no parameter, so each one's
gradient is what it would be if it trained alone, whatever their number. Parameters lie under their site's name, so that
`Optim.lr_factors` and `Optim.decay` reach single adapters: (("adapters/block_05/.*|classifier/block_05/.*", 0.3),).
Clipping by the global norm (`Optim.clip`) would couple them.
"""
import functools
import re
import zlib

import jax
import jax.numpy as jnp

from transferlab import ensembles, losses, tree
from transferlab.backbones import sites as sites_of
from transferlab.method import Method, Read
from transferlab.methods import cross_attention as ca

MEANS = ("mean_logits", "mean_probabilities")
TOP = re.compile(r"top([1-9]\d*)(_probabilities)?")


def inca(spec, *, sites: str | None = None, queries: int = 1, heads: int | None = None, norm_tokens: bool = False,
         combine: str = "best") -> Method:
  """InCA: an adapter and a linear head per site.

  Args:
    spec: the backbone's spec.
    sites: a pattern on site names, such as "block_.*/out" or "block_05/out|norm". Default: every block's output, and
      the final norm if it keeps its tokens.
    queries: learned queries per adapter; several are averaged before the head.
    heads: attention heads H of an adapter; default the backbone's own at that site, 1 in a ResNet.
    norm_tokens: a LayerNorm on the tokens before keys and values, for residual streams whose scale grows with depth.
    combine: what becomes of the adapters; their training does not depend on it. Chosen on the validation split after
      training, the others being dropped: "best", the one of the highest accuracy (of equal ones, of the lowest loss,
      then the earliest); "top3", the mean of the logits of the three best, or of any other number, "top3_probabilities"
      of their probabilities; "greedy", a weighted mean of logits, see `ensembles.greedy`. Until then, and for good
      where there is no validation split, the logits are the mean over all. Not chosen: "mean_logits";
      "mean_probabilities", the logarithm of that; a site's name, "norm"; a weighted mean, "block_03/out*2+norm".
      All adapters are taken from one step, with a recipe's select="best" the one at which the mean over all is best; a
      sweep scores each adapter at its own best step instead, and then trains the chosen one alone.
      The best one alone is the cheapest to serve, stopping where it reads; an ensemble is often a little better.

  Trainable: {"adapters": {site: …}, "classifier": {site: {"kernel": [D, C], "bias": [C]}}}, nested at the slashes of
  site names. One adapter of one query has 4 D^2 + 6 D parameters, 4,200,448 on ViT-L/16. Does not merge.
  """
  return _method("inca", spec, sites, heads, norm_tokens, combine, lambda num_classes: queries, ca.linear_head,
                 {"queries": queries})


def open_inca(spec, *, sites: str | None = None, heads: int | None = None, norm_tokens: bool = False,
              combine: str = "best") -> Method:
  """Open-InCA: a query per class, and a diagonal head that reads logit c from query c.

  Options as of `inca`. One adapter has 4 D^2 + 5 D + C D parameters, and its head C (D + 1). Classes meet only in the
  softmax: `add_classes` and `keep_classes` leave the logits of the others as they are.
  """
  return _method("open_inca", spec, sites, heads, norm_tokens, combine, lambda num_classes: num_classes,
                 ca.diagonal_head, {})


def _method(name, spec, pattern, heads, norm_tokens, combine, queries, head, options) -> Method:
  shapes = sites_of(spec)
  if pattern is None:
    pattern = r"block_\d+/out" + (r"|norm" if "norm" in shapes and shapes["norm"].shape[1] > 1 else "")
  chosen = _matching(spec, shapes, pattern)
  _check(combine, chosen)
  make = {site: functools.partial(ca.init, width=shapes[site].shape[-1], norm_tokens=norm_tokens,
                                  heads=_heads(spec, site) if heads is None else heads) for site in chosen}
  for init_ in make.values():  # a number of heads that does not divide a width is an error now, not at the first step
    jax.eval_shape(functools.partial(init_, queries=queries(1)), jax.random.key(0))

  def init(rng, frozen, num_classes):
    # By name, so that an adapter starts as it would alone.
    keys = {site: jax.random.fold_in(rng, zlib.crc32(site.encode())) for site in chosen}
    adapters = {site: make[site](keys[site], queries=queries(num_classes)) for site in chosen}
    heads_ = {site: ca.init_head(shapes[site].shape[-1], num_classes) for site in chosen}
    return {"adapters": tree.unflatten(adapters), "classifier": tree.unflatten(heads_)}, {}

  def visit(trainable, ctx):
    def visitor(logits, site, y, x):
      if site not in make:
        return logits, y
      read = ca.features(_at(trainable["adapters"], site), jax.lax.stop_gradient(y))  # [B, M, D]
      return {**logits, site: head(_at(trainable["classifier"], site), read)}, y      # {site: [B, C]}
    return visitor

  def loss(trainable, outputs, ctx):
    return sum(losses.cross_entropy(logits, ctx.batch) for logits in outputs.carry.values())

  options = {"sites": pattern, **options, "heads": heads, "norm_tokens": norm_tokens, "combine": combine}
  return Method(
      name=name, options=options, init=init, visit=visit, carry={}, loss=loss, writes_from=spec.depth,
      readout=lambda trainable, features, carry, ctx: combined(carry, combine),
      reads={site: Read(site) for site in chosen}, members=lambda outputs: outputs.carry,
      choose=_choose(spec, name, options, chosen) if len(chosen) > 1 and _chooses(combine) else None,
      member_options=lambda site: {"sites": re.escape(site), "combine": "mean_logits"})


def _matching(spec, shapes: dict, pattern: str) -> list[str]:
  """Names of the sites that a pattern matches, in the order of the forward pass."""
  try:
    chosen = [site for site in shapes if re.fullmatch(pattern, site)]
  except re.error as error:
    raise ValueError(f"sites {pattern!r} is not a regular expression ({error}); expected e.g. 'block_.*/out'") from None
  if not chosen:
    raise ValueError(f"sites {pattern!r} matches none of {spec.name}; nearest: "
                     f"{', '.join(tree.nearest(pattern, shapes))}")
  for site in chosen:
    if len(shapes[site].shape) < 3:
      raise ValueError(f"site {site!r} of {spec.name} has shape [B, {shapes[site].shape[-1]}]; an adapter attends to "
                       "tokens [B, T, D] or maps, leave it out of sites")
  return chosen


def _heads(spec, site: str) -> int:
  """The backbone's attention heads at a site; those of the last block outside of blocks; 1 where it has none."""
  block = re.match(r"block_(\d+)/", site)
  return spec.block(int(block[1]) if block else spec.depth - 1).heads or 1


def _at(nested: dict, site: str) -> dict:
  return functools.reduce(dict.__getitem__, site.split("/"), nested)


def _chooses(combine: str) -> bool:
  return combine in ("best", "greedy") or bool(TOP.fullmatch(combine))


def _choose(spec, name: str, options: dict, sites: list[str]):
  """The `Method.choose` of a method with these options that reads these sites."""
  combine = options["combine"]
  top = TOP.fullmatch("top1" if combine == "best" else combine)

  def choose(trainable, state, logits, labels, weights=None):
    logits = {site: logits[site] for site in sites}  # of equal ones the earlier wins
    picked = (ensembles.top_k(logits, labels, int(top[1]), weights) if top else
              ensembles.greedy(logits, labels, weights=weights))
    how = MEANS[bool(top and top[2])]
    if len(set(picked.values())) > 1:
      how = "+".join(f"{site}*{weight}" for site, weight in picked.items())
    kept = {**options, "sites": "|".join(map(re.escape, picked)), "combine": how}
    return {"inca": inca, "open_inca": open_inca}[name](spec, **kept), at_sites(trainable, picked), state

  return choose


def _shares(combine: str, sites) -> dict[str, int]:
  """{site: weight} of "block_03/out*2+norm"; {} if that is not what it says of these sites."""
  parts = [re.fullmatch(r"(.+?)(?:\*([1-9]\d{0,3}))?", part) for part in combine.split("+")]
  found = {part[1]: int(part[2] or 1) for part in parts if part and part[1] in sites}
  return found if len(found) == len(parts) else {}


def _check(combine: str, sites: list[str]) -> None:
  top = TOP.fullmatch(combine)
  if top and int(top[1]) > len(sites):
    raise ValueError(f"combine is {combine!r} and {len(sites)} sites are read; expected a number from 1 to "
                     f"{len(sites)}")
  if not (_chooses(combine) or combine in MEANS or _shares(combine, sites)):
    raise ValueError(f"combine is {combine!r}; expected best, top3 (or another number), greedy, {', '.join(MEANS)} "
                     f"or a site that is read, nearest: {', '.join(tree.nearest(combine, sites))}")


def combined(logits: dict, combine: str):
  """One set of logits [B, C] of {site: [B, C]}; see `inca`. Softmax of them gives the probabilities meant."""
  if combine == "mean_probabilities":
    each = jnp.stack(list(logits.values()))                                           # [K, B, C]
    return jax.nn.logsumexp(jax.nn.log_softmax(each), axis=0) - jnp.log(len(logits))
  weights = _shares(combine, logits) or dict.fromkeys(logits, 1)
  return sum(weight * logits[site] for site, weight in weights.items()) / sum(weights.values())


def at_sites(trainable: dict, sites) -> dict:
  """The adapters and heads of these sites alone."""
  return {part: tree.unflatten({site: _at(trainable[part], site) for site in sites}) for part in trainable}


def _each_site(trainable: dict, change) -> dict:
  """A trainable whose adapters and heads are `change(index, adapter, head)` of the old ones."""
  names = sorted(name.removesuffix("/bias") for name in tree.flatten(trainable["classifier"]) if name.endswith("/bias"))
  new = {site: change(k, _at(trainable["adapters"], site), _at(trainable["classifier"], site))
         for k, site in enumerate(names)}
  part = lambda i: tree.unflatten({site: pair[i] for site, pair in new.items()})
  return {"adapters": part(0), "classifier": part(1)}


def add_classes(trainable: dict, rng, count: int) -> dict:
  """The trainable of `open_inca` with `count` more classes at the end, at every site."""
  return _each_site(trainable, lambda k, *pair: ca.add_classes(*pair, jax.random.fold_in(rng, k), count))


def keep_classes(trainable: dict, classes) -> dict:
  """The trainable of `open_inca` with these classes alone, in this order; see `cross_attention.keep_classes`."""
  return _each_site(trainable, lambda k, *pair: ca.keep_classes(*pair, classes))
