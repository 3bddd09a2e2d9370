"""The command: what each verb prints and writes, and that a bad request is one line that helps and leaves nothing."""
import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from engine import contents, files, write_images
from PIL import Image

from transferlab import backbones, cli, experiment, inform, methods
from transferlab.backbones.weights import load_weights, save_weights
from transferlab.checkpoint import load_adapter, save_adapter

ROOT = Path(__file__).resolve().parent.parent
CONFIG = '''
from transferlab.experiment import arguments, defaults

def get_config(text=None):
  arg = arguments(text, data="", backbone="", method="linear")
  config = defaults(arg.method, data=arg.data, backbone=arg.backbone)
  config.duration, config.batch_size, config.devices = "12 steps", 4, 1
  config.optim.lr = 3e-2
  return config
'''


@pytest.fixture
def run(capsys):
  """run("verb", "--flag=…") -> (exit code, standard output, lines of standard error)."""
  def call(*argv):
    capsys.readouterr()
    try:
      cli.main(["transferlab", *map(str, argv)])
      code = 0
    except SystemExit as stop:
      code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.splitlines()
  return call


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_weights):
  """A folder with images/, tiny.safetensors (with a head), config.py, and a trained run/ of a linear probe."""
  place = tmp_path_factory.mktemp("place")
  write_images(place / "images")
  rng = np.random.default_rng(0)
  head = {"kernel": rng.normal(size=(16, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}
  save_weights(tiny_weights._replace(head=head), place / "tiny.safetensors")
  (place / "config.py").write_text(CONFIG)
  cli.main(["transferlab", *train_flags(place), f"--workdir={place / 'run'}"])
  return place


def train_flags(place, data=None, method="linear", backbone=None):
  data, backbone = data or f"folder:{place / 'images'}", backbone or place / "tiny.safetensors"
  return ["train", f"--config={place / 'config.py'}:data={data},method={method},backbone={backbone}"]


def served(place):
  return f"--adapter={place / 'run' / 'adapter.safetensors'}", f"--backbone={place / 'tiny.safetensors'}"


# What verbs do

def test_train_leaves_a_run_and_prints_the_adapter(place, run):
  assert {"config.json", "metrics.jsonl", "adapter.safetensors", "result.json"} <= files(place / "run")
  result = json.loads((place / "run" / "result.json").read_text())
  assert result["test"]["accuracy"] > 0.8 and result["backbone"] == "tiny" and result["recipe"]["batch_size"] == 4
  before = (place / "run" / "adapter.safetensors").stat().st_mtime_ns
  code, out, err = run(*train_flags(place), f"--workdir={place / 'run'}")
  assert code == 0 and out.strip() == str(place / "run" / "adapter.safetensors")
  assert any("finished run" in line for line in err)
  assert (place / "run" / "adapter.safetensors").stat().st_mtime_ns == before


def test_train_takes_any_key(place, run, tmp_path):
  code, out, err = run(*train_flags(place, method="dtl"), f"--workdir={tmp_path / 'run'}", "--micro_batch=auto",
                       "--config.options.first_write=3", "--config.options.rank=4", "--config.optim.lr=1e-3",
                       "--config.duration=2 steps", "--config.remat=true", "--bad_images=skip",
                       "--config.optim.decay=(('.*bias', 0.0),)")
  assert code == 0, err
  found = json.loads((tmp_path / "run" / "config.json").read_text())
  assert found["options"] == {"rank": 4, "first_read": 0, "first_write": 3, "beta": 100.0, "activation": "swish",
                              "readout": "mean"}
  recipe = found["recipe"]
  assert recipe["optim"]["lr"] == 1e-3 and recipe["remat"] is True and recipe["optim"]["decay"] == [[".*bias", 0.0]]
  assert recipe["micro_batch"] == -1 and recipe["bad_images"] == "skip"
  assert load_adapter(tmp_path / "run" / "adapter.safetensors").method.options["first_write"] == 3


def test_eval(place, run, tmp_path):
  flags = ("eval", *served(place), f"--data=folder:{place / 'images'}")
  code, out, err = run(*flags, "--json", f"--out={tmp_path / 'out'}")
  found, result = json.loads(out), json.loads((place / "run" / "result.json").read_text())
  assert code == 0 and found["per_class"].keys() == {"ant", "bee", "cat"}
  assert [found[k] for k in ("accuracy", "mean_per_class", "examples")] == [
      result["test"][k] for k in ("accuracy", "mean_per_class", "examples")]
  assert found["loss"] == pytest.approx(result["test"]["loss"], abs=1e-5)
  paths = [str(tmp_path / "out" / name) for name in ("confusion.csv", "confusion.png")]
  assert err[-2:] == paths  # standard output holds the JSON object alone
  table = list(csv.reader((tmp_path / "out" / "confusion.csv").open()))
  assert table[0] == ["true \\ predicted", "ant", "bee", "cat"]
  assert [row[0] for row in table[1:]] == ["ant", "bee", "cat"]
  counts = np.array([row[1:] for row in table[1:]], int)
  assert counts.sum() == found["examples"] and np.trace(counts) / counts.sum() == found["accuracy"]
  assert Image.open(tmp_path / "out" / "confusion.png").width > 100

  code, out, err = run(*flags, "--split=all", f"--out={tmp_path / 'all'}")
  assert code == 0 and "images 24" in out and "bee" in out and "accuracy" in out


def test_eval_of_the_head_that_weights_carry(place, run, tmp_path):
  (tmp_path / "names.json").write_text(json.dumps(["cat", "ant", "bee"]))
  flags = ("eval", f"--backbone={place / 'tiny.safetensors'}", f"--data=folder:{place / 'images'}", "--split=all")
  code, out, err = run(*flags, f"--classes={tmp_path / 'names.json'}", "--json")
  weights = load_weights(place / "tiny.safetensors")
  assert code == 0 and json.loads(out)["examples"] == 24 and weights.head is not None
  assert files(tmp_path) == {"names.json"}  # no --out, nothing written


def test_eval_and_predict_cannot_train(place, run, monkeypatch):
  from transferlab import stage, step, train
  for module, name in ((train, "fit"), (step, "make_step"), (stage, "make_step")):
    monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("trained"))
  assert run("eval", *served(place), f"--data=folder:{place / 'images'}")[0] == 0
  assert {"run/confusion.csv", "run/confusion.png"} <= files(place)  # beside the adapter, unless --out says otherwise
  before = files(place)
  assert run("predict", *served(place), place / "images" / "ant" / "0.jpg")[0] == 0
  assert run("eval", f"--adapter={place / 'nothing'}", f"--data=folder:{place / 'images'}")[0] == 1
  assert files(place) == before


def test_predict(place, run, tmp_path):
  one, folder = place / "images" / "bee" / "0.jpg", place / "images" / "ant"
  code, out, err = run("predict", *served(place), one, folder, "--batch_size=4")  # flags may follow the files
  rows = list(csv.DictReader(out.splitlines()))
  assert code == 0 and [row["file"] for row in rows] == [str(one), *sorted(map(str, folder.iterdir()))]
  assert [row["class"] for row in rows] == ["bee"] + ["ant"] * 8
  assert all(0 < float(row["probability"]) <= 1 for row in rows)
  code, out, err = run("predict", *served(place), "--top=3", f"--out={tmp_path / 'p.csv'}", one)
  rows = list(csv.DictReader((tmp_path / "p.csv").open()))
  assert code == 0 and not out and [row["class"] for row in rows][0] == "bee" and len(rows) == 3
  assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)


