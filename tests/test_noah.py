"""NOAH: a masked supernet is the network it hides, the search is a pure function of its scores, and a run of both."""
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import metrics, recipe

from test_methods import GOLDEN, VIT_B16, close, error, head, native, read
from transferlab import backbones, data, experiment, methods, tree
from transferlab.checkpoint import load_adapter
from transferlab.evaluate import evaluate, make_predict
from transferlab.heads import Head, train_heads
from transferlab.method import Context, forward, predict, sizes
from transferlab.methods import noah_evolution
from transferlab.methods.noah import KINDS, count
from transferlab.methods.noah_evolution import Plan, Space, evolve
from transferlab.methods.noah_search import random_sizes
from transferlab.train import Fit, fit

TINY = dataclasses.replace(backbones.architecture("vit_tiny_test"), depth=2, pool="mean")  # prompts are not pooled
NETWORK = {"prompts": (5, 2, 6, 1), "lora": (3, 6, 1, 2), "adapter": (1, 5, 6, 3)}  # of the golden numbers


def arrays_of(network: dict) -> dict:
  return {kind: jnp.asarray(network[kind], jnp.int32) for kind in KINDS}


def sliced(trainable: dict, network: dict) -> dict:
  """The leading slices of a supernet's parameters, or of their gradients."""
  found = {"classifier": trainable["classifier"]}
  for i in range(len(network["prompts"])):
    p, r, n = (network[kind][i] for kind in KINDS)
    block, of = f"block_{i:02d}", lambda kind: trainable[kind][f"block_{i:02d}"]  # noqa: B023
    cut = {"prompts": lambda leaf: leaf[:p], "lora": lambda leaf: {"a": leaf["a"][:, :r], "b": leaf["b"][:r]},  # noqa: B023
           "adapter": lambda leaf: {
               "down": {"kernel": leaf["down"]["kernel"][:, :n], "bias": leaf["down"]["bias"][:n]},  # noqa: B023
               "up": {"kernel": leaf["up"]["kernel"][:n], "bias": leaf["up"]["bias"]}}}  # noqa: B023
    for kind in KINDS:
      if network[kind][i]:
        found.setdefault(kind, {})[block] = cut[kind](of(kind))
  return found


# --- Against the original -------------------------------------------------------------------------------------------

def trainable_of(arrays, prefix):
  """The golden's parameters under our names; torch holds (out, in)."""
  of = lambda name: arrays[prefix + name]
  adapter = lambda i, layer: {"kernel": of(f"blocks.{i}.adapter.{layer}.weight").T,
                              "bias": of(f"blocks.{i}.adapter.{layer}.bias")}
  blocks = [f"block_{i:02d}" for i in range(4)]
  return {
      "prompts": {block: of(f"blocks.{i}.visual_prompt_token")[0] for i, block in enumerate(blocks)},
      "lora": {block: {k: of(f"blocks.{i}.attn.LoRA_{k}.weight").T for k in "ab"} for i, block in enumerate(blocks)},
      "adapter": {block: {"down": adapter(i, "ln1"), "up": adapter(i, "ln2")} for i, block in enumerate(blocks)},
      "unused": {"prompts": of("visual_prompt_token")[0], "positions": of("visual_prompt_token_pos_embed")[0]},
      "classifier": head(arrays, prefix)}


