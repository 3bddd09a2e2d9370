"""Bytes that a step moves between a device and its memory, counted in the step as it is written.

XLA's own count, "bytes accessed", is of the operations that a compiler left: the CPU's are in float32 and hardly
joined, a TPU's pass partly between fast memories, and both come to several times what has to be moved. Counted here is
what large arrays cannot avoid: matrix products and convolutions read what they multiply and write what comes out, and
all that lies between them is taken to be joined to one of them. What a step changes is read and written once.
"""
import math

import jax
from jax.extend import core

PRODUCTS = ("dot_general", "conv_general_dilated")


def traffic(step, run, *others) -> float:
  """Bytes that a step (run, *others) moves, for arrays or shapes, on one device; of their own widths."""
  changed = sum(math.prod(leaf.shape) * _width(leaf) for leaf in jax.tree.leaves(run))
  return 2 * changed + products(jax.make_jaxpr(step)(run, *others).jaxpr)


def products(jaxpr) -> float:
  """Bytes that the matrix products and convolutions of a traced function read and write; a loop's by its length, and of
  the branches of a condition the most."""
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name in PRODUCTS:
      total += sum(math.prod(v.aval.shape) * _width(v.aval) for v in (*equation.invars, *equation.outvars))
      continue
    inner = [products(sub) for sub in _inside(equation)]
    joined = max(inner, default=0.0) if equation.primitive.name == "cond" else sum(inner)
    total += joined * (equation.params["length"] if equation.primitive.name == "scan" else 1)
  return total


def _inside(equation) -> list:
  """Functions that an equation calls."""
  values = [value for group in equation.params.values() for value in (group if isinstance(group, tuple) else (group,))]
  return [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values
          if isinstance(value, (core.ClosedJaxpr, core.Jaxpr))]


def _width(leaf) -> int:
  return 0 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize
