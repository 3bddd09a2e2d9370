"""Every layout gives the activations of the original implementation at every block, and the same parameters."""
import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from transferlab import tree
from transferlab.backbones import ARCHITECTURES, abstract_params, build
from transferlab.backbones.spec import ViTSpec
from transferlab.backbones.weights import load_weights, names, weights_hash

COPIES = Path(__file__).parent / "golden" / "weights"
SHARED = Path(__file__).parents[1] / ".." / "shared"


def golden(name: str) -> Path:
  """A checkpoint of the originals: the copy in this repository, or the shared folder's."""
  for folder in (COPIES, SHARED / "golden" / "checkpoints"):
    if (folder / name).exists():
      return folder / name
  pytest.skip(f"{name} lies in ../shared/golden/checkpoints only, which is not here")


def record(carry, site, y, x):
  del x
  return {**carry, site: y}, y


@functools.cache
def compiled(spec):
  return jax.jit(lambda params, x: build(spec).apply(params, x, record, {}))


def run(weights, images):
  """Every site, "features" and "logits" for images [B, 3, S, S] as the goldens have them."""
  features, sites = compiled(weights.spec)(weights.params, images.transpose(0, 2, 3, 1))
  x = np.asarray(features)
  if "pre_logits" in weights.head:
    x = np.tanh(x @ weights.head["pre_logits"]["kernel"] + weights.head["pre_logits"]["bias"])
    sites["pre_logits"] = x
  return {**sites, "features": features, "logits": x @ weights.head["kernel"] + weights.head["bias"]}


def site_of(golden_name: str) -> str:
  fixed = {"patch_embed": "patch", "embeddings": "embed", "norm_out": "norm", "tokens": "norm"}
  if not golden_name.startswith("block_"):
    return fixed.get(golden_name, golden_name)
  index, _, branch = golden_name.removeprefix("block_").partition("_")
  return f"block_{int(index):02d}/{branch or 'out'}"


def check(weights, outputs, prefix: str, images, least: int):
  found = run(weights, images)
  compared = {name.removeprefix(prefix): outputs[name] for name in outputs.files if name.startswith(prefix)}
  compared = {name: value for name, value in compared.items() if name not in ("images", "raw_uint8_nhwc")}
  assert len(compared) >= least
  for name, value in compared.items():
    np.testing.assert_allclose(found[site_of(name)], value, rtol=1e-5, atol=1e-5, err_msg=name)


GOOGLE = {"augreg.npz": "augreg", "augreg_opt_target.npz": "augreg", "original_21k.npz": "original_21k",
          "bigvision_gap_loop.npz": "bigvision_gap", "bigvision_gap_loop_bare.npz": "bigvision_gap",
          "bigvision_tok_scan.npz": "bigvision_tok"}


@pytest.mark.parametrize("file", GOOGLE)
def test_google_layouts_agree_at_every_block(file):
  weights = load_weights(golden(f"augreg_npz/{file}"))
  outputs = np.load(golden("augreg_npz/io.npz"))
  check(weights, outputs, GOOGLE[file] + "/", outputs["images"], least=3 if file == "original_21k.npz" else 15)
  assert ("pre_logits" in weights.head) == (file == "original_21k.npz")


@pytest.mark.parametrize("file", ["original_21k.npz", "bigvision_gap_loop.npz", "bigvision_tok_scan.npz"])
def test_google_files_with_the_tanh_gelu_of_google_code(file):
  weights = load_weights(golden(f"augreg_npz/{file}"), gelu="tanh")
  outputs = np.load(golden("augreg_npz/io_google_tanh.npz"))
  check(weights, outputs, GOOGLE[file] + "/", outputs["images"], least=1)
  exact = load_weights(golden(f"augreg_npz/{file}"))
  assert weights.hash != exact.hash
  difference = np.abs(run(exact, outputs["images"])["logits"] - outputs[GOOGLE[file] + "/logits"]).max()
  assert difference > 1e-5, "the goldens do not tell the two forms apart"


def test_timm_agrees_at_every_block():
  outputs = np.load(golden("augreg_npz/io.npz"))  # the same weights as augreg, so the same outputs
  check(load_weights(golden("timm_vit"), heads=3), outputs, "augreg/", outputs["images"], least=15)


def test_hugging_face_agrees_at_every_block():
  outputs = np.load(golden("hf_vit/io.npz"))
  weights = load_weights(golden("hf_vit"))
  check(weights, outputs, "", outputs["images"], least=11)
  assert weights.spec.norm_eps == 1e-12


def test_one_set_of_weights_has_one_hash_in_every_layout(tmp_path):
  original = dict(np.load(golden("augreg_npz/original_21k.npz")))
  augreg = {name: value for name, value in original.items() if not name.startswith("pre_logits")}
  np.savez(tmp_path / "augreg.npz", **augreg)
  np.savez_compressed(tmp_path / "target.npz", **{f"opt/target/{name}": value for name, value in augreg.items()},
                      **{"opt/state/step": np.int64(7)})
  first = load_weights(golden("augreg_npz/original_21k.npz"))
  for other in (load_weights(tmp_path / "augreg.npz"), load_weights(tmp_path / "target.npz"),
                load_weights(golden("timm_vit"), heads=3)):
    assert other.hash == first.hash
    chex.assert_trees_all_equal(other.params, first.params)


