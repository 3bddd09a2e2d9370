"""`transferlab data list` and `check`: rows on what is there, records of what was there, and what has changed."""
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fake_tfds
from engine import write_images
from transferlab import cli
from transferlab.commands import datasets
from transferlab.data import from_string, image_folder, inventory, record, suites
from transferlab.data.entries import Entry, Source, open_entry
from transferlab.data.tasks import BadImage, DataError

CLASSES = ("ant", "bee", "cat")


def find(data_dir):
  """The folder <data_dir>/insects with train/ and test/, and a list that is never whole."""
  folder, lists = data_dir / "insects", data_dir / "insects.txt"
  problem = "" if (folder / "test").is_dir() else f"{folder} lacks test/; expected train/ and test/; complete it"
  found = [Source("folder", folder, "insects:1", problem)] if folder.is_dir() else []
  return found + ([Source("list", lists, problem="half a list")] if lists.exists() else [])


def part(source, name, flip: bool = False):
  split = image_folder(source.path, val_fraction=0).splits[name]
  return split.select(range(len(split))[::-1]) if flip else split


def class_names(source):
  return image_folder(source.path, val_fraction=0).class_names


ENTRY = Entry("own/insects", "Insects", find, part, class_names, {"final": {"train": "train", "test": "test"}},
              num_classes=3, counts={"train": 24, "test": 12}, builders=("insects:1.0.0",), layout="insects/train/")


@pytest.fixture
def place(tmp_path):
  """A data directory with the whole set."""
  write_images(tmp_path / "insects" / "train", CLASSES, 8)
  write_images(tmp_path / "insects" / "test", CLASSES, 4, seed=1)
  return tmp_path


def check(data_dir, entry=ENTRY, accept=False):
  row, = inventory.checked([entry], data_dir, accept)
  return row


def listed(data_dir, entry=ENTRY):
  row, = inventory.listed([entry], data_dir)
  return row


def changed(**fields):
  return dataclasses.replace(ENTRY, **fields)


# Rows


@pytest.mark.parametrize("rows", [inventory.listed, inventory.checked])
def test_absent(tmp_path, rows):
  row, = rows([ENTRY], tmp_path)
  assert (row.state, row.wrong, row.source, row.hash) == ("absent", False, "", "")
  assert row.counts == {"train": (None, 24), "test": (None, 12)}, "what to expect is shown before anything is there"
  assert row.notes == (f"expected insects/train/; prepare it with `transferlab data prepare own/insects "
                       f"--data_dir={tmp_path} --download`",)
  assert not list(tmp_path.iterdir())


def test_list_opens_nothing(place):
  def refuse(*_):
    raise AssertionError("opened")
  row = listed(place, changed(part=refuse, class_names=refuse))
  assert (row.state, row.source, row.notes) == ("present", "folder insects:1", ("not checked",))
  assert row.counts == {"train": (None, 24), "test": (None, 12)}
  assert not (place / record.FOLDER).exists()


def test_check_counts_hashes_and_keeps_what_it_found(place):
  row = check(place)
  task = image_folder(place / "insects", val_fraction=0)
  assert (row.state, row.wrong, row.notes) == ("checked", False, ())
  assert row.counts == {"train": (24, 24), "test": (12, 12)}
  assert row.hash == task.split_hash() and row.pixels == task.splits["train"].fingerprint()
  kept = json.loads((place / ".transferlab" / "own__insects.json").read_text())["folder"]
  assert kept["parts"]["test"] == {"count": 12, "hash": task.splits["test"].hash(),
                                   "pixels": task.splits["test"].fingerprint()}
  again = listed(place, changed(part=None))
  assert (again.counts, again.hash, again.pixels) == (row.counts, row.hash, row.pixels)
  assert again.notes == (f"checked {kept['date']} as folder insects:1",)


