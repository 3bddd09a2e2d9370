"""Swin weights: the layouts of timm and of the original, every stage as the library computes it, and the way back."""
import dataclasses
import json
import logging

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from transferlab import backbones, cli, tree
from transferlab.backbones import zoo
from transferlab.backbones.spec import Preprocessing, SwinSpec
from transferlab.backbones.weights import WeightsError, export_timm, load_weights, names, save_weights, swins
from transferlab.backbones.weights.torch_files import read_torch
from transferlab.method import record

TINY = backbones.architecture("swin_tiny_test")
IMAGENET = Preprocessing(64, "bicubic", "center", 0.9, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="session")
def original(golden):
  """The path of the original's `.pth`, which lies under two names."""
  try:
    return golden("weights/timm_swin/swin_original.pth")
  except pytest.skip.Exception:
    return golden("checkpoints/timm_swin/swin_original.pth")


@pytest.fixture(scope="session")
def arrays(original):
  """{the original's name: array}, without what is computed."""
  return {name: a for name, a in read_torch(original).items() if not name.endswith(("_index", "attn_mask"))}


def timm(arrays: dict) -> dict:
  """The original's names as those of timm 0.9 and later: merges before their stage, another classifier."""
  moved = {f"layers.{i}.downsample": f"layers.{i + 1}.downsample" for i in range(3)}
  def rename(name):
    old = next((old for old in moved if name.startswith(old)), None)
    return moved[old] + name.removeprefix(old) if old else name.replace("head.", "head.fc.")
  return {rename(name): array for name, array in arrays.items()}


def store(path, arrays: dict, config: dict | None = None):
  safetensors.numpy.save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path,
                              {"timm_config": json.dumps(config or {})})
  return path


def close(found, wanted, what):
  assert np.abs(found - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max()), what


def test_every_stage_features_and_logits_are_the_librarys(original):
  weights = load_weights(original)
  io = np.load(original.with_name("io.npz"), allow_pickle=False)
  spec = weights.spec
  features, acts = jax.jit(lambda params, images: backbones.build(spec).apply(params, images, record(), {}))(
      weights.params, io["images"].transpose(0, 2, 3, 1))
  sites = {"patch_embed": "embed", "feature_map": "norm"}
  for i in range(spec.depth):
    stage = spec.stage(i)
    sites[f"stage_{stage}_block_{i - sum(spec.stages[:stage])}"] = sites[f"stage_{stage}"] = f"block_{i:02d}/out"
    sites[f"stage_{stage}_downsample"] = f"merge_{stage}/out"
  maps = [name for name in io.files if name not in ("images", "features", "logits")]
  assert len(maps) == 15
  for name in maps:
    close(acts[sites[name]], io[name].reshape(2, -1, io[name].shape[-1]), name)
  close(features, io["features"], "features")
  close(features @ weights.head["kernel"] + weights.head["bias"], io["logits"], "logits")


