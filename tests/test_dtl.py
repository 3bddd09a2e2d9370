"""DTL, DTL+ and DTL+* against the original, and what they promise beside the conformance table.

Goldens are compared as in `test_methods.py`: with the original's float64 run, to 1e-6 of a tensor's largest value.
"""
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import GOLDEN, close, golden_gradient, head, native, read

from transferlab import backbones, methods, tree
from transferlab.backbones.spec import Preprocessing, SwinSpec, ViTSpec
from transferlab.backbones.weights import Weights, names, swins
from transferlab.checkpoint import load_adapter, save_adapter
from transferlab.method import Context, collect, forward, replay
from transferlab.methods.dtl import _swish, _written
from transferlab.methods.dtl_conv import depthwise
from transferlab.optim import Optim, make_optimiser
from transferlab.step import compile_step, make_step, start

TINY, TINY_SWIN = backbones.architecture("vit_tiny_test"), backbones.architecture("swin_tiny_test")
VIT_B16 = backbones.architecture("vit_b16")
GRID14 = ViTSpec("grid14", 56, 4, 32, 4, 4, 128)
GOLDEN_SWIN = SwinSpec("golden", 32, 2, 16, (2, 2, 2, 2), (1, 2, 4, 8), 4)


# --- The original -----------------------------------------------------------------------------------------------------

def trainable_of(arrays, prefix, spec, blocks, stages=()):
  """Our trainable of the original's parameters, or of their gradients: torch holds (out, in) and (D, 1, k, k)."""
  side = {f"block_{i:02d}": {k: arrays[f"{prefix}lora_dict.{i}.lora_{k.upper()}"].T for k in "ab"} for i in blocks}
  for stage in stages:
    filters = arrays[f"{prefix}lora_fusions.{stage}.weight" if spec.family == "swin" else f"{prefix}lora_fusion.weight"]
    side[f"stage_{stage}"] = {"kernel": filters[:, 0].transpose(1, 2, 0)}
  return {"side": side, "classifier": head(arrays, prefix)}


def params_of(arrays, spec):
  if spec.family == "vit":
    return native(arrays, "param/")
  own = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
  return tree.unflatten(names.to_native(names.expand(swins.table(spec, merge_after=True), spec.depth), own))


LATE = {"first_write": 3}
GOLDENS = {  # file: spec, method, options, blocks that read, stages with a convolution
    "dtl_vit": (GOLDEN, "dtl", LATE, range(4), ()),
    "dtlplus_vit_k3_grid14": (GRID14, "dtl_plus", {**LATE, "kernel": 3}, range(4), (0,)),
    "dtlplus_vit_k4_grid4_patched": (GOLDEN, "dtl_plus", {**LATE, "kernel": 4}, range(4), (0,)),
    "dtl_swin": (GOLDEN_SWIN, "dtl", {"first_write": 6}, range(4, 8), ()),
    "dtlplus_swin_k5": (GOLDEN_SWIN, "dtl_plus", {"first_write": 6}, range(4, 8), (2, 3))}


@pytest.mark.parametrize("file", GOLDENS)
def test_golden(golden, file):
  """Logits, loss and the gradient of every trainable leaf equal the original's."""
  spec, name, options, blocks, stages = GOLDENS[file]
  arrays = read(golden(f"dtl_and_petl/{file}.npz"))
  with jax.default_matmul_precision("highest"):
    found, gradient = golden_gradient(methods.build(name, spec, **options), spec, arrays, params_of(arrays, spec),
                                      trainable_of(arrays, "param/", spec, blocks, stages))
  close(found, {"loss": arrays["loss_f64"], "logits": arrays["logits_f64"]})
  close(gradient, trainable_of(arrays, "grad64/", spec, blocks, stages))
  unused = json.loads(str(arrays["meta_json"]))["trainable_without_grad"]  # convolutions of stages that never write
  assert len(tree.flatten(gradient)) == sum(name.startswith("grad64/") for name in arrays)
  assert unused == ([f"lora_fusions.{stage}.weight" for stage in (0, 1)] if file == "dtlplus_swin_k5" else [])


