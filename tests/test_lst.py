"""LST against a float64 reading of it for a ViT (the released code has none), and how its side network is pruned."""
import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferlab as tl
from transferlab import backbones, losses, methods, tree
from transferlab.backbones import vit
from transferlab.method import Context, collect, forward, predict
from transferlab.methods import classifier
from transferlab.methods.lst_pruning import prune

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # 2/3 of the time to compile


# --- Golden ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reading(golden):
  """(the golden's arrays, its notes, our trainable, the backbone's weights), float64 but for the weights."""
  arrays = {}
  for name in ("io", "side_params"):
    with np.load(golden(f"lst/{name}.npz"), allow_pickle=False) as file:
      arrays |= dict(file)
  weights = tl.load_weights(golden("weights/timm_vit/model.safetensors").parent, heads=3)
  return arrays, json.loads(golden("lst/meta.json").read_text()), trainable_of(arrays, weights.spec.depth), weights


def trainable_of(arrays, depth):
  """Our trainable of the golden's names; it holds (out, in), we (in, out)."""
  dense = lambda name: {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}
  norm = lambda name: {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}
  ours = {"ln1": (norm, "norm1"), "qkv": (dense, "attn.qkv"), "proj": (dense, "attn.proj"), "ln2": (norm, "norm2"),
          "fc1": (dense, "mlp.fc1"), "fc2": (dense, "mlp.fc2")}
  blocks = {f"block_{i:02d}": {name: make(f"side.{i}.{theirs}") for name, (make, theirs) in ours.items()}
            for i in range(depth)}
  down = {slot: dense(f"down.{i}") for i, slot in enumerate(("embed", *blocks))}
  return {"down": down, "side": blocks, "alpha": arrays["alpha"], "norm": norm("side_norm"), "up": dense("up"),
          "classifier": dense("head")}


def close(found, wanted, tolerance):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


def test_golden_in_float64(reading, monkeypatch):
  """Features of both read-outs, logits, loss and the gates' gradient, from the golden's activations of the backbone."""
  arrays, notes, trainable, weights = reading
  monkeypatch.setattr(vit, "softmax", jax.nn.softmax)  # ours computes in float32 at most, as do all read-outs' logits
  with jax.enable_x64(True):
    seen = {"embed": arrays["embeddings"], **{f"block_{i:02d}": arrays[f"block_{i}"] for i in range(3)}}
    batch = {"target": jax.nn.one_hot(np.array(notes["loss_labels"]), 10), "weight": jnp.ones(2)}
    head = lambda features: features @ trainable["classifier"]["kernel"] + trainable["classifier"]["bias"]
    cls, mean = (methods.build("lst", weights.spec, readout=readout) for readout in ("cls", "mean"))

    def run(alpha):
      features = [method.finish({**trainable, "alpha": alpha}, seen, Context()) for method in (cls, mean)]
      return losses.cross_entropy(head(features[0]), batch), (features, head(features[0]), head(features[1]))

    both = quick(jax.value_and_grad(run, has_aux=True))
    (loss, (features, logits, of_mean)), gradient = both(arrays["alpha"])
    assert logits.dtype == jnp.float64
    for found, name in ((features[0], "features"), (features[1], "features_patch_mean"), (logits, "logits"),
                        (of_mean, "logits_patch_mean"), (both(np.zeros(3))[0][1][1], "logits_alpha0")):
      close(found, arrays[name], 1e-10)
    close(loss, notes["loss"], 1e-10)
    close(gradient, list(notes["dloss_dalpha_central_difference"].values()), 1e-8)


def test_golden_from_images(reading):
  """Through the backbone in float32, and from its cached activations."""
  arrays, notes, trainable, weights = reading
  trainable = jax.tree.map(np.float32, trainable)
  method, backbone = methods.build("lst", weights.spec), backbones.build(weights.spec)
  images = np.float32(arrays["images"].transpose(0, 2, 3, 1))

  @quick
  def run(params, trainable, images):
    _, seen = backbone.apply(params, images, collect(method.reads, params), {})
    return (predict(method, backbone, trainable, {}, params, images),
            predict(method, None, trainable, {}, {}, seen))

  for logits in run(weights.params, trainable, images):
    assert logits.dtype == jnp.float32
    close(logits, arrays["logits"], 1e-5)
  count = sum(leaf.size for name, leaf in tree.flatten(trainable).items() if not name.startswith("classifier"))
  assert count == notes["param_count_without_head"]


# --- What the backward pass keeps -----------------------------------------------------------------------------------

