"""InCA against a float64 oracle of our reading of it (no public code exists), and what makes parallel adapters worth
having: isolation, the folded computation, classes that come and go, the choice among them.

The goldens say that the code is right about that reading, not about the paper.
"""
import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import colours, recipe

from transferlab import backbones, data, ensembles, losses, methods, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.checkpoint import load_adapter
from transferlab.cost import flops
from transferlab.evaluate import collect_members
from transferlab.method import Context, forward, predict, sizes
from transferlab.methods import cross_attention as ca
from transferlab.methods.inca import add_classes, at_sites, combined, keep_classes
from transferlab.optim import Optim, make_optimiser
from transferlab.step import make_step, start
from transferlab.stage import Stage
from transferlab.train import fit

SINGLE = ["g01_inca_h1", "g02_inca_h4", "g03_inca_nobias", "g04_inca_lnin", "g05_inca_m3", "g06_inca_spatial",
          "g07_open_inca"]
PRECISIONS = [("float64", 1e-10), ("float32", 2e-6)]
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # 2/3 of the time to compile


def close(found, wanted, tolerance):
  """Same names, and every leaf to `tolerance` of its largest value or of 1."""
  found, wanted = tree.flatten(found), tree.flatten(wanted)
  assert found.keys() == wanted.keys()
  chex.assert_trees_all_equal_shapes(found, wanted)
  for name, leaf in wanted.items():
    np.testing.assert_allclose(found[name], leaf, rtol=0, atol=tolerance * max(1, np.abs(leaf).max()), err_msg=name)


def native(arrays, prefix, open_head=False):
  """(adapter, head) of the oracle's names under a prefix; the key bias is left out."""
  part = lambda name: arrays[f"{prefix}{name}"]
  pair = lambda name: {"kernel": part(f"w{name}"), "bias": part(f"b{name}")}
  norm = lambda name: {"scale": part(f"{name}_scale"), "bias": part(f"{name}_bias")}
  adapter = {"query": part("query"), "q": pair("q"), "k": {"kernel": part("wk")}, "v": pair("v"), "out": pair("o"),
             "norm": norm("ln")}
  if f"{prefix}lnin_scale" in arrays:
    adapter["norm_tokens"] = norm("lnin")
  return adapter, {"kernel": part("head_w").T if open_head else part("head_w"), "bias": part("head_b")}


def read(golden, name, dtype):
  """(arrays of `dtype` as jax's, the file's notes)"""
  with np.load(golden(f"inca/{name}.npz"), allow_pickle=False) as file:
    notes = json.loads(str(file["meta"]))
    return {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in file.items() if n != "meta"}, notes


def batch_of(labels, num_classes, dtype):
  return {"target": jax.nn.one_hot(labels, num_classes, dtype=dtype), "weight": jnp.ones(len(labels), dtype)}


