"""DPL: the original's numbers, what belongs to a domain, and what a prediction depends on."""
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clip_goldens import golden_clip, golden_values
from engine import colours, recipe
from scipy.special import log_softmax

from transferlab import backbones, methods, serve
from transferlab.method import Context, classes, forward, predict, sizes
from transferlab.methods.dpl import _mlp, dpl
from transferlab.optim import Optim, make_optimiser
from transferlab.testing import made_up_ids
from transferlab.train import fit


class Original(NamedTuple):
  """The golden in our terms. Rows of a step are the original's 12 and two of filling, whose domain 0 is not trained on.
  """
  spec: Any
  values: dict
  state: dict
  frozen: dict
  backbone: Any
  batch: dict
  test: Any  # projected test images [5, d]

  def mlp(self, prefix: str) -> dict:
    names = {"layer_0": "input", "layer_1": "hiddens.0", "layer_2": "output"}
    value = lambda name: jnp.asarray(self.values[f"{prefix}/{name}"].T)
    return {"mlp": {ours: {"kernel": value(f"{theirs}.weight"), "bias": value(f"{theirs}.bias")}
                    for ours, theirs in names.items()}}

  def method(self, **options):
    return dpl(self.spec, tokens=2, width=24, dropout=0.0, **options)


@pytest.fixture(scope="module")
def original(golden):
  spec, params = golden_clip(golden, "W")
  g, backbone = golden_values(golden, "W_dg_dpl"), backbones.build(spec)
  images = np.concatenate([*(g[f"images_domain{d}"] for d in range(3)), g["images_test"]])
  with jax.default_matmul_precision("highest"):
    projected = np.array(jax.jit(lambda images: backbone.apply(params, images)[0].image)(images))  # [17, d]
  fill = lambda leaf, value=0: np.concatenate([leaf, np.full((2, *leaf.shape[1:]), value, leaf.dtype)])
  batch = {"activations": {"image": fill(projected[:12], 9)}, "label": fill(g["labels"].reshape(-1).astype(np.int32)),
           "weight": fill(np.ones(12, np.float32)), "domain": fill(np.repeat(np.int32([2, 3, 7]), 4))}
  state = {"prompts": g["tokenized_prompts"]}
  frozen = dpl(spec, tokens=2).prepare(params, state)
  del frozen["image"], frozen["image_projection"]
  return Original(spec, g, state, frozen, backbone, batch, projected[12:])


@pytest.fixture(scope="module")
def run_loss(original):
  """(batch, domains, trainable, **options of the method) -> (loss, gradient, Outputs)."""
  @functools.cache
  def program(domains, options):
    method = original.method(**dict(options))
    def loss(trainable, batch):
      batch = {**batch, "target": jax.nn.one_hot(batch["label"], 5)}
      ctx = Context(batch, original.state, original.frozen, {}, jax.random.key(0), True, domains=domains)
      outputs = forward(method, original.backbone, trainable, batch["activations"], ctx)
      return method.loss(trainable, outputs, ctx), outputs
    return jax.jit(jax.value_and_grad(loss, has_aux=True))
  def run(batch, domains=3, trainable=None, **options):
    trainable = trainable or original.mlp("init")
    with jax.default_matmul_precision("highest"):
      (value, outputs), gradient = program(domains, tuple(options.items()))(trainable, batch)
    return float(value), gradient, outputs
  return run


def close(found, wanted, rtol=1e-4):
  np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def trees_close(found, wanted, rtol):
  jax.tree.map(lambda a, b: close(a, b, rtol), found, wanted)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def predicted(original):
  """(which prefix of the golden's MLP, predict, weight [5]) -> logits of the test images."""
  programs = {how: jax.jit(lambda trainable, weight, how=how: predict(
      original.method(predict=how), original.backbone, trainable, original.state, original.frozen,
      {"image": original.test}, weight)) for how in ("batch", "image")}
  def run(prefix="init", how="batch", weight=(1, 1, 1, 1, 1)):
    trainable = prefix if isinstance(prefix, dict) else original.mlp(prefix)
    with jax.default_matmul_precision("highest"):
      return np.array(programs[how](trainable, np.float32(weight)))
  return run


