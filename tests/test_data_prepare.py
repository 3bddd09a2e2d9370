"""Preparing with TFDS: what is fetched and what is not, what each failure says, and that the others go on.

A tiny builder stands for the real ones, a server on this machine for the network; TensorFlow is in no process here.
"""
import errno
import hashlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import download as tfds_download
from tensorflow_datasets.core.download import checksums, downloader

from transferlab import cli
from transferlab.data import prepare, prepare_one, tfds as reader
from transferlab.data.entries import Entry, Source
from transferlab.data.prepare_one import Problem
from transferlab.data.suites import ENTRIES
from transferlab.data.tasks import DataError

CONTENT = {"known.txt": b"ant\nbee\ncat\n", "unknown.txt": b"dog\n"}


class TinyFetch(tfds.core.GeneratorBasedBuilder):
  """Lines of two files; TFDS knows the checksum of one. The tests set the server, and a fault."""
  VERSION = tfds.core.Version("1.0.0")
  server = "http://127.0.0.1:9"  # a port where nothing listens
  fault = None

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"word": tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    paths = dl_manager.download([f"{self.server}/{name}" for name in CONTENT])
    if self.fault:
      raise self.fault
    return {split: self._generate_examples(path) for split, path in zip(("train", "test"), paths)}

  def _generate_examples(self, path):
    for i, word in enumerate(path.read_text().split()):
      yield i, {"word": word}


class TinyManual(tfds.core.GeneratorBasedBuilder):
  """One file that only people can fetch."""
  VERSION = tfds.core.Version("2.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "Ask for words.txt\n  at the counter."

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"word": tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(dl_manager.manual_dir / "words.txt")}

  _generate_examples = TinyFetch._generate_examples


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    content = self.server.files.get(self.path.strip("/"))
    self.server.asked.append(self.path)
    self.send_response(404 if content is None else 200)
    self.end_headers()
    self.wfile.write(content or b"")

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  """Serves CONTENT on this machine; `files` may be changed, `asked` says what was asked for."""
  found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  found.files, found.asked = dict(CONTENT), []
  threading.Thread(target=found.serve_forever, daemon=True).start()
  _at(monkeypatch, f"http://127.0.0.1:{found.server_port}")
  yield found
  found.shutdown()
  found.server_close()


@pytest.fixture
def no_server(monkeypatch):
  _at(monkeypatch, TinyFetch.server)


def _at(monkeypatch, address: str) -> None:
  """The builder fetches there."""
  content = CONTENT["known.txt"]
  known = checksums.UrlInfo(tfds.core.utils.Size(len(content)), hashlib.sha256(content).hexdigest(), "known.txt")
  monkeypatch.setattr(TinyFetch, "server", address)
  monkeypatch.setattr(TinyFetch, "url_infos", {f"{address}/known.txt": known}, raising=False)


@pytest.fixture
def sealed(monkeypatch):
  """Any connection is an error that no one catches as a download's."""
  def refuse(*_):
    raise AssertionError("connected to the network")
  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)


def by_hand(data_dir, *names, content=None):
  folder = data_dir / "downloads" / "manual"
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    (folder / name).write_bytes(CONTENT[name] if content is None else content)
  return folder


def words(data_dir, split, builder="tiny_fetch", version="1.0.0") -> list[str]:
  """What our own reader finds in the prepared copy."""
  source, = reader.find(data_dir, builder, version)
  assert not source.problem, source.problem
  return [example["word"].decode() for example in reader.records(source, split)]


def half_written(data_dir) -> list:
  return [path for path in data_dir.rglob("*") if path.name.startswith("incomplete.") or ".tmp." in path.name]


# One builder: prepare_one


def test_nothing_is_fetched_unless_asked(tmp_path, no_server, sealed):
  with pytest.raises(Problem) as problem:
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)
  text = str(problem.value)
  assert "without --download nothing is fetched" in text and str(tmp_path / "downloads" / "manual") in text
  assert f"known.txt (12 bytes) from {TinyFetch.server}/known.txt" in text, "all files at once, not one per attempt"
  assert f"unknown.txt (size unknown) from {TinyFetch.server}/unknown.txt" in text
  assert not half_written(tmp_path) and not reader.find(tmp_path, "tiny_fetch", "1.0.0")


