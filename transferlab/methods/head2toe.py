"""Head2Toe: a linear head on the few most useful of all intermediate activations (Evci et al. 2022, arXiv 2201.03529;
google-research/head2toe @ 6277f63, called "the code" here). `all_features` is its first half and its baseline.

Activations of many sites are pooled to about `target_size` numbers, normalised per layer and laid side by side. A head
on all of them trains with a group lasso; the features whose weights are largest stay, and a new head trains on those.
`head2toe_reader` says which activations those are, and what of that is our reading.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import ensembles, losses
from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods.head2toe_features import CLS_MODES, Layout, count_of, length, score, select, unit_per_layer
from transferlab.methods.head2toe_reader import Reader, reader


def _check(spec, options: dict) -> None:
  choices = {"cls": CLS_MODES, "normalisation": ("unit", "none"), "penalty": tuple(losses.PENALTIES),
             "compat": (None, "paper")}
  for name, allowed in choices.items():
    if name in options and options[name] not in allowed:
      raise ValueError(f"{name} is {options[name]!r}; expected one of {', '.join(map(repr, allowed))}")
  if options["target_size"] < 1:
    raise ValueError(f"target_size is {options['target_size']}; expected a positive whole number, such as 512 or 8192")
  if not options["coefficient"] >= 0:
    raise ValueError(f"coefficient is {options['coefficient']}; expected 0 or more")
  if options["cls"] != "normal" and not spec.prefix_tokens:
    raise ValueError(f"cls is {options['cls']!r} and {spec.name} has no class token; use cls='normal'")


def _counts(fraction: float | tuple, total: int) -> dict[str, int]:
  """{member: number of features it keeps} of one fraction or of several; a member's name is its fraction."""
  fractions = fraction if isinstance(fraction, tuple) else (fraction,)
  found = {}
  for each in fractions:
    if isinstance(each, bool) or not isinstance(each, (int, float)) or not math.isfinite(each):
      raise ValueError(f"fraction {each!r} is no number; expected one such as 0.01, or several, (0.001, 0.01, 0.1)")
    name, count = repr(float(each)), count_of(each, total)
    if not 1 <= count <= total:
      raise ValueError(f"fraction {each} keeps {count} of {total} features; expected 1 to {total}")
    if name in found:
      raise ValueError(f"fraction {name} is there twice; give each once")
    found[name] = count
  if not found:
    raise ValueError("fraction is empty; expected a number such as 0.01, or several, (0.001, 0.01, 0.1)")
  return found


def _glorot(rng, features: int, num_classes: int) -> dict:
  kernel = jax.nn.initializers.glorot_uniform()(rng, (features, num_classes))
  return {"kernel": kernel, "bias": jnp.zeros(num_classes)}


def share_of_batch(options: dict, ctx):
  """What a batch's loss is multiplied by. The code divides sums over b examples, b times the penalty among them, by the
  nominal batch size."""
  real = jnp.sum(ctx.batch["weight"] > 0)
  return real / (ctx.rows or len(ctx.batch["weight"])) if options["compat"] == "paper" else 1


def _on_all(spec, name: str, options: dict, source: Reader, penalty: str) -> Method:
  """A head on all features, with a penalty on its kernel."""
  normalised, ends = options["normalisation"] == "unit", np.cumsum(source.layout.sizes)[:-1]

  def readout(trainable, features, carry, ctx):
    # Layer by layer, each product scaled rather than its input: the N features of an image are never copied, which is a
    # quarter of a step.
    head, logits = trainable["classifier"], 0
    for tap, kernel in zip(source.layout.names, jnp.split(head["kernel"], ends)):
      x = carry[tap].astype(jnp.float32)                                                 # [B, n]
      logits += x @ kernel / (length(x) if normalised else 1)                            # [B, C]
    return logits + head["bias"]

  def loss(trainable, outputs, ctx):
    coefficient = ctx.vary.get("coefficient", options["coefficient"])
    value = losses.cross_entropy(outputs.logits, ctx.batch)
    value += coefficient * losses.PENALTIES[penalty](trainable["classifier"]["kernel"])
    return value * share_of_batch(options, ctx)

  return Method(
      name=name, options=options, reads=source.reads, writes_from=spec.depth, loss=loss, varies=("coefficient",),
      init=lambda rng, frozen, num_classes: ({"classifier": _glorot(rng, source.layout.total, num_classes)}, {}),
      readout=readout)


