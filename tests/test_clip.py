"""CLIP's fold over two towers: the original's numbers at every site, and what the towers promise to their visitors."""
import functools
import json
import re

import jax
import numpy as np
import pytest
from clip_goldens import golden_clip, golden_values

from transferlab import backbones, methods, tree
from transferlab.backbones import Towers
from transferlab.backbones.weights import clip_names, names
from transferlab.method import record
from transferlab.testing import PROPERTIES, Case, Expected

TINY = backbones.architecture("clip_tiny_test")


def near(what, found, wanted, tolerance=1e-4):
  assert found.shape == wanted.shape, what
  error = float(np.max(np.abs(np.asarray(found) - wanted) / (1 + np.abs(wanted))))
  assert error <= tolerance, f"{what}: {error:.1e}"


@functools.cache
def program(spec, **how):
  """params, inputs -> (Towers, all sites), compiled once for each shape of its inputs."""
  return jax.jit(lambda params, inputs: backbones.build(spec).apply(params, inputs, record(), {}, **how))


def run(spec, params, inputs, **how):
  with jax.default_matmul_precision("highest"):
    return program(spec, **how)(params, inputs)


def normalised(x):
  return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def tiny(random_weights):
  """(parameters, images [2, 16, 16, 3], ids [3, 12]) of the tiny CLIP; texts end at 3, 5 and 11."""
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 60, (3, TINY.context)).astype(np.int32)
  for row, end in enumerate((3, 5, 11)):
    ids[row, 0], ids[row, end], ids[row, end + 1:] = TINY.vocabulary - 2, TINY.vocabulary - 1, 0
  return random_weights(TINY).params, rng.standard_normal((2, 16, 16, 3)).astype(np.float32), ids


def test_golden_zero_shot_at_every_site(golden):
  """All that the original computes on the way to its logits."""
  spec, params = golden_clip(golden, "T")
  wanted = golden_values(golden, "T_zeroshot")
  out, sites = run(spec, params, Towers(wanted["images"], wanted["token_ids"]))
  ends = np.argmax(wanted["token_ids"], axis=-1)
  assert np.array_equal(ends, wanted["eot_index"])
  layer_norm = lambda x, p: np.asarray(backbones.normalise(x, p["scale"], p["bias"], spec.norm_eps))
  for i in range(spec.depth):
    image, text = (sites[f"{tower}/block_{i:02d}/out"] for tower in ("image", "text"))
    near(f"image {i}", image, wanted["vision_hidden_all_layers"][i])
    near(f"class token {i}", image[:, 0], wanted["cls_raw_per_layer"][i])
    near(f"end {i}", backbones.at_end(text, wanted["token_ids"]), wanted["eot_raw_per_layer"][i])
    cls = layer_norm(image[:, 0], params["image"]["norm"])
    eot = layer_norm(text[np.arange(5), ends], params["text"]["norm"])
    near(f"normed class token {i}", cls, wanted["cls_ln_post_per_layer"][i])
    near(f"normed end {i}", eot, wanted["eot_ln_final_per_layer"][i])
    near(f"projected {i}", cls @ params["image_projection"]["kernel"], wanted["cls_projected_per_layer"][i])
    near(f"projected text {i}", eot @ params["text_projection"]["kernel"], wanted["eot_projected_per_layer"][i])
  near("last text layer", sites["text/block_03/out"], wanted["text_hidden_last_layer"])
  near("image features", out.image, wanted["image_features"])
  near("text features", out.text, wanted["text_features"])
  logits = np.exp(params["logit_scale"]) * normalised(out.image) @ normalised(out.text).T
  near("logits", logits, wanted["logits_per_image"])
  near("logits of texts", logits.T, wanted["logits_per_text"])


@pytest.fixture(scope="module")
def both(tiny):
  """(Towers, all sites) of both towers together."""
  params, images, ids = tiny
  return run(TINY, params, Towers(images, ids))


def test_each_tower_needs_its_own_parameters_alone(tiny, both):
  params, images, ids = tiny
  order = list(backbones.sites(TINY))
  assert [name for name in order if "block" not in name] == [
      "image/patch", "image/embed", "image/embed_norm", "image/pre_norm", "image/norm", "image/pooled",
      "image/projected", "text/embed", "text/norm", "text/pooled", "text/projected"]
  masks = {"text/block_00/bias", "text/block_01/bias"}
  assert set(order) == both[1].keys() - masks and masks < both[1].keys()
  for tower, inputs in (("image", images), ("text", Towers(None, ids))):
    own = {name: leaf for name, leaf in params.items() if name.startswith(tower)}
    out, seen = jax.eval_shape(program(TINY), own, inputs)
    assert [getattr(out, name) is None for name in ("image", "text")] == [tower == "text", tower == "image"]
    assert seen.keys() == {name for name in both[1] if name.startswith(tower)}


