"""Head2Toe: a linear head on the few most useful of all intermediate activations (Evci et al. 2022, arXiv 2201.03529;
google-research/head2toe @ 6277f63, called "the code" here). `all_features` is its first half and its baseline.

Activations of many sites are pooled to about `target_size` numbers, normalised per layer and laid side by side. A head
on all of them trains with a group lasso; the features whose weights are largest stay, and a new head trains on those.

Which activations of a ViT the paper taps is known by name and number only. Our reading of the names, per block:
pre_attn is the first norm's output, attn the attention branch, mlp_1 the MLP's hidden layer before its GELU, mlp_2 the
MLP's output. cls_embedded is the class token after the final norm, which on most ViTs pre_logits is too: it stays,
since with it the numbers of features are the code's (ViT-B/16: 68352, 374784, 1254912 at T = 512, 8192, 24576).
"""
import functools

import jax
import jax.numpy as jnp

from transferlab import losses
from transferlab.backbones import abstract_params, sites as shapes_of
from transferlab.method import Method, Read
from transferlab.methods import classifier
from transferlab.methods.head2toe_features import (CLS_MODES, Layout, count_of, pool, score, select, unit,
                                                   unit_per_layer)
from transferlab.methods.head2toe_resnet import resnet_taps
from transferlab.tree import nearest


def _taps(spec, sites: str | tuple, shapes: dict) -> dict[str, Read]:
  """{name: Read} of the activations to read, in the order of their features; "paper" gives the code's names."""
  if sites != "paper":
    found = {site: Read(site) for site in ((sites,) if isinstance(sites, str) else sites)}
  elif spec.family == "resnet":
    found = {name: Read(site) for name, site in resnet_taps(spec).items()}
  else:
    found = {"pre_logits": Read("pooled"), "root_output_with_cls": Read("patch"),
             "position_embedded_input": Read("embed")}
    for i in range(spec.depth):
      for name, place in (("pre_attn", "ln1"), ("attn", "attn"), ("mlp_1", "fc1"), ("mlp_2", "mlp")):
        found[f"encoder_{i}_{name}"] = Read(f"block_{i:02d}/{place}")
    found["encoded_sequence"] = Read("norm")
    if spec.prefix_tokens and shapes["norm"].shape[1] > 1:
      found["cls_embedded"] = Read("norm", "cls")
  for read in found.values():
    if read.site not in shapes:
      raise ValueError(f"site {read.site!r} is not in {spec.name}; nearest: {', '.join(nearest(read.site, shapes))}")
  if not found:
    raise ValueError("sites is empty; expected 'paper' or names of sites")
  return found


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


def _reader(spec, sites: str | tuple, target_size: int, cls: str):
  """(layout, reads) of the pooled activations {tap: [B, n]}."""
  shapes = shapes_of(spec)

  def reduce(read, y, frozen):  # [B, T, D'], [B, W, W, D'] or [B, D'] -> [B, n]
    if read.site == "patch" and spec.prefix_tokens:  # the code taps the patches with the class token in front
      token = jnp.broadcast_to(frozen["cls"], (y.shape[0], 1, y.shape[2])).astype(y.dtype)
      y = jnp.concatenate([token, y], axis=1)
    return pool(y[:, :1], target_size) if read.how == "cls" else pool(y, target_size, cls)

  reads = {tap: Read(read.site, f"{read.how} pooled to {target_size} {cls}", functools.partial(reduce, read))
           for tap, read in _taps(spec, sites, shapes).items()}
  size = lambda read: jax.eval_shape(read.reduce, shapes[read.site], abstract_params(spec)).shape[1]
  return Layout(tuple(reads), tuple(size(read) for read in reads.values())), reads


def _head(spec, name: str, options: dict, reader, *, penalty: str, kept=None) -> Method:
  """A head on all features of a `_reader`, or on the `kept` [K] of them."""
  layout, reads = reader
  normalised, paper = options["normalisation"] == "unit", options["compat"] == "paper"

  def init(rng, frozen, num_classes):
    features = layout.total if kept is None else len(kept)
    kernel = jax.nn.initializers.glorot_uniform()(rng, (features, num_classes))
    state = {} if kept is None else {"kept": jnp.array(kept)}
    return {"classifier": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}, state

  def readout(trainable, features, carry, ctx):
    layers = [carry[tap] for tap in layout.names]
    if kept is None:
      x = jnp.concatenate([unit(x) if normalised else x for x in layers], axis=-1)  # [B, N]
    else:  # norms are of what is kept: gather first
      indices = ctx.state["kept"]
      x = jnp.concatenate(layers, axis=-1)[:, indices]                               # [B, K]
      x = unit_per_layer(x, layout.layer_of(indices), len(layers)) if normalised else x
    return classifier.apply(trainable["classifier"], x)

  def loss(trainable, outputs, ctx):
    coefficient = ctx.vary.get("coefficient", options["coefficient"])
    value = losses.cross_entropy(outputs.logits, ctx.batch)
    value += coefficient * losses.PENALTIES[penalty](trainable["classifier"]["kernel"])
    # The code divides sums over b examples, b times the penalty among them, by the nominal batch size.
    return value * jnp.mean(ctx.batch["weight"] > 0) if paper else value

  return Method(name=name, options=options, init=init, readout=readout, loss=loss, reads=reads, writes_from=spec.depth,
                varies=("coefficient",))


