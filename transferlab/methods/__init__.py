"""Every method under its name. A method is a function (spec, **options) -> Method; its defaults are its paper's."""
import contextlib
import inspect
import typing

from transferlab.config import typed
from transferlab.method import Method
from transferlab.methods.adapter import adapter
from transferlab.methods.adaptformer import adaptformer
from transferlab.methods.bitfit import bitfit
from transferlab.methods.clip_adapter import clip_adapter
from transferlab.methods.clip_linear import clip_linear
from transferlab.methods.coop import coop
from transferlab.methods.dpl import dpl
from transferlab.methods.dtl import dtl, dtl_plus, dtl_plus_star
from transferlab.methods.fact import fact_tk, fact_tt
from transferlab.methods.full import full
from transferlab.methods.head2toe import all_features, head2toe
from transferlab.methods.head2toe_ft import head2toe_ft
from transferlab.methods.head2toe_given import head2toe_given
from transferlab.methods.head2toe_layers import head2toe_layers
from transferlab.methods.inca import inca, open_inca
from transferlab.methods.lfa import lfa
from transferlab.methods.linear import linear
from transferlab.methods.lora import lora
from transferlab.methods.lst import lst
from transferlab.methods.maple import maple
from transferlab.methods.miro import miro
from transferlab.methods.mlp3 import mlp3
from transferlab.methods.noah import noah
from transferlab.methods.noah_search import noah_search
from transferlab.methods.qlora import qlora
from transferlab.methods.scratch import scratch
from transferlab.methods.ssf import ssf
from transferlab.methods.vpt import vpt_deep, vpt_shallow
from transferlab.methods.zero_shot import zero_shot
from transferlab.tree import nearest

METHODS = {"linear": linear, "mlp3": mlp3, "full": full, "bitfit": bitfit, "lora": lora, "dtl": dtl, "inca": inca,
           "dtl_plus": dtl_plus, "dtl_plus_star": dtl_plus_star,
           "open_inca": open_inca, "all_features": all_features, "head2toe": head2toe, "head2toe_ft": head2toe_ft,
           "head2toe_layers": head2toe_layers, "head2toe_given": head2toe_given, "lst": lst,
           "adapter": adapter, "adaptformer": adaptformer, "fact_tt": fact_tt, "fact_tk": fact_tk,
           "noah": noah, "noah_search": noah_search, "scratch": scratch, "ssf": ssf,
           "vpt_shallow": vpt_shallow, "vpt_deep": vpt_deep,
           "zero_shot": zero_shot, "clip_linear": clip_linear, "lfa": lfa, "clip_adapter": clip_adapter,
           "coop": coop, "maple": maple, "dpl": dpl, "qlora": qlora, "miro": miro}

# What a backbone must have, in words and as a test of its spec. Most of these methods work inside attention or beside
# an MLP; batch statistics never train, so a network from random weights would have none.
_BLOCKS = ("transformer blocks", lambda spec: bool(spec.heads))
_EQUAL_PIECES = ("transformer blocks whose MLP is a multiple of their width",
                 lambda spec: bool(spec.heads) and not spec.block(0).mlp_width % spec.block(0).width)
_ONE_ATTENTION = ("attention over all tokens at once", lambda spec: spec.family == "vit")
# Of a CLIP it wants the projections, too.
_CLIP_OR_BLOCKS = ("a plain ViT, alone or in a CLIP", lambda spec: spec.family in ("vit", "clip"))
_CLIP = ("an image and a text tower, as a CLIP has", lambda spec: spec.family == "clip")
NEEDS = {"zero_shot": _CLIP, "clip_linear": _CLIP, "lfa": _CLIP, "clip_adapter": _CLIP, "coop": _CLIP, "maple": _CLIP,
         "dpl": _CLIP, "qlora": _CLIP_OR_BLOCKS, "miro": _CLIP_OR_BLOCKS,
         "adapter": _BLOCKS, "adaptformer": _BLOCKS, "fact_tt": _EQUAL_PIECES, "fact_tk": _EQUAL_PIECES,
         "ssf": _BLOCKS, "vpt_shallow": _BLOCKS, "vpt_deep": _BLOCKS,
         "noah": _ONE_ATTENTION, "noah_search": _ONE_ATTENTION, "lora": _BLOCKS, "dtl": _BLOCKS,
         "dtl_plus": _BLOCKS, "dtl_plus_star": _BLOCKS,
         "lst": ("transformer blocks of one width", lambda spec: spec.family == "vit"),
         "scratch": ("norms without batch statistics", lambda spec: not spec.statistics)}


def options_of(name: str) -> dict:
  """A method's options with their defaults."""
  parameters = inspect.signature(METHODS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def adapted(name: str, spec):
  """The spec of what a method adapts: all of a backbone, or a CLIP's image tower if the method needs no text."""
  alone = spec.family == "clip" and name in METHODS and NEEDS.get(name) not in (_CLIP, _CLIP_OR_BLOCKS)
  return spec.image if alone else spec


def fits(name: str, spec) -> bool:
  """Whether a method works on a backbone of this kind."""
  return name not in NEEDS or NEEDS[name][1](adapted(name, spec))


def by_default(spec) -> dict[str, Method]:
  """{name: the method with its default options} of all that work so on a backbone; some are too large for a small one.
  """
  found = {}
  for name in METHODS:
    with contextlib.suppress(ValueError):
      found[name] = build(name, spec)
  return found


def build(name: str, spec, **options) -> Method:
  """The method `name` for a backbone, of a CLIP for the part that it adapts (`adapted`); unknown names and options are
  errors that name the nearest valid ones."""
  if name not in METHODS:
    raise ValueError(f"method {name!r} is unknown; nearest: {', '.join(nearest(name, METHODS))}; "
                     f"all: {', '.join(sorted(METHODS))}")
  if not fits(name, spec):
    raise ValueError(f"{name} needs {NEEDS[name][0]}; {spec.name} has none. Methods for it: "
                     f"{', '.join(method for method in METHODS if fits(method, spec))}")
  known = options_of(name)
  for option in options:
    if option not in known:
      hint = f"nearest: {', '.join(nearest(option, known))}; all: {', '.join(known)}" if known else "it has none"
      raise ValueError(f"method {name!r} has no option {option!r}; {hint}")
  kinds = typing.get_type_hints(METHODS[name])
  options = {key: typed(f"option {key!r} of method {name!r}", value, kinds[key], known[key]) if key in kinds else value
             for key, value in options.items()}
  if isinstance(rate := options.get("dropout"), float) and not 0 <= rate < 1:
    raise ValueError(f"option 'dropout' of method {name!r} is {rate}; expected a number from 0 to below 1")
  return METHODS[name](adapted(name, spec), **options)
