"""Accelerators on paper: what their makers say of one device, and the times that a program's counts take on it.

A step is arithmetic, traffic to the device's memory, and what it receives from other devices. Each takes its amount
over a share of the published rate; how far they overlap is not known, so that a step takes at least the largest of
them and at most their sum. Latency of collectives, loading of images and the host are left out.
"""
import math
from typing import NamedTuple

from transferlab.tree import nearest

USABLE = 0.9  # of a device's memory; the rest is the runtime's, and lost between arrays


class Machine(NamedTuple):
  """Published figures of one device.

  Fields:
    name, form: in words.
    flops: FLOP/s in bfloat16, dense.
    memory: bytes.
    bandwidth: bytes/s of its memory.
    links: (most devices, bytes/s that one of them receives when all exchange at once), ascending.
    source: where the figures are published.
  """
  name: str
  form: str
  flops: float
  memory: float
  bandwidth: float
  links: tuple[tuple[float, float], ...]
  source: str

  def link(self, devices: int) -> float:
    """Bytes/s that each of so many devices receives."""
    return next(rate for most, rate in self.links if devices <= most)

  @property
  def usable(self) -> float:
    """Bytes that a program may hold."""
    return USABLE * self.memory


# Links are half of what is published for both directions. Rings over nodes of eight GPUs pass from node to node by all
# their network cards, eight of 50 GB/s (H100) or 25 GB/s (A100), so that these together are the rate of the rings. A
# TPU slice that is no full torus, less than 16 x 16 chips (v5e) or 4 x 4 x 4 (v5p), is taken to use half its links.
MACHINES = {
    "h100": Machine("H100", "SXM, 80 GB, nodes of 8", 989e12, 80e9, 3.35e12, ((8, 450e9), (math.inf, 400e9)),
                    "NVIDIA's H100 datasheet (NVLink 900 GB/s) and DGX H100 (8 x 400 Gb/s InfiniBand)"),
    "a100": Machine("A100", "SXM, 80 GB, nodes of 8", 312e12, 80e9, 2.039e12, ((8, 300e9), (math.inf, 200e9)),
                    "NVIDIA's A100 datasheet (NVLink 600 GB/s) and DGX A100 (8 x 200 Gb/s InfiniBand)"),
    "v5e": Machine("v5e", "TPU, 16 GB, a pod of 256", 197e12, 16e9, 819e9,
                   ((128, 100e9), (256, 200e9), (math.inf, 3.125e9)),
                   "Cloud TPU documentation of v5e (interconnect 400 GB/s; a pod's network 6.4 Tb/s)"),
    "v5p": Machine("v5p", "TPU, 95 GiB, a pod of 8960", 459e12, 95 * 2**30, 2.765e12,
                   ((63, 300e9), (8960, 600e9), (math.inf, 6.25e9)),
                   "Cloud TPU documentation of v5p (interconnect 1200 GB/s; a chip's network 50 Gb/s)")}


class Times(NamedTuple):
  """Seconds of a step's parts."""
  arithmetic: float
  memory: float
  links: float

  @property
  def limit(self) -> str:
    """The part that takes longest."""
    return max(self._fields, key=lambda name: getattr(self, name))


def machine(name: str) -> Machine:
  """A machine of `MACHINES`."""
  if name not in MACHINES:
    raise ValueError(f"machine {name!r} is unknown; nearest: {nearest(name, MACHINES)[0]}; all: {', '.join(MACHINES)}")
  return MACHINES[name]


def times(on: Machine, devices: int, flops: float, moved: float, received: float, efficiency: float) -> Times:
  """What a step takes on each of `devices` devices.

  Args:
    flops, moved, received: of one device: FLOPs, bytes to and from its memory, and bytes from other devices.
    efficiency: share of the published rates that is reached, of all three.
  """
  rates = on.flops, on.bandwidth, on.link(devices)
  return Times(*(amount / (efficiency * rate) for amount, rate in zip((flops, moved, received), rates)))
