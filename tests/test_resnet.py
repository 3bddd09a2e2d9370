"""ResNet: every stage against the libraries' own outputs, the taps of Head2Toe, files, and what methods do on it."""
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferlab import backbones, inform, methods, tree
from transferlab.backbones.spec import Preprocessing, ResNetSpec
from transferlab.backbones.weights import WeightsError, export_timm, files, load_weights, save_weights, with_logits
from transferlab.method import drop_path, predict, record
from transferlab.methods.head2toe_features import pool
from transferlab.methods.head2toe_resnet import resnet_taps
from transferlab.testing import PROPERTIES, Case, Expected, Skip

V1 = ResNetSpec("tiny_v1", 32, (1, 2), (16, 32), 8)
V2 = dataclasses.replace(V1, name="tiny_v2", version=2)
BIT = dataclasses.replace(V2, name="tiny_bit", norm="group", groups=2)
TINY = {spec.name: spec for spec in (V1, V2, BIT)}
GOLDENS = {"timm_resnet50_v15": ("model.safetensors", "", {}), "timm_resnetv2": ("model.safetensors", "", {}),
           "bit_npz": ("bit_gn4.npz", "bit_gn4/", {"groups": 4})}


@pytest.fixture(scope="module")
def load(golden):
  def load(name):
    file, prefix, options = GOLDENS[name]
    weights = load_weights(golden(f"checkpoints/{name}/{file}"), image_size=64, **options)
    io = np.load(golden(f"checkpoints/{name}/io.npz"), allow_pickle=False)
    own = {key.removeprefix(prefix): io[key] for key in io.files if key.startswith(prefix)}
    return weights, {key: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for key, x in own.items()}
  return load


def close(found, wanted, what: str = ""):
  """To 1e-5 of the largest value. (BiT's golden maps, float32, are themselves 4e-6 of it away from float64.)"""
  error = np.abs(np.asarray(found) - wanted).max()
  assert error <= 1e-5 * max(1, np.abs(wanted).max()), f"{what}: {error:.1e} of {np.abs(wanted).max():.1f}"


@pytest.mark.parametrize("name", GOLDENS)
def test_every_stage_features_and_logits_are_the_librarys(load, name):
  weights, io = load(name)
  features, acts = backbones.build(weights.spec).apply(weights.params, io["images"], record(), {})
  spec, sites = weights.spec, {"stem": "stem/out"}
  for i in range(spec.depth):
    stage = spec.stage(i)
    sites[f"stage_{stage + 1}_block_{i - sum(spec.stages[:stage])}"] = f"block_{i:02d}/out"
    sites[f"stage_{stage + 1}"] = f"block_{i:02d}/out"  # the last one stays
  if spec.version == 2:
    sites["final_norm_act"] = "norm"
  compared = [key for key in io if key in sites]
  assert len(compared) == (11 if spec.version == 2 else 10) and spec.stages == (1, 2, 1, 1)
  for key in compared:
    close(acts[sites[key]], io[key], key)
  close(features, io["features"], "features")
  close(features @ weights.head["kernel"] + weights.head["bias"], io["logits"], "logits")


@pytest.mark.parametrize("name", GOLDENS)
def test_files_come_back_bit_for_bit(load, name, tmp_path):
  weights, _ = load(name)
  for path in (save_weights(weights, tmp_path / "own.safetensors"), export_timm(weights, tmp_path / "timm"),
               export_timm(weights, tmp_path / "timm.safetensors")):
    back = load_weights(path)
    chex.assert_trees_all_equal((back.params, back.head), (weights.params, weights.head))
    assert back.spec == weights.spec and back.hash == weights.hash and back.preprocessing == weights.preprocessing


@pytest.mark.parametrize("name", ["timm_resnet50_v15", "timm_resnetv2"])
def test_a_timm_export_has_timms_names_and_shapes(load, golden, name, tmp_path):
  original, _ = files.read_safetensors(golden(f"checkpoints/{name}/model.safetensors"))
  found, _ = files.read_safetensors(export_timm(load(name)[0], tmp_path / "x.safetensors"))
  chex.assert_trees_all_equal(found, {k: v for k, v in original.items() if not k.endswith("num_batches_tracked")})


def test_the_logits_become_a_site(load, tmp_path):
  weights, io = load("timm_resnetv2")
  inside = with_logits(weights)
  features, acts = backbones.build(inside.spec).apply(inside.params, io["images"], record("logits"), {})
  close(features, io["features"])
  close(acts["logits"], io["logits"])
  assert inside.hash != weights.hash and inside.head is None
  assert load_weights(save_weights(inside, tmp_path / "x.safetensors")).spec.classes == 10
  assert load_weights(export_timm(inside, tmp_path / "t.safetensors")).hash == weights.hash
  with pytest.raises(WeightsError, match="expected a ResNet's weights with their classifier"):
    with_logits(inside)


# --- Taps -----------------------------------------------------------------------------------------------------------

