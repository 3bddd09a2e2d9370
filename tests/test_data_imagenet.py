"""ImageNet and its shifted test sets: folders, NOAH's lists, TFDS, labels among 1,000 classes, masking, bad input."""
import io
import pickle
import shutil

import fake_tfds
import numpy as np
import pytest
from PIL import Image

from transferlab import data
from transferlab.data import ENTRIES, SUITES, DataError, imagenet
from transferlab.data.fewshot import few_shot

WNIDS = [f"n{1000 + 7 * i:08d}" for i in range(1000)]


def picture():
  file = io.BytesIO()
  Image.new("RGB", (3, 2), (9, 90, 200)).save(file, "PNG")
  return file.getvalue()


PICTURE = picture()


def classes(root, names, count=1):
  """`root/<name>/<name>_<i>.JPEG`."""
  for name in names:
    (root / name).mkdir(parents=True)
    for i in range(count):
      (root / name / f"{name}_{i}.JPEG").write_bytes(PICTURE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """All sets as folders under their own names: two training images per class, test sets with a few classes only."""
  root = tmp_path_factory.mktemp("folders")
  classes(root / "imagenet" / "train", WNIDS, 2)
  classes(root / "imagenet" / "val", WNIDS[:30])
  classes(root / "imagenetv2-matched-frequency-format-val", [str(i) for i in (0, 10, 2, 999)], 3)
  classes(root / "imagenet-sketch", [WNIDS[i] for i in (3, 500)])
  classes(root / "imagenet-a", [WNIDS[i] for i in (6, 11, 999)], 2)
  classes(root / "imagenet-r", [WNIDS[i] for i in (1, 2)], 2)
  return root


@pytest.fixture
def tree(folders, tmp_path):
  """Links to the folders, for tests that take some away or add files."""
  for name in folders.iterdir():
    if name.name != "imagenet":
      (tmp_path / name.name).symlink_to(name)
  (tmp_path / "imagenet").mkdir()
  for name in ("train", "val"):
    (tmp_path / "imagenet" / name).symlink_to(folders / "imagenet" / name)
  return tmp_path


def open_(name, data_dir, query=""):
  return data.from_string(f"imagenet/{name}?counts=any&shots=1{query}", data_dir)


@pytest.mark.parametrize("name, labels", [
    ("val", [*range(30)]), ("v2", [0, 0, 0, 2, 2, 2, 10, 10, 10, 999, 999, 999]), ("sketch", [3, 500]),
    ("a", [6, 6, 11, 11, 999, 999]), ("r", [1, 1, 2, 2])])
def test_labels_are_places_among_the_thousand_sorted_classes(folders, name, labels):
  task = open_(name, folders)
  assert task.splits["test"].labels.tolist() == labels and task.class_names == tuple(WNIDS)
  assert task.splits["train"].labels.tolist() == list(range(1000)) and set(task.splits) == {"train", "test"}
  assert task.test_classes == () and task.source == "folder" and task.templates == ("a photo of a {}.",)
  for split in task.splits.values():
    split = pickle.loads(pickle.dumps(split))
    assert split.read(len(split) - 1).tolist() == [[[9, 90, 200]] * 3] * 2
    assert all(key.split("/")[0] in (WNIDS[label], str(label)) for key, label in zip(split.keys, split.labels))
  task.check()


def test_training_images_are_drawn_with_a_seed_or_all_taken(folders):
  whole = data.from_string("imagenet/a?counts=any&shots=0", folders).splits["train"]
  assert len(whole) == 2000
  draws = [open_("a", folders, f"&seed={seed}") for seed in (0, 1)]
  for seed, task in enumerate(draws):
    assert task.splits["train"].keys == few_shot(whole, 1, seed).keys and task.draw == f"seed {seed}"
  assert draws[0].splits["train"].keys != draws[1].splits["train"].keys
  assert open_("v2", folders).splits["train"].hash() == draws[0].splits["train"].hash()
  assert data.from_string("imagenet/a?counts=any", folders).protocol == (
      "ImageNet shift, final: train=train test=test, shots 16, incomplete (6 of 7500 test images)")
  with pytest.raises(DataError, match="shots is -1"):
    data.from_string("imagenet/a?counts=any&shots=-1", folders)


def test_masked_tasks_name_the_classes_present_and_another_protocol(folders):
  for name, present in (("a", (6, 11, 999)), ("r", (1, 2))):
    usual, masked = open_(name, folders), open_(f"{name}_masked", folders)
    assert usual.test_classes == () and masked.test_classes == present
    assert usual.protocol != masked.protocol and "among the classes present" in masked.protocol
    assert usual.split_hash() == masked.split_hash() and masked.num_classes == 1000


def test_the_suite_has_one_protocol_and_the_published_sizes():
  assert SUITES["imagenet_shift"] == tuple(f"imagenet/{name}" for name in ("val", "v2", "sketch", "a", "r"))
  assert len({(ENTRIES[name].protocol, str(ENTRIES[name].phases)) for name in SUITES["imagenet_shift"]}) == 1
  assert {name.split("/")[1]: ENTRIES[name].counts["test"] for name in SUITES["imagenet_shift"]} == {
      "val": 50_000, "v2": 10_000, "sketch": 50_889, "a": 7_500, "r": 30_000}
  assert ENTRIES["imagenet/val"].builders == ("imagenet2012:5.1.0",)
  assert ENTRIES["imagenet/v2"].builders == ("imagenet2012:5.1.0", "imagenet_v2/matched-frequency:3.0.0")


def test_builders_and_versions_are_those_of_tfds():
  import tensorflow_datasets as tfds
  for wanted in (imagenet.TRAIN, *imagenet.TESTS.values()):
    builder = tfds.builder(wanted.builder.name)
    assert str(builder.version) == wanted.builder.pinned and builder.info.features["label"].num_classes == 1000


def test_a_test_set_of_another_size_is_an_error(folders):
  with pytest.raises(DataError, match="imagenet/a in .* has 6 of 7500 test images"):
    data.from_string("imagenet/a?shots=1", folders)


def test_coops_layout_and_class_names(tree):
  for old, new in (("imagenet/train", "imagenet/images/train"), ("imagenet/val", "imagenet/images/val"),
                   ("imagenet-a", "imagenet-adversarial/imagenet-a"), ("imagenet-r", "imagenet-rendition/imagenet-r"),
                   ("imagenet-sketch", "imagenet-sketch_/images"),
                   ("imagenetv2-matched-frequency-format-val", "imagenetv2/imagenetv2-matched-frequency-format-val")):
    (tree / new).parent.mkdir(parents=True, exist_ok=True)
    (tree / old).rename(tree / new)
  (tree / "imagenet-sketch_").rename(tree / "imagenet-sketch")
  names = [f"{wnid} name of {i % 999}" for i, wnid in enumerate(WNIDS)]
  (tree / "imagenet" / "classnames.txt").write_text("\ufeff" + "\r\n".join(reversed(names)) + "\r\n", "utf-8")
  for name in imagenet.TESTS:
    task = open_(name, tree)
    assert task.class_names[5] == "name of 5" and len(set(task.class_names)) == 1000
    assert {task.class_names[0], task.class_names[999]} == {f"name of 0 ({WNIDS[0]})", f"name of 0 ({WNIDS[999]})"}
  path = tree / "imagenet" / "classnames.txt"
  path.write_text("\n".join(names[1:]))
  with pytest.raises(DataError, match=f"classnames.txt names 999 of 1000 classes; {WNIDS[0]} is missing; expected"):
    open_("a", tree)
  path.write_bytes(b"\xff\xfe\x00")
  with pytest.raises(DataError, match="classnames.txt is UTF-16 or no text; expected lines such as `n01440764 tench`"):
    open_("a", tree)


# Bad input

def test_half_present_sets_say_which_half_is_missing(tree):
  (tree / "imagenet-a").unlink()
  with pytest.raises(DataError, match="imagenet/train is there, but neither imagenet-a nor imagenet-adversarial/"
                                      "imagenet-a is in .* with a folder per class; add it"):
    open_("a", tree)
  (tree / "imagenet" / "train").unlink()
  with pytest.raises(DataError, match="imagenet-r is there, but neither imagenet/train nor imagenet/images/train"):
    open_("r", tree)
  with pytest.raises(DataError, match="imagenet/a is not in .*; expected imagenet/train.*; prepare it with `transfer"
                                      "lab data prepare imagenet/a .*image-net.org"):
    open_("a", tree)


def test_training_folders_that_are_not_a_thousand_are_an_error(tree):
  (tree / "imagenet" / "train").unlink()
  classes(tree / "imagenet" / "train", WNIDS[:999])
  with pytest.raises(DataError, match="imagenet-a has the class folder 'n00007993', which is none of the 999"):
    open_("a", tree)
  with pytest.raises(DataError, match="has the class folder '999'"):
    open_("v2", tree)
  with pytest.raises(DataError, match="has 999 classes; expected 1000"):
    open_("r", tree)
  classes(tree / "imagenet" / "train", [WNIDS[999], "n1", "annotations"])  # the last two are no classes
  assert len(open_("a", tree).splits["train"]) == 1000


# NOAH's lists

def lists(tree, lines, name="train_meta.list.num_shot_1.seed_0"):
  (tree / "imagenet" / "annotations").mkdir(exist_ok=True)
  (tree / "imagenet" / "annotations" / name).write_text("\n".join(lines) + "\n")


def test_noahs_lists_are_preferred_and_taken_as_they_are(tree):
  lines = [f"{wnid}/{wnid}_1.JPEG {label}" for label, wnid in enumerate(WNIDS)][::-1]
  lists(tree, lines)
  task = open_("r", tree)
  usual = open_("r", tree, "&source=folder")
  assert task.source == "list" and task.splits["test"].hash() == usual.splits["test"].hash()
  assert [f"{key} {label}" for key, label in zip(task.splits["train"].keys, task.splits["train"].labels)] == lines
  assert task.splits["train"].read(3).shape == (2, 3, 3)
  with pytest.raises(DataError, match="annotations has no train_meta.list.num_shot_1.seed_2; found 'train_meta.list."
                                      "num_shot_1.seed_0'; choose one of these, or draw .*source=folder"):
    open_("r", tree, "&seed=2")
  assert len(open_("r", tree, "&seed=2&source=folder").splits["train"]) == 1000


@pytest.mark.parametrize("line, message", [
    (f"{WNIDS[0]}/{WNIDS[0]}_7.JPEG 0", "line 1 names .*_7.JPEG, which is not in"),
    (f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG 1000", "line 1 has the label '1000'; expected a whole number from 0 to 999"),
    (f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG 1", f"the label 1, which is {WNIDS[1]} in .*fetch the list again"),
    (f"../val/{WNIDS[0]}/{WNIDS[0]}_0.JPEG 0", "line 1 names '../val"), ("word", "line 1 is 'word'")])
def test_a_wrong_line_of_a_list_is_named(tree, line, message):
  lists(tree, [line])
  with pytest.raises(DataError, match=message):
    open_("a", tree)


# TFDS

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """ImageNet with classes 0 to 19 going round, ImageNet-A and -V2, as array_record; -R as TFRecord only."""
  root = tmp_path_factory.mktemp("tfds")
  def change(split, i, example):
    return {**example, "label": i % 20}
  fake_tfds.prepare("imagenet2012", root, {"train": 60, "validation": 8}, change=change)
  fake_tfds.prepare("imagenet_a", root, {"test": 9}, change=change)
  fake_tfds.prepare("imagenet_v2/matched-frequency", root, {"test": 5}, version="3.1.0", change=change)
  fake_tfds.prepare("imagenet_r", root, {"test": 5}, "tfrecord", change=change)
  return root


def test_sets_prepared_by_tfds(prepared):
  task = open_("a_masked", prepared, "&seed=3")
  assert task.source == "array_record imagenet2012:5.1.0+imagenet_a:0.1.0" and task.test_classes == tuple(range(9))
  assert task.num_classes == 1000 and task.class_names[0] == "n01440764" and task.class_names[999] == "n15075141"
  assert sorted(task.splits["train"].labels) == list(range(20)) and len(task.splits["test"]) == 9
  assert all(key.startswith("train/train_") for key in task.splits["train"].keys)
  whole = data.from_string("imagenet/a?counts=any&shots=0", prepared).splits["train"]
  assert len(whole) == 60 and task.splits["train"].keys == few_shot(whole, 1, 3).keys
  assert open_("val", prepared).splits["test"].labels.tolist() != [] and task.splits["test"].read(8).ndim == 3


def test_few_shots_are_drawn_from_the_first_examples_that_tfds_has_shuffled(prepared, monkeypatch):
  """Reading all of ImageNet's records for 16,000 of them would take hours."""
  monkeypatch.setattr(imagenet, "DRAWN_FROM", 40)
  whole = data.from_string("imagenet/a?counts=any&shots=0", prepared).splits["train"]
  assert len(whole) == 60
  drawn = data.from_string("imagenet/a?counts=any&shots=2", prepared).splits["train"]
  assert drawn.keys == few_shot(whole.select(range(40)), 2, 0).keys
  assert len(data.from_string("imagenet/a?counts=any&shots=17", prepared).splits["train"]) == 60


def test_versions_with_the_same_examples_are_accepted_with_a_remark(prepared):
  [source] = ENTRIES["imagenet/v2"].find(prepared)
  assert not source.problem and source.remark == "version 3.1.0 instead of 3.0.0"


def test_forms_do_not_mix_and_the_usable_one_is_taken(prepared, tree):
  with pytest.raises(DataError, match="has 'imagenet2012:5.1.0', 'imagenet_r:0.2.0' in different file formats"):
    open_("r", prepared)
  with pytest.raises(DataError, match="lacks 'imagenet_sketch:1.0.0' of 'imagenet2012:5.1.0', 'imagenet_sketch:1.0.0'"):
    open_("sketch", prepared)
  for name in ("imagenet2012", "imagenet_r"):
    shutil.copytree(prepared / name, tree / name)
  assert open_("r", tree).source == "folder"
  shutil.copytree(prepared / "imagenet_a", tree / "imagenet_a")
  assert [s.format for s in ENTRIES["imagenet/a"].find(tree)] == ["array_record", "folder"]
  lists(tree, ["any"])
  assert [s.format for s in ENTRIES["imagenet/a"].find(tree)] == ["list", "array_record", "folder"]
  assert np.all(open_("a", tree, "&source=folder").splits["test"].labels == [6, 6, 11, 11, 999, 999])
