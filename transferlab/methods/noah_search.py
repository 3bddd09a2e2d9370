"""NOAH's search for a network: a supernet, an evolutionary search among its sub-networks on validation, and the network
found, trained anew (Zhang et al. 2022, arXiv 2206.04673; ZhangYuanhan-AI/NOAH @ e9c55f3, called "the code" here)."""
import jax
import jax.numpy as jnp
import numpy as np

from transferlab.method import Method
from transferlab.methods import classifier
from transferlab.methods.noah import KINDS, check, count, noah, start, visitor
from transferlab.methods.noah_evolution import Plan, Space, evolve


def noah_search(spec, *, choices: tuple = (5, 10, 50, 100), depths: tuple = (), limit: int = 640_000,
                dropout: float = 0.1, compat: str | None = None, supernet_duration: str = "500 epochs",
                supernet_lr: float = 5e-4, generations: int = 15, population: int = 50, top: int = 10,
                mutations: int = 25, crossovers: int = 25, p_mutate: float = 0.2, p_depth: float = 0.4) -> Method:
  """Three steps in two stages: the supernet is trained and searched, then `noah` trains what was found, from the start.

  Args:
    spec: the backbone's spec, a ViT.
    choices: sizes that prompts, LoRA and adapter may have in a block.
    depths: the first so many blocks have a module, each kind for itself; () for quarters of the depth, 3, 6, 9 and 12
      of 12 blocks.
    limit: most trainable parameters of a network without the classifier, 0 for any number. The default is the code's;
      what the authors gave for each task is not known.
    dropout, compat: as of `noah`.
    supernet_duration, supernet_lr: of the supernet alone, "" and 0 for the recipe's own. The recipe is that of the
      network found: "100 epochs" and 1e-3 in the paper.
    generations, population: rounds of the search, and new networks in each.
    top, mutations, crossovers: of the best `top` so far come so many of these; the rest is random.
    p_mutate, p_depth: see `noah_evolution.mutate`.

  Every step trains one random network within the supernet (with micro-batches, one for each of them). It is drawn from
  the step's key and computed at the supernet's size under masks: one program for all of them, that has the cost of the
  largest. Evaluations during training are of the largest network. The search is on the split "val"; what it finds is
  fixed by the recipe's seed, so a resumed run finds it again.

  What is saved is a `noah` with its sizes. The paper trains it on all 1,000 images of a VTAB task, of which 200 were
  val: give the sizes that the search prints to method=noah on the task with phase=final.

  Trainable of the supernet: as of `noah` with compat, at the largest sizes. State: {"sizes": {kind: [L] int32}, the
  largest until the search is over; "seed": int32 of the search}. Does not merge, as `noah`.
  """
  L, depths = spec.depth, depths or tuple(sorted({spec.depth * k // 4 for k in (1, 2, 3, 4)} - {0}))
  plan = Plan(generations, population, top, mutations, crossovers, p_mutate, p_depth)
  _check(L, choices, depths, limit, plan)
  largest = check(spec, {kind: tuple(max(choices) * (i < max(depths)) for i in range(L)) for kind in KINDS}, compat)
  named = lambda network: dict(zip(KINDS, network))
  space = Space(L, choices, depths, len(KINDS), lambda network: not limit or count(spec, named(network)) <= limit)

  def init(rng, frozen, num_classes):
    rng, of_seed = jax.random.split(rng)
    state = {"sizes": {kind: jnp.asarray(each, jnp.int32) for kind, each in largest.items()},
             "seed": jax.random.randint(of_seed, (), 0, np.iinfo(np.int32).max)}
    return start(spec, rng, largest, num_classes, compat), state

  def visit(trainable, ctx):
    sizes = ctx.vary or ctx.state["sizes"]
    if ctx.train and not ctx.vary:
      sizes = random_sizes(jax.random.fold_in(ctx.rng, 1), L, choices, depths)
    return visitor(spec, trainable, ctx, dropout, sizes)

  def search(trainable, state, score):
    scored = lambda networks: score([{kind: np.array(each, np.int32) for kind, each in named(network).items()}
                                     for network in networks])
    found, _ = evolve(scored, space, plan, int(state["seed"]))
    return {**state, "sizes": {kind: jnp.asarray(each, jnp.int32) for kind, each in named(found).items()}}

  def then(trainable, state):
    sizes = {kind: tuple(np.asarray(state["sizes"][kind]).tolist()) for kind in KINDS}
    return noah(spec, **sizes, dropout=dropout, compat=compat)

  recipe = {**({"duration": supernet_duration} if supernet_duration else {}),
            **({"optim": {"lr": supernet_lr}} if supernet_lr else {})}
  options = {"choices": choices, "depths": depths, "limit": limit, "dropout": dropout, "compat": compat,
             "supernet_duration": supernet_duration, "supernet_lr": supernet_lr, **plan._asdict()}
  return Method(name="noah_search", options=options, init=init, visit=visit, readout=classifier.readout, writes_from=0,
                recipe=recipe, search=search, then=then)


def random_sizes(rng, blocks: int, choices: tuple, depths: tuple) -> dict:
  """{kind: [L] int32} of a random network; `noah_evolution.draw` as a part of a program."""
  def one(rng):
    of_depth, of_sizes = jax.random.split(rng)
    sizes = jax.random.choice(of_sizes, jnp.asarray(choices), (blocks,))
    return jnp.where(jnp.arange(blocks) < jax.random.choice(of_depth, jnp.asarray(depths)), sizes, 0)
  return {kind: one(rng) for kind, rng in zip(KINDS, jax.random.split(rng, len(KINDS)))}


def _check(L: int, choices, depths, limit: int, plan: Plan) -> None:
  whole = lambda n: isinstance(n, int) and not isinstance(n, bool)
  if not choices or not all(whole(n) and n > 0 for n in choices):
    raise ValueError(f"choices is {choices}; expected whole numbers above 0, such as (5, 10, 50, 100)")
  if not all(whole(n) and 1 <= n <= L for n in depths):
    raise ValueError(f"depths is {depths}; expected numbers of blocks from 1 to {L}, or () for quarters of them")
  least = {"limit": 0, "generations": 1, "population": 1, "top": 1, "mutations": 0, "crossovers": 0}
  for name, value in {"limit": limit, **plan._asdict()}.items():
    if name in least and value < least[name]:
      raise ValueError(f"{name} is {value}; expected {least[name]} or more")
    if name not in least and not 0 <= value <= 1:
      raise ValueError(f"{name} is {value}; expected a probability, 0 to 1")
