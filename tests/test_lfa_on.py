"""LFA on CoOp, CLIP-Adapter, MaPLe and QLoRA: the original code's numbers, and how the two stages meet."""
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_goldens import golden_clip, golden_values
from engine import colours, metrics, recipe
from test_clip_simple import SGD, cached, clip, same, same_logits, train, training_step  # noqa: F401

from transferlab import backbones, methods, serve, tree
from transferlab.checkpoint import load_adapter
from transferlab.method import Context, classes, forward, predict, sizes
from transferlab.methods import clip_text as ct
from transferlab.methods.lfa_on import RECIPES
from transferlab.optim import Optim
from transferlab.recipe import Recipe
from transferlab.testing import made_up_ids
from transferlab.train import fit

TINY, CLIP_B16 = (backbones.architecture(name) for name in ("clip_tiny_test", "clip_vit_b16"))
FLAT = dataclasses.replace(TINY, depth=1, text_depth=1)  # compiles quickly


def matrices(values: dict, prefix: str) -> dict:
  """The eight matrices of a few-shot golden, which holds (out, in)."""
  of = lambda name: jnp.asarray(values[f"{prefix}/{name}"].T)
  return {"image": {k: of(f"image_encoder.{k.upper()}") for k in "qkv"},
          "text_self": {k: of(f"text_encoder.{k.upper()}_self") for k in "qkv"},
          "text_cross": {k: of(f"text_encoder.{k.upper()}_cross") for k in "kv"}}


def maple_of(values: dict) -> dict:
  """MaPLe's trainable of a golden's parameters; torch's linear maps are (out, in)."""
  of = lambda name: jnp.asarray(values[f"maple/{name}"])
  linear = lambda name: {"kernel": of(f"{name}.weight").T, "bias": of(f"{name}.bias")}
  deep = {f"block_{i + 1:02d}": {"context": of(f"compound_prompts_text.{i}"),
                                 "projection": linear(f"compound_prompt_projections.{i}")} for i in range(2)}
  return {"context": of("ctx"), "projection": linear("proj"), **deep}


FEWSHOT = {  # golden: base, its options, its trainable, the golden's ids
    "T_lfa_on_coop": ("coop", (("tokens", 4),), lambda v: {"context": jnp.asarray(v["ctx"])}, "tokenized_prompts"),
    "T_lfa_on_clip_adapter": ("clip_adapter", (), lambda v: {
        "adapter": {k: jnp.asarray(v[k].T) for k in ("down", "up")}}, "token_ids"),
    "T_lfa_on_maple": ("maple", (("depth", 3),), maple_of, "tokenized_prompts")}


def second_stage(first, params, trained, ids):
  """(method, state, frozen) of LFA on what the first stage trained."""
  classes = {ct.SLOT: ids.astype(np.int32)}
  _, state = first.init(jax.random.key(0), params, classes)
  second = first.then(trained, state)
  _, state = second.init(jax.random.key(0), params, classes)
  return second, state, second.prepare(params, state)


