"""Few-shot: k images of every class, on NOAH's five fine-grained sets or on CoOp's eleven.

    transferlab train --config=configs/fewshot.py:task=fewshot/oxford_pets,shots=4,method=dtl --workdir=runs/pets
    transferlab train --config=configs/fewshot.py:method=dtl --suite=fewshot5 --data_dir=/data --workdir=runs/few
    transferlab train --config=configs/fewshot.py:method=lora --suite=coop11 --seeds=1,2,3 --workdir=runs/coop

Published: 1, 2, 4, 8 and 16 shots (the default); seeds 0 to 2 of NOAH's lists, 1 to 3 of CoOp's draws. `seed` is that
of the images and of the training. "fewshot/" chooses the step on val every 10 epochs, as DTL does; "coop/" takes the
last step. A task without a slash is one of NOAH's. The rates are starting points. Methods that read class names as
texts get CoOp's names of the classes, and those with the option `templates` its template of the data set.

`protocol=paper` takes the published hyper-parameters, by data set and shots, for dtl and dtl_plus (110 epochs,
drop-path 0, kernel 3; test images 256 x 256 pixels before the centre is cut), and NOAH's for lora and adapter (batches
of 64, with mixup, CutMix, smoothed labels and erasing), all on ViT-B/16 and on NOAH's lists; for others there is an
error. What the repositories do with images and the choice of an epoch is told when the run begins, and listed in
configs/vtab.py. NOAH's normalisation is ImageNet's and DTL's 0.5/0.5, and the augmentation differs, too, so that
published gaps between the two are not those of the methods alone. We choose on val, never on test.

    transferlab train --config=configs/fewshot.py:method=dtl_plus,shots=4,protocol=paper,backbone=vit_b16.orig_in21k \
        --suite=fewshot5 --workdir=runs/published

On a CLIP ViT-B/16 and CoOp's draws of 16 shots it takes those of LFA's comparison: lfa, coop, clip_adapter, maple,
clip_linear and zero_shot. SGD, whose decay of 5e-4 is added before the momentum; a first epoch at 1e-5, then a cosine
that does not reach 0; random crops and flips with CLIP's own normalisation; the last epoch's model. EuroSAT trains 200
epochs, ImageNet has rows of its own, and with LFA eight templates. Those trained in float16, CoOp, MaPLe and
clip_linear, train in float32 here.

    transferlab train --config=configs/fewshot.py:method=lfa,protocol=paper,backbone=FILE --suite=coop11 \
        --seeds=1,2,3 --data_dir=/data --workdir=runs/clip/lfa
    transferlab report runs/clip --paper=lfa/fewshot

base=coop, base=clip_adapter and base=maple take LFA's on a method that trains first, by its own recipe.
"""
from transferlab.experiment import arguments, defaults, published
from transferlab.papers import recipes


def get_config(text=None):
  arg = arguments(text, task="oxford_pets", method="linear", backbone="vit_formula64", shots=16, phase="final",
                  source="", counts="expected", seed=0, **recipes.ARGUMENTS)
  coop = arg.task.startswith("coop/")
  config = defaults(arg.method, data=published(arg, "fewshot", "shots", "seed", "phase", "source", "counts"),
                    backbone=arg.backbone, seed=arg.seed)
  recipes.set_templates(config)
  config.duration = "100 epochs"
  config.batch_size = 32
  config.augmentation = "crop_flip" if coop else "fewshot"
  config.drop_last = not coop  # EuroSAT with 1 shot has 10 images, fewer than a batch
  config.optim.warmup = "10 percent"
  config.evaluate_every = "10 epochs"
  config.select = "last" if coop and arg.phase == "final" else "best"
  if recipes.asked(arg):
    recipes.apply(config, recipes.of_arguments(arg, config.data, arg.shots))
  return config