def test_scan_layout_whose_table_leaves_the_class_token_out(tmp_path):
  arrays = dict(np.load(golden("augreg_npz/original_21k.npz")))
  scan = {f"params/{name}": value for name, value in big_vision(arrays).items() if not name.startswith("pre_logits")}
  pos = scan.pop("params/Transformer/posembed_input/pos_embedding")
  scan["params/cls"] = scan["params/cls"] + pos[:, :1]  # big_vision adds positions to the patches only
  np.savez(tmp_path / "scan.npz", **scan, **{"params/pos_embedding": pos[:, 1:]})
  weights = load_weights(tmp_path / "scan.npz")
  assert not weights.params["pos"][:, 0].any() and weights.params["pos"].shape == (1, 17, 48)
  outputs = np.load(golden("augreg_npz/io.npz"))
  check(weights, outputs, "augreg/", outputs["images"], least=15)


def big_vision(arrays):
  """vit_jax's names and per-block arrays as big_vision's scan layout."""
  renamed = {name.replace("Attention_1", "Attention_0").replace("MlpBlock_3", "MlpBlock_0")
             .replace("LayerNorm_2", "LayerNorm_1"): value for name, value in arrays.items()}
  blocks = {name: value for name, value in renamed.items() if "encoderblock_" in name}
  stacked = {name.replace("_0/", "/", 1): np.stack([blocks[name.replace("block_0", f"block_{i}", 1)] for i in range(3)])
             for name in blocks if "encoderblock_0/" in name}
  return {name: value for name, value in renamed.items() if name not in blocks} | stacked


def test_short_floats_and_column_major_arrays_load(tmp_path):
  arrays = dict(np.load(golden("augreg_npz/original_21k.npz")))
  halves = {name: value.astype(jnp.bfloat16).view("V2") for name, value in arrays.items()}  # as big_vision stores it
  np.savez(tmp_path / "bf16.npz", **halves)
  np.savez(tmp_path / "f.npz", **{name: np.asfortranarray(value, np.float64) for name, value in arrays.items()})
  exact = load_weights(golden("augreg_npz/original_21k.npz")).params
  chex.assert_trees_all_equal(load_weights(tmp_path / "f.npz").params, exact)
  chex.assert_trees_all_close(load_weights(tmp_path / "bf16.npz").params, exact, rtol=2 ** -8)
  timm = safetensors.numpy.load_file(golden("timm_vit") / "model.safetensors")
  safetensors.numpy.save_file({n: a.astype(jnp.bfloat16) for n, a in timm.items()}, tmp_path / "b.safetensors")
  chex.assert_trees_all_equal(load_weights(tmp_path / "b.safetensors", heads=3).params,
                              load_weights(tmp_path / "bf16.npz").params)


LAYOUTS = {"native": names.native(), "timm": names.timm(), "timm fc_norm": names.timm("fc_norm"),
           "huggingface": names.huggingface(), "bare huggingface": names.huggingface(""),
           "vit_jax": names.google(True), "big_vision": names.google(False)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [
    ARCHITECTURES["vit_tiny_test"],
    ViTSpec("gap", 8, 4, 12, 2, 3, 20, False, "mean", qkv_bias=False)], ids=["cls", "gap"])
def test_tables_are_bidirectional(layout, spec):
  rng = np.random.default_rng(0)
  shapes = {name: leaf.shape for name, leaf in tree.flatten(abstract_params(spec)).items()}
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  rules = {name: rule for name, rule in names.expand(LAYOUTS[layout], spec.depth).items() if name in params}
  foreign = names.from_native(rules, params, spec.heads)
  assert {name: array.shape for name, array in foreign.items()} == names.foreign_shapes(rules, shapes, spec.heads)
  assert sum(array.size for array in foreign.values()) == sum(array.size for array in params.values())
  back = names.to_native(rules, foreign)
  assert list(back) == list(rules) and not foreign
  chex.assert_trees_all_equal(back, {name: params[name] for name in rules})
  assert weights_hash(tree.unflatten(back), spec) == weights_hash(tree.unflatten(params), spec)


def test_hash_depends_on_names_values_and_what_shapes_do_not_show():
  spec = ARCHITECTURES["vit_tiny_test"]
  zeros = tree.unflatten({n: np.zeros(leaf.shape) for n, leaf in tree.flatten(abstract_params(spec)).items()})
  hashes = [weights_hash(zeros, spec)]
  hashes += [weights_hash(zeros, dataclasses.replace(spec, **change)) for change in (
      {"norm_eps": 1e-5}, {"gelu": "tanh"}, {"pool": "mean"}, {"heads": 4})]
  hashes.append(weights_hash(tree.merge(zeros, {"norm": {"bias": np.eye(1, spec.width)[0]}}), spec))
  assert len(set(hashes)) == len(hashes)
  assert weights_hash(zeros, spec) == weights_hash(zeros, dataclasses.replace(spec, name="other"))


def test_real_weights():
  file = SHARED / "data" / "weights" / "vit_ti16_224_tinyimagenet.safetensors"
  if not file.exists():
    pytest.skip("../shared/data is not here")
  weights = load_weights(file, architecture="vit_ti16")
  assert weights.spec == ARCHITECTURES["vit_ti16"]
  assert weights.head["kernel"].shape == (192, 200) and weights.source == file.name
  assert weights.preprocessing.mean == (0.5, 0.5, 0.5)
  features = jax.jit(build(weights.spec).apply)(weights.params, np.zeros((1, 224, 224, 3), np.float32))[0]
  assert np.isfinite(features).all() and np.abs(features).max() < 100
