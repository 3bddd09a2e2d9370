"""Few-shot: the sampler, `shots=` on any source, NOAH's lists, CoOp's split files, and what may be wrong in them."""
import io
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from engine import write_images
from PIL import Image

from transferlab import data, experiment
from transferlab.data import coop, fewshot, inventory, suites
from transferlab.data.fewshot import few_shot
from transferlab.data.tasks import DataError, Split
from transferlab.data.templates import IMAGENET_ENSEMBLE, RENAMES, TEMPLATES, readable


def split_of(labels, name="train"):
  return Split(name, tuple(f"{name}{i}" for i in range(len(labels))), np.array(labels, np.int32), len)


@pytest.fixture(scope="module")
def jpeg():
  file = io.BytesIO()
  Image.new("RGB", (12, 10), (90, 40, 10)).save(file, "JPEG")
  return file.getvalue()


def put(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


# The sampler.


def test_few_shot_takes_so_many_of_every_class_and_all_of_a_smaller_one():
  split = split_of([2] * 5 + [0] * 3 + [1] * 9)
  for shots in (1, 2, 4, 8, 16):
    drawn = few_shot(split, shots, seed=0)
    counts = Counter(drawn.labels.tolist())
    assert counts == {c: min(n, shots) for c, n in {2: 5, 0: 3, 1: 9}.items()}
    assert len(set(drawn.keys)) == len(drawn) and set(drawn.keys) <= set(split.keys)
    assert all(split.labels[split.keys.index(k)] == c for k, c in zip(drawn.keys, drawn.labels))
  assert few_shot(split, 0, seed=0) is split


def test_few_shot_draws_as_dassl_does():
  """Against a transcription of the rule: classes by first appearance, `random.sample` of each, one generator."""
  labels = random.Random(5).choices(range(4), k=60)
  state = random.Random(7)
  expected = []
  for label in dict.fromkeys(labels):
    expected += state.sample([i for i, other in enumerate(labels) if other == label], 3)
  drawn = few_shot(split_of(labels), 3, seed=7)
  assert [int(key.removeprefix("train")) for key in drawn.keys] == expected


def test_few_shot_draws_from_a_class_of_just_so_many_images_and_not_from_a_smaller_one():
  """The former moves the generator for the classes that follow, the latter does not."""
  state = random.Random(2)
  exact, last = state.sample(range(2, 5), 3), state.sample(range(5, 10), 3)
  assert few_shot(split_of([0] * 2 + [1] * 3 + [2] * 5), 3, seed=2).keys == tuple(
      f"train{i}" for i in [0, 1, *exact, *last])


def test_few_shot_is_the_same_on_every_machine():
  """Numbers of CPython 3.11; `random.sample` has drawn so since 3.2."""
  assert few_shot(split_of([0] * 30 + [1] * 30), 4, seed=1).keys == (
      "train4", "train18", "train27", "train25", "train54", "train32", "train38", "train33")


def test_few_shot_seeds_differ_and_repeat():
  split = split_of([0, 1, 2] * 20)
  keys = [few_shot(split, 2, seed).keys for seed in (0, 1, 0)]
  assert keys[0] == keys[2] != keys[1]


def test_few_shot_keeps_domains_and_pickles():
  split = Split("train", tuple("abcdef"), np.array([0, 1] * 3), len, domains=np.array([0, 0, 1, 1, 2, 2]))
  drawn = pickle.loads(pickle.dumps(few_shot(split, 1, seed=3)))
  assert [split.domains[split.keys.index(k)] for k in drawn.keys] == drawn.domains.tolist()


def test_few_shot_refuses_negative_numbers():
  with pytest.raises(DataError, match="shots is -1; expected"):
    few_shot(split_of([0, 1]), -1, seed=0)


# `shots=` on any source.


def test_any_source_takes_shots(tmp_path):
  root = write_images(tmp_path / "mine", count=10)
  whole = data.from_string(f"folder:{root}")
  task = data.from_string(f"folder:{root}?shots=2&shots_seed=1")
  assert Counter(task.splits["train"].labels.tolist()) == {0: 2, 1: 2, 2: 2}
  assert set(task.splits["train"].keys) <= set(whole.splits["train"].keys)
  assert all(task.splits[name].hash() == whole.splits[name].hash() for name in ("val", "test"))
  assert task.name == "mine, 2 shots" and "seed 1" in task.draw and task.protocol == ""
  assert task.check() == []
  other = data.from_string(f"folder:{root}?shots=2&shots_seed=2")
  assert other.splits["train"].hash() != task.splits["train"].hash() and other.name == task.name
  assert data.from_string(f"folder:{root}?shots=0").split_hash() == whole.split_hash()
  assert len(data.from_string("digits?shots=1").splits["train"]) == 10


def test_shots_of_a_domain_folder_and_of_a_csv(tmp_path):
  for domain in ("photo", "sketch", "toy"):
    write_images(tmp_path / "dg" / domain, count=6)
  task = data.from_string(f"domains:{tmp_path / 'dg'}?test=toy&shots=2")
  assert Counter(task.splits["train"].labels.tolist()) == {0: 2, 1: 2, 2: 2} and task.splits["train"].domains.max() < 2
  root = write_images(tmp_path / "flat", count=6)
  rows = [f"{c}/{i}.jpg,{c}" for c in ("ant", "bee", "cat") for i in range(6)]
  (root / "table.csv").write_text("image,label\n" + "\n".join(rows))
  assert len(data.from_string(f"csv:{root / 'table.csv'}?shots=1").splits["train"]) == 3


@pytest.mark.parametrize("query, message", [
    ("shots=two", "shots is 'two'; expected a number"), ("shots=-3", "shots is -3; expected"),
    ("shots_seed=2", "shots_seed is 2 without shots"), ("shot=2", "did you mean 'shots'"),
    ("test_fraction=1&shots=1", "no training images to draw 1 per class from")])
def test_wrong_shots(tmp_path, query, message):
  root = write_images(tmp_path / "mine", count=6)
  with pytest.raises(DataError, match=message):
    data.from_string(f"folder:{root}?{query}")


# NOAH's lists.


@pytest.fixture
def pets(tmp_path, jpeg):
  """oxford-pets in NOAH's own tree: 37 classes, train 3 per class, val 1, test 2; images in CoOp's folder."""
  return noah(tmp_path, jpeg, "few-shot/oxford-pets", "oxford_pets/images")


def noah(root, jpeg, lists, images, classes=37):
  lines = {}
  for seed in (0, 2):
    for shots in (1, 2):
      lines[f"train_meta.list.num_shot_{shots}.seed_{seed}"] = [
          f"a cat_{c}_{(i + seed) % 3}.jpg {c}" for c in range(classes) for i in range(shots)]
  lines["val_meta.list"] = [f"a cat_{c}_3.jpg {c}" for c in range(classes)]
  lines["test_meta.list"] = [f"a cat_{c}_{i}.jpg {c}" for c in range(classes) for i in (4, 5)]
  for name, rows in lines.items():
    put(root / lists / "annotations" / name, "\n".join(rows).encode() + b"\n")
  for c in range(classes):
    for i in range(6):
      put(root / images / f"a cat_{c}_{i}.jpg", jpeg)
  return root


def test_noah_lists(pets):
  task = data.from_string("fewshot/oxford_pets?shots=2&seed=2&counts=any", pets)
  assert {name: len(split) for name, split in task.splits.items()} == {"train": 74, "val": 37, "test": 74}
  assert task.splits["train"].keys[:2] == ("a cat_0_2.jpg", "a cat_0_0.jpg")
  assert task.splits["train"].read(0).shape == (10, 12, 3)
  assert task.num_classes == 37 and task.source == "list" and "shots 2" in task.protocol and task.draw == "seed 2"
  assert task.templates == ("a photo of a {}, a type of pet.",) and task.check() == []
  pickle.loads(pickle.dumps(task)).splits["test"].read(3)


def test_noah_seed_and_shots_choose_the_list(pets):
  splits = {(shots, seed): data.from_string(f"fewshot/oxford_pets?shots={shots}&seed={seed}&counts=any", pets)
            for shots in (1, 2) for seed in (0, 2)}
  assert len({task.splits["train"].hash() for task in splits.values()}) == 4
  assert len({task.splits["test"].hash() for task in splits.values()}) == 1


def test_noah_repeated_images_stay(pets):
  path = pets / "few-shot/oxford-pets/annotations/train_meta.list.num_shot_1.seed_0"
  path.write_text("".join(line * 2 for line in path.read_text().splitlines(True)))
  task = data.from_string("fewshot/oxford_pets?shots=1&seed=0&counts=any", pets)
  assert len(task.splits["train"]) == 74 and len(set(task.splits["train"].keys)) == 37


@pytest.mark.parametrize("lists, images", [
    ("FGFS/few-shot_split/oxford-pets", "FGFS/oxford-pets"), ("few-shot_split/oxford-pets", "oxford-pets"),
    ("oxford_pets", "oxford_pets/images"), ("oxford-pets", "oxford-pets/jpg"), ("few-shot/oxford-pets", "oxford_pets")])
def test_noah_layouts(tmp_path, jpeg, lists, images):
  noah(tmp_path, jpeg, lists, images)
  task = data.from_string("fewshot/oxford_pets?shots=1&seed=0&counts=any", tmp_path)
  assert task.splits["test"].read(0).shape == (10, 12, 3)


def test_noah_tuning_never_sees_the_test_list(pets):
  path = pets / "few-shot/oxford-pets/annotations/test_meta.list"
  path.write_text("a cat_0_4.jpg 0\nlost.jpg 99\n")
  task = data.from_string("fewshot/oxford_pets?shots=1&phase=tune&counts=any", pets)
  assert set(task.splits) == {"train", "val"}


def test_noah_published_size_is_checked(pets):
  with pytest.raises(DataError, match="74 of 3669 test images"):
    data.from_string("fewshot/oxford_pets?shots=1&seed=0", pets)


def test_noah_shots_without_a_list_name_those_there(pets):
  with pytest.raises(DataError, match="no train_meta.list.num_shot_16.seed_0; it has shots=1 with seed 0, 2; shots=2"):
    data.from_string("fewshot/oxford_pets", pets)


def test_an_image_with_two_labels_in_one_list(pets):
  path = pets / "few-shot" / "oxford-pets" / "annotations" / "test_meta.list"
  path.write_text("\na cat_0_4.jpg 0\na cat_1_4.jpg 1\n./a cat_0_4.jpg 3\n")
  with pytest.raises(DataError, match=r"test_meta\.list gives a cat_0_4\.jpg the label 0 in line 2 and 3 in line 4;"):
    data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)


