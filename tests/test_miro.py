"""MIRO: the original's numbers, and which features it keeps near the frozen ones."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clip_goldens import golden_clip, golden_values

from transferlab import backbones, experiment, losses, methods, tree
from transferlab.method import Context, forward
from transferlab.methods.miro import miro, quarters
from transferlab.optim import Optim, make_optimiser

LAYERS = ("patch", "block_00", "block_01", "block_02", "block_03")


@pytest.fixture(scope="module")
def original(golden):
  """(spec, values of the golden, frozen parameters, what trains, its batch)."""
  spec, params = golden_clip(golden, "T")
  g = golden_values(golden, "T_miro")
  return spec, g, {name: params[name] for name in ("image", "image_projection")}, trainable_of(g), {
      "image": np.concatenate([g[f"images_domain{d}"] for d in range(3)]),
      "label": g["labels"].reshape(-1).astype(np.int32), "weight": np.ones(12, np.float32)}


def trainable_of(g) -> dict:
  """The golden's featurizer, classifier and variances in our layout."""
  of = lambda name: g[f"featurizer/{name}"]
  flat = {"image/patch_kernel": of("conv1.weight").transpose(2, 3, 1, 0), "image_projection/kernel": of("proj"),
          "image/cls": of("class_embedding")[None, None], "image/pos": of("positional_embedding")[None]}
  for ours, theirs in (("embed_norm", "ln_pre"), ("norm", "ln_post"), *(
      (f"block_{i:02d}/{a}", f"transformer.resblocks.{i}.{b}") for i in range(4) for a, b in (
          ("ln1", "ln_1"), ("ln2", "ln_2")))):
    flat |= {f"image/{ours}/scale": of(f"{theirs}.weight"), f"image/{ours}/bias": of(f"{theirs}.bias")}
  for i in range(4):
    for ours, theirs in (("qkv", "attn.in_proj_"), ("proj", "attn.out_proj."), ("fc1", "mlp.c_fc."),
                         ("fc2", "mlp.c_proj.")):
      name, there = f"image/block_{i:02d}/{ours}", f"transformer.resblocks.{i}.{theirs}"
      flat |= {f"{name}/kernel": of(f"{there}weight").T, f"{name}/bias": of(f"{there}bias")}
  variance = {layer: {"bias": g[f"var_b{i}"].reshape(-1)} for i, layer in enumerate(LAYERS)}
  head = {"kernel": g["classifier_w"].T, "bias": g["classifier_b"]}
  return jax.tree.map(jnp.asarray, {"backbone": tree.unflatten(flat), "classifier": head, "variance": variance})


def close(found, wanted, rtol=1e-4):
  np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def test_features_losses_and_steps_are_the_originals(original):
  """Adam, with ten times the rate for variances, by `experiment.LR_FACTORS`."""
  spec, g, frozen, trainable, batch = original
  method, backbone = miro(spec, weight=float(g["ld"])), backbones.build(spec)
  optim = Optim("adam", weight_decay=0.0, decay=(), lr_factors=experiment.LR_FACTORS["miro"])
  optimiser = make_optimiser(optim, lambda step: float(g["lr"]), trainable)
  ctx = Context({**batch, "target": jax.nn.one_hot(batch["label"], 5)}, {}, frozen, {}, None, True)
  def loss(trainable):
    outputs = forward(method, backbone, trainable, batch["image"], ctx)
    return method.loss(trainable, outputs, ctx), outputs
  @jax.jit
  def step(trainable, moments):
    found, gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    updates, moments = optimiser.update(gradient, moments, trainable)
    return optax.apply_updates(trainable, updates), moments, found
  moments, trained, found = optimiser.init(trainable), trainable, []
  with jax.default_matmul_precision("highest"):
    for _ in range(3):
      trained, moments, of_step = step(trained, moments)
      found.append(of_step)
    _, after = step(trained, moments)[2]
  (values, (before, *_)) = zip(*found)
  close(before.features.image, g["features"])
  close(before.logits, g["logits"])
  shares = [2 * before.carry[layer].mean() for layer in LAYERS]  # the original has them without the half
  np.testing.assert_allclose(shares, g["vlb_mean_per_layer"], rtol=1e-4)
  np.testing.assert_allclose(values, g["losses_total"], rtol=1e-4)
  for i, layer in enumerate(LAYERS):
    close(trained["variance"][layer]["bias"], g[f"step3_var_b{i}"].reshape(-1), 1e-3)
  close(trained["classifier"]["kernel"], g["step3_classifier_w"].T, 1e-3)
  close(trained["backbone"]["image_projection"]["kernel"], g["step3_proj"], 1e-3)
  close(after.logits, g["step3_logits"], 1e-3)


