"""Variants, resolution, preprocessing, zoo and export of `load_weights`."""
import dataclasses
import json
import logging
import os
import re
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from transferlab import tree
from transferlab.backbones import ARCHITECTURES, abstract_params, build, zoo
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights.export import timm_config
from transferlab.backbones.weights import (WeightsError, export_timm, load_weights, origin, resample_positions,
                                           save_weights)

COPIES = Path(__file__).parent / "golden" / "weights"
TIMM, HF = COPIES / "timm_vit", COPIES / "hf_vit"
TINY = ARCHITECTURES["vit_tiny_test"]


def random_params(spec, seed=0):
  rng = np.random.default_rng(seed)
  return tree.unflatten({name: rng.normal(size=leaf.shape).astype(np.float32)
                         for name, leaf in tree.flatten(abstract_params(spec)).items()})


def timm_arrays():
  return safetensors.numpy.load_file(TIMM / "model.safetensors")


def store(path, arrays):
  safetensors.numpy.save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
  return path


def replace(name, *shape):
  return lambda arrays: arrays.update({name: np.ones(shape, np.float32)})


def test_wrong_architecture_is_named(tmp_path):
  small = dataclasses.replace(ARCHITECTURES["vit_ti16"], image_size=32)
  zeros = tree.unflatten({n: np.zeros(leaf.shape) for n, leaf in tree.flatten(abstract_params(small)).items()})
  export_timm(zeros, tmp_path / "small.safetensors", small)
  with pytest.raises(WeightsError, match="small.safetensors is a vit_ti16 .*3 heads.*you asked for vit_b16 .*12 heads"):
    load_weights(tmp_path / "small.safetensors", architecture="vit_b16")
  with pytest.raises(WeightsError, match="width 48; you asked for vit_b16"):
    load_weights(TIMM, architecture="vit_b16")
  with pytest.raises(ValueError, match="'vit_b17' is unknown; nearest: vit_b1"):
    load_weights(TIMM, architecture="vit_b17")


def test_heads_come_from_the_file_the_width_or_the_caller(tmp_path):
  with pytest.raises(WeightsError, match="pass heads="):
    load_weights(TIMM)
  with pytest.raises(WeightsError, match="asked for 4 attention heads; the file has 3"):
    load_weights(HF, heads=4)
  with pytest.raises(WeightsError, match="not a multiple of heads 5"):
    load_weights(TIMM, heads=5)
  export_timm(random_params(TINY), tmp_path / "t.safetensors", TINY)
  arrays = store(tmp_path / "bare.safetensors", safetensors.numpy.load_file(tmp_path / "t.safetensors"))
  assert load_weights(arrays).spec == TINY  # a known width


@pytest.mark.parametrize("change, words", [
    (lambda a: a.pop("blocks.1.mlp.fc1.weight"), "missing: blocks.1.mlp.fc1.weight"),
    (lambda a: a.pop("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight is missing"),
    (lambda a: a.pop("head.bias"), "missing: head.bias"),
    (replace("blocks.0.ls1.gamma", 48), "unexpected: blocks.0.ls1.gamma.*layer scale"),
    (replace("reg_token", 1, 4, 48), "unexpected: reg_token.*register tokens"),
    (replace("norm.bias", 47), r"mis-shaped: norm.bias \[47\] instead of \[48\]"),
    (replace("blocks.1.mlp.fc1.weight", 384, 48), r"\[384, 48\] instead of \[192, 48\]"),
    (replace("pos_embed", 1, 13, 48), "13 rows; expected a square grid and a class"),
    (replace("patch_embed.proj.weight", 48, 1, 8, 8), "1 channels"),
    (replace("blocks.999999999.mlp.fc1.weight", 1, 1), "at most 256 blocks"),
])
def test_missing_unexpected_and_mis_shaped_names_are_listed(tmp_path, change, words):
  arrays = timm_arrays()
  change(arrays)
  with pytest.raises(WeightsError, match="odd.safetensors.*" + words):
    load_weights(store(tmp_path / "odd.safetensors", arrays), heads=3)


def test_big_vision_attention_pooling_is_refused(tmp_path):
  arrays = dict(np.load(COPIES / "augreg_npz" / "bigvision_gap_loop.npz"))
  np.savez(tmp_path / "map.npz", **arrays, **{"params/MAPHead_0/probe": np.zeros((1, 1, 48), np.float32)})
  with pytest.raises(WeightsError, match="map.npz.*MAP head"):
    load_weights(tmp_path / "map.npz")


def test_position_table_without_a_class_row(tmp_path):
  arrays = timm_arrays()
  arrays["pos_embed"] = arrays["pos_embed"][:, 1:]  # timm's no_embed_class
  pos = load_weights(store(tmp_path / "a.safetensors", arrays), heads=3).params["pos"]
  assert pos.shape == (1, 17, 48) and not pos[:, 0].any() and np.array_equal(pos[:, 1:], arrays["pos_embed"])


@pytest.mark.parametrize("side", [2, 3, 7, 14])
def test_positions_are_resampled_as_pil_does(side):
  pos = np.random.default_rng(0).normal(size=(1, 17, 3)).astype(np.float32)
  found = resample_positions(pos, side, 1)
  grid = pos[0, 1:].reshape(4, 4, 3)
  resize = lambda channel: np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC))
  expected = [resize(grid[..., c]) for c in range(3)]
  np.testing.assert_allclose(found[0, 1:].reshape(side, side, 3), np.stack(expected, -1), atol=2e-6)
  assert np.array_equal(found[:, :1], pos[:, :1]) and found.dtype == np.float32
  assert resample_positions(pos, 4, 1) is pos


