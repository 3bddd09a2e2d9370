"""What `transferlab info` tells: sizes and costs of any backbone and method from shapes alone, and sites."""
import ast
import dataclasses
import re

import jax
import jax.numpy as jnp

from transferlab import backbones, cost, devices, features, heads, methods
from transferlab.backbones import zoo
from transferlab.backbones.weights import load_weights, with_logits
from transferlab.method import Context, Method, classes, forward, sizes
from transferlab.tree import nearest


def find(backbone: str, image_size: int | None = None, logits: bool = False):
  """(spec, preprocessing or None) of an architecture, a zoo entry (neither needs weights) or a weights file.

  With `logits` a ResNet's own classifier is part of it, see `with_logits`; one of ImageNet's 1000 classes where no file
  says how many there are.
  """
  if backbone in backbones.ARCHITECTURES:
    spec, preprocessing = backbones.architecture(backbone), None
  elif backbone in zoo.ZOO and zoo.ZOO[backbone].architecture in backbones.ARCHITECTURES:
    spec, preprocessing = backbones.architecture(zoo.ZOO[backbone].architecture), zoo.ZOO[backbone].preprocessing
  else:
    try:
      weights = load_weights(backbone, image_size=image_size)
    except ValueError as error:
      known = [*backbones.ARCHITECTURES, *zoo.ZOO]
      raise ValueError(f"{error}; nearest names: {', '.join(nearest(backbone, known))}") from None
    weights = with_logits(weights) if logits else weights
    return weights.spec, weights.preprocessing
  if logits and spec.family != "resnet":
    raise ValueError(f"{spec.name} has no site for logits; leave --logits out, it is for ResNets")
  spec = dataclasses.replace(spec, classes=1000) if logits else spec
  return (spec.at_resolution(image_size) if image_size else spec), preprocessing


def site_shapes(spec) -> dict[str, tuple]:
  """{site: shape for one image}."""
  return {name: leaf.shape for name, leaf in backbones.sites(spec).items()}


def options(text: str) -> dict:
  """"rank=4,form=fused" as a dict; values are Python literals or plain words."""
  found = {}
  for part in filter(None, re.split(r",(?=\s*\w+=)", text)):
    name, equals, value = part.partition("=")
    if not equals:
      raise ValueError(f"option {part!r} is not understood; expected name=value, e.g. rank=4")
    try:
      found[name.strip()] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[name.strip()] = value
  return found


def costs(spec, method: str | None, method_options: dict, num_classes: int, *, batch_size: int = 32,
          remat: bool = False, cached: bool = False, dtype=jnp.float32) -> list[dict]:
  """A row per method, see `cost.of`; all methods that fit, with their defaults, if `method` is None. A row with
  "first_stage" is of the first of several stages; the adapter that is saved is of the last."""
  built = _built(spec, method, method_options)
  if cached and method:
    features.check(built[method], spec)
  elif cached:
    built = {name: each for name, each in built.items() if features.cacheable(each, spec)}
  row = lambda name, each: cost.of(methods.adapted(name, spec), each, num_classes, batch_size=batch_size, remat=remat,
                                   cached=cached, dtype=dtype)
  stage = lambda each: {"first_stage": True} if each.then else {}
  return [{"method": name, "backbone": spec.name, **row(name, each), **stage(each)} for name, each in built.items()]


def _built(spec, method: str | None, method_options: dict) -> dict[str, Method]:
  """The method that is asked for by its name, or all that fit."""
  if method is None and method_options:
    raise ValueError("options belong to one method; give --method")
  return {method: methods.build(method, spec, **method_options)} if method else methods.by_default(spec)


def on_devices(spec, method: str | None, method_options: dict, num_classes: int, count: int, shard: int = 1, *,
               batch_size: int = 32, **how) -> list[dict]:
  """A row per method of what a step costs each of `count` devices, of which `shard` at a time share one copy of the
  backbone (0 for all of them), see `cost.on_devices`. They have to be there, see `devices.pretend`.

  Args:
    batch_size: images of a step on all devices, filled up to a multiple of their number.
    how: remat, dtype, as of `cost.of`.
  """
  mesh = devices.sharing(count, shard)
  rows = -(-batch_size // devices.groups(mesh)) * devices.groups(mesh)
  def row(name, each):
    adapted = methods.adapted(name, spec)
    found = cost.on_devices(adapted, each, num_classes, mesh=mesh, batch_size=rows, **how)
    return {"method": name, "backbone": adapted.name, **sizes(each, backbones.abstract_params(adapted),
                                                              num_classes)._asdict(), **found._asdict()}
  known = {"devices": mesh.size, "shard": mesh.shape["shard"], "batch_size": rows}
  return [{**row(name, each), **known, **({"first_stage": True} if each.then else {})}
          for name, each in _built(spec, method, method_options).items()]


def compared(spec, method: str, method_options: dict, num_classes: int, against: str, *, count: int = 0,
             **how) -> list[dict]:
  """What a method costs beside another one, on the same batch and in the same precision.

  Args:
    against: name of the other method, with its defaults; "full" is full fine-tuning.
    count: K, of parallel heads: a grid's points that train as one program; 0 for none.
    how: batch_size, remat, dtype, as of `cost.of`.

  Returns:
    rows with "method", trainable, trainable_without_classifier, frozen, train_flops, train_peak_bytes, and of_backbone
    (parameters without the classifier), of_flops and of_peak (those of `against`), shares: the last of the method's
    members alone, if it trains several side by side; the method; K heads of it; `against`.
  """
  if against == method:
    raise ValueError(f"{method} is compared with itself; expected another method, such as full")
  whole, other = methods.build(method, spec, **method_options), methods.build(against, spec)
  names = members(spec, whole, num_classes)
  each = {method: whole, against: other}
  if len(names) > 1:
    one = methods.build(method, spec, **{**method_options, **whole.member_options(names[-1])})
    each = {f"{method}, {names[-1]} alone": one, f"{method}, {len(names)} together": whole, against: other}
  def row(name, made, step, count=1):
    found = sizes(made, backbones.abstract_params(spec), num_classes)
    return {"method": name, "trainable": count * found.trainable,
            "trainable_without_classifier": count * found.trainable_without_classifier, "frozen": found.frozen,
            **step._asdict()}
  rows = [row(name, made, cost.of_training(spec, made, num_classes, **how)) for name, made in each.items()]
  if count:
    step = heads.step_cost(spec, whole, num_classes, count, **how)
    rows.insert(-1, row(f"{rows[-2]['method']}, {count} heads", whole, step, count))
  last = rows[-1]
  return [{**row, "of_backbone": row["trainable_without_classifier"] / row["frozen"],
           "of_flops": row["train_flops"] / last["train_flops"],
           "of_peak": row["train_peak_bytes"] / last["train_peak_bytes"]} for row in rows]


def members(spec, method: Method, num_classes: int) -> list[str]:
  """Names of the members of a method that trains several side by side, in the order in which they are read."""
  if not method.members:
    return []
  def run(rng, params, activations):
    trainable, state = method.init(rng, params, classes(method, num_classes))
    return method.members(forward(method, None, trainable, activations, Context(state=state)))
  found = jax.eval_shape(run, jax.random.key(0), backbones.abstract_params(spec),
                         features.activation_shapes(spec, method.reads))
  return [slot for slot in method.reads if slot in found] or list(found)