@pytest.mark.parametrize("form", ["masked", "sliced"])
def test_golden(golden, form):
  """Logits, loss and every gradient equal the original's, and are zero where its are: outside slices, at the unused."""
  arrays = read(golden("dtl_and_petl/noah_subnet.npz"))
  part, vary = (lambda found: sliced(found, NETWORK)), {}
  method = methods.build("noah", GOLDEN, dropout=0.0, **NETWORK)
  if form == "masked":
    part, vary = (lambda found: found), arrays_of(NETWORK)
    method = methods.build("noah_search", GOLDEN, choices=(6,), depths=(4,), dropout=0.0, compat="noah")
  wanted, trainable = (part(trainable_of(arrays, prefix)) for prefix in ("grad64/", "param/"))
  shapes = jax.eval_shape(lambda rng: method.init(rng, None, 10)[0], jax.random.key(0))
  assert tree.difference(tree.flatten(trainable), tree.flatten(shapes)) == ""
  images, backbone = arrays["images"].transpose(0, 2, 3, 1), backbones.build(GOLDEN)

  @jax.jit
  def run(trainable, frozen, vary):
    def loss(trainable):
      batch = {"target": jax.nn.one_hot(arrays["labels"], 10), "weight": jnp.ones(3)}
      context = Context(batch=batch, frozen=frozen, train=True, rng=jax.random.key(0), vary=vary)
      outputs = forward(method, backbone, trainable, images, context)
      return method.loss(trainable, outputs, context), outputs.logits
    return jax.value_and_grad(loss, has_aux=True)(trainable)

  (loss, logits), gradient = run(jax.tree.map(jnp.asarray, trainable), native(arrays, "param/"), vary)
  close({"loss": loss, "logits": logits}, {"loss": arrays["loss_f64"], "logits": arrays["logits_f64"]})
  of_torch = error(part(trainable_of(arrays, "grad/")), wanted)
  assert of_torch < 4e-6
  close(gradient, wanted, max(1e-6, 2 * of_torch))
  for name, leaf in tree.flatten(wanted).items():
    assert np.array_equal(tree.flatten(gradient)[name] == 0, leaf == 0), name  # exactly the same zeros
  if form == "masked":
    assert len(tree.flatten(gradient)) == len(json.loads(str(arrays["meta_json"]))["trainable"])


def test_sizes_of_the_published_networks(shared):
  """The mean of 19 is 371,290 with the code's unused parameters; it counts 100 rows of positions, 442,512. The networks
  themselves have 360,134, the 0.36M that FacT's authors give for NOAH."""
  found = json.loads((shared / "papers" / "dtl_and_petl_hparams.json").read_text())["noah"]["subnets_vtab"]
  published = [dict(zip(KINDS, (n["visual_prompt_dim"], n["lora_dim"], n["adapter_dim"]))) for n in found.values()]
  own = np.array([count(VIT_B16, network) for network in published])
  first = 768 * np.array([network["prompts"][0] for network in published])
  assert [len(own), round(own.mean()), round((own + 2 * first).mean())] == [19, 360_134, 371_290]
  assert round((own + first + 768 * 100).mean()) == 442_512
  params = backbones.abstract_params(VIT_B16)
  for i in (0, 7):
    of = lambda **more: sizes(methods.build("noah", VIT_B16, **published[i], **more), params, 5)  # noqa: B023
    assert of().trainable_without_classifier == own[i]
    assert of(compat="noah").trainable_without_classifier == own[i] + 2 * first[i]


# --- Supernet -------------------------------------------------------------------------------------------------------

NETWORKS = [  # leading blocks, as they are drawn; all that a network can do without is left out somewhere
    {"prompts": (3, 0), "lora": (2, 0), "adapter": (1, 3)},
    {"prompts": (0, 0), "lora": (3, 3), "adapter": (0, 0)},
    {"prompts": (1, 3), "lora": (0, 0), "adapter": (2, 0)}]


@pytest.fixture(scope="module")
def small_weights(random_weights):
  return random_weights(TINY)


@pytest.fixture(scope="module")
def supernet(small_weights):
  """(method, trainable moved from its start, state, frozen, images) with sizes up to 3."""
  method = methods.build("noah_search", TINY, choices=(1, 2, 3), dropout=0.0)
  trainable, state = jax.jit(lambda rng: method.init(rng, None, 4))(jax.random.key(0))
  rng = np.random.default_rng(1)
  moved = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), trainable)
  return method, moved, state, small_weights.params, rng.standard_normal((2, 16, 16, 3)).astype(np.float32)


