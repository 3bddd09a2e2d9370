"""A sweep's ledger, and the choice among what is in it."""
import hashlib
import json
import math
import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from transferlab import distributed
from transferlab.files import atomic, write_json
from transferlab.progress import show_table
from transferlab.workdir import Workdir


class Candidate(NamedTuple):
  """What can be chosen.

  Fields:
    values: {key: value} of the grid, without the seed.
    member: of the method's classifiers; "" where it has but one.
    score, loss: means over folds and seeds; None if one of them diverged.
    point: number of its first grid point.
  """
  values: dict[str, Any]
  member: str
  score: float | None
  loss: float | None
  point: int

  def __str__(self) -> str:
    return ", ".join([f"{key}={value}" for key, value in self.values.items()] + ([self.member] if self.member else []))


class Line(NamedTuple):
  """A row of a ledger, and where it stands."""
  file: Path
  number: int
  row: dict


def lines(folder) -> list[Line]:
  """What stands in a sweep's folder, in the ledgers of all processes that ever wrote there; what is in two of them
  counts once. A last line that was cut is left out.

  Raises:
    ValueError: a line that is no row.
  """
  found: dict[tuple, Line] = {}
  for file in sorted([*Path(folder).glob("sweep.jsonl"), *Path(folder).glob("sweep.[0-9]*.jsonl")]):
    texts = file.read_text().split("\n")  # of whole lines the last text is empty
    for number, text in enumerate(texts, 1):
      try:
        if text:
          row = json.loads(text)
          found.setdefault((row["point_hash"], row.get("member")), Line(file, number, row))
      except (ValueError, KeyError, TypeError, AttributeError):
        if number < len(texts):
          raise no_row(file, number) from None
  return list(found.values())


def no_row(file: Path, number: int) -> ValueError:
  """The error of a line that no sweep wrote."""
  return ValueError(f"{file} line {number} is no row of a sweep; delete the line, its point is then trained again")


class Ledger:
  """`sweep.jsonl` in a folder that belongs to one sweep; another one is refused with the differences.

  Rows of a grid point come and go together, and are found by the hash of everything that was asked of the point; a
  point of which a row is gone is trained again. Of several processes each writes a file of its own, `sweep.1.jsonl`
  the second, and reads all of them.
  """

  def __init__(self, path, asked: dict):
    self.folder = Workdir(path, json.loads(json.dumps(asked)))  # tuples become lists, as they will be when read back
    place, _ = distributed.hosts()
    self.path = self.folder.path / (f"sweep.{place}.jsonl" if place else "sweep.jsonl")
    self.refresh()

  def refresh(self, wanted: Collection[str] = (), patience: float = 90) -> None:
    """Reads what all processes wrote; waits for points that are `wanted`, which a network's disk may show late.

    Raises:
      ValueError: they do not appear.
    """
    until = time.monotonic() + patience
    while True:
      found, points = lines(self.folder.path), {}
      for line in found:
        points.setdefault(line.row["point_hash"], []).append(line.row)
      self.rows = {key: rows for key, rows in points.items() if len(rows) == rows[0].get("member_count")}
      self.own = [line.row for line in found if line.file == self.path and line.row["point_hash"] in self.rows]
      if not (missing := set(wanted) - set(self.rows)):
        return
      if time.monotonic() > until:
        raise ValueError(f"{self.folder.path} lacks {len(missing)} points that other processes trained; expected one "
                         "folder that all of them write to: put --workdir on storage that they share")
      time.sleep(2)

  def begin(self) -> None:
    """Takes the folder; of several processes the first does, and all of them have to see it."""
    if distributed.first():
      self.folder.path.mkdir(parents=True, exist_ok=True)
      for name in ("config.json", "sweep*.jsonl", "best.json"):
        for left_over in self.folder.path.glob(f".{name}.*"):  # of a write that was killed
          left_over.unlink()
      write_json(self.folder.path / "config.json", self.folder.asked)

  def add(self, rows: Sequence[dict]) -> None:
    """Appends rows, all or none of them."""
    for row in rows:
      self.rows.setdefault(row["point_hash"], []).append(row)
    self.own += rows
    with atomic(self.path) as temporary, open(temporary, "w") as file:
      file.writelines(json.dumps(row) + "\n" for row in self.own)


