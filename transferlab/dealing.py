"""Work that several processes share out: each does its part alone, on its own devices, and then all go on together."""
import itertools
from collections.abc import Callable, Sequence

from transferlab import distributed


def shares(groups: Sequence[Sequence[int]], count: int) -> list[list[tuple[int, list[int]]]]:
  """Deals groups of grid points out over `count` processes: for each of them [(number of the group, its points)].

  Where there are enough groups each goes to one process as a whole, the largest first, to whoever has least; it is
  compiled once then. Otherwise all points, in order, are cut into contiguous parts of about equal size.
  """
  there = [number for number, points in enumerate(groups) if points]
  if len(there) >= count:
    dealt: list[list[int]] = [[] for _ in range(count)]
    for number in sorted(there, key=lambda number: -len(groups[number])):
      min(dealt, key=lambda own: sum(len(groups[each]) for each in own)).append(number)
    return [[(number, list(groups[number])) for number in sorted(own)] for own in dealt]
  flat = [(number, point) for number in there for point in groups[number]]
  cuts = [-(-len(flat) * place // count) for place in range(count + 1)]
  group_of = lambda pair: pair[0]
  return [[(number, [point for _, point in part]) for number, part in itertools.groupby(flat[start:end], group_of)]
          for start, end in itertools.pairwise(cuts)]


def apart(name: str, work: Callable[[], None], waiting: Callable[[int], None]) -> None:
  """Does `work`, this process's own, inside `distributed.alone`, and waits until all processes have done theirs.

  One that fails raises, as always, and does not wait.

  Args:
    name, waiting: as of `distributed.meet`.
  """
  if distributed.hosts()[1] == 1:
    work()
    return
  with distributed.alone():
    work()
  distributed.meet(name, None, waiting)
