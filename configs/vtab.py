"""VTAB-1k: one of its 19 tasks, or with --suite=vtab1k all that are present.

    transferlab train --config=configs/vtab.py:task=dtd,method=dtl,backbone=vit_b16.augreg_in21k --workdir=runs/dtd
    transferlab train --config=configs/vtab.py:method=dtl --suite=vtab1k --data_dir=/data --workdir=runs/vtab
    transferlab train --config=configs/vtab.py:task=dtd,method=dtl_plus,protocol=paper,backbone=vit_b16.orig_in21k \
        --workdir=runs/published
    transferlab sweep --config=configs/vtab.py:task=dtd,method=vpt_deep,protocol=paper,rates=chosen,phase=tune \
        --final=phase=final --workdir=runs/vpt

The default phase trains on the 1,000 images of train800val200 and reports the last step on test, as published.
`phase=tune` trains on 800, chooses the step on the other 200 and has no test: for choosing hyper-parameters.
`source=list` (or array_record, tfrecord) chooses where several forms lie; `counts=any` takes an incomplete set.
Images are squashed to a square and not augmented, as published; range, mean and std are those of the weights.

`protocol=paper` takes the hyper-parameters of released code, which may differ from task to task: dtl and dtl_plus on
ViT-B/16 and Swin-B; fact_tt, fact_tk, ssf, noah (its published sub-nets), noah_search (with phase=tune), lora, adapter
and adaptformer on ViT-B/16; vpt_deep for the three tasks of VPT's demo. Which backbone it is says its name, or
family=vit, family=swin. linear, full, bitfit and VPT have a protocol of choosing on validation instead of values:
rates=chosen, with the grid that the file then offers to sweeps. For anything else there is an error, no default. The
last epoch is reported. With other weights, another resolution or other images the same values are not what was
published.

Where the repositories differ, from each other or from this:
  normalisation: 0.5/0.5 in DTL, SSF and NOAH's VPT, ImageNet's mean and std in FacT, in NOAH's LoRA and Adapter and in
    VPT's loader; here what belongs to the weights, for all methods, since it moves accuracies by points. The line that
    the run begins with says how to set theirs.
  which rate an epoch has: DTL and SSF count epochs from 0 and warm up within a cosine of 100 epochs, so that the peak
    is 0.9755 of the rate, then idle for 10 more; NOAH and FacT start with two epochs at the first rate; VPT's first
    epoch has rate 0. `optim.schedule` has each of them; our own cosine has none of it.
  what is reported: DTL the last epoch; FacT the largest test accuracy of every 10th epoch, SSF the best test epoch,
    NOAH a running maximum over test. We never choose on test, in no protocol, so expect less than theirs.
  what decays: DTL all but the classifier's bias, FacT all, SSF the classifier's kernel alone.
  read-out: DTL pools patches (`options.readout`), all others read the class token.
  LoRA and Adapter are NOAH's, one A for q, k and v, and weights that NOAH's initialisation draws anew (compat=noah);
    FacT-TK's slices are read in the released order (compat=released). FacT's, AdaptFormer's and LoRA's scales per task
    in PETL-ViT's binary adapters are of another width, 32 bits of 1, and not used.
  #param leaves the classifier out everywhere; NOAH's 0.43 counts a position table of prompts that it never uses (0.36
    in FacT's paper), DTL+'s 0.13 on Swin-B only convolutions in use.
"""
from transferlab.experiment import arguments, defaults, published
from transferlab.papers import recipes


def _arguments(text):
  return arguments(text, task="dtd", method="linear", backbone="vit_formula64", phase="final", source="",
                   counts="expected", seed=0, **recipes.ARGUMENTS)


def get_config(text=None):
  arg = _arguments(text)
  config = defaults(arg.method, data=published(arg, "vtab", "phase", "source", "counts"), backbone=arg.backbone,
                    preprocessing="crop=squash,crop_fraction=1", seed=arg.seed)
  config.duration = "100 epochs"
  config.batch_size = 32
  config.optim.warmup = "10 percent"
  config.select = "best" if arg.phase == "tune" else "last"
  if recipes.asked(arg):
    recipes.apply(config, recipes.of_arguments(arg, config.data))
    config.select = "last"
  return config


def get_grid(text=None):
  """What a paper's protocol chooses on validation, for rates=chosen; nothing else."""
  arg = _arguments(text)
  return recipes.of_arguments(arg, published(arg, "vtab")).grid if recipes.asked(arg) else {}