def point_hash(asked: dict) -> str:
  """16 hex digits of what was asked of a point."""
  return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def mean(values: Sequence[float | None]) -> float | None:
  """The mean, None if anything is missing."""
  return None if any(value is None for value in values) else statistics.fmean(values)


def plain(score: NamedTuple) -> dict:
  """A `heads.Score` for JSON; the numbers of one that diverged are None."""
  found = {name: value for name, value in score._asdict().items() if name != "mean_over_domains" or value is not None}
  broken = not (math.isfinite(score.loss) and math.isfinite(score.accuracy))
  return {name: None if broken and isinstance(value, float) else value for name, value in found.items()}


def over_folds(scores: Sequence[dict], criterion: str) -> dict:
  """A point's score, of those of its folds: each fold counts the same. Where domains decide, a fold whose rows are all
  of one domain has that one's accuracy as its mean over domains."""
  filled = [{criterion: score["accuracy"], **score} for score in scores]
  means = {name: mean([score[name] for score in filled]) for name in filled[0]
           if name not in ("step", "examples") and all(name in score for score in filled)}
  return {**means, "examples": sum(score["examples"] for score in scores)}


def candidates(points: Sequence[dict], rows: Sequence[Sequence[dict]], criterion: str) -> list[Candidate]:
  """What can be chosen, the best first: by score, of equals by loss, then by place in the grid; the diverged come last.

  Args:
    points: {key: value} of the grid's points; those that differ only in "seed" count as one.
    rows: of the ledger, by point; one for each member.
    criterion: the field of a row's "val" that is the score.

  Raises:
    ValueError: all have diverged.
  """
  found: dict[str, tuple[dict, str, int, list[dict]]] = {}
  for number, (values, own) in enumerate(zip(points, rows)):
    values = {key: value for key, value in values.items() if key != "seed"}
    for row in own:
      key = json.dumps([values, row["member"]], sort_keys=True)
      found.setdefault(key, (values, row["member"], number, []))[3].append(row["val"])
  made = [Candidate(values, member, mean([val[criterion] for val in vals]), mean([val["loss"] for val in vals]), number)
          for values, member, number, vals in found.values()]
  finite = [candidate for candidate in made if candidate.score is not None]
  if not finite:
    raise ValueError(f"all {len(made)} candidates diverged: loss or parameters were not finite; lower optim.lr, set "
                     "optim.clip=1.0, or use dtype='float32'")
  ranked = sorted(finite, key=lambda candidate: (-candidate.score, candidate.loss))  # stable: the earlier stays first
  return ranked + [candidate for candidate in made if candidate.score is None]


def show(found: Sequence[Candidate], criterion: str, title: str, count: int = 10) -> None:
  """Prints the best candidates, the chosen one first, by what they differ in."""
  members = any(candidate.member for candidate in found)
  keys = [key for key in found[0].values if len({str(candidate.values[key]) for candidate in found}) > 1]
  names = [key.rpartition(".")[2] for key in keys]
  table = Table("", *(names if len(set(names)) == len(names) else keys), *["member"] * members, f"val {criterion}",
                "val loss", title=escape(title))
  number = lambda value: "diverged" if value is None else f"{value:.4f}"
  value = lambda value: f"{value:g}" if isinstance(value, float) else escape(str(value))
  for place, candidate in enumerate(found[:count]):
    table.add_row("chosen" if not place else str(place + 1), *(value(candidate.values[key]) for key in keys),
                  *[escape(candidate.member)] * members, number(candidate.score), number(candidate.loss))
  show_table(table)
  if len(found) > count:
    print(f"and {len(found) - count} more, all in the sweep's ledger")