# --- Goldens --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", SINGLE)
def test_golden(golden, monkeypatch, name, dtype, tolerance):
  """Attention, pooled tokens, features, logits, loss and the gradient of every leaf, both ways of computing them."""
  with jax.enable_x64(dtype == "float64"):
    arrays, notes = read(golden, name, dtype)
    is_open = notes["open_head"]
    pair, z, labels = native(arrays, "in_p_", is_open), arrays["in_z"], arrays["in_y"]
    head_of = ca.diagonal_head if is_open else ca.linear_head

    def loss(pair, z, way):
      adapter, head = pair
      monkeypatch.setattr(ca, "cheaper_folded", lambda *shape: way is ca.folded)
      pooled, weights = way(adapter, ca.tokens_of(adapter, z))
      y = ca.features(adapter, z)
      logits = head_of(head, y)
      seen = {"attn": weights, "pooled": pooled, "feat": y, "logits": logits}
      return losses.cross_entropy(logits, batch_of(labels, logits.shape[1], dtype)), seen

    gradient_of = jax.value_and_grad(loss, has_aux=True)
    both = quick(lambda pair, z: [gradient_of(pair, z, way) for way in (ca.direct, ca.folded)])
    wanted = native(arrays, "out_g_", is_open)
    assert len(jax.tree.leaves(wanted)) + 1 == sum(n.startswith("out_g_") for n in arrays)  # all but the key bias
    for (value, seen), gradient in both(pair, z):
      assert seen["logits"].dtype == dtype
      close({**seen, "loss": value}, {k: arrays[f"out_{k}"] for k in (*seen, "loss")}, tolerance)
      close(dict(enumerate(gradient)), dict(enumerate(wanted)), tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_golden_of_parallel_adapters(golden, dtype, tolerance):
  """Gradients of one summed loss, and three AdamW steps in which each adapter has its own rate and decay."""
  with jax.enable_x64(dtype == "float64"):
    arrays, notes = read(golden, "g09_parallel_adamw", dtype)
    names = [f"a{i}" for i in range(notes["n"])]
    pack = lambda prefix: {a: dict(zip(("adapter", "head"), native(arrays, prefix.format(a)))) for a in names}
    trainable, z = pack("in_{}_p_"), {a: arrays[f"in_{a}_z"] for a in names}
    rows = lambda values: tuple((f"{a}/.*", value) for a, value in zip(names, values))
    optim = Optim(lr=1.0, weight_decay=1.0, decay=rows(notes["wd"]), lr_factors=rows(notes["lr"]))
    optimiser = make_optimiser(optim, lambda step: 1.0, trainable)

    def loss(trainable):
      logits = {a: ca.linear_head(trainable[a]["head"], ca.features(trainable[a]["adapter"], z[a])) for a in names}
      each = {a: losses.cross_entropy(logits[a], batch_of(arrays["in_y"], 5, dtype)) for a in names}
      return sum(each.values()), (each, logits)

    @quick
    def step(trainable, state):
      (total, seen), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
      updates, state = optimiser.update(gradient, state, trainable)
      return jax.tree.map(jnp.add, trainable, updates), state, gradient, total, seen

    state, path = optimiser.init(trainable), []
    for t in range(notes["steps"]):
      trainable, state, gradient, total, (each, logits) = step(trainable, state)
      path.append(each)
      if t == 0:
        close(logits, {a: arrays[f"out_{a}_logits"] for a in names}, tolerance)
        close({"sum": total}, {"sum": arrays["out_sum_loss"]}, tolerance)
        close(gradient, pack("out_{}_g_"), tolerance)
    close({a: np.array([each[a] for each in path]) for a in names}, {a: arrays[f"out_{a}_losses"] for a in names},
          tolerance)
    close(trainable, pack("out_{}_after_"), tolerance)


# --- One adapter ----------------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).standard_normal((10, 16, 16, 3)).astype(np.float32)
THREE = "block_00/(mid|out)|norm"


@pytest.fixture(scope="module")
def small(tiny_spec, random_weights):
  """Weights of one block, which compiles quickly."""
  return random_weights(dataclasses.replace(tiny_spec, depth=1))


def arbitrary(make, *args, seed=0):
  """Numbers of the shapes that `make(rng, *args)` gives, drawn on the host: compiling initialisers takes seconds."""
  rng, shapes = np.random.default_rng(seed), jax.eval_shape(lambda rng: make(rng, *args), jax.random.key(0))
  draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
  return jax.tree.map(lambda x: 1 + 0.1 * draw(x) if x.ndim == 1 else draw(x) * x.shape[0] ** -0.5, shapes)


def init(method, num_classes, seed=0):
  """A trainable of the host, none of its leaves 0."""
  return arbitrary(lambda rng: method.init(rng, None, num_classes)[0], seed=seed)


def moved(params, by=0.1, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + by * rng.standard_normal(x.shape).astype(np.float32), params)


@pytest.mark.parametrize("shape, heads, queries, norm_tokens",
                         [((2, 17, 16), 2, 1, False), ((2, 4, 5, 12), 3, 4, True)])
def test_both_ways_are_one_function(shape, heads, queries, norm_tokens):
  """Values and gradients, those of the tokens included, which no training uses."""
  adapter = arbitrary(ca.init, shape[-1], heads, queries, norm_tokens)
  x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
  def run(way):
    def value(adapter, x):
      pooled, weights = way(adapter, ca.tokens_of(adapter, x))
      return jnp.sum(jnp.sin(pooled)), (pooled, weights)
    return quick(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(adapter, x)
  chex.assert_trees_all_close(run(ca.folded), run(ca.direct), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens, width, heads, queries", [(197, 96, 6, 1), (50, 96, 6, 16), (50, 96, 6, 24),
                                                          (50, 96, 1, 50), (5, 96, 6, 8)])
def test_the_way_that_is_chosen_has_fewer_flops(tokens, width, heads, queries):
  """By XLA's own count. At the shapes between, where both are near, the multiply-adds of the formula decide."""
  adapter = arbitrary(ca.init, width, heads, queries)
  x = jax.ShapeDtypeStruct((64, tokens, width), jnp.float32)
  count = lambda way: flops(jax.jit(lambda x: way(adapter, x)[0]).lower(x).compile())
  assert ca.cheaper_folded(tokens, width, heads, queries) == (count(ca.folded) < count(ca.direct))


def test_cost_of_the_paper_sizes():
  """ViT-L/16: one query folds; Open-InCA of 100 classes does not, of 50 it does (the bound is near 68)."""
  assert ca.cheaper_folded(197, 1024, 16, 1) and ca.cheaper_folded(197, 1024, 16, 50)
  assert not ca.cheaper_folded(197, 1024, 16, 100)


def test_order_of_the_tokens_does_not_matter():
  adapter, features = arbitrary(ca.init, 16, 4, 2), quick(ca.features)
  x = np.random.default_rng(0).standard_normal((2, 9, 16)).astype(np.float32)
  chex.assert_trees_all_close(features(adapter, x), features(adapter, x[:, ::-1]), rtol=0, atol=1e-5)


def test_initial_values():
  adapter = ca.init(jax.random.key(0), 256, 4, 8)
  chex.assert_shape([adapter["query"], adapter["q"]["kernel"], adapter["out"]["kernel"]],
                    [(8, 256), (256, 4, 64), (4, 64, 256)])
  np.testing.assert_allclose(np.std(adapter["query"]), 0.02, rtol=0.1)
  bound = (6 / 512) ** 0.5
  kernels = [adapter[name]["kernel"].reshape(-1) for name in ("q", "k", "v", "out")]
  for kernel in kernels:
    assert 0.99 * bound < np.abs(kernel).max() <= bound
  assert len({float(kernel[0]) for kernel in kernels}) == 4 and "bias" not in adapter["k"]
  head = ca.init_head(256, 5)
  assert not np.any(head["kernel"]) and head["kernel"].shape == (256, 5)


# --- Classes that come and go ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("before, added", [(3, 4), (10, 40)])
def test_classes_come_and_go_without_touching_the_others(small, before, added):
  """Also where more queries change the way of computing (10 queries fold here, 50 do not)."""
  assert ca.cheaper_folded(17, 16, 2, before) and ca.cheaper_folded(17, 16, 2, before + added) == (before + added < 20)
  method, backbone = methods.build("open_inca", small.spec, sites="block_00/(mid|out)"), backbones.build(small.spec)
  logits = quick(lambda trainable: predict(method, backbone, trainable, {}, small.params, IMAGES))
  trainable = init(method, before)
  grown = add_classes(trainable, jax.random.key(1), added)
  chex.assert_trees_all_equal_shapes(grown, init(method, before + added))
  old, new = logits(trainable), logits(grown)
  allowed = 2e-6 * max(1, np.abs(old).max())
  np.testing.assert_allclose(new[:, :before], old, rtol=0, atol=allowed)
  assert np.any(old) and not np.any(new[:, before:])  # the head of a new class is zero
  fresh = [adapter["query"][before:] for adapter in grown["adapters"]["block_00"].values()]
  assert not np.array_equal(*fresh)
  np.testing.assert_allclose(logits(keep_classes(grown, [2, 0])), old[:, [2, 0]], rtol=0, atol=allowed)
  chex.assert_trees_all_equal(keep_classes(grown, range(before)), trainable)


@pytest.mark.parametrize("classes", [[0, 3], [-1], [1, 1], []])
def test_classes_to_keep_are_checked(classes):
  with pytest.raises(ValueError, match="expected different indices from 0 to 2"):
    ca.keep_classes(arbitrary(ca.init, 8, 2, 3), ca.init_head(8, 3), classes)


def test_a_class_of_open_inca_does_not_know_the_others():
  """Only its own query and column move a logit."""
  adapter, head = arbitrary(ca.init, 8, 2, 4), moved(ca.init_head(8, 4))
  x = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)
  logit = lambda query, kernel: ca.diagonal_head({**head, "kernel": kernel},
                                                 ca.features({**adapter, "query": query}, x))[0, 1]
  query, kernel = quick(jax.grad(logit, argnums=(0, 1)))(adapter["query"], head["kernel"])
  assert np.flatnonzero(np.any(query, axis=1)).tolist() == [1] == np.flatnonzero(np.any(kernel, axis=0)).tolist()


