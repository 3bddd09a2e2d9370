"""Published hyper-parameters: those collected, what they make of a configuration, and what is refused."""
import json
import types
from pathlib import Path

import jax
import pytest
from engine import write_images

from transferlab import backbones, cli, data, experiment, methods, optim, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import save_weights
from transferlab.papers import recipes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = {"vtab": "vtab", "fewshot": "fewshot", "imagenet": "domain_generalization"}
NAMES = {  # of the repositories -> ours
    "cifar_100": "cifar100", "cifar": "cifar100", "diabetic_retinopathy": "retinopathy", "dsprites_loc": "dspr_loc",
    "dsprites_ori": "dspr_ori", "kitti": "kitti_dist", "patch_camelyon": "camelyon", "smallnorb_azi": "snorb_azim",
    "smallnorb_ele": "snorb_ele", "oxford_flowers102": "flowers102", "oxford_iiit_pet": "pets", "oxford_pet": "pets"}
SETS = {"fgvc-aircraft-FS": "fgvc_aircraft", "food101-FS": "food101", "oxford-flowers102-FS": "oxford_flowers102",
        "oxford-pets-FS": "oxford_pets", "standford-cars-FS": "stanford_cars"}
TARGETS = {"imagenet": "val", "imagenetv2": "v2", "imagenet-sketch": "sketch", "imagenet-adversarial": "a",
           "imagenet-rendition": "r"}


def config(suite, **arguments):
  text = ",".join(f"{name}={value}" for name, value in {"protocol": "paper", **arguments}.items())
  return experiment.load(f"{CONFIGS / FILES[suite]}.py:{text}")


@pytest.fixture(scope="module")
def collected(request):
  return json.loads((request.getfixturevalue("shared") / "papers" / "dtl_and_petl_hparams.json").read_text())


# --- The values -----------------------------------------------------------------------------------------------------

def vtab(source: dict) -> list[tuple[str, dict]]:
  """(our task, its values), of all 19."""
  found = [(f"vtab/{NAMES.get(name, name)}", values) for name, values in source.items()]
  assert {task for task, _ in found} == set(data.SUITES["vtab1k"])
  return found


@pytest.mark.parametrize("method, name", [("dtl", "DTL"), ("dtl_plus", "DTL+")])
def test_dtls_values_are_those_collected(collected, method, name):
  def same(found, values):
    assert (found["optim.lr"], found["drop_path"]) == (values["lr"], values["drop_path"])
    assert found.get("options.kernel", 0) == values["kernel"]
  for family in ("vit", "swin"):
    for task, values in vtab(collected["dtl"][f"{family}_vtab"]):
      same(recipes.find(method, task, family).changes, values[name])
  for each, shots in collected["dtl"]["vit_few_shot"].items():
    for text, values in shots.items():
      same(recipes.find(method, f"fewshot/{SETS[each]}", shots=int(text[5:])).changes, values[name])
  for target, values in collected["dtl"]["vit_domain_generalization"].items():
    same(recipes.find(method, f"imagenet/{TARGETS[target]}").changes, values[name])


