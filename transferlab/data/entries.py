"""A published task before it is opened: where it may lie in a data directory, what it should hold, how to get it.

An `Entry` names the parts of its data set ("train800val200") and, for each phase of its protocol ("tune", "final"),
which part is the split "train", "val" or "test". A part that the phase does not use is never read: tuning cannot see
the test images.
"""
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from transferlab.data import record
from transferlab.data.tasks import DataError, Split, Task, some


DRAWS = ("seed", "trial")  # options that draw other splits of the same protocol


@dataclass(frozen=True)
class Source:
  """One form of a data set, found in a data directory.

  Attributes:
    format: "array_record", "tfrecord", "list", "folder" or "split_zhou".
    path: folder or file.
    version: "cifar100:3.0.2" for TFDS, else "".
    problem: one line on why it cannot be used (what was found, what was expected, what to do), "" if it can.
    remark: one line worth knowing, such as a version newer than the benchmark's.
  """
  format: str
  path: Path
  version: str = ""
  problem: str = ""
  remark: str = ""

  def __str__(self) -> str:
    return f"{self.format} {self.version}".strip()


@dataclass(frozen=True)
class Entry:
  """A task of a suite.

  Attributes:
    name: "vtab/dtd": suite and task.
    protocol: published name of the protocol, for the ledger: "VTAB-1k".
    find: data directory -> the forms that lie there, the preferred one first; reads no image and no label.
    part: (source, name of a part, **options) -> Split. Options have annotated types and defaults.
    class_names: source -> names by label.
    phases: phase -> {split: part}; the first phase is the default.
    group: for averages, such as "natural".
    num_classes: expected, None where unknown.
    counts: part -> published number of images; parts that are not listed are not checked.
    domain_names: where the splits have domains.
    builders: TFDS builders that hold it, "cifar100:3.0.2", for `transferlab data prepare`.
    layout: what is looked for in the data directory, for messages.
    how: how to get it where TFDS cannot, one sentence.
    templates: texts with {} for the class name, for backbones with a text tower.
    masked: evaluate among the classes that the test split has, not among all.
  """
  name: str
  protocol: str
  find: Callable[[Path], list[Source]]
  part: Callable[..., Split]
  class_names: Callable[[Source], tuple[str, ...]]
  phases: Mapping[str, Mapping[str, str]]
  group: str = ""
  num_classes: int | None = None
  counts: Mapping[str, int] = field(default_factory=dict)
  domain_names: tuple[str, ...] = ()
  builders: tuple[str, ...] = ()
  layout: str = ""
  how: str = ""
  templates: tuple[str, ...] = ()
  masked: bool = False

  @property
  def options(self) -> dict[str, inspect.Parameter]:
    """The options of `part` by name."""
    return dict(list(inspect.signature(self.part).parameters.items())[2:])


def data_directory(path: str | os.PathLike = "") -> Path:
  """The folder of the data sets: `path`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets, as TFDS has it."""
  return Path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def absent(entry: Entry, data_dir: Path) -> str:
  """One line: what is missing, what was expected, what to do."""
  return "; ".join(filter(None, (f"{entry.name} is not in {data_dir}", how_to_get(entry, data_dir),
                                 "or give another --data_dir")))


def how_to_get(entry: Entry, data_dir: Path) -> str:
  """What was expected, and what to do."""
  ways = [f"expected {entry.layout}"] if entry.layout else []
  if entry.builders:
    ways.append(f"prepare it with `transferlab data prepare {entry.name} --data_dir={data_dir} --download`")
  return "; ".join([*ways, *([entry.how] if entry.how else [])])


def choose(entry: Entry, data_dir: Path, wanted: str = "") -> Source:
  """The form to read: the first usable one, or the first of format `wanted`. Raises `DataError` if there is none."""
  if not data_dir.is_dir():
    what = "is a file" if data_dir.exists() else "does not exist"
    raise DataError(f"{entry.name}: data directory {data_dir} {what}; expected the folder of the data sets; give it as "
                    "--data_dir=, or in $TFDS_DATA_DIR")
  found = entry.find(data_dir)
  usable = [source for source in found if not source.problem and wanted in ("", source.format)]
  if usable:
    return usable[0]
  if wanted and any(not source.problem for source in found):
    raise DataError(f"{entry.name} has no source {wanted!r} in {data_dir}; found {some(map(str, found))}")
  raise DataError(f"{entry.name}: {found[0].problem}" if found else absent(entry, data_dir))