def test_a_second_check_leaves_the_record(place):
  check(place)
  file = record.path(place, ENTRY.name)
  old = json.loads(file.read_text())
  old["folder"]["date"] = "2001-02-03"
  file.write_text(json.dumps(old))
  assert check(place).state == "checked" and json.loads(file.read_text()) == old
  assert check(place, accept=True).state == "checked" and json.loads(file.read_text()) != old


def test_parts_of_all_phases_once(place):
  opened = []
  def counted(source, name):
    opened.append(name)
    return part(source, name)
  entry = changed(part=counted, phases={"final": {"train": "train", "test": "test"}, "tune": {"train": "train"}})
  assert list(check(place, entry).counts) == ["train", "test"] and opened == ["train", "test"]


def test_a_part_that_is_new_is_added_to_the_record(place):
  check(place, changed(phases={"tune": {"train": "train"}}))
  assert listed(place).counts == {"train": (24, 24), "test": (None, 12)}
  check(place)
  assert listed(place).counts == {"train": (24, 24), "test": (12, 12)}


def test_other_forms_are_named(place):
  (place / "insects.txt").touch()
  assert check(place).notes == ("also list, which cannot be used: half a list",)
  twice = changed(find=lambda folder: [*find(folder)[:1], Source("tfrecord", folder)])
  assert check(place, twice).notes == ("also tfrecord",)


def test_remarks_on_the_task_are_notes(place):
  twins = changed(part=lambda source, name: part(source, "train"), counts={})
  assert check(place, twins).notes == ("24 images are in both train and test",)


def test_remarks_on_the_form_are_notes(place):
  aged = changed(find=lambda folder: [dataclasses.replace(find(folder)[0], remark="version 2 instead of 1")])
  assert check(place, aged).notes == ("version 2 instead of 1",)
  assert listed(place, aged).notes[1:] == ("version 2 instead of 1",)


# What is wrong, and that the others go on


def remove_test(place):
  shutil.rmtree(place / "insects" / "test")


def remove_image(place):
  (place / "insects" / "test" / "bee" / "1.jpg").unlink()


def damage_image(place):
  (place / "insects" / "train" / "ant" / "3.jpg").write_bytes(b"no image")


def fourth_class(place):
  write_images(place / "insects" / "train", ("dog",), 1)
  write_images(place / "insects" / "test", ("dog",), 1)


@pytest.mark.parametrize("spoil, says", [
    (remove_test, "insects lacks test/; expected train/ and test/"), (remove_image, "test has 11 images, expected 12"),
    (damage_image, "3.jpg: not an image"), (fourth_class, "has 4 classes; expected 3")])
def test_a_set_with_a_problem(place, spoil, says):
  spoil(place)
  whole = changed(name="own/whole", find=lambda folder: [Source("folder", folder / "whole")])
  write_images(place / "whole" / "train", CLASSES, 8)
  write_images(place / "whole" / "test", CLASSES, 4)
  bad, good = inventory.checked([ENTRY, whole], place)
  assert (bad.state, bad.wrong, good.state) == ("problem", True, "checked")
  assert says in bad.notes[0] and "\n" not in bad.notes[0]
  assert not record.path(place, ENTRY.name).exists(), "a set that is not right is no measure for later ones"


@pytest.mark.parametrize("error", [DataError("cut short"), OSError(5, "cut short"), RuntimeError("cut\nshort"),
                                   BadImage("cut short")])
def test_whatever_a_reader_raises_is_a_problem_of_its_set(place, error):
  def raising(source, name):
    raise error
  row = check(place, changed(part=raising))
  assert row.state == "problem" and "cut short" in row.notes[0]


@pytest.mark.parametrize("rows", [inventory.listed, inventory.checked])
def test_a_folder_that_cannot_be_listed_is_a_problem_of_its_set(place, rows):
  def refuse(folder):
    raise PermissionError(errno.EACCES, "Permission denied", str(folder / "bees"))
  bad, good = rows([changed(name="own/bees", find=refuse), ENTRY], place)
  assert (bad.task, bad.state, good.wrong) == ("own/bees", "problem", False)
  assert bad.notes == (f"[Errno 13] Permission denied: '{place / 'bees'}'",)