def test_predict_with_an_image_that_cannot_be_read(place, run, tmp_path):
  bad, good = tmp_path / "bad.jpg", place / "images" / "bee" / "0.jpg"
  bad.write_bytes(good.read_bytes()[:300])
  out_file = tmp_path / "p.csv"
  code, out, err = run("predict", *served(place), f"--out={out_file}", good, bad)
  assert code == 1 and "bad.jpg" in err[-1] and "--bad_images=skip" in err[-1] and not out_file.exists()
  code, out, err = run("predict", *served(place), f"--out={out_file}", "--bad_images=skip", good, bad)
  assert code == 0 and err[0].startswith(f"skipped: {bad}") and out_file.read_text().count("\n") == 2


def table_of(place, name, *rows, encoding="utf-8"):
  (place / name).write_bytes("\r\n".join(["note;image", *rows, ""]).encode(encoding))
  return f"--table={place / name}"


def test_predict_adds_columns_to_a_table(place, run, tmp_path):
  rows = ['"a;b";images\\bee\\0.jpg', "x;images/ant/1.jpg", ";", "again;images/bee/0.jpg"]
  table = table_of(place, "photos.csv", *rows, encoding="utf-8-sig")
  before = (place / "photos.csv").read_bytes()
  code, out, err = run("predict", *served(place), table, f"--out={tmp_path / 'p.csv'}", "--top=2", "--batch_size=2")
  assert code == 0 and not out, err
  written = (tmp_path / "p.csv").read_bytes()
  assert written.startswith("\ufeff".encode()) and written.count(b"\r\n") == 5
  lines = written.decode("utf-8-sig").splitlines()
  assert lines[0] == "note;image;predicted;probability;predicted_2;probability_2" and lines[3] == ";;;;;"
  assert all(line.startswith(row + ";") for row, line in zip(rows, lines[1:]))
  found = list(csv.DictReader(lines, delimiter=";"))
  assert [row["predicted"] for row in found] == ["bee", "ant", "", "bee"] and found[0] != found[3]
  assert found[0]["probability"] == found[3]["probability"] > found[0]["probability_2"]  # one image, one prediction
  assert (place / "photos.csv").read_bytes() == before
  code, out, err = run("predict", *served(place), f"--out={tmp_path / 'f.csv'}", "--top=2", place / "images/ant/1.jpg")
  single = list(csv.DictReader((tmp_path / "f.csv").open()))
  assert [found[1][k] for k in ("predicted", "predicted_2")] == [row["class"] for row in single]


