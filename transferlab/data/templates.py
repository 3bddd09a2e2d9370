"""Texts and class names for backbones with a text tower, as CoOp has them (github.com/KaiyangZhou/CoOp at ff61507).

A data set goes by one name here, whatever the suite; {} is where the class name goes.
"""
from collections.abc import Iterable

TEMPLATES: dict[str, tuple[str, ...]] = {
    "caltech101": ("a photo of a {}.",),
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",),
    "food101": ("a photo of {}, a type of food.",),
    "imagenet": ("a photo of a {}.",),
    "oxford_flowers": ("a photo of a {}, a type of flower.",),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": ("a photo of a {}.",),
    "sun397": ("a photo of a {}.",),
    "ucf101": ("a photo of a person doing {}.",),
}

# The ensemble of LFA and of CLIP-Adapter on ImageNet; CoOp itself uses the single template above.
IMAGENET_ENSEMBLE = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.", "a photo of a {}.")

# Raw folder name -> name. CoOp also leaves out Caltech101's BACKGROUND_Google and Faces_easy: 100 classes remain.
RENAMES: dict[str, dict[str, str]] = {
    "caltech101": {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
    "eurosat": {
        "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
        "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
        "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"},
}


def readable(names: Iterable[str], dataset: str) -> tuple[str, ...]:
  """Class names to put into a template: renamed as above, "_" as a space. A name that is already readable stays."""
  renames = RENAMES.get(dataset, {})
  return tuple(renames.get(name, name).replace("_", " ") for name in names)
