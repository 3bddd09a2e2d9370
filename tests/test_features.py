"""The activation cache: training from it is training from images; its files survive a kill at any point and nothing
damaged, foreign or unwanted is ever read from it."""
import dataclasses
import json
import shutil
from collections import namedtuple

import jax
import numpy as np
import pytest
from engine import contents, metrics, recipe, write_images

from transferlab import backbones, cli, cost, data, features, methods, train
from transferlab import recipe as recipes
from transferlab.data.tasks import BadImage
from transferlab.features import cache as cache_lib
from transferlab.features import fill as fill_lib
from transferlab.features import store as store_lib
from transferlab.features.store import Column, Store
from transferlab.method import Read, record
from transferlab.train import fit

# Of the first block alone: what comes after it is in no program, which makes these quick to compile.
MEAN = Read("patch", "mean", lambda y, frozen: y.mean(axis=1))
READS = {"a": Read("block_00/out", "cls", lambda y, frozen: y[:, 0]), "b": MEAN}
FIRST, OF_PATCHES = {"site": "block_00/out"}, {"site": "patch", "tokens": "mean"}  # for `linear`


def sealed(task: data.Task) -> data.Task:
  """The task without its pixels, but for the first ones, which are part of the key."""
  def of(split):
    def read(row):
      assert row < 2, "an image was decoded"
      return split.read(row)
    return dataclasses.replace(split, read=read, verified=False)
  return dataclasses.replace(task, splits={name: of(split) for name, split in task.splits.items()})


@pytest.fixture(autouse=True, scope="module")
def small():
  """Shards of eight rows, and fingerprints of two images."""
  whole = data.Split.fingerprint
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store_lib, "SHARD", 8)
    patch.setattr(data.Split, "fingerprint", lambda split, count=2: whole(split, count))
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small, tiny_weights, tiny_task):
  """A cache of `READS` of the task that nobody changes."""
  path = tmp_path_factory.mktemp("cache")
  written(path, tiny_weights, tiny_task)
  return path


def written(folder, weights, task, asked=None, reads=READS, **how):
  """The cache of a recipe, with all splits of a task."""
  cache = features.of_recipe(folder, asked or recipe())
  features.write(cache, weights, reads, task.splits, device_count=1, quiet=True, **{"batch_size": 16, **how})
  return cache


# The files

COLUMNS = [Column("block_00/out", "tokens", (3, 2)), Column("pooled", "tokens", ())]


def values(start, stop, dtype=np.float32):
  """What row i of the columns is, whoever asks."""
  rows = np.arange(start, stop)
  return {COLUMNS[0].name: (rows[:, None, None] + np.arange(6).reshape(3, 2) / 8).astype(dtype),
          COLUMNS[1].name: (-rows).astype(dtype)}


def fill(store, columns=COLUMNS, stop=20, step=5):
  with store.writer(columns) as writer:
    while writer.done < stop:
      new = values(writer.done, min(stop, writer.done + step), store.dtype)
      writer.append({column.name: new[column.name] for column in writer.columns})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("killed_at", [0, 5, 8, 10, 16, 18])
def test_a_killed_writer_goes_on_at_its_last_shard(tmp_path, killed_at, dtype):
  whole, cut = Store(tmp_path / "whole", {"a": 1}, 20, dtype), Store(tmp_path / "cut", {"a": 1}, 20, dtype)
  fill(whole, step=5)
  with pytest.raises(KeyboardInterrupt), cut.writer(COLUMNS) as writer:
    for start in range(0, killed_at, 2):
      writer.append(values(start, start + 2, cut.dtype))
    raise KeyboardInterrupt
  assert Store(tmp_path / "cut", {"a": 1}, 20, dtype).missing(COLUMNS) == COLUMNS
  again = Store(tmp_path / "cut", {"a": 1}, 20, dtype)
  with again.writer(COLUMNS) as writer:
    assert writer.done == killed_at // 8 * 8
  fill(again, step=3)
  assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
  for column in COLUMNS:
    found = again.open(column)
    assert found.dtype == again.dtype and np.array_equal(found, values(0, 20, again.dtype)[column.name])
    again.check(column, found)