def test_a_label_out_of_range(place):
  def wrong(source, name):
    split = part(source, name)
    return dataclasses.replace(split, labels=split.labels + (np.arange(len(split)) == 5) * 7)
  row = check(place, changed(part=wrong))
  assert row.state == "problem" and "label 7 of 'train/ant/5.jpg'" in row.notes[0]


def test_a_half_present_set_is_a_problem_in_the_list_too(place):
  remove_test(place)
  row = listed(place)
  assert row.wrong and row.notes == (f"{place / 'insects'} lacks test/; expected train/ and test/; complete it",)


# Sets that change


def rename_image(place):
  path = place / "insects" / "test" / "ant" / "0.jpg"
  path.rename(path.with_name("renamed.jpg"))


def encode_again(place):
  path = place / "insects" / "test" / "ant" / "0.jpg"
  pixels = np.asarray(Image.open(path)) // 2
  Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("change, says", [
    (rename_image, "test hash is {0}, was {1}"), (encode_again, "test pixels are {2}, were {3}"),
    (remove_image, "test has 11 images, had 12; test has 11 images, expected 12")])
def test_a_changed_set_is_reported_until_it_is_accepted(place, change, says):
  before = check(place)
  old = record.read(place, ENTRY.name, "folder").parts["test"]
  change(place)
  row = check(place)
  now = image_folder(place / "insects", val_fraction=0).splits["test"]
  date = record.read(place, ENTRY.name, "folder").date
  assert (row.state, row.wrong) == ("changed", True)
  assert row.notes[0] == f"changed since {date}: " + says.format(now.hash(), old.hash, now.fingerprint(), old.pixels)
  assert row.notes[1].endswith(f"transferlab data check own/insects --data_dir={place} --accept")
  assert check(place).state == "changed", "telling does not make it right"
  accepted = check(place, accept=True)
  assert accepted.state == "checked"
  assert check(place).state == accepted.state and listed(place).hash == accepted.hash
  assert (accepted.hash == before.hash) == (change is encode_again)


def test_an_unexpected_number_of_images_is_a_problem_until_it_is_accepted(place):
  remove_image(place)
  says = "test has 11 images, expected 12; complete the data set, or take what is there with ?counts=any"
  assert check(place).notes == (says,) and check(place).state == "problem"
  assert listed(place).notes == ("not checked",)
  remark = "accepted with 11 of 12 test images; open it with ?counts=any"
  row = check(place, accept=True)
  assert (row.state, row.wrong, row.notes) == ("checked", False, (remark,))
  row = check(place)
  assert (row.state, row.wrong, row.notes) == ("checked", False, (remark,))
  row = listed(place)
  assert (row.state, row.wrong, row.notes[1:], row.counts["test"]) == ("present", False, (remark,), (11, 12))
  with pytest.raises(DataError, match="11 of 12 test images"):
    open_entry(ENTRY, place)
  (place / "insects" / "test" / "ant" / "1.jpg").unlink()
  row = check(place)
  assert row.state == "changed" and "test has 10 images, had 11; test has 10 images, expected 12" in row.notes[0]


def test_a_part_that_nobody_accepted_is_a_problem_beside_an_accepted_one(place):
  remove_image(place)
  check(place, changed(phases={"tune": {"test": "test"}}), accept=True)
  (place / "insects" / "train" / "ant" / "1.jpg").unlink()
  row = check(place)
  assert row.state == "problem" and row.notes[0].startswith("train has 23 images, expected 24; complete")
  assert check(place, accept=True).notes == (
      "accepted with 23 of 24 train images, 11 of 12 test images; open it with ?counts=any",)


