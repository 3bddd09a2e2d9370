"""A method is a few pure functions around a frozen backbone, and calling one is `forward`.

    frozen' = weights(trainable, frozen)
    features, carry = backbone(frozen', images, visit(trainable, ctx), carry)
    logits = readout(trainable, features, carry, ctx)

On a CLIP the class names are inputs, too: `prompts` turns them into texts, whose tokens `init` receives, and `prepare`
may compute their features once for a whole run.

Only `trainable` is ever differentiated. A method made of several stages names in `then` the method that follows it.
"""
from typing import Any, NamedTuple
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import losses
from transferlab.backbones import Backbone, Towers


SETTLED = "text_features"  # among frozen parameters: what `settled` computed


class Read(NamedTuple):
  """One activation a method reads: a site, and how it is reduced before anything trainable sees it.

  Fields:
    site: its name.
    how: the reduction in a word or two, "tokens" for none; with the site it names the result in a cache.
    reduce: (y [B, …], frozen) -> [B, …], the reduction.
  """
  site: str
  how: str = "tokens"
  reduce: Callable = lambda y, frozen: y


class Context(NamedTuple):
  """What a method's functions may use beside its trainable.

  Fields:
    batch: label [B] int32, target [B, C] (one-hot, smoothed or mixed), weight [B] (0 marks padding), domain [B] if any;
      when predicting weight at most.
    state: arrays the method needs and does not train.
    frozen: the backbone's parameters, as `Method.prepare` gives them.
    reference: sites of a second, frozen pass, if the method asks for one.
    rng: key for dropout and the like, None unless training.
    train: whether this is a training step.
    vary: values of those options, see `Method.varies`, that parallel heads do not share.
    domains: number of domains that are trained on, 1 without domains; None where it is not known.
    rows: of the batch before devices filled it up; None where it is not known.
  """
  batch: dict = {}
  state: dict = {}
  frozen: dict = {}
  reference: dict = {}
  rng: Any = None
  train: bool = False
  vary: dict = {}
  domains: int | None = None
  rows: float | None = None


class Outputs(NamedTuple):
  """Of one forward pass."""
  logits: Any    # [B, C] float32
  features: Any  # [B, D], None from a cache
  carry: Any     # the visitor's last carry, after `Method.finish`


class Prompts(NamedTuple):
  """Texts that a method on a CLIP wants of class names.

  Fields:
    strings: (class names) -> {slot: texts}; their numbers depend on the number of classes alone.
    context: tokens of a text, T.
  """
  strings: Callable
  context: int


