"""Adapter and AdaptFormer against the original implementations, where drop-path acts, and what LoRA needs on a Swin."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import GOLDEN, close, golden_gradient, head, native, read

from transferlab import backbones, methods, tree
from transferlab.method import Context, chain, forward, sizes
from transferlab.methods import classifier

TINY = backbones.architecture("vit_tiny_test")


def originals(arrays) -> dict:
  return {"loss": arrays["loss_f64"], "logits": arrays["logits_f64"]}


def bottlenecks(arrays, prefix, module, down, up):
  """Our {"block_00": {"down", "up"}} of torch's layers (out, in)."""
  layer = lambda i, name: {"kernel": arrays[f"{prefix}blocks.{i}.{module}.{name}.weight"].T,
                           "bias": arrays[f"{prefix}blocks.{i}.{module}.{name}.bias"]}
  return {f"block_{i:02d}": {"down": layer(i, down), "up": layer(i, up)} for i in range(4)}


def adapter_trainable(arrays, prefix):
  return {"adapter": bottlenecks(arrays, prefix, "adapter", "ln1", "ln2"), "classifier": head(arrays, prefix)}


def adaptformer_trainable(arrays, prefix):
  return {"adaptformer": bottlenecks(arrays, prefix, "adaptmlp", "down_proj", "up_proj"),
          "classifier": head(arrays, prefix)}


def in_timm_names(arrays) -> dict:
  """AdaptFormer's own ViT has three projections for q, k, v, and no module around fc1 and fc2."""
  named = {name.replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2."): a for name, a in arrays.items()}
  for i in range(4):
    for kind in ("weight", "bias"):
      parts = [arrays[f"param/blocks.{i}.attn.{p}_proj.{kind}"] for p in "qkv"]
      named[f"param/blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
  return named


@pytest.mark.parametrize("file, name, options, trainable_of", [
    ("adapter_noah", "adapter", {}, adapter_trainable),
    ("adaptformer_official", "adaptformer", {"scale": 0.1}, adaptformer_trainable)])
def test_golden(golden, file, name, options, trainable_of):
  """Logits, loss and the gradient of every trainable leaf equal the original's float64 run."""
  arrays = read(golden(f"dtl_and_petl/{file}.npz"))
  method = methods.build(name, GOLDEN, dim=4, dropout=0.0, **options)
  frozen = native(in_timm_names(arrays) if name == "adaptformer" else arrays, "param/")
  found, gradient = golden_gradient(method, GOLDEN, arrays, frozen, trainable_of(arrays, "param/"))
  close(found, originals(arrays), 2e-6)
  assert len(tree.flatten(gradient)) == sum(key.startswith("grad64/") for key in arrays)  # every gradient is compared
  close(gradient, trainable_of(arrays, "grad64/"), 2e-6)


# --- What a visitor does at its site --------------------------------------------------------------------------------

def filled(method, seed=1):
  """A trainable of which nothing is zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: method.init(key, None, 3), jax.random.key(0))[0]
  return jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape, np.float32), shapes)


def at_mlp(method, trainable, block=0, **context):
  """What the method makes of an MLP's output [2, 5, D] that came from a stream."""
  y, stream = np.random.default_rng(0).standard_normal((2, 2, 5, 16), np.float32)
  return method.visit(trainable, Context(**context))((), f"block_{block:02d}/mlp", y, stream)[1]


@pytest.mark.parametrize("name", ["adapter", "adaptformer"])
def test_where_drop_path_acts(tiny_weights, name):
  """With the last MLP dropped, an adapter is left with its value at 0; AdaptFormer reads the stream beside it."""
  method, params = methods.build(name, TINY, dim=4, dropout=0.0), tiny_weights.params
  trainable = filled(method)
  def spy(carry, site, y, x):
    return ({**carry, site: y, "stream": x} if site == "block_02/mlp" else carry), y
  seen = method._replace(carry={}, visit=lambda trainable, ctx: chain(method.visit(trainable, ctx), spy))
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
  context = Context(frozen=params, train=True, rng=jax.random.key(0))
  run = jax.jit(lambda trainable: forward(seen, backbones.build(TINY), trainable, images, context, drop_path_rate=1.0))
  found = run(trainable).carry
  down, up = (jax.tree.map(np.float64, trainable[name]["block_02"][part]) for part in ("down", "up"))
  if name == "adapter":
    low = down["bias"] / (1 + np.exp(-1.702 * down["bias"]))
    expected = np.broadcast_to(low @ up["kernel"] + up["bias"], (2, TINY.tokens, 16))
  else:
    low = np.maximum(found["stream"] @ down["kernel"] + down["bias"], 0)
    expected = 0.1 * (low @ up["kernel"] + up["bias"])
  np.testing.assert_allclose(found["block_02/mlp"], expected, rtol=0, atol=1e-5)


def test_adaptformer_without_biases_is_one_with_zero_biases():
  plain = methods.build("adaptformer", TINY, bias=False)
  full = methods.build("adaptformer", TINY)
  trainable = filled(plain)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32),
                       jax.eval_shape(lambda key: full.init(key, None, 3), jax.random.key(0))[0])
  np.testing.assert_allclose(at_mlp(plain, trainable), at_mlp(full, tree.merge(zeros, trainable)), atol=1e-6)