def test_a_check_takes_lists_that_are_there(pets):
  row, = inventory.checked([data.ENTRIES["fewshot/oxford_pets"]], pets, accept=True)
  assert row.state == "checked", row
  assert "of shots=2 with seed 2, since there is no list for shots=16 with seed 0" in row.notes


def test_noah_label_out_of_range_names_file_and_line(pets):
  path = pets / "few-shot/oxford-pets/annotations/val_meta.list"
  path.write_text("\na cat_0_3.jpg 0\n\na cat_1_3.jpg 37\n")
  with pytest.raises(DataError, match=r"val_meta.list line 4 has the label '37'; expected .* from 0 to 36"):
    data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)
  path.write_text("a cat_0_3.jpg -1\n")
  with pytest.raises(DataError, match="line 1 has the label '-1'"):
    data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)


def test_noah_list_naming_a_missing_image(pets):
  (pets / "oxford_pets/images/a cat_5_4.jpg").unlink()
  with pytest.raises(DataError, match=r"test_meta.list line 11 names a cat_5_4.jpg, .* \(1 of 74 images"):
    data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)


@pytest.mark.parametrize("path", ["../../etc/x.jpg", "/etc/x.jpg", "a/../../x.jpg", "C:\\x.jpg", "..\\x.jpg"])
def test_noah_paths_stay_inside(pets, path):
  (pets / "few-shot/oxford-pets/annotations/val_meta.list").write_text(f"{path} 0\n")
  with pytest.raises(DataError, match="val_meta.list line 1 names .*; expected a path below"):
    data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)


