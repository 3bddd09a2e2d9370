"""The counts of steps and their times as tables, what limits each in a sentence, and both as files."""
import math
from collections.abc import Sequence
from pathlib import Path

from transferlab import plots
from transferlab.files import write_json
from transferlab.papers.table import Table
from transferlab.scale.machines import USABLE, Machine, Times
from transferlab.scale.steps import Row, Setting

KINDS = {"reduced": ("all-reduce", "reduce-scatter"), "gathered": ("all-gather",)}  # all else is exchanged
LIMITS = {"arithmetic": "arithmetic limits", "memory": "traffic to memory limits", "links": "links limit"}


def received(row: Row) -> dict[str, int]:
  """{"reduced", "gathered", "exchanged": bytes that a device receives in a step}."""
  found = {name: sum(row.received.get(kind, 0) for kind in kinds) for name, kinds in KINDS.items()}
  return {**found, "exchanged": sum(row.received.values()) - sum(found.values())}


def tables(rows: Sequence[Row], on: Sequence[Machine], setting: Setting, efficiency: float) -> list[Table]:
  """One of what is counted, and one for each machine of the times that it implies."""
  return [_counts(rows, setting), *(_times(rows, machine, efficiency) for machine in on)]


def _counts(rows: Sequence[Row], setting: Setting) -> Table:
  mega = lambda value: value / 1e6 if value else None
  part = lambda value, unit: None if value is None else value / unit
  cells = [[row.backbone, row.method, row.devices, row.shard, mega(row.trainable), *map(mega, received(row).values()),
            part(row.peak, 1e9), part(row.flops, 1e12), row.moved / 1e9] for row in rows]
  where = f"TPU {setting.slice}" if setting.slice else "CPU"
  remarks = [f"weak scaling: {setting.batch} images per device, {setting.num_classes} classes"
             + ", adapted blocks computed again" * setting.remat,
             f"compiled for {where}, backbones in {setting.dtype}, heads and gradients in float32; AdamW",
             "reduced, gathered, exchanged: MB (10^6 bytes) that a device receives in a step, by ring algorithms",
             "traffic: what matrix products read and write in memory, backbones in bfloat16"]
  if not setting.slice:
    remarks.append("peak and what is gathered are float32's; in bfloat16 an accelerator needs down to half of either, "
                   "and may scatter the gradients of a shared backbone that trains, for half of what is reduced")
  if any(row.flops is None for row in rows):
    remarks.append("rows without numbers: the compiler finds that the step does not fit")
  header = ["backbone", "method", "devices", "shard", "trained (M)", "reduced", "gathered", "exchanged", "peak (GB)",
            "TFLOP", "traffic (GB)"]
  forms = ["", "", "", "", ".3f", ".2f", ".2f", ".2f", ".2f", ".3f", ".1f"]
  return Table("A training step, counted on each device", header, forms, cells, [], remarks)


def _times(rows: Sequence[Row], machine: Machine, efficiency: float) -> Table:
  cells = []
  for row in rows:
    times = row.times(machine, efficiency)
    ms = [None] * 5 if times is None else [1e3 * value for value in (*times, max(times), sum(times))]
    cells.append([row.backbone, row.method, row.devices, row.shard, *ms, times and times.limit,
                  "yes" if row.fits(machine) else "no"])
  rates = [f"{machine.flops / 1e12:.0f} TFLOP/s in bfloat16", f"memory of {machine.memory / 1e9:.0f} GB at "
           f"{machine.bandwidth / 1e12:.2f} TB/s", "links of " + ", ".join(
               f"{rate / 1e9:.3g} GB/s" + f" (up to {most} devices)" * math.isfinite(most)
               for most, rate in machine.links)]
  remarks = [f"{machine.name}: {'; '.join(rates)}. {machine.source}",
             f"at {efficiency:.0%} of these rates; fits: in {USABLE:.0%} of the memory; a step takes from the largest "
             "part (all overlap) to the sum (none does); latencies and the loading of images are left out"]
  return Table(f"Milliseconds of a step on {machine.name}, {machine.form}",
               ["backbone", "method", "devices", "shard", "arithmetic", "memory", "links", "largest", "sum", "limit",
                "fits"], ["", "", "", ""] + [".3g"] * 5 + ["", ""], cells, [], remarks)