def test_columns_are_added_beside_those_that_stand(tmp_path):
  store = Store(tmp_path, {}, 20, "float32")
  fill(store, COLUMNS[:1])
  stands = contents(store.path)[f"{COLUMNS[0].name}.npy"]
  with Store(tmp_path, {}, 20, "float32").writer(COLUMNS) as writer:
    assert writer.columns == COLUMNS[1:] and writer.done == 0
  fill(Store(tmp_path, {}, 20, "float32"))
  assert not Store(tmp_path, {}, 20, "float32").missing(COLUMNS)
  assert contents(store.path)[f"{COLUMNS[0].name}.npy"] == stands


def test_of_two_columns_that_stopped_apart_both_become_whole(tmp_path):
  store = Store(tmp_path, {}, 20, "float32")
  fill(store, COLUMNS[:1], stop=16)
  fill(Store(tmp_path, {}, 20, "float32"))
  last = Store(tmp_path, {}, 20, "float32")
  for column in COLUMNS:
    last.check(column, last.open(column))


def test_what_another_process_wrote_meanwhile_is_not_written_again(tmp_path):
  early, late = (Store(tmp_path, {}, 20, "float32") for _ in range(2))
  fill(late)
  before = contents(late.path)
  with early.writer(COLUMNS) as writer:
    assert writer.columns == [] and writer.done == 20
  assert contents(late.path) == before


def short(file):
  file.write_bytes(file.read_bytes()[:-4])


def other_shape(file):
  np.save(file, np.zeros((20, 5), np.float32))


def other_type(file):
  np.save(file, np.zeros((20, 3, 2), np.float64))


def pickled(file):
  np.save(file, np.array([print] * 20), allow_pickle=True)


def no_array(file):
  file.write_text("no array")


def gone(file):
  file.unlink()


@pytest.mark.parametrize("damage", [short, other_shape, other_type, pickled, no_array, gone])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path, damage):
  store = Store(tmp_path, {}, 20, "float32")
  fill(store)
  damage(store.path / f"{COLUMNS[0].name}.npy")
  with pytest.raises(ValueError, match=r"damaged: found .*expected float32 \[20, 3, 2\]; delete .* and run again"):
    Store(tmp_path, {}, 20, "float32").open(COLUMNS[0])
  Store(tmp_path, {}, 20, "float32").open(COLUMNS[1])


def test_changed_bytes_are_noticed(tmp_path):
  store = Store(tmp_path, {}, 20, "float32")
  fill(store)
  file = store.path / f"{COLUMNS[1].name}.npy"
  file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
  with pytest.raises(ValueError, match="damaged: rows from 16 on have another checksum"):
    store.check(COLUMNS[1], store.open(COLUMNS[1]))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"of": {}}', '{"of": {}, "rows": 21, "shard": 8, "columns": {}}',
                                  '{"of": {"b": 1}, "rows": 20, "shard": 8, "columns": {}}',
                                  '{"of": {}, "rows": 20, "shard": 0, "columns": {}}',
                                  '{"of": {}, "rows": 20, "shard": 1.5, "columns": {}}',
                                  '{"of": {}, "rows": 20, "shard": 8, "columns": {"a": 3}}'])
def test_a_damaged_header_is_an_error_that_says_what_to_do(tmp_path, text):
  store = Store(tmp_path, {}, 20, "float32")
  fill(store)
  (store.path / "header.json").write_text(text)
  with pytest.raises(ValueError, match="header.json is damaged: .*; delete .* and run again"):
    Store(tmp_path, {}, 20, "float32")


def test_a_file_that_lost_shards_the_header_has_is_not_written_over(tmp_path):
  store = Store(tmp_path, {}, 20, "float32")
  fill(store, stop=16)
  short(store.path / f"{COLUMNS[0].name}.npy")
  with pytest.raises(ValueError, match="ends before row 16; delete"):
    fill(Store(tmp_path, {}, 20, "float32"))


def test_half_written_columns_are_not_read(tmp_path):
  store = Store(tmp_path, {}, 20, "float32")
  fill(store, stop=16)
  with pytest.raises(ValueError, match="has 16 of 20 rows; write the others first"):
    store.open(COLUMNS[0])


# What is kept

