"""Parameters by name: a leaf of a pytree is addressed as "block_03/qkv/kernel", groups of leaves by ordered patterns.

Patterns are regular expressions that must match a whole name. The first that matches wins; a pattern that matches
nothing is an error naming the nearest leaves, so a misspelt target can never silently train, decay or freeze nothing.
"""
import difflib
import re
from typing import Any
from collections.abc import Iterable, Sequence


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"a/b": leaf} of nested dicts; anything that is not a dict is a leaf, empty dicts vanish."""
  if not isinstance(tree, dict):
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat.update(flatten(value, f"{prefix}/{key}" if prefix else str(key)))
  return flat


def unflatten(flat: dict[str, Any]) -> dict:
  """Inverse of `flatten`."""
  tree: dict = {}
  for name, leaf in flat.items():
    *path, last = name.split("/")
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
  """The names most like `name`, best first; never empty while there are names."""
  names = [str(n) for n in names]
  return difflib.get_close_matches(name, names, count, cutoff=0.3) or names[:count]


def match(patterns: Sequence[tuple[str, Any]], tree: Any, default: Any = None) -> dict:
  """A tree of the same structure whose leaves are the value of the first pattern that matches the leaf's name.

  Args:
    patterns: ordered (regular expression, value) pairs.
    tree: nested dicts.
    default: value for leaves that no pattern matches.

  Raises:
    ValueError: a pattern matches no leaf.
  """
  names = list(flatten(tree))
  for pattern, _ in patterns:
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(f"pattern {pattern!r} is not a regular expression ({error}); expected e.g. '.*/bias'") from None
    if not any(re.fullmatch(pattern, name) for name in names):
      raise ValueError(f"pattern {pattern!r} matches none of {len(names)} parameters; nearest: "
                       f"{', '.join(nearest(pattern, names))}")
  first = lambda name: next((value for pattern, value in patterns if re.fullmatch(pattern, name)), default)
  return unflatten({name: first(name) for name in names})


def difference(found: dict[str, Any], expected: dict[str, Any], limit: int = 5) -> str:
  """What separates two flat trees of arrays or shapes: missing, unexpected and mis-shaped names, '' if nothing does."""
  shape = lambda leaf: tuple(getattr(leaf, "shape", leaf))
  listing = lambda names: ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
  missing = [n for n in expected if n not in found]
  unexpected = [n for n in found if n not in expected]
  misshaped = [f"{n} {list(shape(found[n]))} instead of {list(shape(expected[n]))}"
               for n in expected if n in found and shape(found[n]) != shape(expected[n])]
  parts = [f"{word}: {listing(names)}" for word, names in
           (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)) if names]
  return "; ".join(parts)


def merge(base: dict, changes: dict) -> dict:
  """`base` with the leaves of `changes` in place of its own; a leaf that `base` lacks is an error."""
  flat = flatten(base)
  for name, leaf in flatten(changes).items():
    if name not in flat:
      raise ValueError(f"{name!r} is not among the parameters; nearest: {', '.join(nearest(name, flat))}")
    flat[name] = leaf
  return unflatten(flat)
