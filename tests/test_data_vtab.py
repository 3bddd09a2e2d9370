"""VTAB-1k: its table, slices and labels against TFDS and its own reading; lists of extracted images; bad input."""
import pickle
import shutil

import fake_tfds
import numpy as np
import pytest
from PIL import Image

from transferlab import data
from transferlab.data import vtab, vtab_lists
from transferlab.data.tasks import BadImage, DataError

TASKS = {task.name: task for task in vtab.TASKS}
BUILDERS = {task.builder: task for task in vtab.TASKS}
N = 38  # train examples of most fakes: floors of .6n + .2n and of .8n differ, and .9n is no whole number
SPLITS = {  # what the real builders have; three splits elsewhere
    "eurosat/rgb": ("train",), "resisc45": ("train",), "dsprites": ("train",), "smallnorb": ("train", "test"),
    "caltech101": ("train", "test"), "cifar100": ("train", "test"), "svhn_cropped": ("train", "test"),
    "oxford_iiit_pet": ("train", "test")}
SIZES = {"train": N, "validation": 9, "test": 14}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Format -> data directory with all 16 builders; the same examples in both."""
  root = tmp_path_factory.mktemp("prepared")
  for form in ("array_record", "tfrecord"):
    for builder in BUILDERS:
      counts = {split: SIZES[split] for split in SPLITS.get(builder, ("train", "validation", "test"))}
      fake_tfds.prepare(builder, root / form, counts, form, change=spread_depths if builder == "clevr" else None)
  return {form: root / form for form in ("array_record", "tfrecord")}


def spread_depths(split, i, example):
  """Else the nearest of many objects would be in the first bin always."""
  for thing in example["objects"]:
    thing["pixel_coords"][2] = max(thing["pixel_coords"][2], (7, 8.2, 8.7, 9.2, 9.7, 10.5)[i % 6])
  return example


@pytest.fixture
def lists(tmp_path):
  """A data directory with `vtab-1k/dtd`: 8 + 4 training and 5 test images, all four lists."""
  write_lists(tmp_path / "vtab-1k" / "dtd", 47)
  return tmp_path


def write_lists(folder, num_classes):
  rng = np.random.default_rng(len(folder.name))
  lines = {}
  for part, count in (("train800", 8), ("val200", 4), ("test", 5)):
    images = folder / "images" / ("test" if part == "test" else "train800val200")
    images.mkdir(parents=True, exist_ok=True)
    lines[part] = []
    for i in range(count):
      name = f"{i + 100 * (part == 'val200'):06d}.jpg"
      Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).save(images / name)
      lines[part].append(f"images/{images.name}/{name} {rng.integers(num_classes)}")
  lines["train800val200"] = lines["train800"] + lines["val200"]
  for part, rows in lines.items():
    (folder / f"{part}.txt").write_text("\n".join(rows) + "\n")


def edit(path, row, line):
  lines = path.read_text().split("\n")
  lines[row] = line
  path.write_text("\n".join(lines))


def open_any(name, data_dir, phase="final", **options):
  return data.from_string(f"vtab/{name}?phase={phase}&counts=any", data_dir=data_dir, **options)


# The table.

def test_suite_in_published_order():
  names = [name.removeprefix("vtab/") for name in data.SUITES["vtab1k"]]
  assert names == ["cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn", "sun397", "camelyon", "eurosat",
                   "resisc45", "retinopathy", "clevr_count", "clevr_dist", "dmlab", "kitti_dist", "dspr_loc",
                   "dspr_ori", "snorb_azim", "snorb_ele"]
  found = [data.ENTRIES[f"vtab/{name}"] for name in names]
  assert [e.group for e in found] == 7 * ["natural"] + 4 * ["specialized"] + 8 * ["structured"]
  assert [e.num_classes for e in found] == [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
  assert [e.counts["test"] for e in found] == [
      10000, 6084, 1880, 6149, 3669, 26032, 21750, 32768, 5400, 6300, 42670, 15000, 15000, 22735, 711, 73728, 73728,
      12150, 12150]
  for entry in found:
    assert dict(entry.counts, test=0) == {"train800": 800, "val200": 200, "train800val200": 1000, "test": 0}
    assert next(iter(entry.phases)) == "final"
    assert entry.phases["tune"] == {"train": "train800", "val": "val200"}


@pytest.mark.parametrize("builder", BUILDERS)
def test_table_agrees_with_tfds(builder, tmp_path):
  import tensorflow_datasets as tfds
  made, task = tfds.builder(builder, data_dir=tmp_path), BUILDERS[builder]
  assert str(made.version) == task.pinned
  names = set(made.info.features)
  assert task.key in names if task.key else not names & {"id", "file_name", "filename", "name"}
  if not task.names:
    assert made.info.features["label"].num_classes == task.num_classes


@pytest.mark.parametrize("name", TASKS)
def test_derived_class_names_are_as_many_as_classes(name):
  assert len(set(TASKS[name].names)) in (0, TASKS[name].num_classes)


@pytest.mark.parametrize("name, sizes, expected", [  # by hand, at the real sizes of the train split and of odd ones
    ("cifar100", {"train": 50000}, {"val200": (45000, 45200)}),
    ("pets", {"train": 3680}, {"val200": (2944, 3144)}),
    ("eurosat", {"train": 27000}, {"val200": (16200, 16400), "test": (21600, 27000)}),
    ("resisc45", {"train": 31500}, {"val200": (18900, 19100), "test": (25200, 31500)}),
    ("caltech101", {"train": 3057}, {"val200": (2751, 2951)}),
    ("dspr_ori", {"train": 737280}, {"val200": (589824, 590024), "test": (663552, 737280)}),
    ("eurosat", {"train": 1009}, {"val200": (605, 805), "test": (806, 1009)}),
    ("dspr_loc", {"train": 1009}, {"val200": (807, 1007), "test": (907, 1009)}),
    ("snorb_ele", {"test": 24300}, {"val200": (0, 200), "test": (12150, 24300)}),
    ("svhn", {"train": 905}, {"val200": (814, 905)}),  # cut short, which open_entry reports
])
def test_slices_by_hand(name, sizes, expected):
  task, (split, n) = TASKS[name], next(iter(sizes.items()))
  starts = {"val200": (task.val, 200), "test": (task.test, None)}
  for part, (start, stop) in expected.items():
    assert starts[part][0].split == split
    assert starts[part][0].rows(n, starts[part][1]) == range(start, stop)


# Derived labels.

@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("distance, label", [
    (0.0, -1), (1e-3, 0), (8.0, 0), (8.0001, 1), (8.5, 1), (8.75, 2), (9.0, 2), (9.5, 3), (9.6, 4), (10.0, 4),
    (10.001, 5), (100.0, 5), (100.1, 6), (np.inf, 6)])
def test_clevr_distance_edges(distance, label, kind):
  """Equal to a threshold is not above it; outside all of them is outside the classes."""
  scene = {"objects": {"pixel_coords": np.array([[1, 2, 300.0], [900, 0, distance]], kind)}}
  assert vtab.clevr_distance(scene) == (label if distance < 300 else 6)
  just_above = {"objects": {"pixel_coords": np.nextafter(np.array([[0, 0, 8.5]], kind), kind(9))}}
  assert vtab.clevr_distance(just_above) == 2


@pytest.mark.parametrize("distances, types, label", [
    ([8.0], [0], 0), ([8.01], [1], 1), ([20.0], [2], 1), ([20.5], [0], 2), ([-3.0], [0], 0),
    ([5.0], [3], 3), ([5.0, 30.0], [3, 2], 2), ([30.0, 9.0, 4.0], [0, 1, 7], 1), ([], [], 3), ([999.0], [0], 2),
    ([-100.0], [0], -1)])
def test_kitti_distance_edges(distances, types, label):
  location = np.array([[50, -50, z] for z in distances], np.float32)
  assert vtab.kitti_distance({"objects": {"location": location, "type": np.array(types, np.int64)}}) == label


def test_bins_of_dsprites():
  by_twos = [vtab.binned({"f": np.int64(i)}, "f", 32, 16) for i in range(32)]
  assert by_twos == [i // 2 for i in range(32)]
  by_two_and_a_half = [vtab.binned({"f": np.int64(i)}, "f", 40, 16) for i in range(40)]
  assert by_two_and_a_half == [2 * i // 5 for i in range(40)]
  assert np.bincount(by_two_and_a_half).tolist() == 8 * [3, 2]


def test_scenes_without_objects():
  assert vtab.clevr_count({"objects": {"size": np.zeros(0)}}) == -3
  assert vtab.clevr_distance({"objects": {"pixel_coords": np.zeros(0, np.float32)}}) == 6


# TFDS's forms, against TFDS's own reading.

def by_loop(name, example):
  """The label as `specs` have it, written down a second time."""
  objects = example.get("objects")
  if name == "clevr_count":
    return sum(1 for _ in objects["color"]) - 3
  if name == "clevr_dist":
    nearest = min(float(c[2]) for c in objects["pixel_coords"])
    return max(i for i, t in enumerate([0, 8, 8.5, 9, 9.5, 10, 100]) if t < nearest)
  if name == "kitti_dist":
    nearest = min([float(c[2]) for c, t in zip(objects["location"], objects["type"]) if t in (0, 1, 2)] + [1000])
    return max(i for i, t in enumerate([-100, 8, 20, 999]) if t < nearest)
  feature = {"dspr_loc": "label_x_position", "dspr_ori": "label_orientation", "snorb_azim": "label_azimuth",
             "snorb_ele": "label_elevation"}.get(name, "label")
  value = int(example[feature])
  return {"dspr_loc": value // 2, "dspr_ori": value * 2 // 5}.get(name, value)


def in_published_slices(name, sizes):
  """Part -> (split, rows), with ⌊⌋ by hand for N = 38."""
  val = {"cifar100": 34, "caltech101": 34, "svhn": 34, "clevr_count": 34, "clevr_dist": 34, "pets": 30, "dspr_loc": 30,
         "dspr_ori": 30, "eurosat": 22, "resisc45": 22}
  test = {"eurosat": ("train", 29), "resisc45": ("train", 29), "dspr_loc": ("train", 33), "dspr_ori": ("train", 33),
          "snorb_azim": ("test", 7), "snorb_ele": ("test", 7), "clevr_count": ("validation", 0),
          "clevr_dist": ("validation", 0)}
  val_split = "train" if name in val else "test" if name.startswith("snorb") else "validation"
  test_split, start = test.get(name, ("test", 0))
  train, val = ("train", range(N)), (val_split, range(val.get(name, 0), sizes[val_split]))
  return {"train": [train, val], "test": [(test_split, range(start, sizes[test_split]))]}


@pytest.mark.parametrize("name", TASKS)
def test_parts_of_every_task(name, prepared):
  import tensorflow_datasets as tfds
  task = TASKS[name]
  opened = {form: open_any(name, prepared[form]) for form in prepared}
  folder = prepared["array_record"] / task.builder / task.pinned
  source = tfds.builder_from_directory(folder).as_data_source()
  for split, pieces in in_published_slices(name, {k: len(v) for k, v in source.items()}).items():
    examples = [source[where][row] for where, rows in pieces for row in rows]
    found = opened["array_record"].splits[split]
    assert found.labels.tolist() == [by_loop(name, example) for example in examples]
    if task.key:
      names = [where for where, rows in pieces for _ in rows]
      assert found.keys == tuple(f"{where}/{e[task.key].decode()}" for where, e in zip(names, examples))
    for row in (0, 7, len(found) - 1) if len(found) > 7 else (0, len(found) - 1):
      image = examples[row]["image"] * np.uint8(255 if name.startswith("dspr") else 1)
      np.testing.assert_array_equal(found.read(row), np.repeat(image, 3 // image.shape[2], 2))
    assert len(set(found.labels.tolist())) >= min(task.num_classes, 4 if split == "train" else 2)
    other = opened["tfrecord"].splits[split]
    assert (found.keys, found.hash(), found.fingerprint(4)) == (other.keys, other.hash(), other.fingerprint(4))
  for form, found in opened.items():
    assert found.class_names == opened["array_record"].class_names and found.num_classes == task.num_classes
    assert found.source.startswith(f"{form} {task.builder}:{task.pinned}")
    assert found.protocol.startswith("VTAB-1k, final: train=train800val200 test=test")
    found.check()


def test_slices_are_those_of_tfds(tmp_path):
  """With enough examples, counts are checked, and the published form of the slices gives the same examples."""
  import tensorflow_datasets as tfds
  fake_tfds.prepare("cifar100", tmp_path, {"train": 2005, "test": 3})
  task = data.from_string("vtab/cifar100?phase=tune", data_dir=tmp_path)  # ⌊.9 · 2005⌋ = 1804
  for split, name in (("train[:800]", "train"), ("train[1804:2004]", "val")):
    source = tfds.data_source("cifar100", split=split, data_dir=tmp_path)
    assert task.splits[name].keys == tuple(f"train/{example['id'].decode()}" for example in source)
    assert task.splits[name].labels.tolist() == [example["label"] for example in source]
  with pytest.raises(DataError, match="vtab/.* has .*3 of 10000 test images"):
    data.from_string("vtab/cifar100", data_dir=tmp_path)
  final = open_any("cifar100", tmp_path).splits["train"]
  assert final.keys == task.splits["train"].keys + task.splits["val"].keys
  again = pickle.loads(pickle.dumps(final))
  np.testing.assert_array_equal(again.read(900), task.splits["val"].read(100))


def test_too_few_examples(tmp_path):
  fake_tfds.prepare("svhn_cropped", tmp_path, {"train": 905, "test": 3})
  with pytest.raises(DataError, match="91 of 200 val200 images"):
    data.from_string("vtab/svhn?phase=tune", data_dir=tmp_path)


def test_tuning_never_reads_test(prepared, tmp_path):
  folder = tmp_path / "dtd"
  shutil.copytree(prepared["array_record"] / "dtd", folder)
  for path in folder.rglob("dtd-test*"):
    path.write_bytes(bytes(path.stat().st_size))
  task = open_any("dtd", tmp_path, "tune")
  assert list(task.splits) == ["train", "val"]
  assert len(task.splits["val"]) == SIZES["validation"]
  with pytest.raises(DataError):
    open_any("dtd", tmp_path)


def test_versions(prepared, tmp_path):
  def as_version(builder, version):
    shutil.copytree(prepared["array_record"] / builder, tmp_path / version / builder)
    (old,) = (tmp_path / version / builder).iterdir()
    info = old / "dataset_info.json"
    info.write_text(info.read_text().replace(f'"version": "{old.name}"', f'"version": "{version}"'))
    assert version in info.read_text()
    old.rename(old.with_name(version))
    return tmp_path / version
  assert open_any("cifar100", as_version("cifar100", "3.0.1")).source == (
      "array_record cifar100:3.0.1 (version 3.0.1 instead of 3.0.2)")
  with pytest.raises(DataError, match=r"2\.0\.0.*3\.0\.2|3\.0\.2.*2\.0\.0"):
    open_any("cifar100", as_version("cifar100", "2.0.0"))
  with pytest.raises(DataError, match=r"2\.0\.1"):
    open_any("dmlab", as_version("dmlab", "2.0.2"))
  assert open_any("kitti_dist", as_version("kitti", "3.1.0")).source == (
      "array_record kitti:3.1.0 (version 3.1.0 instead of 3.3.0)")
  assert open_any("kitti_dist", as_version("kitti", "3.2.0")).source == (
      "array_record kitti:3.2.0 (version 3.2.0 instead of 3.3.0; the benchmark has kitti 3.1.0)")


@pytest.mark.parametrize("name, remark", [
    ("pets", "oxford_iiit_pet:4.0.0 (the benchmark has oxford_iiit_pet 3.*)"),
    ("kitti_dist", "kitti:3.3.0 (the benchmark has kitti 3.1.0)"), ("dtd", "dtd:3.0.1")])
def test_a_newer_version_is_said(name, remark, prepared):
  assert open_any(name, prepared["tfrecord"]).source == f"tfrecord {remark}"


def test_a_shard_is_missing(prepared, tmp_path):
  shutil.copytree(prepared["array_record"] / "dtd", tmp_path / "dtd")
  next((tmp_path / "dtd").rglob("dtd-validation*")).unlink()
  (source,) = data.ENTRIES["vtab/dtd"].find(tmp_path)
  assert source.problem
  with pytest.raises(DataError, match="vtab/dtd: .*dtd"):
    open_any("dtd", tmp_path)


def test_a_split_is_missing(tmp_path):
  fake_tfds.prepare("dtd", tmp_path, {"train": 5, "test": 3})
  with pytest.raises(DataError, match="has no split 'validation'; found"):
    open_any("dtd", tmp_path)


def test_nothing_there(tmp_path):
  with pytest.raises(DataError, match="vtab/snorb_azim is not in .*smallnorb/2.0.0/.*vtab-1k/smallnorb_azi/.*prepare"):
    open_any("snorb_azim", tmp_path)


# Lists of extracted images.

@pytest.mark.parametrize("root", ["vtab-1k", "vtab", ""])
@pytest.mark.parametrize("name", TASKS)
def test_lists_of_every_task(name, root, tmp_path):
  entry, folder = data.ENTRIES[f"vtab/{name}"], tmp_path / root / TASKS[name].folders[-1]
  write_lists(folder, entry.num_classes)
  (source,) = entry.find(tmp_path)
  assert (source.format, source.path, source.problem) == ("list", folder, "")
  for phase, parts in entry.phases.items():
    task = open_any(name, tmp_path, phase)
    for split, part in parts.items():
      lines = (folder / f"{part}.txt").read_text().split("\n")[:-1]
      found = task.splits[split]
      assert [f"{key} {label}" for key, label in zip(found.keys, found.labels)] == lines
      np.testing.assert_array_equal(found.read(2), np.asarray(Image.open(folder / lines[2].split(" ")[0])))
    assert task.class_names == (TASKS[name].names or tuple(map(str, range(entry.num_classes))))
    assert task.source.startswith("list (extracted images")


def test_published_folder_names():
  assert [task.folders[0] for task in vtab.TASKS] == [
      "cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397", "patch_camelyon",
      "eurosat", "resisc45", "diabetic_retinopathy", "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc",
      "dsprites_ori", "smallnorb_azi", "smallnorb_ele"]


def test_which_form_is_read(prepared, lists):
  """TFDS's form is preferred, `source` chooses, an unusable one is passed over; TFDS's folder is no half of lists."""
  for form in ("array_record", "tfrecord"):
    shutil.rmtree(lists / "dtd", ignore_errors=True)
    shutil.copytree(prepared[form] / "dtd", lists / "dtd")
    assert [s.format for s in data.ENTRIES["vtab/dtd"].find(lists)] == [form, "list"]
    assert open_any("dtd", lists).source == f"{form} dtd:3.0.1"
    assert data.from_string("vtab/dtd?source=list&counts=any", data_dir=lists).source.startswith("list (")
  with pytest.raises(DataError, match="no source 'folder' in .*tfrecord.*list"):
    data.from_string("vtab/dtd?source=folder&counts=any", data_dir=lists)
  next((lists / "dtd").rglob("dtd-train*")).unlink()
  assert open_any("dtd", lists).source.startswith("list (")
  assert data.ENTRIES["vtab/caltech101"].find(prepared["tfrecord"])[0].format == "tfrecord"


def test_training_lists_in_one_piece(lists):
  """1,000 lines are cut into 800 and 200, which is said; another number is not."""
  folder = lists / "vtab-1k" / "dtd"
  thousand = [f"images/{i}.jpg {i % 47}" for i in range(1000)]
  for i in range(1000):
    (folder / "images" / f"{i}.jpg").touch()
  (folder / "train800val200.txt").write_text("\n".join(thousand))
  (folder / "train800.txt").write_text("\n".join(thousand[:799]))
  (folder / "val200.txt").unlink()  # the other piece, of 799 lines, is not mixed with what is cut
  task = data.from_string("vtab/dtd?phase=tune", data_dir=lists)
  assert task.splits["train"].labels.tolist() == [i % 47 for i in range(800)]
  assert task.splits["val"].labels.tolist() == [i % 47 for i in range(800, 1000)]
  assert task.source.endswith("; train800 and val200 are cut from train800val200.txt)")
  (folder / "train800val200.txt").write_text("\n".join(thousand[:950]))
  with pytest.raises(DataError, match="train800val200.txt has 950 lines; expected 1000"):
    open_any("dtd", lists, "tune")


@pytest.mark.parametrize("phase", ["tune", "final"])
@pytest.mark.parametrize("name, row, line, where", [
    ("val200", 1, "images/train800val200/000101.jpg 46", r"000101.jpg 3 is only in train800val200\.txt"),
    ("train800val200", 11, "", r"000103.jpg \d+ is only in train800\.txt and val200\.txt"),
    ("train800", 0, "", r"000000.jpg \d+ is only in train800val200\.txt")])
def test_training_lists_that_disagree(lists, phase, name, row, line, where):
  edit(lists / "vtab-1k" / "dtd" / "val200.txt", 1, "images/train800val200/000101.jpg 3")
  edit(lists / "vtab-1k" / "dtd" / "train800val200.txt", 9, "./images/train800val200/000101.jpg 3")
  open_any("dtd", lists, phase)
  edit(lists / "vtab-1k" / "dtd" / f"{name}.txt", row, line)
  with pytest.raises(DataError, match=rf"dtd: train800val200\.txt is not train800\.txt and val200\.txt .*{where}"):
    open_any("dtd", lists, phase)


def test_training_lists_in_two_pieces(lists):
  folder = lists / "vtab-1k" / "dtd"
  whole = open_any("dtd", lists).splits["train"]
  (folder / "train800val200.txt").unlink()
  pieces = open_any("dtd", lists).splits["train"]
  assert pieces.hash() == whole.hash() and pieces.fingerprint() == whole.fingerprint()
  np.testing.assert_array_equal(pieces.read(9), whole.read(9))


@pytest.mark.parametrize("removed, found", [
    (["test"], "has train800.txt, val200.txt, train800val200.txt; expected"),
    (["train800val200", "val200"], "has train800.txt, test.txt; expected"),
    (["test", "train800", "val200", "train800val200"], "has no list; expected")])
def test_missing_lists_are_a_problem(removed, found, lists):
  for name in removed:
    (lists / "vtab-1k" / "dtd" / f"{name}.txt").unlink()
  (source,) = data.ENTRIES["vtab/dtd"].find(lists)
  assert found in source.problem
  with pytest.raises(DataError, match=f"vtab/dtd: .*{found}"):
    open_any("dtd", lists)


@pytest.mark.parametrize("label", ["47", "-1", "1.0", "cat", "99999999999999999999"])
def test_a_label_out_of_range_on_one_line(label, lists):
  """The line is the file's, blank ones counted."""
  path = lists / "vtab-1k" / "dtd" / "train800val200.txt"
  edit(path, 5, f"\n{path.read_text().split()[10]} {label}")
  with pytest.raises(DataError, match=rf"train800val200\.txt line 7 has the label '{label}'; expected .* 0 to 46"):
    open_any("dtd", lists)


