"""Optimisers, schedules, losses and gradient accumulation against numbers by hand; durations."""
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transferlab import backbones, devices, losses, methods
from transferlab.backbones.spec import Preprocessing
from transferlab.config import resolve_steps
from transferlab.data.mix import smooth_one_hot
from transferlab.optim import Optim, epoch_rates, make_optimiser, schedule
from transferlab.step import make_step, start

# --- Schedules ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, ours", [("dtl", "dtl"), ("ssf", "dtl"), ("fact_noah", "noah"), ("vpt", "vpt")])
def test_released_schedules(golden, name, ours):
  """Per-epoch rates equal those of the released code, for the nominal rate and, being linear in it, for another one."""
  with np.load(golden("dtl_and_petl/lr_schedules.npz"), allow_pickle=False) as file:
    wanted = file[name]
  np.testing.assert_allclose(epoch_rates(ours, 1e-3, len(wanted)), wanted, rtol=1e-12, atol=1e-18)
  # The run sees them: constant within an epoch of 31 steps (VTAB's 1,000 images in batches of 32).
  rate = schedule(Optim(schedule=ours, lr=1e-3, warmup="10 epochs"), 31 * len(wanted), 31, 32)
  for epoch in (0, 1, 9, 10, 50, len(wanted) - 1):
    for step in (31 * epoch, 31 * epoch + 30):
      np.testing.assert_allclose(rate(step), wanted[epoch], rtol=1e-6, atol=1e-12)


def test_dtl_peaks_below_its_nominal_rate_and_idles_at_the_end():
  rates = epoch_rates("dtl", 1e-3, 110)
  np.testing.assert_allclose(rates.max(), 0.9755e-3, rtol=1e-4)
  np.testing.assert_allclose(rates[-10:], 1e-8)
  with pytest.raises(ValueError, match="10 idle epochs and the run has 8"):
    schedule(Optim(schedule="dtl"), 80, 10, 32)


def test_cosine_and_constant():
  cosine = schedule(Optim(lr=0.2, schedule="cosine", warmup="10 steps"), 110, 11, 32)
  wanted = [0.2 * t / 10 if t < 10 else 0.1 * (1 + np.cos(np.pi * (t - 10) / 100)) for t in range(111)]
  np.testing.assert_allclose([float(cosine(t)) for t in range(0, 111, 5)], wanted[::5], atol=1e-7)
  constant = schedule(Optim(lr=0.2, schedule="constant", warmup="2 epochs"), 100, 5, 32)
  np.testing.assert_allclose([float(constant(t)) for t in (0, 5, 10, 99)], [0, 0.1, 0.2, 0.2], atol=1e-7)
  assert float(schedule(Optim(lr=0.2, schedule="constant"), 100, 5, 32)(0)) == np.float32(0.2)


@pytest.mark.parametrize("fields, message", [
    ({"name": "lamb"}, "optimiser 'lamb' is unknown"), ({"schedule": "step"}, "schedule 'step' is unknown"),
    ({"lr": 0.0}, "lr is 0.0; expected a number above 0")])
def test_wrong_optimisers_are_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    Optim(**fields)


# --- Durations ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("duration, steps", [
    ("500 steps", 500), ("1 step", 1), ("20 epochs", 620), ("1 epoch", 31), ("0.5 epochs", 16), ("3200 examples", 100),
    ("10 percent", 100), (" 2  epochs ", 62)])
def test_durations(duration, steps):
  assert resolve_steps(duration, 31, 32, 1000) == steps


@pytest.mark.parametrize("duration", ["20", "epochs", "20 epoch s", "-1 steps", "3 hours", "", 20])
def test_durations_that_are_none(duration):
  with pytest.raises(ValueError, match="warmup is .*; expected a number and a unit, e.g. '20 epochs'"):
    resolve_steps(duration, 31, 32, 1000, "warmup")


def test_percents_need_a_whole():
  with pytest.raises(ValueError, match="percents are of the whole run"):
    resolve_steps("5 percent", 31, 32, None, "duration")


# --- Optimisers -----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
PARAMS = {"lora": {"a": draw(4, 2), "b": draw(2, 4)}, "classifier": {"kernel": draw(4, 3), "bias": draw(3)}}
GRADIENTS = [jax.tree.map(lambda x: draw(*x.shape), PARAMS) for _ in range(3)]


