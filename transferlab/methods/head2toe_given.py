"""Head2Toe's last stage on features that are given: those that another task selected (Evci et al. 2022, arXiv
2201.03529, ask how far tasks share their features)."""
import numpy as np

from transferlab.method import Method
from transferlab.methods.head2toe import all_features, on_selected
from transferlab.methods.head2toe_reader import reader


def head2toe_given(spec, *, kept: tuple = (), total: int = 0, source: str = "", sites: str | tuple = "paper",
                   target_size: int = 512, cls: str = "normal", normalisation: str = "unit",
                   compat: str | None = None) -> Method:
  """A linear head on given features, trained as `head2toe` trains its second stage, without a penalty.

  Args:
    spec: the backbone's spec.
    kept: indices among all N features, different ones in any order; () for all of them. `analysis.given` reads them,
      and the options below, from the adapter of a run of `head2toe`.
    total: the N that `kept` counts among. A backbone or options with another number of features are refused, since the
      same index would be another feature there; 0 checks nothing.
    source: the task that selected them, for reports.
    sites, target_size, cls, normalisation, compat: as of `all_features`; the first three say which features there are.

  Trainable: {"classifier": {"kernel": [K, C], "bias": [C]}}. State: {"kept": [K] int32}. Does not merge.
  """
  shared = {"sites": sites, "target_size": target_size, "cls": cls, "normalisation": normalisation, "compat": compat}
  options = {"kept": kept, "total": total, "source": source, **shared}
  everything = all_features(spec, penalty="none", coefficient=0.0, **shared)  # it checks the options, too
  read = reader(spec, sites, target_size, cls)
  found = read.layout.total
  if total not in (0, found):
    raise ValueError(f"kept counts among {total} features and {spec.name} has {found} with these options; expected the "
                     "backbone, sites, target_size and cls of the run that selected them")
  if not kept:
    return everything._replace(name="head2toe_given", options=options, varies=())
  wrong = [i for i in kept if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < found]
  if wrong or len(set(kept)) < len(kept):
    what = repr(wrong[0]) if wrong else "a number twice"
    raise ValueError(f"kept holds {what}; expected different whole numbers from 0 to {found - 1}, indices among the "
                     f"{found} features of these options")
  return on_selected(spec, "head2toe_given", options, read, np.array(kept, np.int32))._replace(varies=())