class Method(NamedTuple):
  """An adaptation method for one backbone.

  Fields:
    name: its registered name.
    options: its options as plain data; with the name they rebuild it.
    init: (rng, frozen, num_classes) -> trainable, state; of a method with `prompts` (rng, frozen, {slot: ids [n, T]}).
    prompts: the texts it wants, None if it knows classes by their number. Ids that it needs later belong to its state.
    prepare: (frozen, state) -> frozen', what of the frozen parameters a run or a loaded adapter keeps. It is called
      once, on arrays, and may compute what is the same for all images, as features of the class prompts are.
    texts: (ctx) -> ids [P, T] that the text tower runs over in every step; None if it does not run.
    fixed_texts: whether what it makes of them depends on no image, so that a trained method keeps it, see `settled`.
    weights: (trainable, frozen) -> frozen', parameters rewritten before the call.
    visit: (trainable, ctx) -> visitor of the forward pass; None for a method that only collects what it `reads`, whose
      carry then is {slot: reduced activation}.
    carry: the visitor's first carry.
    finish: (trainable, carry, ctx) -> carry, what becomes of the visitor's last carry, or of cached activations, before
      anything else sees it.
    readout: (trainable, features [B, D], carry, ctx) -> logits [B, C] float32.
    loss: (trainable, outputs, ctx) -> scalar.
    reads: {slot: Read}, in the order of the forward pass, what a run from cached activations needs. A method with a
      visitor of its own reads unreduced sites; one that writes, all that its visitor uses below block `writes_from`,
      and as the last one what leaves the block before that one, where its run from a cache goes on.
    reference: sites of a second, frozen pass that ctx shall hold.
    writes_from: index of the first block whose computation depends on trainable, of a CLIP's image tower; the depth if
      none does.
    merge: (trainable, frozen) -> frozen', the same classifier on a plain backbone; None where mathematics forbids it.
    frozen: False if the method never looks at the frozen parameters after init, so that no second copy is kept.
    recipe: what the recipe is to be for this stage alone, {"duration": "500 epochs", "optim": {"lr": 5e-4}}; see
      `recipe.changed`. Heads trained side by side share one recipe and know none of a stage's own.
    whole_batch: True if an example's result depends on the others of its batch; such a batch is never cut into
      micro-batches.
    search: (trainable, state, score) -> state, called when this stage is trained and before `then`. score([vary, …]) ->
      [accuracy on the validation split] with ctx.vary set to each of these, {name: array} of equal shapes; they are
      evaluated side by side. Its randomness comes from `state`, so that a resumed run searches as before.
    then: (trainable, state) -> the Method of the next stage, or None.
    varies: options, numbers, that `loss` and `readout` take from ctx.vary where they are there: parallel heads may
      differ in them and still share one program.
    members: (outputs) -> {member: logits [B, C]} of the classifiers that the method trains side by side, None for one.
    choose: (trainable, state, {member: logits [N, C]}, labels [N], weights [N] of examples or None) -> (Method,
      trainable, state), made after training from the members' logits on the validation split; None if nothing is left
      to choose.
    member_options: (member) -> the options that train this member alone; None where there are no members.
  """
  name: str
  options: dict
  init: Callable
  readout: Callable
  writes_from: int
  prompts: Prompts | None = None
  prepare: Callable = lambda frozen, state: frozen
  texts: Callable | None = None
  fixed_texts: bool = False
  weights: Callable = lambda trainable, frozen: frozen
  visit: Callable | None = None
  carry: Any = ()
  finish: Callable = lambda trainable, carry, ctx: carry
  loss: Callable = lambda trainable, outputs, ctx: losses.cross_entropy(outputs.logits, ctx.batch)
  reads: dict = {}
  reference: tuple = ()
  merge: Callable | None = None
  frozen: bool = True
  recipe: dict = {}
  whole_batch: bool = False
  search: Callable | None = None
  then: Callable | None = None
  varies: tuple = ()
  members: Callable | None = None
  choose: Callable | None = None
  member_options: Callable | None = None


def record(*names: str):
  """A visitor that collects sites into its carry, a dict; all of them when no names are given. Start with `carry={}`.

  Recorded activations do not hand gradients back: what reads them cannot train what made them.
  """
  def visit(carry, site, y, x):
    del x
    if y is not None and (not names or site in names):
      carry = {**carry, site: jax.lax.stop_gradient(y)}
    return carry, y
  return visit


def collect(reads: dict, frozen, stop: bool = True):
  """A visitor whose carry becomes {slot: reduced activation}. Start with `carry={}`.

  Args:
    reads: {slot: Read}.
    frozen: what reductions may look at.
    stop: whether activations leave with `stop_gradient`; only a method that trains the backbone itself wants False.
  """
  def visit(carry, site, y, x):
    del x
    if y is not None:
      found = {slot: read.reduce(y, frozen) for slot, read in reads.items() if read.site == site}
      carry = {**carry, **(jax.lax.stop_gradient(found) if stop else found)}
    return carry, y
  return visit


def visitor(method: Method, trainable, ctx: Context):
  """(visitor, first carry) of a method's forward pass."""
  if method.visit is None:
    return collect(method.reads, ctx.frozen), {}
  return method.visit(trainable, ctx), method.carry