def test_the_taps_of_head2toe_and_their_numbers_of_features(shared):
  spec = dataclasses.replace(backbones.architecture("resnet50_v2"), classes=1000)
  sites, taps = backbones.sites(spec), resnet_taps(spec)
  shapes = {name: sites[site].shape[1:] for name, site in taps.items()}
  listed = json.loads((shared / "papers/head2toe_features.json").read_text())["resnet50_224_paper_cost_table"]
  assert [(t["name"], tuple(t["shape"])) for t in listed["tensors"]] == list(shapes.items()) and len(shapes) == 52
  for target, count in ((512, 30440), (8192, 467688), (24576, 1696552)):
    pooled = [jax.eval_shape(lambda x, T=target: pool(x, T), sites[site]).shape[1] for site in taps.values()]
    assert sum(pooled) == count


def test_head2toe_reads_the_taps():
  assert [len(methods.build("all_features", backbones.architecture(name)).reads)
          for name in ("resnet50", "resnet50_v2")] == [51, 51]


def test_the_3x3_convolutions_input_has_a_border_of_zeros(random_weights):
  weights = random_weights(V2)
  acts = backbones.build(V2).apply(weights.params, jnp.ones((1, 32, 32, 3)), record(), {})[1]
  x = np.asarray(acts["block_01/conv2/in"])
  assert x.shape == (1, 10, 10, 8) and x[:, 1:-1, 1:-1].any()
  assert not (x[:, [0, -1]].any() or x[:, :, [0, -1]].any())


# --- The fold -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TINY)
def test_sites_lie_on_the_path_and_start_enters_at_a_block(random_weights, name):
  spec = TINY[name]
  weights, apply = random_weights(spec), backbones.build(spec).apply
  images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
  plain, acts = apply(weights.params, images, record(), {})
  inside, _ = apply(weights.params, acts["block_01/in"], start=1)
  np.testing.assert_array_equal(inside, plain)
  for site, y in backbones.sites(spec).items():
    assert acts[site].shape == (2, *y.shape[1:])
    write = lambda carry, s, y, x, site=site: (carry, jnp.sin(2 * y) + 0.5 if s == site else y)
    assert not np.allclose(apply(weights.params, images, write)[0], plain), f"{site} is off the path"
  for i in range(spec.depth):
    assert spec.block(i).grid == acts[f"block_{i:02d}/in"].shape[1:3]


def test_drop_path_drops_residual_branches(random_weights):
  weights, images = random_weights(V2), np.ones((2, 32, 32, 3), np.float32)
  apply = backbones.build(V2).apply
  dropped = apply(weights.params, images, drop_path(jax.random.key(0), 1.0 - 1e-6, V2.depth))[0]
  last = apply(weights.params, images, lambda c, s, y, x: (c, 0 * y if s == "block_02/branch" else y))[0]
  assert not np.allclose(dropped, apply(weights.params, images)[0]) and np.isfinite(last).all()


@pytest.mark.parametrize("name, count", [("resnet50", 23_561_152), ("resnet50_v2", 23_545_792),
                                         ("bit_r50x1", 23_500_352)])
def test_sizes_are_timms(name, count):
  """25,557,032, 25,549,352 and 25,549,352 with 1,000 classes; here batch statistics count too, the head not."""
  spec = backbones.architecture(name)
  flat = tree.flatten(backbones.abstract_params(spec))
  trained = sum(leaf.size for leaf_name, leaf in flat.items() if not leaf_name.endswith(("/mean", "/var")))
  head = 2048 * 1000 + 1000
  assert trained + head == {"resnet50": 25_557_032}.get(name, 25_549_352)
  assert sum(leaf.size for leaf in flat.values()) == count


# --- Methods --------------------------------------------------------------------------------------------------------

def trained(spec) -> int:
  flat = tree.flatten(backbones.abstract_params(spec))
  return sum(leaf.size for name, leaf in flat.items() if not name.endswith(("/mean", "/var")))


def biases(spec) -> int:
  flat = tree.flatten(backbones.abstract_params(spec))
  return sum(leaf.size for name, leaf in flat.items() if name.endswith("/bias"))


TABLE = {"linear": Expected(identity=True, size=lambda spec: 0, mergeable=True, cost=1.05),
         "full": Expected(identity=True, size=trained, mergeable=True),
         "bitfit": Expected(identity=True, size=biases, mergeable=True)}
CASES = {}


CHEAP = ("logits", "identity", "size", "writes_from", "isolation", "save_load", "merged")


@pytest.mark.parametrize("method, backbone, name", [
    pytest.param(method, backbone, name, marks=[pytest.mark.full] if late else [])
    for method, backbone in (("linear", "tiny_v1"), ("full", "tiny_v1"), ("full", "tiny_bit"), ("bitfit", "tiny_v2"))
    for name in (*CHEAP, "gradient", "frozen", "remat", "cost")
    for late in [backbone == "tiny_bit" and name not in CHEAP]])
def test_property(method, backbone, name):
  case = CASES.setdefault((method, backbone), Case(method, TINY[backbone], TABLE[method]))
  try:
    PROPERTIES[name](case)
  except Skip as reason:
    pytest.skip(str(reason))


