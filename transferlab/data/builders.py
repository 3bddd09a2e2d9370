"""Tasks made of several sets that TFDS prepared, such as DomainNet's six domains, as one source."""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transferlab.data import tfds
from transferlab.data.entries import Source
from transferlab.data.tasks import some


class Builder(NamedTuple):
  """A TFDS builder, its pinned version, and how other versions with the same examples begin; see `tfds.find`."""
  name: str
  pinned: str
  accepted: str = ""

  def __str__(self) -> str:
    return f"{self.name}:{self.pinned}"


def find(data_dir: Path, builders: Sequence[Builder]) -> list[Source]:
  """A source, with the data directory as its path, for every file format that all builders are prepared in.

  If there is none: one with a problem where some of the builders are there, nothing where none is.
  """
  found = {builder: tfds.find(data_dir, *builder) for builder in builders}
  version = "+".join(map(str, builders))
  formats = [[s.format for s in each if not s.problem] for each in found.values()]
  shared = [form for form in dict.fromkeys(formats[0]) if all(form in each for each in formats)]
  if shared or not any(found.values()):
    remarks = "; ".join(each[0].remark for each in found.values() if each and each[0].remark)
    return [Source(form, data_dir, version, remark=remarks) for form in shared]
  problems = [source.problem for each in found.values() for source in each[:1] if source.problem]
  missing = [str(builder) for builder, each in found.items() if not each]
  return [Source("tfds", data_dir, version, problem=problems[0] if problems else (
      f"{data_dir} lacks {some(missing, 6)} of {some(builders, 6)}; prepare the missing ones, too" if missing else
      f"{data_dir} has {some(builders, 6)} in different file formats; prepare them in one"))]


def one(source: Source, builder: Builder) -> Source:
  """The copy of one builder behind a source that `find` returned."""
  return next(s for s in tfds.find(source.path, *builder) if s.format == source.format and not s.problem)