def replay(visit, carry, activations: dict):
  """Visits cached sites {site: y} in order; returns the carry and what the visitor made of the last one, which enters
  the backbone at `start`."""
  y = None
  for site, value in activations.items():
    carry, y = visit(carry, site, value, None)
  return carry, y


def drop_path(rng, rate: float, depth: int):
  """Stochastic depth (Huang et al. 2016) as a visitor.

  Each branch of a sample is dropped with a rate that grows linearly from 0 at the first block to `rate` at the last;
  kept branches are scaled by 1 / keep. Attention and MLP draw apart; a ResNet's block has one branch, and of a CLIP
  only the image tower drops some.
  """
  def visit(carry, site, y, x):
    del x
    block, _, place = site.removeprefix("image/").partition("/")
    if place not in ("attn", "mlp", "branch"):
      return carry, y
    index = int(block.rsplit("_", 1)[1])
    keep = 1 - rate * index / max(depth - 1, 1)
    if keep == 1:
      return carry, y
    key = jax.random.fold_in(rng, 2 * index + (place == "mlp"))
    kept = jax.random.bernoulli(key, keep, (y.shape[0],) + (1,) * (y.ndim - 1))
    return carry, jnp.where(kept, y / jnp.asarray(keep, y.dtype), jnp.zeros((), y.dtype))
  return visit


def chain(*visitors):
  """Visitors one after the other at every site, each seeing what the one before returned; they share one carry."""
  def visit(carry, site, y, x):
    for visitor in visitors:
      carry, y = visitor(carry, site, y, x)
    return carry, y
  return visit


def forward(method: Method, backbone: Backbone | None, trainable, inputs, ctx: Context, *, drop_path_rate: float = 0.0,
            remat: bool = False) -> Outputs:
  """One forward pass of an adapted backbone.

  Args:
    inputs: normalised images [B, S, S, 3]; or cached activations {slot: [B, …]} of what the method reads, from which
      one that only reads needs no backbone, and one that writes enters it at block `writes_from`.
    drop_path_rate: stochastic depth of the last block; acts in training only, and only in blocks that are computed.
    remat: recompute the adapted blocks in the backward pass instead of keeping their activations.
  """
  cached, start, features = isinstance(inputs, dict), 0, None
  if method.reference and not cached:
    _, seen = backbone.apply(ctx.frozen, inputs, record(*method.reference), {})
    ctx = ctx._replace(reference=seen)
  visit, carry = visitor(method, trainable, ctx)
  known = ctx.frozen.get(SETTLED) if method.texts else None
  texts = method.texts(ctx) if method.texts and known is None else None
  writes = backbone is not None and method.writes_from < backbone.spec.depth
  goes_on = not cached or writes or texts is not None
  if cached:
    start = method.writes_from
    carry, inputs = _replayed(method, visit, carry, inputs, backbone.dtype if goes_on else jnp.float32)
  if texts is not None:
    inputs, start = (Towers(inputs, texts), start) if not cached or writes else (Towers(None, texts), 0)
  if goes_on:
    if ctx.train and drop_path_rate:
      visit = chain(drop_path(jax.random.fold_in(ctx.rng, 0), drop_path_rate, backbone.spec.depth), visit)
    features, carry = backbone.apply(method.weights(trainable, ctx.frozen), inputs, visit, carry, start=start,
                                     remat_from=method.writes_from if remat else None)
  if known is not None:
    features = Towers(features and features.image, known)
  carry = method.finish(trainable, carry, ctx)
  return Outputs(method.readout(trainable, features, carry, ctx), features, carry)


def settled(method: Method, backbone: Backbone, trainable, state, frozen: dict) -> dict:
  """What a trained method needs of the frozen parameters (as `Method.prepare` gives them) to predict: where it runs the
  text tower in every step and to the same end, its features [P, d] instead of the tower."""
  if not method.fixed_texts:
    return frozen

  def run(trainable, state, frozen):
    ctx = Context(state=state, frozen=frozen)
    visit, carry = visitor(method, trainable, ctx)
    return backbone.apply(method.weights(trainable, frozen), Towers(None, method.texts(ctx)), visit, carry)[0].text

  kept = {name: leaf for name, leaf in frozen.items() if name not in ("text", "text_projection")}
  return {**kept, SETTLED: jax.jit(run)(trainable, state, frozen)}


