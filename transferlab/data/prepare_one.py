"""Prepares one data set with TFDS, in a process of its own: `python -m transferlab.data.prepare_one dtd 3.0.1 /data`.

TFDS's builders write with TensorFlow, which stays in this process. An archive fetched by hand is found in
`<data_dir>/downloads/manual` under the name it has at its source; without --download nothing else is read, and what is
missing is named. The last line on standard output is a JSON object; its "problem" is one line, or "" if all went well.
"""
import argparse
import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

PACKAGES = ("tensorflow", "h5py", "scipy", "cv2", "importlib_resources")  # what the builders of the suites import
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
RETRIES = 2  # with TFDS's own ten a dead host takes minutes
PROBLEM_LENGTH = 250  # characters of someone else's message


class Problem(Exception):
  """What hinders a preparation, and what to do, in one line."""


def prepare(name: str, version: str, data_dir: Path, file_format: str = "array_record", download: bool = False) -> None:
  """Writes `<data_dir>/<name>/<version>`.

  Args:
    name: TFDS builder, "dtd" or "sun397/tfds".
    download: fetch what is not there.

  Raises:
    Problem: an archive is missing, cannot be fetched, or is not the one that TFDS knows; a package is missing; another
      version; anything else that stops TFDS.
  """
  import tensorflow_datasets as tfds
  manual = data_dir / "downloads" / "manual"
  try:
    manual.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise Problem(f"cannot write to {manual} ({error.strerror}); make it writable, or give another --data_dir"
                  ) from error
  try:
    builder = tfds.builder(f"{name}:{version}", data_dir=data_dir)
  except Exception as error:
    raise Problem(f"TFDS {tfds.__version__} cannot make {name}:{version} ({one_line(error.__cause__ or error)}); "
                  "install a tensorflow-datasets that can") from error
  fetching = Fetching(manual, download)
  with patched(fetching):
    try:
      builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False),
          file_format=file_format)
    except Exception as error:
      fetching.settle()
      by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
      by_hand = by_hand and f"TFDS cannot fetch this set, put it into {manual} by hand: {' '.join(by_hand.split())}"
      raise Problem("; ".join(filter(None, (fetching.problem() or explain(error), by_hand)))) from error


@dataclass
class Fetching:
  """What TFDS may fetch, and what came of it.

  Attributes:
    manual: folder of the files that were fetched by hand.
    allowed: the network may be used.
    missing: "name (size) from URL" of files that were asked for and not `allowed`.
    failed: a line per file that could not be fetched or is another one than expected.
    started: folders of downloads, which are gone when these are done.
    pending: TFDS's promises of downloads.
  """
  manual: Path
  allowed: bool
  missing: list[str] = field(default_factory=list)
  failed: list[str] = field(default_factory=list)
  started: set[Path] = field(default_factory=set)
  pending: list = field(default_factory=list)

  def settle(self) -> None:
    """Lets the other downloads of the set come to their ends, so that what they fetch is kept for the next attempt."""
    if any(promise.is_pending for promise in self.pending):
      print("one download failed; waiting for the others", file=sys.stderr)
    for promise in self.pending:
      with contextlib.suppress(Exception):
        promise.get()

  def problem(self) -> str:
    asked = f"without --download nothing is fetched; put into {self.manual}: {', '.join(self.missing)}"
    return "; ".join([*dict.fromkeys(self.failed), *([asked] if self.missing else [])])

  def file(self, url: str, known) -> tuple[Path, str]:
    """Where a file by hand belongs, and its size; `known` is TFDS's `UrlInfo` of it, None where it has none."""
    name = known and known.filename or os.path.basename(unquote(urlsplit(url).path)) or "download"
    return self.manual / name, str(known.size) if known else "size unknown"


def explain(error: Exception) -> str:
  """One line on what stopped TFDS, other than a download."""
  if isinstance(error, ImportError):
    return f"{one_line(error)}; install it with pip install 'transferlab[prepare]'"
  text = one_line(error).partition(" Create it ")[0].rstrip(".")  # where TFDS goes on with its instructions
  return f"{type(error).__name__}: {text}; TRANSFERLAB_TRACEBACK=1 shows where"


