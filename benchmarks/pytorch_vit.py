"""Vision transformers in plain PyTorch, as `vs_pytorch.py` times them: written the way PyTorch users write them.

`F.scaled_dot_product_attention`, `nn.Linear`, no activation of a frozen part in the graph (`no_grad` where nothing
below needs a gradient, `requires_grad=False` for all that does not train). Module names follow the names of our
parameters, which `load` copies.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from transferlab import tree


class Block(nn.Module):
  """Pre-norm transformer block, [B, T, D] -> [B, T, D]."""

  def __init__(self, D: int, heads: int, mlp_width: int, eps: float):
    super().__init__()
    self.heads = heads
    self.ln1, self.ln2 = nn.LayerNorm(D, eps), nn.LayerNorm(D, eps)
    self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
    self.fc1, self.fc2 = nn.Linear(D, mlp_width), nn.Linear(mlp_width, D)

  def forward(self, x):
    B, T, D = x.shape
    q, k, v = self.qkv(self.ln1(x)).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
    x = x + self.proj(a)
    return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class ViT(nn.Module):
  """Images [B, 3, S, S] to the class token after the final norm, [B, D]."""

  def __init__(self, spec):
    super().__init__()
    D, p = spec.width, spec.patch_size
    self.patch = nn.Conv2d(3, D, p, p)
    self.cls, self.pos = nn.Parameter(torch.empty(1, 1, D)), nn.Parameter(torch.empty(1, spec.tokens, D))
    self.blocks = nn.ModuleList(Block(D, spec.heads, spec.mlp_width, spec.norm_eps) for _ in range(spec.depth))
    self.norm = nn.LayerNorm(D, spec.norm_eps)

  def embed(self, images):
    x = self.patch(images).flatten(2).transpose(1, 2)
    return torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos

  def forward(self, images):
    x = self.embed(images)
    for block in self.blocks:
      x = block(x)
    return self.norm(x[:, 0])


class Full(nn.Module):
  """Everything trains."""

  def __init__(self, vit: ViT, classes: int):
    super().__init__()
    self.vit, self.head = vit, nn.Linear(vit.norm.normalized_shape[0], classes)

  def forward(self, images):
    return self.head(self.vit(images))


class Probe(Full):
  """The head alone trains."""

  def __init__(self, vit: ViT, classes: int):
    super().__init__(vit.requires_grad_(False), classes)

  def forward(self, images):
    with torch.no_grad():
      features = self.vit(images)
    return self.head(features)


class LowRankQV(nn.Module):
  """A frozen q, k, v projection with a trained pair for q and one for v."""

  def __init__(self, qkv: nn.Linear, rank: int, dropout: float):
    super().__init__()
    D = qkv.in_features
    self.qkv, self.dropout = qkv, nn.Dropout(dropout)
    make = lambda *shape: nn.Parameter(torch.zeros(*shape))
    self.q_a, self.q_b, self.v_a, self.v_b = make(D, rank), make(rank, D), make(D, rank), make(rank, D)

  def forward(self, x):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    q = q + self.dropout(x @ self.q_a) @ self.q_b
    v = v + self.dropout(x @ self.v_a) @ self.v_b
    return torch.cat([q, k, v], dim=-1)


class LoRA(Full):
  """LoRA on q and v, as Hu et al. 2022 and PETL-ViT."""

  def __init__(self, vit: ViT, classes: int, rank: int, dropout: float):
    super().__init__(vit.requires_grad_(False), classes)
    for block in vit.blocks:
      block.qkv = LowRankQV(block.qkv, rank, dropout)


class DTL(Full):
  """DTL of Fu et al. 2024: a low-rank side stream, written back after blocks M … L; mean read-out."""

  def __init__(self, vit: ViT, classes: int, rank: int, first_write: int, beta: float):
    super().__init__(vit.requires_grad_(False), classes)
    D = self.head.in_features
    self.first_write, self.beta = first_write, beta
    self.a = nn.ParameterList(torch.zeros(D, rank) for _ in vit.blocks)
    self.b = nn.ParameterList(torch.zeros(rank, D) for _ in vit.blocks)

  def forward(self, images):
    with torch.no_grad():
      z = self.vit.embed(images)
    h = 0
    for i, block in enumerate(self.vit.blocks):
      h = h + z @ self.a[i] @ self.b[i]
      with torch.set_grad_enabled(i >= self.first_write and torch.is_grad_enabled()):
        z = block(z)
      if i >= self.first_write - 1:
        z = z + h * torch.sigmoid(self.beta * h)
    return self.head(self.vit.norm(z[:, 1:].mean(dim=1)))


def model(name: str, spec, options: dict, frozen: dict, trainable: dict) -> nn.Module:
  """One of "linear", "full", "lora", "dtl" with our parameters.

  Args:
    options: of our method of that name.
    frozen, trainable: our parameters, the classifier among the trainable.
  """
  vit = ViT(spec)
  load(vit, trainable["backbone"] if name == "full" else frozen)
  classes = trainable["classifier"]["bias"].shape[0]
  if name == "dtl":
    made = DTL(vit, classes, options["rank"], options["first_write"], options["beta"])
    ours = {f"{part}.{i}": pair[part] for i, pair in enumerate(trainable["side"].values()) for part in "ab"}
  elif name == "lora":
    made = LoRA(vit, classes, options["rank"], options["dropout"])
    ours = {f"vit.blocks.{i}.qkv.{column}_{part}": pairs[column][part]
            for i, pairs in enumerate(trainable["lora"].values()) for column in "qv" for part in "ab"}
  else:
    made, ours = {"linear": Probe, "full": Full}[name](vit, classes), {}
  ours |= {"head.weight": trainable["classifier"]["kernel"].T, "head.bias": trainable["classifier"]["bias"]}
  made.load_state_dict({**made.state_dict(), **{name: tensor(leaf) for name, leaf in ours.items()}})
  return made


def tensor(array) -> torch.Tensor:
  """A copy."""
  return torch.tensor(np.array(array))


def load(vit: ViT, params: dict) -> None:
  """Copies our parameters of a ViT: dense kernels are transposed, the patches' goes from [p, p, 3, D] to [D, 3, p, p].
  """
  state = {}
  for name, leaf in tree.flatten(params).items():
    layer, _, leaf_name = name.replace("patch_", "patch/").rpartition("/")
    if layer.startswith("block_"):
      block, _, part = layer.partition("/")
      layer = f"blocks.{int(block[6:])}.{part}"
    leaf = leaf.transpose(3, 2, 0, 1) if layer == "patch" and leaf.ndim == 4 else leaf.T if leaf.ndim == 2 else leaf
    leaf_name = {"kernel": "weight", "scale": "weight"}.get(leaf_name, leaf_name)
    state[f"{layer}.{leaf_name}".lstrip(".")] = tensor(leaf)
  vit.load_state_dict(state)
