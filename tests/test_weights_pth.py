"""`.pth` and `.pt` files of torch.save: state dicts load as from elsewhere, and nothing else gets in or runs."""
import logging
import pickle
import struct
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from transferlab.backbones.weights import WeightsError, files, load_weights, torch_files
from transferlab.backbones.weights.torch_files import read_torch

COPIES = Path(__file__).parent / "golden" / "weights"
KINDS = {"Float": np.float32, "Half": np.float16, "BFloat16": jnp.bfloat16, "Double": np.float64, "Long": np.int64,
         "Int": np.int32, "Bool": np.bool_}


# --- What torch.save writes, put together here ----------------------------------------------------------------------

def text(value: str) -> bytes:
  data = value.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
  data = pickle.encode_long(value)
  return b"\x8a" + bytes([len(data)]) + data


def tuple_(*values) -> bytes:
  return b"(" + b"".join(number(v) if isinstance(v, int) else v for v in values) + b"t"


def storage(key: str, count: int, kind: str = "Float") -> bytes:
  return tuple_(text("storage"), f"ctorch\n{kind}Storage\n".encode(), text(key), text("cpu"), count) + b"Q"


EMPTY = b"ccollections\nOrderedDict\n)R"
MODULE = b"c__torch__.model.___torch_mangle_7\nBlock\n)\x81"  # an object of TorchScript's, without attributes
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(stored: bytes, offset: int, shape: tuple, strides: tuple, *more: bytes) -> bytes:
  return REBUILD + tuple_(stored, offset, tuple_(*shape), tuple_(*strides), b"\x89", EMPTY, *more) + b"R"


def state_dict(**tensors: bytes) -> bytes:
  return b"}(" + b"".join(text(name) + value for name, value in tensors.items()) + b"u"


def archive(path, program: bytes, stored: dict, compression=zipfile.ZIP_STORED, **others):
  """The file at `path`; a whole program has no protocol and no stop of its own."""
  with zipfile.ZipFile(path, "w", compression) as file:
    file.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
    for key, data in {"byteorder": b"little", **{f"data/{k}": d for k, d in stored.items()}, **others}.items():
      file.writestr(f"archive/{key}", data)
  return path


