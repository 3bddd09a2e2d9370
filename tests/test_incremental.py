"""Classes in steps: what is old stays bit for bit, no earlier image is seen again, numbers are those of every step's
own adapter, an interrupted protocol ends as an uninterrupted one."""
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from engine import contents, files, metrics, recipe, write_images

from transferlab import backbones, cli, data, incremental, methods, serve, train, tree
from transferlab.backbones.weights import save_weights
from transferlab.checkpoint import load_adapter
from transferlab.method import Context, forward, sizes
from transferlab.methods.growing import grow, join
from transferlab.testing import check_method

SITES = "block_00/(mid|out)"
ASKED = recipe(duration="2 epochs", batch_size=4, checkpoint_every="1 epoch")


@pytest.fixture(scope="module")
def small(tiny_spec, random_weights):
  return random_weights(dataclasses.replace(tiny_spec, depth=1))


@pytest.fixture(scope="module")
def task():
  """48 and 24 images [16, 16, 3] of 6 classes that differ in colour."""
  rng, labels = np.random.default_rng(0), np.arange(72) % 6
  centres = 60 + 140 * (np.arange(6)[:, None] >> np.arange(3) & 1)
  images = rng.normal(centres[labels][:, None, None], 30, (72, 16, 16, 3)).clip(0, 255).astype(np.uint8)
  found = data.arrays(images, labels, list("uvwxyz"), {"train": range(48), "test": range(48, 72)}, name="colours")
  return dataclasses.replace(found, splits={name: found.splits[name] for name in ("train", "test")})


def learn(small, task, folder, **changes):
  return incremental.learn(small, task, changes.pop("recipe", ASKED), workdir=folder, quiet=True,
                           **{"steps": 3, "options": {"sites": "block_00/out"}, **changes})


@pytest.fixture(scope="module")
def learned(small, task, tmp_path_factory):
  """(workdir, result) of three steps over the new classes."""
  folder = tmp_path_factory.mktemp("learned") / "new"
  return folder, learn(small, task, folder)


def arrays(folder, step) -> dict:
  return tree.flatten(load_adapter(folder / f"step_{step:02d}" / "adapter.safetensors").trainable)


# --- Growing --------------------------------------------------------------------------------------------------------

def arbitrary(method, count, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), None, count)[0])
  return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def test_only_rows_of_new_classes_train_and_old_ones_stay(small):
  method, backbone = methods.build("open_inca", small.spec, sites=SITES), backbones.build(small.spec)
  tokens = {site: np.random.default_rng(2).normal(size=(4, 17, 16)).astype(np.float32) for site in method.reads}
  def logits(method, trainable, state):
    """{site: [B, C]}, and what the sites say together under "all"."""
    def run(trainable, state):
      found = forward(method, backbone, trainable, tokens, Context(state=state))
      return {**found.carry, "all": found.logits}
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(trainable, state)
  old = arbitrary(method, 3)
  before = logits(method, old, {})
  for over, columns in (("new", 2), ("all", 5)):
    grown = grow(method, old, over)
    assert sizes(grown, small.params, columns).trainable == 2 * 2 * (16 + 16 + 1)  # sites, classes; query, w, b
    rows = arbitrary(grown, columns, seed=1)
    whole = join(old, rows)
    for name, leaf in tree.flatten(old).items():
      kept = tree.flatten(whole)[name]
      kept = kept[:3] if name.endswith("/query") else kept[..., :3] if name.startswith("classifier") else kept
      np.testing.assert_array_equal(kept, leaf, err_msg=name)
    together, mine = logits(method, whole, {}), logits(grown, rows, old)
    for site in together:
      assert mine[site].shape == (4, columns) and np.ptp(together[site], axis=0).min() > 1e-2
      np.testing.assert_allclose(mine[site], together[site][:, -columns:], rtol=0, atol=1e-6)
      np.testing.assert_allclose(together[site][:, :3], before[site], rtol=0, atol=1e-6)


def test_growing_is_a_method_like_others(small):
  base = methods.build("open_inca", small.spec, sites="block_00/out")
  old = arbitrary(base, 3)
  check_method(lambda spec: grow(base, old, "all"), small.spec, num_classes=5, properties=["gradient"])


def test_what_cannot_grow(small):
  with pytest.raises(ValueError, match="method is 'inca'; expected 'open_inca'"):
    grow(methods.build("inca", small.spec), {})
  with pytest.raises(ValueError, match="over is 'old'; expected one of new, all"):
    grow(methods.build("open_inca", small.spec), {}, "old")


# --- The protocol ---------------------------------------------------------------------------------------------------

