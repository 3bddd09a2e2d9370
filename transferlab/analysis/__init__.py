"""What finished runs show beyond their averages: `transferlab report RUNS --figure=head2toe/layers --out=FOLDER`.

Every figure is a CSV file and, where matplotlib is installed, a picture.
"""
from collections.abc import Callable, Sequence
from pathlib import Path

from transferlab.analysis import accuracy, rank, selected
from transferlab.analysis.selected import given as given
from transferlab.analysis.sensitivity import ledgers as ledgers, sensitivity
from transferlab.analysis.sites import sites
from transferlab.tree import nearest

# name: (rows of `report.read`, or of `ledgers`, folder, allow, …) -> (files written, lines to print)
FIGURES: dict[str, Callable[..., tuple[list[Path], list[str]]]] = {
    "head2toe/layers": selected.layers,
    "head2toe/overlap": selected.overlap,
    "head2toe/transfer": selected.transfer,
    "head2toe/taps": accuracy.taps,
    "head2toe/target_size": accuracy.target_size,
    "head2toe/affinity": accuracy.affinity,
    "inca/sites": sites,
    "dtl/sensitivity": sensitivity,
    "lfa/rank": rank.rank,
}
WITHOUT_RUNS = ("head2toe/affinity", "lfa/rank")  # they have the papers' numbers, or look at a backbone
OF_SWEEPS = ("dtl/sensitivity",)                  # they take the rows of sweeps' ledgers
ON_IMAGES = ("lfa/rank",)                         # they run a backbone over images, and take both


def figure(name: str, rows: Sequence[dict], folder, allow: Sequence[str] = (), **given) -> tuple[list[Path], list[str]]:
  """Makes a figure of `FIGURES`.

  Args:
    rows: of `report.read`, or of `ledgers` for those in `OF_SWEEPS`.
    folder: for its files.
    allow: fields in which runs may differ all the same, as of `report.report`.
    given: of those in `ON_IMAGES`, see `rank.rank`.

  Raises:
    ValueError: an unknown name; no runs that the figure is about, or runs that must not stand in one.
  """
  if name not in FIGURES:
    raise ValueError(f"figure {name!r} is unknown; nearest: {nearest(name, FIGURES)[0]}; all: {', '.join(FIGURES)}")
  return FIGURES[name](rows, folder, allow, **given)