@pytest.mark.parametrize("lost, message", [
    ("few-shot/oxford-pets/annotations/val_meta.list", "has no val_meta.list"),
    ("few-shot/oxford-pets/annotations/train_meta.list*", r"has no train_meta.list.num_shot_\*"),
    ("oxford_pets/images/*", "the images of .* are neither beside it nor")])
def test_half_of_noah(pets, lost, message):
  for path in pets.glob(lost):
    path.unlink()
  source, = suites.ENTRIES["fewshot/oxford_pets"].find(pets)
  assert source.problem and "\n" not in source.problem
  with pytest.raises(DataError, match=message):
    data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"oneword\n", b"../x.jpg 0\n"])
def test_a_test_list_that_cannot_be_read_is_a_problem_and_not_an_exception(pets, content):
  (pets / "few-shot/oxford-pets/annotations/test_meta.list").write_bytes(content)
  source, = suites.ENTRIES["fewshot/oxford_pets"].find(pets)
  assert source.problem and "\n" not in source.problem


def test_absent_few_shot_says_where_it_is_looked_for(tmp_path):
  with pytest.raises(DataError, match="fewshot/food101 is not in .*food101/annotations.*NOAH.*coop/food101"):
    data.from_string("fewshot/food101", tmp_path)
  with pytest.raises(DataError, match=r"coop/dtd is not in .*split_zhou_DescribableTextures.json, images.*DATASETS.md"):
    data.from_string("coop/dtd", tmp_path)