def _replayed(method: Method, visit, carry, activations: dict, dtype):
  """(carry, what enters the backbone) after the part of a forward pass that is cached."""
  kept = {slot: activations[slot].astype(dtype) for slot in method.reads}  # stored in another type, perhaps
  if method.visit is None:
    return kept, next(reversed(kept.values()), None)
  return replay(visit, carry, {read.site: kept[slot] for slot, read in method.reads.items()})


def needed(method: Method, params: dict, depth: int, cached: bool = False) -> dict:
  """Those of a backbone's parameters, as `Method.prepare` gives them, that a run looks at.

  Args:
    depth: L.
    cached: the run is from cached activations, so that blocks below `writes_from` are not computed, and nothing of the
      backbone is by a method that only reads; of a CLIP nothing of the image tower.
  """
  if not method.frozen:
    return {}
  if cached and method.writes_from == depth:
    return {name: leaf for name, leaf in params.items() if name != "image"} if method.prompts else {}
  below = {f"block_{i:02d}" for i in range(method.writes_from)} if cached else ()
  return {name: leaf for name, leaf in params.items() if name not in below}


def predict(method: Method, backbone: Backbone | None, trainable, state, frozen, inputs, weight=None):
  """Logits [B, C] float32 of normalised images [B, S, S, 3], or of cached activations {slot: [B, …]}.

  Args:
    weight: [B], 0 marks padding; for the few methods whose predictions depend on the rest of the batch.
  """
  batch = {} if weight is None else {"weight": weight}
  return forward(method, backbone, trainable, inputs, Context(batch, state, frozen)).logits


def classes(method: Method, names: Sequence[str] | int, tokenize: Callable | None = None):
  """What `init` is to know of the classes: their number, or {slot: ids [n, T] int32} of a method with `prompts`.

  Args:
    names: of the classes, or their number C.
    tokenize: texts -> ids [n, T]. Of a mere number of classes only shapes matter, and all ids may be 0.

  Raises:
    ValueError: texts are wanted, of names, and there is no tokenizer.
  """
  if method.prompts is None:
    return names if isinstance(names, int) else len(names)
  if tokenize is None and not isinstance(names, int):
    raise ValueError(f"{method.name} reads class names as texts, and there is no tokenizer; load the weights with one")
  names = [f"class {i}" for i in range(names)] if isinstance(names, int) else names
  encode = tokenize or (lambda texts: np.zeros((len(texts), method.prompts.context), np.int32))
  return {slot: encode(texts) for slot, texts in method.prompts.strings(names).items()}


def stages(method: Method, train: Callable) -> list:
  """Runs a method's stages in order: `train(method)` returns (trainable, state), from which the next stage is made.

  Returns:
    [(method, trainable, state)], one entry per stage; the last one is the result.
  """
  results = []
  while method is not None:
    trainable, state = train(method)
    results.append((method, trainable, state))
    method = method.then(trainable, state) if method.then else None
  return results


class Sizes(NamedTuple):
  """Numbers of parameters."""
  trainable: int
  trainable_without_classifier: int
  state: int
  frozen: int


def sizes(method: Method, frozen, num_classes: int) -> Sizes:
  """Numbers of parameters, from shapes alone; `frozen` may hold arrays or shapes."""
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  init = lambda rng, params: method.init(rng, params, classes(method, num_classes))
  trainable, state = jax.eval_shape(init, jax.random.key(0), frozen)
  return Sizes(count(trainable), count({k: v for k, v in trainable.items() if k != "classifier"}), count(state),
               count(frozen))