def test_the_image_tower_is_a_vit_of_the_same_numbers(tiny, both):
  params, images, _ = tiny
  features, alone = run(TINY.image, params["image"], images)
  assert {f"image/{name}" for name in alone} | {"image/projected"} == {n for n in both[1] if n.startswith("image/")}
  for name, value in alone.items():
    near(name, value, np.asarray(both[1][f"image/{name}"]), 1e-6)
  near("features", features @ params["image_projection"]["kernel"], np.asarray(both[0].image), 1e-6)


def test_it_goes_on_from_any_block_of_the_image_tower(tiny, both):
  params, _, ids = tiny
  again, _ = run(TINY, params, Towers(both[1]["image/block_01/out"], ids), start=2, remat_from=1)
  near("image", again.image, np.asarray(both[0].image), 1e-6)
  near("text", again.text, np.asarray(both[0].text), 1e-6)


def test_what_follows_the_end_of_a_text_changes_nothing(tiny):
  """The mask is causal, so padding may be anything, and be cut off."""
  params, _, ids = tiny
  whole, sites = run(TINY, params, Towers(None, ids))
  shorter, _ = run(TINY, params, Towers(None, ids[:2, :6]))
  near("cut", shorter.text, np.asarray(whole.text)[:2], 1e-6)
  padded = np.where(np.arange(TINY.context) > ids.argmax(-1)[:, None], 7, ids)
  near("padding", run(TINY, params, Towers(None, padded))[0].text, np.asarray(whole.text), 1e-6)
  early = ids.copy()
  early[:, 2] = 9
  moved, other = run(TINY, params, Towers(None, early))
  assert np.array_equal(other["text/block_01/out"][:, :2], sites["text/block_01/out"][:, :2])
  assert np.abs(moved.text - whole.text).max() > 1e-3


def test_prompts_enter_before_positions_and_keep_the_end(tiny):
  """A visitor's rows in place of placeholders give what the same embeddings give from the table."""
  params, _, ids = tiny
  other = ids.copy()
  other[:, 1:3] = (11, 13)
  prompts = params["text"]["tokens"][[11, 13]]
  def insert(carry, site, y, x):
    return carry, y.at[:, 1:3].set(prompts) if site == "text/embed" else y
  found, _ = jax.jit(lambda params, ids: backbones.build(TINY).apply(params, Towers(None, ids), insert))(params, ids)
  near("prompts", found.text, np.asarray(run(TINY, params, Towers(None, other))[0].text), 1e-6)


def test_shapes_are_the_published_ones(golden):
  """302 tensors and 149,620,737 parameters of ViT-B/16 under OpenAI's names; every variant's tables are one to one."""
  spec = backbones.architecture("clip_vit_b16")
  shapes = {name: leaf.shape for name, leaf in tree.flatten(backbones.abstract_params(spec)).items()}
  rules = names.expand(clip_names.table("openai", spec), 0)
  published = json.loads(golden("lfa_and_clip/vitb16_state_dict_shapes.json").read_text())
  assert names.foreign_shapes(rules, shapes, 0) == {name: tuple(shape) for name, (shape, _) in published.items()}
  counts = json.loads(golden("lfa_and_clip/vitb16_param_counts.json").read_text())
  size = lambda prefix: sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(prefix))
  assert (len(published), size(""), size("image")) == (
      counts["n_state_dict"], counts["clip_total"], counts["clip_visual"])


@pytest.mark.parametrize("name, heads, tokens", [
    ("clip_vit_b32", (12, 8), 50), ("clip_vit_b16", (12, 8), 197), ("clip_vit_l14", (16, 12), 257),
    ("clip_vit_l14_336", (16, 12), 577)])
def test_variants(name, heads, tokens):
  spec = backbones.architecture(name)
  assert (spec.heads, spec.text_heads) == heads == (spec.width // 64, spec.text_width // 64)
  assert (spec.image.tokens, spec.context, spec.vocabulary, spec.gelu) == (tokens, 77, 49408, "quick")
  assert {spec.norm_eps, spec.image.norm_eps, spec.text.norm_eps} == {1e-5}


@pytest.mark.parametrize("change, words", [
    ({"gelu": "relu"}, "gelu 'relu' is unknown"), ({"text_heads": 5}, "text_width 24 is not a multiple"),
    ({"heads": 5}, "not a multiple of heads"), ({"context": 2}, "context is 2"), ({"context": 9999}, "is 9999")])
def test_specs_that_make_no_clip(change, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    backbones.architecture("clip_tiny_test", **change)


def test_ssf_has_a_pair_behind_the_norm_of_the_embeddings_and_merges_without_a_bias_of_patches():
  case = Case("ssf", TINY, Expected(mergeable=True))
  assert {"patch", "embed_norm"} <= case.initial["ssf"].keys() and case.spec == TINY.image
  PROPERTIES["merged"](case)


def test_the_ladder_starts_from_what_enters_the_first_block():
  assert methods.build("lst", TINY, reduction=4).reads["embed"].site == "embed_norm"
  assert methods.build("lst", backbones.architecture("vit_tiny_test"), reduction=4).reads["embed"].site == "embed"