def test_class_name_file(pets):
  path = pets / "few-shot/oxford-pets/annotations/classnames.txt"
  names = [f"wire_hair {i}" for i in range(37)]
  path.write_text("\ufeff" + "\r\n".join(names) + "\r\n", encoding="utf-8")
  task = data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)
  assert task.class_names == tuple(f"wire hair {i}" for i in range(37))
  path.write_text("\n".join(names[:-1]))
  with pytest.raises(DataError, match="classnames.txt has 36 class names; expected 37"):
    data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)


def test_classes_that_differ_in_case_only_are_remarked(pets):
  names = ["Bengal", "bengal", *(f"cat {i}" for i in range(35))]
  (pets / "few-shot/oxford-pets/classnames.txt").write_text("\n".join(names))
  task = data.from_string("fewshot/oxford_pets?shots=1&counts=any", pets)
  assert any("differ only in case" in remark for remark in task.check())


# CoOp's split files.


def zhou(root, jpeg, change=None, per_class=(6, 5, 2)):
  """eurosat: ten classes under their raw names, as CoOp's layout has it."""
  names = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
           "Residential", "River", "SeaLake"]
  split, start = {}, 0
  for part, count in zip(("train", "val", "test"), per_class):
    split[part] = [[f"{name}/{name}_{start + i}.jpg", c, readable([name], "eurosat")[0]]
                   for c, name in enumerate(names) for i in range(count)]
    start += count
  for rows in split.values():
    for path, *_ in rows:
      put(root / "eurosat/2750" / path, jpeg)
  if change:
    change(split)
  put(root / "eurosat/split_zhou_EuroSAT.json", json.dumps(split, indent=4).encode())
  return split


def test_coop_split(tmp_path, jpeg):
  split = zhou(tmp_path, jpeg)
  task = data.from_string("coop/eurosat?shots=4&seed=1&counts=any", tmp_path)
  assert {name: len(s) for name, s in task.splits.items()} == {"train": 40, "val": 40, "test": 20}
  assert task.splits["test"].keys == tuple(row[0] for row in split["test"])
  assert task.class_names[0] == "Annual Crop Land" and task.class_names[9] == "Sea or Lake"
  assert task.templates == ("a centered satellite photo of {}.",) and task.source == "split_zhou"
  assert task.splits["train"].read(0).shape == (10, 12, 3) and task.check() == []
  assert data.from_string("coop/eurosat?shots=0&counts=any", tmp_path).splits["train"].keys == tuple(
      row[0] for row in split["train"])