def all_features(spec, *, penalty: str = "l21", coefficient: float = 1e-4, sites: str | tuple = "paper",
                 target_size: int = 512, cls: str = "normal", normalisation: str = "unit",
                 compat: str | None = None) -> Method:
  """One linear head on all activations: "+All" with a penalty, the baselines of Head2Toe, and its first stage.

  Args:
    spec: the backbone's spec.
    penalty: on the kernel, never the bias: "none", "l1", "l2" or "l21", a group lasso of each feature's weights.
    coefficient: of the penalty; the paper's grid for Head2Toe is 1e-4 and 1e-5.
    sites: "paper" for its taps of a ViT (see above), or names of sites; "patch" has the class token put in front.
      `sites="pooled", penalty="none"` is the paper's Linear.
    target_size: T, to which activations are pooled; 512, 8192 or 24576 in the paper for ResNet-50.
    cls: how tokens with a class token are pooled: "normal", "only_cls" or "nopool_cls", see `pool`.
    normalisation: "unit" scales each layer's vector to length 1, as in the paper; "none".
    compat: None, or "paper" for the code's loss.

  Trainable: {"classifier": {"kernel": [N, C] Glorot-uniform, "bias": [C] zeros}}. Reads only; does not merge.

  Differences from the code:
    * Its loss is (sum of cross-entropies + b * penalty) / B with B the nominal batch size and b the examples in the
      batch, so a short last batch counts less; here the cross-entropy is a mean over the b examples and the penalty
      counts once, unless compat="paper" (whole batches only: a micro-batch would count as a batch).
    * It keeps the order of the first epoch for all others; here every epoch is shuffled, as for all methods.
    * It reports the mean over batches of correct / 50, too low where 50 does not divide the test set; here accuracy
      is correct / examples.
    * It resizes images as TF1 did (bilinear without antialiasing or half-pixel centres); here preprocessing belongs
      to the weights.
    * Its "per_feature" normalisation takes the statistics of whatever batch it holds and is left out; "layer groups"
      forget their coefficient and are left out.
    * It trains with Keras' Adam: Recipe's optim name="adam_keras", eps=1e-7, weight_decay=0, schedule="cosine".
  """
  options = {"penalty": penalty, "coefficient": coefficient, "sites": sites, "target_size": target_size, "cls": cls,
             "normalisation": normalisation, "compat": compat}
  _check(spec, options)
  return _head(spec, "all_features", options, _reader(spec, sites, target_size, cls), penalty=penalty)


def head2toe(spec, *, fraction: float = 0.01, coefficient: float = 1e-4, sites: str | tuple = "paper",
             target_size: int = 512, cls: str = "normal", normalisation: str = "unit",
             compat: str | None = None) -> Method:
  """Head2Toe, two stages: all features with a group lasso, then a new head on the best of them, without a penalty.

  Args:
    fraction: share of all N features that stay, int(fraction * N) of all layers together; the paper chooses it per task
      by cross-validation, 0.001 to 0.2.
    spec, coefficient, sites, target_size, cls, normalisation, compat: as of `all_features`; so are the differences from
      the code. Norms of the second stage are of the kept features only.

  Trainable of the second stage: {"classifier": {"kernel": [K, C], "bias": [C]}}. State: {"kept": [K] int32}, indices
  among all features, best first; `layout_of(spec, ...).split(kept)` tells them by layer. Both stages train with one
  recipe, as in the code. Does not merge.
  """
  options = {"fraction": fraction, "coefficient": coefficient, "sites": sites, "target_size": target_size, "cls": cls,
             "normalisation": normalisation, "compat": compat}
  _check(spec, options)
  reader = _reader(spec, sites, target_size, cls)
  total = reader[0].total
  count = count_of(fraction, total)
  if not 1 <= count <= total:
    raise ValueError(f"fraction {fraction} keeps {count} of {total} features; expected 1 to {total}")

  def then(trainable, state):
    kept = select(score(trainable["classifier"]["kernel"]), count)
    return _head(spec, "head2toe", options, reader, penalty="none", kept=kept)

  return _head(spec, "head2toe", options, reader, penalty="l21")._replace(then=then)


def layout_of(spec, *, sites: str | tuple = "paper", target_size: int = 512, cls: str = "normal") -> Layout:
  """The layers that these options read, and the number of features of each."""
  return _reader(spec, sites, target_size, cls)[0]
