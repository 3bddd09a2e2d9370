"""The ViT: equal to the original's goldens, a fold that visitors can read and change, the same however it is run."""
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transferlab import backbones, methods, tree
from transferlab.backbones import vit
from transferlab.backbones.spec import ViTSpec
from transferlab.backbones.weights import names
from transferlab.method import Context, chain, drop_path, forward, record, replay

GOLDEN = ViTSpec("golden", 32, 8, 32, 4, 4, 128)
PLACES = ("in", "ln1", "qkv", "bias", "proj", "attn", "mid", "ln2", "fc1", "fc2", "mlp", "out")


def close(found, wanted, tolerance):
  """Same names, and every leaf to `tolerance` of its largest value or of 1."""
  found, wanted = tree.flatten(found), tree.flatten(wanted)
  assert found.keys() == wanted.keys()
  for name, leaf in wanted.items():
    assert jnp.shape(found[name]) == np.shape(leaf), name
    np.testing.assert_allclose(found[name], leaf, rtol=0, atol=tolerance * max(1, np.abs(leaf).max()), err_msg=name)


def images_of(spec, batch=4, seed=1):
  return jax.random.normal(jax.random.key(seed), (batch, *backbones.image_shape(spec)))


@pytest.fixture(scope="module")
def tiny(tiny_spec, tiny_weights):
  """(spec, backbone, params, images) of the tiny ViT."""
  return tiny_spec, backbones.build(tiny_spec), tiny_weights.params, images_of(tiny_spec)


def value_and_gradient(backbone, params, images, **options):
  """Of a scalar that depends on every feature, for all parameters and the images."""
  def loss(params, images):
    features = backbone.apply(params, images, **options)[0]
    return jnp.sum(features.astype(jnp.float32) * jnp.cos(jnp.arange(features.size).reshape(features.shape)))
  return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, images)


# --- Goldens ------------------------------------------------------------------------------------------------

def read(path):
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def native(arrays, prefix):
  """Those of our parameters that the arrays hold in timm's names under a prefix, torch's [out, in] turned."""
  own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
  rules = names.expand(names.timm(), GOLDEN.depth)
  rules = {ours: rule for ours, rule in rules.items() if set(rule.foreign) <= set(own)}
  return tree.unflatten(names.to_native(rules, own))


def head(arrays, prefix):
  return {"kernel": arrays[f"{prefix}head.weight"].T, "bias": arrays[f"{prefix}head.bias"]}


def trainable_of(name, arrays, prefix):
  """Our trainable of the original's parameters, or of their gradients."""
  classifier = {"classifier": head(arrays, prefix)}
  if name == "linear":
    return classifier
  leaves = tree.flatten(native(arrays, prefix))
  if name == "bitfit":
    return {"biases": tree.unflatten({n: leaf for n, leaf in leaves.items() if "bias" in n}), **classifier}
  return {"backbone": tree.unflatten(leaves), **classifier}


# The original full_vit.npz is large; full_vit_gradients.npz holds its float64 gradients, rounded to float32. It started
# from the weights and images of linear_vit.npz.
@pytest.mark.parametrize(
    "name, files", [("linear", ["linear_vit"]), ("bitfit", ["bitfit_vit"]), ("full", ["full_vit"]),
                    ("full", ["linear_vit", "full_vit_gradients"])], ids=("linear", "bitfit", "full_original", "full"))
def test_golden(golden, name, files):
  """Logits, loss and every gradient equal those of the original torch code, in float32 and in float64, to 1e-5."""
  arrays = {key: array for file in files for key, array in read(golden(f"dtl_and_petl/{file}.npz")).items()}
  method, backbone = methods.build(name, GOLDEN), backbones.build(GOLDEN)
  frozen = native(arrays, "param/")
  batch = {"target": jax.nn.one_hot(arrays["labels"], 10), "weight": jnp.ones(3)}
  images = arrays["images"].transpose(0, 2, 3, 1)

  @jax.jit
  def run(trainable):
    def loss(trainable):
      context = Context(batch=batch, frozen=frozen, train=True, rng=jax.random.key(0))
      outputs = forward(method, backbone, trainable, images, context)
      return method.loss(trainable, outputs, context), outputs.logits
    return jax.value_and_grad(loss, has_aux=True)(trainable)

  (loss, logits), gradient = run(trainable_of(name, arrays, "param/"))
  chex.assert_shape(logits, (3, 10))
  for suffix, prefix in (("", "grad/"), ("_f64", "grad64/")):
    wanted = {"loss": arrays[f"loss{suffix}"], "logits": arrays[f"logits{suffix}"]}
    close({"loss": loss, "logits": logits}, wanted, 1e-5)
    if name != "full" or f"{prefix}cls_token" in arrays:
      close(gradient, trainable_of(name, arrays, prefix), 1e-5)


