"""How others name and lay out a ViT's parameters: one table per layout, read in both directions.

A row says which arrays of a file make one of our parameters and how. `to_native` and `from_native` follow the same
rows, so what one direction does the other undoes bit for bit.

    layout       dense kernels   patch kernel   q, k, v                                  source
    native       (in, out)       [p, p, 3, D]   one [D, 3D]: q, k, v, each by head       `backbones/vit.py`
    timm         (out, in)       [D, 3, p, p]   one [3D, D]                              timm vision_transformer.py
    huggingface  (out, in)       [D, 3, p, p]   three [D, D]                             transformers modeling_vit.py
    google       (in, out)       [p, p, 3, D]   three [D, H, D/H], output [H, D/H, D]    vit_jax, big_vision
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
  """load: the file's arrays -> our array; store: (our array, heads H) -> the file's arrays."""
  load: Callable[[Sequence[np.ndarray]], np.ndarray]
  store: Callable[[np.ndarray, int], Sequence[np.ndarray]]


class Rule(NamedTuple):
  """One parameter: our name, the file's names, and what happens on the way. "{i}" stands for the block."""
  native: str
  foreign: tuple[str, ...]
  transform: Transform

  def at(self, block: int) -> "Rule":
    return Rule(self.native.format(i=block), tuple(name.format(i=block) for name in self.foreign), self.transform)


SAME = Transform(lambda a: a[0], lambda x, heads: (x,))
TRANSPOSED = Transform(lambda a: a[0].T, lambda x, heads: (x.T,))  # (out, in) <-> (in, out)
CONVOLUTION = Transform(                                           # [D, 3, p, p] <-> [p, p, 3, D]
    lambda a: a[0].transpose(2, 3, 1, 0), lambda x, heads: (x.transpose(3, 2, 0, 1),))
POINTWISE = Transform(                                             # [C, D, 1, 1] <-> [D, C]
    lambda a: a[0][:, :, 0, 0].T, lambda x, heads: (x.T[:, :, None, None],))
POINTWISE_BIT = Transform(lambda a: a[0][0, 0], lambda x, heads: (x[None, None],))  # [1, 1, D, C] <-> [D, C]
THREE = Transform(np.concatenate, lambda x, heads: np.split(x, 3))  # 3 x [D] <-> [3D]
THREE_TRANSPOSED = Transform(                                      # 3 x [D, D] <-> [D, 3D]
    lambda a: np.concatenate([x.T for x in a], axis=1),
    lambda x, heads: [part.T for part in np.split(x, 3, axis=1)])
THREE_BY_HEAD = Transform(                                         # 3 x [D, H, D/H] <-> [D, 3D]
    lambda a: np.concatenate([x.reshape(len(x), -1) for x in a], axis=1),
    lambda x, heads: [part.reshape(len(x), heads, -1) for part in np.split(x, 3, axis=1)])
THREE_BIASES_BY_HEAD = Transform(                                  # 3 x [H, D/H] <-> [3D]
    lambda a: np.concatenate([x.reshape(-1) for x in a]),
    lambda x, heads: [part.reshape(heads, -1) for part in np.split(x, 3)])
OUT_BY_HEAD = Transform(                                           # [H, D/H, D] <-> [D, D]
    lambda a: a[0].reshape(-1, a[0].shape[-1]),
    lambda x, heads: (x.reshape(heads, -1, x.shape[-1]),))


def _table(rows) -> tuple[Rule, ...]:
  return tuple(Rule(native, (foreign,) if isinstance(foreign, str) else tuple(foreign), transform)
               for native, foreign, transform in rows)


def native() -> tuple[Rule, ...]:
  """Our own names, as `save_weights` writes them."""
  leaves = ["ln1/scale", "ln1/bias", "qkv/kernel", "qkv/bias", "proj/kernel", "proj/bias",
            "ln2/scale", "ln2/bias", "fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias"]
  names = ["patch_kernel", "patch_bias", "cls", "pos", "embed_norm/scale", "embed_norm/bias", "norm/scale", "norm/bias"]
  return _table((name, name, SAME) for name in names + [f"block_{{i:02d}}/{leaf}" for leaf in leaves])


