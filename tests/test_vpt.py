"""VPT against the original, prompts' ways through ViT and Swin, and what keeps them with their image.

Goldens are compared as in `test_methods.py`: with the original's float64 run, to 1e-6 of a tensor's largest value.
"""
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import GOLDEN, close, head, read

from transferlab import backbones, methods, tree
from transferlab.backbones.spec import SwinSpec
from transferlab.backbones.weights import names
from transferlab.method import Context, chain, forward, predict, visitor
from transferlab.methods import classifier, vpt
from transferlab.optim import NO_DECAY
from transferlab.testing import Case, Expected

TINY = backbones.architecture("vit_tiny_test")
TINY_SWIN = backbones.architecture("swin_tiny_test")
SHORT_SWIN = dataclasses.replace(TINY_SWIN, stages=(2, 1))
GOLDEN_SWIN = SwinSpec("golden", 32, 2, 16, (2, 2, 2, 2), (1, 2, 4, 8), 4)
VITS = {"cls": dataclasses.replace(TINY, depth=2), "mean": dataclasses.replace(TINY, depth=2, pool="mean"),
        "mean_no_cls": dataclasses.replace(TINY, depth=2, class_token=False, pool="mean"),
        "mean_before_norm": dataclasses.replace(TINY, depth=2, pool="mean_before_norm")}


# --- The original -----------------------------------------------------------------------------------------------------

def original_run(method, spec, frozen, trainable, arrays):
  """(logits, loss, gradient) of a golden's batch."""
  batch = {"target": jax.nn.one_hot(arrays["labels"], 10), "weight": jnp.ones(3)}
  @jax.jit
  def run(trainable, frozen, images):
    def loss(trainable):
      context = Context(batch=batch, frozen=frozen, train=True, rng=jax.random.key(0))
      outputs = forward(method, backbones.build(spec), trainable, images, context)
      return method.loss(trainable, outputs, context), outputs.logits
    (loss, logits), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    return logits, loss, gradient
  return run(trainable, frozen, arrays["images"].transpose(0, 2, 3, 1))


def check_golden(method, spec, frozen, trainable_of, arrays):
  logits, loss, gradient = original_run(method, spec, frozen, trainable_of("param/"), arrays)
  chex.assert_shape(logits, (3, 10))
  close({"loss": loss, "logits": logits}, {"loss": arrays["loss_f64"], "logits": arrays["logits_f64"]})
  close(gradient, trainable_of("grad64/"))


def vit_params(arrays):
  """Our parameters of KMnP/vpt's ViT, whose q, k and v are apart."""
  place = "transformer.encoder.layer.{i}."
  pair = lambda ours, theirs, weight: [
      (f"block_{{i:02d}}/{ours}/{'scale' if weight is names.SAME else 'kernel'}", [f"{place}{theirs}.weight"], weight),
      (f"block_{{i:02d}}/{ours}/bias", [f"{place}{theirs}.bias"], names.SAME)]
  three = lambda leaf: [f"{place}attn.{part}.{leaf}" for part in ("query", "key", "value")]
  rows = [("patch_kernel", ["transformer.embeddings.patch_embeddings.weight"], names.CONVOLUTION),
          ("patch_bias", ["transformer.embeddings.patch_embeddings.bias"], names.SAME),
          ("cls", ["transformer.embeddings.cls_token"], names.SAME),
          ("pos", ["transformer.embeddings.position_embeddings"], names.SAME),
          *pair("ln1", "attention_norm", names.SAME), *pair("proj", "attn.out", names.TRANSPOSED),
          ("block_{i:02d}/qkv/kernel", three("weight"), names.THREE_TRANSPOSED),
          ("block_{i:02d}/qkv/bias", three("bias"), names.THREE), *pair("ln2", "ffn_norm", names.SAME),
          *pair("fc1", "ffn.fc1", names.TRANSPOSED), *pair("fc2", "ffn.fc2", names.TRANSPOSED),
          ("norm/scale", ["transformer.encoder.encoder_norm.weight"], names.SAME),
          ("norm/bias", ["transformer.encoder.encoder_norm.bias"], names.SAME)]
  rules = names.expand([names.Rule(ours, tuple(theirs), change) for ours, theirs, change in rows], 4)
  own = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
  return tree.unflatten(names.to_native(rules, own))


@pytest.mark.parametrize("name", ["vpt_shallow", "vpt_deep"])
def test_golden_on_vit(golden, name):
  arrays = read(golden(f"dtl_and_petl/{name}_vit.npz"))
  def trainable_of(prefix):
    found = [arrays[f"{prefix}transformer.prompt_embeddings"][0]]
    found += list(arrays.get(f"{prefix}transformer.deep_prompt_embeddings", []))
    return {"prompts": {f"block_{i:02d}": p for i, p in enumerate(found)}, "classifier": head(arrays, prefix)}
  method = methods.build(name, GOLDEN, prompts=5, dropout=0.0)
  check_golden(method, GOLDEN, vit_params(arrays), trainable_of, arrays)


