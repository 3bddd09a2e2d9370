"""Head2Toe's relatives: several fractions at once, whole layers, the backbone tuned along, training from scratch; and
Head2Toe and InCA on a ResNet."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferlab as tl
from transferlab import backbones, losses, methods, tree
from transferlab.backbones.spec import Preprocessing, ResNetSpec
from transferlab.checkpoint import load_adapter
from transferlab.method import Context, forward, predict
from transferlab.methods.head2toe import layout_of
from transferlab.methods.head2toe_features import Layout, pool, score
from transferlab.methods.head2toe_layers import layer_means
from transferlab.optim import Optim, make_optimiser
from transferlab.step import compile_step, make_step, start
from transferlab.testing import PROPERTIES, Case, Expected

T = {"target_size": 64}
FEW = {"target_size": 64, "sites": ("patch", "block_01/attn", "block_01/fc1", "pooled")}  # 64, 64, 64 and 16 features
FRACTIONS = (0.02, 0.2, 0.07)
RECIPE = Optim("adam_keras", lr=0.02, weight_decay=0.0, eps=1e-7)
B, C = 6, 3


def first_kernel(spec, seed: int = 0, **reading):
  """A trainable of the first stage, from which the second takes its features."""
  rng, count = np.random.default_rng(seed), layout_of(spec, **(reading or FEW)).total
  return {"classifier": {"kernel": rng.standard_normal((count, C)).astype(np.float32), "bias": np.zeros(C, np.float32)}}


def second(spec, name: str = "head2toe", seed: int = 0, **options):
  return methods.build(name, spec, **{**FEW, **options}).then(first_kernel(spec, seed), {})


def activations(spec) -> dict:
  """Cached activations of B images, made up; negative ones too."""
  rng, layout = np.random.default_rng(0), layout_of(spec, **FEW)
  return {tap: rng.standard_normal((B, size)).astype(np.float32) for tap, size in zip(layout.names, layout.sizes)}


def run(method, spec, steps: int = 6):
  """(state, trainables after every step) of training on the cached activations."""
  trainable, state = method.init(jax.random.key(3), {}, C)
  optimiser = make_optimiser(RECIPE, lambda step: 0.02, trainable)
  step, found = make_step(method, None, optimiser, Preprocessing(16), C), [trainable]
  now = start(*jax.tree.map(jnp.array, (trainable, state)), optimiser)
  batch = {"activations": activations(spec), "label": np.arange(B, dtype=np.int32) % C,
           "weight": np.float32([1] * (B - 1) + [0])}
  compiled = compile_step(step, now, {}, batch)
  for _ in range(steps):
    now, _ = compiled(now, {}, batch)
    found.append(jax.tree.map(np.array, now.trainable))
  return state, found


def close(found, wanted, tolerance=1e-6):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found, wanted)


# --- Several fractions ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [{}, {"normalisation": "none", "compat": "paper"}], ids=["unit", "none"])
def test_every_fraction_trains_as_it_would_alone(tiny_spec, how):
  """Initial values, six steps, and the features: those of a fraction are the first of the largest's."""
  state, together = run(second(tiny_spec, fraction=FRACTIONS, **how), tiny_spec)
  assert list(together[0]["classifier"]) == ["0.02", "0.2", "0.07"]
  for fraction in FRACTIONS:
    kept, alone = run(second(tiny_spec, fraction=fraction, **how), tiny_spec)
    K = int(fraction * 208)
    np.testing.assert_array_equal(state["kept"][:K], kept["kept"])
    assert alone[0]["classifier"]["kernel"].shape == (K, C) and not np.allclose(
        alone[0]["classifier"]["kernel"], alone[-1]["classifier"]["kernel"], atol=1e-2)
    close([step["classifier"][str(fraction)] for step in together], [step["classifier"] for step in alone])


def outputs_of(method, trainable, state, acts):
  return forward(method, None, trainable, acts, Context(state=state))


