"""Sets prepared by TFDS: both forms read alike, without TensorFlow and without a network; damage has a name."""
import concurrent.futures
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_tfds import frame, prepare

from transferlab.data import ENTRIES, files, from_string, tfds, tfds_info
from transferlab.data.tasks import DataError, Task

BUILDERS = """caltech101:3.0.2 cifar100:3.0.2 dtd:3.0.1 oxford_flowers102:2.1.1 oxford_iiit_pet:4.0.0
  svhn_cropped:3.1.0 sun397/tfds:4.0.0 patch_camelyon:2.0.0 eurosat/rgb:2.0.0 resisc45:3.0.0
  diabetic_retinopathy_detection/btgraham-300:3.0.0 clevr:3.1.0 dmlab:2.0.1 kitti:3.3.0 dsprites:2.0.0 smallnorb:2.0.0
  domainnet/real:1.0.0 domainnet/painting:1.0.0 domainnet/clipart:1.0.0 domainnet/quickdraw:1.0.0
  domainnet/infograph:1.0.0 domainnet/sketch:1.0.0 imagenet2012:5.1.0 imagenet_v2/matched-frequency:3.0.0
  imagenet_sketch:1.0.0 imagenet_a:0.1.0 imagenet_r:0.2.0 caltech_birds2011:0.2.0 cars196:2.1.0 food101:2.0.0
  stanford_dogs:0.2.0""".split()
COUNTS = {"train": 23, "test": 9}