def updates(optim, params=PARAMS, gradients=GRADIENTS, rate=0.1):
  """Parameters after each of the gradients."""
  optimiser, found = make_optimiser(optim, lambda step: rate, params), []
  state = optimiser.init(params)
  for gradient in gradients:
    change, state = optimiser.update(gradient, state, params)
    params = optax.apply_updates(params, change)
    found.append(params)
  return found


def by_hand(name, p, gradients, rate=0.1, decay=0.3, momentum=0.9, b1=0.9, b2=0.999, eps=1e-8):
  """One leaf in float64, after each gradient."""
  p, m, v, found = p.astype(np.float64), 0.0, 0.0, []
  for t, g in enumerate(gradients, 1):
    g = g.astype(np.float64) + (0 if name == "adamw" else decay * p)
    if name == "sgd":
      m = momentum * m + g
      p = p - rate * m
    else:
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
      step = (m / (1 - b1 ** t)) / (np.sqrt(v / (1 - b2 ** t)) + eps)
      p = p - rate * (step + (decay * p if name == "adamw" else 0))
    found.append(p)
  return found


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimisers_by_hand(name):
  """Decay is decoupled in AdamW and added to the gradient elsewhere, as torch does; the bias does not decay."""
  found = updates(Optim(name, weight_decay=0.3))
  for group, leaf in (("lora", "a"), ("lora", "b"), ("classifier", "kernel"), ("classifier", "bias")):
    decay = 0 if leaf == "bias" else 0.3
    wanted = by_hand(name, PARAMS[group][leaf], [g[group][leaf] for g in GRADIENTS], decay=decay)
    # Adam's 1 - b2^t is 0.001 at first, which float32 knows to 6e-5: 3e-5 of a step of 0.1 after the root.
    np.testing.assert_allclose([f[group][leaf] for f in found], wanted, rtol=0, atol=1e-5 if "adam" in name else 1e-6)


def test_keras_adam_adds_eps_to_the_uncorrected_root():
  """In float64 by hand, with an eps that is large enough to matter; decay is added to the gradient."""
  found = updates(Optim("adam_keras", weight_decay=0.3, eps=0.1))
  p, m, v = PARAMS["lora"]["a"].astype(np.float64), 0.0, 0.0
  for t, (gradients, after) in enumerate(zip(GRADIENTS, found), 1):
    g = gradients["lora"]["a"].astype(np.float64) + 0.3 * p
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    p = p - 0.1 * np.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t) * m / (np.sqrt(v) + 0.1)
    np.testing.assert_allclose(after["lora"]["a"], p, rtol=0, atol=1e-5)


def test_rates_by_pattern():
  """Masked = subset: what has factor 0 does not move, and the rest moves as if it were alone."""
  for name in ("sgd", "adamw"):
    masked = updates(Optim(name, lr_factors=(("lora/.*", 0.0),)))[-1]
    chex.assert_trees_all_equal(masked["lora"], PARAMS["lora"])
    only = lambda tree: {"classifier": tree["classifier"]}
    alone = updates(Optim(name), only(PARAMS), [only(g) for g in GRADIENTS])[-1]
    chex.assert_trees_all_equal(masked["classifier"], alone["classifier"])
  whole, tenth = (updates(Optim("sgd", weight_decay=0.0, lr_factors=f))[0] for f in ((), ((".*/kernel", 0.1),)))
  moved = lambda new: np.asarray(new["classifier"]["kernel"]) - PARAMS["classifier"]["kernel"]
  np.testing.assert_allclose(moved(tenth), 0.1 * moved(whole), rtol=0, atol=1e-6)
  chex.assert_trees_all_equal(tenth["lora"], whole["lora"])


def test_the_first_pattern_wins():
  found = updates(Optim("sgd", lr_factors=(("lora/b", 1.0), ("lora/.*", 0.0))))[-1]
  chex.assert_trees_all_equal(found["lora"]["a"], PARAMS["lora"]["a"])
  assert not np.array_equal(found["lora"]["b"], PARAMS["lora"]["b"])


@pytest.mark.parametrize("field", ["decay", "lr_factors"])
def test_a_pattern_that_matches_nothing_is_an_error(field):
  with pytest.raises(ValueError, match="'clasifier/kernel' matches none of 4 parameters; nearest: classifier/kernel"):
    make_optimiser(Optim(**{field: (("clasifier/kernel", 0.0),)}), lambda step: 0.1, PARAMS)


