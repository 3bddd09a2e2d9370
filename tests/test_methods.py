"""Methods against the original implementations, and what each of them promises beside the conformance table.

Goldens are float32 runs of the original torch code, with a float64 run beside them. Tensors are compared with the
float64 run to 1e-6 of their largest value, or 1e-6 itself where that is below 1; or to twice what torch's own float32
is off, where that is more. It is for the gradients of NOAH's LoRA, whose float32 is 2.0e-6 off in torch and 1.8e-6
here. The others agree to 2e-7.
"""
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferlab as tl
from transferlab import backbones, data, methods, tree
from transferlab.backbones.spec import ViTSpec
from transferlab.backbones.weights import names
from transferlab.checkpoint import load_adapter
from transferlab.method import Context, chain, forward, predict, sizes, stages, visitor
from transferlab.methods import classifier

GOLDEN = ViTSpec("golden", 32, 8, 32, 4, 4, 128)
VIT_B16 = backbones.architecture("vit_b16")


def error(found, wanted):
  """Largest difference over all leaves, each in units of its largest value or of 1."""
  found, wanted = tree.flatten(found), tree.flatten(wanted)
  return max(np.abs(found[n] - wanted[n]).max() / max(1, np.abs(wanted[n]).max()) for n in wanted)


def close(found, wanted, tolerance=1e-6):
  """Same names, and every leaf to `tolerance` of its largest value or of 1."""
  found, wanted = tree.flatten(found), tree.flatten(wanted)
  assert found.keys() == wanted.keys()
  chex.assert_trees_all_equal_shapes(found, wanted)
  for name, leaf in wanted.items():
    np.testing.assert_allclose(found[name], leaf, rtol=0, atol=tolerance * max(1, np.abs(leaf).max()), err_msg=name)


def native(arrays, prefix, depth=4):
  """Our parameters of a backbone in timm's names under a prefix."""
  rules = names.expand(names.timm(), depth)
  own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
  return tree.unflatten(names.to_native(rules, own))


def head(arrays, prefix):
  return {"kernel": arrays[f"{prefix}head.weight"].T, "bias": arrays[f"{prefix}head.bias"]}


# Our trainable of each original's parameters, or of their gradients: torch holds (out, in), we (in, out).

def lora_qv_trainable(arrays, prefix):
  of = lambda i, p, which: arrays[f"{prefix}blocks.{i}.attn.lora_{p}.adapter_{which}.weight"].T
  blocks = {f"block_{i:02d}": {p: {"a": of(i, p, "down"), "b": of(i, p, "up")} for p in "qv"} for i in range(4)}
  return {"lora": blocks, "classifier": head(arrays, prefix)}


def lora_fused_trainable(arrays, prefix):
  pair = lambda i: {k: arrays[f"{prefix}blocks.{i}.attn.LoRA_{k}.weight"].T for k in "ab"}
  return {"lora": {f"block_{i:02d}": {"qkv": pair(i)} for i in range(4)}, "classifier": head(arrays, prefix)}


QV = {"rank": 4, "scale": 0.5, "dropout": 0.0}
FUSED = {"rank": 4, "form": "fused", "dropout": 0.0}
GOLDENS = [
    ("lora_qv_petlvit", "lora", QV, lora_qv_trainable),
    ("lora_qv_petlvit", "lora", {**QV, "space": "weights"}, lora_qv_trainable),
    ("lora_qkv_noah", "lora", FUSED, lora_fused_trainable),
    ("lora_qkv_noah", "lora", {**FUSED, "space": "weights"}, lora_fused_trainable)]


def read(path):
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def golden_gradient(method, spec, arrays, frozen, trainable):
  """{"loss", "logits"} and the gradient on a golden's images, in the form of a training step."""
  backbone, images = backbones.build(spec), arrays["images"].transpose(0, 2, 3, 1)  # [B, S, S, 3]
  batch = {"target": jax.nn.one_hot(arrays["labels"], 10), "weight": jnp.ones(3)}

  @jax.jit
  def run(trainable, frozen, images):
    def loss(trainable):
      context = Context(batch=batch, frozen=frozen, train=True, rng=jax.random.key(0))
      outputs = forward(method, backbone, trainable, images, context)
      return method.loss(trainable, outputs, context), outputs.logits
    return jax.value_and_grad(loss, has_aux=True)(trainable)

  (loss, logits), gradient = run(trainable, frozen, images)
  return {"loss": loss, "logits": logits}, gradient


