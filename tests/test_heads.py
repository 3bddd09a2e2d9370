"""Parallel heads: one program of K, against the same trainings one by one, and against each other."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import recipe

from transferlab import backbones, cost, data, devices, methods, train, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.features.cache import activation_shapes
from transferlab.heads import Head, train_heads
from transferlab.heads.program import chunk_size, make_heads_step, run_shapes, settings, start_heads
from transferlab.heads.scores import Score, Scores
from transferlab.heads.shared import Shared
from transferlab.method import Context, forward, stages
from transferlab.methods.over_sites import over_sites
from transferlab.optim import Optim, make_optimiser, schedule
from transferlab.recipe import train_loader
from transferlab.step import make_step, start

TINY = backbones.architecture("vit_tiny_test")
H2T = {"target_size": 8, "sites": ("block_00/out", "block_02/fc1", "pooled")}
STEPS, ROWS, CLASSES = 4, 12, 4


# --- The program, on activations made up ------------------------------------------------------------------------------

def activations(reads, rows=ROWS, seed=0):
  rng = np.random.default_rng(seed)
  return {slot: rng.standard_normal(shape.shape).astype(np.float32)
          for slot, shape in activation_shapes(TINY, reads, rows).items()}


def rows_of(leaves, rows):
  return jax.tree.map(lambda leaf: leaf[rows], leaves)


def batch_of(method, rows=ROWS):
  return {"activations": activations(method.reads, rows), "label": (np.arange(rows) % CLASSES).astype(np.int32),
          "weight": np.ones(rows, np.float32), "fold": (np.arange(rows) // CLASSES).astype(np.int32)}


class Program:
  """K heads of all features, for STEPS steps on one batch; compiled once for all tests."""

  def __init__(self, method, optim):
    self.method, self.optim, self.batch = method, optim, batch_of(method)
    self.traces = 0
    self.sharding = devices.along_heads(devices.make_mesh(1))
    inner = make_heads_step(method, None, optim, None, CLASSES, self.sharding)
    def step(*arguments):
      self.traces += 1
      return inner(*arguments)
    self.step = jax.jit(step)

  def settings(self, heads):
    rates = lambda lr: np.array([schedule(dataclasses.replace(self.optim, lr=lr), STEPS, 2, 8)(step)
                                 for step in range(STEPS)], np.float32)
    return settings(heads, rates)

  def __call__(self, heads, batch=None, steps=STEPS):
    """(run, logs of the first step), leaves [K, …] on the host."""
    made = [self.method.init(jax.random.key(head.seed), None, CLASSES) for head in heads]
    run, first = start_heads(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *made), self.optim), None
    run = jax.device_put(run, self.sharding)
    for _ in range(steps):
      run, logs = self.step(run, self.settings(heads), {}, self.batch if batch is None else batch)
      first = first or jax.device_get(logs)
    return jax.device_get(run), first


@pytest.fixture(scope="module")
def program():
  return Program(methods.build("all_features", TINY, **H2T), Optim("adam_keras", clip=0.5, eps=1e-7))


BASE = [Head(1e-2, 0.0, 0, {"coefficient": 1e-4}, 0), Head(3e-2, 0.1, 0, {"coefficient": 1e-2}, 1),
        Head(1e-2, 0.0, 1, {"coefficient": 1e-3}, 2), Head(1e-3, 0.5, 2, {"coefficient": 0.0}, -1)]


@pytest.fixture(scope="module")
def base(program):
  return program(BASE)


def leaves_of(run, k):
  return {name: leaf[k] for name, leaf in tree.flatten(run.trainable).items()}


@pytest.mark.parametrize("change", [
    {"lr": 5e-2}, {"lr": 1e30}, {"weight_decay": 0.3}, {"vary": {"coefficient": 10.0}}, {"seed": 7}, {"fold": 2}],
                         ids=lambda change: "-".join(map(str, *change.items())).replace(" ", ""))
def test_what_one_head_does_reaches_no_bit_of_the_others(program, base, change):
  changed, _ = program([BASE[0], BASE[1]._replace(**change), *BASE[2:]])
  for k in (0, 2, 3):
    for name, leaf in leaves_of(changed, k).items():
      assert np.array_equal(leaf, leaves_of(base[0], k)[name]), (k, name)
    assert changed.nan_step[k] == -1
  assert any(not np.array_equal(leaf, leaves_of(base[0], 1)[name]) for name, leaf in leaves_of(changed, 1).items())
  assert program.traces == 1, "another grid is no other program"


def test_a_head_that_breaks_down_says_when(program):
  run, _ = program([BASE[0]._replace(lr=1e30), *BASE[1:]])
  assert run.nan_step.tolist() == [1, -1, -1, -1]


def test_a_held_out_fold_is_a_subset():
  """Loss, gradient's norm and what is trained are those of the rows that are left, whatever the others hold."""
  program = Program(methods.build("all_features", TINY, **H2T), Optim("sgd", clip=0.5))
  heads = [BASE[0], BASE[1]]
  run, logs = program(heads)
  for k, head in enumerate(heads):
    left = np.flatnonzero(program.batch["fold"] != head.fold)
    subset = rows_of(program.batch, left)
    optim = dataclasses.replace(program.optim, lr=head.lr, weight_decay=head.weight_decay)
    trainable, state = program.method.init(jax.random.key(head.seed), None, CLASSES)
    optimiser = make_optimiser(optim, schedule(optim, STEPS, 2, 8), trainable)
    step = jax.jit(make_step(program.method, None, optimiser, None, CLASSES, vary=head.vary))
    alone, first = start(trainable, state, optimiser), None
    for _ in range(STEPS):
      alone, found = step(alone, {}, subset)
      first = first or found
    for log in ("loss", "grad_norm"):
      np.testing.assert_allclose(logs[log][k], first[log], rtol=1e-6)
    for name_, leaf in tree.flatten(alone.trainable).items():
      np.testing.assert_allclose(leaves_of(run, k)[name_], leaf, atol=1e-6)