def test_remarks_on_the_task_are_there_whatever_else_is_wrong(place):
  twins = changed(part=lambda source, name: part(source, "train"))
  overlap = "24 images are in both train and test"
  row = check(place, twins)
  assert row.state == "problem" and row.notes[1:] == (overlap,)
  check(place)
  row = check(place, twins)
  assert row.state == "changed" and row.notes[2:] == (overlap,)


def test_lists_of_other_shots_than_the_default_ones(place):
  """What is checked is what is there, under a record of its own; the default lists, once there, are another set."""
  opened = []
  def drawn(source, name, shots: int = 16, seed: int = 0):
    opened.append((shots, seed))
    return part(source, name)
  entry = changed(find=lambda folder: [Source("list", folder / "insects")], part=drawn)
  for shots, seed in ((1, 0), (4, 1), (4, 2)):
    (place / "insects" / f"train_meta.list.num_shot_{shots}.seed_{seed}").touch()
  remark = "of shots=4 with seed 2, since there is no list for shots=16 with seed 0"
  row = check(place, entry)
  assert (row.state, row.notes, set(opened)) == ("checked", (remark,), {(4, 2)})
  assert listed(place, entry).notes[1:] == (remark,)
  (place / "insects" / "train_meta.list.num_shot_16.seed_0").touch()
  assert listed(place, entry).notes == ("not checked",)
  assert check(place, entry).notes == () and opened[-1] == (16, 0)


def test_a_version_is_named_only_where_examples_differ(place):
  check(place)
  newer = changed(find=lambda folder: [dataclasses.replace(find(folder)[0], version="insects:2")])
  assert check(place, newer).state == "checked"
  assert listed(place, newer).notes[0].endswith("as folder insects:1")
  rename_image(place)
  assert "(folder insects:1 then): test hash is" in check(place, newer).notes[0]


def test_forms_have_records_of_their_own(place):
  check(place)
  flipped = changed(find=lambda folder: [Source("list", folder / "insects")],
                    part=lambda source, name: part(source, name, flip=True))
  assert check(place, flipped).state == "checked"
  assert listed(place).hash and listed(place, flipped).hash, "one does not push the other out"
  assert check(place, flipped).hash != check(place).hash


def test_opening_a_changed_task_is_refused(place):
  open_entry(ENTRY, place)
  check(place)
  task = open_entry(ENTRY, place)
  rename_image(place)
  with pytest.raises(DataError, match=r"own/insects in .* has changed since 20..-..-..: test hash is .*, was "
                                      rf"{task.splits['test'].hash()}; restore it, or .* check own/insects .*--accept"):
    open_entry(ENTRY, place)
  with pytest.raises(DataError, match="has changed"):
    open_entry(ENTRY, place, counts="any")
  with pytest.raises(DataError, match="has changed"):
    open_entry(ENTRY, place, flip=False)
  with pytest.raises(DataError, match="has changed"):
    open_entry(ENTRY, place, flip=True)  # draws other splits, from a set that is another
  assert "test" not in open_entry(changed(phases={"tune": {"train": "train"}}), place).splits, "its parts are the same"
  check(place, accept=True)
  assert open_entry(ENTRY, place).split_hash() != task.split_hash()
  assert len(open_entry(ENTRY, place, flip=True).splits["test"]) == 12, "other draws of an unchanged set are fine"


def test_opening_reads_no_pixels(place):
  check(place)
  encode_again(place)
  open_entry(ENTRY, place)  # a result row has the fingerprint, and `check` compares it


# Records


@pytest.mark.parametrize("content", ["", "{", "[]", '{"folder": 3}', '{"folder": {"parts": {}}}',
                                     '{"folder": {"source": "", "hash": "", "parts": {"train": {"size": 3}}}}',
                                     b"\xff\xfe"])