@pytest.mark.parametrize("file_format", prepare.FORMATS[:1])
def test_files_fetched_by_hand_need_no_network(tmp_path, no_server, sealed, file_format):
  """With a checksum or, as DomainNet's, without one."""
  by_hand(tmp_path, *CONTENT)
  prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, file_format)
  assert sorted(words(tmp_path, "train")) == ["ant", "bee", "cat"] and words(tmp_path, "test") == ["dog"]
  assert [source.format for source in reader.find(tmp_path, "tiny_fetch", "1.0.0")] == [file_format]


def test_one_file_by_hand_and_one_missing(tmp_path, no_server, sealed):
  by_hand(tmp_path, "known.txt")
  with pytest.raises(Problem) as problem:
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)
  assert "unknown.txt" in str(problem.value) and "/known.txt" not in str(problem.value)


def test_download_when_asked(tmp_path, server):
  prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, download=True)
  assert sorted(words(tmp_path, "train")) == ["ant", "bee", "cat"]
  assert sorted(server.asked) == ["/known.txt", "/unknown.txt"] and not half_written(tmp_path)


def test_files_by_hand_come_before_the_network(tmp_path, server):
  by_hand(tmp_path, *CONTENT)
  prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, download=True)
  assert server.asked == []


def test_a_file_that_has_changed_at_its_source(tmp_path, server):
  server.files["known.txt"] = b"something else"
  with pytest.raises(Problem) as problem:
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, download=True)
  text = str(problem.value)
  assert f"known.txt from {TinyFetch.server}/known.txt is not the file that TFDS expects" in text
  assert "found 14 bytes" in text and "expected 12 bytes" in text
  assert text.endswith(f"put the original to {tmp_path / 'downloads' / 'manual' / 'known.txt'}")
  assert "cannot be fetched" not in text and not half_written(tmp_path), "the wrong file would be in the way"
  by_hand(tmp_path, "known.txt")
  prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, download=True)
  assert words(tmp_path, "test") == ["dog"]
  assert server.asked.count("/unknown.txt") == 1, "what the first attempt fetched is kept"


@pytest.mark.parametrize("named", [True, False])
def test_a_wrong_file_by_hand(tmp_path, no_server, sealed, monkeypatch, named):
  if not named:  # old lists of checksums have no file names
    nameless = {url: replace(known, filename=None) for url, known in TinyFetch.url_infos.items()}
    monkeypatch.setattr(TinyFetch, "url_infos", nameless)
  by_hand(tmp_path, *CONTENT, content=b"<html>not found</html>")
  with pytest.raises(Problem, match="known.txt .* is not the file .*found 22 bytes"):
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)


def test_files_that_are_gone(tmp_path, server):
  server.files.clear()
  with pytest.raises(Problem) as problem:
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, download=True)
  text = str(problem.value)
  assert text.count("404") == 2, "all that fails is said at once"
  assert f"{TinyFetch.server}/unknown.txt cannot be fetched" in text
  assert f"put unknown.txt (size unknown) into {tmp_path / 'downloads' / 'manual'} by hand" in text
  assert not half_written(tmp_path)


def test_a_host_that_is_down_is_given_up_soon(tmp_path, no_server):
  start = time.monotonic()
  with pytest.raises(Problem, match="cannot be fetched .*refused.* by hand"):
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, download=True)
  assert time.monotonic() - start < 5 and not half_written(tmp_path)


def test_a_host_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_one, "TIMEOUT", (0.3, 0.3))
  monkeypatch.setattr(prepare_one, "RETRIES", 0)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    _at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
    start = time.monotonic()
    with pytest.raises(Problem, match="timed out"):
      prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path, download=True)
    assert time.monotonic() - start < 5


def test_a_set_that_only_people_can_fetch(tmp_path, sealed):
  manual = tmp_path / "downloads" / "manual"
  with pytest.raises(Problem) as problem:
    prepare_one.prepare("tiny_manual", "2.0.0", tmp_path, download=True)
  assert str(problem.value).count("Ask for words.txt at the counter.") == 1 and str(manual) in str(problem.value)
  assert "using instructions" not in str(problem.value), "TFDS's own words, which repeat them"
  by_hand(tmp_path, "other.txt", content=b"")
  with pytest.raises(Problem, match="words.txt.*; TFDS cannot fetch this set, put it into .* Ask for words"):
    prepare_one.prepare("tiny_manual", "2.0.0", tmp_path)
  by_hand(tmp_path, "words.txt", content=b"cow\n")
  prepare_one.prepare("tiny_manual", "2.0.0", tmp_path)
  assert words(tmp_path, "train", "tiny_manual", "2.0.0") == ["cow"]


