"""`fit`: it learns, selects on validation, opens test once, and leaves what it promises; the step under it."""
import dataclasses
import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import colours, files, metrics, recipe, write_images
from rich.console import Console
from sklearn import metrics as oracle

from transferlab import backbones, cost, data, devices, methods, progress, stage, train, tree
from transferlab.backbones.weights import weights_hash
from transferlab.checkpoint import load_adapter
from transferlab.evaluate import evaluate
from transferlab.optim import Optim, make_optimiser
from transferlab.step import compile_step, make_step, start, to_inputs
from transferlab.stage import NotFinite
from transferlab.train import Recipe, fit

SGD = Optim(name="sgd", lr=0.1, schedule="constant", momentum=0.0, weight_decay=0.0)
LEARNS = recipe(duration="8 epochs", optim=Optim(lr=2e-2), checkpoint_every="2 epochs")


@pytest.fixture(scope="module")
def ran(tiny_weights, tmp_path_factory):
  """(workdir, Fit) of one run of DTL that the tests below look at."""
  workdir = tmp_path_factory.mktemp("runs") / "dtl"
  return workdir, fit(tiny_weights, "dtl", colours(), LEARNS, options={"rank": 4}, workdir=workdir, quiet=True)


def test_it_learns(ran):
  rows = [row["loss"] for row in metrics(ran[0]) if "loss" in row]
  assert len(rows) == 40
  assert np.mean(rows[-5:]) < 0.7 * np.mean(rows[:5])
  assert ran[1].result["test"]["accuracy"] > 0.9  # chance is 0.25


def test_the_backbone_is_left_alone(ran, tiny_weights):
  assert weights_hash(tiny_weights.params, tiny_weights.spec) == tiny_weights.hash


def test_what_a_run_leaves(ran, tiny_weights):
  workdir, run, task = *ran, colours()
  config, result = (json.loads((workdir / name).read_text()) for name in ("config.json", "result.json"))
  assert config["recipe"]["duration"] == "8 epochs" and config["options"]["rank"] == 4
  assert config["options"]["first_write"] == 2  # resolved, not the None that was asked for
  assert {f.name for f in (workdir / "checkpoints" / "stage_0").iterdir()} == {"30", "40"}
  rows = metrics(workdir)
  assert [row["step"] for row in rows if "val" in row] == [5, 10, 15, 20, 25, 30, 35, 40]
  assert all({"step", "loss", "grad_norm", "lr", "stage"} == row.keys() for row in rows if "loss" in row)
  assert result == json.loads(json.dumps(run.result))
  assert result["backbone_hash"] == tiny_weights.hash and result["split_hash"] == task.split_hash()
  assert result["preprocessing"]["mean"] == [0.5, 0.5, 0.5] and result["image_size"] == 16
  assert result["pixels"] == task.splits["train"].fingerprint()
  assert result["recipe"]["seed"] == 0 and result["protocol"] == "best on val, test once"
  assert result["examples"] == {"train": 40, "val": 10, "test": 14} == {k: len(v) for k, v in task.splits.items()}
  assert result["test"]["examples"] == 14 and result["val"]["examples"] == 10
  assert result["steps"] == 40 and result["selected_step"] in range(5, 41, 5)
  assert result["trainable"] == result["trainable_without_classifier"] + 17 * 4
  assert result["versions"].keys() >= {"transferlab", "jax", "flax", "optax", "numpy", "pillow",
                                       "tensorflow-datasets"}
  also = ("seconds", "train_peak_bytes", "train_flops", "device", "devices", "dtype", "config_hash", "class_names")
  assert all(result[field] for field in also)


def test_the_adapter_is_the_fit(ran):
  workdir, run = ran
  adapter = load_adapter(run.adapter)
  assert run.adapter == workdir / "adapter.safetensors" and adapter.class_names == ("grey", "red", "green", "blue")
  found, kept = tree.flatten(adapter.trainable), tree.flatten(run.trainable)
  assert found.keys() == kept.keys() and all(np.array_equal(found[name], kept[name]) for name in found)
  assert adapter.header["test"] == run.result["test"] and adapter.header["task"] == "colours"


