"""One method on several sites in one program: which site a head reads is a number, so that it may vary along K."""
import jax.numpy as jnp

from transferlab.method import Context, Method, Outputs, forward


def over_sites(methods) -> Method:
  """The method whose option "member", from `ctx.vary`, says which of `methods` it is, by their place.

  Args:
    methods: Methods of one name that differ in the sites they read, [M]: probes or adapters on blocks of equal shapes.
      They only read, and what trains has equal shapes in all; a head starts as the first would, by its seed.

  All their sites are read, once for all heads. The trainable is that of the first, whose names it carries. Stages
  follow where the methods have them. Classifiers side by side, such as Head2Toe's fractions, stay members.

  Raises:
    ValueError: methods that are not alike, or say nothing of what they read; when run, activations of unlike shapes.
  """
  methods = tuple(methods)
  _check(methods)
  first = methods[0]

  def pick(carry, ctx: Context):
    """{slot of the first: [B, …]} of the member asked for."""
    member = jnp.asarray(ctx.vary.get("member", 0), jnp.int32)
    of_slot = zip(first.reads, zip(*[[carry[f"{i}/{slot}"] for slot in m.reads] for i, m in enumerate(methods)]))
    return {slot: _stacked(slot, values)[member] for slot, values in of_slot}

  def finish(trainable, carry, ctx) -> Outputs:
    return forward(first, None, trainable, pick(carry, ctx), ctx)

  def members(outputs) -> dict:
    found = first.members(outputs.carry)
    return found if len(found) > 1 else {}  # one site's classifier is the read-out, and the name would be the first's

  return Method(
      name=first.name, options={"over_sites": [method.options for method in methods]}, init=first.init, finish=finish,
      readout=lambda trainable, features, carry, ctx: carry.logits,
      loss=lambda trainable, outputs, ctx: first.loss(trainable, outputs.carry, ctx),
      writes_from=first.writes_from,
      reads={f"{i}/{slot}": read for i, method in enumerate(methods) for slot, read in method.reads.items()},
      then=first.then and (lambda trainable, state: over_sites([m.then(trainable, state) for m in methods])),
      varies=(*first.varies, "member"), members=first.members and members)


def _check(methods: tuple) -> None:
  if not methods:
    raise ValueError("over_sites got no methods; expected one per site")
  of = lambda method: (method.name, len(method.reads), method.writes_from, bool(method.then))
  for method in methods:
    if of(method) != of(methods[0]):
      raise ValueError(f"over_sites got {method.name} {method.options} beside {methods[0].name} {methods[0].options}; "
                       "expected one method on different sites")
    if not method.reads:
      raise ValueError(f"{method.name} says nothing of what it reads; over_sites needs methods that only read")


def _stacked(slot: str, values):
  """[M, B, …]."""
  shapes = {value.shape[1:] for value in values}
  if len(shapes) > 1:
    raise ValueError(f"{slot} has shapes {', '.join(map(str, sorted(shapes)))} on different sites; expected one shape, "
                     "sweep over sites of equal shapes apart")
  return jnp.stack(values)