@contextlib.contextmanager
def patched(fetching: Fetching) -> Iterator[None]:
  """Within the block, TFDS fetches only if allowed, gives up on dead hosts, and `fetching` learns what failed.

  TFDS has no setting for any of this. It is the one place that reaches into it; tests/test_data_prepare.py guards it.
  """
  from tensorflow_datasets.core import download as tfds_download
  from tensorflow_datasets.core.download import downloader
  manager = _manager(tfds_download.DownloadManager, fetching)
  patient = functools.partial(downloader._open_url, timeout=TIMEOUT)
  with mock.patch.object(tfds_download, "DownloadManager", manager), \
      mock.patch.object(downloader, "MAX_RETRIES", RETRIES), mock.patch.object(downloader, "_open_url", patient):
    try:
      yield
    except KeyboardInterrupt:
      _remove(fetching.started)
      raise


def _manager(base: type, fetching: Fetching) -> type:
  """TFDS's download manager `base`, which calls `_download` with each file that it finds nowhere."""
  from tensorflow_datasets.core.download import checksums
  from tensorflow_datasets.core.utils.lazy_imports_utils import promise

  class Manager(base):
    def _register_or_validate_checksums(self, url, url_info, path):
      known = self._url_infos.get(url)
      if known and known != url_info:
        found, wanted = (f"{int(info.size):,} bytes, SHA-256 {info.checksum[:12]}…" for info in (url_info, known))
        fetching.failed.append(f"{path.name} from {url} is not the file that TFDS expects (found {found}; expected "
                               f"{wanted}): it is damaged, or has changed at its source; put the original to "
                               f"{fetching.file(url, known)[0]}")
      super()._register_or_validate_checksums(url, url_info, path)

    def _download(self, resource):
      url = resource.url
      path, size = fetching.file(url, self._url_infos.get(url))
      if path.exists():  # TFDS itself looks only for files whose names it knows; of DomainNet it knows nothing
        self._register_or_validate_checksums(url, checksums.compute_url_info(path), path)
        return promise.Promise.resolve(path)
      if not fetching.allowed:  # rejected rather than raised, so that TFDS asks for its other files, too
        fetching.missing.append(f"{path.name} ({size}) from {url}")
        return promise.Promise.reject(Problem(url))
      folder, pattern = self._get_dl_path(resource).parent, f"{self._get_dl_path(resource).name}.tmp.*"
      before = set(folder.glob(pattern))
      coming = super()._download(resource)
      started = set(folder.glob(pattern)) - before
      fetching.started |= started

      def clean(error):
        _remove(started)
        if not any(url in line for line in fetching.failed):
          fetching.failed.append(f"{url} cannot be fetched ({_reason(error)}); put {path.name} ({size}) into "
                                 f"{path.parent} by hand")
        raise error

      fetching.pending.append(coming.catch(clean))
      return fetching.pending[-1]

  return Manager


def _reason(error: Exception) -> str:
  """The innermost cause in requests' nested errors."""
  cause = getattr(next(iter(error.args), None), "reason", None) or error
  return re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", one_line(cause))


def _remove(folders: set[Path]) -> None:
  for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)


def one_line(text: object) -> str:
  words = " ".join(str(text).split())
  return words if len(words) <= PROBLEM_LENGTH else f"{words[:PROBLEM_LENGTH]}…"


def missing_packages() -> list[str]:
  """Of `PACKAGES`; asked for before the first download, not after 36 GB."""
  return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="transferlab.data.prepare_one", description=__doc__.partition("\n")[0])
  parser.add_argument("name")
  parser.add_argument("version")
  parser.add_argument("data_dir", type=Path)
  parser.add_argument("--file_format", default="array_record")
  parser.add_argument("--download", action="store_true")
  parser.add_argument("--bars", action="store_true", help="TFDS's progress bars on standard error")
  given = parser.parse_args(argv)
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that TFDS removes what it has half written
  problem = ""
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS greets at length
    try:
      if missing := missing_packages():
        raise Problem(f"preparing needs {', '.join(missing)}; install with pip install 'transferlab[prepare]', in an "
                      "environment of its own if this one shall stay small")
      _quiet(given.bars)
      prepare(given.name, given.version, given.data_dir, given.file_format, given.download)
    except Problem as error:
      problem = str(error)
      if os.environ.get("TRANSFERLAB_TRACEBACK"):
        traceback.print_exc()
    except KeyboardInterrupt:
      os._exit(130)  # a plain exit would wait for the downloads under way
  print(json.dumps({"problem": problem}))


def _quiet(bars: bool) -> None:
  import tensorflow_datasets as tfds
  from absl import logging as absl_logging
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("urllib3").setLevel(logging.ERROR)
  if not bars:
    tfds.disable_progress_bar()


if __name__ == "__main__":
  main()
