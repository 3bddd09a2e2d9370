"""NF4 against bitsandbytes, QLoRA against the original, and what they promise beside the conformance table.

Goldens of logits to 1e-4 (1 + |x|), values after 3 steps to 1e-3 of a tensor's largest value, in float32 matmuls.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from clip_goldens import golden_clip, golden_values

from transferlab import backbones, cost, methods, serve, tree
from transferlab.checkpoint import save_adapter
from transferlab.method import Context, chain, classes, forward, predict, record, sizes
from transferlab.methods import clip_text as ct, nf4
from transferlab.testing import made_up_ids

TINY, VIT = backbones.architecture("clip_tiny_test"), backbones.architecture("vit_tiny_test")
CLIP_B16 = backbones.architecture("clip_vit_b16")
PLAIN = {"base": "none", "dropout": 0.0}


@pytest.fixture(scope="module")
def packed(golden):
  with np.load(golden("lfa_and_clip/nf4_bitsandbytes.npz"), allow_pickle=False) as file:
    return dict(file)


def kernel(I: int, O: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal((I, O)).astype(np.float32)


dequantised = jax.jit(nf4.dequantise)


# --- NF4 --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", "ab")
def test_codes_are_those_of_bitsandbytes(packed, which):
  """All 4-bit codes, and the 8-bit ones of magnitudes, but for one of 2,560: it lies 1e-6 above the middle between two
  levels, and bitsandbytes takes the lower one, which is not the nearest."""
  found = nf4.quantise(packed[f"{which}_weight"].T)
  np.testing.assert_array_equal(found["codes"].reshape(-1, 1), packed[f"{which}_packed"])
  np.testing.assert_allclose(found["offset"][0, 0], packed[f"{which}_absmax_offset"], rtol=2e-7)
  scales = packed[f"{which}_absmax_state2_absmax"]
  np.testing.assert_allclose(found["scales"][0], scales, rtol=2e-7)
  own, theirs = np.array(found["magnitudes"][0]), packed[f"{which}_absmax_q8"]
  other = np.flatnonzero(own != theirs)
  assert other.tolist() == {"a": [], "b": [1091]}[which]
  value = (packed[f"{which}_absmax_fp32"] - packed[f"{which}_absmax_offset"]) / np.repeat(scales, nf4.GROUP)
  distance = lambda codes: np.abs(packed[f"{which}_state2_code256"].astype(float)[codes[other]] - value[other])
  assert np.all(distance(own) < distance(theirs))


@pytest.mark.parametrize("which", "ab")
def test_dequantised_and_multiplied_as_bitsandbytes_does(packed, which):
  """From its own codes: float32 to rounding, and the product in bfloat16 to a rounding of it."""
  weight = packed[f"{which}_weight"]
  of = lambda name: packed[f"{which}_{name}"]
  stored = {"codes": of("packed").reshape(len(weight), -1), "magnitudes": of("absmax_q8")[None],
            "scales": of("absmax_state2_absmax")[None], "offset": of("absmax_offset").reshape(1, 1)}
  np.testing.assert_allclose(dequantised(stored), of("dequant"), rtol=1e-6, atol=1e-8)
  y = nf4.dense("bfloat16", of("x"), stored, None)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(y), of("y_bf16"), rtol=2 ** -8)
  np.testing.assert_allclose(nf4.dense("float32", of("x"), stored, None), of("x") @ of("dequant").T, atol=1e-5)


def test_levels_are_those_of_bitsandbytes(packed):
  np.testing.assert_array_equal(nf4.LEVELS, packed["nf4_code"])
  np.testing.assert_allclose(nf4.DYNAMIC_LEVELS, packed["a_state2_code256"], rtol=3e-7)
  assert (nf4.BLOCK, nf4.GROUP) == (packed["blocksize"], packed["state2_blocksize"])


def test_parts_of_a_kernel_are_quantised_apart():
  """As q, k and v are matrices of their own there; and zeros stay zeros beside a part that has some."""
  parts = [kernel(48, 16), 3 * kernel(48, 16, 1), np.zeros((48, 16), np.float32)]
  whole = nf4.quantise(np.concatenate(parts, axis=1), 3)
  each = [nf4.quantise(part) for part in parts]
  for name, leaf in whole.items():
    np.testing.assert_array_equal(leaf, np.concatenate([one[name] for one in each]), err_msg=name)
  np.testing.assert_array_equal(dequantised(whole)[32:], 0)
  assert nf4.shape(whole) == (48, 48) and whole["codes"].dtype == jnp.uint8
  with pytest.raises(ValueError, match="does not cut into 3 x blocks of 64"):
    jax.eval_shape(lambda: nf4.quantise(jnp.zeros((16, 8)), 3))


def test_a_quantised_kernel_takes_a_seventh_of_its_bytes():
  """4 bits a number and 8 for each 64 of them, for float32's 32: ViT-B/16's kernels."""
  stored = jax.eval_shape(nf4.quantise, jax.ShapeDtypeStruct((768, 3072), jnp.float32))
  bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in stored.values()) / (768 * 3072)
  assert 4 + 8 / 64 < bits < 4.13


def test_the_gradient_of_a_quantised_layer_goes_to_its_input():
  stored, x = nf4.quantise(kernel(64, 32)), kernel(5, 64, 1)
  loss = lambda x: jnp.sum(jnp.sin(nf4.dense("float32", x, stored, jnp.ones(32))))
  weight = np.array(dequantised(stored))
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), np.cos(x @ weight.T + 1) @ weight, atol=1e-5)


def test_no_kernel_is_kept_as_floats_for_the_backward_pass():
  """Nor made before it is its turn: of eight layers, two kernels at most are there at a time."""
  layers = [jax.eval_shape(nf4.quantise, jax.ShapeDtypeStruct((512, 512), jnp.float32))] * 8
  def loss(x, layers):
    for layer in layers:
      x = jnp.tanh(nf4.dense("float32", x, layer, None))
    return jnp.sum(x)
  options = {"xla_disable_hlo_passes": "cse_barrier_expander"}  # as `step.compile_step`
  compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((4, 512), jnp.float32), layers).compile(options)
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 512 ** 2


# --- QLoRA ------------------------------------------------------------------------------------------------------------

def trainable_of(values: dict, prefix: str) -> dict:
  """Our trainable of a golden's tensors "prefix/text_model.encoder.layers.0.self_attn.k_proj.lora_A", (out, in)."""
  flat = {}
  for name, array in values.items():
    if name.startswith(f"{prefix}/"):
      tower, _, _, block, _, target, which = name.removeprefix(f"{prefix}/").split(".")
      tower = {"text_model": "text", "vision_model": "image"}[tower]
      flat[f"{tower}/block_{int(block):02d}/{target.removesuffix('_proj')}/{which[-1].lower()}"] = array.T
  return {"lora": tree.unflatten(flat)}


