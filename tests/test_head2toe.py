"""Head2Toe against the original code: its functions one by one, and whole runs from images to the last step.

Goldens are float32 runs of google-research/head2toe; functions agree to 1e-5 of their largest value, runs to 1e-4.
"""
import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferlab as tl
from transferlab import backbones, losses, methods
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.vit import ignore
from transferlab.checkpoint import load_adapter
from transferlab.method import Context, Outputs, collect, forward, predict, record, stages
from transferlab.methods.head2toe import layout_of, share_of_batch
from transferlab.methods.head2toe_features import (Layout, average, count_of, pool, score, select, standardise, unit,
                                                   unit_per_layer)
from transferlab.optim import Optim, make_optimiser, schedule
from transferlab.step import compile_step, make_step, start

RECIPE = Optim("adam_keras", lr=0.05, weight_decay=0.0, eps=1e-7)  # the goldens'
VIT_B16 = backbones.architecture("vit_b16")


def read(path):
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def close(found, wanted, tolerance=1e-5):
  """Equal shapes, and equal to `tolerance` of the largest value."""
  assert np.shape(found) == np.shape(wanted)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(initial=0))


# --- Pooling --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, count", [("01_pooling", 70), ("01_pooling_small", 24)])  # some of the same arrays
def test_pooling(golden, file, count):
  arrays, seen = read(golden(f"head2toe/{file}.npz")), 0
  for name, wanted in arrays.items():
    layer, _, how = name.rpartition("_")
    if how == "in":
      continue
    seen += 1
    cls = next((mode for mode in ("nopool_cls", "only_cls") if layer.endswith(mode)), "normal")
    x = arrays[f"{layer.removesuffix(f'_{cls}')}_in"]
    found = average(x, int(how[4:])) if how.startswith("pool") else pool(x, int(how[1:]), cls)
    close(found, wanted)
  assert seen == count


def test_pooling_of_a_single_token_passes_it():
  x = np.arange(10, dtype=np.float32).reshape(2, 1, 5)
  for cls in ("normal", "only_cls", "nopool_cls"):
    np.testing.assert_array_equal(pool(x, 2, cls), x[:, 0])


def test_pooling_averages_in_float32():
  x = jnp.full((1, 512, 2), 1.0, jnp.bfloat16).at[:, 0].set(3.0)
  found = pool(x, 2)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, np.float32([[1 + 2 / 512] * 2]))


@pytest.mark.parametrize("target", [512, 768, 8192, 15360, 24576, 32448])
def test_published_numbers_of_features_on_vit_b16(golden, target):
  counts = json.loads(golden("head2toe/meta_functions.json").read_text())["feature_counts_from_original_function"]
  layout = layout_of(VIT_B16, target_size=target)
  assert layout.total == counts[f"vitb16_cls2d_T{target}"] and len(layout.names) == 53


def test_numbers_kept(golden):
  for name, count in json.loads(golden("head2toe/meta_functions.json").read_text())["kept_counts_int(N*f)"].items():
    total, fraction = name.split("*")
    assert count_of(float(fraction), int(total)) == count


# --- Normalisation --------------------------------------------------------------------------------------------------

def test_normalisation(golden):
  arrays = read(golden("head2toe/02_normalise.npz"))
  layers = [arrays[f"emb{i}"] for i in range(3)]
  for axis in (0, 1):
    close(unit(layers[0], axis), arrays[f"zan_emb0_axis{axis}"])
  join = lambda f, layers: jnp.concatenate([f(x) for x in layers], axis=1)
  close(join(unit, layers), arrays["all_unit_vector"])
  close(join(standardise, layers), arrays["all_per_feature"])
  close(join(jnp.asarray, layers), arrays["all_none"])
  kept = [x[:, arrays[f"sel{i}"]] for i, x in enumerate(layers)]  # nothing of layer 1
  close(join(standardise, kept), arrays["sel_per_feature"])
  close(join(jnp.asarray, kept), arrays["sel_none"])
  close(join(unit, kept), arrays["sel_unit_vector"])

  layout = Layout(("a", "b", "c"), (5, 7, 4))
  indices = np.concatenate([arrays["sel0"], 12 + arrays["sel2"]])
  order = np.array([3, 0, 2, 4, 1])  # layers mixed, as a selection by score has them
  x = np.concatenate(layers, axis=1)[:, indices[order]]
  np.testing.assert_array_equal(layout.layer_of(np.arange(16)), np.repeat([0, 1, 2], layout.sizes))
  close(unit_per_layer(x, layout.layer_of(indices[order]), 3), arrays["sel_unit_vector"][:, order])