def test_tensorboard_where_installed(ran):
  pytest.importorskip("tensorboardX")
  assert any((ran[0] / "tensorboard").iterdir())


def test_a_method_object_in_memory(ran, tiny_weights, tmp_path, monkeypatch):
  """Without a workdir nothing is written and the numbers are the same; step and prediction are traced once each."""
  traces = []
  method = methods.build("dtl", tiny_weights.spec, rank=4)
  def readout(*args):
    traces.append(args[-1].train)
    return method.readout(*args)
  monkeypatch.chdir(tmp_path)
  run = fit(tiny_weights, method._replace(readout=readout), colours(), LEARNS, quiet=True)
  assert {**run.result, "seconds": 0} == {**ran[1].result, "seconds": 0}
  assert run.adapter is None and not files(tmp_path)
  assert sorted(traces) == [False, True]


# Selection

def scripted(monkeypatch, *values):
  """Validation gives these (accuracy, loss) in turn."""
  given = iter(values)
  found = lambda *_: dict(zip(("accuracy", "loss"), next(given)), mean_per_class=0.0, examples=1)
  monkeypatch.setattr(stage, "scores", found)


def test_best_is_the_step_it_says(tiny_weights, tiny_task, monkeypatch):
  """Of equal accuracies the lower loss wins, and the parameters are those of that step, not of the last."""
  constant = Optim(name="sgd", lr=0.1, schedule="constant")
  asked = recipe(duration="5 steps", optim=constant, evaluate_every="1 steps")
  scripted(monkeypatch, (0.5, 0.1), (0.8, 0.5), (0.8, 0.4), (0.8, 0.4), (0.7, 0.1), (0.3, 9.0))
  best = fit(tiny_weights, "linear", tiny_task, asked, quiet=True)
  assert best.result["selected_step"] == 3 and best.result["val"]["loss"] == 0.4
  scripted(monkeypatch, *[(0.5, 0.5)] * 9)
  asked = dataclasses.replace(asked, duration="3 steps", select="last")
  last = fit(tiny_weights, "linear", tiny_task, asked, quiet=True)
  assert last.result["selected_step"] == 3 and last.result["protocol"] == "last on val, test once"
  for a, b in zip(jax.tree.leaves(best.trainable), jax.tree.leaves(last.trainable)):
    assert np.array_equal(a, b)


def test_without_validation_the_last_step_counts(tiny_weights, tiny_task):
  task = dataclasses.replace(tiny_task, splits={k: v for k, v in tiny_task.splits.items() if k != "val"})
  result = fit(tiny_weights, "linear", task, recipe(), quiet=True).result
  assert result["val"] is None and result["selected_step"] == 15 and result["protocol"] == "last, test once"
  task = dataclasses.replace(task, splits={"train": task.splits["train"]})
  assert fit(tiny_weights, "linear", task, recipe(duration="1 steps"), quiet=True).result["test"] is None


def test_test_is_opened_once_and_after_selection(tiny_weights, tiny_task, monkeypatch):
  events, test = [], tiny_task.splits["test"]
  def read(row):
    events.append(row)
    return test.read(row)
  sealed = dataclasses.replace(tiny_task, splits={**tiny_task.splits, "test": dataclasses.replace(test, read=read)})
  choose = train.Stage.choose
  def chosen(stage):
    assert set(stage.task.splits) == {"train", "val"}  # selection has no way to the test split
    choose(stage)
    events.append("chosen")
  monkeypatch.setattr(train.Stage, "choose", chosen)
  fit(tiny_weights, "linear", sealed, recipe(), quiet=True)
  assert events[0] == "chosen" and sorted(events[1:]) == list(range(14))


