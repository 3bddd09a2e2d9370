"""Several processes: they find each other or say why not, do the same or say who differs, and end together."""
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import hosts
import pytest
from engine import write_images

from transferlab import cli, data, distributed, rendezvous, train

HOST = socket.gethostname()


# How processes find each other

def meet(*told, timeout=20.0, port=0) -> list:
  """What each of the processes that were told (number of processes, own number) gets: host names or the error."""
  port = port or hosts.free_port()
  def one(numbers):
    try:
      return rendezvous.meet(f"127.0.0.1:{port}", *numbers, timeout)
    except (ValueError, RuntimeError) as error:
      return str(error)
  with ThreadPoolExecutor(len(told)) as pool:
    return list(pool.map(one, told))


def call(port: int, text: bytes) -> None:
  """Says something at a port, once somebody listens there, and goes."""
  until = time.monotonic() + 5
  while True:
    try:
      with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(text)
        return
    except ConnectionRefusedError:
      assert time.monotonic() < until
      time.sleep(0.01)


def test_processes_meet_whatever_else_calls_at_the_port():
  port = hosts.free_port()
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(meet, (3, 0), port=port, timeout=20)
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process', b"[1]\n"):
      call(port, text)
    assert meet((3, 1), (3, 2), port=port) == [[HOST] * 3] * 2
  assert first.result() == [[HOST] * 3]


def test_a_process_that_has_left_may_come_again():
  ours, theirs = socket.socketpair()
  hello, came = {"process": 1, "processes": 3, "host": "b"}, {0: (None, "a"), 1: (ours, "elsewhere")}
  with ours, theirs, pytest.raises(ValueError, match="two processes were told that they are process 1 of 3"):
    rendezvous._checked(hello, 3, came)
  ours, theirs = socket.socketpair()
  theirs.close()
  with ours:
    assert rendezvous._checked(hello, 3, {**came, 1: (ours, "elsewhere")}) == (1, "b")


def test_nobody_starts_with_a_process_that_has_left():
  port = hosts.free_port()
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(meet, (2, 0), port=port)
    call(port, json.dumps({"process": 1, "processes": 2, "host": "elsewhere"}).encode() + b"\n")
  assert first.result() == ["process 1 of 2 (elsewhere) left before the start; look at what it says"]


@pytest.mark.parametrize("told, message", [
    ([(2, 0), (3, 1)], "process 1 on HOST was told that there are 3 processes, process 0 on HOST that there are 2"),
    ([(2, 0), (3, 2)], "process 2 on HOST was told that there are 3 processes, process 0 on HOST that there are 2"),
    ([(3, 0), (3, 2), (2, 1)], "process 1 on HOST was told that there are 2 processes, process 0 on HOST that there "
                               "are 3"),
    ([(3, 0), (3, 1), (3, 1)], "two processes were told that they are process 1 of 3, on HOST and on HOST; give each"),
])
def test_numbers_that_disagree_are_told_to_all(told, message):
  for found in meet(*told):
    assert message.replace("HOST", HOST) in found


def test_who_is_missing_is_named_and_nobody_waits_for_ever():
  for found in meet((3, 0), (3, 1), timeout=0.5):
    assert f"process 2 of 3 did not come to process 0 ({HOST}) within 0.5 s; 2 of them are here" in found or (
        "was reached and gave no start within 0.5 s" in found)  # process 1 may have begun to wait first
  assert re.fullmatch(r"process 0 did not answer at 127.0.0.1:\d+ within 0.3 s \(Connection refused\); start it there, "
                      "check --coordinator, and that no firewall closes the port", meet((2, 1), timeout=0.3)[0])
  with socket.create_server(("127.0.0.1", 0)) as other:  # it takes calls and says nothing
    port = other.getsockname()[1]
    with pytest.raises(RuntimeError, match="was reached and gave no start within 0.3 s: .* or another program"):
      rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 0.3)
    with pytest.raises(RuntimeError, match=f"cannot listen on port {port} of .*; another run may be using it"):
      rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 0.3)