@pytest.mark.parametrize("file, name, options, trainable_of", GOLDENS,
                         ids=[f"{g[0]}-{g[2].get('space', 'activations')}" for g in GOLDENS])
def test_golden(golden, file, name, options, trainable_of):
  """Logits, loss and the gradient of every trainable leaf equal the original's."""
  arrays = read(golden(f"dtl_and_petl/{file}.npz"))
  method = methods.build(name, GOLDEN, **options)
  frozen, trainable = native(arrays, "param/"), trainable_of(arrays, "param/")
  found, gradient = golden_gradient(method, GOLDEN, arrays, frozen, trainable)
  chex.assert_shape(found["logits"], (3, 10))
  close(found, {"loss": arrays["loss_f64"], "logits": arrays["logits_f64"]})
  trained = json.loads(str(arrays["meta_json"]))["trainable"]
  assert {f"grad/{name}" for name in trained} == {name for name in arrays if name.startswith("grad/")}
  assert len(tree.flatten(gradient)) == len(trained)  # every gradient is compared
  of_torch = error(trainable_of(arrays, "grad/"), trainable_of(arrays, "grad64/"))
  assert of_torch < 1e-6 or file == "lora_qkv_noah"
  close(gradient, trainable_of(arrays, "grad64/"), max(1e-6, 2 * of_torch))


@pytest.mark.parametrize("file, options, trainable_of",
                         [("lora_qv_petlvit", QV, lora_qv_trainable), ("lora_qkv_noah", FUSED, lora_fused_trainable)])
def test_merged_lora_gives_the_golden_logits(golden, file, options, trainable_of):
  arrays = read(golden(f"dtl_and_petl/{file}.npz"))
  trainable = trainable_of(arrays, "param/")
  params = methods.build("lora", GOLDEN, **options).merge(trainable, native(arrays, "param/"))
  features, _ = jax.jit(lambda params, images: backbones.build(GOLDEN).apply(params, images))(
      params, arrays["images"].transpose(0, 2, 3, 1))
  close({"": classifier.apply(trainable["classifier"], features)}, {"": arrays["logits_f64"]})


# --- Sizes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options, expected", [
    ("linear", {}, 0), ("full", {}, 85_798_656), ("bitfit", {}, 102_912), ("lora", {}, 294_912),
    ("lora", {"form": "fused"}, 294_912), ("dtl", {}, 36_864), ("dtl", {"rank": 4}, 73_728)])
def test_published_sizes_on_vit_b16(name, options, expected):
  found = sizes(methods.build(name, VIT_B16, **options), backbones.abstract_params(VIT_B16), 100)
  assert found.trainable_without_classifier == expected
  assert found.trainable == expected + 100 * 768 + 100
  assert found.frozen == 85_798_656 and found.state == 0


# --- Where gradients go ---------------------------------------------------------------------------------------------



CROSSED = []  # sites whose backward pass was traced
_wire = jax.custom_vjp(lambda y, site: y, nondiff_argnums=(1,))
_wire.defvjp(lambda y, site: (y, None), lambda site, _, g: (CROSSED.append(site), (g,))[1])


def trip_wire(carry, site, y, x):
  """A visitor that notes the blocks into which a cotangent comes."""
  del x
  return carry, y if y is None else _wire(y, site)


@pytest.mark.parametrize("name, options, blocks", [
    ("dtl", {}, {2}), ("dtl", {"first_write": 1}, {1, 2}), ("dtl", {"first_write": 3}, set()),
    ("lora", {}, {0, 1, 2}), ("linear", {}, set()), ("linear", {"site": "block_01/out"}, set())])
