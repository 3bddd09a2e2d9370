"""CoOp and MaPLe against the original, and what they promise beside the conformance table.

Goldens are float32 runs of the original torch code: logits to 1e-4 (1 + |x|), gradients and parameters after three
steps to 1e-3 of the largest value. They hold the placeholders' ids, so that no tokenizer is needed.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clip_goldens import golden_clip, golden_values
from engine import colours, metrics, recipe

from transferlab import backbones, methods, serve, tree
from transferlab.checkpoint import load_adapter
from transferlab.method import Context, classes, forward, needed, sizes
from transferlab.methods.coop import POSITIONS, visitor as coop_visitor
from transferlab.methods.maple import visitor as maple_visitor
from transferlab.optim import Optim, make_optimiser
from transferlab.testing import made_up_ids
from transferlab.train import fit

TINY, B16 = (backbones.architecture(name) for name in ("clip_tiny_test", "clip_vit_b16"))
SMALL = {"coop": {"tokens": 4}, "maple": {"depth": 2}}  # what fits TINY


# --- The original -----------------------------------------------------------------------------------------------------

def three_steps(method, backbone, trainable, inputs, context):
  """Loss, logits and gradient of the first of three steps of SGD, the losses of all, and where they end."""
  optimiser = make_optimiser(Optim("sgd", momentum=0.1, weight_decay=5e-4, decay=()), lambda step: 0.01, trainable)
  @jax.jit
  def step(trainable, opt_state, context_arrays, inputs):
    ctx = Context(*context_arrays, train=True, rng=jax.random.key(0))
    def loss(trainable):
      outputs = forward(method, backbone, trainable, inputs, ctx)
      return method.loss(trainable, outputs, ctx), outputs
    (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    updates, opt_state = optimiser.update(gradient, opt_state, trainable)
    seen = {"loss": value, "logits": outputs.logits, "text": outputs.features.text, "image": outputs.features.image}
    return optax.apply_updates(trainable, updates), opt_state, seen, gradient
  opt_state, found = optimiser.init(trainable), []
  for _ in range(3):
    trainable, opt_state, *seen = step(trainable, opt_state, context[:3], inputs)
    found.append(seen)
  (first, gradient), losses = found[0], [float(seen["loss"]) for seen, _ in found]
  return first, gradient, losses, trainable


def check_golden(found, arrays, gradient_of, after):
  first, gradient, losses, trainable = found
  for name, theirs in (("logits", "logits"), ("text", "text_features"), ("loss", "loss")):
    np.testing.assert_allclose(first[name], arrays[theirs], rtol=1e-4, atol=1e-4, err_msg=name)
  np.testing.assert_allclose(losses, arrays["sgd_losses"], rtol=1e-4)
  for mine, theirs in ((gradient, gradient_of), (trainable, after)):
    mine, theirs = tree.flatten(mine), tree.flatten(theirs)
    assert mine.keys() == theirs.keys()
    for name, leaf in theirs.items():
      np.testing.assert_allclose(mine[name], leaf, rtol=0, atol=1e-3 * np.abs(leaf).max(), err_msg=name)
  assert all(np.abs(leaf).max() > 1e-3 for leaf in tree.flatten(gradient_of).values())


def golden_context(method, params, state, arrays):
  batch = {"target": jax.nn.one_hot(arrays["labels"], 5), "weight": jnp.ones(6)}
  return Context(batch, state, jax.tree.map(jnp.asarray, method.prepare(params, state)))


def golden_classes(arrays, words=()):
  """Ids of a golden's texts, of its bare names, and of words."""
  ids, lengths = arrays["tokenized_prompts"], arrays.get("name_lens", ())
  names = np.stack([made_up_ids(TINY, ["x " * int(n)])[0] for n in lengths]) if len(lengths) else None
  return {"prompts": ids, "names": names, "words": np.int32([[49406, *words, 49407]])}


@pytest.mark.parametrize("form, options", [
    ("end", {"tokens": 4}), ("middle", {"tokens": 4, "position": "middle"}),
    ("front", {"tokens": 4, "position": "front"}), ("csc", {"tokens": 4, "class_specific": True}),
    ("ctxinit", {"words": "a photo of a"})])
