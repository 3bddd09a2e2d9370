"""Fine-grained sets from class folders and from TFDS's copies: splits, cuts, class names, remarks, halves."""
import io
import pickle
from collections import Counter

import fake_tfds
import pytest
from PIL import Image

from transferlab import data
from transferlab.data import finegrained, suites
from transferlab.data.tasks import DataError

# Our entry -> TFDS's builder, its classes, its splits.
PREPARED = {
    "inca/cub200": ("caltech_birds2011", 200, ("train", "test")),
    "inca/stanford_cars": ("cars196", 196, ("train", "test")),
    "inca/oxford_flowers": ("oxford_flowers102", 102, ("train", "validation", "test")),
    "inca/dtd": ("dtd", 47, ("train", "validation", "test")),
    "inca/oxford_pets": ("oxford_iiit_pet", 37, ("train", "test")),
    "inca/stanford_dogs": ("stanford_dogs", 120, ("train", "test")),
    "inca/eurosat": ("eurosat/rgb", 10, ("train",)),
}


@pytest.fixture(scope="module")
def jpeg():
  file = io.BytesIO()
  Image.new("RGB", (12, 10), (90, 40, 10)).save(file, "JPEG")
  return file.getvalue()


def folders(root, jpeg, classes, **images):
  """root/<split>/<class>/<i>.jpg with so many images of every class; root/<class>/ for the split ""."""
  for split, count in images.items():
    for name in classes:
      path = root / split.strip("_") / name
      path.mkdir(parents=True)
      for i in range(count):
        (path / f"{split}{i}.jpg").write_bytes(jpeg)
  return root


