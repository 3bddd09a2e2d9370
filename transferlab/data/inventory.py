"""`transferlab data list` and `check`: what of the published tasks lies in a data directory, a row per task."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from transferlab.data import record, suites
from transferlab.data.entries import Entry, Source, checked_names, how_to_get
from transferlab.data.fewshot import draws
from transferlab.data.folders import nearest
from transferlab.data.imagenet import LISTS
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
    """Whether something has to be done about a set that is there."""
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
  return (_row(entry, data_dir, _remembered) for entry in entries)


def checked(entries: Sequence[Entry], data_dir: Path, accept: bool = False) -> Iterator[Row]:
  """Rows from opening every part of every task that is there; keeps what was found for the next time.

  Args:
    accept: what is there now is right, whatever an earlier check found, and however many images were expected.
  """
  return (_row(entry, data_dir, partial(_opened, accept=accept)) for entry in entries)


def _row(entry: Entry, data_dir: Path, look: Callable[[Row, Entry, Source, Path], Row]) -> Row:
  """The row of one entry, after a `look` into what is there."""
  row = Row(entry.name, "problem")
  try:
    row, source = _found(entry, data_dir)
    return row if source is None else look(row, entry, source, data_dir)
  except (OSError, ValueError, RuntimeError) as error:  # one bad set does not hide the others
    return replace(row, state="problem", notes=(" ".join(str(error).split()) or type(error).__name__, *row.notes))


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


def _remembered(row: Row, entry: Entry, source: Source, data_dir: Path) -> Row:
  _, form, remarks = _draw(entry, source)
  known = record.read(data_dir, entry.name, form)
  if known is None:
    return replace(row, notes=("not checked", *row.notes))
  row = _measured(row, entry, known)
  notes = [f"checked {known.date} as {known.source}", *_accepted(row.counts, known.parts), *remarks]
  return replace(row, notes=(*notes, *row.notes))


def _opened(row: Row, entry: Entry, source: Source, data_dir: Path, accept: bool) -> Row:
  names, (options, form, remarks) = checked_names(entry, source), _draw(entry, source)
  parts = {part: entry.part(source, part, **options) for part in _parts(entry)}
  remarks = [*row.notes, *remarks, *_remarks(entry, names, parts)]
  now = Record(str(source), Task(entry.name, names, parts).split_hash(),
               {name: Part(len(split), split.hash(), split.fingerprint()) for name, split in parts.items()})
  row = replace(_measured(row, entry, now), state="checked")
  before = None if accept else record.read(data_dir, entry.name, form)
  known = now.parts if accept else before.parts if before else {}
  wrong = [f"{part} has {found} images, expected {expected}" for part, (found, expected) in row.counts.items()
           if expected not in (None, found) and not _same_count(known, part, found)]
  if before and (changes := record.differences(before.parts, now.parts)):
    versions = f" ({before.source} then)" if before.source != now.source else ""
    what = f"changed since {before.date}{versions}: {'; '.join([*changes, *wrong])}"
    return replace(row, state="changed", notes=(what, record.mend(data_dir, entry.name), *remarks))
  if wrong:
    what = "complete the data set, or take what is there with ?counts=any"
    return replace(row, state="problem", notes=(f"{'; '.join(wrong)}; {what}", *remarks))
  if set(now.parts) - set(before.parts if before else ()):
    remarks += filter(None, [record.write(data_dir, entry.name, form, now.stamped())])
  return replace(row, notes=(*_accepted(row.counts, known), *remarks))


def _draw(entry: Entry, source: Source) -> tuple[dict[str, int], str, list[str]]:
  """Options to open the parts with, the form that its record goes by, and remarks.

  Published lists may be there for other shots and seeds than the default ones; then the last of them is checked.
  """
  there = draws(source.path) or draws(source.path / LISTS) if source.format == "list" else []
  default = tuple(entry.options[name].default for name in ("shots", "seed")) if there else ()
  if not there or default in there:
    return {}, source.format, []
  shots, seed = there[-1]
  return ({"shots": shots, "seed": seed}, f"{source.format} {shots} {seed}",
          [f"of shots={shots} with seed {seed}, since there is no list for shots={default[0]} with seed {default[1]}"])


def _accepted(counts: Mapping[str, tuple[int | None, int | None]], known: Mapping[str, Part]) -> list[str]:
  """A remark on parts with an unexpected number of images: a record of such is only made when one accepts it."""
  found = [f"{found} of {expected} {part} images" for part, (found, expected) in counts.items()
           if expected not in (None, found) and _same_count(known, part, found)]
  return [f"accepted with {', '.join(found)}; open it with ?counts=any"] if found else []


def _same_count(known: Mapping[str, Part], part: str, count: int | None) -> bool:
  return part in known and known[part].count == count


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
