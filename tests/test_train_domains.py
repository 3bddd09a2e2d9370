"""Training and evaluation over domains: a batch of each, scores of each, the choice by their mean; masked test sets."""
import dataclasses

import numpy as np
import pytest
from engine import colours, contents, metrics, recipe
from scipy.special import log_softmax

from transferlab import data, evaluate, methods, serve, stage, train
from transferlab.data import DataError
from transferlab.train import fit

NAMES = ("photo", "sketch", "map", "logo")


def of_domains(validate=True) -> data.Task:
  """The easy task in four domains: the rows of train and val go round three of them, test is the fourth's."""
  task = colours()
  ids = {"train": np.arange(40) % 3, "val": np.array([0] * 6 + [1] * 3 + [2]), "test": np.full(14, 3)}
  splits = {name: dataclasses.replace(split, domains=ids[name]) for name, split in task.splits.items()
            if validate or name != "val"}
  return dataclasses.replace(task, splits=splits, domain_names=NAMES)


PER_DOMAIN = recipe(batch_size=4, per_domain=True, duration="2 epochs", evaluate_every="2 steps", augmentation="flip",
                    checkpoint_every="3 steps")


@pytest.fixture(scope="module")
def ran(tiny_weights, tmp_path_factory):
  """The folder of a whole run, and what `fit` returned."""
  folder = tmp_path_factory.mktemp("ran")
  return folder, fit(tiny_weights, "linear", of_domains(), PER_DOMAIN, workdir=folder, quiet=True)


def test_a_step_takes_a_batch_of_every_domain(ran):
  result = ran[1].result
  assert result["steps"] == 8  # an epoch is 40 images, 12 a step
  assert result["recipe"]["per_domain"] is True


def test_an_interrupted_run_of_every_domain_ends_as_the_whole_one(ran, tiny_weights, tmp_path, monkeypatch):
  validate, calls = train.Stage.validate, []
  def stop(self, done, progress):
    if done == 6 and not calls:
      calls.append(done)
      raise KeyboardInterrupt
    validate(self, done, progress)
  monkeypatch.setattr(train.Stage, "validate", stop)
  with pytest.raises(KeyboardInterrupt):
    fit(tiny_weights, "linear", of_domains(), PER_DOMAIN, workdir=tmp_path, quiet=True)
  resumed = fit(tiny_weights, "linear", of_domains(), PER_DOMAIN, workdir=tmp_path, quiet=True)
  assert calls and resumed.result["test"] == ran[1].result["test"]
  assert metrics(tmp_path) == metrics(ran[0])
  assert contents(tmp_path)["adapter.safetensors"] == contents(ran[0])["adapter.safetensors"]


def test_devices_and_micro_batches_change_no_result(ran, tiny_weights):
  """12 rows a step: in two parts of 6, two rows of each on each of 3 devices."""
  run = fit(tiny_weights, "linear", of_domains(), dataclasses.replace(PER_DOMAIN, devices=3, micro_batch=6), quiet=True)
  assert run.result["devices"] == 3
  assert run.result["test"]["loss"] == pytest.approx(ran[1].result["test"]["loss"], rel=1e-4)
  with pytest.raises(ValueError, match="micro_batch 5 does not cut a batch of 12"):
    fit(tiny_weights, "linear", of_domains(), dataclasses.replace(PER_DOMAIN, micro_batch=5), quiet=True)


def test_durations_in_examples_count_all_domains(tiny_weights):
  asked = dataclasses.replace(PER_DOMAIN, duration="60 examples")
  assert train.Stage(methods.build("linear", tiny_weights.spec), tiny_weights, of_domains(), asked, None, 0,
                     quiet=True).total == 5


def test_scores_come_by_domain_with_their_mean(ran):
  val, test = ran[1].result["val"], ran[1].result["test"]
  assert list(val["domains"]) == list(NAMES[:3])
  assert val["mean_over_domains"] == pytest.approx(np.mean(list(val["domains"].values())))
  assert val["accuracy"] == pytest.approx(np.dot(list(val["domains"].values()), [6, 3, 1]) / 10)
  assert "domains" not in test and "mean_over_domains" not in test  # one domain


def test_the_step_is_chosen_by_the_mean_over_domains(tiny_weights, monkeypatch):
  """Pooled accuracy would choose step 4. The protocol says which it was."""
  def scripted():
    given = iter([(0.5, 0.9, 1.0), (0.9, 0.5, 1.0), (0.6, 0.9, 0.5), (0.1, 0.1, 1.0), (0.1, 0.1, 1.0)])
    def found(*_):
      accuracy, mean, loss = next(given)
      return {"accuracy": accuracy, "mean_over_domains": mean, "loss": loss, "mean_per_class": 0.0, "examples": 1}
    monkeypatch.setattr(stage, "scores", found)
  chosen = {}
  for per_domain in (True, False):
    scripted()
    asked = dataclasses.replace(PER_DOMAIN, per_domain=per_domain, duration="8 steps")
    result = fit(tiny_weights, "linear", of_domains(), asked, quiet=True).result
    chosen[per_domain] = result["selected_step"], result["protocol"]
  assert chosen == {True: (6, "best on val, mean over domains, test once"), False: (4, "best on val, test once")}


