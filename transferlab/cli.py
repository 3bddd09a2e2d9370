"""The `transferlab` command: every verb is a thin call into the library."""
import errno
import os
import sys

from absl import flags

from transferlab.commands.data import data_verb
from transferlab.commands.training import report, train
from transferlab.commands.using import evaluate, predict
from transferlab.commands.weights import convert, info, merge

USAGE = """usage: transferlab VERB [--flag=value …]      (transferlab VERB --help lists a verb's flags)

  train     --config=configs/folder.py:data=folder:/images,method=dtl --workdir=runs/mine
  train     --config=configs/vtab.py:method=dtl --suite=vtab1k --data_dir=/data --workdir=runs/vtab
  report    runs/vtab
  eval      --adapter=runs/mine/adapter.safetensors --data=folder:/images
  predict   --adapter=runs/mine/adapter.safetensors --out=predictions.csv image.jpg folder/
  predict   --adapter=runs/mine/adapter.safetensors --table=photos.csv --out=predicted.csv
  info      --backbone=vit_b16 --method=dtl --num_classes=100
  convert   --backbone=weights.npz --out=weights.safetensors
  merge     --adapter=runs/mine/adapter.safetensors --out=merged.safetensors
  data      --data=folder:/images
  data      list|check|prepare vtab1k coop/dtd --data_dir=/data
"""

VERBS = {"train": train, "report": report, "eval": evaluate, "predict": predict, "info": info, "convert": convert,
         "merge": merge, "data": data_verb}


def main(argv: list[str] | None = None) -> None:
  """Runs a verb. What the user can mend is one line on standard error; TRANSFERLAB_TRACEBACK=1 shows its origin."""
  argv = list(sys.argv if argv is None else argv)
  if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
    print(USAGE)
    raise SystemExit(0 if len(argv) > 1 else 2)
  verb = argv[1]
  try:
    if verb not in VERBS:
      from transferlab.tree import nearest
      raise ValueError(f"verb {verb!r} is unknown; nearest: {nearest(verb, VERBS)[0]}; all: {', '.join(VERBS)}")
    _run(verb, argv[2:])
  except (ValueError, OSError, RuntimeError, flags.Error) as error:
    if isinstance(error, BrokenPipeError) and _unread():
      raise SystemExit(1) from None
    if os.environ.get("TRANSFERLAB_TRACEBACK"):
      raise
    hint = ""
    if isinstance(error, flags.UnrecognizedFlagError):
      hint = f"; transferlab {verb} --help lists the flags"
      hint += ", configuration keys are --config.NAME" * (verb == "train")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      hint = "; free some space and run the same command again" + ", it resumes" * (verb == "train")
    print("error: " + " ".join(str(error).split()) + hint, file=sys.stderr)
    raise SystemExit(1) from None
  except KeyboardInterrupt:
    print("stopped" + "; the same command resumes from the last checkpoint" * (verb == "train"), file=sys.stderr)
    raise SystemExit(130) from None


def _run(verb: str, argv: list[str]) -> None:
  """Runs a verb; all that it prints is out at its end, also where that is a status."""
  try:
    VERBS[verb]([f"transferlab {verb}", *argv])
  except SystemExit:
    sys.stdout.flush()
    raise
  sys.stdout.flush()


def _unread() -> bool:
  """Whether who read standard output has gone, as `head` does; what is left to be written is then dropped."""
  try:
    print(flush=True)  # a flush alone succeeds where the line that failed was too long to be kept
    return False
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
  main()
