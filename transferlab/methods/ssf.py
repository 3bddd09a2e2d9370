"""SSF: a scale and a shift of every channel behind every layer (Lian et al. 2022, arXiv 2210.08823; dongzelian/SSF @
e94e0e7).

    y' = scale * y + bias        behind the patch embedding, its norm, ln1, qkv, proj, ln2, fc1 (before GELU), fc2, norm

An affine map behind a linear layer or a norm is another such layer, so everything merges. Norms are rewritten in
training, too: their output need not be kept then, and their gradient costs nothing more. Dense layers are scaled
behind; rewriting them would differentiate whole matrices. A step on ViT-B/16, 224 px, batch 32, CPU, by XLA:

    rewritten     forward passes    peak
    norms         2.04              4731 MiB
    nothing       2.04              6060 MiB
    everything    2.99              5443 MiB
"""
import jax

from transferlab import tree
from transferlab.method import Method
from transferlab.methods import classifier


def ssf(spec) -> Method:
  """SSF.

  Args:
    spec: the backbone's spec, a ViT or a Swin. Patch merging has no pair, as in the released code; nor has a projection
      without bias a shift, which could not merge.

  Trainable: {"ssf": {"patch": {"scale": [D], "bias": [D]}, "block_00": {"ln1": …, "qkv": …, "proj", "ln2", "fc1",
  "fc2"}, …, "norm": …}, "classifier"}: 205,824 numbers on ViT-B/16 without the classifier, 267,264 on Swin-B, where
  "patch_norm" has a pair as well, as has CLIP's "embed_norm". Scales are normal around 1, shifts around 0, of std 0.02:
  training starts near the frozen model. The names spare them from weight decay, as the original does. Merges.
  """
  layers = _layers(spec)

  def init(rng, frozen, num_classes):
    rng_head, rng = jax.random.split(rng)
    leaves = [(layer, leaf, width) for layer, (leaves, width) in layers.items() for leaf in leaves]
    pairs = {f"{layer}/{leaf}": (leaf == "scale") + 0.02 * jax.random.normal(key, (width,))
             for key, (layer, leaf, width) in zip(jax.random.split(rng, len(leaves)), leaves)}
    return {"ssf": tree.unflatten(pairs), "classifier": classifier.init(rng_head, spec.width, num_classes)}, {}

  def visit(trainable, ctx):
    pairs = tree.flatten(trainable["ssf"])
    def visitor(carry, site, y, x):
      if site not in layers or _is_norm(site):
        return carry, y
      return carry, (y * pairs[f"{site}/scale"] + pairs.get(f"{site}/bias", 0)).astype(y.dtype)
    return visitor

  def folded(trainable, frozen, chosen):
    """{name: array} of the parameters of some layers, with the pairs in them."""
    pairs, leaves, changes = tree.flatten(trainable["ssf"]), tree.flatten(frozen), {}
    for layer in chosen:
      weight, bias = _parameters(layer)
      scale = pairs[f"{layer}/scale"]
      changes[weight] = leaves[weight] * scale                                   # [D], or columns of [D, D']
      if bias in leaves:
        changes[bias] = leaves[bias] * scale + pairs[f"{layer}/bias"]
      elif layer == "patch":  # without a bias the shift goes where patches have their positions
        changes["pos"] = leaves["pos"].at[:, spec.prefix_tokens:].add(pairs["patch/bias"])
    return changes

  def weights(trainable, frozen):
    return tree.merge(frozen, tree.unflatten(folded(trainable, frozen, filter(_is_norm, layers))))

  def merge(trainable, frozen):
    leaves = tree.flatten(frozen)
    changes = {name: leaf.astype(leaves[name].dtype) for name, leaf in folded(trainable, frozen, layers).items()}
    return tree.merge(frozen, tree.unflatten(changes))

  return Method(name="ssf", options={}, init=init, weights=weights, visit=visit, merge=merge,
                readout=classifier.readout, writes_from=0)


def _layers(spec) -> dict:
  """{layer: ((leaf, …), width)}. A dense layer's name is its site, a norm's that of its parameters."""
  both = ("scale", "bias")
  found = {"patch": (both, spec.block(0).width)}
  if spec.family == "swin":
    found["patch_norm"] = (both, spec.block(0).width)
  elif spec.embed_norm:
    found["embed_norm"] = (both, spec.width)
  for i in range(spec.depth):
    D, block = spec.block(i).width, f"block_{i:02d}"
    found |= {f"{block}/{name}": (both, D) for name in ("ln1", "proj", "ln2", "fc2")}
    found[f"{block}/qkv"] = (both if spec.qkv_bias else ("scale",), 3 * D)
    found[f"{block}/fc1"] = (both, spec.block(i).mlp_width)
  return {**found, "norm": (both, spec.width)}


def _is_norm(layer: str) -> bool:
  return layer.rsplit("/", 1)[-1] in ("patch_norm", "embed_norm", "ln1", "ln2", "norm")


def _parameters(layer: str) -> tuple[str, str]:
  """Names of the two parameters of a layer."""
  if layer == "patch":
    return "patch_kernel", "patch_bias"
  return f"{layer}/{'scale' if _is_norm(layer) else 'kernel'}", f"{layer}/bias"