@pytest.mark.parametrize("name", FEWSHOT)
def test_few_shot_golden(golden, clip, name):  # noqa: F811
  """Logits, loss and the gradient of all eight matrices."""
  spec, params, activations = clip
  base, options, trained_of, ids = FEWSHOT[name]
  values = golden_values(golden, name)
  first = methods.build("lfa", spec, base=base, base_options=options, dropout=0.0)
  method, state, frozen = second_stage(first, params, trained_of(values), values[ids])
  images = cached(method, activations["fewshot"]) if method.reads else values["images"]
  target = jax.nn.one_hot(values["labels"], 5)

  @jax.jit
  def run(trainable, state, frozen, images):
    ctx = Context({"target": target, "weight": jnp.ones(6)}, state, frozen, rng=jax.random.key(0), train=True)
    def loss(trainable):
      outputs = forward(method, backbones.build(spec), trainable, images, ctx)
      return method.loss(trainable, outputs, ctx), outputs
    (loss, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    return loss, outputs.logits, outputs.carry, gradient

  loss, logits, carry, gradient = run(matrices(values, "param"), state, frozen, images)
  same_logits(logits, values["logits"])
  same_logits(loss, values["loss"])
  jax.tree.map(same, gradient, matrices(values, "grad"))
  if base == "maple":
    same_logits(carry["image"], values["image_layer_features"].transpose(1, 0, 2))
    same_logits(carry["text"][:, 0], values["text_layer_features"].transpose(1, 0, 2))


def lora_of(values: dict) -> dict:
  """LoRA's pairs of a golden; torch's are (R, in) and (out, R)."""
  def tower(name: str, there: str) -> dict:
    of = lambda i, target: f"lora/{there}.encoder.layers.{i}.self_attn.{target}_proj.lora_"
    return {f"block_{i:02d}": {t: {k: jnp.asarray(values[of(i, t) + k.upper()].T) for k in "ab"}
                               for t in ("q", "k", "v", "out")} for i in range(4)}
  return {"lora": {"image": tower("image", "vision_model"), "text": tower("text", "text_model")}}


def test_domain_generalisation_golden(golden):
  """LFA on LoRA in both towers, whose base is not quantised there: layers, logits, losses and 3 steps."""
  spec, params = golden_clip(golden, "T")
  values = golden_values(golden, "T_dg_lora_lfa")
  dg = lambda prefix: {branch: {k: jnp.asarray(values[f"{prefix}/{there}_{k.upper()}.origin"]) for k in names}
                       for branch, (there, names) in {"image": ("visual_self", "qkv"), "text_cross":
                           ("textual_cross", "kv"), "text_self": ("textual_self", "qkv")}.items()}
  first = methods.build("lfa", spec, templates="a photo of a {}", init="clip", dropout=0.0, base="qlora",
                        base_options=(("base", "none"),))
  method, state, frozen = second_stage(first, params, lora_of(values), values["token_ids"])
  start, _ = method.init(jax.random.key(0), params, {ct.SLOT: values["token_ids"]})
  jax.tree.map(same, start, dg("init"))
  assert not {"text", "text_projection"} & set(frozen)
  run = jax.jit(lambda trainable, images: forward(method, backbones.build(spec), trainable, images,
                                                  Context(state=state, frozen=frozen)))
  test = run(start, values["images_test"])
  same_logits(test.carry["image"], values["image_layer_features_test"].transpose(1, 0, 2))
  same_logits(test.carry["text"][:, 0], values["text_layer_features"].transpose(1, 0, 2))
  same_logits(test.logits, values["logits_test_init"])
  images = np.concatenate([values[f"images_domain{d}"] for d in range(3)])
  step = training_step(method, spec, start, dataclasses.replace(SGD, weight_decay=0.0))
  losses, _, trained = train(step, (start, state, frozen), images, values["labels"].ravel())
  same(losses, values["losses"])
  jax.tree.map(same, trained, dg("step3"))
  same_logits(run(trained, values["images_test"]).logits, values["logits_test_step3"])


# --- The two stages ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(random_weights):
  return random_weights(FLAT)._replace(tokenizer=functools.partial(made_up_ids, FLAT))


def test_a_run_trains_the_base_with_its_own_recipe_then_lfa(weights, tmp_path):
  """Both stages from one cache; the file holds both, and a classifier loaded from it says what the run said."""
  task = colours()
  task = dataclasses.replace(task, splits={name: task.splits[name] for name in ("train", "test")})
  options = {"base": "clip_adapter", "base_options": (("ratio", 0.5),), "base_recipe": (("duration", "3 steps"),)}
  fitted = fit(weights, "lfa", task, recipe(duration="2 steps", batch_size=20), options=options, quiet=True,
               workdir=tmp_path / "run", features=tmp_path / "cache")
  rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
  assert [(row["stage"], row["step"]) for row in rows] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
  assert [row["lr"] for row in rows[::3]] == pytest.approx([1e-5, 1e-2])  # CLIP-Adapter's first epoch, and the run's
  assert set(fitted.trainable) == {"image", "text_self", "text_cross"} and list(fitted.state["base"]) == ["adapter"]
  assert load_adapter(fitted.adapter).header["options"] == json.loads(json.dumps(fitted.method.options))
  scores = serve.evaluate(serve.load(fitted.adapter, weights=weights), task, quiet=True)
  assert scores.loss == pytest.approx(fitted.result["test"]["loss"], rel=1e-5)


def test_a_trained_base_serves_as_first_stage(weights):
  """Of an adapter that is already there only the second stage is run: `then` of the first takes what was trained."""
  base = methods.build("clip_adapter", FLAT, ratio=0.5)
  trained, state = base.init(jax.random.key(3), weights.params, classes(base, 4, weights.tokenizer))
  first = methods.build("lfa", FLAT, base="clip_adapter", base_options=tuple(base.options.items()))
  second = first.then(trained, state)
  assert second.name == first.name == "lfa" and second.options == first.options and second.then is None
  own, state = second.init(jax.random.key(0), weights.params, classes(second, 4, weights.tokenizer))
  frozen = second.prepare(weights.params, state)
  images = {slot: jnp.ones((2, 16)) * (i + 1) for i, slot in enumerate(second.reads)}
  found = predict(second, None, own, state, frozen, images)
  other = predict(second, None, own, {**state, "base": jax.tree.map(jnp.zeros_like, trained)}, frozen, images)
  assert np.abs(found - other).max() > 1e-3  # the adapter is in use


@pytest.mark.parametrize("base", ["coop", "clip_adapter", "maple", "qlora"])
def test_sizes_and_recipes_on_clip_b16(base):
  """2,490,368 parameters train on any base; its own stage follows its table."""
  first = methods.build("lfa", CLIP_B16, base=base, base_recipe=(("lr", 1),))
  params = backbones.abstract_params(CLIP_B16)
  trained, state = jax.eval_shape(lambda rng, p: first.init(rng, p, classes(first, 3)), jax.random.key(0), params)
  second = first.then(trained, state)
  assert sizes(second, params, 3).trainable == 2_490_368
  assert first.recipe == {**RECIPES[base], "optim": {**RECIPES[base]["optim"], "lr": 1.0}}
  assert bool(second.reads) == (base in ("coop", "clip_adapter"))  # these may run from a cache
  Recipe(**{**first.recipe, "optim": Optim(**first.recipe["optim"])})


def test_a_frozen_base_has_no_dropout(weights):
  """QLoRA's, and LFA's own switched off: a training step sees what a prediction sees, without 4-bit texts."""
  first = methods.build("lfa", FLAT, base="qlora", base_options=(("dropout", 0.9),), dropout=0.0)
  known = classes(first, 4, weights.tokenizer)
  trained, state = first.init(jax.random.key(0), weights.params, known)
  trained = jax.tree.map(lambda x: x + 0.1, trained)
  second = first.then(trained, state)
  own, state = second.init(jax.random.key(0), weights.params, known)
  frozen = second.prepare(weights.params, state)
  assert not any("text/" in name for name in tree.flatten(frozen))
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
  def logits(frozen, state, images, train):
    ctx = Context({}, state, frozen, rng=jax.random.key(1) if train else None, train=train)
    return forward(second, backbones.build(FLAT), own, images, ctx).logits
  found = jax.jit(lambda *arrays: [logits(*arrays, train) for train in (True, False)])(frozen, state, images)
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("options, message", [
    ({"base": "cop"}, "base 'cop' is unknown; nearest: coop"),
    ({"base_options": (("tokens", 4),)}, "base is 'none' and base_options or base_recipe give ('tokens', 4)"),
    ({"base": "coop", "base_options": ("tokens", 4)}, "expected pairs of a name and a value, such as (('tokens', 4),)"),
    ({"base": "coop", "base_options": (("token", 4),)}, "method 'coop' has no option 'token'; nearest: tokens"),
    ({"base": "clip_adapter", "base_recipe": (("epochs", 4),)}, "base_recipe has no 'epochs'"),
    ({"base": "clip_adapter", "base_recipe": (("lr", "fast"),)}, "base_recipe's lr is 'fast'; expected float"),
    ({"base": "maple", "base_options": (("depth", 2),), "templates": ("a {}", "the {}")}, "brings a prompt of its own"),
    ({"base": "clip_adapter", "base_options": (("templates", "the {}"),)}, "share the option 'templates'")])
def test_what_is_wrong_is_said(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    methods.build("lfa", TINY, **options)
