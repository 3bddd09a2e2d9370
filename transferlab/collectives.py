"""What devices send each other in one run of a compiled program, read from its text.

XLA's own cost analysis says nothing of it. The text is that of one device (all run the same), with every collective
once: what stands in a loop counts as often as the loop runs, what stands behind a condition as if it were met.
"""
import math
import re
from collections import Counter
from functools import cache

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

# Bytes that a device receives for each byte of the result, among n that take part, by the ring algorithms, which reach
# the lower bound of bandwidth (Patarasuk and Yuan 2009): an all-reduce is a reduce-scatter and an all-gather.
_RECEIVED = {
    "all-gather": lambda n: (n - 1) / n, "all-reduce": lambda n: 2 * (n - 1) / n, "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n, "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1, "collective-broadcast": lambda n: 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collectives(compiled) -> dict[str, int]:
  """{kind: bytes that one device receives} in a run of a compiled program, kinds as in `KINDS`; only those it has.

  Counted as the ring algorithms move them: of an array of `s` bytes among n devices (n - 1) / n s are gathered, as many
  scattered or exchanged, and twice as many reduced; a permutation is its array. Links and latencies are not looked at.

  Args:
    compiled: what `.lower(...).compile()` returns, or its text.

  Raises:
    ValueError: a loop that communicates and does not say how often it runs.
  """
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  lines = {name: lines for name, lines in _computations(text)}
  entry = re.search(r"^ENTRY %?([\w.-]+) ", text, re.MULTILINE)
  if entry is None:
    raise ValueError("the text has no ENTRY; expected that of a compiled program, compiled.as_text()")
  header = re.search(r"num_partitions=(\d+)", text) or re.search(r"replica_count=(\d+)", text)
  devices = int(header[1]) if header else 1

  @cache
  def total(name: str) -> Counter:
    found, starts = Counter(), {}
    for own, shape, operation, rest in lines.get(name, ()):
      kind = operation.removesuffix("-start").removesuffix("-done")
      if kind in _RECEIVED and operation.endswith("-start"):
        starts[own] = rest  # its result holds what goes in, too; what comes out is the result of its end
      elif kind in _RECEIVED:
        given = starts[re.match(r".*?%?([\w.-]+)\)", rest)[1]] if operation.endswith("-done") else rest
        found[kind] += _bytes(shape) * _RECEIVED[kind](_members(given, devices))
      if operation in ("async-update", "async-done"):
        continue  # they name what their start has called
      inner = sum((total(called) for called in _CALLED.findall(rest)), Counter())
      for branches in _BRANCHES.findall(rest):
        inner += _most([total(branch.strip(" %")) for branch in branches.split(",")])
      if operation == "while" and inner:
        trips = _TRIPS.search(rest)
        if trips is None:
          raise ValueError(f"loop {own} communicates, and the program does not say how often it runs; expected a loop "
                           "of fixed length, such as lax.scan's")
        inner = Counter({kind: int(trips[1]) * size for kind, size in inner.items()})
      found += inner
    return found

  return {kind: round(size) for kind, size in sorted(total(entry[1]).items()) if size}


def _computations(text: str):
  """(name, [(name, shape, operation, rest of the line)]) of every computation in a program's text."""
  name, body = None, []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      name, body = head[1], []
    elif line.startswith("}") and name:
      yield name, body
      name = None
    elif name and (found := _INSTRUCTION.match(line)):
      body.append(found.groups())


def _bytes(shape: str) -> float:
  """Of an array "bf16[4,8]{1,0}", or of all of a tuple."""
  found = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
  return sum(int(bits or 8) / 8 * math.prod(map(int, filter(None, sizes.split(",")))) for _, bits, sizes in found)


def _members(rest: str, devices: int) -> int:
  """How many devices take part in a collective together: the size of its first group."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? ?\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'a':(2)4 is a part of axis a, of size 4
    return math.prod(int(part) if part else sizes[name] for name, part in parts)
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(found[2])
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(found[1].split(","))
  return devices  # no groups, or an empty list: all of them


def _most(choices: list[Counter]) -> Counter:
  return max(choices, key=lambda choice: sum(choice.values()), default=Counter())
