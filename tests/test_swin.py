"""The Swin Transformer: against the originals' logits and gradients, its windows, its sites, and methods on it.

Goldens are float32 runs of the original torch code with a float64 run beside them, and are compared as in
test_methods.py: with the latter, to 1e-6 of a tensor's largest value or of 1, or twice what torch's float32 is off.
"""
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferlab import backbones, methods, tree
from transferlab.backbones import swin
from transferlab.backbones.spec import SwinSpec
from transferlab.backbones.weights import names, swins
from transferlab.method import Context, forward, record
from transferlab.methods.linear import feature

GOLDEN = SwinSpec("golden", 32, 2, 16, (2, 2, 2, 2), (1, 2, 4, 8), 4)
TINY = backbones.architecture("swin_tiny_test")
SWIN_B = backbones.architecture("swin_b")


@functools.cache
def apply(spec, dtype=jnp.float32):
  """The compiled (params, images) -> (features, {site: activation}), and how often it was traced."""
  traces = []
  def run(params, images):
    traces.append(1)
    return backbones.build(spec, dtype).apply(params, images, record(), {})
  return jax.jit(run), traces


@pytest.fixture(scope="module")
def tiny(random_weights):
  """(params, images [2, 16, 16, 3], features, sites) of the tiny Swin."""
  params = random_weights(TINY).params
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
  return params, images, *apply(TINY)[0](params, images)


# --- The originals --------------------------------------------------------------------------------------------------

def native(arrays, prefix):
  """(our parameters, head) of a golden's, or of their gradients; what is not there is left out."""
  own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
  rules = {name: rule for name, rule in names.expand(swins.table(GOLDEN, True), 0).items() if rule.foreign[0] in own}
  head = {name: rule for name, rule in names.expand(names.HEADS["swin"], 0).items() if rule.foreign[0] in own}
  params = names.to_native(rules, own)
  return tree.unflatten(params), names.to_native(head, own)


def largest(found, wanted):
  """The largest difference over all leaves, each in units of its largest value or of 1."""
  found, wanted = tree.flatten(found), tree.flatten(wanted)
  assert found.keys() == wanted.keys()
  return max(np.abs(found[name] - leaf).max() / max(1, np.abs(leaf).max()) for name, leaf in wanted.items())


def read(path):
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


@pytest.fixture(scope="module")
def ours(golden):
  """(loss, logits, gradient of everything, the goldens' weights and images), which are the same in all three."""
  arrays = read(golden("dtl_and_petl/bitfit_swin.npz"))
  method, backbone = methods.build("full", GOLDEN), backbones.build(GOLDEN)
  params, head = native(arrays, "param/")
  batch = {"target": jax.nn.one_hot(arrays["labels"], 10), "weight": jnp.ones(3)}

  @jax.jit
  def run(trainable, images):
    def loss(trainable):
      context = Context(batch=batch, train=True, rng=jax.random.key(0))
      outputs = forward(method, backbone, trainable, images, context)
      return method.loss(trainable, outputs, context), outputs.logits
    return jax.value_and_grad(loss, has_aux=True)(trainable)

  (loss, logits), gradient = run({"backbone": params, "classifier": head}, arrays["images"].transpose(0, 2, 3, 1))
  return loss, logits, gradient, {name: array for name, array in arrays.items() if name.startswith(("param", "images"))}


@pytest.mark.parametrize("name", ["bitfit", "linear", "full"])
def test_logits_loss_and_gradients_are_the_originals(golden, ours, name):
  """What a method trains has the originals' gradients: the loss is one, so they are parts of the whole gradient."""
  arrays = read(golden(f"dtl_and_petl/{name}_swin.npz"))
  loss, logits, gradient, weights = ours
  assert all(np.array_equal(arrays[key], array) for key, array in weights.items())
  assert abs(loss - arrays["loss_f64"]) < 1e-6 and largest({"": logits}, {"": arrays["logits_f64"]}) < 1e-6
  method, frozen = methods.build(name, GOLDEN), native(arrays, "param/")[0]
  trainable = method.init(jax.random.key(0), frozen, 10)[0]
  trained = set(tree.flatten(trainable.get("biases") or trainable.get("backbone") or {}))
  (params, head), (single, single_head) = native(arrays, "grad64/"), native(arrays, "grad/")
  assert set(tree.flatten(params)) == trained and sorted(head) == ["bias", "kernel"]
  found = {key: leaf for key, leaf in tree.flatten(gradient["backbone"]).items() if key in trained}
  wanted, of_torch = {**tree.flatten(params), **head}, {**tree.flatten(single), **single_head}
  off = largest(of_torch, wanted)
  assert largest({**found, **gradient["classifier"]}, wanted) < max(1e-6, 2 * off) and off < 5e-6
  assert all(np.any(leaf) for leaf in found.values())


