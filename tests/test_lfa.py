"""LFA against the original, the form that forms no vector per image and class, and what it promises beside the
conformance table.

Goldens: logits and what leads to them to 1e-4 (1 + |x|), gradients and trained values to 1e-4 of a leaf's largest.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clip_goldens import golden_clip, golden_values

from transferlab import backbones, cost, losses, methods, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.method import Context, collect, forward, sizes
from transferlab.methods import classifier
from transferlab.methods import layer_attention as la
from transferlab.methods.lfa import explain, image_reads
from transferlab.optim import Optim, make_optimiser
from transferlab.step import make_step, start

B16 = backbones.architecture("clip_vit_b16")
FEW_SHOT = {"T_lfa_fewshot": 1, "T_lfa_fewshot_imagenet8": 8}
DG = {"T_dg_lfa": None, "T_dg_lfa_rank2": 2}


def close(found, wanted, tolerance=1e-4):
  """Every element to `tolerance` (1 + |x|)."""
  np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def close_leaves(found, wanted, tolerance=1e-4):
  """Same names; every leaf to `tolerance` of its largest value."""
  found, wanted = tree.flatten(found), tree.flatten(wanted)
  assert found.keys() == wanted.keys()
  for name, leaf in wanted.items():
    np.testing.assert_allclose(found[name], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=name)


def few_shot_matrices(values, prefix):
  """Our trainable of torch's Linears (out, in)."""
  of = lambda name: values[f"{prefix}{name}"].T
  return {"image": {k: of(f"image_encoder.{k.upper()}") for k in "qkv"},
          "text_self": {k: of(f"text_encoder.{k.upper()}_self") for k in "qkv"},
          "text_cross": {k: of(f"text_encoder.{k.upper()}_cross") for k in "kv"}}


def dg_matrices(values, prefix, rank):
  def of(name):
    if rank:
      return {part: values[f"{prefix}{name}.{part}.weight"].T for part in ("down", "up")}
    return values[f"{prefix}{name}.origin"]
  return {"image": {k: of(f"visual_self_{k.upper()}") for k in "qkv"},
          "text_self": {k: of(f"textual_self_{k.upper()}") for k in "qkv"},
          "text_cross": {k: of(f"textual_cross_{k.upper()}") for k in "kv"}}


@pytest.fixture(scope="module")
def clip(golden):
  """(spec, parameters) of the golden CLIP."""
  return golden_clip(golden, "T")


@pytest.fixture(scope="module")
def layers_of(clip):
  """images [B, S, S, 3] -> cached activations {slot: [B, D]}; one program for up to 12."""
  spec, params = clip
  run = jax.jit(lambda params, images: backbones.build(spec).apply(
      params, images, collect(image_reads(spec, spec.depth), params), {})[1])
  def layers(images):
    found = run(params, np.pad(images, ((0, 12 - len(images)), (0, 0), (0, 0), (0, 0))))
    return {slot: value[:len(images)] for slot, value in found.items()}
  return layers


def trained(method, trainable, frozen, activations, labels, optim, steps=3):
  """(losses, the first gradient, trainable) of steps on cached activations, through the real step and optimiser."""
  optimiser = make_optimiser(optim, lambda step: optim.lr, trainable)
  step = jax.jit(make_step(method, None, optimiser, Preprocessing(32), 5))
  batch = {"activations": activations, "label": jnp.asarray(labels, jnp.int32), "weight": jnp.ones(len(labels))}
  run, found = start(trainable, {}, optimiser), []
  for i in range(steps):
    run, metrics = step(run, frozen, batch)
    found.append(float(metrics["loss"]))
    if i == 0:  # the momentum, which then is the gradient and the decay
      first = jax.tree.map(lambda m, w: m - np.float32(optim.weight_decay) * w,
                           optax.tree_utils.tree_get(run.opt_state, "trace"), trainable)
  return found, first, run.trainable


def seen_of(method):
  """The compiled (trainable, frozen, activations) -> Explanation, carry."""
  def run(trainable, frozen, activations):
    context = Context(frozen=frozen)
    outputs = forward(method, None, trainable, activations, context)
    return explain(method, trainable, outputs, context), outputs.carry
  return jax.jit(run)


def naive(trainable, image, text, scale, beta):
  """Every vector formed, written down from the equations: (logits, {score, attention and z of each path})."""
  f, rows = {path: {k: (image if path == "image" else text) @ w for k, w in each.items()}
             for path, each in trainable.items()}, "...l,...ld->...d"
  d = f["image"]["q"].shape[-1]
  q = f["image"]["q"][:, -1]
  e = {"image": jnp.einsum("bd,bld->bl", q, f["image"]["k"]) / d ** 0.5,
       "self": jnp.einsum("ctd,ctld->ctl", f["text_self"]["q"][:, :, -1], f["text_self"]["k"]) / d ** 0.5,
       "cross": jnp.einsum("bd,ctld->cbtl", q, f["text_cross"]["k"]) / d ** 0.5}
  a = {path: jax.nn.softmax(score, axis=-1) for path, score in e.items()}
  z = {"image": jnp.einsum(rows, a["image"], f["image"]["v"]), "self": jnp.einsum(rows, a["self"], f["text_self"]["v"]),
       "cross": jnp.einsum("cbtl,ctld->cbtd", a["cross"], f["text_cross"]["v"])}
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  cross = jnp.einsum("bd,cbd->bc", unit(z["image"]), unit(z["cross"].mean(axis=2)))
  own = jnp.einsum("bd,cd->bc", unit(z["image"]), unit(z["self"].mean(axis=1)))
  return scale * (beta * cross + (1 - beta) * own), {"score": e, "attention": a, "z": z}


# --- The original -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", FEW_SHOT)
def test_few_shot_golden(golden, clip, layers_of, file, monkeypatch):
  """Layers, scores, attention, vectors, logits at three betas, loss, gradients, three steps; all but the vectors with
  stored dropout, too."""
  (spec, params), values = clip, golden_values(golden, file)
  build = lambda **options: methods.build("lfa", spec, templates=("{}",) * FEW_SHOT[file], **options)
  trainable, labels = few_shot_matrices(values, "param/"), values["labels"]
  with jax.default_matmul_precision("highest"):
    frozen = build().prepare(params, {"prompts": values["token_ids"]})
    assert not {"text", "text_projection"} & frozen.keys()
    activations, see = layers_of(values["images"]), seen_of(build())
    found, layers = see(trainable, frozen, activations)
    close(layers["image"].swapaxes(0, 1), values["image_layer_features"])
    close(layers["text"].swapaxes(1, 2), values["text_layer_features"])
    close(found.logits, values["logits"])
    close(found.attention.image, values["attn_image_self"])
    close(found.attention.text_self, values["attn_text_self"])
    close(found.attention.text_cross.swapaxes(0, 1), values["attn_text_cross"])
    masks = values["dropout_mask_image"].swapaxes(0, 1), values["dropout_mask_text"].swapaxes(1, 2)
    at, vectors = jax.jit(lambda w, image, text: (
        [la.logits(w, image * masks[0], text * masks[1], 20.0), *(la.logits(w, image, text, 20.0, b) for b in (0, 1))],
        naive(w, image, text, 20.0, 0.9)))(trainable, layers["image"], layers["text"])
    close(at, [values["logits_train"], values["logits_beta0"], values["logits_beta1"]])
    close(vectors[0], values["logits"])
    for ours, theirs in (("image", "image_self"), ("self", "text_self"), ("cross", "text_cross")):
      close(vectors[1]["score"][ours], values[f"score_{theirs}"])
    for ours, theirs in (("image", "image"), ("self", "text_self_per_class_prompt"),
                         ("cross", "text_cross_class_image_prompt")):
      close(vectors[1]["z"][ours], values[f"z_{theirs}"])

    steps = Optim("sgd", lr=0.01, momentum=0.1, weight_decay=5e-4, decay=())
    lost, gradient, after = trained(build(dropout=0.0), trainable, frozen, activations, labels, steps)
    close(lost, values["sgd_losses"])
    close(lost[0], values["loss_eval"])
    close_leaves(gradient, few_shot_matrices(values, "grad/"))
    close_leaves(after, few_shot_matrices(values, "sgd3/"))
    close(see(after, frozen, activations)[0].logits, values["sgd3_logits"])

    stored = {mask.shape: mask for mask in masks}
    monkeypatch.setattr(classifier, "dropout", lambda rng, rate, x, train: x * stored[x.shape])
    lost, gradient, _ = trained(build(), trainable, frozen, activations, labels, steps, 1)
    close(lost, [values["loss_train"]])
    close_leaves(gradient, few_shot_matrices(values, "grad_train/"))


@pytest.mark.parametrize("file", DG)
def test_domain_generalisation_golden(golden, clip, layers_of, file, monkeypatch):
  """Initial values, attention and logits, and three updates on three domains' batches in one; the golden's low-rank
  dropout is off."""
  (spec, params), values, rank = clip, golden_values(golden, file), DG[file]
  monkeypatch.setattr(la, "RANK_DROPOUT", 0.0)
  method = methods.build("lfa", spec, templates="a photo of a {}", init="clip", dropout=0.0, rank=rank)
  trainable = dg_matrices(values, "init/", rank)
  own, state = method.init(jax.random.key(0), params, {"prompts": values["token_ids"]})
  assert sum(leaf.size for leaf in jax.tree.leaves(own)) == values["n_trainable"]
  if not rank:
    close_leaves(own, trainable, 0)
  with jax.default_matmul_precision("highest"):
    frozen, see, test = method.prepare(params, state), seen_of(method), layers_of(values["images_test"])
    found, layers = see(trainable, frozen, test)
    close(found.logits, values["logits_test_init"])
    close(layers["image"].swapaxes(0, 1), values["image_layer_features_test"])
    close(layers["text"][:, 0].swapaxes(0, 1), values["text_layer_features"])
    close(found.attention.image, values["attn_image_self_init"])
    close(found.attention.text_self[:, 0], values["attn_text_self_init"])
    close(found.attention.text_cross[:, :, 0], values["attn_text_cross_init"])
    images = layers_of(np.concatenate([values[f"images_domain{i}"] for i in range(3)]))
    steps = Optim("sgd", lr=float(values["lr"]), momentum=0.1, weight_decay=0.0, decay=())
    lost, _, after = trained(method, trainable, frozen, images, values["labels"].reshape(-1), steps)
    close(lost, values["losses"])
    close_leaves(after, dg_matrices(values, "step3/", rank))
    close(see(after, frozen, test)[0].logits, values["logits_test_step3"])


# --- The head ---------------------------------------------------------------------------------------------------------

def drawn(seed, L, M, T, C=7, B=6, D=10, W=9, d=8):
  """(trainable, image [B, L, D], text [C, T, M, W])."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  matrices = {path: {name: draw(D if path == "image" else W, d) / 3 for name in names}
              for path, names in la.MATRICES.items()}
  return matrices, draw(B, L, D), draw(C, T, M, W)


def test_gram_form_is_the_naive_one():
  """Logits and gradients, with several templates and towers of unlike depth."""
  trainable, image, text = drawn(0, L=5, M=3, T=4)
  batch = {"target": np.eye(7, dtype=np.float32)[:6], "weight": np.ones(6, np.float32)}
  @jax.jit
  def run(w):
    loss = lambda logits: jax.value_and_grad(lambda w: losses.cross_entropy(logits(w), batch))(w)
    return loss(lambda w: la.logits(w, image, text, 20.0, 0.7)), loss(lambda w: naive(w, image, text, 20.0, 0.7)[0])
  (found, grads), (wanted, grads_) = run(trainable)
  close(found, wanted, 1e-5)
  close_leaves(grads, grads_, 1e-5)


def test_what_stands_between_the_mixture_and_its_length():
  """A map of z enters both cosines, so that one that scales it changes nothing and one that turns it turns the logits;
  the query does not see it. Matrices of zeros have finite gradients."""
  trainable, image, text = drawn(1, 4, 4, 1)
  @jax.jit
  def run(w):
    adapted = [la.logits(w, image, text, 20.0, adapt=lambda z, by=by: by * z) for by in (1, 3, -1)]
    return adapted, jax.grad(lambda w: la.logits(w, image, text, 20.0).sum())(jax.tree.map(jnp.zeros_like, w))
  (plain, scaled, turned), gradient = run(trainable)
  close(scaled, plain, 1e-5)
  close(turned, -plain, 1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_memory_of_a_thousand_classes():
  """ViT-B/16, batch 256, from cached layers: at most 0.5 GB; a vector for every image and class alone is as much."""
  step = cost.of_training(B16, methods.build("lfa", B16), 1000, batch_size=256, cached=True)
  assert step.train_peak_bytes < 0.5e9


# --- The method -------------------------------------------------------------------------------------------------------

def initial(*options):
  """{name: matrix} for each of several options, on projections of ones and twos with D = 768, Dt = d = 512."""
  frozen = {"image_projection": {"kernel": np.ones((768, 512))}, "text_projection": {"kernel": 2 * np.ones((512, 512))}}
  built = [methods.build("lfa", B16, **each) for each in options]
  init = jax.jit(lambda key: [method.init(key, frozen, {})[0] for method in built])
  return [tree.flatten(jax.tree.map(np.asarray, each)) for each in init(jax.random.key(0))]


def test_sizes_on_vit_b16():
  """The poster's 2490K in both forms; of a low rank, the factors alone."""
  shapes = backbones.abstract_params(B16)
  size = lambda **options: sizes(methods.build("lfa", B16, **options), shapes, 65).trainable
  assert size() == size(init="clip") == 2_490_368
  assert size(init="clip", rank=4) == 4 * (3 * (768 + 512) + 5 * (512 + 512))


def test_initial_values():
  """"clip": the projections; "random": queries and keys uniform within 1/sqrt(fan-in), values the projections; of a low
  rank both factors uniform, so not zero."""
  copies, mixed, low = initial({"init": "clip"}, {}, {"init": "clip", "rank": 4})
  assert len(copies) == 8 and all((leaf == (1 if name[0] == "i" else 2)).all() for name, leaf in copies.items())
  for name, leaf in mixed.items():
    if name.endswith("/v"):
      assert (leaf == (1 if name[0] == "i" else 2)).all()
    else:
      bound = leaf.shape[0] ** -0.5
      assert 0.99 * bound < np.abs(leaf).max() <= bound and abs(leaf.mean()) < 0.01 * bound
  for name, leaf in low.items():
    bound = leaf.shape[0] ** -0.5
    assert 0.9 * bound < np.abs(leaf).max() <= bound, name


def seen_by_the_head(monkeypatch, train, **options):
  """Arguments of the head for layers of ones, [40, 3, 16] and [30, 2, 2, 24]."""
  spec = backbones.architecture("clip_tiny_test")
  method, seen = methods.build("lfa", spec, templates=("{}", "a {}"), **options), {}
  monkeypatch.setattr(la, "logits", lambda trainable, image, text, scale, beta, **more: seen.update(
      image=image, text=text, scale=scale, beta=beta, **more))
  frozen = {"logit_scale": np.log(np.float32(7)), "image_projection": {"kernel": None},
            "text_projection": {"kernel": None}}
  context = Context(frozen=frozen, train=train, rng=jax.random.key(1) if train else None)
  method.readout({}, None, {"image": jnp.ones((40, 3, 16)), "text": jnp.ones((30, 2, 2, 24))}, context)
  return seen


def test_dropout_is_on_layers_in_training_only(monkeypatch):
  """Elements are 0 or 1 / 0.8, each drawn for itself; none of them in prediction or without dropout."""
  found = seen_by_the_head(monkeypatch, True)
  assert (float(found["scale"]), found["beta"]) == (pytest.approx(7), 0.9)
  for tower in ("image", "text"):
    values, zero = np.asarray(found[tower]), np.asarray(found[tower]) == 0
    np.testing.assert_allclose(values[~zero], 1.25)
    assert abs(zero.mean() - 0.2) < 0.03
    for axis in range(zero.ndim):  # no axis shares a mask
      assert zero.any(axis=axis).mean() > zero.mean() + 0.1
  for train, options in ((False, {}), (True, {"dropout": 0.0})):
    found = seen_by_the_head(monkeypatch, train, **options)
    assert (found["image"] == 1).all() and (found["text"] == 1).all()


def test_low_rank_dropout(monkeypatch):
  """A quarter of what the factors add is dropped in training, of each matrix for itself; the frozen part never."""
  key = seen_by_the_head(monkeypatch, True, init="clip", rank=2)["rng"]
  assert key is not None and seen_by_the_head(monkeypatch, False, init="clip", rank=2)["rng"] is None
  pair = {"down": jnp.full((4, 2), 0.5), "up": jnp.ones((2, 300))}  # adds 4
  trainable = {path: dict.fromkeys(names, pair) for path, names in la.MATRICES.items()}
  project = la._projection(trainable, {"image": jnp.ones((4, 300)), "text": jnp.ones((4, 300))}, key)
  found = {(path, name): np.asarray(project(path, name, jnp.ones((50, 4)))) for path, names in la.MATRICES.items()
           for name in names}
  assert len({np.packbits(each > 5).tobytes() for each in found.values()}) == 8
  for each in found.values():
    np.testing.assert_allclose(np.unique(each), [4, 4 + 4 / 0.75], rtol=1e-6)
    assert abs((each == 4).mean() - 0.25) < 0.02


def test_explanation(random_weights):
  """Attention sums to 1 over layers; the last layer's logits are those of a method that attends to it alone. With a
  rank, and a text tower deeper than the image tower."""
  spec = dataclasses.replace(backbones.architecture("clip_tiny_test"), text_depth=4)
  params, rng = random_weights(spec).params, np.random.default_rng(0)
  build = lambda layers=None: methods.build("lfa", spec, init="clip", rank=2, layers=layers)
  ids = rng.integers(1, 62, (5, 8), dtype=np.int32)
  ids[:, -1] = 63
  trainable, state = build().init(jax.random.key(0), params, {"prompts": ids})
  activations = {slot: rng.standard_normal((3, 16)).astype(np.float32) for slot in build().reads}
  see = lambda method: seen_of(method)(trainable, method.prepare(params, state), activations)
  (found, layers), (last, _) = see(build()), see(build(1))
  two = build(2).finish(trainable, activations, Context(frozen=build(2).prepare(params, state)))
  assert [each.shape for each in found.attention] == [(3, 3), (5, 1, 4), (3, 5, 1, 4)]
  for each in found.attention:
    close(np.asarray(each).sum(axis=-1), 1, 1e-6)
  close(found.last, last.logits, 1e-5)
  assert np.abs(found.last - found.logits).max() > 0.01
  for tower in ("image", "text"):
    close(two[tower], layers[tower][..., -2:, :], 1e-6)


@pytest.mark.parametrize("options, message", [
    ({"init": "zeros"}, "init is 'zeros'; expected one of clip, random"),
    ({"beta": 1.5}, "beta is 1.5; expected a number from 0 to 1"),
    ({"dropout": 1.0}, "from 0 to below 1"), ({"rank": 0, "init": "clip"}, "rank is 0; expected 1 or more"),
    ({"rank": 2}, "set init='clip'"), ({"layers": 13}, "layers is 13; expected 1 to 12"),
    ({"templates": "no place"}, "exactly one {}")])
def test_options_that_cannot_be(options, message):
  with pytest.raises(ValueError, match=message):
    methods.build("lfa", B16, **options)


def test_only_a_clip_will_do():
  with pytest.raises(ValueError, match="lfa needs an image and a text tower"):
    methods.build("lfa", backbones.architecture("vit_tiny_test"))
