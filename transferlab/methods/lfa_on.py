"""LFA on an adapted CLIP, as a second stage (MLAI-Yonsei/LFA): CoOp, CLIP-Adapter, MaPLe or QLoRA trains with its own
recipe, is frozen, and LFA's eight matrices train on what it makes of the layers of both towers.

Texts come from the base's text tower, once per run. Images come from the plain tower (CoOp, CLIP-Adapter; a run may
read them from a cache), or in every step from one with MaPLe's prompts or QLoRA's updates, into which no gradient goes.
CLIP-Adapter acts on the mixture of an image's layers before it is normalised; the query stays as it is.

A frozen base has no dropout. The released QLoRA goes on drawing LoRA's for images, and computes texts once under a
single draw of it, in its first step.
"""
import jax

from transferlab import backbones, methods, prompts
from transferlab.backbones import Towers
from transferlab.config import typed
from transferlab.method import Context, Method, visitor
from transferlab.methods import clip_text as ct
from transferlab.methods.clip_adapter import blend
from transferlab.tree import nearest

# How each base trains: the few-shot table of the released configurations, for QLoRA their domain generalisation. Decay
# is Dassl's default and meets every parameter.
_COOP = {"name": "sgd", "weight_decay": 5e-4, "decay": (), "schedule": "coop", "warmup": "1 epochs"}
RECIPES = {
    "coop": {"duration": "200 epochs", "batch_size": 32, "optim": {**_COOP, "lr": 0.002, "momentum": 0.9}},
    "clip_adapter": {"duration": "40 epochs", "batch_size": 4, "optim": {**_COOP, "lr": 0.0035, "momentum": 0.1}},
    "maple": {"duration": "5 epochs", "batch_size": 4, "optim": {**_COOP, "lr": 0.0035, "momentum": 0.9}},
    "qlora": {"duration": "5001 steps", "batch_size": 32, "optim": {
        "name": "sgd", "weight_decay": 0.0, "decay": (), "schedule": "constant", "warmup": "0 steps", "lr": 0.001,
        "momentum": 0.1}}}
CHANGES = {"duration": str, "batch_size": int, "name": str, "lr": float, "momentum": float, "weight_decay": float,
           "schedule": str, "warmup": str, "clip": float}


def base_of(spec, base: str, options: tuple, changes: tuple, templates: tuple) -> Method | None:
  """The first stage's method, None for "none"; with LFA's templates, if it takes some."""
  if base == "none":
    if given := options + changes:
      raise ValueError(f"base is 'none' and base_options or base_recipe give {given[0]!r}; name the base: "
                       f"{', '.join(RECIPES)}")
    return None
  if base not in RECIPES:
    raise ValueError(f"base {base!r} is unknown; nearest: {', '.join(nearest(base, RECIPES))}; expected 'none' or one "
                     f"of {', '.join(RECIPES)}")
  options = _pairs("base_options", options, "tokens", 4)
  if "templates" in methods.options_of(base):
    if prompts.templates(options.setdefault("templates", templates)) != templates:
      raise ValueError(f"base_options give templates {options['templates']!r}; leave them out, {base} and LFA share "
                       "the option 'templates'")
  elif len(templates) > 1:
    raise ValueError(f"there are {len(templates)} templates and {base} brings a prompt of its own; give one")
  try:
    return methods.build(base, spec, **options)
  except ValueError as error:
    raise ValueError(f"base {base!r}: {error}; options of the base go into base_options, (('tokens', 4),)") from None


def texts(spec, base: Method | None, frozen: dict, state: dict, make_visit) -> tuple[dict, dict]:
  """Runs the class prompts through the text tower of the frozen base, or through the plain one; once per run.

  Args:
    make_visit: as of `clip_text.encode`.

  Returns:
    (what its visitor collects, the frozen parameters that images need).
  """
  if base is None or not base.texts:
    return ct.encode(spec, frozen, state[ct.SLOT], make_visit)[1], ct.without_text(frozen)
  backbone, prepared = backbones.build(spec), base.prepare(frozen, state)

  def run(prepared, state):
    ctx = Context(state=state, frozen=prepared)
    ids = base.texts(ctx)
    own, carry = visitor(base, state["base"], ctx)
    visit = _beside(own, make_visit(prepared, ids))
    return backbone.apply(base.weights(None, prepared), Towers(None, ids), visit, (carry, {}))[1][1]

  found = jax.jit(run)(prepared, state)
  kept = ct.without_text(prepared if base.writes_from < spec.depth else frozen)
  kept = {name: {site: leaf for site, leaf in each.items() if not site.startswith("text/")}
          if isinstance(each, dict) else each for name, each in kept.items() if name != ct.SLOT}
  return found, kept


def adapt(base: Method | None, ctx: Context):
  """What is between LFA's mixture of an image's layers [B, d] and its normalisation; None for nothing."""
  if base is None or base.name != "clip_adapter":
    return None
  return lambda z: blend(ctx.state["base"]["adapter"], z, base.options["ratio"])


def stages(spec, base: Method, head: Method, changes: tuple) -> Method:
  """The base and then `head`, an LFA that uses `texts` and `adapt`, both under LFA's name and options.

  Args:
    changes: of the base's recipe, (("duration", "50 epochs"), ("lr", 1e-3)).

  The second stage's state is the base's, with what it trained under "base", so that an adapter file holds both.
  """
  def after(trained, state) -> Method:
    second = _in_image_tower(base, head) if base.writes_from < spec.depth else head
    def init(rng, frozen, classes):
      trainable, _ = head.init(rng, frozen, classes)
      return trainable, {**state, "base": trained}
    return second._replace(init=init, prompts=base.prompts)

  return base._replace(name=head.name, options=head.options, recipe=_recipe(base.name, changes), then=after)


def _in_image_tower(base: Method, head: Method) -> Method:
  """`head` on images that run through a tower that the frozen base writes into. Nothing that trains does, and what is
  read hands no gradient back."""
  def visit(trainable, ctx):
    # Not ctx itself: a frozen base has no dropout.
    own, _ = visitor(base, ctx.state["base"], Context(state=ctx.state, frozen=ctx.frozen))
    return _beside(own, visitor(head, trainable, ctx)[0])

  return head._replace(
      weights=lambda trainable, frozen: base.weights(None, frozen), visit=visit,
      carry=(base.carry, {}), reads={}, finish=lambda trainable, carry, ctx: head.finish(trainable, carry[1], ctx))


def _beside(first, second):
  """Two visitors with carries of their own; the second sees what the first returned, and changes nothing."""
  def visit(carry, site, y, x):
    a, b = carry
    a, y = first(a, site, y, x)
    b, _ = second(b, site, y, x)
    return (a, b), y
  return visit


def _recipe(base: str, changes: tuple) -> dict:
  """The recipe of the first stage."""
  given = _pairs("base_recipe", changes, "duration", "50 epochs")
  for name, value in given.items():
    if name not in CHANGES:
      raise ValueError(f"base_recipe has no {name!r}; nearest: {', '.join(nearest(name, CHANGES))}; all: "
                       f"{', '.join(CHANGES)}")
    given[name] = typed(f"base_recipe's {name}", value, CHANGES[name])
  own = {name: given.pop(name) for name in ("duration", "batch_size") if name in given}
  return {**RECIPES[base], **own, "optim": {**RECIPES[base]["optim"], **given}}


def _pairs(name: str, given: tuple, *example) -> dict:
  """A dict of (("tokens", 4), …)."""
  if not all(isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) for each in given):
    raise ValueError(f"{name} are {given!r}; expected pairs of a name and a value, such as {((*example,),)}")
  return dict(given)