# Evaluation

@pytest.mark.parametrize("device_count", [1, 4])
@pytest.mark.parametrize("split, batch_size", [("test", 4), ("test", 14), ("val", 32)])
def test_evaluation_counts_the_last_partial_batch(tiny_task, tiny_weights, split, batch_size, device_count):
  rng = np.random.default_rng(0)
  project = rng.normal(size=(16 * 16 * 3, 4)).astype(np.float32) / 5000
  logits_of = jax.jit(lambda images, weight=None: images.reshape(len(images), -1).astype(jnp.float32) @ project)
  split = tiny_task.splits[split]
  loader = data.eval_loader(split, tiny_weights.preprocessing, batch_size=batch_size)
  found = evaluate(logits_of, loader, 4, mesh=devices.make_mesh(device_count))
  logits = np.asarray(logits_of(np.stack([split.read(i) for i in range(len(split))])))
  predicted = logits.argmax(-1)
  assert np.array_equal(found.confusion, oracle.confusion_matrix(split.labels, predicted, labels=range(4)))
  assert found.accuracy == pytest.approx(oracle.accuracy_score(split.labels, predicted))
  assert found.mean_per_class == pytest.approx(oracle.balanced_accuracy_score(split.labels, predicted))
  assert np.allclose(found.per_class, oracle.recall_score(split.labels, predicted, average=None))
  probabilities = np.asarray(jax.nn.softmax(logits.astype(np.float64)))
  assert found.loss == pytest.approx(oracle.log_loss(split.labels, probabilities, labels=range(4)), rel=1e-5)


# The step

