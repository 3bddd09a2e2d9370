"""The adapter that a run leaves, one small safetensors file.

It holds trainable and state as `trainable/…` and `state/…` arrays, and a JSON header that says how to rebuild the
method, which backbone it belongs to (by hash), the preprocessing, the class names and where it comes from. Reading one
executes nothing; every name, shape and field is checked.
"""
import json
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from transferlab import backbones, config, methods, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import Weights
from transferlab.files import atomic
from transferlab.method import Method, classes

FORMAT = 1
MAX_DEPTH = 256  # of a backbone that a file's header describes


def versions() -> dict:
  """Versions of what computed a result, decoders of its images included."""
  return {name: metadata.version(name) for name in (
      "transferlab", "jax", "flax", "optax", "numpy", "pillow", "tensorflow-datasets")}


class Adapter(NamedTuple):
  """A trained method, without its backbone."""
  method: Method
  trainable: dict
  state: dict
  class_names: tuple
  preprocessing: Preprocessing
  backbone: dict  # name, source, hash, spec
  header: dict    # everything the file says of itself


def save_adapter(path, method: Method, trainable, state, *, weights: Weights, class_names,
                 notes: dict | None = None) -> None:
  """Writes an adapter, whole or not at all.

  Args:
    path: of the file, "….safetensors".
    class_names: names of the classifier's columns.
    notes: more plain data to keep with it: task, split hash, recipe, scores.
  """
  header = {
      "format": FORMAT, "method": method.name, "options": method.options, "class_names": list(class_names),
      "backbone": {"name": weights.name, "source": weights.source, "hash": weights.hash,
                   "spec": weights.spec.to_dict()},
      "preprocessing": weights.preprocessing.to_dict(), "versions": versions(), **(notes or {})}
  write_adapter(path, header, trainable, state)


def write_adapter(path, header: dict, trainable, state) -> None:
  """Writes an adapter under a header as `Adapter.header` has it, whole or not at all."""
  arrays = tree.flatten({"trainable": trainable, "state": state})
  arrays = {name: np.asarray(leaf, order="C") for name, leaf in arrays.items()}
  with atomic(path) as temporary:
    Path(temporary).write_bytes(safetensors.numpy.save(arrays, {"transferlab": json.dumps(header)}))


