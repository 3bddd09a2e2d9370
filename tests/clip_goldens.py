"""The CLIPs and the inputs of the golden files in golden/lfa_and_clip, as tests of our CLIP take them.

    spec, params = golden_clip(golden, "T")                  # `golden` is conftest's fixture; "T" or "W"
    values = golden_values(golden, "T_zeroshot")             # {name: array}, images [B, S, S, 3], ids [P, 77] int32
    with jax.default_matmul_precision("highest"):
      out, _ = backbones.build(spec).apply(params, Towers(values["images"], values["token_ids"]))

`params` are numpy arrays named as in `backbones/clip.py`, not to be written to: they are read once per session. Token
ids are called "tokenized_prompts" in some files. Texts of the goldens end before the 20th token, so ids[:, :20] gives
the same numbers and costs a quarter. "T" has widths 32 and 32, joint width 16, 2 heads in each tower; "W" 48 and 32,
32, 3 and 2; both 4 blocks, 32 px, patch 8. Only 29 rows of the token table were kept, the rest are zeros here:
`golden_values` refuses other ids. Matrices of the methods keep the original's layout: torch's Linear has (out, in),
CLIP's projections (in, out).
"""
import functools
import json

import numpy as np

from transferlab.backbones.clip_spec import CLIPSpec
from transferlab.backbones.weights import clip_names, names
from transferlab.tree import unflatten

FOLDER = "lfa_and_clip"


def golden_clip(golden, which: str = "T") -> tuple[CLIPSpec, dict]:
  """(spec, parameters) of the golden CLIP "T" or "W"."""
  return _clip(golden(f"{FOLDER}/{which}_clip_weights.npz"))


def golden_values(golden, name: str) -> dict[str, np.ndarray]:
  """The arrays of a golden file such as "T_zeroshot", images NHWC and token ids int32; a fresh dict each time."""
  path = golden(f"{FOLDER}/{name}.npz")
  known = set(_read(golden(f"{FOLDER}/{name[0]}_clip_weights.npz"))["token_embedding.ids"].tolist())
  values = dict(_read(path))
  for key, value in values.items():
    if key.startswith("images") and value.ndim == 4:
      values[key] = value.transpose(0, 2, 3, 1)
    elif key.endswith(("token_ids", "tokenized_prompts")):
      assert set(value.ravel().tolist()) <= known, f"{name}: {key} has ids whose embeddings are not in the golden"
      values[key] = value.astype(np.int32)
  return values


@functools.cache
def _read(path) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    return {name: file[name] for name in file.files}


@functools.cache
def _clip(path) -> tuple[CLIPSpec, dict]:
  arrays = dict(_read(path))
  c = json.loads(str(arrays["config_json"]))
  spec = CLIPSpec(f"golden_{path.name[0]}", c["image"], c["patch"], c["vw"], c["vl"], c["vh"], 4 * c["vw"],
                  c["tw"], c["tl"], c["th"], 4 * c["tw"], c["embed"], c["vocab"], c["ctx"])
  table = np.zeros((c["vocab"], c["tw"]), np.float32)
  table[arrays["token_embedding.ids"]] = arrays["token_embedding.rows"]
  arrays["token_embedding.weight"] = table
  return spec, unflatten(names.to_native(names.expand(clip_names.table("openai", spec), 0), arrays))
