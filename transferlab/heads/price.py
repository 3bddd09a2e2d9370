"""What parallel heads cost, from shapes alone."""
import jax
import jax.numpy as jnp
import numpy as np

from transferlab import backbones, cost, devices
from transferlab.backbones.spec import Preprocessing
from transferlab.heads.program import Head, make_heads_step, run_shapes, settings
from transferlab.method import Method
from transferlab.optim import Optim
from transferlab.step import compile_step


def step_cost(spec, method: Method, num_classes: int, count: int, *, batch_size: int = 32, dtype=jnp.float32,
              remat: bool = False) -> cost.StepCost:
  """Of one training step of `count` heads on images, on one device; of the first stage if a method has several."""
  optim, sharding = Optim(), devices.along_heads(devices.make_mesh(1))
  whole = backbones.abstract_params(spec)
  run = run_shapes(method, whole, num_classes, optim, count)
  frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), whole) if method.frozen else {}
  heads = settings([Head(1e-3, 0.0)] * count, lambda lr: np.full(1, lr, np.float32))
  step = make_heads_step(method, backbones.build(spec, dtype), optim, Preprocessing(spec.image_size), num_classes,
                         sharding, remat=remat)
  return cost.of_step(compile_step(step, run, heads, frozen, cost.image_batch(spec, batch_size), remat=remat))