def test_coop_draws_val_after_train_with_the_same_generator(tmp_path, jpeg):
  split = zhou(tmp_path, jpeg)
  for shots, of_val in ((1, 1), (2, 2), (16, 4)):
    state, expected = random.Random(3), {}
    for part, count in (("train", shots), ("val", of_val)):
      classes = [[row[0] for row in split[part] if row[1] == c] for c in range(10)]
      expected[part] = sum((state.sample(rows, count) if len(rows) >= count else rows for rows in classes), [])
    task = data.from_string(f"coop/eurosat?shots={shots}&seed=3&counts=any", tmp_path)
    assert {part: list(task.splits[part].keys) for part in expected} == expected
    tuned = data.from_string(f"coop/eurosat?shots={shots}&seed=3&counts=any&phase=tune", tmp_path)
    assert tuned.splits["val"].hash() == task.splits["val"].hash() and "test" not in tuned.splits


def test_coop_default_is_16_shots_seed_1(tmp_path, jpeg):
  zhou(tmp_path, jpeg, per_class=(20, 5, 1))
  task = data.from_string("coop/eurosat?counts=any", tmp_path)
  assert len(task.splits["train"]) == 160 and task.draw == "seed 1" and "shots 16" in task.protocol


def test_coop_never_reads_pickles(tmp_path, jpeg):
  zhou(tmp_path, jpeg)
  plain = data.from_string("coop/eurosat?shots=1&counts=any", tmp_path).split_hash()
  put(tmp_path / "eurosat/split_fewshot/shot_1-seed_1.pkl", b"cos\nsystem\n(S'exit 1'\ntR.")
  assert data.from_string("coop/eurosat?shots=1&counts=any", tmp_path).split_hash() == plain


def set_row(index, value, part="train"):
  return lambda split: split[part].__setitem__(index, value)


@pytest.mark.parametrize("change, message", [
    (set_row(3, ["../../x.jpg", 0, "a"]), r"train\[3\] names '../../x.jpg', which leaves"),
    (set_row(3, ["/etc/passwd", 0, "a"]), r"train\[3\] names '/etc/passwd', which leaves"),
    (set_row(3, ["", 0, "a"]), r"train\[3\] names '', which leaves"),
    (set_row(2, ["x.jpg", "0", "a"], "val"), r"val\[2\] is \['x.jpg', '0', 'a'\]; expected \[image path, label"),
    (set_row(2, ["x.jpg", True, "a"]), r"train\[2\] is .*True"),
    (set_row(2, ["x.jpg", 1.0, "a"]), r"train\[2\] is .*1.0"),
    (set_row(2, ["x.jpg", -1, "a"]), r"train\[2\] is .*-1"),
    (set_row(2, ["x.jpg", 0]), r"train\[2\] is \['x.jpg', 0\]"),
    (set_row(2, [None, 0, "a"]), r"train\[2\] is \[None"),
    (set_row(2, ["x.jpg", 0, " "]), r"train\[2\] is"),
    (set_row(2, "x.jpg"), r"train\[2\] is 'x.jpg'"),
    (set_row(0, ["x.jpg", 0, "Farm"], "test"), r"test\[0\] calls class 0 'Farm'; elsewhere it is 'Annual Crop Land'"),
    (set_row(0, ["x.jpg", 12, "Farm"]), "11 labels up to 12 and none of 10"),
    (lambda split: split.pop("val"), "holds an object with 'train', 'test'; expected an object with the lists"),
    (lambda split: split.update(val={}), "expected an object with the lists train, val and test"),
    (lambda split: split.update(val=[]), "val is empty")])
