"""VTAB-1k: one of its 19 tasks, or with --suite=vtab1k all that are present.

    transferlab train --config=configs/vtab.py:task=dtd,method=dtl,backbone=vit_b16.augreg_in21k --workdir=runs/dtd
    transferlab train --config=configs/vtab.py:method=dtl --suite=vtab1k --data_dir=/data --workdir=runs/vtab

The default phase trains on the 1,000 images of train800val200 and reports the last step on test, as published.
`phase=tune` trains on 800, chooses the step on the other 200 and has no test: for choosing hyper-parameters.
`source=list` (or array_record, tfrecord) chooses where several forms lie; `counts=any` takes an incomplete set.
Images are squashed to a square and not augmented, as published; range, mean and std are those of the weights.
"""
from transferlab.experiment import arguments, defaults, published


def get_config(text=None):
  arg = arguments(text, task="dtd", method="linear", backbone="vit_formula64", phase="final", source="",
                  counts="expected", seed=0)
  config = defaults(arg.method, data=published(arg, "vtab", "phase", "source", "counts"), backbone=arg.backbone,
                    preprocessing="crop=squash", seed=arg.seed)
  config.duration = "100 epochs"
  config.batch_size = 32
  config.optim.warmup = "10 percent"
  config.select = "best" if arg.phase == "tune" else "last"
  return config
