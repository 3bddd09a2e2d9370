"""K heads as one program: a training step and an evaluation, mapped over everything in which the heads differ.

Mapped, on a first axis K: trainable, state, optimiser state, learning rates, weight decay, seed, fold, and the options
of `Method.varies`. Not mapped: the batch and the frozen backbone, so that what a method only reads is computed once for
all K. Each head has its own loss, clipping and optimiser: another's numbers, NaN among them, never enter its own.
"""
from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferlab.method import Context, Method, classes, forward
from transferlab.optim import make_optimiser
from transferlab.step import inputs_of, make_step, start


class Head(NamedTuple):
  """In what one of K parallel heads differs from the others.

  Fields:
    lr: peak learning rate.
    weight_decay: strength of the decay.
    seed: of initialisation and dropout; the order of the batches and their augmentation are shared.
    vary: {option: number}, of options in `Method.varies`.
    fold: rows of this fold are held out: they weigh nothing in training and are what the head is validated on. -1 none.
  """
  lr: float
  weight_decay: float
  seed: int = 0
  vary: dict = {}
  fold: int = -1


def settings(heads, rates, class_weights=None) -> dict:
  """What a program needs to know of K heads, as arrays [K, …].

  Args:
    rates: learning rate -> [S], the rate of every step. A table serves any schedule, without another program.
    class_weights: fold -> [C], if classes are weighted.
  """
  column = lambda name, dtype: np.array([getattr(head, name) for head in heads], dtype)
  found = {"rate": np.stack([rates(head.lr) for head in heads]), "weight_decay": column("weight_decay", np.float32),
           "seed": column("seed", np.uint32), "fold": column("fold", np.int32),
           "vary": {name: np.array([head.vary[name] for head in heads], np.float32) for name in heads[0].vary}}
  return found if class_weights is None else {
      **found, "class_weights": np.stack([class_weights(head.fold) for head in heads])}


def make_heads_step(method: Method, backbone, optim, preprocessing, num_classes: int, sharding, **how):
  """The step (run, settings, frozen, batch) -> (run, {"loss", "grad_norm"}) of K heads, leaves and logs [K, …].

  Args:
    optim: an `Optim`, whose rate and weight decay the heads replace.
    sharding: of the run's first axis, see `devices.along_heads`.
    how: as of `step.make_step`.

  A batch in folds holds "fold" [B] too, the fold of each row.
  """
  def one(run, head, frozen, batch):
    optimiser = make_optimiser(optim, lambda step: head["rate"][step], run.trainable, head["weight_decay"])
    if "fold" in batch:
      batch = {**batch, "weight": batch["weight"] * (batch["fold"] != head["fold"])}
    step = make_step(method, backbone, optimiser, preprocessing, num_classes, seed=head["seed"], vary=head["vary"],
                     class_weights=head.get("class_weights"), **how)
    return step(run, frozen, batch)

  def step(run, heads, frozen, batch):
    run, logs = jax.vmap(one, in_axes=(0, 0, None, None))(run, heads, frozen, batch)
    return jax.lax.with_sharding_constraint(run, sharding), logs

  return step


def start_heads(trainable, state, optim):
  """The runs before the first step, of a trainable and state [K, …]. The optimiser's rate plays no part in it."""
  return jax.vmap(lambda t, s: start(t, s, make_optimiser(optim, lambda step: 0.0, t)))(trainable, state)


def run_shapes(method: Method, params, num_classes: int, optim, count: int):
  """Shapes of the runs of `count` heads; nothing is computed."""
  def run(rng, params):
    one = method.init(rng, params, classes(method, num_classes))
    return start_heads(*jax.tree.map(lambda leaf: jnp.stack([leaf] * count), one), optim)
  return jax.eval_shape(run, jax.random.key(0), params)


def make_heads_scores(method: Method, backbone, preprocessing, domains: int):
  """A jitted (trainable, state, settings, frozen, batch) -> {member: (sums [K, G, 3], logits [K, B, C])}.

  The sums, over the rows of each of `domains` G domains, are correct predictions, negative log-likelihoods and rows.
  Where the batch is in folds, a head counts the rows of its own fold. The member "" is the method's own read-out.
  """
  def sums(logits, batch, weight):
    group = jax.nn.one_hot(batch["domain"], domains) if "domain" in batch else jnp.ones((len(weight), 1))  # [B, G]
    right = logits.argmax(axis=-1) == batch["label"]
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=-1)[:, 0]   # [B]
    each = jnp.stack([right, -likelihood, jnp.ones_like(likelihood)], axis=-1)                             # [B, 3]
    counts = (group > 0)[:, :, None] & (weight > 0)[:, None, None]      # a row that does not count may be infinite
    return jnp.sum(jnp.where(counts, each[:, None], 0.0), axis=0)                                          # [G, 3]

  def one(trainable, state, head, frozen, batch):
    weight = batch["weight"] * (batch["fold"] == head["fold"]) if "fold" in batch else batch["weight"]
    context = Context({"weight": weight}, state, frozen, vary=head["vary"])
    outputs = forward(method, backbone, trainable, inputs_of(batch, preprocessing), context)
    members = {"": outputs.logits, **(method.members(outputs) if method.members else {})}
    # An ordered dict leaves a program as it is, a dict sorted by its keys.
    return OrderedDict((member, (sums(logits, batch, weight), logits)) for member, logits in members.items())

  return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)))


@jax.jit
def choose(which, new, old):
  """Leaves [K, …] of `new` for the heads in `which`, bool [K], of `old` for the others."""
  return jax.tree.map(lambda n, o: jnp.where(which.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def chunk_size(count: int, peak, limit: int, multiple: int = 1) -> int:
  """Of `count` heads, how many train at once so that no chunk needs more than `limit` bytes.

  Args:
    peak: number of heads -> bytes of the program that trains them; it is compiled for that, so it is asked seldom.
    multiple: the answer is one of its multiples, and so may exceed `count`.

  Raises:
    ValueError: even the smallest chunk does not fit.
  """
  blocks = -(-count // multiple)
  size = lambda chunks: multiple * -(-blocks // chunks)  # equal chunks, the last filled up: one program serves all
  whole, least = size(1), size(blocks)
  if (most := peak(whole)) <= limit:
    return whole
  if whole == least or (fewest := peak(least)) > limit:
    needed = most if whole == least else fewest
    raise ValueError(f"{least} parallel head(s) need {needed / 2**20:.0f} MiB and {limit / 2**20:.0f} MiB may be used; "
                     "set micro_batch or remat=True, or lower batch_size")
  each = (most - fewest) / (whole - least)  # memory grows about linearly in the heads: start from that guess
  chunks = -(-whole // max(least, int(least + (limit - fewest) / max(each, 1))))
  while size(chunks) > least and peak(size(chunks)) > limit:
    chunks += 1
  return size(min(chunks, blocks))
