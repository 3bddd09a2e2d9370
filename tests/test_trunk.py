"""What lies below a method's first write is frozen: training from it cached is training from images, and tasks that are
served together share it."""
import dataclasses
import json

import jax
import numpy as np
import pytest
from engine import metrics, recipe, write_images

from transferlab import backbones, cli, cost, devices, features, inform, methods, serve, shared, train, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.checkpoint import save_adapter
from transferlab.heads import Head, train_heads
from transferlab.heads.shared import Shared
from transferlab.method import Context, chain, collect, drop_path, forward, needed
from transferlab.recipe import train_loader
from transferlab.train import fit

METHOD = "dtl"  # on three blocks the first write follows the second


def near(a, b, tolerance=1e-6):
  for name, value in a.items():
    if isinstance(value, float):
      assert value == pytest.approx(b[name], rel=tolerance, abs=tolerance), name


def same(found, wanted, atol=1e-6):
  for name, leaf in tree.flatten(wanted).items():
    np.testing.assert_allclose(tree.flatten(found)[name], leaf, atol=atol, err_msg=name)


def arbitrary(method, params, count, seed=0):
  """A method's trainable, drawn, so that what it writes is not zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: method.init(key, params, count)[0], jax.random.key(0))
  return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


# Training

ASKED = recipe(duration="7 steps", checkpoint_every="2 steps", label_smoothing=0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_weights, tiny_task):
  """(folder of the cache, workdir, Fit) of a run from the cache that nothing interrupted."""
  place = tmp_path_factory.mktemp("trunk")
  found = fit(tiny_weights, METHOD, tiny_task, ASKED, workdir=place / "run", features=place / "cache", quiet=True)
  return place / "cache", place / "run", found


def test_cached_is_streamed(tmp_path, whole, tiny_weights, tiny_task):
  """Losses and gradients of every step, scores, the step that is selected, and what was trained."""
  _, workdir, cached = whole
  streamed = fit(tiny_weights, METHOD, tiny_task, ASKED, workdir=tmp_path, quiet=True)
  rows, others = metrics(workdir), metrics(tmp_path)
  assert len(rows) == len(others) == 7 + 2
  for a, b in zip(rows, others):
    assert a.keys() == b.keys() and a["step"] == b["step"]
    near(a.get("val", a), b.get("val", b))
  same(cached.trainable, streamed.trainable)
  for split in ("val", "test"):
    near(cached.result[split], streamed.result[split])
    assert cached.result[split]["accuracy"] == streamed.result[split]["accuracy"]
  for name in ("selected_step", "protocol", "recipe", "trainable", "split_hash", "steps"):
    assert cached.result[name] == streamed.result[name]
  assert cached.result["cached"] == {"dtype": "float32", "views": 0}
  assert cached.result["train_flops"] < 0.75 * streamed.result["train_flops"]  # two blocks of three are in no step


def test_a_killed_run_resumes_bit_for_bit(tmp_path, whole, tiny_weights, tiny_task, monkeypatch):
  cache, workdir, expected = whole
  take, calls = features.Features.take, []
  def dies(kept, rows, view=0):
    calls.append(view)
    if len(calls) == 7:
      raise KeyboardInterrupt
    return take(kept, rows, view)
  run = lambda: fit(tiny_weights, METHOD, tiny_task, ASKED, workdir=tmp_path, features=cache, quiet=True)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(features.Features, "take", dies)
    run()
  assert 0 < max(row["step"] for row in metrics(tmp_path)) < 7
  found = run()
  for name, leaf in tree.flatten(expected.trainable).items():
    assert np.array_equal(tree.flatten(found.trainable)[name], leaf), name
  assert metrics(tmp_path) == metrics(workdir)


def test_blocks_below_the_first_write_are_no_longer_there(whole, tiny_weights, tiny_task):
  method, left = methods.build(METHOD, tiny_weights.spec), tiny_weights.params.keys() - {"block_00", "block_01"}
  stage = train.Stage(method, tiny_weights, tiny_task, ASKED, None, 0, True, whole[0])
  loaders = stage.loader, {"val": stage.val_loader}
  heads = Shared(tiny_weights, tiny_task, ASKED, 2, folds=None, loaders=loaders, memory_limit=None, mesh=None,
                 keep_logits=False, keep_trainables=True, quiet=True)
  assert stage.frozen.keys() == heads.frozen_of(method).keys() == left
  batch = next(stage.loader)
  assert "image" not in batch and set(batch["activations"]) == {"block_00/in", "block_01/in", "trunk"}
  stage.loader.close()


@pytest.mark.parametrize("name, backbone, options, compute, kept_in, tolerance", [
    ("dtl", "vit_tiny_test", {"first_write": 1}, "float32", "float32", 1e-6),
    ("dtl_plus", "vit_tiny_test", {}, "float32", "bfloat16", 0.02),
    ("dtl_plus", "vit_tiny_test", {}, "bfloat16", "bfloat16", 0.02),
    ("dtl_plus", "swin_tiny_test", {"first_read": 0, "first_write": 2}, "float32", "float32", 1e-6)])
def test_a_run_goes_on_where_the_trunk_ends(random_weights, name, backbone, options, compute, kept_in, tolerance):
  """Also between Swin's stages, where what is written enters a merge first; a bfloat16 cache is near."""
  spec = backbones.architecture(backbone)
  method, built, weights = methods.build(name, spec, **options), backbones.build(spec, compute), random_weights(spec)
  trainable = arbitrary(method, weights.params, 4)
  images = np.random.default_rng(1).standard_normal((3, 16, 16, 3)).astype(np.float32)
  def logits(params, images):
    from_images = forward(method, built, trainable, images, Context(frozen=params)).logits
    kept = built.apply(params, images, collect(method.reads, params), {})[1]
    kept = jax.tree.map(lambda leaf: leaf.astype(kept_in), kept)
    left = needed(method, params, spec.depth, cached=True)
    return from_images, forward(method, built, trainable, kept, Context(frozen=left)).logits
  streamed, cached = jax.jit(logits)(jax.tree.map(lambda leaf: leaf.astype(compute), weights.params), images)
  assert np.ptp(streamed, axis=0).min() > 10 * tolerance
  np.testing.assert_allclose(cached, streamed, atol=tolerance)