def test_predict_finds_the_column_and_the_root_of_a_table(place, run, tmp_path):
  (tmp_path / "t.csv").write_text("photo\nbee/0.jpg\n")
  flags = ("predict", *served(place), f"--table={tmp_path / 't.csv'}", f"--out={tmp_path / 'p.csv'}")
  assert_error(*run(*flags)[::2], "expected image, file", "image_column=")
  assert_error(*run(*flags, "--image_column=photo")[::2], str(tmp_path / "bee/0.jpg"), "no such file")
  assert files(tmp_path) == {"t.csv"}
  code, out, err = run(*flags, "--image_column=photo", f"--root={place / 'images'}")
  assert code == 0 and (tmp_path / "p.csv").read_text().startswith("photo,predicted,probability\nbee/0.jpg,bee,0.")


def test_predict_leaves_a_table_and_what_it_cannot_read_alone(place, run, tmp_path):
  table = table_of(place, "t.csv", "x;images/bee/0.jpg", "y;images/lost.jpg", "z;")
  out, bad = tmp_path / "p.csv", ("predict", *served(place), table, f"--out={tmp_path / 'p.csv'}")
  assert_error(*run(*bad)[::2], "line 4 names no image", "--bad_images=skip")
  code, _, err = run(*bad, "--bad_images=skip")
  assert code == 0 and any("lost.jpg" in line for line in err)
  assert [line.count(";") for line in out.read_text().splitlines()] == [3] * 4
  assert out.read_text().splitlines()[2:] == ["y;images/lost.jpg;;", "z;;;"]
  before = contents(place)
  (place / "link.csv").symlink_to(place / "t.csv")
  for target in ("t.csv", "link.csv"):
    assert_error(*run("predict", *served(place), table, f"--out={place / target}")[::2], "is the table that is read")
  (place / "link.csv").unlink()
  again = ("predict", *served(place), f"--table={out}", f"--out={tmp_path / 'q.csv'}", f"--root={place}")
  assert_error(*run(*again)[::2], "a column 'predicted' already", "rename")
  assert_error(*run("predict", *served(place), table)[::2], "--out is missing")
  assert_error(*run("predict", *served(place), table, "x.jpg", f"--out={out}")[::2], "unexpected argument 'x.jpg'")
  assert_error(*run("predict", *served(place), "--root=x", "x.jpg")[::2], "--root are for --table=")
  assert_error(*run(*bad[:-1], f"--out={tmp_path / 'none' / 'p.csv'}", "--bad_images=skip")[::2], "cannot write")
  assert before == contents(place) and files(tmp_path) == {"p.csv"}


def test_data_and_train_show_classes_that_differ_only_in_case(place, run, tmp_path):
  rows = [f"images/{c}/{k}.jpg,{name}\n" for c, name in (("ant", "Bee"), ("bee", "bee")) for k in range(8)]
  (place / "case.csv").write_text("image,label\n" + "".join(rows))
  code, out, err = run("data", f"--data=csv:{place / 'case.csv'}")
  assert code == 0 and "remark: classes 'Bee', 'bee' differ only in case" in out
  code, out, err = run(*train_flags(place, f"csv:{place / 'case.csv'}"), f"--workdir={tmp_path / 'run'}",
                       "--config.duration=1 steps")
  assert code == 0 and any("'Bee', 'bee' differ only in case" in line for line in err)