def test_resolution_change():
  whole = load_weights(TIMM, heads=3)
  half = load_weights(TIMM, heads=3, image_size=16)
  assert half.spec == whole.spec.at_resolution(16) and half.preprocessing.image_size == 16 and half.hash == whole.hash
  assert half.params["pos"].shape == (1, 5, 48)
  features, _ = jax.jit(build(half.spec).apply)(half.params, np.ones((1, 16, 16, 3), np.float32))
  chex.assert_shape(features, (1, 48))
  chex.assert_tree_all_finite(features)
  for size in (0, 20, -8):
    with pytest.raises(WeightsError, match="multiple of the patch size 8"):
      load_weights(TIMM, heads=3, image_size=size)


def test_preprocessing_comes_from_beside_the_weights(tmp_path, caplog):
  assert load_weights(TIMM, heads=3).preprocessing == Preprocessing(32, "bicubic", "center", 0.9)
  assert load_weights(HF).preprocessing == Preprocessing(32, "bilinear", "squash")
  assert not caplog.records
  plain = store(tmp_path / "plain.safetensors", timm_arrays())
  assert load_weights(plain, heads=3).preprocessing == Preprocessing(32, "bicubic", "center", 0.9)
  google = load_weights(COPIES / "augreg_npz" / "original_21k.npz")
  assert google.preprocessing == Preprocessing(32, "bilinear", "squash")
  assert [r.message.count("assumed") + r.message.count("Pass preprocessing=") for r in caplog.records] == [2, 2]
  mine = Preprocessing(16, "box", mean=(0.1, 0.2, 0.3))
  assert load_weights(plain, heads=3, preprocessing=mine, image_size=16).preprocessing == mine
  with pytest.raises(WeightsError, match="for 16 px, the weights for 32 px; pass image_size=16"):
    load_weights(plain, heads=3, preprocessing=mine)


def test_hugging_face_preprocessing_gives_its_images():
  outputs, preprocessing = np.load(HF / "io.npz"), load_weights(HF).preprocessing
  size = (preprocessing.image_size,) * 2
  pixels = np.stack([Image.fromarray(raw).resize(size, Image.Resampling[preprocessing.interpolation.upper()])
                     for raw in outputs["raw_uint8_nhwc"]])
  images = (pixels / 255 - preprocessing.mean) / preprocessing.std
  np.testing.assert_allclose(images.transpose(0, 3, 1, 2), outputs["images"], atol=1e-6)


def folder(tmp_path, origin: Path, config: dict, file="config.json"):
  target = tmp_path / origin.name
  target.mkdir(exist_ok=True)
  for path in origin.iterdir():
    if path.suffix in (".json", ".safetensors"):
      (target / path.name).write_bytes(path.read_bytes())
  (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | config))
  return target


@pytest.mark.parametrize("config, words", [
    ({"model_type": "deit"}, "'deit'; expected model_type 'vit'"), ({"hidden_act": "silu"}, "hidden_act 'silu'"),
    ({"num_attention_heads": 5}, "multiple of heads 5"), ({"num_attention_heads": "3"}, "heads is '3'"),
    ({"layer_norm_eps": -1}, "eps -1"), ({"layer_norm_eps": [1]}, "configuration")])
def test_configurations_that_cannot_be_used(tmp_path, config, words):
  with pytest.raises(WeightsError, match="hf_vit.*" + words):
    load_weights(folder(tmp_path, HF, config))


