"""Zero-shot CLIP, its linear probes and CLIP-Adapter against the original code, and what they promise beside that.

Goldens are compared as their README asks: logits to 1e-4 (1 + |x|), gradients and values after 3 steps to 1e-3 of a
tensor's largest value; in float32 matmuls. Steps run from cached activations, which are collected once for all tests.
"""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clip_goldens import golden_clip, golden_values
from engine import colours, recipe

from transferlab import backbones, experiment, methods
from transferlab.backbones.spec import Preprocessing
from transferlab.checkpoint import load_adapter
from transferlab.method import Context, collect, predict, sizes
from transferlab.methods import clip_text as ct
from transferlab.methods.clip_adapter import blend
from transferlab.methods.lfa import image_reads
from transferlab.optim import Optim, make_optimiser
from transferlab.step import make_step, start
from transferlab.testing import made_up_ids
from transferlab.train import fit

TINY, CLIP_B16 = (backbones.architecture(name) for name in ("clip_tiny_test", "clip_vit_b16"))
SGD = Optim("sgd", momentum=0.1, weight_decay=5e-4, decay=())


@pytest.fixture(scope="module")
def clip(golden):
  """(spec, parameters, what methods read of the images of a golden file {file: {site: [B, …]}})."""
  spec, params = golden_clip(golden, "T")
  fewshot, dg = golden_values(golden, "T_zeroshot"), golden_values(golden, "T_dg_zs_lp")
  parts = [fewshot["images"], *(dg[f"images_domain{d}"] for d in range(3)), dg["images_test"]]
  reads = {**ct.projected_image(), **image_reads(spec, spec.depth)}
  with jax.default_matmul_precision("highest"):
    run = jax.jit(lambda params, images: backbones.build(spec).apply(params, images, collect(reads, params), {})[1])
    found = {reads[slot].site: each for slot, each in run(params, np.concatenate(parts)).items()}
    rows = {"fewshot": slice(0, 6), "dg": slice(6, 18), "dg_test": slice(18, 23)}
    yield spec, params, {name: {site: x[part] for site, x in found.items()} for name, part in rows.items()}


def cached(method, activations: dict) -> dict:
  return {slot: activations[read.site] for slot, read in method.reads.items()}


def begin(method, params, ids, trainable=None):
  """(trainable, state, frozen) of a golden's texts."""
  own, state = method.init(jax.random.key(0), params, {ct.SLOT: ids})
  return own if trainable is None else trainable, state, method.prepare(params, state)


def training_step(method, spec, trainable, optim):
  """(optimiser, compiled step) of learning rate 0.01 on 5 classes."""
  optimiser = make_optimiser(optim, lambda step: 0.01, trainable)
  as_they_are = Preprocessing(32, mean=(0.0,) * 3, std=(1 / 255,) * 3)  # images of goldens are normalised already
  return optimiser, jax.jit(make_step(method, backbones.build(spec), optimiser, as_they_are, 5))


def train(step, begun, inputs, labels):
  """(losses of 3 steps, gradient of the first with its weight decay, trainable after them); inputs are images, or
  activations by slot."""
  (optimiser, step), (trainable, state, frozen) = step, begun
  given = {"activations": inputs} if isinstance(inputs, dict) else {"image": inputs}
  batch = {**given, "label": jnp.asarray(labels, jnp.int32), "weight": jnp.ones(len(labels))}
  run, losses, first = start(trainable, state, optimiser), [], None
  for _ in range(3):
    run, metrics = step(run, frozen, batch)
    losses.append(metrics["loss"])
    first = first or optax.tree_utils.tree_get(run.opt_state, "trace")  # of the momentum the first value
  return np.array(losses), first, run.trainable


