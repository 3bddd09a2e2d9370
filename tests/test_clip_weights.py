"""CLIPs from files: every layout gives the same weights, configurations are read as their libraries do, relatives and
damage are refused in a line; and what is written back loads again."""
import json
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
from test_clip import near, run
from test_weights_pth import save, scripted

from transferlab import backbones, cli, methods, tree
from transferlab.backbones import Towers
from transferlab.backbones.weights import (WeightsError, clip_names, export_timm, image_tower, load_weights, names,
                                           save_weights)
from transferlab.backbones.weights.preprocess import CLIP_MEAN, CLIP_STD
from transferlab.checkpoint import Adapter, check_backbone
from transferlab.data import image

TINY = backbones.architecture("clip_tiny_test")
HF_CONFIG = {"model_type": "clip", "text_config": {"num_attention_heads": 2, "eos_token_id": 63},
             "vision_config": {"num_attention_heads": 2}}
OPEN_CONFIG = {"model_cfg": {"embed_dim": 12, "quick_gelu": True, "vision_cfg": {"width": 16, "head_width": 8},
                             "text_cfg": {"heads": 2}}, "preprocess_cfg": {}}


@pytest.fixture(scope="module")
def tiny(random_weights):
  return random_weights(TINY)


def arrays_of(weights, layout: str) -> dict:
  rules = names.expand(clip_names.table(layout, weights.spec), 0)
  flat = {name: np.asarray(leaf) for name, leaf in tree.flatten(weights.params).items()}
  return {name: np.asarray(array, order="C") for name, array in names.from_native(rules, flat, 0).items()}


def folder(path, arrays: dict, config: dict | None, preprocessor: dict | None = None, name="model.safetensors"):
  """A folder as of the hub; the configuration's name goes with the file's."""
  path.mkdir(exist_ok=True)
  safetensors.numpy.save_file(arrays, path / name, {"format": "pt"})
  for file, value in (("open_clip_config.json" if name.startswith("open") else "config.json", config),
                      ("preprocessor_config.json", preprocessor)):
    if value is not None:
      (path / file).write_text(json.dumps(value))
  return path


def refused(words: str, *args, **options):
  with pytest.raises(WeightsError) as error:
    load_weights(*args, **options)
  message = str(error.value)
  assert "\n" not in message and words in message and len(message) < 600, message


# --- Goldens --------------------------------------------------------------------------------------------------------

def sites_near(golden, weights, io: str, ids: str, places: dict):
  """Sites, features and logits of a golden; of texts up to their ends, since transformers masks the padding."""
  wanted = {name: value for name, value in np.load(golden(io)).items()}
  out, sites = run(weights.spec, weights.params, Towers(wanted["images"].transpose(0, 2, 3, 1), np.int32(wanted[ids])))
  inside = (np.arange(wanted[ids].shape[1]) <= wanted[ids].argmax(-1)[:, None])[..., None]
  for name, site in places.items():
    shown = inside if site.startswith("text/") and wanted[name].ndim == 3 else 1
    near(name, sites[site] * shown, wanted[name] * shown)
  near("image", out.image, wanted["image_features_unnormalised"])
  near("text", out.text, wanted["text_features_unnormalised"])
  images, texts = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(np.asarray, out))
  near("logits", np.exp(weights.params["logit_scale"]) * images @ texts.T, wanted["logits"])


def test_golden_hugging_face(golden):
  """A folder as transformers saves it, its configuration without defaults; texts are padded with their end."""
  weights = load_weights(golden("checkpoints/hf_clip"))
  spec = weights.spec
  assert (spec.heads, spec.text_heads, spec.gelu, spec.norm_eps, spec.vocabulary) == (4, 4, "quick", 1e-5, 1024)
  p, io = weights.preprocessing, np.load(golden("checkpoints/hf_clip/io.npz"))
  assert (p.image_size, p.interpolation, p.crop, p.crop_fraction, p.mean, p.std) == (
      32, "bicubic", "center", 1.0, CLIP_MEAN, CLIP_STD)
  blocks = {f"{theirs}_block_{i}": f"{ours}/block_{i:02d}/out" for i in range(3)
            for theirs, ours in (("vision", "image"), ("text", "text"))}
  pixels = np.stack([image.preprocess(picture, p) for picture in io["raw_uint8_nhwc"]])
  near("pixels", image.normalise(pixels, p), io["images"].transpose(0, 2, 3, 1))
  assert (io["input_ids"][:, -1] == 1023).all()  # argmax is the first end, although padding is the same
  sites_near(golden, weights, "checkpoints/hf_clip/io.npz", "input_ids", blocks | {
      "vision_embeddings": "image/embed_norm", "vision_tokens": "image/block_02/out", "vision_pooled": "image/pooled",
      "text_tokens": "text/norm", "text_pooled": "text/pooled"})