class Steps:
  """One step of plain SGD with rate 1 of a linear probe, so that what changed is the gradient."""

  def __init__(self, weights, device_count=1, **how):
    self.weights, self.mesh = weights, devices.make_mesh(device_count)
    self.method, self.backbone = methods.build("linear", weights.spec), backbones.build(weights.spec)
    optimiser = make_optimiser(dataclasses.replace(SGD, lr=1.0), lambda step: 1.0, self.first())
    self.step = make_step(self.method, self.backbone, optimiser, weights.preprocessing, 4, **how)
    self.begin = lambda: devices.replicate(start(jax.tree.map(jnp.array, self.first()), {}, optimiser), self.mesh)
    self.frozen = devices.replicate(jax.tree.map(jnp.asarray, weights.params), self.mesh)

  @staticmethod
  def first():
    rng = np.random.default_rng(1)
    return {"classifier": {"kernel": rng.normal(size=(16, 4)).astype(np.float32), "bias": np.zeros(4, np.float32)}}

  def gradient(self, batch):
    batch = devices.put_batch(batch, self.mesh)
    run = self.begin()
    with warnings.catch_warnings():
      warnings.simplefilter("error", UserWarning)  # donated arrays that no result can take: the backbone
      compiled = compile_step(self.step, run, self.frozen, batch)
    with jax.transfer_guard("disallow"):  # the host neither sends nor fetches anything in a step
      after, values = compiled(run, self.frozen, batch)
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), self.first(), after.trainable)["classifier"]
    return float(values["loss"]), change

  def by_hand(self, batch, targets, weight):
    """The same in numpy: softmax minus target, weighted, times features."""
    inputs = to_inputs(jnp.asarray(batch["image"]), self.weights.preprocessing)
    features, _ = jax.jit(lambda p, x: self.backbone.apply(p, x))(self.weights.params, inputs)
    features, head = np.asarray(features, np.float64), self.first()["classifier"]
    logits = features @ head["kernel"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    share = weight / weight.sum()
    slope = share[:, None] * (np.exp(log_p) - targets)
    return -(share[:, None] * targets * log_p).sum(), {"kernel": features.T @ slope, "bias": slope.sum(0)}


def batch_of(rows=6, padding=0, soft=False, seed=0):
  rng = np.random.default_rng(seed)
  batch = {"image": rng.integers(0, 256, (rows + padding, 16, 16, 3), np.uint8),
           "label": rng.integers(0, 4, rows + padding).astype(np.int32),
           "weight": np.array([1] * rows + [0] * padding, np.float32)}
  if soft:
    batch["soft_label"] = rng.dirichlet(np.ones(4), rows + padding).astype(np.float32)
  return batch


def assert_close(found, wanted, tolerance=1e-6):
  assert found[0] == pytest.approx(wanted[0], abs=2e-6, rel=tolerance)
  for name in ("kernel", "bias"):
    np.testing.assert_allclose(found[1][name], wanted[1][name], atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_and_padding_by_hand(tiny_weights, soft):
  """Mixed examples count by the mean weight of what was mixed."""
  weights, batch = np.array([0.5, 1.0, 3.0, 2.0], np.float32), batch_of(6, padding=2, soft=soft)
  targets = batch.get("soft_label", np.eye(4)[batch["label"]])
  steps = Steps(tiny_weights, class_weights=weights)
  assert_close(steps.gradient(batch), steps.by_hand(batch, targets, batch["weight"] * (targets @ weights)), 2e-6)


def test_micro_batches_and_padding_and_devices_agree(tiny_weights):
  """Of 6 images: 4 devices do not divide them, parts differ in weight, and one part is padding alone."""
  batch = batch_of(6)
  padded = {k: np.concatenate([v, np.repeat(v[:1], 2, 0)]) for k, v in batch.items()}
  padded["weight"][6:] = 0
  wanted = Steps(tiny_weights).gradient(batch)
  assert_close(Steps(tiny_weights).gradient(padded), wanted)
  assert_close(Steps(tiny_weights, micro_batches=8).gradient(padded), wanted)
  assert_close(Steps(tiny_weights, micro_batches=3).gradient(batch), wanted)
  if jax.device_count() >= 4:
    assert_close(Steps(tiny_weights, 4).gradient(batch), wanted)
    assert_close(Steps(tiny_weights, 4, micro_batches=2).gradient(batch), wanted)


def test_runs_on_one_and_four_devices_agree(tiny_weights, tiny_task):
  """Batches of 6, which 4 devices do not divide, the last of an epoch partial."""
  if jax.device_count() < 4:
    pytest.skip("needs 4 devices")
  asked = recipe(duration="2 epochs", batch_size=6, drop_last=False, optim=SGD)
  on = lambda count: fit(tiny_weights, "linear", tiny_task, dataclasses.replace(asked, devices=count), quiet=True)
  one, four = on(1), on(4)
  assert one.result["steps"] == four.result["steps"] == 14 and four.result["devices"] == 4
  for a, b in zip(jax.tree.leaves(one.trainable), jax.tree.leaves(four.trainable)):
    np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)
  assert one.result["test"]["accuracy"] == four.result["test"]["accuracy"]


def test_the_number_of_the_first_step_that_is_not_finite_stays(tiny_weights):
  steps = Steps(tiny_weights)
  batch = devices.put_batch(batch_of(), steps.mesh)
  run = steps.begin()
  compiled = compile_step(steps.step, run, steps.frozen, batch)
  run, _ = compiled(run, steps.frozen, batch)
  assert int(run.nan_step) == -1
  run = run._replace(trainable=jax.tree.map(lambda x: x * jnp.nan, run.trainable))
  for _ in range(2):
    run, _ = compiled(run, steps.frozen, batch)
  assert int(run.nan_step) == 2 and int(run.step) == 3


# Recipes

@pytest.mark.parametrize("changes, method", [
    (dict(dtype="bfloat16", remat=True, drop_path=0.2, label_smoothing=0.1), "dtl"),
    (dict(micro_batch=2, class_weights="balanced"), "linear"), (dict(micro_batch=-1), "linear")])
def test_other_ways_to_train(tiny_weights, tiny_task, changes, method):
  run = fit(tiny_weights, method, tiny_task, recipe(duration="2 steps", **changes), quiet=True)
  assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.trainable))
  assert run.result["dtype"] == changes.get("dtype", "float32")


