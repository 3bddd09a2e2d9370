"""The conformance table: a row per registered method, each property a test of its own.

A property that breaks names the method, the backbone and the property, e.g. test_property[dtl-devices].
"""
import dataclasses
import functools

import chex
import jax
import pytest

from transferlab import backbones, methods, tree
from transferlab.testing import PROPERTIES, Broken, Case, Expected, Skip, check_method

TINY = backbones.architecture("vit_tiny_test")
TINY_SWIN = backbones.architecture("swin_tiny_test")
TINY_CLIP = backbones.architecture("clip_tiny_test")


def pooled_patches(carry, site, y, x):
  """The mean of the patch tokens goes into the final norm: how DTL pools."""
  del x
  return carry, y[:, TINY.prefix_tokens:].mean(axis=1, keepdims=True) if site == "pre_norm" else y


def plain_pooled(carry, site, y, x):
  """The same where there is no class token."""
  del x
  return carry, y.mean(axis=1, keepdims=True) if site == "pre_norm" else y


def biases(spec) -> int:
  """Of one block: ln1 D, qkv 3D, proj D, ln2 D, fc1 the MLP's width, fc2 D."""
  return 7 * spec.width + spec.mlp_width


def everything(spec) -> int:
  D, N, p = spec.width, spec.tokens, spec.patch_size
  block = 4 * D * D + 2 * D * spec.mlp_width + biases(spec) + 2 * D
  return spec.depth * block + 3 * p * p * D + D + N * D + 2 * D + (D if spec.class_token else 0)


def adapters(spec, queries: int) -> int:
  """Of InCA: projections and norm 4 D^2 + 5 D and the queries, at every block and the norm if that keeps its tokens."""
  sites = spec.depth + (spec.pool != "mean_before_norm")
  return sites * (4 * spec.width ** 2 + (5 + queries) * spec.width)


def ladder(spec, reduction: int, rungs: int = 3) -> int:
  """Of LST: a side block and a gate per rung, a downsample more, norm and upsample."""
  D, d, m = spec.width, spec.width // reduction, spec.mlp_width // reduction
  block = 4 * d * d + 2 * d * m + (9 if spec.qkv_bias else 6) * d + m + 1
  return rungs * block + (rungs + 1) * (D * d + d) + 2 * d + d * D + D


def modules(spec, size: int) -> int:
  """Of NOAH: prompts, LoRA and an adapter of one size in every block."""
  return spec.depth * (size * (7 * spec.width + 1) + spec.width)


def pairs(spec) -> int:
  """Of SSF: twice the biases of all blocks, 2 D behind the patches, behind their norm, if any, and the last norm."""
  shapes = [spec.block(i) for i in range(spec.depth)]
  blocks = sum((14 if spec.qkv_bias else 11) * shape.width + 2 * shape.mlp_width for shape in shapes)
  normed = spec.family == "swin" or spec.embed_norm
  return blocks + (4 if normed else 2) * shapes[0].width + 2 * spec.width


def bottlenecks(spec, bias: bool = True) -> int:
  """Of Adapter and AdaptFormer: down to 8 and up again in every block."""
  widths = [spec.block(i).width for i in range(spec.depth)]
  return sum(2 * 8 * D + bias * (8 + D) for D in widths)


def factors(spec, rank: int) -> int:
  """Of FacT: U and V of every stage."""
  return sum(2 * rank * D for D in {spec.block(i).width for i in range(spec.depth)})


