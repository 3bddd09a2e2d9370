"""The `transferlab` command: every verb is a thin call into the library."""
import contextlib
import errno
import os
import sys

from absl import flags

from transferlab.commands.classes import classes, incremental
from transferlab.commands.data import data_verb
from transferlab.commands.features import features
from transferlab.commands.reporting import report
from transferlab.commands.scaling import scale
from transferlab.commands.sweeping import sweep
from transferlab.commands.training import train
from transferlab.commands.using import evaluate, predict
from transferlab.commands.weights import convert, info, merge
from transferlab.signals import handled

USAGE = """usage: transferlab VERB [--flag=value …]      (transferlab VERB --help lists a verb's flags)

  train     --config=configs/folder.py:data=folder:/images,method=dtl --workdir=runs/mine
  train     --config=configs/vtab.py:method=dtl --suite=vtab1k --data_dir=/data --workdir=runs/vtab
  train     --config=configs/folder.py:data=folder:/images --workdir=runs/mine --distributed   (in every process)
  sweep     --config=configs/vtab.py:phase=tune --grid="optim.lr=1e-3,1e-2" --final=phase=final --workdir=runs/dtd
  report    runs/vtab
  report    runs/vtab --paper=dtl/table2
  report    runs/vtab --figure=head2toe/layers --out=figures
  eval      --adapter=runs/mine/adapter.safetensors --data=folder:/images
  predict   --adapter=runs/mine/adapter.safetensors --out=predictions.csv image.jpg folder/
  predict   --adapter=runs/mine/adapter.safetensors --table=photos.csv --out=predicted.csv
  predict   --adapter=cats/adapter.safetensors,dogs/adapter.safetensors image.jpg
  predict   --backbone=clip/ --classes="dog,cat" --templates="a photo of a {}." image.jpg
  predict   --adapter=lfa/adapter.safetensors --backbone=clip/ --explain=explained image.jpg
  info      --backbone=vit_b16 --method=dtl --num_classes=100
  info      --backbone=vit_l16 --method=inca --against=full --heads=8
  scale     --backbone=vit_gigantic14 --methods=lora,full --devices=1,8,64 --machines=h100,v5e --out=scale
  convert   --backbone=weights.npz --out=weights.safetensors
  merge     --adapter=runs/mine/adapter.safetensors --out=merged.safetensors
  classes   --adapter=runs/mine/adapter.safetensors --drop=ant,bee --out=fewer.safetensors
  incremental --config=configs/folder.py:data=folder:/images,method=open_inca --steps=5 --workdir=runs/steps
  features  --backbone=vit_formula64 --data=folder:/images --method=head2toe --out=cache --dry_run
  data      --data=folder:/images
  data      list|check|prepare vtab1k coop/dtd --data_dir=/data
"""

VERBS = {"train": train, "sweep": sweep, "report": report, "eval": evaluate, "predict": predict, "info": info,
         "scale": scale, "convert": convert, "merge": merge, "classes": classes, "incremental": incremental,
         "features": features, "data": data_verb}
RESUMES = ("train", "sweep", "incremental", "features")  # what the same command takes up where it stopped


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
    with handled() if verb in RESUMES else contextlib.nullcontext():
      _run(verb, argv[2:])
  except (ValueError, OSError, RuntimeError, flags.Error) as error:
    if isinstance(error, BrokenPipeError) and _unread():
      raise SystemExit(1) from None
    if os.environ.get("TRANSFERLAB_TRACEBACK"):
      raise
    hint = ""
    if isinstance(error, flags.UnrecognizedFlagError):
      hint = f"; transferlab {verb} --help lists the flags"
      hint += ", configuration keys are --config.NAME" * (verb in ("train", "sweep", "incremental"))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      hint = "; free some space and run the same command again" + ", it resumes" * (verb in RESUMES)
    _stop("error: " + " ".join(str(error).split()) + hint, 1)
  except KeyboardInterrupt:
    _stop("stopped" + "; the same command resumes from what is saved" * (verb in RESUMES), 130)


def _stop(line: str, code: int) -> None:
  """Ends the program with a line on standard error, and with it the processes that it works with."""
  if failure := sys.modules.get("transferlab.failure"):
    failure.fail(line.removeprefix("error: "), code)
  print(line, file=sys.stderr)
  raise SystemExit(code) from None


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