def test_clipping_is_by_the_global_norm():
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(GRADIENTS[0])))
  clipped = updates(Optim("sgd", weight_decay=0.0, clip=0.5), gradients=GRADIENTS[:1])[0]
  wanted = jax.tree.map(lambda p, g: p - 0.1 * g * np.float32(0.5 / norm), PARAMS, GRADIENTS[0])
  chex.assert_trees_all_close(clipped, wanted, rtol=0, atol=1e-6)
  loose = updates(Optim("sgd", weight_decay=0.0, clip=100.0), gradients=GRADIENTS[:1])[0]
  chex.assert_trees_all_close(loose, updates(Optim("sgd", weight_decay=0.0), gradients=GRADIENTS[:1])[0])


# --- Losses ---------------------------------------------------------------------------------------------------------

def cross_entropy_by_hand(logits, target, weight):
  total = 0.0
  for row, t, w in zip(logits.astype(np.float64), target, weight):
    total += w * -np.sum(t * (row - row.max() - np.log(np.exp(row - row.max()).sum())))
  return total / np.sum(weight)


def test_cross_entropy_by_hand():
  logits, labels, weight = 3 * draw(5, 4), np.array([0, 3, 1, 2, 0]), np.float32([1, 1, 0.5, 2, 0])
  batch = {"label": jnp.asarray(labels), "weight": jnp.asarray(weight)}
  hard = losses.cross_entropy(logits, {**batch, "target": losses.targets(batch, 4)})
  chex.assert_shape(hard, ())
  np.testing.assert_allclose(hard, cross_entropy_by_hand(logits, np.eye(4)[labels], weight), rtol=1e-6)
  smooth = smooth_one_hot(labels, 4, 0.1)
  np.testing.assert_allclose(smooth[0], [0.925, 0.025, 0.025, 0.025], atol=1e-7)
  mixed = {**batch, "soft_label": jnp.asarray(0.7 * smooth + 0.3 * smooth[::-1])}
  soft = losses.cross_entropy(logits, {**mixed, "target": losses.targets(mixed, 4)})
  np.testing.assert_allclose(soft, cross_entropy_by_hand(logits, mixed["soft_label"], weight), rtol=1e-6)


def test_padding_does_not_count_and_nothing_at_all_is_zero():
  logits = draw(3, 4)
  def loss(weight):
    rows = len(weight)
    target = losses.targets({"label": jnp.zeros(rows, jnp.int32)}, 4)
    return float(losses.cross_entropy(logits[:rows], {"target": target, "weight": jnp.float32(weight)}))
  np.testing.assert_allclose(loss([1, 1, 0]), loss([1, 1]), rtol=1e-6)
  assert loss([0, 0, 0]) == 0


# --- The step -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def probe(tiny_spec, tiny_weights):
  """A linear probe, its parameters, and a batch of 12 rows of which 5 are padding."""
  method = methods.build("linear", tiny_spec)
  trainable, _ = method.init(jax.random.key(0), tiny_weights.params, 4)
  rng = np.random.default_rng(1)
  batch = {"image": rng.integers(0, 256, (12, 16, 16, 3), np.uint8), "label": rng.integers(0, 4, 12).astype(np.int32),
           "weight": np.float32([1] * 7 + [0] * 5)}
  features = jax.jit(lambda params, images: backbones.build(tiny_spec).apply(params, images)[0])(
      tiny_weights.params, batch["image"] / np.float32(127.5) - 1)
  return method, trainable, batch, np.asarray(features)


def one_step(probe, tiny_spec, tiny_weights, rows=None, **how):
  method, trainable, batch, _ = probe
  optimiser = make_optimiser(Optim("sgd", weight_decay=0.0), lambda step: 0.1, trainable)
  step = make_step(method, backbones.build(tiny_spec), optimiser, Preprocessing(16), 4, **how)
  batch = jax.tree.map(lambda x: x[:rows], batch)
  run, metrics = jax.jit(step)(start(trainable, {}, optimiser), tiny_weights.params, batch)
  assert int(run.step) == 1 and int(run.nan_step) == -1
  return metrics, run.trainable["classifier"]


def step_by_hand(probe, weight):
  """Loss and gradients of the classifier in numpy."""
  _, trainable, batch, features = probe
  kernel, bias = (np.asarray(trainable["classifier"][k], np.float64) for k in ("kernel", "bias"))
  logits = features @ kernel + bias
  target = np.eye(4)[batch["label"]]
  p = np.exp(logits - logits.max(1, keepdims=True))
  each = (p / p.sum(1, keepdims=True) - target) * (weight / weight.sum())[:, None]
  return cross_entropy_by_hand(logits, target, weight), {"kernel": features.T @ each, "bias": each.sum(0)}


