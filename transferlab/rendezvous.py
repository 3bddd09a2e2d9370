"""Where the processes of a run find each other before JAX joins them: each says who it is to the first one, over plain
TCP at the address of JAX's coordinator, and hears from it that all have come, or what is wrong.

JAX itself aborts a process that nobody answers, or whose number is taken or too large, with a page of C++; its service
takes the address over once all have met. One line of JSON goes each way.
"""
import contextlib
import json
import os
import socket
import time

RETRY = 0.1  # seconds between attempts to reach the first process
STRANGER = 2.0  # seconds that whoever connects may take to say who he is
LINE = 65536  # bytes, at most


def meet(coordinator: str, processes: int, process: int, timeout: float) -> list[str]:
  """Host names of all processes in their order, once all of them are here.

  Args:
    coordinator: "host:port" where process 0 runs and listens.
    timeout: seconds to wait for the others.

  Raises:
    ValueError: the address is none; processes were told different numbers, or the same place.
    RuntimeError: time is up; the port is in use; one has left.
  """
  host, port = address(coordinator)
  if process:
    return _ask(host, port, {"process": process, "processes": processes, "host": socket.gethostname()}, timeout)
  with _listener(port) as listener:
    return _receive(listener, processes, timeout)


def address(text: str) -> tuple[str, int]:
  """(host, port) of "host:port"; an IPv6 address stands in brackets."""
  host, _, port = text.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ValueError(f"coordinator is {text!r}; expected the host where process 0 runs and a free port there, such as "
                     "node0:12355")
  return host.removeprefix("[").removesuffix("]"), int(port)


# --- Process 0 -----------------------------------------------------------------------------------------------------

def _listener(port: int) -> socket.socket:
  """Listens on all addresses of this host, as JAX's service will."""
  try:
    if socket.has_dualstack_ipv6():
      with contextlib.suppress(OSError):  # a kernel that knows IPv6 and was told not to use it
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
  except OSError as error:
    raise RuntimeError(f"process 0 cannot listen on port {port} of {socket.gethostname()} ({os.strerror(error.errno)});"
                       " another run may be using it, or another process is process 0 too: give --coordinator a free "
                       "port") from None


def _receive(listener: socket.socket, processes: int, timeout: float) -> list[str]:
  """Waits for the others, and tells all of them how it went."""
  until, own = time.monotonic() + timeout, socket.gethostname()
  guests, came = [], {0: (None, own)}  # {process: (connection, host)}
  with contextlib.ExitStack() as stack:
    try:
      while len(came) < processes:
        if (connection := _accept(listener, until)) is None:
          missing = [str(place) for place in range(processes) if place not in came]
          raise RuntimeError(f"process{'es'[:2 * (len(missing) > 1)]} {', '.join(missing[:8])} of {processes} did not "
                             f"come to process 0 ({own}) within {timeout:g} s; {len(came)} of them are here; look at "
                             "what the missing ones say, or give a longer --connect_timeout")
        guests.append(stack.enter_context(connection))
        if hello := _line(connection, STRANGER):
          place, host = _checked(hello, processes, came)
          came[place] = connection, host
      left = [f"process {place} of {processes} ({host})" for place, (guest, host) in came.items() if _gone(guest)]
      if left:
        raise RuntimeError(f"{left[0]} left before the start; look at what it says")
    except (ValueError, RuntimeError) as error:
      while late := _accept(listener, time.monotonic() + RETRY):
        guests.append(stack.enter_context(late))
      _tell(guests, {"error": str(error)})
      raise
    hosts = [came[place][1] for place in range(processes)]
    _tell(guests, {"hosts": hosts})
    for connection, _ in list(came.values())[1:]:  # who closes first keeps the port a while: it shall be the other
      _line(connection, STRANGER)
  return hosts


def _accept(listener: socket.socket, until: float) -> socket.socket | None:
  """The next connection, None when time is up."""
  listener.settimeout(max(until - time.monotonic(), 0.001))
  try:
    return listener.accept()[0]
  except TimeoutError:
    return None


def _checked(hello: dict, processes: int, came: dict) -> tuple[int, str]:
  """(process, host) of one that has come, if it fits with those before."""
  place, told, host, own = hello.get("process"), hello.get("processes"), str(hello.get("host"))[:256], came[0][1]
  if told != processes:
    raise ValueError(f"process {place} on {host} was told that there are {told} processes, process 0 on {own} that "
                     f"there are {processes}; give all of them the same --processes")
  if not isinstance(place, int) or not 0 < place < processes:
    raise ValueError(f"a process on {host} says that it is number {place}; expected 1 … {processes - 1}")
  if place in came and not _gone(came[place][0]):
    raise ValueError(f"two processes were told that they are process {place} of {processes}, on {came[place][1]} and "
                     f"on {host}; give each its own --process, from 0 to {processes - 1}")
  return place, host


def _gone(connection: socket.socket | None) -> bool:
  """Whether the other end is closed."""
  if connection is None:
    return False
  connection.setblocking(False)
  try:
    return not connection.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True


def _tell(guests: list[socket.socket], message: dict) -> None:
  for connection in guests:
    with contextlib.suppress(OSError):
      connection.settimeout(STRANGER)
      connection.sendall(json.dumps(message).encode() + b"\n")


# --- The others ----------------------------------------------------------------------------------------------------

def _ask(host: str, port: int, hello: dict, timeout: float) -> list[str]:
  """Goes to process 0 until it answers, which it does when all have come or something is wrong."""
  until, reason, there = time.monotonic() + timeout, "", False
  where = f"{host}:{port}"
  while (left := until - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=min(left, 10)) as connection:
        connection.sendall(json.dumps(hello).encode() + b"\n")
        there = True
        answer = _line(connection, max(until - time.monotonic(), 0.001)) or {}
    except OSError as error:  # nobody listens yet, or its name is not known yet
      reason, answer = error.strerror or str(error), {}
    if "error" in answer:
      raise ValueError(str(answer["error"]))
    if isinstance(hosts := answer.get("hosts"), list) and len(hosts) == hello["processes"]:
      return [str(name) for name in hosts]
    time.sleep(min(RETRY, max(until - time.monotonic(), 0)))
  if there:
    raise RuntimeError(f"{where} was reached and gave no start within {timeout:g} s: other processes are missing, or "
                       "another program listens there; look at what process 0 says, or give a longer --connect_timeout")
  raise RuntimeError(f"process 0 did not answer at {where} within {timeout:g} s ({reason}); start it there, check "
                     "--coordinator, and that no firewall closes the port")


def _line(connection: socket.socket, timeout: float) -> dict | None:
  """A line of JSON with an object, None where the other end sends none in time."""
  until, text = time.monotonic() + timeout, b""
  try:
    while not text.endswith(b"\n") and len(text) < LINE:
      connection.settimeout(max(until - time.monotonic(), 0.001))
      if not (part := connection.recv(4096)):
        break
      text += part
    found = json.loads(text)
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None
