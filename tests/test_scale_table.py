"""The costs on several devices on paper: what is counted in compiled steps, what it implies, and how it is shown."""
import csv
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

from transferlab import cli, cost
from transferlab.scale import MACHINES, Row, Setting, chosen, limits, machine, plain, rows, steps, tables, write
from transferlab.scale.machines import Times
from transferlab.scale.traffic import products, traffic

TINY = "vit_tiny_test"
SETTING = Setting(batch=4, num_classes=5)


@pytest.fixture(scope="module")
def found() -> dict[tuple, Row]:
  """{(method, devices, shard): row} of tiny steps, four images on each device."""
  on = [MACHINES["h100"]]
  made = [*rows([(TINY, "linear")], [1, 2, 4], on, SETTING, quiet=True),
          *rows([(TINY, "full")], [2], on, SETTING, quiet=True),
          *rows([(TINY, "linear")], [2], on, SETTING, shard=2, quiet=True)]
  return {(row.method, row.devices, row.shard): row for row in made}


def row(method="lora", devices=8, shard=1, **changes) -> Row:
  known = dict(backbone="vit", method=method, devices=devices, shard=shard, batch=8, trainable=10, shared=8e9,
               moved=1e9, flops=1e12, peak=int(20e9), received={"all-reduce": int(1e6)})
  return Row(**{**known, **changes})


# --- What is counted ------------------------------------------------------------------------------------------------

def test_gradients_of_what_trains_are_reduced_and_nothing_else(found):
  """In float32, with the loss and the weights' sum; a device receives 2 (n - 1) / n of them."""
  assert found["linear", 1, 1].received == {}
  for method, n in (("linear", 2), ("linear", 4), ("full", 2)):
    made = found[method, n, 1]
    assert made.received == {"all-reduce": 2 * (n - 1) / n * 4 * (made.trainable + 2)}
  assert found["linear", 2, 1].trainable == 5 * 16 + 5


def test_a_device_holds_and_computes_the_same_however_many_there_are(found):
  """So that 64 devices cost as 8 do, but for their links."""
  one, two, four = (found["linear", n, 1] for n in (1, 2, 4))
  assert two.peak == four.peak and two.peak == pytest.approx(one.peak, rel=0.05)
  assert two.flops == pytest.approx(four.flops, rel=1e-4) == pytest.approx(one.flops, rel=0.01)
  assert one.moved == two.moved == four.moved


def test_four_devices_share_the_work_of_one_batch(found):
  of_four, = rows([(TINY, "linear")], [4], [], SETTING._replace(batch=1), quiet=True)
  assert 4 * of_four.flops == pytest.approx(found["linear", 1, 1].flops, rel=0.03)


def test_a_shared_backbone_is_gathered_and_not_held(found):
  whole, shared = found["linear", 2, 1], found["linear", 2, 2]
  assert set(shared.received) == {"all-reduce", "all-gather"}
  assert shared.received["all-reduce"] == whole.received["all-reduce"]
  kernels = 3 * 4 * (16 * 48 + 16 * 16 + 2 * 16 * 32)  # bytes of three blocks'; the other device has half of them
  assert shared.received["all-gather"] == kernels / 2 and whole.shared > kernels
  assert shared.peak < whole.peak


def test_traffic_is_what_products_read_and_write_and_twice_what_changes():
  a, b = jnp.zeros((3, 4), jnp.bfloat16), jnp.zeros((4, 5))
  product = 2 * 12 + 4 * 20 + 4 * 15
  step = lambda run, x: (run + 1, jax.nn.relu(x @ b) * 2)
  assert traffic(step, jnp.zeros(7), a) == 2 * 4 * 7 + product
  count = lambda f, *args: products(jax.make_jaxpr(f)(*args).jaxpr)
  assert count(jax.jit(lambda x: jnp.sin(x) @ b), a) == product
  assert count(lambda x: jax.lax.scan(lambda c, _: (c, c @ b), x, None, length=6), a) == 6 * product
  assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ b, lambda: 2 * (x @ b)), a) == product


def test_traffic_of_a_linear_probe_by_hand(found):
  """A backbone in bfloat16, and a head, its gradient and AdamW in float32."""
  B, T, D, M, H = 4, 17, 16, 32, 2
  product = lambda *sizes: sum(sizes)  # read, read, written
  patches = product(B * 16 * 16 * 3, 4 * 4 * 3 * D, B * 16 * D)
  attention = product(B * T * D, B * T * D, B * H * T * T) + product(B * H * T * T, B * T * D, B * T * D)
  dense = sum(product(B * T * n, n * m, B * T * m) for n, m in ((D, 3 * D), (D, D), (D, M), (M, D)))
  head = 2 * product(B * D, D * 5, B * 5)
  run = 3 * (5 * D + 5) + 4  # and four counters
  assert found["linear", 1, 1].moved == 2 * (patches + 3 * (attention + dense)) + 4 * (head + 2 * run)


