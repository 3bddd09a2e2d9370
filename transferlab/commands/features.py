"""`transferlab features`: the activations that heads train from."""
from transferlab.commands.flags import BACKBONE, DISTRIBUTED, define, join, parse, required


def features(argv: list[str]) -> None:
  """Keeps the activations that a method reads of a task's images, for --config.features of `transferlab train`."""
  values = define(backbone=BACKBONE, data=("", "the images, e.g. folder:/images, or a task such as vtab/dtd"),
                  data_dir=("", "folder of the data sets of suites"), method=("linear", "method that shall train"),
                  options=("", "the method's options, e.g. target_size=8192"),
                  out=("", "folder of the cache; other weights and images may lie there too"),
                  dtype=("float32", "what activations are kept in: float32 or bfloat16"),
                  compute=("auto", "what the backbone computes in: float32, bfloat16 or auto"),
                  views=(0, "augmented copies of the training images, 0 for the images as they are"),
                  augmentation=("none", "of the views"), drop_path=(0.0, "stochastic depth of the views"),
                  seed=(0, "of the views"), image_size=(0, "pixels, 0 for the weights' own"),
                  preprocessing=("", "changes to the weights' own, e.g. crop=squash"),
                  logits=(False, "read a ResNet's own classifier too"), batch_size=(64, "images at once"),
                  shard=(1, "devices that share one copy of the backbone, 0 for all"),
                  bad_images=("error", "error, or skip to leave out images that cannot be read"),
                  download=(False, "fetch a zoo entry"), dry_run=(False, "only print the size"),
                  **DISTRIBUTED)
  parse(values, argv, features)
  required(values, "backbone", "data", "out")
  join(values, features)
  from transferlab import data, distributed, experiment, inform, methods
  from transferlab import features as features_lib
  from transferlab.progress import say
  from transferlab.recipe import Recipe, places
  from transferlab.train import readable
  same = {name: values[name].value for name in ("augmentation", "drop_path", "views", "seed", "bad_images",
                                                          "shard")}
  recipe = Recipe(dtype=values.compute, cache_dtype=values.dtype, **same)
  shared = ("backbone", "image_size", "preprocessing", "logits", "download", "method")
  weights = experiment.weights_of(experiment.Experiment(**{name: values[name].value for name in shared}))
  method = methods.build(values.method, weights.spec, **inform.options(values.options))
  features_lib.check(method, weights.spec, recipe)
  distributed.compare("request", {"weights": weights.hash, "method": method.name, "options": method.options, **same,
                                  "dtype": values.dtype, "compute": values.compute, "batch_size": values.batch_size})
  task = data.from_string(values.data, values.data_dir)
  if not values.dry_run:
    task = features_lib.verified(values.out, weights, method.reads, task, recipe)
    task = readable(task, recipe.bad_images, say, quiet=False)
  features_lib.write(features_lib.of_recipe(values.out, recipe), weights, method.reads, task.splits,
                     batch_size=values.batch_size, dry_run=values.dry_run, **places(recipe))
  print(values.out)
