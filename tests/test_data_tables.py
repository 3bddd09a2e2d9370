"""Tables and lists as people have them: what spreadsheets and Windows write, one file per class, and each bad input."""
import numpy as np
import pytest
from PIL import Image

from transferlab import data
from transferlab.data import DataError


@pytest.fixture
def images(tmp_path):
  """`images/0.png` … `images/9.png` in a folder; image k is the grey level k."""
  (tmp_path / "images").mkdir()
  for k in range(10):
    Image.fromarray(np.full((4, 5, 3), k, np.uint8)).save(tmp_path / "images" / f"{k}.png")
  return tmp_path


@pytest.fixture
def table(images):
  """table(text or bytes, **options) -> the task of a CSV file beside the images, everything in train."""
  def make(content, **options):
    content = content.encode() if isinstance(content, str) else content
    (images / "t.csv").write_bytes(content)
    return data.csv_file(images / "t.csv", **{"val_fraction": 0, "test_fraction": 0, **options})
  return make


def found(task) -> list[tuple[int, str]]:
  """(grey level, class name) of each training image: what the task really reads."""
  split = task.splits["train"]
  return [(int(split.read(i)[0, 0, 0]), task.class_names[label]) for i, label in enumerate(split.labels)]


def fails(make, *says) -> None:
  with pytest.raises(DataError) as error:
    make()
  assert "\n" not in str(error.value)
  for text in says:
    assert text in str(error.value), str(error.value)


ROWS = [(0, "a"), (1, "b, or c")]


@pytest.mark.parametrize("content", [
    'image,label\nimages/0.png,a\nimages/1.png,"b, or c"\n',
    '\ufeffimage,label\r\nimages/0.png,a\r\nimages/1.png,"b, or c"\r\n',
    '"image";"label"\r\nimages/0.png;a\r\n"images/1.png";b, or c',
    'image\tlabel\nimages/0.png\ta\n\nimages/1.png\tb, or c\n\n',
    'label,image\ra,images/0.png\r"b, or c",images/1.png\r',
    'note,"image, file","label"\n"two\r\nlines; and ""quotes""",images/0.png,a\n,images/1.png,"b, or c"\n',
    '"a,b,c";image;label\n1;images/0.png;a\n2;images/1.png;b, or c\n',
    'image,label\n images/0.png , a \n./images//1.png,"b, or c"\n,\n  ,  \n   \n',
    'image,label\nimages\\0.png,a\nimages\\1.png,"b, or c"\n',
], ids=["plain", "mark and windows", "semicolons", "tabs and blank lines", "old mac", "breaks in quotes",
        "commas in header", "spaces and empty rows", "backslashes"])
def test_tables_as_programs_write_them(table, content):
  options = {"image_column": "image, file"} if "image, file" in content else {}
  task = table(content, **options)
  assert found(task) == ROWS
  assert task.splits["train"].keys == ("images/0.png", "images/1.png")  # so the split's hash is the same for all


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_an_error_that_helps(table, encoding):
  fails(lambda: table("image\tlabel\nimages/0.png\ta\n".encode(encoding)), "t.csv is UTF-16", "save it again", "UTF-8")


def test_another_encoding_is_an_error_with_its_line(table):
  content = "image,label\nimages/0.png,a\nimages/1.png,Köln\n".encode("latin-1")
  fails(lambda: table(content), "line 3", r"b'\xf6'", "UTF-8")


def test_bad_cells_and_headers(table, images):
  fails(lambda: table("image,label\nimages/0.png,a\nimages/1.png,b,c\n"), "line 3 has 3 cells", "expected 2",
        "in quotes")
  fails(lambda: table("image,label\nimages/0.png,a\nimages/1.png\n"), "line 3 has 1 cells")
  fails(lambda: table('image,label\nimages/0.png,"a\nimages/1.png,b\n'), "is not CSV", "quotes in pairs")
  fails(lambda: table("image,label\nimages/0.png,a\nimages/1.png,\n"), "line 3 has no label")
  fails(lambda: table("image,label\nimages/0.png,a\n ,b\n"), "line 3 has no image")
  fails(lambda: table("image,label,Label\nimages/0.png,a,b\n"), "2 columns called 'label'", "label_column=")
  fails(lambda: table("image,label\n,\n , \n"), "expected a header and at least one image")
  fails(lambda: table(""), "has 0 lines")
  fails(lambda: table("image,label\nC:\\me\\0.png,a\n"), "0.png does not exist", "give the folder of the images")
  (images / "t.csv").unlink()
  fails(lambda: data.csv_file(images / "t.csv"), "cannot read", "t.csv")
  fails(lambda: data.csv_file(images), "cannot read")


def test_one_image_with_two_labels(table):
  fails(lambda: table("image,label\nimages/0.png,a\nimages/1.png,b\nimages\\0.png,b\n"),
        "'images/0.png' is in two classes, 'a' and 'b'", "remove it")


def test_a_row_twice_counts_once_where_the_split_is_cut(table):
  rows = [f"images/{k}.png,{'ab'[k % 2]}\n" for k in range(10)]
  once = table("image,label\n" + "".join(rows), val_fraction=0.2, test_fraction=0.2)
  twice = table("image,label\n" + "".join(rows + rows[::-1]), val_fraction=0.2, test_fraction=0.2)
  assert once.split_hash() == twice.split_hash() and twice.check() == []


def test_rows_of_given_splits_stay_and_an_image_in_two_of_them_is_remarked(table):
  rows = [f"images/{k}.png,{'ab'[k % 2]},{split}\n" for k in range(2) for split in ("train", "train", "val", "Testing")]
  task = table("image,label,split\n" + "".join(rows))
  assert {name: len(split) for name, split in task.splits.items()} == {"train": 4, "val": 2, "test": 2}
  assert "2 images are in both train and val" in task.check()


