"""Backbones that do not fit one device: parameters split over the mesh axis `shard`, whose devices share one copy.

Ordered patterns, regular expressions on names such as "block_03/qkv/kernel", say which dimension of a parameter is
split, or None for one that is whole on every device. The first that matches a name counts, and every parameter has to
be covered. Batches are split over the same devices, so that each computes its own rows with all of the backbone, which
`backbones.gathering` brings together layer by layer (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3).
"""
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transferlab import devices, tree

# Of all families. A kernel's last dimension but one is what it takes in, [in, out] or [h, w, in, out]: what the devices
# have is then in one piece, and gathered without being rearranged. What stays whole is 0.4 % of ViT-B, less of others.
PATTERNS: tuple[tuple[str, int | None], ...] = (
    (r"(image/)?patch_kernel|stem/kernel", None),  # pixels: 3 channels, p * p of them
    (r".*/kernel", -2),
    (r"text/tokens", -1),
    (r".*(scale|bias|mean|var|cls|pos)", None),
)


def plan(params: dict, mesh: Mesh, patterns=()) -> dict[str, NamedSharding]:
  """{name: how it lies on the devices} of the parameters that are split; {} on a mesh whose devices share none.

  Args:
    params: a backbone's parameters, or their shapes.
    patterns: (regular expression, dimension or None) that come before `PATTERNS`.

  Raises:
    ValueError: a pattern that is none or matches nothing, a parameter that none covers, a dimension that there is not
      or that the devices do not divide.
  """
  size, found = mesh.shape["shard"], {}
  _check(patterns, params)
  for name, leaf in tree.flatten(params).items() if size > 1 else ():
    known = [dim for pattern, dim in (*patterns, *PATTERNS) if re.fullmatch(pattern, name)]
    if not known:
      raise ValueError(f"no pattern covers {name} {list(leaf.shape)}; add one to shard_patterns, ({name!r}, None) to "
                       "keep it whole, or a dimension to split in the place of None")
    if known[0] is None:
      continue
    if not -leaf.ndim <= known[0] < leaf.ndim:
      raise ValueError(f"dimension {known[0]} of {name} {list(leaf.shape)} is to be split and there is none; expected "
                       f"{-leaf.ndim} to {leaf.ndim - 1}, or None to keep it whole")
    dim = known[0] % leaf.ndim
    if leaf.shape[dim] % size:
      fit = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and leaf.shape[dim] % n == 0]
      raise ValueError(f"shard={size} does not divide dimension {dim} of {name} {list(leaf.shape)}, which is "
                       f"{leaf.shape[dim]}; use shard={' or '.join(map(str, fit))}, or keep it whole with the pattern "
                       f"({name!r}, None) in shard_patterns")
    found[name] = NamedSharding(mesh, PartitionSpec(*("shard" if d == dim else None for d in range(leaf.ndim))))
  return found


def _check(patterns, params: dict) -> None:
  for pattern in patterns:
    pair = isinstance(pattern, (tuple, list)) and len(pattern) == 2
    if not pair or not isinstance(pattern[0], str) or not (pattern[1] is None or type(pattern[1]) is int):
      raise ValueError(f"shard_patterns has {pattern!r}; expected a regular expression and a dimension or None, such "
                       "as ('.*/fc1/kernel', 1)")
  tree.match(patterns, params)  # raises for what matches nothing


def place(frozen: dict, params: dict, dtype, mesh: Mesh, split: dict[str, NamedSharding]) -> dict:
  """Frozen parameters on the devices in the type that the backbone computes in, see `devices.cast`, leaf by leaf: no
  device and no second copy on the host ever holds them all.

  Args:
    frozen: as `Method.prepare` gives them; the same in all processes.
    params: the backbone's own.
    split: from `plan`.
  """
  def put(path, leaf, place):
    return devices.put(devices.cast({path[0].key: leaf}, params, dtype)[path[0].key], place)
  return jax.tree_util.tree_map_with_path(put, frozen, of_frozen(frozen, mesh, split))


def of_frozen(frozen: dict, mesh: Mesh, split: dict[str, NamedSharding]) -> dict:
  """Where frozen parameters belong, a tree of shardings; what a method has made of some under other names is whole."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: split.get(_name(path)) or devices.replicated(mesh), frozen)


def of_run(run, mesh: Mesh, split: dict[str, NamedSharding]):
  """Where the leaves of a run belong, a tree of shardings: a backbone that trains, {"backbone": …} in a trainable, and
  what the optimiser keeps of it, are split like a frozen one, and all else is whole."""
  def one(path, leaf):
    own = split.get(f"/{_name(path)}".rpartition("/backbone/")[2])
    return own if own and len(own.spec) == len(leaf.shape) else devices.replicated(mesh)
  return jax.tree_util.tree_map_with_path(one, run)


def _name(path) -> str:
  return "/".join(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