@pytest.mark.parametrize("name", ["domainbed", "timm"])  # hard labels and bytes, soft labels and floats
def test_augmentation_presets(tiny_weights, tiny_task, name):
  fit(tiny_weights, "linear", tiny_task, recipe(duration="2 steps", augmentation=name, micro_batch=4), quiet=True)


@pytest.mark.parametrize("changes, says", [
    (dict(batch_size=0), "batch_size is 0"), (dict(micro_batch=-2), "micro_batch is -2"), (dict(seed=-1), "seed is -1"),
    (dict(drop_path=1.0), "drop_path is 1.0"), (dict(label_smoothing=-0.1), "label_smoothing"),
    (dict(dtype="half"), "dtype"), (dict(select="test"), "expected one of best, last"),
    (dict(duration="20"), "expected a number and a unit"), (dict(duration="-1 epochs"), "unit"),
    (dict(duration="0 epochs"), "expected more than 0"), (dict(duration="5 percent"), "percents are of the whole run"),
    (dict(log_every="2 parsecs"), "log_every is '2 parsecs'"),
    (dict(augmentation="flipp"), "did you mean 'flip'")])
def test_a_recipe_that_makes_no_sense(changes, says):
  with pytest.raises(ValueError, match=says):
    Recipe(**changes)


@pytest.mark.parametrize("changes", [dict(lr=-1.0), dict(lr=0.0), dict(lr=float("nan")), dict(schedule="cosin"),
                                     dict(name="adamax"), dict(weight_decay=-1.0), dict(clip=-1.0)])
def test_an_optimiser_that_makes_no_sense(changes):
  with pytest.raises(ValueError, match="expected"):
    Optim(**changes)


def test_micro_batch_that_fits(monkeypatch):
  class Compiled:
    def __init__(self, parts):
      self.parts = parts
    def memory_analysis(self):
      size = 1000 + 100 * 12 // self.parts
      return type("M", (), dict(argument_size_in_bytes=1000, temp_size_in_bytes=size - 1000, output_size_in_bytes=500,
                                alias_size_in_bytes=500))
  step, parts = cost.largest_that_fits(Compiled, 12, 1, limit=1450)
  assert parts == step.parts == 3 and cost.divisors(12, 4) == [12, 4]
  assert cost.largest_that_fits(Compiled, 12, 1, limit=10**6)[1] == 1
  with pytest.raises(ValueError, match="one example needs .* remat=True"):
    cost.largest_that_fits(Compiled, 12, 1, limit=900)
  with pytest.raises(ValueError, match="micro_batch 5 does not cut a batch of 12.*valid: 12, 6, 4"):
    cost.parts(12, 5)


def test_flops_of_micro_batches_are_those_of_the_batch(tiny_weights):
  batch, counted = batch_of(8), {}
  for parts in (1, 4):
    steps = Steps(tiny_weights, micro_batches=parts)
    counted[parts] = cost.of_step(compile_step(steps.step, steps.begin(), steps.frozen, batch), parts).train_flops
  assert counted[4] == pytest.approx(counted[1], rel=0.1)


# Stopping

