"""Splits, tasks, their hashes and checks, automatic splits, class weights."""
import ast
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

import transferlab.data as data
from transferlab.data.split import complete, stratified

PACKAGE = Path(data.__file__).parent


def task_of(train, test=(), val=(), class_names=("a", "b"), domain_names=()):
  """A task with the given labels; images are 2x2 and black."""
  def split(name, labels):
    n = len(labels)
    read = data.arrays(np.zeros((max(n, 1), 2, 2), np.uint8), [0] * max(n, 1), ["a"], {"train": range(max(n, 1))},
                       val_fraction=0, test_fraction=0).splits["train"].read
    return data.Split(name, tuple(f"{name}{i}" for i in range(n)), np.array(labels, np.int64), read)
  given = {"train": train, "val": val, "test": test}
  splits = {k: split(k, v) for k, v in given.items() if len(v) or k == "train"}
  return data.Task("t", tuple(class_names), splits, domain_names)


def test_select_keeps_names_labels_and_pixels_together():
  images = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((6, 2, 3), np.uint8)
  everything = data.arrays(images, [0, 1, 0, 1, 0, 1], splits={"train": range(6)}, val_fraction=0,
                           test_fraction=0).splits["train"]
  part = everything.select([5, 2, 3]).select([2, 0], "val")
  assert part.name == "val" and part.labels.tolist() == [1, 1] and part.labels.dtype == np.int32
  assert [part.read(i)[0, 0, 0] for i in range(2)] == [3, 5]
  assert part.keys == (everything.keys[3], everything.keys[5])
  again = pickle.loads(pickle.dumps(part))
  assert again.hash() == part.hash() and np.array_equal(again.read(1), part.read(1))


def test_hash_depends_on_keys_labels_and_order_and_is_pinned():
  a = data.Split("train", ("x", "y"), np.array([0, 1]), None)
  assert a.hash() == "bada210f11fd49b6"  # pinned: a saved adapter names its data by this
  assert a.hash() == data.Split("val", ("x", "y"), np.array([0, 1]), None).hash()
  others = [data.Split("train", keys, np.array(labels), None)
            for keys, labels in ((("x", "z"), [0, 1]), (("x", "y"), [1, 1]), (("y", "x"), [1, 0]))]
  assert len({s.hash() for s in others} | {a.hash()}) == 4


def test_fingerprint_sees_pixels_that_the_hash_does_not():
  images = np.zeros((4, 5, 5), np.uint8)
  one = data.arrays(images, [0, 1, 0, 1], splits={"train": range(4)}, val_fraction=0, test_fraction=0).splits["train"]
  brighter = data.Split("train", one.keys, one.labels, data.arrays(
      images + 1, [0, 1, 0, 1], splits={"train": range(4)}, val_fraction=0, test_fraction=0).splits["train"].read)
  assert one.hash() == brighter.hash() and one.fingerprint() != brighter.fingerprint()


def test_labels_must_be_one_whole_number_per_image():
  with pytest.raises(data.DataError, match="float64"):
    data.Split("train", ("x", "y"), np.array([0.0, 1.0]), None)
  with pytest.raises(data.DataError, match=r"expected whole numbers \[2\]"):
    data.Split("train", ("x", "y"), np.array([0]), None)


def test_check_passes_a_sound_task_and_remarks():
  assert task_of([0, 1], [1, 0], [0, 1]).check() == []
  assert task_of([0, 1], [1, 0], [0]).check() == ["no val image of 'b'"]
  assert task_of([0, 1], [1], domain_names=("x", "y")).check() == ["no test image of 'a'"]
  shared = task_of([0, 1], [0, 1])
  shared.splits["test"] = data.Split("test", ("train0", "q"), np.array([0, 1]), None)
  assert shared.check() == ["1 images are in both train and test"]


@pytest.mark.parametrize("task, words", [
    (lambda: task_of([0, 7]), ["label 7", "'train1'", "0..1"]),
    (lambda: task_of([0, -1]), ["label -1", "0..1"]),
    (lambda: task_of([0, 1], [0, 2]), ["label 2", "'test1'"]),
    (lambda: task_of([0, 0]), ["no training image of 'b'"]),
    (lambda: task_of([1, 1]), ["no training image of 'a'", "count from 0"]),
    (lambda: task_of([0, 1], [1, 1]), ["train and test differ", "'a'"]),
    (lambda: task_of([]), ["'train'", "no image"]),
    (lambda: task_of([0], class_names=("a",)), ["1 class", "at least two"]),
    (lambda: task_of([0, 1], class_names=("a", "a")), ["'a'", "more than once"]),
])
def test_check_names_what_is_wrong_on_one_line(task, words):
  with pytest.raises(data.DataError) as error:
    task().check()
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_check_of_a_split_in_use_only():
  task = task_of([0, 0], [1, 1])
  assert task.check(["test"]) == []
  with pytest.raises(data.DataError, match="no split 'val'"):
    task.check(["val"])