def test_full_fine_tuning_leaves_batch_statistics_alone(random_weights):
  method, weights = methods.build("full", V1), random_weights(V1)
  trainable, _ = method.init(jax.random.key(0), weights.params, 3)
  assert not [name for name in tree.flatten(trainable) if name.endswith(("mean", "var"))]
  merged = tree.flatten(method.merge(trainable, weights.params))
  assert merged.keys() == tree.flatten(weights.params).keys()


@pytest.mark.parametrize("method", ["lora", "dtl"])
def test_methods_for_transformers_say_so(method, monkeypatch):
  monkeypatch.setattr(inform.cost, "of", lambda *arguments, **how: {})
  with pytest.raises(ValueError, match=f"^{method} needs transformer blocks; resnet50 has none. Methods for it: lin"):
    methods.build(method, backbones.architecture("resnet50"))
  assert method not in [row["method"] for row in inform.costs(V1, None, {}, 3)]


def test_a_probe_on_a_map_takes_its_mean(random_weights):
  method, weights = methods.build("linear", V1, site="block_01/out", tokens="mean"), random_weights(V1)
  trainable, _ = method.init(jax.random.key(0), weights.params, 3)
  images, backbone = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32), backbones.build(V1)
  _, acts = backbone.apply(weights.params, images, record("block_01/out"), {})
  found = predict(method, backbone, trainable, {}, weights.params, images)
  wanted = np.asarray(acts["block_01/out"]).mean(axis=(1, 2)) @ trainable["classifier"]["kernel"]
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  with pytest.raises(ValueError, match="has no class token; use tokens='mean'"):
    methods.build("linear", V1, site="block_01/out")


# --- Files that do not fit ------------------------------------------------------------------------------------------

def test_what_a_file_lacks_or_has_too_much_is_listed(golden, tmp_path):
  arrays, _ = files.read_safetensors(golden("checkpoints/timm_resnetv2/model.safetensors"))
  arrays["stages.0.blocks.0.se.fc1.weight"] = arrays.pop("stages.3.blocks.0.norm2.bias")
  arrays["stages.1.blocks.1.conv2.weight"] = arrays["stages.1.blocks.1.conv2.weight"][:, :4]
  path = files.write_safetensors(tmp_path / "x.safetensors", arrays, {})
  with pytest.raises(WeightsError) as error:
    load_weights(path)
  for part in ("missing: stages.3.blocks.0.norm2.bias", "unexpected: stages.0.blocks.0.se.fc1.weight",
               "mis-shaped: stages.1.blocks.1.conv2.weight [8, 4, 3, 3] instead of [8, 8, 3, 3]"):
    assert part in str(error.value)


def test_variants_are_named(golden, tmp_path):
  path = golden("checkpoints/timm_resnet50_v15/model.safetensors")
  with pytest.raises(WeightsError, match=r"is a resnet_v1_d5_w128 \(version 1, batch norm.*you asked for resnet50_v2"):
    load_weights(path, architecture="resnet50_v2")
  with pytest.raises(WeightsError, match="you asked for vit_b16"):
    load_weights(path, architecture="vit_b16")
  with pytest.raises(WeightsError, match="heads and gelu belong to a ViT"):
    load_weights(path, gelu="tanh")
  with pytest.raises(WeightsError, match="this file has batch norm; leave groups out"):
    load_weights(path, groups=32)
  with pytest.raises(WeightsError, match="expected a divisor of all widths.*pass groups="):
    load_weights(golden("checkpoints/bit_npz/bit_gn4.npz"))
  arrays, _ = files.read_safetensors(path)
  basic = {name: array for name, array in arrays.items() if "conv3" not in name}
  with pytest.raises(WeightsError, match="layer1.0.conv3.weight is missing; expected a ResNet of bottleneck blocks"):
    load_weights(files.write_safetensors(tmp_path / "basic.safetensors", basic, {}))


def test_a_resnet_takes_any_resolution_but_only_the_one_asked_for(load):
  weights, _ = load("timm_resnetv2")
  with pytest.raises(ValueError, match=r"takes \[B, 64, 64, 3\] here"):
    backbones.build(weights.spec).apply(weights.params, np.zeros((1, 32, 32, 3)))
  odd = weights.spec.at_resolution(50)
  features, _ = backbones.build(odd).apply(weights.params, np.zeros((1, 50, 50, 3)))
  assert features.shape == (1, 128)
  assert weights.preprocessing == Preprocessing(64, "bilinear", "center", 0.875)


@pytest.mark.parametrize("change, message", [
    ({"widths": (16,)}, "must be as many"), ({"widths": (16, 30)}, "multiples of 4"), ({"norm": "layer"}, "is unknown"),
    ({"version": 1, "norm": "group"}, "is unknown"), ({"groups": 4}, "expected 0 with batch norm"),
    ({"norm": "group", "groups": 3}, "expected a divisor of all widths")])
def test_impossible_specs_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(V2, **change)
