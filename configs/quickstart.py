"""Digits on the bundled backbone, one method at a time: `python -m transferlab.quickstart` runs four side by side.

    transferlab train --config=configs/quickstart.py:method=dtl --workdir=runs/quickstart_dtl

README.md has the table that the quickstart prints, with its device.
"""
from transferlab.experiment import arguments, defaults
from transferlab.quickstart import RECIPES


def get_config(text=None):
  arg = arguments(text, method="linear", seed=0)
  config = defaults(arg.method, data="digits", seed=arg.seed)
  for key, value in RECIPES[arg.method].items():
    config.update_from_flattened_dict({key: value})
  return config
