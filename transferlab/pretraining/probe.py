"""Linear probe of the bundled backbone against the same network untrained: the table of this folder's README.

"start" is the network as training finds it (`initial`), so that one sees what the images themselves contribute.

    python -m transferlab.pretraining.probe --data=<folder with dtd10, flowers12, cifar10_jpeg>

Features are frozen and standardised; the classifier is multinomial logistic regression whose strength is chosen by
three-fold cross-validation within the training part. The test part is scored once. Digits (scikit-learn) need no
folder: the first 1,000 are for training, the last 597 the test; the 200 between are left out.
"""
import pathlib

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from transferlab.backbones import build
from transferlab.backbones.weights import load_weights
from transferlab.pretraining import initial

SETS = ("dtd10", "flowers12", "cifar10_jpeg")
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse of the L2 penalty
FEATURES = ("cls", "mean", "both")


def resize(picture, size: int):
  return np.asarray(picture.convert("RGB").resize((size, size), Image.BICUBIC))


def digits(size: int):
  """{"train": (images [1000, S, S, 3] uint8, labels), "test": (images [597, S, S, 3], labels)}."""
  data = load_digits()
  pictures = (data.images * (255 / 16)).round().astype(np.uint8)
  images = np.stack([resize(Image.fromarray(picture), size) for picture in pictures])
  return {"train": (images[:1000], data.target[:1000]), "test": (images[1200:], data.target[1200:])}


def folder(root: pathlib.Path, size: int):
  """The same of a folder {train,test}/class/file."""
  parts = {}
  for part in ("train", "test"):
    files = sorted((file.parent.name, file) for file in (root / part).glob("*/*") if file.is_file())
    names = sorted({name for name, _ in files})
    parts[part] = (np.stack([resize(Image.open(file), size) for _, file in files]),
                   np.array([names.index(name) for name, _ in files]))
  return parts


def extractor(spec):
  """A function (params, images uint8 [N, S, S, 3]) -> features of the last norm's tokens.

  They are {"cls": class token [N, D], "mean": mean patch token [N, D], "both": the two side by side [N, 2D]}.
  """
  net = build(spec)
  def look(carry, site, y, x):
    del x
    return (y if site == "norm" else carry), y
  @jax.jit
  def forward(params, images):
    tokens = net.apply(params, images.astype(jnp.float32) / 127.5 - 1, look, None)[1]          # [B, T, D]
    return tokens[:, 0], tokens[:, spec.prefix_tokens:].mean(1)
  def extract(params, images, batch: int = 100):
    padded = np.concatenate([images, np.zeros((-len(images) % batch, *images.shape[1:]), np.uint8)])
    cls, mean = (np.concatenate(x)[:len(images)] for x in
                 zip(*[jax.device_get(forward(params, padded[i:i + batch])) for i in range(0, len(padded), batch)]))
    return {"cls": cls, "mean": mean, "both": np.concatenate([cls, mean], -1)}
  return extract


def classifier(strength: float):
  return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300, tol=1e-3))


def probe(train, test=None):
  """Accuracies of a linear classifier on frozen features.

  Args:
    train: (features [N, D], labels [N]).
    test: the same, or None to leave the test part closed.

  Returns:
    (cross-validated accuracy within train, test accuracy or None).
  """
  folds = StratifiedKFold(3, shuffle=True, random_state=0)
  scores = {c: cross_val_score(classifier(c), *train, cv=folds).mean() for c in STRENGTHS}
  best = max(scores, key=scores.get)
  return scores[best], classifier(best).fit(*train).score(*test) if test else None


def table(weights: dict, spec, data: dict, opened: bool = True):
  """Rows (set, network, feature, cross-validated accuracy, test accuracy), for `weights` {name: params}."""
  extract = extractor(spec)
  for name, parts in data.items():
    for network, params in weights.items():
      features = {part: extract(params, images) for part, (images, _) in parts.items() if opened or part == "train"}
      for kind in FEATURES:
        pairs = [(features[part][kind], parts[part][1]) for part in features]
        yield (name, network, kind, *probe(*pairs))


def main(_):
  weights = load_weights(_WEIGHTS.value or "vit_formula64")
  spec, preprocessing = weights.spec, weights.preprocessing
  key = jax.random.key(_SEED.value)
  data = {"digits": digits(preprocessing.image_size)}
  root = pathlib.Path(_DATA.value) if _DATA.value else None
  for name in SETS if root else ():
    if (root / name).is_dir():
      data[name] = folder(root / name, preprocessing.image_size)
    else:
      print(f"{root / name} is not there: left out")
  print(f"{weights.source}\n\n| set | network | " + " | ".join(f"{kind} (cv)" for kind in FEATURES) + " |")
  print("|---|---|" + "---|" * len(FEATURES))
  cells = []
  networks = {"untrained": build(spec).init(key), "start": initial.structured(key, spec), "trained": weights.params}
  for name, network, kind, inside, outside in table(networks, spec, data, not _CLOSED.value):
    cells.append(f"({100 * inside:.1f})" if outside is None else f"{100 * outside:.1f} ({100 * inside:.1f})")
    if kind == FEATURES[-1]:
      print(f"| {name} | {network} | " + " | ".join(cells) + " |", flush=True)
      cells = []


if __name__ == "__main__":
  _DATA = flags.DEFINE_string("data", None, f"Folder with any of {', '.join(SETS)}, each as {{train,test}}/class/file.")
  _WEIGHTS = flags.DEFINE_string("weights", None, "Weights to probe; the bundled ones if not given.")
  _CLOSED = flags.DEFINE_bool("closed", False, "Cross-validate within the training parts only; for choosing.")
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of the two untrained networks.")
  app.run(main)
