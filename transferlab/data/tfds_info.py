"""What a folder that TensorFlow Datasets prepared says of itself: builder, version, format, files, sizes.

Only dataset_info.json is read and names of files are looked at: `find` costs a millisecond and needs no TFDS.
"""
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from transferlab.data.entries import Source
from transferlab.data.tasks import DataError, some

FORMATS = ("array_record", "tfrecord")  # the preferred one first
# Builders whose class names lie beside the shards. Without that file TFDS calls classes "0", "1", ..., as it does for
# those that never have it: a copy that lost it would pass for whole.
NAMED = """caltech101 cars196 cifar100 domainnet dtd eurosat imagenet2012 imagenet_a imagenet_r imagenet_sketch
  imagenet_v2 oxford_flowers102 oxford_iiit_pet resisc45 stanford_dogs sun397""".split()
NAMES = "label.labels.txt"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_WORD = re.compile(r"\w[\w.-]*")  # a split's name becomes part of a path
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def find(data_dir: Path, builder: str, pinned: str, accepted: str = "") -> list[Source]:
  """The prepared copies of a builder in a data directory, the best one first; reads no image and no label.

  Args:
    builder: "cifar100" or, with a configuration, "sun397/tfds".
    pinned: the version whose subsets are the published ones, "3.0.2".
    accepted: how other versions that hold the same examples begin, "3."; they come with a remark, all others with a
      problem.
  """
  root = Path(data_dir) / builder
  names = sorted(os.listdir(root)) if root.is_dir() else []
  found = [source for name in names if _VERSION.fullmatch(name) for source in _copies(root / name, builder)]
  found = [_judged(source, builder, pinned, accepted) for source in found]
  if not found and (started := [name for name in names if name.startswith("incomplete.")]):
    return [Source("tfds", root / started[0], f"{builder}:{pinned}", problem=(
        f"{root / started[0]} was left by a preparation that did not finish; expected {root / pinned}; delete it and "
        "prepare the set again"))]
  # A stable sort: of several accepted versions the newest comes first.
  found = sorted(found, key=lambda source: _number(source.path.name), reverse=True)
  return sorted(found, key=lambda source: (bool(source.problem), source.path.name != pinned,
                                           (*FORMATS, source.format).index(source.format)))


def sizes(source: Source) -> dict[str, int]:
  """Examples of each TFDS split, from dataset_info.json."""
  return {split: sum(lengths) for split, lengths in Info.read(source.path).shards.items()}


@dataclass(frozen=True)
class Info:
  """What dataset_info.json says.

  Attributes:
    builder: "sun397/tfds".
    formats: of the shards; sets from before 2021 do not say, and are TFRecord.
    shards: TFDS split -> records in each of its files.
  """
  folder: Path
  builder: str
  version: str
  formats: tuple[str, ...]
  shards: dict[str, tuple[int, ...]]

  @classmethod
  def read(cls, folder: Path) -> "Info":
    path = folder / "dataset_info.json"
    try:
      info = json.loads(path.read_text("utf-8"))
      shards = {s["name"]: tuple(int(n) for n in s.get("shardLengths", ())) for s in info["splits"]}
      named = {s.get("filepathTemplate", _TEMPLATE) for s in info["splits"]}
      if named - {_TEMPLATE} or not all(map(_WORD.fullmatch, shards)):
        raise ValueError(f"splits {some(shards)} in files {some(named)}, expected {_TEMPLATE}")
      return cls(folder, "/".join(filter(None, (info["name"], info.get("configName")))), info["version"],
                 (info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())), shards)
    except FileNotFoundError:
      raise DataError(f"{folder} has no dataset_info.json, so it is not, or only half, a set that TFDS prepared; "
                      "complete the copy, or delete it and prepare the set again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
      raise DataError(f"{path} cannot be read ({type(e).__name__}: {' '.join(str(e).split())}); copy it again, or "
                      "prepare the set again") from None

  def files(self, format: str, split: str) -> tuple[str, ...]:
    """Paths of the shards of one split."""
    stem, count = f"{self.builder.split('/')[0]}-{split}.{format}", len(self.shards[split])
    return tuple(os.fspath(self.folder / f"{stem}-{i:05d}-of-{count:05d}") for i in range(count))


def _copies(folder: Path, builder: str) -> list[Source]:
  """What lies in one version's folder: a source per format."""
  version = f"{builder}:{folder.name}"
  try:
    info = Info.read(folder)
  except DataError as e:
    return [Source("tfds", folder, version, problem=str(e))]
  if (info.builder, info.version) != (builder, folder.name):
    return [Source("tfds", folder, version, problem=(
        f"{folder} holds {info.builder} {info.version} by its dataset_info.json; expected {builder} {folder.name}; "
        "put it where it belongs, and prepare this one"))]
  known = [format for format in info.formats if format in FORMATS]
  if not known:
    return [Source(info.formats[0], folder, version, problem=(
        f"{folder} is prepared as {info.formats[0]}; expected {' or '.join(FORMATS)}; delete it and prepare it again"))]
  return [Source(format, folder, version, problem=_missing(info, format)) for format in known]


def _missing(info: Info, format: str) -> str:
  files = [os.path.basename(file) for split in info.shards for file in info.files(format, split)] + ["features.json"]
  files += [NAMES] * (info.builder.split("/")[0] in NAMED)
  present = set(os.listdir(info.folder))
  lacking = [name for name in files if name not in present]
  if not lacking:
    return ""
  return (f"{info.folder} lacks {len(lacking)} of {len(files)} files ({some(lacking, 2)}); complete the copy, or "
          "delete it and prepare the set again")


def _judged(source: Source, builder: str, pinned: str, accepted: str) -> Source:
  """With a word on its version, unless it cannot be read anyway."""
  version = source.path.name
  if source.problem or version == pinned:
    return source
  if accepted and version.startswith(accepted):
    return replace(source, remark=f"version {version} instead of {pinned}")
  return replace(source, problem=(
      f"{source.path} is version {version} of {builder}; expected {pinned}: subsets such as train[:800] hold other "
      f"examples in another version; prepare {builder}:{pinned}"))


def _number(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split("."))