def test_kept_is_what_the_backbone_gives(folder, tiny_weights, tiny_task):
  cache = features.of_recipe(folder, recipe())
  found = features.Features(cache, tiny_weights, READS, "train", tiny_task.splits["train"])
  apply = backbones.build(tiny_weights.spec).apply
  run = jax.jit(lambda params, images: apply(params, images, record("block_00/out", "patch"), {})[1])
  rows = np.array([3, 39, 0])
  images = np.stack([tiny_task.splits["train"].read(row) for row in rows])
  images = data.normalise(images, tiny_weights.preprocessing)
  seen = run(tiny_weights.params, images)
  taken = found.take(rows)
  np.testing.assert_allclose(taken["a"], seen["block_00/out"][:, 0], atol=1e-6)
  np.testing.assert_allclose(taken["b"], seen["patch"].mean(axis=1), atol=1e-6)
  assert len(found) == 40 and found.bytes_per_image == 2 * 16 * 4
  assert features.bytes_per_image(tiny_weights.spec, READS, "bfloat16") == 2 * 16 * 2


def test_writing_goes_on_where_it_was_killed(tmp_path, tiny_weights, tiny_task, monkeypatch):
  written(tmp_path / "whole", tiny_weights, tiny_task)
  append, calls = store_lib.Writer.append, []
  def dies(writer, values):
    calls.append(writer.done)
    if len(calls) == 3:
      raise KeyboardInterrupt
    append(writer, values)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(store_lib.Writer, "append", dies)
    written(tmp_path / "cut", tiny_weights, tiny_task, batch_size=6)
  monkeypatch.setattr(store_lib.Writer, "append", lambda writer, values: (calls.append(writer.done),
                                                                         append(writer, values)))
  written(tmp_path / "cut", tiny_weights, tiny_task)
  assert calls[:4] == [0, 6, 12, 8]  # 12 rows came, and one shard of 8 stands
  assert files_alike(tmp_path / "cut", tmp_path / "whole")


def files_alike(one, other):
  a, b = contents(one), contents(other)
  arrays = [name for name in a if name.endswith(".npy")]
  read = lambda folder, name: np.load(folder / name)
  return a.keys() == b.keys() and all(np.allclose(read(one, name), read(other, name), atol=1e-6) for name in arrays)


def test_the_key_has_every_ingredient(tmp_path, tiny_weights, tiny_task, random_weights, tiny_spec):
  split, asked = tiny_task.splits["train"], recipe()
  def key(weights=tiny_weights, split=split, asked=asked, view=0):
    return features.cache.stores(features.of_recipe(tmp_path, asked), weights, "train", split)[view].path.name
  changed = lambda **how: dataclasses.replace(asked, **how)
  flip = changed(augmentation="flip", views=2)
  brighter = dataclasses.replace(split, read=lambda row: split.read(row) | 1)
  pre = tiny_weights.preprocessing.changed
  keys = {
      "as it is": key(), "weights": key(random_weights(tiny_spec, seed=1)), "pixels": key(split=brighter),
      "crop": key(tiny_weights._replace(preprocessing=pre("crop=center"))),
      "mean": key(tiny_weights._replace(preprocessing=pre("mean=0/0/0"))),
      "size": key(tiny_weights._replace(spec=dataclasses.replace(tiny_spec, image_size=20))),
      "images": key(split=split.select(range(39))), "order": key(split=split.select(range(39, -1, -1))),
      "labels": key(split=dataclasses.replace(split, labels=split.labels[::-1])),
      "kept in": key(asked=changed(cache_dtype="bfloat16")), "computed in": key(asked=changed(dtype="bfloat16")),
      "view 0": key(asked=flip), "view 1": key(asked=flip, view=1),
      "seed": key(asked=dataclasses.replace(flip, seed=1)),
      "augmentation": key(asked=dataclasses.replace(flip, augmentation="crop_flip")),
      "drop path": key(asked=dataclasses.replace(flip, drop_path=0.1))}
  assert len(set(keys.values())) == len(keys), keys
  same = [changed(seed=3), changed(batch_size=4, label_smoothing=0.1, duration="1 steps")]
  assert {key(asked=each) for each in same} == {keys["as it is"]}
  more = dataclasses.replace(flip, views=5)  # views are added, not made again
  assert key(asked=more) == keys["view 0"] and key(asked=more, view=1) == keys["view 1"]


def test_a_read_has_its_own_file(tiny_spec):
  names = {Column(*which, (1,)).name for which in (("a/b", "mean"), ("a", "b-mean"), ("a_b", "mean"), ("a/b", "me an"),
                                                          ("a/b", "me-an"))}
  assert len(names) == 5 and all(name.replace("_", "").replace("-", "").isalnum() for name in names)