def test_a_damaged_record(place, content):
  check(place)
  file = record.path(place, ENTRY.name)
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  says = f"the record {file} cannot be read"
  for row in (listed(place), check(place)):
    assert row.state == "problem" and says in row.notes[0] and "delete it" in row.notes[0]
  with pytest.raises(DataError, match="the record .* cannot be read"):
    open_entry(ENTRY, place)
  assert check(place, accept=True).state == "checked"
  assert check(place).state == "checked" and open_entry(ENTRY, place)


@pytest.mark.parametrize("kind", ["no folder can be made", "no file can be written"])
def test_a_data_directory_that_cannot_be_written(place, monkeypatch, kind):
  def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")
  if kind == "no file can be written":
    monkeypatch.setattr(record, "write_json", refuse)
  (place / record.FOLDER).touch() if kind == "no folder can be made" else (place / record.FOLDER).mkdir()
  row = check(place)
  assert (row.state, row.wrong) == ("checked", False) and row.counts["train"] == (24, 24)
  assert row.notes[0].startswith("not recorded, so that changes go unnoticed (")
  assert open_entry(ENTRY, place) and listed(place).notes == ("not checked",)


# The names


def test_select(monkeypatch):
  assert inventory.select(["vtab/dtd", "vtab/dtd"]) == [suites.ENTRIES["vtab/dtd"]]
  assert [entry.name for entry in inventory.select(["vtab/pets", "vtab1k"])][:2] == ["vtab/pets", "vtab/cifar100"]
  assert len(inventory.select(["vtab1k"])) == 19
  assert {name for names in suites.SUITES.values() for name in names} == {e.name for e in inventory.select([])}
  with pytest.raises(DataError, match="'vtab/dtt' is no task and no suite; .*did you mean 'vtab/dtd'"):
    inventory.select(["vtab/pets", "vtab/dtt"])
  with pytest.raises(DataError, match="expected one of vtab1k, .* or a task such as vtab/"):
    inventory.select(["../etc"])


# The command


@pytest.fixture
def run(capsys, place, monkeypatch):
  """Runs `transferlab data` with the one entry on `place`; returns exit status, standard output and errors."""
  monkeypatch.setitem(suites.ENTRIES, ENTRY.name, ENTRY)
  monkeypatch.setitem(suites.ENTRIES, "own/absent", changed(name="own/absent", find=lambda folder: []))
  monkeypatch.setitem(suites.SUITES, "own", (ENTRY.name, "own/absent"))
  def command(*argv, data_dir=place):
    status = 0
    try:
      cli.main(["transferlab", "data", *argv, *([f"--data_dir={data_dir}"] if data_dir else [])])
    except SystemExit as stop:
      status = stop.code
    return status, *capsys.readouterr()
  return command


def test_plain_lines(run, place):
  status, out, err = run("list", "own")
  lines = out.splitlines()
  assert (status, err) == (0, "") and len(lines) == 4
  assert lines[1].split() == ["own/insects", "present", "folder", "insects:1", "train", "?/24", "test", "?/12", "not",
                              "checked"]
  assert lines[3] == f"{place}: 1 absent, 1 present"
  assert lines[0].index("notes") == lines[1].index("not checked") == lines[2].index("expected insects")
  row = check(place)
  out = run("check", "own")[1]
  assert f"train 24/24 test 12/12  {row.hash}  {row.pixels}\n" in out


def test_exit_status_and_accept(run, place):
  assert run("check", "own")[0] == 0, "absent is not wrong"
  rename_image(place)
  status, out, err = run("check", "own")
  assert status == 1 and "changed since" in out and not err
  assert run("list", "own")[0] == 0 and run("check", "own", "--accept")[0] == 0 and run("check", "own")[0] == 0
  remove_test(place)
  assert run("list", "own")[0] == run("check", "own")[0] == 1


@pytest.mark.parametrize("spoil, status", [(remove_image, 0), (damage_image, 1)])
def test_images_that_cannot_be_read_give_a_status(run, place, spoil, status):
  spoil(place)
  found, out, _ = run(f"--data=folder:{place / 'insects'}")
  assert found == status and ("skipped: " in out) == bool(status) and "split hash" in out


