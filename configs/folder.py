"""A folder of images, any backbone, any method.

    transferlab train --config=configs/folder.py:data=folder:/path/to/images,method=dtl --workdir=runs/mine

`data` also takes domains:/path?test_domain=sketch, list:/path?train=train.txt, classes:/path/of/lists, csv:/file.csv
and digits; `backbone` a zoo name, a weights file or folder, or hf:owner/name. Every other key is set after it, e.g.
--config.optim.lr=3e-4.
"""
from transferlab.experiment import arguments, defaults


def get_config(text=None):
  arg = arguments(text, data="", backbone="vit_formula64", method="linear", seed=0)
  config = defaults(arg.method, data=arg.data, backbone=arg.backbone, seed=arg.seed)
  config.duration = "20 epochs"
  config.batch_size = 32
  config.augmentation = "flip"  # digits, text and left-right tasks want "none"
  config.optim.warmup = "10 percent"
  return config