def test_statistics_of_the_training_set_scale_the_test_set():
  x = np.random.default_rng(0).standard_normal((8, 3), np.float32)
  whole = standardise(x)
  close(standardise(x[:2], x.mean(0), x.var(0)), whole[:2])
  assert np.abs(standardise(x[:2]) - whole[:2]).max() > 0.1


def test_gradients_of_zero_vectors_are_finite():
  zeros = jnp.zeros((2, 3))
  for f in (unit, lambda x: unit_per_layer(x, jnp.array([0, 0, 1]), 2)):
    gradient = jax.vjp(f, zeros)[1](jnp.ones((2, 3)))[0]
    assert np.isfinite(gradient).all() and not np.any(f(zeros))


# --- Penalties and the loss -----------------------------------------------------------------------------------------

def test_penalties(golden):
  arrays = read(golden("head2toe/03_regularisers.npz"))
  W = arrays["W"]
  assert not W[3].any() and 0 < np.abs(W[9]).max() < 1e-19
  def check(name, penalty, kernel=W):
    value, gradient = jax.jit(jax.value_and_grad(penalty))(kernel)
    close(value, arrays[f"{name}_value"])
    close(gradient, arrays[f"{name}_grad"])
    return gradient
  for coefficient in (0.0001, 0.5):
    gradient = check(f"group_c{coefficient}_r2.0_p1.0", lambda w, c=coefficient: c * losses.l21(w))
    assert not gradient[3].any() and not gradient[9].any() and gradient[0].any()
  check("group_zero", losses.l21, jnp.zeros((4, 3)))
  check("l1l2_0.001_0.0", lambda w: 0.001 * losses.l1(w))
  check("l1l2_0.0_0.001", lambda w: 0.001 * losses.l2(w))
  check("l1l2_0.001_0.002", lambda w: 0.001 * losses.l1(w) + 0.002 * losses.l2(w))


PENALTY = np.float32([[0.37], [0], [0]])  # a kernel whose l21 is the goldens' constant penalty


@pytest.mark.parametrize("part", ["full", "partial"])
def test_loss(golden, tiny_spec, part):
  """The code's loss of a batch of 8, and of one filled up with 3 rows of padding; ours does not shrink with it."""
  arrays = read(golden("head2toe/05_loss.npz"))
  logits, labels = arrays[f"{part}_logits"], arrays[f"{part}_labels"]
  b = len(labels)
  batch = {"target": np.eye(4, dtype=np.float32)[np.pad(labels, (0, 8 - b))],
           "weight": np.float32([1] * b + [0] * (8 - b))}
  padded = np.concatenate([logits, 9 * np.ones((8 - b, 4), np.float32)])
  def loss(coefficient, compat):
    method = methods.build("all_features", tiny_spec, sites="pooled", coefficient=coefficient, compat=compat)
    return method.loss({"classifier": {"kernel": PENALTY}}, Outputs(padded, None, None), Context(batch))
  close(loss(0.0, "paper"), arrays[f"{part}_loss_noreg"])
  close(loss(1.0, "paper"), arrays[f"{part}_loss_reg0.37"])
  close(loss(1.0, None), arrays[f"{part}_loss_noreg"] * 8 / b + 0.37)


@pytest.mark.parametrize("penalty, by_hand", [
    ("none", lambda w: 0), ("l1", lambda w: np.abs(w).sum()), ("l2", lambda w: (w ** 2).sum()),
    ("l21", lambda w: np.sqrt((w ** 2).sum(1)).sum())])
