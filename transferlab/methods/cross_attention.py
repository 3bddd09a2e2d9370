"""InCA's adapter: learned queries attend to the tokens of one activation of a frozen backbone (Dukler et al. 2023,
arXiv 2303.04105).

    q_h = query Wq_h + bq_h        k_h = x Wk_h        v_h = x Wv_h + bv_h                       h = 1 … H
    y = LN(concat_h(softmax(q_h k_h^T / sqrt(D / H)) v_h) Wo + bo)                               [B, M, D]

What is whose. The paper's abstracts and a figure's caption say: light cross-attention modules on intermediate
activations of a frozen network, trained in parallel, in two kinds, InCA and Open-InCA. The paper's equations were not
at hand. Inferred from the stated size, 1.3 % of ViT-L/16: four full projections and no MLP. Recalled, and confirmed by
nothing read: one query, a norm after the attention; for Open-InCA one query per class and a diagonal head. Our own: the
number of heads, biases of q, v and out, LayerNorm as the norm, no residual, the linear head, several queries averaged
before the head, the optional LayerNorm on tokens, initial values.

There is no bias of the keys: softmax ignores it, so its gradient is rounding noise, which Adam would scale up.

The same function is computed in two ways. `direct` forms keys and values. `folded` takes the scores as x (Wk_h q_h) and
applies Wv and Wo after pooling, so that only x and the attention have to be kept for the backward pass.

Arrays of one adapter: {"query": [M, D], "q", "v": {"kernel": [D, H, D/H], "bias": [H, D/H]}, "k": {"kernel"},
"out": {"kernel": [H, D/H, D], "bias": [D]}, "norm": {"scale", "bias"}, and "norm_tokens": {"scale", "bias"} if wanted}.
A head is {"kernel": [D, C], "bias": [C]}, in Open-InCA too, where column c belongs to query c alone.
"""
import jax
import jax.numpy as jnp

from transferlab.backbones import normalise

EPS = 1e-6  # of both norms


def init(rng, width: int, heads: int, queries: int = 1, norm_tokens: bool = False) -> dict:
  """An adapter for tokens of `width` D: 4 D^2 + (5 + M) D parameters for M queries, 2 D more with a norm on tokens.

  Projections are Xavier-uniform, queries normal of std 0.02: attention starts near the mean of the tokens. Biases are
  zero. (Our choice.)

  Raises:
    ValueError: heads do not divide the width, or there is no query.
  """
  if heads < 1 or width % heads:
    raise ValueError(f"heads is {heads}; expected a divisor of the width, {width}")
  if queries < 1:
    raise ValueError(f"queries is {queries}; expected at least 1")
  D, H, d = width, heads, width // heads
  keys = dict(zip(("query", "q", "k", "v", "out"), jax.random.split(rng, 5)))
  matrix = jax.nn.initializers.glorot_uniform()
  project = lambda name: matrix(keys[name], (D, D)).reshape(D, H, d)
  norm = lambda: {"scale": jnp.ones(D), "bias": jnp.zeros(D)}
  adapter = {
      "query": new_queries(keys["query"], queries, D),
      "q": {"kernel": project("q"), "bias": jnp.zeros((H, d))},
      "k": {"kernel": project("k")},
      "v": {"kernel": project("v"), "bias": jnp.zeros((H, d))},
      "out": {"kernel": matrix(keys["out"], (D, D)).reshape(H, d, D), "bias": jnp.zeros(D)},
      "norm": norm()}
  return {**adapter, "norm_tokens": norm()} if norm_tokens else adapter


def new_queries(rng, count: int, width: int):
  """[count, D], normal of std 0.02."""
  return 0.02 * jax.random.normal(rng, (count, width))


def init_head(width: int, num_classes: int) -> dict:
  """A head of zeros: all classes start equal, and the adapter moves from the second step on. (Our choice.)"""
  return {"kernel": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}


def tokens_of(adapter: dict, x):
  """What is attended to, in the adapter's precision: [B, T, D], or a map [B, rows, columns, D] flattened."""
  x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(adapter["query"].dtype)
  norm = adapter.get("norm_tokens")
  return x if norm is None else normalise(x, norm["scale"], norm["bias"], EPS)


def _queries(adapter: dict):
  """Projected and scaled queries [M, H, d]."""
  q = jnp.einsum("md,dhe->mhe", adapter["query"], adapter["q"]["kernel"]) + adapter["q"]["bias"]
  return q * q.shape[-1] ** -0.5