@pytest.mark.parametrize("fault, says", [
    (ImportError("Failed importing cv2"), r"^Failed importing cv2; install it .* 'transferlab\[prepare\]'$"),
    (OSError("Not enough disk space. Needed: 2 GiB"), "OSError: Not enough disk space"),
    (ValueError("a\nb " + "c" * 500), "ValueError: a b c+…; TRANSFERLAB_TRACEBACK=1")])
def test_whatever_else_happens_is_one_line_and_leaves_nothing_half_written(tmp_path, no_server, monkeypatch, fault,
                                                                           says):
  by_hand(tmp_path, *CONTENT)
  monkeypatch.setattr(TinyFetch, "fault", fault)
  with pytest.raises(Problem, match=says) as problem:
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)
  assert "\n" not in str(problem.value) and not half_written(tmp_path)
  monkeypatch.setattr(TinyFetch, "fault", None)
  prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)
  assert words(tmp_path, "test") == ["dog"]


@pytest.mark.parametrize("name, version", [("tiny_fetch", "0.9.0"), ("no_such_set", "1.0.0")])
def test_a_version_or_a_set_that_tfds_does_not_have(tmp_path, name, version):
  with pytest.raises(Problem, match=f"TFDS {tfds.__version__} cannot make {name}:{version}"):
    prepare_one.prepare(name, version, tmp_path)


def test_a_data_directory_that_is_a_file(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(Problem, match=r"^cannot write to .*file/downloads/manual \(Not a directory\); make it wri"):
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path / "file")


def test_tfds_is_itself_again_afterwards(tmp_path, no_server):
  before = tfds_download.DownloadManager, downloader.MAX_RETRIES, downloader._open_url
  with pytest.raises(Problem):
    prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)
  assert (tfds_download.DownloadManager, downloader.MAX_RETRIES, downloader._open_url) == before


def test_what_we_reach_into_is_still_there():
  """Private names of TFDS; a version without them must fail here, not at a user's."""
  base = tfds_download.DownloadManager
  assert all(hasattr(base, name) for name in ("_download", "_register_or_validate_checksums", "_get_dl_path"))
  assert downloader.MAX_RETRIES == 10 and "kwargs" in downloader._open_url.__code__.co_varnames
  assert "**kwargs" in open(downloader.__file__).read().split("session.get(")[1].split(")")[0]


def test_all_builders_of_the_suites_exist_in_the_pinned_version(tmp_path, sealed):
  builders = {builder for entry in ENTRIES.values() for builder in entry.builders}
  assert len(builders) > 16
  for builder in builders:
    name, _, version = builder.partition(":")
    assert str(tfds.builder(name, data_dir=tmp_path).version) == version


def test_the_process_prints_one_line(tmp_path, monkeypatch, capsys, no_server):
  by_hand(tmp_path, *CONTENT)
  monkeypatch.setattr(prepare_one, "missing_packages", list)
  prepare_one.main(["tiny_fetch", "1.0.0", str(tmp_path), "--file_format=array_record"])
  assert capsys.readouterr() == ('{"problem": ""}\n', "")
  prepare_one.main(["tiny_fetch", "0.1.0", str(tmp_path)])
  out, err = capsys.readouterr()
  assert "cannot make" in json.loads(out)["problem"] and not err


# All of them: prepare


def entry(name, *builders, found=(), how=""):
  return Entry(name, "", lambda data_dir: list(found), None, None, {"final": {"train": "train"}}, builders=builders,
               how=how)


ANT, BEE, CAT = entry("own/ant", "ant:1.0.0"), entry("own/bee", "bee:1.0.0"), entry("own/cat", "cat:1.0.0", "bee:1.0.0")


