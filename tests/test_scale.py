"""One run, whatever it runs on: one device, four, or two processes of two devices give the same trainable and count the
same; each process reads its own images; what lies on the disk is written once and read by all."""
import dataclasses
import functools
import json
from pathlib import Path

import hosts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import colours, recipe, write_images

from transferlab import (backbones, cost, data, devices, distributed, evaluate, features, methods, optim, serve, train,
                        tree)
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import Weights
from transferlab.method import Context, Read, forward
from transferlab.step import compile_step, make_step, start, to_inputs

SPEC = dataclasses.replace(backbones.architecture("vit_tiny_test"), depth=2)
SGD = optim.Optim("sgd", lr=0.05)
ROWS = 8  # of batches that are evaluated

# method, options, recipe: what could depend on the number of devices. Four devices do not divide batches of six; of the
# two in an epoch of "dropped" the second has one row, so that one of two processes has nothing but filling.
CASES = {
    "mixed": ("linear", {}, {"augmentation": "timm", "per_domain": True, "batch_size": 2, "class_weights": "balanced",
                             "micro_batch": -1}),
    "dropped": ("lora", {"rank": 2}, {"drop_path": 0.3, "batch_size": 6, "drop_last": False}),
    "cached": ("head2toe", {"fraction": 0.1, "target_size": 32, "sites": ("block_00/out", "pooled")}, {
        "augmentation": "flip", "drop_path": 0.3, "views": 2, "batch_size": 6, "micro_batch": 4}),
}
SIZES = (1, 3, 7, 10, 33)
READS = {"patch": Read("patch", "mean", lambda y, frozen: y.mean(axis=1))}


def task_of(case: str) -> data.Task:
  """Training images alone, 7 or 40, with domains where batches have some of each."""
  task = colours()
  split = task.splits["train"].select(range(7 if case == "dropped" else 40))
  domains = np.arange(40) % 5 % 3 if case == "mixed" else None
  return dataclasses.replace(task, splits={"train": dataclasses.replace(split, domains=domains)})


def weights_of(folder) -> Weights:
  with np.load(Path(folder) / "weights.npz") as file:
    params, head = tree.unflatten(dict(file)), {"kernel": np.eye(16, 4, dtype=np.float32), "bias": np.zeros(4)}
  return Weights(SPEC, params, head, Preprocessing(SPEC.image_size), "tiny", "random", "0" * 16)


def trained(folder, case: str, count: int) -> tuple[dict, dict]:
  """({leaf: array}, result) of a case trained on so many devices, 0 for all."""
  method, options, changes = CASES[case]
  if case == "cached" and count == 1:
    changes = {**changes, "micro_batch": 3}  # two parts of 6 rows, not of 8
  asked = recipe(**{"duration": "20 steps", "optim": SGD, **changes, "devices": count})
  kept = f"{folder}/features {count}" if asked.views else ""
  found = train.fit(weights_of(folder), method, task_of(case), asked, options=options, features=kept,
                    quiet=case != "mixed")
  return jax.tree.map(np.asarray, tree.flatten(found.trainable)), found.result


def images_of(size: int) -> data.Split:
  """Images [4, 4, 3] of three classes and two domains."""
  images = np.random.default_rng(size).integers(0, 256, (size, 4, 4, 3), np.uint8)
  split = data.arrays(images, np.arange(size) % 3, ["a", "b", "c"], {"test": range(size)}).splits["test"]
  return dataclasses.replace(split, domains=np.arange(size) % 2)


@functools.cache
def colour_logits():
  return jax.jit(lambda images, weight=None: images.astype(jnp.float32).mean((1, 2)) / 50)


def counted(size: int, count: int | None) -> dict:
  """How a split is evaluated on so many devices, and the members' logits that a choice is made from."""
  mesh = devices.make_mesh(count)
  make = functools.partial(data.eval_loader, images_of(size), Preprocessing(4), batch_size=ROWS)
  loader = make(own=devices.own_rows(mesh, ROWS))
  found = evaluate.evaluate(colour_logits(), loader, 3, mesh=mesh)
  members, labels = evaluate.collect_members(lambda images: {"all": colour_logits()(images)}, loader, mesh)
  return {"confusion": found.confusion.tolist(), "loss": found.loss, "domains": found.domains.tolist(),
          "members": members["all"].tolist(), "labels": labels.tolist()}


def check(folder, bad_images: str) -> dict:
  """What is known of a folder's images: how many are readable, and what is said of the others."""
  said, task = [], data.image_folder(Path(folder) / "images", val_fraction=0, test_fraction=0)
  try:
    found = train.readable(task, bad_images, said.append, True).splits["train"]
  except data.BadImage as error:
    return {"error": str(error)}
  return {"readable": found.hash(), "pixels": found.fingerprint(99), "said": said}


def judged(folder) -> dict:
  found = serve.evaluate(serve.load(None, weights_of(folder), class_names=colours().class_names), colours(), "all",
                         batch_size=6, quiet=True)
  return {"confusion": found.confusion.tolist(), "loss": found.loss}


def kept(folder, name: str) -> features.Cache:
  """A cache of the first activation, written by whoever comes."""
  cache = features.Cache(str(Path(folder) / name))
  features.write(cache, weights_of(folder), READS, colours().splits, batch_size=6, quiet=True)
  return cache