def test_facts_ssfs_and_noahs_values_are_those_collected(collected):
  for form in ("tt", "tk"):
    for task, values in vtab(collected["fact"][form]):
      found = recipes.find(f"fact_{form}", task).changes
      assert (found["options.rank"], found["options.scale"]) == (values["rank"], values["scale"])
  for task, values in vtab(collected["ssf"]["vtab"]):
    found = recipes.find("ssf", task).changes
    assert {"lr": found["optim.lr"], "weight_decay": found["optim.weight_decay"], "drop_path": found["drop_path"],
            "nproc": found["batch_size"] // collected["ssf"]["common"]["batch"]} == values
  for task, values in vtab(collected["noah"]["subnets_vtab"]):
    found = recipes.find("noah", task).changes
    assert [found[f"options.{kind}"] for kind in ("prompts", "lora", "adapter")] == [
        values[kind] for kind in ("visual_prompt_dim", "lora_dim", "adapter_dim")]


def test_common_values_are_those_collected(collected):
  for name, common, epochs in (("dtl", collected["dtl"]["common"], "epochs_run"),
                               ("fact_tk", collected["fact"]["common"], "epochs"),
                               ("lora", collected["noah"]["individual"]["vtab"], "epochs")):
    found = recipes.find(name, "vtab/dtd").changes
    assert found["duration"] == f"{common[epochs]} epochs" and found["batch_size"] == common["batch"]
    assert found["optim.weight_decay"] == common["weight_decay"]
  few = collected["noah"]["individual"]["few_shot"]
  assert recipes.find("adapter", "fewshot/food101", shots=2).changes["optim.lr"] == few["lr"]
  search, found = collected["noah"]["search"], recipes.find("noah_search", "vtab/dtd").changes
  assert [found[f"options.{key}"] for key in ("generations", "population", "top", "mutations", "crossovers", "p_mutate",
                                              "p_depth")] == [value for value in search.values() if value != "val200"]


def test_grids_are_those_collected(collected):
  vpt = collected["vpt"]
  grid = recipes.find("linear", "vtab/dtd", chosen=True).grid
  assert grid["optim.lr"] == [rate * 64 / 256 for rate in vpt["base_lr_grid_linear"]]
  assert grid["optim.weight_decay"] == vpt["wd_grid"]
  for task, values in vpt["demo_settings"].items():
    if "lr" in values:
      found = recipes.find("vpt_deep", f"vtab/{task}").changes
      assert [found[key] for key in ("options.prompts", "batch_size", "optim.lr", "optim.weight_decay",
                                     "options.dropout")] == list(values.values())


# --- What a configuration becomes -----------------------------------------------------------------------------------

def cases():
  """(method, suite, task, shots, family, chosen) of every collected recipe, with its first task."""
  first = {"vtab": "dtd", "fewshot": "oxford_pets/4", "imagenet": "sketch"}
  for each in recipes.collected()["recipes"]:
    suite = each["suites"][0]
    if "clip" in each["families"]:
      continue  # tests/test_lfa_protocols.py has those
    known = each.get("tasks", {first[suite]: None})
    task, _, shots = (first[suite] if first[suite] in known else next(iter(known))).partition("/")
    for method in each["methods"]:
      for family in each["families"]:
        yield pytest.param(method, suite, task, int(shots or 0), family, "grid" in each,
                           id=f"{method}-{suite}-{family}{'-chosen' * ('grid' in each)}")


@pytest.mark.parametrize("method, suite, task, shots, family, chosen", cases())
def test_every_recipe_makes_a_configuration_that_can_train(method, suite, task, shots, family, chosen):
  """Options suit the method on ViT-B/16 or Swin-B, patterns of decay match its parameters, images can be prepared."""
  more = {"family": family, "rates": "chosen" if chosen else "published", **({"shots": shots} if shots else {})}
  found, options, recipe = experiment.parse(config(suite, method=method, task=f"{suite}/{task}", **more))
  spec = backbones.architecture({"vit": "vit_b16", "swin": "swin_b"}[family])
  built = methods.build(method, spec, **options)
  frozen = backbones.abstract_params(spec)
  trainable, _ = jax.eval_shape(lambda rng, params: built.init(rng, params, 5), jax.random.key(0), frozen)
  made = optim.make_optimiser(recipe.optim, lambda step: 0.1, trainable)
  jax.eval_shape(made.init, trainable)
  assert len(optim.epoch_rates(recipe.optim.schedule, recipe.optim.lr, int(recipe.duration.split()[0]))) in (100, 110)
  Preprocessing(224).changed(found.preprocessing)
  assert recipe.select == ("best" if suite == "fewshot" else "last") and recipe.optim.lr > 0
  assert recipe.evaluate_every == "10 epochs" or suite != "fewshot"


def recipe_of(suite="vtab", **arguments):
  return experiment.parse(config(suite, **arguments))[2]


def test_rates_of_dtl():
  """The whole of its schedule: 110 epochs of 31 steps, 10 of warm-up within the cosine, the last 10 idle."""
  own = recipe_of(method="dtl_plus", task="dtd")
  rate = optim.schedule(own.optim, 110 * 31, 31, 32)
  assert own.duration == "110 epochs" and own.drop_last and own.batch_size == 32
  assert float(rate(0)) == pytest.approx(1e-7) and float(rate(30)) == float(rate(0))
  assert max(float(rate(31 * epoch)) for epoch in range(110)) == pytest.approx(0.9755 * 3e-4, rel=1e-4)
  assert float(rate(31 * 100)) == float(rate(31 * 109)) == pytest.approx(1e-8)


@pytest.mark.parametrize("method, spared", [("dtl", {"classifier/bias"}), ("fact_tk", set()), ("ssf", None)])
def test_what_decays(method, spared):
  own = recipe_of(method=method, task="dtd")
  built = methods.build(method, backbones.architecture("vit_tiny_test"))
  trainable, _ = jax.eval_shape(lambda rng, params: built.init(rng, params, 5), jax.random.key(0),
                                backbones.abstract_params(backbones.architecture("vit_tiny_test")))
  factors = tree.flatten(tree.match(own.optim.decay, trainable, 1.0))
  spared = set(factors) - {"classifier/kernel"} if spared is None else spared
  assert {name for name, factor in factors.items() if not factor} == spared


def test_a_methods_own_values_come_before_its_protocols():
  own = recipe_of(method="full", rates="chosen")
  assert (own.optim.name, own.optim.eps, own.optim.warmup, own.duration) == ("adamw", 1e-6, "5 epochs", "100 epochs")
  assert recipe_of(method="linear", rates="chosen").optim.name == "sgd"


def test_images_of_few_shots_are_squashed_to_256_pixels_and_cut():
  found = experiment.parse(config("fewshot", method="dtl", task="oxford_pets", shots=1))[0]
  assert found.preprocessing == "crop=squash,crop_fraction=0.875,interpolation=bicubic"
  assert int(224 / Preprocessing(224).changed(found.preprocessing).crop_fraction) == 256


@pytest.mark.parametrize("backbone, family", [
    ("vit_b16.orig_in21k", "vit"), ("/data/swin/B_16.npz", "vit"), ("swin_b", "swin"), ("hf:timm/swin_base_x", "swin"),
    ("/w/Swin_Base_22k.pth", "swin"), ("resnet50_v2", "resnet"), ("bit_r50x1", "resnet"),
    ("clip_vit_b16.openai", "clip"), ("hf:openai/clip-vit-base-patch16", "clip"), ("/clip/B_16.npz", "vit")])
def test_a_backbones_name_says_its_family(backbone, family):
  assert recipes.family_of(backbone) == family


def test_swin_has_rates_of_its_own():
  rate = lambda **arguments: recipe_of(method="dtl", task="dtd", **arguments).optim.lr
  assert (rate(backbone="vit_b16"), rate(backbone="swin_b"), rate(backbone="vit_b16", family="swin")) == (
      3e-4, 1e-4, 1e-4)
  assert config("vtab", method="dtl", task="dtd", family="swin").options.rank == 4


def test_the_last_epoch_counts_when_tuning_too():
  assert recipe_of(method="linear", rates="chosen", phase="tune").select == "last"


def test_without_the_protocol_nothing_published_is_used():
  own = experiment.load(f"{CONFIGS / 'vtab.py'}:method=dtl_plus,task=dtd")
  assert own.optim.schedule == "cosine" and own.duration == "100 epochs" and own.options.kernel == 5


def test_grids_are_offered_where_a_paper_chooses():
  grid = lambda text: experiment.load_grid(f"{CONFIGS / 'vtab.py'}:{text}")
  assert set(grid("method=vpt_deep,protocol=paper,rates=chosen")) == {
      "optim.lr", "optim.weight_decay", "options.prompts"}
  assert grid("method=full,protocol=paper,rates=chosen")["optim.lr"] == [rate / 4 for rate in (
      0.005, 0.001, 0.0005, 0.0001)]
  assert grid("method=dtl,protocol=paper") == grid("method=linear") == {}


# --- What is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suite, arguments, message", [
    ("vtab", {"method": "dtl_plus_star"}, "dtl_plus_star has no published hyper-parameters for dtd of vtab on "
     "ViT-B/16; published there are dtl, dtl_plus, fact_tt"),
    ("vtab", {"method": "fact_tk", "backbone": "swin_b"}, "on Swin-B; published there are dtl, dtl_plus"),
    ("vtab", {"method": "dtl", "backbone": "resnet50"}, "on resnet; published there are none"),
    ("vtab", {"method": "linear"}, "its protocol chooses them on validation: sweep with the arguments rates=chosen"),
    ("vtab", {"method": "vpt_deep"}, "published are sun397, eurosat, dmlab; its protocol chooses"),
    ("vtab", {"method": "dtl", "rates": "chosen"}, "published are cifar100, .*; leave rates=chosen out"),
    ("fewshot", {"method": "dtl", "shots": 3}, "oxford_pets with 3 shots of fewshot .*; published are fgvc_aircraft/1"),
    ("fewshot", {"method": "ssf"}, "published there are dtl, dtl_plus, lora, adapter"),
    ("fewshot", {"method": "dtl", "task": "coop/dtd"}, "dtd with 16 shots of coop on ViT-B/16; published there are n"),
    ("imagenet", {"method": "dtl", "task": "pacs/sketch"}, "for sketch of pacs on ViT-B/16; published there are none"),
    ("vtab", {"protocol": "papers"}, "protocol is 'papers'; expected paper"),
    ("vtab", {"protocol": "", "family": "swin"}, "family, rates and base are for protocol=paper"),
    ("vtab", {"family": "resnet"}, "expected family vit, swin, clip, and rates")])