def swin_params(arrays):
  """Our parameters of the original Swin's names, in which a merge ends the stage before."""
  found = {}
  norm = lambda ours, theirs: {f"{ours}/scale": arrays[f"{theirs}.weight"], f"{ours}/bias": arrays[f"{theirs}.bias"]}
  dense = lambda ours, theirs: {f"{ours}/kernel": arrays[f"{theirs}.weight"].T,
                                f"{ours}/bias": arrays[f"{theirs}.bias"]}
  for i in range(8):
    ours, theirs = f"block_{i:02d}", f"param/layers.{i // 2}.blocks.{i % 2}"
    found |= norm(f"{ours}/ln1", f"{theirs}.norm1") | norm(f"{ours}/ln2", f"{theirs}.norm2")
    found |= dense(f"{ours}/qkv", f"{theirs}.attn.qkv") | dense(f"{ours}/proj", f"{theirs}.attn.proj")
    found |= dense(f"{ours}/fc1", f"{theirs}.mlp.fc1") | dense(f"{ours}/fc2", f"{theirs}.mlp.fc2")
    found[f"{ours}/relative_bias"] = arrays[f"{theirs}.attn.relative_position_bias_table"]
  for stage in (1, 2, 3):
    found |= norm(f"merge_{stage}/norm", f"param/layers.{stage - 1}.downsample.norm")
    found[f"merge_{stage}/reduction/kernel"] = arrays[f"param/layers.{stage - 1}.downsample.reduction.weight"].T
  found |= norm("patch_norm", "param/patch_embed.norm") | norm("norm", "param/norm")
  return tree.unflatten({**found, "patch_bias": arrays["param/patch_embed.proj.bias"],
                         "patch_kernel": arrays["param/patch_embed.proj.weight"].transpose(2, 3, 1, 0)})


def swin_trainable(arrays, prefix):
  own = [*arrays[f"{prefix}prompt_embeddings"]]
  own += [p for stage in range(4) for p in arrays[f"{prefix}deep_prompt_embeddings_{stage}"]]
  return {"prompts": {f"block_{i:02d}": p for i, p in enumerate(own)}, "classifier": head(arrays, prefix)}


def test_golden_on_swin(golden):
  arrays = read(golden("dtl_and_petl/vpt_deep_swin.npz"))
  method = methods.build("vpt_deep", GOLDEN_SWIN, prompts=3, dropout=0.0)
  check_golden(method, GOLDEN_SWIN, swin_params(arrays), functools.partial(swin_trainable, arrays), arrays)


# --- The way of prompts -----------------------------------------------------------------------------------------------

@functools.cache
def tiny(name, spec, **options):
  """(method, parameters, trainable) with prompts as large as tokens, so that what they do is seen."""
  case = Case(name, spec, Expected({"prompts": 3, **options}))
  prompts = jax.tree.map(lambda x: 5 * x, case.trainable["prompts"])
  return case.method, case.params, {**case.trainable, "prompts": prompts}


def images(count):
  return np.random.default_rng(3).standard_normal((count, 16, 16, 3), np.float32)


def by_the_paper(spec, trainable, params, batch, stream):
  """Logits with rows in the residual stream, which a block with prompts of its own overwrites."""
  at = spec.prefix_tokens
  def visit(carry, site, y, x):
    block, _, place = site.partition("/")
    if place == "in" and block in trainable["prompts"]:
      if block != "block_00":
        y = jnp.concatenate([y[:, :at], y[:, at + 3:]], axis=1)
      own = jnp.broadcast_to(trainable["prompts"][block], (len(y), 3, y.shape[-1]))
      return carry, jnp.concatenate([y[:, :at], own, y[:, at:]], axis=1)
    return stream(carry, site, y, x)
  return classifier.apply(trainable["classifier"], backbones.build(spec).apply(params, batch, visit)[0])


@pytest.mark.parametrize("name, pool", [
    ("vpt_shallow", "mean"), ("vpt_shallow", "mean_no_cls"), ("vpt_shallow", "mean_before_norm"), ("vpt_deep", "cls"),
    ("vpt_deep", "mean_no_cls")])