def same_logits(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def same(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


# --- The originals ----------------------------------------------------------------------------------------------------

def test_zero_shot_golden(golden, clip):
  """Logits, and texts in chunks as all at once."""
  spec, params, activations = clip
  values, method = golden_values(golden, "T_zeroshot"), methods.build("zero_shot", spec)
  trainable, state, frozen = begin(method, params, values["token_ids"])
  assert trainable == {} and "text" not in frozen
  same_logits(predict(method, None, {}, state, frozen, cached(method, activations["fewshot"])),
              values["logits_per_image"])
  for chunk in (2, 0):
    texts, nothing = ct.encode(spec, params, values["token_ids"], chunk=chunk)
    same_logits(texts, values["text_features"])
    assert nothing == {}


def test_zero_shot_probabilities_golden(golden, clip):
  """The released domain-generalisation class, whose prompts have no final period."""
  spec, params, activations = clip
  values, ids = golden_values(golden, "T_dg_zs_lp"), golden_values(golden, "T_zeroshot")["token_ids"]
  method = methods.build("zero_shot", spec, templates="a photo of a {}")
  logits = predict(method, None, *begin(method, params, ids), cached(method, activations["dg_test"]))
  np.testing.assert_allclose(jax.nn.softmax(logits), values["zs_probabilities"], atol=1e-4)


def test_linear_probe_of_domain_generalisation_golden(golden, clip):
  """On the last block's class token and on those of blocks 0 and 1; texts are always read at the last."""
  spec, params, activations = clip
  values, ids = golden_values(golden, "T_dg_zs_lp"), golden_values(golden, "T_zeroshot")["token_ids"]
  method = methods.build("clip_linear", spec)
  begun = begin(method, params, ids)
  assert sum(leaf.size for leaf in jax.tree.leaves(begun[0])) == values["n_trainable"]
  step = training_step(method, spec, begun[0], dataclasses.replace(SGD, weight_decay=0.0))
  for layer in (-1, 0, 1):
    of = lambda name, layer=layer: values[f"lp_layer{layer}_{name}"]
    read = methods.build("clip_linear", spec, layer=layer)
    test = cached(read, activations["dg_test"])
    same_logits(predict(method, None, *begun, test), of("logits_init"))
    losses, _, trained = train(step, begun, cached(read, activations["dg"]), values["labels"].ravel())
    same(losses, of("losses"))
    for name in ("image_projection", "text_projection"):
      same(trained[name]["kernel"], of(f"{name}_step3"))
    same_logits(predict(method, None, trained, *begun[1:], test), of("logits_step3"))


def test_few_shot_linear_probe_golden(golden, clip):
  spec, params, activations = clip
  values = golden_values(golden, "T_linear_probe_fewshot")
  method = methods.build("clip_linear", spec, form="fewshot", dropout=0.0)
  begun = begin(method, params, values["token_ids"])
  same_logits(begun[2]["classes"], values["text_features_normalized"])
  same_logits(predict(method, None, *begun, cached(method, activations["fewshot"])), values["logits_eval"])
  losses, _, trained = train(training_step(method, spec, begun[0], SGD), begun,
                             cached(method, activations["fewshot"]), values["labels"])
  same(losses, values["sgd_losses"])
  assert list(trained) == ["image_projection"]
  same(trained["image_projection"]["kernel"], values["sgd3_visual_proj"])
  same_logits(predict(method, None, trained, *begun[1:], cached(method, activations["fewshot"])),
              values["sgd3_logits"])


def test_clip_adapter_golden(golden, clip):
  spec, params, activations = clip
  values = golden_values(golden, "T_clip_adapter")
  method = methods.build("clip_adapter", spec)
  begun = begin(method, params, values["token_ids"],
                {"adapter": {name: jnp.asarray(values[name].T) for name in ("down", "up")}})
  images = cached(method, activations["fewshot"])
  same_logits(predict(method, None, *begun, images), values["logits"])
  same_logits(blend(begun[0]["adapter"], images["image"], 1.0), values["adapter_out"])
  losses, gradient, trained = train(training_step(method, spec, begun[0], SGD), begun, images, values["labels"])
  same(losses, values["sgd_losses"])
  for name in ("down", "up"):
    same(gradient["adapter"][name] - 5e-4 * begun[0]["adapter"][name], values[f"grad_{name}"].T)
    same(trained["adapter"][name], values[f"sgd3_{name}"].T)


# --- What they promise beside that ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options, expected", [
    ("zero_shot", {}, 0), ("clip_linear", {}, 655_360), ("clip_linear", {"form": "fewshot"}, 393_216),
    ("clip_adapter", {}, 131_072)])
def test_published_sizes_on_vit_b16(name, options, expected):
  found = sizes(methods.build(name, CLIP_B16, **options), backbones.abstract_params(CLIP_B16), 10)
  assert (found.trainable, found.state) == (expected, 10 * 77)


def test_several_templates_are_an_ensemble():
  """Rows of a class lie together; each is normalised before their mean, which is normalised again."""
  texts = np.float32([[3, 0], [0, 1], [0, 2], [0, 8]])
  np.testing.assert_allclose(ct.ensemble(texts, 2), [[0.5 ** 0.5] * 2, [0, 1]], rtol=1e-6)
  method = methods.build("zero_shot", TINY, templates=("a {}.", "the {}"))
  assert method.prompts.strings(["big_dog", "cat"]) == {
      ct.SLOT: ["a big dog.", "the big dog", "a cat.", "the cat"]}