def test_scores_by_hand():
  """Four classes in two steps; a row per image, its class in the comment."""
  logits = np.array([[9, 0, 0, 0], [1, 0, 5, 0],   # 0: right, taken by 2 later
                     [5, 1, 0, 0],                 # 1: wrong from the start
                     [0, 0, 1, 0], [3, 0, 2, 0],   # 2: right, outbid by 0
                     [0, 0, 0, 1]], np.float32)    # 3: right
  found = incremental.scores(logits, np.array([0, 0, 1, 2, 2, 3]), [("a", "b"), ("c", "d")])
  assert found == {"matrix": [[pytest.approx(2 / 3)], [pytest.approx(1 / 3), pytest.approx(2 / 3)]],
                   "seen": [pytest.approx(2 / 3), 0.5], "own": [pytest.approx(2 / 3), 1.0],
                   "average": pytest.approx(7 / 12), "last": 0.5, "forgetting": pytest.approx(1 / 3)}


def test_classes_are_dealt_out_once_in_an_order_of_the_seed():
  names = [str(c) for c in range(10)]
  blocks = incremental.class_blocks(names, 4, 0)
  assert [len(block) for block in blocks] == [3, 3, 2, 2] and sorted(sum(blocks, ())) == names
  assert blocks == incremental.class_blocks(names, 4, 0) != incremental.class_blocks(names, 4, 1)
  assert sum(blocks, ()) != tuple(names)


def test_every_step_leaves_old_rows_and_shared_weights_bit_for_bit(learned):
  folder, _ = learned
  for step in (1, 2):
    now, then = arrays(folder, step), arrays(folder, step + 1)
    for name, leaf in now.items():
      axis = 0 if name.endswith("/query") else -1 if name.startswith("classifier") else None
      kept = then[name] if axis is None else np.take(then[name], range(2 * step), axis)
      np.testing.assert_array_equal(kept, leaf, err_msg=name)
      if axis is not None:
        assert np.take(then[name], range(2 * step, 2 * step + 2), axis).any(), f"{name} has not learned"