def test_a_compiler_that_refuses_is_a_row_without_numbers(monkeypatch):
  def refuse(*_, **__):
    raise jax.errors.JaxRuntimeError(said)
  monkeypatch.setattr(cost, "compile_training", refuse)
  said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM"
  blank = row(backbone=TINY, method="linear", flops=None, peak=None, received={})
  made = steps.counted(blank, 2, 2, SETTING)
  assert made == blank._replace(devices=2, shard=2)
  assert not made.fits(MACHINES["h100"]) and made.times(MACHINES["h100"], 1.0) is None
  said = "INTERNAL: something else"
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    steps.counted(blank, 1, 1, SETTING)


def test_as_few_devices_share_a_backbone_as_a_machine_needs():
  tried = []
  def compiled(size):
    tried.append(size)
    return row(shard=size, peak=int(12.5e9 + 8e9 / size))
  on = list(MACHINES.values())
  assert [made.shard for made in steps._shared(row(peak=int(20.5e9)), on, compiled)] == [8]  # 14.4 GB of v5e
  assert tried == [8] and not steps._shared(row(peak=int(9e9)), on, compiled)
  assert not steps._shared(row(peak=int(30e9)), on, compiled) and tried == [8]  # nothing helps, and nothing is tried
  closest = steps._shared(row(peak=int(21.2e9)), on, lambda size: compiled(size)._replace(peak=int(15e9)))
  assert [made.shard for made in closest] == [8] and tried.pop() == 8
  assert [made.shard for made in steps._shared(row(peak=None), on, compiled)] == [2, 8] and tried == [8, 2, 4, 8]


def test_methods_that_need_texts_get_a_clip_of_the_same_size():
  assert chosen(["vit_l16", "vit_gigantic14"], ["lfa"]) == [("clip_vit_l14", "lfa"), ("clip_vit_bigg14", "lfa")]
  assert [method for _, method in chosen()] == 3 * ["linear", "inca", "lfa", "dtl", "lora", "full"]
  assert [method for _, method in chosen(["vit_s16"])] == ["linear", "inca", "dtl", "lora", "full"]


# --- What it implies ------------------------------------------------------------------------------------------------

def test_times_are_amounts_over_rates():
  h100, made = MACHINES["h100"], row(received={"all-reduce": 225_000_000, "all-gather": 225_000_000})
  assert made.times(h100, 0.5) == pytest.approx((2e12 / 989e12, 2e9 / 3.35e12, 2 * 450e6 / 450e9))
  assert made._replace(devices=64).times(h100, 0.5).links == pytest.approx(2 * 450e6 / 400e9)
  assert [Times(*times).limit for times in ((3, 2, 1), (1, 3, 2), (1, 2, 3))] == ["arithmetic", "memory", "links"]
  for known in MACHINES.values():
    assert known.link(1) == known.link(8) >= known.link(10**6) and known.flops > 10 * known.bandwidth


def test_sentences_are_written_from_the_numbers():
  v5e, h100 = MACHINES["v5e"], MACHINES["h100"]
  few, many = row(devices=1, peak=int(1e9)), row(devices=64)
  shared = row(devices=64, shard=4, peak=int(14e9), received={"all-gather": int(9e9)})
  said, = limits([few, many, shared], [h100, v5e], SETTING, 0.5)
  assert said == ("lora on vit, 64 devices: arithmetic limits on H100 (2.02 of 2.62 ms, links 0.2%); links limit on "
                  "v5e (180 of 193 ms); 20.0 GB (float32) do not fit the 14.4 GB of v5e, with shard=4 14.0 GB do.")
  said, = limits([many._replace(peak=int(90e9))], [h100], SETTING, 0.5)
  assert said == ("lora on vit, 64 devices: 90.0 GB (float32) do not fit the 72.0 GB of H100, nor with a shared "
                  "backbone: fewer images per device.")
  said, = limits([many._replace(peak=int(90e9)), shared._replace(peak=int(80e9))], [h100], SETTING, 0.5)
  assert said.endswith("of H100, nor do 80.0 GB with shard=4: fewer images per device.")
  said, = limits([few._replace(moved=1e12)], [h100], SETTING, 0.5)
  assert said.startswith("lora on vit, 1 device: traffic to memory limits on H100 (597 of 599 ms")
  said, = limits([many._replace(peak=None, flops=None), shared], [v5e], SETTING, 0.5)
  assert said.endswith("; a step does not fit the 14.4 GB of v5e, with shard=4 14.0 GB do.")