def test_the_coefficient_varies(program):
  """A head with a coefficient in its hand trains as the method built with it."""
  _, logs = program([head._replace(fold=-1) for head in BASE], steps=1)
  for k, head in enumerate(BASE):
    built = methods.build("all_features", TINY, **H2T, **head.vary)
    trainable, _ = built.init(jax.random.key(head.seed), None, CLASSES)
    context = Context({**program.batch, "target": jax.nn.one_hot(program.batch["label"], CLASSES)})
    outputs = forward(built, None, trainable, program.batch["activations"], context)
    np.testing.assert_allclose(logs["loss"][k], built.loss(trainable, outputs, context), rtol=1e-6)


@pytest.mark.parametrize("schedule_", ["constant", "cosine", "vpt", "noah", "dtl"])
def test_rates_are_those_of_the_schedule(tiny_weights, tiny_task, schedule_):
  """Also where a schedule is not proportional to its peak."""
  optim = Optim(schedule=schedule_, warmup="5 steps")
  task = selection(tiny_task)
  shared = Shared(tiny_weights, task, recipe(duration="12 epochs", optim=optim), 2, folds=None, loaders=cached(task),
                  memory_limit=None, mesh=None, keep_logits=False, keep_trainables=True, quiet=True)
  found = shared.settings([Head(1e-2, 0.0), Head(1e-3, 0.0)])["rate"]
  for k, lr in enumerate((1e-2, 1e-3)):
    rate = schedule(dataclasses.replace(optim, lr=lr), 60, 5, 8)
    np.testing.assert_allclose(found[k], [float(rate(step)) for step in range(60)], rtol=1e-5)
  shared.loader.close()


# --- Whole trainings --------------------------------------------------------------------------------------------------

def selection(task):
  return dataclasses.replace(task, splits={name: task.splits[name] for name in ("train", "val")})


def cached(task, method=None, how=None, names=("val", "train")):
  """(train loader, {split: evaluation loader}) as of a cache of what a method reads: noise, shifted by the class."""
  reads = (method or methods.build("linear", TINY)).reads
  def take(split):
    shift = 0.5 * np.random.default_rng(0).standard_normal((CLASSES, 1))[split.labels]  # [N, 1]
    rows = {slot: values + shift.reshape(-1, *[1] * (values.ndim - 1)).astype(np.float32)
            for slot, values in activations(reads, len(split), len(split)).items()}
    return lambda index, epoch=0: {slot: values[index] for slot, values in rows.items()}
  train = train_loader(how or recipe(), task, Preprocessing(16), take(task.splits["train"]))
  return train, {name: data.eval_loader(task.splits[name], Preprocessing(16), batch_size=8,
                                        activations=take(task.splits[name])) for name in names if name in task.splits}