def test_five_steps_of_dtl(golden):
  """Five AdamW steps from the authors' initialisation, through the real step and optimiser."""
  arrays = read(golden("dtl_and_petl/train5_dtl_vit.npz"))
  frozen = native(arrays, "init/")
  trainable = jax.tree.map(jnp.array, trainable_of(arrays, "init/", GRID14, range(4)))
  method, backbone = methods.build("dtl", GRID14, first_write=3), backbones.build(GRID14)
  rates = jnp.asarray(arrays["lrs"], jnp.float32)
  optimiser = make_optimiser(Optim(weight_decay=0.05), lambda step: rates[step], trainable)
  # The golden images are normalised already. A step divides pixels by 255 and by std: 1/255 gives them back to 1 ulp.
  preprocessing = Preprocessing(56, mean=(0.0,) * 3, std=(1 / 255,) * 3)
  step, run = make_step(method, backbone, optimiser, preprocessing, 10), start(trainable, {}, optimiser)
  compiled = None
  for t in range(5):
    rows = slice(4 * t, 4 * t + 4)
    batch = {"image": jnp.asarray(arrays["images"][rows].transpose(0, 2, 3, 1)), "weight": jnp.ones(4),
             "label": jnp.asarray(arrays["labels"][rows], jnp.int32)}
    compiled = compiled or compile_step(step, run, frozen, batch)
    run, metrics = compiled(run, frozen, batch)
    assert abs(float(metrics["loss"]) - arrays["losses"][t]) < 1e-6
    if t == 0:  # at the start only B and the classifier have a gradient (Adam's first moment is a tenth of it)
      norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for n, g in arrays.items() if n.startswith("grad0/")))
      assert abs(float(metrics["grad_norm"]) - norm) < 1e-6 * max(1, norm)
    close(run.trainable, trainable_of(arrays, f"step{t + 1}/", GRID14, range(4)))


# --- The side network -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_depthwise_is_xlas_convolution(k):
  """Value and both gradients, on a map that is not square and smaller than the filter."""
  rng = np.random.default_rng(k)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  x, kernel, g = draw(2, 3, 6, 4), draw(k, k, 4), draw(2, 3, 6, 4)
  def xlas(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel[:, :, None], (1, 1), "SAME", feature_group_count=4,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))
  (found, back), (wanted, back_) = jax.vjp(depthwise, x, kernel), jax.vjp(xlas, x, kernel)
  close(dict(enumerate((found, *back(g)))), dict(enumerate((wanted, *back_(g)))))


def moved(method, seed=0):
  """A trainable away from its start, where h is zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: method.init(key, None, 4)[0], jax.random.key(0))
  return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize("name", ["dtl", "dtl_plus"])
def test_h_restarts_at_every_stage_and_the_class_token_passes_the_convolution(name):
  """What is written after a block is the gated sum of its own stage's reads, by the definition."""
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
  for spec in (TINY, TINY_SWIN):
    method = methods.build(name, spec, first_read=0, first_write=1)
    side = moved(method)["side"]
    visit, lows, h = method.visit({"side": side}, Context()), method.carry, 0.0
    for i in range(spec.depth):
      block, shape = f"block_{i:02d}", spec.block(i)
      z, out = (draw((2, shape.grid[0] * shape.grid[1] + spec.prefix_tokens, shape.width)) for _ in range(2))
      h = (0.0 if i == 0 or shape.stage != spec.block(i - 1).stage else h) + z @ side[block]["a"] @ side[block]["b"]
      u = h / (1 + np.exp(np.clip(-100 * h, None, 80)))
      lows, written = replay(visit, lows, {f"{block}/in": z, f"{block}/out": out})
      if name == "dtl_plus":
        own, patches = np.split(u, [spec.prefix_tokens], axis=1)
        patches = depthwise(patches.reshape(2, *shape.grid, -1), side[f"stage_{shape.stage}"]["kernel"])
        u = np.concatenate([own, patches.reshape(2, -1, shape.width)], axis=1)
      np.testing.assert_allclose(written - out, u, atol=2e-6 * np.abs(u).max(), err_msg=f"{spec.name} {block}")


def test_only_what_is_read_is_kept_for_the_backward_pass():
  """Neither h nor what the convolution takes in, which are as wide as the stream."""
  lows, bs = [jnp.ones((2, 17, 2))] * 3, [jnp.ones((2, 64))] * 3
  _, back = jax.vjp(lambda lows, bs, filters: _written(lows, bs, filters, jnp.sin, (4, 4)), lows, bs,
                    jnp.ones((3, 3, 64)))
  assert max(leaf.size for leaf in jax.tree.leaves(back)) < 2 * 17 * 64


def test_the_gate_has_a_slope_where_h_starts():
  """swish'(0) is 1/2 where relu'(0) is 0, without which B would never leave zero."""
  assert float(jax.grad(lambda h: _swish(100.0, h))(0.0)) == 0.5