def test_a_fraction_sees_no_features_but_its_own(tiny_spec):
  method = second(tiny_spec, fraction=FRACTIONS)
  trainable, state = method.init(jax.random.key(0), {}, C)
  layout, kept = layout_of(tiny_spec, **FEW), np.array(state["kept"])
  acts = activations(tiny_spec)
  outside = layout.split(np.setdiff1d(np.arange(layout.total), kept[:int(0.07 * 208)]))
  other = {tap: x.copy() for tap, x in acts.items()}
  for tap, places in outside.items():
    other[tap][:, places] *= 3
  a, b = (method.members(outputs_of(method, trainable, state, x)) for x in (acts, other))
  for member in ("0.02", "0.07"):
    np.testing.assert_array_equal(a[member], b[member])
  assert not np.allclose(a["0.2"], b["0.2"])


def test_until_one_is_chosen_the_logits_are_the_mean(tiny_spec):
  method = second(tiny_spec, fraction=FRACTIONS)
  trainable, state = method.init(jax.random.key(0), {}, C)
  outputs = outputs_of(method, trainable, state, activations(tiny_spec))
  members = method.members(outputs)
  assert set(members) == {"0.02", "0.07", "0.2"} and all(x.shape == (B, C) for x in members.values())
  np.testing.assert_allclose(outputs.logits, np.mean(list(members.values()), axis=0), atol=1e-6)
  batch = {"target": jax.nn.one_hot(np.arange(B) % C, C), "weight": jnp.float32([1, 1, 1, 1, 0, 0])}
  each = sum(losses.cross_entropy(x, batch) for x in members.values())
  np.testing.assert_allclose(method.loss(trainable, outputs, Context(batch)), each, rtol=1e-6)
  paper = second(tiny_spec, fraction=FRACTIONS, compat="paper")  # 4 examples of the nominal 6
  np.testing.assert_allclose(paper.loss(trainable, outputs, Context(batch)), each * 4 / 6, rtol=1e-6)


def test_heads_with_features_of_their_own_share_one_program(tiny_spec):
  """What is kept comes from the state: two heads stacked on an axis, stages and all, are the two apart."""
  options = {"fraction": FRACTIONS, "coefficient": 1e-3}
  first, acts = methods.build("head2toe", tiny_spec, **FEW, **options), activations(tiny_spec)
  made = [first.then(first_kernel(tiny_spec, seed), {}).init(jax.random.key(seed), {}, C) for seed in range(2)]
  assert not np.array_equal(made[0][1]["kept"], made[1][1]["kept"])
  stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

  def start_of(kernel, rng):
    return first.then(kernel, {}).init(rng, {}, C)
  seeds = jnp.stack([jax.random.key(seed) for seed in range(2)])
  stacked = jax.vmap(start_of)(stack([first_kernel(tiny_spec, seed) for seed in range(2)]), seeds)
  close(stacked, stack(made))

  shared = second(tiny_spec, **options)  # whose own selection is that of seed 0
  logits = jax.jit(jax.vmap(lambda trainable, state: shared.members(outputs_of(shared, trainable, state, acts))))
  found = logits(*stacked)
  for k, (trainable, state) in enumerate(made):
    own = second(tiny_spec, seed=k, **options)
    close({m: x[k] for m, x in found.items()}, own.members(outputs_of(own, trainable, state, acts)), 1e-5)


LABELS = np.array([0, 1, 2, 0])
RIGHT = 4.0 * np.eye(3)[LABELS]


@pytest.mark.parametrize("logits, best", [
    ({"0.02": RIGHT[:, ::-1], "0.2": RIGHT, "0.07": -RIGHT}, 0.2),     # the most accurate
    ({"0.02": 0.1 * RIGHT, "0.2": 0.5 * RIGHT, "0.07": RIGHT}, 0.07),  # of equals that of the lower loss
    ({"0.02": 0.1 * RIGHT, "0.2": RIGHT, "0.07": RIGHT}, 0.07)])       # then the smaller