def test_one_program_gives_what_each_network_gives_alone(supernet):
  method, trainable, state, frozen, images = supernet
  backbone, traces = backbones.build(TINY), 0

  @jax.jit
  def masked(trainable, vary):
    nonlocal traces
    traces += 1
    context = Context(state=state, frozen=frozen, vary=vary)
    return forward(method, backbone, trainable, images, context).logits

  for network in NETWORKS:
    alone = methods.build("noah", TINY, **network)
    logits = jax.jit(lambda part, alone=alone: predict(alone, backbone, part, {}, frozen, images))(
        sliced(trainable, network))
    np.testing.assert_allclose(masked(trainable, arrays_of(network)), logits, rtol=0, atol=1e-6)
  whole = masked(trainable, state["sizes"])
  assert traces == 1 and np.abs(whole - logits).max() > 0.1

  # What is masked cannot be told: prompts get exactly no attention, units and ranks exactly nothing.
  other = jax.tree.map(lambda leaf: leaf + 100, trainable)
  kept = {kind: tuple(size and 1 for size in sizes) for kind, sizes in NETWORKS[0].items()}
  where = sliced(jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape), trainable), kept)
  where = tree.flatten(where)
  mixed = tree.unflatten({
      name: leaf if name not in where else leaf.reshape(-1).at[where[name].reshape(-1)].set(
          tree.flatten(trainable)[name].reshape(-1)[where[name].reshape(-1)]).reshape(leaf.shape)
      for name, leaf in tree.flatten(other).items()})
  assert np.array_equal(masked(mixed, arrays_of(kept)), masked(trainable, arrays_of(kept)))


def test_a_step_draws_a_network():
  """Sizes of a random depth, each kind for itself, all of them sooner or later; the same for the same key."""
  draw = jax.jit(lambda rng: random_sizes(rng, 3, (1, 4), (1, 3)))
  found = [jax.device_get(draw(jax.random.key(i))) for i in range(150)]
  wanted = {(n, *rest) for n in (1, 4) for rest in [(0, 0), *((a, b) for a in (1, 4) for b in (1, 4))]}
  for kind in KINDS:
    assert {tuple(sizes[kind].tolist()) for sizes in found} == wanted
  assert len({json.dumps(jax.tree.map(np.ndarray.tolist, sizes)) for sizes in found}) > 100
  assert all(np.array_equal(draw(jax.random.key(7))[kind], found[7][kind]) for kind in KINDS)


def test_a_training_step_uses_the_network_of_its_key(supernet):
  """Gradients are there for what the key draws and nowhere else."""
  method, trainable, state, frozen, images = supernet
  @jax.jit
  def gradient(rng):
    context = Context({"target": jax.nn.one_hot(jnp.arange(2), 4), "weight": jnp.ones(2)}, state, frozen, {}, rng, True)
    loss = lambda trainable: method.loss(
        trainable, forward(method, backbones.build(TINY), trainable, images, context), context)
    return jax.grad(loss)(trainable)
  drawn = set()
  for seed in range(4):
    rng = jax.random.key(seed)
    wanted = jax.device_get(random_sizes(jax.random.fold_in(rng, 1), 2, (1, 2, 3), (1, 2)))
    found = gradient(rng)
    reached = lambda leaf, axis: int(np.any(np.moveaxis(np.array(leaf), axis, 0).reshape(3, -1), axis=1).sum())
    for i in range(2):
      block = f"block_{i:02d}"
      sizes_found = (reached(found["prompts"][block], 0), reached(found["lora"][block]["a"], 1),
                     reached(found["adapter"][block]["up"]["kernel"], 0))
      assert sizes_found == tuple(wanted[kind][i] for kind in KINDS)
    drawn.add(str(wanted))
  assert len(drawn) == 4


