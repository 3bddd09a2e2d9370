"""`transferlab info --against`: a method's costs beside another one's, parallel heads' too, from shapes alone."""
import dataclasses
import functools
import json

import jax.numpy as jnp
import pytest

from transferlab import backbones, cli, cost, heads, inform, methods, progress

SPEC = dataclasses.replace(backbones.architecture("vit_tiny_test"), depth=1)
D = SPEC.width


@pytest.fixture(scope="module")
def rows():
  return inform.compared(SPEC, "inca", {"sites": "patch|norm"}, 5, "linear", count=3, batch_size=4)


def test_one_member_all_heads_and_the_other(rows):
  assert [row["method"] for row in rows] == ["inca, norm alone", "inca, 2 together", "inca, 2 together, 3 heads",
                                            "linear"]
  adapter = 4 * D * D + 6 * D
  assert [row["trainable_without_classifier"] for row in rows] == [adapter, 2 * adapter, 6 * adapter, 0]
  assert [row["trainable"] for row in rows] == [adapter + 5 * (D + 1), 2 * (adapter + 5 * (D + 1)),
                                                6 * (adapter + 5 * (D + 1)), 5 * (D + 1)]
  frozen = rows[0]["frozen"]
  assert rows[2]["of_backbone"] == 6 * adapter / frozen and rows[3]["of_backbone"] == 0
  for name, of in (("train_flops", "of_flops"), ("train_peak_bytes", "of_peak")):
    assert [row[of] for row in rows] == [row[name] / rows[3][name] for row in rows]
    assert rows[0][name] < rows[1][name] < rows[2][name]


def test_heads_share_the_backbone(rows):
  """Two more heads cost two more adapters' work, not two more backbones'."""
  one, other = rows[1]["train_flops"], rows[3]["train_flops"]  # linear: the forward pass and next to nothing
  assert rows[2]["train_flops"] - one < 2.2 * (one - other)


def test_one_head_costs_what_training_alone_does():
  method = methods.build("mlp3", SPEC)
  found, alone = heads.step_cost(SPEC, method, 5, 1, batch_size=4), cost.of(SPEC, method, 5, batch_size=4)
  assert found.train_flops == pytest.approx(alone["train_flops"], rel=0.02)
  assert found.train_peak_bytes == pytest.approx(alone["train_peak_bytes"], rel=0.05)


def test_members_come_in_the_order_of_the_forward_pass():
  sites = "patch|block_00/(mid|out)|norm"
  assert inform.members(SPEC, methods.build("open_inca", SPEC, sites=sites), 5) == [
      "patch", "block_00/mid", "block_00/out", "norm"]
  assert inform.members(SPEC, methods.build("linear", SPEC), 5) == []


def test_the_command(monkeypatch, capsys, rows):
  asked = []
  monkeypatch.setattr(inform, "compared", lambda *args, **how: asked.append((args[1:], how)) or rows)
  command = ["transferlab", "info", "--backbone=vit_tiny_test", "--method=inca", "--options=sites=patch|norm",
             "--num_classes=5", "--against=linear", "--heads=3", "--batch_size=4"]
  cli.main(command)
  printed = capsys.readouterr().out
  assert "3 heads" in printed and "100.0%" in printed and "a step of 4 images, 5 classes, float32" in printed
  args, how = asked[0]
  assert args == ("inca", {"sites": "patch|norm"}, 5, "linear") and (how["count"], how["batch_size"]) == (3, 4)
  cli.main([*command, "--json", "--dtype=bfloat16"])
  assert json.loads(capsys.readouterr().out) == rows and asked[1][1]["dtype"] is jnp.bfloat16


def test_costs_of_a_first_stage_are_called_so(monkeypatch, capsys):
  numbers = dict.fromkeys(("trainable", "trainable_without_classifier", "forward_flops", "train_flops", "frozen",
                           "train_peak_bytes", "adapter_bytes"), 1)
  monkeypatch.setattr(cost, "of", lambda *args, **how: numbers)
  cli.main(["transferlab", "info", "--backbone=vit_tiny_test", "--method=head2toe"])
  assert "head2toe: of the first stage" in capsys.readouterr().out
  cli.main(["transferlab", "info", "--backbone=vit_tiny_test", "--method=linear"])
  assert "first stage" not in capsys.readouterr().out


@pytest.mark.parametrize("how", [{}, {"force_terminal": True, "width": 80}, {"force_terminal": True, "width": 30}])
def test_numbers_are_printed_whole(monkeypatch, capsys, rows, how):
  """Into a pipe, on an ordinary terminal, and on a narrow one, where cells go on below."""
  monkeypatch.setattr(inform, "compared", lambda *args, **how: [
      {**row, "trainable": 303_404_132, "trainable_without_classifier": 4_200_448} for row in rows])
  monkeypatch.setattr(progress, "Console", functools.partial(progress.Console, no_color=True, **how))
  cli.main(["transferlab", "info", "--backbone=vit_tiny_test", "--method=inca", "--against=linear"])
  printed = capsys.readouterr().out
  assert "…" not in printed and (how.get("width") == 30 or printed.count("4,200,448") == len(rows))


@pytest.mark.parametrize("arguments, message", [
    (["--against=full"], "--method is missing"), (["--method=linear", "--heads=2"], "--heads is for --against"),
    (["--method=linear", "--against=linear"], "linear is compared with itself"),
    (["--method=linear", "--against=ful"], "method 'ful' is unknown; nearest: full"),
    (["--method=linear", "--against=full", "--cached"], "leave --cached out"),
    (["--batch_size=0"], "--batch_size is 0; expected 1 or more"), (["--num_classes=0"], "--num_classes is 0"),
    (["--method=linear", "--against=full", "--heads=-1"], "--heads is -1; expected 0 or more"),
    (["--dtype=half"], "--dtype is 'half'; expected float32 or bfloat16")])
def test_wrong_flags_are_one_line_errors(capsys, arguments, message):
  with pytest.raises(SystemExit):
    cli.main(["transferlab", "info", "--backbone=vit_tiny_test", *arguments])
  assert message in capsys.readouterr().err