def test_variances_start_at_a_tenth_and_the_backbone_at_the_frozen_one(original, golden):
  spec, params = golden_clip(golden, "T")
  trainable, state = miro(spec).init(jax.random.key(0), params, 5)
  assert state == {} and "text" not in trainable["backbone"]
  for leaf in jax.tree.leaves(trainable["variance"]):
    np.testing.assert_allclose(leaf, original[1]["var_b_init"][0], rtol=1e-6)
    np.testing.assert_allclose(jax.nn.softplus(leaf) + 1e-5, original[1]["var_init_value"], rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, trainable["backbone"], original[2])
  assert jax.tree.map(jnp.shape, trainable) == jax.tree.map(jnp.shape, original[3])


@pytest.mark.parametrize("depth, blocks", [(12, [3, 6, 9, 12]), (24, [6, 12, 18, 24]), (6, [2, 3, 5, 6]),
                                           (4, [1, 2, 3, 4]), (3, [1, 2, 3]), (1, [1])])
def test_blocks_at_every_quarter(depth, blocks):
  assert [i + 1 for i in quarters(depth)] == blocks


def test_padding_does_not_count(tiny_weights):
  """The regulariser is a mean over the rows that count, so that parts of a batch add up to it."""
  spec, frozen = tiny_weights.spec, tiny_weights.params
  method, backbone = methods.build("miro", spec, weight=0.5), backbones.build(spec)
  noise = lambda leaf: leaf + 0.1 * np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32)
  trainable = jax.tree.map(noise, method.init(jax.random.key(0), frozen, 3)[0])
  batch = {"target": jax.nn.one_hot(jnp.arange(4) % 3, 3), "weight": jnp.float32([1, 1, 1, 0])}
  @jax.jit
  def loss(images):
    ctx = Context(batch, {}, frozen, {}, None, True)
    outputs = forward(method, backbone, trainable, images, ctx)
    return method.loss(trainable, outputs, ctx), losses.cross_entropy(outputs.logits, batch), outputs.carry
  images = np.random.default_rng(1).standard_normal((4, 16, 16, 3)).astype(np.float32)
  value, plain, carry = loss(images)
  assert list(carry) == ["block_00", "block_01", "block_02", "patch"]  # as jit sorts them
  assert float(value - plain) == pytest.approx(0.5 * float(sum(carry.values())[:3].mean()), rel=1e-4)
  assert abs(value - plain) > 1e-2
  images[3] = 9
  assert float(loss(images)[0]) == pytest.approx(float(value), rel=1e-6)


def test_its_defaults_spare_variances_decay_and_speed_them_up(tiny_weights):
  config = experiment.defaults("miro", data="digits")
  trainable, _ = methods.build("miro", tiny_weights.spec).init(jax.random.key(0), tiny_weights.params, 3)
  factors = tree.flatten(tree.match(experiment.parse(config)[2].optim.lr_factors, trainable, 1.0))
  assert {name.split("/")[0] for name, factor in factors.items() if factor == 10.0} == {"variance"}
  assert config.optim.lr == 5e-5
  decay = tree.flatten(tree.match(experiment.parse(config)[2].optim.decay, trainable, 1.0))
  assert all(decay[name] == 0.0 for name in decay if name.startswith("variance"))


def test_options_out_of_range_are_errors(tiny_spec):
  for options, message in (({"weight": -1.0}, "weight is -1.0"), ({"dropout": 1.0}, "'dropout'")):
    with pytest.raises(ValueError, match=message):
      methods.build("miro", tiny_spec, **options)
  with pytest.raises(ValueError, match="miro needs a plain ViT, alone or in a CLIP"):
    methods.build("miro", backbones.architecture("swin_tiny_test"))