def label(example):
  return example["label"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
  """(format, shards) -> data directory with the same CIFAR-100 in it, 23 and 9 images."""
  made = {}
  def get(file_format, num_shards=3):
    if (file_format, num_shards) not in made:
      made[file_format, num_shards] = tmp_path_factory.mktemp(file_format)
      prepare("cifar100", made[file_format, num_shards], COUNTS, file_format, num_shards)
    return made[file_format, num_shards]
  return get


@pytest.fixture
def cifar(copies, tmp_path):
  """format -> a copy of a prepared CIFAR-100 in three shards that a test may spoil; its folder."""
  def get(file_format):
    shutil.copytree(copies(file_format), tmp_path, dirs_exist_ok=True)
    return tmp_path / "cifar100" / "3.0.2"
  return get


def source_of(data_dir, builder="cifar100", pinned="3.0.2", **kwargs):
  source, = tfds.find(Path(data_dir), builder, pinned, **kwargs)
  return source


def same(a, b) -> bool:
  """Of features, arrays and lists of them included."""
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
  if isinstance(a, list):
    return len(a) == len(b) and all(map(same, a, b))
  return type(a) is type(b) and np.array_equal(a, b)


@pytest.mark.parametrize("name", BUILDERS)
def test_both_formats_of_every_builder_give_the_same_examples(name, tmp_path):
  builder, version = name.split(":")
  sources = []
  for file_format in ("array_record", "tfrecord"):
    folder = prepare(builder, tmp_path / file_format, {"train": 5, "test": 3}, file_format, num_shards=2)
    assert folder == tmp_path / file_format / builder / version
    sources.append(source_of(tmp_path / file_format, builder, version))
    assert not sources[-1].problem and not sources[-1].remark
    assert str(sources[-1]) == f"{file_format} {name}" and tfds.sizes(sources[-1]) == {"train": 5, "test": 3}
  a, b = (tfds.records(source, "train") for source in sources)
  assert len(a) == len(b) == 5
  assert all(same(a[row], b[row]) for row in (4, 0, 2, 1, 3)) and not same(a[0], b[1])
  assert isinstance(a[0]["image"], bytes)  # encoded as it was stored
  a, b = (tfds.examples(source, "test", range(3), "test", lambda _: 0, None) for source in sources)
  assert a.hash() == b.hash() and a.fingerprint() == b.fingerprint() and len(set(a.keys)) == 3
  assert all(a.read(row).shape[2] == 3 for row in range(3))


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_order_and_slices_are_those_of_tfds(copies, file_format, shards):
  """TFDS's own reader of a one-shard array_record says what train[:8] and train[20:22] are."""
  import tensorflow_datasets
  builder = tensorflow_datasets.builder_from_directory(copies("array_record", 1) / "cifar100/3.0.2")
  expected = list(builder.as_data_source("train[:8]+train[20:22]"))
  rows = [*range(8), 20, 21]
  split = tfds.examples(source_of(copies(file_format, shards)), "train", rows, "val", label, "id")
  assert split.name == "val" and split.labels.tolist() == [example["label"] for example in expected]
  assert split.keys == tuple(f"train/{example['id'].decode()}" for example in expected)
  for row in range(10):
    np.testing.assert_array_equal(split.read(row), expected[row]["image"])


def test_hashes_depend_on_the_rows_and_not_on_the_form(copies):
  splits = [tfds.examples(source_of(copies(*form)), "train", range(4, 20), "train", label, "id")
            for form in (("array_record", 1), ("array_record", 3), ("tfrecord", 2), ("tfrecord", 3))]
  assert len({split.hash() for split in splits}) == len({split.fingerprint() for split in splits}) == 1
  other = tfds.examples(source_of(copies("tfrecord")), "train", range(5, 21), "train", label, "id")
  assert other.hash() != splits[0].hash() and other.fingerprint() != splits[0].fingerprint()


def test_another_seed_is_another_set(copies, tmp_path):
  prepare("cifar100", tmp_path, COUNTS, seed=1)
  a, b = (tfds.examples(source_of(d), "test", range(9), "test", label, "id") for d in (tmp_path, copies("tfrecord")))
  assert a.hash() != b.hash() and a.fingerprint() != b.fingerprint()


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_labels_are_read_without_decoding_an_image(copies, file_format, monkeypatch):
  monkeypatch.setattr(tfds, "decode", lambda *_: pytest.fail("an image was decoded"))
  assert len(tfds.examples(source_of(copies(file_format)), "train", range(23), "train", label, "id")) == 23


def _pixels(split):
  return [split.read(row) for row in range(len(split))]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_splits_travel_to_other_processes_and_threads(copies, file_format):
  split = tfds.examples(source_of(copies(file_format)), "train", range(3, 21), "train", label, "id")
  expected = _pixels(split)
  assert len(pickle.dumps(split)) < 5000  # open files and indices stay behind
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    np.testing.assert_array_equal(pool.submit(_pixels, split).result(), expected)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    np.testing.assert_array_equal(list(pool.map(pickle.loads(pickle.dumps(split)).read, range(18))), expected)


def test_a_forked_process_opens_its_own_files(copies, monkeypatch):
  found = tfds.records(source_of(copies("array_record")), "train")
  first, (_, reader) = found[0], found._opened
  assert found[0] and found._opened[1] is reader
  monkeypatch.setattr(os, "getpid", lambda: -1)
  assert same(found[0], first) and found._opened[1] is not reader


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_needs_neither_tensorflow_nor_a_network_and_is_quiet(copies, file_format):
  code = f"""
import sys
from pathlib import Path
def refuse(event, args):
  assert not event.startswith("socket."), "network: " + event
  assert event != "import" or args[0] != "tensorflow"
sys.addaudithook(refuse)
from transferlab.data import tfds
source, = tfds.find(Path({str(copies(file_format))!r}), "cifar100", "3.0.2")
assert "tensorflow_datasets" not in sys.modules, "finding a set should not cost the import"
split = tfds.examples(source, "train", range(23), "train", lambda e: e["label"], "id")
assert split.read(22).shape == (32, 32, 3) and tfds.class_names(source)[7] == "label 7"
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tfds_still_has_what_the_reader_takes_from_it():
  """Not in TFDS's documentation: if this fails after an upgrade, `_Reader` needs another way to parse an example."""
  import tensorflow_datasets as library
  kind = library.features
  features = kind.FeaturesDict({"label": kind.ClassLabel(num_classes=3), "image": kind.Image(), "text": kind.Text()})
  content = features.serialize_example({"label": 2, "image": b"not decoded", "text": "é"})
  decoders = {"image": library.decode.SkipDecoding()}
  assert features.deserialize_example_np(content, decoders=decoders) == {
      "label": 2, "image": b"not decoded", "text": "é".encode()}


def test_binary_pixels_are_scaled_and_grey_becomes_rgb(tmp_path):
  prepare("dsprites", tmp_path, {"train": 4})
  source = source_of(tmp_path, "dsprites", "2.0.0")
  plain, scaled, bright = (tfds.examples(source, "train", range(4), "train", lambda e: e["label_orientation"], None,
                                         scale=scale) for scale in (1, 255, 1000))
  assert set(np.unique(plain.read(1))) == {0, 1} and set(np.unique(bright.read(1))) == {0, 255}
  np.testing.assert_array_equal(scaled.read(1), plain.read(1) * 255)
  assert scaled.read(1).shape == (64, 64, 3) and scaled.read(1).dtype == np.uint8
  assert plain.labels.tolist() == [tfds.records(source, "train")[row]["label_orientation"] for row in range(4)]

  prepare("smallnorb", tmp_path, {"test": 3})
  source = source_of(tmp_path, "smallnorb", "2.0.0")
  split = tfds.examples(source, "test", [2, 0], "val", lambda e: e["label_azimuth"], None)
  image = split.read(0)
  assert image.shape == (96, 96, 3) and (image == image[:, :, :1]).all()
  other = tfds.examples(source, "test", [2], "val", lambda e: 0, None, image="image2")
  assert (other.read(0) != image).any() and other.keys != split.keys[:1]


def test_keys_without_names_are_of_the_file_for_jpeg_and_of_the_pixels_for_png(tmp_path):
  """The same picture in a PNG of another writer keeps its key."""
  import io

  from PIL import Image
  def recompress(split, index, example):
    pixels, file = files.decode("", example["image"]), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1 + 8 * (index % 2))
    return {**example, "image": file.getvalue()}
  prepare("svhn_cropped", tmp_path / "a", {"train": 4})
  prepare("svhn_cropped", tmp_path / "b", {"train": 4}, change=recompress)
  a, b = (source_of(tmp_path / x, "svhn_cropped", "3.1.0") for x in "ab")
  assert tfds.records(a, "train")[0]["image"] != tfds.records(b, "train")[0]["image"]
  a, b = (tfds.examples(s, "train", range(4), "train", label, None) for s in (a, b))
  assert a.keys == b.keys and a.keys[0].startswith("pixels:") and len(set(a.keys)) == 4
  prepare("food101", tmp_path, {"train": 4})
  keys = tfds.examples(source_of(tmp_path, "food101", "2.0.0"), "train", range(4), "train", label, None).keys
  assert len(set(keys)) == 4 and all(key.startswith("jpeg:") for key in keys)


