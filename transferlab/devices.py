"""Devices: the only place that knows how many there are. Batches are split over the mesh axis `data`, the rest is whole
on every device; gradients are those of the global batch whatever the number of devices."""
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(count: int | None = None) -> Mesh:
  """A mesh of the first `count` local devices, all of them by default."""
  devices = jax.devices()
  if count is not None and not 1 <= count <= len(devices):
    raise ValueError(f"{count} devices asked for and {len(devices)} found; use devices=1 … {len(devices)}")
  return Mesh(np.array(devices[:count]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
  """The first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def replicate(tree, mesh: Mesh):
  """Puts a pytree whole on every device. The result may share memory with `tree`: never donate the backbone."""
  return jax.device_put(tree, replicated(mesh))


def put_batch(batch: dict, mesh: Mesh) -> dict:
  """Puts a batch of arrays [B, …], nested or not, on the devices, B split over `data`.

  A batch that the devices do not divide is filled up with copies of its last row of weight 0.
  """
  missing = -len(batch["weight"]) % mesh.size
  if missing:
    fill = lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    batch = jax.tree.map(fill, batch)
    batch["weight"][-missing:] = 0
  return jax.device_put(batch, along_batch(mesh))
