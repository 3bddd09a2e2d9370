"""InCA and Open-InCA: cross-attention adapters on many activations of a frozen backbone, all trained in parallel from
one forward pass (Dukler et al. 2023, arXiv 2303.04105). `cross_attention.py` holds one adapter and says what is known
of the paper; of the rest, stated in its abstracts: adapters are isolated from the backbone and trained in parallel, and
are combined or selected afterwards. Our own choices: the sites, the loss, the rules of combining, selection by
validation accuracy, everything else below.

The loss is the sum, not the mean, of the adapters' own mean losses: the adapters share no parameter, so each one's
gradient is what it would be if it trained alone, whatever their number. Parameters lie under their site's name, so that
`Optim.lr_factors` and `Optim.decay` reach single adapters: (("adapters/block_05/.*|classifier/block_05/.*", 0.3),).
Clipping by the global norm (`Optim.clip`) would couple them.
"""
import functools
import re

import jax
import jax.numpy as jnp

from transferlab import losses, tree
from transferlab.backbones import sites as sites_of
from transferlab.method import Context, Method, Read, forward
from transferlab.methods import cross_attention as ca

COMBINATIONS = ("mean_logits", "mean_probabilities")


def inca(spec, *, sites: str | None = None, queries: int = 1, heads: int | None = None, norm_tokens: bool = False,
         combine: str = "mean_logits") -> Method:
  """InCA: an adapter and a linear head per site.

  Args:
    spec: the backbone's spec.
    sites: a pattern on site names, such as "block_.*/out" or "block_05/out|norm". Default: every block's output, and
      the final norm if it keeps its tokens.
    queries: learned queries per adapter; several are averaged before the head.
    heads: attention heads H of an adapter; default the backbone's own at that site, 1 in a ResNet.
    norm_tokens: a LayerNorm on the tokens before keys and values, for residual streams whose scale grows with depth.
    combine: the logits are "mean_logits", of all adapters, or the logarithm of "mean_probabilities", or those of one
      site, given by its name. Training does not depend on it.

  Trainable: {"adapters": {site: …}, "classifier": {site: {"kernel": [D, C], "bias": [C]}}}, nested at the slashes of
  site names. One adapter of one query has 4 D^2 + 6 D parameters, 4,200,448 on ViT-L/16. Does not merge.
  """
  return _method("inca", spec, sites, heads, norm_tokens, combine, lambda num_classes: queries, ca.linear_head,
                 {"queries": queries})


def open_inca(spec, *, sites: str | None = None, heads: int | None = None, norm_tokens: bool = False,
              combine: str = "mean_logits") -> Method:
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
  if combine not in (*COMBINATIONS, *chosen):
    raise ValueError(f"combine is {combine!r}; expected {', '.join(COMBINATIONS)} or a site that is read, nearest: "
                     f"{', '.join(tree.nearest(combine, chosen))}")
  make = {site: functools.partial(ca.init, width=shapes[site].shape[-1], norm_tokens=norm_tokens,
                                  heads=_heads(spec, site) if heads is None else heads) for site in chosen}
  for init_ in make.values():  # a number of heads that does not divide a width is an error now, not at the first step
    jax.eval_shape(functools.partial(init_, queries=queries(1)), jax.random.key(0))

  def init(rng, frozen, num_classes):
    keys = dict(zip(chosen, jax.random.split(rng, len(chosen))))
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

  return Method(
      name=name, options={"sites": pattern, **options, "heads": heads, "norm_tokens": norm_tokens, "combine": combine},
      init=init, visit=visit, carry={}, loss=loss, writes_from=spec.depth,
      readout=lambda trainable, features, carry, ctx: combined(carry, combine),
      reads={site: Read(site) for site in chosen}, members=lambda outputs: outputs.carry)


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


def combined(logits: dict, how: str):
  """One set of logits [B, C] of {site: [B, C]}; see `inca` for `how`. Softmax of them gives the probabilities meant."""
  if how not in COMBINATIONS:
    return logits[how]
  each = jnp.stack(list(logits.values()))                                             # [K, B, C]
  if how == "mean_logits":
    return each.mean(axis=0)
  return jax.nn.logsumexp(jax.nn.log_softmax(each), axis=0) - jnp.log(len(logits))


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


def site_scores(method: Method, backbone, trainable, frozen, batches) -> dict[str, tuple[float, float]]:
  """Accuracy and mean cross-entropy of every adapter, for choosing among them: give validation data, never the test's.

  Args:
    method: an `inca` or `open_inca`.
    batches: of {"image": [B, S, S, 3] normalised, "label": [B], "weight": [B], 0 for rows that do not count}.

  Returns:
    {site: (accuracy, loss)} in the order of the forward pass.
  """
  @jax.jit
  def count(trainable, frozen, batch):
    logits = forward(method, backbone, trainable, batch["image"], Context(frozen=frozen)).carry
    weight, label = batch["weight"], batch["label"]
    def sums(z):
      of_label = jnp.take_along_axis(jax.nn.log_softmax(z), label[:, None], axis=-1)[:, 0]
      return jnp.stack([jnp.sum(weight * (z.argmax(-1) == label)), -jnp.sum(weight * of_label), jnp.sum(weight)])
    return {site: sums(z) for site, z in logits.items()}

  counts = [jax.device_get(count(trainable, frozen, batch)) for batch in batches]
  totals = {site: sum(each[site] for each in counts) for site in method.reads}                  # {site: [3]}
  return {site: (float(right / rows), float(loss / rows)) for site, (right, loss, rows) in totals.items()}


def best_site(scores: dict[str, tuple[float, float]]) -> str:
  """The site of the highest accuracy; of equal ones that of the lower loss, then the earlier."""
  return max(scores, key=lambda site: (scores[site][0], -scores[site][1]))


def only(spec, method: Method, trainable: dict, site: str) -> tuple[Method, dict]:
  """The method and trainable of one site's adapter alone; its logits are those it had among the others."""
  make = {"inca": inca, "open_inca": open_inca}[method.name]
  alone = make(spec, **{**method.options, "sites": re.escape(site), "combine": "mean_logits"})
  return alone, {part: tree.unflatten({site: _at(trainable[part], site)}) for part in trainable}
