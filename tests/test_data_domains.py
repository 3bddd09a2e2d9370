"""DomainBed's suites: the seeded cut, the parts, folders as they lie, TFDS, bad input."""
import json
import os
import pickle
from pathlib import Path

import fake_tfds
import numpy as np
import pytest
from PIL import Image

from transferlab import data
from transferlab.data import ENTRIES, SUITES, DataError, domains, inventory, tfds

GOLDEN = Path(__file__).parent / "golden" / "lfa_and_clip" / "domainbed_splits.json"
PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
VLCS = {"Caltech101": 11, "LabelMe": 12, "SUN09": 13, "VOC2007": 14}  # domain -> images, here


def write(folder, seed):
  """One small image, no two alike."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng([9, seed]).integers(0, 256, (4, 5, 3), np.uint8)).save(folder)


def vlcs(root, sizes=VLCS, classes=("bird", "car", "chair", "dog", "person")):
  """`root/<domain>/<class>/<i>.png`, images going round the classes."""
  for d, (domain, size) in enumerate(sizes.items()):
    for i in range(size):
      write(root / domain / classes[i % len(classes)] / f"{i:02d}.png", 100 * d + i)
  return root


@pytest.fixture
def data_dir(tmp_path):
  vlcs(tmp_path / "VLCS")
  return tmp_path


def images_of(split):
  return [split.keys[i] for i in range(len(split))]


# The cut

def test_the_cut_is_domainbeds():
  """Shuffles that DomainBed's own code made."""
  for case in json.loads(GOLDEN.read_text()):
    out, in_ = domains.halves(case["N"], case["trial_seed"], case["env"])
    assert (out.tolist(), in_.tolist()) == (case["out"], case["in_"])


@pytest.mark.parametrize("trial", [0, 1])
def test_parts_are_cut_domain_by_domain_in_the_order_of_torchvision(data_dir, trial):
  """The rule written out once more, on paths: sorted classes, in each os.walk sorted by folder, files sorted."""
  write(data_dir / "VLCS" / "SUN09" / "car" / "a" / "0.png", 900)  # sorted by whole paths it would come before b.png
  write(data_dir / "VLCS" / "SUN09" / "car" / "b.png", 901)
  task = data.from_string(f"vlcs/sun09?counts=any&trial={trial}", data_dir)
  expected = {"train": [], "val": [], "test": []}
  for index, domain in enumerate(VLCS):
    keys = []
    for name in sorted(os.listdir(data_dir / "VLCS" / domain)):
      for root, _, files in sorted(os.walk(data_dir / "VLCS" / domain / name, followlinks=True)):
        keys += [os.path.relpath(os.path.join(root, file), data_dir / "VLCS") for file in sorted(files)]
    out, in_ = domains.halves(len(keys), trial, index)
    for part, rows in ({"test": in_} if domain == "SUN09" else {"train": in_, "val": out}).items():
      expected[part] += [keys[row].replace(domain, domain.lower(), 1) for row in rows]
  assert {part: list(split.keys) for part, split in task.splits.items()} == expected
  assert task.draw == f"trial {trial}"


def test_labels_domains_and_pixels_belong_to_the_keys(data_dir):
  task = data.from_string("vlcs/sun09?counts=any", data_dir)
  assert task.class_names == ("bird", "car", "chair", "dog", "person") and task.templates == ("a photo of a {}",)
  assert task.domain_names == ("caltech101", "labelme", "sun09", "voc2007")
  assert task.check() == [] and task.source == "folder"
  for name, split in task.splits.items():
    assert split.name == name and set(split.domains) == ({2} if name == "test" else {0, 1, 3})
    split = pickle.loads(pickle.dumps(split))
    for i, key in enumerate(split.keys):
      domain, class_name, file = key.split("/")
      assert task.domain_names[split.domains[i]] == domain and task.class_names[split.labels[i]] == class_name
      folder = {d.lower(): d for d in VLCS}[domain]
      with Image.open(data_dir / "VLCS" / folder / class_name / file) as image:
        assert np.array_equal(split.read(i), np.array(image))