def test_linear_probes_train_through_several_templates():
  """Of C T texts both forms make C classes; at the start they say what zero-shot says."""
  rng = np.random.default_rng(0)
  params = {"text_projection": {"kernel": jnp.asarray(rng.standard_normal((24, 12)), jnp.float32)},
            "image_projection": {"kernel": jnp.asarray(rng.standard_normal((16, 12)), jnp.float32)}}
  texts, image = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((6, 24), (2, 16)))
  classes = ct.ensemble(texts @ params["text_projection"]["kernel"], 2)
  wanted = ct.cosine_logits(image @ params["image_projection"]["kernel"], classes, jnp.zeros(()))
  for form, kept in (("dg", texts), ("fewshot", classes)):
    method = methods.build("clip_linear", TINY, form=form, templates=("a {}.", "the {}"))
    trainable, _ = method.init(None, params, {})
    assert set(trainable) == {"dg": set(params), "fewshot": {"image_projection"}}[form]
    ctx = Context(frozen={"classes": kept, "logit_scale": jnp.zeros(())})
    np.testing.assert_allclose(method.readout(trainable, None, {"image": image}, ctx), wanted, atol=1e-6)


def test_dropout_of_the_few_shot_probe_is_on_vectors_of_length_1():
  """In training alone, on images and texts apart; what is left is scaled by 1 / 0.8 and not normalised again."""
  params = {"image_projection": {"kernel": jnp.eye(16, 12)}}
  image, ctx = jnp.ones((4, 16)), Context(frozen={"classes": jnp.eye(12), "logit_scale": jnp.zeros(())})
  logits = lambda form, ctx: np.asarray(methods.build("clip_linear", TINY, form=form).readout(
      {**params, "text_projection": {"kernel": jnp.eye(12)}}, None, {"image": image}, ctx))
  whole = 12 ** -0.5
  np.testing.assert_allclose(logits("fewshot", ctx), whole, rtol=1e-6)
  found = logits("fewshot", ctx._replace(train=True, rng=jax.random.key(0)))
  kept = found != 0
  np.testing.assert_allclose(found[kept], whole / 0.64, rtol=1e-6)
  columns = kept.any(axis=0)  # a text that is dropped is so for all images
  assert 0 < columns.sum() < 12 and not kept[:, columns].all()
  np.testing.assert_allclose(logits("dg", ctx._replace(train=True, rng=jax.random.key(0))), whole, rtol=1e-6)


def test_a_run_of_zero_shot_trains_nothing_and_leaves_a_file(random_weights, tmp_path):
  spec = dataclasses.replace(TINY, depth=1, text_depth=1)
  weights = random_weights(spec)._replace(tokenizer=functools.partial(made_up_ids, spec))
  task = colours()
  found = fit(weights, "zero_shot", task, recipe(), options={"templates": ("a {}", "the {}")}, workdir=tmp_path,
              quiet=True)
  assert (found.result["steps"], found.result["trainable"], found.trainable) == (0, 0, {})
  adapter = load_adapter(found.adapter)
  np.testing.assert_array_equal(adapter.state[ct.SLOT], weights.tokenizer(adapter.method.prompts.strings(
      task.class_names)[ct.SLOT]))


@pytest.mark.parametrize("text, expected", [
    ("{}", "{}"), ("a photo of a {}", "a photo of a {}"), ("('{}', 'the {}')", ("{}", "the {}"))])
def test_templates_from_a_command_line(text, expected):
  config = experiment.defaults("zero_shot", data="digits")
  experiment.change(config, "options.templates", text)
  assert experiment.parse(config)[1] == {"templates": expected}


@pytest.mark.parametrize("name, options, message", [
    ("zero_shot", {"templates": "a photo"}, "has 0 places for a class name"),
    ("zero_shot", {"templates": ()}, "there is no template"),
    ("clip_linear", {"form": "both"}, "form is 'both'; expected 'dg' or 'fewshot'"),
    ("clip_linear", {"layer": 3}, "layer is 3; expected -1 for the last, or 0 to 2"),
    ("clip_adapter", {"ratio": 1.5}, "ratio is 1.5"), ("clip_adapter", {"reduction": 0}, "reduction 0")])
def test_what_is_wrong_is_said(name, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    methods.build(name, TINY, **options)


def test_they_need_a_text_tower():
  with pytest.raises(ValueError, match="zero_shot needs an image and a text tower"):
    methods.build("zero_shot", backbones.architecture("vit_tiny_test"))