def same(found, wanted, atol=1e-6):
  for name, leaf in tree.flatten(wanted).items():
    np.testing.assert_allclose(tree.flatten(found)[name], leaf, atol=atol, err_msg=name)


def of_head(trained, k):
  return rows_of(trained.trainable, k)


SIX = [Head(lr, decay, seed) for lr in (1e-3, 1e-2, 3e-2) for decay, seed in ((0.0, 0), (0.1, 1))]


def single_run(weights, method, task, how, head, loaders=None):
  """The last stage of a `fit` with one head's numbers, but for the order of the batches, which heads share."""
  own = dataclasses.replace(how, seed=head.seed, optim=dataclasses.replace(
      how.optim, lr=head.lr, weight_decay=head.weight_decay))
  last = None
  def through(method):
    nonlocal last
    last = train.Stage(method, weights, task, own, None, 0, True)
    if loaders:
      last.loader, last.val_loader = loaders()[0], None if method.members else loaders()[1]["val"]
    else:
      last.loader, last.val_loader = train_loader(how, task, weights.preprocessing), None
    last.train()
    return last.trainable, last.state
  stages(method, through)
  return last


@pytest.mark.parametrize("name, options, optim", [
    ("linear", {}, Optim()), ("head2toe", {"fraction": 0.2, **H2T}, Optim("adam_keras", eps=1e-7)),
    ("inca", {"sites": "block_02/out"}, Optim("sgd", clip=0.5))])
def test_six_heads_end_where_single_runs_end(tiny_weights, tiny_task, name, options, optim):
  """With all that `fit` does: stages, the best of one for the next, schedule, decay, clipping."""
  task, how = selection(tiny_task), recipe(duration="2 epochs", optim=optim)
  method = methods.build(name, TINY, **options)
  loaders = lambda: cached(task, method, how)
  trained = train_heads(method, tiny_weights, task, how, SIX, loaders=loaders(), quiet=True)
  for k in (1, 4) if name == "linear" else (4,):
    single = single_run(tiny_weights, method, task, how, SIX[k], loaders)
    same(of_head(trained, k), single.run.trainable)
    same(rows_of(trained.state, k), single.state, 0)
    if method.members is None:
      score = trained.scores[k][""]
      assert (score.accuracy, score.step, score.examples) == (single.val["accuracy"], single.selected_step, 10)
      assert score.loss == pytest.approx(single.val["loss"], abs=1e-6)


def test_heads_train_from_images(random_weights, tiny_task):
  """One that writes into the backbone too, and its dropout is that of its seed."""
  task, how = selection(tiny_task), recipe(duration="5 steps", optim=Optim(clip=1.0), select="last")
  spec = dataclasses.replace(TINY, depth=1)
  weights, method = random_weights(spec), methods.build("lora", spec, rank=2, dropout=0.3)
  heads = [Head(1e-3, 0.0), Head(1e-2, 0.1, 5)]
  trained = train_heads(method, weights, task, how, heads, quiet=True)
  same(of_head(trained, 1), single_run(weights, method, task, how, heads[1]).run.trainable)
  assert not np.array_equal(*tree.flatten(trained.trainable)["classifier/kernel"])


def test_the_frozen_forward_pass_is_shared():
  """64 probes cost little more than one."""
  method, backbone = methods.build("linear", TINY), backbones.build(TINY)
  batch = {"image": jnp.zeros((8, 16, 16, 3)), "label": jnp.zeros(8, jnp.int32), "weight": jnp.ones(8)}
  def flops(count):
    step = make_heads_step(method, backbone, Optim(), Preprocessing(16), CLASSES,
                           devices.along_heads(devices.make_mesh(1)))
    heads = settings([Head(1e-3, 0.0)] * count, lambda lr: np.zeros(STEPS, np.float32))
    params = backbones.abstract_params(TINY)
    shapes = run_shapes(method, params, CLASSES, Optim(), count)
    return cost.flops(jax.jit(step).lower(shapes, heads, params, batch))
  assert flops(64) < 1.3 * flops(1)


@pytest.fixture(scope="module")
def whole(tiny_weights, tiny_task):
  """Six probes in one program on one device."""
  return probes(tiny_weights, tiny_task)


def probes(weights, task, heads=SIX, **how):
  task, recipe_ = selection(task), recipe(**how.pop("recipe", {}))
  loaders = cached(task, None, recipe_)
  return train_heads(methods.build("linear", TINY), weights, task, recipe_, heads, loaders=loaders, quiet=True, **how)


