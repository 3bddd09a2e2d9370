"""The training step: one pure function of (run, frozen, batch), compiled once per shape."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transferlab import losses
from transferlab.backbones import Backbone
from transferlab.backbones.spec import Preprocessing
from transferlab.method import Context, Method, forward


class Run(NamedTuple):
  """Everything that changes while training.

  Fields:
    step: int32, number of finished steps.
    trainable: what is optimised.
    state: arrays the method needs and does not train.
    opt_state: the optimiser's.
    nan_step: int32, the first step whose loss, gradient or result was not finite, -1 while there is none. It is read
      only now and then, so that the host never waits for the device within a step.
  """
  step: Any
  trainable: Any
  state: Any
  opt_state: Any
  nan_step: Any


def start(trainable, state, optimiser: optax.GradientTransformation) -> Run:
  """The run before its first step."""
  return Run(jnp.zeros((), jnp.int32), trainable, state, optimiser.init(trainable), jnp.full((), -1, jnp.int32))


def to_inputs(images, preprocessing: Preprocessing):
  """Pixels [B, S, S, 3] on the 0 … 255 scale, uint8 or float, as the normalised float32 input of a backbone."""
  mean, std = jnp.asarray(preprocessing.mean, jnp.float32), jnp.asarray(preprocessing.std, jnp.float32)
  return (images.astype(jnp.float32) / 255 - mean) / std


def inputs_of(batch: dict, preprocessing: Preprocessing):
  """What enters `method.forward`: a batch's cached activations, or its images, normalised."""
  return batch["activations"] if "activations" in batch else to_inputs(batch["image"], preprocessing)


def make_step(method: Method, backbone: Backbone, optimiser: optax.GradientTransformation, preprocessing: Preprocessing,
              num_classes: int, *, seed: int = 0, drop_path: float = 0.0, remat: bool = False,
              micro_batches: int = 1, class_weights=None, vary: dict | None = None, domains: int | None = None,
              rows: int | None = None):
  """The step (run, frozen, batch) -> (run, {"loss", "grad_norm"}), to be jitted with `compile_step`.

  Args:
    seed: with the step's number it gives all randomness, so a resumed run draws what an uninterrupted one draws.
    drop_path: stochastic depth of the last block.
    remat: recompute adapted blocks in the backward pass.
    micro_batches: the batch is cut into so many parts whose gradients add up to the whole batch's.
    class_weights: [C] or None; examples count by the weight of their class, mixed ones by the weights of theirs.
    vary: {option: number}, what this head does not share with those beside it, see `Method.varies`.
    domains: number of domains that are trained on, if it is known.
    rows: of a batch before devices fill it up, if it is known.

  The batch holds image [B, S, S, 3] on 0 … 255, or cached activations {slot: [B, …]}, for which no backbone is needed;
  label [B], weight [B], and soft_label [B, C] if labels are mixed.

  Raises:
    ValueError: micro-batches of a method that needs its batches whole.
  """
  if micro_batches > 1 and method.whole_batch:
    raise ValueError(f"{method.name} needs its batches whole, as an example's result depends on the others, and each "
                     f"is cut into {micro_batches} micro-batches; set micro_batch=0, and lower batch_size if memory is "
                     "short")

  def loss(trainable, state, frozen, batch, rng):
    context = Context({**batch, "target": losses.targets(batch, num_classes)}, state, frozen, {}, rng, True,
                      vary or {}, domains, rows and rows / micro_batches)
    outputs = forward(method, backbone, trainable, inputs_of(batch, preprocessing), context,
                      drop_path_rate=drop_path, remat=remat)
    return method.loss(trainable, outputs, context)

  def gradient(trainable, state, frozen, batch, rng):
    if micro_batches == 1:
      return jax.value_and_grad(loss)(trainable, state, frozen, batch, rng)
    # Rows are dealt out in turn, so that each device's rows of the batch stay on it.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
    total = jnp.sum(batch["weight"])
    def add(sums, part):
      index, part = part
      value = jax.value_and_grad(loss)(trainable, state, frozen, part, jax.random.fold_in(rng, index))
      share = jnp.sum(part["weight"]) / jnp.maximum(total, 1e-12)  # a part of padding only counts nothing
      return jax.tree.map(lambda s, v: s + share * v, sums, value), None
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (0.0 * total, trainable))
    return jax.lax.scan(add, zero, (jnp.arange(micro_batches), parts))[0]

  def step(run: Run, frozen, batch):
    if class_weights is not None:
      each = jnp.sum(losses.targets(batch, num_classes) * jnp.asarray(class_weights, jnp.float32), axis=-1)  # [B]
      batch = {**batch, "weight": batch["weight"] * each}
    rng = jax.random.fold_in(jax.random.key(seed), run.step)
    value, grads = gradient(run.trainable, run.state, frozen, batch, rng)
    updates, opt_state = optimiser.update(grads, run.opt_state, run.trainable)
    trainable = optax.apply_updates(run.trainable, updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(trainable))
    nan_step = jnp.where(~finite & (run.nan_step < 0), run.step + 1, run.nan_step)
    return Run(run.step + 1, trainable, run.state, opt_state, nan_step), {"loss": value, "grad_norm": norm}

  return step


def keeping_barriers(backbone: Backbone) -> dict:
  """Arguments of `jax.jit` for a program without gradients: on CPU XLA drops barriers early, and would gather all of a
  divided backbone at once (102 MiB of temporaries for 11, of a ViT of 97 MiB on 4 devices)."""
  needed = backbone.split and jax.default_backend() == "cpu"
  return {"compiler_options": {"xla_disable_hlo_passes": "cse_barrier_expander"}} if needed else {}


def compile_step(step, run, *others, remat: bool = False):
  """Compiles a step of (run, *others) ahead of time, for arrays or for shapes; the run alone is donated, and leaves as
  it came, on the same devices."""
  options, places = {}, jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), run)
  on = {device.platform for place in jax.tree.leaves(places) for device in place.device_set} or {jax.default_backend()}
  if "cpu" in on:
    # On CPU XLA drops the barriers around what is to be computed again before it joins equal expressions, and so keeps
    # much of it after all. Without that pass, ViT-B/16 at batch 32, MiB: DTL 1764 for 2302, with remat 965 for 1393;
    # LoRA with remat 968 for 1989; full 5344 for 5789.
    options["xla_disable_hlo_passes"] = "cse_barrier_expander"
    if not all(place.is_fully_replicated for place in jax.tree.leaves(places)):
      # It joins the sums of all gradients over the devices, so that those of a divided backbone would all be whole at
      # the same time. (A compiler may scatter such sums instead, at half of what is moved; that for the CPU does not.)
      options["xla_disable_hlo_passes"] += ",cpu-all-reduce-combiner"
    if remat:  # the default scheduler ignores memory, and rematerialisation then saves none
      options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
  lowered = jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(run, *others)
  return lowered.compile(compiler_options=options or None)
