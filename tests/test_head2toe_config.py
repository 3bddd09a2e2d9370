"""configs/head2toe.py: the paper's names, grids and quirks, and a run with all the quirks, from images to answers."""
import dataclasses
import json
from pathlib import Path

import engine
import jax
import numpy as np
import pytest

from transferlab import data, experiment, inform, methods, serve, train
from transferlab.backbones.spec import ResNetSpec
from transferlab.backbones.weights import save_weights
from transferlab.checkpoint import save_adapter
from transferlab.recipe import train_loader

CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "head2toe.py")
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
PAPER = ("linear", "all_none", "all_l1", "all_l2", "all_l21", "head2toe", "head2toe_ft", "head2toe_ft_plus",
         "head2toe_layers", "full", "scratch")


def load(text=""):
  return experiment.load(f"{CONFIG}:{text}")


@pytest.mark.parametrize("name", PAPER)
def test_each_name_of_the_paper_is_a_method(name, tiny_spec):
  found, options, recipe = experiment.parse(load(f"method={name},compat=paper"))
  method = methods.build(found.method, tiny_spec, **options)
  assert (method.writes_from < tiny_spec.depth) == (name in ("full", "scratch"))  # the others begin on a frozen one
  assert recipe.optim.lr_factors == ((("classifier/.*", 100.0),) if name.endswith(("ft", "ft_plus", "full")) else ())
  if name in ("linear", "full"):
    assert options["sites"] == "pooled" and options["normalisation"] == "unit" and method.then is None
  if name.startswith("all_"):
    assert options["penalty"] == name.removeprefix("all_") and options["sites"] == "paper"


def test_the_recipe_is_the_papers():
  _, _, recipe = experiment.parse(load())
  assert (recipe.batch_size, recipe.drop_last, recipe.augmentation, recipe.select) == (128, False, "none", "last")
  assert dataclasses.asdict(recipe.optim) == {
      **dataclasses.asdict(train.Recipe().optim), "name": "adam_keras", "lr": 0.01, "schedule": "cosine",
      "weight_decay": 0.0, "eps": 1e-7, "clip": 0.0, "warmup": "0 steps"}


def test_the_recipes_order_reaches_the_batches(tiny_weights):
  for compat, same in (("", False), ("paper", True)):
    _, _, recipe = experiment.parse(load(f"compat={compat}"))
    loader = train_loader(dataclasses.replace(recipe, batch_size=40), engine.colours(), tiny_weights.preprocessing)
    assert (next(loader)["index"].tolist() == next(loader)["index"].tolist()) == same
    loader.close()


@pytest.mark.parametrize("name, lr, points", [
    ("linear", (0.1, 0.01), 4), ("all_none", (0.1, 0.01), 12), ("all_l1", (0.1, 0.01), 36),
    ("all_l2", (0.1, 0.01), 36), ("all_l21", (0.1, 0.01), 36), ("head2toe", (0.1, 0.01), 24),
    ("head2toe_layers", (0.1, 0.01), 24), ("head2toe_ft", (1e-3, 1e-4), 192),
    ("head2toe_ft_plus", (1e-3, 1e-4), 384), ("full", (1e-3, 1e-4), 4), ("scratch", (1e-3, 1e-4), 4)])
def test_the_grid_is_the_papers(name, lr, points):
  """2 rates x 2 durations, and of what reads many layers x 3 target sizes x 2 or 3 coefficients x 8 fractions."""
  text = f"method={name}"
  grid = experiment.load_grid(f"{CONFIG}:{text}")
  assert grid["optim.lr"] == list(lr) and grid["duration"] == ["500 steps", "5000 steps"]
  assert np.prod([len(values) for values in grid.values()]) == points
  if "options.fraction" in grid:  # side by side in one training where they can be
    assert grid["options.fraction"] == ([FRACTIONS] if points == 24 else list(FRACTIONS))
  if "options.target_size" in grid:
    assert grid["options.target_size"] == [512, 8192, 24576]
  config = load(text)
  for key, values in grid.items():
    for value in values:
      experiment.change(config, key, value)
  experiment.parse(config)


def test_methods_of_other_papers_have_no_grid_here():
  assert experiment.load_grid(f"{CONFIG}:method=lora") == {}
  assert load("method=lora").optim.lr == experiment.defaults("lora").optim.lr