def alike(found, wanted):
  assert found.heads == wanted.heads
  same(found.trainable, wanted.trainable)
  for a, b in zip(found.scores, wanted.scores, strict=True):
    assert {member: score._replace(loss=0) for member, score in a.items()} == {
        member: score._replace(loss=0) for member, score in b.items()}
    np.testing.assert_allclose([score.loss for score in a.values()], [score.loss for score in b.values()], rtol=1e-6)


@pytest.mark.parametrize("count, heads", [(4, 4), (4, 2)])
def test_devices_make_no_difference(tiny_weights, tiny_task, whole, count, heads):
  """Six heads on four devices, too: the seventh and eighth are copies that nobody sees."""
  found = probes(tiny_weights, tiny_task, mesh=devices.make_mesh(count, heads=heads))
  alike(found, whole)
  assert found.chunks == [6]


@pytest.mark.parametrize("how", [{"devices": 4}, {"micro_batch": -1}],
                         ids=lambda how: "-".join(map(str, *how.items())))
def test_the_recipe_makes_no_difference(tiny_weights, tiny_task, whole, how):
  """Of its own four devices, the greatest common divisor of 4 and 6 share out the heads."""
  alike(probes(tiny_weights, tiny_task, recipe=how), whole)


def test_a_mesh_has_groups_of_devices():
  assert dict(devices.make_mesh(4, heads=2).shape) == {"data": 2, "shard": 1, "heads": 2}
  assert dict(devices.make_mesh().shape) == {"data": len(jax.devices()), "shard": 1, "heads": 1}
  rows = {heads: len(devices.put_batch({"weight": np.ones(7)}, devices.make_mesh(4, heads=heads))["weight"])
          for heads in (4, 2, 1)}
  assert rows == {4: 7, 2: 8, 1: 8}, "a batch is filled up for the groups that share it out"
  for wrong in (3, 0):
    with pytest.raises(ValueError, match="does not divide 4 devices"):
      devices.make_mesh(4, heads=wrong)


def test_chunks_make_no_difference(tiny_weights, tiny_task, whole, capsys, monkeypatch):
  """What fits trains at once, the rest after it by the same program, and what is done is told at once."""
  compiled, told = [], []
  inner = Shared.compile
  monkeypatch.setattr(Shared, "compile", lambda self, lane, size, parts: (
      compiled.append(size), inner(self, lane, size, parts))[1])
  five = probes(tiny_weights, tiny_task, SIX[:5], memory_limit=int(0.6 * whole.peak_bytes),
                finished=lambda first, chunk: told.append((first, chunk)))
  assert five.chunks == [2, 2, 1] or five.chunks == [3, 2]
  assert len(compiled) == len(set(compiled)) <= 4
  alike(five, whole._replace(heads=tuple(SIX[:5]), scores=whole.scores[:5],
                             trainable=jax.tree.map(lambda leaf: leaf[:5], whole.trainable)))
  assert [first for first, _ in told] == np.cumsum([0, *five.chunks[:-1]]).tolist()
  assert sum((chunk.scores for _, chunk in told), []) == five.scores
  assert min(chunk.step_seconds for _, chunk in told) > 0
  assert five.step_seconds == pytest.approx(np.mean([chunk.step_seconds for _, chunk in told]))
  assert five.peak_bytes <= 0.6 * whole.peak_bytes