# --- Windows --------------------------------------------------------------------------------------------------------

def test_windows_are_cut_rolled_and_joined():
  x = np.arange(2 * 64 * 3).reshape(2, 64, 3)
  for shift in (0, 2):
    windows = swin.cut(x, (8, 8), 4, shift)
    chex.assert_shape(windows, (2, 4, 16, 3))
    np.testing.assert_array_equal(swin.join(windows, (8, 8), 4, shift), x)
    rows = (np.arange(4) + shift) % 8
    np.testing.assert_array_equal(windows[1, 0].reshape(4, 4, 3), x[1].reshape(8, 8, 3)[rows][:, rows])


def test_relative_positions_and_masks_follow_from_the_map():
  """Equal offsets share a row of the table, others do not; a mask separates what is not adjacent on the map."""
  index, places = swin.relative_index(3), np.stack(np.divmod(np.arange(9), 3), -1)
  offset = places[:, None] - places                                                     # [t, t, 2]
  assert (index == (offset[..., 0] + 2) * 5 + offset[..., 1] + 2).all() and len(np.unique(index)) == 25
  where = swin.cut(np.stack(np.divmod(np.arange(64), 8), -1)[None], (8, 8), 4, 2)[0]    # [nW, t, 2], before the roll
  far = np.abs(where[:, :, None] - where[:, None]).max(-1) >= 4                         # brought together by the roll
  np.testing.assert_array_equal(swin.shift_mask((8, 8), 4, 2) < 0, far)


def test_a_token_reaches_its_window_only_and_the_shifted_one_next(tiny):
  params, images, _, before = tiny
  changed = images.copy()
  changed[:, :2, :2] += 1  # the patch of token 0, above left
  _, after = apply(TINY)[0](params, changed)
  moved = lambda site: {i for i in range(64) if not np.array_equal(before[site][:, i], after[site][:, i])}
  square = lambda sides: {8 * y + x for y in sides for x in sides}
  assert moved("embed") == {0} and moved("block_00/out") == square(range(4)) == moved("block_01/in")
  # Shifted by 2, rows 0 and 1 stand with 6 and 7 in a window, but masked, and 2 to 5 together.
  assert moved("block_01/out") == square(range(6))


def test_geometry_of_swin_b():
  shapes = [SWIN_B.block(i) for i in range(SWIN_B.depth)]
  found = [(s.width, s.heads, s.mlp_width, s.grid[0], s.stage) for s in shapes]
  assert [found[i] for i in (0, 2, 4, 23)] == [
      (128, 4, 512, 56, 0), (256, 8, 1024, 28, 1), (512, 16, 2048, 14, 2), (1024, 32, 4096, 7, 3)]
  assert [SWIN_B.window_of(i) for i in (0, 1, 5, 22, 23)] == [(7, 0), (7, 3), (7, 3), (7, 0), (7, 0)]
  assert SWIN_B.at_resolution(448).block(23).grid == (14, 14)
  with pytest.raises(ValueError, match="windows of 7 fill"):
    SWIN_B.at_resolution(256)
  small = SwinSpec("small", 16, 2, 8, (1, 2), (1, 1), 8)  # maps of 8 and 4, the last smaller than the window
  with pytest.raises(ValueError, match="image_size 32 changes the windows .*for which its bias tables have no rows"):
    small.at_resolution(32)


# --- The fold -------------------------------------------------------------------------------------------------------

def test_sites_lie_on_the_path_with_their_shapes(tiny):
  params, images, plain, acts = tiny
  listed = backbones.sites(TINY)
  assert set(acts) - set(listed) == {f"block_{i:02d}/bias" for i in range(4)}  # the same for all images
  assert acts["block_00/bias"].shape == (1, 2, 16, 16) and acts["block_01/bias"].shape == (4, 2, 16, 16)
  for site, y in listed.items():
    assert acts[site].shape == (2, *y.shape[1:])
  run = jax.jit(lambda params, images, chosen: backbones.build(TINY).apply(
      params, images, lambda i, site, y, x: (i + 1, jnp.where(i == chosen, jnp.sin(2 * y) + 0.5, y)), 0)[0])
  for i, site in enumerate(acts):
    assert not np.allclose(run(params, images, i), plain, atol=1e-4), f"{site} is off the path"
  np.testing.assert_allclose(run(params, images, len(acts)), plain, atol=1e-6)
  for i in range(TINY.depth):
    shape = TINY.block(i)
    assert acts[f"block_{i:02d}/in"].shape == (2, shape.grid[0] * shape.grid[1], shape.width)
    assert acts[f"block_{i:02d}/fc1"].shape[-1] == shape.mlp_width