def test_starts():
  spec = dataclasses.replace(TINY, depth=1)
  start = lambda **options: methods.build("noah", spec, prompts=50, lora=20, adapter=20, **options).init(
      jax.random.key(0), None, 3)[0]
  ours, theirs = start(), start(compat="noah")
  bound = (6 / (16 * 51)) ** 0.5
  largest = np.abs(ours["prompts"]["block_00"]).max()
  assert 0.95 * bound < largest <= bound
  assert not ours["lora"]["block_00"]["b"].any() and not ours["adapter"]["block_00"]["up"]["kernel"].any()
  assert "unused" not in ours and theirs["unused"]["positions"].shape == (50, 16)
  for leaf in (theirs["lora"]["block_00"]["a"], theirs["lora"]["block_00"]["b"],
               theirs["adapter"]["block_00"]["up"]["kernel"], theirs["adapter"]["block_00"]["down"]["kernel"]):
    assert 0.017 < leaf.std() < 0.023
  assert np.abs(ours["lora"]["block_00"]["a"]).max() <= 0.25 and ours["lora"]["block_00"]["a"].std() > 0.13


# --- Search ---------------------------------------------------------------------------------------------------------

SPACE = Space(4, (1, 2, 3), (2, 4), 2, lambda network: True)
TARGET = ((3, 1, 2, 2), (2, 3, 0, 0))


def likeness(networks):
  return [float(sum(a == b for mine, wanted in zip(network, TARGET) for a, b in zip(mine, wanted)))
          for network in networks]


def test_the_search_finds_the_best_and_says_so():
  calls = []
  def score(networks):
    calls.append(networks)
    return likeness(networks)
  plan = Plan(generations=15, population=30, mutations=10, crossovers=10)
  found, accuracy = evolve(score, SPACE, plan, 0)
  scored = [network for networks in calls for network in networks]
  assert accuracy == likeness([found])[0] == max(likeness(scored)) >= 7  # of 8
  assert len(calls) == 15 and [len(networks) for networks in calls] == 15 * [30]
  assert len(set(scored)) == len(scored)  # none is scored twice
  assert np.mean(likeness(calls[-1])) > np.mean(likeness(calls[0])) + 0.5  # offspring of the best is better
  assert evolve(likeness, SPACE, plan, 0) == (found, accuracy) != evolve(likeness, SPACE, plan, 3)


def test_the_seed_of_a_run_fixes_its_search(supernet):
  method, trainable, state, *_ = supernet
  def first_round(state):
    seen = []
    def score(variants):
      seen.append([[variant[kind].tolist() for kind in KINDS] for variant in variants])
      return [1.0] * len(variants)
    found = method.search(trainable, state, score)
    assert [found["sizes"][kind].tolist() for kind in KINDS] == seen[0][0]  # of equals the first
    return seen[0]
  seeds = [jax.jit(lambda rng: method.init(rng, None, 4)[1]["seed"])(jax.random.key(i)) for i in (0, 1)]
  same, other = ({**state, "seed": seed} for seed in seeds)
  assert first_round(same) == first_round(same) != first_round(other)


def test_the_limit_holds_and_a_small_space_ends():
  seen = []
  small = SPACE._replace(allowed=lambda network: sum(map(sum, network)) <= 5)
  found, _ = evolve(lambda networks: seen.extend(networks) or [1.0] * len(networks), small, Plan(population=30), 0)
  assert seen and all(sum(map(sum, network)) <= 5 for network in seen) and len(seen) < 30
  assert found == seen[0]  # of equals the first
  with pytest.raises(ValueError, match="no network of sizes 1, 2, 3 in the first 2 or 4 blocks keeps the limit; raise"):
    evolve(likeness, SPACE._replace(allowed=lambda network: False), Plan(population=2), 0)


