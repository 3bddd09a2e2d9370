"""Sweeps: the grid and its groups, folds, the ledger, the choice on validation alone, and the final runs."""
import json

import jax
import numpy as np
import pytest
from engine import contents, write_images

from transferlab import choice, cli, data, devices, experiment, grid, methods, sweep
from transferlab.backbones.weights import save_weights
from transferlab.data.entries import Entry, Source
from transferlab.heads import Score, Trained
from transferlab.method import sizes

CONFIG = '''
from transferlab.experiment import arguments, defaults

def get_config(text=None):
  arg = arguments(text, data="", task="", backbone="", method="linear", phase="tune", seed=0)
  config = defaults(arg.method, data=arg.task or arg.data, backbone=arg.backbone, seed=arg.seed, devices=1)
  config.duration, config.batch_size, config.evaluate_every = "6 steps", 6, "3 steps"
  config.select = "best" if arg.phase == "tune" else "last"
  return config

def get_grid(text=None):
  return {"optim.lr": [1e-2, 1e-1]} if "task" in (text or "") else {"options.site": ["pooled", "block_01/out"]}
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_weights):
  """A folder with images/ of three classes of ten, tiny.safetensors and config.py."""
  place = tmp_path_factory.mktemp("place")
  write_images(place / "images", count=10)
  save_weights(tiny_weights, place / "tiny.safetensors")
  (place / "config.py").write_text(CONFIG)
  return place


def config(place, method="linear", **changes):
  found = experiment.load(f"{place / 'config.py'}:method={method},data=folder:{place / 'images'},"
                          f"backbone={place / 'tiny.safetensors'}")
  return grid.changed(found, changes)


@pytest.fixture
def heads(monkeypatch):
  """Stands for `train_heads`: `score(head, method)` gives {member: Score}, `calls` and `cached` tell of the calls."""
  class Fake:
    chunk = 100
    score = staticmethod(lambda head, method: {"": Score(head.lr, 1.0, None, 6, 6)})
    def __call__(self, method, weights, task, recipe, heads, *, folds, loaders, finished, **_):
      assert "test" not in task.splits
      assert not loaders or set(loaders[1]) == {"val" if folds is None else "train"}
      self.calls.append(heads)
      self.cached.append((method.name, loaders is not None))
      for first in range(0, len(heads), self.chunk):
        some = tuple(heads[first:first + self.chunk])
        scores = [self.score(head, method) for head in some]
        finished(first, Trained(method, some, None, None, scores, [len(some)], 7, None, 0.5))
  fake = Fake()
  fake.calls, fake.cached = [], []
  monkeypatch.setattr(sweep, "train_heads", fake)
  return fake


def chosen(place, tmp_path, values, **how):
  """The outcome of a sweep without final runs."""
  how = {"seeds": (), "quiet": True, **how}
  return sweep.run(how.pop("config", None) or config(place), values, tmp_path / "sweep", **how)


def test_grid_is_read_from_text():
  assert grid.parse("optim.lr=1e-3, 1e-2; options.fraction=0.1,(0.01,(0.2,0.3));") == {
      "optim.lr": ["1e-3", "1e-2"], "options.fraction": ["0.1", "(0.01,(0.2,0.3))"]}


def test_points_are_the_product_and_the_first_key_varies_slowest(place):
  points = grid.points(config(place), {"optim.lr": ["1e-3", 1e-2], "duration": ["6 steps", "1 epoch"]})
  assert [tuple(point.values.values()) for point in points] == [
      (1e-3, "6 steps"), (1e-3, "1 epoch"), (1e-2, "6 steps"), (1e-2, "1 epoch")]
  assert [point.recipe.optim.lr for point in points] == [1e-3, 1e-3, 1e-2, 1e-2]


def test_another_method_keeps_the_options_that_it_has_too(place):
  base = config(place, "head2toe", **{"options.target_size": 64, "options.cls": "only_cls"})
  linear, lasso = grid.points(base, {"method": ["linear", "all_features"]})
  assert linear.options == {"site": "pooled", "tokens": "cls"}
  assert (lasso.options["target_size"], lasso.options["cls"], lasso.options["penalty"]) == (64, "only_cls", "l21")


@pytest.mark.parametrize("text, message", [
    ("optim.lrr=1", "no key 'optim.lrr'; nearest: optim.lr"), ("options.sites=norm", "nearest: options.site"),
    ("optim.lr=", "no value empty"), ("optim.lr=1,,2", "no value empty"), ("optim.lr", "expected KEY=VALUE"),
    ("optim.lr=1;optim.lr=2", "grid has optim.lr twice"), ("optim.lr=fast", "optim.lr is 'fast'; expected float"),
    ("optim.lr=1e-3,0.001", "a point twice: optim.lr=1e-3 and optim.lr=0.001"), ("", "the grid is empty"),
    ("data=digits", "different tasks are not compared; .*--suite"), ("batch_size=0", "batch_size is 0"),
    ("options.site=pooledd", "nearest: pooled"), ("method=linearr", "nearest: linear")])
def test_mistakes_in_the_grid_stop_before_anything_is_written(place, tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    chosen(place, tmp_path, grid.parse(text))
  assert not (tmp_path / "sweep").exists()


def groups(place, tiny_weights, method, values):
  points = grid.points(config(place, method), values)
  return grid.group(points, [tiny_weights] * len(points), 3)


@pytest.mark.parametrize("method, values, sizes", [
    ("linear", {"optim.lr": [1, 2], "optim.weight_decay": [0, 1], "seed": [0, 1]}, [8]),
    ("linear", {"options.site": ["pooled", "block_00/out", "block_01/fc1"], "optim.lr": [1, 2]}, [4, 2]),
    ("linear", {"batch_size": [4, 6], "optim.lr": [1, 2]}, [2, 2]),
    ("linear", {"duration": ["6 steps", "9 steps"]}, [1, 1]),
    ("all_features", {"options.coefficient": [0, 1e-3], "options.target_size": [16, 64]}, [2, 2]),
    ("all_features", {"options.penalty": ["l1", "l2"]}, [1, 1]),
    ("head2toe", {"method": ["head2toe", "linear"], "optim.lr": [1, 2]}, [2, 2])])
def test_points_that_differ_in_numbers_alone_make_one_group(place, tiny_weights, method, values, sizes):
  assert [len(group.methods) for group in groups(place, tiny_weights, method, values)] == sizes


def test_a_group_knows_what_each_head_varies(place, tiny_weights):
  (lasso,) = groups(place, tiny_weights, "all_features", {"options.coefficient": [0.5, 0.25]})
  assert lasso.vary == {0: {"coefficient": 0.5}, 1: {"coefficient": 0.25}} and len(lasso.sites) == 1
  (probes,) = groups(place, tiny_weights, "linear", {"optim.lr": [1, 2], "options.site": ["pooled", "block_00/out"]})
  assert [vary["member"] for vary in probes.vary.values()] == [0, 1, 0, 1]
  assert [method.options["site"] for method in probes.sites] == ["pooled", "block_00/out"]


def test_the_method_of_a_point_is_that_of_its_image_size(place):
  points = grid.points(config(place, "all_features", **{"options.sites": "block_00/out", "options.target_size": 640}),
                       {"image_size": [16, 32]})
  weights = [experiment.weights_of(point.experiment) for point in points]
  assert weights[0].hash == weights[1].hash
  for group in grid.group(points, weights, 3):
    method = methods.build("all_features", group.weights.spec, **points[0].options)
    width = lambda made, own=group: sizes(made, own.weights.params, 3).trainable
    assert {width(made) for made in group.methods.values()} == {width(method)}


def test_folds_deal_out_every_class_evenly():
  labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [23, 11, 7]))
  names = ("a", "b", "c")
  folds = data.folds(labels, 5, names, seed=3)
  of_class = np.array([[np.sum((labels == c) & (folds == f)) for f in range(5)] for c in range(3)])
  assert (np.ptp(of_class, axis=1) <= 1).all() and np.ptp(np.bincount(folds)) <= 1
  assert (folds == data.folds(labels, 5, names, seed=3)).all() and (folds != data.folds(labels, 5, names, seed=4)).any()
  assert data.folds(labels, 5, names, contiguous=True).tolist() == sorted([*range(5)] * 8 + [0])


@pytest.mark.parametrize("count, message", [(1, "folds is 1; expected 2 to 5"), (6, "expected 2 to 5"),
                                            (3, "class 'b' has 2 training images, fewer than 3 folds")])
def test_folds_that_cannot_be_cut_are_refused(count, message):
  with pytest.raises(data.DataError, match=message):
    data.folds(np.array([0, 0, 0, 1, 1]), count, ("a", "b"))
  assert data.folds(np.array([0, 0, 0, 1, 1]), 3, ("a", "b"), contiguous=True).tolist() == [0, 0, 1, 1, 2]


def test_contiguous_folds_of_images_sorted_by_class_are_refused():
  with pytest.raises(data.DataError, match="100% of the 5 images of fold 0 are of classes that no other fold has"):
    data.folds(np.repeat([0, 1, 2], 5), 3, ("a", "b", "c"), contiguous=True)
  rare = np.array([0, 1, 2, 3, 0, 1, 4, 0])  # published subsets have classes of one image
  assert data.folds(rare, 2, ("a", "b", "c", "d", "e"), contiguous=True).tolist() == [0] * 4 + [1] * 4


def test_the_best_score_wins_then_the_lower_loss_then_the_earlier_point(place, tmp_path, heads):
  table = {1e-3: (0.5, 1.0), 1e-2: (0.75, 2.0), 1e-1: (0.75, 1.5), 1.0: (0.75, 1.5), 10.0: (0.99, float("inf"))}
  heads.score = lambda head, method: {"": Score(*table[head.lr], None, 6, 6)}
  outcome = chosen(place, tmp_path, {"optim.lr": list(table)})
  assert [candidate.values["optim.lr"] for candidate in outcome.candidates] == [1e-1, 1.0, 1e-2, 1e-3, 10.0]
  assert outcome.candidates[-1].score is None
  best = json.loads((tmp_path / "sweep" / "best.json").read_text())
  assert (best["values"], best["score"], best["config"]["optim"]["lr"]) == ({"optim.lr": 0.1}, 0.75, 0.1)


def test_where_all_diverged_nothing_is_chosen(place, tmp_path, heads):
  heads.score = lambda head, method: {"": Score(0.0, float("inf"), None, 6, 6)}
  with pytest.raises(ValueError, match="all 2 candidates diverged.*lower optim.lr"):
    chosen(place, tmp_path, {"optim.lr": [1e-3, 1e-2]})
  assert '"accuracy": null' in (tmp_path / "sweep" / "sweep.jsonl").read_text()


def test_a_score_is_the_mean_over_folds_and_seeds(place, tmp_path, heads):
  heads.score = lambda head, method: {"": Score(head.lr * (head.fold + 2 * head.seed), head.fold, None, 9, 6)}
  outcome = chosen(place, tmp_path, {"optim.lr": [0.25, 0.125], "seed": [0, 1]}, folds=2)
  assert [(head.lr, head.seed, head.fold) for head in heads.calls[0]] == [
      (lr, seed, fold) for lr in (0.25, 0.125) for seed in (0, 1) for fold in (0, 1)]
  assert [(c.values, c.score, c.loss) for c in outcome.candidates] == [
      ({"optim.lr": 0.25}, 0.25 * 1.5, 0.5), ({"optim.lr": 0.125}, 0.125 * 1.5, 0.5)]
  row = outcome.rows[1]
  assert row["values"] == {"optim.lr": 0.25, "seed": 1} and row["protocol"] == "2 stratified folds of train"
  assert row["val"] == {"accuracy": 0.625, "loss": 0.5, "examples": 18}
  assert [score["accuracy"] for score in row["by_fold"]] == [0.5, 0.75] and row["test"] is None and row["folds"] == 2


def test_a_fold_that_diverged_takes_its_point_out(place, tmp_path, heads):
  loss = lambda head: float("nan") if head.lr > 0.1 and head.fold else 1.0
  heads.score = lambda head, method: {"": Score(head.lr, loss(head), None, 9, 6)}
  assert chosen(place, tmp_path, {"optim.lr": [0.5, 0.1]}, folds=2).best.values == {"optim.lr": 0.1}


def test_domains_count_alike_where_the_recipe_says_so(place, tmp_path, heads):
  for domain in ("photo", "sketch", "art"):
    write_images(tmp_path / "domains" / domain, count=8)
  own = config(place, data=f"domains:{tmp_path / 'domains'}?test_domain=art", per_domain=True)
  heads.score = lambda head, method: {"": Score(head.lr, 1.0, 1 - head.lr, 6, 6)}
  outcome = chosen(place, tmp_path, {"optim.lr": [0.5, 0.1]}, config=own)
  assert (outcome.criterion, outcome.best.values, outcome.best.score) == ("mean_over_domains", {"optim.lr": 0.1}, 0.9)


@pytest.mark.parametrize("means, score", [((0.25, None), (0.25 + 0.5) / 2), ((None, 0.25), (0.5 + 0.25) / 2),
                                          ((None, None), 0.5)])
def test_a_fold_of_one_domain_counts_by_its_accuracy(means, score):
  found = choice.over_folds([choice.plain(Score(0.5, 1.0, mean, 6, 6)) for mean in means], "mean_over_domains")
  assert found == {"accuracy": 0.5, "loss": 1.0, "mean_over_domains": score, "examples": 12}
  by_accuracy = choice.over_folds([choice.plain(Score(0.5, 1.0, mean, 6, 6)) for mean in means], "accuracy")
  assert by_accuracy == {"accuracy": 0.5, "loss": 1.0, "examples": 12}


def test_the_choice_is_a_point_and_a_member(place, tmp_path, heads, monkeypatch):
  heads.score = lambda head, method: {site: Score(head.lr + (site == "block_01/out"), 1.0, None, 6, 6)
                                      for site in method.reads}
  outcome = chosen(place, tmp_path, {"optim.lr": [0.1, 0.2]}, config=config(place, "inca"))
  assert (outcome.best.values, outcome.best.member) == ({"optim.lr": 0.2}, "block_01/out")
  assert len(outcome.rows) == 2 * len({candidate.member for candidate in outcome.candidates})
  options = json.loads((tmp_path / "sweep" / "best.json").read_text())["config"]["options"]
  assert options["sites"] == "block_01/out"


def test_a_fraction_is_chosen_among_those_of_one_training(place, tmp_path, heads):
  heads.score = lambda head, method: {"0.1": Score(0.5, 1.0, None, 6, 6), "0.4": Score(0.75, 1.0, None, 6, 6)}
  outcome = chosen(place, tmp_path, {"options.fraction": ["(0.1,0.4)"]}, config=config(place, "head2toe"))
  assert outcome.best.member == "0.4" and [head.vary for head in heads.calls[0]] == [{"coefficient": 1e-4}]
  assert json.loads((tmp_path / "sweep" / "best.json").read_text())["config"]["options"]["fraction"] == 0.4


def test_an_interrupted_sweep_goes_on_where_its_ledger_ends(place, tmp_path, heads):
  values = {"batch_size": [4, 6], "optim.lr": [0.1, 0.2]}
  whole = chosen(place, tmp_path / "whole", values, folds=2)
  heads.calls, heads.chunk, score = [], 3, heads.score
  def broken(head, method):
    if len(heads.calls) == 2 and head.lr == 0.2:
      raise KeyboardInterrupt
    return score(head, method)
  heads.score = broken
  with pytest.raises(KeyboardInterrupt):
    chosen(place, tmp_path, values, folds=2)
  # The first chunk of the second group ended in the middle of a point's folds, and then there was no other.
  rows = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
  assert [tuple(row["values"].values()) for row in rows] == [(4, 0.1), (4, 0.2)]
  heads.calls, heads.score = [], score
  again = chosen(place, tmp_path, values, folds=2)
  assert [[(head.lr, head.fold) for head in call] for call in heads.calls] == [[(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]]
  plain = lambda outcome: [{k: v for k, v in row.items() if k not in ("seconds", "heads")} for row in outcome.rows]
  assert again.candidates == whole.candidates and plain(again) == plain(whole)


def test_a_point_that_lost_a_member_s_row_is_trained_again(place, tmp_path, heads):
  heads.score = lambda head, method: {"0.1": Score(0.5, 1.0, None, 6, 6), "0.4": Score(0.75, 1.0, None, 6, 6)}
  values, own = {"options.fraction": ["(0.1,0.4)"], "optim.lr": [0.1, 0.2]}, config(place, "head2toe")
  best = chosen(place, tmp_path, values, config=own).best
  ledger = tmp_path / "sweep" / "sweep.jsonl"
  ledger.write_text("".join(line + "\n" for line in ledger.read_text().splitlines() if '"0.4"' not in line))
  again = chosen(place, tmp_path, values, config=own)
  assert again.best == best and len(again.candidates) == 4 and [len(call) for call in heads.calls] == [2, 2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_scores_of_other_pixels_under_the_same_names_are_not_taken_up(place, tmp_path, heads, split):
  parts = {name: write_images(tmp_path / "parts" / name, count=8) for name in ("train", "val")}
  own = config(place, data=f"folder:{tmp_path / 'parts'}")
  chosen(place, tmp_path, {"optim.lr": [0.1]}, config=own)
  write_images(parts[split], count=8, seed=7)
  with pytest.raises(ValueError, match="another configuration .*pixels"):
    chosen(place, tmp_path, {"optim.lr": [0.1]}, config=own)


def test_a_sweep_that_goes_on_where_another_type_is_computed_in_mixes_nothing(place, tmp_path, heads, monkeypatch):
  one = chosen(place, tmp_path, {"optim.lr": [0.1]})
  monkeypatch.setattr(devices, "compute_dtype", lambda name: jax.numpy.bfloat16)
  two = chosen(place, tmp_path, {"optim.lr": [0.1, 0.2]})
  assert [len(call) for call in heads.calls] == [1, 2]
  assert {row["dtype"] for row in one.rows} == {"float32"} and {row["dtype"] for row in two.rows} == {"bfloat16"}


def test_chunks_are_noted_as_they_end(place, tmp_path, heads):
  seen, heads.chunk = [], 3
  score = heads.score
  def watched(head, method):
    file = tmp_path / "sweep" / "sweep.jsonl"
    seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
    return score(head, method)
  heads.score = watched
  chosen(place, tmp_path, {"optim.lr": [0.1, 0.2, 0.3]}, folds=2)
  assert seen == [0, 0, 0, 1, 1, 1]


def test_a_larger_grid_adds_what_is_missing_and_a_smaller_one_chooses_within_itself(place, tmp_path, heads):
  chosen(place, tmp_path, {"optim.lr": [0.1, 0.2]})
  more = chosen(place, tmp_path, {"optim.lr": [0.05, 0.2], "optim.weight_decay": [0.05, 0.5]})
  assert [[(head.lr, head.weight_decay) for head in call] for call in heads.calls] == [
      [(0.1, 0.05), (0.2, 0.05)], [(0.05, 0.05), (0.05, 0.5), (0.2, 0.5)]]
  assert more.best.values == {"optim.lr": 0.2, "optim.weight_decay": 0.05} and len(more.rows) == 4
  assert chosen(place, tmp_path, {"optim.lr": [0.1]}).best.values == {"optim.lr": 0.1} and len(heads.calls) == 2


def test_another_sweep_in_the_same_folder_is_refused_with_the_differences(place, tmp_path, heads):
  chosen(place, tmp_path, {"optim.lr": [0.1]})
  before = contents(tmp_path)
  with pytest.raises(ValueError, match="another configuration .*batch_size: 6 -> 5"):
    chosen(place, tmp_path, {"optim.lr": [0.1]}, config=config(place, batch_size=5))
  with pytest.raises(ValueError, match="folds: 0 -> 2"):
    chosen(place, tmp_path, {"optim.lr": [0.1]}, folds=2)
  assert contents(tmp_path) == before
  (tmp_path / "sweep" / "sweep.jsonl").write_text("{\n")
  with pytest.raises(ValueError, match="sweep.jsonl line 1 is no row of a sweep"):
    chosen(place, tmp_path, {"optim.lr": [0.1]})


@pytest.mark.parametrize("how, message", [
    ({"folds": 7}, "class 'ant' has 6 training images, fewer than 7 folds"), ({"folds": 1}, "folds is 1"),
    ({"seeds": (1, 1)}, "expected different whole numbers"), ({"seeds": (2**32,)}, "from 0 to 4294967295")])
def test_requests_that_cannot_be_met_stop_before_anything_is_written(place, tmp_path, heads, how, message):
  with pytest.raises(ValueError, match=message):
    chosen(place, tmp_path, {"optim.lr": [0.1]}, **how)
  assert not heads.calls and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("values, changes, cache, message", [
    ({"optim.lr": [0.1]}, {"cache_dtype": "bfloat16"}, False, "belong to a cache, and linear trains from images"),
    ({"optim.lr": [0.1]}, {"views": 2, "augmentation": "flip"}, False, "views is 2 .* belong to a cache"),
    ({"method": ["linear", "lora"]}, {"cache_dtype": "bfloat16"}, True, "and lora trains from images"),
    ({"augmentation": ["none", "flip"]}, {}, True, "augmentation 'flip' is random")])
def test_what_a_group_cannot_have_of_the_cache_stops_before_any_trains(place, tmp_path, heads, values, changes, cache,
                                                                       message):
  own = config(place, **changes, features=str(tmp_path / "cache") if cache else "")
  with pytest.raises(ValueError, match=message):
    chosen(place, tmp_path, values, config=own)
  assert not heads.calls and not list(tmp_path.iterdir())


def test_without_a_split_to_choose_on_folds_are_asked_for(place, tmp_path, heads):
  own = config(place, data=f"folder:{place / 'images'}?val_fraction=0")
  with pytest.raises(ValueError, match="no 'val' to choose on; give folds=5"):
    chosen(place, tmp_path, {"optim.lr": [0.1]}, config=own)
  assert chosen(place, tmp_path, {"optim.lr": [0.1]}, config=own, folds=3).best.score == pytest.approx(0.1)


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
  """A sweep of rate, decay and site, with two final runs."""
  folder = tmp_path_factory.mktemp("trained")
  values = {"optim.lr": ["3e-3", "3e-2"], "options.site": ["pooled", "block_01/out"]}
  return sweep.run(config(place), values, folder, seeds=(0, 1), quiet=True), folder


def test_every_point_scores_what_training_it_alone_scores(place, trained):
  outcome, _ = trained
  assert len(outcome.rows) == 4 and len({row["group"] for row in outcome.rows}) == 1
  other = outcome.rows[outcome.candidates[-1].point]
  runs = {outcome.best.point: outcome.finals[0],
          outcome.candidates[-1].point: experiment.run(grid.changed(config(place), other["values"]), quiet=True).result}
  for point, alone in runs.items():
    row = outcome.rows[point]
    assert row["val"]["accuracy"] == alone["val"]["accuracy"]
    assert row["val"]["loss"] == pytest.approx(alone["val"]["loss"], abs=1e-6)
    assert row["heads"] == 4 and row["from_cache"] is False
    assert 0 < row["step_seconds"] < row["seconds"] and row["train_peak_bytes"] > 0
    # Everything that was asked for is in the row, and the same but for the split that is left out.
    assert {key for key in row if key in alone and row[key] != alone[key]} - {"seconds", "train_peak_bytes"} == {
        "val", "test", "split_hash", "protocol"}


def test_the_choice_is_trained_with_every_seed_and_tested_once(trained):
  outcome, folder = trained
  best = max(outcome.rows, key=lambda row: (row["val"]["accuracy"], -row["val"]["loss"]))
  assert outcome.best.values == best["values"]
  assert [(row["seed"], row["test"]["examples"]) for row in outcome.finals] == [(0, 6), (1, 6)]
  assert outcome.finals[0]["val"]["accuracy"] == best["val"]["accuracy"]
  assert outcome.finals[0]["options"]["site"] == best["values"]["options.site"]
  assert {path.name for path in folder.iterdir()} == {"config.json", "sweep.jsonl", "best.json", "final"}


def test_a_finished_sweep_is_returned_as_it_is(place, trained, heads):
  outcome, folder = trained
  before = contents(folder)
  again = sweep.run(config(place), {"optim.lr": [3e-3, 3e-2], "options.site": ["pooled", "block_01/out"]}, folder,
                    seeds=(0, 1), quiet=True)
  assert not heads.calls and contents(folder) == before and again.finals == outcome.finals


def test_a_sweep_never_opens_the_test_split(place, tmp_path, heads):
  write_images(tmp_path / "parts" / "train", count=8)
  write_images(tmp_path / "parts" / "val", count=4)
  (tmp_path / "parts" / "test").mkdir()
  for name in ("ant", "bee", "cat"):
    (tmp_path / "parts" / "test" / name).mkdir()
    (tmp_path / "parts" / "test" / name / "0.jpg").write_bytes(b"no image")
  own = config(place, data=f"folder:{tmp_path / 'parts'}")
  assert chosen(place, tmp_path, {"optim.lr": [1e-2, 1e-1]}, config=own).rows
  with pytest.raises(ValueError, match="not an image"):
    chosen(place, tmp_path, {"optim.lr": [1e-2, 1e-1]}, config=own, seeds=(0,))


def test_folds_hold_out_each_training_image_once_and_the_cache_changes_nothing(place, tmp_path):
  values = {"optim.lr": [1e-2, 1e-1]}
  streamed = chosen(place, tmp_path / "streamed", values, folds=2)
  own = config(place, features=str(tmp_path / "features"))
  cached = chosen(place, tmp_path / "cached", values, folds=2, config=own)
  for a, b in zip(streamed.rows, cached.rows):
    assert a["val"]["examples"] == b["val"]["examples"] == 18 and a["point_hash"] == b["point_hash"]
    assert a["val"]["accuracy"] == b["val"]["accuracy"]
    assert a["val"]["loss"] == pytest.approx(b["val"]["loss"], abs=1e-5)


def test_a_method_that_writes_is_swept_from_images_beside_one_that_reads(place, tmp_path, heads):
  heads.score = lambda head, method: {"": Score(float(method.name == "lora"), 1.0, None, 6, 6)}
  own = config(place, features=str(tmp_path / "features"))
  outcome = chosen(place, tmp_path, {"method": ["linear", "lora", "dtl", "head2toe", "head2toe_ft"]}, config=own)
  assert outcome.best.values == {"method": "lora"}
  assert heads.cached == [("linear", True), ("lora", False), ("dtl", True), ("head2toe", True), ("head2toe_ft", False)]
  best = json.loads((tmp_path / "sweep" / "best.json").read_text())["config"]
  assert (best["method"], best["features"], best["options"]["rank"]) == ("lora", "", 8)


def test_command_sweeps_with_the_grid_of_the_config_file(place, tmp_path, heads, capsys):
  flags = [f"--config={place / 'config.py'}:data=folder:{place / 'images'},backbone={place / 'tiny.safetensors'}",
           f"--workdir={tmp_path / 'sweep'}", "--config.duration=2 steps"]
  cli.main(["transferlab", "sweep", *flags, "--seeds=0,1", "--final=phase=final", "--folds=2"])
  out, err = capsys.readouterr()
  assert "2 grid points in 1 group, 2 to train, 2 folds: 4 heads" in err
  assert "chosen" in out and "block_01/out" in out and "± " in out
  rows = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").rglob("result.json"))]
  assert [row["recipe"]["select"] for row in rows] == ["last", "last"]
  cli.main(["transferlab", "report", str(tmp_path / "sweep")])
  assert "± " in capsys.readouterr().out
  with pytest.raises(SystemExit):
    cli.main(["transferlab", "sweep", *flags, "--folds=2", "--contiguous"])
  assert "of classes that no other fold has, since the images are sorted by class" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main(["transferlab", "sweep", *flags, "--grid=optim.lrr=1", "--nofinal"])
  assert capsys.readouterr().err == ("error: config has no key 'optim.lrr'; nearest: optim.lr, optim.clip, "
                                     "optim.lr_factors\n")


def toy(name: str) -> Entry:
  """A task in data_dir/<name>, an image folder, with the phases tune and final."""
  find = lambda data_dir: [Source("folder", data_dir / name)] if (data_dir / name).is_dir() else []
  part = lambda source, part: data.image_folder(source.path).splits[part]
  return Entry(f"toy/{name}", "toy", find, part, lambda source: data.image_folder(source.path).class_names,
               {"final": {"train": "train", "test": "test"}, "tune": {"train": "train", "val": "val"}}, "", 3)


def test_a_suite_is_swept_task_by_task(place, tmp_path, heads, monkeypatch, capsys):
  for seed, name in enumerate(("one", "two", "three")):
    monkeypatch.setitem(data.ENTRIES, f"toy/{name}", toy(name))
    if name != "two":
      write_images(tmp_path / "data" / name, seed=seed)
  monkeypatch.setitem(data.SUITES, "toys", ("toy/one", "toy/two", "toy/three"))
  (tmp_path / "config.py").write_text(CONFIG.replace("arg.task or arg.data", 'f"{arg.task}?phase={arg.phase}"'))
  command = ["transferlab", "sweep", f"--config={tmp_path / 'config.py'}:backbone={place / 'tiny.safetensors'}",
             "--suite=toys", "--seeds=1", "--final=phase=final", f"--data_dir={tmp_path / 'data'}",
             f"--workdir={tmp_path / 'runs'}", "--config.duration=2 steps"]
  cli.main(command)
  out = capsys.readouterr().out
  assert "left out: toy/two" in out and "mean of 2 of 3 tasks" in out and "allowed to differ: recipe.optim.lr" in out
  rows = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").rglob("result.json"))]
  assert [(row["task"], row["seed"], row["recipe"]["optim"]["lr"]) for row in rows] == [
      ("toy/one", 1, 0.1), ("toy/three", 1, 0.1)]
  assert [row["protocol"].split(";")[0] for row in rows] == ["toy, final: train=train test=test"] * 2


def test_ledgers_are_told_apart_by_the_values_that_matter(place, tmp_path, heads):
  """Where the images, weights and cache lie is no part of what a sweep is."""
  chosen(place, tmp_path, {"optim.lr": [0.1]})
  write_images(tmp_path / "images", count=10)
  moved = config(place, data=f"folder:{tmp_path / 'images'}", features=str(tmp_path / "features"))
  chosen(place, tmp_path, {"optim.lr": [0.1]}, config=moved)
  assert len(heads.calls) == 1


def test_the_table_shows_what_candidates_differ_in(capsys):
  values = [{"optim.lr": lr, "options.fraction": (0.1, 0.2)} for lr in (0.1, 1e9)]
  found = choice.candidates(values, [[{"member": member, "val": {"accuracy": acc, "loss": acc}} for member in "ab"]
                                     for acc in (0.5, None)], "accuracy")
  choice.show(found, "accuracy", "x [a]", count=3)
  out = capsys.readouterr().out
  assert "fraction" not in out and "x [a]" in out and "and 1 more" in out
  rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
  assert rows == [["chosen", "0.1", "a", "0.5000", "0.5000"], ["2", "0.1", "b", "0.5000", "0.5000"],
                  ["3", "1e+09", "a", "diverged", "diverged"]]


def test_mean_of_nothing_missing():
  assert choice.mean([0.5, 0.25]) == 0.375 and choice.mean([0.5, None]) is None


def test_points_that_come_to_the_same_training_are_refused(place, tmp_path, heads):
  with pytest.raises(ValueError, match="several points of the grid are the same training as .*'architecture': ''"):
    chosen(place, tmp_path, {"architecture": ["", "vit_tiny_test"]})


@pytest.mark.parametrize("body, found", [
    ("", {}), ("def get_grid(text=None):\n  return {'batch_size': (4, 8), 'data': [text]}",
               {"batch_size": [4, 8], "data": ["task=x"]})])
def test_a_config_file_may_offer_a_grid(tmp_path, body, found):
  (tmp_path / "config.py").write_text(body)
  assert experiment.load_grid(f"{tmp_path / 'config.py'}:task=x") == found


@pytest.mark.parametrize("body, message", [
    ("def get_grid(text=None):\n  return {'batch_size': 4}", "expected a list of values for each key"),
    ("def get_grid(text=None):\n  return 1 / 0", "line 2: ZeroDivisionError")])
def test_a_wrong_grid_of_a_config_file_is_one_line(tmp_path, body, message):
  (tmp_path / "config.py").write_text(body)
  with pytest.raises(ValueError, match=message):
    experiment.load_grid(str(tmp_path / "config.py"))


def test_further_arguments_of_a_config_file():
  cases = {("a.py", ""): "a.py", ("a.py", "b=1"): "a.py:b=1", ("a.py:b=1", "b=2"): "a.py:b=1,b=2",
           ("a.py:", "b=2"): "a.py:b=2", ("a.py:b=1", ""): "a.py:b=1"}
  assert all(experiment.with_arguments(*given) == wanted for given, wanted in cases.items())