@pytest.mark.parametrize("file", ["/etc/images/000000.jpg", "../dtd/images/test/000000.jpg", "images/../../x.jpg"])
def test_a_path_that_leaves_the_folder(file, lists):
  edit(lists / "vtab-1k" / "dtd" / "test.txt", 1, f"{file} 3")
  with pytest.raises(DataError, match=r"test\.txt line 2 names .*; expected a path below .*dtd"):
    open_any("dtd", lists)


def test_missing_images(lists):
  folder = lists / "vtab-1k" / "dtd"
  for row in (1, 4, 5):
    (folder / "images" / "train800val200" / f"{row:06d}.jpg").unlink()
  with pytest.raises(DataError, match=r"train800val200\.txt line 2 names images/train800val200/000001\.jpg, which is "
                                      r"not in .*dtd \(3 of 12 images are missing\)"):
    open_any("dtd", lists)
  shutil.rmtree(folder / "images")
  with pytest.raises(DataError, match=r"\(8 of 8 images are missing\)"):
    open_any("dtd", lists, "tune")


def test_tuning_needs_no_test_image(lists):
  shutil.rmtree(lists / "vtab-1k" / "dtd" / "images" / "test")
  assert len(open_any("dtd", lists, "tune").splits["val"]) == 4
  with pytest.raises(DataError, match="5 of 5 images"):
    open_any("dtd", lists)