def test_a_chunk_that_fails_leaves_those_before_it(tiny_weights, tiny_task, whole, monkeypatch):
  told = []
  monkeypatch.setattr("transferlab.heads.shared.chunk_size", lambda *arguments: 3)
  def finished(first, chunk):
    told.append(chunk.scores)
    monkeypatch.setattr(Shared, "put", lambda self, batch: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    probes(tiny_weights, tiny_task, finished=finished)
  assert len(told) == 1 and told[0][0][""].accuracy == whole.scores[0][""].accuracy


def test_what_arrays_hold_already_is_not_there_for_programs(tiny_weights, tiny_task, monkeypatch):
  monkeypatch.setattr(cost, "available_bytes", lambda: 10**9)
  monkeypatch.setattr(cost, "held_bytes", lambda: 10**9 - 1000)
  with pytest.raises(ValueError, match="and 0 MiB may be used"):
    probes(tiny_weights, tiny_task)


def test_too_little_memory_is_an_error_before_the_first_step(tiny_weights, tiny_task):
  with pytest.raises(ValueError, match=r"1 parallel head\(s\) need .* MiB and 0 MiB may be used; set micro_batch"):
    probes(tiny_weights, tiny_task, memory_limit=1000)


@pytest.mark.parametrize("count, limit, multiple, wanted", [
    (24, 34, 1, 24), (24, 33, 1, 12), (24, 20, 1, 8), (7, 14, 1, 4), (5, 11, 1, 1), (6, 18, 4, 8), (6, 17, 4, 4),
    (1, 11, 1, 1)])
def test_chunk_size(count, limit, multiple, wanted):
  """10 bytes for all and one for each head; chunks are equal, and as few as fit."""
  asked = []
  peak = lambda size: (asked.append(size), 10 + size)[1]
  assert chunk_size(count, peak, limit, multiple) == wanted
  assert len(set(asked)) <= 4
  with pytest.raises(ValueError, match="heads? may|may be used"):
    chunk_size(count, peak, 10, multiple)


def test_chunk_size_where_memory_is_not_linear():
  assert chunk_size(16, lambda size: int(300 * size ** 0.5), 840) == 6


# --- Scores -----------------------------------------------------------------------------------------------------------

def test_folds_are_validated_on_their_own_rows(tiny_weights, tiny_task):
  """By the un-augmented training rows that a head held out, counted by hand."""
  task = dataclasses.replace(tiny_task, splits={"train": tiny_task.splits["train"]})
  folds = np.arange(40) // 14
  heads = [Head(1e-2, 0.0, 0, {}, fold) for fold in (0, 2)]
  trained = train_heads(methods.build("linear", TINY), tiny_weights, task, recipe(), heads, folds=folds,
                        loaders=cached(task), keep_logits=True, quiet=True)
  logits = trained.logits["train"]
  assert logits.shape == (2, 1, 40, CLASSES)
  for k, head in enumerate(heads):
    rows = np.flatnonzero(folds == head.fold)
    labels, z = task.splits["train"].labels[rows], logits[k, 0, rows]
    loss = -np.asarray(jax.nn.log_softmax(z))[np.arange(len(rows)), labels].mean()
    score = trained.scores[k][""]
    assert score == Score((z.argmax(-1) == labels).mean(), pytest.approx(loss, rel=1e-5), None, len(rows), 15)


def test_classes_are_balanced_within_a_fold(tiny_weights, tiny_task):
  task, how = selection(tiny_task), recipe(class_weights="balanced")
  folds = np.where(np.arange(40) < 8, 0, np.where(tiny_task.splits["train"].labels == 1, 1, 2))
  shared = Shared(tiny_weights, task, how, 1, folds=folds, loaders=cached(task), memory_limit=None, mesh=None,
                  keep_logits=False, keep_trainables=True, quiet=True)
  weights = shared.settings([Head(1e-2, 0.0, fold=0), Head(1e-2, 0.0, fold=1)])["class_weights"]
  shared.loader.close()
  np.testing.assert_allclose(weights[0], np.ones(4))
  np.testing.assert_allclose(weights[1], [32 / 40, 32 / 8, 32 / 40, 32 / 40])


def test_members_are_scored_apart(tiny_weights, tiny_task):
  """Each by its own logits, in the method's order; a member that breaks down takes nobody along."""
  task = selection(tiny_task)
  method = methods.build("linear", TINY)._replace(members=lambda outputs: {
      "whole": outputs.logits, "broken": outputs.logits * jnp.nan, "turned": -outputs.logits})
  trained = train_heads(method, tiny_weights, task, recipe(), SIX[:2], loaders=cached(task), keep_logits=True,
                        keep_trainables=False, quiet=True)
  logits, labels = trained.logits["val"], task.splits["val"].labels
  assert logits.shape == (2, 3, 10, CLASSES) and trained.trainable is None
  for scores, z in zip(trained.scores, logits, strict=True):
    assert list(scores) == ["whole", "broken", "turned"]
    assert scores["broken"][:4] == (0.0, math.inf, None, 10)
    assert scores["turned"].accuracy == (z[2].argmax(-1) == labels).mean() or scores["turned"].step < 15
    np.testing.assert_array_equal(z[2], -z[0])


def test_a_head_that_breaks_down_scores_worst_and_is_named(tiny_weights, tiny_task, whole, capsys):
  task = selection(tiny_task)
  heads = [Head(1e38, 0.1, 1), *SIX[1:]]
  trained = train_heads(methods.build("linear", TINY), tiny_weights, task, recipe(), heads, loaders=cached(task))
  assert trained.scores[0][""]._replace(step=0) == Score(0.0, math.inf, None, 10, 0)
  assert trained.scores[1:] == whole.scores[1:]
  for k in range(1, 6):
    for name, leaf in tree.flatten(of_head(trained, k)).items():
      assert np.array_equal(leaf, tree.flatten(of_head(whole, k))[name])
  said = capsys.readouterr().err
  assert "6 heads in 1 chunk of 6, peak" in said
  assert said.count("is not finite") == 1 and "head 0 (lr 1e+38, weight decay 0.1) is not finite from step" in said
  assert said.count("it scores worst") == 1


def test_a_head_that_broke_down_in_an_early_stage_stays_worst(tiny_weights, tiny_task):
  """Its second stage selects features by NaN and trains well on them: that counts for nothing."""
  task, how = selection(tiny_task), recipe(duration="1 epochs", optim=Optim("sgd"))
  method = methods.build("linear", TINY)
  breaking = lambda trainable, outputs, ctx: method.loss(trainable, outputs, ctx) * ctx.vary["scale"]
  first = method._replace(loss=breaking, varies=("scale",), then=lambda trainable, state: method)
  heads = [Head(1e-2, 0.0, 0, {"scale": scale}) for scale in (1.0, math.nan)]
  trained = train_heads(first, tiny_weights, task, how, heads, loaders=cached(task), quiet=True)
  good, bad = (scores[""] for scores in trained.scores)
  assert good.accuracy > 0 and math.isfinite(good.loss)
  assert (bad.accuracy, bad.loss) == (0.0, math.inf)


def of(right, loss, count=10.0):
  return np.array([[[right, loss * count, count]]])


def test_the_best_evaluation_counts_or_the_last():
  best, last = Scores(True, False), Scores(False, False)
  seen = [of(5, 1.0), of(7, 0.9), of(7, 0.8), of(7, 0.85), of(6, 0.1)]
  better = [best.add({"": sums}, step).tolist() for step, sums in enumerate(seen)]
  for step, sums in enumerate(seen):
    last.add({"": sums}, step)
  assert better == [[True], [True], [True], [False], [False]]
  assert best.of_heads([True]) == [{"": Score(0.7, pytest.approx(0.8), None, 10, 2)}]
  assert last.of_heads([True])[0][""].step == 4


def test_what_is_not_finite_never_wins_again():
  scores = Scores(True, False)
  for step, sums in enumerate([of(9, 1.0), of(9, math.nan), of(10, 0.1)]):
    scores.add({"": sums}, step)
  assert scores.of_heads([True])[0][""][:2] == (0.0, math.inf)


def test_the_mean_over_domains_decides_where_it_shall():
  by_domain, plain = Scores(True, True), Scores(True, False)
  seen = [np.array([[[8, 9.0, 8], [0, 1.0, 2]]]), np.array([[[5, 9.0, 8], [2, 1.0, 2]]])]
  for step, sums in enumerate(seen):
    by_domain.add({"": sums}, step)
    plain.add({"": sums}, step)
  assert by_domain.of_heads([True])[0][""] == Score(0.7, 1.0, (5 / 8 + 1) / 2, 10, 1)
  assert plain.of_heads([True])[0][""].step == 0


# --- Sites along K ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, key, options", [
    ("linear", "site", {"tokens": "mean"}), pytest.param("inca", "sites", {}, marks=pytest.mark.full)])