def limits(rows: Sequence[Row], on: Sequence[Machine], setting: Setting, efficiency: float) -> list[str]:
  """A sentence for each backbone and method, from the numbers: what limits its steps on the most devices, and where
  they do not fit."""
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    groups.setdefault((row.backbone, row.method), []).append(row)
  said = []
  for (backbone, method), group in groups.items():
    most = max(row.devices for row in group)
    group = [row for row in group if row.devices == most]
    holding = {machine: next((row for row in group if row.fits(machine)), None) for machine in on}
    parts = _limits({machine: row for machine, row in holding.items() if row}, efficiency)
    parts += _room(group, holding, setting)
    said.append(f"{method} on {backbone}, {most} device{'s' * (most > 1)}: {'; '.join(parts)}.")
  return said


def _limits(holding: dict[Machine, Row], efficiency: float) -> list[str]:
  """"arithmetic limits on v5e (7.3 of 12 ms, links 0.2%)"."""
  parts: dict[str, list[str]] = {}
  for machine, row in holding.items():
    times = row.times(machine, efficiency)
    links = f", links {times.links / sum(times):.1%}" * (times.limit != "links")
    parts.setdefault(times.limit, []).append(
        f"{machine.name} ({1e3 * max(times):.3g} of {1e3 * sum(times):.3g} ms{links})")
  return [f"{LIMITS[limit]} on {', '.join(names)}" for limit, names in parts.items()]


def _room(group: Sequence[Row], holding: dict[Machine, Row | None], setting: Setting) -> list[str]:
  """What does not fit, and how it would."""
  first, said = group[0], []
  need = "a step does" if first.peak is None else f"{first.peak / 1e9:.1f} GB ({setting.dtype}) do"
  least = min((row for row in group if row.peak is not None), key=lambda row: row.peak, default=first)
  hope = ", nor with a shared backbone" * (first.shard == 1 < first.devices)
  if least.shard > first.shard:
    hope = f", nor do {least.peak / 1e9:.1f} GB with shard={least.shard}"
  for machine, row in holding.items():
    room = f"{need} not fit the {machine.usable / 1e9:.1f} GB of {machine.name}"
    if row is None:
      said.append(f"{room}{hope}: fewer images per device")
    elif row.shard > first.shard:
      said.append(f"{room}, with shard={row.shard} {row.peak / 1e9:.1f} GB do")
  return said


def plain(rows: Sequence[Row], on: Sequence[Machine], setting: Setting, efficiency: float) -> dict:
  """All of it as plain data, in seconds and bytes: a row for each step and machine."""
  lines = []
  for row in rows:
    for machine in on:
      times = row.times(machine, efficiency)
      parts = Times(None, None, None) if times is None else times
      lines.append({"backbone": row.backbone, "method": row.method, "devices": row.devices, "shard": row.shard,
                    "batch_per_device": row.batch, "trainable": row.trainable, "flops": row.flops, "peak": row.peak,
                    "moved": row.moved, **received(row), "machine": machine.name, "fits": row.fits(machine),
                    **parts._asdict(), "largest": times and max(times), "sum": times and sum(times),
                    "limit": times and times.limit})
  bounds = lambda links: [[most if math.isfinite(most) else None, rate] for most, rate in links]
  return {"setting": {**setting._asdict(), "dtype": setting.dtype}, "efficiency": efficiency, "usable": USABLE,
          "machines": [{**machine._asdict(), "links": bounds(machine.links)} for machine in on],
          "rows": lines, "limits": limits(rows, on, setting, efficiency)}


def write(folder, found: dict) -> list[Path]:
  """Writes what `plain` made as scale.csv, the rows, and scale.json; returns their paths."""
  lines, folder = found["rows"], Path(folder)
  table = plots.table(folder / "scale.csv", list(lines[0]), [list(line.values()) for line in lines])
  write_json(folder / "scale.json", found)
  return [table, folder / "scale.json"]