def test_a_reader_that_leaves_is_no_error(place):
  """As in `| head`. Of a long line nothing is kept in the buffer, a short one comes up at the end."""
  code = ("from transferlab import cli; from transferlab.commands import datasets; "
          "datasets.run = lambda *_, **__: print('x' * {}) or {}; cli.main(['transferlab', 'data', 'list'])")
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
  for size, well in ((1, True), (1_000_000, True), (1, False)):
    with subprocess.Popen([sys.executable, "-c", code.format(size, well)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment) as process:
      process.stdout.close()
      assert process.stderr.read() == ""
    assert process.returncode == 1


def test_json(run):
  status, out, _ = run("check", "own", "--json")
  rows = json.loads(out)
  assert status == 0 and [row["task"] for row in rows] == ["own/insects", "own/absent"]
  assert rows[0]["counts"] == {"train": [24, 24], "test": [12, 12]} and rows[0]["state"] == "checked"
  assert json.loads(run("list", "own/insects", "--json")[1])[0]["hash"] == rows[0]["hash"]


@pytest.mark.parametrize("width, table", [(200, True), (80, False)])
def test_a_table_where_there_is_room(run, monkeypatch, width, table):
  from rich.console import Console
  monkeypatch.setattr(datasets, "Console", lambda: Console(width=width, force_terminal=True))
  out = run("list", "own")[1]
  assert ("───" in out) == table and "own/insects" in out and "[" not in out.replace("\x1b[", "")


def test_the_data_directory_of_the_environment(run, place, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(place))
  assert "1 present" in run("list", "own/insects", data_dir="")[1]


@pytest.mark.parametrize("argv, says", [
    (["list", "own/insect"], "did you mean 'own/insects'"), (["lits"], "expected --data=folder:/images, or list, che"),
    (["list", "--accept"], "data list takes no --accept; it takes --data_dir, --json"),
    (["check", "--download"], "data check takes no --download"),
    (["list", "--data=digits"], "expected --data=folder:/images, or list"), ([], "--data is missing")])
def test_wrong_commands(run, argv, says):
  status, out, err = run(*argv)
  assert status == 1 and says in err and err.count("\n") == 1 and not out


def test_no_data_directory(run, place):
  status, _, err = run("list", data_dir=place / "nothing")
  assert status == 1 and "does not exist; expected the folder of the data sets" in err and err.count("\n") == 1
  (place / "file").touch()
  assert "is a file" in run("check", data_dir=place / "file")[2]


# A real entry, as TFDS prepares it


@pytest.fixture(scope="module")
def dtd(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  fake_tfds.prepare("dtd", folder, {"train": 1880, "validation": 1880, "test": 1880})
  return folder


def test_a_task_of_vtab(dtd, run):
  status, out, _ = run("check", "vtab/dtd", "--json", data_dir=dtd)
  row, = json.loads(out)
  assert (status, row["state"], row["source"]) == (0, "checked", "array_record dtd:3.0.1")
  assert row["counts"] == {"train800val200": [1000, 1000], "test": [1880, 1880], "train800": [800, 800],
                           "val200": [200, 200]}
  tune, final = (from_string(f"vtab/dtd?phase={phase}", dtd) for phase in ("tune", "final"))
  assert row["pixels"] == tune.splits["train"].fingerprint() == final.splits["train"].fingerprint()
  fake_tfds.prepare("dtd", dtd / "other", {"train": 1880, "validation": 1880, "test": 1880}, seed=1)
  shutil.rmtree(dtd / "dtd")
  (dtd / "other" / "dtd").rename(dtd / "dtd")
  assert run("check", "vtab/dtd", data_dir=dtd)[0] == 1
  with pytest.raises(DataError, match="vtab/dtd in .* has changed since"):
    from_string("vtab/dtd?phase=tune", dtd)
