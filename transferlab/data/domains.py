"""Domain generalisation as DomainBed has it: train on all domains but one, choose on a fifth of those, test on that one
(Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021).

Every domain is cut once, by a seeded shuffle of its files: a fifth is "out", the rest "in". "pacs/sketch" trains on the
in-parts of the other domains, chooses on their out-parts, and tests on the in-part of sketch, which is what DomainBed
reports; its phase "whole" tests on all of sketch. "pacs/all" holds no domain out: it tests on the out-parts and chooses
on a fifth of the in-parts. A suite is its leave-one-out tasks; their plain mean is DomainBed's average.

DomainNet also comes with TFDS, as "domainnet_tfds": there each domain brings a test part, which is what is tested on;
its numbers are not those of "domainnet".
"""
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transferlab.data import builders, tfds
from transferlab.data.builders import Builder
from transferlab.data.entries import Entry, Source
from transferlab.data.files import FileReader
from transferlab.data.folders import subfolders, find_images
from transferlab.data.tasks import DataError, Split, some

OUT = 0.2  # share of a domain that is kept out of training


@dataclass(frozen=True)
class _Set:
  """What a set is called and holds.

  Attributes:
    folders: usual names in a data directory; case, spaces and underscores do not matter, here and below.
    domains: their folders, sorted.
    sizes: images per domain, where known.
  """
  name: str
  folders: tuple[str, ...]
  domains: tuple[str, ...]
  num_classes: int
  sizes: tuple[int, ...] = ()

  @property
  def domain_names(self) -> tuple[str, ...]:
    return tuple(re.sub("[^a-z0-9]+", "_", domain.lower()) for domain in self.domains)


# Sizes from the literature; they add up to the totals in DomainBed's README. TerraIncognita's differ between sources.
SETS = (
    _Set("vlcs", ("VLCS",), ("Caltech101", "LabelMe", "SUN09", "VOC2007"), 5, (1415, 2656, 3282, 3376)),
    _Set("pacs", ("PACS", "PACS/kfold"), ("art_painting", "cartoon", "photo", "sketch"), 7, (2048, 2344, 1670, 3929)),
    _Set("office_home", ("office_home", "OfficeHomeDataset_10072016"), ("Art", "Clipart", "Product", "Real World"), 65,
         (2427, 4365, 4439, 4357)),
    _Set("terra_incognita", ("terra_incognita",), ("location_100", "location_38", "location_43", "location_46"), 10),
    _Set("domainnet", ("domain_net",), ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), 345,
         (48129, 51605, 72266, 172500, 172947, 69128)),
)
TFDS_SET = dataclasses.replace(SETS[-1], name="domainnet_tfds", folders=(), sizes=())
BUILDERS = tuple(Builder(f"domainnet/{domain}", "1.0.0") for domain in TFDS_SET.domains)


def seed_hash(*parts) -> int:
  """DomainBed's seed of several things: of (trial, index of the domain), say."""
  return int(hashlib.md5(str(parts).encode()).hexdigest(), 16) % 2**31


def halves(count: int, *seed: int) -> tuple[np.ndarray, np.ndarray]:
  """(out, in): DomainBed's cut of `count` files in ImageFolder's order; its seed is (trial, index of the domain)."""
  rows = np.arange(count)
  np.random.RandomState(seed_hash(*seed)).shuffle(rows)  # the legacy generator, whose stream numpy has frozen
  return rows[:int(count * OUT)], rows[int(count * OUT):]


def _domains_of(part: str, held_out: int | None, count: int) -> list[int]:
  """Indices of the domains that a part is made of."""
  return [d for d in range(count) if held_out is None or (d == held_out) == (part in ("test", "whole"))]


def _rows(part: str, count: int, trial: int, domain: int, held_out: int | None) -> np.ndarray:
  """Which of the `count` files of one of its domains belong to a part."""
  out, in_ = halves(count, trial, domain)
  if held_out is not None:
    return {"train": in_, "val": out, "test": in_, "whole": np.arange(count)}[part]
  val, train = halves(len(in_), trial, domain, 1)  # the same rule once more, under a seed of its own
  return {"train": in_[train], "val": in_[val], "test": out}[part]


# Folders

def _find(wanted: _Set, data_dir: Path) -> list[Source]:
  roots = [root for name in wanted.folders for root in _matching(data_dir, name)]
  found, others = [], []
  for root in roots:
    folders = subfolders(root)
    present = {_plain(name) for name, folder in folders.items() if not _is_tfds(folder)}
    missing = [domain for domain in wanted.domains if _plain(domain) not in present]
    problem = f"{root} lacks the domain folders {some(missing, 6)}; expected {some(wanted.domains, 6)}; add them"
    if len(missing) < len(wanted.domains):
      found.append(Source("folder", root, problem=problem if missing else ""))
    elif not any(map(_is_tfds, folders.values())):
      others.append(Source("folder", root, problem=problem))
  return sorted(found, key=lambda source: bool(source.problem)) or others[:1]


def _part(wanted: _Set, held_out: int | None, source: Source, part: str, trial: int = 0) -> Split:
  """One part; `trial` is DomainBed's trial seed: each cuts the domains anew."""
  folders, class_names, splits = _domain_folders(wanted, source), _class_names(wanted, source), {}
  for domain in _domains_of(part, held_out, len(folders)):
    everything = _read_domain(wanted.domain_names[domain], folders[domain], class_names)
    splits[domain] = everything.select(_rows(part, len(everything), trial, domain, held_out))
  return _joined(part, splits)