# Views and stochastic depth

def between(first, last, visit):
  """A visitor in blocks `first` … `last` - 1 alone."""
  names = [f"block_{i:02d}" for i in range(first, last)]
  return lambda carry, site, y, x: visit(carry, site, y, x) if site.split("/")[0] in names else (carry, y)


def test_cached_blocks_have_the_drops_of_their_view_and_the_others_those_of_the_step(tiny_weights):
  spec, rate = tiny_weights.spec, 0.8
  method, backbone = methods.build(METHOD, spec), backbones.build(spec)
  trainable, params = arbitrary(method, tiny_weights.params, 4), tiny_weights.params
  images = np.random.default_rng(1).standard_normal((16, 16, 16, 3)).astype(np.float32)
  def both(seed):
    of_view, step = drop_path(jax.random.key(7), rate, spec.depth), jax.random.key(seed)
    kept = backbone.apply(params, images, chain(of_view, collect(method.reads, params)), {})[1]
    context = Context(frozen=params, rng=step, train=True)
    cached = forward(method, backbone, trainable, kept, context, drop_path_rate=rate).logits
    of_step = drop_path(jax.random.fold_in(step, 0), rate, spec.depth)
    mixed = chain(between(0, 2, of_view), between(2, 3, of_step), method.visit(trainable, context))
    whole = backbone.apply(params, images, mixed, method.carry)
    return cached, method.readout(trainable, *whole, context)
  run = jax.jit(both)
  first, again = run(0), run(1)
  for cached, mixed in (first, again):
    np.testing.assert_allclose(cached, mixed, atol=1e-6)
  assert (abs(first[0] - again[0]).max(axis=1) > 1e-3).sum() > 4