def test_golden_openai(golden):
  """The archive of torch.jit.save and the state dict, in half precision, are the same weights; a ResNet is refused."""
  archive, plain = (load_weights(golden(f"checkpoints/openai_clip/vit_{kind}.pt")) for kind in ("jit", "state_dict"))
  assert archive.hash == plain.hash and archive.spec == plain.spec and archive.image_hash == plain.image_hash
  assert (archive.spec.heads, archive.spec.text_heads, archive.spec.gelu) == (2, 1, "quick")
  assert {leaf.dtype for leaf in tree.flatten(archive.params).values()} == {np.dtype("float32")}
  places = {f"{theirs}_block_{i}": f"{ours}/block_{i:02d}/out" for i in range(2)
            for theirs, ours in (("vision", "image"), ("text", "text"))}
  sites_near(golden, archive, "checkpoints/openai_clip/io_vit.npz", "tokens_ids", places | {
      "vision_embeddings_after_ln_pre": "image/embed_norm", "vision_ln_post": "image/pooled",
      "text_ln_final": "text/norm"})
  for kind in ("jit", "state_dict"):
    refused("has a ResNet as its image tower", golden(f"checkpoints/openai_clip/rn_{kind}.pt"))


# --- One CLIP in every layout ---------------------------------------------------------------------------------------

def test_the_same_weights_from_every_layout(tmp_path, tiny):
  openai = arrays_of(tiny, "openai")
  extra = {name: np.array(n, np.int64) for name, n in (("input_resolution", 16), ("context_length", 16),
                                                       ("vocab_size", 64))}
  custom = {n if n.startswith("visual.") or n == "logit_scale" else f"text.{n}": a for n, a in openai.items()}
  hf = arrays_of(tiny, "huggingface_clip")
  ids = {f"{tower}_model.embeddings.position_ids": np.arange(16)[None] for tower in ("text", "vision")}
  heads = {"heads": (2, 2)}
  found = {
      "state dict": load_weights(save(tmp_path / "a.pt", openai | extra), **heads),
      "torchscript": load_weights(scripted(tmp_path / "b.pt", openai | extra), architecture="clip_tiny_test"),
      "parallel": load_weights(save(tmp_path / "c.pt", {f"module.{n}": a for n, a in openai.items()}), **heads),
      "open_clip": load_weights(folder(tmp_path / "d", openai, OPEN_CONFIG, name="open_clip_model.safetensors")),
      "open_clip's file": load_weights(tmp_path / "d" / "open_clip_model.safetensors"),
      "CustomTextCLIP": load_weights(folder(tmp_path / "e", custom | {"text.attn_mask": np.zeros((16, 16), np.float32)},
                                            OPEN_CONFIG, name="open_clip_model.safetensors")),
      "hugging face": load_weights(folder(tmp_path / "f", hf | ids, HF_CONFIG)),
      "bare": load_weights(folder(tmp_path / "g", hf, None), **heads),
      "ours": load_weights(save_weights(tiny, tmp_path / "h.safetensors"))}
  for name, weights in found.items():
    assert weights.spec == TINY, name
    assert weights.hash == found["ours"].hash == tiny.hash and weights.image_hash == found["ours"].image_hash, name
  for name, leaf in tree.flatten(tiny.params).items():
    assert np.array_equal(tree.flatten(found["ours"].params)[name], leaf) and leaf.shape == np.shape(
        tree.flatten(found["hugging face"].params)[name]), name
  refused("pass heads=(of images, of texts) or an architecture=", tmp_path / "a.pt")
  refused("the text tower cannot be told", tmp_path / "a.pt", heads=2)
  refused("asked for 4 attention heads in the image tower; the configuration has 2", tmp_path / "f", heads=(4, 2))
  refused("16 is to have 3 attention heads", tmp_path / "a.pt", heads=(3, 2))