@pytest.mark.parametrize("how", [{}, {"class_weights": np.float32([0.5, 2.0, 1.0, 4.0])}, {"micro_batches": 3},
                                 {"micro_batches": 12}], ids=["plain", "class_weights", "in_3_parts", "row_by_row"])
def test_a_step_by_hand(probe, tiny_spec, tiny_weights, how):
  """Loss, gradient norm and new parameters; padding spreads unevenly over the parts, class weights are per example."""
  weight = probe[2]["weight"].astype(np.float64)
  if "class_weights" in how:
    weight = weight * how["class_weights"][probe[2]["label"]]
  loss, gradient = step_by_hand(probe, weight)
  metrics, after = one_step(probe, tiny_spec, tiny_weights, **how)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=0, atol=1e-6)
  norm = np.sqrt(sum(np.sum(g ** 2) for g in gradient.values()))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=2e-6)
  for name, g in gradient.items():
    np.testing.assert_allclose(after[name], probe[1]["classifier"][name] - 0.1 * g, rtol=0, atol=1e-6)


def test_padding_rows_change_nothing(probe, tiny_spec, tiny_weights):
  (found, after), (wanted, without) = (one_step(probe, tiny_spec, tiny_weights, rows) for rows in (None, 7))
  chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-6)
  chex.assert_trees_all_close(after, without, rtol=0, atol=1e-6)


def test_the_first_bad_step_is_remembered(probe, tiny_spec, tiny_weights):
  """A NaN is noted on the device with its step's number, and later steps do not overwrite it."""
  method, trainable, batch, _ = probe
  optimiser = make_optimiser(Optim("sgd"), lambda step: 0.1, trainable)
  step = jax.jit(make_step(method, backbones.build(tiny_spec), optimiser, Preprocessing(16), 4))
  bad, run, seen = {**batch, "weight": np.full(12, np.nan, np.float32)}, start(trainable, {}, optimiser), []
  for b in (batch, bad, batch):
    run, _ = step(run, tiny_weights.params, b)
    seen.append(int(run.nan_step))
  assert seen == [-1, 2, 2]


def test_randomness_follows_seed_step_and_part(tiny_spec, tiny_weights):
  """Every step draws anew, and what it draws is a function of seed and step alone: a resumed run draws the same."""
  probe = methods.build("linear", tiny_spec)
  method = probe._replace(  # a loss that is what its rng draws
      loss=lambda trainable, outputs, ctx: jax.random.uniform(ctx.rng) + 0 * outputs.logits.sum())
  trainable, _ = method.init(jax.random.key(0), tiny_weights.params, 4)
  optimiser = make_optimiser(Optim("sgd"), lambda step: 0.1, trainable)
  batch = {"image": np.zeros((2, 16, 16, 3), np.uint8), "label": np.zeros(2, np.int32),
           "weight": np.ones(2, np.float32)}
  first = start(trainable, {}, optimiser)
  def draws(**how):
    step = jax.jit(make_step(method, backbones.build(tiny_spec), optimiser, Preprocessing(16), 4, **how))
    return [float(step(first._replace(step=jnp.int32(n)), tiny_weights.params, batch)[1]["loss"]) for n in (0, 1, 2, 1)]
  found, other, parts = draws(), draws(seed=1), draws(micro_batches=2)
  assert len({*found, *other, *parts}) == 9 and found[1] == found[3]
  rng = jax.random.fold_in(jax.random.key(0), 1)
  each = [float(jax.random.uniform(jax.random.fold_in(rng, part))) for part in range(2)]  # parts do not draw the same
  np.testing.assert_allclose([found[1], parts[1]], [float(jax.random.uniform(rng)), np.mean(each)], rtol=1e-6)


def test_a_batch_that_the_devices_do_not_divide_is_filled_with_rows_that_do_not_count():
  batch = {"image": np.arange(6 * 3, dtype=np.uint8).reshape(6, 3), "weight": np.ones(6, np.float32)}
  put = devices.put_batch(batch, devices.make_mesh(4))
  np.testing.assert_array_equal(put["image"], batch["image"][[0, 1, 2, 3, 4, 5, 5, 5]])
  np.testing.assert_array_equal(put["weight"], [1, 1, 1, 1, 1, 1, 0, 0])
  assert {shard.data.shape for shard in put["image"].addressable_shards} == {(2, 3)} and len(batch["weight"]) == 6
  with pytest.raises(ValueError, match="5 devices asked for and 4 found"):
    devices.make_mesh(5)