def test_info(run):
  code, out, err = run("info", "--backbone=vit_tiny_test", "--method=lora", "--options=rank=4,form=fused",
                       "--num_classes=10", "--batch_size=8", "--json")
  row, spec = json.loads(out), backbones.architecture("vit_tiny_test")
  assert code == 0 and row["trainable_without_classifier"] == 3 * (16 * 4 + 4 * 48)
  assert row["trainable"] == row["trainable_without_classifier"] + 170 == row["adapter_bytes"] / 4
  assert row["frozen"] == sum(leaf.size for leaf in jax.tree.leaves(backbones.abstract_params(spec)))
  assert row["train_flops"] > row["forward_flops"] > 8 * 2 * 3 * 17 * 16 * (48 + 16 + 64)
  assert row["train_peak_bytes"] > 4 * row["frozen"]


def test_info_prints_all_methods_and_sites(run, monkeypatch):
  some = {name: methods.METHODS[name] for name in ("linear", "dtl")}  # each is compiled
  monkeypatch.setattr(methods, "METHODS", some)
  code, out, err = run("info", "--backbone=vit_tiny_test", "--batch_size=2")
  assert code == 0 and "linear" in out and "dtl" in out
  code, out, err = run("info", "--backbone=vit_tiny_test", "--sites", "--json")
  sites = json.loads(out)
  assert code == 0 and sites["block_02/qkv"] == [1, 17, 48] and list(sites)[-1] == "pooled"
  assert run("info", "--backbone=vit_tiny_test", "--sites")[1].count("block_01/") == 11


# One of each form, and the largest; the others are the same code with other numbers, which their specs check.
FORMS = ("vit_tiny_test", "vit_b16", "vit_gigantic14", "swin_tiny_test", "swin_t", "clip_tiny_test", "clip_vit_b16",
         "clip_vit_bigg14", "resnet50", "resnet50_v2", "bit_r50x1")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in FORMS else [pytest.mark.full]) for name in backbones.ARCHITECTURES])
def test_every_architecture_has_sites_and_sizes(name):
  """From shapes alone, the 1.8 billion parameters of the largest included."""
  from transferlab.method import sizes
  spec = backbones.architecture(name)
  params = backbones.abstract_params(spec)
  if name == "clip_vit_bigg14":  # published in millions: docs/model_profile.csv of mlfoundations/open_clip
    size = lambda part: sum(leaf.size for leaf in jax.tree.leaves(part))
    image = size((params["image"], params["image_projection"]))
    assert (round(size(params) / 1e6, 2), round(image / 1e6, 2)) == (2539.57, 1844.91)
  for method in methods.METHODS if name == "vit_b16" else ("full",) if spec.statistics else ("dtl", "full"):
    if not methods.fits(method, spec):
      continue
    own = methods.adapted(method, spec)
    found = sizes(methods.build(method, spec), params if own is spec else backbones.abstract_params(own), 5)
    assert 0 <= found.trainable_without_classifier < found.trainable
    # Heads on all activations are larger than a tiny backbone; miro learns five variances beside one.
    assert spec.name == "vit_tiny_test" or found.trainable <= found.frozen + spec.width * 10 + 5
  tower = "image/" * (spec.family == "clip")
  assert inform.site_shapes(spec)[f"{tower}pooled"] == (1, spec.width)


def test_info_of_a_zoo_entry_needs_no_weights(run):
  code, out, err = run("info", "--backbone=vit_b16.augreg_in21k", "--sites", "--json")
  assert code == 0 and json.loads(out)["patch"] == [1, 196, 768]


def test_info_of_a_resnet_with_its_logits(run):
  code, out, err = run("info", "--backbone=resnet50_v2", "--logits", "--sites", "--json")
  assert code == 0 and json.loads(out)["logits"] == [1, 1000]
  code, out, err = run("info", "--backbone=vit_tiny_test", "--logits")
  assert code == 1 and any("vit_tiny_test has no site for logits; leave --logits out" in line for line in err)