@pytest.mark.parametrize("name", ["adapter", "adaptformer"])
def test_dropout_acts_in_training_only_and_differs_between_blocks(name):
  with_, without = (methods.build(name, TINY, dropout=rate) for rate in (0.5, 0.0))
  trainable = filled(with_)
  trainable[name]["block_01"] = trainable[name]["block_00"]
  dry = at_mlp(without, trainable, train=True, rng=jax.random.key(1))
  np.testing.assert_array_equal(at_mlp(with_, trainable), dry)
  wet = [at_mlp(with_, trainable, block, train=True, rng=jax.random.key(seed)) for block, seed in
         ((0, 1), (0, 2), (1, 1), (0, 1))]
  assert all(np.abs(one - dry).max() > 1e-3 for one in wet)
  assert np.abs(wet[0] - wet[1]).max() > 1e-3 and np.abs(wet[0] - wet[2]).max() > 1e-3
  np.testing.assert_array_equal(wet[0], wet[3])


# --- Initialisation, sizes, options ---------------------------------------------------------------------------------

def test_initialisation():
  spec = backbones.architecture("vit_s16", depth=2)
  blocks = lambda name, **options: list(methods.build(name, spec, **options).init(jax.random.key(0), None, 10)[0][
      name].values())
  for block in blocks("adapter") + blocks("adapter", compat="noah"):
    np.testing.assert_allclose(np.std(block["down"]["kernel"]), 0.02, rtol=0.05)
    assert not np.any(block["down"]["bias"]) and not np.any(block["up"]["bias"])
  assert not any(np.any(block["up"]["kernel"]) for block in blocks("adapter"))
  for block in blocks("adapter", compat="noah"):  # its model-wide initialisation overwrites the adapter's own
    np.testing.assert_allclose(np.std(block["up"]["kernel"]), 0.02, rtol=0.05)
  first, second = blocks("adaptformer")
  bound = 384 ** -0.5
  assert 0.99 * bound < np.abs(first["down"]["kernel"]).max() <= bound
  assert not np.array_equal(first["down"]["kernel"], second["down"]["kernel"])
  assert not any(np.any(leaf) for leaf in (first["up"]["kernel"], first["up"]["bias"], first["down"]["bias"]))


@pytest.mark.parametrize("name, options, count", [
    ("adapter", {}, 17 * 12_032 + 24 * 8), ("adaptformer", {"bias": False}, 16 * 12_032), ("lora", {}, 32 * 12_032),
    ("lora", {"form": "fused"}, 32 * 12_032)])
def test_sizes_on_swin_b(name, options, count):
  """By formula, since no paper counts them there; the blocks' widths add up to 12,032."""
  spec = backbones.architecture("swin_b")
  found = sizes(methods.build(name, spec, **options), backbones.abstract_params(spec), 10)
  assert found.trainable_without_classifier == count and found.trainable == count + 10 * 1024 + 10


@pytest.mark.parametrize("name, options, message", [
    ("adapter", {"dim": 0}, "dim is 0; expected 1 to the smallest block's width, 16"),
    ("adapter", {"dim": 17}, "dim is 17; expected 1 to"),
    ("adapter", {"compat": "petl"}, "compat is 'petl'; expected None or 'noah'"),
    ("adaptformer", {"dim": 32}, "dim is 32; expected 1 to"),
    ("adaptformer", {"biases": False}, "no option 'biases'; nearest: bias")])
def test_wrong_options_are_one_line_errors(name, options, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, TINY, **options)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_rank_above_the_first_stage_of_a_swin_is_an_error():
  with pytest.raises(ValueError, match="rank is 9; expected 1 to the smallest block's width, 8"):
    methods.build("lora", backbones.architecture("swin_tiny_test"), rank=9)


def test_adapters_need_transformer_blocks():
  with pytest.raises(ValueError, match="adapter needs transformer blocks; resnet50 has none"):
    methods.build("adapter", backbones.architecture("resnet50"))


def test_the_classifier_of_a_swin_has_the_width_of_its_features():
  method = methods.build("adapter", backbones.architecture("swin_tiny_test"))
  trainable, _ = method.init(jax.random.key(0), None, 5)
  assert trainable["classifier"]["kernel"].shape == (16, 5)
  assert [trainable["adapter"][f"block_{i:02d}"]["up"]["kernel"].shape for i in (1, 2)] == [(8, 8), (8, 16)]
  assert classifier.apply(trainable["classifier"], jnp.ones((2, 16))).shape == (2, 5)