@pytest.fixture
def child(monkeypatch):
  """Puts a script in the place of the preparing process; it sees the arguments as `args`."""
  def replace(script: str):
    code = f"import json, os, sys, time, signal; args = sys.argv[1:]\n{script}"
    monkeypatch.setattr(prepare, "_command", lambda: [sys.executable, "-c", code])
  return replace


OK = "print(json.dumps({'problem': ''}))"


def states(outcomes) -> dict[str, str]:
  return {outcome.name: outcome.state for outcome in outcomes}


def test_each_builder_once_and_one_failure_does_not_stop_the_others(tmp_path, child):
  child("print('chatter'); print(json.dumps({'problem': 'host is down' if args[0] == 'bee' else ''}))")
  outcomes = list(prepare.prepare([ANT, BEE, CAT], tmp_path / "new"))
  assert states(outcomes) == {"ant:1.0.0": "prepared", "bee:1.0.0": "failed", "cat:1.0.0": "prepared"}
  assert outcomes[1].tasks == ("own/bee", "own/cat") and outcomes[1].text == "host is down"
  assert (tmp_path / "new").is_dir()


def test_what_the_process_is_told(tmp_path, child):
  child("print(json.dumps({'problem': ' '.join(args) + os.environ['TF_CPP_MIN_LOG_LEVEL']}))")
  text = lambda **given: next(prepare.prepare([ANT], tmp_path, **given)).text
  assert text() == f"ant 1.0.0 {tmp_path} --file_format=array_record3"
  assert text(download=True, file_format="tfrecord", bars=True).endswith("--file_format=tfrecord --download --bars3")


def test_signs_of_life(tmp_path, child, monkeypatch):
  monkeypatch.setattr(prepare, "SAY_EVERY", 0.2)
  child(f"time.sleep(0.7); {OK}")
  said = []
  assert states(prepare.prepare([ANT], tmp_path, say=said.append)) == {"ant:1.0.0": "prepared"}
  assert said[0].startswith("ant:1.0.0: preparing in ") and "still preparing" in said[1]


@pytest.mark.parametrize("script, says", [
    ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9 without a result; is there enough memory"),
    ("print('x' * 100000, file=sys.stderr); sys.exit('no more inodes')", r"with status 1 .*\(no more inodes\)"),
    ("print('not json')", "with status 0 without a result"), ("print('[]')", "without a result"), ("", "without")])
def test_a_process_that_ends_without_a_result(tmp_path, child, script, says):
  child(script)
  outcome, = prepare.prepare([ANT], tmp_path)
  assert outcome.state == "failed"
  with pytest.raises(AssertionError, match=says):
    raise AssertionError(outcome.text)


def test_what_is_there_is_left_alone(tmp_path, no_server, child):
  by_hand(tmp_path, *CONTENT)
  prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)
  child("sys.exit('started')")
  tiny = entry("own/tiny", "tiny_fetch:1.0.0")
  outcome, = prepare.prepare([tiny], tmp_path, file_format="tfrecord")
  assert outcome.state == "already there" and "array_record in " in outcome.text
  next((tmp_path / "tiny_fetch" / "1.0.0").glob("*train*")).unlink()
  outcome, = prepare.prepare([tiny], tmp_path)
  assert outcome.state == "failed" and "lacks 1 of" in outcome.text and "prepare the set again" in outcome.text


def test_after_an_interruption(tmp_path, no_server, monkeypatch, child):
  """What a killed process left is named by `list`, does not hinder the next preparation, and is named once more."""
  left = tmp_path / "tiny_fetch" / "incomplete.ABC123_1.0.0"
  left.mkdir(parents=True)
  source, = reader.find(tmp_path, "tiny_fetch", "1.0.0")
  assert str(left) in source.problem
  by_hand(tmp_path, *CONTENT)
  child(OK)
  outcome, = prepare.prepare([entry("own/tiny", "tiny_fetch:1.0.0")], tmp_path)
  assert outcome.state == "prepared" and outcome.text.endswith(f"{left} is left from a preparation that did not "
                                                               "finish; delete it")
  prepare_one.prepare("tiny_fetch", "1.0.0", tmp_path)
  assert words(tmp_path, "test") == ["dog"]