# --- The fold -----------------------------------------------------------------------------------------------

def test_sites_are_those_documented(tiny):
  spec, *_ = tiny
  visited = []
  def visit(carry, site, y, x):
    visited.append(site)
    return carry, y
  run = lambda params, images: backbones.build(spec).apply(params, images, visit)[0]
  jax.eval_shape(run, backbones.abstract_params(spec), images_of(spec))
  blocks = [f"block_{i:02d}/{place}" for i in range(spec.depth) for place in PLACES]
  assert visited == ["patch", "embed", *blocks, "pre_norm", "norm", "pooled"]
  shapes = backbones.sites(spec, batch=2)
  assert list(shapes) == [site for site in visited if not site.endswith("/bias")]
  T, D = spec.tokens, spec.width
  width = {"qkv": 3 * D, "fc1": spec.mlp_width}
  for site, leaf in shapes.items():
    wanted = {"patch": (2, T - 1, D), "pooled": (2, D)}.get(site, (2, T, width.get(site.rpartition("/")[2], D)))
    assert leaf.shape == wanted, site


def test_recording_changes_nothing(tiny):
  spec, backbone, params, images = tiny
  plain = jax.jit(lambda p, x: backbone.apply(p, x)[0])(params, images)
  features, seen = jax.jit(lambda p, x: backbone.apply(p, x, record(), {}))(params, images)
  close({"": features}, {"": plain}, 1e-6)
  assert list(seen) and set(seen) == set(backbones.sites(spec))
  np.testing.assert_array_equal(seen["pooled"], features)


def test_x_is_what_the_site_took_in(tiny):
  _, backbone, params, images = tiny
  def visit(carry, site, y, x):
    return ({**carry, site: (y, x)}, y) if y is not None else (carry, y)
  _, seen = jax.jit(lambda p, x: backbone.apply(p, x, visit, {}))(params, images)
  for block in ("block_00", "block_02"):
    for place in ("qkv", "proj", "fc1", "fc2"):
      (y, x), dense = seen[f"{block}/{place}"], params[block][place]
      np.testing.assert_allclose(y, x @ dense["kernel"] + dense["bias"], atol=1e-5, err_msg=place)
    y, x = seen[f"{block}/mid"]
    np.testing.assert_allclose(y, x + seen[f"{block}/attn"][0], atol=1e-6)
    y, x = seen[f"{block}/out"]
    np.testing.assert_allclose(y, x + seen[f"{block}/mlp"][0], atol=1e-6)


def test_what_a_visitor_writes_counts(tiny):
  """A write at any site of the last block moves the features, and leaves all that came before as it was."""
  spec, backbone, params, images = tiny
  written = [f"block_02/{place}" for place in PLACES if place != "bias"]
  @jax.jit
  def run(amounts):  # one program for all sites: `amounts` says how much is added at each
    def write(carry, site, y, x):
      del x
      return carry, y + amounts[written.index(site)] * jnp.cos(jnp.arange(y.shape[-1])) if site in written else y
    return backbone.apply(params, images, chain(write, record()), {})
  plain, before = run(jnp.zeros(len(written)))
  order = list(backbones.sites(spec))
  for i, site in enumerate(written):
    changed, after = run(jnp.zeros(len(written)).at[i].set(1.0))
    assert np.abs(changed - plain).max() > 1e-3, site
    for name in order[:order.index(site)]:
      np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=f"{name} after a write at {site}")


def test_an_attention_bias_masks(tiny):
  """A bias of -inf on the last token's column is attention without that token."""
  spec, backbone, params, images = tiny
  T = spec.tokens
  hide = jnp.where(jnp.arange(T) == T - 1, -jnp.inf, 0.0)[None, None, None]                # [1, 1, 1, T]
  masked = lambda carry, site, y, x: (carry, hide if site.endswith("/bias") else y)
  cut = lambda carry, site, y, x: (carry, y[:, :-1] if site == "embed" else y)
  run = lambda visit: jax.jit(lambda p, x: backbone.apply(p, x, visit)[0])(params, images)
  close({"": run(masked)}, {"": run(cut)}, 1e-5)