def test_the_held_out_domain_is_never_seen_and_a_fifth_of_the_others_validates(data_dir):
  for held_out, name in enumerate(domains.SETS[0].domain_names):
    task = data.from_string(f"vlcs/{name}?counts=any", data_dir)
    sizes = list(VLCS.values())
    held = sizes.pop(held_out)
    assert {k: len(s) for k, s in task.splits.items()} == {
        "train": sum(n - n // 5 for n in sizes), "val": sum(n // 5 for n in sizes), "test": held - held // 5}
    keys = sum((images_of(split) for split in task.splits.values()), [])
    assert len(set(keys)) == len(keys) and set(task.splits["test"].domains) == {held_out}


def test_a_changed_set_is_noticed_in_every_trial(data_dir):
  list(inventory.checked([ENTRIES["vlcs/sun09"]], data_dir, accept=True))
  for trial in ("", "&trial=0", "&trial=1"):
    data.from_string(f"vlcs/sun09?counts=any{trial}", data_dir)
  next((data_dir / "VLCS" / "LabelMe").rglob("*.*")).unlink()
  for trial in ("", "&trial=0", "&trial=1"):
    with pytest.raises(DataError, match="vlcs/sun09 in .* has changed since"):
      data.from_string(f"vlcs/sun09?counts=any{trial}", data_dir)


def test_the_phase_whole_tests_on_the_whole_domain_and_says_so(data_dir):
  usual, whole = (data.from_string(f"vlcs/sun09?counts=any{phase}", data_dir) for phase in ("", "&phase=whole"))
  assert len(usual.splits["test"]) == 11 and len(whole.splits["test"]) == 13
  assert set(usual.splits["test"].keys) < set(whole.splits["test"].keys)
  assert usual.splits["train"].hash() == whole.splits["train"].hash()
  assert usual.protocol.startswith("DomainBed, final: train=train val=val test=test, incomplete (31 of 5958 train")
  assert whole.protocol.startswith("DomainBed, whole: train=train val=val test=whole, incomplete (")


def test_all_domains_at_once_test_on_the_out_parts_and_choose_on_a_second_cut(data_dir):
  task = data.from_string("vlcs/all?counts=any", data_dir)
  held = [data.from_string(f"vlcs/{name}?counts=any&phase=whole", data_dir) for name in task.domain_names]
  out = {name: set(held[name == "caltech101"].splits["val"].keys) for name in task.domain_names}
  for d, name in enumerate(task.domain_names):
    of = {part: {k for k in split.keys if k.startswith(f"{name}/")} for part, split in task.splits.items()}
    everything = set(held[d].splits["test"].keys)
    assert of["test"] == {k for k in out[name] if k.startswith(f"{name}/")}
    assert of["train"] | of["val"] | of["test"] == everything and sum(map(len, of.values())) == len(everything)
    assert len(of["val"]) == (len(everything) - len(everything) // 5) // 5
    ordered = sorted(everything)  # ImageFolder's order here
    in_ = domains.halves(len(ordered), 0, d)[1]
    assert of["val"] == {ordered[in_[row]] for row in domains.halves(len(in_), 0, d, 1)[0]}
  assert all(set(split.domains) == {0, 1, 2, 3} for split in task.splits.values())
  assert "all domains" in task.protocol


# Suites

def test_suites_are_their_leave_one_out_tasks_with_one_protocol():
  assert {name: len(tasks) for name, tasks in domains.SUITES.items()} == {
      "vlcs": 4, "pacs": 4, "office_home": 4, "terra_incognita": 4, "domainnet": 6, "domainnet_tfds": 6}
  assert SUITES["office_home"] == tuple(f"office_home/{d}" for d in ("art", "clipart", "product", "real_world"))
  protocols = {}
  for suite, tasks in domains.SUITES.items():
    assert f"{suite}/all" in ENTRIES and f"{suite}/all" not in tasks
    assert tuple(f"{suite}/{d}" for d in ENTRIES[tasks[0]].domain_names) == tasks
    assert ENTRIES[tasks[0]].domain_names == tuple(sorted(ENTRIES[tasks[0]].domain_names))  # the seed's index counts so
    [protocols[suite]] = {ENTRIES[task].protocol for task in tasks}
    assert ENTRIES[f"{suite}/all"].protocol != protocols[suite]
  assert protocols["domainnet"] != protocols["domainnet_tfds"]


def test_sizes_are_those_of_the_literature_and_what_a_part_really_has():
  totals = {s.name: sum(s.sizes) for s in domains.SETS if s.sizes}
  assert totals == {"vlcs": 10_729, "pacs": 9_991, "office_home": 15_588, "domainnet": 586_575}
  for entry in domains.ENTRIES:
    [wanted] = [s for s in (*domains.SETS, domains.TFDS_SET) if s.name == entry.name.split("/")[0]]
    held_out = dict(zip(wanted.domain_names, range(9))).get(entry.name.split("/")[1])
    for part, count in entry.counts.items():
      inside = domains._domains_of(part, held_out, len(wanted.sizes))
      assert count == sum(len(domains._rows(part, wanted.sizes[d], 0, d, held_out)) for d in inside)


def test_a_part_of_another_size_is_an_error_unless_any_is_fine(data_dir):
  with pytest.raises(DataError, match="VLCS has 31 of 5958 train images, .*; complete the data set, or .*any"):
    data.from_string("vlcs/sun09", data_dir)


# Folders as they lie

def test_folders_are_found_whatever_their_case_and_spelling(tmp_path):
  office = {"Art": 5, "Clipart": 5, "Product": 5, "Real World": 5}
  classes = [f"c{i:02d}" for i in range(65)]
  for folder, real in (("OfficeHome", "Real World"), ("office_home", "real_world"), ("office-home", "RealWorld")):
    root = tmp_path / folder / "x"
    for d, domain in enumerate([*list(office)[:3], real]):
      for i, c in enumerate(classes):
        (root / folder / domain / c).mkdir(parents=True)
        write(root / folder / domain / c / "0.png", 1000 * d + i)
  hashes = {data.from_string("office_home/real_world?counts=any", tmp_path / folder / "x").split_hash()
            for folder in ("OfficeHome", "office_home", "office-home")}
  assert len(hashes) == 1


def test_pacs_may_lie_one_level_deeper_and_the_complete_one_is_taken(tmp_path):
  sizes = dict.fromkeys(("art_painting", "cartoon", "photo", "sketch"), 7)
  vlcs(tmp_path / "a" / "PACS" / "kfold", sizes, PACS)
  assert ENTRIES["pacs/photo"].find(tmp_path / "a")[0].path == tmp_path / "a" / "PACS" / "kfold"
  vlcs(tmp_path / "a" / "PACS", {"photo": 7}, PACS)
  found = ENTRIES["pacs/photo"].find(tmp_path / "a")
  assert [bool(source.problem) for source in found] == [False, True] and found[0].path.name == "kfold"
  assert len(data.from_string("pacs/photo?counts=any", tmp_path / "a").splits["test"]) == 6


def test_a_class_may_be_missing_from_a_domain(tmp_path):
  vlcs(tmp_path / "VLCS", dict(list(VLCS.items())[:3]))
  vlcs(tmp_path / "VLCS", {"VOC2007": 12}, ("bird", "dog", "person"))
  task = data.from_string("vlcs/voc2007?counts=any", tmp_path)
  assert set(task.splits["test"].labels) == {0, 3, 4}
  assert "no test image of 'car', 'chair'" in task.check()


def test_absent_or_half_present_sets_say_what_to_do(tmp_path):
  with pytest.raises(DataError, match=r"vlcs/sun09 is not in .*; expected VLCS/\{Caltech101,LabelMe,SUN09,VOC2007\}/"
                                      r"<class>/\*.jpg; get the folders with DomainBed.*; or give another --data_dir"):
    data.from_string("vlcs/sun09", tmp_path)
  vlcs(tmp_path / "VLCS", {"LabelMe": 5, "SUN09": 5})
  with pytest.raises(DataError, match="VLCS lacks the domain folders 'Caltech101', 'VOC2007'; expected .*; add them$"):
    data.from_string("vlcs/sun09", tmp_path)
  (tmp_path / "PACS" / "zip").mkdir(parents=True)
  with pytest.raises(DataError, match="PACS lacks the domain folders 'art_painting', 'cartoon', 'photo', 'sketch'; "):
    data.from_string("pacs/photo", tmp_path)
  (tmp_path / "terra_incognita").write_text("a file")
  with pytest.raises(DataError, match="terra_incognita/location_38 is not in"):
    data.from_string("terra_incognita/location_38", tmp_path)


def test_an_unexpected_class_folder_is_an_error(data_dir):
  write(data_dir / "VLCS" / "SUN09" / "zebra" / "0.png", 7)
  with pytest.raises(DataError, match="SUN09 has the class folder 'zebra'; expected the classes of the first domain, "
                                      "'bird', .*; rename or remove it"):
    data.from_string("vlcs/caltech101?counts=any", data_dir)


def test_another_number_of_classes_is_an_error(tmp_path):
  vlcs(tmp_path / "VLCS", classes=("bird", "car"))
  with pytest.raises(DataError, match="has 2 classes; expected 5; is it another data set"):
    data.from_string("vlcs/sun09?counts=any", tmp_path)


@pytest.mark.parametrize("query, message", [
    ("trial=x", "trial is 'x'; expected a number"), ("seed=1", "'seed' is no option; expected .*trial"),
    ("phase=tune", "no phase 'tune'; expected final, whole"), ("source=tfrecord", "no source 'tfrecord' in .*folder")])
def test_options_are_checked(data_dir, query, message):
  with pytest.raises(DataError, match=message):
    data.from_string(f"vlcs/sun09?{query}", data_dir)


def test_a_domain_without_images_for_validation_is_an_error_before_training(tmp_path):
  vlcs(tmp_path / "VLCS", dict.fromkeys(VLCS, 4), ("bird", "car", "chair", "dog"))
  (tmp_path / "VLCS" / "Caltech101" / "person").mkdir()
  with pytest.raises(DataError, match="split 'val' of task 'vlcs/sun09' has no image"):
    data.from_string("vlcs/sun09?counts=any", tmp_path).check()


# DomainNet by TFDS

@pytest.fixture(scope="module")
def domainnet(tmp_path_factory):
  """Format -> a data directory with the six builders; 10, 11, ... train examples and 6 test examples each."""
  roots = {form: tmp_path_factory.mktemp(form) for form in ("array_record", "tfrecord")}
  for form, root in roots.items():
    for d, builder in enumerate(domains.BUILDERS):
      fake_tfds.prepare(builder.name, root, {"train": 10 + d, "test": 6}, form, seed=d)
  return roots


def test_every_task_says_where_it_is_looked_for():
  assert all(entry.layout for entry in data.ENTRIES.values())
  assert "domainnet/{clipart,infograph,painting,quickdraw,real,sketch}/1.0.0/" in (
      data.ENTRIES["domainnet_tfds/real"].layout)


def test_domainnet_by_tfds_has_its_own_test_parts(domainnet):
  tasks = {form: data.from_string("domainnet_tfds/painting", root) for form, root in domainnet.items()}
  task = tasks["array_record"]
  assert task.split_hash() == tasks["tfrecord"].split_hash() and task.num_classes == 345
  assert task.source == "array_record " + "+".join(f"domainnet/{d}:1.0.0" for d in task.domain_names)
  sizes = {d: 10 + d for d in range(6) if d != 2}
  assert {k: len(s) for k, s in task.splits.items()} == {
      "train": sum(n - n // 5 for n in sizes.values()), "val": sum(n // 5 for n in sizes.values()), "test": 6}
  for part in ("train", "val"):
    split = task.splits[part]
    for d, n in sizes.items():
      [source] = tfds.find(domainnet["array_record"], f"domainnet/{task.domain_names[d]}", "1.0.0")
      out, in_ = domains.halves(n, 0, d)
      official = tfds.records(source, "train")
      expected = [int(official[row]["label"]) for row in (out if part == "val" else in_).tolist()]
      assert split.labels[split.domains == d].tolist() == expected
  assert set(task.splits["test"].domains) == {2} and task.splits["test"].read(3).ndim == 3


def test_all_of_domainnet_by_tfds_tests_on_all_test_parts(domainnet):
  task = data.from_string("domainnet_tfds/all?trial=1", domainnet["tfrecord"])
  assert {k: len(s) for k, s in task.splits.items()} == {"train": 75 - 13, "val": 13, "test": 36}
  assert np.bincount(task.splits["test"].domains).tolist() == [6] * 6
  other = data.from_string("domainnet_tfds/all", domainnet["tfrecord"])
  assert set(task.splits["train"].keys) != set(other.splits["train"].keys)
  keys = sum((images_of(split) for split in task.splits.values()), [])
  assert len(set(keys)) == len(keys)


def test_tfds_folders_are_not_taken_for_domainbeds_nor_the_other_way_round(domainnet, tmp_path):
  os.symlink(domainnet["tfrecord"] / "domainnet", tmp_path / "domainnet")
  assert ENTRIES["domainnet/real"].find(tmp_path) == [] and len(ENTRIES["domainnet_tfds/real"].find(tmp_path)) == 1
  with pytest.raises(DataError, match="domainnet/real is not in"):
    data.from_string("domainnet/real", tmp_path)
  vlcs(tmp_path / "other" / "domainnet", dict.fromkeys(domains.TFDS_SET.domains, 2))
  assert ENTRIES["domainnet_tfds/real"].find(tmp_path / "other") == []
  assert ENTRIES["domainnet/real"].find(tmp_path / "other")[0].path == tmp_path / "other" / "domainnet"


def test_builders_that_are_not_all_there_say_what_is_missing(domainnet, tmp_path):
  for form, names in (("array_record", ("real", "sketch")), ("tfrecord", ("clipart",))):
    for name in names:
      (tmp_path / "domainnet").mkdir(exist_ok=True)
      os.symlink(domainnet[form] / "domainnet" / name, tmp_path / "domainnet" / name)
  with pytest.raises(DataError, match="lacks 'domainnet/infograph:1.0.0', 'domainnet/painting:1.0.0', "
                                      "'domainnet/quickdraw:1.0.0' of 'domainnet/clipart:1.0.0'.*; prepare the miss"):
    data.from_string("domainnet_tfds/real", tmp_path)
  for name in ("infograph", "painting", "quickdraw"):
    os.symlink(domainnet["tfrecord"] / "domainnet" / name, tmp_path / "domainnet" / name)
  with pytest.raises(DataError, match="in different file formats; prepare them in one"):
    data.from_string("domainnet_tfds/real", tmp_path)


def test_one_builder_of_another_version_or_damaged_spoils_the_set(domainnet, tmp_path):
  for builder in domains.BUILDERS:
    (tmp_path / builder.name).parent.mkdir(exist_ok=True)
    if builder.name != "domainnet/real":
      os.symlink(domainnet["array_record"] / builder.name, tmp_path / builder.name)
  fake_tfds.prepare("domainnet/real", tmp_path, {"train": 5, "test": 5}, version="2.0.0")
  with pytest.raises(DataError, match="is version 2.0.0 of domainnet/real; expected 1.0.0"):
    data.from_string("domainnet_tfds/sketch", tmp_path)


# On real input

def test_pacs_as_it_is(shared, tmp_path):
  os.symlink(shared / "data" / "pacs70", tmp_path / "PACS")
  task = data.from_string("pacs/sketch?counts=any", tmp_path)
  assert {k: len(s) for k, s in task.splits.items()} == {"train": 1176, "val": 294, "test": 392}
  assert task.class_names == PACS and task.check() == []
  assert np.bincount(task.splits["train"].domains).tolist() == [392] * 3
  assert task.splits["test"].read(0).shape == (227, 227, 3)