def test_the_penalty_counts_once_and_spares_the_bias(tiny_spec, penalty, by_hand):
  method = methods.build("all_features", tiny_spec, sites="pooled", penalty=penalty, coefficient=0.5)
  kernel = np.random.default_rng(0).standard_normal((6, 3), np.float32)
  batch = {"target": jnp.eye(4, 3), "weight": jnp.float32([1, 1, 1, 0])}
  outputs = Outputs(jnp.zeros((4, 3)), None, None)
  loss = method.loss({"classifier": {"kernel": kernel, "bias": 100 * np.ones(3)}}, outputs, Context(batch))
  close(loss, np.log(3) + 0.5 * by_hand(kernel))


# --- Scores and selection -------------------------------------------------------------------------------------------

def test_scores_and_selection(golden):
  arrays = read(golden("head2toe/04_scores_selection.npz"))
  sizes = tuple(arrays["embedding_sizes"].tolist())
  layout = Layout(tuple(f"layer{i}" for i in range(4)), sizes)
  scores = score(arrays["kernel"])
  close(scores, arrays["score_connectivity_l2"])
  assert len(np.unique(scores)) < 50  # some are equal
  for fraction in (0.01, 0.02, 0.05, 0.1, 0.2, 0.29, 0.5, 1.0):
    count = count_of(fraction, 50)
    kept = select(scores, count)
    np.testing.assert_array_equal(kept, arrays[f"idx_f{fraction}_off0"])
    for name, local in layout.split(kept).items():
      np.testing.assert_array_equal(local, arrays[f"idx_f{fraction}_off0_{name}"])
    if fraction < 1:  # without the best three
      np.testing.assert_array_equal(select(scores, count + 3)[3:], arrays[f"idx_f{fraction}_off3"])


# --- On a ViT -------------------------------------------------------------------------------------------------------

def sites_of(spec, params, images):
  return backbones.build(spec).apply(params, images, record(), {})[1]


@pytest.mark.parametrize("cls", ["normal", "only_cls", "nopool_cls"])
def test_taps_of_a_vit(tiny_spec, tiny_weights, cls):
  """Each tap is its site pooled; the patches have the class token, without a position, in front."""
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
  params = tiny_weights.params
  seen = sites_of(tiny_spec, params, images)
  seen["patch"] = np.concatenate([np.repeat(params["cls"], 2, axis=0), seen["patch"]], axis=1)
  close(seen["patch"] + params["pos"], seen["embed"], 1e-6)
  names = {"pre_logits": "pooled", "root_output_with_cls": "patch", "position_embedded_input": "embed"}
  for i in range(3):
    block = {"pre_attn": "ln1", "attn": "attn", "mlp_1": "fc1", "mlp_2": "mlp"}
    names |= {f"encoder_{i}_{name}": f"block_{i:02d}/{place}" for name, place in block.items()}
  names |= {"encoded_sequence": "norm"}
  wanted = {name: pool(seen[site], 64, cls) for name, site in names.items()}
  wanted["cls_embedded"] = seen["norm"][:, 0]

  method = methods.build("all_features", tiny_spec, target_size=64, cls=cls, normalisation="none")
  _, carry = backbones.build(tiny_spec).apply(params, images, collect(method.reads, params), {})
  assert carry.keys() == wanted.keys()
  for name in wanted:
    close(carry[name], wanted[name], 1e-6)
  layout = layout_of(tiny_spec, target_size=64, cls=cls)
  assert layout.names == tuple(wanted) and layout.sizes == tuple(x.shape[1] for x in wanted.values())

  x = np.concatenate(list(wanted.values()), axis=1)  # the head reads them side by side, in this order
  trainable = {"classifier": {"kernel": np.float32(np.arange(x.shape[1])[:, None] / 100), "bias": np.float32([3])}}
  close(predict(method, backbones.build(tiny_spec), trainable, {}, params, images),
        x @ trainable["classifier"]["kernel"] + 3)


