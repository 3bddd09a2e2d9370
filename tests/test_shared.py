"""Several tasks on one pass: each as if it were served alone, the pass no longer than needed, strangers refused."""
import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from engine import write_images

from transferlab import backbones, cli, methods, serve, shared
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import save_weights
from transferlab.checkpoint import save_adapter
from transferlab.commands import using
from transferlab.cost import flops

HEADS = {  # name: (method, options, classes)
    "last": ("linear", {}, 3),
    "early": ("linear", {"site": "block_00/out"}, 2),
    "mean": ("linear", {"site": "block_00/out", "tokens": "mean"}, 5),  # one site, reduced in two ways
    "again": ("linear", {"site": "block_00/out", "tokens": "mean"}, 4),
    "inca": ("inca", {"sites": "block_00/out|block_01/mid"}, 3),
    "open": ("open_inca", {"sites": "block_01/mid"}, 4),
    "all": ("all_features", {"target_size": 8}, 3)}
IMAGES = list(np.random.default_rng(0).integers(0, 256, (5, 20, 18, 3), np.uint8))


def arbitrary(method, params, count, seed=0):
  """A method's trainable and state, drawn."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: method.init(key, params, count), jax.random.key(0))
  return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)


def save(path, weights, name, options, count, task=None):
  method = methods.build(name, weights.spec, **options)
  trainable, state = arbitrary(method, weights.params, count)
  save_adapter(path, method, trainable, state, weights=weights, class_names=[f"{path.stem} {c}" for c in range(count)],
               notes={"task": task} if task else None)
  return str(path)


@pytest.fixture(scope="module")
def small(tiny_spec, random_weights):
  weights = random_weights(dataclasses.replace(tiny_spec, depth=2))
  return weights._replace(preprocessing=Preprocessing(16, "bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))


@pytest.fixture(scope="module")
def heads(tmp_path_factory, small):
  """{name: path of an adapter} of HEADS."""
  folder = tmp_path_factory.mktemp("heads")
  return {name: save(folder / f"{name}.safetensors", small, *head, task=f"task {name}") for name, head in HEADS.items()}


def test_each_task_is_served_as_if_alone(heads, small):
  found = shared.load_many(heads, small)
  assert list(found.tasks) == list(HEADS) and found.deepest == "pooled" and found.weights is small
  together = found(IMAGES, batch_size=3)  # the last batch is filled up
  assert {name: len(found.tasks[name]) for name in HEADS} == {name: head[2] for name, head in HEADS.items()}
  for name in ("last", "mean", "inca", "all"):
    alone = serve.load(heads[name], small)
    assert found.tasks[name] == alone.class_names
    assert together[name].shape == (5, HEADS[name][2]) and together[name].dtype == np.float32
    assert np.ptp(together[name], axis=0).max() > 1e-3  # the images do differ
    np.testing.assert_allclose(together[name], alone(IMAGES, batch_size=3), rtol=0, atol=1e-6, err_msg=name)


def test_no_image_gives_no_row(heads, small):
  found = shared.load_many([heads["early"], heads["open"]], small)([])
  assert {name: rows.shape for name, rows in found.items()} == {"task early": (0, 2), "task open": (0, 4)}


def test_the_pass_stops_at_the_deepest_site(tiny_spec, heads, small):
  spec = dataclasses.replace(tiny_spec, depth=12)
  backbone, params = backbones.build(spec), backbones.abstract_params(spec)
  image = jax.ShapeDtypeStruct((4, 16, 16, 3), np.uint8)
  def cost(*sites):
    chosen = {site: methods.build("linear", spec, site=site) for site in sites}
    heads = {site: jax.eval_shape(lambda m=m: m.init(jax.random.key(0), params, 3)) for site, m in chosen.items()}
    lowered = shared.make_predict(chosen, backbone, Preprocessing(16)).lower(heads, params, image)
    return flops(lowered.compile(compiler_options={"xla_backend_optimization_level": 0}))
  whole, five = cost(*(f"block_{i:02d}/out" for i in range(12))), cost("block_04/out", "block_01/out")
  assert 2 < whole / five < 2.5  # one pass for twelve tasks; five blocks of twelve and the patches for two early ones
  assert shared.load_many([heads["inca"], heads["early"]], small).deepest == "block_01/mid"


def test_what_two_heads_read_alike_is_reduced_once(heads, small, monkeypatch):
  seen = []
  def collect(reads, frozen):
    seen.append(sorted(reads))
    return original(reads, frozen)
  original = shared.collect
  monkeypatch.setattr(shared, "collect", collect)
  chosen = ("early", "mean", "again")
  shared.load_many({name: heads[name] for name in chosen}, small)(IMAGES[:1], batch_size=1)
  assert seen == [[("block_00/out", "cls"), ("block_00/out", "mean")]]


def test_names_of_tasks(small, tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  def names(*made):
    paths = [save(tmp_path / name, small, "linear", {}, 2, task) for name, task in made]
    return list(shared.load_many(paths, small).tasks), paths
  assert names(("x.safetensors", "cats"), ("y.safetensors", "dogs"))[0] == ["cats", "dogs"]
  assert names(("x.safetensors", "cats"), ("y.safetensors", "cats"))[0] == ["x", "y"]
  assert names(("x.safetensors", "cats"), ("y.safetensors", None))[0] == ["x", "y"]
  found, paths = names(("a/z.safetensors", "cats"), ("b/z.safetensors", "cats"))
  assert found == paths
  with pytest.raises(ValueError, match="z.safetensors is given twice"):
    shared.load_many([paths[0], paths[0]], small)
  with pytest.raises(ValueError, match="no adapters given"):
    shared.load_many([])


def test_strangers_are_refused(heads, small, random_weights, tmp_path):
  first = heads["early"]
  def refused(match, weights, name="linear", options=None, given=small):
    path = save(tmp_path / "other.safetensors", weights, name, options or {}, 2)
    with pytest.raises(ValueError, match=match) as error:
      shared.load_many([first, path], given)
    assert "\n" not in str(error.value)
  other = random_weights(small.spec, seed=1)
  refused(f"other.safetensors was trained on weights with hash {other.hash[:12]} and .*{small.hash[:12]}.*same weights",
          other._replace(preprocessing=small.preprocessing))
  changed = dataclasses.replace(small.preprocessing, std=(0.4, 0.5, 0.7))
  refused(r"prepare images differently: std \(0.4, 0.5, 0.7\) and \(0.4, 0.5, 0.6\);", small._replace(
      preprocessing=changed))
  for name, options in (("lora", {}), ("full", {}), ("dtl", {"first_write": 2})):
    refused(f"other.safetensors holds '{name}', which changes what the backbone computes.*on its own", small, name,
            options)
  refused("hash", small, given=other)
  with pytest.raises(ValueError, match="not in the zoo; give those weights"):
    shared.load_many([first, heads["mean"]])


# --- The command ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory, heads, small):
  """A folder with images/ and weights.safetensors, and the flags that serve two tasks."""
  place = tmp_path_factory.mktemp("place")
  write_images(place / "images", ("ant", "bee"), count=2)
  save_weights(small, place / "weights.safetensors")
  return place, [f"--adapter={heads['early']},{heads['open']}", f"--backbone={place / 'weights.safetensors'}"]


@pytest.fixture(scope="module")
def served(heads, small):
  return shared.load_many([heads["early"], heads["open"]], small)


def predict(*argv) -> int | str | None:
  try:
    return cli.main(["transferlab", "predict", *map(str, argv)])
  except SystemExit as stop:
    return stop.code


def test_predict_writes_a_row_per_image_and_task(place, served, tmp_path, capsys):
  folder, flags = place
  image = folder / "images" / "ant" / "0.jpg"
  assert predict(*flags, "--top=2", f"--out={tmp_path / 'p.csv'}", folder / "images") is None
  assert "2 tasks on one pass of weights, up to block_01/mid" in capsys.readouterr().err
  with open(tmp_path / "p.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == ["file", "task", "class", "probability"] and len(rows) == 4 * 2 * 2
  assert [row["task"] for row in rows[:4]] == ["task early"] * 2 + ["task open"] * 2
  for task, names in served.tasks.items():
    mine = [row for row in rows if row["file"] == str(image) and row["task"] == task]
    probabilities = served([str(image)])[task][0]
    best = np.argsort(-probabilities)[:2]
    assert [row["class"] for row in mine] == [names[c] for c in best]
    assert [float(row["probability"]) for row in mine] == pytest.approx(probabilities[best], abs=2e-6)


def test_predict_fills_columns_of_a_table_for_each_task(place, served, tmp_path):
  folder, flags = place
  (tmp_path / "t.csv").write_text("image,note\nant/0.jpg,x\nbee/1.jpg,y\nant/0.jpg,z\n")
  asked = f"--table={tmp_path / 't.csv'}", f"--root={folder / 'images'}", f"--out={tmp_path / 'p.csv'}"
  assert predict(*flags, *asked) is None
  with open(tmp_path / "p.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == ["image", "note", "predicted (task early)", "probability (task early)",
                           "predicted (task open)", "probability (task open)"]
  assert [row["note"] for row in rows] == ["x", "y", "z"]
  assert {k: v for k, v in rows[0].items() if k != "note"} == {k: v for k, v in rows[2].items() if k != "note"}
  for row, name in zip(rows, ("ant/0.jpg", "bee/1.jpg")):
    for task, found in served([str(folder / "images" / name)]).items():
      assert row[f"predicted ({task})"] == served.tasks[task][found[0].argmax()]
      assert float(row[f"probability ({task})"]) == pytest.approx(found[0].max(), abs=2e-6)


def test_predict_refuses_more_classes_than_the_smallest_task_has(place, capsys):
  folder, flags = place
  assert predict(*flags, "--top=3", folder / "images") == 1
  assert "number of classes of task early, 2" in capsys.readouterr().err


def test_a_comma_in_the_name_of_one_adapter(heads, small, tmp_path):
  odd = tmp_path / "a,b.safetensors"
  odd.write_bytes(Path(heads["early"]).read_bytes())
  asked = SimpleNamespace(adapter=str(odd), backbone=small)
  assert using._classifier(asked).class_names == ("early 0", "early 1")