def test_the_site_varies(name, key, options):
  """Logits, loss and gradient are those of the method on that site alone."""
  single = [methods.build(name, TINY, **{key: f"block_0{i}/out"}, **options) for i in (0, 2)]
  method = over_sites(single)
  batch = {**batch_of(method), "target": jax.nn.one_hot(np.arange(ROWS) % CLASSES, CLASSES)}
  trainable, state = method.init(jax.random.key(0), {}, CLASSES)
  trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)  # InCA's classifier starts at zero
  def run(method, trainable, inputs, vary):
    def loss(trainable):
      context = Context(batch, state, vary=vary, train=True)
      outputs = forward(method, None, trainable, inputs, context)
      return method.loss(trainable, outputs, context), outputs.logits
    return jax.value_and_grad(loss, has_aux=True)(trainable)
  found = jax.jit(jax.vmap(functools.partial(run, method), in_axes=(None, None, 0)))(
      trainable, batch["activations"], {"member": jnp.array([1.0, 0.0, 1.0])})
  for k, i in ((0, 1), (1, 0)) if name == "linear" else ((2, 1),):
    inputs = {slot: batch["activations"][f"{i}/{slot}"] for slot in single[i].reads}
    form, _ = jax.eval_shape(functools.partial(single[i].init, frozen={}, num_classes=CLASSES), jax.random.key(0))
    own = jax.tree.unflatten(jax.tree.structure(form), jax.tree.leaves(trainable))
    wanted = jax.jit(functools.partial(run, single[i]))(own, inputs, {})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a[k], b, atol=1e-6)


