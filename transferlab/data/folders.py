"""Tasks from folders of images.

Folder names are class names, sorted. Files that are no images by their suffix, and hidden ones, are passed over.
"""
import difflib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from transferlab.data.files import SUFFIXES, FileReader, is_image
from transferlab.data.split import ALIASES, complete
from transferlab.data.tasks import DataError, Split, Task, some


def image_folder(root: str | os.PathLike, val_fraction: float = 0.2, test_fraction: float = 0.2, seed: int = 0) -> Task:
  """`root/{train,val,test}/class/*`, or `root/class/*` with an automatic stratified split.

  Split folders may also be called training, valid, validation or testing, in any case. With split folders, folders of
  other names next to them are ignored. Splits that are missing are cut from train as `split.complete` says.

  Raises:
    DataError: no images, a class folder without one, classes that differ between splits, too few images to split.
  """
  root = _folder(root)
  parts = split_folders(root) or {"train": root}
  classes = {name: subfolders(folder) for name, folder in parts.items()}
  first = next(iter(classes))
  for name, folders in classes.items():
    _same_classes(first, classes[first], name, folders)
  if not classes[first]:
    raise DataError(_nothing_found(root))
  class_names = tuple(classes[first])
  if all(name.lower() in ALIASES for name in class_names):
    raise DataError(f"{root} has {some(class_names)} without class folders in them; expected "
                    f"{root}/{class_names[0]}/<class>/*.jpg; sort the images into one folder per class")
  paths, labels, splits = [], [], {}
  for part, folders in classes.items():
    start = len(paths)
    for label, (class_name, folder) in enumerate(folders.items()):
      found = _images_of_class(class_name, folder)
      paths += found
      labels += [label] * len(found)
    splits[part] = np.arange(start, len(paths))
  labels = np.array(labels, np.int32)
  splits = complete(splits, labels, class_names, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
  return Task(root.name, class_names, _pool(root, paths, labels, splits))


def domain_folder(root: str | os.PathLike, test_domain: str, val_fraction: float = 0.2, seed: int = 0) -> Task:
  """`root/domain/class/*`: `test_domain` is the test split, the other domains are cut into train and val.

  The cut is stratified by domain and class, so that the validation images come from the training domains in proportion;
  a class with a single image in a domain stays in train. A class may be missing from a domain.
  """
  root = _folder(root)
  domains = subfolders(root)
  if test_domain not in domains:
    raise DataError(f"test domain {test_domain!r} is not a folder of {root}; found {some(domains) or 'no folder'}"
                    f"{nearest(test_domain, domains)}")
  if len(domains) < 2:
    raise DataError(f"{root} has the single domain {test_domain!r}; expected at least one more to train on")
  folders = {domain: subfolders(folder) for domain, folder in domains.items()}
  class_names = tuple(sorted(set().union(*folders.values())))
  paths, labels, domain_ids = [], [], []
  for d, classes in enumerate(folders.values()):
    for class_name, folder in classes.items():
      found = _images_of_class(class_name, folder)
      paths += found
      labels += [class_names.index(class_name)] * len(found)
      domain_ids += [d] * len(found)
  if not paths:
    raise DataError(f"no class folder in the domains of {root}; expected {root}/<domain>/<class>/*.jpg")
  labels, domain_ids = np.array(labels, np.int32), np.array(domain_ids, np.int32)
  held_out = domain_ids == tuple(domains).index(test_domain)
  splits = complete({"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)},
                    domain_ids * len(class_names) + labels, (), val_fraction=val_fraction, test_fraction=0, seed=seed,
                    strict=False)
  return Task(f"{root.name}/{test_domain}", class_names, _pool(root, paths, labels, splits, domain_ids), tuple(domains))


def find_images(folder: str | os.PathLike) -> list[str]:
  """Paths of all images below `folder`, sorted. Links are followed, each folder once and never upwards."""
  found, seen = [], set()
  top = os.path.realpath(folder)
  for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
    real = os.path.realpath(here)
    if real in seen or (top + os.sep).startswith(real.rstrip(os.sep) + os.sep) and here != os.fspath(folder):
      folders.clear()
      continue
    seen.add(real)
    folders[:] = sorted(f for f in folders if _visible(f))
    found += [os.path.join(here, f) for f in files if is_image(f)]
  return sorted(found)


def nearest(name: str, names: Iterable[str]) -> str:
  """"; did you mean ...?" for an error, or nothing."""
  near = difflib.get_close_matches(name, list(names), 1)
  return f"; did you mean {near[0]!r}?" if near else ""


def _folder(root: str | os.PathLike) -> Path:
  root = Path(root).expanduser()
  if not root.is_dir():
    found = "is a file" if root.exists() else "does not exist"
    raise DataError(f"{root} {found}; expected a folder of images")
  return root.resolve()


def _visible(name: str) -> bool:
  return not name.startswith(".") and name != "__MACOSX"


def subfolders(folder: Path) -> dict[str, Path]:
  """Name -> path of the folders in one, sorted, without hidden ones."""
  return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _visible(path.name)}


def split_folders(root: Path) -> dict[str, Path]:
  """Folders that are splits by name; empty if `root` holds classes. A class that is called 'train' holds images."""
  parts = {}
  for name, folder in subfolders(root).items():
    split = ALIASES.get(name.lower())
    if split is None or not subfolders(folder):
      continue
    if split in parts:
      raise DataError(f"{root} has two folders for the {split} split, {parts[split].name!r} and {name!r}; keep one")
    parts[split] = folder
  return {name: parts[name] for name in ("train", "val", "test") if name in parts}


def _same_classes(a: str, classes_a: Iterable[str], b: str, classes_b: Iterable[str]) -> None:
  only_a, only_b = sorted(set(classes_a) - set(classes_b)), sorted(set(classes_b) - set(classes_a))
  if only_a or only_b:
    found = "; ".join(f"only in {name}: {some(only)}" for name, only in ((a, only_a), (b, only_b)) if only)
    raise DataError(f"{a} and {b} hold different classes ({found}); expected the same class folders in both; "
                    "rename, add or remove folders")


def _images_of_class(class_name: str, folder: Path) -> list[str]:
  found = find_images(folder)
  if not found:
    raise DataError(f"class {class_name!r} has no image: {folder} holds {_contents(folder)}; expected files "
                    f"{' '.join('*' + s for s in SUFFIXES)}; add images or remove the folder")
  return found


def _contents(folder: Path) -> str:
  names = sorted(p.name for p in folder.iterdir() if _visible(p.name))
  return some(names, 3) if names else "nothing"


def _nothing_found(root: Path) -> str:
  loose = sum(is_image(p.name) for p in root.iterdir())
  found = f"{loose} images but no class folder" if loose else "no class folder with images"
  return f"{root} has {found}; expected {root}/<class>/*.jpg or {root}/{{train,val,test}}/<class>/*.jpg"


def _pool(root: Path, paths: list[str], labels: np.ndarray, splits: dict[str, np.ndarray],
          domains: np.ndarray | None = None) -> dict[str, Split]:
  keys = tuple(Path(p).relative_to(root).as_posix() for p in paths)
  everything = Split("all", keys, labels, FileReader(tuple(paths)), domains)
  return {name: everything.select(rows, name) for name, rows in splits.items()}


def _raise(error: OSError) -> None:
  raise DataError(f"cannot list {error.filename} ({error.strerror}); check its permissions") from None
