"""Files that are cut, damaged, lying or malicious: each one line of WeightsError, and nothing in them runs."""
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from transferlab import tree
from transferlab.backbones import ARCHITECTURES, abstract_params
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import WeightsError, load_weights, save_weights
from transferlab.backbones.weights import files
from transferlab.backbones.weights.files import read_npz, read_safetensors

COPIES = Path(__file__).parent / "golden" / "weights"
SHARED = Path(__file__).parents[1] / ".." / "shared" / "golden" / "checkpoints"
TINY = ARCHITECTURES["vit_tiny_test"]


def bad_files():
  found = {}
  for root in (SHARED, COPIES):
    for folder in ("malicious", "truncated"):
      found |= {f"{folder}/{p.name}": p for p in sorted((root / folder).glob("*")) if p.suffix != ".json"}
  return found


@pytest.fixture
def marker():
  path = Path("/tmp/pwned")  # what the malicious goldens would create
  assert not path.exists(), f"{path} exists already: an earlier run was taken in, or something else made it"
  yield path
  assert not path.exists(), "a malicious file was executed"


@pytest.fixture
def tiny(tmp_path):
  """A stored backbone of ours and an npz of the same sizes in Google's layout."""
  rng = np.random.default_rng(0)
  shapes = {name: leaf.shape for name, leaf in tree.flatten(abstract_params(TINY)).items()}
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  return save_weights(tree.unflatten(params), tmp_path / "tiny.safetensors", TINY, preprocessing=Preprocessing(16))


def refused(path, *words, **options) -> str:
  with pytest.raises(WeightsError) as error:
    load_weights(path, **options)
  text = str(error.value)
  assert "\n" not in text and len(text) < 600, text
  for word in words:
    assert word in text, text
  return text


@pytest.mark.parametrize("name", bad_files())
def test_malicious_and_truncated_files_are_refused(name, marker):
  path = bad_files()[name]
  refused(path, path.name, *(["Convert"] if path.stem.startswith("evil") and path.suffix != ".npz" else []))