def test_what_is_not_published_is_an_error_that_names_what_is(suite, arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    config(suite, **arguments)
  assert "\n" not in str(error.value)


# --- A run ----------------------------------------------------------------------------------------------------------

def test_a_run_tells_its_recipe_and_what_it_cannot_say(tmp_path, tiny_weights, capsys, monkeypatch):
  asked = []
  fit = lambda weights, method, task, recipe, *, options, **_: asked.append((recipe, options)) or types.SimpleNamespace(
      adapter="adapter")
  monkeypatch.setattr(experiment, "fit", fit)
  write_images(tmp_path / "images", count=12)
  save_weights(tiny_weights, tmp_path / "tiny.safetensors")
  recipes._tell.cache_clear()
  text = f"task=dtd,method=dtl_plus,protocol=paper,backbone={tmp_path / 'tiny.safetensors'}"
  cli.main(["transferlab", "train", f"--workdir={tmp_path / 'run'}", f"--config={CONFIGS / 'vtab.py'}:{text}",
            f"--config.data=folder:{tmp_path / 'images'}", "--config.batch_size=8", "--config.options.kernel=3"])
  told = capsys.readouterr().err
  assert "recipe: duration 110 epochs, batch_size 8, optim.name adamw, optim.lr 0.0003, optim.schedule dtl" in told
  assert "drop_path 0.1" in told and "options.kernel 3" in told
  assert told.count("values are those of vtab/dtd on ViT-B/16") == 1
  assert told.count("heekhero/DTL @ bf6c51e): images are normalised by mean=0.5/0.5/0.5") == 1
  (recipe, options), = asked
  assert recipe.optim.decay == (("classifier/bias", 0.0),) and options["kernel"] == 3


def test_rows_of_the_ablation_are_table_5s():
  config = lambda text: experiment.load(f"{CONFIGS / 'dtl_ablation.py'}:{text}")
  rows = {row: config(f"row={row}") for row in ("identity", "dtl", "dtl_plus", "rank4", "rank1")}
  told = lambda config: (config.method, config.options.activation, config.options.rank)
  assert {row: told(config) for row, config in rows.items()} == {
      "identity": ("dtl", "identity", 2), "dtl": ("dtl", "swish", 2), "dtl_plus": ("dtl_plus", "swish", 2),
      "rank4": ("dtl_plus", "swish", 4), "rank1": ("dtl_plus", "swish", 1)}
  assert rows["dtl"].select == "last" and rows["dtl"].duration == "110 epochs"
  with pytest.raises(ValueError, match="row is 'rank3'; expected one of identity"):
    config("row=rank3")
