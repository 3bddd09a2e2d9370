"""Linear probe: a classifier on one activation of the frozen backbone, by default its own feature vector."""
from transferlab.backbones import sites
from transferlab.method import Method, Read
from transferlab.methods import classifier
from transferlab.tree import nearest


def linear(spec, *, site: str = "pooled", tokens: str = "cls") -> Method:
  """Linear probe; on an intermediate activation with another `site`.

  Args:
    spec: the backbone's spec.
    site: what is read. "pooled" is the backbone's feature vector [B, D]; any other site, such as "block_05/out", gives
      tokens [B, T, D'] or a map [B, H, W, D'], which are reduced by `tokens`.
    tokens: "cls" takes the class token, "mean" the mean of the patch tokens or of the map; a vector ignores it.

  Merges into a plain backbone with a head when it reads "pooled".
  """
  read, width = feature(spec, site, tokens)
  return Method(
      name="linear", options={"site": site, "tokens": tokens},
      init=lambda rng, frozen, num_classes: ({"classifier": classifier.init(rng, width, num_classes)}, {}),
      readout=lambda trainable, features, carry, ctx: classifier.apply(trainable["classifier"], carry["features"]),
      reads={"features": read}, writes_from=spec.depth,
      merge=(lambda trainable, frozen: frozen) if site == "pooled" else None)


def feature(spec, site: str, tokens: str) -> tuple[Read, int]:
  """What reads one vector [B, D'] of a site, and D'; see `linear` for the arguments."""
  shapes = sites(spec)
  if site not in shapes:
    raise ValueError(f"site {site!r} is not in {spec.name}; nearest: {', '.join(nearest(site, shapes))}")
  if tokens not in ("cls", "mean"):
    raise ValueError(f"tokens is {tokens!r}; expected 'cls' or 'mean'")
  prefix = spec.prefix_tokens
  has_tokens = len(shapes[site].shape) > 2
  if has_tokens and tokens == "cls" and (not prefix or site == "patch"):
    raise ValueError(f"site {site!r} of {spec.name} has no class token; use tokens='mean'")

  def reduce(y, frozen):  # [B, T, D'], [B, H, W, D'] or [B, D'] -> [B, D']
    if not has_tokens:
      return y
    y = y.reshape(y.shape[0], -1, y.shape[-1])
    return y[:, 0] if tokens == "cls" else y[:, 0 if site == "patch" else prefix:].mean(axis=1)

  return Read(site, tokens if has_tokens else "tokens", reduce), shapes[site].shape[-1]