def test_no_read_out_of_a_vit_contains_prompts(name, pool):
  spec = VITS[pool]
  method, params, trainable = tiny(name, spec)
  at = spec.prefix_tokens
  def drop(carry, site, y, x):  # before the read-out
    return carry, jnp.concatenate([y[:, :at], y[:, at + 3:]], axis=1) if site == "pre_norm" else y
  found, wanted = jax.jit(lambda trainable, params, batch: (
      predict(method, backbones.build(spec), trainable, {}, params, batch),
      by_the_paper(spec, trainable, params, batch, drop)))(trainable, params, images(2))
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_deep_prompts_on_swin_are_those_that_travel():
  """To join at the attention of windows and leave behind it is the same as rows in the residual stream."""
  method, params, trainable = tiny("vpt_deep", SHORT_SWIN)
  found, wanted = jax.jit(lambda trainable, params, batch: (
      predict(method, backbones.build(SHORT_SWIN), trainable, {}, params, batch),
      by_the_paper(SHORT_SWIN, trainable, params, batch, vpt._swin_stream(3))))(trainable, params, images(2))
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name, spec, rows", [
    ("vpt_deep", TINY, {17}), ("vpt_shallow", TINY, {17 + 3}), ("vpt_deep", TINY_SWIN, {64, 16, 16 + 3}),
    ("vpt_shallow", TINY_SWIN, {64 + 3, 16 + 3})], ids=lambda value: getattr(value, "name", None))
