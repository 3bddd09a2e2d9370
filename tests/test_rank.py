"""The effective rank of features: of layers of a CLIP, and of what LFA makes of them."""
import csv
import functools

import jax
import numpy as np
import pytest

from transferlab import analysis, backbones, cli, methods
from transferlab.analysis import rank
from transferlab.analysis.rank import effective_rank
from transferlab.checkpoint import save_adapter
from transferlab.method import classes
from transferlab.step import to_inputs
from transferlab.testing import made_up_ids


def test_effective_rank_of_known_singular_values():
  """exp(entropy) by hand: k equal ones give k, (3, 1) gives 4 / 3^(3/4), a mean of its own counts unless taken away."""
  assert effective_rank(np.eye(5)) == pytest.approx(5)
  turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
  assert effective_rank(turn[:, :2] @ np.diag([3, 1]) @ turn[:2]) == pytest.approx(4 / 3 ** 0.75)
  assert effective_rank(np.outer([1, 2, 3], [1, 0, 1])) == pytest.approx(1)
  assert effective_rank(np.zeros((3, 2))) == 0 == effective_rank(np.ones((3, 2)), centred=True)
  square = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
  assert effective_rank(square + [100, 0], centred=True) == pytest.approx(2)
  assert effective_rank(square + [100, 0]) == pytest.approx(np.exp(np.log(101 / 100) * 100 / 101 + np.log(101) / 101),
                                                            rel=1e-3)


@pytest.fixture(scope="module")
def weights(random_weights):
  spec = backbones.architecture("clip_tiny_test")
  return random_weights(spec)._replace(tokenizer=functools.partial(made_up_ids, spec))


@pytest.fixture(scope="module")
def run(weights, tiny_task, tmp_path_factory):
  """A row of an LFA whose matrices are as initialised, its adapter in its folder."""
  folder = tmp_path_factory.mktemp("rank") / "mine"
  folder.mkdir()
  method = methods.build("lfa", weights.spec, init="clip")
  trainable, state = method.init(jax.random.key(0), weights.params,
                                 classes(method, tiny_task.class_names, weights.tokenizer))
  save_adapter(folder / "adapter.safetensors", method, trainable, state, weights=weights,
               class_names=tiny_task.class_names)
  return {"method": "lfa", "path": str(folder)}


def test_layers_and_aggregate(weights, tiny_task, run, tmp_path, monkeypatch):
  """A row for every layer and tower; the projection's is that of CLIP's own vectors, and, values being projections at
  the start, that of the last layer's values; each tower's mixture has another."""
  monkeypatch.setattr(rank, "BATCH", 4)  # the last batch is filled up
  written, remarks = analysis.figure("lfa/rank", [run], tmp_path, weights=weights, task=tiny_task, images=10)
  header, *rows = csv.reader(open(tmp_path / "lfa_rank_table.csv"))
  assert header[:5] == ["tower", "features", "layer", "vectors", "width"]
  layers = [row for row in rows if row[2]]
  assert [row[:5] for row in layers] == [
      *(["image", "CLIP, layers", str(i), "10", "16"] for i in (1, 2, 3)),
      *(["text", "CLIP, layers", str(i), "4", "24"] for i in (1, 2))]
  found = {(row[0], row[1]): [float(value) for value in row[5:]] for row in rows if not row[2]}
  test = tiny_task.splits["test"]
  pixels = np.stack([test.read(i) for i in np.unique(np.linspace(0, 13, 10).round().astype(int))])
  towers, _ = jax.jit(backbones.build(weights.spec).apply)(weights.params, to_inputs(pixels, weights.preprocessing))
  wanted = [effective_rank(towers.image), effective_rank(towers.image, centred=True)]
  assert found["image", "CLIP, projected"] == pytest.approx(wanted, rel=1e-4)
  for tower in ("image", "text"):
    assert found[tower, "LFA, values of the last layer"] == pytest.approx(found[tower, "CLIP, projected"], rel=1e-4)
    assert abs(found[tower, "LFA, aggregate"][1] - found[tower, "CLIP, projected"][1]) > 1e-3
  assert written[1] == tmp_path / "lfa_rank.csv" and len(remarks) == 2
  assert remarks[0].startswith("images, mean taken away: layers ") and "LFA, aggregate" in remarks[1]
  if len(written) > 2:  # where matplotlib is
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_without_runs_or_tokenizer(weights, tiny_task, tmp_path):
  """Layers of images alone; no more images than there are."""
  analysis.figure("lfa/rank", (), tmp_path, weights=weights._replace(tokenizer=None), task=tiny_task, split="val")
  rows = list(csv.reader(open(tmp_path / "lfa_rank_table.csv")))[1:]
  assert [(row[0], row[2], row[3]) for row in rows] == [("image", layer, "10") for layer in ("1", "2", "3", "")]


def test_what_cannot_be(weights, tiny_weights, tiny_task, run, tmp_path, capsys):
  figure = functools.partial(analysis.figure, "lfa/rank", folder=tmp_path, task=tiny_task)
  for rows, given, message in (
      ((), {"weights": tiny_weights}, "is a vit; the figure is of the towers of a CLIP"),
      ((), {"weights": weights, "split": "sketch"}, "no split 'sketch'; expected one of train, val, test"),
      ((), {"weights": weights, "images": 1}, "images is 1; expected 2 or more"),
      ([{**run, "method": "linear"}], {"weights": weights}, "none of 1 runs is LFA's")):
    with pytest.raises(ValueError, match=message):
      figure(rows, **given)
  for argv, message in ((["--figure=lfa/rank", "--out=x"], "--backbone is missing"),
                        (["--figure=dtl/sensitivity", "--out=x", "--data=digits"], "--data is not for --figure=dtl/s"),
                        (["--images=3"], "--images is for --figure=lfa/rank")):
    with pytest.raises(SystemExit):
      cli.main(["transferlab", "report", *argv])
    assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