def test_golden(golden):
  """Logits, losses of three steps on batches of three domains, and what was trained by then."""
  spec, params = golden_clip(golden)
  values = golden_values(golden, "T_dg_lora")
  method, backbone = methods.build("qlora", spec, **PLAIN), backbones.build(spec)
  trainable = trainable_of(values, "init")
  own, state = method.init(jax.random.key(0), params, {ct.SLOT: values["token_ids"]})
  assert jax.tree.structure(own) == jax.tree.structure(trainable)
  frozen = method.prepare(params, state)
  # One program for both: images for testing have no weight in the loss.
  images = np.concatenate([*(values[f"images_domain{d}"] for d in range(3)), values["images_test"]])
  batch = {"target": jnp.eye(5)[np.append(values["labels"], [0] * 5)], "weight": np.float32([1] * 12 + [0] * 5)}

  @jax.jit
  def run(trainable, frozen, images):
    def loss(trainable):
      context = Context(batch, state, frozen, {}, jax.random.key(0), True)
      outputs = forward(method, backbone, trainable, images, context)
      return method.loss(trainable, outputs, context), outputs.logits[12:]
    return jax.value_and_grad(loss, has_aux=True)(trainable)

  optimiser = optax.sgd(float(values["lr"]), float(values["momentum"]))
  opt_state, losses, logits = optimiser.init(trainable), [], []
  with jax.default_matmul_precision("highest"):
    for _ in range(4):
      (loss, found), gradient = run(trainable, frozen, images)
      losses, logits, last = [*losses, loss], [*logits, found], trainable
      updates, opt_state = optimiser.update(gradient, opt_state)
      trainable = optax.apply_updates(trainable, updates)
  np.testing.assert_allclose(logits[0], values["logits_test_init"], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(losses[:3], values["losses"], rtol=1e-5)
  np.testing.assert_allclose(jax.nn.softmax(logits[3]), values["probs_test_step3"], atol=1e-4)
  for name, wanted in tree.flatten(trainable_of(values, "step3")).items():
    np.testing.assert_allclose(tree.flatten(last)[name], wanted, rtol=0, atol=1e-3 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("options, count", [
    ({}, 491_520), ({"rank": 2, "targets": ("q", "k", "v", "out", "fc1", "fc2")}, 552_960),
    ({"rank": 6, "targets": ("q", "k", "v")}, 552_960), ({"rank": 2, "targets": ("q", "k", "v")}, 184_320)])
def test_parameters_are_the_published_number(options, count):
  found = sizes(methods.build("qlora", CLIP_B16, **options), backbones.abstract_params(CLIP_B16), 65)
  assert (found.trainable, found.state) == (count, 65 * 77)


# Of equal widths, so that kernels have few shapes to compile for.
SMALL_CLIP = dataclasses.replace(TINY, depth=1, text_depth=1, text_width=16, text_mlp_width=32)
SMALL = [SMALL_CLIP, dataclasses.replace(VIT, depth=1)]


@pytest.fixture(scope="module", params=SMALL, ids=["clip", "vit"])
def pair(request, random_weights):
  """(weights, {base: (method, trainable, state, frozen)}): on 4 bits, and plain on the kernels that these stand for."""
  spec, rng = request.param, np.random.default_rng(0)
  weights = random_weights(spec)._replace(tokenizer=functools.partial(made_up_ids, spec))
  make = lambda **options: methods.build("qlora", spec, dropout=0.0, targets=("q", "v", "out", "fc1", "fc2"), **options)
  quantised, plain = make(compute="float32"), make(base="none")
  known = classes(quantised, ["ant", "busy bee", "cat"], weights.tokenizer)
  shapes = jax.eval_shape(lambda: quantised.init(jax.random.key(0), weights.params, known)[0])
  trainable = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
  state = known if spec.family == "clip" else {}
  frozen = quantised.prepare(weights.params, state)
  kernels = {f"{site}/kernel": np.array(dequantised(stored)).T for site, stored in frozen["nf4"].items()}
  params = tree.merge(weights.params, tree.unflatten(kernels))
  return weights, {"nf4": (quantised, trainable, state, frozen),
                   "none": (plain, trainable, state, plain.prepare(params, state))}


def test_four_bits_stand_for_what_they_are_dequantised_to(pair):
  """Logits and gradients are those of plain LoRA on the dequantised kernels, in towers of a CLIP and in a ViT; and the
  product that the backbone itself would take is not computed."""
  weights, both = pair
  S, backbone = weights.spec.image_size, backbones.build(weights.spec)
  images = np.random.default_rng(1).standard_normal((4, S, S, 3)).astype(np.float32)
  found, flops = {}, {}
  for base, (method, trainable, state, frozen) in both.items():
    def run(trainable, frozen, method=method, state=state):
      def loss(trainable):
        context = Context({"target": jnp.eye(3)[:2].repeat(2, 0), "weight": jnp.ones(4)}, state, frozen)
        outputs = forward(method, backbone, trainable, images, context)
        return method.loss(trainable, outputs, context), outputs.logits
      return jax.value_and_grad(loss, has_aux=True)(trainable)
    frozen = jax.tree.map(jnp.asarray, frozen)
    compiled = jax.jit(run).lower(trainable, frozen).compile()
    found[base], flops[base] = compiled(trainable, frozen), cost.flops(compiled)
  for name, wanted in tree.flatten(found["none"][1]).items():
    allowed = 1e-4 * np.abs(wanted).max() + 1e-7
    np.testing.assert_allclose(tree.flatten(found["nf4"][1])[name], wanted, rtol=0, atol=allowed, err_msg=name)
  np.testing.assert_allclose(found["nf4"][0][1], found["none"][0][1], atol=1e-4)
  assert flops["nf4"] < 1.2 * flops["none"]


def test_only_kernels_of_blocks_are_quantised(pair):
  """All four of each block, in place of the floats; everything else, projections included, stays as it is."""
  weights, both = pair
  frozen = both["nf4"][3]
  before, after = (set(tree.flatten(params)) for params in (weights.params, frozen))
  dense = {name for name in before if name.split("/")[-2:] in [[place, "kernel"] for place in (
      "qkv", "proj", "fc1", "fc2")]}
  depth = 2 if weights.spec.family == "clip" else 1
  assert before - after == dense and len(dense) == 4 * depth
  assert {f"{site}/kernel" for site in frozen["nf4"]} == dense
  parts = {(site.rpartition("/")[2], len(stored["offset"])) for site, stored in frozen["nf4"].items()}
  assert parts == {("qkv", 3), ("proj", 1), ("fc1", 1), ("fc2", 1)}
  for name, leaf in tree.flatten(weights.params).items():
    if name not in dense:
      np.testing.assert_array_equal(tree.flatten(frozen)[name], leaf, err_msg=name)


def test_an_adapter_holds_the_updates_alone_and_the_base_is_quantised_again(pair, tmp_path):
  weights, both = pair
  method, trainable, state, frozen = both["nf4"]
  path = tmp_path / "adapter.safetensors"
  save_adapter(path, method, trainable, state, weights=weights, class_names=["ant", "busy bee", "cat"])
  names = set(safetensors.numpy.load_file(path))
  own = {f"trainable/{name}" for name in tree.flatten(trainable)}
  assert names == own | ({"state/prompts"} if weights.spec.family == "clip" else set())
  served = serve.load(path, weights)
  assert jax.tree.all(jax.tree.map(np.array_equal, served.frozen["nf4"], frozen["nf4"]))
  if weights.spec.family == "clip":
    found = served([np.full((20, 20, 3), 99, np.uint8)], batch_size=1)
    assert found.shape == (1, 3) and abs(found.sum() - 1) < 1e-5


def visited(method, trainable, x, site: str, train: bool, width: int = 48):
  """What the visitor makes of zeros [..., width] that a site puts out, from its input x."""
  context = Context(train=train, rng=jax.random.key(0) if train else None)
  def run(x):
    carry, found = method.visit(trainable, context)("untouched", site, jnp.zeros((*x.shape[:-1], width)), x)
    assert carry == "untouched"
    return found
  return np.array(jax.jit(run)(x))


def test_an_update_is_scaled_and_dropout_acts_on_its_input():
  """With A and B that hand on the first R inputs, q, k and v show what dropout left of them: the same for all three."""
  method = methods.build("qlora", TINY, rank=2, alpha=8.0, base="none", dropout=0.5)
  pass_on = {"a": jnp.eye(16, 2), "b": jnp.eye(2, 16)}
  trainable = {"lora": {"image": {"block_01": {name: pass_on for name in ("q", "k", "v", "out")}}}}
  x = kernel(50, 16)[None]                                                       # [1, 50, 16]
  q, k, v = np.split(visited(method, trainable, x, "image/block_01/qkv", True), 3, axis=-1)
  np.testing.assert_array_equal(q, k)
  np.testing.assert_array_equal(q, v)
  kept = q[..., :2] != 0
  assert 0.3 < kept.mean() < 0.7
  np.testing.assert_allclose(q[..., :2][kept], 4 * 2 * x[..., :2][kept], rtol=1e-6)  # alpha / R, 1 / (1 - rate)
  np.testing.assert_array_equal(q[..., 2:], 0)
  out = visited(method, trainable, x, "image/block_01/proj", True, 16)
  assert not np.array_equal(out[..., :2] != 0, kept)
  plain = visited(method, trainable, x, "image/block_01/qkv", False)
  np.testing.assert_allclose(np.split(plain, 3, axis=-1)[1][..., :2], 4 * x[..., :2], rtol=1e-6)


def test_products_are_in_bfloat16_and_the_residual_stream_is_not(pair):
  """Only what enters the GELU stays narrow, where nothing is added to it."""
  weights, both = pair
  _, trainable, state, frozen = both["nf4"]
  S, backbone = weights.spec.image_size, backbones.build(weights.spec)
  def types(**options):
    method = methods.build("qlora", weights.spec, **options)
    trainable, _ = jax.eval_shape(lambda: method.init(jax.random.key(0), weights.params, classes(method, 3)))
    context = lambda frozen: Context(state=state, frozen=frozen)
    def run(trainable, frozen):
      seen = method._replace(visit=lambda t, ctx: chain(method.visit(t, ctx), record()), carry={})
      return forward(seen, backbone, trainable, jnp.zeros((2, S, S, 3)), context(frozen)).carry
    return {site: leaf.dtype for site, leaf in jax.eval_shape(run, trainable, frozen).items()}
  narrow = lambda found: {site.rpartition("/")[2] for site, dtype in found.items() if dtype == jnp.bfloat16}
  assert narrow(types()) == {"fc1"}
  assert narrow(types(targets=("q", "fc1"))) == narrow(types(compute="float32")) == set()


def test_texts_are_cut_behind_the_longest_and_of_several_templates_classes_are_means(random_weights):
  weights, backbone = random_weights(SMALL_CLIP), backbones.build(SMALL_CLIP)
  method = methods.build("qlora", SMALL_CLIP, templates=("a {}", "the {} of it"), **PLAIN)
  known = classes(method, ["ant", "busy bee"], functools.partial(made_up_ids, SMALL_CLIP))
  trainable, state = method.init(jax.random.key(0), weights.params, known)
  frozen = method.prepare(weights.params, state)
  a = np.concatenate([leaf.ravel() for name, leaf in tree.flatten(trainable).items() if name.endswith("a")])
  assert 0.98 * 16 ** -0.5 < np.abs(a).max() <= 16 ** -0.5 and 0.4 < np.mean(a > 0) < 0.6
  assert state[ct.SLOT].shape == (4, 16) and method.texts(Context(frozen=frozen)).shape == (4, 7)
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
  zero_shot = methods.build("zero_shot", SMALL_CLIP, templates=("a {}", "the {} of it"))
  run = jax.jit(lambda f, images: predict(zero_shot, backbone, {}, state, f, images))
  wanted = run(zero_shot.prepare(weights.params, state), images)
  found = jax.jit(lambda t, f, images: predict(method, backbone, t, state, f, images))
  np.testing.assert_allclose(found(trainable, frozen, images), wanted, atol=1e-5)


@pytest.mark.parametrize("options, message", [
    ({"rank": 17}, "rank is 17; expected 1 to the smallest tower's width, 16"),
    ({"targets": ("q", "mlp")}, "targets are 'q', 'mlp'; expected some of q, k, v, out, fc1, fc2, each once"),
    ({"targets": ()}, "targets are none"), ({"targets": ("q", "q")}, "each once"),
    ({"base": "int8"}, "base 'int8'.*expected base 'nf4' or 'none'"), ({"compute": "half"}, "compute 'half'"),
    ({"templates": "a photo"}, "has 0 places")])
def test_options_out_of_range_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    methods.build("qlora", TINY, **options)


def test_it_needs_a_plain_vit_or_a_clip():
  for spec in (backbones.architecture("resnet50"), backbones.architecture("swin_tiny_test")):
    with pytest.raises(ValueError, match="qlora needs"):
      methods.build("qlora", spec)
  narrow = dataclasses.replace(VIT, width=12, heads=2, mlp_width=24)  # 12 x 12 numbers are no whole blocks of 64
  method = methods.build("qlora", narrow)
  with pytest.raises(ValueError, match="use base='none'"):
    jax.eval_shape(method.prepare, backbones.abstract_params(narrow), {})