def save(path, arrays: dict, wrap=lambda program: program):
  """Arrays as torch.save writes a state dict."""
  kinds = {np.dtype(kind): name for name, kind in KINDS.items()}
  strides = lambda a: tuple(step // a.itemsize for step in a.strides)
  entries = {name: tensor(storage(str(i), a.size, kinds[a.dtype]), 0, a.shape, strides(a))
             for i, (name, a) in enumerate(arrays.items())}
  stored = {str(i): a.tobytes() for i, a in enumerate(arrays.values())}
  return archive(path, wrap(state_dict(**entries)), stored)


def scripted(path, arrays: dict):
  """Arrays as torch.jit.save writes a module of modules, "visual.conv1.weight"; its code is deflated."""
  kinds, stored = {np.dtype(kind): name for name, kind in KINDS.items()}, {}
  def program(prefix: str) -> bytes:
    inside = dict.fromkeys(name[len(prefix):].partition(".")[0] for name in arrays if name.startswith(prefix))
    entries = {"training": b"\x89", "_is_full_backward_hook": b"N"}
    for name in inside:
      if (a := arrays.get(prefix + name)) is None:
        entries[name] = program(f"{prefix}{name}.")
        continue
      key, strides = str(len(stored)), tuple(step // a.itemsize for step in a.strides)
      entries[name] = tensor(storage(key, a.size, kinds[a.dtype]), 0, a.shape, strides)
      stored[key] = a.tobytes()
    return MODULE + state_dict(**entries) + b"b"
  archive(path, program(""), stored)
  with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
    file.writestr("archive/code/__torch__/model.py", "import os\n" * 100)
  return path


def one(path, entry: bytes, count: int = 6, kind: str = "Float", **others):
  """A file with the tensor "w" and one storage of `count` numbers, 0, 1, ….."""
  return archive(path, state_dict(w=entry), {"0": np.arange(count).astype(KINDS[kind]).tobytes()}, **others)


def refused(path, *words) -> None:
  with pytest.raises(WeightsError) as error:
    load_weights(path)
  message = str(error.value)
  assert "\n" not in message and message.startswith(path.name) and len(message) < 600, message
  for word in words:
    assert word in message, message


# --- What loads -----------------------------------------------------------------------------------------------------

def test_a_file_of_torch_holds_what_its_safetensors_does(golden):
  """Written by torch itself: a state dict with the versions of its modules."""
  found = read_torch(golden("checkpoints/timm_resnet50_v15/model.pth"))
  expected, _ = files.read_safetensors(golden("checkpoints/timm_resnet50_v15/model.safetensors"))
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert found[name].shape == array.shape and np.array_equal(found[name], array), name
  loaded = [load_weights(golden(f"checkpoints/timm_resnet50_v15/model.{kind}")) for kind in ("pth", "safetensors")]
  assert loaded[0].hash == loaded[1].hash and loaded[0].spec == loaded[1].spec


@pytest.mark.parametrize("name", ["vit_state_dict.pt", "rn_state_dict.pt"])
def test_another_file_of_torch_is_finite_numbers(golden, name):
  found = read_torch(golden(f"checkpoints/openai_clip/{name}"))
  assert len(found) > 60 and {array.dtype.name for array in found.values()} == {"float32", "int64"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number(tmp_path, kind):
  array = np.array([[0, 1, 2], [1, 0, 5]]).astype(KINDS[kind])
  found = read_torch(save(tmp_path / "a.pth", {"w": array}))["w"]
  assert found.dtype == (np.float32 if array.dtype.kind not in "ib" else array.dtype)
  np.testing.assert_array_equal(found, array.astype(found.dtype))


def test_windows_on_one_storage(tmp_path):
  stored = storage("0", 6)
  program = state_dict(
      whole=tensor(stored, 0, (2, 3), (3, 1)), transposed=tensor(stored, 0, (3, 2), (1, 3)),
      part=tensor(stored, 4, (2,), (1,)), every_second=tensor(stored, 1, (3,), (2,)), single=tensor(stored, 5, (), ()),
      parameter=b"ctorch._utils\n_rebuild_parameter\n" + tuple_(tensor(stored, 0, (6,), (1,)), b"\x88", EMPTY) + b"R")
  found = read_torch(archive(tmp_path / "a.pt", program, {"0": np.arange(6, dtype=np.float32).tobytes()}))
  expected = {"whole": [[0, 1, 2], [3, 4, 5]], "transposed": [[0, 3], [1, 4], [2, 5]], "part": [4, 5],
              "every_second": [1, 3, 5], "single": 5, "parameter": [0, 1, 2, 3, 4, 5]}
  assert {name: array.tolist() for name, array in found.items()} == expected


def test_state_dicts_inside_checkpoints(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  array = np.arange(6, dtype=np.float32)
  inside = lambda name, *others: lambda program: b"}(" + text(name) + program + b"".join(others) + b"u"
  epoch = text("epoch") + number(3)
  for wrap in (inside("model"), inside("state_dict"), inside("model", epoch), inside("state_dict", epoch),
               lambda program: inside("model")(inside("state_dict", epoch)(program))):
    assert read_torch(save(tmp_path / "a.pth", {"w": array}, wrap))["w"].tolist() == array.tolist()
  assert sum("left out: epoch" in record.message for record in caplog.records) == 3
  for wrap, words in ((inside("net"), "'net', which is no tensor"), (inside("model_ema"), "'model_ema'"),
                      (lambda program: b"]" + program + b"a", "no state dict"), (lambda _: b"}", "no state dict")):
    refused(save(tmp_path / "a.pth", {"w": array}, wrap), words)
  # a dict that holds itself
  refused(archive(tmp_path / "a.pth", b"}q\x00" + text("model") + b"h\x00s", {}), "no state dict")


def test_a_vit_of_timm_loads_by_file_and_by_folder(tmp_path):
  arrays = safetensors.numpy.load_file(COPIES / "timm_vit" / "model.safetensors")
  expected = load_weights(COPIES / "timm_vit", heads=3)
  found = load_weights(save(tmp_path / "pytorch.pth", arrays, lambda p: b"}" + text("model") + p + b"s"), heads=3)
  assert found.hash == expected.hash and found.spec == expected.spec
  (tmp_path / "config.json").write_text((COPIES / "timm_vit" / "config.json").read_text())
  assert load_weights(tmp_path, heads=3).preprocessing == expected.preprocessing


# --- What does not --------------------------------------------------------------------------------------------------

def test_nothing_but_state_dicts_and_nothing_runs(tmp_path):
  marker = tmp_path / "executed"
  command = text(f"touch {marker}")
  good = tensor(storage("0", 6), 0, (6,), (1,))
  programs = {
      "system": b"cposix\nsystem\n(" + command + b"tR", "eval": b"c__builtin__\neval\n(" + command + b"tR",
      "inst": b"(" + command + b"iposix\nsystem\n", "obj": b"(cposix\nsystem\n" + command + b"o",
      "stack_global": text("posix") + text("system") + b"\x93" + command + b"\x85R",
      "newobj": b"ctorch\nFloatStorage\n)\x81", "newobj of torch": b"c__torch__.a\nos.system\n)\x81",
      "newobj of another": b"c__torch__a.b\nC\n)\x81", "newobj with arguments": MODULE[:-2] + tuple_(command) + b"\x81",
      "module called": MODULE[:-1] + b"R", "module of a list": MODULE + b"]b", "module of a module": MODULE * 2 + b"b",
      "module of numbers": MODULE + b"}" + number(1) + good + b"sb",
      "module as a dict": MODULE + number(1) + good + b"s", "extension": b"\x82\x01",
      "dotted": b"ctorch\nos.system\n(" + command + b"tR", "torch.load": b"ctorch\nload\n(" + command + b"tR",
      "numpy": b"cnumpy.core.multiarray\n_reconstruct\n)R", "storage called": b"ctorch\nFloatStorage\n)R",
      "dict called": b"})R", "text called": command + b")R", "arguments": EMPTY[:-2] + b"(]tR",
      "build on a tensor": good + b"}b", "build on a text": command + b"}b",
      "hooks": REBUILD + tuple_(storage("0", 6), 0, tuple_(6), tuple_(1), b"\x89", state_dict(a=good)) + b"R",
      "views": tensor(storage("0", 6), 0, (6,), (1,), b"}(" + text("conj") + b"\x88u"),
      "few arguments": REBUILD + tuple_(storage("0", 6), 0) + b"R", "parameter of text":
      b"ctorch._utils\n_rebuild_parameter\n" + tuple_(command, b"\x88", EMPTY) + b"R",
      "no storage": storage("1", 6), "outside": storage("../data/0", 6), "not a reference": command + b"Q",
      "by text": b"Pstorage\n", "unknown kind": storage("0", 6, "Quint8"), "no mark": b"t", "empty stack": b"R",
      "past a mark": b"}(s", "no memory": b"h\x07", "odd items": b"}(" + text("a") + b"u",
      "tuple as key": b"}(" + tuple_(1) + number(1) + b"u", "set on a list": b"](" + text("a") + number(1) + b"u",
      "append to a dict": b"}" + number(1) + b"a", "bytes": b"C\x01a", "pop": b"}0", "unknown": b"\xff",
      "a name of lines": b"}" + text("a\nb") + good + b"s",
      "a name before a mark": b"}" + text("w") + good + b"(s", "number as name": b"}" + number(1) + good + b"s"}
  for name, program in programs.items():
    wrapped = program if name.startswith(("a name", "number as")) else b"}" + text("w") + program + b"s"
    path = archive(tmp_path / "odd.pth", wrapped, {"0": bytes(24)})
    with pytest.raises(WeightsError, match="^odd.pth") as error:
      read_torch(path)
    assert "\n" not in str(error.value) and not marker.exists(), name
    assert not name.startswith(("newobj", "module")) or "is refused: it" in str(error.value), name
  assert read_torch(archive(path, state_dict(w=good), {"0": bytes(24)}))["w"].shape == (6,)


def test_sizes_that_lie_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
  path, whole = tmp_path / "lie.pth", storage("0", 6)
  for entry, words in ((tensor(whole, 0, (7,), (1,)), "shape [7] at 0 does not lie within data/0, which holds 6"),
                       (tensor(whole, 1, (6,), (1,)), "at 1"), (tensor(whole, 0, (2, 3), (4, 1)), "within"),
                       (tensor(whole, -1, (2,), (1,)), "within"), (tensor(whole, 5, (6,), (-1,)), "within"),
                       (tensor(whole, 0, (-2, -3), (3, 1)), "within"), (tensor(whole, 0, (1 << 40,), (0,)), "within"),
                       (tensor(whole, 0, (1 << 62, 0), (1, 1)), "within"),
                       (tensor(whole, 1 << 70, (1,), (1,)), "within"),
                       (tensor(whole, 0, (2, 3), (3,)), "within"), (tensor(whole, 0, (1,) * 40, (1,) * 40), "within"),
                       (tensor(whole, 0, (b"\x88",), (1,)), "within"),
                       (tensor(storage("0", 7), 0, (6,), (1,)), "holds 24 bytes and should hold 7 numbers of 4"),
                       (tensor(storage("0", 6, "Double"), 0, (6,), (1,)), "6 numbers of 8")):
    refused(one(path, entry), words, "fetch it again")
  good = tensor(whole, 0, (6,), (1,))
  refused(one(path, good, compression=zipfile.ZIP_DEFLATED), "is compressed")
  many = state_dict(**{f"w{i}": good for i in range(40)})
  refused(archive(path, many, {"0": b"\0\0\xc0\x7f" * 6}), "w0 [6] has numbers that are not finite")
  monkeypatch.setattr(files, "MAX_BYTES", 900)
  refused(archive(path, many, {"0": bytes(24)}), "claims 960", "implausible")
  monkeypatch.setattr(torch_files, "MAX_PROGRAM_BYTES", 50)
  refused(one(path, good), "describes its tensors")


def test_archives_that_torch_does_not_write(tmp_path):
  good, path = tensor(storage("0", 6), 0, (6,), (1,)), tmp_path / "odd.pt"
  refused(one(path, good, byteorder=b"big"), "byte order b'big'")
  for name in ("../../x", "archive/../x", "/x", "archive\\x", "other/x", "archive//x"):
    one(path, good)
    with zipfile.ZipFile(path, "a") as file:
      file.writestr(name, b"x")
    refused(path, "one folder", "Convert")
  one(path, good)
  with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
    file.writestr("archive/data.pkl", b"\x80\x02}.")
  refused(path, "each name once")
  zipfile.ZipFile(path, "w").close()
  refused(path, "found nothing")
  whole = one(path, good).read_bytes()
  at = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))  # its entry in the directory, with two sizes
  path.write_bytes(whole[:at + 20] + struct.pack("<II", 1 << 30, 1 << 30) + whole[at + 28:])
  refused(path, "implausible")
  path.write_bytes(pickle.dumps({"w": 1}, 2))
  refused(path, "before torch 1.6", "Convert")


def test_torchscript_archives_hold_what_the_state_dict_does(golden, tmp_path):
  """Written by torch.jit.save: modules within modules, and code, which is deflated and stays unread."""
  found, expected = (read_torch(golden(f"checkpoints/openai_clip/vit_{kind}.pt")) for kind in ("jit", "state_dict"))
  assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)
  again = read_torch(scripted(tmp_path / "again.pt", found))
  assert again.keys() == found.keys() and all(np.array_equal(again[name], found[name]) for name in found)


def test_modules_that_hold_themselves_have_an_end(tmp_path):
  good, path = tensor(storage("0", 6), 0, (6,), (1,)), tmp_path / "odd.pt"
  itself = MODULE + b"q\x00}(" + text("w") + good + text("again") + b"h\x00ub"
  assert list(read_torch(archive(path, itself, {"0": bytes(24)}))) == ["w"]
  deep = MODULE + state_dict(w=good) + b"b"
  for _ in range(70):
    deep = MODULE + state_dict(a=deep) + b"b"
  refused(archive(path, deep, {"0": bytes(24)}), "more than 64 deep")
  refused(archive(path, MODULE + state_dict(**{"a\nb": good}) + b"b", {"0": bytes(24)}), "no tensor")
  refused(archive(path, MODULE, {}), "no state dict")


def test_any_cut_is_refused_and_any_flip_refused_or_harmless(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {f"block.{i}.weight": rng.normal(size=(4, 3)).astype(np.float32) for i in range(3)}
  bad, whole = tmp_path / "bad.pth", save(tmp_path / "good.pth", arrays).read_bytes()
  for length in (0, 1, 30, *rng.integers(31, len(whole), 15), len(whole) - 1):
    bad.write_bytes(whole[:length])
    refused(bad)
  for position in rng.integers(0, len(whole), 300):
    bad.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << int(rng.integers(8))]) + whole[position + 1:])
    try:
      found = read_torch(bad)
    except WeightsError as error:
      assert "\n" not in str(error)
    else:  # a flip in a field of the archive that nobody needs
      assert all(np.array_equal(found[name], array) for name, array in arrays.items()) and len(found) == 3


def test_programs_of_noise_are_refused_in_one_line():
  rng, members = np.random.default_rng(1), {"data/0": 24}
  program = state_dict(w=tensor(storage("0", 6), 0, (2, 3), (3, 1)), v=tensor(storage("0", 6), 0, (6,), (1,)))
  for _ in range(400):
    bytes_ = bytearray(program + b".")
    for position in rng.integers(0, len(bytes_), rng.integers(1, 4)):
      bytes_[position] = int(rng.integers(256))
    try:
      with files.reading(COPIES / "README.md", "torch"):
        torch_files._state_dict(torch_files.Machine("noise", members).run(bytes(bytes_)), "noise")
    except WeightsError as error:
      assert "\n" not in str(error)