@pytest.mark.parametrize("normalisation", ["unit", "none"])
def test_second_stage_of_a_vit_by_hand(tiny_spec, tiny_weights, normalisation):
  """The best features of the first kernel, each layer's share of them scaled to length 1."""
  options = {"target_size": 64, "normalisation": normalisation}
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
  params, backbone = tiny_weights.params, backbones.build(tiny_spec)
  layout = layout_of(tiny_spec, target_size=64)
  first = methods.build("head2toe", tiny_spec, fraction=0.05, **options)
  trainable, _ = first.init(jax.random.key(0), params, 3)
  second = first.then(trainable, {})
  head, state = second.init(jax.random.key(1), params, 3)
  kept = np.argsort(-(trainable["classifier"]["kernel"] ** 2).sum(1), kind="stable")[:int(0.05 * layout.total)]
  np.testing.assert_array_equal(state["kept"], kept)

  _, carry = backbone.apply(params, images, collect(first.reads, params), {})
  x = np.concatenate([carry[name] for name in layout.names], axis=1)[:, kept]
  if normalisation == "unit":
    layers = np.array(layout.layer_of(kept))
    for layer in np.unique(layers):
      x[:, layers == layer] /= np.linalg.norm(x[:, layers == layer], axis=1, keepdims=True)
  close(predict(second, backbone, head, state, params, images), x @ head["classifier"]["kernel"])
  assert second.then is None and not np.any(head["classifier"]["bias"])
  limit = np.sqrt(6 / (len(kept) + 3))  # Glorot-uniform, not the first kernel's rows
  assert 0.9 * limit < np.abs(head["classifier"]["kernel"]).max() <= limit
  outputs, batch = Outputs(jnp.zeros((2, 3)), None, None), {"target": jnp.eye(2, 3), "weight": jnp.ones(2)}
  close(second.loss(head, outputs, Context(batch)), np.log(3))  # no penalty
  assert first.loss(trainable, outputs, Context(batch)) > np.log(3)


def test_two_stages_are_trained_resumed_saved_and_loaded(tiny_weights, tiny_task, tmp_path):
  options = {"target_size": 64, "fraction": 0.2}
  recipe = tl.Recipe(duration="12 epochs", batch_size=8, devices=1, evaluate_every="12 epochs",
                     optim=dataclasses.replace(RECIPE, lr=0.02))
  fit = lambda folder: tl.fit(tiny_weights, "head2toe", tiny_task, recipe, options=options, workdir=folder, quiet=True)
  run = fit(tmp_path / "run")
  assert run.result["test"]["accuracy"] > 0.5  # chance is 0.25
  (tmp_path / "run" / "result.json").unlink()  # as if stopped right before the end
  (tmp_path / "run" / "adapter.safetensors").unlink()
  again = fit(tmp_path / "run")
  found = load_adapter(again.adapter)
  assert found.method.name == "head2toe" and found.method.then is None and found.state["kept"].dtype == np.int32
  for a, b in ((run.trainable, found.trainable), (run.state, found.state)):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, a), b)
  kept = found.state["kept"]
  assert len(np.unique(kept)) == len(kept) == int(0.2 * layout_of(tiny_weights.spec, target_size=64).total)


@pytest.mark.parametrize("name, options, message", [
    ("all_features", {"penalty": "l3"}, "penalty is 'l3'; expected one of 'none', 'l1', 'l2', 'l21'"),
    ("all_features", {"normalisation": "per_feature"}, "expected one of 'unit', 'none'"),
    ("all_features", {"cls": "mean"}, "expected one of 'normal', 'only_cls', 'nopool_cls'"),
    ("all_features", {"compat": "code"}, "expected one of None, 'paper'"),
    ("all_features", {"target_size": 0}, "target_size is 0; expected a positive"),
    ("all_features", {"coefficient": -1.0}, "coefficient is -1.0; expected 0 or more"),
    ("all_features", {"coefficient": float("nan")}, "coefficient is nan"),
    ("all_features", {"sites": ("block_1/out",)}, "nearest: block_01/out"),
    ("all_features", {"sites": ()}, "sites is empty"),
    ("head2toe", {"fraction": 1e-4}, "fraction 0.0001 keeps 0 of 1856 features; expected 1 to 1856"),
    ("head2toe", {"fraction": 1.1}, "keeps 2041 of 1856")])