def test_concatenated_splits_read_in_order(copies):
  source = source_of(copies("tfrecord"))
  parts = [tfds.examples(source, split, rows, "x", label, "id") for split, rows in
           (("test", range(3)), ("train", range(0)), ("train", [22, 4]))]
  whole = tfds.concatenate("train800val200", *parts)
  assert whole.name == "train800val200" and len(whole) == 5 and whole.domains is None and not whole.verified
  assert whole.keys == parts[0].keys + parts[2].keys
  assert whole.labels.tolist() == [*parts[0].labels, *parts[2].labels]
  expected = _pixels(parts[0]) + _pixels(parts[2])
  np.testing.assert_array_equal(_pixels(pickle.loads(pickle.dumps(whole))), expected)
  np.testing.assert_array_equal(_pixels(whole.select([4, 1])), [expected[4], expected[1]])


def test_class_names_come_from_the_folder(tmp_path, copies):
  assert tfds.class_names(source_of(copies("array_record"))) == tuple(f"label {i}" for i in range(100))
  assert tfds.class_names(source_of(copies("tfrecord")), "coarse_label")[19] == "coarse_label 19"
  prepare("svhn_cropped", tmp_path, {"train": 2})
  assert tfds.class_names(source_of(tmp_path, "svhn_cropped", "3.1.0")) == tuple("0123456789")
  for feature in ("fine_label", "image"):
    with pytest.raises(DataError, match=f"no labels '{feature}'; found 'coarse_label', 'id'"):
      tfds.class_names(source_of(copies("array_record")), feature)


