"""The signal that takes a machine away, as one process has it; see `preemption.py` for the whole of it.

SIGTERM, by which schedulers say so, and SIGUSR1 (`sbatch --signal=USR1@120`) end the program with exit code 75
(EX_TEMPFAIL, "try again"), which no failure of a run has: a launcher that sees it starts the same command again.
"""
import contextlib
import signal
from types import SimpleNamespace

CODE = 75
NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]

# asked: a signal came. waits: it is looked for after every step. taken: other handlers than these have the signals.
state = SimpleNamespace(asked=False, waits=False, taken=False)


class Preempted(SystemExit):
  """Ends the program with exit code 75, having said why. It is no `Exception`: what goes on after failures does not go
  on after this."""

  def __init__(self, what: str = "the same command goes on from what is saved"):
    super().__init__(CODE)
    from transferlab.progress import say
    say(said(what))


def said(what: str) -> str:
  """The line that a preempted program ends with."""
  return f"preempted: {what}; exit code {CODE}"


@contextlib.contextmanager
def handled():
  """Inside, which has to be in the main thread, a signal raises `Preempted`, or waits for who looks for it."""
  before = {} if state.taken else {number: signal.signal(number, _signalled) for number in NUMBERS}
  try:
    yield
  finally:
    if not state.taken:
      state.asked = False
      for number, handler in before.items():
        signal.signal(number, handler)


def _signalled(*_) -> None:
  state.asked = True
  if not state.waits:
    raise Preempted