def test_golden_coop(golden, form, options):
  """From cached projections of the images, so that the program holds the text tower alone."""
  spec, params = golden_clip(golden, "T")
  arrays = golden_values(golden, f"T_coop_{form}")
  images = golden_values(golden, "T_zeroshot")
  np.testing.assert_array_equal(arrays["images"], images["images"])
  method = methods.build("coop", spec, **options)
  known = golden_classes(arrays, (320, 1125, 539, 320))
  initial, state = method.init(jax.random.key(0), params, known)
  if form == "ctxinit":
    np.testing.assert_array_equal(initial["context"], arrays["ctx"])
  else:
    assert initial["context"].shape == arrays["ctx"].shape
  context = golden_context(method, params, state, arrays)
  assert method.texts(context).shape == (5, 10)  # of 77 tokens; the longest text ends at the tenth
  context = context._replace(frozen=needed(method, context.frozen, spec.depth, cached=True))
  assert "image" not in context.frozen
  with jax.default_matmul_precision("highest"):
    found = three_steps(method, backbones.build(spec), {"context": jnp.asarray(arrays["ctx"])},
                        {"image": jnp.asarray(images["image_features"])}, context)
  check_golden(found, arrays, {"context": arrays["grad_ctx"]}, {"context": arrays["sgd3_ctx"]})


def maple_of(arrays, prefix):
  """Our trainable of the original's names: torch's Linear has (out, in)."""
  def linear(name):
    return {"kernel": arrays[f"{prefix}/{name}.weight"].T, "bias": arrays[f"{prefix}/{name}.bias"]}
  deep = {f"block_{i + 1:02d}": {"context": arrays[f"{prefix}/compound_prompts_text.{i}"],
                                 "projection": linear(f"compound_prompt_projections.{i}")} for i in range(2)}
  return {"context": arrays[f"{prefix}/ctx"], "projection": linear("proj"), **deep}


def test_golden_maple(golden):
  spec, params = golden_clip(golden, "T")
  arrays = golden_values(golden, "T_maple")
  method = methods.build("maple", spec, depth=3)
  initial, state = method.init(jax.random.key(0), params, golden_classes(arrays))
  trainable = jax.tree.map(jnp.asarray, maple_of(arrays, "param"))
  assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, trainable)
  table = params["text"]["tokens"]
  np.testing.assert_array_equal(initial["context"], table[[320, 1125]])  # "a photo"
  context = golden_context(method, params, state, arrays)
  with jax.default_matmul_precision("highest"):
    found = three_steps(method, backbones.build(spec), trainable, jnp.asarray(arrays["images"]), context)
  check_golden(found, arrays, maple_of(arrays, "grad"), maple_of(arrays, "sgd3"))
  np.testing.assert_allclose(found[0]["image"], arrays["image_features"], rtol=1e-4, atol=1e-4)


