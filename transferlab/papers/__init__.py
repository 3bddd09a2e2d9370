"""Tables that papers printed, beside what runs of ours gave: `transferlab report [RUNS] --paper=head2toe/vit_b16`.

A paper's numbers lie in a JSON file of its own, its module makes tables of them.
"""
from collections.abc import Callable, Sequence
from functools import partial

from transferlab.papers import head2toe
from transferlab.papers.table import Table
from transferlab.tree import nearest

# name: (rows of `report.read`, split=, allow=) -> tables; without rows they hold the paper's numbers alone.
TABLES: dict[str, Callable[..., list[Table]]] = {
    "head2toe/cost": head2toe.cost_table,
    "head2toe/resnet50": partial(head2toe.accuracy_table, "resnet50"),
    "head2toe/vit_b16": partial(head2toe.accuracy_table, "vit_b16"),
}


def tables(name: str, rows: Sequence[dict] = (), *, split: str = "test", allow: Sequence[str] = ()) -> list[Table]:
  """The tables of a name in `TABLES`; `split` and `allow` as of `report.report`, for our rows."""
  if name not in TABLES:
    raise ValueError(f"paper {name!r} is unknown; nearest: {nearest(name, TABLES)[0]}; all: {', '.join(TABLES)}")
  return TABLES[name](rows, split=split, allow=allow)
