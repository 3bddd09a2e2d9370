"""What LFA looks at: the layers that count for each image and its class, and what the last layers alone would say, as
numbers and pictures; the qualitative table of LFA's poster (MLAI-Yonsei/LFA)."""
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, plots
from transferlab.files import write_json
from transferlab.method import Context, forward
from transferlab.methods.lfa import explain as looked_at
from transferlab.progress import Progress
from transferlab.serve import Classifier, in_batches, read_images
from transferlab.step import to_inputs

PATHS = {"text_cross": "layers of the class, asked by the image", "text_self": "layers of the class, asked by itself",
         "image": "layers of the image"}
SHOWN = 5  # classes in a picture


class Explained(NamedTuple):
  """Of one image.

  Fields:
    probabilities: [C].
    last: [C], the same matrices with nothing but each tower's last layer.
    attention: {"text_cross": [L], "text_self": [L], "image": [L]}, each of sum 1, what the layers count: the texts' of
      the predicted class, means over its templates. L are the layers that are attended to, of that tower.
  """
  probabilities: np.ndarray
  last: np.ndarray
  attention: dict[str, np.ndarray]


def explain(classifier: Classifier, images: Iterable, batch_size: int = 32) -> list[Explained]:
  """Why an LFA classifier says what it says of images, uint8 [H, W, 3] or paths; on any base.

  Raises:
    ValueError: the classifier is not LFA.
  """
  return _explained(_compiled(classifier), classifier, images, batch_size)


def _explained(run: Callable, classifier: Classifier, images: Iterable, batch_size: int) -> list[Explained]:
  found = []
  for batch, rows in in_batches(images, classifier.preprocessing, batch_size):
    probabilities, last, attention = jax.device_get(run(batch))
    found += [Explained(probabilities[i], last[i], {path: attention[path][i] for path in PATHS})
              for i in range(rows)]
  return found


def _compiled(classifier: Classifier) -> Callable:
  """Preprocessed images [B, S, S, 3] -> (probabilities [B, C], those of the last layers [B, C], {path: [B, L]})."""
  method, preprocessing = classifier.method, classifier.preprocessing
  if method.name != "lfa":
    raise ValueError(f"layers are explained of LFA, and this classifier is {method.name!r}; train with method=lfa")
  backbone = backbones.build(classifier.weights.spec)

  def run(trainable, state, frozen, images):
    ctx = Context(state=state, frozen=frozen)
    outputs = forward(method, backbone, trainable, to_inputs(images, preprocessing), ctx)
    found = looked_at(method, trainable, outputs, ctx)
    best, rows = found.logits.argmax(-1), jnp.arange(len(images))
    attention = {"text_cross": found.attention.text_cross[rows, best].mean(1),                     # [B, L]
                 "text_self": found.attention.text_self[best].mean(1), "image": found.attention.image}
    return jax.nn.softmax(found.logits), jax.nn.softmax(found.last), attention

  jitted = jax.jit(run)
  return lambda images: jitted(classifier.trainable, classifier.state, classifier.frozen, images)


def write(classifier: Classifier, files: Iterable, folder, *, batch_size: int = 32, bad_images: str = "error",
          quiet: bool = False) -> list[Path]:
  """Explains image files: `explanations.json` with everything, `explanations.csv` with a row per image, and a picture
  per image, `0001_<name>.png`: the image, its class, three bars per layer, and both predictions.

  Layers are counted from 1, as on the poster. An image that cannot be read is an error that names it, or with
  bad_images="skip" named and left out.

  Returns:
    The files written; pictures are left out, with a message, where matplotlib is missing.
  """
  run, folder, files = _compiled(classifier), Path(folder), [os.fspath(file) for file in files]
  plots.make_folder(folder)
  names = {file: f"{i + 1:04d}_{Path(file).stem}" for i, file in enumerate(files)}
  found, pictures, draws = {}, [], True
  with Progress(len(files), "explaining", quiet=quiet) as progress:
    for i in range(0, len(files), batch_size):
      images = read_images(files[i:i + batch_size], bad_images)
      explained = _explained(run, classifier, images.values(), batch_size)
      for (file, image), each in zip(images.items(), explained):
        found[file] = each
        drawn = draw(folder / names[file], image, each, classifier.class_names) if draws else []
        pictures, draws = pictures + drawn, bool(drawn)
      progress.update(len(files[i:i + batch_size]))
  return [*_write_numbers(found, classifier, folder), *pictures]


def draw(path, image: np.ndarray, explained: Explained, class_names) -> list[Path]:
  """Writes `path`.png, the picture of one image [H, W, 3] uint8; [] without matplotlib."""
  best, last = explained.probabilities.argmax(), explained.last.argmax()
  shown = np.argsort(-explained.probabilities, kind="stable")[:SHOWN]
  if last not in shown:
    shown[-1] = last
  classes = {class_names[c]: (explained.probabilities[c], explained.last[c]) for c in shown}
  title = (f"{class_names[best]} {explained.probabilities[best]:.0%}; by the last layers alone: {class_names[last]} "
           f"{explained.last[last]:.0%}")
  return plots.portrait(path, image, {PATHS[name]: each for name, each in explained.attention.items()}, classes,
                        ("all layers", "last layers alone"), title=title)


def _write_numbers(found: dict[str, Explained], classifier: Classifier, folder: Path) -> list[Path]:
  names = classifier.class_names
  best = lambda p: (names[p.argmax()], float(p.max()))
  first = next(iter(found.values()), None)
  layers = [(path, i) for path in PATHS for i in range(len(first.attention[path]))] if first else []
  rows = [[file, *best(e.probabilities), *best(e.last), *(float(e.attention[path][i]) for path, i in layers)]
          for file, e in found.items()]
  head = ["file", "class", "probability", "last_layer_class", "last_layer_probability"]
  numbers = plots.table(folder / "explanations.csv", [*head, *(f"{path}_{i + 1}" for path, i in layers)], rows)
  everything = folder / "explanations.json"
  write_json(everything, [
      {**dict(zip(head, row)), "probabilities": dict(zip(names, e.probabilities.tolist())),
       "last_layer_probabilities": dict(zip(names, e.last.tolist())),
       "attention": {path: each.tolist() for path, each in e.attention.items()}}
      for row, e in zip(rows, found.values())])
  return [everything, numbers]