def test_pickles_are_refused_under_any_name(tmp_path, marker):
  class Evil:
    def __reduce__(self):
      return os.system, (f"touch {marker}",)
  for name in ("a.pt", "a.bin", "a.ckpt", "a.npz", "a.safetensors"):
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    refused(tmp_path / name, name)
  (tmp_path / "hub").mkdir()
  (tmp_path / "hub" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
  refused(tmp_path / "hub", "pytorch_model.bin", "pickle")
  with zipfile.ZipFile(tmp_path / "torch.npz", "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
  refused(tmp_path / "torch.npz", "data.pkl", "not an npz")


def npz(path, header: dict, data: bytes = b"\0" * 64, name="embedding/kernel.npy", **options):
  member = io.BytesIO()
  np.lib.format.write_array_header_1_0(member, header)
  with zipfile.ZipFile(path, "w", **options) as archive:
    archive.writestr(name, member.getvalue() + data)
  return path


def test_headers_that_lie_are_caught_before_memory_is_taken(tmp_path, monkeypatch):
  header = {"descr": "<f4", "fortran_order": False, "shape": (4, 4)}
  assert read_npz(npz(tmp_path / "good.npz", header))["embedding/kernel"].shape == (4, 4)
  refused(npz(tmp_path / "a.npz", header | {"shape": (1 << 40, 1 << 40)}), "a.npz", "claims shape")
  refused(npz(tmp_path / "b.npz", header | {"shape": (-4, 4)}), "claims shape")
  refused(npz(tmp_path / "c.npz", header | {"shape": (2, 4)}), "holds 64 bytes", "needs 32")
  refused(npz(tmp_path / "d.npz", header | {"shape": (1 << 62, 0)}), "d.npz")
  refused(npz(tmp_path / "e.npz", header | {"descr": "|O", "shape": (8,)}), "Python objects")
  refused(npz(tmp_path / "f.npz", header, name="embedding/kernel.txt"), "not an npz")
  bomb = npz(tmp_path / "bomb.npz", header | {"shape": (4 << 20,)}, bytes(16 << 20), compression=zipfile.ZIP_DEFLATED)
  monkeypatch.setattr(files, "MAX_BYTES", 8 << 20)
  refused(bomb, "implausible")


def lying_safetensors(path, header: dict, data: bytes = b""):
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)
  return path


def test_safetensors_with_odd_types_and_empty_arrays(tmp_path):
  entry = {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]}
  refused(lying_safetensors(tmp_path / "a.safetensors", {"patch_embed.proj.weight": entry}), "a.safetensors")
  entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
  refused(lying_safetensors(tmp_path / "b.safetensors", {"x": entry}, bytes(4)), "F8_E4M3")
  assert read_safetensors(lying_safetensors(tmp_path / "c.safetensors", {
      "x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)))[0]["x"].dtype == np.int64


def test_numbers_that_are_not_finite_are_refused(tmp_path, tiny):
  arrays = safetensors.numpy.load_file(tiny)
  with safetensors.safe_open(tiny, "np") as file:
    metadata = file.metadata()
  arrays["block_01/fc1/kernel"][3, 2] = np.nan
  safetensors.numpy.save_file(arrays, tmp_path / "nan.safetensors", metadata)
  refused(tmp_path / "nan.safetensors", "block_01/fc1/kernel", "not finite")
  arrays["block_01/fc1/kernel"] = np.zeros((16, 32), np.int8)
  safetensors.numpy.save_file(arrays, tmp_path / "int.safetensors", metadata)
  refused(tmp_path / "int.safetensors", "block_01/fc1/kernel int8")


def test_any_cut_is_refused_and_any_flip_refused_or_harmless(tmp_path, tiny):
  arrays = safetensors.numpy.load_file(tiny)
  original = load_weights(tiny)
  np.savez(tmp_path / "tiny.npz", **{f"x/{n}": a for n, a in arrays.items()})
  rng = np.random.default_rng(1)
  for source, read in ((tiny, lambda p: load_weights(p).params), (tmp_path / "tiny.npz", read_npz)):
    whole = source.read_bytes()
    cuts = (0, 1, 8, 100, *rng.integers(100, len(whole), 10), len(whole) - 1)
    cases = [whole[:n] for n in cuts] + [whole + b"\0" * 8]
    positions = (rng.integers(0, len(whole), 15), rng.integers(0, 2000, 15), len(whole) - rng.integers(1, 1500, 15))
    for position in np.concatenate(positions):
      cases.append(whole[:position] + bytes([whole[position] ^ 1 << int(rng.integers(8))]) + whole[position + 1:])
    for i, case in enumerate(cases):
      bad = tmp_path / f"bad{source.suffix}"
      bad.write_bytes(case)
      try:
        found = tree.flatten(read(bad))
      except WeightsError as error:
        assert "\n" not in str(error)
        continue
      # bytes after the archive, a flip in its unused fields, or (safetensors has no checksum) in a number or free text
      assert i >= len(cuts), f"cut {i} of {source.suffix} was accepted"
      if source.suffix == ".npz":
        names = [n.removeprefix("x/") for n in found]
        assert all(np.array_equal(found[f"x/{n}"], arrays[n]) for n in names if n in arrays)
      else:
        assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in tree.flatten(original.params).items()}


def test_shards(tmp_path, tiny):
  arrays = safetensors.numpy.load_file(COPIES / "timm_vit" / "model.safetensors")
  folder = tmp_path / "sharded"
  folder.mkdir()
  (folder / "config.json").write_bytes((COPIES / "timm_vit" / "config.json").read_bytes())
  one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
  parts = {one: sorted(arrays)[:20], two: sorted(arrays)[20:]}
  for file, members in parts.items():
    safetensors.numpy.save_file({n: arrays[n] for n in members}, folder / file)
  index = folder / "model.safetensors.index.json"
  where = {n: file for file, members in parts.items() for n in members}
  index.write_text(json.dumps({"weight_map": where}))
  assert load_weights(folder, heads=3).hash == load_weights(COPIES / "timm_vit", heads=3).hash
  for changed, word in (({"a": "../../tiny.safetensors"}, "same folder"), ({"a": "3.safetensors"}, "fetch all shards"),
                        (where | {"norm.bias": one}, "two versions"), (where | {"x": one}, "no shard holds"),
                        ({}, "weight_map")):
    index.write_text(json.dumps({"weight_map": changed}))
    refused(folder, word, heads=3)
  index.write_text("{")
  refused(folder, "not JSON")


def test_nothing_half_written_and_no_temporary_left(tmp_path, tiny, monkeypatch):
  weights = load_weights(tiny)
  before = tiny.read_bytes()
  monkeypatch.setattr(safetensors.numpy, "save_file", lambda arrays, path, metadata: (
      Path(path).write_bytes(b"half"), (_ for _ in ()).throw(OSError(28, "No space left on device"))))
  with pytest.raises(WeightsError, match="No space left"):
    save_weights(weights, tiny)
  assert tiny.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["tiny.safetensors"]
  with pytest.raises(WeightsError, match="cannot write"):
    save_weights(weights, tiny / "below" / "a.safetensors")