def squares(spec) -> int:
  """Of FacT: D x D pieces of all dense layers."""
  return spec.depth * (4 + 2 * spec.block(0).mlp_width // spec.block(0).width)


# Sizes are the papers' formulas. Costs are a few per cent above what the tiny backbone takes: 1.00, 3.35, 2.47, 2.89,
# 1.49, 1.13, 1.58, 1.15, 1.05 times its forward pass.
TABLE = {
    "linear": Expected(identity=True, size=lambda spec: 0, mergeable=True, cost=1.05),
    "mlp3": Expected(size=lambda spec: 2 * spec.width * (spec.width + 1), mergeable=False, cost=1.05),
    "full": Expected(identity=True, size=everything, mergeable=True, cost=3.5),
    "bitfit": Expected(identity=True, size=lambda spec: spec.depth * biases(spec) + 2 * spec.width, mergeable=True,
                       cost=2.6),
    "lora": Expected(identity=True, still={"dropout": 0.0}, size=lambda spec: spec.depth * 4 * spec.width * 8,
                     mergeable=True, cost=3.0),
    "adapter": Expected(identity=True, still={"dropout": 0.0}, size=bottlenecks, mergeable=False, cost=2.3),
    "adaptformer": Expected(options={"dropout": 0.0}, identity=True, size=bottlenecks, mergeable=False, cost=2.3),
    "fact_tt": Expected(options={"rank": 4}, identity=True, still={"dropout": 0.0}, mergeable=True, cost=3.9,
                        size=lambda spec: factors(spec, 4) + 16 * squares(spec)),
    "fact_tk": Expected(options={"rank": 4, "dropout": 0.0}, identity=True, mergeable=True, cost=3.9,
                        size=lambda spec: factors(spec, 4) + 64 + 4 * squares(spec)),
    "dtl": Expected(identity=pooled_patches, size=lambda spec: spec.depth * 4 * spec.width, mergeable=False, cost=1.6),
    "dtl_plus": Expected(options={"kernel": 3}, identity=pooled_patches, mergeable=False, cost=1.7,
                         size=lambda spec: (spec.depth * 4 + 9) * spec.width),
    "dtl_plus_star": Expected(options={"kernel": 3}, identity=pooled_patches, mergeable=False, cost=2.3,
                              size=lambda spec: (spec.depth * 4 + 9) * spec.width),
    "inca": Expected(size=lambda spec: adapters(spec, 1), mergeable=False, cost=1.2),
    "open_inca": Expected(size=lambda spec: adapters(spec, 5), mergeable=False, cost=1.65),
    "all_features": Expected(options={"target_size": 64}, size=lambda spec: 0, mergeable=False, cost=1.2),
    "head2toe": Expected(options={"target_size": 64, "fraction": 0.1}, size=lambda spec: 0, mergeable=False, cost=1.1),
    "head2toe_ft": Expected(options={"target_size": 64, "fraction": 0.1}, size=everything, mergeable=False, cost=3.6),
    "head2toe_layers": Expected(options={"target_size": 64, "fraction": 0.1}, size=lambda spec: 0, mergeable=False,
                                cost=1.1),
    "head2toe_given": Expected(options={"target_size": 64, "kept": tuple(range(3, 300, 7)), "source": "other"},
                               size=lambda spec: 0, mergeable=False, cost=1.1),
    "scratch": Expected(size=everything, mergeable=True, cost=3.5),
    "ssf": Expected(size=pairs, mergeable=True, cost=2.55),
    "vpt_shallow": Expected(options={"prompts": 3}, still={"dropout": 0.0}, size=lambda spec: 3 * spec.width,
                            mergeable=False, cost=2.8),
    "vpt_deep": Expected(options={"prompts": 3}, still={"dropout": 0.0}, mergeable=False, cost=2.7,
                         size=lambda spec: 3 * spec.width * spec.depth),
    "noah": Expected(still={"dropout": 0.0}, size=lambda spec: modules(spec, 5), mergeable=False, cost=4.5),
    "noah_search": Expected(options={"choices": (2,), "depths": (1,), "dropout": 0.0}, mergeable=False, cost=4.5,
                            size=lambda spec: modules(spec, 2) // spec.depth),  # what is found: the first block alone
    "lst": Expected(options={"reduction": 4}, size=lambda spec: ladder(spec, 4), mergeable=False, cost=1.6),
}

def low_rank(spec, rank: int) -> int:
  """Of QLoRA: pairs for q, k, v and out in every block of both towers."""
  return sum(tower.depth * 8 * tower.width * rank for tower in (spec.image, spec.text))


def prompts_of(spec, tokens: int, depth: int) -> int:
  """Of MaPLe: tokens of the text tower for `depth` blocks, each with a linear map to the image tower's."""
  return depth * (tokens * spec.text_width + (spec.text_width + 1) * spec.width)


def generator(spec, tokens: int, width: int) -> int:
  """Of DPL: three dense layers from an image's projection to the tokens of its domain."""
  return (spec.embed_width + 1) * width + (width + 1) * width + (width + 1) * tokens * spec.text_width


def regularised(spec) -> int:
  """Of MIRO: the image tower, its projection, and variances of the patches and of the blocks that end a quarter."""
  tower = backbones.abstract_params(spec)["image"]
  return (sum(leaf.size for leaf in tree.flatten(tower).values()) + spec.width * spec.embed_width
          + (1 + len({-(-spec.depth * quarter // 4) for quarter in (1, 2, 3, 4)})) * spec.width)


# Methods that read class names, or want a CLIP's projections, on a small CLIP. Costs are of the image tower's pass.
CLIP = {
    "zero_shot": Expected(options={"templates": ("a photo of a {}", "art of {}")}, identity=True, mergeable=False,
                          size=lambda spec: 0, cost=1.1),
    "clip_linear": Expected(identity=True, mergeable=False, cost=1.1,
                            size=lambda spec: (spec.width + spec.text_width) * spec.embed_width),
    "clip_adapter": Expected(mergeable=False, cost=1.1,
                             size=lambda spec: 2 * spec.embed_width * (spec.embed_width // 4)),
    "lfa": Expected(still={"dropout": 0.0}, mergeable=False, cost=1.4,
                    size=lambda spec: (3 * spec.width + 5 * spec.text_width) * spec.embed_width),
    "coop": Expected(options={"tokens": 4}, mergeable=False, size=lambda spec: 4 * spec.text_width),
    "maple": Expected(options={"depth": 2}, mergeable=False, size=lambda spec: prompts_of(spec, 2, 2)),
    "dpl": Expected(options={"tokens": 4, "width": 8}, mergeable=False, size=lambda spec: generator(spec, 4, 8),
                    still={"dropout": 0.0}),
    "qlora": Expected(options={"rank": 2}, still={"dropout": 0.0, "compute": "float32"}, mergeable=False,
                      size=lambda spec: low_rank(spec, 2)),
    "miro": Expected(options={"weight": 0.1}, identity=False, mergeable=False, size=regularised),
}

# Other forms of the same methods, under their own names.
VARIANTS = {
    "linear/site": ("linear", Expected(options={"site": "block_01/out", "tokens": "mean"}, size=lambda spec: 0,
                                       mergeable=False, cost=1.05)),
    "mlp3/site": ("mlp3", Expected(options={"site": "block_01/out", "tokens": "mean"}, mergeable=False, cost=1.05,
                                   size=lambda spec: 2 * spec.width * (spec.width + 1))),
    "lora/fused": ("lora", Expected(options={"form": "fused", "rank": 4, "scale": 0.5, "dropout": 0.0}, identity=True,
                                    size=lambda spec: spec.depth * 16 * spec.width, mergeable=True)),
    "lora/weights": ("lora", Expected(options={"space": "weights", "dropout": 0.0}, identity=True,
                                      size=lambda spec: spec.depth * 32 * spec.width, mergeable=True)),
    "lora/noah": ("lora", Expected(options={"form": "fused", "compat": "noah", "dropout": 0.0}, identity=False,
                                   size=lambda spec: spec.depth * 32 * spec.width, mergeable=True)),
    "inca/options": ("inca", Expected(
        options={"sites": r"block_\d+/attn", "queries": 2, "heads": 4, "norm_tokens": True,
                 "combine": "mean_probabilities"},
        size=lambda spec: spec.depth * (4 * spec.width ** 2 + 9 * spec.width), mergeable=False)),
    "all_features/options": ("all_features", Expected(
        options={"sites": ("patch", "block_01/out", "pooled"), "penalty": "l1", "normalisation": "none",
                 "target_size": 32}, size=lambda spec: 0, mergeable=False)),
    "head2toe/fractions": ("head2toe", Expected(options={"target_size": 64, "fraction": (0.01, 0.1, 0.03)},
                                                size=lambda spec: 0, mergeable=False)),
    "head2toe_ft/baseline": ("head2toe_ft", Expected(options={"sites": "pooled", "fraction": 1.0}, size=everything,
                                                     mergeable=False)),
    "lst/options": ("lst", Expected(options={"reduction": 2, "init": "random", "readout": "mean", "layers": (0, 2)},
                                    size=lambda spec: ladder(spec, 2, 2), mergeable=False)),
    "adaptformer/plain": ("adaptformer", Expected(options={"bias": False, "dropout": 0.0}, identity=True,
                                                  size=lambda spec: bottlenecks(spec, False), mergeable=False)),
    "fact_tk/released": ("fact_tk", Expected(
        options={"rank": 3, "scale": 0.5, "dropout": 0.0, "compat": "released"}, identity=True, mergeable=True,
        size=lambda spec: factors(spec, 3) + 27 + 3 * squares(spec))),
    "dtl_plus/options": ("dtl_plus", Expected(
        options={"kernel": 4, "activation": "identity", "rank": 1, "first_read": 1, "first_write": 2},
        identity=pooled_patches, size=lambda spec: (2 * 2 + 16) * spec.width, mergeable=False)),
    "dtl/cls": ("dtl", Expected(options={"readout": "cls", "first_write": 1, "rank": 3}, identity=True,
                                size=lambda spec: spec.depth * 6 * spec.width, mergeable=False)),
}

def swin_biases(spec) -> int:
  """As `biases`, with the tables of relative positions, the norms of patches and merges, and the final norm's."""
  shapes = [spec.block(i) for i in range(spec.depth)]
  tables = sum((2 * spec.window_of(i)[0] - 1) ** 2 * shape.heads for i, shape in enumerate(shapes))
  blocks = sum(7 * shape.width + shape.mlp_width for shape in shapes)
  merges = sum(4 * spec.width_of(stage - 1) for stage in range(1, len(spec.stages)))
  return blocks + tables + merges + 2 * spec.embed_width + spec.width


def all_parameters(spec) -> int:
  return sum(leaf.size for leaf in tree.flatten(backbones.abstract_params(spec)).values())


def swin_adapters(spec, queries: int) -> int:
  """As `adapters`, at every block's width, and at the norm's."""
  widths = [*(spec.block(i).width for i in range(spec.depth)), spec.width]
  return sum(4 * D ** 2 + (5 + queries) * D for D in widths)


# Methods on the small Swin, by name or by name of a variant.
SWIN = {
    "linear": Expected(identity=True, size=lambda spec: 0, mergeable=True),
    "bitfit": Expected(identity=True, size=swin_biases, mergeable=True),
    "head2toe": TABLE["head2toe"]._replace(cost=None),
    "dtl": Expected(options={"first_write": 3}, identity=True, size=lambda spec: 2 * 8 * spec.width, mergeable=False),
    "dtl_plus": Expected(options={"first_write": 3, "kernel": 3}, identity=True, mergeable=False,
                         size=lambda spec: (2 * 8 + 9) * spec.width),
    "dtl_plus_star": Expected(options={"kernel": 3}, identity=True, mergeable=False,
                              size=lambda spec: (2 * 8 + 9) * (spec.width_of(0) + spec.width_of(1))),
    "lora": Expected(options={"dropout": 0.0}, identity=True, mergeable=True,
                     size=lambda spec: sum(32 * spec.block(i).width for i in range(spec.depth))),
    "adapter": TABLE["adapter"]._replace(options={"dropout": 0.0}, still={}, cost=None),
    "adaptformer": TABLE["adaptformer"]._replace(cost=None),
    "fact_tt": TABLE["fact_tt"]._replace(options={"rank": 4, "dropout": 0.0}, still={}, cost=None),
    "fact_tk": TABLE["fact_tk"]._replace(cost=None),
    "ssf": Expected(size=pairs, mergeable=True),
    "vpt_shallow": Expected(options={"prompts": 3}, still={"dropout": 0.0}, size=lambda spec: 3 * spec.embed_width,
                            mergeable=False),
    "vpt_deep": Expected(options={"prompts": 3}, still={"dropout": 0.0}, mergeable=False,
                         size=lambda spec: sum(3 * spec.block(i).width for i in range(spec.depth))),
}

# Small ViTs that differ in what methods have to know: class token, pooling, GELU, bias of q, k, v.
BACKBONES = {
    "mean": dataclasses.replace(TINY, name="mean", pool="mean"),
    "mean_no_cls": dataclasses.replace(TINY, name="mean_no_cls", class_token=False, pool="mean", gelu="tanh"),
    "mean_before_norm": dataclasses.replace(TINY, name="mean_before_norm", pool="mean_before_norm", qkv_bias=False),
    "mean_before_norm_no_cls": dataclasses.replace(TINY, name="mean_before_norm_no_cls", class_token=False,
                                                   pool="mean_before_norm"),
}


# Their training step is a small head's on features that others read, too, or that of lora and full on one tower more.
ALIKE = ("zero_shot", "clip_linear", "clip_adapter", "qlora", "miro")
CLIP_VARIANTS = {
    "clip_linear/fewshot": Expected(options={"form": "fewshot", "dropout": 0.0}, identity=True, mergeable=False,
                                    size=lambda spec: spec.width * spec.embed_width),
    "lfa/on_maple": CLIP["lfa"]._replace(options={"base": "maple", "base_options": (("depth", 2),)}, cost=None),
}
ON_IMAGE_TOWER = {
    name: expected._replace(cost=None, size=all_parameters if expected.size is everything else expected.size)
    for name, expected in TABLE.items()}


@functools.lru_cache(maxsize=4)
def case(method: str, backbone: str) -> Case:
  """Shared by the properties, so that each program is compiled once; a few at a time, since programs take memory."""
  if backbone == "swin_tiny_test":
    return Case(method.partition("/")[0], TINY_SWIN, (SWIN | SWIN_OTHERS)[method])
  if backbone == "clip_tiny_test":
    return Case(method.partition("/")[0], TINY_CLIP, (CLIP | CLIP_VARIANTS | ON_IMAGE_TOWER)[method])
  name, expected = VARIANTS.get(method) or (method, TABLE[method])
  spec = BACKBONES.get(backbone, TINY)
  if not spec.class_token and expected.identity is pooled_patches:
    expected = expected._replace(identity=plain_pooled)
  if not spec.qkv_bias and expected.size and name in ("bitfit", "full", "head2toe_ft", "scratch"):
    size = expected.size
    expected = expected._replace(size=lambda spec: size(spec) - 3 * spec.width * spec.depth)
  return Case(name, spec, expected)


def check(method, backbone, name):
  try:
    PROPERTIES[name](case(method, backbone))
  except Skip as reason:
    pytest.skip(str(reason))


def test_every_method_has_a_row():
  assert {*TABLE, *CLIP} == set(methods.METHODS), "a registered method needs a row in TABLE, and a row a method"


CHEAP = ("logits", "identity", "size", "writes_from", "isolation", "save_load", "merged")
# Their training step is another row's with other numbers in it, so that what takes training is left to --full.
TWINS = ("dtl_plus_star", "fact_tk", "noah_search", "adaptformer", "vpt_shallow", "open_inca", "head2toe_layers",
         "head2toe_given")


def rows():
  for method in TABLE:
    for name in PROPERTIES:
      again = method in TWINS and name not in (*CHEAP, "gradient", "cached")
      yield pytest.param(method, name, marks=[pytest.mark.full] if again else [], id=f"{method}-{name}")


@pytest.mark.parametrize("method, name", rows())
def test_property(method, name):
  check(method, "vit_tiny_test", name)


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("method", VARIANTS)
def test_property_of_variants(method, name):
  check(method, "vit_tiny_test", name)


@pytest.mark.parametrize("name", [*CHEAP, "gradient"])
@pytest.mark.parametrize("method", SWIN)
def test_property_on_swin(method, name):
  check(method, "swin_tiny_test", name)


@pytest.mark.parametrize("method, name", [
    pytest.param(method, name, id=f"{method}-{name}", marks=[pytest.mark.full] if late else [])
    for method in CLIP for name in PROPERTIES
    for late in [method in ALIKE and name not in (*CHEAP, "gradient", "cached")]])
def test_property_on_clip(method, name):
  check(method, "clip_tiny_test", name)


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("method", CLIP_VARIANTS)
def test_property_on_clip_of_variants(method, name):
  check(method, "clip_tiny_test", name)


# Methods that need no text adapt a CLIP's image tower, a ViT with a norm before its blocks and no bias of patches.
@pytest.mark.parametrize("method, name", [
    pytest.param(method, name, id=f"{method}-{name}", marks=[] if quick else [pytest.mark.full])
    for method in ON_IMAGE_TOWER for name in PROPERTIES
    for quick in [method in ("linear", "lora", "ssf", "lst", "inca", "dtl") and name in CHEAP]])
def test_property_on_clips_image_tower(method, name):
  check(method, "clip_tiny_test", name)


# Methods that know nothing of blocks: on a Swin only with --full. head2toe_ft is left out: its gradients by devices or
# parts of a batch are 1.6e-6 off there, by rounding (46 times less with a backbone in float64).
SWIN_OTHERS = {
    "full": Expected(identity=True, size=all_parameters, mergeable=True),
    "scratch": Expected(size=all_parameters, mergeable=True),
    "mlp3": TABLE["mlp3"]._replace(cost=None),
    "inca": Expected(size=lambda spec: swin_adapters(spec, 1), mergeable=False),
    "open_inca": Expected(size=lambda spec: swin_adapters(spec, 5), mergeable=False),
    **{name: TABLE[name]._replace(cost=None) for name in ("all_features", "head2toe_layers", "head2toe_given")},
}


@pytest.mark.full
@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("method", SWIN_OTHERS)
def test_property_on_swin_of_others(method, name):
  check(method, "swin_tiny_test", name)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PROPERTIES if name not in (*CHEAP, "gradient")])
@pytest.mark.parametrize("method", SWIN)
def test_property_on_swin_trained(method, name):
  check(method, "swin_tiny_test", name)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PROPERTIES if name not in CHEAP])
@pytest.mark.parametrize("method", VARIANTS)
def test_property_of_variants_trained(method, name):
  check(method, "vit_tiny_test", name)


@pytest.mark.full
@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("method", [*TABLE, *VARIANTS])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_property_everywhere(backbone, method, name):
  check(method, backbone, name)


def test_programs_as_users_compile_them_give_the_same():
  """The suite has its programs made in a simple way (conftest.py); with XLA's defaults a step gives the same."""
  lora = case("lora", "vit_tiny_test")
  step, frozen, batch, mesh = lora.compiled()
  users = jax.jit(lora.step(lora.method)).lower(lora.run(mesh), frozen, batch).compile(compiler_options={
      "xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True,
      "xla_cpu_parallel_codegen_split_count": 32})
  chex.assert_trees_all_close(users(lora.run(mesh), frozen, batch), step(lora.run(mesh), frozen, batch), atol=1e-6)


# --- The table itself: it passes what is right and names what is not ------------------------------------------------

def broken_linear(spec, *, site="pooled"):
  """A linear probe by a third party, with mistakes: it hands gradients back and has a leaf that nothing uses."""
  inner = methods.build("linear", spec, site=site)
  def init(rng, frozen, num_classes):
    trainable, state = inner.init(rng, frozen, num_classes)
    return {**trainable, "unused": trainable["classifier"]["bias"]}, state
  return inner._replace(
      name="broken", init=init, carry={},
      visit=lambda trainable, ctx: lambda carry, name, y, x: ({"features": y} if name == site else carry, y))


def test_check_method_passes_a_method_of_ones_own():
  def mine(spec, *, bias=0.0):
    probe = methods.build("linear", spec)
    return probe._replace(name="mine", options={"bias": bias},
                          readout=lambda *arguments: probe.readout(*arguments) + bias, merge=None)
  found = check_method(mine, expected=Expected(options={"bias": 0.5}, mergeable=False), properties=CHEAP)
  assert found == {
      "logits": "passed", "identity": "skipped: does not promise to start from the frozen model",
      "size": "skipped: no formula given", "writes_from": "passed", "isolation": "passed", "save_load": "passed",
      "merged": "skipped: offers no merge"}
  assert "mine" not in methods.METHODS


def test_check_method_names_every_broken_property():
  with pytest.raises(Broken) as error:
    check_method(broken_linear, expected=Expected(mergeable=False, size=lambda spec: 0, identity=True),
                 properties=["logits", "identity", "size", "gradient", "isolation", "merged"])
  lines = str(error.value).splitlines()
  assert [line.split(": ")[0] for line in lines] == [
      f"broken on vit_tiny_test, {name}" for name in ("size", "gradient", "isolation", "merged")]
  assert "gradient of unused: found zero everywhere" in lines[1] and "stop_gradient" in lines[2]
  assert all("found" in line and "expected" in line for line in lines)


def test_check_method_refuses_unknown_names():
  with pytest.raises(ValueError, match="nearest: .*devices"):
    check_method("linear", properties=["device"])
  with pytest.raises(ValueError, match="nearest: lora"):
    check_method("lorra")