def test_compat_asks_for_the_three_quirks():
  default, paper = load("backbone=x.npz,logits=true"), load("backbone=x.npz,logits=true,compat=paper")
  assert default.logits and default.backbone == "x.npz" and paper.data == default.data == (
      "vtab/dtd?phase=final&source=&counts=expected")
  different = {key for key in default if default[key] != paper[key]}
  assert different == {"preprocessing", "reshuffle", "options"}
  assert default.reshuffle and not paper.reshuffle and paper.preprocessing == (
      "crop=squash,crop_fraction=1,interpolation=bilinear_tf1")
  assert (default.options.compat, paper.options.compat) == (None, "paper")
  with pytest.raises(ValueError, match="config argument compat is 'papers'; expected paper, or nothing"):
    load("compat=papers")


def test_a_run_with_all_quirks(tiny_weights, tmp_path):
  """Trained on pixels with fractions, in one order; the adapter keeps the resize and answers for any image with it."""
  found, options, recipe = experiment.parse(load("method=linear,compat=paper"))
  recipe = dataclasses.replace(recipe, duration="6 steps", batch_size=16, devices=1)  # of 40 images, the last batch 8
  tf1 = tiny_weights.preprocessing.changed(found.preprocessing)
  result = train.fit(tiny_weights._replace(preprocessing=tf1), found.method, engine.colours(), recipe, options=options,
                     workdir=tmp_path, quiet=True)
  assert result.result["preprocessing"]["interpolation"] == "bilinear_tf1" and result.result["steps"] == 6
  assert not json.loads((tmp_path / "config.json").read_text())["recipe"]["reshuffle"]
  classifier = serve.load(result.adapter, tiny_weights)  # what it was trained with, not what lies beside the weights
  assert classifier.preprocessing == tf1 and classifier.method.options["compat"] == "paper"
  images = np.random.default_rng(0).integers(0, 256, (3, 25, 41, 3), np.uint8)
  logits = lambda preprocessing: np.asarray(classifier.logits(np.stack(
      [data.preprocess(image, preprocessing) for image in images])))
  wanted = np.exp(logits(tf1)) / np.exp(logits(tf1)).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(classifier(images, batch_size=3), wanted, atol=1e-6)
  assert np.abs(logits(tf1) - logits(tf1.changed("interpolation=bilinear"))).max() > 1e-3


def test_a_resnets_logits_are_read_where_the_configuration_says_so(random_weights, tmp_path):
  """And an adapter so trained finds them in the same file again."""
  spec = ResNetSpec("small", 32, (1, 1), (16, 32), stem_width=8, version=2)
  head = {"kernel": np.ones((32, 7), np.float32), "bias": np.zeros(7, np.float32)}
  plain = random_weights(spec)._replace(head=head)
  file = str(save_weights(plain, tmp_path / "resnet.safetensors"))
  found, options, _ = experiment.parse(load(f"method=all_none,backbone={file},logits=true"))
  weights = experiment.weights_of(found)
  method = methods.build(found.method, weights.spec, **options)
  assert weights.spec.classes == 7 and list(method.reads)[-1] == "logits"
  without = experiment.weights_of(dataclasses.replace(found, logits=False))
  assert without.spec.classes == 0 and "logits" not in methods.build(found.method, without.spec, **options).reads
  trainable, state = method.init(jax.random.key(0), weights.params, 3)
  save_adapter(tmp_path / "adapter.safetensors", method, trainable, state, weights=weights, class_names=("a", "b", "c"))
  for given in (file, plain, weights):
    classifier = serve.load(tmp_path / "adapter.safetensors", given)
    assert classifier.weights.spec.classes == 7 and classifier.weights.hash == weights.hash
  with pytest.raises(ValueError, match="classes 7 and 0"):
    serve.load(tmp_path / "adapter.safetensors", plain._replace(head=None))


def test_the_memory_of_467688_features_is_known_beforehand():
  """Peak of a step of 128 images and 100 classes from a cache: the head with its gradient and two moments (187 MB
  each), the batch, which is never copied (239 MB), and not much else. See benchmarks/memory.py."""
  spec, _ = inform.find("resnet50_v2", logits=True)
  found = inform.costs(spec, "head2toe", {"target_size": 8192}, 100, batch_size=128, cached=True)[0]
  head, batch = 467688 * 100 * 4, 128 * 467688 * 4
  assert found["trainable"] == 46_768_900 and found["bytes_per_image"] == 467688 * 4
  assert 4 * head + batch < found["train_peak_bytes"] < 5.2 * head + 1.2 * batch < 1.3e9