# --- CoOp -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("position", POSITIONS)
def test_every_token_is_where_the_position_says(position, M):
  """Of an odd context the smaller half is in front of the name."""
  lengths, T = [1, 2, 4], 1 + M + 4 + 2 + 1
  names = [[f"n{i}" for i in range(n)] for n in lengths]
  learned, rest = [f"v{i}" for i in range(M)], [".", "end"] + ["pad"] * T
  half = {"end": M, "middle": M // 2, "front": 0}[position]
  wanted = [["start", *learned[:half], *name, *learned[half:], *rest][:T] for name in names]
  before = [["start", *["X"] * M, *name, *rest][:T] for name in names]
  words = sorted({word for row in wanted + before for word in row})
  numbers = lambda rows: np.float32([[words.index(word) for word in row] for row in rows])
  visit = coop_visitor({"context": numbers([learned])[0][:, None]}, {"lengths": jnp.array(lengths)}, position)
  found = jax.jit(lambda y: visit((), "text/embed", y, None)[1])(numbers(before)[..., None])
  np.testing.assert_array_equal(found[..., 0], numbers(wanted))
  assert visit("carry", "text/block_00/in", before, None) == ("carry", before)


def test_names_are_measured_without_the_context():
  method = methods.build("coop", TINY, tokens=4, position="front")
  known = classes(method, ["dog", "alarm_clock"], lambda texts: made_up_ids(TINY, texts))
  texts = method.prompts.strings(["dog", "alarm_clock"])
  assert texts == {"prompts": ["X X X X dog.", "X X X X alarm clock."], "names": ["dog", "alarm clock"]}
  _, state = method.init(jax.random.key(0), None, known)
  assert state["lengths"].tolist() == [1, 2] and state["lengths"].dtype == np.int32


def test_every_class_has_a_context_of_its_own_that_starts_from_the_words(random_weights):
  params = random_weights(TINY).params
  method = methods.build("coop", TINY, words="a_photo of", class_specific=True)
  assert method.options["tokens"] == 3
  known = classes(method, 4, lambda texts: made_up_ids(TINY, texts))
  trainable, _ = method.init(jax.random.key(0), params, known)
  wanted = params["text"]["tokens"][made_up_ids(TINY, ["a photo of"])[0, 1:4]]
  np.testing.assert_array_equal(trainable["context"], np.broadcast_to(wanted, (4, 3, 24)))
  with pytest.raises(ValueError, match="words 'a photo of' are 4 tokens; expected 3, one for each word; choose"):
    method.init(jax.random.key(0), params, {**known, "words": made_up_ids(TINY, ["a pho to of"])})


def test_without_words_the_context_starts_small():
  method, ids = methods.build("coop", B16), np.zeros((2, 77), np.int32)
  context = method.init(jax.random.key(0), None, {"prompts": ids})[0]["context"]
  assert context.shape == (16, 512)
  np.testing.assert_allclose([np.mean(context), np.std(context)], [0, 0.02], atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_the_text_tower_runs_over_class_prompts_not_over_images(random_weights, name):
  """[C, T, Dt] whatever the batch, T up to the end of the longest prompt; and all of the context counts."""
  method, params = methods.build(name, TINY, **SMALL[name]), random_weights(TINY).params
  known = classes(method, ["dog", "alarm clock", "eiffel"], lambda texts: made_up_ids(TINY, texts))
  trainable, state = method.init(jax.random.key(0), params, known)
  frozen, shapes = method.prepare(params, state), []
  def run(images):
    def visit(carry, site, y, x):
      if site == "text/block_00/in":
        shapes.append(y.shape)
      return inner(carry, site, y, x)
    ctx = Context({}, state, frozen)
    inner = method.visit(trainable, ctx)
    return forward(method._replace(visit=lambda *_: visit), backbones.build(TINY), trainable, images, ctx).logits
  for B in (1, 7):
    assert jax.eval_shape(run, jax.ShapeDtypeStruct((B, 16, 16, 3), jnp.float32)).shape == (B, 3)
  assert shapes == [(3, 8, 24)] * 2  # start, 4 words, 2 of "alarm clock.", end


# --- MaPLe ------------------------------------------------------------------------------------------------------------

def test_initialisation_of_maple():
  method = methods.build("maple", B16, words="", tokens=3)
  trainable = method.init(jax.random.key(0), None, {"prompts": np.zeros((2, 77), np.int32)})[0]
  assert list(trainable) == ["context", "projection", *(f"block_{i:02d}" for i in range(1, 9))]
  contexts = [np.asarray(trainable["context"]), *(np.asarray(trainable[f"block_{i:02d}"]["context"])
                                                  for i in range(1, 9))]
  assert len({context.tobytes() for context in contexts}) == 9
  np.testing.assert_allclose(np.std(contexts), 0.02, rtol=0.05)
  first, *deep = [trainable["projection"], *(trainable[f"block_{i:02d}"]["projection"] for i in range(1, 9))]
  for other in deep:
    np.testing.assert_array_equal(other["kernel"], deep[0]["kernel"])
    np.testing.assert_array_equal(other["bias"], deep[0]["bias"])
  assert not np.array_equal(first["kernel"], deep[0]["kernel"])
  for drawn in (first["kernel"], first["bias"], deep[0]["kernel"], deep[0]["bias"]):
    assert 0.98 < np.max(drawn) * 512 ** 0.5 <= 1 and -1 <= np.min(drawn) * 512 ** 0.5 < -0.98


def test_tokens_of_maple_are_where_the_paper_has_them():
  """Behind the start of a text and behind the patches; a block without tokens of its own keeps what there is."""
  own = lambda value: {"context": jnp.full((2, 1), value), "projection": {"kernel": jnp.full((1, 1), 10.0),
                                                                         "bias": jnp.ones(1)}}
  visit = maple_visitor({**own(1.0), "block_01": own(2.0)})
  rows = {"text/embed": [5, 6, 7, 8], "image/embed": [5, 6, 7], "text/block_01/in": [5, 6, 7, 8],
          "image/block_01/in": [5, 6, 7, 11, 11]}
  wanted = {"text/embed": [5, 1, 1, 8], "image/embed": [5, 6, 7, 11, 11], "text/block_01/in": [5, 2, 2, 8],
            "image/block_01/in": [5, 6, 7, 21, 21]}
  for site in ("text/block_00/in", "text/block_02/in", "image/block_02/in", "image/block_01/out", "image/embed_norm"):
    rows[site] = wanted[site] = [5, 6, 7]
  at = lambda site, row: visit((), site, jnp.float32([row, row])[..., None], None)[1][1, :, 0]
  found = jax.jit(lambda: {site: at(site, row) for site, row in rows.items()})()
  assert {site: row.tolist() for site, row in found.items()} == wanted


# --- Both -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options, size", [
    ("coop", {}, 8_192), ("coop", {"class_specific": True}, 819_200), ("coop", {"words": "a photo of a"}, 2_048),
    ("maple", {}, 3_555_072), ("maple", {"depth": 3}, 1_185_024), ("maple", {"depth": 1}, 395_008)])