@pytest.mark.parametrize("config, expected", [
    ({"resample": 3, "size": 32}, Preprocessing(32, "bicubic")),
    ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
     Preprocessing(32, "bilinear", "center", 0.8)),
    ({"do_normalize": False}, Preprocessing(32, "bilinear", mean=(0, 0, 0), std=(1, 1, 1))),
    ({"do_center_crop": True, "crop_size": 28}, "squashes to 32 and then cuts 28"),
    ({"image_mean": [0.4, 0.4]}, "preprocessing"), ({"resample": 9}, "resample 9"), ({"rescale_factor": 1}, "1/255")])
def test_hugging_face_preprocessor_configurations(tmp_path, config, expected):
  path = folder(tmp_path, HF, config, "preprocessor_config.json")
  if isinstance(expected, str):
    with pytest.raises(WeightsError, match=expected):
      load_weights(path)
  else:
    assert load_weights(path).preprocessing == expected


def test_hugging_face_defaults_and_pooler(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  (tmp_path / "m").mkdir()
  arrays = {name.removeprefix("vit."): a for name, a in safetensors.numpy.load_file(HF / "model.safetensors").items()
            if not name.startswith("classifier")}
  arrays |= {"pooler.dense.weight": np.zeros((48, 48), np.float32), "pooler.dense.bias": np.zeros(48, np.float32)}
  store(tmp_path / "m" / "model.safetensors", arrays)
  (tmp_path / "m" / "config.json").write_text('{"model_type": "vit", "num_attention_heads": 3}')
  weights = load_weights(tmp_path / "m")
  assert weights.head is None and weights.spec.norm_eps == 1e-12 and weights.spec.gelu == "erf"
  chex.assert_trees_all_equal(weights.params, load_weights(HF).params)
  assert any("pooler.dense.weight" in r.message for r in caplog.records)
  # ViTConfig's own default of 12 heads holds where the configuration says nothing
  (tmp_path / "m" / "config.json").write_text('{"model_type": "vit", "hidden_act": "gelu_new", "layer_norm_eps": 1e-6}')
  assert (spec := load_weights(tmp_path / "m").spec).heads == 12 and spec.gelu == "tanh" and spec.norm_eps == 1e-6


@pytest.mark.parametrize("config, words", [
    ({"global_pool": "map"}, "global_pool 'map'"), ({"architecture": "vit_base_patch16_rpn_224"}, "rpn"),
    ({"model_args": {"act_layer": "silu"}}, "act_layer 'silu'"),
    ({"model_args": {"pool_include_prefix": True}}, "pool_include_prefix=True"), ({"model_args": [1]}, "configuration"),
    ({"pretrained_cfg": {"mean": [0] * 3, "std": [1] * 3, "crop_mode": "border"}}, "crop_mode 'border'"),
    ({"pretrained_cfg": {"mean": [0] * 3, "std": [1] * 3, "interpolation": "random"}}, "interpolation 'random'")])
def test_timm_configurations_that_cannot_be_used(tmp_path, config, words):
  with pytest.raises(WeightsError, match="timm_vit.*" + words):
    load_weights(folder(tmp_path, TIMM, config), heads=3)


def test_timm_pooling_follows_names_and_configuration(tmp_path):
  assert load_weights(folder(tmp_path, TIMM, {"global_pool": "avg"}), heads=3).spec.pool == "mean"
  arrays = timm_arrays()
  renamed = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: a for name, a in arrays.items()}
  weights = load_weights(store(tmp_path / "fc.safetensors", renamed), heads=3)
  assert weights.spec.pool == "mean_before_norm" and weights.spec.class_token
  del renamed["cls_token"]
  renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
  weights = load_weights(store(tmp_path / "gap.safetensors", renamed), heads=3)
  assert weights.spec.pool == "mean_before_norm" and not weights.spec.class_token
  record = lambda carry, site, y, x: ({**carry, site: y}, y)
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  features, sites = jax.jit(lambda p, x: build(weights.spec).apply(p, x, record, {}))(weights.params, images)
  mean = np.asarray(sites["block_02/out"]).mean(1)  # timm's fc_norm: LayerNorm of the mean, eps 1e-6
  mean = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(features, mean * arrays["norm.weight"] + arrays["norm.bias"], atol=1e-5)


VARIANTS = {"cls": {}, "mean": {"pool": "mean", "class_token": False}, "mean with cls": {"pool": "mean"},
            "mean_before_norm": {"pool": "mean_before_norm", "class_token": False},
            "fc_norm with cls": {"pool": "mean_before_norm"}, "tanh": {"gelu": "tanh"}, "eps": {"norm_eps": 1e-12},
            "no qkv bias": {"qkv_bias": False}, "heads": {"heads": 4, "name": "mine"}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["folder", "file.safetensors"])
