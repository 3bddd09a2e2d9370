"""From what a user writes to files on this machine: a zoo name, a file, a folder, or `hf:owner/name`.

The network is touched in one function, `_hub`, and only when asked: by writing `hf:`, or by a zoo name together with
`download=True`. What the hub's own cache holds already is used either way.
"""
import importlib.resources
import os
from pathlib import Path
from typing import NamedTuple

from transferlab.backbones.weights.files import WeightsError, read_json
from transferlab.backbones.weights.torch_files import SUFFIXES
from transferlab.backbones.weights.torch_pickle import CONVERT
from transferlab.backbones.zoo import ZOO, ZooEntry
from transferlab.tree import nearest

_PICKLES = (".bin", ".pkl", ".ckpt", ".tar")
_REFUSED = f"it is a pickle, and reading one can run any code; {' and '.join(SUFFIXES)} are read. {CONVERT}"
_KNOWN = (".npz", ".safetensors", *SUFFIXES)
_WITH_CONFIG = ("model.safetensors", "open_clip_model.safetensors")  # the hub's names for what has one beside it
_WANTED = ["config.json", "open_clip_config.json", "preprocessor_config.json", "model.safetensors",
           "model.safetensors.index.json", "model-*.safetensors", "tokenizer.json", "vocab.json", "merges.txt"]


class Origin(NamedTuple):
  """Where weights are: `path` is an .npz, .safetensors, .pth or .pt or an index of shards; JSON beside it is read."""
  path: Path
  config: dict                # {} if absent
  preprocessor: dict | None
  name: str
  source: str
  entry: ZooEntry | None = None


def locate(source, download: bool = False) -> Origin:
  """Finds the files of a source; WeightsError says what exists and how to get what does not."""
  if not isinstance(source, (str, os.PathLike)) or not str(source):
    raise WeightsError(f"weights are {source!r}; expected a zoo name, a file, a folder or 'hf:owner/name'")
  if source in ZOO:
    return _from_zoo(str(source), download)
  if str(source).startswith("hf:"):
    repository = str(source).removeprefix("hf:")
    return _from_folder(_hub(repository, True), repository.split("/")[-1], str(source))
  path = Path(source).expanduser()
  if path.is_dir():
    name = path.resolve().name
    return _from_folder(path, name, name)
  if path.is_file():
    return _from_file(path)
  if path.suffix in (*_KNOWN, *_PICKLES) or len(path.parts) > 1:
    raise WeightsError(f"{source} does not exist; expected a file or folder, a zoo name, or 'hf:owner/name'")
  close = [name for name in ZOO if name.startswith(f"{source}.")] or nearest(str(source), ZOO)
  raise WeightsError(f"{str(source)!r} is no file, no folder and no name of the zoo; nearest: {', '.join(close)}; "
                     "a download is written 'hf:owner/name'")


def _from_file(path: Path) -> Origin:
  if path.suffix.lower() in _PICKLES:
    raise WeightsError(f"{path.name} is refused: {_REFUSED}")
  if path.suffix not in _KNOWN:
    raise WeightsError(f"{path.name}: the suffix {path.suffix!r} is unknown; expected {', '.join(_KNOWN)} or a folder")
  if path.name in _WITH_CONFIG:
    name = path.resolve().parent.name
    return _from_folder(path.parent, name, name, path.name)
  return Origin(path, {}, None, path.stem, path.name)


def _from_folder(folder: Path, name: str, source: str, chosen: str | None = None) -> Origin:
  files = sorted(p.name for p in folder.iterdir() if p.is_file())
  read = lambda file: read_json(folder / file) if file in files else None
  tensors = [f for f in files if f.endswith(".safetensors")] or [f for f in files if f.endswith(SUFFIXES)]
  chosen = chosen or next((f for f in ("model.safetensors", "model.safetensors.index.json") if f in files), None)
  chosen = chosen or (tensors[0] if len(tensors) == 1 else None)
  if chosen is None:
    pickles = [f for f in files if Path(f).suffix in _PICKLES]
    raise WeightsError(f"{folder.name}/ has no model.safetensors; it has {', '.join(files[:6]) or 'no files'}"
                       + (f". {pickles[0]} is refused: {_REFUSED}" if pickles else ""))
  config = read("open_clip_config.json") if chosen.startswith("open_clip") else read("config.json")
  config = config or read("open_clip_config.json") or {}
  return Origin(folder / chosen, config, read("preprocessor_config.json"), name, source)


def _from_zoo(name: str, download: bool) -> Origin:
  entry = ZOO[name]
  kind, _, where = entry.source.partition(":")
  if kind == "bundled":
    path = Path(str(importlib.resources.files("transferlab.backbones") / "bundled" / where))
    if not path.is_file():
      raise WeightsError(f"{name} is bundled as {where}, which is not in this installation; install transferlab again")
    return Origin(path, {}, None, name, where, entry)
  try:
    folder = _hub(where, download)
  except WeightsError as error:
    if download:
      raise
    raise WeightsError(
        f"{name} is not on this machine. It is {'open_clip_' * (entry.architecture or '').startswith('clip')}"
        f"model.safetensors and the configuration beside it of {where}: "
        f"write hf:{where}, or pass download=True (--config.download=True); both need pip install 'transferlab[hub]'. "
        "Or fetch them into a folder and give the folder"
    ) from error
  return _from_folder(folder, name, entry.source)._replace(entry=entry)


def _hub(repository: str, download: bool) -> Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise WeightsError(f"hf:{repository} needs huggingface_hub: pip install 'transferlab[hub]'") from error
  repository, _, revision = repository.partition("@")
  fetch = lambda *more: Path(huggingface_hub.snapshot_download(
      repository, revision=revision or None, allow_patterns=[*_WANTED, *more], local_files_only=not download))
  try:
    folder = fetch()
    return folder if any(folder.glob("model*.safetensors*")) else fetch("open_clip_model.safetensors")
  except Exception as error:  # the hub's and its HTTP library's errors have no common base
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    raise WeightsError(f"hf:{repository} could not be fetched ({type(error).__name__}: {reason}); check the name and "
                       "the network, or download model.safetensors and config.json and give the folder") from error
