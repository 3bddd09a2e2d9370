"""Head2Toe (Evci et al. 2022, arXiv 2201.03529): the method, its baselines and the whole grid of its paper, on VTAB-1k.

    transferlab train --config=configs/head2toe.py:task=dtd,method=head2toe,backbone=resnet50_v2.npz,logits=true \
        --config.options.target_size=8192 --workdir=runs/dtd
    transferlab sweep --config=configs/head2toe.py:task=dtd,method=all_l21 --folds=5 --contiguous --features=features \
        --workdir=runs/dtd_grid

`method` is a registered one, or a name of the paper's, see NAMES: linear, all_none, all_l1, all_l2, all_l21 ("+All"),
full (fine-tuning) and head2toe_ft_plus, which is a choice between head2toe and head2toe_ft by the sweep. The slides'
domain affinity is the accuracy of linear minus that of scratch. `given=runs/svhn/adapter.safetensors` trains on the
features that a run of head2toe selected, on another task for instance. `logits=true` is for a ResNet file with its
classifier: then ResNet-50 v2 at 224 px has the paper's 30440, 467688 or 1696552 features. Any other data:
--config.data=folder:/x.

compat=paper reproduces three quirks of the original code: TensorFlow 1's resize, one order of the images in all epochs,
and a loss that divides by the nominal batch size. Without it images are resized as the weights want, each epoch is
shuffled, and the loss is a mean. Either way images are squashed to a square, uncropped and not augmented.

What is known of the paper's setting, the body of which we have not seen:
  by numbers that it prints: target sizes 512, 8192, 24576 (the number of features), 500 or 5000 steps and the fractions
    (the cost table; a longer list may have been searched);
  by its code and the slides: batches of 128, the last one short, Keras' Adam with eps 1e-7, cosine without warm-up, no
    weight decay, no early stopping, 5 contiguous folds, 3 seeds;
  by the code's default and an example: learning rates 0.1 and 0.01, coefficients 1e-4 and 1e-5 for Head2Toe;
  unknown, and chosen by us: the third coefficient that baselines have (1e-3), the target sizes for a ViT (the same),
    and all rates where the backbone trains: 1e-3 and 1e-4, for a new head on a pre-trained one 100 times as much (the
    code has one rate for both).
Its folds are of the first 1000 images of TFDS's "train"; its final runs train on train800val200, which differ in 200
images for most tasks. Here folds are of train800val200 itself, 800 and 200 images as there; phase=tune, for sweeps
without folds, trains on train800 and validates on val200. The images of "test" are never part of either. Folds train
side by side on batches of all 1000, where held-out images have weight 0: some 102 of 128 count, theirs are full.
"""
from transferlab.experiment import arguments, defaults, published

NAMES = {  # of the paper: (registered method, its options)
    "linear": ("all_features", {"sites": "pooled", "penalty": "none"}),  # of pre_logits at length 1, unlike our linear
    "all_none": ("all_features", {"penalty": "none"}), "all_l1": ("all_features", {"penalty": "l1"}),
    "all_l2": ("all_features", {"penalty": "l2"}), "all_l21": ("all_features", {"penalty": "l21"}),
    "full": ("head2toe_ft", {"sites": "pooled", "fraction": 1.0}),       # as well
    "head2toe_ft_plus": ("head2toe", {})}
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
FROZEN = ("linear", "all_none", "all_l1", "all_l2", "all_l21", "all_features", "head2toe", "head2toe_layers")
TUNED = ("full", "head2toe_ft", "head2toe_ft_plus")  # pre-trained backbone and head; the last may leave it frozen


def _arguments(text):
  return arguments(text, task="dtd", method="head2toe", backbone="vit_formula64", phase="final", source="",
                   counts="expected", seed=0, compat="", logits=False, given="")


def get_config(text=None):
  arg = _arguments(text)
  if arg.compat not in ("", "paper"):
    raise ValueError(f"config argument compat is {arg.compat!r}; expected paper, or nothing")
  paper = arg.compat == "paper"
  name, options = NAMES.get(arg.method, (arg.method, {}))
  if arg.given:
    from transferlab import analysis
    if arg.method != "head2toe":
      raise ValueError(f"config argument given is for method=head2toe, not {arg.method}; leave one of them out")
    name, options = "head2toe_given", analysis.given(arg.given)
  config = defaults(name, data=published(arg, "vtab", "phase", "source", "counts"), backbone=arg.backbone,
                    logits=arg.logits, seed=arg.seed, reshuffle=not paper)
  config.preprocessing = "crop=squash,crop_fraction=1" + ",interpolation=bilinear_tf1" * paper
  with config.options.ignore_type():  # sites may be several
    config.options.update(options)
  if paper and "compat" in config.options:
    with config.options.ignore_type():
      config.options.compat = "paper"
  config.duration = "500 steps"
  config.batch_size = 128
  config.drop_last = False
  config.optim.update(name="adam_keras", eps=1e-7, schedule="cosine", weight_decay=0.0)
  if arg.method in FROZEN:
    config.optim.lr = 0.01
  elif arg.method in TUNED:
    config.optim.lr, config.optim.lr_factors = 1e-4, (("classifier/.*", 100.0),)
  config.select = "last"
  config.evaluate_every = "100 percent"
  config.checkpoint_every = "20 percent"  # with its moments, a head of 1,696,552 features and 100 classes takes 2 GB
  return config


def get_grid(text=None):
  """The paper's grid of its methods, nothing for others. Fractions are one value, which is trained side by side, where
  the backbone is frozen."""
  arg = _arguments(text)
  method = "linear" if arg.given else arg.method  # nothing to select: rates and durations alone
  if method not in (*FROZEN, *TUNED, "scratch"):
    return {}
  grid = {"method": ("head2toe", "head2toe_ft")} if method == "head2toe_ft_plus" else {}
  grid["optim.lr"] = (0.1, 0.01) if method in FROZEN else (1e-3, 1e-4)
  grid["duration"] = ("500 steps", "5000 steps")
  if method.startswith(("all_", "head2toe")):
    grid["options.target_size"] = (512, 8192, 24576)
  if method.startswith("head2toe"):
    grid["options.coefficient"] = (1e-4, 1e-5)
    grid["options.fraction"] = FRACTIONS if method in TUNED else (FRACTIONS,)
  elif method in ("all_l1", "all_l2", "all_l21", "all_features"):
    grid["options.coefficient"] = (1e-3, 1e-4, 1e-5)
  return grid