def test_published_sizes_on_vit_b16(name, options, size):
  assert sizes(methods.build(name, B16, **options), backbones.abstract_params(B16), 100).trainable == size


def trained(random_weights, name, options, task, **where):
  """(weights, Fit) of 30 steps with made-up tokens."""
  weights = random_weights(TINY)
  params = {**weights.params, "logit_scale": np.float32(math.log(20))}
  weights = weights._replace(params=params, tokenizer=lambda texts: made_up_ids(TINY, texts))
  how = recipe(duration="6 epochs", optim=Optim("adamw", lr=0.05, weight_decay=0.0))
  return weights, fit(weights, name, task, how, options=options, quiet=True, **where)


def learns(workdir) -> bool:
  losses = [row["loss"] for row in metrics(workdir) if "loss" in row]
  return len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_coop_learns_from_a_cache_and_predicts_from_images_without_a_tokenizer(random_weights, tmp_path):
  options = {"tokens": 4, "class_specific": True}
  weights, run = trained(random_weights, "coop", options, colours(), workdir=tmp_path / "run",
                         features=tmp_path / "features")
  assert learns(tmp_path / "run")
  adapter = load_adapter(run.adapter)
  jax.tree.map(np.testing.assert_array_equal, (adapter.trainable, adapter.state), (run.trainable, run.state))
  found = serve.evaluate(serve.load(run.adapter, weights._replace(tokenizer=None)), colours())
  assert found.accuracy == run.result["test"]["accuracy"]
  np.testing.assert_allclose(found.loss, run.result["test"]["loss"], rtol=1e-5)


def test_maple_learns(random_weights, tmp_path):
  """What is saved gives the same logits without a tokenizer: a row of the conformance table."""
  task = dataclasses.replace(colours(), splits={"train": colours().splits["train"]})
  _, run = trained(random_weights, "maple", SMALL["maple"], task, workdir=tmp_path)
  assert learns(tmp_path)
  assert load_adapter(run.adapter).state["prompts"].shape == (4, TINY.context)


@pytest.mark.parametrize("name, spec, options, message", [
    ("coop", TINY, {"position": "behind"}, "position is 'behind'; expected one of 'end', 'middle', 'front'"),
    ("coop", TINY, {}, "tokens is 16; expected 1 to 12, to leave room for a name in 16"),
    ("coop", TINY, {"tokens": 0}, "tokens is 0; expected 1 to 12"),
    ("coop", B16, {"tokens": 3, "words": "a photo of a"}, "tokens is 3 and words are 'a photo of a'; expected one"),
    ("maple", TINY, {"tokens": 13, "depth": 1}, "tokens is 13; expected 1 to 12"),
    ("maple", B16, {"tokens": 5}, "tokens is 5 and words are 'a photo of a'; expected at least as many words"),
    ("maple", TINY, {}, "depth is 9; expected 1 to 2, the blocks of clip_tiny_test's shallower tower"),
    ("maple", TINY, {"depth": 0}, "depth is 0; expected 1 to 2"),
    ("maple", backbones.architecture("vit_tiny_test"), {}, "maple needs an image and a text tower"),
    ("coop", backbones.architecture("swin_tiny_test"), {}, "coop needs an image and a text tower")])
def test_wrong_options_are_one_line_errors(name, spec, options, message):
  with pytest.raises(ValueError) as error:
    methods.build(name, spec, **options)
  assert message in str(error.value) and "\n" not in str(error.value)
