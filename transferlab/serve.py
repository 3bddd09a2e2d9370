"""A classifier in use: an adapter on its backbone, the head that a weights file carries, or a CLIP and class names."""
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, data, devices, distributed, methods
from transferlab.backbones import zoo
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import Weights, export_timm, image_tower, load_weights, weights_hash, with_logits
from transferlab.checkpoint import Adapter, check_backbone, load_adapter
from transferlab.evaluate import Evaluation, evaluate as count, make_predict
from transferlab.files import atomic, write_json
from transferlab.method import Method, classes, settled
from transferlab.methods import classifier as head_lib
from transferlab.progress import Progress, say
from transferlab.train import check_texts


class Classifier(NamedTuple):
  """Calling it with uint8 RGB images, or files, gives their probabilities [N, C]; columns are `class_names`."""
  class_names: tuple
  preprocessing: Preprocessing
  method: Method
  trainable: dict
  state: dict
  weights: Weights
  frozen: dict      # what the method keeps of them
  logits: Callable  # preprocessed images [B, S, S, 3] on 0 … 255, weight [B] or None -> logits [B, C]

  def __call__(self, images: Iterable, batch_size: int = 32) -> np.ndarray:
    """Images of any size, uint8 [H, W, 3] or paths, to probabilities float32 [N, C]; computes in float32."""
    found = [np.zeros((0, len(self.class_names)), np.float32)]
    for batch, rows in in_batches(images, self.preprocessing, batch_size):
      weight = (np.arange(len(batch)) < rows).astype(np.float32)
      found.append(np.asarray(jax.nn.softmax(self.logits(batch, weight), axis=-1))[:rows])
    return np.concatenate(found)

  @property
  def tasks(self) -> dict:
    """{task: class names}; a single task needs no name. What predicts files and tables asks for this and `by_task`."""
    return {"": self.class_names}

  def by_task(self, images: Iterable, batch_size: int = 32) -> dict[str, np.ndarray]:
    """{task: probabilities [N, C]}."""
    return {"": self(images, batch_size)}


def in_batches(images: Iterable, preprocessing: Preprocessing, batch_size: int):
  """(images as the backbone wants them [batch_size, S, S, 3], how many of them count); the last batch is filled up."""
  images = [images] if isinstance(images, (str, os.PathLike)) else list(images)
  for i in range(0, len(images), batch_size):
    batch = np.stack([data.preprocess(_pixels(image), preprocessing) for image in images[i:i + batch_size]])
    yield np.concatenate([batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)]), len(batch)


