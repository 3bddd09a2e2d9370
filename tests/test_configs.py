"""Every file in configs/, with every method where it takes one: it loads, and its first training step runs on a tiny
backbone and fake data. A new file is tested without being named here. Unknown keys are errors naming the nearest."""
import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from transferlab import backbones, devices, experiment, methods, train
from transferlab.testing import made_up_ids

FOLDER = Path(__file__).resolve().parent.parent / "configs"


def files(folder=FOLDER) -> list[Path]:
  return sorted(path for path in Path(folder).glob("*.py") if not path.name.startswith("_"))


def load(path):
  """A config file as a module of its own."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def texts(path) -> list[str]:
  """The arguments to try: each registered method, or none if the file does not take a method."""
  module = load(path)
  try:
    module.get_config("method=linear")
  except ValueError as error:
    if "config argument" not in str(error):
      raise
    return [""]
  return [f"method={name}" for name in methods.METHODS]


def steps(path) -> list[str]:
  """The arguments whose first step is run: every method in one file; two and the file's own names in others, where only
  the recipe is left to try."""
  tried = ("", "lora", "linear", *getattr(load(path), "NAMES", {}))
  return [text for text in texts(path) if path.stem == "folder" or text.removeprefix("method=") in tried] + [
      f"method={name}" for name in tried if name and name not in methods.METHODS]


CASES = [(path, text) for path in files() for text in texts(path)]
STEPS = [(path, text) for path in files() for text in steps(path)]
named = lambda cases: [f"{path.stem}-{text}" for path, text in cases]


@pytest.mark.parametrize("path, text", CASES, ids=named(CASES))
def test_config_loads(path, text):
  config = load(path).get_config(text or None)
  if not config.data:
    with pytest.raises(ValueError, match="config.data is empty; give --config.data="):
      experiment.parse(config)
    config.data = "digits"
  found, options, recipe = experiment.parse(config)
  if text:
    name = text.removeprefix("method=")
    assert found.method == getattr(load(path), "NAMES", {}).get(name, (name,))[0]  # a paper's names come first
  assert set(options) == set(methods.options_of(found.method))
  assert recipe == train.Recipe(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)})


@pytest.mark.parametrize("path, text", STEPS, ids=named(STEPS))
def test_first_step_of_a_config(path, text, random_weights, tiny_spec, tiny_task):
  """The step of the whole recipe (its duration, schedule and augmentation), on a backbone and a batch that are tiny."""
  config = load(path).get_config(text or None)
  config.data = config.data or "digits"
  found, options, recipe = experiment.parse(config)
  weights = random_weights(dataclasses.replace(tiny_spec, depth=2))  # the fewest blocks for which methods have a middle
  if not methods.fits(found.method, weights.spec):
    weights, options = on_clip(random_weights, found.method, options)
  first_step(found.method, options, recipe, weights, tiny_task)


def on_clip(random_weights, method, options):
  """(weights of a tiny CLIP, the options with which a method is no deeper than it is)."""
  spec = dataclasses.replace(backbones.architecture("clip_tiny_test"), depth=2, context=40)  # CoOp has 16 tokens
  weights = random_weights(spec)._replace(tokenizer=lambda texts: made_up_ids(spec, texts))
  return weights, {**options, "depth": 2} if method == "maple" else options


@pytest.mark.parametrize("file, text", [("fewshot", "task=coop/imagenet,method=lfa"),
                                        ("domain_generalization", "task=pacs/sketch,method=zero_shot")])
def test_first_step_on_a_clip(file, text, random_weights, tiny_task):
  """Of published recipes: eight templates and the schedule of epochs; nothing to train."""
  config = load(FOLDER / f"{file}.py").get_config(f"{text},protocol=paper,backbone=clip")
  found, options, recipe = experiment.parse(config)
  weights, options = on_clip(random_weights, found.method, options)
  first_step(found.method, options, recipe, weights, tiny_task)


def first_step(name, options, recipe, weights, tiny_task):
  """Runs it, with at most 8 images of 16 px, and sees that it trains."""
  recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, 8), devices=1, workers=0)
  split = tiny_task.splits["train"]
  split = dataclasses.replace(split, domains=np.arange(len(split)) % 2)  # for recipes that want a batch of each domain
  task = dataclasses.replace(tiny_task, splits={"train": split})
  method = methods.build(name, weights.spec, **options)
  stage = train.Stage(method, weights, task, recipe, None, 0, True)
  if name == "zero_shot":
    assert stage.total == 0 and not jax.tree.leaves(stage.run.trainable)
    return
  batch = devices.put_batch(next(stage.loader), stage.mesh)
  before = [np.array(leaf) for leaf in jax.tree.leaves(stage.run.trainable)]
  run, metrics = stage.compile(batch)(stage.run, stage.frozen, batch)
  stage.loader.close()
  assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0 and int(run.nan_step) == -1
  if float(stage.rate(0)) > 0:
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(run.trainable), before))


def test_every_config_says_how_to_run_it():
  for path in files():
    assert f"transferlab train --config=configs/{path.name}" in load(path).__doc__, path.name


def test_a_new_file_is_found(tmp_path):
  start = "from transferlab.experiment import arguments, defaults\ndef get_config(text=None):\n"
  (tmp_path / "mine.py").write_text(f"{start}  return defaults(arguments(text, method='dtl').method, data='digits')\n")
  (tmp_path / "fixed.py").write_text(f"{start}  arguments(text, size=1)\n  return defaults('lora', data='digits')\n")
  (tmp_path / "_helper.py").write_text("")
  assert {path.name: texts(path) for path in files(tmp_path)} == {
      "fixed.py": [""], "mine.py": [f"method={name}" for name in methods.METHODS]}


# --- Mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    ({"batchsize": 8}, "config has no key 'batchsize'; nearest: batch_size"),
    ({"backbon": "x"}, "config has no key 'backbon'; nearest: backbone"),
    ({"rank": 4}, "options of the method go under options"),
    ({"optim": {"learning_rate": 1e-3}}, "config.optim has no key 'learning_rate'; nearest: "),
    ({"optim": {"lr": "fast"}}, "config.optim.lr is 'fast'; expected float"),
    ({"data": ""}, "config.data is empty"),
    ({"batch_size": 1.5}, "config.batch_size is 1.5; expected int")])
def test_unknown_keys_and_types_are_errors(change, message):
  with pytest.raises(ValueError) as error:
    experiment.parse({"data": "digits", **change})
  assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_options_are_errors(tiny_weights, tiny_task):
  _, options, recipe = experiment.parse({"data": "digits", "method": "lora", "options": {"rnak": 4}})
  with pytest.raises(ValueError, match="method 'lora' has no option 'rnak'; nearest: rank"):
    train.fit(tiny_weights, "lora", tiny_task, recipe, options=options, quiet=True)


def test_unknown_methods_and_arguments_are_errors():
  with pytest.raises(ValueError, match="method 'dtll' is unknown; nearest: dtl"):
    experiment.defaults("dtll")
  with pytest.raises(ValueError, match="config has no key 'seeds'; nearest: seed"):
    experiment.defaults("dtl", seeds=1)
  with pytest.raises(ValueError, match="config argument 'metod=dtl' is not understood; .*nearest: method"):
    experiment.arguments("metod=dtl", method="linear")
  with pytest.raises(ValueError, match="config argument 'dtl' is not understood; expected name=value"):
    experiment.arguments("dtl", method="linear")
  found = experiment.arguments("method=dtl,seed=3", method="linear", seed=0)
  assert (found.method, found.seed) == ("dtl", 3)


def test_a_config_holds_every_default_and_nothing_unknown():
  config = experiment.defaults("lora", data="digits")
  assert config.options.to_dict() == methods.options_of("lora")
  found, options, recipe = experiment.parse(config)
  assert recipe == train.Recipe() and found == experiment.Experiment(data="digits", method="lora")
  config.optim.lrr = 1.0  # a config file may, in its way; reading it does not let it pass
  with pytest.raises(ValueError, match="config.optim has no key 'lrr'; nearest: lr"):
    experiment.parse(config)
