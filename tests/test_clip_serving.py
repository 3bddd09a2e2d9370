"""CLIPs in use: classes known by their names, adapters of texts and of images alone, and what LFA looks at."""
import csv
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from engine import files, write_images
from PIL import Image
from test_tokenizer import MERGES, V

from transferlab import backbones, cli, data, experiment, explain, methods, serve
from transferlab.backbones import Towers
from transferlab.backbones.clip_spec import CLIPSpec
from transferlab.backbones.weights import image_tower, load_weights, save_weights
from transferlab.checkpoint import save_adapter
from transferlab.method import classes, record
from transferlab.step import to_inputs

SPEC = CLIPSpec("small_clip", 16, 4, 16, 2, 2, 32, 16, 3, 2, 32, 8, V, 20)
NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def place(tmp_path_factory, random_weights):
  """images/, clip/ with a tokenizer beside the weights, alone.safetensors without one, and merges/."""
  place = tmp_path_factory.mktemp("clip")
  write_images(place / "images", NAMES, count=4)
  for folder in ("clip", "merges"):
    (place / folder).mkdir()
    (place / folder / "bpe_simple_vocab_16e6.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
  made = random_weights(SPEC)
  made = made._replace(params={**made.params, "logit_scale": np.float32(3)})
  save_weights(made, place / "clip" / "model.safetensors")
  save_weights(made, place / "alone.safetensors")
  return place


@pytest.fixture(scope="module")
def weights(place):
  return load_weights(place / "clip")


@pytest.fixture(scope="module")
def images(place):
  return [str(place / "images" / name / f"{i}.jpg") for name, i in (("ant", 0), ("bee", 3), ("cat", 1))]


def adapter(folder, weights, method, **options):
  """An adapter as it is before training."""
  weights = weights if methods.adapted(method, weights.spec) is weights.spec else image_tower(weights)
  made = methods.build(method, weights.spec, **options)
  trainable, state = made.init(jax.random.key(0), weights.params, classes(made, NAMES, weights.tokenizer))
  save_adapter(folder / f"{method}.safetensors", made, trainable, state, weights=weights, class_names=NAMES)
  return folder / f"{method}.safetensors"


@pytest.fixture
def run(capsys):
  """run("verb", "--flag=…") -> rows of the CSV on standard output; a refusal is its line instead."""
  def call(*argv):
    capsys.readouterr()
    try:
      cli.main(["transferlab", *map(str, argv)])
    except SystemExit:
      return capsys.readouterr().err.splitlines()[-1]
    return list(csv.DictReader(capsys.readouterr().out.splitlines()))
  return call


@functools.cache
def towers():
  """(params, 12 images, ids of 6 texts) -> (Towers, every site), compiled once."""
  return jax.jit(lambda params, images, ids: backbones.build(SPEC).apply(params, Towers(images, ids), record(), {}))


def run_towers(weights, paths, texts=()):
  """Projections [B, d] and [P, d], and the image tower's sites."""
  pixels = np.stack([data.preprocess(data.decode(path), weights.preprocessing) for path in paths])
  pad = lambda x, rows: np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
  out, sites = towers()(weights.params, to_inputs(pad(pixels, 12), weights.preprocessing),
                        pad(weights.tokenizer(texts), 6))
  return (np.asarray(out.image)[:len(paths)], np.asarray(out.text)[:len(texts)],
          {site: np.asarray(y)[:len(paths)] for site, y in sites.items() if site.startswith("image/")})


def by_hand(weights, texts, paths):
  """Probabilities [B, C] from both towers' projections; texts are [C][T], normalised before and after their mean."""
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  image, text, _ = run_towers(weights, paths, [text for each in texts for text in each])
  text = unit(unit(text).reshape(len(texts), len(texts[0]), -1).mean(1))
  e = np.exp(np.exp(weights.params["logit_scale"]) * unit(image) @ text.T)
  return e / e.sum(-1, keepdims=True)


def test_a_tokenizer_is_found_beside_the_weights_or_given(place, weights):
  ids = weights.tokenizer(["dog"])
  assert ids.shape == (1, SPEC.context)
  assert load_weights(place / "alone.safetensors").tokenizer is None
  given = dict(backbone=str(place / "alone.safetensors"), tokenizer=str(place / "merges"), method="zero_shot")
  found = experiment.weights_of(experiment.Experiment(**given))
  np.testing.assert_array_equal(found.tokenizer(["dog"]), ids)
  long = "x" * 50
  with pytest.raises(ValueError, match="has 52 tokens"):
    found.tokenizer([long])
  assert experiment.weights_of(experiment.Experiment(**given, truncate=True)).tokenizer([long]).shape == (1, 20)
  with pytest.raises(ValueError, match="^alone.safetensors: none.json: no tokenizer is there"):
    load_weights(place / "alone.safetensors", tokenizer="none.json")
  for wrong in ({"tokenizer": place / "merges"}, {"truncate": True}):
    with pytest.raises(ValueError, match="belong to a CLIP, and this is a vit_formula64; leave them out"):
      load_weights("vit_formula64", **wrong)


def test_a_clip_without_its_text_tower_is_told(weights, place, tmp_path):
  save_weights(image_tower(weights), tmp_path / "tower.safetensors")
  tower = load_weights(tmp_path / "tower.safetensors")
  with pytest.raises(ValueError, match="is a CLIP's image tower alone, and class names need the text tower; give the"):
    serve.load(None, tower, class_names=["dog", "cat"])
  with pytest.raises(ValueError, match="belong to a CLIP, and this is an image tower alone"):
    load_weights(tmp_path / "tower.safetensors", tokenizer=place / "merges")


def test_a_clip_tells_classes_apart_by_their_names(place, weights, images, run):
  expected = by_hand(weights, [["a photo of a ant."], ["a photo of a a bee."]], images)
  np.testing.assert_allclose(serve.load(None, weights, class_names=("ant", "a_bee"))(images), expected, atol=1e-5)
  long = "animals with letters"  # 24 tokens, cut to 20
  rows = run("predict", f"--backbone={place / 'alone.safetensors'}", f"--tokenizer={place / 'merges'}", "--truncate",
             f"--classes=ant,{long}", "--templates=a {}|{}, small", "--top=2", *images)
  cut = weights._replace(tokenizer=functools.partial(weights.tokenizer, truncate=True))
  expected = by_hand(cut, [["a ant", "ant, small"], [f"a {long}", f"{long}, small"]], images)
  found = [{row["class"]: float(row["probability"]) for row in rows if row["file"] == path} for path in images]
  np.testing.assert_allclose([[each["ant"], each[long]] for each in found], expected, atol=1e-5)


def test_evaluation_takes_the_classes_and_texts_of_the_data(place, weights, capsys, monkeypatch, tmp_path):
  def accuracy(*flags):
    capsys.readouterr()
    cli.main(["transferlab", "eval", f"--backbone={place / 'clip'}", f"--data=folder:{place / 'images'}", "--split=all",
              "--json", *flags])
    return json.loads(capsys.readouterr().out)
  task = dataclasses.replace(data.from_string(f"folder:{place / 'images'}"), templates=("{} texture.",))
  monkeypatch.setattr(data, "from_string", lambda *where: task)
  paths = sorted(map(str, (place / "images").rglob("*.jpg")))
  truth = [NAMES.index(path.split("/")[-2]) for path in paths]
  (tmp_path / "names.json").write_text(json.dumps(["cat", "bee", "ant"]))
  for flags, template in (((), "{} texture."), ((f"--classes={tmp_path / 'names.json'}", "--templates=a {}"), "a {}")):
    found, expected = accuracy(*flags), by_hand(weights, [[template.format(name)] for name in NAMES], paths)
    assert found["examples"] == 12 and found["accuracy"] == pytest.approx((expected.argmax(-1) == truth).mean())
    assert found["loss"] == pytest.approx(-np.log(expected[np.arange(12), truth]).mean(), abs=1e-4)


@pytest.mark.parametrize("flags, says", [
    (["--backbone={clip}"], "has no classes of its own; give their names with --classes=dog,cat"),
    (["--backbone={clip}", "--classes=ant,Ant"], "class names 'ant', 'Ant' are the same once cleaned"),
    (["--backbone={clip}", "--classes=ant,_"], "class 1 has the name '_', which is empty once cleaned"),
    (["--backbone={clip}", "--classes=ant,,bee"], "class 1 has no name; expected one between all commas"),
    (["--backbone={clip}", '--classes=["ant"'], "class names cannot be read from --classes (Expecting ',' delimiter"),
    (["--backbone={clip}", '--classes=["ant", 3]'], "--classes holds no list of strings; expected a JSON list"),
    (["--backbone={clip}", '--classes=["ant", " "]'], "class 1 has the name ' ', which is empty once cleaned"),
    (["--backbone={clip}", "--classes=" + "ant," * 99 + "ant"], "class names 'ant', 'ant', 'ant' are the same"),
    (["--backbone={clip}", "--classes=ant", "--templates=a {}|b"], "the template 'b' has 0 places"),
    (["--backbone={clip}", "--classes=ant,<|endoftext|>"], "holds <|endoftext|>"),
    (["--backbone={clip}", "--classes=ant,animals with letters"], "has 30 tokens, start and end included; expected at"),
    (["--backbone={clip}", "--truncate", "--classes=ant,bee", "--templates=animals with letters {}"],
     "the texts of the classes 'ant' and 'bee' are the same once cut"),
    (["--backbone={alone}", "--classes=ant"], "came without a tokenizer; give its file or folder as tokenizer (--toke"),
    (["--backbone={alone}", "--classes=ant", "--tokenizer={images}"], "images: no tokenizer is there; expected token"),
    (["--backbone=vit_formula64", "--classes=ant", "--templates=a {}"], "templates are for a CLIP's text tower"),
    (["--backbone={clip}", "--adapter=x", "--classes=ant"], "--classes does not go with --adapter"),
    (["--classes=ant"], "--adapter is missing"),
    (["--backbone={clip}", "--classes=ant", "--explain=x", "--table={images}", "--out=y"], "--explain is for images")])
def test_bad_requests_are_a_line(place, images, run, flags, says):
  where = {"clip": place / "clip", "alone": place / "alone.safetensors", "images": place / "images"}
  paths = [] if any("--table" in flag for flag in flags) else images[:1]
  before = files(place)
  error = run("predict", *(flag.format(**where) if "{" in flag and "--templates" not in flag else flag
                           for flag in flags), *paths)
  assert error.startswith("error: ") and says in error, error
  assert files(place) == before


def test_an_adapter_on_the_image_tower_takes_the_whole_clip(tmp_path, place, weights):
  path = adapter(tmp_path, weights, "linear")
  found = serve.load(path, place / "alone.safetensors")
  assert found.weights.spec == SPEC.image and found.method.name == "linear"
  with pytest.raises(ValueError, match="an adapter has its own class names, templates and preprocessing; leave"):
    serve.load(path, weights, templates="{}")


@pytest.fixture(scope="module")
def explained(tmp_path_factory, weights):
  """An LFA adapter with two templates, and its classifier."""
  path = adapter(tmp_path_factory.mktemp("lfa"), weights, "lfa", templates=("a {}", "the {}"))
  return path, serve.load(path, weights._replace(tokenizer=None))


def test_an_lfa_adapter_explains_itself_without_a_tokenizer(tmp_path, place, weights, images, explained, run):
  path, classifier = explained
  (tmp_path / "broken.jpg").write_bytes(b"no image")
  rows = run("predict", f"--adapter={path}", f"--backbone={place / 'alone.safetensors'}", "--batch_size=2",
             f"--explain={tmp_path / 'out'}", "--bad_images=skip", images[0], tmp_path / "broken.jpg", *images[1:])
  assert [row["file"] for row in rows] == images
  assert files(tmp_path / "out") == {"0001_0.png", "0003_3.png", "0004_1.png", "explanations.csv", "explanations.json"}
  assert np.asarray(Image.open(tmp_path / "out" / "0001_0.png").convert("RGB")).std() > 10
  stored = json.loads((tmp_path / "out" / "explanations.json").read_text())
  table = list(csv.DictReader((tmp_path / "out" / "explanations.csv").open()))
  found = explain.explain(classifier, images)
  for row, of_file, line, each in zip(rows, stored, table, found, strict=True):
    assert row["file"] == of_file["file"] == line["file"]
    assert row["class"] == of_file["class"] == line["class"] == NAMES[each.probabilities.argmax()]
    assert float(row["probability"]) == pytest.approx(of_file["probability"], abs=1e-5)
    assert of_file["last_layer_class"] == line["last_layer_class"] == NAMES[each.last.argmax()]
    assert of_file["last_layer_probability"] == pytest.approx(each.last.max(), abs=1e-6)
    np.testing.assert_allclose(list(of_file["probabilities"].values()), each.probabilities, atol=1e-6)
    np.testing.assert_allclose(list(of_file["last_layer_probabilities"].values()), each.last, atol=1e-6)
    assert {path: len(of_file["attention"][path]) for path in explain.PATHS} == {
        "text_cross": 3, "text_self": 3, "image": 2}
    for name, values in of_file["attention"].items():
      assert sum(values) == pytest.approx(1, abs=1e-5)
      np.testing.assert_allclose([float(line[f"{name}_{i + 1}"]) for i in range(len(values))], values, atol=1e-6)


def test_explanations_are_of_the_predicted_class_and_of_the_last_layers(weights, images, explained):
  """By naive sums over everything, and by LFA made for one layer."""
  classifier = explained[1]
  with pytest.raises(ValueError, match="this classifier is 'coop'; train with method=lfa"):
    explain.explain(classifier._replace(method=classifier.method._replace(name="coop")), images)
  found = explain.explain(classifier, images)
  np.testing.assert_allclose([each.probabilities for each in found], classifier(images), atol=1e-6)
  one = methods.build("lfa", SPEC, templates=("a {}", "the {}"), layers=1)
  last = serve._make(NAMES, weights.preprocessing, one, classifier.trainable, classifier.state, weights)
  np.testing.assert_allclose([each.last for each in found], last(images), atol=1e-6)

  trained, text = jax.tree.map(np.asarray, (classifier.trainable, classifier.frozen["text_layers"]))  # [C, T, L, Dt]
  sites, norm = run_towers(weights, images)[2], weights.params["image"]["norm"]
  x = np.stack([sites[f"image/block_{i:02d}/out"][:, 0] for i in range(SPEC.depth)], axis=1)  # [B, L, D]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + SPEC.norm_eps) * norm["scale"] + norm["bias"]
  def attention(q, k):
    e = np.exp(k @ q / np.sqrt(SPEC.embed_width))
    return e / e.sum()
  for b, each in enumerate(found):
    c = each.probabilities.argmax()
    q = x[b, -1] @ trained["image"]["q"]
    own = [attention(t[-1] @ trained["text_self"]["q"], t @ trained["text_self"]["k"]) for t in text[c]]
    cross = [attention(q, t @ trained["text_cross"]["k"]) for t in text[c]]
    expected = {"image": attention(q, x[b] @ trained["image"]["k"]), "text_self": np.mean(own, 0),
                "text_cross": np.mean(cross, 0)}
    for name, values in expected.items():
      np.testing.assert_allclose(each.attention[name], values, atol=1e-5)


def test_pictures_show_the_class_of_the_last_layers_too(tmp_path, monkeypatch):
  """Also where it is far from the most probable ones; and explanations end well without matplotlib."""
  shown = {}
  monkeypatch.setattr(explain.plots, "portrait", lambda path, image, bars, shares, labels, title: shown.update(
      shares=list(shares), title=title) or [])
  p, last = np.array([.3, .2, .16, .14, .12, .08]), np.array([0, 0, 0, 0, 0, 1.])
  each = explain.Explained(p, last, {name: np.ones(1) for name in explain.PATHS})
  assert explain.draw(tmp_path / "x", np.zeros((4, 4, 3), np.uint8), each, list("abcdef")) == []
  assert shown == {"shares": ["a", "b", "c", "d", "f"], "title": "a 30%; by the last layers alone: f 100%"}