def test_one_set_of_weights_is_the_same_in_every_layout(original, arrays, golden, tmp_path):
  expected = load_weights(original)
  assert expected.spec == SwinSpec("swin_w8_d2-1-2-1", 64, 4, 8, (2, 1, 2, 1), (2, 4, 8, 16), 4)
  assert expected.preprocessing == IMAGENET and expected.head["kernel"].shape == (64, 10)
  old = {**arrays, "layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64)}
  bare = {name: a for name, a in timm(arrays).items() if not name.startswith("head.")}
  for i, other in enumerate((old, timm(arrays), bare)):
    found = load_weights(store(tmp_path / f"{i}.safetensors", other))
    assert found.hash == expected.hash and found.spec == expected.spec
    chex.assert_trees_all_equal(found.params, expected.params)
    assert (found.head is None) == (other is bare)


def test_timms_own_file(golden, original, arrays):
  path = golden("checkpoints/timm_swin/model.safetensors")
  chex.assert_trees_all_equal(safetensors.numpy.load_file(path), timm(arrays))
  assert load_weights(path).hash == load_weights(original).hash


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b", "swin_l"])
@pytest.mark.parametrize("after", [True, False], ids=["swin", "timm"])
def test_an_architecture_is_known_by_its_shapes(name, after, caplog):
  caplog.set_level(logging.INFO)
  spec = backbones.architecture(name)
  shapes = {n: leaf.shape for n, leaf in tree.flatten(backbones.abstract_params(spec)).items()}
  foreign = names.foreign_shapes(names.expand(swins.table(spec, after), 0), shapes, 0)
  dummies = {n: np.broadcast_to(np.float32(0), shape) for n, shape in foreign.items()}
  layout, found = swins.recognise(dummies, {}, {})
  assert found == spec and layout.name == ("swin" if after else "timm_swin")
  assert [r.message for r in caplog.records] == [
      f"nothing in this {layout.name} tells its image size; assumed 224 px, at which the last map is one window of 7"]


def test_the_image_size_comes_from_maps_masks_configuration_or_is_said_to_be_assumed(tmp_path, caplog, random_weights):
  caplog.set_level(logging.INFO)
  params = random_weights(TINY).params  # windows of 4 in both stages; maps of 8 and 4 at 16 px
  file = export_timm(params, tmp_path / "t.safetensors", TINY)
  arrays = safetensors.numpy.load_file(file)
  mask = {"layers.0.blocks.1.attn_mask": np.zeros((16, 16, 16), np.float32)}  # 4 x 4 windows: a map of 16
  for config, extra, size in (({}, {}, 16), ({"pretrained_cfg": {"input_size": [3, 32, 32]}}, {}, 32),
                              ({"model_args": {"img_size": 32}}, {}, 32), ({"input_size": [3, 16, 16]}, mask, 32)):
    caplog.clear()
    weights = load_weights(store(tmp_path / "x.safetensors", arrays | extra, config))
    assert weights.spec.image_size == weights.preprocessing.image_size == size and weights.spec.sizes == TINY.sizes
    assert ("assumed 16 px" in caplog.text) == (not config)
  with pytest.raises(WeightsError, match="x.safetensors: no Swin .* image_size is 20; expected one that windows of 4"):
    load_weights(store(tmp_path / "x.safetensors", arrays, {"input_size": [3, 20, 20]}))


def test_another_resolution_keeps_the_windows(original, random_weights, tmp_path):
  file = save_weights(random_weights(TINY), tmp_path / "tiny.safetensors")
  assert load_weights(file, image_size=32).spec == TINY.at_resolution(32)
  for path, size, words in ((file, 24, "image_size is 24; expected one that windows of 4 fill"),
                            (file, 15, "multiple of the patch"),
                            (original, 128, "image_size 128 changes the windows of swin_w8_d2-1-2-1")):
    with pytest.raises(WeightsError, match=f"^{path.name}.*{words}"):
      load_weights(path, image_size=size)


ODD = {"attn.qkv.weight": "layers.0.blocks.1.attn.qkv.weight", "norm": "patch_embed.norm.bias", "head": "head.fc.bias",
       "table": "layers.2.blocks.1.attn.relative_position_bias_table", "merge": "layers.2.downsample.reduction.weight"}


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_missing_and_mis_shaped_names_are_listed(arrays, tmp_path, name):
  whole = timm(arrays)
  less = {key: a for key, a in whole.items() if key != name}
  with pytest.raises(WeightsError, match=f"^x.safetensors: .*timm_swin's layout: missing: {name}"):
    load_weights(store(tmp_path / "x.safetensors", less))
  longer = {**whole, name: np.concatenate([whole[name], whole[name]])}
  listed = name.replace("head.fc.bias", "head.fc.weight")  # whose bias says how many classes there are
  with pytest.raises(WeightsError, match=f"^x.safetensors: .*mis-shaped: {listed} "):
    load_weights(store(tmp_path / "x.safetensors", longer))


@pytest.mark.parametrize("change, words", [
    ({"absolute_pos_embed": np.ones((1, 256, 8))}, "unexpected: absolute_pos_embed$"),
    ({"layers.0.blocks.0.attn.logit_scale": np.ones((2, 1, 1))}, "this is a Swin V2"),
    ({"layers.1.blocks.0.attn.relative_position_bias_table": np.ones((48, 4))}, "48 rows; expected .*window"),
    ({"layers.1.blocks.0.attn.relative_position_bias_table": np.ones((64, 4))}, "64 rows; expected .*window"),
    ({"layers.1.blocks.0.attn.relative_position_bias_table": np.ones(49)}, "expected 2 dimensions"),
    ({"layers.1.blocks.0.attn.relative_position_bias_table": np.ones((49, 3))}, "not a multiple of its heads, 3"),
    ({"layers.9.blocks.0.norm1.weight": np.ones(8)}, "10 stages; expected at most 256 in 8"),
    ({"layers.0.blocks.999.norm1.weight": np.ones(8)}, "missing: layers.0.blocks.2.mlp"),
    ({"layers.4.blocks.0.norm1.weight": np.ones(8)}, "layers.4.blocks.0.attn.relative_position_bias_table is missing"),
    ({"patch_embed.proj.weight": np.ones((8, 1, 4, 4))}, "1 channels"),
    ({"layers.0.blocks.1.attn_mask": np.ones((3, 16, 16))}, "no Swin can be made")])
def test_what_is_no_swin_of_ours_is_told(arrays, tmp_path, change, words):
  odd = timm(arrays) | {name: np.asarray(a, np.float32) for name, a in change.items()}
  with pytest.raises(WeightsError, match=f"^x.safetensors: .*{words}"):
    load_weights(store(tmp_path / "x.safetensors", odd))


def test_wrong_variants_and_arguments_are_named(original, arrays, tmp_path):
  with pytest.raises(WeightsError, match="swin_original.pth is a swin_w8_d2-1-2-1 .width 8, .*for swin_b .width 128, "):
    load_weights(original, architecture="swin_b")
  with pytest.raises(WeightsError, match="swin_w8.*asked for vit_b16"):
    load_weights(original, architecture="vit_b16")
  for arguments in ({"heads": 4}, {"groups": 8}):
    with pytest.raises(WeightsError, match="heads and groups belong to other backbones, and this is a swin_w8"):
      load_weights(original, **arguments)
  assert load_weights(original, gelu="tanh").hash != load_weights(original).hash
  for config, words in (({"model_args": {"always_partition": True}}, "always_partition=True"),
                        ({"global_pool": "max"}, "global_pool 'max'"), ({"model_args": 7}, "configuration"),
                        ({"transferlab": {"norm_eps": "x"}}, "no Swin")):
    with pytest.raises(WeightsError, match=words):
      load_weights(store(tmp_path / "x.safetensors", timm(arrays), config))


def test_export_writes_timms_names_and_comes_back_exactly(original, arrays, tmp_path):
  weights = load_weights(original)
  weights = weights._replace(preprocessing=dataclasses.replace(weights.preprocessing, mean=(0.1, 0.2, 0.3)))
  file = export_timm(weights, tmp_path / "timm")
  chex.assert_trees_all_equal(safetensors.numpy.load_file(file), timm(arrays))
  config = json.loads((tmp_path / "timm" / "config.json").read_text())
  assert config["model_args"] | {"depths": [2, 1, 2, 1], "num_heads": [2, 4, 8, 16], "window_size": 4, "img_size": 64,
                                 "embed_dim": 8, "mlp_ratio": 4, "patch_size": 4} == config["model_args"]
  assert config["num_classes"] == 10 and config["pretrained_cfg"]["classifier"] == "head.fc"
  for path in (tmp_path / "timm", export_timm(weights, tmp_path / "t.safetensors"),
               save_weights(weights, tmp_path / "own.safetensors", source="Microsoft")):
    back = load_weights(path)
    chex.assert_trees_all_equal((back.params, back.head), (weights.params, weights.head))
    assert back.spec == weights.spec and back.hash == weights.hash and back.preprocessing == weights.preprocessing
  assert back.source == "own.safetensors (Microsoft)"


@pytest.mark.parametrize("changes", [{"gelu": "tanh"}, {"norm_eps": 1e-6}, {"qkv_bias": False}, {"mlp_ratio": 13 / 8},
                                     {"name": "mine", "image_size": 32}], ids=str)
def test_variants_survive_export_and_our_own_file(changes, random_weights, tmp_path, caplog):
  weights = random_weights(dataclasses.replace(TINY, **changes))
  for write in (export_timm, save_weights):
    back = load_weights(write(weights, tmp_path / f"{write.__name__}.safetensors"))
    assert back.spec == weights.spec and back.hash == weights.hash
  assert ("timm builds this Swin" in caplog.text) == bool({"gelu", "norm_eps"} & set(changes))


def test_our_own_header_must_make_a_swin(random_weights, tmp_path):
  weights = random_weights(TINY)
  file = save_weights(weights, tmp_path / "own.safetensors")
  arrays, fields = safetensors.numpy.load_file(file), TINY.to_dict()
  for spec, words in ((fields | {"stages": [2, 3]}, "missing: block_04"), (fields | {"window": 3}, "windows of 3 fill"),
                      (fields | {"colour": 1}, "colour"), (fields | {"stages": [999, 2]}, "at most 256"),
                      (fields | {"stage_heads": "x"}, "expected tuple")):
    header = json.dumps({"spec": spec, "preprocessing": weights.preprocessing.to_dict()})
    safetensors.numpy.save_file(arrays, file, {"transferlab": header})
    with pytest.raises(WeightsError, match=f"^own.safetensors.*{words}"):
      load_weights(file)


def test_the_command_line_takes_a_swin(original, tmp_path, capsys):
  cli.main(["transferlab", "convert", f"--backbone={original}", f"--out={tmp_path / 'out'}"])
  assert load_weights(tmp_path / "out").hash == load_weights(original).hash
  cli.main(["transferlab", "info", "--backbone=swin_b.ms_in22k", "--sites", "--json"])
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["merge_3/cat"] == [1, 49, 2048] and found["block_05/windows"] == [1, 4, 49, 512]
  assert zoo.ZOO["swin_b.ms_in22k"].preprocessing == dataclasses.replace(IMAGENET, image_size=224)
