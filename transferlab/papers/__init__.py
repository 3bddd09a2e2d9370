"""Tables that papers printed, beside what runs of ours gave: `transferlab report [RUNS] --paper=head2toe/vit_b16`.

A paper's numbers lie in a JSON file of its own, its module makes tables of them. `recipes` has published
hyper-parameters.
"""
from collections.abc import Callable, Sequence
from functools import partial

from transferlab.papers import dtl, dtl_costs, dtl_figures, head2toe, lfa, lfa_costs
from transferlab.papers.table import Table
from transferlab.tree import nearest

# name: (rows of `report.read`, split=, allow=) -> tables; without rows they hold the paper's numbers alone.
TABLES: dict[str, Callable[..., list[Table]]] = {
    "head2toe/cost": head2toe.cost_table,
    "head2toe/resnet50": partial(head2toe.accuracy_table, "resnet50"),
    "head2toe/vit_b16": partial(head2toe.accuracy_table, "vit_b16"),
    "dtl/table1": dtl_costs.units,
    "dtl/table2": partial(dtl.vtab, "table2"),
    "dtl/table3": partial(dtl.vtab, "table3"),
    "dtl/table4": dtl.domains,
    "dtl/table5": dtl.ablation,
    "dtl/table6": dtl_costs.throughput,
    "dtl/figure1": dtl_figures.trade_off,
    "dtl/figure3": dtl_figures.few_shot,
    "lfa/fewshot": lfa.few_shot,
    "lfa/dg": lfa.domains,
    "lfa/efficiency": lfa_costs.efficiency,
}
MEASURED = ("dtl/table2", "dtl/table3", "dtl/table6", "lfa/efficiency")  # they take measure=True
DRAWN = ("dtl/figure1", "dtl/figure3")                                   # they take out=


def tables(name: str, rows: Sequence[dict] = (), *, split: str = "test", allow: Sequence[str] = (),
           measure: bool = False, out: str = "") -> list[Table]:
  """The tables of a name in `TABLES`.

  Args:
    rows: of our runs, `report.read`.
    split, allow: as of `report.report`, for our rows.
    measure: measure what is measured on this machine, which takes minutes; for those in `MEASURED`.
    out: picture to write, FILE.png, with FILE.csv beside it; for those in `DRAWN`.
  """
  if name not in TABLES:
    raise ValueError(f"paper {name!r} is unknown; nearest: {nearest(name, TABLES)[0]}; all: {', '.join(TABLES)}")
  more = {}
  for option, value, known in (("measure", measure, MEASURED), ("out", out, DRAWN)):
    if value and name not in known:
      raise ValueError(f"--{option} is not for --paper={name}; it is for {', '.join(known)}; leave it out")
    more |= {option: value} if value else {}
  return TABLES[name](rows, split=split, allow=allow, **more)
