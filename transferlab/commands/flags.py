"""Flags of the verbs: each verb has its own, defined where it reads them."""
import os
import re
import sys
from collections.abc import Callable

from absl import flags

BACKBONE = (None, "zoo name, weights file or folder, or hf:owner/name")
DISTRIBUTED = {
    "distributed": (False, "this is one of several processes of a run, which all are given the same command"),
    "coordinator": ("", "HOST:PORT of process 0; found on TPU pods, SLURM, Open MPI and Kubernetes, as the next two"),
    "processes": (0, "how many there are"), "process": (-1, "which one this is, from 0"),
    "connect_timeout": (300, "seconds to wait for the others")}


def define(**strings) -> flags.FlagValues:
  """A verb's own flags; each keyword is a string flag with (default, help)."""
  values = flags.FlagValues()
  for name, (default, text) in strings.items():
    kinds = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    kinds.get(type(default), flags.DEFINE_string)(name, default, text, flag_values=values)
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
  values.set_gnu_getopt()  # flags may follow file names
  return values


def parse(values: flags.FlagValues, argv: list[str], verb: Callable, files: bool = False) -> list[str]:
  """Positional arguments, where the verb takes `files`; prints help, the verb's docstring first, and exits if asked."""
  rest = values(argv)[1:]
  if values.help:
    print(f"{argv[0]}: {verb.__doc__}\n")
    for name in values:
      if name not in ("help", "h"):
        print(f"  --{name}  {values[name].help} (default: {values[name].default!r})")
    raise SystemExit(0)
  if rest and not files:
    raise ValueError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
  return rest


def join(values: flags.FlagValues, verb: Callable, config: dict[str, str] | None = None) -> None:
  """Joins the processes of a run where --distributed says so; nothing may have touched JAX's devices.

  All have to have been given the same command: the verb, its flags, and the changes of the configuration, `config`.
  Standard output is process 0's alone, as the messages are.
  """
  given = [name for name in DISTRIBUTED if values[name].present]
  if not values.distributed:
    if given:
      raise ValueError(f"--{given[0]} goes with --distributed, which is not given; add it, or leave --{given[0]} out")
    return
  from transferlab import distributed, preemption
  # JAX's collectives on CPU greet each other on file descriptor 1; scripts read results there.
  descriptor, nowhere = sys.stdout.fileno(), open(os.devnull, "w")
  sys.stdout = open(os.dup(descriptor), "w", encoding=sys.stdout.encoding)
  os.dup2(nowhere.fileno(), descriptor)
  distributed.connect(values.coordinator, values.processes, values.process, values.connect_timeout)
  preemption.listen()
  own = {f"--{name}": values[name].value for name in values if name not in (*DISTRIBUTED, "help", "h")}
  distributed.compare("command", {"verb": verb.__name__, **own,
                                  **{f"--config.{key}": text for key, text in (config or {}).items()}})
  if not distributed.first():
    sys.stdout = nowhere


def required(values: flags.FlagValues, *names: str) -> None:
  """Raises `ValueError` at the first of the flags that is not given."""
  for name in names:
    if not values[name].value:
      raise ValueError(f"--{name} is missing: {values[name].help}")


def config_changes(argv: list[str]) -> tuple[dict[str, str], list[str]]:
  """({key: text} of the --config.KEY=value among the arguments, the other arguments)."""
  changes, rest = {}, []
  for argument in argv:
    if found := re.fullmatch(r"--?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL):
      if found[2] is None:
        raise ValueError(f"{argument} has no value; expected {argument}=value")
      changes[found[1]] = found[2]
    else:
      rest.append(argument)
  return changes, rest


def seeds(text: str) -> list[int]:
  """The numbers of "0,1,2"."""
  found = words(text)
  if not found or not all(seed.isdecimal() for seed in found) or len(set(found)) != len(found):
    raise ValueError(f"--seeds is {text!r}; expected different whole numbers, such as 0,1,2")
  return [int(seed) for seed in found]


def words(text: str) -> list[str]:
  """The parts of "a, b"."""
  return [word.strip() for word in text.split(",") if word.strip()]
