"""Backbones that several devices share: what is split, that nothing changes but memory, and what it costs."""
import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import hosts
from engine import colours, recipe
from transferlab import backbones, cli, cost, devices, heads, methods, sharding, tree
from transferlab.backbones.spec import Preprocessing, ResNetSpec, ViTSpec
from transferlab.checkpoint import load_adapter
from transferlab.collectives import collectives
from transferlab.evaluate import make_predict
from transferlab.method import sizes
from transferlab.optim import Optim, make_optimiser
from transferlab.recipe import Recipe
from transferlab.step import compile_step, make_step
from transferlab.testing import Case, Expected, _weights
from transferlab.train import fit

RESNET = ResNetSpec("resnet", 32, (1, 1, 1, 1), (16, 32, 64, 128), 16)
BIT = dataclasses.replace(RESNET, version=2, norm="group", groups=4)
SPECS = {"vit": backbones.architecture("vit_tiny_test", depth=1), "resnet": RESNET, "bit": BIT,
         "swin": backbones.architecture("swin_tiny_test", stages=(1, 1)),
         "clip": backbones.architecture("clip_tiny_test", depth=2)}
WIDE = ViTSpec("wide", 8, 4, 256, 2, 4, 1024)  # its parameters outweigh its activations


# --- Which parameters are split ------------------------------------------------------------------------------------

def plan(spec, shard=4, patterns=(), params=None):
  """{name: the dimension that is split}."""
  params = params or backbones.abstract_params(spec)
  found = sharding.plan(params, devices.make_mesh(4, shard=shard), patterns)
  return {name: tuple(place.spec).index("shard") for name, place in found.items()}


@pytest.mark.parametrize("family", SPECS)
def test_kernels_are_split_and_small_leaves_are_whole(family):
  found, leaves = plan(SPECS[family]), tree.flatten(backbones.abstract_params(SPECS[family]))
  whole = {name: leaf for name, leaf in leaves.items() if name not in found}
  assert {name.rpartition("/")[2] for name in found} <= {"kernel", "tokens"}
  assert {leaf.ndim for name, leaf in whole.items() if "relative_bias" not in name} <= {0, 1, 2, 3, 4}
  assert all(name.endswith(("patch_kernel", "stem/kernel")) or name.rpartition("/")[2] != "kernel" for name in whole)
  assert found.get("text/tokens", 1) == 1 and all(leaves[name].shape[dim] % 4 == 0 for name, dim in found.items())
  assert plan(SPECS[family], shard=1) == {}


@pytest.mark.parametrize("family", SPECS)
def test_whatever_is_split_is_gathered_where_it_is_used(family):
  spec, mesh = SPECS[family], devices.make_mesh(4, shard=4)
  params = backbones.abstract_params(spec)
  apply = backbones.build(spec, split=(split := sharding.plan(params, mesh))).apply
  text = str(jax.make_jaxpr(lambda params, inputs: apply(params, inputs)[0])(params, backbones.example(spec, 4)))
  assert text.count("optimization_barrier") == len(split) > 0


def test_the_first_pattern_counts_and_ones_own_come_first():
  found = plan(SPECS["vit"], patterns=((r".*/fc1/kernel", 1), (r".*/fc./kernel", None), ("pos", -1)))
  assert found == {"block_00/fc1/kernel": 1, "block_00/qkv/kernel": 0, "block_00/proj/kernel": 0, "pos": 2}


@pytest.mark.parametrize("patterns, message", [
    ((("block_07/.*", 0),), "'block_07/.*' matches none"), ((("(", 0),), "not a regular expression"),
    (("pos",), "'pos'; expected a regular expression and a dimension"), ((("pos", "1"),), r"\('pos', '1'\); expected"),
    ((("pos", True),), "expected a regular expression"),
    ((("pos", 3),), r"dimension 3 of pos \[1, 17, 16\] is to be split and there is none; expected -3 to 2, or None"),
    ((("pos", 1),), r"shard=4 does not divide dimension 1 of pos \[1, 17, 16\], which is 17; use shard=1, or keep it")])
