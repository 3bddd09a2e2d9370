"""Domain generalisation: train on all domains of a data set but one, test on that one; or on a shifted ImageNet.

    transferlab train --config=configs/domain_generalization.py:task=pacs/sketch,method=lora --workdir=runs/sketch
    transferlab train --config=configs/domain_generalization.py:method=lora --suite=pacs --workdir=runs/pacs

Suites: pacs, vlcs, office_home, terra_incognita, domainnet, with DomainBed's seeded 80/20 cut of every domain (`seed`
is its trial), one batch of every training domain in each step, and the step chosen on the training domains' 20 %. The
published runs take 5,000 steps, squash test images to a square, as here, and augment validation images, too; their
rates, of SGD on CLIP's heads, suit no other method and are not used here.
imagenet_shift: 16 images of every ImageNet class, tested on -V2, -Sketch, -A and -R.

`protocol=paper` takes the published hyper-parameters for imagenet_shift on ViT-B/16, and is an error for other suites.
dtl and dtl_plus (kernel 3) have 110 epochs, drop-path 0, the last epoch's model, and a rate and a run for every test
set: what is tested is known to the tuning. lora, adapter and vpt_deep (50 prompts) are NOAH's, one model for all test
sets, with mixup, CutMix, smoothed labels and erasing, and ImageNet's normalisation where DTL has 0.5/0.5. So the seven
points between them in DTL's table 4 are not of like against like. Labels are of all 1,000 classes everywhere.

    transferlab train --config=configs/domain_generalization.py:method=dtl_plus,protocol=paper,backbone=FILE \
        --suite=imagenet_shift --workdir=runs/published
"""
from transferlab.experiment import arguments, defaults, published
from transferlab.papers import recipes


def get_config(text=None):
  arg = arguments(text, task="pacs/sketch", method="linear", backbone="vit_formula64", source="", counts="expected",
                  seed=0, **recipes.ARGUMENTS)
  imagenet = arg.task.startswith("imagenet/")
  data = f"{published(arg, 'pacs', 'source', 'counts')}&{'seed' if imagenet else 'trial'}={arg.seed}"
  config = defaults(arg.method, data=data, backbone=arg.backbone, seed=arg.seed,
                    preprocessing="" if imagenet else "crop=squash,crop_fraction=1")
  config.duration = "5000 steps"
  config.batch_size = 32
  config.evaluate_every = "300 steps"
  config.checkpoint_every = "300 steps"
  config.per_domain = not imagenet
  config.augmentation = "fewshot" if imagenet else "domainbed"
  config.select = "last" if imagenet else "best"
  if recipes.asked(arg):
    recipes.apply(config, recipes.of_arguments(arg, config.data))
  return config