def on_selected(spec, name: str, options: dict, source: Reader, kept) -> Method:
  """The second stage: a new head on the features `kept` [K], best first; of several fractions, a head for each.

  All heads have initial values from the same key and no parameter in common: each is what it would be alone.
  """
  several, normalised = isinstance(options.get("fraction"), tuple), options["normalisation"] == "unit"
  counts = _counts(options["fraction"], source.layout.total) if several else {"": len(kept)}

  def init(rng, frozen, num_classes):
    heads = {member: _glorot(rng, count, num_classes) for member, count in counts.items()}
    return {"classifier": heads if several else heads[""]}, {"kept": jnp.array(kept)}

  def finish(trainable, carry, ctx):  # {tap: [B, n]} -> {member: [B, C]}
    indices = ctx.state["kept"]
    x, layers = source.join(carry)[:, indices], source.layout.layer_of(indices)          # [B, K], [K]
    def logits(head, count):  # a fraction is the first of the sorted features, and norms are of those
      best = x[:, :count]
      if normalised:
        best = unit_per_layer(best, layers[:count], len(source.layout.names))
      return classifier.apply(head, best)
    heads = trainable["classifier"] if several else {"": trainable["classifier"]}
    return {member: logits(heads[member], count) for member, count in counts.items()}

  def loss(trainable, outputs, ctx):
    each = outputs.carry.values() if several else (outputs.logits,)
    return sum(losses.cross_entropy(logits, ctx.batch) for logits in each) * share_of_batch(options, ctx)

  def of_member(member):
    return {"fraction": float(member)}

  def choose(trainable, state, logits, labels, weights=None):
    ascending = {member: logits[member] for member in sorted(counts, key=float)}
    best = ensembles.ranked(ascending, labels, weights)[0]
    first = state["kept"][:counts[best]]
    alone = on_selected(spec, name, {**options, **of_member(best)}, source, first)
    return alone, {"classifier": trainable["classifier"][best]}, {"kept": first}

  method = Method(name=name, options=options, init=init, finish=finish, loss=loss, reads=source.reads,
                  writes_from=spec.depth, varies=("coefficient",),
                  readout=lambda trainable, features, carry, ctx: sum(carry.values()) / len(carry))
  if not several:
    return method
  return method._replace(members=lambda outputs: outputs.carry, choose=choose, member_options=of_member)


def two_stages(spec, name: str, options: dict, *, rank=lambda scores, layout: scores, second=on_selected) -> Method:
  """A head on all features with a group lasso, then `second` on the best of them.

  Args:
    rank: (scores [N], layout) -> [N], what the largest are taken of.
    second: (spec, name, options, reader, kept [K]) -> Method.
  """
  _check(spec, options)
  source = reader(spec, options["sites"], options["target_size"], options["cls"])
  counts, total = _counts(options["fraction"], source.layout.total).values(), source.layout.total
  if min(counts) == total:  # nothing to select
    return second(spec, name, options, source, jnp.arange(total))

  def then(trainable, state):
    kept = select(rank(score(trainable["classifier"]["kernel"]), source.layout), max(counts))
    return second(spec, name, options, source, kept)

  return _on_all(spec, name, options, source, "l21")._replace(then=then)