def test_released_losses_and_steps_are_the_originals(original, run_loss, predicted):
  g, trainable, found = original.values, original.mlp("init"), []
  optimiser = make_optimiser(Optim("sgd", momentum=float(g["momentum"]), weight_decay=0.0, decay=()),
                             lambda step: float(g["lr"]), trainable)
  moments = optimiser.init(trainable)
  for _ in range(3):
    value, gradient, _ = run_loss(original.batch, trainable=trainable, compat="released")
    updates, moments = optimiser.update(gradient, moments, trainable)
    trainable = optax.apply_updates(trainable, updates)
    found.append(value)
  np.testing.assert_allclose(found, g["losses"], rtol=1e-4)
  trees_close(trainable, original.mlp("step3"), 1e-3)
  close(predicted("init"), g["logits_test_init"])
  close(predicted(trainable), g["logits_test_step3"])


def test_the_loss_compares_an_image_with_its_own_domains_prompts(original, run_loss):
  """Read in float64 from the original's text features: 5-way, of the domain's own; released, 15-way, of the first's."""
  g, rows, label = original.values, np.arange(12), original.values["labels"].reshape(-1)
  value, _, outputs = run_loss(original.batch)
  text = g["text_features_per_domain"].astype(np.float64)                                       # [3, 5, d]
  close(unit(np.asarray(outputs.features.text)), unit(text).reshape(15, -1))
  image = unit(original.batch["activations"]["image"][:12].astype(np.float64))                  # [12, d]
  logits = 20 * np.einsum("bd,kcd->bkc", image, unit(text))
  own = logits[rows, rows // 4]
  close(outputs.logits[:12], own)
  assert value == pytest.approx(-log_softmax(own, axis=1)[rows, label].mean(), rel=1e-5)
  released = -log_softmax(logits.reshape(12, 15), axis=1)[rows, label].mean()
  assert run_loss(original.batch, compat="released")[0] == pytest.approx(released, rel=1e-5)
  assert abs(value - released) > 0.1


def test_with_one_domain_both_forms_are_one(original, run_loss):
  """In a batch that lacks the other two, which then are no columns of the released softmax."""
  batch = {**original.batch, "domain": np.full(14, 3, np.int32)}
  own, released = run_loss(batch), run_loss(batch, compat="released")
  assert own[0] == pytest.approx(released[0], rel=1e-6)
  trees_close(own[1], released[1], 1e-5)


def test_order_and_names_of_domains_and_what_fills_a_batch_change_nothing(original, run_loss):
  """The engine may also not tell how many domains there are."""
  order, batch = np.random.default_rng(0).permutation(14), dict(original.batch)
  other = jax.tree.map(lambda leaf: leaf[order], batch)
  other["domain"] = np.array([0, 0, 1, 4, 0, 0, 0, 5], np.int32)[other["domain"]]
  other["activations"] = {"image": other["activations"]["image"] + (other["weight"] == 0)[:, None]}
  for compat, domains in ((None, 3), ("released", 3), ("released", None)):
    (value, gradient, _), again = run_loss(batch, compat=compat), run_loss(other, domains, compat=compat)
    assert again[0] == pytest.approx(value, rel=1e-5)
    trees_close(again[1], gradient, 1e-4)


def test_texts_run_once_per_domain_and_class_and_no_longer_than_they_are(original):
  """Never per image: 3 x 5 texts for 14 images, 5 when predicting, of 12 tokens for the longest and not 77."""
  method, seen = original.method(), []
  ids = method.texts(Context(frozen=original.frozen))
  assert ids.shape == (5, 12)
  for ctx in (Context(original.batch, train=True, domains=3), Context()):
    visit = method.visit(original.mlp("init"), ctx)
    embed = lambda y, visit=visit: visit({"image": jnp.zeros((14, 32))}, "text/embed", y, ids)[1]
    seen.append(jax.eval_shape(embed, jnp.zeros((*ids.shape, 32))).shape)
  assert seen == [(15, 12, 32), (5, 12, 32)]


def test_predictions_by_image_are_those_of_batches_of_one(predicted):
  alone = np.stack([predicted(weight=np.eye(5)[i])[i] for i in range(5)])  # the rest of each batch is filling
  close(predicted(how="image"), alone, 1e-5)
  close(predicted(how="image", weight=(1, 1, 1, 0, 0))[:3], alone[:3], 1e-5)
  assert np.abs(alone - predicted()).max() > 1e-2  # what a batch says of an image depends on the others


def test_dropout_is_behind_every_layer_but_the_last():
  """In training alone, of a draw of its own for each: two of three layers halve what is left, and double it."""
  layers, x = {f"layer_{i}": {"kernel": jnp.eye(40), "bias": jnp.zeros(40)} for i in range(3)}, jnp.ones((100, 40))
  found = np.array(_mlp(layers, x, 0.5, Context(rng=jax.random.key(0), train=True)))
  assert np.unique(found).tolist() == [0, 4] and abs(np.mean(found == 4) - 0.25) < 0.03
  np.testing.assert_array_equal(_mlp(layers, x, 0.5, Context()), x)


def test_published_size():
  spec = backbones.architecture("clip_vit_b16")
  assert sizes(methods.build("dpl", spec), backbones.abstract_params(spec), 7).trainable == 4_727_808


@pytest.mark.parametrize("options, message", [
    ({"predict": "domains"}, "expected predict 'batch' or 'image'"), ({"compat": "paper"}, "compat None or 'released'"),
    ({"tokens": 0}, "tokens is 0"), ({"depth": 1}, "depth of 2 or more"), ({"template": "a photo"}, "0 places")])
def test_options_out_of_range_are_errors(options, message):
  with pytest.raises(ValueError, match=message):
    methods.build("dpl", backbones.architecture("clip_tiny_test"), **options)


# On data with domains

@pytest.fixture(scope="module")
def of_domains():
  """The easy task with domains 0 and 2 to train on, and 1 held out."""
  task, ids = colours(), {"train": np.arange(40) % 2 * 2, "val": np.arange(10) % 2 * 2, "test": np.full(14, 1)}
  splits = {name: dataclasses.replace(split, domains=ids[name]) for name, split in task.splits.items()}
  return dataclasses.replace(task, splits=splits, domain_names=("a", "b", "c"))


@pytest.fixture(scope="module")
def weights(random_weights):
  found = random_weights(backbones.architecture("clip_tiny_test"))
  return found._replace(tokenizer=functools.partial(made_up_ids, found.spec))


OPTIONS = {"tokens": 2, "width": 8}
PER_DOMAIN = recipe(batch_size=6, per_domain=True, duration="4 steps")


def test_a_run_knows_its_domains_saves_and_loads(of_domains, weights, tmp_path):
  method, told = methods.build("dpl", weights.spec, **OPTIONS), []
  watched = lambda trainable, outputs, ctx: told.append(ctx.domains) or method.loss(trainable, outputs, ctx)
  run = fit(weights, method._replace(loss=watched), of_domains, PER_DOMAIN, workdir=tmp_path, quiet=True)
  assert set(told) == {2} and colours().splits["train"].domain_count == 1
  served = serve.load(run.adapter, weights)
  assert serve.evaluate(served, of_domains, batch_size=32, quiet=True).loss == pytest.approx(
      run.result["test"]["loss"], rel=1e-5)
  np.testing.assert_array_equal(served.state["prompts"], run.state["prompts"])
  image = np.full((16, 16, 3), 50, np.uint8)
  np.testing.assert_allclose(served([image]), served([image] * 32)[:1], rtol=1e-5)  # 31 rows of filling do not count


def test_micro_batches_are_refused(of_domains, weights):
  with pytest.raises(ValueError, match="dpl needs its batches whole.*2 micro-batches; set micro_batch=0"):
    fit(weights, "dpl", of_domains, dataclasses.replace(PER_DOMAIN, micro_batch=6), options=OPTIONS, quiet=True)


def test_class_names_reach_the_prompts(weights):
  method = methods.build("dpl", weights.spec, tokens=3)
  texts = method.prompts.strings(["alarm_clock", "dog"])
  assert texts == {"prompts": ["X X X a photo of a alarm clock.", "X X X a photo of a dog."]}
  assert classes(method, ["alarm_clock", "dog"], weights.tokenizer)["prompts"].shape == (2, 16)