def products(jaxpr, shape) -> int:
  """Matrix products with an operand of a shape, in a jaxpr and those it calls."""
  found = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found += any(operand.aval.shape in (shape, shape[::-1]) for operand in equation.invars)
    found += sum(products(inner, shape) for inner in jax.core.jaxprs_in_params(equation.params))
  return found


@pytest.mark.parametrize("spec, name, options, late", [
    (TINY, "dtl", {"first_write": 1}, 2), (TINY, "dtl", {}, 1), (TINY, "dtl_plus", {"first_write": 3}, 0),
    (TINY, "dtl_plus_star", {}, 2), (TINY_SWIN, "dtl", {"first_write": 3}, 1), (TINY_SWIN, "dtl_plus_star", {}, 3)],
    ids=lambda value: getattr(value, "name", str(value)))
def test_no_product_of_blocks_below_the_first_write_in_the_backward_pass(spec, name, options, late):
  """The step's jaxpr multiplies by the kernels of every block once, and of `late` blocks, L - M, once more."""
  method, backbone = methods.build(name, spec, **options), backbones.build(spec)
  params = backbones.abstract_params(spec)
  trainable, _ = jax.eval_shape(lambda rng: method.init(rng, None, 4), jax.random.key(0))
  def loss(trainable, params, images):
    context = Context({"target": jnp.ones((2, 4)), "weight": jnp.ones(2)}, {}, params, {}, jax.random.key(0), True)
    return method.loss(trainable, forward(method, backbone, trainable, images, context), context)
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable, params, images).jaxpr
  once, again = [list(range(spec.depth)), list(range(spec.depth - late, spec.depth))]
  for shape in {params[f"block_{i:02d}"]["fc1"]["kernel"].shape for i in once}:
    of_shape = [i for i in once + again if params[f"block_{i:02d}"]["fc1"]["kernel"].shape == shape]
    assert products(jaxpr, shape) == 2 * len(of_shape)  # fc1 and fc2
  assert spec.depth - method.writes_from == late


def gradient(method, backbone, params, trainable, inputs):
  def loss(trainable):
    context = Context({"target": jnp.eye(4), "weight": jnp.ones(4)}, {}, params, {}, jax.random.key(0), True)
    return method.loss(trainable, forward(method, backbone, trainable, inputs, context), context)
  return jax.grad(loss)(trainable)


IMAGES = np.random.default_rng(0).standard_normal((4, 16, 16, 3), np.float32)


def test_entering_right_before_a_merge_gives_the_same_gradient(random_weights):
  """`reads` holds all that the visitor looks at before; here the first write closes a stage."""
  method, backbone = methods.build("dtl", TINY_SWIN, first_read=0, first_write=2), backbones.build(TINY_SWIN)
  @jax.jit
  def both(trainable, params, images):
    _, kept = backbone.apply(params, images, collect(method.reads, params), {})
    assert list(kept) == ["block_00/in", "block_01/in", "trunk"]
    return [gradient(method, backbone, params, trainable, inputs) for inputs in (kept, images)]
  close(*both(moved(method), random_weights(TINY_SWIN).params, IMAGES))


def test_bfloat16_backbones_get_float32_gradients(random_weights):
  """Within what rounding the backbone to 8 bits takes away."""
  spec = dataclasses.replace(TINY, depth=2)
  method = methods.build("dtl", spec, first_write=1)
  @jax.jit
  def both(trainable, params, images):
    return [gradient(method, backbones.build(spec, dtype), params, trainable, images)
            for dtype in (jnp.bfloat16, jnp.float32)]
  found, wanted = map(tree.flatten, both(moved(method), random_weights(spec).params, IMAGES))
  for name, leaf in wanted.items():
    assert found[name].dtype == jnp.float32
    assert np.linalg.norm(found[name] - leaf) < 0.05 * np.linalg.norm(leaf), name


# --- Parameters and options -------------------------------------------------------------------------------------------

def test_initialisation():
  side = methods.build("dtl_plus", VIT_B16, kernel=4).init(jax.random.key(0), None, 10)[0]["side"]
  filters = side.pop("stage_0")["kernel"]
  a = np.stack([pair["a"] for pair in side.values()])
  chex.assert_shape([a, filters], [(12, 768, 2), (4, 4, 768)])
  for drawn, bound in ((a, 768 ** -0.5), (filters, 1 / 4)):
    assert 0.99 * bound < np.abs(drawn).max() <= bound
    np.testing.assert_allclose(np.std(drawn), bound / 3 ** 0.5, rtol=0.02)
  assert not np.array_equal(a[0], a[1]) and not any(np.any(pair["b"]) for pair in side.values())