def test_wrong_split_file(tmp_path, jpeg, change, message):
  zhou(tmp_path, jpeg, change)
  with pytest.raises(DataError, match=message) as error:
    data.from_string("coop/eurosat?shots=1&counts=any", tmp_path)
  assert "\n" not in str(error.value) and "split_zhou_EuroSAT.json" in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"train": [["a.jpg", 0, "a"', b"\xff\xfe{}", b"[" * 100_000])
def test_split_file_cut_short(tmp_path, jpeg, content):
  zhou(tmp_path, jpeg)
  (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_bytes(content)
  with pytest.raises(DataError, match="is no JSON .*was it cut short"):
    data.from_string("coop/eurosat?shots=1&counts=any", tmp_path)


def test_a_split_file_that_changed_is_read_again(tmp_path, jpeg):
  zhou(tmp_path, jpeg)
  before = data.from_string("coop/eurosat?shots=1&counts=any", tmp_path)
  zhou(tmp_path, jpeg, lambda split: split["test"].pop())
  after = data.from_string("coop/eurosat?shots=1&counts=any", tmp_path)
  assert len(after.splits["test"]) == len(before.splits["test"]) - 1


def test_split_file_with_missing_images(tmp_path, jpeg):
  split = zhou(tmp_path, jpeg)
  for row in split["test"][:3]:
    (tmp_path / "eurosat/2750" / row[0]).unlink()
  with pytest.raises(DataError, match=r"AnnualCrop_11.jpg, which is not in .*2750 \(3 of 20 test"):
    data.from_string("coop/eurosat?shots=1&counts=any", tmp_path)
  assert data.from_string("coop/eurosat?shots=1&counts=any&phase=tune", tmp_path)


def test_half_of_coop(tmp_path, jpeg):
  zhou(tmp_path, jpeg)
  (tmp_path / "eurosat/split_zhou_EuroSAT.json").rename(tmp_path / "split.json")
  with pytest.raises(DataError, match="eurosat has no split_zhou_EuroSAT.json; complete it"):
    data.from_string("coop/eurosat", tmp_path)
  (tmp_path / "split.json").rename(tmp_path / "eurosat/split_zhou_EuroSAT.json")
  (tmp_path / "eurosat/2750").rename(tmp_path / "eurosat/images")
  with pytest.raises(DataError, match="eurosat has no 2750; complete it"):
    data.from_string("coop/eurosat", tmp_path)


def test_a_wrong_number_of_classes(tmp_path, jpeg):
  zhou(tmp_path, jpeg, lambda split: [split.update({k: [r for r in v if r[1] < 9]}) for k, v in split.items()])
  with pytest.raises(DataError, match="has 9 classes; expected 10"):
    data.from_string("coop/eurosat?shots=1&counts=any", tmp_path)


def test_cars_keep_their_two_image_folders(tmp_path, jpeg):
  split = {part: [[f"cars_{'test' if part == 'test' else 'train'}/{c:05}{part}.jpg", c, f"2012 Make {c}"]
                  for c in range(196)] for part in ("train", "val", "test")}
  put(tmp_path / "stanford_cars/split_zhou_StanfordCars.json", json.dumps(split).encode())
  for rows in split.values():
    for path, *_ in rows:
      put(tmp_path / "stanford_cars" / path, jpeg)
  task = data.from_string("coop/stanford_cars?shots=1&counts=any", tmp_path)
  assert len(task.splits["test"]) == 196 and task.splits["test"].read(0).shape == (10, 12, 3)


@pytest.fixture
def aircraft(tmp_path, jpeg):
  names = [f"F/A-{i} B" for i in range(100)]
  put(tmp_path / "fgvc_aircraft/variants.txt", "\n".join(names).encode())
  for p, part in enumerate(("train", "val", "test")):
    images = [(f"{p}{c:03}", name) for c, name in enumerate(names)]
    put(tmp_path / f"fgvc_aircraft/images_variant_{part}.txt", "".join(f"{i} {n}\n" for i, n in images).encode())
    for image, _ in images:
      put(tmp_path / f"fgvc_aircraft/images/{image}.jpg", jpeg)
  return tmp_path


def test_aircraft_official_lists(aircraft):
  task = data.from_string("coop/fgvc_aircraft?counts=any", aircraft)
  assert task.class_names[3] == "F/A-3 B" and task.splits["test"].keys[3] == "2003.jpg" and task.source == "list"
  assert task.splits["test"].labels.tolist() == list(range(100))


@pytest.mark.parametrize("line", ["2001 F/B-1", "2001", "", "../2001 F/A-1 B"])
def test_aircraft_wrong_line(aircraft, line):
  path = aircraft / "fgvc_aircraft/images_variant_val.txt"
  path.write_text(f"1000 F/A-0 B\n{line}\n1001 F/A-1 B\n")
  with pytest.raises(DataError, match="images_variant_val.txt line 2 is .*; expected an image number and a name"):
    data.from_string("coop/fgvc_aircraft?counts=any", aircraft)


@pytest.mark.parametrize("name", ["variants.txt", "images_variant_test.txt"])
def test_aircraft_lists_that_are_no_text(aircraft, name):
  (aircraft / "fgvc_aircraft" / name).write_bytes(b"\xff\xfe\x00")
  with pytest.raises(DataError, match=f"{name} is UTF-16 or no text; expected "):
    data.from_string("coop/fgvc_aircraft?counts=any", aircraft)


def test_aircraft_wrong_class_names(aircraft):
  path = aircraft / "fgvc_aircraft/variants.txt"
  path.write_text(path.read_text() + "\nextra\n")
  with pytest.raises(DataError, match="variants.txt has 101 class names; expected 100"):
    data.from_string("coop/fgvc_aircraft?counts=any", aircraft)
  path.unlink()
  with pytest.raises(DataError, match="has no variants.txt; complete it"):
    data.from_string("coop/fgvc_aircraft?counts=any", aircraft)


def test_coop_imagenet_takes_folders_and_not_noahs_lists(tmp_path, jpeg):
  wnids = [f"n{i:08}" for i in range(1000)]
  for wnid in wnids:
    put(tmp_path / f"imagenet/images/train/{wnid}/a.JPEG", jpeg)
    put(tmp_path / f"imagenet/images/val/{wnid}/b.JPEG", jpeg)
  put(tmp_path / "imagenet/annotations/train_meta.list.num_shot_16.seed_1", b"n00000000/a.JPEG 0\n")
  put(tmp_path / "imagenet/classnames.txt", "\n".join(f"{w} fish {i}" for i, w in enumerate(wnids)).encode())
  task = data.from_string("coop/imagenet?counts=any", tmp_path)
  assert {name: len(split) for name, split in task.splits.items()} == {"train": 1000, "test": 1000}
  assert task.source == "folder" and task.draw == "seed 1" and task.class_names[7] == "fish 7"
  assert task.protocol.startswith("CoOp few-shot") and task.templates == ("a photo of a {}.",)


# Names and templates.


def test_suites_have_the_published_tasks():
  assert len(suites.SUITES["fewshot5"]) == 5 and len(suites.SUITES["coop11"]) == 11
  assert {n.split("/")[1] for n in suites.SUITES["coop11"]} == set(TEMPLATES)
  for name in suites.SUITES["coop11"] + suites.SUITES["fewshot5"]:
    entry = suites.ENTRIES[name]
    assert {"shots", "seed"} == set(entry.options) and "test" not in entry.phases.get("tune", {}) and entry.num_classes
    assert entry.options["seed"].default == (name[0] == "c") and entry.options["seed"].annotation is int
    assert entry.templates and all("{}" in t for t in entry.templates)


def test_renames():
  assert readable(["SeaLake", "Forest", "a_b"], "eurosat") == ("Sea or Lake", "Forest", "a b")
  assert readable(["Faces", "car_side"], "caltech101") == ("face", "car side")
  assert readable(["Faces"], "dtd") == ("Faces",)
  for dataset, names in RENAMES.items():
    assert readable(readable(names, dataset), dataset) == readable(names, dataset), "renaming twice changes nothing"
  assert len(RENAMES["eurosat"]) == 8 and len(IMAGENET_ENSEMBLE) == 8


def test_fewshot_modules_keep_to_their_own_names():
  assert all(e.name.startswith("fewshot/") for e in fewshot.ENTRIES)
  assert all(e.name.startswith("coop/") for e in coop.ENTRIES)


# The configuration file.


def test_config_opens_what_it_says(pets):
  for text, data_, draw in (("task=oxford_pets,shots=1,seed=2,counts=any", "fewshot/oxford_pets", "seed 2"),
                            ("task=fewshot/oxford_pets,shots=2,counts=any", "fewshot/oxford_pets", "seed 0")):
    config = experiment.load(f"{ROOT / 'configs' / 'fewshot.py'}:{text}")
    task = data.from_string(config.data, pets)
    assert (task.name, task.draw) == (data_, draw) and config.select == "best" and config.augmentation == "fewshot"
  config = experiment.load(f"{ROOT / 'configs' / 'fewshot.py'}:task=coop/dtd")
  assert config.data.startswith("coop/dtd?shots=16") and config.select == "last" and config.augmentation == "crop_flip"
