"""`transferlab incremental` and `classes`: Open-InCA, whose classes come and go."""
import csv
import json

from transferlab.commands.flags import config_changes, define, parse, required


def incremental(argv: list[str]) -> None:
  """Learns the classes of a task in steps, each without the images of the steps before, and scores every step."""
  values = define(config=("", "config file, its arguments after a colon; --config.KEY=value changes any key"),
                  workdir=("", "folder for what the run leaves"), steps=(10, "S; classes are dealt out evenly"),
                  order_seed=(0, "of the order of classes"),
                  over=("new", "later steps' cross-entropy is over the new classes, or over all seen so far"),
                  split=("test", "whose accuracies are reported: test, or val"),
                  joint=(False, "also train on all classes at once, for comparison"),
                  json=(False, "print one JSON object"))
  overrides, rest = config_changes(argv)
  parse(values, rest, incremental)
  required(values, "config", "workdir")
  from transferlab import experiment
  from transferlab import incremental as incremental_lib
  result = incremental_lib.run(
      experiment.load(values.config, overrides), values.workdir, steps=values.steps, order_seed=values.order_seed,
      over=values.over, split=values.split, joint=values.joint)
  if values.json:
    print(json.dumps(result))
  else:
    incremental_lib.show(result)
    print(f"{values.workdir}/{result['adapter']}")


def classes(argv: list[str]) -> None:
  """Lists an adapter's classes, or writes an Open-InCA adapter with some of them; the others' rows are left out."""
  values = define(adapter=("", "adapter.safetensors of a run"),
                  keep=("", "classes to keep, in this order: ant,bee; quotes around a name with a comma"),
                  drop=("", "classes to remove, the others keep their order"), out=("", "file to write"))
  parse(values, argv, classes)
  required(values, "adapter")
  if not values.keep and not values.drop:
    from transferlab.checkpoint import load_adapter
    print(*load_adapter(values.adapter).class_names, sep="\n")
    return
  required(values, "out")
  from transferlab.incremental import select_classes
  names = lambda text: next(csv.reader([text], skipinitialspace=True), [])
  select_classes(values.adapter, values.out, keep=names(values.keep), drop=names(values.drop))
  print(values.out)