def test_without_validation_or_with_one_domain_in_it_nothing_is_averaged(tiny_weights):
  asked = dataclasses.replace(PER_DOMAIN, duration="1 steps")
  result = fit(tiny_weights, "linear", of_domains(validate=False), asked, quiet=True).result
  assert result["val"] is None and result["protocol"] == "last, test once"
  task = of_domains()
  val = dataclasses.replace(task.splits["val"], domains=np.zeros(10, int))
  task = dataclasses.replace(task, splits={**task.splits, "val": val})
  assert fit(tiny_weights, "linear", task, asked, quiet=True).result["protocol"] == "best on val, test once"


def test_data_without_domains_is_an_error_before_training(tiny_weights):
  with pytest.raises(DataError, match="split 'train' has no domains"):
    fit(tiny_weights, "linear", colours(), PER_DOMAIN, quiet=True)


# Evaluation

class Loader:
  """Two batches of given labels and domains, the last row only filling."""

  def __init__(self, labels, domains):
    reader = data.split  # any picklable thing; no image is read
    self.split = data.Split("test", tuple(map(str, range(len(labels)))), np.array(labels), reader, np.array(domains))
    self.batches = []
    for rows in (slice(0, 3), slice(3, 6)):
      filled = lambda x, rows=rows: np.pad(np.array(x[rows]), (0, 3 - len(x[rows])))
      weight = filled(np.ones(len(labels), np.float32))
      self.batches.append({"image": filled(np.arange(len(labels)))[:, None], "label": filled(labels), "weight": weight,
                           "domain": filled(domains)})

  def __len__(self):
    return 2

  def __iter__(self):
    return iter(self.batches)


LOGITS = np.array([[9, 1, 0, 2], [3, 1, 2, 0], [0, 1, 8, 3], [7, 2, 5, 4], [1, 0, 3, 5]], np.float32)
LABELS, DOMAINS = [1, 2, 2, 3, 3], [0, 0, 2, 2, 2]


def count(among=()):
  found = lambda images, weight: LOGITS[np.asarray(images)[:, 0]]
  return evaluate.evaluate(found, Loader(LABELS, DOMAINS), 4, among=among)


def test_a_masked_evaluation_is_one_of_the_columns_that_are_left():
  whole, masked = count(), count((1, 2, 3))
  assert whole.accuracy == pytest.approx(2 / 5)  # rows 2 and 4
  left = LOGITS[:, 1:]
  assert masked.accuracy == np.mean(left.argmax(1) + 1 == LABELS) == pytest.approx(3 / 5)
  expected = -log_softmax(left, axis=1)[np.arange(5), np.array(LABELS) - 1].mean()
  assert masked.loss == pytest.approx(expected, rel=1e-5) and masked.loss < whole.loss
  assert masked.confusion[:, 0].sum() == 0


def test_domains_are_counted_without_the_filling():
  found = count()
  assert found.domains.tolist() == [[0, 2], [0, 0], [2, 3]] and found.per_domain == {0: 0.0, 2: pytest.approx(2 / 3)}
  both = found.plus(evaluate.Evaluation(found.confusion, found.loss)).plus(
      evaluate.Evaluation(found.confusion, found.loss, np.array([[1, 1], [0, 4], [0, 0], [2, 2]])))
  assert both.domains.tolist() == [[1, 3], [0, 4], [2, 3], [2, 2]]
  assert stage.scores(found, ("a", "b"))["domains"] == {"a": 0.0, "2": pytest.approx(2 / 3)}


def masked() -> data.Task:
  """The easy task, tested on classes 1 and 3 alone."""
  task = colours()
  test = task.splits["test"]
  test = test.select(np.flatnonzero(test.labels % 2 == 1))
  return dataclasses.replace(task, splits={**task.splits, "test": test}, protocol="masked", test_classes=(1, 3))


def test_a_task_with_test_classes_is_tested_among_them_and_validated_among_all(tiny_weights, tmp_path):
  task, asked = masked(), recipe(duration="1 steps")
  run = fit(tiny_weights, "linear", task, asked, workdir=tmp_path, quiet=True)
  plain = fit(tiny_weights, "linear", dataclasses.replace(task, test_classes=()), asked, quiet=True)
  assert run.result["test"]["among"] == 2 and "among" not in run.result["val"] and "among" not in plain.result["test"]
  assert run.result["val"] == plain.result["val"] and run.result["test"]["loss"] < plain.result["test"]["loss"]
  classifier = serve.load(run.adapter, tiny_weights)
  served = serve.evaluate(classifier, task, quiet=True)
  assert served.accuracy == run.result["test"]["accuracy"]
  assert served.loss == pytest.approx(run.result["test"]["loss"], rel=1e-5) and not served.confusion[:, [0, 2]].any()
  assert serve.evaluate(classifier, task, "val", quiet=True).loss == pytest.approx(run.result["val"]["loss"], rel=1e-5)
  everything = serve.evaluate(classifier, task, "all", quiet=True)
  assert everything.confusion.sum() == 40 + 10 + 7


def test_masking_follows_the_classes_of_a_wider_head(tiny_weights, tmp_path):
  """A head whose classes stand in another order: masking goes by name."""
  task = masked()
  order = ("blue", "grey", "green", "red")
  run = fit(tiny_weights, "linear", task.relabel(order), recipe(duration="1 steps"), workdir=tmp_path, quiet=True)
  served = serve.evaluate(serve.load(run.adapter, tiny_weights), task, quiet=True)
  assert served.loss == pytest.approx(run.result["test"]["loss"], rel=1e-5)
  assert not served.confusion[:, [1, 2]].any()