def test_sets_that_tfds_does_not_have(tmp_path, child):
  child("sys.exit('started')")
  there = Source("folder", tmp_path / "birds")
  outcomes = list(prepare.prepare([entry("own/birds", how="Ask the birds."), entry("own/fish", found=[there]),
                                   entry("own/half", found=[Source("list", tmp_path, problem="half")])], tmp_path))
  assert states(outcomes) == {"own/birds": "failed", "own/fish": "already there", "own/half": "failed"}
  assert "TFDS does not have it; Ask the birds." in outcomes[0].text


def test_ctrl_c_reaches_the_process_and_waits_for_it(tmp_path, child):
  child(f"""
try:
  open({str(tmp_path / 'started')!r}, 'w').close(); time.sleep(20)
except KeyboardInterrupt:
  time.sleep(0.5); open({str(tmp_path / 'tidied')!r}, 'w').close()""")
  def interrupt():
    while not (tmp_path / "started").exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
  threading.Thread(target=interrupt, daemon=True).start()
  with pytest.raises(KeyboardInterrupt):
    list(prepare.prepare([ANT], tmp_path))
  assert (tmp_path / "tidied").exists()


def test_bad_arguments(tmp_path):
  with pytest.raises(DataError, match="file_format is 'riegeli'; expected array_record or tfrecord"):
    next(prepare.prepare([ANT], tmp_path, file_format="riegeli"))
  (tmp_path / "file").touch()
  with pytest.raises(DataError, match=r"cannot write to data directory .*below \(Not a dir.*\); give another --"):
    next(prepare.prepare([ANT], tmp_path / "file" / "below"))


def test_a_data_directory_that_cannot_be_written_is_said_before_the_first_builder(tmp_path, child, monkeypatch):
  child("raise SystemExit('started')")
  def refuse(dir):
    raise OSError(errno.EROFS, "Read-only file system")
  monkeypatch.setattr(prepare.tempfile, "TemporaryFile", refuse)
  there = entry("own/fish", found=[Source("folder", tmp_path)])
  outcomes = prepare.prepare([ANT, BEE, there], tmp_path)
  assert next(outcomes).state == "already there", "which needs no writing"
  with pytest.raises(DataError, match=rf"^cannot write to data directory {tmp_path} \(Read-only file system\); give "):
    next(outcomes)
  assert not list(outcomes)


# The command


def run(capfd, *argv):
  with pytest.raises(SystemExit) if argv[-1] == "fails" else pytest.MonkeyPatch.context():
    cli.main(["transferlab", "data", "prepare", *(a for a in argv if a != "fails")])
  return capfd.readouterr()


def test_the_command(tmp_path, child, capfd):
  child("print(json.dumps({'problem': '' if args[0] == 'dtd' else 'no host for ' + args[0]}))")
  out, err = run(capfd, "vtab/dtd", f"--data_dir={tmp_path}")
  assert out.splitlines() == [f"dtd:3.0.1: prepared: array_record in {tmp_path}/dtd/3.0.1", f"1 of 1 are in {tmp_path}"]
  assert err == f"dtd:3.0.1: preparing in {tmp_path}/dtd/3.0.1\n"
  out, _ = run(capfd, "vtab1k", f"--data_dir={tmp_path}", "fails")
  lines = out.splitlines()
  assert len(lines) == 17 and lines[-1].startswith("1 of 16 are in"), "19 tasks, three pairs of one builder"
  assert "smallnorb:2.0.0: failed: no host for smallnorb" in lines


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_the_command_without_the_extra(tmp_path, capfd):
  """The real process, in an environment such as most have."""
  out, err = run(capfd, "vtab/dtd", f"--data_dir={tmp_path}", "--download", "fails")
  assert "dtd:3.0.1: failed: preparing needs tensorflow" in out and "pip install 'transferlab[prepare]'" in out
  assert err.count("\n") == 1, "one line that says what is being prepared"


@pytest.mark.parametrize("argv, says", [
    ([], "nothing to prepare; name tasks or suites"), (["vtab/dtt"], "did you mean 'vtab/dtd'"),
    (["vtab/dtd", "--file_format=x"], "file_format is 'x'"), (["vtab/dtd", "--accept"], "takes no --accept")])
def test_wrong_commands(tmp_path, capfd, argv, says):
  _, err = run(capfd, *argv, f"--data_dir={tmp_path}", "fails")
  assert says in err and err.count("\n") == 1