def test_of_the_backbone_only_what_is_read_is_kept(tiny_spec):
  """And no attention weights of the side network, which are as large as the backbone's."""
  spec = dataclasses.replace(tiny_spec, width=24, heads=3, mlp_width=72)
  method, backbone, B = methods.build("lst", spec, reduction=2), backbones.build(spec), 2
  params = backbones.abstract_params(spec)
  trainable, _ = jax.eval_shape(lambda rng, p: method.init(rng, p, 4), jax.random.key(0), params)

  def kept(trainable, params, images):
    def loss(trainable):
      context = Context({"target": jnp.ones((B, 4)), "weight": jnp.ones(B)}, {}, params, {}, jax.random.key(0), True)
      return method.loss(trainable, forward(method, backbone, trainable, images, context), context)
    return jax.tree.leaves(jax.vjp(loss, trainable)[1])

  found = jax.eval_shape(kept, trainable, params, jax.ShapeDtypeStruct((B, 16, 16, 3), jnp.float32))
  T, shapes = spec.tokens, [leaf.shape for leaf in found]
  wide = [shape for shape in shapes if np.prod(shape[:-1]) >= B * (T - 1) and shape[-1] in (24, 72)]
  assert len(wide) == spec.depth + 1 and {shape[-1] for shape in wide} == {24}
  assert not [shape for shape in shapes if len(shape) == 4 and shape[-2:] == (T, T)]


# --- The start of the side network ----------------------------------------------------------------------------------

def test_pruned_by_one_the_side_network_is_the_backbone(tiny_spec, tiny_weights):
  """Bit for bit; with gates that let nothing in, and maps that change nothing, it computes the backbone's features."""
  spec, params, D = tiny_spec, tiny_weights.params, tiny_spec.width
  method, backbone = methods.build("lst", spec, reduction=1), backbones.build(spec)
  trainable, _ = method.init(jax.random.key(0), params, 3)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, trainable["side"]), {f"block_{i:02d}": params[f"block_{i:02d}"]
                                                                          for i in range(spec.depth)})
  same = {"kernel": jnp.eye(D), "bias": jnp.zeros(D)}
  trainable |= {"alpha": jnp.full(spec.depth, 100.0), "up": same, "down": {**trainable["down"], "embed": same}}
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
  logits = quick(lambda params, images: predict(method, backbone, trainable, {}, params, images))(params, images)
  features, _ = quick(lambda params, images: backbone.apply(params, images))(params, images)
  close(logits, np.asarray(classifier.apply(trainable["classifier"], features)), 1e-5)


def total(weights, axis):
  return np.abs(np.asarray(weights, np.float64)).sum(axis)


def largest(weights, count):
  return np.sort(np.argsort(-weights, kind="stable")[:count])