# --- Many adapters --------------------------------------------------------------------------------------------------

@functools.lru_cache
def step_of(spec, name, sites, optim):
  """(optimiser, compiled step) of a method on batches of 8; the tests below share them."""
  method, backbone = methods.build(name, spec, sites=sites), backbones.build(spec)
  optimiser = make_optimiser(optim, lambda step: 0.05, init(method, 4))
  return optimiser, quick(make_step(method, backbone, optimiser, Preprocessing(16), 4))


def trained(weights, name, sites, optim, *starts, steps=3):
  """The trainables that some steps on noise make of these."""
  optimiser, step = step_of(weights.spec, name, sites, optim)
  rng, results = np.random.default_rng(0), []
  batch = {"image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8), "label": np.arange(8, dtype=np.int32) % 4,
           "weight": np.float32([1] * 7 + [0])}
  for trainable in starts:
    run = start(trainable, {}, optimiser)
    for _ in range(steps):
      run, _ = step(run, weights.params, batch)
    results.append(jax.tree.map(np.array, run.trainable))
  return results


@pytest.mark.parametrize("name, optimiser", [("inca", "sgd"), ("inca", "adamw"), ("open_inca", "adamw")])
def test_adapters_do_not_know_each_other(small, name, optimiser):
  """Another start of one adapter leaves the parameters of all others bit-identical after three steps."""
  trainable = init(methods.build(name, small.spec, sites=THREE), 4)
  other = jax.tree.map(lambda x: x, trainable)
  other["adapters"]["block_00"]["mid"] = moved(other["adapters"]["block_00"]["mid"], seed=1)
  a, b = map(tree.flatten, trained(small, name, THREE, Optim(optimiser), trainable, other))
  of_it = {n for n in a if n.partition("/")[2].startswith("block_00/mid/")}
  assert len(of_it) == 12 and all(not np.array_equal(a[n], b[n]) for n in of_it)
  assert len(a) == 3 * 12 and all(np.array_equal(a[n], b[n]) for n in a.keys() - of_it)


