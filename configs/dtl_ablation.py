"""DTL's ablations on VTAB-1k (Fu et al. 2024, arXiv 2312.07856): table 5, and figure 4's accuracy and costs by M.

    for row in identity dtl dtl_plus rank4 rank1; do transferlab train --suite=vtab1k --data_dir=/data \
        --config=configs/dtl_ablation.py:row=$row,backbone=vit_b16.orig_in21k --workdir=runs/ablation/$row; done
    transferlab report runs/ablation --paper=dtl/table5
    transferlab train --config=configs/dtl_ablation.py:row=rank4,task=dtd --workdir=runs/one

    transferlab sweep --config=configs/dtl_ablation.py:row=dtl,task=dtd,phase=tune,backbone=vit_b16.orig_in21k \
        --nofinal --data_dir=/data --workdir=runs/by_m
    transferlab report runs/by_m --figure=dtl/sensitivity --out=figures

Rows are table 5's: DTL without a gate (identity), DTL, DTL+, and DTL+ of rank 4 and 1. All have the hyper-parameters
that are published for DTL, or DTL+, and the task, see configs/vtab.py; that the paper kept them for ablations is our
reading. The grid is over M from 1 to `depth`, the backbone's; any other is given as --grid. Other data:
--config.data=folder:/x with --config.optim.lr= for it.
"""
from transferlab.experiment import arguments, change, defaults, published
from transferlab.papers import recipes

ROWS = {"identity": ("dtl", {"activation": "identity"}), "dtl": ("dtl", {}), "dtl_plus": ("dtl_plus", {}),
        "rank4": ("dtl_plus", {"rank": 4}), "rank1": ("dtl_plus", {"rank": 1})}


def _arguments(text):
  return arguments(text, row="dtl", task="dtd", backbone="vit_formula64", phase="final", source="", counts="expected",
                   family="", depth=12, seed=0)


def get_config(text=None):
  arg = _arguments(text)
  if arg.row not in ROWS:
    raise ValueError(f"config argument row is {arg.row!r}; expected one of {', '.join(ROWS)}")
  method, options = ROWS[arg.row]
  config = defaults(method, data=published(arg, "vtab", "phase", "source", "counts"), backbone=arg.backbone,
                    seed=arg.seed, select="last")
  family = arg.family or recipes.family_of(arg.backbone)
  recipes.apply(config, recipes.find(method, config.data.partition("?")[0], family))
  for name, value in options.items():
    change(config, f"options.{name}", value)
  return config


def get_grid(text=None):
  """Figure 4's: M, from the first block to the last."""
  return {"options.first_write": tuple(range(1, _arguments(text).depth + 1))}
