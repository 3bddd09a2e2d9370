"""Devices: the only place that knows how many there are, in this process and in others. Batches are split over the mesh
axes `data` and `shard`, frozen parameters that do not fit over `shard`, parallel heads over `heads`, the rest is whole
on every device; gradients are those of the global batch whatever their number."""
import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transferlab import distributed


def make_mesh(count: int | None = None, heads: int = 1, shard: int = 1, among=None) -> Mesh:
  """A mesh [data, shard, heads] of the first `count` devices of all processes, all of them by default; of this process
  inside `distributed.alone`; or of the devices `among` which they are, see `topology`.

  Groups of `heads` devices, which has to divide their number, share out parallel heads, and groups of `shard` of these
  a frozen backbone; all groups share out the batch.
  """
  own = jax.devices() if distributed.hosts()[1] > 1 else jax.local_devices()
  devices = among or sorted(own, key=lambda device: device.process_index)  # a process's rows are next to each other
  if count is not None and not 1 <= count <= len(devices):
    raise ValueError(f"{count} devices asked for and {len(devices)} found; use devices=1 … {len(devices)}")
  count = len(devices) if count is None else count
  idle = {device.process_index for device in devices} - {device.process_index for device in devices[:count]}
  if idle and among is None:
    raise ValueError(f"devices={count} of {len(devices)} leaves process {min(idle)} without any; use devices=0 for all "
                     "of them, or start fewer processes")
  for name, size, left in (("heads", heads, count), ("shard", shard, count // max(heads, 1))):
    if size < 1 or left % size:
      what = "devices" if left == count else f"groups of {heads} devices"
      raise ValueError(f"{name}={size} does not divide {left} {what}; expected a divisor")
  return Mesh(np.array(devices[:count]).reshape(-1, shard, heads), ("data", "shard", "heads"),
              axis_types=(AxisType.Auto,) * 3)


def sharing(count: int, shard: int) -> Mesh:
  """A mesh of `count` devices of which `shard` at a time share a backbone; 0 for all of them."""
  count = count or make_mesh().size
  return make_mesh(count, shard=shard or count)


def pretend(count: int) -> None:
  """Gives this process `count` CPU devices at least and no accelerator, to compile for, unless JAX runs already."""
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))
    jax.config.update("jax_platforms", "cpu")


def topology(name: str) -> list:
  """The devices of a TPU slice, "v5e:2x4", that need not be here: programs can be compiled for them, and not run.

  Raises:
    ValueError: there is no such slice, or no TPU compiler, or another process uses it.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the network which machine this is
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except RuntimeError as error:
    why = "another process uses the compiler" if "lockfile" in str(error) else str(error).partition(";")[0][:200]
    raise ValueError(f"nothing can be compiled for a TPU slice {name!r} ({why}); expected a slice such as v5e:2x4 or "
                     "v5p:2x2x2, and its compiler: pip install 'transferlab[tpu]'") from None


def compute_dtype(name: str):
  """The type a backbone computes in: "float32", "bfloat16", or "auto", which is float32 on CPU, else bfloat16."""
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
  """The first axis split over the groups that share out the batch."""
  return NamedSharding(mesh, PartitionSpec(("data", "shard")))


def along_heads(mesh: Mesh) -> NamedSharding:
  """The first axis, K, split over the devices of `heads`."""
  return NamedSharding(mesh, PartitionSpec("heads"))


def groups(mesh: Mesh) -> int:
  """Into how many parts a batch is split."""
  return mesh.shape["data"] * mesh.shape["shard"]


def put(tree, sharding: NamedSharding):
  """Puts a pytree, which is the same in all processes, on the devices. The result may share memory with `tree`: never
  donate the backbone."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  def one(leaf):
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
  return jax.tree.map(one, tree)


def replicate(tree, mesh: Mesh):
  """Puts a pytree whole on every device, see `put`."""
  return put(tree, replicated(mesh))


def whole(tree):
  """A pytree of arrays on the devices as numpy arrays, whole in every process; all processes have to call it. Arrays of
  the host, which are whole already, stay as they are."""
  far = lambda leaf: isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
  gather = lambda leaf: multihost_utils.process_allgather(leaf, tiled=True) if far(leaf) else leaf
  return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(gather, tree)))


def cast(frozen: dict, params: dict, dtype) -> dict:
  """Frozen parameters in the type that a backbone computes in: the floats among its own `params`.

  Scalars stay as they are, and so does what a method has made of parameters under other names (`Method.prepare`).
  """
  def one(leaf):
    floats = jnp.ndim(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    if isinstance(leaf, np.ndarray):  # on the host, as no device may hold all of them
      return leaf.astype(dtype, copy=False) if floats else leaf
    return jnp.asarray(leaf, dtype) if floats else jnp.asarray(leaf)
  return {name: jax.tree.map(one, leaf) if name in params else leaf for name, leaf in frozen.items()}


def on_host():
  """A context whose computations run on the host's CPU, where JAX has that beside its devices: for what is not to be
  whole on one of them."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:
    return contextlib.nullcontext()


def own_rows(mesh: Mesh, rows: int) -> tuple[int, int] | None:
  """(first, end) of the rows that this process puts on its devices, of a batch of `rows` that is filled up until the
  groups divide it: `end` may lie beyond `rows`. None where one process has them all."""
  sharding = along_batch(mesh)
  if sharding.is_fully_addressable:
    return None
  filled = -(-rows // groups(mesh)) * groups(mesh)
  parts = [index[0].indices(filled) for index in sharding.addressable_devices_indices_map((filled,)).values()]
  return min(start for start, *_ in parts), max(stop for _, stop, _ in parts)


def padding(rows: int, mesh: Mesh) -> str:
  """What to tell of batches of `rows` that the groups do not divide; "" of others."""
  count = groups(mesh)
  filled = -(-rows // count) * count
  return "" if filled == rows else (
      f"batches of {rows} are filled up to {filled} rows for {count} devices: {1 - rows / filled:.0%} of the work is "
      f"padding; a multiple of {count} wastes none")


def put_batch(batch: dict, mesh: Mesh) -> dict:
  """Puts a batch of arrays [B, …], nested or not, on the devices, B split over the groups; of several processes each
  gives its `own_rows`.

  A batch that the groups do not divide is filled up with copies of its last row of weight 0.
  """
  sharding = along_batch(mesh)
  if not sharding.is_fully_addressable:
    own = {str(index) for index in sharding.addressable_devices_indices_map((groups(mesh),)).values()}
    rows = lambda x: len(x) // len(own) * groups(mesh)  # one process may have more of the groups than another
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (rows(x), *x.shape[1:])), batch)
  missing = -len(batch["weight"]) % groups(mesh)
  if missing:
    fill = lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    batch = jax.tree.map(fill, batch)
    batch["weight"][-missing:] = 0
  return jax.device_put(batch, sharding)