def test_rate_of_one_adapter_leaves_the_others(small):
  trainable = init(methods.build("inca", small.spec, sites=THREE), 4)
  slow = Optim("adamw", lr_factors=(("(adapters|classifier)/norm/.*", 0.1),))
  a, b = (tree.flatten(trained(small, "inca", THREE, optim, trainable)[0]) for optim in (Optim("adamw"), slow))
  assert {n for n in a if not np.array_equal(a[n], b[n])} == {n for n in a if n.split("/")[1] == "norm"}


def test_training_together_is_training_alone(small):
  """The loss is a sum: the number of adapters does not change the gradient of any. SGD, which shows scale."""
  trainable, one = init(methods.build("inca", small.spec, sites=THREE), 4), "block_00/out"
  together, = trained(small, "inca", THREE, Optim("sgd"), trainable)
  alone, = trained(small, "inca", one, Optim("sgd"), at_sites(trainable, [one]))
  chex.assert_trees_all_close(alone, at_sites(together, [one]), rtol=0, atol=1e-6)
  assert not np.array_equal(tree.flatten(alone)["classifier/block_00/out/kernel"],
                            tree.flatten(trainable)["classifier/block_00/out/kernel"])


def test_weight_decay_spares_queries_norms_and_biases(tiny_spec):
  trainable = init(methods.build("inca", tiny_spec, sites="norm", norm_tokens=True), 4)
  optimiser = make_optimiser(Optim("sgd", weight_decay=1.0), lambda step: 1.0, trainable)
  zero = jax.tree.map(np.zeros_like, trainable)
  updates, _ = optimiser.update(zero, optimiser.init(trainable), trainable)
  decayed = {name for name, leaf in tree.flatten(updates).items() if np.any(leaf)}
  assert decayed == {f"adapters/norm/{name}/kernel" for name in ("q", "k", "v", "out")} | {"classifier/norm/kernel"}


