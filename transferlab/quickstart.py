"""Four methods side by side on a real data set, from nothing but this package: `python -m transferlab.quickstart`.

The bundled backbone, which has never seen a photograph or a digit, is adapted to scikit-learn's 8x8 digits (1,000
images to train on, 200 to choose the epoch, 597 to test). Each method leaves a folder in `runs/quickstart`.
"""
import shutil
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from transferlab import data, serve
from transferlab.backbones.weights import load_weights
from transferlab.optim import Optim
from transferlab.progress import say
from transferlab.recipe import Recipe
from transferlab.train import fit

# Learning rates: the best of three, a factor of about three apart, on the validation split.
RECIPES = {
    "linear": Recipe(duration="15 epochs", optim=Optim(lr=3e-2, warmup="10 percent"), evaluate_every="3 epochs"),
    "lora": Recipe(duration="8 epochs", optim=Optim(lr=1e-2, warmup="10 percent"), evaluate_every="2 epochs"),
    "dtl": Recipe(duration="8 epochs", optim=Optim(lr=1e-2, warmup="10 percent"), evaluate_every="2 epochs"),
    "full": Recipe(duration="8 epochs", optim=Optim(lr=1e-3, warmup="10 percent"), evaluate_every="2 epochs"),
}


def run(folder="runs/quickstart", backbone: str = "vit_formula64", task: data.Task | None = None,
        recipes=None) -> list[dict]:
  """Trains every method of `recipes` (default `RECIPES`) on `task` (default: digits); prints a table and predictions.

  Returns:
    the ledger rows, in the order of the methods.
  """
  folder, weights, task = Path(folder), load_weights(backbone), task or data.digits()
  rows = []
  for method, recipe in (recipes or RECIPES).items():
    if (folder / method / "config.json").exists():  # always a fresh run, so that the seconds mean something
      shutil.rmtree(folder / method)
    say(f"\n{method}")
    rows.append(fit(weights, method, task, recipe, workdir=folder / method).result)
  table = Table("method", "test accuracy", "trainable", "without classifier", "peak MiB of a step", "seconds",
                title=f"{task.name} on {weights.name}")
  for row in rows:
    table.add_row(row["method"], f"{row['test']['accuracy']:.3f}", f"{row['trainable']:,}",
                  f"{row['trainable_without_classifier']:,}", f"{row['train_peak_bytes'] / 2**20:.0f}",
                  f"{row['seconds']:.0f}")
  Console().print(table)

  adapter = folder / rows[-2]["method"] / "adapter.safetensors"
  classifier, test = serve.load(adapter, weights), task.splits["test"]
  images = [0, len(test) // 2, len(test) - 1]
  probabilities = classifier([test.read(i) for i in images])  # [3, C]
  print(f"\nthree test images by {adapter}:")
  for i, row in zip(images, probabilities):
    truth, guess = task.class_names[test.labels[i]], task.class_names[int(np.argmax(row))]
    print(f"  image {i}: it is {truth}, predicted {guess} with probability {row.max():.2f}")
  return rows


if __name__ == "__main__":
  run(*sys.argv[1:2])