def test_patterns_that_cannot_be_meant(patterns, message):
  with pytest.raises(ValueError, match=message):
    plan(SPECS["vit"], patterns=patterns)


def test_a_parameter_that_no_pattern_covers_is_named():
  params = {**backbones.abstract_params(SPECS["vit"]), "block_00": {"gate": jax.ShapeDtypeStruct((4, 4), "float32")}}
  with pytest.raises(ValueError, match=r"no pattern covers block_00/gate \[4, 4\]; add one to shard_patterns"):
    plan(None, params=params)
  assert plan(None, params=params, patterns=(("block_00/gate", -1),)) == {"block_00/gate": 1}


def test_recipes_that_cannot_be_meant():
  for change, message in (({"shard": -1}, "shard is -1; expected 0 or more"),
                          ({"shard_patterns": (("pos", 1),)}, "with shard=1 each has its own")):
    with pytest.raises(ValueError, match=message):
      Recipe(**change)
  with pytest.raises(ValueError, match="shard=3 does not divide 4 devices"):
    devices.sharing(4, 3)
  assert dict(devices.sharing(0, 0).shape) == {"data": 1, "shard": 4, "heads": 1}


def test_a_parameter_is_placed_in_parts_and_in_the_type_of_the_computation(random_weights):
  """No device gets more than its own part, nor a run's backbone or its moments."""
  mesh, weights = devices.make_mesh(4, shard=4), random_weights(SPECS["vit"])
  split = sharding.plan(weights.params, mesh)
  extra = {"nf4": {"block_00/qkv": {"codes": np.ones((4, 3), np.uint8)}}}  # what a method made
  placed = sharding.place({**weights.params, **extra}, weights.params, jnp.bfloat16, mesh, split)
  kernel = placed["block_00"]["fc2"]["kernel"]
  assert {part.data.shape for part in kernel.addressable_shards} == {(8, 16)} and kernel.dtype == jnp.bfloat16
  np.testing.assert_array_equal(kernel, weights.params["block_00"]["fc2"]["kernel"].astype(jnp.bfloat16))
  assert placed["pos"].sharding.is_fully_replicated and placed["nf4"]["block_00/qkv"]["codes"].dtype == np.uint8
  optimiser = optax.adam(1e-3)
  run = {"trainable": {"backbone": weights.params, "classifier": {"kernel": np.ones((16, 4), np.float32)}}}
  run["moments"] = optimiser.init(run["trainable"])
  parts = [leaf for leaf in jax.tree.leaves(sharding.of_run(run, mesh, split)) if not leaf.is_fully_replicated]
  assert len(parts) == 3 * len(split)


# --- Equality ------------------------------------------------------------------------------------------------------

def first_step(case, mesh, **how):
  """(loss, gradient) of a case's batch, and how many leaves of what its step takes are split."""
  split = sharding.plan(case.params, mesh)
  run = jax.tree.map(np.asarray, case.run(devices.make_mesh(1)))
  run = jax.tree.map(devices.put, run, sharding.of_run(run, mesh, split))
  frozen = sharding.place(case.frozen, case.params, jnp.float32, mesh, split)
  count = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((run, frozen)))
  step = compile_step(case.step(case.method, backbones.build(case.spec, split=split), **how), run, frozen,
                      batch := devices.put_batch(case.batch, mesh))
  run, metrics = step(run, frozen, batch)
  return (np.array(metrics["loss"]), jax.tree.map(np.array, optax.tree_utils.tree_get(run.opt_state, "trace"))), count


@pytest.mark.parametrize("family, method, shard, how", [
    ("vit", "full", 2, {}), ("vit", "lora", 4, {"remat": True, "micro_batches": 2}), ("swin", "linear", 4, {}),
    ("bit", "linear", 4, {}), ("clip", "lfa", 4, {})])
def test_loss_and_gradients_are_those_of_the_whole_backbone(family, method, shard, how):
  case = Case(method, SPECS[family], Expected(options={"lora": {"dropout": 0.0}}.get(method, {})))
  (wanted, none), (found, some) = (first_step(case, mesh, **how) for mesh in (
      devices.make_mesh(1), devices.make_mesh(4, shard=shard)))
  assert some > none == 0
  chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