# --- Combining and choosing -----------------------------------------------------------------------------------------

def softmax(z):
  return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def test_ways_to_combine():
  logits = {"a": jnp.array([[1.0, 2.0, 0.5]]), "b": jnp.array([[-1.0, 4.0, 30.0]])}
  np.testing.assert_allclose(combined(logits, "mean_logits"), [[0.0, 3.0, 15.25]])
  wanted = (softmax(np.float64(logits["a"])) + softmax(np.float64(logits["b"]))) / 2
  np.testing.assert_allclose(np.exp(combined(logits, "mean_probabilities")), wanted, rtol=1e-5)
  np.testing.assert_allclose(combined(logits, "b"), logits["b"])
  np.testing.assert_allclose(combined(logits, "a*3+b"), [[0.5, 2.5, 7.875]])
  for not_yet_chosen in ("best", "top1", "top2_probabilities", "greedy"):
    np.testing.assert_allclose(combined(logits, not_yet_chosen), [[0.0, 3.0, 15.25]])


def test_one_site_does_not_compute_the_blocks_after_it(tiny_spec, tiny_weights):
  """A classifier that was selected stops where it reads."""
  def cost(combine):
    method, backbone = methods.build("inca", tiny_spec, combine=combine), backbones.build(tiny_spec)
    trainable = init(method, 4)
    run = quick(lambda images: predict(method, backbone, trainable, {}, tiny_weights.params, images))
    return flops(run.lower(jax.ShapeDtypeStruct((32, 16, 16, 3), jnp.float32)).compile())
  assert cost("block_00/out") < 0.45 * cost("block_02/out") < 0.45 * cost("mean_logits")


SITES = r"patch|block_0[01]/out|norm"


@pytest.fixture(scope="module")
def members(tiny_spec):
  """(trainable, activations, {site: logits [40, 4]}, labels) of adapters on noise; "patch" is the best of them, and by
  name the last. Labels are the mean's guesses, half of them changed."""
  rng, method = np.random.default_rng(0), methods.build("inca", tiny_spec, sites=SITES)
  activations = {site: rng.standard_normal((40, 5, 16)).astype(np.float32) for site in method.reads}
  trainable = init(method, 4)
  found = quick(lambda own: forward(method, None, own, activations, Context()))(trainable)
  logits = jax.device_get(method.members(found))
  labels = np.where(rng.random(40) < 0.5, found.logits.argmax(-1), rng.integers(0, 4, 40))
  labels[:20] = logits["patch"][:20].argmax(-1)
  return trainable, activations, logits, labels


def chosen_by(spec, members, combine):
  """(chosen method, its trainable, its logits from the same activations)"""
  trainable, activations, logits, labels = members
  method, own, state = methods.build("inca", spec, sites=SITES, combine=combine).choose(trainable, {}, logits, labels)
  assert state == {} and own.keys() == {"adapters", "classifier"}
  chex.assert_trees_all_equal(own, at_sites(trainable, method.reads))
  again = methods.build("inca", spec, **json.loads(json.dumps(method.options)))
  return method, own, quick(lambda own: predict(again, None, own, {}, {}, activations))(own)