def test_random_images_or_drops_need_views(tmp_path, tiny_weights, tiny_task):
  for how, message in (({"drop_path": 0.1}, "drop_path 0.1 is random, .*views=4"),
                       ({"augmentation": "flip"}, "'flip' is random, .*keep several with views=4"),
                       ({"views": 2}, "views is 2 and nothing is random")):
    with pytest.raises(ValueError, match=message):
      fit(tiny_weights, METHOD, tiny_task, recipe(**how), features=tmp_path / "cache", quiet=True)
  assert not (tmp_path / "cache").exists()
  asked = recipe(drop_path=0.5, views=2, cache_dtype="bfloat16", duration="6 steps", select="last")
  found = fit(tiny_weights, METHOD, tiny_task, asked, features=tmp_path / "cache", quiet=True).result
  assert found["cached"] == {"dtype": "bfloat16", "views": 2} and np.isfinite(found["val"]["loss"])
  assert found["protocol"].startswith("activations in bfloat16, none in 2 views; ")
  headers = [json.loads(path.read_text())["of"] for path in tmp_path.rglob("header.json")]
  assert sorted(header.get("view", -1) for header in headers) == [-1, -1, 0, 1]  # val and test as they are
  kept = features.Features(features.of_recipe(tmp_path / "cache", asked), tiny_weights,
                           methods.build(METHOD, tiny_weights.spec).reads, "train", tiny_task.splits["train"])
  one, other = (kept.take(np.arange(40), view) for view in range(2))
  assert np.array_equal(one["block_00/in"], other["block_00/in"])
  assert 5 < (one["trunk"] != other["trunk"]).any(axis=(1, 2)).sum() < 40  # at a rate of 0.25, of attention and of MLP


# Parallel heads

HEADS = [Head(1e-2, 0.0), Head(3e-2, 0.1, seed=1), Head(1e-3, 0.0), Head(1e-2, 0.5)]


@pytest.fixture(scope="module")
def selection(tiny_task):
  return dataclasses.replace(tiny_task, splits={name: tiny_task.splits[name] for name in ("train", "val")})


@pytest.fixture(scope="module")
def parallel(whole, tiny_weights, selection):
  """(how -> Trained): four heads from one trunk."""
  method, asked = methods.build(METHOD, tiny_weights.spec), recipe(duration="6 steps")
  def run(**how):
    loaders = features.loaders(whole[0], tiny_weights, method.reads, selection, asked, quiet=True)
    return train_heads(method, tiny_weights, selection, asked, HEADS, loaders=loaders, quiet=True, **how)
  return run


@pytest.fixture(scope="module")
def together(parallel):
  return parallel()


def test_heads_that_share_a_trunk_end_where_single_runs_end(whole, together, tiny_weights, selection):
  assert together.chunks == [4]
  k, asked, method = 1, recipe(duration="6 steps"), methods.build(METHOD, tiny_weights.spec)
  own = dataclasses.replace(asked, seed=HEADS[k].seed, optim=dataclasses.replace(
      asked.optim, lr=HEADS[k].lr, weight_decay=HEADS[k].weight_decay))
  single = train.Stage(method, tiny_weights, selection, own, None, 0, True, whole[0])
  single.loader.close()
  kept = single.kept(single.cache, "train", selection.splits["train"])
  single.loader = train_loader(asked, selection, tiny_weights.preprocessing, kept.take)  # heads share their batches
  single.train()
  same(jax.tree.map(lambda leaf: leaf[k], together.trainable), single.run.trainable)
  score = together.scores[k][""]
  assert (score.accuracy, score.step) == (single.val["accuracy"], single.selected_step)
  assert score.loss == pytest.approx(single.val["loss"], abs=1e-6)


def test_devices_make_no_difference(parallel, together):
  found = parallel(mesh=devices.make_mesh(4, heads=2))
  same(found.trainable, together.trainable)
  for ours, wanted in zip(found.scores, together.scores, strict=True):
    assert ours[""].accuracy == wanted[""].accuracy and ours[""].loss == pytest.approx(wanted[""].loss, abs=1e-6)


# Costs and commands