def test_validation_chooses_a_fraction(tiny_spec, logits, best):
  method = second(tiny_spec, fraction=FRACTIONS, coefficient=1e-5)
  trainable, state = method.init(jax.random.key(0), {}, C)
  alone, one, kept = method.choose(trainable, state, {m: np.float32(x) for m, x in logits.items()}, LABELS)
  assert alone.options == {**method.options, "fraction": best} and alone.options["coefficient"] == 1e-5
  assert alone.members is None and alone.choose is None and alone.then is None
  K = int(best * 208)
  assert kept["kept"].shape == (K,) and one["classifier"]["kernel"].shape == (K, C)
  acts = activations(tiny_spec)
  before = method.members(outputs_of(method, trainable, state, acts))[str(best)]
  np.testing.assert_array_equal(outputs_of(alone, one, kept, acts).logits, before)
  again = methods.build("head2toe", tiny_spec, **{**method.options, **method.member_options(str(best))})
  assert again.options == alone.options


def test_keeping_everything_needs_no_selection(tiny_spec):
  for name in ("head2toe", "head2toe_layers"):
    method = methods.build(name, tiny_spec, fraction=1.0, **FEW)
    np.testing.assert_array_equal(method.init(jax.random.key(0), {}, C)[1]["kept"], np.arange(208))
    assert method.then is None
  assert methods.build("head2toe", tiny_spec, fraction=(0.1, 1.0), **FEW).then  # one of them selects


@pytest.mark.parametrize("name, fraction, message", [
    ("head2toe", (), "fraction is empty; expected a number such as 0.01"),
    ("head2toe", (0.1, 0.1), "fraction 0.1 is there twice"),
    ("head2toe", (0.1, "0.2"), "fraction '0.2' is no number"),
    ("head2toe", (0.1, 1e-4), "fraction 0.0001 keeps 0 of 208 features; expected 1 to 208"),
    ("head2toe", (0.1, float("inf")), "fraction inf is no number"), ("head2toe", float("nan"), "fraction nan is no"),
    ("head2toe_layers", 2.0, "fraction 2.0 keeps 416 of 208"),
    ("head2toe_ft", (0.1, 0.2), "option 'fraction' of method 'head2toe_ft' is (0.1, 0.2); expected float")])
def test_wrong_fractions_are_one_line_errors(tiny_spec, name, fraction, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, tiny_spec, fraction=fraction, **FEW)
  assert message in str(error.value) and "\n" not in str(error.value)


# --- Whole layers ---------------------------------------------------------------------------------------------------

def test_layers_are_ranked_by_the_mean_of_their_scores():
  layout = Layout(("a", "b", "c"), (2, 3, 1))
  found = layer_means(jnp.float32([9, 1, 4, 4, 5, 4]), layout)  # the single best feature is in none of the best layers
  np.testing.assert_allclose(found, [5, 5, 13 / 3, 13 / 3, 13 / 3, 4], rtol=1e-6)


def test_whole_layers_are_kept_and_the_last_one_filled_up(tiny_spec):
  layout, kernel = layout_of(tiny_spec, **FEW), first_kernel(tiny_spec)
  kept = np.array(second(tiny_spec, "head2toe_layers", fraction=0.5).init(jax.random.key(0), {}, C)[1]["kept"])
  assert len(kept) == len(set(kept)) == int(0.5 * 208)  # as many as head2toe keeps
  scores, found = np.array(score(kernel["classifier"]["kernel"])), layout.split(kept)
  ends = np.cumsum(layout.sizes)
  means = {name: scores[end - size:end].mean() for name, size, end in zip(layout.names, layout.sizes, ends)}
  left, sizes = len(kept), dict(zip(layout.names, layout.sizes))
  for name in sorted(means, key=means.get, reverse=True):
    np.testing.assert_array_equal(found[name], np.arange(min(left, sizes[name])))
    left -= len(found[name])
  partial = [name for name in found if 0 < len(found[name]) < sizes[name]]
  assert left == 0 and len(partial) == 1


def test_layers_take_several_fractions_too(tiny_spec):
  found = second(tiny_spec, "head2toe_layers", fraction=(0.1, 0.2)).init(jax.random.key(0), {}, C)
  assert list(found[0]["classifier"]) == ["0.1", "0.2"]


# --- The backbone tuned along ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shallow(random_weights, tiny_spec):
  return random_weights(dataclasses.replace(tiny_spec, depth=2))


def images(spec, count: int = 2):
  return np.random.default_rng(0).standard_normal((count, spec.image_size, spec.image_size, 3)).astype(np.float32)