def test_mutation_keeps_sizes_and_crossover_keeps_kinds():
  rng, plan = np.random.default_rng(0), Plan(p_mutate=1.0, p_depth=1.0)
  mutants = {noah_evolution.mutate(rng, TARGET, SPACE, plan) for _ in range(60)}
  for first, second in mutants:
    assert first in (TARGET[0], (3, 1, 0, 0)) and second[:2] == (2, 3)
  assert len({second for _, second in mutants}) > 5  # it grows by random sizes
  changed = [noah_evolution.mutate(rng, TARGET, SPACE, Plan())[0] != TARGET[0] for _ in range(2000)]
  assert 0.02 < np.mean(changed) < 0.06  # 0.2 * 0.4, and half of the depths are the one that it has
  other = ((1, 1, 1, 1), (1, 1, 1, 1))
  crossed = {noah_evolution.cross(rng, TARGET, other) for _ in range(60)}
  assert crossed == {(a, b) for a in (TARGET[0], other[0]) for b in (TARGET[1], other[1])}


# --- Runs -----------------------------------------------------------------------------------------------------------

OPTIONS = {"choices": (1, 2, 3), "supernet_duration": "12 steps", "supernet_lr": 5e-2, "generations": 2,
           "population": 12, "mutations": 4, "crossovers": 4, "dropout": 0.0}
RECIPE = recipe(duration="10 steps", checkpoint_every="12 steps")
ONE = dataclasses.replace(TINY, depth=1)


class Killed(Exception):
  pass


class Ran(NamedTuple):
  """A run that was killed behind its search, and went on.

  Fields:
    scored: [(variants, accuracies)], a pair for each round of the first search.
    supernet: (trainable, state) as the first search got them.
    rows: of metrics.jsonl when it was killed.
    said: what the second run told.
  """
  workdir: Path
  fit: Fit
  scored: list
  supernet: tuple
  rows: list
  said: str


@pytest.fixture(scope="module")
def one_block(random_weights):
  return random_weights(ONE)


@pytest.fixture(scope="module")
def ran(one_block, tiny_task, tmp_path_factory):
  workdir, scored, supernet = tmp_path_factory.mktemp("noah") / "run", [], []
  method, said = methods.build("noah_search", ONE, **OPTIONS), io.StringIO()
  def search(trainable, state, score):
    supernet.extend((trainable, state))
    def spied(variants):
      scored.append((variants, score(variants)))
      return scored[-1][1]
    method.search(trainable, state, spied)
    raise Killed
  with pytest.raises(Killed):
    fit(one_block, method._replace(search=search), tiny_task, RECIPE, workdir=workdir, quiet=True)
  rows = metrics(workdir)
  with contextlib.redirect_stderr(said):
    found = fit(one_block, "noah_search", tiny_task, RECIPE, options=OPTIONS, workdir=workdir)
  return Ran(workdir, found, scored, tuple(supernet), rows, said.getvalue())


def test_a_run_trains_searches_and_trains_what_it_found(ran):
  """The choice is what a search before the run was killed found, too: it is fixed by the seed."""
  pairs = [pair for variants, found in ran.scored for pair in zip(found, variants)]
  best = max(pairs, key=lambda pair: pair[0])[1]  # the first of equals
  method, result = ran.fit.method, ran.fit.result
  assert method.name == "noah" and not ran.fit.state
  assert {kind: method.options[kind] for kind in KINDS} == {kind: tuple(best[kind].tolist()) for kind in KINDS}
  assert result["chosen"] == method.options and result["method"] == "noah_search"
  assert result["trainable_without_classifier"] == count(ONE, method.options)
  assert result["steps"] == 10 and len(pairs) == 24
  adapter = load_adapter(ran.fit.adapter)
  assert adapter.method.options == method.options
  assert tree.flatten(adapter.trainable).keys() == tree.flatten(ran.fit.trainable).keys()


def test_its_log_has_every_step_and_round_once(ran):
  rows = metrics(ran.workdir)
  assert rows[:len(ran.rows)] == ran.rows
  assert [row["search"]["scored"] for row in rows if "search" in row] == [12, 12]
  rates = {stage: [row["lr"] for row in rows if row["stage"] == stage and "lr" in row] for stage in (0, 1)}
  assert [len(rates[0]), len(rates[1])] == [12, 10]
  assert [rates[0][0], rates[1][0]] == pytest.approx([5e-2, 1e-2])  # the supernet's own, and the recipe's