def test_classes_that_differ_only_in_case_are_two_and_remarked(table):
  task = table("image,label\nimages/0.png,Rose\nimages/1.png,rose\n")
  assert task.class_names == ("Rose", "rose")
  assert [remark for remark in task.check() if "differ only in case" in remark and "'Rose', 'rose'" in remark]


def test_an_image_that_is_not_there_is_named_or_left_out(table):
  task = table("image,label\nimages/0.png,a\nimages/1.png,b\nimages/lost.png,b\n")
  with pytest.raises(data.BadImage, match="1 of 3 images.*images/lost.png: no such file"):
    data.check_images(task.splits["train"])
  assert len(data.check_images(task.splits["train"], "skip")[0]) == 2


def test_a_table_is_written_back_as_it_was(images):
  content = '\ufeff"image; file";note;n\r\nimages\\0.png; "as ""is""";1\r\n"two\nlines";;2\r\n;;\r\n'
  (images / "t.csv").write_bytes(content.encode())
  table = data.read_table(images / "t.csv")
  assert table.lines == (2, 4, 5) and table.images("IMAGE; file") == [
      str(images / "images/0.png"), str(images / "two\nlines"), ""]
  assert table.images("image; file", "/other")[0] == "/other/images/0.png"
  table.write(images / "out.csv", ["x", "y"], [["1", "b;c"], ["", ""], ["3", "4"]])
  written = (images / "out.csv").read_bytes().decode()
  assert written == ('\ufeff"image; file";note;n;x;y\r\nimages\\0.png;" ""as """"is""""""";1;1;"b;c"\r\n'
                     '"two\nlines";;2;;\r\n;;;3;4\r\n')
  again = data.read_table(images / "out.csv")
  assert [row[:3] for row in again.rows] == list(table.rows) and again.encoding == table.encoding == "utf-8-sig"


# One file per class

@pytest.fixture
def lists(images):
  """lists({"rose.txt": text or bytes}, **options) -> the task of such a folder beside the images."""
  def make(files, **options):
    folder = images / "classes"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
      file.unlink()
    for name, content in files.items():
      (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return data.class_lists(folder, **{"root": images, "val_fraction": 0, "test_fraction": 0, **options})
  return make


def test_one_file_per_class(lists, images):
  task = lists({"tulip.txt": "images/3.png\rimages/1.png\r", "Rose.TXT": "\ufeffimages/0.png\r\n\r\n images\\2.png\r\n",
                "._rose.txt": b"\0\xff", "notes.md": "x"})
  assert task.class_names == ("Rose", "tulip") and task.name == "classes"
  assert found(task) == [(0, "Rose"), (2, "Rose"), (3, "tulip"), (1, "tulip")] and task.check() == []
  assert task.splits["train"].keys[1] == "images/2.png"


def test_paths_are_relative_to_the_lists_unless_root_is_given(lists, images):
  files = {"a.txt": "../images/0.png\n", "b.txt": "../images/1.png\n"}
  assert found(lists(files, root=None)) == [(0, "a"), (1, "b")]
  fails(lambda: lists(files), "does not exist", "give the folder of the images as root")


def test_the_split_of_class_files_is_automatic_and_seeded(lists, images):
  rows = {"7.txt": range(5), "12.txt": range(5, 10)}
  files = {name: "".join(f"images/{k}.png\n" for k in found) for name, found in rows.items()}
  task = lists(files, val_fraction=0.2, test_fraction=0.2)
  assert task.class_names == ("12", "7")  # names, though they look like indices
  assert {name: np.bincount(split.labels).tolist() for name, split in task.splits.items()} == {
      "train": [3, 3], "val": [1, 1], "test": [1, 1]}
  text = f"classes:{images}/classes?root={images}"
  assert data.from_string(text).split_hash() == task.split_hash()
  assert data.from_string(text + "&seed=1").split_hash() != task.split_hash()


def test_bad_class_files(lists, images):
  fails(lambda: lists({"a.txt": "images/0.png\nimages/1.png\n", "b.txt": "images/1.png\n"}),
        "'images/1.png' is in two classes, 'a' and 'b'")
  fails(lambda: lists({"a.txt": "images/0.png\n", "b.txt": "\n \n"}), "class 'b' has no image", "b.txt is empty")
  fails(lambda: lists({"train.txt": "images/0.png 0\n", "test.txt": "images/1.png 1\n"}), "named like splits", "list:")
  fails(lambda: lists({"notes.md": "x"}), "holds no .txt file", "one text file per class")
  fails(lambda: data.class_lists(images / "nowhere"), "is no folder")
  fails(lambda: lists({"a.txt": "images/0.png\n".encode("utf-16"), "b.txt": "images/1.png\n"}), "a.txt is UTF-16")
  task = lists({"a.txt": "images/0.png\nimages/lost.png\n", "b.txt": "images/1.png\n"})
  with pytest.raises(data.BadImage, match="images/lost.png: no such file"):
    data.check_images(task.splits["train"])
  assert any("differ only in case" in r for r in lists({"a.txt": "images/0.png", "A.txt": "images/1.png"}).check())


def test_a_list_in_utf_16_is_an_error_that_helps(images):
  (images / "train.txt").write_bytes("images/0.png 0\nimages/1.png 1\n".encode("utf-16"))
  fails(lambda: data.list_files(images), "train.txt is UTF-16", "UTF-8")