def test_tuning_starts_from_the_frozen_backbone_with_the_same_selection(shallow):
  frozen, tuned = (second(shallow.spec, name, fraction=0.1) for name in ("head2toe", "head2toe_ft"))
  apply, params, x = backbones.build(shallow.spec), shallow.params, images(shallow.spec)
  head, state = frozen.init(jax.random.key(0), params, C)
  trainable, same = tuned.init(jax.random.key(0), params, C)
  assert trainable.keys() == {"backbone", "classifier"} and not tuned.frozen and not tuned.reads
  close((trainable["classifier"], same), (head["classifier"], state), 0)
  logits = lambda method, *of: jax.jit(lambda *args: predict(method, apply, *args, x))(*of)
  np.testing.assert_allclose(logits(tuned, trainable, same, {}), logits(frozen, head, state, params), atol=1e-5)
  assert methods.build("head2toe_ft", shallow.spec, **T).writes_from == shallow.spec.depth  # its first stage is frozen


def test_gradients_of_tuning_by_hand(shallow):
  """The kept features of three sites, recomputed and scaled by layer, with gradients into the backbone."""
  sites = ("patch", "block_01/attn", "pooled")
  reading = {"target_size": 64, "sites": sites}
  first = methods.build("head2toe_ft", shallow.spec, fraction=0.3, **reading)
  method, layout = first.then(first_kernel(shallow.spec, **reading), {}), layout_of(shallow.spec, **reading)
  trainable, state = method.init(jax.random.key(0), shallow.params, C)
  apply, x = backbones.build(shallow.spec), images(shallow.spec)
  kept, target = np.array(state["kept"]), {"target": jnp.eye(2, C), "weight": jnp.ones(2)}

  def ours(trainable):
    context = Context(target, state, {}, {}, None, True)
    return method.loss(trainable, forward(method, apply, trainable, x, context), context)

  def by_hand(trainable):
    def keep(carry, site, y, inputs):
      return {**carry, site: y} if site in sites else carry, y
    params = trainable["backbone"]
    _, seen = apply.apply(params, x, keep, {})
    seen["patch"] = jnp.concatenate([jnp.repeat(params["cls"], 2, axis=0), seen["patch"]], axis=1)
    parts = []
    for site, places in layout.split(np.sort(kept)).items():
      part = pool(seen[site], 64)[:, places]
      parts.append(part / jnp.linalg.norm(part, axis=1, keepdims=True))
    order = np.argsort(kept)
    logits = jnp.concatenate(parts, axis=1) @ trainable["classifier"]["kernel"][order] + trainable["classifier"]["bias"]
    return losses.cross_entropy(logits, target)

  found, wanted = (jax.jit(jax.value_and_grad(f))(trainable) for f in (ours, by_hand))
  close(found, wanted, 1e-5)
  assert np.any(tree.flatten(found[1])["backbone/cls"])


def test_the_fine_tuning_baseline_scales_its_features(shallow):
  method = methods.build("head2toe_ft", shallow.spec, sites="pooled", fraction=1.0)
  trainable, state = method.init(jax.random.key(0), shallow.params, C)
  apply, x = backbones.build(shallow.spec), images(shallow.spec)
  features, _ = apply.apply(shallow.params, x)
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  np.testing.assert_allclose(predict(method, apply, trainable, state, {}, x), unit @ trainable["classifier"]["kernel"],
                             atol=1e-6)


def test_both_stages_of_tuning_have_the_whole_schedule(shallow, tiny_task, tmp_path):
  """The second begins anew; the heads' factor of the rate holds in both; the result comes back from its file."""
  optim = Optim("adam_keras", lr=1e-4, weight_decay=0.0, eps=1e-7, lr_factors=(("classifier/.*", 100.0),))
  recipe = tl.Recipe(duration="2 epochs", batch_size=8, devices=1, optim=optim, log_every="1 steps", select="last")
  run = tl.fit(shallow, "head2toe_ft", tiny_task, recipe, options={"fraction": 0.1, **FEW}, workdir=tmp_path,
               quiet=True)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  rates = [[row["lr"] for row in rows if row["stage"] == stage and "lr" in row] for stage in (0, 1)]
  assert rates[0] == rates[1] and rates[0][0] == pytest.approx(1e-4) and len(rates[0]) == 10
  found = load_adapter(run.adapter)
  assert found.method.name == "head2toe_ft" and found.method.then is None
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found.trainable["backbone"], shallow.params)
  assert 0 < max(jax.tree.leaves(moved)) < 3e-3  # ten steps of 1e-4 at most
  assert run.result["trainable_without_classifier"] == sum(leaf.size for leaf in jax.tree.leaves(shallow.params))