def test_export_to_timm_and_back_is_exact(tmp_path, variant, target):
  spec = dataclasses.replace(TINY, **VARIANTS[variant])
  params = random_params(spec)
  preprocessing = Preprocessing(16, "bilinear", "center", 0.8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  head = {"kernel": np.eye(16, 5, dtype=np.float32), "bias": np.arange(5, dtype=np.float32)}
  file = export_timm(params, tmp_path / target, spec, head, preprocessing)
  back = load_weights(tmp_path / target)
  chex.assert_trees_all_equal(back.params, params)
  chex.assert_trees_all_equal(back.head, head)
  assert back.spec == spec and back.preprocessing == preprocessing
  again = export_timm(back, tmp_path / "again" / file.name)
  first, second = (safetensors.safe_open(path, "np") for path in (file, again))
  assert sorted(first.keys()) == sorted(second.keys()) and first.metadata() == second.metadata()
  names = set(first.keys())
  assert ("fc_norm.weight" in names) == (spec.pool == "mean_before_norm") != ("norm.weight" in names)
  assert ("cls_token" in names) == spec.class_token


def test_export_writes_what_the_original_wrote(tmp_path):
  export_timm(load_weights(TIMM, heads=3), tmp_path / "out")
  found, expected = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), timm_arrays()
  assert sorted(found) == sorted(expected)
  chex.assert_trees_all_equal(found, expected)
  config, original = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", TIMM))
  for field in ("num_classes", "num_features", "global_pool"):
    assert config[field] == original[field]
  assert original["pretrained_cfg"].items() <= config["pretrained_cfg"].items()


def test_export_tells_timm_every_size():
  odd = dataclasses.replace(TINY, width=50, mlp_width=116)  # int(width * (mlp_width / width)) falls short by one
  for spec in (*(spec for spec in ARCHITECTURES.values() if spec.family == "vit"), odd):
    arguments = timm_config(spec, 7, None)["model_args"]
    assert int(spec.width * arguments["mlp_ratio"]) == spec.mlp_width
    assert (arguments["embed_dim"], arguments["depth"], arguments["num_heads"]) == (spec.width, spec.depth, spec.heads)
  assert timm_config(ARCHITECTURES["vit_ti16"], 7, None)["architecture"] == "vit_tiny_patch16_224"
  assert timm_config(ARCHITECTURES["vit_gigantic14"], 7, None)["architecture"] == "vit_gigantic_patch14_224"


def test_export_of_the_original_release_leaves_its_tanh_head_out(tmp_path, caplog):
  weights = load_weights(COPIES / "augreg_npz" / "original_21k.npz")
  back = load_weights(export_timm(weights, tmp_path / "o.safetensors"))
  assert back.head is None and back.hash == weights.hash and "pre_logits" in caplog.text
  native = load_weights(save_weights(weights, tmp_path / "n.safetensors", source="Google"))
  chex.assert_trees_all_equal(native.head, weights.head)
  assert native.source == "n.safetensors (Google)" and native.hash == weights.hash and native.spec == weights.spec


def test_export_refuses_parameters_of_another_spec(tmp_path):
  params = random_params(TINY)
  with pytest.raises(WeightsError, match="mis-shaped: pos"):
    export_timm(params, tmp_path / "x.safetensors", TINY.at_resolution(32))
  with pytest.raises(WeightsError, match="pass spec="):
    export_timm(params, tmp_path / "x.safetensors")
  assert not list(tmp_path.iterdir())


def test_native_files_in_half_precision(tmp_path):
  params = random_params(TINY)
  file = save_weights(params, tmp_path / "half.safetensors", TINY, preprocessing=Preprocessing(16), dtype=np.float16)
  weights = load_weights(file)
  chex.assert_trees_all_equal(weights.params, tree.unflatten(
      {n: a.astype(np.float16).astype(np.float32) for n, a in tree.flatten(params).items()}))
  assert weights.name == "half" and weights.spec == TINY and os.path.getsize(file) < 2.2 * sum(
      a.size for a in tree.flatten(params).values()) + 8000
  tree.flatten(params)["norm/bias"][0] = 1e6
  with pytest.raises(WeightsError, match="norm/bias is not finite as float16"):
    save_weights(params, file, TINY, preprocessing=Preprocessing(16), dtype=np.float16)


