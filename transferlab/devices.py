"""Devices: the only place that knows how many there are. Batches are split over the mesh axis `data`, parallel heads
over `heads`, the rest is whole on every device; gradients are those of the global batch whatever their number."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(count: int | None = None, heads: int = 1) -> Mesh:
  """A mesh [data, heads] of the first `count` local devices, all of them by default. Groups of `heads` devices, which
  has to divide their number, share out parallel heads; the groups share out the batch."""
  devices = jax.devices()
  if count is not None and not 1 <= count <= len(devices):
    raise ValueError(f"{count} devices asked for and {len(devices)} found; use devices=1 … {len(devices)}")
  count = len(devices) if count is None else count
  if heads < 1 or count % heads:
    raise ValueError(f"heads={heads} does not divide {count} devices; expected a divisor of them")
  return Mesh(np.array(devices[:count]).reshape(-1, heads), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)


def compute_dtype(name: str):
  """The type a backbone computes in: "float32", "bfloat16", or "auto", which is float32 on CPU, else bfloat16."""
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
  """The first axis split over the devices of `data`."""
  return NamedSharding(mesh, PartitionSpec("data"))


def along_heads(mesh: Mesh) -> NamedSharding:
  """The first axis, K, split over the devices of `heads`."""
  return NamedSharding(mesh, PartitionSpec("heads"))


def replicate(tree, mesh: Mesh):
  """Puts a pytree whole on every device. The result may share memory with `tree`: never donate the backbone."""
  return jax.device_put(tree, replicated(mesh))


def cast(frozen: dict, params: dict, dtype) -> dict:
  """Frozen parameters in the type that a backbone computes in: the floats among its own `params`.

  Scalars stay as they are, and so does what a method has made of parameters under other names (`Method.prepare`).
  """
  def one(leaf):
    floats = jnp.ndim(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, dtype) if floats else jnp.asarray(leaf)
  return {name: jax.tree.map(one if name in params else jnp.asarray, leaf) for name, leaf in frozen.items()}


def put_batch(batch: dict, mesh: Mesh) -> dict:
  """Puts a batch of arrays [B, …], nested or not, on the devices, B split over `data`.

  A batch that the devices do not divide is filled up with copies of its last row of weight 0.
  """
  missing = -len(batch["weight"]) % mesh.shape["data"]
  if missing:
    fill = lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    batch = jax.tree.map(fill, batch)
    batch["weight"][-missing:] = 0
  return jax.device_put(batch, along_batch(mesh))