def test_sites_of_stages_go_on_together():
  single = [methods.build("head2toe", TINY, sites=(f"block_0{i}/out",), target_size=8, fraction=0.5) for i in (0, 1)]
  method = over_sites(single)
  after = method.then(*method.init(jax.random.key(0), {}, CLASSES))
  assert after.then is None and list(after.reads) == list(method.reads) and "member" in after.varies
  trainable, state = after.init(jax.random.key(0), {}, CLASSES)
  inputs = activations(method.reads)
  for i, alone in enumerate(single):
    alone = alone.then(*alone.init(jax.random.key(0), {}, CLASSES))
    own = {slot: inputs[f"{i}/{slot}"] for slot in alone.reads}
    context = Context(state=state, vary={"member": i})
    np.testing.assert_allclose(forward(after, None, trainable, inputs, context).logits,
                               forward(alone, None, trainable, own, context).logits, atol=1e-6)


def test_unlike_methods_do_not_go_together():
  probe = functools.partial(methods.build, "linear", TINY)
  for wrong in ((probe(), methods.build("all_features", TINY, **H2T)), (methods.build("lora", TINY),), ()):
    with pytest.raises(ValueError, match="over_sites"):
      over_sites(wrong)
  mixed = over_sites([probe(site="block_00/fc1", tokens="mean"), probe(site="block_00/out", tokens="mean")])
  with pytest.raises(ValueError, match="expected one shape"):
    jax.eval_shape(lambda acts: forward(mixed, None, {}, acts, Context()).logits,
                   {"0/features": jnp.zeros((2, 32)), "1/features": jnp.zeros((2, 16))})


# --- Errors -----------------------------------------------------------------------------------------------------------

FOLDS = np.arange(40) % 5


@pytest.mark.parametrize("change, said", [
    ({"splits": ("train", "val", "test")}, "has a split 'test'; selection never sees it"),
    ({"splits": ("train",)}, "no split 'val'"), ({"heads": []}, "heads is empty"),
    ({"heads": [Head(0.0, 0.0)]}, "an lr of 0 or less"), ({"heads": [Head(1.0, 0.0, -1)]}, "a seed outside"),
    ({"heads": [Head(1.0, 0.0, 0, {"coefficient": 1.0})]}, "linear cannot vary 'coefficient' in one"),
    ({"heads": [Head(1.0, 0.0), Head(1.0, 0.0, 0, {"x": 1.0})]}, "expected the same options in all"),
    ({"heads": [Head(1.0, 0.0, fold=1)]}, "holds out fold 1; expected one of -1"),
    ({"folds": FOLDS}, "holds out fold -1; expected one of 0, 1, 2, 3, 4"),
    ({"folds": FOLDS[1:]}, r"folds are \[39\]"), ({"folds": FOLDS - 1}, "from -1"),
    ({"folds": FOLDS, "heads": [Head(1.0, 0.0, fold=0)], "augmentation": "timm"}, "mixup"),
    ({"loaders": ("train",)}, "loaders have train to evaluate on; expected 'val'")])
def test_what_cannot_be_is_said(tiny_weights, tiny_task, change, said):
  task = dataclasses.replace(tiny_task, splits={
      name: tiny_task.splits[name] for name in change.get("splits", ("train", "val"))})
  names = change.get("loaders")
  loaders = names and (cached(task)[0], {name: None for name in names})
  with pytest.raises(ValueError, match=said):
    train_heads(methods.build("linear", TINY), tiny_weights, task,
                recipe(augmentation=change.get("augmentation", "none")), change.get("heads", [Head(1e-3, 0.0)]),
                folds=change.get("folds"), loaders=loaders, quiet=True)