def test_the_best_is_chosen(tiny_spec, members):
  _, _, logits, labels = members
  accuracy = {site: (each.argmax(-1) == labels).mean() for site, each in logits.items()}
  assert max(accuracy, key=accuracy.get) == "patch" and len(set(accuracy.values())) > 1
  method, own, found = chosen_by(tiny_spec, members, "best")
  assert method.options == {**methods.build("inca", tiny_spec, sites="patch").options, "combine": "mean_logits"}
  assert method.choose is None and list(tree.flatten(own["classifier"])) == ["patch/bias", "patch/kernel"]
  np.testing.assert_allclose(found, logits["patch"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("combine", ["top2", "top3_probabilities", "greedy"])
def test_ensembles_are_chosen(tiny_spec, members, combine):
  """The members that `ensembles` says, and logits that are their mean."""
  _, _, logits, labels = members
  logits = {site: np.float64(logits[site]) for site in ("patch", "block_00/out", "block_01/out", "norm")}
  weights = (ensembles.greedy(logits, labels) if combine == "greedy" else
             ensembles.top_k(logits, labels, int(combine[3])))
  method, _, found = chosen_by(tiny_spec, members, combine)
  assert list(method.reads) == list(weights) and 1 < len(weights)
  if combine == "greedy":
    assert len(set(weights.values())) > 1  # else this would not be a test of shares
  each = {site: softmax(logits[site]) if "prob" in combine else logits[site] for site in weights}
  wanted = sum(weight * each[site] for site, weight in weights.items()) / sum(weights.values())
  np.testing.assert_allclose(found, np.log(wanted) if "prob" in combine else wanted, rtol=0, atol=1e-5)


def test_of_equal_members_the_earlier_is_chosen(tiny_spec, members):
  """In the order of the forward pass, whatever that of the names or of the dict."""
  trainable, _, logits, labels = members
  equal = {site: logits["norm"] for site in sorted(logits)}
  assert list(equal)[0] == "block_00/out"
  method, *_ = methods.build("inca", tiny_spec, sites=SITES, combine="best").choose(trainable, {}, equal, labels)
  assert list(method.reads) == ["patch"]


def test_what_is_left_to_choose(tiny_spec):
  build = functools.partial(methods.build, "open_inca", tiny_spec)
  assert all(build(combine=combine).choose for combine in ("best", "top1", "top4_probabilities", "greedy"))
  for combine in ("mean_logits", "mean_probabilities", "norm", "norm*2+block_00/out"):
    assert build(combine=combine).choose is None
  assert build(sites="norm", combine="best").choose is None
  one = build(**{**build().options, **build().member_options("block_01/out")})
  assert list(one.reads) == ["block_01/out"] and one.choose is None


def test_logits_of_members_leave_padding_out(small):
  """Every example of a split once, in its order, whatever the size of a batch."""
  split = colours().splits["val"]
  loader = data.eval_loader(split, small.preprocessing, batch_size=4)
  logits, labels = collect_members(lambda x: {"b": x[:, 0, :2, 0], "a": np.asarray(x[:, 1, :3, 0])}, loader)
  images = np.stack([split.read(i) for i in range(len(split))])
  assert len(split) % 4 and logits.keys() == {"a", "b"}
  np.testing.assert_array_equal(labels, split.labels)
  np.testing.assert_array_equal(logits["a"], images[:, 1, :3, 0])
  np.testing.assert_array_equal(logits["b"], images[:, 0, :2, 0])


LEARNS = recipe(duration="3 epochs")


@pytest.fixture(scope="module")
def ran(small, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "inca"
  return workdir, fit(small, "inca", colours(), LEARNS, workdir=workdir, quiet=True,
                      options={"sites": "patch|norm"})


def test_a_run_chooses_on_validation(ran, small):
  """The row has every member's scores, the choice, and the scores of what was chosen; the adapter holds that alone."""
  workdir, run = ran
  row = json.loads((workdir / "result.json").read_text())
  assert list(row["members"]) == ["patch", "norm"] and row == json.loads(json.dumps(run.result))
  best = max(row["members"], key=lambda site: (row["members"][site]["accuracy"], -row["members"][site]["loss"]))
  assert row["chosen"] == {"sites": best, "combine": "mean_logits"}
  assert row["options"]["combine"] == "best" and row["options"]["sites"] == "patch|norm"
  assert row["val"]["accuracy"] == row["members"][best]["accuracy"]
  np.testing.assert_allclose(row["val"]["loss"], row["members"][best]["loss"], rtol=1e-5)
  assert row["trainable"] == sum(leaf.size for leaf in jax.tree.leaves(run.trainable))
  assert len({tuple(found.values()) for found in row["members"].values()}) == 2
  adapter = load_adapter(run.adapter)
  assert adapter.method.options == run.method.options and list(adapter.method.reads) == [best]
  chex.assert_trees_all_equal(adapter.trainable, jax.tree.map(np.array, run.trainable))


def test_a_run_that_was_cut_before_its_end_chooses_the_same(ran, small):
  workdir, run = ran
  (workdir / "result.json").unlink()
  (workdir / "adapter.safetensors").unlink()
  again = fit(small, "inca", colours(), LEARNS, workdir=workdir, quiet=True, options=run.result["options"])
  assert {**again.result, "seconds": 0} == {**run.result, "seconds": 0}
  chex.assert_trees_all_equal(*(jax.tree.map(np.array, each.trainable) for each in (again, run)))
  assert fit(small, "inca", colours(), LEARNS, workdir=workdir, quiet=True, options=run.result["options"]
             ).method.options == run.method.options


def test_without_validation_nothing_is_chosen(small, capsys):
  task = colours()
  task = dataclasses.replace(task, splits={"train": task.splits["train"]})
  method = methods.build("inca", small.spec, sites="patch|norm")
  stage = Stage(method, small, task, LEARNS, None, 0, False)
  stage.settle()
  stage.loader.close()
  assert stage.method is method and stage.choice == {}
  assert "there is none: nothing is chosen" in capsys.readouterr().err


# --- Sites, sizes, options ------------------------------------------------------------------------------------------

def test_size_on_vit_l16():
  """1.38 % of the backbone, which the paper's stated 1.3 % was read from."""
  spec = backbones.architecture("vit_l16")
  found = sizes(methods.build("inca", spec, sites="norm"), backbones.abstract_params(spec), 100)
  assert found.trainable_without_classifier == 4_200_448 and found.trainable == 4_200_448 + 102_500
  assert 0.0138 < 4_200_448 / found.frozen < 0.0139
  every = sizes(methods.build("inca", spec), backbones.abstract_params(spec), 100)
  assert every.trainable == 25 * (4_200_448 + 102_500)
  one = sizes(methods.build("open_inca", spec, sites="norm"), backbones.abstract_params(spec), 100)
  assert one.trainable == 4 * 1024 ** 2 + 5 * 1024 + 100 * (2 * 1024 + 1)


@pytest.mark.parametrize("changes, sites", [
    ({}, ["block_00/out", "block_01/out", "block_02/out", "norm"]),
    ({"pool": "mean_before_norm"}, ["block_00/out", "block_01/out", "block_02/out"])])
def test_default_sites(tiny_spec, changes, sites):
  """Where the norm comes after the mean, it has one token, and nothing to attend to."""
  assert list(methods.build("inca", dataclasses.replace(tiny_spec, **changes)).reads) == sites


def test_sites_of_any_width(small):
  """An adapter is as wide as what it reads: 2 D in this MLP, 3 D at the fused projection."""
  method = methods.build("inca", small.spec, sites="patch|block_00/(fc1|qkv|attn)", queries=2)
  trainable, backbone = init(method, 4), backbones.build(small.spec)
  carry = quick(lambda own: forward(method, backbone, own, IMAGES, Context(frozen=small.params)).carry)(trainable)
  assert list(method.reads) == ["patch", "block_00/qkv", "block_00/attn", "block_00/fc1"]
  assert carry.keys() == method.reads.keys()
  widths = [trainable["adapters"]["block_00"][name]["query"].shape for name in ("qkv", "attn", "fc1")]
  assert widths == [(2, 48), (2, 16), (2, 32)]
  assert all(logits.shape == (10, 4) and np.any(logits) for logits in carry.values())


@pytest.mark.parametrize("options, message", [
    ({"sites": "block_9/out"}, "matches none of vit_tiny_test; nearest: block_"),
    ({"sites": "block_("}, "is not a regular expression"),
    ({"sites": "pooled"}, "site 'pooled' of vit_tiny_test has shape [B, 16]"),
    ({"heads": 3}, "heads is 3; expected a divisor of the width, 16"),
    ({"heads": 0}, "heads is 0"),
    ({"queries": 0}, "queries is 0; expected at least 1"),
    ({"combine": "norms"}, "mean_logits, mean_probabilities or a site that is read, nearest: norm"),
    ({"combine": "norm+block_00/mid"}, "combine is 'norm+block_00/mid'"),
    ({"combine": "norm*0"}, "combine is 'norm*0'"),
    ({"combine": "top5"}, "combine is 'top5' and 4 sites are read; expected a number from 1 to 4"),
    ({"combine": "norm", "sites": "block_.*/out"}, "combine is 'norm'")])
def test_wrong_options_are_one_line_errors(tiny_spec, options, message):
  with pytest.raises(ValueError) as error:
    methods.build("inca", tiny_spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)