def open_entry(entry: Entry, data_dir: str | os.PathLike = "", phase: str = "", source: str = "",
               counts: str = "expected", **options) -> Task:
  """The task of an entry, in one phase of its protocol.

  Args:
    data_dir: see `data_directory`.
    phase: one of the entry's phases, by default its first.
    source: a format, where several lie there; default the preferred one.
    counts: "expected" raises where a part has not the published number of images; "any" takes what is there.
    options: those of the entry's `part`.

  Raises:
    DataError: absent, incomplete, another version, another number of images or classes, unknown option; or other
      examples than `transferlab data check` found earlier.
  """
  phase = phase or next(iter(entry.phases))
  if phase not in entry.phases:
    raise DataError(f"{entry.name} has no phase {phase!r}; expected {', '.join(entry.phases)}")
  if counts not in ("expected", "any"):
    raise DataError(f"counts is {counts!r}; expected 'expected' or 'any'")
  if unknown := sorted(set(options) - set(entry.options)):
    raise DataError(f"{entry.name} has no option {unknown[0]!r}; expected "
                    f"{', '.join(['phase', 'source', 'counts', *entry.options])}")
  folder = data_directory(data_dir)
  chosen = choose(entry, folder, source)
  parts = {part: entry.part(chosen, part, **options) for part in entry.phases[phase].values()}
  names = checked_names(entry, chosen)
  incomplete = [f"{len(split)} of {entry.counts[part]} {part} images" for part, split in parts.items()
                if entry.counts.get(part) not in (None, len(split))]
  if incomplete and counts == "expected":
    raise DataError(f"{entry.name} in {chosen.path} has {', '.join(incomplete)}; complete the data set, or take what "
                    "is there with counts=any (an argument of the configuration; ?counts=any after a task's name)")
  values = {name: options.get(name, parameter.default) for name, parameter in entry.options.items()}
  _refuse_changed(entry, folder, chosen, parts, values)
  splits = {name: _named(parts[part], name) for name, part in entry.phases[phase].items()}
  draw = ", ".join(f"{name} {value}" for name, value in values.items() if name in DRAWS)
  return Task(entry.name, names, splits, entry.domain_names, source=_said(chosen), draw=draw,
              protocol=_protocol(entry, phase, values, incomplete), templates=entry.templates,
              test_classes=_present(splits) if entry.masked else ())


def _protocol(entry: Entry, phase: str, values: Mapping, incomplete: list[str]) -> str:
  """What rows of the ledger must share to be averaged; a set that lacks images has a protocol of its own."""
  used = " ".join(f"{name}={part}" for name, part in entry.phases[phase].items())
  fixed = (f"{name} {value}" for name, value in values.items() if name not in DRAWS)
  lacking = [f"incomplete ({', '.join(incomplete)})"] if incomplete else []
  return ", ".join([f"{entry.protocol}, {phase}: {used}", *fixed, *lacking])


def _refuse_changed(entry: Entry, folder: Path, source: Source, parts: Mapping[str, Split], values: Mapping) -> None:
  """Compares with the last check, which was of the default options; for others those parts are read as well."""
  if record.read(folder, entry.name, source.format) is None:
    return
  if values != {name: parameter.default for name, parameter in entry.options.items()}:
    parts = {part: entry.part(source, part) for part in parts}
  record.refuse_changed(folder, entry.name, source.format, parts)


def checked_names(entry: Entry, source: Source) -> tuple[str, ...]:
  """The class names; raises `DataError` if they are not as many as expected."""
  names = tuple(entry.class_names(source))
  if entry.num_classes not in (None, len(names)):
    raise DataError(f"{entry.name} in {source.path} has {len(names)} classes; expected {entry.num_classes}; is it "
                    "another data set, or a part of it?")
  return names


def _named(split: Split, name: str) -> Split:
  return split.select(range(len(split)), name) if split.name != name else split


def _said(source: Source) -> str:
  return f"{source} ({source.remark})" if source.remark else str(source)


def _present(splits: Mapping[str, Split]) -> tuple[int, ...]:
  return tuple(np.unique(splits["test"].labels).tolist()) if "test" in splits else ()
