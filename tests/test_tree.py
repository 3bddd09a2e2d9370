"""Names of leaves, ordered patterns, differences; and configurations filled strictly."""
import dataclasses

import numpy as np
import pytest

from transferlab import config, tree
from transferlab.optim import Optim
from transferlab.train import Recipe

TREE = {"block_00": {"qkv": {"kernel": np.zeros((2, 6)), "bias": np.zeros(6)}}, "norm": {"scale": np.zeros(2)},
        "cls": np.zeros(2)}
NAMES = ["block_00/qkv/kernel", "block_00/qkv/bias", "norm/scale", "cls"]


def test_flatten_and_back():
  flat = tree.flatten(TREE)
  assert list(flat) == NAMES and flat["cls"] is TREE["cls"]
  again = tree.unflatten(flat)
  assert list(tree.flatten(again)) == NAMES and again["block_00"]["qkv"]["bias"] is TREE["block_00"]["qkv"]["bias"]
  assert tree.flatten({"a": {}, "b": 1}) == {"b": 1} and tree.unflatten({}) == {}


def test_the_first_pattern_wins_and_the_rest_has_the_default():
  found = tree.match(((".*/bias", 1), ("block_00/.*", 2)), TREE, 0)
  assert tree.flatten(found) == {"block_00/qkv/kernel": 2, "block_00/qkv/bias": 1, "norm/scale": 0, "cls": 0}
  assert tree.flatten(tree.match((), TREE, 7)) == dict.fromkeys(NAMES, 7)


@pytest.mark.parametrize("pattern, nearest", [
    ("blok_00/qkv/bias", "block_00/qkv/bias"), ("scale", "norm/scale"), ("cl", "cls")])
def test_a_pattern_has_to_match_a_whole_name(pattern, nearest):
  with pytest.raises(ValueError, match=f"pattern '{pattern}' matches none of 4 parameters; nearest: .*{nearest}"):
    tree.match(((pattern, 1),), TREE, 0)


def test_nearest_never_leaves_one_alone():
  assert tree.nearest("lorra", ["linear", "lora", "dtl"])[0] == "lora"
  assert tree.nearest("zzz", ["linear", "lora"]) == ["linear", "lora"] and tree.nearest("zzz", []) == []


def test_difference_says_what_separates():
  expected = {"a": (2,), "b": (3, 4), "c": (1,)}
  assert tree.difference({"a": np.zeros(2), "b": np.zeros((3, 4)), "c": np.zeros(1)}, expected) == ""
  assert tree.difference({"a": np.zeros(3), "b": np.zeros((3, 4)), "d": np.zeros(1)}, expected) == (
      "missing: c; unexpected: d; mis-shaped: a [3] instead of [2]")
  assert tree.difference({}, {f"x{i}": (1,) for i in range(7)}) == "missing: x0, x1, x2, x3, x4 and 2 more"


def test_merge_replaces_leaves_and_refuses_new_ones():
  new = np.ones(6)
  found = tree.merge(TREE, {"block_00": {"qkv": {"bias": new}}})
  assert found["block_00"]["qkv"]["bias"] is new and found["norm"]["scale"] is TREE["norm"]["scale"]
  assert TREE["block_00"]["qkv"]["bias"] is not new and list(tree.flatten(found)) == NAMES
  with pytest.raises(ValueError, match="'block_00/qkv/bais' is not among the parameters; nearest: block_00/qkv/bias"):
    tree.merge(TREE, {"block_00": {"qkv": {"bais": new}}})


# --- Configurations -------------------------------------------------------------------------------------------------

def test_fill_takes_what_fits():
  recipe = config.fill(Recipe, {"batch_size": 8, "optim": {"lr": 1, "decay": [[".*bias", 0.0]]}, "remat": True})
  assert (recipe.batch_size, recipe.optim.lr, recipe.optim.decay, recipe.remat) == (8, 1.0, ((".*bias", 0.0),), True)
  assert isinstance(recipe.optim.lr, float) and recipe.optim.name == "adamw"
  assert config.fill(Recipe, dataclasses.asdict(Recipe())) == Recipe()
  assert config.fill(Recipe, {"optim": Optim(lr=2.0)}).optim.lr == 2.0


@pytest.mark.parametrize("values, message", [
    ({"batchsize": 8}, "config has no key 'batchsize'; nearest: batch_size"),
    ({"optim": {"learning_rate": 1}}, "config.optim has no key 'learning_rate'; nearest: "),
    ({"batch_size": "8"}, "config.batch_size is '8'; expected int"),
    ({"batch_size": True}, "config.batch_size is True; expected int"),
    ({"duration": 20}, "config.duration is 20; expected str, such as '20 epochs'"),
    ({"remat": 1}, "config.remat is 1; expected bool"),
    ({"select": "first"}, "select is 'first'; expected one of best, last"),
    ({"batch_size": 0}, "batch_size is 0; expected 1 or more")])
def test_fill_refuses_what_does_not(values, message):
  with pytest.raises(ValueError) as error:
    config.fill(Recipe, values)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_changes_between_configurations():
  old = {"a": 1, "optim": {"lr": 0.1, "name": "sgd"}, "gone": 1}
  new = {"a": 1, "optim": {"lr": 0.2, "name": "sgd"}, "new": 2}
  assert config.changes(old, new) == ["optim.lr: 0.1 -> 0.2", "gone: 1 -> None", "new: None -> 2"]
  assert config.changes(old, old) == []