# --- Memory and messages -------------------------------------------------------------------------------------------

def programs(method, micro_batches=1):
  """The compiled step and prediction of the wide ViT, shared by 4 devices."""
  mesh, built, shapes = devices.make_mesh(4, shard=4), methods.build(method, WIDE), Preprocessing(8)
  split = sharding.plan(backbones.abstract_params(WIDE), mesh)
  run, frozen, batch = cost._placed(*cost._arguments(WIDE, built, 5, 16, jnp.float32, False), mesh, split)
  optimiser, backbone = make_optimiser(Optim(), lambda step: 1e-3, run.trainable), backbones.build(WIDE, split=split)
  step = make_step(built, backbone, optimiser, shapes, 5, micro_batches=micro_batches)
  predict = make_predict(built, backbone, shapes).lower(run.trainable, run.state, frozen, batch["image"])
  return compile_step(step, run, frozen, batch), predict


KERNELS = 4 * WIDE.depth * (4 * 256 * 256 + 2 * 256 * 1024)  # bytes of all that is split
LARGEST = 4 * 256 * 1024


def test_a_kernel_is_gathered_where_it_is_used_and_let_go():
  """In the forward and in the backward pass, and anew in each of the micro-batches."""
  (forward, predict), (both, _), (parts, _) = programs("linear"), programs("lora"), programs("lora", micro_batches=2)
  for step, passes in ((forward, 1), (predict.compile(), 1), (both, 2), (parts, 4)):
    assert step.memory_analysis().temp_size_in_bytes < 1.7 * LARGEST  # all kernels are 6 * LARGEST
    first = 4 * 256 * 768 * (passes // 2)  # qkv of the first block: nothing below needs a gradient
    assert collectives(step)["all-gather"] == (KERNELS * passes - first) * 3 / 4


def test_a_backbone_that_trains_is_shared_with_its_moments():
  built = methods.build("full", WIDE)
  found = cost.on_devices(WIDE, built, 5, mesh=devices.make_mesh(4, shard=4), batch_size=16)
  trained = sizes(built, backbones.abstract_params(WIDE), 5).trainable
  assert found.run_bytes == 3 * (4 * trained - KERNELS * 3 / 4) + 16 and found.frozen_bytes == 0
  assert found.temporary_bytes < 4 * LARGEST + 2**20 < KERNELS  # nor are the gradients ever all there


def test_flops_are_those_of_one_device():
  built = methods.build("linear", WIDE)
  found = cost.on_devices(WIDE, built, 5, mesh=devices.make_mesh(4), batch_size=16)
  assert found.flops == pytest.approx(cost.of_training(WIDE, built, 5, batch_size=16).train_flops / 4, rel=0.02)
  assert set(found.received) == {"all-reduce"} and found.received["all-reduce"] < 1.1 * 2 * 3 / 4 * 4 * 5 * 257


# --- Reading collectives -------------------------------------------------------------------------------------------

MESH = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def compiled(run, *, specs, out, loop=0):
  """A program of arrays f32[8, 16] on 4 devices, mapped over them; in a loop of so many turns, or none."""
  mapped = jax.shard_map(run, mesh=MESH, in_specs=specs, out_specs=out, check_vma=False)
  step = (lambda x: jax.lax.scan(lambda y, _: (mapped(y), None), x, None, length=loop)[0]) if loop else mapped
  return jax.jit(step).lower(jax.ShapeDtypeStruct((8, 16), "float32", sharding=NamedSharding(MESH, specs))).compile()


def test_bytes_of_known_programs():
  def run(x):  # [8, 16], 512 bytes, the same on all
    return (jax.lax.psum(x, ("a", "b")), jax.lax.psum_scatter(x, ("a", "b"), tiled=True),
            jax.lax.all_gather(x[:2], "b", tiled=True), jax.lax.ppermute(x[:, :4], "a", [(0, 1), (1, 0)]),
            jax.lax.all_to_all(x, "a", 0, 1, tiled=True))
  found = collectives(compiled(run, specs=P(), out=(P(), P(("a", "b")), P(), P("a"), P("a"))))
  assert found == {"all-gather": 256 / 2, "all-reduce": 2 * 512 * 3 / 4, "all-to-all": 512 / 2,
                   "collective-permute": 128, "reduce-scatter": 512 * 3 / 4}


def test_what_is_in_a_loop_counts_as_often_as_it_runs():
  run = lambda x: jax.lax.psum(x, "a") / 2 + jax.lax.psum(x, ("a", "b"))  # [4, 16], 256 bytes
  once, five = (collectives(compiled(run, specs=P("a"), out=P("a"), loop=loop)) for loop in (0, 5))
  assert once == {"all-reduce": 256 + 2 * 256 * 3 / 4} and five == {"all-reduce": 5 * once["all-reduce"]}


TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%inner (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%small (q: f32[4]) -> f32[4] {
  ROOT %q = f32[4]{0} parameter(0)
}

%large (r: f32[4]) -> f32[4] {
  %r = f32[4]{0} parameter(0)
  ROOT %cp = f32[4]{0} collective-permute(%r), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x: bf16[4,8], y: pred[]) -> f32[4] {
  %x = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, /*index=1*/bf16[8,8]{1,0:T(8,128)}) all-gather-start(%x), replica_groups=mesh['u'=8] \
{'u':(4)2}, dimensions={0}
  %done = bf16[8,8]{1,0} all-gather-done(%start)
  %reduced = (f32[16]{0}, s8[4]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%add
  %async = ((f32[16]{0}), f32[4]{0}, u32[]) async-start(%a), calls=%inner
  %end = f32[4]{0} async-done(%async), calls=%inner
  %loop = (s32[], f32[4]{0}) while(%t), condition=%small, body=%LOOP, backend_config={TRIPS}
  ROOT %if = f32[4]{0} conditional(%y, %q, %q), branch_computations={%small, %large}
}
"""


def test_a_start_and_its_end_are_one_message():
  """By hand: 128 bytes of which one half is there, (64 + 4) * 2 * 7 / 8, 16 bytes three times over."""
  text = TEXT.replace("%LOOP", "%large").replace("TRIPS", '"known_trip_count":{"n":"3"}')
  assert collectives(text) == {"all-gather": 64, "all-reduce": 119, "reduce-scatter": 48, "collective-permute": 4 * 16}


def test_a_loop_of_unknown_length_is_refused_if_it_communicates():
  with pytest.raises(ValueError, match="loop loop communicates, and the program does not say how often"):
    collectives(TEXT.replace("%LOOP", "%large").replace("TRIPS", ""))
  assert collectives(TEXT.replace("%LOOP", "%small").replace("TRIPS", ""))["collective-permute"] == 16
  with pytest.raises(ValueError, match="no ENTRY"):
    collectives("HloModule jit_step")


# --- Runs ----------------------------------------------------------------------------------------------------------

def shared_run(workdir, **changes):
  """Full fine-tuning of the small ViT for 3 steps, on all devices of all processes."""
  told = recipe(devices=0, shard=0, duration="3 steps", optim=Optim("sgd", lr=1e-2), checkpoint_every="2 steps")
  weights = _weights(Case("linear", SPECS["vit"]))
  return fit(weights, "full", colours(), dataclasses.replace(told, **changes), workdir=workdir or None, quiet=True)


def test_processes_share_a_backbone_that_trains(tmp_path):
  """Four devices of two processes share all of it; one process with two pairs ends with the same adapter."""
  ended = hosts.run(shared_run, str(tmp_path / "two"))
  assert [code for code, *_ in ended] == [0, 0], ended
  alone = shared_run("", devices=4, shard=2)
  assert {part.data.shape for part in alone.trainable["backbone"]["block_00"]["fc1"]["kernel"].addressable_shards} == {
      (8, 32)}
  found = load_adapter(tmp_path / "two" / "adapter.safetensors")
  chex.assert_trees_all_close(found.trainable, jax.device_get(alone.trainable), rtol=0, atol=1e-6)


def test_a_run_from_the_cache(tmp_path, tiny_weights, tiny_task, monkeypatch):
  """The pass that fills it and the run share a backbone, and give what one device gives from images."""
  told = recipe(devices=4, shard=2, duration="2 steps", checkpoint_every="1 steps")
  wanted = fit(tiny_weights, "linear", tiny_task, dataclasses.replace(told, shard=1, devices=1), quiet=True)
  built, build = [], backbones.build
  monkeypatch.setattr(backbones, "build", lambda *args, **how: built.append(made := build(*args, **how)) or made)
  found = fit(tiny_weights, "linear", tiny_task, told, workdir=tmp_path, features=tmp_path / "cache", quiet=True)
  assert [len(each.split) for each in built if each.split] == [12, 12]  # the pass's and the run's
  chex.assert_trees_all_close(found.trainable, wanted.trainable, rtol=0, atol=1e-6)
  assert found.result["test"] == pytest.approx(wanted.result["test"], rel=1e-5)
  assert found.result["recipe"]["shard"] == 2 and found.result["devices"] == 4


def test_parallel_heads_refuse_a_shared_backbone(tiny_weights, tiny_task):
  task = dataclasses.replace(tiny_task, splits={name: tiny_task.splits[name] for name in ("train", "val")})
  with pytest.raises(ValueError, match="need the whole backbone on every device, and shard is 2; set shard=1"):
    heads.train_heads(methods.build("linear", tiny_weights.spec), tiny_weights, task, recipe(devices=4, shard=2),
                      [heads.Head(1e-3, 0.0)], quiet=True)


# --- The command ---------------------------------------------------------------------------------------------------

INFO = ["transferlab", "info", "--backbone=vit_tiny_test", "--method=linear"]


def test_the_command(capsys):
  cli.main([*INFO, "--devices=4", "--shard=2", "--batch_size=6", "--num_classes=5", "--json"])
  row = json.loads(capsys.readouterr().out)
  assert (row["devices"], row["shard"], row["batch_size"]) == (4, 2, 8)
  split = 4 * 3 * (4 * 16 * 16 + 2 * 16 * 32)
  assert row["frozen_bytes"] == 4 * row["frozen"] - split / 2 and row["received"]["all-gather"] == split / 2
  assert row["run_bytes"] == 4 * 3 * row["trainable"] + 16  # with two moments; four counts of steps
  cli.main([*INFO, "--devices=4", "--num_classes=5"])
  printed = capsys.readouterr().out
  assert "all-reduce MiB" in printed and "all-gather" not in printed and "each with a copy of the backbone" in printed


@pytest.mark.parametrize("flags, message", [
    (["--shard=2"], "--shard is for --devices"), (["--devices=-1"], "--devices is -1"),
    (["--devices=4", "--shard=3"], "shard=3 does not divide 4 devices"), (["--devices=4", "--cached"], "leave"),
    (["--devices=8"], "8 devices asked for and 4 found")])
def test_wrong_requests(flags, message, capsys):
  with pytest.raises(SystemExit):
    cli.main([*INFO, *flags])
  assert message in capsys.readouterr().err


def test_the_largest_vit_on_devices_that_are_not_here():
  """1.84 billion parameters on 8 devices, from shapes alone: an eighth of what is split and all of the rest."""
  command = [sys.executable, "-m", "transferlab.cli", *INFO[1:2], "--backbone=vit_gigantic14", "--method=linear",
             "--devices=8", "--shard=8", "--json"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-500:]
  row = SimpleNamespace(**json.loads(done.stdout))
  split = 4 * 48 * (4 * 1664 ** 2 + 2 * 1664 * 8192)
  assert row.frozen == 1_842_775_680 and row.frozen_bytes == 4 * row.frozen - split * 7 / 8
  assert row.received["all-gather"] == split * 7 / 8 and row.temporary_bytes < 0.02 * 4 * row.frozen