def test_a_label_of_minus_one_is_named_by_the_check(tmp_path):
  prepare("diabetic_retinopathy_detection/btgraham-300", tmp_path, {"train": 6},
          change=lambda split, i, example: {**example, "label": -1 if i == 3 else i % 5, "name": f"eye {i}"})
  source = source_of(tmp_path, "diabetic_retinopathy_detection/btgraham-300", "3.0.0")
  split = tfds.examples(source, "train", range(6), "train", label, "name")
  assert sorted(split.labels) == [-1, 0, 0, 1, 2, 4]
  with pytest.raises(DataError, match="label -1 of 'train/eye 3' in split 'train' is outside 0..4"):
    Task("retina", tfds.class_names(source), {"train": split}, protocol="VTAB-1k").check()


# What `find` says.

def test_an_absent_set_is_not_found(tmp_path, copies):
  assert tfds.find(tmp_path, "cifar100", "3.0.2") == [] == tfds.find(tmp_path / "no", "sun397/tfds", "4.0.0")
  assert tfds.find(copies("tfrecord"), "cifar10", "3.0.2") == []
  (tmp_path / "cifar100").mkdir()
  assert tfds.find(tmp_path, "cifar100", "3.0.2") == []


def test_a_preparation_that_did_not_finish_is_reported(cifar):
  folder = cifar("tfrecord")
  folder.rename(folder.parent / "incomplete.ABC123_3.0.2")
  assert "incomplete.ABC123_3.0.2 was left by a preparation that did not finish" in source_of(folder.parents[1]).problem
  shutil.copytree(folder.parent / "incomplete.ABC123_3.0.2", folder)
  assert not source_of(folder.parents[1]).problem  # a whole copy beside it is enough


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_missing_shards_are_counted(cifar, file_format):
  folder = cifar(file_format)
  (folder / f"cifar100-train.{file_format}-00001-of-00003").unlink()
  source = source_of(folder.parents[1])
  assert f"lacks 1 of 8 files ('cifar100-train.{file_format}-00001-of-00003'); complete the copy" in source.problem
  with pytest.raises(DataError, match="lacks 1 of 8 files"):
    tfds.records(source, "train")
  (folder / "features.json").unlink()
  assert "lacks 2 of 8 files" in source_of(folder.parents[1]).problem


def test_a_copy_without_its_class_names_is_half_a_set(cifar):
  """TFDS would call the classes "0", "1", ...; that is how they are called only where a set has no names."""
  folder = cifar("array_record")
  (folder / "label.labels.txt").unlink()
  assert "lacks 1 of 8 files ('label.labels.txt'); complete the copy" in source_of(folder.parents[1]).problem
  with pytest.raises(DataError, match="cifar100/3.0.2 lacks 1 of 8 files .'label.labels.txt'"):
    from_string("vtab/cifar100?counts=any", folder.parents[1])


def test_a_file_of_class_names_that_was_cut(cifar):
  file = cifar("array_record") / "label.labels.txt"
  file.write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
  with pytest.raises(DataError, match="cannot be read .*expected|has 40 classes; expected 100"):
    from_string("vtab/cifar100?counts=any", file.parents[2])