@pytest.mark.parametrize("options, found", [
    ({}, ["block_02", "block_03", "stage_1"]),
    ({"first_read": 0, "first_write": 3}, ["block_02", "block_03", "stage_1"]),  # nothing would train stage 0's
    ({"first_read": 1, "first_write": 2}, ["block_01", "block_02", "block_03", "stage_0", "stage_1"])])
def test_parameters_are_those_that_train(options, found):
  trainable = jax.eval_shape(lambda key: methods.build("dtl_plus", TINY_SWIN, **options).init(key, None, 3)[0],
                             jax.random.key(0))
  assert sorted(trainable["side"]) == found


def test_defaults_are_the_papers():
  of = lambda name, spec: methods.build(name, backbones.architecture(spec)).options
  assert of("dtl", "vit_b16") == {"rank": 2, "first_read": 0, "first_write": 7, "beta": 100.0, "activation": "swish",
                                  "readout": "mean"}
  assert of("dtl_plus", "swin_b") == {"rank": 4, "first_read": 4, "first_write": 15, "beta": 100.0, "kernel": 5,
                                      "activation": "swish", "readout": "mean"}
  assert of("dtl_plus_star", "swin_b") == {"rank": 4, "beta": 100.0, "kernel": 5, "activation": "swish",
                                           "readout": "mean"}
  reads = methods.build("dtl", backbones.architecture("swin_b")).reads
  assert [read.site for read in reads.values()] == [*(f"block_{i:02d}/in" for i in range(4, 15)), "block_14/out"]


def test_everything_but_the_classifiers_bias_decays():
  trainable = moved(methods.build("dtl_plus", TINY))
  optimiser = make_optimiser(Optim(weight_decay=0.05), lambda step: 1.0, trainable)
  updates, _ = optimiser.update(jax.tree.map(np.zeros_like, trainable), optimiser.init(trainable), trainable)
  still = [name for name, update in tree.flatten(updates).items() if not np.any(update)]
  assert still == ["classifier/bias"]


def test_an_adapter_of_vit_b16_is_below_a_megabyte(tmp_path):
  method = methods.build("dtl", VIT_B16)
  trainable, state = method.init(jax.random.key(0), None, 100)
  weights = Weights(VIT_B16, {}, None, Preprocessing(224), "vit_b16", "random", "0" * 64)
  class_names = [f"class {i}" for i in range(100)]
  save_adapter(tmp_path / "a.safetensors", method, trainable, state, weights=weights, class_names=class_names)
  size = (tmp_path / "a.safetensors").stat().st_size
  assert 4 * (36_864 + 76_900) < size < 1e6
  chex.assert_trees_all_equal(load_adapter(tmp_path / "a.safetensors").trainable, jax.tree.map(np.asarray, trainable))


@pytest.mark.parametrize("name, spec, options, message", [
    ("dtl", TINY, {"first_write": 4}, "first_write is 4; expected 1 to the depth, 3"),
    ("dtl", TINY, {"first_write": 0}, "first_write is 0"),
    ("dtl", TINY, {"first_read": 2, "first_write": 2}, "expected 3 to the depth, 3, with first_read 2"),
    ("dtl", TINY, {"first_read": 3}, "first_read is 3; expected 0 to the last block, 2"),
    ("dtl", TINY, {"first_read": -1}, "first_read is -1"),
    ("dtl", TINY, {"readout": "mena"}, "expected 'mean' or 'cls'"),
    ("dtl", TINY_SWIN, {"readout": "cls"}, "swin_tiny_test has no class token; expected 'mean'"),
    ("dtl", TINY, {"rank": 17}, "expected 1 to the width, 16"),
    ("dtl", TINY_SWIN, {"rank": 9, "first_read": 0, "first_write": 1}, "expected 1 to the width, 8"),
    ("dtl", TINY, {"beta": 0.0}, "beta is 0.0; expected a number above 0"),
    ("dtl", TINY, {"activation": "relu"}, "activation is 'relu'; expected 'swish' or 'identity'"),
    ("dtl", TINY, {"kernel": 3}, "'dtl' has no option 'kernel'"),
    ("dtl_plus", TINY, {"kernel": 0}, "kernel is 0; expected 1 or more; without a convolution the method is dtl"),
    ("dtl_plus_star", TINY, {"first_write": 2}, "'dtl_plus_star' has no option 'first_write'"),
    ("dtl_plus", backbones.architecture("resnet50"), {}, "needs transformer blocks; resnet50 has none")])
def test_wrong_options_are_one_line_errors(name, spec, options, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)