def test_half_precision_is_read_as_float32(tmp_path, tiny):
  arrays = {name: array.astype(np.float16) for name, array in arrays_of(tiny, "huggingface_clip").items()}
  params = tree.flatten(load_weights(folder(tmp_path / "a", arrays, HF_CONFIG)).params)
  for name, leaf in tree.flatten(tiny.params).items():
    assert params[name].dtype == np.float32 and np.array_equal(params[name], leaf.astype(np.float16)), name


# --- What configurations say ----------------------------------------------------------------------------------------

def changed(config: dict, *path, **values) -> dict:
  """The configuration with other values at a place; None removes one."""
  config = json.loads(json.dumps(config))
  place = config
  for name in path:
    place = place[name]
  place |= values
  return config


def test_gelu_is_the_checkpoints(tmp_path, tiny, caplog):
  openai, hf = arrays_of(tiny, "openai"), arrays_of(tiny, "huggingface_clip")
  open_clip = lambda config: folder(tmp_path / "o", openai, config, name="open_clip_model.safetensors")
  for config, expected in ((OPEN_CONFIG, "quick"), (changed(OPEN_CONFIG, "model_cfg", quick_gelu=False), "erf")):
    assert load_weights(open_clip(config)).spec.gelu == expected
  for act, expected in (("gelu", "erf"), ("quick_gelu", "quick"), ("gelu_new", "tanh")):
    config = changed(changed(HF_CONFIG, "text_config", hidden_act=act), "vision_config", hidden_act=act)
    assert load_weights(folder(tmp_path / "h", hf, config)).spec.gelu == expected
  assert "GELU" not in caplog.text
  for file, expected in ((save(tmp_path / "a.pt", openai), "quick"), (folder(tmp_path / "s", openai, None), "erf")):
    caplog.clear()
    weights = load_weights(file, heads=(2, 2))
    assert weights.spec.gelu == expected and "GELU" in caplog.text
    assert load_weights(file, heads=(2, 2), gelu="erf").spec.gelu == "erf"
  refused("hidden_act 'relu' is not supported", folder(tmp_path / "h", hf, changed(HF_CONFIG, "text_config",
                                                                                      hidden_act="relu")))
  refused("['gelu', 'quick_gelu']", folder(tmp_path / "h", hf, changed(HF_CONFIG, "text_config", hidden_act="gelu")))


def test_configurations_of_hugging_face(tmp_path, tiny):
  hf = arrays_of(tiny, "huggingface_clip")
  load = lambda config: folder(tmp_path / "h", hf, config)
  for end in (2, 63):  # 2 is what old configurations say
    assert load_weights(load(changed(HF_CONFIG, "text_config", eos_token_id=end))).spec == TINY
  older = changed(HF_CONFIG, text_config=None, vision_config={}, text_config_dict=HF_CONFIG["text_config"],
                  vision_config_dict=HF_CONFIG["vision_config"])
  assert load_weights(load(older)).spec == TINY
  both = changed(changed(HF_CONFIG, "text_config", layer_norm_eps=1e-6), "vision_config", layer_norm_eps=1e-6)
  assert load_weights(load(both)).spec.norm_eps == 1e-6
  refused("reads texts at token 7; expected the last of the vocabulary, 63", load(
      changed(HF_CONFIG, "text_config", eos_token_id=7)))
  refused("image tower of width 16 is to have 12 attention heads", load(changed(HF_CONFIG, vision_config={})))
  refused("describes a 'siglip'", load(changed(HF_CONFIG, model_type="siglip")))
  refused("configuration", load(changed(HF_CONFIG, text_config=7)))
  refused("LayerNorm eps 0.0", load(changed(changed(HF_CONFIG, "text_config", layer_norm_eps=0), "vision_config",
                                            layer_norm_eps=0)))


