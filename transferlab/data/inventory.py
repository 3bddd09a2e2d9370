"""`transferlab data list` and `check`: what of the published tasks lies in a data directory, a row per task."""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transferlab.data import record, suites
from transferlab.data.entries import Entry, Source, checked_names, how_to_get
from transferlab.data.folders import nearest
from transferlab.data.record import Part, Record
from transferlab.data.tasks import DataError, Split, Task


@dataclass(frozen=True)
class Row:
  """One task.

  Attributes:
    task: the entry's name.
    state: "absent", "present", "checked", "changed" or "problem"; the last two are wrong.
    source: the form that is read, "array_record dtd:3.0.1".
    counts: part -> images (found, expected); None where not counted, or not known.
    hash: 16 hex digits over the examples of all parts, "" if never computed.
    pixels: fingerprint of the first 32 images of the training part, "" if never computed.
    notes: what is worth knowing, or to be done.
  """
  task: str
  state: str
  source: str = ""
  counts: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
  hash: str = ""
  pixels: str = ""
  notes: tuple[str, ...] = ()

  @property
  def wrong(self) -> bool:
    return self.state in ("changed", "problem")


def select(names: Sequence[str]) -> list[Entry]:
  """The entries that names of tasks and suites stand for, each once; without names all there are."""
  found = {}
  for name in names or suites.SUITES:
    if name not in suites.SUITES and name not in suites.ENTRIES:
      raise DataError(f"{name!r} is no task and no suite; expected one of {', '.join(suites.SUITES)}, or a task such "
                      f"as {next(iter(suites.ENTRIES))}{nearest(name, [*suites.SUITES, *suites.ENTRIES])}")
    found |= dict.fromkeys(suites.SUITES.get(name, (name,)))
  return [suites.ENTRIES[name] for name in found]


def listed(entries: Sequence[Entry], data_dir: Path) -> Iterator[Row]:
  """Rows from what lies there and from the records of earlier checks; reads no image and no label."""
  for entry in entries:
    row, source = _found(entry, data_dir)
    if source is None:
      yield row
      continue
    try:
      known = record.read(data_dir, entry.name, source.format)
    except DataError as error:
      yield replace(row, state="problem", notes=(str(error), *row.notes))
      continue
    if known is None:
      yield replace(row, notes=("not checked", *row.notes))
    else:
      yield replace(_measured(row, entry, known), notes=(f"checked {known.date} as {known.source}", *row.notes))


def checked(entries: Sequence[Entry], data_dir: Path, accept: bool = False) -> Iterator[Row]:
  """Rows from opening every part of every task that is there; keeps what was found for the next time.

  Args:
    accept: what is there now is right, whatever an earlier check found.
  """
  for entry in entries:
    row, source = _found(entry, data_dir)
    try:
      yield row if source is None else _opened(row, entry, source, data_dir, accept)
    except (OSError, ValueError, RuntimeError) as error:  # one bad set does not hide the others
      yield replace(row, state="problem", notes=(" ".join(str(error).split()) or type(error).__name__, *row.notes))


def _found(entry: Entry, data_dir: Path) -> tuple[Row, Source | None]:
  """The row as far as it is known without a look inside, and the form to look into."""
  counts = {part: (None, entry.counts.get(part)) for part in _parts(entry)}
  found = entry.find(data_dir)
  usable = [source for source in found if not source.problem]
  if not found:
    return Row(entry.name, "absent", counts=counts, notes=(how_to_get(entry, data_dir),)), None
  if not usable:
    return Row(entry.name, "problem", str(found[0]), counts, notes=(found[0].problem,)), None
  first = usable[0]
  others = (f"also {source}" + (f", which cannot be used: {source.problem}" if source.problem else "")
            for source in found if source is not first)
  return Row(entry.name, "present", str(first), counts, notes=(*filter(None, [first.remark]), *others)), first


def _parts(entry: Entry) -> list[str]:
  return list(dict.fromkeys(part for phase in entry.phases.values() for part in phase.values()))


def _opened(row: Row, entry: Entry, source: Source, data_dir: Path, accept: bool) -> Row:
  names = checked_names(entry, source)
  parts = {part: entry.part(source, part) for part in _parts(entry)}
  remarks = _remarks(entry, names, parts)
  now = Record(str(source), Task(entry.name, names, parts).split_hash(),
               {name: Part(len(split), split.hash(), split.fingerprint()) for name, split in parts.items()})
  row = replace(_measured(row, entry, now), state="checked")
  wrong = [f"{part} has {found} images, expected {expected}" for part, (found, expected) in row.counts.items()
           if expected not in (None, found)]
  before = None if accept else record.read(data_dir, entry.name, source.format)
  if before and (changes := record.differences(before.parts, now.parts)):
    versions = f" ({before.source} then)" if before.source != now.source else ""
    what = f"changed since {before.date}{versions}: {'; '.join([*changes, *wrong])}"
    return replace(row, state="changed", notes=(what, record.mend(data_dir, entry.name), *row.notes))
  if (not wrong or accept) and (before is None or set(now.parts) - set(before.parts)):
    remark = record.write(data_dir, entry.name, source.format, now.stamped())
    row = replace(row, notes=(*row.notes, *filter(None, [remark])))
  if wrong:
    what = "complete the data set, or take what is there with ?counts=any"
    return replace(row, state="problem", notes=(f"{'; '.join(wrong)}; {what}", *row.notes))
  return replace(row, notes=(*row.notes, *remarks))


def _remarks(entry: Entry, names: tuple[str, ...], parts: Mapping[str, Split]) -> list[str]:
  """What `Task.check` says of the task in each phase; raises `DataError` as it does."""
  found = []
  for phase in entry.phases.values():
    splits = {name: replace(parts[part], name=name) for name, part in phase.items()}
    found += Task(entry.name, names, splits, entry.domain_names, protocol=entry.protocol).check()
  return list(dict.fromkeys(found))


def _measured(row: Row, entry: Entry, known: Record) -> Row:
  """With what a record knows."""
  counts = {part: (known.parts[part].count if part in known.parts else None, expected)
            for part, (_, expected) in row.counts.items()}
  first = known.parts.get(_parts(entry)[0])
  return replace(row, counts=counts, hash=known.hash, pixels=first.pixels if first else "")