def test_convert_and_merge(place, run, tmp_path):
  code, out, err = run("convert", f"--backbone={place / 'tiny.safetensors'}", f"--out={tmp_path / 'timm.safetensors'}")
  again, weights = load_weights(tmp_path / "timm.safetensors"), load_weights(place / "tiny.safetensors")
  assert code == 0 and again.hash == weights.hash and np.array_equal(again.head["kernel"], weights.head["kernel"])
  code, out, err = run("merge", *served(place), f"--out={tmp_path / 'merged.safetensors'}")
  assert code == 0 and "largest difference of logits" in out
  assert load_weights(tmp_path / "merged.safetensors").hash == weights.hash  # of a linear probe


def test_merge_of_what_cannot_be_merged(place, run, tmp_path, tiny_weights):
  dtl = methods.build("dtl", tiny_weights.spec)
  trainable, state = dtl.init(jax.random.key(0), tiny_weights.params, 2)
  save_adapter(tmp_path / "a.safetensors", dtl, trainable, state, weights=tiny_weights, class_names=["a", "b"])
  code, out, err = run("merge", f"--adapter={tmp_path / 'a.safetensors'}", f"--backbone={place / 'tiny.safetensors'}",
                       f"--out={tmp_path / 'm.safetensors'}")
  assert_error(code, err, "Methods that merge: linear, full, bitfit, lora")
  assert files(tmp_path) == {"a.safetensors"}


def test_data(place, run):
  code, out, err = run("data", f"--data=folder:{place / 'images'}")
  assert code == 0 and "3 classes" in out and "split hash" in out and "train pixels" in out


def test_help(run):
  code, out, err = run("--help")
  assert code == 0 and all(f"  {verb} " in out for verb in cli.VERBS)
  assert run()[0] == 2
  for verb in cli.VERBS:
    code, out, err = run(verb, "--help")
    assert code == 0 and f"transferlab {verb}" in out and "--" in out and not err
  assert "--config.KEY=value" in run("train", "--help")[1]