def test_preprocessing_belongs_to_the_checkpoint(tmp_path, tiny, caplog):
  hf, openai = arrays_of(tiny, "huggingface_clip"), arrays_of(tiny, "openai")
  of = lambda preprocessor: load_weights(folder(tmp_path / "h", hf, HF_CONFIG, preprocessor)).preprocessing
  usual = load_weights(save(tmp_path / "a.pt", openai | {"input_resolution": np.array(16)}), heads=(2, 2)).preprocessing
  assert usual.describe() == f"16 px, bicubic, center crop 1, mean {CLIP_MEAN}, std {CLIP_STD}"
  assert of({}) == of({"size": 224, "crop_size": 224, "resample": 3}) == of({"size": {"shortest_edge": 224}}) == usual
  assert not caplog.records
  other = of({"size": {"height": 16, "width": 16}, "crop_size": 16, "resample": 2, "image_mean": [0, 0, 0]})
  assert (other.crop, other.interpolation, other.mean, other.std) == ("squash", "bilinear", (0, 0, 0), CLIP_STD)
  open_clip = lambda **values: folder(tmp_path / "o", openai, changed(OPEN_CONFIG, preprocess_cfg=values),
                                      name="open_clip_model.safetensors")
  assert load_weights(open_clip()).preprocessing == usual
  squashed = load_weights(open_clip(resize_mode="squash", interpolation="bilinear", std=[1, 1, 1])).preprocessing
  assert (squashed.crop, squashed.interpolation, squashed.std) == ("squash", "bilinear", (1, 1, 1))
  refused("resize_mode 'longest'", open_clip(resize_mode="longest"))
  (tmp_path / "h" / "preprocessor_config.json").unlink()
  assert load_weights(tmp_path / "h").preprocessing == usual and "no preprocessing is stored" in caplog.text


# --- Towers ---------------------------------------------------------------------------------------------------------

def test_an_image_tower_alone_is_a_vit(tmp_path, tiny):
  """As Hugging Face's CLIPVisionModel; texts need a CLIP."""
  hf = {name: array for name, array in arrays_of(tiny, "huggingface_clip").items() if name.startswith("vis")}
  config = {"model_type": "clip_vision_model", "num_attention_heads": 2}
  weights = load_weights(folder(tmp_path / "h", hf, config))
  assert weights.spec == TINY.image and weights.hash == image_tower(tiny).hash and not weights.image_hash
  openai = {name: array for name, array in arrays_of(tiny, "openai").items() if name.startswith("visual")}
  assert load_weights(save(tmp_path / "a.pt", openai), heads=2).hash == weights.hash
  with pytest.raises(ValueError, match="an image and a text tower"):
    methods.build("zero_shot", weights.spec)
  refused("you asked for clip_tiny_test (image tower", tmp_path / "h", architecture="clip_tiny_test")
  text = {name: array for name, array in arrays_of(tiny, "huggingface_clip").items() if name.startswith("text")}
  refused("this is a text tower alone", folder(tmp_path / "t", text, {"model_type": "clip_text_model"}))


def test_resolution_changes_the_image_tower_alone(tmp_path, tiny):
  file = save_weights(tiny, tmp_path / "a.safetensors")
  half = load_weights(file, image_size=8)
  assert half.spec == TINY.at_resolution(8) and half.preprocessing.image_size == 8
  assert half.params["image"]["pos"].shape == (1, 5, 16) and half.params["text"]["pos"].shape == (16, 24)
  assert np.array_equal(half.params["image"]["pos"][:, 0], tiny.params["image"]["pos"][:, 0])
  assert half.hash == tiny.hash and image_tower(half).hash == image_tower(tiny).hash
  assert image_tower(half).spec == TINY.image.at_resolution(8)
  refused("multiple of the patch size 4", file, image_size=10)


def test_an_image_tower_of_its_own(tiny):
  tower = image_tower(tiny)
  assert tower.spec == TINY.image and tower.params is tiny.params["image"] and tower.hash != tiny.hash
  assert (tower.name, tower.source, tower.preprocessing) == (tiny.name, tiny.source, tiny.preprocessing)