def test_what_a_search_says_can_be_given_to_another_run(ran):
  assert "search, round 2: 12 scored, best val accuracy" in ran.said and "resumed at step 12 of 12" in ran.said
  flags = next(line for line in ran.said.splitlines() if line.startswith("found: ")).removeprefix("found: ")
  assert flags.startswith("--config.method=noah --config.options.prompts=")
  config = experiment.defaults("noah")
  for flag in flags.split(" --config.")[1:]:
    name, _, value = flag.partition("=")
    experiment.change(config, name, value.strip('"'))
  assert methods.build("noah", ONE, **config.options.to_dict()).options == ran.fit.method.options


def test_scores_are_accuracies(ran, one_block, tiny_task):
  """Of all variants, those of the last chunk too, which is filled up; against the supernet with one state at a time."""
  loader = data.eval_loader(tiny_task.splits["val"], one_block.preprocessing, batch_size=32)
  method, (trainable, state) = methods.build("noah_search", ONE, **OPTIONS), ran.supernet
  run, (variants, found) = make_predict(method, backbones.build(ONE), one_block.preprocessing), ran.scored[1]
  def accuracy(variant):
    own = {**state, "sizes": jax.tree.map(jnp.asarray, variant)}
    return evaluate(lambda images, _: run(trainable, own, one_block.params, images), loader, 4).accuracy
  assert found == pytest.approx([accuracy(variant) for variant in variants]) and len(set(found)) > 1


def test_what_a_search_needs(small_weights, tiny_task, tmp_path):
  task = dataclasses.replace(tiny_task, splits={"train": tiny_task.splits["train"]})
  with pytest.raises(ValueError, match="noah_search searches on a validation split and the task has splits train; give "
                                       "it a val split .*phase=tune"):
    fit(small_weights, "noah_search", task, RECIPE, options=OPTIONS, workdir=tmp_path / "run", quiet=True)
  assert not (tmp_path / "run").exists()
  both = dataclasses.replace(tiny_task, splits={name: tiny_task.splits[name] for name in ("train", "val")})
  with pytest.raises(ValueError, match="noah_search searches between its stages"):
    train_heads(methods.build("noah_search", TINY), small_weights, both, RECIPE, [Head(1e-2, 0.0)])


@pytest.mark.parametrize("name, options, message", [
    ("noah", {"prompts": (1, 2, 3)}, r"prompts is \(1, 2, 3\); expected a whole number from 0, or one for each of"),
    ("noah", {"lora": -1}, "lora is -1; expected a whole number from 0"),
    ("noah", {"adapter": (1, 1.5)}, r"adapter is \(1, 1.5\); expected a whole number from 0"),
    ("noah", {"prompts": 0, "lora": 0, "adapter": 0}, "prompts, lora and adapter are 0 in all blocks; give one"),
    ("noah", {"compat": "vpt"}, "compat is 'vpt'; expected None or 'noah'"),
    ("noah_search", {"choices": (5, 0)}, r"choices is \(5, 0\); expected whole numbers above 0"),
    ("noah_search", {"depths": (2, 3)}, r"depths is \(2, 3\); expected numbers of blocks from 1 to 2"),
    ("noah_search", {"population": 0}, "population is 0; expected 1 or more"),
    ("noah_search", {"crossovers": -1}, "crossovers is -1; expected 0 or more"),
    ("noah_search", {"p_depth": 1.5}, "p_depth is 1.5; expected a probability, 0 to 1")])
def test_mistakes(name, options, message):
  with pytest.raises(ValueError, match=message):
    methods.build(name, TINY, **options)


@pytest.mark.parametrize("name", ["noah", "noah_search"])
def test_windows_are_refused(name):
  with pytest.raises(ValueError, match=f"{name} needs attention over all tokens at once; .* has none"):
    methods.build(name, backbones.architecture("swin_tiny_test"))
