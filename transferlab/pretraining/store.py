"""The stored weights: safetensors, leaves by name, float16, with the spec and preprocessing in the header."""
import json
import os
import pathlib

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from transferlab import tree
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.spec import ViTSpec

BUNDLED = pathlib.Path(__file__).parent.parent / "backbones" / "bundled" / "vit_formula64.safetensors"


def write(path, params, spec, preprocessing, source: str, dtype=np.float16):
  """Writes a file beside `path` and renames it, so that no half-written file ever bears the name."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  header = {"spec": spec.to_dict(), "preprocessing": preprocessing.to_dict(), "source": source}
  leaves = {name: np.asarray(leaf, dtype) for name, leaf in tree.flatten(params).items()}
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(save(leaves, {"transferlab": json.dumps(header)}))
  os.replace(partial, path)


def read(path):
  """Returns (params as nested dicts of float32, spec, preprocessing, source)."""
  with safe_open(path, "np") as file:
    header = json.loads(file.metadata()["transferlab"])
    leaves = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
  spec, preprocessing = ViTSpec(**header["spec"]), Preprocessing.from_dict(header["preprocessing"])
  return tree.unflatten(leaves), spec, preprocessing, header["source"]