def _read_domain(name: str, folder: Path, class_names: tuple[str, ...]) -> Split:
  """All images in torchvision's order, on which the cut is defined: by class, folder below it, and file name."""
  classes = subfolders(folder)
  if unexpected := sorted(set(classes) - set(class_names)):
    raise DataError(f"{folder} has the class folder {unexpected[0]!r}; expected the classes of the first domain, "
                    f"{some(class_names)}; rename or remove it")
  keys, paths, labels = [], [], []
  for class_name, class_folder in classes.items():
    found = sorted(find_images(class_folder), key=os.path.split)
    paths += found
    keys += [f"{name}/{class_name}/{Path(path).relative_to(class_folder).as_posix()}" for path in found]
    labels += [class_names.index(class_name)] * len(found)
  return Split(name, tuple(keys), np.array(labels, np.int32), FileReader(tuple(paths)))


def _class_names(wanted: _Set, source: Source) -> tuple[str, ...]:
  return tuple(subfolders(_domain_folders(wanted, source)[0]))


def _domain_folders(wanted: _Set, source: Source) -> list[Path]:
  by_plain = {_plain(name): folder for name, folder in subfolders(source.path).items()}
  return [by_plain[_plain(domain)] for domain in wanted.domains]


def _matching(folder: Path, name: str) -> list[Path]:
  """Folders "PACS/kfold" below `folder`."""
  found = [folder]
  for step in name.split("/"):
    found = [path for parent in found for n, path in subfolders(parent).items() if _plain(n) == _plain(step)]
  return found


def _plain(name: str) -> str:
  return re.sub("[^a-z0-9]", "", name.lower())


def _is_tfds(folder: Path) -> bool:
  """TFDS's folder "domainnet/real" holds versions, not classes."""
  return any(re.fullmatch(r"\d+\.\d+\.\d+", name) for name in subfolders(folder))


# DomainNet by TFDS

def _tfds_part(held_out: int | None, source: Source, part: str, trial: int = 0) -> Split:
  """One part: "test" is the official test part, "train" and "val" are cut from the official train part."""
  official, splits = "test" if part == "test" else "train", {}
  for domain in _domains_of(part, held_out, len(BUILDERS)):
    prepared = builders.one(source, BUILDERS[domain])
    count = tfds.sizes(prepared)[official]
    out, in_ = halves(count, trial, domain)
    rows = {"train": in_, "val": out, "test": np.arange(count)}[part]
    splits[domain] = tfds.examples(prepared, official, rows, part, tfds.stored_label, key=None)
  return _joined(part, splits)


def _tfds_class_names(source: Source) -> tuple[str, ...]:
  return tfds.class_names(builders.one(source, BUILDERS[0]))


# Both

def _joined(part: str, splits: dict[int, Split]) -> Split:
  """Splits by domain as one that knows the domain of each image."""
  ids = np.repeat(list(splits), [len(split) for split in splits.values()])
  return dataclasses.replace(tfds.concatenate(part, *splits.values()), domains=ids)


def _sizes(wanted: _Set, held_out: int | None, parts: Iterable[str]) -> dict[str, int]:
  """Images per part, where the sizes of the domains are known."""
  def count(part: str, size: int) -> int:
    out = int(size * OUT)
    second = int((size - out) * OUT)
    if held_out is None:
      return {"train": size - out - second, "val": second, "test": out}[part]
    return {"train": size - out, "val": out, "test": size - out, "whole": size}[part]
  return {part: sum(count(part, wanted.sizes[d]) for d in _domains_of(part, held_out, len(wanted.sizes)))
          for part in parts if wanted.sizes}


def _entry(wanted: _Set, held_out: int | None) -> Entry:
  phases = {"final": {"train": "train", "val": "val", "test": "test"}}
  common = dict(name=f"{wanted.name}/{'all' if held_out is None else wanted.domain_names[held_out]}",
                protocol="DomainBed" if held_out is not None else "DomainBed's cut, all domains",
                num_classes=wanted.num_classes, domain_names=wanted.domain_names, group=wanted.name,
                templates=("a photo of a {}",))  # no full stop
  if wanted is TFDS_SET:
    common["protocol"] = f"{common['protocol']}, tested on the official test parts"
    return Entry(**common, find=functools.partial(builders.find, builders=BUILDERS), class_names=_tfds_class_names,
                 part=functools.partial(_tfds_part, held_out), phases=phases, builders=tuple(map(str, BUILDERS)),
                 layout=f"domainnet/{{{','.join(wanted.domains)}}}/{BUILDERS[0].pinned}/ as TFDS prepares them")
  if held_out is not None:
    phases["whole"] = {**phases["final"], "test": "whole"}
  return Entry(**common, find=functools.partial(_find, wanted), part=functools.partial(_part, wanted, held_out),
               class_names=functools.partial(_class_names, wanted), phases=phases,
               counts=_sizes(wanted, held_out, [part for splits in phases.values() for part in splits.values()]),
               layout=f"{wanted.folders[0]}/{{{','.join(wanted.domains)}}}/<class>/*.jpg",
               how="get the folders with DomainBed's download script (github.com/facebookresearch/DomainBed)")


def _entries() -> Iterator[Entry]:
  for wanted in (*SETS, TFDS_SET):
    for held_out in (*range(len(wanted.domains)), None):
      yield _entry(wanted, held_out)


ENTRIES: tuple[Entry, ...] = tuple(_entries())
SUITES: dict[str, tuple[str, ...]] = {
    wanted.name: tuple(f"{wanted.name}/{domain}" for domain in wanted.domain_names) for wanted in (*SETS, TFDS_SET)}
