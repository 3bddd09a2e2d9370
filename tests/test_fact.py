"""FacT against the original implementation, against loops over its pieces, and its layers' own gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapters import filled, originals
from test_methods import GOLDEN, close, golden_gradient, head, native, read

from transferlab import backbones, methods, tree
from transferlab.method import Context, sizes
from transferlab.methods import classifier
from transferlab.methods.fact_layers import dense, project, project_hidden

TINY = backbones.architecture("vit_tiny_test")


def shared(arrays, prefix):
  return {"u": arrays[f"{prefix}FacTu.weight"].T, "v": arrays[f"{prefix}FacTv.weight"].T}


def tk_trainable(arrays, prefix):
  fact = {"stage_0": shared(arrays, prefix), "core": arrays[f"{prefix}FacTc"], "mix": arrays[f"{prefix}FacTp"]}
  return {"fact": fact, "classifier": head(arrays, prefix)}


def tt_trainable(arrays, prefix):
  of = lambda i, name: arrays[f"{prefix}blocks.{i}.{name}_FacTs.weight"].T
  block = lambda i: {"qkv": np.concatenate([of(i, f"attn.{p}") for p in "qkv"], axis=1), "proj": of(i, "attn.proj"),
                     "fc1": of(i, "mlp.fc1"), "fc2": of(i, "mlp.fc2")}
  fact = {"stage_0": shared(arrays, prefix), **{f"block_{i:02d}": block(i) for i in range(4)}}
  return {"fact": fact, "classifier": head(arrays, prefix)}


OPTIONS = {"rank": 4, "scale": 0.5, "dropout": 0.0}
GOLDENS = [("fact_tt_vit", "fact_tt", OPTIONS, tt_trainable),
           ("fact_tk_vit", "fact_tk", {**OPTIONS, "compat": "released"}, tk_trainable)]


@pytest.mark.parametrize("file, name, options, trainable_of", GOLDENS)
def test_golden(golden, file, name, options, trainable_of):
  """Logits, loss and gradients equal the original's float64 run; in float64 they do so to 1e-14, torch's own float32 is
  1e-6 off."""
  arrays = read(golden(f"dtl_and_petl/{file}.npz"))
  method, trainable = methods.build(name, GOLDEN, **options), trainable_of(arrays, "param/")
  found, gradient = golden_gradient(method, GOLDEN, arrays, native(arrays, "param/"), trainable)
  close(found, originals(arrays), 5e-6)
  count = lambda flat: sum(leaf.size for leaf in flat.values())
  compared = {key: leaf for key, leaf in arrays.items() if key.startswith("grad64/")}
  assert count(tree.flatten(gradient)) == count(compared)  # every gradient is compared
  close(gradient, trainable_of(arrays, "grad64/"), 1e-5)


@pytest.mark.parametrize("file, name, options, trainable_of", GOLDENS)
def test_merged_weights_give_the_golden_logits(golden, file, name, options, trainable_of):
  arrays = read(golden(f"dtl_and_petl/{file}.npz"))
  images, frozen, trainable = arrays["images"].transpose(0, 2, 3, 1), native(arrays, "param/"), trainable_of(
      arrays, "param/")
  run = jax.jit(lambda params: classifier.apply(trainable["classifier"],
                                                backbones.build(GOLDEN).apply(params, images)[0]))
  merge = lambda **changes: methods.build(name, GOLDEN, **{**options, **changes}).merge(trainable, frozen)
  close({"": run(merge())}, {"": arrays["logits_f64"]}, 5e-6)
  if name == "fact_tk":  # the released order of slices is no detail
    assert 1.5 < np.abs(run(merge(compat=None)) - arrays["logits_f64"]).max() < 3


def slices(name, fact, i, pieces, R):
  """The R x R slices of block i: of q, k, v, proj, the pieces of fc1, and those of fc2, which are transposed."""
  if name == "fact_tk":
    columns = fact["mix"].T[(4 + 2 * pieces) * i:][:4 + 2 * pieces]
    return [sum(column[c] * fact["core"][:, :, c] for c in range(R)) for column in columns]
  block = fact[f"block_{i:02d}"]
  cut = lambda wide: [wide[:, R * j:R * j + R] for j in range(wide.shape[1] // R)]
  return [*cut(block["qkv"]), block["proj"], *cut(block["fc1"]), *cut(block["fc2"].T)]


@pytest.mark.parametrize("name", ["fact_tt", "fact_tk"])
@pytest.mark.parametrize("spec", [TINY, backbones.architecture("swin_tiny_test")], ids=lambda spec: spec.name)
def test_merged_updates_are_those_of_each_piece(random_weights, spec, name):
  """W + s U Sigma V, one D x D piece after the other."""
  R, s, frozen = 3, 0.7, random_weights(spec).params
  method = methods.build(name, spec, rank=R, scale=s)
  trainable = filled(method)
  merged, n = method.merge(trainable, frozen), spec.block(0).mlp_width // spec.block(0).width
  for i in range(spec.depth):
    block, stage = f"block_{i:02d}", f"stage_{spec.block(i).stage}"
    U, V = (np.float64(trainable["fact"][stage][which]) for which in "uv")
    each = slices(name, trainable["fact"], i, n, R)
    more = [s * U @ sigma @ V for sigma in each[:4 + n]] + [s * U @ sigma.T @ V for sigma in each[4 + n:]]
    expected = {"qkv": np.concatenate(more[:3], 1), "proj": more[3], "fc1": np.concatenate(more[4:4 + n], 1),
                "fc2": np.concatenate(more[4 + n:], 0)}
    for layer, update in expected.items():
      np.testing.assert_allclose(merged[block][layer]["kernel"], frozen[block][layer]["kernel"] + update, atol=1e-5)
  untouched = {n for n, leaf in tree.flatten(merged).items() if np.array_equal(leaf, tree.flatten(frozen)[n])}
  assert len(untouched) == len(tree.flatten(frozen)) - 4 * spec.depth


# --- Layers ---------------------------------------------------------------------------------------------------------

def arrays_of(*shapes):
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize("biased", [True, False])
def test_a_dense_layer_with_its_update_has_the_plain_gradient(biased):
  x, kernel, bias, low, v, seed = arrays_of((2, 3, 8), (8, 12), (12,), (6, 4), (4, 12), (2, 3, 12))
  layer = {"kernel": kernel, "bias": bias} if biased else {"kernel": kernel}
  plain = lambda x, layer, low, v: x @ kernel + biased * bias + (low @ v).reshape(2, 3, 12)
  run = lambda f: jax.value_and_grad(lambda x, low, v: jnp.sum(f(x, layer, low, v) * seed), (0, 1, 2))(x, low, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(dense), run(plain))


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_a_projection_of_hidden_units_has_the_plain_gradient(gelu):
  before, u, seed = arrays_of((2, 3, 8), (4, 2), (6, 4))
  def run(f):
    def value(before, u):
      return jnp.sum(f(backbones.gelu(before, gelu), before, u) * seed)
    return jax.value_and_grad(value, (0, 1))(before, u)
  found = run(lambda x, before, u: project_hidden(gelu, x, before, u))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found,
               run(lambda x, before, u: project(x, u)))


def test_layers_on_a_bfloat16_backbone_give_its_type_back():
  """And their gradients the types of what trains."""
  x, kernel, low, v = arrays_of((2, 3, 8), (8, 12), (6, 4), (4, 12))
  half, layer = jnp.asarray(x, jnp.bfloat16), {"kernel": jnp.asarray(kernel, jnp.bfloat16)}
  value = lambda x, low, v: dense(x, layer, low, v)
  assert value(half, low, v).dtype == jnp.bfloat16
  gradient = jax.grad(lambda *inputs: value(*inputs).sum().astype(jnp.float32), (0, 1, 2))(half, low, v)
  assert [g.dtype for g in gradient] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.parametrize("place, wide", [("qkv", 3), ("proj", 1), ("fc1", 2), ("fc2", 1)])
def test_dropout_acts_in_training_only_and_before_v(tiny_weights, place, wide):
  """What it leaves of an update is within the span of V."""
  with_, without = (methods.build("fact_tt", TINY, rank=2, dropout=rate) for rate in (0.5, 0.0))
  trainable, params = filled(with_), tiny_weights.params
  before, = arrays_of((2, 5, 32 if place == "fc2" else 16))
  x = backbones.gelu(before, "erf") if place == "fc2" else before
  def update(method, block="block_00", **context):
    _, y = method.visit(trainable, Context(frozen=params, **context))(before, f"{block}/{place}", jnp.zeros(1), x)
    layer = params[block][place]
    return np.asarray(y - (x @ layer["kernel"] + layer["bias"]))
  wet, dry = update(with_, train=True, rng=jax.random.key(1)), update(without, train=True, rng=jax.random.key(1))
  np.testing.assert_array_equal(update(with_), dry)
  assert np.abs(wet - dry).max() > 1e-3 and np.abs(wet - update(with_, train=True, rng=jax.random.key(2))).max() > 1e-3
  np.testing.assert_array_equal(wet, update(with_, train=True, rng=jax.random.key(1)))
  v = np.float64(trainable["fact"]["stage_0"]["v"])
  rows = wet.reshape(-1, 16)
  assert rows.size == 2 * 5 * 16 * wide
  np.testing.assert_allclose(rows @ np.linalg.pinv(v) @ v, rows, atol=1e-4)


def test_every_layer_draws_its_own_dropout(tiny_weights, monkeypatch):
  keys = []
  monkeypatch.setattr(classifier, "dropout", lambda rng, rate, low, train: keys.append(jax.random.key_data(rng)) or low)
  method = methods.build("fact_tt", TINY, rank=2)
  visit = method.visit(filled(method), Context(frozen=tiny_weights.params, train=True, rng=jax.random.key(1)))
  x, wide = arrays_of((2, 5, 16), (2, 5, 32))
  for i in range(TINY.depth):
    for place in ("qkv", "proj", "fc1", "fc2"):
      visit(wide, f"block_{i:02d}/{place}", jnp.zeros(1), wide if place == "fc2" else x)
  assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 4 * TINY.depth == len(keys)


# --- Initialisation, sizes, options ---------------------------------------------------------------------------------

def test_initialisation():
  spec = backbones.architecture("vit_s16", depth=2)
  within = lambda leaf, bound: 0.97 * bound < np.abs(leaf).max() <= bound
  start = lambda name: methods.build(name, spec).init(jax.random.key(0), None, 10)[0]["fact"]
  tt, tk = start("fact_tt"), start("fact_tk")
  for fact in (tt, tk):
    assert within(fact["stage_0"]["u"], 384 ** -0.5) and not np.any(fact["stage_0"]["v"])
  for place, rows in (("qkv", 16), ("proj", 16), ("fc1", 16), ("fc2", 64)):
    assert within(tt["block_01"][place], rows ** -0.5)
    assert not np.array_equal(tt["block_00"][place], tt["block_01"][place])
  assert within(tk["core"], 3 ** 0.5 / 16) and within(tk["mix"], (6 / (16 + 24)) ** 0.5)


@pytest.mark.parametrize("name, options, count", [
    ("fact_tt", {}, 135_168), ("fact_tk", {}, 70_144), ("fact_tk", {"rank": 32}, 164_864)])
def test_sizes_on_swin_b(name, options, count):
  """By our formula: U and V of four stages, 1,920 wide together, and 12 pieces in each of 24 blocks."""
  spec, R = backbones.architecture("swin_b"), options.get("rank", 16)
  inner = 12 * 24 * R ** 2 if name == "fact_tt" else R ** 3 + 12 * 24 * R
  assert count == 2 * R * 1920 + inner
  found = sizes(methods.build(name, spec, **options), backbones.abstract_params(spec), 10)
  assert found.trainable_without_classifier == count


@pytest.mark.parametrize("name, options, message", [
    ("fact_tt", {"rank": 0}, "rank is 0; expected 1 to the width, 16"),
    ("fact_tk", {"rank": 17}, "rank is 17; expected 1 to the width, 16"),
    ("fact_tk", {"compat": "aligned"}, "compat is 'aligned'; expected None or 'released'"),
    ("fact_tt", {"compat": "released"}, "no option 'compat'")])
def test_wrong_options_are_one_line_errors(name, options, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, TINY, **options)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_an_mlp_that_is_no_multiple_of_the_width_is_refused():
  with pytest.raises(ValueError, match="whose MLP is a multiple of their width; vit_g14 has none"):
    methods.build("fact_tt", backbones.architecture("vit_g14"))