def names(count):
  return [f"class_{i:03}" for i in range(count)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """All seven builders: 5 examples of every class in train, 2 in each other split, classes by turns."""
  root = tmp_path_factory.mktemp("tfds")
  for builder, classes, splits in PREPARED.values():
    fake_tfds.prepare(builder, root, {s: classes * (5 if s == "train" else 2) for s in splits},
                      change=lambda _, i, example, c=classes: {**example, "label": i % c})
  return root


@pytest.mark.parametrize("name", PREPARED)
def test_every_builder(prepared, name):
  _, classes, splits = PREPARED[name]
  task = data.from_string(f"{name}?counts=any", prepared)
  trainval, test = 5 * classes + 2 * classes * ("validation" in splits), 2 * classes
  if len(splits) == 1:
    trainval, test = 4 * classes, classes
  assert {k: len(s) for k, s in task.splits.items()} == {"train": trainval, "test": test}
  assert task.num_classes == classes and task.source.startswith("array_record") and task.check() == []
  assert len(set(task.splits["train"].keys) | set(task.splits["test"].keys)) == trainval + test
  assert set(Counter(task.splits["train"].labels.tolist()).values()) == {trainval // classes}
  copied = pickle.loads(pickle.dumps(task))
  assert (copied.splits["train"].read(trainval - 1) == task.splits["train"].read(trainval - 1)).all()


@pytest.mark.parametrize("name", PREPARED)
def test_tuning_cuts_train_and_val_from_trainval_alone(prepared, name):
  _, classes, splits = PREPARED[name]
  final, tune = (data.from_string(f"{name}?counts=any&phase={phase}", prepared) for phase in ("final", "tune"))
  assert set(tune.splits) == {"train", "val"}
  train, val, test = (set(s.keys) for s in (tune.splits["train"], tune.splits["val"], final.splits["test"]))
  assert train | val == set(final.splits["train"].keys) and not train & val and not (train | val) & test
  per_class = 2 if "validation" in splits else 1
  assert set(Counter(tune.splits["val"].labels.tolist()).values()) == {per_class}
  if "validation" in splits:
    assert all(key.startswith("validation/") for key in val), "an official val is not cut anew"


def test_cuts_repeat(prepared):
  first, again = (data.from_string("inca/eurosat?counts=any", prepared) for _ in range(2))
  assert first.split_hash() == again.split_hash()


def test_eurosat_names_are_readable(prepared):
  task = data.from_string("inca/eurosat?counts=any", prepared)
  assert "Annual Crop Land" in task.class_names and "Sea or Lake" in task.class_names
  assert task.templates == ("a centered satellite photo of {}.",)


def test_shots_of_a_published_set(prepared):
  task = data.from_string("inca/dtd?counts=any&shots=2&shots_seed=3", prepared)
  assert Counter(task.splits["train"].labels.tolist()) == {c: 2 for c in range(47)}
  assert "2 shots" in task.protocol and task.draw == "shots seed 3" and len(task.splits["test"]) == 94


def test_published_sizes_are_checked(prepared):
  with pytest.raises(DataError, match="inca/cub200 in .* has 1000 of 5994 trainval images"):
    data.from_string("inca/cub200", prepared)


def test_another_version_of_a_builder(tmp_path):
  fake_tfds.prepare("dtd", tmp_path, {"train": 10, "validation": 5, "test": 5}, version="1.0.0")
  with pytest.raises(DataError, match="1.0.0.*3.0.1"):
    data.from_string("inca/dtd", tmp_path)


# Class folders.


def test_folders_with_and_without_val(tmp_path, jpeg):
  folders(tmp_path / "mit67", jpeg, names(67), train=5, test=2)
  task = data.from_string("inca/mit67?counts=any", tmp_path)
  assert {k: len(s) for k, s in task.splits.items()} == {"train": 335, "test": 134} and task.source == "folder"
  assert task.class_names[3] == "class 003" and task.splits["test"].keys[0] == "test/class_000/test0.jpg"
  tune = data.from_string("inca/mit67?counts=any&phase=tune", tmp_path)
  assert set(Counter(tune.splits["val"].labels.tolist()).values()) == {1} and len(tune.splits["train"]) == 268
  folders(tmp_path / "mit67", jpeg, names(67), val=3)
  whole = data.from_string("inca/mit67?counts=any", tmp_path)
  tune = data.from_string("inca/mit67?counts=any&phase=tune", tmp_path)
  assert len(whole.splits["train"]) == 8 * 67 and len(tune.splits["train"]) == 335 and len(tune.splits["val"]) == 201
  assert whole.splits["train"].read(8 * 67 - 1).shape == (10, 12, 3)


def test_eurosat_folder_is_cut_and_tuning_stays_off_its_test(tmp_path, jpeg):
  folders(tmp_path / "eurosat/2750", jpeg, names(10), _=20)
  final, tune = (data.from_string(f"inca/eurosat?counts=any&phase={p}", tmp_path) for p in ("final", "tune"))
  assert {k: len(s) for k, s in final.splits.items()} == {"train": 160, "test": 40}
  assert {k: len(s) for k, s in tune.splits.items()} == {"train": 130, "val": 30}
  assert {key for s in tune.splits.values() for key in s.keys} == set(final.splits["train"].keys)


@pytest.mark.parametrize("name, folder, classes", [
  ("i2s/wikiart", "wikiart", 195), ("i2s/sketches", "sketches", 250), ("i2s/oxford_flowers", "flowers", 102),
  ("inca/fgvc_aircraft", "fgvc-aircraft", 100), ("inca/flood_depth", "flooddepth", 4),
  ("inca/herbarium", "herbarium2019", 7)])
def test_sets_that_only_folders_hold(tmp_path, jpeg, name, folder, classes):
  folders(tmp_path / folder, jpeg, names(classes), train=1, test=1)
  task = data.from_string(f"{name}?counts=any", tmp_path)
  assert task.num_classes == classes and len(task.splits["test"]) == classes


def test_cropped_folder_is_the_published_one(tmp_path, jpeg):
  folders(tmp_path / "CUB_200_2011", jpeg, names(200), train=1, test=1)
  task = data.from_string("i2s/cub200?counts=any", tmp_path)
  assert "cropped to the bounding box" in task.source
  assert "cropped" not in data.from_string("inca/cub200?counts=any", tmp_path).source
  folders(tmp_path / "cubs_cropped", jpeg, names(200), train=1, test=2)
  task = data.from_string("i2s/cub200?counts=any", tmp_path)
  assert task.source == "folder" and len(task.splits["test"]) == 400


def test_half_a_set(tmp_path, jpeg):
  folders(tmp_path / "wikiart", jpeg, names(195), train=1)
  with pytest.raises(DataError, match=r"wikiart has no test/ with class folders; expected train/ and test/"):
    data.from_string("i2s/wikiart", tmp_path)
  folders(tmp_path / "wikiart", jpeg, names(194), test=1)
  with pytest.raises(DataError, match="train and test hold different classes .*only in train: 'class_194'"):
    data.from_string("i2s/wikiart?counts=any", tmp_path)


def test_two_folders_for_one_split_are_a_problem_and_not_an_exception(tmp_path, jpeg):
  folders(tmp_path / "wikiart", jpeg, names(3), train=1, test=1, val=1, validation=1)
  source, = suites.ENTRIES["i2s/wikiart"].find(tmp_path)
  assert "two folders for the val split" in source.problem


def test_another_number_of_classes(tmp_path, jpeg):
  folders(tmp_path / "sketches", jpeg, names(12), train=1, test=1)
  with pytest.raises(DataError, match="has 12 classes; expected 250"):
    data.from_string("i2s/sketches?counts=any", tmp_path)


def test_an_unreadable_image_is_named(tmp_path, jpeg):
  root = folders(tmp_path / "flood_depth", jpeg, names(3), train=2, test=1)
  (root / "train/class_001/train0.jpg").write_bytes(jpeg[:60])
  task = data.from_string("inca/flood_depth", tmp_path)
  with pytest.raises(data.BadImage, match="1 of 6 images .*class_001/train0.jpg"):
    data.check_images(task.splits["train"])


def test_classes_that_differ_in_case_only_are_remarked(tmp_path, jpeg):
  folders(tmp_path / "flood_depth", jpeg, ["Deep", "deep", "dry"], train=2, test=1)
  remarks = data.from_string("inca/flood_depth", tmp_path).check()
  assert any("'Deep', 'deep' differ only in case" in remark for remark in remarks)


def test_other_data_under_the_same_name_is_not_half_a_set(tmp_path, jpeg):
  """CoOp and TFDS put their own things into dtd/ and eurosat/."""
  folders(tmp_path / "dtd/images", jpeg, names(2), _=1)
  folders(tmp_path / "eurosat/rgb", jpeg, names(2), _=1)
  assert suites.ENTRIES["inca/dtd"].find(tmp_path) == suites.ENTRIES["inca/eurosat"].find(tmp_path) == []


def test_absent(tmp_path):
  with pytest.raises(DataError, match="i2s/wikiart is not in .*wikiart/{train,test}/<class>.*piggyback"):
    data.from_string("i2s/wikiart", tmp_path)
  with pytest.raises(DataError, match="cars196/2.1.0/ as TFDS prepares it; prepare it with `transferlab data prepare"):
    data.from_string("inca/stanford_cars", tmp_path)


def test_suites():
  assert [n for n in suites.SUITES["imagenet_to_sketch"]] == [
      "i2s/cub200", "i2s/stanford_cars", "i2s/oxford_flowers", "i2s/wikiart", "i2s/sketches"]
  entries = [suites.ENTRIES[name] for name in suites.SUITES["imagenet_to_sketch"]]
  assert [e.num_classes for e in entries] == [200, 196, 102, 195, 250]
  assert [tuple(e.counts.values()) for e in entries] == [
      (5994, 5794), (8144, 8041), (2040, 6149), (42129, 10628), (16000, 4000)]
  assert len(suites.SUITES["inca11"]) == 11 and "recall" in finegrained.__doc__


def test_real_textures_in_the_layout_of_a_suite(tmp_path, shared):
  """Ten of DTD's 47 classes: everything fits but the number of classes."""
  (tmp_path / "dtd").symlink_to(shared / "data/dtd10")
  with pytest.raises(DataError, match="has 10 classes; expected 47"):
    data.from_string("inca/dtd?counts=any", tmp_path)
  (tmp_path / "flood_depth").symlink_to(shared / "data/dtd10")
  task = data.from_string("inca/flood_depth?phase=tune&shots=4", tmp_path)
  assert len(task.splits["train"]) == 40 and len(task.splits["val"]) == 60 and task.check() == []
  assert data.check_images(task.splits["train"])[1] == ()