def test_the_mlp_has_rows_only_for_prompts_that_travel(name, spec, rows):
  method, seen = methods.build(name, spec, prompts=3), set()
  trainable, _ = jax.eval_shape(lambda rng: method.init(rng, None, 4), jax.random.key(0))
  def spy(carry, site, y, x):
    if site.endswith("/fc1"):
      seen.add(y.shape[1])
    return carry, y
  def run(trainable, params, batch):
    inner, carry = visitor(method, trainable, Context(frozen=params))
    return backbones.build(spec).apply(params, batch, chain(inner, spy), carry)[0]
  jax.eval_shape(run, trainable, backbones.abstract_params(spec), jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
  assert seen == rows


@functools.cache
def predicted(name, **options):
  """Compiled: three images -> logits of a method on a short Swin."""
  method, params, trainable = tiny(name, SHORT_SWIN, **options)
  run = jax.jit(lambda t, p, batch: predict(method, backbones.build(SHORT_SWIN), t, {}, p, batch))
  return lambda batch: np.asarray(run(trainable, params, batch))


@pytest.mark.parametrize("name", ["vpt_shallow", "vpt_deep"])
def test_logits_of_an_image_on_swin_do_not_depend_on_its_batch(name):
  a, b, c, d = images(4)
  run = predicted(name)
  found = run(np.stack([a, b, c]))
  np.testing.assert_allclose(run(np.stack([b, a, d]))[[1, 0]], found[:2], rtol=0, atol=1e-6)


def test_travelling_prompts_through_windows_and_merges():
  """What a shallow prompt meets on Swin, place by place; no golden has more than the last block of it."""
  visit, rng = vpt._swin_stream(3), np.random.default_rng(0)
  prompts, tokens, windows = (rng.standard_normal(shape, np.float32)
                              for shape in ((2, 3, 8), (2, 64, 8), (2, 4, 16, 8)))
  both = np.concatenate([prompts, tokens], axis=1)
  for site in ("block_00/ln1", "merge_1/in"):
    carry, y = visit((), site, both, None)
    np.testing.assert_array_equal(carry, prompts)
    np.testing.assert_array_equal(y, tokens)
  carry, y = visit(prompts, "block_00/windows", windows, None)
  np.testing.assert_array_equal(y, np.concatenate([np.stack([prompts] * 4, axis=1), windows], axis=2))
  _, bias = visit(carry, "block_00/bias", np.ones((4, 2, 16, 16), np.float32), None)
  assert bias.shape == (4, 2, 19, 19) and bias[..., 3:, 3:].all() and bias.sum() == 4 * 2 * 16 * 16
  carry, left = visit(carry, "block_00/proj", y + np.arange(4, dtype=np.float32)[:, None, None], None)
  np.testing.assert_allclose(carry, prompts + 1.5, rtol=0, atol=1e-6)  # the mean of windows
  chex.assert_equal_shape([left, windows])
  _, y = visit(prompts, "block_00/attn", tokens, None)
  np.testing.assert_array_equal(y, both)
  _, y = visit(prompts, "merge_1/cat", np.zeros((2, 16, 32), np.float32), None)
  np.testing.assert_array_equal(y[:, :3], np.concatenate([prompts] * 4, axis=-1))
  for site in ("block_00/in", "block_00/mid", "block_00/mlp", "merge_1/norm", "pre_norm", "norm"):
    assert visit((), site, both, None)[1] is both


def test_the_released_order_mixes_prompts_of_a_batch():
  """Against the index arithmetic of the released code, where windows are [B nW, …] and their prompts [nW B, …]."""
  visit, rng = vpt._swin_stream(3, mixed=True), np.random.default_rng(0)
  prompts, windows, answers = (rng.standard_normal(shape, np.float32)
                               for shape in ((2, 3, 8), (2, 4, 16, 8), (2, 4, 19, 8)))
  _, y = visit(prompts, "block_00/windows", windows, None)
  wanted = np.concatenate([np.broadcast_to(prompts, (4, 2, 3, 8)).reshape(8, 3, 8), windows.reshape(8, 16, 8)], axis=1)
  np.testing.assert_array_equal(y.reshape(8, 19, 8), wanted)
  carry, y = visit((), "block_00/proj", jnp.asarray(answers), None)
  np.testing.assert_allclose(carry, answers.reshape(8, 19, 8)[:, :3].reshape(4, 2, 3, 8).mean(0), rtol=0, atol=1e-6)
  np.testing.assert_array_equal(y, answers[:, :, 3:])

  a, b, c, d = images(4)
  run = predicted("vpt_shallow", compat="released")
  assert np.abs(run(np.stack([a, b, c])) - run(np.stack([a, b, d])))[:2].max() > 1e-3
  alike = np.stack([a, a, a])
  np.testing.assert_allclose(run(alike), predicted("vpt_shallow")(alike), rtol=0, atol=1e-6)


# --- Dropout, initialisation, options ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vpt_shallow", "vpt_deep"])
def test_dropout_acts_in_training_and_apart_for_each_image(name):
  spec = dataclasses.replace(TINY, depth=1)
  method, params, trainable = tiny(name, spec, dropout=0.5)
  batch = np.repeat(images(1), 2, axis=0)
  wet, dry, still = jax.jit(lambda keys: (
      [forward(method, backbones.build(spec), trainable, batch, Context(frozen=params, rng=key, train=True)).logits
       for key in keys],
      predict(tiny(name, spec)[0], backbones.build(spec), trainable, {}, params, batch),
      predict(method, backbones.build(spec), trainable, {}, params, batch)))(jax.random.split(jax.random.key(0)))
  np.testing.assert_allclose(still, dry, rtol=0, atol=1e-6)
  assert np.abs(wet[0] - dry).max() > 1e-3 and np.abs(wet[0] - wet[1]).max() > 1e-3
  assert np.abs(wet[0][0] - wet[0][1]).max() > 1e-3


def test_every_block_draws_its_own_dropout():
  ctx = Context(rng=jax.random.key(0), train=True)
  trainable = {"prompts": {f"block_{i:02d}": jnp.ones((5, 8)) for i in range(2)}}
  first, second, again = (vpt._draw(trainable, ctx, block, jnp.zeros((2, 1, 1)), 0.5)
                          for block in ("block_00", "block_01", "block_00"))
  chex.assert_shape(first, (2, 5, 8))
  assert set(np.unique(first)) == {0, 2} and np.any(first != second) and np.any(first[0] != first[1])
  np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("backbone, bound", [("vit_b16", 0.0625), ("swin_tiny_test", (6 / (3 * 2 * 2 + 8)) ** 0.5)])
def test_initialisation(backbone, bound):
  """One bound for all blocks, of the patch's area and the first width."""
  spec = backbones.architecture(backbone)
  prompts = methods.build("vpt_deep", spec).init(jax.random.key(0), None, 10)[0]["prompts"]
  assert list(prompts) == [f"block_{i:02d}" for i in range(spec.depth)]
  for i, own in enumerate(prompts.values()):
    chex.assert_shape(own, (50, spec.block(i).width))
    assert 0.99 * bound < np.abs(own).max() <= bound
  assert not np.array_equal(prompts["block_00"], prompts["block_01"])


def test_weight_decay_acts_on_prompts():
  trainable = methods.build("vpt_deep", TINY).init(jax.random.key(0), None, 10)[0]
  assert not any(re.fullmatch(NO_DECAY[0][0], name) for name in tree.flatten(trainable["prompts"], "prompts"))


@pytest.mark.parametrize("name, spec, options, message", [
    ("vpt_deep", TINY, {"prompts": 0}, "prompts is 0; expected 1 or more"),
    ("vpt_shallow", TINY, {"compat": "released"}, "'released' on a Swin; vit_tiny_test is a vit"),
    ("vpt_shallow", TINY_SWIN, {"compat": "original"}, "compat is 'original'; expected None, or 'released'"),
    ("vpt_deep", TINY_SWIN, {"compat": "released"}, "no option 'compat'"),
    ("vpt_deep", backbones.architecture("resnet50"), {}, "needs transformer blocks")])
def test_wrong_options_are_one_line_errors(name, spec, options, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)