def test_an_attention_bias_gets_its_gradient(tiny):
  """Against a central difference, a bias for each head."""
  spec, backbone, params, images = tiny
  def loss(bias):
    slopes = bias[:, None, None] * jnp.cos(jnp.arange(spec.tokens))                        # [H, 1, T]
    visit = lambda carry, site, y, x: (carry, slopes if site.endswith("/bias") else y)
    return jnp.sum(backbone.apply(params, images, visit)[0] ** 2 * jnp.arange(spec.width))
  at, step = jnp.linspace(0.1, 0.5, spec.heads), 1e-2
  gradient = jax.jit(jax.grad(loss))(at)
  value = jax.jit(loss)
  for h in range(spec.heads):
    e = step * jnp.eye(spec.heads)[h]
    np.testing.assert_allclose(gradient[h], (value(at + e) - value(at - e)) / (2 * step), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("start", (1, 2))
def test_entering_at_a_block_equals_the_whole_fold(tiny, start):
  spec, backbone, params, images = tiny
  def count(carry, site, y, x):
    return carry + site.endswith("/in"), y
  whole, seen = jax.jit(lambda p, x: backbone.apply(p, x, chain(record()), {}))(params, images)
  cached = {f"block_{i:02d}/in": seen[f"block_{i:02d}/in"] for i in range(start)}
  cached[f"block_{start - 1:02d}/out"] = seen[f"block_{start - 1:02d}/out"]
  carry, x = replay(count, 0, cached)
  features, carry = jax.jit(lambda p, x, c: backbone.apply(p, x, count, c, start=start))(params, x, carry)
  close({"": features}, {"": whole}, 1e-6)
  assert carry == spec.depth


# --- The same however it is run -----------------------------------------------------------------------------

def test_remat_changes_nothing(tiny):
  _, backbone, params, images = tiny
  value, (of_params, of_images) = value_and_gradient(backbone, params, images)
  again, (of_params_again, of_images_again) = value_and_gradient(backbone, params, images, remat_from=1)
  close({"value": again, "params": of_params_again, "images": of_images_again},
        {"value": value, "params": of_params, "images": of_images}, 1e-5)


def test_vmap_over_weights(tiny):
  """Two sets of weights in one call, with gradients, equal two calls."""
  _, backbone, params, images = tiny
  both = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), params)
  def loss(params):
    return jnp.sum(backbone.apply(params, images)[0] ** 2 * jnp.arange(1, 1 + backbone.spec.width))
  alone = jax.jit(jax.value_and_grad(loss))
  values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(both)
  for i in range(2):
    part = functools.partial(jax.tree.map, lambda leaf, i=i: leaf[i])
    value, gradient = alone(part(both))
    np.testing.assert_allclose(values[i], value, rtol=1e-5)
    close(part(gradients), gradient, 1e-5)


def test_four_devices_equal_one(tiny):
  if jax.device_count() < 4:
    pytest.skip("needs 4 devices; tests/conftest.py makes them")
  _, backbone, params, images = tiny
  value, (gradient, _) = value_and_gradient(backbone, params, images)
  mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
  spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
  whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  value4, (gradient4, of_images) = value_and_gradient(backbone, whole, spread)
  close(gradient4, gradient, 1e-6)
  np.testing.assert_allclose(value4, value, atol=1e-5)  # 64 features of order 1, which cancel
  assert len(of_images.sharding.device_set) == 4


def test_bfloat16_is_close(tiny):
  """bfloat16 has 8 bits: value and gradient to a few per cent, features in bfloat16."""
  spec, backbone, params, images = tiny
  half = backbones.build(spec, jnp.bfloat16)
  features = jax.jit(lambda p, x: half.apply(p, x)[0])(params, images)
  assert features.dtype == jnp.bfloat16
  wanted = jax.jit(lambda p, x: backbone.apply(p, x)[0])(params, images)
  np.testing.assert_allclose(features.astype(jnp.float32), wanted, atol=0.03 * np.abs(wanted).max())
  _, (gradient, _) = value_and_gradient(half, params, images)  # of float32 parameters, cast on use
  _, (exact, _) = value_and_gradient(backbone, params, images)
  norm = lambda tree_: np.sqrt(sum(float(jnp.sum(leaf ** 2)) for leaf in jax.tree.leaves(tree_)))
  assert norm(jax.tree.map(lambda a, b: a - b, gradient, exact)) < 0.05 * norm(exact)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


# --- The arithmetic -----------------------------------------------------------------------------------------

def test_gelu_and_its_gradient():
  """To float32's rounding of float64, tails included; the other forms by their formulas."""
  from scipy import special
  x = np.concatenate([np.linspace(-12, 12, 4801), [0.0, 1e-30, -1e-30, 60.0, -60.0]])
  cdf, pdf = 0.5 * special.erfc(-x / np.sqrt(2)), np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
  value, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: vit.gelu(x, "erf"))))(jnp.float32(x))
  np.testing.assert_allclose(value, x * cdf, atol=1e-6)
  np.testing.assert_allclose(slope, cdf + x * pdf, atol=1e-6)
  small = x[np.abs(x) < 12]
  np.testing.assert_allclose(vit.gelu(jnp.float32(small), "quick"), small / (1 + np.exp(-1.702 * small)), atol=1e-5)
  tanh = 0.5 * small * (1 + np.tanh(np.sqrt(2 / np.pi) * (small + 0.044715 * small ** 3)))
  np.testing.assert_allclose(vit.gelu(jnp.float32(small), "tanh"), tanh, atol=1e-5)


