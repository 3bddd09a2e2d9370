"""DomainBed's random search as a grid of sweeps: the hyper-parameters that a trial draws for LFA and its baselines
(Gulrajani and Lopez-Paz, ICLR 2021; hparams_registry.py of facebookresearch/DomainBed and of MLAI-Yonsei/LFA).

Every hyper-parameter has a generator of its own, seeded by its name, so that a draw is the same whatever else is drawn.
Draw 0 are the defaults.
"""
import numpy as np

from transferlab.data.domains import SUITES, seed_hash

SEARCHED = ("lfa", "clip_linear", "dpl", "qlora")  # of the others nothing is drawn, or a sweep cannot train them
LARGEST = {"domainnet": 5.0}  # exponent of 2 of the largest batch of a domain


def draw(method: str, suite: str, trial: int, number: int) -> dict:
  """{key of a configuration: value} of one draw.

  Args:
    method: one of `SEARCHED`.
    suite: "pacs"; batches are smaller on "domainnet".
    trial: DomainBed's trial_seed, that of the splits, too.
    number: its hparams_seed; 0 for the defaults.
  """
  random = lambda name: np.random.RandomState(seed_hash(seed_hash(number, trial), name))
  choice = lambda name, *values: values[random(name).choice(len(values))]
  found = {"optim.lr": ("lr", lambda name: 10 ** random(name).uniform(-4.5, -2.5)),
           "optim.momentum": ("momentum", lambda name: choice(name, 0.0, 0.1, 0.2)),
           "batch_size": ("batch_size", lambda name: int(2 ** random(name).uniform(3, LARGEST.get(suite, 5.5))))}
  default = {"optim.lr": 1e-3, "optim.momentum": 0.1, "batch_size": 32}
  if method == "dpl":
    found |= {"options.tokens": ("num_domain_tokens", lambda name: choice(name, 2, 4, 8, 16)),
              "options.width": ("mlp_width", lambda name: choice(name, 256, 512)),
              "options.dropout": ("mlp_dropout", lambda name: choice(name, 0.0, 0.1))}
    default |= {"options.tokens": 16, "options.width": 512, "options.dropout": 0.1}
  return {key: value(name) for key, (name, value) in found.items()} if number else default


def draws(method: str, suite: str, trial: int, count: int) -> dict[str, list[tuple]]:
  """The first `count` draws of a trial as a grid of one joint key, see `grid.points`.

  Raises:
    ValueError: a method, or a suite, for which nothing is drawn; a count below 1.
  """
  if method not in SEARCHED or suite not in SUITES:
    raise ValueError(f"DomainBed draws nothing for {method} on {suite}; expected {', '.join(SEARCHED)} on "
                     f"{', '.join(SUITES)}; leave rates=chosen out")
  if count < 1:
    raise ValueError(f"config argument draws is {count}; expected 1 or more, DomainBed's search of LFA had 5")
  found = [draw(method, suite, trial, number) for number in range(count)]
  return {"+".join(found[0]): [tuple(each.values()) for each in found]}
