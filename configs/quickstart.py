"""Digits on the bundled backbone, one method at a time; `python -m transferlab.quickstart` runs four side by side.

    transferlab train --config=configs/quickstart.py:method=dtl --workdir=runs/quickstart_dtl

README.md has the table that the quickstart prints.
"""
import dataclasses

from transferlab.experiment import arguments, defaults
from transferlab.quickstart import RECIPES


def get_config(text=None):
  arg = arguments(text, method="linear", seed=0)
  recipe = RECIPES.get(arg.method, RECIPES["lora"])
  config = defaults(arg.method, data="digits")
  config.update(dataclasses.asdict(dataclasses.replace(recipe, seed=arg.seed)))
  return config