def in_each(folder: str) -> None:
  place, _ = distributed.hosts()
  found = {"counted": {size: counted(size, None) for size in SIZES}, "uneven": counted(10, 3), "judged": judged(folder),
           "skip": check(folder, "skip"), "error": check(folder, "error")}
  kept(folder, "together")
  with distributed.alone():
    kept(folder, "each alone")
  for case in CASES:
    arrays, found[case] = trained(folder, case, 0)
    np.savez(Path(folder) / f"{case} {place}.npz", **arrays)
  (Path(folder) / f"{place}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_weights):
  path = tmp_path_factory.mktemp("scale")
  np.savez(path / "weights.npz", **tree.flatten(random_weights(SPEC).params))
  images = write_images(path / "images", count=9)
  for name in ("ant/3", "cat/7"):
    (images / f"{name}.jpg").write_text("no image")
  return path


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
  """What each of two processes found."""
  ended = hosts.run(in_each, str(folder))
  assert [code for code, *_ in ended] == [0, 0], ended
  return [json.loads((folder / f"{place}.json").read_text()) for place in (0, 1)]


def close(found: dict, wanted: dict, tolerance=1e-6):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_not_depend_on_what_it_runs_on(folder, two, case, capsys):
  wanted, result = trained(folder, case, 1)
  assert "filled up" not in capsys.readouterr().err
  others = [(dict(np.load(folder / f"{case} {place}.npz")), two[place][case]) for place in (0, 1)]
  for arrays, found in [trained(folder, case, 4), *others]:
    close(arrays, wanted)
    assert found["devices"] == 4 and found["steps"] == result["steps"] == 20
  assert capsys.readouterr().err.count("batches of 6 are filled up to 8 rows for 4 devices: 25%") == (case == "mixed")


@pytest.mark.parametrize("size", SIZES)
def test_every_example_counts_once(two, size):
  wanted = counted(size, 1)
  assert np.sum(wanted["confusion"]) == size == np.sum(wanted["domains"], axis=0)[1]
  for found in (counted(size, 4), *(each["counted"][str(size)] for each in two)):
    close(found, wanted, 1e-5)
    assert found["confusion"] == wanted["confusion"] and found["labels"] == wanted["labels"]


def test_processes_may_have_unequal_shares_of_a_batch(two):
  for found in two:
    close(found["uneven"], counted(10, 1), 1e-5)


def test_a_classifier_is_evaluated_by_two_processes(folder, two):
  for found in two:
    close(found["judged"], judged(folder))


def test_unreadable_images_are_the_same_for_all(folder, two):
  skipped, error = check(folder, "skip"), check(folder, "error")
  assert "ant/3" in skipped["said"][0] and "cat/7" in skipped["said"][1] and "2 of 27" in error["error"]
  for each in two:
    assert (each["skip"], each["error"]) == (skipped, error)


def test_activations_are_those_of_one_process(folder, two):
  cache = kept(folder, "alone")
  open_ = lambda cache, name: features.Features(cache, weights_of(folder), READS, name, colours().splits[name])
  for name, split in colours().splits.items():
    rows = np.arange(len(split))
    for other in ("together", "each alone"):
      found = open_(dataclasses.replace(cache, folder=str(folder / other)), name)
      close(found.take(rows), open_(cache, name).take(rows))


# In one process

def test_the_step_is_pmap_of_a_step_of_each_device(folder):
  """The loss of the whole batch is a mean over devices of shares that its weights give; so are its gradients."""
  weights, method = weights_of(folder), methods.build("linear", SPEC)
  trainable, state = method.init(jax.random.key(0), weights.params, 4)
  backbone, optimiser = backbones.build(SPEC), optim.make_optimiser(SGD, lambda step: 0.05, trainable)
  batch = {"image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8),
           "label": np.arange(8, dtype=np.int32) % 4, "weight": np.float32([1, 1, 1, 1, 1, 0, 0, 0])}

  def of_device(trainable, opt_state, batch):
    total = jax.lax.pmean(batch["weight"].sum(), "devices")
    def loss(trainable):
      own = {**batch, "target": jax.nn.one_hot(batch["label"], 4)}
      context = Context(own, state, weights.params, train=True)
      outputs = forward(method, backbone, trainable, to_inputs(batch["image"], weights.preprocessing), context)
      return method.loss(trainable, outputs, context) * batch["weight"].sum() / total
    gradient = jax.lax.pmean(jax.grad(loss)(trainable), "devices")
    updates, opt_state = optimiser.update(gradient, opt_state, trainable)
    return jax.tree.map(jnp.add, trainable, updates), opt_state

  mapped = jax.pmap(of_device, "devices", devices=jax.devices()[:4])
  copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), (trainable, optimiser.init(trainable)))
  parts = jax.tree.map(lambda rows: rows.reshape(4, 2, *rows.shape[1:]), batch)
  mesh = devices.make_mesh(4)
  run, frozen = devices.replicate((start(trainable, state, optimiser), weights.params), mesh)
  batch = devices.put_batch(batch, mesh)
  step = compile_step(make_step(method, backbone, optimiser, weights.preprocessing, 4), run, frozen, batch)
  for _ in range(3):
    run, _ = step(run, frozen, batch)
    copies = mapped(*copies, parts)
  close(tree.flatten(jax.tree.map(lambda leaf: leaf[3], copies[0])), tree.flatten(run.trainable))


def test_what_is_said_of_padding():
  mesh = devices.make_mesh(4)
  assert not devices.padding(12, mesh)
  assert devices.padding(10, mesh) == ("batches of 10 are filled up to 12 rows for 4 devices: 17% of the work is "
                                       "padding; a multiple of 4 wastes none")
  with pytest.raises(ValueError, match="micro_batch 5 does not cut a batch of 12 on 4 devices .* valid: 12, 4"):
    cost.parts(12, 5, 4)