def test_methods_that_read_the_same_share_it(tmp_path, tiny_weights, tiny_task):
  written(tmp_path, tiny_weights, tiny_task)
  before = contents(tmp_path)
  cache = features.of_recipe(tmp_path, recipe())
  assert features.complete(cache, tiny_weights, {"other": MEAN}, "val", tiny_task.splits["val"])
  written(tmp_path, tiny_weights, sealed(tiny_task), reads={"other": MEAN})
  assert contents(tmp_path) == before
  new = Read("embed", "last", lambda y, frozen: y[:, -1])
  written(tmp_path, tiny_weights, tiny_task, reads={"new": new, "b": MEAN})
  after = contents(tmp_path)
  assert len(after) == len(before) + 3
  assert all(after[name] == value for name, value in before.items() if name.endswith(".npy"))


def test_the_size_is_said_before_and_a_full_disk_is_refused(tmp_path, tiny_weights, tiny_task, monkeypatch, capsys):
  cache = features.of_recipe(tmp_path / "new", recipe())
  write = lambda **how: features.write(cache, tiny_weights, READS, tiny_task.splits, device_count=1, **how)
  write(dry_run=True)
  said = capsys.readouterr().err
  assert "cache of train: 40 images, 2 activations, 128 bytes per image in float32; 5.12 kB, of which 5.12 kB" in said
  assert str(tmp_path / "new") in said and not (tmp_path / "new").exists()
  monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(8000))
  with pytest.raises(ValueError, match="has 8 kB free and the activations need 8.19 kB; free some space"):
    write()
  assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path, tiny_weights, tiny_task):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="file is a file; expected a folder"):
    written(tmp_path / "file", tiny_weights, tiny_task)


def test_a_disk_that_fills_up_leaves_what_stands(tmp_path, tiny_weights, tiny_task, monkeypatch):
  def full(descriptor):
    raise OSError(28, "No space left on device")
  with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
    patch.setattr(store_lib.os, "fsync", full)
    written(tmp_path, tiny_weights, tiny_task)
  written(tmp_path, tiny_weights, tiny_task)


def test_mapped_is_resident(folder, tiny_weights, tiny_task, monkeypatch):
  cache = features.of_recipe(folder, recipe())
  rows = np.array([5, 1, 5])
  make = lambda: features.Features(cache, tiny_weights, READS, "train", tiny_task.splits["train"]).take(rows)
  resident = make()
  monkeypatch.setattr(cache_lib, "RESIDENT_BYTES", 0)
  for slot, rows in make().items():
    assert np.array_equal(rows, resident[slot])
    assert type(rows) is np.ndarray and isinstance(resident[slot], jax.Array)


@pytest.mark.parametrize("limit, resident", [(3 * 40 * 128, True), (3 * 40 * 128 - 1, False)])
def test_an_accelerator_keeps_what_fills_a_third_of_it(folder, tiny_weights, tiny_task, monkeypatch, limit, resident):
  cache, real = features.of_recipe(folder, recipe()), jax.devices()[0]
  gpu = namedtuple("Device", "platform memory_stats")("gpu", lambda: {"bytes_limit": limit})
  monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
  monkeypatch.setattr(jax, "device_put", lambda x, where, put=jax.device_put: put(x, real))
  kept = features.Features(cache, tiny_weights, READS, "train", tiny_task.splits["train"])
  assert kept.resident == resident and all(len(rows) == 3 for rows in kept.take(np.array([5, 1, 5])).values())


# Batches

def of_domains(task):
  """The task with three domains, one of them small."""
  give = lambda split: dataclasses.replace(split, domains=np.minimum(np.arange(len(split)) % 5, 2).astype(np.int32))
  return dataclasses.replace(task, splits={name: give(split) for name, split in task.splits.items()})


@pytest.mark.parametrize("how", [{}, {"drop_last": False}, {"label_smoothing": 0.1}, {"reshuffle": False},
                                 {"per_domain": True, "batch_size": 3, "label_smoothing": 0.1}])