def test_a_damaged_image_is_named(lists):
  (lists / "vtab-1k" / "dtd" / "images" / "test" / "000003.jpg").write_bytes(b"no image")
  with pytest.raises(BadImage, match="test/000003.jpg"):
    open_any("dtd", lists).splits["test"].read(3)


def test_lists_from_windows(lists):
  folder, plain = lists / "vtab-1k" / "dtd", open_any("dtd", lists)
  for path in folder.glob("*.txt"):
    text = path.read_text().replace("images/", "./images/").replace("\n", "\r\n")
    path.write_text("\ufeff" + text + "\r\n", encoding="utf-8", newline="")
  assert open_any("dtd", lists).split_hash() == plain.split_hash()


@pytest.mark.parametrize("file", vtab_lists.NAME_FILES)
def test_class_names_beside_the_lists(file, lists):
  write_lists(lists / "vtab" / "kitti", 4)
  (lists / "vtab" / "kitti" / file).write_text("a\nb\nc\nd")
  assert open_any("kitti_dist", lists).class_names == ("a", "b", "c", "d")
  path = lists / "vtab-1k" / "dtd" / file
  path.write_text("".join(f"texture {i} \n" for i in range(47)))
  assert open_any("dtd", lists).class_names == tuple(f"texture {i}" for i in range(47))
  path.write_text("one\ntwo\n")
  with pytest.raises(DataError, match="has 2 classes; expected 47"):
    open_any("dtd", lists)
  path.write_bytes(b"caf\xe9\n")
  with pytest.raises(DataError, match=rf"{file} line 1 is not UTF-8 .*expected one class name per line"):
    open_any("dtd", lists)