def test_relabel_follows_another_class_order():
  task = task_of([0, 1, 1], class_names=("cat", "dog"))
  moved = task.relabel(["dog", "emu", "cat"])
  assert moved.splits["train"].labels.tolist() == [2, 0, 0] and moved.num_classes == 3
  with pytest.raises(data.DataError, match="'dog'"):
    task.relabel(["cat", "emu"])


def test_stratified_covers_every_row_once_and_every_class_everywhere():
  labels = np.repeat(np.arange(4), [3, 10, 25, 100])
  cut = stratified(labels, np.arange(138), {"val": 0.2, "test": 0.3}, "abcd", seed=5)
  assert sorted(np.concatenate(list(cut.values())).tolist()) == list(range(138))
  counts = {k: np.bincount(labels[v]).tolist() for k, v in cut.items()}
  assert counts == {"train": [1, 5, 12, 50], "val": [1, 2, 5, 20], "test": [1, 3, 8, 30]}


def test_a_small_fraction_of_a_small_class_is_one_image_and_train_keeps_one():
  labels = np.zeros(4, np.int32)
  assert {k: len(v) for k, v in stratified(labels, np.arange(4), {"val": 0.05}, "a", seed=0).items()} == {
      "train": 3, "val": 1}
  assert {k: len(v) for k, v in stratified(labels, np.arange(3), {"val": 0.5, "test": 0.4}, "a", seed=0).items()} == {
      "train": 1, "val": 1, "test": 1}


def test_stratified_is_pinned_and_classes_are_independent():
  labels = np.repeat([0, 1], 10)
  rows = stratified(labels, np.arange(20), {"val": 0.2}, "ab", seed=0)["val"].tolist()
  assert rows == stratified(labels, np.arange(20), {"val": 0.2}, "ab", seed=0)["val"].tolist()
  assert rows != stratified(labels, np.arange(20), {"val": 0.2}, "ab", seed=1)["val"].tolist()
  grown = stratified(np.repeat([0, 1], [10, 30]), np.arange(40), {"val": 0.2}, "ab", seed=0)["val"].tolist()
  assert [r for r in grown if r < 10] == [r for r in rows if r < 10]
  assert rows == [2, 3, 14, 17]  # the same on every machine and numpy: published results depend on it


def test_stratified_refuses_a_class_that_is_too_small():
  with pytest.raises(data.DataError, match="class 'b' has 2 images.*at least 3"):
    stratified(np.array([0, 0, 0, 1, 1]), np.arange(5), {"val": 0.2, "test": 0.2}, "ab", seed=0)


def test_complete_cuts_only_what_is_missing():
  labels = np.zeros(10, np.int32)
  def of(**splits):
    splits = {k: np.array(v) for k, v in splits.items()}
    done = complete(splits, labels, "a", val_fraction=0.2, test_fraction=0.3, seed=0)
    return {k: len(v) for k, v in done.items()}
  assert of(train=range(10)) == {"train": 5, "val": 2, "test": 3}
  assert of(train=range(5), test=range(5, 10)) == {"train": 4, "val": 1, "test": 5}
  assert of(train=range(5), val=range(5, 10)) == {"train": 5, "val": 5}
  assert of(test=range(10)) == {"test": 10}
  everything = complete({"train": np.arange(10)}, labels, "a", val_fraction=0.2, test_fraction=1, seed=0)
  assert {k: len(v) for k, v in everything.items()} == {"test": 10}
  with pytest.raises(data.DataError, match="nothing to train on"):
    complete({"train": np.arange(10)}, labels, "a", val_fraction=0.5, test_fraction=0.5, seed=0)


def test_class_weights_are_sklearns_balanced_ones():
  labels = np.array([0, 0, 0, 0, 1, 2, 2])
  weights = data.class_weights(labels, 3)
  np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=labels), rtol=1e-6)
  assert weights[labels].mean() == pytest.approx(1)
  with pytest.raises(data.DataError, match="at least once"):
    data.class_weights(labels, 4)


def test_no_file_of_the_package_imports_jax_or_tensorflow():
  for file in PACKAGE.glob("*.py"):
    for node in ast.walk(ast.parse(file.read_text())):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
          [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
      assert not {n.split(".")[0] for n in names} & {"jax", "jaxlib", "flax", "tensorflow"}, file


def test_importing_the_package_brings_in_neither_jax_nor_tensorflow():
  # The stand-in keeps the code of the backbones out of it, so that only this package's own imports count.
  code = ("import sys, types, transferlab; stub = types.ModuleType('transferlab.backbones'); "
          f"stub.__path__ = [{str(PACKAGE.parent / 'backbones')!r}]; sys.modules['transferlab.backbones'] = stub; "
          "before = set(sys.modules); import transferlab.data; "
          "print(sorted((set(sys.modules) - before) & {'jax', 'jaxlib', 'flax', 'tensorflow', 'grain', 'sklearn'}))")
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parents[1], check=True)
  assert out.stdout.strip() == "[]"
