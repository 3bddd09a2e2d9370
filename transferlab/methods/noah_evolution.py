"""NOAH's evolutionary search, as a pure function of what scores networks (Zhang et al. 2022, arXiv 2206.04673;
evolution.py of ZhangYuanhan-AI/NOAH, called "the code" here).

A network is a tuple with a tuple of sizes for every kind of module, ((prompts of all blocks), (lora), (adapter)).
Sizes are above 0 in the first blocks, up to a depth that each kind has for itself, and 0 behind.
"""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Space(NamedTuple):
  """What networks there are.

  Fields:
    blocks: L.
    choices: sizes above 0 that a module may have.
    depths: numbers of blocks that may have a module of one kind.
    kinds: how many kinds of modules there are.
    allowed: network -> whether it is small enough.
  """
  blocks: int
  choices: Sequence[int]
  depths: Sequence[int]
  kinds: int
  allowed: Callable[[tuple], bool]


class Plan(NamedTuple):
  """How long to search, see `noah_search`."""
  generations: int = 15
  population: int = 50
  top: int = 10
  mutations: int = 25
  crossovers: int = 25
  p_mutate: float = 0.2
  p_depth: float = 0.4


_TRIES = 1000  # random draws for each network wanted: a tight limit leaves few


def evolve(score: Callable[[list], Sequence[float]], space: Space, plan: Plan, seed: int) -> tuple[tuple, float]:
  """The best network found, with its score; of equals the one found first.

  Args:
    score: networks -> a score of each; called once a generation, with networks it has not seen.

  A generation holds mutations and crossovers of the best networks so far, and random ones to fill it up. A space that
  has been seen whole ends the search.

  Raises:
    ValueError: no network of the space is allowed.
  """
  rng, seen, best = np.random.default_rng(seed), set(), []

  def fresh(make: Callable[[], tuple], wanted: int, tries: int) -> list[tuple]:
    found = []
    for _ in range(tries):
      if len(found) >= wanted:
        break
      network = make()
      if network not in seen and space.allowed(network):
        seen.add(network)
        found.append(network)
    return found

  for _ in range(plan.generations):
    made = []
    if parents := [network for _, network in best]:
      made += fresh(lambda: mutate(rng, _pick(rng, parents), space, plan), plan.mutations, 10 * plan.mutations)
      made += fresh(lambda: cross(rng, _pick(rng, parents), _pick(rng, parents)), plan.crossovers, 10 * plan.crossovers)
    wanted = plan.population - len(made)
    made += fresh(lambda: draw(rng, space), wanted, _TRIES * max(wanted, 0))
    if not made:
      break
    best = sorted([*best, *zip(score(made), made)], key=lambda pair: -pair[0])[:plan.top]  # stable
  if not best:
    raise ValueError(f"no network of sizes {', '.join(map(str, space.choices))} in the first "
                     f"{' or '.join(map(str, space.depths))} blocks keeps the limit; raise it or allow smaller sizes")
  return best[0][1], best[0][0]


def draw(rng, space: Space) -> tuple:
  """A network with a random depth for every kind, and random sizes."""
  return tuple(_filled(rng, (), int(_pick(rng, space.depths)), space) for _ in range(space.kinds))


def mutate(rng, network: tuple, space: Space, plan: Plan) -> tuple:
  """Each kind is open to change with `p_mutate`, and then takes a random depth with `p_depth`: it is cut, or goes on
  with random sizes. Sizes that stay are never changed; that is the code's way."""
  made = []
  for sizes in network:
    if rng.random() < plan.p_mutate and rng.random() < plan.p_depth:
      sizes = _filled(rng, tuple(n for n in sizes if n), int(_pick(rng, space.depths)), space)
    made.append(sizes)
  return tuple(made)


def cross(rng, one: tuple, other: tuple) -> tuple:
  """All sizes of a kind from one of two networks."""
  return tuple(_pick(rng, pair) for pair in zip(one, other))


def _filled(rng, sizes: tuple, depth: int, space: Space) -> tuple:
  """The first `depth` of `sizes`, random ones where there are fewer, and zeros in the blocks behind."""
  more = tuple(int(_pick(rng, space.choices)) for _ in range(depth - len(sizes)))
  return sizes[:depth] + more + (0,) * (space.blocks - depth)


def _pick(rng, options: Sequence) -> Any:
  return options[int(rng.integers(len(options)))]