def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(tiny_weights, tiny_task, tmp_path):
  """The rate is 0 in step 1 and absurd in step 2."""
  asked = recipe(optim=Optim(name="sgd", lr=1e30, warmup="2 steps"), checkpoint_every="1 steps")
  with pytest.raises(NotFinite, match="not finite at step 2; the last good checkpoint is of step 1"):
    fit(tiny_weights, "linear", tiny_task, asked, workdir=tmp_path / "run", quiet=True)
  left = files(tmp_path / "run")
  assert not {"adapter.safetensors", "result.json"} & left
  assert {name for name in left if name.count("/") == 2 and name.startswith("checkpoints")} == {"checkpoints/stage_0/1"}
  assert [row["step"] for row in metrics(tmp_path / "run")] == [1]


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_last_step_that_overflows_leaves_no_adapter(tiny_weights, tiny_task, tmp_path, lr):
  """Loss and gradient of the only step are fine; its result is not."""
  asked = recipe(duration="1 steps", optim=Optim(lr=lr))
  with pytest.raises(NotFinite, match="step 1; there is no checkpoint yet"):
    fit(tiny_weights, "linear", tiny_task, asked, workdir=tmp_path / "run", quiet=True)
  assert not [name for name in files(tmp_path / "run") if "adapter" in name or name.startswith("checkpoints/stage_0/")]


def test_images_that_cannot_be_read(tmp_path, tiny_weights, capsys):
  root = write_images(tmp_path / "images", count=6)
  (root / "ant" / "0.jpg").write_bytes(b"text")
  with pytest.raises(data.BadImage, match="1 of .* images of split .*0.jpg.*bad_images"):
    fit(tiny_weights, "linear", data.image_folder(root), recipe(batch_size=4), workdir=tmp_path / "run")
  assert not (tmp_path / "run").exists()
  skip = recipe(batch_size=4, duration="1 steps", bad_images="skip")
  run = fit(tiny_weights, "linear", data.image_folder(root), skip, workdir=tmp_path / "run")
  assert "skipped: " in capsys.readouterr().err and sum(run.result["examples"].values()) == 17
  assert "without 1 unreadable" in run.result["protocol"], "rows on fewer images are not averaged with others"
  for image in (root / "ant").iterdir():
    image.write_bytes(b"text")
  with pytest.raises(data.DataError, match="'ant'|split"):
    fit(tiny_weights, "linear", data.image_folder(root), skip, workdir=tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_finished_run_is_recognised_before_its_images_are_decoded(tmp_path, tiny_weights, monkeypatch):
  task = data.image_folder(write_images(tmp_path / "images"))
  asked = recipe(batch_size=4, duration="1 steps")
  first = fit(tiny_weights, "linear", task, asked, workdir=tmp_path / "run", quiet=True)
  monkeypatch.setattr(train, "readable", lambda *_: pytest.fail("decoded again"))
  again = fit(tiny_weights, "linear", task, asked, workdir=tmp_path / "run", quiet=True)
  assert again.result == first.result
  (tmp_path / "run" / "adapter.safetensors").unlink()  # as if killed before the end: it is run to the end once more
  monkeypatch.undo()
  assert fit(tiny_weights, "linear", task, asked, workdir=tmp_path / "run", quiet=True).adapter.exists()


# Progress

def test_progress_elsewhere_is_lines(capsys, monkeypatch):
  monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
  with progress.Progress(3, "training") as bar:
    bar.update(2, "loss 0.1")
    bar.update()
  assert capsys.readouterr().err.splitlines() == [f"training {n}/3 loss 0.1" for n in (2, 3)]
  monkeypatch.setattr(progress, "LINE_EVERY", 10.0)
  with progress.Progress(3, "training") as bar:
    bar.update(3)
  assert not capsys.readouterr().err  # short work says nothing


def test_progress_on_a_terminal_nests(monkeypatch):
  out = io.StringIO()
  monkeypatch.setattr(progress, "Console", lambda **_: Console(file=out, force_terminal=True, width=80))
  with progress.Progress(2, "training") as outer:
    outer.update(1, "loss 0.5")
    with progress.Progress(1, "evaluating") as inner:
      inner.update()
    outer.update()
  assert "training" in out.getvalue() and "evaluating" in out.getvalue()
  with progress.Progress(2, "training", quiet=True) as silent:
    silent.update()
  assert "\n\n\n" not in out.getvalue()