def test_native_header_must_agree_with_the_arrays(tmp_path):
  file = save_weights(random_params(TINY), tmp_path / "a.safetensors", TINY, preprocessing=Preprocessing(16))
  arrays = safetensors.numpy.load_file(file)
  fields = TINY.to_dict()
  for spec, words in ((fields | {"depth": 4}, "depth 4 and 3"), (fields | {"image_size": 32}, "image_size 32"),
                      (fields | {"colour": 1}, "colour"), ({}, "configuration"), (7, "configuration")):
    header = json.dumps({"spec": spec, "preprocessing": Preprocessing(16).to_dict()})
    safetensors.numpy.save_file(arrays, file, {"transferlab": header})
    with pytest.raises(WeightsError, match=words):
      load_weights(file)


def test_zoo_is_small_and_its_names_say_what_they_are():
  assert len(zoo.ZOO) <= 15 and {"vit_b16.orig_in21k", "vit_b16.augreg_in21k"} <= set(zoo.ZOO)
  for name, entry in zoo.ZOO.items():
    kind, _, where = entry.source.partition(":")
    assert kind in ("hf", "bundled") and where and entry.data and entry.head
    if entry.architecture:
      spec = ARCHITECTURES[entry.architecture]
      assert name.split(".")[0] == entry.architecture
      assert re.search(rf"patch{spec.patch_size}_(window\d+_|clip_)?{spec.image_size}\b", where)
      assert entry.preprocessing.image_size == spec.image_size


def test_offline_is_offline(monkeypatch, tmp_path):
  asked = []
  def snapshot_download(repository, **options):
    asked.append((repository, options["local_files_only"]))
    raise FileNotFoundError("no such thing\nsecond line")
  hub = type(sys)("huggingface_hub")
  hub.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  name = "timm/vit_base_patch16_224.augreg_in21k"
  with pytest.raises(WeightsError, match=f"not on this machine.*model.safetensors.*{name}.*download=True"):
    load_weights("vit_b16.augreg_in21k")
  with pytest.raises(WeightsError, match="could not be fetched"):
    load_weights("vit_b16.augreg_in21k", download=True)
  with pytest.raises(WeightsError, match="hf:me/mine.*could not be fetched .*no such thing"):
    load_weights("hf:me/mine@v1")
  assert asked == [(name, True), (name, False), ("me/mine", False)]
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(WeightsError, match=r"pip install 'transferlab\[hub\]'"):
    load_weights("hf:me/mine")
  with pytest.raises(WeightsError, match="not on this machine"):
    load_weights("vit_l16.augreg_in21k")


def test_zoo_entries_check_variant_and_hash(monkeypatch):
  monkeypatch.setattr(origin, "_hub", lambda repository, download: HF)
  weights = load_weights("hf:google/tiny")
  assert (weights.name, weights.source) == ("tiny", "hf:google/tiny")
  mine = Preprocessing(32, "lanczos")
  entry = zoo.ZooEntry("hf:google/tiny", None, mine, "noise", "none", weights.hash)
  monkeypatch.setitem(zoo.ZOO, "tiny.noise", entry)
  assert load_weights("tiny.noise").name == "tiny.noise" and load_weights("tiny.noise").preprocessing == mine
  monkeypatch.setitem(zoo.ZOO, "tiny.noise", entry._replace(hash="0" * 64))
  with pytest.raises(WeightsError, match="other weights, or a damaged file"):
    load_weights("tiny.noise")
  with pytest.raises(WeightsError, match="you asked for vit_b16"):
    load_weights("vit_b16.augreg_in21k")


@pytest.mark.parametrize("source, words", [
    ("vit_b16", "nearest: vit_b16.augreg_in21k"), ("vit_b16.augreg", "nearest: vit_b16.augreg"),
    ("", "expected a zoo name"), (None, "expected a zoo name"), ("missing/file.npz", "does not exist"),
    ("weights.npz", "does not exist")])
def test_sources_that_do_not_exist(source, words):
  with pytest.raises(WeightsError, match=words):
    load_weights(source)


def test_other_files_and_empty_folders(tmp_path):
  (tmp_path / "notes.txt").write_text("hello")
  with pytest.raises(WeightsError, match="suffix '.txt' is unknown"):
    load_weights(tmp_path / "notes.txt")
  with pytest.raises(WeightsError, match="no model.safetensors; it has notes.txt"):
    load_weights(tmp_path)


def test_bundled_backbone():
  try:
    weights = load_weights("vit_formula64")
  except WeightsError as error:
    pytest.skip(f"not trained yet: {error}")
  assert weights.name == "vit_formula64" and weights.preprocessing.image_size == weights.spec.image_size == 64
  features, _ = jax.jit(build(weights.spec).apply)(weights.params, np.zeros((1, 64, 64, 3), np.float32))
  chex.assert_shape(features, (1, weights.spec.width))
  chex.assert_tree_all_finite(features)