def test_which_sets_have_class_names_is_as_tfds_has_it(tmp_path):
  import tensorflow_datasets
  late = {"cifar100", "stanford_dogs"}  # read from the archive, while they are prepared
  for builder in sorted({builder for entry in ENTRIES.values() for builder in entry.builders}):
    feature = dict(tensorflow_datasets.builder(builder, data_dir=tmp_path).info.features).get("label")
    name = re.split("[/:]", builder)[0]
    assert (name in tfds_info.NAMED) == (name in late or getattr(feature, "_str2int", None) is not None), builder


def edit(folder, **changes):
  path = folder / "dataset_info.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILED = {
    "gone": (lambda f: (f / "dataset_info.json").unlink(), "has no dataset_info.json.*delete it and prepare"),
    "cut": (lambda f: (f / "dataset_info.json").write_text('{"name": "ci'), "dataset_info.json cannot be read .JSON"),
    "binary": (lambda f: (f / "dataset_info.json").write_bytes(b"\xff\xfe{}"), "cannot be read .UnicodeDecodeError"),
    "list": (lambda f: (f / "dataset_info.json").write_text("[1]"), "cannot be read .TypeError"),
    "splits": (lambda f: edit(f, splits=[{"name": "train", "shardLengths": ["x"]}]), "cannot be read .ValueError"),
    "leaves": (lambda f: edit(f, splits=[{"name": "../../train", "shardLengths": ["1"]}]), "splits '../../train'"),
    "template": (lambda f: edit(f, splits=[{"name": "train", "filepathTemplate": "/etc/{SPLIT}"}]), "files '/etc"),
    "other set": (lambda f: edit(f, name="cifar10"), "holds cifar10 3.0.2 by its .*; expected cifar100 3.0.2"),
    "configuration": (lambda f: edit(f, configName="x"), "holds cifar100/x 3.0.2 by its"),
    "folder renamed": (lambda f: edit(f, version="3.0.1"), "holds cifar100 3.0.1 by its.*expected cifar100 3.0.2"),
    "riegeli": (lambda f: edit(f, fileFormat="riegeli"), "is prepared as riegeli; expected array_record or tfrecord"),
    "parquet": (lambda f: edit(f, fileFormat="parquet"), "is prepared as parquet; expected array_record or tfrecord"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_description_is_reported_in_one_line(case, cifar):
  spoil, message = SPOILED[case]
  folder = cifar("array_record")
  spoil(folder)
  problem = source_of(folder.parents[1]).problem
  assert re.search(message, problem) and "\n" not in problem and str(folder) in problem
  assert source_of(folder.parents[1]).version == "cifar100:3.0.2"


def test_versions(tmp_path):
  for version in ("3.0.2", "3.0.9", "3.0.10", "2.0.0"):
    prepare("cifar100", tmp_path, {"train": 2}, version=version)
  (tmp_path / "cifar100" / "downloads").mkdir()
  found = tfds.find(tmp_path, "cifar100", "3.0.2")
  assert [s.version.split(":")[1] for s in found if not s.problem] == ["3.0.2"] and len(found) == 4
  assert all("expected 3.0.2: subsets such as train[:800] hold other examples" in s.problem for s in found[1:])
  assert "is version 3.0.10 of cifar100" in found[1].problem

  found = tfds.find(tmp_path, "cifar100", "3.0.2", accepted="3.")
  assert [s.path.name for s in found] == ["3.0.2", "3.0.10", "3.0.9", "2.0.0"]
  assert [s.remark for s in found] == ["", "version 3.0.10 instead of 3.0.2", "version 3.0.9 instead of 3.0.2", ""]
  assert [bool(s.problem) for s in found] == [False, False, False, True]
  assert len(tfds.examples(found[2], "train", range(2), "train", label, "id")) == 2

  for version in ("3.0.2", "2.0.0"):  # what can be read comes first; what cannot says so, whatever its version
    (tmp_path / "cifar100" / version / "dataset_info.json").unlink()
  found = tfds.find(tmp_path, "cifar100", "3.0.2", accepted="3.")
  assert [s.path.name for s in found] == ["3.0.10", "3.0.9", "3.0.2", "2.0.0"]
  assert all("has no dataset_info.json" in s.problem for s in found[2:])


def test_array_record_comes_before_tfrecord(tmp_path, copies):
  """The pinned version in any form before a version that is merely accepted; both forms may lie in one folder."""
  shutil.copytree(copies("tfrecord"), tmp_path, dirs_exist_ok=True)
  prepare("cifar100", tmp_path, COUNTS, version="3.0.1")
  assert [str(s) for s in tfds.find(tmp_path, "cifar100", "3.0.2", "3.")] == [
      "tfrecord cifar100:3.0.2", "array_record cifar100:3.0.1"]
  folder = tmp_path / "cifar100" / "3.0.2"
  shutil.copytree(copies("array_record") / "cifar100" / "3.0.2", folder, dirs_exist_ok=True)
  edit(folder, fileFormat="tfrecord", alternativeFileFormats=["array_record"])
  found = tfds.find(tmp_path, "cifar100", "3.0.2")
  assert [str(s) for s in found if not s.problem] == ["array_record cifar100:3.0.2", "tfrecord cifar100:3.0.2"]
  a, b = (tfds.examples(s, "test", range(9), "test", label, "id") for s in found[:2])
  assert a.hash() == b.hash() and a.fingerprint() == b.fingerprint()
  for file in folder.glob("*.array_record*"):
    file.unlink()
  assert [str(s) for s in tfds.find(tmp_path, "cifar100", "3.0.2") if not s.problem] == ["tfrecord cifar100:3.0.2"]


def test_an_old_description_without_a_format_is_tfrecord(cifar):
  folder = cifar("tfrecord")
  info = json.loads((folder / "dataset_info.json").read_text())
  del info["fileFormat"]
  for split in info["splits"]:
    del split["filepathTemplate"]
  (folder / "dataset_info.json").write_text(json.dumps(info))
  source = source_of(folder.parents[1])
  assert source.format == "tfrecord" and len(tfds.examples(source, "test", range(9), "test", label, "id")) == 9


# What reading says.

def read_all(folder):
  return tfds.examples(source_of(folder.parents[1]), "train", range(23), "train", label, "id")


def test_rows_splits_and_features_that_are_not_there(copies):
  source = source_of(copies("array_record"))
  with pytest.raises(DataError, match="no split 'validation'; found 'train', 'test'"):
    tfds.examples(source, "validation", range(2), "val", label, "id")
  with pytest.raises(DataError, match="has 23 examples in 'train'; rows 20 to 23 are wanted; complete the data set"):
    tfds.examples(source, "train", range(20, 24), "train", label, "id")
  for name, wrong in {"file_name": dict(key="file_name"), "picture": dict(key=None, image="picture"),
                      "objects": dict(key="id", label=lambda example: example["objects"])}.items():
    with pytest.raises(DataError, match=f"record 0 has no feature '{name}'; found 'coarse_label', 'id', 'image', "):
      tfds.examples(source, "train", range(2), **{"name": "train", "label": label, **wrong})


@pytest.mark.parametrize("what", [b"label", b"\x89PNG", b"train_"])
def test_a_damaged_tfrecord_is_named_with_its_record(cifar, what):
  """In the name of a feature, in an image, in a text: all inside the second record of the second file."""
  folder = cifar("tfrecord")
  path = folder / "cifar100-train.tfrecord-00001-of-00003"
  content = bytearray(path.read_bytes())
  start = tfds.tfrecord.index(path)[1, 0]
  content[content.index(what, start) + len(what)] ^= 4
  path.write_bytes(content)
  with pytest.raises(DataError, match=r"train.tfrecord-00001-of-00003: record 1 is damaged .*copy the file"):
    read_all(folder)
  source = source_of(folder.parents[1])  # what is not touched can still be read
  assert len(tfds.examples(source, "test", range(9), "test", label, "id")) == 9


def test_a_tfrecord_of_another_length_is_named(cifar):
  folder = cifar("tfrecord")
  first, second = (folder / f"cifar100-train.tfrecord-0000{i}-of-00003" for i in range(2))
  shutil.copy(second, first)
  with pytest.raises(DataError, match="00000-of-00003 has 7 records; dataset_info.json expects 8; copy the folder"):
    read_all(folder)
  second.write_bytes(second.read_bytes()[:-5])
  with pytest.raises(DataError, match="00001-of-00003: cut short in record 6"):
    tfds.records(source_of(folder.parents[1]), "train")[9]


def test_a_record_that_is_whole_but_empty_is_named(cifar):
  folder = cifar("tfrecord")
  path = folder / "cifar100-train.tfrecord-00000-of-00003"
  start, _ = tfds.tfrecord.index(path)[7]
  path.write_bytes(path.read_bytes()[:start - 12] + frame(b""))
  with pytest.raises(DataError, match="00000-of-00003: record 7 cannot be read .*lacks 'coarse_label', 'id', "):
    read_all(folder)


@pytest.mark.parametrize("keep", [0, 1000, 65536 - 1, 0.5, 0.99])
def test_an_array_record_cut_short_is_named(cifar, keep):
  folder = cifar("array_record")
  path = folder / "cifar100-train.array_record-00001-of-00003"
  content = path.read_bytes()
  path.write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
  message = r"train.array_record-00001-of-00003(: record 0 cannot be read| has 0 records).*copy the f"
  with pytest.raises(DataError, match=message) as e:
    read_all(folder)
  assert "\n" not in str(e.value)


def test_a_damaged_array_record_is_named_with_its_record(cifar):
  folder = cifar("array_record")
  path = folder / "cifar100-train.array_record-00002-of-00003"
  content = bytearray(path.read_bytes())
  third = [match.start() for match in re.finditer(rb"\x89PNG", content)][3:4]
  at = third[0] + 100 if third else 2000  # compressed records do not show their images
  content[at] ^= 16
  path.write_bytes(content)
  with pytest.raises(DataError, match=r"train.array_record-00002-of-00003: record \d cannot be read .*hash mismatch"):
    read_all(folder)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_file_that_is_gone_since_is_named(cifar, file_format):
  folder = cifar(file_format)
  split = read_all(folder)
  path = folder / f"cifar100-train.{file_format}-00000-of-00003"
  path.unlink()
  with pytest.raises(DataError, match="train.*00000-of-00003.*No such file"):
    pickle.loads(pickle.dumps(split)).read(0)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
  prepare("dtd", tmp_path, {"train": 4}, "tfrecord", change=lambda split, i, e: {**e, "image": b"GIF89 no"})
  split = tfds.examples(source_of(tmp_path, "dtd", "3.0.1"), "train", range(4), "train", label, "file_name")
  with pytest.raises(files.BadImage, match="dtd-train.tfrecord-00000-of-00001: record 2: "):
    split.read(2)


EVIL = """{"featuresDict": {"features": {"label": {"pythonClassName": "evil.Feature"}}},
           "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}"""


@pytest.mark.parametrize("content, message", [
    ("{", "Expecting property name"), ("[]", ""), ('{"type": "evil.Dict"}', "evil.Dict"), (EVIL, "'evil.Feature'")])
def test_a_description_of_features_is_not_trusted(cifar, content, message, monkeypatch):
  """TFDS would import whatever module it names."""
  folder = cifar("tfrecord")
  (folder / "features.json").write_text(content)
  (folder.parents[1] / "evil.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(folder.parents[1])
  with pytest.raises(DataError, match=f"its description by TFDS cannot be read .*{message}.*copy") as e:
    read_all(folder)
  assert "\n" not in str(e.value) and "evil" not in sys.modules


def test_features_in_the_other_description_are_not_trusted_either(cifar, monkeypatch):
  folder = cifar("array_record")
  edit(folder, features=json.loads(EVIL))
  (folder.parents[1] / "evil.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(folder.parents[1])
  with pytest.raises(DataError, match="'evil.Feature' is no feature"):
    read_all(folder)