def test_tables_and_files_hold_the_same(tmp_path, capsys):
  on = [MACHINES["h100"], MACHINES["v5e"]]
  made = [row(), row(method="full", flops=None, peak=None, received={})]
  counts, h100, v5e = tables(made, on, SETTING, 0.5)
  assert counts.rows[0] == ["vit", "lora", 8, 1, 1e-5, 1.0, None, None, 20.0, 1.0, 1.0]
  assert counts.rows[1][-3:] == [None, None, 1.0] and "does not fit" in counts.remarks[-1]
  assert h100.rows[0][-2:] == ["arithmetic", "yes"] and v5e.rows[0][-2:] == ["arithmetic", "no"]
  parts = h100.rows[0][4:7]
  assert h100.rows[0][7:9] == pytest.approx([max(parts), sum(parts)]) and h100.rows[1][4:] == [None] * 6 + ["no"]
  table, whole = write(tmp_path / "out", plain(made, on, SETTING, 0.5))
  lines = list(csv.DictReader(table.open()))
  assert len(lines) == 4 and lines[0]["reduced"] == "1000000" and lines[2]["flops"] == lines[2]["sum"] == ""
  read = json.loads(whole.read_text(), parse_constant=lambda text: pytest.fail(text))  # no Infinity, no NaN
  assert read["limits"] == limits(made, on, SETTING, 0.5) and read["machines"][0]["links"][-1] == [None, 400e9]
  assert math.isclose(float(lines[0]["arithmetic"]) * 1e3, h100.rows[0][4])
  for shown in (counts, h100, v5e):
    shown.show()
  out = capsys.readouterr().out
  assert "50% of these rates" in out and "weak scaling: 4 images per device" in out


# --- The command ----------------------------------------------------------------------------------------------------

def test_the_command(tmp_path, capsys):
  flags = [f"--backbone={TINY}", "--methods=linear", "--devices=1", "--batch_size=2", f"--out={tmp_path}", "--json"]
  cli.main(["transferlab", "scale", *flags])
  found = json.loads(capsys.readouterr().out)
  assert [line["machine"] for line in found["rows"]] == ["H100", "A100", "v5e", "v5p"]
  assert found["setting"] == {"batch": 2, "num_classes": 100, "remat": False, "slice": "", "dtype": "float32"}
  assert json.loads((tmp_path / "scale.json").read_text()) == found and (tmp_path / "scale.csv").exists()


@pytest.mark.parametrize("flag, says", [
  ("--backbone=vit_b61", "vit_b61.*nearest: vit_b16"), ("--methods=dtll", "'dtll' is unknown; nearest: dtl"),
  ("--methods=coop --backbone=vit_s16", "coop needs an image and a text tower"),
  ("--devices=1,x", "'1,x'; expected different numbers"), ("--devices=2,2", "different"), ("--devices=0", "'0'"),
  ("--devices=99", "99 devices asked for and 4 found"),
  ("--devices=4 --shard=3", "shard=3 does not divide 4"),
  ("--machines=h1000", "'h1000' is unknown; nearest: h100; all: h100, a100"), ("--efficiency=0", "efficiency is 0.0"),
  ("--efficiency=1.5", "at most 1"), ("--batch_size=0", "batch_size is 0"), ("--shard=-1", "shard is -1"),
  ("--target=gpu", "'gpu'; expected a TPU slice"), ("--target=tpu:", "tpu:v5e:2x4"), ("stray", "unexpected argument"),
  ("--target=tpu:v5e:9x", "'v5e:9x'.*expected a slice such as v5e:2x4")])
def test_bad_input(capsys, flag, says):
  with pytest.raises(SystemExit, match="1"):
    cli.main(["transferlab", "scale", f"--backbone={TINY}", "--methods=linear", "--devices=1", *flag.split()])
  out, err = capsys.readouterr()
  assert not out and re.search(says, err) and err.splitlines()[-1].startswith("error: ")


def test_an_unknown_machine_names_the_nearest():
  with pytest.raises(ValueError, match="nearest: v5p"):
    machine("v5pp")