def all_features(spec, *, penalty: str = "l21", coefficient: float = 1e-4, sites: str | tuple = "paper",
                 target_size: int = 512, cls: str = "normal", normalisation: str = "unit",
                 compat: str | None = None) -> Method:
  """One linear head on all activations: "+All" with a penalty, the baselines of Head2Toe, and its first stage.

  Args:
    spec: the backbone's spec.
    penalty: on the kernel, never the bias: "none", "l1", "l2" or "l21", a group lasso of each feature's weights.
    coefficient: of the penalty; the paper's grid for Head2Toe is 1e-4 and 1e-5.
    sites: "paper" for its taps, see `head2toe_reader`, or names of sites; "patch" has the class token put in front.
      `sites="pooled", penalty="none"` is the paper's Linear.
    target_size: T, to which activations are pooled; 512, 8192 or 24576 in the paper for ResNet-50.
    cls: how tokens with a class token are pooled: "normal", "only_cls" or "nopool_cls", see `pool`.
    normalisation: "unit" scales each layer's vector to length 1, as in the paper; "none".
    compat: None, or "paper" for the code's loss.

  Trainable: {"classifier": {"kernel": [N, C] Glorot-uniform, "bias": [C] zeros}}. Reads only; does not merge.

  Differences from the code, and what undoes them where something does:
    * Its loss is (sum of cross-entropies + b * penalty) / B with B the nominal batch size and b the examples in the
      batch, so a short last batch counts less; here the cross-entropy is a mean over the b examples and the penalty
      counts once. compat="paper" does as the code (whole batches only: a micro-batch would count as a batch), and
      Recipe's drop_last=False keeps the short batch.
    * It keeps the order of the first epoch for all others; here every epoch is shuffled, as for all methods.
      Recipe's reshuffle=False. (Head2Toe's second stage has an order of its own there, here that of the first.)
    * It resizes images as TF1 did, bilinear without antialiasing or half-pixel centres; here preprocessing belongs to
      the weights. preprocessing="interpolation=bilinear_tf1".
    * It trains with Keras' Adam and no decay. Recipe's optim name="adam_keras", eps=1e-7, weight_decay=0.0,
      schedule="cosine".
    * It reports the last step. Recipe's select="last".
    * It reports the mean over batches of correct / 50, too low where 50 does not divide the test set; here accuracy
      is correct / examples.
    * Its "per_feature" normalisation takes the statistics of whatever batch it holds and is left out; "layer groups"
      forget their coefficient and are left out.
    * The order of its features differs from process to process; here it is that of `taps`, scores of equal value going
      to the earlier.
  """
  options = {"penalty": penalty, "coefficient": coefficient, "sites": sites, "target_size": target_size, "cls": cls,
             "normalisation": normalisation, "compat": compat}
  _check(spec, options)
  return _on_all(spec, "all_features", options, reader(spec, sites, target_size, cls), penalty)


def head2toe(spec, *, fraction: float | tuple = 0.01, coefficient: float = 1e-4, sites: str | tuple = "paper",
             target_size: int = 512, cls: str = "normal", normalisation: str = "unit",
             compat: str | None = None) -> Method:
  """Head2Toe, two stages: all features with a group lasso, then a new head on the best of them, without a penalty.

  Args:
    fraction: share of all N features that stay, int(fraction * N) of all layers together; the paper chooses it per task
      by cross-validation, 0.001 to 0.2; 1.0 keeps all and needs no first stage. Several, (0.001, 0.01, 0.1), are
      trained side by side in the second stage, a head for each on its share of the best features, and the one with the
      best validation accuracy stays (of equals, the lower loss, then the smaller fraction); until then, and for good
      where there is no validation split, the logits are the mean of theirs. A recipe's select="best" goes by that mean;
      the paper takes the last step.
    spec, coefficient, sites, target_size, cls, normalisation, compat: as of `all_features`; so are the differences from
      the code. Norms of the second stage are of the kept features only.

  Trainable of the second stage: {"classifier": {"kernel": [K, C], "bias": [C]}}, of several fractions {"classifier":
  {"0.01": {"kernel": [K, C], ...}, ...}}, each head being what it would be alone (clipping by the global norm would
  couple them). State: {"kept": [K] int32} of the largest fraction, indices among all features, best first;
  `layout_of(spec, ...).split(kept)` tells them by layer. Both stages train with one recipe, each from the start of its
  schedule, as in the code. Does not merge.

  Head2Toe-FT+ of the slides is no model but a choice: "has option to be tuned", which we take for cross-validation
  between `head2toe` and `head2toe_ft` per task. Their options are the same, so a sweep over `method` makes it.
  """
  return two_stages(spec, "head2toe", {
      "fraction": fraction, "coefficient": coefficient, "sites": sites, "target_size": target_size, "cls": cls,
      "normalisation": normalisation, "compat": compat})


def layout_of(spec, *, sites: str | tuple = "paper", target_size: int = 512, cls: str = "normal") -> Layout:
  """The layers that these options read, and the number of features of each."""
  return reader(spec, sites, target_size, cls).layout