def test_frozen_and_tuned_can_be_swept_over_by_name():
  """Head2Toe-FT+ is that choice."""
  assert methods.options_of("head2toe") == methods.options_of("head2toe_ft")


# --- From scratch ---------------------------------------------------------------------------------------------------

def test_scratch_takes_nothing_of_the_weights_but_their_shapes(tiny_spec, tiny_weights):
  method = methods.build("scratch", tiny_spec)
  draw = jax.jit(lambda seed, params: method.init(jax.random.key(seed), params, C)[0])
  other = jax.tree.map(lambda leaf: leaf + 1, tiny_weights.params)
  a, b, c = draw(0, tiny_weights.params), draw(0, other), draw(1, tiny_weights.params)
  close(a, b, 0)
  for name, leaf in tree.flatten(a["backbone"]).items():
    assert not np.array_equal(leaf, tree.flatten(tiny_weights.params)[name])
    if name.endswith("kernel"):
      assert not np.array_equal(leaf, tree.flatten(c["backbone"])[name]) and np.std(leaf) > 0.01
  wanted = backbones.build(tiny_spec).apply(a["backbone"], images(tiny_spec))[0]
  np.testing.assert_array_equal(backbones.build(tiny_spec).apply(method.weights(a, {}), images(tiny_spec))[0], wanted)


# --- On a ResNet ----------------------------------------------------------------------------------------------------

V2 = ResNetSpec("tiny_v2", 16, (1, 1), (8, 16), 8, version=2)
BIT = dataclasses.replace(V2, name="tiny_bit", norm="group", groups=2)


def test_scratch_needs_norms_without_batch_statistics():
  with pytest.raises(ValueError, match="^scratch needs norms without batch statistics; tiny_v2 has none. Methods for"):
    methods.build("scratch", V2)
  assert methods.fits("scratch", BIT) and methods.build("scratch", BIT).merge


CASES = {}
ON_RESNETS = {"all_features": T, "head2toe": {"fraction": (0.05, 0.1), **T}, "linear": {}, "inca": {}}


PROPERTIES_HERE = [(method, name) for method in ON_RESNETS for name in ("devices", "micro_batches")]


@pytest.mark.parametrize("method, name", [
    pytest.param(*pair, marks=() if pair[0] == "head2toe" else pytest.mark.full) for pair in PROPERTIES_HERE])
def test_property_on_a_resnet(method, name):
  PROPERTIES[name](CASES.setdefault(method, Case(method, V2, Expected(options=ON_RESNETS[method]))))


@pytest.mark.parametrize("name", ["gradient", "frozen"])
def test_property_of_tuning_on_a_resnet(name):
  """Batch statistics, which stay, are the frozen parameters that it needs."""
  options = {"fraction": 0.1, **T}
  PROPERTIES[name](CASES.setdefault("head2toe_ft", Case("head2toe_ft", V2, Expected(options=options))))


@pytest.mark.parametrize("method", ON_RESNETS)
def test_methods_train_on_a_resnet(random_weights, tiny_task, tmp_path, method):
  recipe = tl.Recipe(duration="10 epochs", batch_size=8, devices=1, optim=Optim(lr=0.01, weight_decay=0.0),
                     evaluate_every="10 epochs")
  found = tl.fit(random_weights(V2), method, tiny_task, recipe, options=ON_RESNETS[method],
                 workdir=tmp_path, quiet=True)
  assert found.result["test"]["accuracy"] > 0.4  # chance is 0.25
  if method == "head2toe":  # of its fractions validation chose one, and that is what the file holds
    loaded = load_adapter(found.adapter).method
    assert loaded.options == found.method.options and loaded.options["fraction"] in (0.05, 0.1) and not loaded.members