def test_the_order_is_that_of_images(folder, tiny_weights, tiny_task, how):
  task, asked = of_domains(tiny_task), recipe(batch_size=12, **how) if "batch_size" not in how else recipe(**how)
  streamed = recipes.train_loader(asked, task, tiny_weights.preprocessing)
  kept, by_name = features.loaders(folder, tiny_weights, READS, task, asked, quiet=True)
  for attribute in ("steps_per_epoch", "rows_per_step", "problems"):
    assert getattr(kept, attribute) == getattr(streamed, attribute)
  stored = features.Features(features.of_recipe(folder, asked), tiny_weights, READS, "train", task.splits["train"])
  for number in range(2 * streamed.steps_per_epoch + 1):
    a, b = next(streamed), next(kept)
    assert_rows(a, b)
    rows = np.maximum(b["index"], 0)
    assert all(np.array_equal(b["activations"][slot], stored.take(rows)[slot]) for slot in READS)
    if number == 1:
      state = json.loads(json.dumps(kept.get_state()))
  assert state == json.loads(json.dumps({**streamed.get_state(), "step": 2}))
  following = [next(kept) for _ in range(2)]
  kept.set_state({**state, "step": 2 * streamed.steps_per_epoch + 1})
  for wanted in following:
    found = next(kept)
    assert_rows(found, wanted)
    assert all(np.array_equal(found["activations"][slot], wanted["activations"][slot]) for slot in READS)
  evaluated = data.eval_loader(task.splits["val"], tiny_weights.preprocessing, batch_size=32)
  assert len(evaluated) == len(by_name["val"]) and set(by_name) == {"val", "test"}
  for a, b in zip(evaluated, by_name["val"], strict=True):
    assert_rows(a, b)


def assert_rows(a, b):
  """The same batches, but for pixels and activations."""
  assert a.keys() - {"image", "activations"} == b.keys() - {"image", "activations"}
  for name in a.keys() - {"image", "activations"}:
    assert np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype, name


def test_views_are_augmented_copies_that_epochs_take_in_turn(tmp_path, tiny_weights, tiny_task):
  asked = recipe(augmentation="flip", views=2)
  batches, by_name = features.loaders(tmp_path, tiny_weights, READS, tiny_task, asked, evaluate=("train", "val"),
                                      quiet=True)
  split = tiny_task.splits["train"]
  kept = features.Features(features.of_recipe(tmp_path, asked), tiny_weights, READS, "train", split)
  views = [kept.take(np.arange(40), view)["b"] for view in range(2)]
  plain = np.concatenate([batch["activations"]["b"][batch["weight"] > 0] for batch in by_name["train"]])
  unflipped = [np.isclose(view, plain, atol=1e-6).all(axis=1) for view in views]
  assert all(8 < each.sum() < 32 for each in unflipped) and not np.array_equal(*unflipped)
  for epoch in range(3):
    for _ in range(batches.steps_per_epoch):
      batch = next(batches)
      assert np.array_equal(batch["activations"]["b"], views[epoch % 2][batch["index"]])


def test_a_split_is_evaluated_as_it_is_whatever_its_name(tmp_path, tiny_weights, tiny_task):
  asked = recipe(augmentation="flip", views=2, duration="1 epochs")
  def val(name):
    own = dataclasses.replace(tiny_task.splits["val"], name=name)
    task = dataclasses.replace(tiny_task, splits={"train": tiny_task.splits["train"], "val": own})
    return fit(tiny_weights, "linear", task, asked, options=FIRST, features=tmp_path, quiet=True).result["val"]
  assert val("train") == val("val")


# When there is none

@pytest.mark.parametrize("method, how, message", [
    ("full", {}, "full writes into the backbone from block 0 of 3 on and says nothing of what it reads below, .*these "
     "train from a cache: linear, .*dtl.*head2toe"),
    ("linear", {"augmentation": "flip"}, "'flip' is random, .*keep several with views=4, or use augmentation='none'"),
    ("linear", {"drop_path": 0.1}, "drop_path 0.1 is random, .*views=4"),
    ("linear", {"augmentation": "timm"}, "'timm' mixes the images of a batch"),
    ("linear", {"augmentation": "timm", "views": 4}, "'timm' mixes the images of a batch"),
    ("linear", {"views": 4}, "views is 4 and nothing is random; expected 0, or an augmentation such as 'flip'")])
def test_refusals_come_before_anything_is_read(tmp_path, tiny_weights, tiny_task, method, how, message):
  with pytest.raises(ValueError, match=message):
    fit(tiny_weights, method, sealed(tiny_task), recipe(**how), features=tmp_path / "cache", quiet=True)
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("how", [{"augmentation": "flip", "views": 2}, {"cache_dtype": "bfloat16"}])
def test_views_and_types_are_those_of_a_cache(tiny_weights, tiny_task, how):
  with pytest.raises(ValueError, match="belong to a cache, and linear trains from images"):
    fit(tiny_weights, "linear", tiny_task, recipe(**how), quiet=True)


