"""Domain generalisation: train on all domains of a data set but one, test on that one; or on a shifted ImageNet.

    transferlab train --config=configs/domain_generalization.py:task=pacs/sketch,method=lora --workdir=runs/sketch
    transferlab train --config=configs/domain_generalization.py:method=lora --suite=pacs --workdir=runs/pacs

Suites: pacs, vlcs, office_home, terra_incognita, domainnet, with DomainBed's seeded 80/20 cut of every domain (`seed`
is its trial), one batch of every training domain in each step, and the step chosen on the training domains' 20 %. The
published runs take 5,000 steps, squash test images to a square, as here, and augment validation images, too; their
rates, of SGD on CLIP's heads, suit no other method and are not used here.
imagenet_shift: 16 images of every ImageNet class, tested on -V2, -Sketch, -A and -R.
"""
from transferlab.experiment import arguments, defaults, published


def get_config(text=None):
  arg = arguments(text, task="pacs/sketch", method="linear", backbone="vit_formula64", source="", counts="expected",
                  seed=0)
  imagenet = arg.task.startswith("imagenet/")
  data = f"{published(arg, 'pacs', 'source', 'counts')}&{'seed' if imagenet else 'trial'}={arg.seed}"
  config = defaults(arg.method, data=data, backbone=arg.backbone, seed=arg.seed,
                    preprocessing="" if imagenet else "crop=squash")
  config.duration = "5000 steps"
  config.batch_size = 32
  config.evaluate_every = "300 steps"
  config.checkpoint_every = "300 steps"
  config.per_domain = not imagenet
  config.augmentation = "fewshot" if imagenet else "domainbed"
  config.select = "last" if imagenet else "best"
  return config
