"""transferlab: adapt frozen vision backbones cheaply, from their intermediate activations.

    import transferlab as tl
    weights = tl.load_weights("vit_formula64")
    task = tl.image_folder("flowers")
    run = tl.fit(weights, "dtl", task, tl.Recipe(duration="20 epochs"), workdir="runs/flowers")
    probabilities = tl.load_classifier("runs/flowers/adapter.safetensors")(["rose.jpg"])  # [1, C]
"""
import importlib

# Loaded on first use, so that data workers and command-line help do not wait for jax.
_HOMES = {
    "Optim": "optim", "Recipe": "recipe", "fit": "train",
    "load_weights": "backbones.weights", "Weights": "backbones.weights",
    "Task": "data", "image_folder": "data", "arrays": "data", "digits": "data", "load_classifier": "serve",
    "Method": "method", "build_method": "methods", "record": "method", "build_backbone": "backbones"}
_NAMES = {"load_classifier": "load", "build_method": "build", "build_backbone": "build"}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"transferlab has no {name!r}; it has {', '.join(__all__)}")
  return getattr(importlib.import_module(f"transferlab.{_HOMES[name]}"), _NAMES.get(name, name))


def __dir__():
  return __all__