# Training

HEADS = {"linear": FIRST, "head2toe": {"sites": ("embed", "block_00/out"), "target_size": 32, "fraction": 0.2},
         "inca": {"sites": "block_00/out"}}


@pytest.mark.parametrize("method", HEADS)
def test_cached_is_streamed(tmp_path, tiny_weights, tiny_task, method):
  """Losses of every step, scores, the step that is selected; and the second run decodes nothing."""
  def run(name, task, **how):
    return fit(tiny_weights, method, task, recipe(duration="7 steps", label_smoothing=0.1), options=HEADS[method],
               workdir=tmp_path / name, quiet=True, **how).result
  streamed, cached = run("streamed", tiny_task), run("cached", tiny_task, features=tmp_path / "cache")
  rows, others = metrics(tmp_path / "streamed"), metrics(tmp_path / "cached")
  assert len(rows) == len(others) == {"head2toe": 2}.get(method, 1) * (7 + 2)
  for a, b in zip(rows, others):
    assert a.keys() == b.keys() and a["step"] == b["step"]
    near(a.get("val", a), b.get("val", b))
  near(streamed["val"], cached["val"])
  near(streamed["test"], cached["test"])
  assert cached.pop("cached") == {"dtype": "float32", "views": 0} and cached.keys() == streamed.keys()
  compared = ("selected_step", "protocol", "recipe", "trainable", "split_hash", "pixels", "dtype", "steps")
  assert {name: cached[name] for name in compared} == {name: streamed[name] for name in compared}
  assert cached["train_flops"] < 0.2 * streamed["train_flops"]  # the backbone is in no step
  if method == "linear":
    again = run("again", sealed(tiny_task), features=tmp_path / "cache")
    assert again["val"] == cached["val"] and again["test"] == cached["test"]


def near(a, b):
  for name, value in a.items():
    if isinstance(value, float):
      assert value == pytest.approx(b[name], rel=1e-6, abs=1e-6), name


def test_the_backbone_is_in_no_program(folder, tiny_weights, tiny_task):
  linear = methods.build("linear", tiny_weights.spec, **OF_PATCHES)
  broken = tiny_weights._replace(params=None)  # of no use to who has its activations
  linear = linear._replace(init=lambda rng, frozen, C: methods.build("linear", tiny_weights.spec).init(
      rng, tiny_weights.params, C))
  stage = train.Stage(linear, broken, tiny_task, recipe(duration="2 steps"), None, 0, True, folder).train()
  assert stage.frozen == {} and stage.total == 2


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, tiny_weights, tiny_task, monkeypatch):
  asked = recipe(duration="12 steps", checkpoint_every="5 steps", augmentation="flip", views=2)
  def run(name):
    return fit(tiny_weights, "linear", tiny_task, asked, options=OF_PATCHES, workdir=tmp_path / name,
               features=tmp_path / "cache", quiet=True)
  whole, step, calls = run("whole"), features.Features.take, []
  def dies(kept, rows, view=0):
    calls.append(view)
    if len(calls) == 12:
      raise KeyboardInterrupt
    return step(kept, rows, view)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(features.Features, "take", dies)
    run("cut")
  cut = run("cut")
  for leaf in ("kernel", "bias"):
    assert np.array_equal(whole.trainable["classifier"][leaf], cut.trainable["classifier"][leaf])
  assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
  assert whole.result["cached"] == {"dtype": "float32", "views": 2}
  assert whole.result["protocol"].startswith("flip in 2 views; ")


def test_bfloat16_is_near_and_stands_in_the_protocol(tmp_path, tiny_weights, tiny_task):
  task = dataclasses.replace(tiny_task, splits={name: tiny_task.splits[name] for name in ("train", "val")})
  exact = written(tmp_path, tiny_weights, task, reads={"features": MEAN})
  asked = recipe(cache_dtype="bfloat16", duration="2 steps")
  result = fit(tiny_weights, "linear", task, asked, options=OF_PATCHES, features=tmp_path, quiet=True).result
  assert result["protocol"].startswith("activations in bfloat16; ") and result["cached"]["dtype"] == "bfloat16"
  rows = [features.Features(cache, tiny_weights, {"features": MEAN}, "val", task.splits["val"]).take(
      np.arange(10))["features"] for cache in (exact, features.of_recipe(tmp_path, asked))]
  np.testing.assert_allclose(rows[1].astype(np.float32), rows[0], rtol=2**-8)
  sizes = {name: len(value) for name, value in contents(tmp_path).items() if name.endswith(".npy")}
  assert sorted(sizes.values()) == sorted(128 + count * 16 * width for width in (4, 2) for count in (40, 10))