def test_what_a_cache_of_a_trunk_costs(tiny_spec):
  spec = backbones.architecture("vit_b16")
  method = methods.build("dtl", spec)
  assert features.bytes_per_image(spec, method.reads) == 8 * 197 * 768 * 4
  assert features.bytes_per_image(spec, method.reads, "bfloat16") == 8 * 197 * 768 * 2
  _, frozen, batch = cost._arguments(tiny_spec, methods.build(METHOD, tiny_spec), 4, 8, np.float32, cached=True)
  assert set(frozen) == set(backbones.abstract_params(tiny_spec)) - {"block_00", "block_01"}
  assert {leaf.shape for leaf in batch["activations"].values()} == {(8, 17, 16)} and "image" not in batch


def test_info_offers_the_costs_of_a_trunk(tiny_spec, monkeypatch):
  monkeypatch.setattr(cost, "of", lambda spec, method, *rest, **how: {"cached": how["cached"]})
  named = [row["method"] for row in inform.costs(tiny_spec, None, {}, 4, cached=True)]
  assert {"linear", "dtl", "dtl_plus", "dtl_plus_star"} <= set(named) and not {"lora", "full", "bitfit"} & set(named)
  with pytest.raises(ValueError, match="lora writes into the backbone from block 0 of 3 on and says nothing"):
    inform.costs(tiny_spec, "lora", {}, 4, cached=True)


def test_the_command_keeps_what_it_reads(tmp_path, capsys):
  write_images(tmp_path / "images")
  cli.main(["transferlab", "features", "--backbone=vit_formula64", f"--data=folder:{tmp_path / 'images'}",
            "--method=dtl", f"--out={tmp_path / 'cache'}", "--options=first_write=2", "--dry_run"])
  assert "cache of train: 12 images, 3 activations" in capsys.readouterr().err


# Serving

SERVED = {  # name: (method, options, classes)
    "first": ("dtl", {}, 3), "second": ("dtl", {}, 5), "early": ("dtl", {"first_write": 1}, 4),
    "convolved": ("dtl_plus", {"kernel": 3}, 3), "head": ("linear", {}, 6),
    "token": ("linear", {"site": "block_00/out"}, 2)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_weights):
  folder = tmp_path_factory.mktemp("adapters")
  for seed, (name, (method, options, count)) in enumerate(SERVED.items()):
    built = methods.build(method, tiny_weights.spec, **options)
    save_adapter(folder / f"{name}.safetensors", built, arbitrary(built, tiny_weights.params, count, seed), {},
                 weights=tiny_weights, class_names=[f"{name} {c}" for c in range(count)])
  return {name: str(folder / f"{name}.safetensors") for name in SERVED}


def test_tasks_that_share_a_trunk_are_served_as_if_alone(adapters, tiny_weights):
  images = list(np.random.default_rng(0).integers(0, 256, (5, 20, 18, 3), np.uint8))
  found = shared.load_many(adapters, tiny_weights)
  together = found(images, batch_size=3)
  assert list(together) == list(SERVED)
  for name in ("second", "early", "convolved"):
    alone = serve.load(adapters[name], tiny_weights)(images, batch_size=3)
    assert together[name].shape == alone.shape and np.ptp(alone, axis=0).max() > 1e-3
    np.testing.assert_allclose(together[name], alone, rtol=0, atol=1e-6, err_msg=name)
  assert shared.load_many([adapters["first"], adapters["token"]], tiny_weights).deepest == "block_01/out"


def test_images_pass_the_trunk_once_and_tasks_of_one_form_share_a_program(tiny_weights):
  spec, starts = tiny_weights.spec, []
  built = backbones.build(spec)
  def apply(*arguments, start=0, **how):
    starts.append(start)
    return built.apply(*arguments, start=start, **how)
  chosen = {name: methods.build(method, spec, **options) for name, (method, options, _) in SERVED.items()}
  shapes = lambda name: jax.eval_shape(
      lambda: chosen[name].init(jax.random.key(0), tiny_weights.params, SERVED[name][2]))
  heads = {name: shapes(name) for name in SERVED}
  run = shared.make_predict(chosen, built._replace(apply=apply), Preprocessing(16))
  found = jax.eval_shape(run, heads, backbones.abstract_params(spec), jax.ShapeDtypeStruct((2, 16, 16, 3), np.uint8))
  assert {name: leaf.shape for name, leaf in found.items()} == {name: (2, each[2]) for name, each in SERVED.items()}
  assert sorted(starts) == [0, 1, 2, 2]
