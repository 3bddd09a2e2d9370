"""ImageNet-to-Sketch: birds, cars, flowers, paintings and sketches; also any other fine-grained set, "inca/mit67".

    transferlab train --config=configs/imagenet_to_sketch.py:task=wikiart,method=lora --workdir=runs/wikiart
    transferlab train --config=configs/imagenet_to_sketch.py:method=lora --suite=imagenet_to_sketch --workdir=runs/i2s

The default phase trains on everything but test and takes the last step. `phase=tune` keeps a fifth of that (or the
set's own val) to choose on, and has no test. The rates are starting points, not published ones.
"""
from transferlab.experiment import arguments, defaults, published


def get_config(text=None):
  arg = arguments(text, task="oxford_flowers", method="linear", backbone="vit_formula64", phase="final", source="",
                  counts="expected", seed=0)
  config = defaults(arg.method, data=published(arg, "i2s", "phase", "source", "counts"), backbone=arg.backbone,
                    seed=arg.seed)
  config.duration = "30 epochs"
  config.batch_size = 64
  config.augmentation = "crop_flip"
  config.optim.warmup = "10 percent"
  config.select = "best" if arg.phase == "tune" else "last"
  return config