def test_wrong_options_are_one_line_errors(tiny_spec, name, options, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, tiny_spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_modes_of_the_class_token_need_one(tiny_spec):
  spec = dataclasses.replace(tiny_spec, class_token=False, pool="mean")
  with pytest.raises(ValueError, match="no class token; use cls='normal'"):
    methods.build("all_features", spec, cls="only_cls")


# --- Whole runs on the goldens' own backbone ------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class GoldenSpec:
  """The goldens' tiny backbone: two convolutions, 17 tokens whose first is their mean, logits."""
  name: str = "golden"
  image_size: int = 16
  width: int = 16
  depth: int = 1
  prefix_tokens: int = 0
  family: str = "golden"


class GoldenBackbone(nn.Module):
  spec: GoldenSpec
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, visit=ignore, carry=(), *, start=0, remat_from=None):
    weight = lambda name, *shape: self.param(name, nn.initializers.ones, shape)
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = nn.relu(conv(x, weight("k1", 3, 3, 3, 8)))
    carry, x = visit(carry, "after_root", x, None)                # [B, 8, 8, 8]
    x = nn.relu(conv(x, weight("k2", 3, 3, 8, 16)))
    carry, x = visit(carry, "b2", x, None)                        # [B, 4, 4, 16]
    pooled = x.mean(axis=(1, 2))
    x = jnp.concatenate([pooled[:, None], x.reshape(-1, 16, 16)], axis=1) @ weight("kt", 16, 12)
    carry, x = visit(carry, "tokens", x, None)                    # [B, 17, 12]
    carry, pooled = visit(carry, "pre_logits", pooled, x)         # [B, 16]
    carry, _ = visit(carry, "logits", pooled @ weight("kl", 16, 10), pooled)
    return pooled, carry


# The golden images are normalised already. A step divides pixels by 255 and by std: 1/255 gives them back to 1 ulp.
AS_IS = Preprocessing(16, mean=(0.0,) * 3, std=(1 / 255,) * 3)
SITES = ("pre_logits", "after_root", "b2", "tokens", "logits")


@pytest.fixture
def tiny(golden, monkeypatch):
  """(arrays, frozen parameters) of the goldens' backbone, which becomes a family of backbones."""
  monkeypatch.setitem(backbones.FAMILIES, "golden", (GoldenSpec, GoldenBackbone))
  arrays = read(golden("head2toe/19_e2e_images.npz"))
  return arrays, {name: jnp.asarray(arrays[name]) for name in ("k1", "k2", "kt", "kl")}


def run_stage(method, arrays, frozen, kernel, losses_wanted=None):
  """30 steps of batches of 16, 16 and 8 in a fixed order, through the real step and optimiser."""
  trainable, state = method.init(jax.random.key(0), frozen, 4)
  assert trainable["classifier"]["kernel"].shape == kernel.shape and not trainable["classifier"]["bias"].any()
  trainable = {"classifier": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4)}}
  optimiser = make_optimiser(RECIPE, schedule(RECIPE, 30, 3, 16), trainable)
  step = make_step(method, backbones.build(GoldenSpec()), optimiser, AS_IS, 4)
  run, compiled, found = start(trainable, state, optimiser), None, []
  for t in range(30):
    rows = slice(16 * (t % 3), 16 * (t % 3) + 16)
    images, labels = arrays["xs"][rows], arrays["ys"][rows].astype(np.int32)
    fill = 16 - len(labels)
    batch = {"image": jnp.asarray(np.pad(images, ((0, fill),) + ((0, 0),) * 3)),
             "label": jnp.asarray(np.pad(labels, (0, fill))), "weight": jnp.float32([1] * len(labels) + [0] * fill)}
    compiled = compiled or compile_step(step, run, frozen, batch)
    run, metrics = compiled(run, frozen, batch)
    found.append(float(metrics["loss"]))
  if losses_wanted is not None:
    close(found, losses_wanted, 1e-4)
  return run.trainable, run.state


def check_query(method, trainable, state, arrays, frozen, wanted):
  """The query set's accuracy, and the loss as the original reports it."""
  context = Context(state=state, frozen=frozen)
  logits = forward(method, backbones.build(GoldenSpec()), trainable, arrays["xq"], context).logits
  correct = int((logits.argmax(-1) == arrays["yq"]).sum())
  assert correct == round(float(wanted["query_accuracy_reported"]) * 50)  # of 46: the original divides by 50


