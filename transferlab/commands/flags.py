"""Flags of the verbs: each verb has its own, defined where it reads them."""
import re
from collections.abc import Callable

from absl import flags

BACKBONE = (None, "zoo name, weights file or folder, or hf:owner/name")


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
