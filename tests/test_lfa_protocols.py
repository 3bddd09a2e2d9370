"""The protocols of LFA's comparison on CLIP: CoOp's schedule, published hyper-parameters, prompts of tasks, and
DomainBed's draws as a sweep of joint keys."""
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferlab import backbones, data, experiment, grid, methods, optim
from transferlab.data.domains import seed_hash
from transferlab.data.templates import IMAGENET_ENSEMBLE, TEMPLATES
from transferlab.method import classes
from transferlab.methods import lfa_on
from transferlab.optim import Optim, epoch_rates, make_optimiser, schedule
from transferlab.papers import domainbed, recipes
from transferlab.recipe import changed

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FEWSHOT, DG = f"{CONFIGS / 'fewshot.py'}", f"{CONFIGS / 'domain_generalization.py'}"
SUITES = {"pacs": "sketch", "vlcs": "sun09", "office_home": "art", "terra_incognita": "location_38",
          "domainnet": "real"}


def text(path, **arguments) -> str:
  given = {"protocol": "paper", "backbone": "clip_vit_b16", **arguments}
  return f"{path}:" + ",".join(f"{name}={value}" for name, value in given.items())


def few(task="dtd", **arguments):
  return experiment.load(text(FEWSHOT, task=f"coop/{task}", **arguments))


def dg(suite="pacs", **arguments):
  return experiment.load(text(DG, task=f"{suite}/{SUITES[suite]}", **arguments))


# --- The optimiser --------------------------------------------------------------------------------------------------

def test_rates_are_those_of_dassl(golden):
  """Per epoch, in float64; and as a run sees them: constant within an epoch, float32."""
  for name, wanted in json.loads(golden("lfa_and_clip/dassl_lr_schedules.json").read_text()).items():
    lr, rates = wanted["base_lr"], wanted["lr_per_epoch"]
    np.testing.assert_allclose(epoch_rates("coop", lr, len(rates)), rates, rtol=1e-12, atol=0, err_msg=name)
    rate = schedule(Optim(schedule="coop", lr=lr, warmup="1 epochs"), 5 * len(rates), 5, 32)
    for step in (0, 4, 5, 9, 5 * len(rates) - 1):
      np.testing.assert_allclose(rate(step), rates[step // 5], rtol=1e-6)


def test_warm_up_of_coops_schedule():
  """As long as asked for, one epoch if nothing is said; the cosine starts behind it and does not end at 0."""
  rates = epoch_rates("coop", 2e-3, 10, warmup=3)
  assert rates[:3].tolist() == [1e-5] * 3 and rates[3] == 2e-3
  np.testing.assert_allclose(rates[9], 1e-3 * (1 + np.cos(0.6 * np.pi)))
  assert epoch_rates("coop", 2e-3, 10).tolist() == epoch_rates("coop", 2e-3, 10, 1).tolist()
  assert float(schedule(Optim(schedule="coop", lr=2e-3, warmup="0 steps"), 20, 2, 8)(2)) == np.float32(2e-3)


def test_decay_is_added_before_momentum_and_to_everything():
  """SGD as torch has it, by hand, with more of both than published, so that the order shows; biases decay, too."""
  own = experiment.parse(few(method="lfa"))[2].optim
  assert (own.name, own.weight_decay, own.momentum, own.decay) == ("sgd", 5e-4, 0.1, ())
  own = dataclasses.replace(own, weight_decay=0.5, momentum=0.9)
  values = {"context": jnp.array([1.0, -2.0]), "bias": jnp.array([4.0])}
  gradients = [{"context": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])},
               {"context": jnp.array([-0.5, 1.0]), "bias": jnp.array([2.0])}]
  made = make_optimiser(own, lambda step: 0.01, values)
  state, wanted, buffer = made.init(values), {k: np.array(v, np.float64) for k, v in values.items()}, {}
  for gradient in gradients:
    updates, state = made.update(gradient, state, values)
    values = jax.tree.map(jnp.add, values, updates)
    for name in wanted:
      decayed = np.array(gradient[name], np.float64) + 0.5 * wanted[name]
      buffer[name] = 0.9 * buffer[name] + decayed if name in buffer else decayed
      wanted[name] = wanted[name] - 0.01 * buffer[name]
  for name in wanted:
    np.testing.assert_allclose(values[name], wanted[name], rtol=1e-6)


# --- Published hyper-parameters -------------------------------------------------------------------------------------

FEW = {  # the specification's table: lr, momentum, batch, epochs; and ImageNet's own row
    "lfa": ((0.002, 0.1, 32, 100), (0.002, 0.1, 256, 40)),
    "clip_linear": ((0.002, 0.1, 32, 100), (0.002, 0.1, 256, 40)),
    "coop": ((0.002, 0.9, 32, 200), (0.002, 0.9, 32, 50)), "clip_adapter": ((0.0035, 0.1, 4, 40),) * 2,
    "maple": ((0.0035, 0.9, 4, 5), (0.0026, 0.9, 4, 2))}


@pytest.mark.parametrize("method", FEW)
def test_few_shot_rows_are_those_of_the_table(method):
  for task in data.SUITES["coop11"]:
    config = few(task.partition("/")[2], method=method)
    lr, momentum, batch, epochs = FEW[method][task == "coop/imagenet"]
    epochs = 2 * epochs if task == "coop/eurosat" and method in ("lfa", "clip_linear") else epochs
    assert (config.optim.lr, config.optim.momentum, config.batch_size, config.duration) == (
        lr, momentum, batch, f"{epochs} epochs"), task
    assert (config.optim.name, config.optim.schedule, config.optim.weight_decay) == ("sgd", "coop", 5e-4)
    assert config.select == "last" and config.augmentation == "crop_flip" and config.drop_last
    assert config.preprocessing == ""  # CLIP's own
  assert few("imagenet", method="maple").options.depth == 3 and few(method="maple").options.depth == 9
  assert few(method="clip_linear").options.form == "fewshot"


def test_domain_generalisation_is_domainbeds():
  for suite in SUITES:
    for method in ("lfa", "clip_linear", "dpl", "qlora"):
      config = dg(suite, method=method)
      assert (config.optim.name, config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (
          "sgd", 1e-3, 0.1, 0.0)
      assert (config.duration, config.batch_size, config.per_domain, config.select) == ("5001 steps", 32, True, "best")
      assert config.evaluate_every == config.checkpoint_every == f"{1000 if suite == 'domainnet' else 300} steps"
      assert config.optim.schedule == "constant" and config.augmentation == "domainbed"
      assert config.preprocessing == "crop=squash,crop_fraction=1,interpolation=bilinear"
  lfa = dg(method="lfa").options
  assert (lfa.init, lfa.dropout, lfa.beta) == ("clip", 0.0, 0.9) and dg(method="clip_linear").options.form == "dg"
  assert dg(method="zero_shot").preprocessing == ""
  miro = {suite: dg(suite, method="miro") for suite in ("pacs", "domainnet")}
  assert [(each.duration, each.evaluate_every) for each in miro.values()] == [
      ("5001 steps", "200 steps"), ("15001 steps", "1000 steps")]
  assert (miro["pacs"].optim.name, miro["pacs"].optim.lr, miro["pacs"].options.weight) == ("adam", 5e-5, 1.0)


def cases():
  """(suite, task, method) of every recipe for CLIP."""
  for each in recipes.collected()["recipes"]:
    if each["families"] == ["clip"]:
      for suite in each["suites"]:
        task = next(iter(each.get("tasks", {"dtd": 0}))).partition("/")[0] if suite == "coop" else SUITES[suite]
        for method in each["methods"]:
          yield suite, task, method


def test_every_recipe_makes_a_configuration_that_can_train():
  """Options suit the method on CLIP ViT-B/16, patterns match its parameters."""
  spec = backbones.architecture("clip_vit_b16")
  params, seen = backbones.abstract_params(spec), set()
  for suite, task, method in cases():
    name, _, base = method.partition("+")
    config = few(task, method=name, base=base) if suite == "coop" else dg(suite, method=name, base=base)
    found, options, recipe = experiment.parse(config)
    assert found.method == name and recipe.optim.lr > 0
    key = (name, json.dumps(options, sort_keys=True, default=list), recipe.optim)
    if key in seen:
      continue
    seen.add(key)
    built = methods.build(name, spec, **options)
    init = lambda rng, params, built=built: built.init(rng, params, classes(built, 3))
    trainable, _ = jax.eval_shape(init, jax.random.key(0), params)
    if jax.tree.leaves(trainable):
      made = optim.make_optimiser(recipe.optim, lambda step: 0.1, trainable)
      jax.eval_shape(made.init, trainable)


def test_what_lfa_stands_on_trains_as_published():
  """First stages have their recipe beside LFA; it is the one of the published runs of that method alone."""
  assert lfa_on.RECIPES.keys() == {"coop", "clip_adapter", "maple", "qlora"}
  for base, own in lfa_on.RECIPES.items():
    config = dg(method=base) if base == "qlora" else few(method=base)
    recipe = experiment.parse(config)[2]
    changed_by_it = changed(recipe, own)
    assert dataclasses.replace(changed_by_it, optim=recipe.optim) == recipe, base
    unlike = {field.name for field in dataclasses.fields(Optim)
              if getattr(changed_by_it.optim, field.name) != getattr(recipe.optim, field.name)}
    assert unlike <= ({"decay"} if base == "qlora" else set()), base  # of a decay of 0


# --- Prompts --------------------------------------------------------------------------------------------------------

def test_templates_are_the_tasks():
  """Few-shot prompts end with a full stop, those of domain generalisation do not."""
  for protocol in ("", "paper"):
    for name, templates in TEMPLATES.items():
      assert few(name, method="zero_shot", protocol=protocol).options.templates == templates[0]
    for suite in SUITES:
      assert dg(suite, method="clip_linear", protocol=protocol).options.templates == "a photo of a {}"
  assert few("imagenet", method="lfa").options.templates == IMAGENET_ENSEMBLE
  for method in ("clip_linear", "clip_adapter"):
    assert few("imagenet", method=method).options.templates == "a photo of a {}."
  assert dg(method="dpl").options.template == "a photo of a {}."
  assert "templates" not in few(method="coop").options
  assert experiment.load(f"{FEWSHOT}:task=oxford_pets,method=lfa").options.templates == TEMPLATES["oxford_pets"][0]


@pytest.mark.parametrize("given, backbone", [({}, "clip_vit_b16"), ({}, "/weights/ViT-B-16.pt"),
                                             ({"family": "clip"}, "hf:someone/b16")])
def test_a_method_of_clips_alone_needs_no_family(given, backbone):
  assert few(method="lfa", backbone=backbone, **given).optim.schedule == "coop"


def test_what_cannot_be_said_is_told(capsys):
  recipes._tell.cache_clear()
  dg(method="dpl")
  told = capsys.readouterr().err
  assert "values are those of pacs/sketch on CLIP ViT-B/16" in told
  assert "images are normalised by mean=0.485/0.456/0.406" in told and "validation images" in told
  assert "kept by file name" in told and "softmax is over the prompts of all training domains" in told
  few(method="lfa")
  told = capsys.readouterr().err
  assert "normalised" not in told and "loads epoch 100 of another configuration" in told


def test_what_was_released_on_request():
  config = dg(method="dpl", compat="released")
  assert config.options.compat == "released"
  assert config.preprocessing == ("crop=squash,crop_fraction=1,interpolation=bilinear,mean=0.485/0.456/0.406,"
                                  "std=0.229/0.224/0.225")
  assert dg(method="lfa", compat="released").preprocessing == config.preprocessing
  assert dg(method="dpl").options.compat is None
  for arguments, message in (({"compat": "paper"}, "compat is 'paper'; expected released"),
                             ({"compat": "released", "protocol": ""}, "compat is for protocol=paper")):
    with pytest.raises(ValueError, match=message):
      dg(method="dpl", **arguments)


@pytest.mark.parametrize("load, message", [
    (lambda: few(method="lfa", shots=4), "dtd with 4 shots of coop on CLIP ViT-B/16; published are caltech101/16"),
    (lambda: few(method="dpl"), "dpl has no published .* of coop on CLIP ViT-B/16; published there are lfa"),
    (lambda: dg(method="coop"), "coop has no published .*; published there are lfa, clip_linear, zero_shot, dpl"),
    (lambda: few(method="lfa", rates="chosen"), "leave rates=chosen out")])
def test_what_is_not_published_is_an_error(load, message):
  with pytest.raises(ValueError, match=message) as error:
    load()
  assert "\n" not in str(error.value)


# --- DomainBed's draws ----------------------------------------------------------------------------------------------

NAMES = {"optim.lr": "lr", "optim.momentum": "momentum", "batch_size": "batch_size",
         "options.tokens": "num_domain_tokens", "options.width": "mlp_width", "options.dropout": "mlp_dropout"}


def test_draws_are_those_of_domainbed(golden):
  known = json.loads(golden("lfa_and_clip/dg_hparams_sweep.json").read_text())
  count = 0
  for suite, algorithms in known["hparams"].items():
    for algorithm, method in (("CLIP_LFA", "lfa"), ("DPLCLIP", "dpl")):
      for row in algorithms[algorithm]:
        found = domainbed.draw(method, suite.lower(), row["trial_seed"], row["hparams_seed"])
        assert {NAMES[key]: value for key, value in found.items()} == {
            name: row[name] for name in (NAMES[key] for key in found)}
        assert row["weight_decay"] == 0 and row.get("mlp_depth", 3) == 3
        count += 1
  assert count == 60
  for row in known["split_examples"]:  # the splits themselves: tests/test_data_domains.py
    assert seed_hash(row["trial_seed"], row["env"]) == row["seed"]


def test_a_config_file_offers_a_trials_draws():
  chosen = dict(rates="chosen", method="lfa")
  found = experiment.load_grid(text(DG, task="pacs/sketch", seed=1, **chosen))
  (key, values), = found.items()
  assert key == "optim.lr+optim.momentum+batch_size" and len(values) == 5
  assert values[0] == (1e-3, 0.1, 32) and values[1][2] == 8
  assert values != experiment.load_grid(text(DG, task="pacs/sketch", seed=2, **chosen))[key]
  points = grid.points(dg(seed=1, **chosen), found)
  assert [(p.recipe.optim.lr, p.recipe.optim.momentum, p.recipe.batch_size) for p in points] == values
  assert points[2].values == dict(zip(key.split("+"), values[2]))
  assert experiment.load_grid(text(DG, task="pacs/sketch", method="lfa")) == {}
  assert len(experiment.load_grid(text(DG, task="pacs/sketch", draws=2, **chosen))[key]) == 2
  for arguments, message in (({"method": "miro"}, "DomainBed draws nothing for miro on pacs"),
                             ({"method": "lfa", "draws": 0}, "draws is 0; expected 1 or more"),
                             ({"method": "lfa", "task": "imagenet/a"}, "draws nothing for lfa on imagenet")):
    with pytest.raises(ValueError, match=message):
      experiment.load_grid(text(DG, **{"task": "pacs/sketch", "rates": "chosen", **arguments}))


def test_keys_vary_together():
  config = experiment.defaults("linear", data="digits")
  given = grid.parse("optim.lr+batch_size=(1e-3,32),(1e-4,16);seed=0,1")
  points = grid.points(config, given)
  assert [tuple(p.values.values()) for p in points] == [
      (1e-3, 32, 0), (1e-3, 32, 1), (1e-4, 16, 0), (1e-4, 16, 1)]
  assert [p.recipe.batch_size for p in points] == [32, 32, 16, 16]
  for text_, message in (("optim.lr+batch_size=(1e-3,32,1)", r"has the value '\(1e-3,32,1\)'; expected 2 in brackets"),
                         ("optim.lr+batch_size=(1e-3,32);batch_size=8", "grid has batch_size twice"),
                         ("optim.lr+data=(1e-3,digits)", "grid over optim.lr.data: scores of different tasks"),
                         ("optim.lr+batch_size=(1e-3,32),(1e-3,32)", "grid has a point twice")):
    with pytest.raises(ValueError, match=message):
      grid.points(config, grid.parse(text_))