def test_the_architecture_that_was_asked_for(tmp_path, tiny):
  file = save_weights(tiny, tmp_path / "a.safetensors")
  refused("is a clip_tiny_test", file, architecture="clip_vit_b16")
  refused("is a clip_tiny_test", file, architecture="vit_tiny_test")
  refused("groups belongs to a ResNet", file, groups=4)
  refused("you asked for attention heads (4, 2); the file has (2, 2)", file, heads=(4, 2))
  assert load_weights(file, heads=(2, 2), gelu="erf").spec.gelu == "erf"


# --- Written back ---------------------------------------------------------------------------------------------------

def test_timm_gets_the_image_tower_and_gives_it_back(tmp_path, tiny, caplog):
  """Under timm's names norm_pre is there and the patches have no bias; eps and GELU survive."""
  for what in (tiny, image_tower(tiny)):
    file = export_timm(what, tmp_path / "timm")
    again = load_weights(tmp_path / "timm")
    assert again.spec == TINY.image and again.hash == image_tower(tiny).hash
  assert "image tower alone" in caplog.text
  arrays = safetensors.numpy.load_file(file)
  assert "norm_pre.weight" in arrays and "patch_embed.proj.bias" not in arrays
  config = json.loads((tmp_path / "timm" / "config.json").read_text())
  assert config["model_args"]["pre_norm"] and "_clip_" in config["architecture"]
  config.pop("transferlab")  # as timm's own files: built with torch's eps
  bare = folder(tmp_path / "bare", arrays, config)
  assert load_weights(bare).spec.norm_eps == 1e-5
  config["model_args"].pop("act_layer")
  config["architecture"] = "vit_base_patch16_clip_quickgelu_224"
  assert load_weights(folder(bare, arrays, config)).spec.gelu == "quick"
  arrays.pop("norm_pre.weight")
  refused("unexpected: norm_pre.bias", folder(bare, arrays, config))


def test_the_command_converts_and_describes_a_clip(tmp_path, tiny, capsys):
  file = save_weights(tiny, tmp_path / "a.safetensors")
  cli.main(["transferlab", "convert", f"--backbone={file}", f"--out={tmp_path / 'b.safetensors'}"])
  assert load_weights(tmp_path / "b.safetensors").hash == image_tower(tiny).hash
  folder(tmp_path / "h", arrays_of(tiny, "huggingface_clip"), HF_CONFIG)
  for source in (file, tmp_path / "h", "clip_vit_b16.openai"):
    capsys.readouterr()
    cli.main(["transferlab", "info", f"--backbone={source}", "--sites", "--json"])
    sites = json.loads(capsys.readouterr().out)
    assert {"image/embed_norm", "image/projected", "text/norm", "text/projected"} <= sites.keys()
  cli.main(["transferlab", "info", f"--backbone={file}", "--method=linear", "--json"])
  assert json.loads(capsys.readouterr().out.splitlines()[-1])["method"] == "linear"


def test_adapters_of_before_these_fields_are_still_accepted(tiny):
  """Their backbone's spec has no patch_bias and embed_norm; an image tower's differs from the plain ViT's."""
  spec = backbones.architecture("vit_tiny_test")
  plain = tiny._replace(spec=spec, hash="1" * 64)
  older = {name: value for name, value in spec.to_dict().items() if name not in ("patch_bias", "embed_norm")}
  adapter = Adapter(None, {}, {}, ("a",), None, {"name": "old", "hash": "1" * 64, "spec": older}, {})
  check_backbone(adapter, plain)
  with pytest.raises(ValueError, match="differ in .*patch_bias True and False, embed_norm False and True"):
    check_backbone(adapter, image_tower(tiny))