@pytest.mark.parametrize("given, message", [
    ((), "no TPU pod, SLURM step, Open MPI or Kubernetes job is found"),
    (("node:1", 2), "--process is missing; give --coordinator, --processes and --process, or none"),
    (("", 0, 1), "--coordinator is missing"),
    (("node:1", 2, 2), "--process is 2 of 2 processes; expected 0 … 1"),
    (("node:1", -1, 0), "--processes is -1; expected their number"),
    (("node", 2, 0), "coordinator is 'node'; expected the host where process 0 runs and a free port"),
    (("node:70000", 2, 0), "coordinator is 'node:70000'"),
    (("node:1", 2, 0, 0), "the time to wait for other processes is 0 s"),
])
def test_what_is_told_is_whole_and_possible(given, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    distributed.connect(*given)


# What they do together

def together(folder):
  """Run in both processes."""
  place, count = distributed.hosts()
  with distributed.alone():
    inside = distributed.hosts()
  found = {"hosts": [place, count], "inside": inside, "first": distributed.first(),
           "agreed": distributed.agree({"from": place, "text": "ü" * (place + 1)}),
           "gathered": distributed.gather("x" * place), "met": distributed.meet("place", place)}
  distributed.compare("config", {"lr": 0.1, "nested": {"places": [0, 1]}})
  for facts in ({"optim": {"lr": place / 10}}, {} if place else {"seed": 3}):
    try:
      distributed.compare("config", facts)
    except ValueError as error:
      found["different"] = [*found.get("different", ()), str(error)]
  distributed.barrier("written")
  with open(f"{folder}/{place}.json", "w") as file:
    json.dump(found, file)
  time.sleep(2 * place)  # who is first done waits


def test_two_processes_work_together_and_end_well(tmp_path):
  (code, _, err), (other_code, _, other_err) = hosts.run(together, str(tmp_path))
  assert (code, other_code) == (0, 0), (err, other_err)
  assert err == f"2 processes x 2 devices (cpu) on {HOST} (2 processes)\n" and not other_err
  differs = f"process 1 of 2 ({HOST}) differs from process 0 ({HOST}) in its config (0 -> 1): "
  for place in range(2):
    assert json.loads((tmp_path / f"{place}.json").read_text()) == {
        "hosts": [place, 2], "inside": [0, 1], "first": not place, "agreed": {"from": 0, "text": "ü"},
        "gathered": ["", "x"], "met": [0, 1],
        "different": [f"{differs}optim.lr: 0.0 -> 0.1; give all processes the same",
                      f"{differs}seed: 3 -> None; give all processes the same"]}


def test_of_three_the_odd_one_is_named(monkeypatch):
  monkeypatch.setattr(distributed, "hosts", lambda: (1, 3))
  told = [[host, {"lr": lr, "deep": {"x": [1]}}] for host, lr in (("a", 1), ("b", 2), ("c", 2))]
  monkeypatch.setattr(distributed, "meet", lambda *_: told)
  differs = r"process 0 of 3 \(a\) differs from process 1 \(b\) in its run \(1 -> 0\): lr: 2 -> 1;"
  with pytest.raises(ValueError, match=differs):
    distributed.compare("run", {})


def test_data_are_compared_before_they_are_read(monkeypatch, tiny_task):
  asked = []
  def compare(what, facts):
    asked.append((what, facts["split_hash"]))
    raise ValueError("others")
  monkeypatch.setattr(distributed, "compare", compare)
  with pytest.raises(ValueError, match="others"):
    train.readable(tiny_task, "error", print, quiet=True)
  assert asked == [("data", tiny_task.split_hash())]


def test_versions_of_all_that_is_required_are_compared():
  assert {"python", "transferlab", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint"} <= set(distributed._versions())


# How they end

def ends(how: str):
  """Run in both processes: one of them ends, and the other one waits for it."""
  place, _ = distributed.hosts()
  distributed.barrier("begun")
  if how == "raises" and place:
    raise KeyError("nowhere")
  if how == "killed" and place:
    os.kill(os.getpid(), signal.SIGKILL)
  if how == "stopped" and not place:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
  if how == "stopped":
    time.sleep(600)
  distributed.barrier("never")


def timed(*program, **how) -> list[tuple[int, str, str]]:
  began = time.monotonic()
  ended = hosts.run(*program, timeout=60, **how)
  assert time.monotonic() - began < 45, ended
  return ended


def test_an_exception_in_one_ends_all_with_its_message():
  (code, _, err), (failed_code, _, failed_err) = timed(ends, "raises")
  assert (code, failed_code) == (1, 1)
  assert err.splitlines()[1:] == [f"error: process 1 of 2 ({HOST}) failed: KeyError: 'nowhere'"]
  assert failed_err.startswith("Traceback") and failed_err.splitlines()[-1] == (
      f"error: process 1 of 2 ({HOST}): KeyError: 'nowhere'")


def test_a_stop_of_the_first_one_ends_all():
  (code, _, err), (other_code, _, other_err) = timed(ends, "stopped")
  assert (code, other_code) == (130, 1)
  assert err.splitlines()[-1] == f"error: process 0 of 2 ({HOST}): stopped"
  assert other_err == f"error: process 0 of 2 ({HOST}) failed: stopped\n"


def test_a_process_that_is_killed_ends_the_others():
  (code, _, err), (killed, _, _) = timed(ends, "killed")
  assert code not in (0, -signal.SIGKILL) and killed == -signal.SIGKILL
  # Whichever notices first: the collective that lacks its data, or JAX, which aborts with a text of its own.
  assert ("another process is gone, perhaps killed: look at its host" in err.splitlines()[-1]
          or "JAX distributed service detected fatal errors" in err), err


# The command

CONFIG = """
from transferlab.experiment import defaults
def get_config(text=None):
  config = defaults("linear", data=text, backbone="vit_formula64")
  config.duration = "2 steps"
  return config
"""


def test_the_process_with_another_configuration_is_named(tmp_path):
  images = write_images(tmp_path / "images")
  (tmp_path / "config.py").write_text(CONFIG)
  ended = timed(["train", f"--config={tmp_path / 'config.py'}:folder:{images}", f"--workdir={tmp_path / 'run'}"],
                each={1: {"args": ["--config.optim.lr=0.25"]}})
  for code, out, err in ended:
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: process 1 of 2 \({HOST}\) differs from process 0 \({HOST}\) in its command "
                        r"\(0 -> 1\): --config.optim.lr: None -> '0.25'; give all processes the same",
                        err.splitlines()[-1])
  assert not (tmp_path / "run").exists()


def sizes(tmp_path, **how) -> list[tuple[int, str, str]]:
  images = write_images(tmp_path / "images", count=3)
  return timed(["features", "--backbone=vit_formula64", f"--data=folder:{images}", "--out=cache", "--dry_run"], **how)


def one_without_data(images):
  if not distributed.first():
    def missing(*_):
      raise ValueError(f"no {images}")
    data.from_string = missing
  cli.main(["transferlab", "features", "--backbone=vit_formula64", f"--data=folder:{images}", "--out=cache",
            "--dry_run"])


def test_what_a_user_can_mend_in_one_process_is_a_line_in_all(tmp_path):
  images = str(write_images(tmp_path / "images", count=3))
  (code, _, err), (other_code, _, other_err) = hosts.run(one_without_data, images)
  assert (code, other_code) == (1, 1)
  assert len(err.splitlines()) == 2 and len(other_err.splitlines()) == 1
  assert err.splitlines()[-1] == f"error: process 1 of 2 ({HOST}) failed: no {images}"
  assert other_err == f"error: process 1 of 2 ({HOST}): no {images}\n"


def test_standard_output_is_that_of_the_first_process(tmp_path):
  ended = sizes(tmp_path)
  assert [code for code, *_ in ended] == [0, 0], ended
  assert [out for _, out, _ in ended] == ["cache\n", ""]
  assert ended[0][2].startswith("2 processes x 2 devices (cpu)") and "cache of train: " in ended[0][2]
  assert not ended[1][2]