def _pixels(image) -> np.ndarray:
  """A file or an array as uint8 RGB [H, W, 3]."""
  if not isinstance(image, np.ndarray):
    return data.decode(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(f"an image is {image.dtype} {list(image.shape)}; expected uint8 RGB [H, W, 3], or a file's path")
  return image


def load(adapter=None, weights=None, *, class_names=None, templates=None, preprocessing: str = "") -> Classifier:
  """Loads an adapter with its backbone, the head of some weights, or a CLIP that knows classes by their names.

  Args:
    adapter: path of an adapter file; None uses the head that `weights` carry, or of a CLIP `methods.zero_shot`.
    weights: Weights, or a source for `load_weights`; an adapter on a zoo backbone finds its own, and one on a CLIP's
      image tower takes the CLIP.
    class_names: without an adapter; names of the head's columns, "0", "1", … by default, or a CLIP's classes.
    templates: of a CLIP without an adapter, one or several texts with {} for the class name.
    preprocessing: changes to that of the weights, without an adapter; see `Preprocessing.changed`.

  Raises:
    ValueError: weights the adapter was not trained on, no head in the file, another number of classes; a CLIP without
      class names or tokenizer, class names or templates that give no prompts.
  """
  if adapter is None:
    weights = _weights(weights)
    weights = weights._replace(preprocessing=weights.preprocessing.changed(preprocessing))
    return (_zero_shot if weights.spec.family == "clip" else _of_head)(weights, class_names, templates)
  if class_names is not None or preprocessing or templates:
    raise ValueError("an adapter has its own class names, templates and preprocessing; leave classes, templates and "
                     "preprocessing out")
  found = load_adapter(adapter)
  weights = weights_of(adapter, found, weights)
  return _make(found.class_names, found.preprocessing, found.method, found.trainable, found.state, weights)


def weights_of(path, adapter: Adapter, weights=None) -> Weights:
  """The weights that an adapter was trained on: those given, others are refused, or the zoo entry that it names."""
  if weights is None:
    if adapter.backbone["name"] not in zoo.ZOO:
      raise ValueError(f"{path} was trained on {adapter.backbone['name']!r} ({adapter.backbone['source']}), which is "
                       "not in the zoo; give those weights with --backbone")
    weights = adapter.backbone["name"]
  weights = _weights(weights, adapter.backbone["spec"]["image_size"])
  if adapter.backbone["spec"].get("classes") and weights.spec.family == "resnet" and weights.head:
    weights = with_logits(weights)
  if adapter.backbone["spec"]["family"] == "vit" and weights.spec.family == "clip":
    weights = image_tower(weights)
  check_backbone(adapter, weights)
  return weights


def _weights(weights, image_size=None) -> Weights:
  if weights is None:
    raise ValueError("neither an adapter nor weights are given; give --adapter, or --backbone for the head it carries")
  return weights if isinstance(weights, Weights) else load_weights(weights, image_size=image_size)


def _zero_shot(weights: Weights, class_names, templates) -> Classifier:
  if not class_names:
    raise ValueError(f"{weights.name} is a CLIP and has no classes of its own; give their names with "
                     "--classes=dog,cat, or an adapter with --adapter")
  method = methods.build("zero_shot", weights.spec, **({"templates": templates} if templates else {}))
  check_texts(method, weights, class_names)
  known = classes(method, class_names, weights.tokenizer)
  return _make(tuple(class_names), weights.preprocessing, method, *method.init(None, weights.params, known), weights)


def _of_head(weights: Weights, class_names, templates=None) -> Classifier:
  tower = weights.spec.family == "vit" and weights.spec.embed_norm
  if tower and weights.head is None and (templates or class_names):
    raise ValueError(f"{weights.name} is a CLIP's image tower alone, and class names need the text tower; give the "
                     "whole checkpoint with --backbone, or an adapter with --adapter")
  if templates:
    raise ValueError(f"templates are for a CLIP's text tower, and {weights.name} has none; leave them out")
  if weights.head is None:
    raise ValueError(f"{weights.name} carries no classifier; train one, or give an adapter with --adapter")
  count_ = weights.head["kernel"].shape[1]
  names = tuple(map(str, range(count_))) if class_names is None else tuple(class_names)
  if len(names) != count_:
    raise ValueError(f"{len(names)} class names for a head of {count_} classes; give one name per class, in its order")
  method = methods.build("linear", weights.spec)
  if "pre_logits" in weights.head:  # the original ImageNet-21k release
    def readout(trainable, features, carry, ctx):
      del carry, ctx
      pre = trainable["classifier"]["pre_logits"]
      return head_lib.apply(trainable["classifier"], jnp.tanh(features @ pre["kernel"] + pre["bias"]))
    method = method._replace(readout=readout)
  return _make(names, weights.preprocessing, method, {"classifier": weights.head}, {}, weights)


def _make(class_names, preprocessing, method, trainable, state, weights) -> Classifier:
  backbone, trainable = backbones.build(weights.spec), jax.device_put(trainable)
  frozen = method.prepare(weights.params, state) if method.frozen else {}
  frozen = jax.device_put(settled(method, backbone, trainable, state, frozen))
  run = make_predict(method, backbone, preprocessing)
  return Classifier(class_names, preprocessing, method, trainable, state, weights, frozen,
                    lambda images, weight=None: run(trainable, state, frozen, images, weight))


def evaluate(classifier: Classifier, task: data.Task, split: str = "test", *, batch_size: int = 64,
             bad_images: str = "error", quiet: bool = False) -> Evaluation:
  """Counts a classifier's predictions on a split of a task, or on "all" of it; classes are matched by name.

  The test split of a task with `test_classes` is evaluated among those. Several processes share out the images, and
  each returns the count of all.
  """
  unnamed = classifier.class_names == tuple(map(str, range(len(classifier.class_names))))
  if unnamed and not set(task.class_names) <= set(classifier.class_names):
    raise ValueError(f"this head's {len(classifier.class_names)} classes have no names and the data's are "
                     f"{', '.join(task.class_names[:3])}, …; give their names in the head's order with --classes, a "
                     "JSON list")
  task = task.relabel(classifier.class_names)
  names = list(task.splits) if split == "all" else [split]
  task.check(names)
  total, logits, mesh, own = None, classifier.logits, None, None
  if distributed.hosts()[1] > 1:
    distributed.compare("evaluation", {
        "data": task.split_hash(), "split": split, "batch_size": batch_size, "bad_images": bad_images,
        "classes": list(classifier.class_names), "weights": classifier.weights.hash, "method": classifier.method.name,
        "trainable": weights_hash(classifier.trainable, classifier.weights.spec)})
    mesh = devices.make_mesh()
    logits, own = _on(mesh, classifier), devices.own_rows(mesh, batch_size)
  for name in names:
    split, problems = task.splits[name], ()
    if mesh:
      split, problems = data.read_once(split, bad_images, None, distributed.hosts(), distributed.gather)
    loader = data.eval_loader(split, classifier.preprocessing, batch_size=batch_size, bad_images=bad_images, own=own)
    for problem in problems or loader.problems:
      say(f"skipped: {problem}")
    among = task.test_classes if name == "test" else ()
    found = count(logits, loader, len(classifier.class_names), among=among, mesh=mesh, quiet=quiet)
    total = found if total is None else total.plus(found)
  return total


def _on(mesh, classifier: Classifier) -> Callable:
  """The `logits` of a classifier for batches on the devices of a mesh."""
  run = make_predict(classifier.method, backbones.build(classifier.weights.spec), classifier.preprocessing)
  arrays = devices.replicate((classifier.trainable, classifier.state, classifier.frozen), mesh)
  return lambda images, weight: run(*arrays, images, weight)


def predict_files(classifier, files, *, top: int = 1, batch_size: int = 32, bad_images: str = "error",
                  quiet: bool = False):
  """[(file, class, probability)], the `top` most probable classes of each file; of a `SharedClassifier` [(file, task,
  class, probability)], for each of its tasks.

  An image that cannot be read is an error that names it; with bad_images="skip" it is named and left out.
  """
  for task, names in classifier.tasks.items():
    if not 1 <= top <= len(names):
      raise ValueError(f"top is {top}; expected 1 to the number of classes{f' of {task}' * bool(task)}, {len(names)}")
  if batch_size < 1 or bad_images not in ("error", "skip"):
    raise ValueError(f"batch_size is {batch_size} and bad_images {bad_images!r}; expected 1 or more, and 'error' or "
                     "'skip'")
  rows = []
  with Progress(len(files), "predicting", quiet=quiet) as progress:
    for i in range(0, len(files), batch_size):
      readable = read_images(files[i:i + batch_size], bad_images)
      found = classifier.by_task(readable.values(), batch_size)
      for k, name in enumerate(readable):
        for task, names in classifier.tasks.items():
          best = np.argsort(-found[task][k], kind="stable")[:top]
          rows += [(name, *filter(None, [task]), names[c], float(found[task][k, c])) for c in best]
      progress.update(len(files[i:i + batch_size]))
  return rows


def read_images(files, bad_images: str = "error") -> dict[str, np.ndarray]:
  """{file: image [H, W, 3] uint8}; one that cannot be read is an error, or with "skip" named and left out."""
  images = {}
  for name in files:
    try:
      images[name] = data.decode(name)
    except data.BadImage as error:
      if bad_images == "error":
        raise data.BadImage(f"{error}; replace or remove it, or leave it out with --bad_images=skip") from None
      say(f"skipped: {error}")
  return images


def predict_table(classifier, table: data.Table, out, *, image_column: str | None = None, root=None,
                  top: int = 1, batch_size: int = 32, bad_images: str = "error", quiet: bool = False) -> None:
  """Writes a table with its rows and columns as they are and two more: predicted, probability.

  With `top` > 1 predicted_2, probability_2 … follow; for a `SharedClassifier` each task has its own, "predicted
  (flowers)". Images that cannot be read, or rows without one, get empty cells with bad_images="skip".

  Args:
    table: from `data.read_table`; it needs no labels.
    image_column, root: as for `data.csv_file`.

  Raises:
    ValueError: `out` is the table itself, or the table has such columns already; nothing is written then.
  """
  if os.path.exists(out) and os.path.samefile(out, table.path):
    raise ValueError(f"{out} is the table that is read; give another file, the table stays as it is")
  names = [name + (f"_{i + 1}" if i else "") + (f" ({task})" if task else "")
           for task in classifier.tasks for i in range(top) for name in ("predicted", "probability")]
  if taken := sorted(set(names) & {name.strip() for name in table.header}):
    raise ValueError(f"{table.path} has a column {taken[0]!r} already; rename or remove it")
  files = table.images(image_column, root)
  for line, row, file in zip(table.lines, table.rows, files):
    if not file and any(map(str.strip, row)) and bad_images == "error":
      raise data.DataError(f"{table.path} line {line} names no image; complete the row, or leave it without a "
                           "prediction with --bad_images=skip")
  with atomic(out) as temporary:
    cells = {file: [] for file in files}
    for file, *_, label, probability in predict_files(classifier, [file for file in cells if file], top=top,
                                                      batch_size=batch_size, bad_images=bad_images, quiet=quiet):
      cells[file] += [label, f"{probability:.6f}"]
    table.write(temporary, names, [cells[file] or [""] * len(names) for file in files])


def merge(classifier: Classifier, out, *, tolerance: float = 1e-3) -> float:
  """Writes the adapted backbone as plain weights with a head, in timm's names, and returns the largest difference of
  logits between adapter and merged weights on a probe batch of noise.

  Raises:
    ValueError: the method cannot be merged, or the difference exceeds `tolerance`; nothing is written then.
  """
  method, weights = classifier.method, classifier.weights
  if method.merge is None:
    mergeable = [name for name, each in methods.by_default(weights.spec).items() if each.merge]
    raise ValueError(f"{method.name} with options {method.options} has no equal plain weights; deploy the adapter "
                     f"file. Methods that merge: {', '.join(mergeable)}")
  params = jax.tree.map(np.asarray, method.merge(classifier.trainable, jax.device_put(weights.params)))
  head = jax.tree.map(np.asarray, classifier.trainable["classifier"])
  weights = weights._replace(params=params, head=head, preprocessing=classifier.preprocessing)
  merged = _of_head(weights, classifier.class_names)
  S = weights.spec.image_size
  probe = np.random.default_rng(0).integers(0, 256, (4, S, S, 3), np.uint8)
  difference = float(jnp.abs(merged.logits(probe) - classifier.logits(probe)).max())
  if not difference <= tolerance:
    raise ValueError(f"merged and adapted logits differ by {difference:.2e}, more than the tolerance {tolerance:g}; "
                     "nothing was written")
  export_timm(weights, out)
  write_json(classes_file(out), list(classifier.class_names))
  return difference


def classes_file(out) -> Path:
  """Where `merge` puts the class names of the weights it writes: "merged.safetensors" -> "merged.classes.json"."""
  out = Path(out)
  return out.with_suffix(".classes.json") if out.suffix else out / "classes.json"