def test_the_hubs_copies_for_open_clip(tmp_path, tiny, monkeypatch):
  """timm's copies of OpenAI's CLIPs have no model.safetensors; what has one is not fetched twice."""
  asked = []
  def snapshot_download(repository, allow_patterns, **options):
    asked.append((repository, "open_clip_model.safetensors" in allow_patterns))
    return tmp_path / repository
  monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
  (tmp_path / "me").mkdir()
  folder(tmp_path / "me" / "theirs", arrays_of(tiny, "openai"), OPEN_CONFIG, name="open_clip_model.safetensors")
  (tmp_path / "me" / "theirs" / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')
  folder(tmp_path / "me" / "hf", arrays_of(tiny, "huggingface_clip"), HF_CONFIG)
  theirs, hf = load_weights("hf:me/theirs"), load_weights("hf:me/hf")
  assert theirs.hash == hf.hash == tiny.hash and theirs.name == "theirs"
  assert asked == [("me/theirs", False), ("me/theirs", True), ("me/hf", False)]
  (tmp_path / "timm").mkdir()
  (tmp_path / "me" / "theirs").rename(tmp_path / "timm" / "vit_base_patch32_clip_224.openai")
  refused("is a clip_tiny_test", "clip_vit_b32.openai")


# --- What is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, shape, words", [
    ("visual.trunk.patch_embed.proj.weight", (2, 2), "an image tower of timm's"), ("logit_bias", (1,), "SigLIP"),
    ("visual.transformer.resblocks.0.ls_1.gamma", (16,), "layer scale"), ("visual.attn_pool.query", (1, 2), "pooling"),
    ("text_decoder.ln_final.weight", (2,), "decoder"), ("visual.extra", (3,), "unexpected: visual.extra"),
    ("visual.ln_post.bias", (15,), "mis-shaped: visual.ln_post.bias [15] instead of [16]"),
    ("visual.positional_embedding", (12, 16), "12 rows"), ("visual.conv1.weight", (16, 1, 4, 4), "1 channels"),
    ("visual.transformer.resblocks.300.ln_1.bias", (16,), "301 blocks; expected 1 to 256"),
    ("text_projection", (24,), "expected 2 dimensions"), ("visual.proj", (16, 13), "mis-shaped: visual.proj [16, 13]"),
    ("token_embedding.weight", (64, 25), "heads"), ("ln_final.bias", None, "missing: ln_final.bias"),
    ("visual.class_embedding", None, "without an image tower"), ("positional_embedding", None, "is missing"),
    ("transformer.resblocks.0.mlp.c_fc.weight", None, "is missing"), ("logit_scale", None, "missing: logit_scale")])
def test_other_networks_and_damage_are_named(tmp_path, tiny, name, shape, words):
  arrays = arrays_of(tiny, "openai")
  arrays.pop(name, None)
  if shape:
    arrays[name] = np.ones(shape, np.float32)
  refused(words, save(tmp_path / "odd.pt", arrays), heads=(2, 2))


@pytest.mark.parametrize("path, values, words", [
    (("model_cfg", "vision_cfg"), {"pool_type": "avg"}, "pool_type='avg'"),
    (("model_cfg", "text_cfg"), {"no_causal_mask": True}, "no_causal_mask=True"),
    (("model_cfg", "text_cfg"), {"norm_kwargs": {"eps": 1e-6}}, "norm_kwargs"),
    (("model_cfg", "text_cfg"), {"heads": 5}, "24 is to have 5 attention heads"),
    (("model_cfg", "vision_cfg"), {"head_width": 0}, "configuration")])
def test_configurations_of_open_clip_that_hide_another_network(tmp_path, tiny, path, values, words):
  config = changed(OPEN_CONFIG, *path, **values)
  refused(words, folder(tmp_path / "o", arrays_of(tiny, "openai"), config, name="open_clip_model.safetensors"))


def test_headers_of_ours_that_describe_too_much(tmp_path, tiny):
  file = save_weights(tiny, tmp_path / "a.safetensors")
  arrays = safetensors.numpy.load_file(file)
  preprocessing = tiny.preprocessing.to_dict()
  for change, words in (({"text_depth": 10**6}, "1000000 blocks"), ({"depth": 4}, "missing: image/block_03"),
                        ({"context": 9}, "mis-shaped: text/pos"), ({"colour": 1}, "colour")):
    header = json.dumps({"spec": TINY.to_dict() | change, "preprocessing": preprocessing})
    safetensors.numpy.save_file(arrays, file, {"transferlab": header})
    refused(words, file)


def test_a_cut_archive_is_refused(tmp_path, tiny):
  whole = scripted(tmp_path / "good.pt", arrays_of(tiny, "openai")).read_bytes()
  bad = tmp_path / "bad.pt"
  for length in (0, 100, len(whole) // 2, len(whole) - 1):
    bad.write_bytes(whole[:length])
    refused("bad.pt", bad)