def test_no_cotangent_below_the_first_write(tiny_spec, name, options, blocks):
  """Blocks before the method's first write are no part of the backward pass: it is what saves their memory."""
  method, backbone = methods.build(name, tiny_spec, **options), backbones.build(tiny_spec)
  params = backbones.abstract_params(tiny_spec)
  trainable, state = jax.eval_shape(lambda rng, p: method.init(rng, p, 4), jax.random.key(0), params)
  wired = method._replace(visit=lambda trainable, ctx: chain(trip_wire, visitor(method, trainable, ctx)[0]),
                          carry=method.carry if method.visit else {})
  def loss(trainable, params, images):
    context = Context({"target": jnp.ones((2, 4)), "weight": jnp.ones(2)}, {}, params, {}, jax.random.key(0), True)
    return method.loss(trainable, forward(wired, backbone, trainable, images, context), context)
  CROSSED.clear()
  jax.eval_shape(jax.grad(loss), trainable, params, jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
  assert {int(site[6:8]) for site in CROSSED if site.startswith("block_")} == blocks
  assert method.writes_from == min(blocks, default=tiny_spec.depth)


# --- Initialisation and options -------------------------------------------------------------------------------------

def test_initialisation_of_lora():
  spec = backbones.architecture("vit_s16", depth=2)
  def pairs(**options):
    trainable, _ = methods.build("lora", spec, **options).init(jax.random.key(0), None, 10)
    return list(trainable["lora"].values())
  for block in pairs():
    assert sorted(block) == ["q", "v"]
    assert np.abs(block["q"]["a"]).max() <= 384 ** -0.5 and not np.any(block["q"]["b"])
    assert not np.array_equal(block["q"]["a"], block["v"]["a"])
  for block in pairs(form="fused", compat="noah"):  # NOAH's model-wide initialisation overwrites LoRA's zero
    chex.assert_shape([block["qkv"]["a"], block["qkv"]["b"]], [(384, 8), (8, 1152)])
    np.testing.assert_allclose([np.std(block["qkv"]["a"]), np.std(block["qkv"]["b"])], 0.02, rtol=0.05)
  first, second = pairs(form="fused")[:2]
  assert not np.array_equal(first["qkv"]["a"], second["qkv"]["a"]) and not np.any(first["qkv"]["b"])


@pytest.mark.parametrize("name, options, message", [
    ("lroa", {}, "'lroa' is unknown; nearest: lora"),
    ("lora", {"rnk": 4}, "no option 'rnk'; nearest: rank"),
    ("bitfit", {"rank": 4}, "no option 'rank'; it has none"),
    ("lora", {"form": "qkv"}, "expected form 'qv' or 'fused'"),
    ("lora", {"rank": 0}, "rank is 0; expected 1 to the smallest block's width, 16"),
    ("lora", {"space": "weights"}, "set dropout=0 with space='weights'"),
    ("lora", {"compat": "noah"}, "set form='fused'"),
    ("lora", {"dropout": 1}, "option 'dropout' of method 'lora' is 1.0; expected a number from 0 to below 1"),
    ("noah", {"dropout": -0.1}, "option 'dropout' of method 'noah' is -0.1; expected"),
    ("linear", {"site": "block_1/out"}, "nearest: block_01/out"),
    ("linear", {"tokens": "max"}, "expected 'cls' or 'mean'"),
    ("linear", {"site": "patch"}, "no class token; use tokens='mean'")])
def test_wrong_options_are_one_line_errors(tiny_spec, name, options, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, tiny_spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_methods_by_default_are_those_that_a_backbone_takes():
  """Errors list them, on any backbone."""
  merging = lambda name: {method.name for method in methods.by_default(backbones.architecture(name)).values()
                          if method.merge}
  assert merging("resnet50") == {"linear", "full", "bitfit"}
  assert merging("swin_tiny_test") == {"linear", "full", "bitfit", "lora", "fact_tt", "fact_tk", "ssf", "scratch"}
  narrow = backbones.architecture("vit_tiny_test", heads=4)  # too narrow for the ladder's defaults
  assert methods.fits("lst", narrow) and "lst" not in methods.by_default(narrow)


@pytest.mark.parametrize("form", ["qv", "fused"])
def test_dropout_of_lora_acts_in_training_only(tiny_spec, random_weights, form):
  spec = dataclasses.replace(tiny_spec, depth=1)
  params, backbone = random_weights(spec).params, backbones.build(spec)
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
  with_, without = (methods.build("lora", spec, form=form, dropout=rate) for rate in (0.5, 0.0))
  trainable = jax.tree.map(lambda x: x + 0.1, without.init(jax.random.key(0), params, 3)[0])
  context = lambda rng: Context(frozen=params, rng=rng, train=True)
  run = jax.jit(lambda rng: forward(with_, backbone, trainable, images, context(rng)).logits)
  dry = jax.jit(lambda rng: forward(without, backbone, trainable, images, context(rng)).logits)(jax.random.key(1))
  still = jax.jit(lambda images: predict(with_, backbone, trainable, {}, params, images))(images)
  np.testing.assert_allclose(still, dry, rtol=0, atol=1e-6)
  wet = [run(jax.random.key(seed)) for seed in (1, 2, 1)]
  assert np.abs(wet[0] - dry).max() > 1e-3 and np.abs(wet[0] - wet[1]).max() > 1e-3
  np.testing.assert_array_equal(wet[0], wet[2])


# --- Stages, and methods of others ----------------------------------------------------------------------------------

def test_full_after_a_probe_starts_from_its_classifier(tiny_spec, tiny_weights):
  seen = []
  def train(method):
    trainable, state = method.init(jax.random.key(len(seen)), tiny_weights.params, 3)
    seen.append(trainable)
    return jax.tree.map(lambda x: x + 1, trainable), state
  (probe, first, _), (full, _, _) = stages(methods.build("full", tiny_spec, probe_first=True), train)
  assert (sorted(seen[0]), sorted(seen[1])) == (["classifier"], ["backbone", "classifier"])
  assert probe.merge is None and full.merge and full.then is None
  chex.assert_trees_all_equal(seen[1]["classifier"], first["classifier"])
  chex.assert_trees_all_equal(seen[1]["backbone"], tiny_weights.params)


def test_two_stages_are_trained_saved_and_loaded(random_weights, tiny_spec, tiny_task, tmp_path):
  weights = random_weights(dataclasses.replace(tiny_spec, depth=1))
  task = data.Task("train only", tiny_task.class_names, {"train": tiny_task.splits["train"]})
  recipe = tl.Recipe(duration="2 steps", batch_size=8, devices=1)
  run = tl.fit(weights, "full", task, recipe, options={"probe_first": True}, workdir=tmp_path / "run", quiet=True)
  assert sorted(run.trainable) == ["backbone", "classifier"]
  found = load_adapter(run.adapter)
  assert found.method.name == "full" and found.method.then is None
  chex.assert_trees_all_equal(found.trainable, jax.tree.map(np.asarray, run.trainable))
  assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"stage_0", "stage_1"}


def scale_features(spec, *, power: float = 1.0):
  """A method of a third party: it scales the features, and keeps a constant as state."""
  def init(rng, frozen, num_classes):
    head = classifier.init(rng, spec.width, num_classes)
    return {"gain": jnp.ones(spec.width), "classifier": head}, {"shift": jnp.full((), 0.5)}
  def readout(trainable, features, carry, ctx):
    features = jax.lax.stop_gradient(features) * trainable["gain"] ** power + ctx.state["shift"]
    return classifier.apply(trainable["classifier"], features)
  return tl.Method(name="scale_features", options={"power": power}, init=init, readout=readout, writes_from=spec.depth)


def test_fit_takes_a_method_of_a_third_party(tiny_weights, tiny_task, tmp_path, monkeypatch):
  """A Method needs no registration to be trained; loading its file does, since the file names it."""
  recipe = tl.Recipe(duration="20 epochs", batch_size=8, optim=tl.Optim(lr=1e-2), devices=1)
  method = scale_features(tiny_weights.spec, power=2.0)
  run = tl.fit(tiny_weights, method, tiny_task, recipe, workdir=tmp_path / "run", quiet=True)
  assert run.result["method"] == "scale_features" and run.result["options"] == {"power": 2.0}
  assert run.result["test"]["examples"] == 14 and run.result["test"]["accuracy"] > 0.5  # chance is 0.25
  assert float(run.state["shift"]) == 0.5 and np.abs(run.trainable["gain"] - 1).max() > 1e-3
  with pytest.raises(ValueError, match="'scale_features' is unknown; nearest"):
    load_adapter(run.adapter)
  monkeypatch.setitem(methods.METHODS, "scale_features", scale_features)
  found = load_adapter(run.adapter)
  assert found.method.options == {"power": 2.0}
  chex.assert_trees_all_equal(found.trainable, jax.tree.map(np.asarray, run.trainable))
  chex.assert_trees_all_equal(found.state, jax.tree.map(np.asarray, run.state))