def test_what_is_kept_is_the_largest(tiny_spec, random_weights):
  """The same dimensions of the stream everywhere, and as many of each head, alike in q, k and v."""
  rng, names = np.random.default_rng(0), [f"block_{i:02d}" for i in range(tiny_spec.depth)]
  def uneven(leaf):  # rows and columns that differ in size, so that every term of a sum decides something
    return np.float32(leaf * rng.lognormal(size=(len(leaf), 1)) * rng.lognormal(size=leaf.shape[1]) if leaf.ndim == 2
                      else leaf)
  params = jax.tree.map(uneven, random_weights(tiny_spec, 3).params)
  D, H, r, e = tiny_spec.width, tiny_spec.heads, 4, tiny_spec.width // tiny_spec.heads
  found = prune(params, names, H, r)
  weight = sum(total(params[n][layer]["kernel"], axis) for n in names
               for layer, axis in (("qkv", 1), ("proj", 0), ("fc1", 1), ("fc2", 0)))
  stream = largest(weight, D // r)
  np.testing.assert_array_equal(found["norm"]["scale"], params["norm"]["scale"][stream])
  for name in names:
    old, new = params[name], found["side"][name]
    for layer, leaf in (("ln1", "scale"), ("ln1", "bias"), ("ln2", "scale"), ("ln2", "bias"), ("proj", "bias"),
                        ("fc2", "bias")):
      np.testing.assert_array_equal(new[layer][leaf], old[layer][leaf][stream])
    proj = old["proj"]["kernel"][:, stream]
    q, k, v = np.split(old["qkv"]["kernel"][stream], 3, axis=1)
    each = total(q, 0) + total(k, 0) + total(v, 0) + total(proj, 1)                        # [D]
    inner = np.concatenate([e * h + largest(each[e * h:e * h + e], e // r) for h in range(H)])
    hidden = largest(total(old["fc1"]["kernel"][stream], 0) + total(old["fc2"]["kernel"][:, stream], 1),
                     tiny_spec.mlp_width // r)
    columns = np.concatenate([inner, D + inner, 2 * D + inner])
    for found_, wanted in ((new["qkv"]["kernel"], old["qkv"]["kernel"][np.ix_(stream, columns)]),
                           (new["qkv"]["bias"], old["qkv"]["bias"][columns]),
                           (new["proj"]["kernel"], old["proj"]["kernel"][np.ix_(inner, stream)]),
                           (new["fc1"]["kernel"], old["fc1"]["kernel"][np.ix_(stream, hidden)]),
                           (new["fc1"]["bias"], old["fc1"]["bias"][hidden]),
                           (new["fc2"]["kernel"], old["fc2"]["kernel"][np.ix_(hidden, stream)])):
      np.testing.assert_array_equal(found_, wanted)


def test_start(tiny_spec, tiny_weights):
  """The pruned part depends on the weights alone; the rest is drawn. Gates are half open, up and down as torch's."""
  def start(seed, **options):
    return jax.tree.map(np.asarray, methods.build("lst", tiny_spec, reduction=4, **options).init(
        jax.random.key(seed), tiny_weights.params, 3)[0])
  first, second, drawn, other = start(0), start(1), start(0, init="random"), start(1, init="random")
  for part in ("side", "norm"):
    chex.assert_trees_all_equal(first[part], second[part])
    chex.assert_trees_all_equal_shapes(first[part], drawn[part])
  assert not np.any(first["alpha"]) and not np.any(drawn["side"]["block_00"]["qkv"]["bias"])
  assert np.abs(drawn["side"]["block_00"]["qkv"]["kernel"] - other["side"]["block_00"]["qkv"]["kernel"]).max() > 0.1
  assert np.abs(drawn["side"]["block_00"]["qkv"]["kernel"] - drawn["side"]["block_01"]["qkv"]["kernel"]).max() > 0.1
  assert np.all(drawn["norm"]["scale"] == 1) and not np.any(drawn["norm"]["bias"])
  for layer, bound in ((first["down"]["embed"], 0.25), (first["down"]["block_02"], 0.25), (first["up"], 0.5)):
    assert 0.8 * bound < np.abs(layer["kernel"]).max() <= bound and 0 < np.abs(layer["bias"]).max() <= bound
  assert np.abs(first["down"]["embed"]["kernel"] - first["down"]["block_00"]["kernel"]).max() > 0.1
  assert np.abs(first["down"]["embed"]["kernel"] - second["down"]["embed"]["kernel"]).max() > 0.1


def test_pruning_takes_any_precision_and_gives_float32(tiny_spec, tiny_weights):
  half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tiny_weights.params)
  trainable = jax.eval_shape(lambda p: methods.build("lst", tiny_spec).init(jax.random.key(0), p, 3)[0], half)
  assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}


# --- Options --------------------------------------------------------------------------------------------------------

def test_a_dropped_layer_has_no_rung(tiny_spec, tiny_weights):
  method = methods.build("lst", tiny_spec, layers=(1,))
  assert [read.site for read in method.reads.values()] == ["embed", "block_01/out"]
  trainable, _ = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, 3), tiny_weights.params)
  assert (list(trainable["side"]), sorted(trainable["down"])) == (["block_01"], ["block_01", "embed"])
  assert trainable["alpha"].shape == (1,)


def test_without_a_class_token_the_patches_are_averaged(tiny_spec):
  spec = dataclasses.replace(tiny_spec, class_token=False, pool="mean")
  both = [methods.build("lst", s, readout=readout) for s, readout in ((spec, "cls"), (spec, "mean"))]
  rng = np.random.default_rng(0)
  trainable = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), jax.eval_shape(
      lambda p: both[0].init(jax.random.key(0), p, 3)[0], backbones.abstract_params(spec)))
  seen = {slot: rng.standard_normal((2, spec.tokens, spec.width), np.float32) for slot in both[0].reads}
  found = [quick(lambda t, s, method=method: predict(method, None, t, {}, {}, s))(trainable, seen) for method in both]
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("options, message", [
    ({"reduction": 3}, "reduction is 3; expected a divisor of the width of a head, 8, and of the MLP, 32"),
    ({"reduction": 16}, "expected a divisor of the width of a head, 8"),
    ({"reduction": 0}, "reduction is 0"),
    ({"init": "prune"}, "expected init 'pruned' or 'random'"),
    ({"readout": "patch"}, "readout 'cls' or 'mean'"),
    ({"layers": ()}, "layers is (); expected numbers of blocks, 0 to 2, in order"),
    ({"layers": (0, 3)}, "expected numbers of blocks, 0 to 2"),
    ({"layers": (1, 0)}, "in order"),
    ({"layers": ("block_00",)}, "expected numbers of blocks")])
def test_wrong_options_are_one_line_errors(tiny_spec, options, message):
  with pytest.raises(ValueError) as error:
    methods.build("lst", tiny_spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_the_width_of_the_mlp_is_divided_too(tiny_spec):
  with pytest.raises(ValueError, match="reduction is 8; .* and of the MLP, 36"):
    methods.build("lst", dataclasses.replace(tiny_spec, mlp_width=36))


def test_backbones_without_one_width_are_refused():
  for name in ("swin_tiny_test", "resnet50"):
    with pytest.raises(ValueError, match="lst needs transformer blocks of one width"):
      methods.build("lst", backbones.architecture(name))
