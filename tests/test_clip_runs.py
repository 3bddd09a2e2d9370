"""Methods on a CLIP through the engine: runs, caches, parallel heads and shared serving, on a tiny CLIP."""
import functools

import jax
import numpy as np
import pytest
from engine import colours, recipe

from transferlab import backbones, devices, serve, shared
from transferlab.backbones.weights import image_tower
from transferlab.heads import Head, train_heads
from transferlab.features import loaders
from transferlab.method import classes, predict, settled
from transferlab.methods import METHODS, build
from transferlab.optim import Optim
from transferlab.testing import made_up_ids
from transferlab.train import fit

SPEC = backbones.architecture("clip_tiny_test")
SGD = Optim("sgd", lr=0.1, weight_decay=0.0)


@pytest.fixture(scope="module")
def clip(random_weights):
  return random_weights(SPEC)._replace(tokenizer=functools.partial(made_up_ids, SPEC))


def images(count=3):
  task = colours()
  return [task.splits["test"].read(i) for i in range(count)]


def test_zero_shot_trains_nothing_and_leaves_a_whole_run(clip, tmp_path):
  run = fit(clip, "zero_shot", colours(), recipe(), workdir=tmp_path, quiet=True)
  assert run.result["trainable"] == run.result["steps"] == run.result["train_flops"] == 0
  assert run.result["test"]["examples"] == 14 and run.result["val"]["examples"] == 10
  again = fit(clip, "zero_shot", colours(), recipe(), workdir=tmp_path, quiet=True)
  assert again.result == run.result
  classifier = serve.load(run.adapter, clip._replace(tokenizer=None))
  assert classifier(images()).shape == (3, 4)


def test_cached_runs_equal_streamed_ones(clip, tmp_path):
  """Of CoOp, whose step from the cache holds a text tower and no image tower."""
  how = recipe(optim=SGD, duration="2 epochs")
  streamed = fit(clip, "coop", colours(), how, options={"tokens": 2}, quiet=True)
  cached = fit(clip, "coop", colours(), how, options={"tokens": 2}, features=tmp_path, quiet=True)
  assert cached.result["val"]["accuracy"] == streamed.result["val"]["accuracy"]
  for a, b in zip(jax.tree.leaves(cached.trainable), jax.tree.leaves(streamed.trainable)):
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_what_of_a_run_is_in_bfloat16(clip):
  """The backbone's own arrays; not its scalar, whose exponential is taken, nor what a method has made of them."""
  frozen = {"image": clip.params["image"], "logit_scale": clip.params["logit_scale"],
            "nf4": {"scales": np.ones(2, np.float32)}, "prompts": np.ones((2, 3), np.int32)}
  found = jax.tree.map(lambda leaf: leaf.dtype.name, devices.cast(frozen, clip.params, "bfloat16"))
  assert set(jax.tree.leaves(found.pop("image"))) == {"bfloat16"}
  assert found == {"logit_scale": "float32", "nf4": {"scales": "float32"}, "prompts": "int32"}


def test_parallel_heads_equal_single_runs(clip, tmp_path):
  task, how = colours(), recipe(optim=SGD, duration="2 epochs", select="last")
  del task.splits["test"]
  method = build("lfa", SPEC, dropout=0.0)
  found = train_heads(method, clip, task, how, [Head(0.1, 0.0), Head(0.03, 0.0, seed=1)], quiet=True,
                      loaders=loaders(tmp_path, clip, method.reads, task, how, quiet=True))
  one = fit(clip, method, task, how, features=tmp_path, quiet=True)
  for a, b in zip(jax.tree.leaves(found.trainable), jax.tree.leaves(one.trainable)):
    np.testing.assert_allclose(a[0], b, atol=2e-6)


def test_methods_without_texts_adapt_the_image_tower(clip, tmp_path):
  run = fit(clip, "lora", colours(), recipe(duration="1 epoch"), workdir=tmp_path, quiet=True)
  assert run.result["backbone_hash"] == image_tower(clip).hash != clip.hash
  whole, tower = (serve.load(run.adapter, weights)(images()) for weights in (clip, image_tower(clip)))
  assert np.array_equal(whole, tower)


def test_adapters_on_a_clip_share_a_pass(clip, tmp_path):
  paths = []
  for method, options in (("lfa", {}), ("coop", {"tokens": 2}), ("zero_shot", {})):
    paths.append(fit(clip, method, colours(), recipe(duration="1 epoch"), options=options, workdir=tmp_path / method,
                     quiet=True).adapter)
  together = shared.load_many({path.parent.name: path for path in paths}, clip)
  assert together.deepest == "image/projected"
  found = together(images())
  for path in paths:
    np.testing.assert_allclose(found[path.parent.name], serve.load(path, clip)(images()), atol=1e-5)


def test_what_several_tasks_keep_is_on_the_device_once():
  kept = {"text": np.ones(3), "prompts": 5}
  a, b = shared.put_once(({**kept, "mine": np.ones(3)}, kept))
  assert a["text"] is b["text"] and a["mine"] is not a["text"] and isinstance(b["text"], jax.Array)
  np.testing.assert_array_equal(b["text"], kept["text"])


@pytest.mark.parametrize("method, options", [("coop", {"tokens": 2}), ("maple", {"depth": 2}), ("qlora", {"rank": 2})])
def test_a_trained_method_predicts_without_its_text_tower(clip, method, options):
  """What its texts come to is computed once, where a classifier is loaded, and predictions stay the same."""
  built, backbone = build(method, SPEC, **options), backbones.build(SPEC)
  trainable, state = built.init(jax.random.key(0), clip.params, classes(built, colours().class_names, clip.tokenizer))
  trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
  frozen = built.prepare(clip.params, state)
  kept = settled(built, backbone, trainable, state, frozen)
  assert "text" in frozen and "text" not in kept
  run = jax.jit(lambda frozen, images: predict(built, backbone, trainable, state, frozen, images))
  pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  np.testing.assert_allclose(run(kept, pixels), run(frozen, pixels), atol=1e-5)


def test_what_a_clip_lacks_is_said(clip, tiny_weights):
  with pytest.raises(ValueError, match="lfa reads class names as texts, and clip_tiny_test came without a tokenizer"):
    fit(clip._replace(tokenizer=None), "lfa", colours(), recipe(), quiet=True)
  with pytest.raises(ValueError, match="lfa needs an image and a text tower, as a CLIP has; vit_tiny_test has none"):
    fit(tiny_weights, "lfa", colours(), recipe(), quiet=True)


def test_every_method_can_be_built_for_a_clip():
  for name in METHODS:
    if name != "head2toe_given":  # has no default selection
      backbone = build(name, backbones.architecture("clip_vit_b16")).writes_from
      assert 0 <= backbone <= 12, name