def test_attention_equals_plain_softmax_attention():
  """Value and gradient, against the definition written out head by head in float64."""
  B, T, H, d = 2, 7, 3, 4
  rng = np.random.default_rng(0)
  qkv, bias = rng.standard_normal((B, T, 3 * H * d)), rng.standard_normal((H, T, T))
  def plain(qkv, bias):
    q, k, v = np.split(qkv, 3, axis=-1)
    heads = []
    for h in range(H):
      part = slice(h * d, (h + 1) * d)
      scores = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(d) + bias[h]
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
    return np.concatenate(heads, axis=-1)
  ours = lambda qkv, bias: vit.attention(qkv, H, bias)
  np.testing.assert_allclose(ours(jnp.float32(qkv), jnp.float32(bias)), plain(qkv, bias), atol=1e-5)
  np.testing.assert_allclose(ours(jnp.float32(qkv), None), plain(qkv, 0 * bias), atol=1e-5)
  ct, dq, db = rng.standard_normal((B, T, H * d)), rng.standard_normal(qkv.shape), rng.standard_normal(bias.shape)
  of_qkv, of_bias = jax.vjp(ours, jnp.float32(qkv), jnp.float32(bias))[1](jnp.float32(ct))
  e = 1e-6
  slope = np.sum(ct * (plain(qkv + e * dq, bias + e * db) - plain(qkv - e * dq, bias - e * db))) / (2 * e)
  np.testing.assert_allclose(np.sum(of_qkv * dq) + np.sum(of_bias * db), slope, rtol=1e-4, atol=1e-4)


def test_large_scores_stay_finite():
  qkv = 300 * jax.random.normal(jax.random.key(0), (2, 5, 24))
  y, back = jax.vjp(lambda qkv: vit.attention(qkv, 2, None), qkv)
  chex.assert_tree_all_finite((y, back(y)))


def test_layer_norm_keeps_precision_far_from_zero():
  """The variance is taken of x - mean: with a mean of 1000 the one-pass form is off by a tenth and more."""
  x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32) + np.float32(1000)
  wide = x.astype(np.float64)
  exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(vit.normalise(x, np.float32(2), np.float32(3), 1e-6), 2 * exact + 3, atol=1e-3)


def test_stochastic_depth():
  """Rates grow linearly with depth; kept branches are scaled so that the mean stays; attention and MLP draw apart."""
  depth, rate, B = 5, 0.4, 20000
  visit = drop_path(jax.random.key(0), rate, depth)
  ones = jnp.ones((B, 1, 1))
  kept = {}
  for i in range(depth):
    for place in ("attn", "mlp"):
      _, y = visit((), f"block_{i:02d}/{place}", ones, None)
      keep = 1 - rate * i / (depth - 1)
      assert set(np.unique(y)) <= {np.float32(0), np.float32(1) / np.float32(keep)}
      kept[i, place] = np.asarray(y).ravel() > 0
      assert abs(kept[i, place].mean() - keep) < 5 * np.sqrt(keep * (1 - keep) / B) + 1e-9
      assert abs(float(y.mean()) - 1) < 0.03
  assert abs(np.corrcoef(kept[4, "attn"], kept[4, "mlp"])[0, 1]) < 0.05
  assert abs(np.corrcoef(kept[4, "attn"], kept[3, "attn"])[0, 1]) < 0.05
  untouched = visit((), "block_04/proj", ones, None)[1]
  np.testing.assert_array_equal(untouched, ones)


# --- Sizes --------------------------------------------------------------------------------------------------

PARAMETERS = {  # timm's counts of the same models with num_classes=0
    "vit_ti16": 5_524_416, "vit_s16": 21_665_664, "vit_s32": 22_493_952, "vit_b16": 85_798_656, "vit_b32": 87_455_232,
    "vit_b8": 85_807_872, "vit_l16": 303_301_632, "vit_l32": 305_510_400, "vit_h14": 630_764_800}


def counted(spec) -> int:
  """By hand: blocks, patches, positions, class token, final norm."""
  D, M, p = spec.width, spec.mlp_width, spec.patch_size
  block = (3 * D * D + 3 * D) + (D * D + D) + (D * M + M) + (M * D + D) + 2 * 2 * D
  return spec.depth * block + (3 * p * p * D + D) + spec.tokens * D + D * spec.class_token + 2 * D


@pytest.mark.parametrize("name", [name for name, spec in backbones.ARCHITECTURES.items() if spec.family == "vit"])
def test_parameter_counts(name):
  spec = backbones.ARCHITECTURES[name]
  found = sum(leaf.size for leaf in jax.tree.leaves(backbones.abstract_params(spec)))
  assert found == counted(spec)
  if name in PARAMETERS:
    assert found == PARAMETERS[name]
