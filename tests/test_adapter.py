"""Adapter files: they say what they are, load only where they belong, and become plain weights where possible."""
import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from engine import files

from transferlab import checkpoint, methods, serve, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import load_weights, save_weights, weights_hash
from transferlab.checkpoint import check_backbone, load_adapter, save_adapter
from transferlab.method import Method
from transferlab.methods import classifier

NAMES = ("plain", "with space", "comma,\"quote\"", "naïve ß", "猫", "🦋", "line\nbreak", "lone \udcff")
OPTIONS = {"linear": {}, "full": {}, "bitfit": {}, "lora": {"rank": 2, "dropout": 0.0}, "dtl": {"first_write": 3}}


@pytest.fixture
def weights(tiny_weights):
  """With a preprocessing that is not the default one."""
  return tiny_weights._replace(preprocessing=Preprocessing(16, "bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))


def trained(method: Method, weights, num_classes: int = len(NAMES)):
  """A trainable as training may leave it: full fine-tuning starts from the weights, everything else is drawn."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda key, p: method.init(key, p, num_classes), jax.random.key(0), weights.params)
  trainable, state = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
  if "backbone" in trainable:
    trainable["backbone"] = jax.tree.map(np.add, trainable["backbone"], weights.params)
  return trainable, state


@pytest.fixture
def saved(tmp_path, weights):
  """A function that saves an adapter of a method and returns (path, method, trainable)."""
  def save(name="lora", options=None):
    method = methods.build(name, weights.spec, **(OPTIONS[name] if options is None else options))
    trainable, state = trained(method, weights)
    path = tmp_path / f"{name}.safetensors"
    save_adapter(path, method, trainable, state, weights=weights, class_names=NAMES, notes={"task": "t", "val": None})
    return path, method, trainable
  return save


def rewrite(path, change=lambda header: header, arrays=lambda arrays: arrays):
  """Changes the header of an adapter, or its arrays."""
  with safetensors.safe_open(path, "np") as file:
    header = json.loads(file.metadata()["transferlab"])
    found = {name: file.get_tensor(name) for name in file.keys()}
  header = change(header) or header
  path.write_bytes(safetensors.numpy.save(arrays(found) or found, {"transferlab": json.dumps(header)}))
  return path


# What is in it

def test_the_header_says_what_it_is(saved, weights):
  path, method, _ = saved("dtl")
  with safetensors.safe_open(path, "np") as file:
    header = json.loads(file.metadata()["transferlab"])
  assert header["format"] == checkpoint.FORMAT and header["method"] == "dtl" and header["task"] == "t"
  assert header["options"] == {"rank": 2, "first_read": 0, "first_write": 3, "beta": 100.0, "activation": "swish",
                               "readout": "mean"} == method.options
  spec = weights.spec.to_dict()
  assert header["backbone"] == {"name": weights.name, "source": "random", "hash": weights.hash, "spec": spec}
  assert Preprocessing.from_dict(header["preprocessing"]) == weights.preprocessing
  assert tuple(header["class_names"]) == NAMES and "jax" in header["versions"]


@pytest.mark.parametrize("name, options", [(name, options) for name, options in OPTIONS.items()] + [
    ("dtl", {"first_write": None, "beta": 10}), ("lora", {"compat": None}),
    ("lora", {"form": "fused", "compat": "noah"}),
    ("linear", {"site": "block_01/out", "tokens": "mean"})])
def test_what_is_saved_is_what_is_loaded(saved, weights, name, options):
  path, method, trainable = saved(name, options)
  found = load_adapter(path)
  assert found.method.name == name and found.method.options == method.options and not found.method.then
  assert found.class_names == NAMES and found.preprocessing == weights.preprocessing
  flat, kept = tree.flatten(found.trainable), tree.flatten(trainable)
  assert flat.keys() == kept.keys() and all(np.array_equal(flat[n], kept[n]) for n in kept)


def test_full_in_two_stages_loads_the_second(saved, weights, tmp_path):
  """The first stage's arrays, under the name of the whole, do not pass for a result."""
  with pytest.raises(ValueError, match="missing: trainable/backbone"):
    load_adapter(saved("full", {"probe_first": True})[0])
  second = methods.build("full", weights.spec, probe_first=True).then({"classifier": None}, {})
  trainable, state = trained(second, weights)
  save_adapter(tmp_path / "two.safetensors", second, trainable, state, weights=weights, class_names=NAMES)
  found = load_adapter(tmp_path / "two.safetensors")
  assert found.method.options == {"probe_first": True} and not found.method.then


def test_options_may_be_tuples(weights, tmp_path, monkeypatch):
  def several(spec, *, blocks: tuple = (0, 1), pairs: tuple = (), limit: int | None = None) -> Method:
    assert isinstance(blocks, tuple) and all(isinstance(pair, tuple) for pair in pairs)
    options = {"blocks": blocks, "pairs": pairs, "limit": limit}
    init = lambda rng, frozen, num_classes: ({"classifier": classifier.init(rng, spec.width, num_classes)}, {})
    return Method("several", options, init, classifier.readout, spec.depth)
  monkeypatch.setitem(methods.METHODS, "several", several)
  method = methods.build("several", weights.spec, blocks=[1, 2], pairs=[["a", 1]])
  trainable, state = trained(method, weights, 2)
  save_adapter(tmp_path / "a.safetensors", method, trainable, state, weights=weights, class_names=["x", "y"])
  found = load_adapter(tmp_path / "a.safetensors").method.options
  assert found == {"blocks": (1, 2), "pairs": (("a", 1),), "limit": None}


def test_an_adapter_is_written_whole_or_not_at_all(saved, weights, tmp_path, monkeypatch):
  path, method, trainable = saved()
  before = path.read_bytes()
  monkeypatch.setattr(safetensors.numpy, "save", lambda *args: (_ for _ in ()).throw(MemoryError))
  with pytest.raises(MemoryError):
    save_adapter(path, method, trainable, {}, weights=weights, class_names=NAMES)
  assert path.read_bytes() == before and files(tmp_path) == {"lora.safetensors"}
  with pytest.raises(ValueError, match="cannot write .*no/a.safetensors .No such file"):
    save_adapter(tmp_path / "no" / "a.safetensors", method, trainable, {}, weights=weights, class_names=NAMES)


# Files that are refused

def refused(path, match):
  with pytest.raises(ValueError, match=match) as error:
    load_adapter(path)
  assert "\n" not in str(error.value).strip() and str(path) in str(error.value)


def test_no_file_and_other_files(tmp_path, weights):
  refused(tmp_path / "none.safetensors", "no such file; expected the adapter.safetensors")
  refused(tmp_path, "no such file")
  (tmp_path / "text.safetensors").write_text("just text")
  refused(tmp_path / "text.safetensors", "not a readable safetensors file")
  refused(save_weights(weights, tmp_path / "w.safetensors"), "not a transferlab adapter .*--backbone")


def test_a_file_cut_anywhere_is_refused(saved, tmp_path):
  path, _, _ = saved()
  content = path.read_bytes()
  for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
    (tmp_path / "cut.safetensors").write_bytes(content[:size])
    refused(tmp_path / "cut.safetensors", "not a readable safetensors file|not a transferlab adapter")


def test_flipped_bits_in_the_header_never_pass_for_another_adapter(saved):
  """Each flip is refused, or leaves an adapter that still fits its own description."""
  path, _, _ = saved("linear")
  content = bytearray(path.read_bytes())
  size = struct.unpack("<Q", content[:8])[0]
  for position in np.random.default_rng(0).integers(0, 8 + size, 25).tolist():
    flipped = content.copy()
    flipped[position] ^= 1 << (position % 8)
    path.write_bytes(flipped)
    try:
      found = load_adapter(path)
    except ValueError as error:
      assert str(path) in str(error)
    else:
      assert found.trainable["classifier"]["kernel"].shape == (found.backbone["spec"]["width"], len(found.class_names))


def drop(key, *inside):
  def change(header):
    node = header
    for name in inside:
      node = node[name]
    del node[key]
  return change


def put(value, *path):
  def change(header):
    node = header
    for name in path[:-1]:
      node = node[name]
    node[path[-1]] = value
  return change


@pytest.mark.parametrize("change, match", [
    (put(2, "format"), "format 2, newer than 1; install"), (put("1", "format"), "no valid format"),
    (drop("format"), "no valid format"), (put("lorra", "method"), "method 'lorra' is unknown; nearest: lora"),
    (drop("options"), "no valid options"), (put(4, "options", "rank"), "mis-shaped: trainable/lora"),
    (put("two", "options", "rank"), "option 'rank' .* is 'two'; expected int"),
    (put(1, "options", "rankk"), "no option 'rankk'; nearest: rank"),
    (put("transducer", "backbone", "spec", "family"), "unknown family"), (drop("spec", "backbone"), "unknown family"),
    (put("16", "backbone", "spec", "width"), "spec.width is '16'"),
    (put(0, "backbone", "spec", "heads"), "cannot be built"),
    (put(0, "backbone", "spec", "patch_size"), "cannot be built"),
    (drop("depth", "backbone", "spec"), "None blocks; expected 1 to"),
    (put(1, "backbone", "spec", "colour"), "no key 'colour'"),
    (put(32, "backbone", "spec", "width"), "mis-shaped"), (drop("hash", "backbone"), "no valid backbone hash"),
    (put("cubic", "preprocessing", "interpolation"), "'cubic' is unknown"),
    (put("abc", "preprocessing", "mean"), "cannot be built"), (put(1, "preprocessing", "blur"), "cannot be built"),
    (drop("image_size", "preprocessing"), "prepares images of None px"),
    (put([], "class_names"), "no valid class_names"),
    (put(["a", 1], "class_names"), "no valid class_names"), (put(["a", "a"], "class_names"), "no valid class_names"),
    (put(["a", "b"], "class_names"), "mis-shaped: trainable/classifier"), (lambda header: [1], "no adapter header")])
def test_headers_that_do_not_fit(saved, change, match):
  refused(rewrite(saved()[0], change), match)


def without(name):
  return lambda arrays: {k: v for k, v in arrays.items() if k != name}


@pytest.mark.parametrize("change, match", [
    (without("trainable/classifier/kernel"), "missing: trainable/classifier/kernel"),
    (without("trainable/lora/block_00/q/a"), "missing: trainable/lora/block_00/q/a"),
    (lambda a: {**a, "trainable/extra": np.zeros(3, np.float32)}, "unexpected: trainable/extra"),
    (lambda a: {**a, "trainable": np.zeros(3, np.float32)}, "unexpected: trainable;"),
    (lambda a: {**a, "trainable/classifier/bias": np.zeros(3, np.float32)}, r"bias \[3\] instead of \[8\]"),
    (lambda a: {**a, "trainable/classifier/bias": np.zeros(8, np.int32)}, "bias is int32 instead of float32"),
    (lambda a: {**a, "trainable/classifier/bias": np.full(8, np.nan, np.float32)}, "bias has numbers .* not finite"),
    (lambda a: {"x": np.zeros(1)}, "missing: .*unexpected: x")])
def test_arrays_that_do_not_fit(saved, change, match):
  refused(rewrite(saved()[0], arrays=change), match)


def test_reading_executes_nothing(saved, tmp_path):
  """Names of a header reach dicts and shapes, never an import, an eval or a path."""
  trap = tmp_path / "trap"
  code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
  for change in (put(code, "method"), put(code, "options", "form"), put({"__class__": code}, "options", "rank"),
                 put(code, "backbone", "spec", "family"), put(code, "preprocessing", "mean"),
                 put([code] * 8, "class_names")):
    with pytest.raises(ValueError):
      load_adapter(rewrite(saved()[0], change))
  assert not trap.exists()


# Where it belongs

def test_other_weights_and_another_backbone(saved, weights, random_weights):
  adapter = load_adapter(saved()[0])
  check_backbone(adapter, weights)
  check_backbone(adapter, weights._replace(name="copy", spec=dataclasses.replace(weights.spec, name="copy")))
  other = random_weights(weights.spec, seed=1)
  says = f"hash {weights.hash[:12]} and these weights .* have {other.hash[:12]}.*--backbone"
  with pytest.raises(ValueError, match=says):
    check_backbone(adapter, other)
  deeper = random_weights(dataclasses.replace(weights.spec, depth=4))
  with pytest.raises(ValueError, match="they differ in depth 3 and 4; give the weights it was trained on"):
    check_backbone(adapter, deeper)
  with pytest.raises(ValueError, match="gelu erf and tanh"):
    check_backbone(adapter, weights._replace(spec=dataclasses.replace(weights.spec, gelu="tanh")))
  with pytest.raises(ValueError, match="image_size 16 and 32"):
    check_backbone(adapter, weights._replace(spec=weights.spec.at_resolution(32)))


def test_serving_finds_or_asks_for_the_backbone(saved, weights, tmp_path):
  path, _, _ = saved("linear")
  with pytest.raises(ValueError, match="not in the zoo; give those weights with --backbone"):
    serve.load(path)
  with pytest.raises(ValueError, match="its own class names"):
    serve.load(path, weights, class_names=["a"])
  with pytest.raises(ValueError, match="neither an adapter nor weights"):
    serve.load()
  with pytest.raises(ValueError, match="carries no classifier"):
    serve.load(None, weights)
  headed = weights._replace(head={"kernel": np.zeros((16, 3), np.float32), "bias": np.zeros(3, np.float32)})
  with pytest.raises(ValueError, match="2 class names for a head of 3"):
    serve.load(None, headed, class_names=["a", "b"])
  file = save_weights(weights._replace(preprocessing=Preprocessing(16)), tmp_path / "w.safetensors")
  found = serve.load(path, file)  # the file's preprocessing is another one: the adapter's counts
  assert found.preprocessing == weights.preprocessing and found.class_names == NAMES


def test_probabilities_of_images_of_any_number_and_size(saved, weights):
  classify = serve.load(saved("linear")[0], weights)
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (8 + i, 20, 3), np.uint8) for i in range(5)]
  whole = classify(images, batch_size=8)
  assert whole.shape == (5, 8) and np.allclose(whole.sum(1), 1, atol=1e-6) and classify([]).shape == (0, 8)
  np.testing.assert_allclose(classify(images, batch_size=2), whole, atol=1e-6)


