"""SSF against the original, and folded into weights against the paper's words on every kind of read-out."""
import dataclasses
import re

import jax
import numpy as np
import pytest
from test_methods import GOLDEN, head, native, read
from test_vpt import check_golden

from transferlab import backbones, methods, tree
from transferlab.method import predict
from transferlab.methods import classifier
from transferlab.optim import NO_DECAY
from transferlab.testing import Case

TINY = dataclasses.replace(backbones.architecture("vit_tiny_test"), depth=1)
SPECS = {"cls": TINY,
         "mean_no_cls": dataclasses.replace(TINY, class_token=False, pool="mean"),
         "mean_before_norm_no_bias": dataclasses.replace(TINY, pool="mean_before_norm", qkv_bias=False),
         "swin": dataclasses.replace(backbones.architecture("swin_tiny_test"), stages=(1, 1))}
IN_TORCH = {"ln1": "{}.ssf_{}_1", "qkv": "{}.attn.ssf_{}_1", "proj": "{}.attn.ssf_{}_2",
            "ln2": "{}.ssf_{}_2", "fc1": "{}.mlp.ssf_{}_1", "fc2": "{}.mlp.ssf_{}_2"}


def ssf_trainable(arrays, prefix):
  pair = lambda name: {"scale": arrays[prefix + name.format("scale")], "bias": arrays[prefix + name.format("shift")]}
  blocks = {f"block_{i:02d}": {place: pair(name.format(f"blocks.{i}", "{}")) for place, name in IN_TORCH.items()}
            for i in range(4)}
  return {"ssf": {"patch": pair("patch_embed.ssf_{}_1"), "norm": pair("ssf_{}_1"), **blocks},
          "classifier": head(arrays, prefix)}


def test_golden_on_vit(golden):
  arrays = read(golden("dtl_and_petl/ssf_vit.npz"))
  check_golden(methods.build("ssf", GOLDEN), GOLDEN, native(arrays, "param/"),
               lambda prefix: ssf_trainable(arrays, prefix), arrays)


@pytest.mark.parametrize("name", SPECS)
def test_the_method_and_its_merged_weights_do_what_the_paper_says(name):
  """A pair acts on what its layer puts out; the last norm's before or after tokens are averaged, as the norm itself."""
  spec = SPECS[name]
  case = Case("ssf", spec)
  trainable, pairs = case.trainable, case.trainable["ssf"]
  images = np.random.default_rng(3).standard_normal((2, 16, 16, 3), np.float32)
  layers = set()
  def by_the_paper(carry, site, y, x):
    node = pairs
    for part in ("patch_norm" if site == "embed" else site).split("/"):
      node = node.get(part, {})
    if node:
      layers.add(site)
    return carry, y * node.get("scale", 1) + node.get("bias", 0) if node else y
  def run(trainable, params):
    apply = backbones.build(spec).apply
    return [predict(case.method, backbones.build(spec), trainable, {}, params, images),
            *[classifier.apply(trainable["classifier"], features) for features in (
                apply(case.method.merge(trainable, params), images)[0], apply(params, images, by_the_paper)[0])]]
  found, merged, wanted = jax.jit(run)(trainable, case.params)
  assert len(layers) == 6 * spec.depth + 2 + (name == "swin")
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
  np.testing.assert_allclose(merged, wanted, rtol=0, atol=5e-6)


def test_merged_parameters_keep_the_type_of_the_frozen_ones():
  case = Case("ssf", TINY)
  half = jax.tree.map(lambda x: x.astype("bfloat16"), case.params)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(case.method.merge(case.trainable, half))} == {"bfloat16"}


def test_initialisation_is_noise_around_the_identity():
  spec = backbones.architecture("vit_b16", depth=2)
  pairs = tree.flatten(methods.build("ssf", spec).init(jax.random.key(0), None, 10)[0]["ssf"])
  assert len(pairs) == 2 * (2 * 6 + 2)
  for leaf, mean in (("scale", 1), ("bias", 0)):
    values = np.concatenate([value for name, value in pairs.items() if name.endswith(leaf)])
    np.testing.assert_allclose([values.mean(), values.std()], [mean, 0.02], rtol=0, atol=1e-3)
  assert not np.array_equal(pairs["block_00/fc1/bias"], pairs["block_01/fc1/bias"])


def test_weight_decay_spares_all_but_the_classifiers_kernel():
  trainable = methods.build("ssf", TINY).init(jax.random.key(0), None, 10)[0]
  decayed = [name for name in tree.flatten(trainable) if not re.fullmatch(NO_DECAY[0][0], name)]
  assert decayed == ["classifier/kernel"]


@pytest.mark.parametrize("spec, options, message", [
    (TINY, {"rank": 4}, "no option 'rank'; it has none"),
    (backbones.architecture("resnet50"), {}, "needs transformer blocks; resnet50 has none")])
def test_wrong_options_are_one_line_errors(spec, options, message):
  with pytest.raises(ValueError) as error:
    methods.build("ssf", spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)