def test_a_stage_that_writes_trains_from_images(tmp_path, tiny_weights, tiny_task):
  """As Head2Toe-FT's second, after a head."""
  bitfit = methods.build("bitfit", tiny_weights.spec)
  stage = train.Stage(bitfit, tiny_weights, tiny_task, recipe(), None, 1, True, tmp_path)
  assert "image" in next(stage.loader) and "image" in next(iter(stage.val_loader)) and stage.frozen
  assert not any(tmp_path.iterdir())


def test_the_test_split_is_evaluated_once_at_the_end(folder, tiny_weights, tiny_task, monkeypatch):
  opened, init = [], features.Features.__init__
  def note(kept, cache, weights, reads, name, split):
    opened.append(name)
    init(kept, cache, weights, reads, name, split)
  monkeypatch.setattr(features.Features, "__init__", note)
  fit(tiny_weights, "linear", tiny_task, recipe(), options=OF_PATCHES, features=folder, quiet=True)
  assert opened == ["train", "val", "test"]


def test_unreadable_images_are_left_out_or_stop(tmp_path, tiny_weights, tiny_task):
  def read(row):
    if row == 1:
      raise BadImage("image 1 is broken; replace it")
    return tiny_task.splits["train"].read(row)
  split = dataclasses.replace(tiny_task.splits["train"], read=read, verified=False)
  task = dataclasses.replace(tiny_task, splits={**tiny_task.splits, "train": split})
  asked = recipe(bad_images="skip", duration="1 steps")
  with pytest.raises(BadImage, match="1 of 40 images"):
    fit(tiny_weights, "linear", task, recipe(), features=tmp_path, quiet=True)
  for _ in range(2):  # written, then found
    result = fit(tiny_weights, "linear", task, asked, options=OF_PATCHES, features=tmp_path, quiet=True).result
    assert result["examples"]["train"] == 39 and "without 1 unreadable train images" in result["protocol"]


# Commands and costs

def test_the_commands(tmp_path, capsys, monkeypatch):
  write_images(tmp_path / "images")
  config = tmp_path / "folder.py"
  config.write_text("from transferlab.experiment import defaults\n"
                    "def get_config():\n"
                    f"  config = defaults('linear', data='folder:{tmp_path / 'images'}', duration='2 steps', "
                    "batch_size=4)\n  config.options.update(site='patch', tokens='mean')\n  return config\n")
  cache = tmp_path / "cache"
  common = ["transferlab", "features", "--backbone=vit_formula64", f"--data=folder:{tmp_path / 'images'}",
            f"--out={cache}", "--options=site=patch,tokens=mean"]
  cli.main([*common, "--dry_run"])
  assert "cache of train: " in capsys.readouterr().err and not cache.exists()
  cli.main(common)
  assert capsys.readouterr().out.strip() == str(cache)
  monkeypatch.setattr(fill_lib, "_Pass", None)  # nothing is missing
  cli.main(["transferlab", "train", f"--config={config}", f"--config.features={cache}",
            f"--workdir={tmp_path / 'run'}"])
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["cached"] == {"dtype": "float32", "views": 0}
  with pytest.raises(SystemExit):
    cli.main([*common[:-1], "--method=lora"])
  assert "lora writes into the backbone" in capsys.readouterr().err


def test_costs_are_those_of_the_head(tiny_spec):
  linear = methods.build("linear", tiny_spec)
  row = cost.of(tiny_spec, linear, 4, batch_size=8, cached=True)
  assert row["bytes_per_image"] == 16 * 4 and row["trainable"] == 17 * 4 and row["frozen"] > 5000
  assert 2 * 2 * 8 * 16 * 4 < row["train_flops"] < 4 * 2 * 8 * 16 * 4  # of two products and the optimiser
  arguments = 4 * (3 * 17 * 4 + 8 * 16 + 16)  # parameters with two moments, the batch
  assert arguments < row["train_peak_bytes"] < 3 * arguments
