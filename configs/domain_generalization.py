"""Domain generalisation: train on all domains of a data set but one, test on that one; or on a shifted ImageNet.

    transferlab train --config=configs/domain_generalization.py:task=pacs/sketch,method=lora --workdir=runs/sketch
    transferlab train --config=configs/domain_generalization.py:method=lora --suite=pacs --workdir=runs/pacs

Suites: pacs, vlcs, office_home, terra_incognita, domainnet, with DomainBed's seeded 80/20 cut of every domain (`seed`
is its trial), one batch of every training domain in each step, and the step chosen on the training domains' 20 %. The
published runs take 5,000 steps, squash test images to a square, as here, and augment validation images, too. Methods
with the option `templates` get "a photo of a {}", without a full stop; the prompts of dpl, coop and maple have one.
imagenet_shift: 16 images of every ImageNet class, tested on -V2, -Sketch, -A and -R.

`protocol=paper` takes the published hyper-parameters for imagenet_shift on ViT-B/16, and those of LFA's comparison for
the other suites on a CLIP ViT-B/16. For anything else there is an error.
On imagenet_shift dtl and dtl_plus (kernel 3) have 110 epochs, drop-path 0, the last epoch's model, and a rate and a run
for every test set: what is tested is known to the tuning. lora, adapter and vpt_deep (50 prompts) are NOAH's, one model
for all test sets, with mixup, CutMix, smoothed labels and erasing, and ImageNet's normalisation where DTL has 0.5/0.5.
So the seven points between them in DTL's table 4 are not of like against like. Labels are of all 1,000 classes
everywhere.

    transferlab train --config=configs/domain_generalization.py:method=dtl_plus,protocol=paper,backbone=FILE \
        --suite=imagenet_shift --workdir=runs/published

LFA's comparison: lfa, clip_linear, dpl and qlora with SGD of rate 1e-3 and momentum 0.1 for 5,001 steps, 32 images of
every training domain, images squashed to a square; LFA on a trained QLoRA with base=qlora; miro as in its own
repository; zero_shot. For the first four these are the first of the draws that DomainBed searches; rates=chosen gives
draws=5 of them to a sweep. A trial has its own splits and its own draws, so it is a sweep of its own; accuracies are
means over test domains and over trials:

    for trial in 0 1 2; do transferlab sweep --suite=pacs --seeds=$trial --data_dir=/data --workdir=runs/lfa/$trial \
        --config=configs/domain_generalization.py:method=lfa,protocol=paper,rates=chosen,backbone=FILE; done
    transferlab report runs/lfa --paper=lfa/dg

`compat=released` adds what the released code does and we hold for mistakes, where it can be said: ImageNet's
normalisation of images for CLIP, and the method's own compat=released. What cannot is told when the run begins: theirs
trains from features cached by file name, whatever the augmentation was, and augments validation images.
"""
from transferlab.experiment import arguments, defaults, published
from transferlab.papers import domainbed, recipes


def _arguments(text):
  return arguments(text, task="pacs/sketch", method="linear", backbone="vit_formula64", source="", counts="expected",
                   seed=0, draws=5, compat="", **recipes.ARGUMENTS)


def get_config(text=None):
  arg = _arguments(text)
  suite = arg.task.partition("/")[0]
  imagenet = suite == "imagenet"
  data = f"{published(arg, 'pacs', 'source', 'counts')}&{'seed' if imagenet else 'trial'}={arg.seed}"
  config = defaults(arg.method, data=data, backbone=arg.backbone, seed=arg.seed,
                    preprocessing="" if imagenet else "crop=squash,crop_fraction=1")
  recipes.set_templates(config)
  config.duration = "5000 steps"
  config.batch_size = 32
  config.evaluate_every = config.checkpoint_every = "1000 steps" if suite == "domainnet" else "300 steps"
  config.per_domain = not imagenet
  config.augmentation = "fewshot" if imagenet else "domainbed"
  config.select = "last" if imagenet else "best"
  if recipes.asked(arg):
    if not imagenet and arg.rates == "chosen":
      arg.rates = "published"  # the first of the draws
    recipes.apply(config, recipes.of_arguments(arg, config.data), arg.compat)
  elif arg.compat:
    raise ValueError("config argument compat is for protocol=paper; add it, or leave compat out")
  return config


def get_grid(text=None):
  """DomainBed's draws of a trial, for rates=chosen; nothing else."""
  arg = _arguments(text)
  if not recipes.asked(arg) or arg.rates != "chosen":
    return {}
  return domainbed.draws(recipes.called(arg), arg.task.partition("/")[0], arg.seed, arg.draws)