def timm(norm: str = "norm", embed_norm: bool = False) -> tuple[Rule, ...]:
  """timm's names; `norm` is "fc_norm" where the tokens are averaged before the final norm. CLIP's image tower has an
  `embed_norm` and no bias of patches."""
  block = lambda ours, theirs, weight: [(f"block_{{i:02d}}/{ours}/{'scale' if weight is SAME else 'kernel'}",
                                         f"blocks.{{i}}.{theirs}.weight", weight),
                                        (f"block_{{i:02d}}/{ours}/bias", f"blocks.{{i}}.{theirs}.bias", SAME)]
  return _table([
      ("patch_kernel", "patch_embed.proj.weight", CONVOLUTION),
      *([("embed_norm/scale", "norm_pre.weight", SAME), ("embed_norm/bias", "norm_pre.bias", SAME)] if embed_norm else
        [("patch_bias", "patch_embed.proj.bias", SAME)]),
      ("cls", "cls_token", SAME), ("pos", "pos_embed", SAME),
      *block("ln1", "norm1", SAME), *block("qkv", "attn.qkv", TRANSPOSED), *block("proj", "attn.proj", TRANSPOSED),
      *block("ln2", "norm2", SAME), *block("fc1", "mlp.fc1", TRANSPOSED), *block("fc2", "mlp.fc2", TRANSPOSED),
      ("norm/scale", f"{norm}.weight", SAME), ("norm/bias", f"{norm}.bias", SAME)])


def huggingface(prefix: str = "vit.") -> tuple[Rule, ...]:
  """Hugging Face's ViT; `prefix` is "" in checkpoints of the bare model."""
  layer = prefix + "encoder.layer.{i}."
  three = lambda leaf: [f"{layer}attention.attention.{part}.{leaf}" for part in ("query", "key", "value")]
  block = lambda ours, theirs, weight: [(f"block_{{i:02d}}/{ours}/{'scale' if weight is SAME else 'kernel'}",
                                         f"{layer}{theirs}.weight", weight),
                                        (f"block_{{i:02d}}/{ours}/bias", f"{layer}{theirs}.bias", SAME)]
  patch = f"{prefix}embeddings.patch_embeddings.projection"
  return _table([
      ("patch_kernel", f"{patch}.weight", CONVOLUTION), ("patch_bias", f"{patch}.bias", SAME),
      ("cls", f"{prefix}embeddings.cls_token", SAME), ("pos", f"{prefix}embeddings.position_embeddings", SAME),
      *block("ln1", "layernorm_before", SAME),
      ("block_{i:02d}/qkv/kernel", three("weight"), THREE_TRANSPOSED), ("block_{i:02d}/qkv/bias", three("bias"), THREE),
      *block("proj", "attention.output.dense", TRANSPOSED), *block("ln2", "layernorm_after", SAME),
      *block("fc1", "intermediate.dense", TRANSPOSED), *block("fc2", "output.dense", TRANSPOSED),
      ("norm/scale", f"{prefix}layernorm.weight", SAME), ("norm/bias", f"{prefix}layernorm.bias", SAME)])