def test_accuracies_are_those_of_every_steps_own_adapter(learned, small, task):
  folder, result = learned
  test, names = task.splits["test"], sum(map(tuple, result["blocks"]), ())
  truth = np.array([names.index(task.class_names[label]) for label in test.labels])
  classifier = serve.load(folder / "step_02" / "adapter.safetensors", small)  # the last one is the next test's
  assert classifier.class_names == names[:4]
  right = classifier([test.read(i) for i in range(len(test))]).argmax(-1) == truth
  assert result["matrix"][1] == [pytest.approx(right[truth // 2 == j].mean()) for j in range(2)]
  assert result["seen"][1] == pytest.approx(right[truth // 2 <= 1].mean())
  assert result["average"] == pytest.approx(np.mean(result["seen"])) and result["last"] == result["seen"][-1]
  assert result == json.loads((folder / "incremental.json").read_text())


def test_the_last_adapter_is_a_plain_one_of_all_classes(learned, small, task):
  folder, result = learned
  assert result["adapter"] == "step_03/adapter.safetensors"
  adapter = load_adapter(folder / result["adapter"])
  assert adapter.method.name == "open_inca" and sorted(adapter.class_names) == sorted(task.class_names)
  found = serve.evaluate(serve.load(folder / result["adapter"], small), task, quiet=True)  # as transferlab eval does
  assert found.accuracy == pytest.approx(result["last"])


@pytest.mark.parametrize("over, columns", [("new", [2, 2, 2]), ("all", [2, 4, 6])])
def test_no_image_of_an_earlier_step_is_seen_again(small, task, tmp_path, monkeypatch, over, columns):
  seen = []
  class Untrained:
    def __init__(self, method, weights, task, recipe, folder, index, quiet):
      assert list(task.splits) == ["train"] and recipe.select == "last"
      seen.append((len(task.class_names), {task.class_names[label] for label in task.splits["train"].labels}))
      self.trainable, _ = method.init(jax.random.key(0), weights.params, len(task.class_names))
      folder.begin()

    def train(self):
      return self
  monkeypatch.setattr(incremental, "Stage", Untrained)
  monkeypatch.setattr(incremental, "_logits", lambda *_: (np.zeros((6, 6)), np.arange(6)))
  result = learn(small, task, tmp_path, over=over)
  assert seen == [(count, set(block)) for count, block in zip(columns, result["blocks"])]
  assert f"cross-entropy over {over} classes" in result["protocol"] and "in 3 steps" in result["protocol"]


def test_joint_training_for_comparison(small, task, tmp_path, learned, monkeypatch):
  """Asked for afterwards, it is added; the steps stay."""
  folder, result = learned
  shutil.copytree(folder, tmp_path / "run")
  scored = []
  def logits(adapter, weights, task, split):
    scored.append((adapter.parent.name, load_adapter(adapter).class_names == task.class_names, split))
    return np.eye(6)[[0, 1, 2, 3, 4, 4]], np.arange(6)  # the last image is wrong
  monkeypatch.setattr(incremental, "_logits", logits)
  found = learn(small, task, tmp_path / "run", joint=True)
  assert scored == [("step_03", True, "test"), ("joint", True, "test")] and found["joint"] == pytest.approx(5 / 6)
  assert contents(tmp_path / "run" / "step_03") == contents(folder / "step_03")
  row = json.loads((tmp_path / "run" / "joint" / "result.json").read_text())
  assert row["examples"] == {"train": 36} and row["steps"] == 18 and row["test"] is None
  monkeypatch.setattr(incremental, "_step", None)
  assert learn(small, task, tmp_path / "run") == found  # finished, whether joint training is asked for again or not


def test_an_interrupted_protocol_ends_as_an_uninterrupted_one(small, task, tmp_path, learned, monkeypatch):
  (whole, wanted), run = learned, tmp_path / "run"
  shutil.copytree(whole / "step_01", run / "step_01")
  saves, original = [], train.Stage.save
  def save(stage, checkpoints, done):
    original(stage, checkpoints, done)
    saves.append(done)
    if len(saves) == 1:  # within step 2
      raise KeyboardInterrupt
  monkeypatch.setattr(train.Stage, "save", save)
  with pytest.raises(KeyboardInterrupt):
    learn(small, task, run)
  assert not (run / "step_02" / "adapter.safetensors").exists()
  result = learn(small, task, run)
  assert len(saves) == 1 + 1 + 2  # step 1 was not repeated, step 2 went on
  for step in ("step_02", "step_03"):
    name = f"{step}/adapter.safetensors"
    assert (whole / name).read_bytes() == (run / name).read_bytes() and metrics(whole / step) == metrics(run / step)
  assert {k: v for k, v in result.items() if k != "seconds"} == {k: v for k, v in wanted.items() if k != "seconds"}


def test_a_finished_protocol_is_returned_and_another_one_refused(small, task, learned, monkeypatch):
  folder, result = learned
  before = contents(folder)
  monkeypatch.setattr(incremental, "_step", None)
  assert learn(small, task, folder) == result
  for changes, what in (({"order_seed": 1}, "order_seed"), ({"over": "all"}, "over"),
                        ({"recipe": dataclasses.replace(ASKED, duration="3 epochs")}, "duration")):
    with pytest.raises(ValueError, match=f"another configuration .*{what}"):
      learn(small, task, folder, **changes)
  assert contents(folder) == before


@pytest.mark.parametrize("changes, match", [
    ({"steps": 1}, "steps is 1; expected 2 to 3 for 6 classes: every step needs two"),
    ({"steps": 4}, "steps is 4; expected 2 to 3"),
    ({"steps": 6, "over": "all"}, "steps is 6; expected 2 to 5 for 6 classes: the first needs two"),
    ({"over": "old"}, "over is 'old'; expected one of new, all"), ({"order_seed": -1}, "order_seed is -1; expected 0"),
    ({"split": "val"}, "split is 'val' and 'colours' has train, test"),
    ({"split": "train"}, "split is 'train'"),
    ({"recipe": dataclasses.replace(ASKED, views=2)}, "views is 2 and .* belong to a cache"),
    ({"over": "all", "recipe": dataclasses.replace(ASKED, class_weights="balanced")}, "no image of the old classes"),
    ({"options": {"sites": "nowhere"}}, "matches none")])
def test_wrong_requests_are_one_line_and_leave_nothing(small, task, tmp_path, changes, match):
  with pytest.raises(ValueError, match=match) as error:
    learn(small, task, tmp_path / "run", **changes)
  assert "\n" not in str(error.value) and not files(tmp_path)


def test_a_class_that_cannot_be_scored(small, task, tmp_path):
  test = task.splits["test"].select(np.flatnonzero(task.splits["test"].labels != 2))
  published = dataclasses.replace(task, splits={**task.splits, "test": test}, protocol="published")
  with pytest.raises(ValueError, match="no test image of 'w'; expected one of every class"):
    learn(small, published, tmp_path)


# --- Classes that go ------------------------------------------------------------------------------------------------

def test_classes_go_and_the_logits_of_others_stay(learned, small, tmp_path):
  folder, result = learned
  whole = folder / result["adapter"]
  names = load_adapter(whole).class_names
  images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
  logits = np.asarray(serve.load(whole, small).logits(images))
  others = tuple(name for name in names if name not in "zu")
  old = tree.flatten(load_adapter(whole).trainable)
  for kind, given, kept in (("drop", ("z", "u"), others), ("keep", ("z", "u"), ("z", "u"))):
    incremental.select_classes(whole, tmp_path / "fewer.safetensors", **{kind: given})
    found = load_adapter(tmp_path / "fewer.safetensors")
    columns = [names.index(name) for name in kept]
    assert found.class_names == kept
    for name, leaf in tree.flatten(found.trainable).items():
      wanted = old[name][columns] if name.endswith("/query") else old[name]
      np.testing.assert_array_equal(leaf, wanted[..., columns] if name.startswith("classifier") else wanted)
  served = serve.load(tmp_path / "fewer.safetensors", small)
  np.testing.assert_allclose(served.logits(images), logits[:, columns], rtol=0, atol=1e-6)
  header = load_adapter(tmp_path / "fewer.safetensors").header
  assert not {"val", "test"} & set(header) and header["incremental"]["steps"] == 3


@pytest.mark.parametrize("changes, match", [
    ({"keep": ("u", "q")}, "has no class 'q'; nearest: "), ({"drop": ("q",)}, "has no class 'q'"),
    ({"keep": ("u",)}, "'u' would stay; expected at least two"), ({"keep": ("u", "v", "u")}, "each once"),
    ({"drop": tuple("uvwxyz")}, "no class would stay"), ({}, "keep or classes to drop"),
    ({"keep": ("u", "v"), "drop": ("w",)}, "one of both")])
def test_wrong_selections_write_nothing(learned, tmp_path, changes, match):
  folder, result = learned
  with pytest.raises(ValueError, match=match):
    incremental.select_classes(folder / result["adapter"], tmp_path / "fewer.safetensors", **changes)
  assert not files(tmp_path)
  with pytest.raises(ValueError, match="the adapter stays as it is"):
    incremental.select_classes(folder / result["adapter"], folder / result["adapter"], keep=("u", "v"))


# --- The commands ---------------------------------------------------------------------------------------------------

@pytest.fixture
def run(capsys):
  """run("verb", "--flag=…") -> (exit code, standard output, standard error)."""
  def call(*argv):
    try:
      cli.main(["transferlab", *map(str, argv)])
    except SystemExit as stop:
      return stop.code, *capsys.readouterr()
    return 0, *capsys.readouterr()
  return call


def test_incremental_is_a_call_of_learn(small, tmp_path, run, learned, monkeypatch):
  write_images(tmp_path / "images", count=4)
  save_weights(small, tmp_path / "tiny.safetensors")
  config = f"--config=configs/folder.py:data=folder:{tmp_path}/images,backbone={tmp_path}/tiny.safetensors,method="
  def learn(weights, task, recipe, **rest):
    asked.append((weights.hash, task.class_names, recipe.batch_size, rest))
    return learned[1]
  asked = []
  monkeypatch.setattr(incremental, "learn", learn)
  code, out, err = run("incremental", config + "open_inca", f"--workdir={tmp_path / 'run'}", "--steps=3", "--over=all",
                       "--config.batch_size=4", "--config.options.norm_tokens=true", "--joint", "--split=val")
  assert code == 0, err
  weights, classes, batch_size, rest = asked[0]
  assert (weights, classes, batch_size) == (small.hash, ("ant", "bee", "cat"), 4)
  assert rest.pop("options")["norm_tokens"] is True
  assert rest == {"steps": 3, "workdir": str(tmp_path / "run"), "order_seed": 0, "over": "all", "split": "val",
                  "joint": True}
  assert "all seen" in out and "among own" in out and "forgetting" in out
  assert out.splitlines()[-1] == f"{tmp_path / 'run'}/step_03/adapter.safetensors"
  code, out, _ = run("incremental", config + "open_inca", f"--workdir={tmp_path / 'run'}", "--json")
  assert json.loads(out) == learned[1]
  code, _, err = run("incremental", config + "inca", f"--workdir={tmp_path / 'run'}")
  assert code == 1 and "method is 'inca'; expected open_inca" in err
  code, _, err = run("incremental", config + "open_inca", f"--workdir={tmp_path / 'run'}", "--config.features=cache")
  assert code == 1 and "features is 'cache'; expected none" in err and len(asked) == 2


def test_classes_lists_and_removes(learned, tmp_path, run):
  folder, result = learned
  adapter, out = f"--adapter={folder / result['adapter']}", tmp_path / "fewer.safetensors"
  listed = run("classes", adapter)[1].split()
  assert listed == sum(result["blocks"], [])
  assert run("classes", adapter, "--drop=z, u", f"--out={out}")[:2] == (0, f"{out}\n")
  assert load_adapter(out).class_names == tuple(name for name in listed if name not in "zu")
  assert run("classes", adapter, '--keep="v",w', f"--out={out}")[0] == 0 and load_adapter(out).class_names == ("v", "w")
  assert "--out is missing" in run("classes", adapter, "--keep=v,w")[2]
