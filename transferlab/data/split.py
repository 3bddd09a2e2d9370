"""Automatic splits: stratified, and the same on every machine for one seed."""
from collections.abc import Sequence

import numpy as np

from transferlab.data.tasks import DataError

ALIASES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
           "testing": "test"}


def complete(splits: dict[str, np.ndarray], groups: np.ndarray, group_names: Sequence[str], *, val_fraction: float,
             test_fraction: float, seed: int, strict: bool = True) -> dict[str, np.ndarray]:
  """Adds the splits that a source does not bring, cut from its training rows.

  Training rows alone are cut into train, val and test; with a test split given, val is cut from train; with val given
  there is nothing to cut, and a missing test split stays missing. A fraction of 0 leaves its split out, and
  `test_fraction=1` turns all rows into the test split.

  Args:
    splits: name -> rows int [n], some of train, val, test.
    groups: int [N], what to stratify by: the label, or label and domain.
    group_names: what to call group g in an error.
    strict: a group too small to have a row in every part is an error; otherwise it stays in train whole.
  """
  if "train" not in splits or "val" in splits:
    return splits
  if strict and len(groups) and not 0 <= groups.min() <= groups.max() < len(group_names):
    return splits  # labels outside the range: Task.check names the example
  _check_fractions(val_fraction, test_fraction)
  if "test" not in splits and test_fraction == 1:
    return {"test": splits["train"]}
  fractions = {"val": val_fraction} if "test" in splits else {"val": val_fraction, "test": test_fraction}
  cut = stratified(groups, splits["train"], fractions, group_names, seed, strict)
  merged = {**cut, **{name: rows for name, rows in splits.items() if name != "train"}}
  return {name: merged[name] for name in ("train", "val", "test") if name in merged}


def stratified(groups: np.ndarray, rows: np.ndarray, fractions: dict[str, float], group_names: Sequence[str],
               seed: int, strict: bool = True) -> dict[str, np.ndarray]:
  """Cuts `rows` int [n] into "train" and the named parts: each group in the given proportions, at least one row each.
  """
  parts = {name: f for name, f in fractions.items() if f > 0}
  chosen = {name: [] for name in ("train", *parts)}
  for group in np.unique(groups[rows]).tolist():
    members = rows[groups[rows] == group]
    if len(members) <= len(parts):
      if strict:
        raise DataError(f"class {group_names[group]!r} has {len(members)} image{'s'[:len(members) != 1]}; an automatic "
                        f"split into {', '.join(chosen)} needs at least {len(chosen)} of every class; "
                        "add images, give the splits yourself, or set a fraction to 0")
      chosen["train"].append(members)
      continue
    members = _shuffled(members, seed, group)
    start = 0
    for name, count in _counts(len(members), parts).items():
      chosen[name].append(members[start:start + count])
      start += count
  return {name: np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64) for name, found in chosen.items()}


def _shuffled(members: np.ndarray, seed: int, group: int) -> np.ndarray:
  """A group's rows in random order. A generator per group: another class's new images do not move this class's."""
  # Sorting uniform draws, rather than `permutation`, whose stream numpy may change.
  draws = np.random.Generator(np.random.PCG64([seed, group])).random(len(members))
  return members[np.argsort(draws, kind="stable")]


def folds(labels: np.ndarray, count: int, class_names: Sequence[str], *, seed: int = 0, contiguous: bool = False
          ) -> np.ndarray:
  """The fold, 0 … count - 1, of each training row int [N], for cross-validation.

  Args:
    labels: int [N].
    contiguous: consecutive rows make a fold, as in Head2Toe's protocol; otherwise every class is dealt out evenly, in
      an order that the seed draws.

  Raises:
    DataError: fewer than two folds, or more than there are rows or rows of a class; consecutive rows, most of which
      are of classes that the other folds lack, since the rows are sorted by class.
  """
  if not 2 <= count <= len(labels):
    raise DataError(f"folds is {count}; expected 2 to {len(labels)}, the number of training images, or 0 to choose on "
                    "the validation split")
  if contiguous:
    found = np.arange(len(labels)) * count // len(labels)
    for fold in range(count):
      own, others = labels[found == fold], labels[found != fold]
      if (unknown := np.mean(~np.isin(own, others))) > 0.5:
        raise DataError(f"{unknown:.0%} of the {len(own)} images of fold {fold} are of classes that no other fold has, "
                        "since the images are sorted by class; leave contiguous out, every class is then dealt out")
    return found
  found, dealt = np.zeros(len(labels), np.int64), 0
  for group in np.unique(labels).tolist():
    members = _shuffled(np.flatnonzero(labels == group), seed, group)
    if len(members) < count:
      raise DataError(f"class {class_names[group]!r} has {len(members)} training image{'s'[:len(members) != 1]}, fewer "
                      f"than {count} folds; lower folds, or use contiguous ones, which may lack a class")
    found[members] = (dealt + np.arange(len(members))) % count  # going on where the last class ended keeps folds equal
    dealt += len(members)
  return found


def _counts(total: int, parts: dict[str, float]) -> dict[str, int]:
  """Rows per part: the rounded fraction but at least one, the rest and at least one to train."""
  counts = {name: max(1, round(total * f)) for name, f in parts.items()}
  while sum(counts.values()) >= total:
    counts[max(counts, key=counts.get)] -= 1
  return {**counts, "train": total - sum(counts.values())}


def _check_fractions(val: float, test: float) -> None:
  if not (0 <= val < 1 and 0 <= test <= 1 and (val + test < 1 or test == 1)):
    raise DataError(f"val_fraction {val} and test_fraction {test} leave nothing to train on; expected numbers from 0 "
                    "whose sum is below 1 (or test_fraction=1 to test on everything)")