def direct(adapter: dict, x):
  """Attention with keys and values formed.

  Args:
    x: tokens [B, T, D].

  Returns:
    pooled [B, M, D] before the norm, attention weights [B, H, M, T].
  """
  k = jnp.einsum("btd,dhe->bthe", x, adapter["k"]["kernel"])                              # [B, T, H, d]
  v = jnp.einsum("btd,dhe->bthe", x, adapter["v"]["kernel"]) + adapter["v"]["bias"]       # [B, T, H, d]
  weights = jax.nn.softmax(jnp.einsum("mhe,bthe->bhmt", _queries(adapter), k), axis=-1)   # [B, H, M, T]
  return _out(adapter, jnp.einsum("bhmt,bthe->bmhe", weights, v)), weights


def folded(adapter: dict, x):
  """As `direct`, but keys and values are never formed: projections act on the queries and on the pooled tokens."""
  u = jnp.einsum("mhe,dhe->hmd", _queries(adapter), adapter["k"]["kernel"])               # [H, M, D]
  weights = jax.nn.softmax(jnp.einsum("hmd,btd->bhmt", u, x), axis=-1)                    # [B, H, M, T]
  tokens = jnp.einsum("bhmt,btd->bhmd", weights, x)                                       # [B, H, M, D]
  # The weights sum to 1, so that the bias of the values passes through as it is.
  return _out(adapter, jnp.einsum("bhmd,dhe->bmhe", tokens, adapter["v"]["kernel"]) + adapter["v"]["bias"]), weights


def _out(adapter: dict, heads):
  """[B, M, H, d] -> [B, M, D]."""
  return jnp.einsum("bmhe,hed->bmd", heads, adapter["out"]["kernel"]) + adapter["out"]["bias"]


def cheaper_folded(tokens: int, width: int, heads: int, queries: int) -> bool:
  """Whether folding takes fewer multiply-adds: 2 T D M H + M D^2 against 2 T D^2 + 2 T D M, per image."""
  T, D, H, M = tokens, width, heads, queries
  return 2 * T * M * H + M * D <= 2 * T * D + 2 * T * M


def features(adapter: dict, x):
  """What the queries read, after the norm.

  Args:
    x: [B, T, D], or a map [B, rows, columns, D]; gradients do pass into it.

  Returns:
    [B, M, D] in the adapter's precision, by the cheaper of the two ways.
  """
  x = tokens_of(adapter, x)
  D, H, _ = adapter["q"]["kernel"].shape
  attend = folded if cheaper_folded(x.shape[1], D, H, adapter["query"].shape[0]) else direct
  pooled, _ = attend(adapter, x)
  return normalise(pooled, adapter["norm"]["scale"], adapter["norm"]["bias"], EPS)


def linear_head(head: dict, y):
  """[B, M, D] -> logits [B, C] of the queries' mean."""
  return y.mean(axis=1) @ head["kernel"] + head["bias"]


def diagonal_head(head: dict, y):
  """[B, C, D] -> logits [B, C]: logit c is read from query c, so that classes do not meet before the softmax."""
  return jnp.einsum("bcd,dc->bc", y, head["kernel"]) + head["bias"]


def add_classes(adapter: dict, head: dict, rng, count: int) -> tuple[dict, dict]:
  """An Open-InCA adapter and head with `count` more classes at the end; the logits of the old ones stay."""
  D = head["kernel"].shape[0]
  grown = init_head(D, count)
  query = jnp.concatenate([adapter["query"], new_queries(rng, count, D)])                 # [C + count, D]
  return {**adapter, "query": query}, {name: jnp.concatenate([head[name], grown[name]], axis=-1) for name in head}


def keep_classes(adapter: dict, head: dict, classes) -> tuple[dict, dict]:
  """An Open-InCA adapter and head with these classes alone, in this order; their logits stay.

  Raises:
    ValueError: an index is not among the classes, or comes twice.
  """
  C, classes = head["bias"].shape[0], list(classes)
  wrong = [c for c in classes if not 0 <= c < C]
  if wrong or not classes or len(set(classes)) < len(classes):
    raise ValueError(f"classes to keep are {classes}; expected different indices from 0 to {C - 1}, at least one")
  index = jnp.asarray(classes)
  return {**adapter, "query": adapter["query"][index]}, {name: leaf[..., index] for name, leaf in head.items()}