def test_the_installed_command_and_no_tensorflow(place):
  """One process: the entry point, and that nothing on the way imports TensorFlow."""
  code = ("import sys; from transferlab import cli; cli.main(['transferlab', *sys.argv[1:]]); "
          "assert 'tensorflow' not in sys.modules")
  found = subprocess.run([sys.executable, "-c", code, "predict", *served(place), str(place / "images" / "cat")],
                         capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
  assert found.returncode == 0, found.stderr
  assert found.stdout.count(",cat,") == 8 and not found.stderr


# Bad requests

def assert_error(code, err, *says):
  """One line that starts with "error:", the last, and no traceback; what comes before it are lines of progress."""
  assert code == 1 and err, (code, err)
  assert err[-1].startswith("error: ") and sum(line.startswith("error:") for line in err) == 1, err
  assert not any("Traceback" in line for line in err)
  for text in says:
    assert text in err[-1], err[-1]


LORA = ["info", "--backbone=vit_tiny_test", "--method=lora"]
BAD_FLAGS = {
    "a misspelt verb": (["trian"], ["verb 'trian' is unknown", "nearest: train"]),
    "a misspelt flag": (["eval", "--adaptor=x"], ["adaptor", "adapter"]),
    "a stray argument": (["eval", "stray", "--data=x"], ["unexpected argument 'stray'"]),
    "no data": (["eval"], ["--data is missing"]), "no adapter": (["predict", "x.jpg"], ["--adapter is missing"]),
    "no files": (["predict", "--adapter=x"], ["no images given"]), "no config": (["train"], ["--config is missing"]),
    "no out": (["convert", "--backbone=x"], ["--out is missing"]),
    "a number that is none": (["info", "--batch_size=many"], ["batch_size", "many"]),
    "an unknown method": (["info", "--method=dtll"], ["method 'dtll' is unknown", "nearest: dtl"]),
    "an unknown backbone": (["info", "--backbone=vit_b61"], ["'vit_b61'", "vit_b16"]),
    "an unknown option": ([*LORA, "--options=rnk=2"], ["'rnk'", "nearest: rank"]),
    "an option of another type": ([*LORA, "--options=rank=two"], ["expected int"]),
    "an option without a value": ([*LORA, "--options=rank"], ["expected name=value"]),
    "a rank too large": ([*LORA, "--options=rank=99"], ["expected 1 to the smallest block's width, 16"]),
    "options of no method": (["info", "--backbone=vit_tiny_test", "--options=rank=2"], ["give --method"]),
    "data of no kind": (["data", "--data=foldr:x"], ["no known kind", "folder"]),
    "data that is not there": (["data", "--data=folder:/nothing/here"], ["does not exist", "expected a folder"]),
    "a pickle": (["convert", "--backbone=model.pt", "--out=x.safetensors"], ["model.pt"]),
    "weights that are not there": (["convert", "--backbone=none.npz", "--out=x.npz"], ["none.npz does not exist"]),
    "an adapter that is not there": (["predict", "--adapter=none.safetensors", "--backbone=vit_tiny_test", __file__],
                                     ["no such file", "expected the adapter.safetensors"]),
}


@pytest.mark.parametrize("what", BAD_FLAGS)
def test_bad_flags(run, tmp_path, monkeypatch, what):
  monkeypatch.chdir(tmp_path)
  argv, says = BAD_FLAGS[what]
  code, out, err = run(*argv)
  assert_error(code, err, *says)
  assert not files(tmp_path) and not out


BAD_CONFIGS = {
    "--config.optim.lrr=1": ["no key 'optim.lrr'", "nearest: optim.lr"],
    "--config.batch_sise=4": ["nearest: batch_size"], "--config.options.rank=2": ["no key 'options.rank'"],
    "--config.batch_size=many": ["'many'; expected int"], "--config.batch_size=4.5": ["4.5; expected int"],
    "--config.batch_size": ["has no value"], "--config.optim=3": ["optim.lr"], "--config.remat=3": ["expected bool"],
    "--config.optim.lr=-1": ["lr is -1.0", "above 0"],
    "--config.optim.schedule=cosin": ["'cosin' is unknown", "cosine"],
    "--config.optim.name=lion": ["expected one of sgd"],
    "--config.optim.decay=(('.*nothing', 0.0),)": ["pattern '.*nothing' matches none", "classifier/"],
    "--config.optim.decay=0.1": ["expected tuple"], "--config.optim.warmup=3 miles": ["warmup is '3 miles'"],
    "--config.duration=2 parsecs": ["duration is '2 parsecs'", "epochs"],
    "--config.duration=0 steps": ["more than 0"],
    "--config.batch_size=1000": ["batch_size 1000", "expected 1..", "drop_last=False"],
    "--config.micro_batch=3": ["micro_batch 3", "valid: 4, 2, 1"], "--config.devices=99": ["99 devices asked for"],
    "--config.augmentation=flipp": ["did you mean 'flip'"], "--config.select=test": ["expected one of best, last"],
    "--config.method=lnear": ["'lnear' is unknown", "nearest: linear"], "--config.data=": ["config.data is empty"],
    "--config.backbone=vit_x": ["vit_x"], "--config.options.site=pooledd": ["nearest: pooled"],
    "--config.architecture=vit_b16": ["tiny", "you asked for vit_b16", "width 16"],
    "--config.image_size=17": ["multiple of the patch size 4"], "--config.seed=-1": ["seed is -1"],
    "--bad_images=maybe": ["expected one of error, skip"], "--micro_batch=some": ["expected int"],
    "--config.optim.schedule=dtl": ["10 idle epochs"], "--workdr=x": ["workdr"], "--confg.seed=1": ["confg.seed"],
    "--config.preprocessing=crop=round": ["round"],
}


@pytest.mark.parametrize("flag", BAD_CONFIGS)
def test_bad_configurations(place, run, tmp_path, flag):
  code, out, err = run(*train_flags(place), f"--workdir={tmp_path / 'run'}", flag)
  assert_error(code, err, *BAD_CONFIGS[flag])
  assert not files(tmp_path) and not out


@pytest.mark.parametrize("script, says", [
    ("def get_config(): return {'lr': 1}", ["config has no key 'lr'"]), ("x = 1", ["KeyError: 'get_config'"]),
    ("def get_config(:", ["SyntaxError", "correct the file"]), ("import nothing_here", ["line 1: ModuleNotFoundError"]),
    ("def get_config():\n  raise ValueError('mine')", ["error: mine"]),
    (CONFIG.replace("config.optim.lr =", "config.optim.lrr ="), ["config.optim has no key 'lrr'; nearest: lr"]),
    (CONFIG.replace("config.optim.lr = 3e-2", "config.optim.lr = 'fast'"), ["line 8: TypeError"]),
    (CONFIG.replace("config.optim.lr = 3e-2", "config.batchsize = 3"), ["no key 'batchsize'; nearest: batch_size"]),
    (CONFIG.replace("config.optim.lr = 3e-2", "config.options.siite = 'x'"), ["no option 'siite'; nearest: site"])])
def test_bad_config_files(place, run, tmp_path, script, says):
  (tmp_path / "c.py").write_text(script)
  flags = f":data=digits,backbone={place / 'tiny.safetensors'}" if "arguments" in script else ""
  code, out, err = run("train", f"--config={tmp_path / 'c.py'}{flags}", f"--workdir={tmp_path / 'run'}")
  assert_error(code, err, *says)
  assert files(tmp_path) == {"c.py"}


def test_arguments_of_a_config_file(place, run, tmp_path):
  code, out, err = run("train", f"--config={place / 'config.py'}:methd=dtl", f"--workdir={tmp_path / 'run'}")
  assert_error(code, err, "'methd=dtl' is not understood", "nearest: method")
  code, out, err = run("train", f"--config={tmp_path / 'none.py'}", f"--workdir={tmp_path / 'run'}")
  assert_error(code, err, "none.py' does not exist", "configs/folder.py")


def spoiled(kind, root):
  """A folder of images, or another source, with one thing wrong; returns what --data gets."""
  root.mkdir()
  if kind == "empty folder":
    return f"folder:{root}"
  if kind == "a class with no image":
    (write_images(root) / "dog").mkdir()
  elif kind == "different classes in train and test":
    write_images(root / "train")
    write_images(root / "test", ("ant", "bee", "dog"))
  elif kind == "a truncated JPEG":
    path = write_images(root) / "bee" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
  elif kind == "a text file named .jpg":
    (write_images(root) / "bee" / "3.jpg").write_text("not an image")
  elif kind == "one class":
    write_images(root, ("ant",))
  elif kind == "labels outside the range":
    write_images(root)
    lines = [f"{name}/{i}.jpg {c}" for c, name in enumerate(("ant", "bee", "cat")) for i in range(8)]
    (root / "train.txt").write_text("\n".join([*lines[:-1], "cat/7.jpg -1"]))
    return f"list:{root}?train=train.txt"
  return f"folder:{root}"


@pytest.mark.parametrize("kind, says", [
    ("empty folder", ["no class folder with images", "expected"]),
    ("a class with no image", ["class 'dog' has no image", "expected files", "add images or remove the folder"]),
    ("different classes in train and test", ["train and test hold different classes", "'cat'", "'dog'"]),
    ("a truncated JPEG", ["1 of", "3.jpg", "cannot be decoded", "bad_images=skip"]),
    ("a text file named .jpg", ["3.jpg", "not an image", "starts with b'not an image'"]),
    ("one class", ["1 class", "at least two"]),
    ("labels outside the range", ["label -1 of 'cat/7.jpg'", "outside 0..2"])])
def test_bad_data_and_then_the_corrected_command(place, run, tmp_path, kind, says):
  command = lambda data: run(*train_flags(place, data), f"--workdir={tmp_path / 'run'}", "--config.duration=1 steps")
  code, out, err = command(spoiled(kind, tmp_path / "images"))
  assert_error(code, err, *says)
  assert not (tmp_path / "run").exists()
  if kind == "empty folder":  # once is enough: nothing of a refused request is left to be in the way
    assert command(f"folder:{place / 'images'}")[0] == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_bad_weights(place, run, tmp_path):
  (tmp_path / "cut.safetensors").write_bytes((place / "tiny.safetensors").read_bytes()[:5000])
  code, out, err = run(*train_flags(place, backbone=tmp_path / "cut.safetensors"), f"--workdir={tmp_path / 'run'}")
  assert_error(code, err, "cut.safetensors", "not a readable safetensors", "fetch it again")
  assert files(tmp_path) == {"cut.safetensors"}


def test_adapters_where_they_do_not_belong(place, run, tmp_path, random_weights, tiny_weights):
  adapter, image = served(place)[0], place / "images" / "ant" / "0.jpg"
  other = save_weights(random_weights(tiny_weights.spec, seed=5), tmp_path / "other.safetensors")
  code, out, err = run("predict", adapter, f"--backbone={other}", f"--out={tmp_path / 'p.csv'}", image)
  assert_error(code, err, "trained on tiny with hash", "these weights (other) have", "--backbone")
  deep = save_weights(random_weights(dataclasses.replace(tiny_weights.spec, depth=2)), tmp_path / "deep.safetensors")
  code, out, err = run("eval", adapter, f"--backbone={deep}", f"--data=folder:{place / 'images'}")
  assert_error(code, err, "they differ in depth 3 and 2", "--backbone")
  code, out, err = run("predict", adapter, f"--out={tmp_path / 'p.csv'}", image)
  assert_error(code, err, "not in the zoo; give those weights with --backbone")
  code, out, err = run("predict", f"--adapter={other}", f"--backbone={other}", image)
  assert_error(code, err, "not a transferlab adapter", "Backbone weights go to --backbone")
  assert files(tmp_path) == {"other.safetensors", "deep.safetensors"}


@pytest.mark.parametrize("where", ["/proc/nothing", "{file}", "{file}/run"])
def test_no_permission_to_write(place, run, tmp_path, where):
  (tmp_path / "file").write_text("mine")
  where = where.format(file=tmp_path / "file")
  code, out, err = run(*train_flags(place), f"--workdir={where}")
  assert_error(code, err, f"cannot write to workdir {where}", "choose a folder you may write to")
  if where.endswith("run"):
    code, out, err = run("predict", *served(place), f"--out={where}/p.csv", place / "images" / "ant" / "0.jpg")
    assert_error(code, err, "cannot write", "give a path in a folder that exists")
    code, out, err = run("merge", *served(place), f"--out={where}/m.safetensors")
    assert_error(code, err, "cannot write")
    code, out, err = run("eval", *served(place), f"--data=folder:{place / 'images'}", f"--out={where}")
    assert_error(code, err, f"cannot write to {where}")
  assert (tmp_path / "file").read_text() == "mine" and files(tmp_path) == {"file"}


def test_the_workdir_of_another_run(place, run):
  before = contents(place / "run")
  code, out, err = run(*train_flags(place), f"--workdir={place / 'run'}", "--config.optim.lr=1e-3")
  assert_error(code, err, "another configuration", "recipe.optim.lr: 0.03 -> 0.001", "give another --workdir")
  assert before == contents(place / "run")


def test_a_defect_keeps_its_traceback(run, monkeypatch):
  """What the user cannot mend is not dressed up as a mistake of theirs."""
  monkeypatch.setattr(inform, "find", lambda *args: {}["missing"])
  with pytest.raises(KeyError):
    run("info")
  monkeypatch.setattr(inform, "find", lambda *args: (_ for _ in ()).throw(ValueError("two\nlines")))
  assert run("info")[2] == ["error: two lines"]
  monkeypatch.setenv("TRANSFERLAB_TRACEBACK", "1")
  with pytest.raises(ValueError):
    run("info")


# Configurations

CONFIGS = sorted(set((ROOT / "configs").glob("*.py")) - {ROOT / "configs" / "dtl_ablation.py"})  # its rows name methods


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_its_arguments_from_the_command_line(path):
  asked, options, recipe = experiment.parse(experiment.load(f"{path}:method=lora,seed=3", {"data": "digits"}))
  assert (asked.method, asked.data, recipe.seed) == ("lora", "digits", 3) and options == methods.options_of("lora")


def test_overrides_have_the_type_of_what_they_override():
  config = experiment.load(f"{ROOT / 'configs' / 'folder.py'}:method=lora,data=digits", {
      "options.compat": "noah", "options.form": "fused", "optim.lr": "1", "remat": "True",
      "optim.lr_factors": "[['a', 2]]", "data": "list:/a,b?train=x=1.txt", "options.rank": "16"})
  asked, options, recipe = experiment.parse(config)
  assert options["compat"] == "noah" and options["rank"] == 16 and recipe.remat is True
  assert recipe.optim.lr == 1.0 and isinstance(recipe.optim.lr, float) and recipe.optim.lr_factors == (("a", 2),)
  assert asked.data == "list:/a,b?train=x=1.txt"
  config = experiment.load(f"{ROOT / 'configs' / 'folder.py'}:method=dtl,data=digits", {"options.first_write": "none"})
  assert experiment.parse(config)[1]["first_write"] is None
  with pytest.raises(ValueError, match="nearest: data"):
    experiment.defaults("linear", dta="digits")