def google(old: bool) -> tuple[Rule, ...]:
  """Google's names: `old` is vit_jax, which numbers a block's modules; big_vision numbers the modules of each kind."""
  attention, ln2, mlp = (1, 2, 3) if old else (0, 1, 0)
  layer = "Transformer/encoderblock_{i}/"
  heads, dense = f"{layer}MultiHeadDotProductAttention_{attention}/", f"{layer}MlpBlock_{mlp}/Dense_"
  three = lambda leaf: [f"{heads}{part}/{leaf}" for part in ("query", "key", "value")]
  pair = lambda ours, theirs, first, transform=SAME: [(f"{ours}/{first}", f"{theirs}/{first}", transform),
                                                      (f"{ours}/bias", f"{theirs}/bias", SAME)]
  return _table([
      ("patch_kernel", "embedding/kernel", SAME), ("patch_bias", "embedding/bias", SAME), ("cls", "cls", SAME),
      ("pos", "Transformer/posembed_input/pos_embedding" if old else "pos_embedding", SAME),
      *pair("block_{i:02d}/ln1", f"{layer}LayerNorm_0", "scale"),
      ("block_{i:02d}/qkv/kernel", three("kernel"), THREE_BY_HEAD),
      ("block_{i:02d}/qkv/bias", three("bias"), THREE_BIASES_BY_HEAD),
      *pair("block_{i:02d}/proj", f"{heads}out", "kernel", OUT_BY_HEAD),
      *pair("block_{i:02d}/ln2", f"{layer}LayerNorm_{ln2}", "scale"),
      *pair("block_{i:02d}/fc1", f"{dense}0", "kernel"), *pair("block_{i:02d}/fc2", f"{dense}1", "kernel"),
      *pair("norm", "Transformer/encoder_norm", "scale")])


HEADS = {  # classifiers, optional in every layout
    "native": _table([("kernel", "head/kernel", SAME), ("bias", "head/bias", SAME),
                      ("pre_logits/kernel", "head/pre_logits/kernel", SAME),
                      ("pre_logits/bias", "head/pre_logits/bias", SAME)]),
    "timm": _table([("kernel", "head.weight", TRANSPOSED), ("bias", "head.bias", SAME)]),
    "huggingface": _table([("kernel", "classifier.weight", TRANSPOSED), ("bias", "classifier.bias", SAME)]),
    "timm_resnet": _table([("kernel", "fc.weight", TRANSPOSED), ("bias", "fc.bias", SAME)]),
    "timm_resnetv2": _table([("kernel", "head.fc.weight", POINTWISE), ("bias", "head.fc.bias", SAME)]),
    "timm_swin": _table([("kernel", "head.fc.weight", TRANSPOSED), ("bias", "head.fc.bias", SAME)]),
    "swin": _table([("kernel", "head.weight", TRANSPOSED), ("bias", "head.bias", SAME)]),
    "bit": _table([("kernel", "resnet/head/conv2d/kernel", POINTWISE_BIT), ("bias", "resnet/head/conv2d/bias", SAME)]),
    "google": _table([("kernel", "head/kernel", SAME), ("bias", "head/bias", SAME),
                      ("pre_logits/kernel", "pre_logits/kernel", SAME), ("pre_logits/bias", "pre_logits/bias", SAME)]),
}


def expand(rules: Sequence[Rule], depth: int) -> dict[str, Rule]:
  """{our name: rule} with the rows of a block repeated for `depth` blocks."""
  rows = (row for rule in rules for row in ([rule.at(i) for i in range(depth)] if "{i" in rule.native else [rule]))
  return {row.native: row for row in rows}


def to_native(rules: dict[str, Rule], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{our name: contiguous array} of a file's arrays, whose names and shapes must have been checked.

  What is converted leaves `arrays`, so that a large file is not held twice.
  """
  load = lambda rule: np.asarray(rule.transform.load([arrays.pop(name) for name in rule.foreign]), order="C")
  return {name: load(rule) for name, rule in rules.items()}


def from_native(rules: dict[str, Rule], params: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
  """{the file's name: array} of our flat parameters; inverse of `to_native`."""
  return {f: array for name, value in params.items()
          for f, array in zip(rules[name].foreign, rules[name].transform.store(value, heads), strict=True)}


def foreign_shapes(rules: dict[str, Rule], shapes: dict[str, tuple], heads: int) -> dict[str, tuple[int, ...]]:
  """The shapes a file must have for our parameters to have `shapes`; nothing is allocated."""
  dummies = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  return {name: array.shape for name, array in from_native(rules, dummies, heads).items()}
