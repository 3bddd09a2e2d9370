"""Which activations Head2Toe reads, and how many features each of them gives (Evci et al. 2022, arXiv 2201.03529;
google-research/head2toe @ 6277f63, called "the code" here).

Which activations of a ViT the paper taps is known by name and number only. Our reading of the names, per block:
pre_attn is the first norm's output, attn the attention branch, mlp_1 the MLP's hidden layer before its GELU, mlp_2 the
MLP's output. cls_embedded is the class token after the final norm, which on most ViTs pre_logits is too: it stays,
since with it the numbers of features are the code's (ViT-B/16: 68352, 374784, 1254912 at T = 512, 8192, 24576).

The paper has no Swin. Here the same places of its blocks are tapped, and pooled as the maps that they are.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transferlab.backbones import abstract_params, sites as shapes_of
from transferlab.method import Read
from transferlab.methods.head2toe_features import Layout, pool
from transferlab.methods.head2toe_resnet import resnet_taps
from transferlab.tree import nearest


class Reader(NamedTuple):
  """What is read: the layout of all features, and {tap: Read} of its layers, pooled to [B, n] each."""
  layout: Layout
  reads: dict[str, Read]

  def join(self, carry):
    """All layers of a carry {tap: [B, n]} side by side, [B, N]."""
    return jnp.concatenate([carry[tap] for tap in self.layout.names], axis=-1)


def taps(spec, sites: str | tuple, shapes: dict) -> dict[str, Read]:
  """{name: Read} of the activations to read, in the order of their features; "paper" gives the code's names."""
  if sites != "paper":
    found = {site: Read(site) for site in ((sites,) if isinstance(sites, str) else sites)}
  elif spec.family == "resnet":
    found = {name: Read(site) for name, site in resnet_taps(spec).items()}
  else:
    found = {"pre_logits": Read("pooled"), "root_output_with_cls": Read("patch"),
             "position_embedded_input": Read("embed")}
    for i in range(spec.depth):
      for name, place in (("pre_attn", "ln1"), ("attn", "attn"), ("mlp_1", "fc1"), ("mlp_2", "mlp")):
        found[f"encoder_{i}_{name}"] = Read(f"block_{i:02d}/{place}")
    found["encoded_sequence"] = Read("norm")
    if spec.prefix_tokens and shapes["norm"].shape[1] > 1:
      found["cls_embedded"] = Read("norm", "cls")
  for read in found.values():
    if read.site not in shapes:
      raise ValueError(f"site {read.site!r} is not in {spec.name}; nearest: {', '.join(nearest(read.site, shapes))}")
    if spec.family == "swin" and len(shapes[read.site].shape) == 4:
      raise ValueError(f"site {read.site!r} of {spec.name} is cut into windows; expected one of whole maps, such as "
                       f"{read.site.partition('/')[0]}/ln1 or {read.site.partition('/')[0]}/attn")
  if not found:
    raise ValueError("sites is empty; expected 'paper' or names of sites")
  return found


def reader(spec, sites: str | tuple, target_size: int, cls: str) -> Reader:
  """The reader of a backbone, with the options of `all_features`."""
  shapes = shapes_of(spec)

  def reduce(read, y, frozen):  # [B, T, D'], [B, W, W, D'] or [B, D'] -> [B, n]
    if read.site == "patch" and spec.prefix_tokens:  # the code taps the patches with the class token in front
      token = jnp.broadcast_to(frozen["cls"], (y.shape[0], 1, y.shape[2])).astype(y.dtype)
      y = jnp.concatenate([token, y], axis=1)
    if spec.family == "swin" and y.ndim == 3:  # tokens are the pixels of a square map
      y = y.reshape(y.shape[0], math.isqrt(y.shape[1]), -1, y.shape[2])
    return pool(y[:, :1], target_size) if read.how == "cls" else pool(y, target_size, cls)

  reads = {tap: Read(read.site, f"{read.how} pooled to {target_size} {cls}", functools.partial(reduce, read))
           for tap, read in taps(spec, sites, shapes).items()}
  size = lambda read: jax.eval_shape(read.reduce, shapes[read.site], abstract_params(spec)).shape[1]
  return Reader(Layout(tuple(reads), tuple(size(read) for read in reads.values())), reads)