def test_features_are_the_mean_of_the_normalised_tokens(tiny):
  _, _, features, acts = tiny
  np.testing.assert_allclose(features, np.asarray(acts["norm"]).mean(1), atol=1e-6)
  np.testing.assert_array_equal(features, acts["pooled"])


def test_the_fold_enters_behind_a_block_and_recomputes_with_equal_gradients(tiny):
  params, _, plain, acts = tiny
  backbone, x = backbones.build(TINY), acts["block_01/out"]  # a merge comes before the next block
  def loss(params, remat):
    features = backbone.apply(params, x, start=2, remat_from=remat)[0]
    return jnp.sum(jnp.sin(features)), features
  run = lambda remat: lambda params: jax.grad(loss, has_aux=True)(params, remat)
  (kept, features), (again, _) = jax.jit(lambda params: (run(None)(params), run(2)(params)))(params)
  np.testing.assert_allclose(features, plain, atol=1e-6)
  chex.assert_trees_all_close(kept, again, atol=1e-6)
  tails = {name.partition("/")[0] for name, leaf in tree.flatten(kept).items() if np.any(leaf)}
  assert tails == {"merge_1", "block_02", "block_03", "norm"}
  regions = [str(jax.make_jaxpr(run(remat))(params)).count("prevent_cse=True") for remat in (None, 2, 3)]
  assert regions[0] < regions[2] < regions[1]


def test_bfloat16_is_near_and_traced_once(tiny):
  params, images, plain, _ = tiny
  run, traces = apply(TINY, jnp.bfloat16)
  found, acts = run(params, images)
  run(params, images + 1)
  assert len(traces) == 1 and acts["block_03/out"].dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(np.float32), plain, atol=0.1)


# --- Methods --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_takes_a_swin_or_says_up_front_what_it_lacks(name):
  if not methods.fits(name, TINY):
    with pytest.raises(ValueError, match=f"^{name} needs .*; swin_tiny_test has none. Methods for it: linear, "):
      methods.build(name, TINY)
    return
  method, params = methods.build(name, TINY), backbones.abstract_params(TINY)
  def run(params, images):
    trainable, state = method.init(jax.random.key(0), params, 5)
    return forward(method, backbones.build(TINY), trainable, images, Context(state=state, frozen=params)).logits
  found = jax.eval_shape(run, params, jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
  assert (found.shape, found.dtype) == ((2, 5), jnp.float32)


def test_probes_read_any_site_that_belongs_to_images():
  for site, width in {"block_01/windows": 8, "merge_1/cat": 32, "block_03/fc1": 64, "patch": 8}.items():
    assert feature(TINY, site, "mean")[1] == width
  with pytest.raises(ValueError, match="has no class token; use tokens='mean'"):
    methods.build("linear", TINY, site="block_01/out")
  with pytest.raises(ValueError, match="site 'block_01/bias' is not in swin_tiny_test"):
    methods.build("linear", TINY, site="block_01/bias", tokens="mean")


def test_head2toe_pools_the_maps_of_a_swin(tiny):
  _, _, _, acts = tiny
  method = methods.build("all_features", TINY, target_size=64)
  assert len(method.reads) == 4 + 4 * TINY.depth
  read = method.reads["encoder_0_attn"]  # 8 x 8 tokens of width 8: windows of 4 give 2 x 2 x 8 numbers, not 32 rows
  expected = np.asarray(acts["block_00/attn"]).reshape(2, 2, 4, 2, 4, 8).mean((2, 4)).reshape(2, -1)
  np.testing.assert_allclose(read.reduce(acts["block_00/attn"], {}), expected, atol=1e-6)
  with pytest.raises(ValueError, match="'block_00/qkv' of swin_tiny_test is cut into windows"):
    methods.build("head2toe", TINY, sites=("block_00/qkv",))
