"""Folders, domain folders, lists, tables, arrays, digits, `from_string`: counts, labels, names, and each bad input."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import transferlab.data as data
from transferlab.data import DataError

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real images are not beside this checkout (../shared/data)")


def make(root, tree: dict[str, int], suffix="png"):
  """Writes `count` small images into each folder of `tree`; image k of a folder is the grey level k."""
  for folder, count in tree.items():
    (root / folder).mkdir(parents=True, exist_ok=True)
    for k in range(count):
      Image.fromarray(np.full((4, 5, 3), k, np.uint8)).save(root / folder / f"{k:03d}.{suffix}")
  return root


def counts(task) -> dict[str, list[int]]:
  return {k: np.bincount(s.labels, minlength=task.num_classes).tolist() for k, s in task.splits.items()}


def error_of(make_task, kind=DataError) -> str:
  with pytest.raises(kind) as error:
    make_task()
  assert "\n" not in str(error.value)
  return str(error.value)


# Folders

def test_folder_without_splits_is_cut_by_class(tmp_path):
  task = data.image_folder(make(tmp_path / "pets", {"dog": 10, "cat": 5}))
  assert task.name == "pets" and task.class_names == ("cat", "dog") and task.check() == []
  assert counts(task) == {"train": [3, 6], "val": [1, 2], "test": [1, 2]}
  keys = [k for s in task.splits.values() for k in s.keys]
  assert len(set(keys)) == 15 and all(k.split("/")[0] in ("cat", "dog") for k in keys)
  for split in task.splits.values():
    for i, key in enumerate(split.keys):
      assert split.read(i)[0, 0, 0] == int(key[-7:-4]) and task.class_names[split.labels[i]] == key.split("/")[0]


def test_the_automatic_split_depends_on_the_seed_only(tmp_path):
  root = make(tmp_path, {"a": 20, "b": 20})
  assert data.image_folder(root, seed=3).split_hash() == data.image_folder(root, seed=3).split_hash()
  assert data.image_folder(root, seed=3).split_hash() != data.image_folder(root, seed=4).split_hash()
  moved = make(tmp_path / "elsewhere", {"a": 20, "b": 20})
  assert data.image_folder(moved, seed=3).split_hash() == data.image_folder(root / "elsewhere", seed=3).split_hash()


@pytest.mark.parametrize("names", [
    ("train", "val", "test"), ("Training", "valid", "TEST"), ("train", "validation", "testing")])
def test_folder_with_splits(tmp_path, names):
  make(tmp_path, {f"{n}/{c}": k + 1 for k, n in enumerate(names) for c in "ab"})
  (tmp_path / "annotations").mkdir()
  (tmp_path / "README.txt").write_text("x")
  assert counts(data.image_folder(tmp_path)) == {"train": [1, 1], "val": [2, 2], "test": [3, 3]}


def test_missing_splits_are_cut_from_train(tmp_path):
  assert counts(data.image_folder(make(tmp_path / "x", {"train/a": 10, "train/b": 5, "test/a": 2, "test/b": 2}))) == {
      "train": [8, 4], "val": [2, 1], "test": [2, 2]}
  assert counts(data.image_folder(make(tmp_path / "y", {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2}))) == {
      "train": [3, 3], "val": [2, 2]}
  assert counts(data.image_folder(make(tmp_path / "z", {"train/a": 10, "train/b": 10}))) == {
      "train": [6, 6], "val": [2, 2], "test": [2, 2]}
  assert counts(data.image_folder(tmp_path / "z", test_fraction=1)) == {"test": [10, 10]}
  assert counts(data.image_folder(tmp_path / "z", 0, 0)) == {"train": [10, 10]}


def test_a_class_called_train(tmp_path):
  assert data.image_folder(make(tmp_path, {"train": 5, "plane": 5})).class_names == ("plane", "train")


def test_upper_case_nested_and_hidden(tmp_path):
  make(tmp_path, {"a": 3, "a/more": 2, "b": 5, ".git": 2, "__MACOSX": 2}, suffix="PNG")
  (tmp_path / "a" / "Thumbs.db").write_text("x")
  assert counts(data.image_folder(tmp_path, 0, 0)) == {"train": [5, 5]}


def test_bad_folders(tmp_path):
  (tmp_path / "empty").mkdir()
  message = error_of(lambda: data.image_folder(tmp_path / "empty"))
  assert "no class folder" in message and "<class>" in message
  assert "does not exist" in error_of(lambda: data.image_folder(tmp_path / "nowhere"))
  (tmp_path / "file").write_text("x")
  assert "is a file" in error_of(lambda: data.image_folder(tmp_path / "file"))
  assert "3 images but no class folder" in error_of(lambda: data.image_folder(make(tmp_path / "flat", {".": 3})))
  make(tmp_path / "flats", {"train": 3, "test": 3})
  assert "without class folders" in error_of(lambda: data.image_folder(tmp_path / "flats"))
  make(tmp_path / "twice", {"val/a": 1, "valid/a": 1})
  assert "two folders for the val split" in error_of(lambda: data.image_folder(tmp_path / "twice"))


def test_a_class_without_images(tmp_path):
  make(tmp_path, {"a": 3, "b": 0})
  (tmp_path / "b" / "photo.heic").write_text("x")
  message = error_of(lambda: data.image_folder(tmp_path))
  assert "class 'b' has no image" in message and "photo.heic" in message and "*.jpg" in message


def test_different_classes_in_train_and_test(tmp_path):
  make(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 3, "test/c": 3})
  message = error_of(lambda: data.image_folder(tmp_path))
  assert "only in train: 'b'" in message and "only in test: 'c'" in message


def test_a_class_too_small_to_split(tmp_path):
  assert "class 'b' has 2 images" in error_of(lambda: data.image_folder(make(tmp_path, {"a": 9, "b": 2})))


# Domains

def test_domain_folder(tmp_path):
  make(tmp_path, {f"{d}/{c}": 5 for d in ("art", "photo", "sketch") for c in ("cat", "dog")})
  task = data.domain_folder(tmp_path, "photo")
  assert task.domain_names == ("art", "photo", "sketch") and task.check() == []
  assert counts(task) == {"train": [8, 8], "val": [2, 2], "test": [5, 5]}
  assert {k: sorted(set(s.domains.tolist())) for k, s in task.splits.items()} == {
      "train": [0, 2], "val": [0, 2], "test": [1]}
  assert np.bincount(task.splits["val"].domains).tolist() == [2, 0, 2]
  for split in task.splits.values():
    assert [k.split("/")[0] for k in split.keys] == [task.domain_names[d] for d in split.domains]


def test_domain_folder_allows_a_class_missing_from_a_domain_but_not_from_training(tmp_path):
  make(tmp_path, {"x/a": 4, "x/b": 1, "y/a": 4, "y/b": 4, "z/a": 4})
  assert data.domain_folder(tmp_path, "z").check() == ["no test image of 'b'"]
  make(tmp_path, {"z/c": 4})
  assert "no training image of 'c'" in error_of(lambda: data.domain_folder(tmp_path, "z").check())


def test_bad_domains(tmp_path):
  make(tmp_path, {"art/a": 2, "sketch/a": 2})
  assert "did you mean 'sketch'" in error_of(lambda: data.domain_folder(tmp_path, "scetch"))
  make(tmp_path / "single", {"art/a": 2})
  assert "single domain" in error_of(lambda: data.domain_folder(tmp_path / "single", "art"))


# Lists and tables

def test_lists_with_spaces_in_paths(tmp_path):
  make(tmp_path, {"my images": 6})
  lines = [f"my images/{k:03d}.png {k % 2}" for k in range(6)]
  (tmp_path / "train.txt").write_text("\n".join(lines[:4]) + "\n\n")
  (tmp_path / "test.txt").write_text("\r\n".join(lines[4:]))
  task = data.list_files(tmp_path, val_fraction=0)
  assert counts(task) == {"train": [2, 2], "test": [1, 1]} and task.class_names == ("0", "1") and task.check() == []
  assert task.splits["test"].keys == ("my images/004.png", "my images/005.png")
  assert task.splits["test"].read(1)[0, 0, 0] == 5
  named = data.list_files(tmp_path, train="train.txt", val="test.txt", class_names=["no", "yes"])
  assert named.class_names == ("no", "yes") and counts(named) == {"train": [2, 2], "val": [1, 1]}


def test_lists_with_names_as_labels(tmp_path):
  make(tmp_path, {".": 4})
  (tmp_path / "l.txt").write_text("000.png dog\n001.png cat\n002.png dog\n003.png cat\n")
  assert data.list_files(tmp_path, "l.txt", val_fraction=0, test_fraction=0).class_names == ("cat", "dog")
  fixed = data.list_files(tmp_path, "l.txt", class_names=["dog", "cat"], val_fraction=0, test_fraction=0)
  assert fixed.splits["train"].labels.tolist() == [0, 1, 0, 1]
  assert "'dog'" in error_of(lambda: data.list_files(tmp_path, "l.txt", class_names=["cat", "emu"]))


def test_bad_lists(tmp_path):
  make(tmp_path, {".": 2})
  assert "train.txt" in error_of(lambda: data.list_files(tmp_path))
  assert "cannot read" in error_of(lambda: data.list_files(tmp_path, "gone.txt"))
  (tmp_path / "a.txt").write_text("000.png 0\n001.png\n")
  assert "line 2" in error_of(lambda: data.list_files(tmp_path, "a.txt"))
  (tmp_path / "b.txt").write_text("\n")
  assert "empty" in error_of(lambda: data.list_files(tmp_path, "b.txt"))
  (tmp_path / "c.txt").write_text("images/000.png 0\nimages/001.png 1\n")
  assert "give the folder" in error_of(lambda: data.list_files(tmp_path, "c.txt", val_fraction=0, test_fraction=0))
  (tmp_path / "d.txt").write_text("000.png 0\n001.png 5\n")
  task = data.list_files(tmp_path, "d.txt", class_names="ab", val_fraction=0, test_fraction=0)
  assert "label 5" in error_of(task.check)
  (tmp_path / "f.txt").write_text("000.png 123456789\n")
  assert "label 123456789" in error_of(lambda: data.list_files(tmp_path, "f.txt"))
  (tmp_path / "e.txt").write_text("000.png 1\n001.png 2\n")
  assert "count from 0" in error_of(data.list_files(tmp_path, "e.txt", val_fraction=0, test_fraction=0).check)


@pytest.mark.parametrize("header, separator", [("image,label", ","), ("Filename;Class", ";"), ("path\ttarget", "\t")])
def test_table_headers_are_found(tmp_path, header, separator):
  make(tmp_path, {".": 6})
  rows = [f"{k:03d}.png{separator}{'ab'[k % 2]}" for k in range(6)]
  (tmp_path / "t.csv").write_text("\ufeff" + "\n".join([header, *rows]) + "\n", encoding="utf-8")
  task = data.csv_file(tmp_path / "t.csv")
  assert counts(task) == {"train": [1, 1], "val": [1, 1], "test": [1, 1]} and task.class_names == ("a", "b")


def test_table_with_splits_named_columns_and_root(tmp_path):
  make(tmp_path / "pictures", {".": 4})
  (tmp_path / "t.csv").write_text('id,photo,kind,fold\n7,000.png,x,training\n8,"001.png",y,train\n'
                                  "9,002.png,x,Test\n10,003.png,y,test\n")
  task = data.csv_file(tmp_path / "t.csv", "photo", "kind", "fold", root=tmp_path / "pictures", val_fraction=0)
  assert counts(task) == {"train": [1, 1], "test": [1, 1]} and task.splits["test"].read(0)[0, 0, 0] == 2


def test_bad_tables(tmp_path):
  make(tmp_path, {".": 2})
  def table(text):
    (tmp_path / "t.csv").write_text(text)
    return lambda **options: data.csv_file(tmp_path / "t.csv", **options)
  assert "'a', 'b'" in error_of(table("a,b\n000.png,1\n")) and "image_column=" in error_of(table("a,b\n000.png,1\n"))
  assert "label_column=" in error_of(table("image,b\n000.png,1\n"))
  assert "'nope'" in error_of(lambda: table("image,label\n000.png,1\n")(image_column="nope"))
  assert "line 3" in error_of(table("image,label\n000.png,1\n001.png\n"))
  assert "'dev'" in error_of(table("image,label,split\n000.png,1,dev\n"))
  table('image,label,"a\nb"\n"000.png","1\n2",x\n001.png,2,y\n')  # line breaks within quotes
  assert data.csv_file(tmp_path / "t.csv", val_fraction=0, test_fraction=0).class_names == ("1\n2", "2")
  assert "expected a header" in error_of(table("image,label\n"))


# Memory

@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3)])
def test_arrays_of_each_shape(shape):
  images = np.arange(10 * np.prod(shape)).reshape(10, *shape).astype(np.uint8)
  task = data.arrays(images, np.arange(10) % 2, splits={"train": range(8), "test": [8, 9]}, val_fraction=0)
  image = task.splits["test"].read(1)
  assert image.shape == (4, 5, 3) and image.dtype == np.uint8 and task.check() == []
  assert np.array_equal(image, images[9] if shape[-1] == 3 else np.repeat(images[9].reshape(4, 5, 1), 3, 2))


def test_arrays_with_names_and_an_automatic_split():
  task = data.arrays(np.zeros((10, 4, 4), np.uint8), ["b", "a"] * 5)
  assert task.class_names == ("a", "b") and counts(task) == {"train": [3, 3], "val": [1, 1], "test": [1, 1]}


def test_the_hash_of_arrays_depends_on_their_pixels():
  images = np.zeros((10, 4, 4), np.uint8)
  other = images.copy()
  other[3] = 1
  assert data.arrays(images, [0, 1] * 5).split_hash() != data.arrays(other, [0, 1] * 5).split_hash()


@pytest.mark.parametrize("images, labels, options, words", [
    (np.zeros((4, 5, 5), np.float32), [0] * 4, {}, "multiply by 255"),
    (np.zeros((4, 5, 5), np.int64), [0] * 4, {}, "int64"),
    (np.zeros((4, 3, 5, 5), np.uint8), [0] * 4, {}, "moveaxis"),
    (np.zeros((4, 5, 5), np.uint8), [0] * 3, {}, "4 images and 3 labels"),
    (np.zeros((4, 5, 5), np.uint8), [0.0, 1.0, 0.0, 1.0], {}, "labels are float64"),
    (np.zeros((4, 5, 5), np.uint8), [0, 1, 0, 1], {"splits": {"dev": [0]}}, "'dev'"),
    (np.zeros((4, 5, 5), np.uint8), [0, 1, 0, 1], {"splits": {"train": [0, 4]}}, "expected 0..3"),
])
def test_bad_arrays(images, labels, options, words):
  assert words in error_of(lambda: data.arrays(images, labels, **options))


def test_digits_are_a_thousand_image_task():
  task = data.digits()
  assert {k: len(s) for k, s in task.splits.items()} == {"train": 1000, "val": 200, "test": 597}
  assert len({k for s in task.splits.values() for k in s.keys}) == 1797 and task.check() == []
  assert all(c.min() >= len(s) / 10 * 0.9 for s in task.splits.values() for c in [np.bincount(s.labels)])
  image = task.splits["train"].read(0)
  assert image.shape == (8, 8, 3) and image.max() <= 255 and image.max() > 200
  assert task.split_hash() == data.digits(seed=0).split_hash() != data.digits(seed=1).split_hash()


# Strings

def test_from_string(tmp_path):
  make(tmp_path / "f", {"a": 5, "b": 5})
  assert data.from_string("digits?seed=1").split_hash() == data.digits(1).split_hash()
  folder = f"folder:{tmp_path}/f"
  assert data.from_string(folder, seed=2).split_hash() == data.image_folder(tmp_path / "f", seed=2).split_hash()
  assert counts(data.from_string(f"{folder}?val_fraction=0.4&test_fraction=0")) == {"train": [3, 3], "val": [2, 2]}
  make(tmp_path / "d", {"x/a": 5, "x/b": 5, "y/a": 5, "y/b": 5})
  for text in (f"domains:{tmp_path}/d?test=y", f"domains:{tmp_path}/d?test_domain=y"):
    assert data.from_string(text, val_fraction=0.4).name == "d/y"
  (tmp_path / "f" / "l.txt").write_text("".join(f"{c}/{k:03d}.png {c}\n" for c in "ab" for k in range(5)))
  assert len(data.from_string(f"list:{tmp_path}/f?train=l.txt").splits["train"]) == 6
  table = "".join(f"{c}/{k:03d}.png,{c}\n" for c in "ab" for k in range(5))
  (tmp_path / "f" / "t.csv").write_text(f"file,class\n{table}")
  assert len(data.from_string(f"csv:{tmp_path}/f/t.csv?image_column=file").splits["test"]) == 2


@pytest.mark.parametrize("text, words", [
    ("fodler:/x", ["folder:<path>", "digits", "did you mean 'folder'"]),
    ("cifar", ["folder:<path>"]),
    ("folder", ["folder:<path>"]),
    ("digits:/x", ["without a path"]),
    ("digits?sede=1", ["'sede'", "did you mean 'seed'"]),
    ("digits?seed=x", ["'x'", "number"]),
    ("domains:/x", ["test_domain"]),
])
def test_from_string_explains_itself(text, words):
  message = error_of(lambda: data.from_string(text))
  assert all(word in message for word in words), message


def test_from_string_with_a_bare_path_suggests_the_kind(tmp_path):
  assert f"did you mean 'folder:{tmp_path}'" in error_of(lambda: data.from_string(str(tmp_path)))


def test_image_files_for_prediction(tmp_path):
  make(tmp_path, {"a": 2, "b": 1})
  split = data.image_files([tmp_path / "b" / "000.png", tmp_path / "a"])
  assert len(split) == 3 and split.keys[0].endswith("b/000.png") and split.read(2)[0, 0, 0] == 1
  assert "no image" in error_of(lambda: data.image_files([]))


# Real images

@needs_real
@pytest.mark.parametrize("text, expected", [
    ("folder:{}/flowers12", {"train": 576, "val": 144, "test": 240}),
    ("folder:{}/dtd10", {"train": 240, "val": 60, "test": 200}),
    ("folder:{}/cifar10_jpeg", {"train": 800, "val": 200, "test": 4000}),
    ("domains:{}/pacs70?test=sketch", {"train": 1176, "val": 294, "test": 490}),
    ("list:{}/coil20?train=azimuth_train.txt&test=azimuth_test.txt", {"train": 288, "val": 72, "test": 360}),
    ("folder:{}/tinyimagenet_val?test_fraction=1", {"test": 4000}),
])
def test_real_data(text, expected):
  task = data.from_string(text.format(REAL))
  assert {k: len(s) for k, s in task.splits.items()} == expected and task.check() == []
  image = task.splits["test"].read(0)
  assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.std() > 5