def test_embeddings_of_the_golden_backbone(tiny, golden):
  """The pooled, normalised features that the head gets, from images."""
  arrays, frozen = tiny
  wanted = read(golden("head2toe/14_e2e_all_l21.npz"))
  method = methods.build("all_features", GoldenSpec(), sites=SITES, target_size=64, normalisation="none")
  layout = layout_of(GoldenSpec(), sites=SITES, target_size=64)
  assert layout.sizes == tuple(wanted["embedding_sizes"])
  _, carry = backbones.build(GoldenSpec()).apply(frozen, arrays["xq"], collect(method.reads, frozen), {})
  close(np.concatenate([carry[site] for site in SITES], axis=1), wanted["emb_query"])
  assert method.reads.keys() == carry.keys()


@pytest.mark.parametrize("file, options", [
    ("14_e2e_all_l21", {"sites": SITES, "penalty": "l21", "coefficient": 1e-3}),
    ("15_e2e_linear", {"sites": "pre_logits", "penalty": "none"})])
def test_run_of_all_features(tiny, golden, file, options):
  arrays, frozen = tiny
  wanted = read(golden(f"head2toe/{file}.npz"))
  method = methods.build("all_features", GoldenSpec(), target_size=64, compat="paper", **options)
  trainable, state = run_stage(method, arrays, frozen, wanted["final_kernel_init"], wanted["support_loss"])
  close(trainable["classifier"]["kernel"], wanted["final_kernel_end"], 1e-4)
  close(trainable["classifier"]["bias"], wanted["final_bias_end"], 1e-4)
  check_query(method, trainable, state, arrays, frozen, wanted)


def test_run_of_head2toe(tiny, golden):
  """Both stages: the first's kernel, the features it selects in each layer, and the second's kernel."""
  arrays, frozen = tiny
  wanted = read(golden("head2toe/10_e2e_head2toe.npz"))
  names = [str(name) for name in wanted["names"]]
  layout = layout_of(GoldenSpec(), sites=SITES, target_size=64)
  by_layer = np.concatenate([start + wanted[f"sel_{name}"] for name, start in
                             zip(names, np.cumsum((0, *layout.sizes)))]).astype(int)  # the original's order
  place = None
  def train(method):
    nonlocal place
    if method.then:
      return run_stage(method, arrays, frozen, wanted["select_kernel_init"])
    kept = method.init(jax.random.key(0), frozen, 4)[1]["kept"]
    place = np.array([by_layer.tolist().index(i) for i in kept])  # ours is by score alone
    return run_stage(method, arrays, frozen, wanted["final_kernel_init"][place], wanted["support_loss"])

  method = methods.build("head2toe", GoldenSpec(), sites=SITES, target_size=64, fraction=0.1, coefficient=1e-3,
                         compat="paper")
  (_, first, _), (final, last, state) = stages(method, train)
  close(first["classifier"]["kernel"], wanted["select_kernel_end"], 1e-4)
  close(first["classifier"]["bias"], wanted["select_bias_end"], 1e-4)
  close(score(first["classifier"]["kernel"]), wanted["scores"], 1e-4)
  for name, local in zip(names, layout.split(state["kept"]).values()):
    np.testing.assert_array_equal(local, wanted[f"sel_{name}"])
  close(last["classifier"]["kernel"], wanted["final_kernel_end"][place], 1e-4)
  close(last["classifier"]["bias"], wanted["final_bias_end"], 1e-4)
  check_query(final, last, state, arrays, frozen, wanted)


def test_rows_that_devices_fill_up_are_no_part_of_the_nominal_batch():
  """With compat="paper" a loss is over the nominal batch: ten rows of twelve on four devices are all of it, and ten of
  twelve of an epoch's last batch are not."""
  weight = jnp.asarray([1.0] * 10 + [0.0] * 2)
  share = lambda rows: share_of_batch({"compat": "paper"}, Context({"weight": weight}, rows=rows))
  assert share(10) == 1 and np.isclose(share(12), 10 / 12) and np.isclose(share(None), 10 / 12)
  assert share_of_batch({"compat": ""}, Context({"weight": weight}, rows=10)) == 1