# Merging

@pytest.mark.parametrize("name", ["linear", "lora", "bitfit", "full"])
def test_merged_weights_are_the_adapted_model(saved, weights, tmp_path, name):
  loaded = weights._replace(preprocessing=Preprocessing(16))  # the adapter's own counts, and goes with the merged file
  adapted = serve.load(saved(name)[0], loaded)
  difference = serve.merge(adapted, tmp_path / "merged.safetensors")
  again = load_weights(tmp_path / "merged.safetensors")
  assert again.preprocessing == weights.preprocessing
  assert (again.hash == weights.hash) == (name == "linear")
  images = np.random.default_rng(2).integers(0, 256, (4, 16, 16, 3), np.uint8)
  logits = np.asarray(adapted.logits(images))
  np.testing.assert_allclose(serve.load(None, again).logits(images), logits, atol=1e-5)
  assert difference <= 1e-5 < np.abs(logits).max()
  assert weights_hash(weights.params, weights.spec) == weights.hash


def test_a_merge_beyond_the_tolerance_writes_nothing(saved, weights, tmp_path, monkeypatch):
  adapted = serve.load(saved("linear")[0], weights)
  before = files(tmp_path)
  wrong = adapted._replace(logits=lambda images: adapted.logits(images) + 0.5)
  with pytest.raises(ValueError, match="differ by 5.00e-01, more than the tolerance 0.1; nothing was written"):
    serve.merge(wrong, tmp_path / "m.safetensors", tolerance=0.1)
  with pytest.raises(ValueError, match="differ by nan"):
    serve.merge(adapted._replace(logits=lambda images: adapted.logits(images) * np.nan), tmp_path / "m.safetensors")
  assert files(tmp_path) == before


@pytest.mark.parametrize("name, options", [("dtl", {}), ("linear", {"site": "block_01/out"})])
def test_what_cannot_be_merged_says_what_can(saved, weights, tmp_path, name, options):
  with pytest.raises(ValueError, match="no equal plain weights; .* Methods that merge: linear, full, bitfit, lora"):
    serve.merge(serve.load(saved(name, options)[0], weights), tmp_path / "merged.safetensors")
  assert not (tmp_path / "merged.safetensors").exists()