def load_adapter(path) -> Adapter:
  """Reads an adapter file and rebuilds its method.

  Raises:
    ValueError: not an adapter, cut, made by a later format, or its arrays do not fit its method.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such file; expected the adapter.safetensors that training writes into its workdir")
  try:
    with safetensors.safe_open(path, "np") as file:
      text = (file.metadata() or {}).get("transferlab")
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: dtypes numpy lacks
    raise ValueError(f"{path} is not a readable safetensors file ({error}); it may be cut, copy or train it "
                     "again") from None
  header = _parse_header(path, text)
  try:
    spec = config.fill(backbones.FAMILIES[header["backbone"]["spec"]["family"]][0], header["backbone"]["spec"], "spec")
    preprocessing = Preprocessing.from_dict(header["preprocessing"])
    method, (trainable, state) = _last_stage(methods.build(header["method"], spec, **header["options"]), spec,
                                             header["class_names"])
  except (TypeError, ValueError, ArithmeticError, KeyError) as error:
    raise ValueError(f"{path} describes a method that cannot be built: {error}; the file is damaged or of another "
                     "version, train again") from None
  if problem := _problem(arrays, tree.flatten({"trainable": trainable, "state": state})):
    raise ValueError(f"{path} does not fit method {method.name!r} on {spec.name}: {problem}; the file is damaged or "
                     "not written by this library, train again")
  found = tree.unflatten(arrays)
  return Adapter(method, found.get("trainable", {}), found.get("state", {}), tuple(header["class_names"]),
                 preprocessing, header["backbone"], header)


def _last_stage(method: Method, spec, class_names: list[str]):
  """(method, shapes of its trainable and state) of a method's last stage, which is the one that is saved."""
  while True:
    init = lambda rng, frozen, stage=method: stage.init(rng, frozen, classes(stage, len(class_names)))
    shapes = jax.eval_shape(init, jax.random.key(0), backbones.abstract_params(spec))
    if method.then is None:
      return method, shapes
    # A stage's init may take values from the stage before: zeros of the right shapes stand in for them.
    method = method.then(*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def _problem(arrays: dict, expected: dict) -> str:
  """What is wrong with the arrays of a file, "" if nothing is."""
  wrong = [f"{name} is {array.dtype} instead of {expected[name].dtype}" for name, array in arrays.items()
           if name in expected and array.dtype != expected[name].dtype]
  bad = [f"{name} has numbers that are not finite" for name, array in arrays.items()
         if array.dtype.kind == "f" and not np.isfinite(array).all()]
  return tree.difference(arrays, expected) or next(iter(wrong + bad), "")


def _parse_header(path, text) -> dict:
  fields = {"format": int, "method": str, "options": dict, "class_names": list, "backbone": dict, "preprocessing": dict}
  try:
    header = json.loads(text) if text else {}
  except (ValueError, RecursionError):
    header = {}
  if not isinstance(header, dict) or "method" not in header:
    raise ValueError(f"{path} is not a transferlab adapter (it has no adapter header); expected the "
                     "adapter.safetensors that training writes. Backbone weights go to --backbone")
  bad = [name for name, kind in fields.items() if not isinstance(header.get(name), kind)]
  if not bad:
    strings = ("name", "hash", "source")
    bad = [f"backbone {name}" for name in strings if not isinstance(header["backbone"].get(name), str)]
    names = header["class_names"]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
      bad.append("class_names")
  if bad or header["format"] > FORMAT:
    what = f"format {header['format']}, newer than {FORMAT}" if not bad else f"no valid {', '.join(bad)} in its header"
    raise ValueError(f"{path} has {what}; install the version of transferlab that wrote it")
  spec = header["backbone"].get("spec")
  if not isinstance(spec, dict) or spec.get("family") not in list(backbones.FAMILIES):
    raise ValueError(f"{path} belongs to an unknown family of backbones; known: {', '.join(backbones.FAMILIES)}")
  blocks = spec["stages"] if isinstance(spec.get("stages"), list) and spec["stages"] else [spec.get("depth")]
  blocks = [*blocks, *([spec.get("text_depth")] if spec["family"] == "clip" else [])]
  if not all(isinstance(n, int) and n >= 1 for n in blocks) or sum(blocks) > MAX_DEPTH:
    raise ValueError(f"{path} says its backbone has {' + '.join(map(repr, blocks))} blocks; expected 1 to {MAX_DEPTH}")
  if header["preprocessing"].get("image_size") != spec.get("image_size"):
    raise ValueError(f"{path} prepares images of {header['preprocessing'].get('image_size')!r} px for a backbone of "
                     f"{spec.get('image_size')!r} px; the file is damaged, train again")
  if header["method"] not in methods.METHODS:
    raise ValueError(f"{path}: method {header['method']!r} is unknown; nearest: "
                     f"{tree.nearest(header['method'], methods.METHODS)[0]}; register one of your own with "
                     "transferlab.methods.METHODS[name] = function before loading")
  return header


def check_backbone(adapter: Adapter, weights: Weights) -> None:
  """Refuses an adapter on weights it was not trained on. Their names may differ: the same file may lie elsewhere."""
  name, known, spec = adapter.backbone["name"], adapter.backbone["spec"], weights.spec.to_dict()
  known = config.fill(backbones.FAMILIES[known["family"]][0], known, "spec").to_dict()  # fields newer than the adapter
  different = [key for key in spec if key != "name" and known.get(key) != spec[key]]
  if different:
    differs = [f"{key} {known.get(key)} and {spec[key]}" for key in different]
    raise ValueError(f"the adapter was trained on {name} and these weights are {weights.name}: they differ in "
                     f"{', '.join(differs)}; give the weights it was trained on with --backbone")
  if adapter.backbone["hash"] != weights.hash:
    raise ValueError(f"the adapter was trained on {name} with hash {adapter.backbone['hash'][:12]} and these weights "
                     f"({weights.name}) have {weights.hash[:12]}; give the same file with --backbone")
