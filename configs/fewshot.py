"""Few-shot: k images of every class, on NOAH's five fine-grained sets or on CoOp's eleven.

    transferlab train --config=configs/fewshot.py:task=fewshot/oxford_pets,shots=4,method=dtl --workdir=runs/pets
    transferlab train --config=configs/fewshot.py:method=dtl --suite=fewshot5 --data_dir=/data --workdir=runs/few
    transferlab train --config=configs/fewshot.py:method=lora --suite=coop11 --seeds=1,2,3 --workdir=runs/coop

Published: 1, 2, 4, 8 and 16 shots (the default); seeds 0 to 2 of NOAH's lists, 1 to 3 of CoOp's draws. `seed` is that
of the images and of the training. "fewshot/" chooses the step on val every 10 epochs, as DTL does; "coop/" takes the
last step. A task without a slash is one of NOAH's. The rates are starting points: those published go by data set and
shots, and are not used here.
"""
from transferlab.experiment import arguments, defaults, published


def get_config(text=None):
  arg = arguments(text, task="oxford_pets", method="linear", backbone="vit_formula64", shots=16, phase="final",
                  source="", counts="expected", seed=0)
  coop = arg.task.startswith("coop/")
  config = defaults(arg.method, data=published(arg, "fewshot", "shots", "seed", "phase", "source", "counts"),
                    backbone=arg.backbone, seed=arg.seed)
  config.duration = "100 epochs"
  config.batch_size = 32
  config.augmentation = "crop_flip" if coop else "fewshot"
  config.drop_last = not coop  # EuroSAT with 1 shot has 10 images, fewer than a batch
  config.optim.warmup = "10 percent"
  config.evaluate_every = "10 epochs"
  config.select = "last" if coop and arg.phase == "final" else "best"
  return config
