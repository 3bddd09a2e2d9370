"""The conformance table: what every method promises, as properties that run on any method and any backbone.

    from transferlab.testing import Expected, check_method
    check_method("lora", expected=Expected(options={"rank": 4}, identity=True, mergeable=True))
    check_method(my_method)                    # a function (spec, **options) -> Method of your own

`PROPERTIES` maps names to functions of a `Case`, one method on one backbone with random weights, so that a test suite
can run each as a test of its own. A property that does not hold raises `Broken`, an AssertionError of one line: what,
found, expected. One that does not apply here raises `Skip`. Training uses SGD, because Adam hides errors of scale.
"""
import functools
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

from transferlab import backbones, cost, devices, losses, methods, tree
from transferlab.backbones.spec import Preprocessing
from transferlab.backbones.weights import Weights, weights_hash
from transferlab.checkpoint import load_adapter, save_adapter
from transferlab.evaluate import make_predict
from transferlab.method import Context, Method, classes, collect, forward, needed, sizes, visitor
from transferlab.methods import classifier
from transferlab.optim import Optim, make_optimiser
from transferlab.resume import Checkpoints
from transferlab.step import compile_step, make_step, start, to_inputs

ROWS = 8     # of the batch; the last is padding, so that equal parts of it have unequal weight
EXACT = 1e-6  # same mathematics in another order, float32, values around 1


class Broken(AssertionError):
  """A property does not hold."""


class Skip(Exception):
  """A property does not apply to this method or on this machine."""


class Expected(NamedTuple):
  """What a method promises: its row of the table.

  Fields:
    options: passed to the method.
    still: options that switch its randomness off; only where it has some (dropout) and no option can it be left out.
    identity: True if training starts from the frozen model's features, on a CLIP from its zero-shot logits; a visitor
      if from features of the plain backbone with that visitor (DTL pools in its own way); False without such a promise.
    size: spec -> number of trainable parameters without the classifier; None leaves it unchecked.
    mergeable: whether `merge` is offered; None takes either.
    cost: most FLOPs of a training step as a multiple of the plain backbone's forward pass; None leaves it unchecked.
  """
  options: dict = {}
  still: dict = {}
  identity: Any = False
  size: Callable | None = None
  mergeable: bool | None = None
  cost: float | None = None


class Case:
  """One method on one backbone, with random weights and a batch; what is compiled is shared by the properties.

  Of a method in stages this is the last, the one that is saved, made from the others' initial parameters.

  On a CLIP, a method that needs no text runs on the image tower; for others class names become texts of made-up words.

  Fields:
    frozen: parameters of the backbone as a training step gets them, {} if the method keeps no second copy.
    initial, trainable: as initialised, and moved by noise so that every path counts.
  """

  def __init__(self, method: str | Callable, backbone="vit_tiny_test", expected: Expected = Expected(),
               num_classes: int = 5):
    self.make = _lookup(method)
    whole = backbones.architecture(backbone) if isinstance(backbone, str) else backbone
    self.spec = methods.adapted(method, whole) if isinstance(method, str) else whole
    self.expected, self.num_classes = expected, num_classes
    self.params = _random_params(self.spec)
    self.method = self.last_stage(expected.options)
    self.backbone = backbones.build(self.spec)
    self.preprocessing = Preprocessing(self.spec.image_size)
    initial, self.state = self.init(self.method)
    self.frozen = self.prepared(self.method, self.state)
    self.initial = jax.tree.map(jnp.array, initial)
    self.trainable = _moved(self.initial, 2)
    self.predict = make_predict(self.method, self.backbone, self.preprocessing)
    sgd = Optim("sgd", weight_decay=0.0, decay=())
    self.optimiser = make_optimiser(sgd, lambda step: 0.1, self.initial)
    S, rng = self.spec.image_size, np.random.default_rng(0)
    self.batch = {"image": rng.integers(0, 256, (ROWS, S, S, 3), np.uint8),
                  "label": rng.integers(0, num_classes, ROWS).astype(np.int32),
                  "weight": np.float32([1] * (ROWS - 1) + [0]), "domain": np.arange(ROWS, dtype=np.int32) // 2 % 2}
    self.traces = 0
    self._compiled = {}

  def last_stage(self, options: dict) -> Method:
    method = self.make(self.spec, **options)
    while method.then:
      method = method.then(*self.init(method))
    return method

  def init(self, method: Method):
    """(trainable, state) of a stage."""
    tokenize = functools.partial(made_up_ids, self.spec) if method.prompts else None
    return method.init(jax.random.key(1), self.params, classes(method, self.num_classes, tokenize))

  def prepared(self, method: Method, state) -> dict:
    return jax.tree.map(jnp.asarray, method.prepare(self.params, state)) if method.frozen else {}

  def logits(self, trainable):
    """[B, C] of the batch."""
    return self.predict(trainable, self.state, self.frozen, self.batch["image"])

  def run(self, mesh, trainable=None):
    """A run before its first step; its arrays are its own, so that they can be donated."""
    copy = jax.tree.map(jnp.array, (self.trainable if trainable is None else trainable, self.state))
    return jax.device_put(start(*copy, self.optimiser), devices.replicated(mesh))

  def step(self, method: Method, backbone=None, **how):
    """The training step, counting how often it is traced."""
    inner = make_step(method, backbone or self.backbone, self.optimiser, self.preprocessing, self.num_classes, **how)
    def step(run, frozen, batch):
      self.traces += 1
      return inner(run, frozen, batch)
    return step

  def compiled(self, device_count: int = 1, method: Method | None = None, **how):
    """(compiled step, its frozen parameters, its batch, its mesh); compiled once for each way."""
    key = (device_count, id(method or self.method), *how.items())
    if key not in self._compiled:
      mesh = devices.make_mesh(device_count)
      frozen, batch = devices.replicate(self.frozen, mesh), devices.put_batch(self.batch, mesh)
      step = compile_step(self.step(method or self.method, **how), self.run(mesh), frozen, batch,
                          remat=how.get("remat", False))
      self._compiled[key] = step, frozen, batch, mesh
    return self._compiled[key]

  def train(self, steps: int = 2, **how):
    """Trains on the batch. Returns {"loss", "gradient"} of the first step and "trainable" after the last one."""
    step, frozen, batch, mesh = self.compiled(**how)
    run, metrics = step(self.run(mesh), frozen, batch)
    momentum = optax.tree_utils.tree_get(run.opt_state, "trace")
    gradient = jax.tree.map(np.array, momentum)  # which it still is after the first step
    loss = np.array(metrics["loss"])
    for _ in range(steps - 1):
      run, _ = step(run, frozen, batch)
    return {"loss": loss, "gradient": gradient, "trainable": jax.tree.map(np.array, run.trainable)}

  def zero_shot(self):
    """Logits [B, C] of the plain CLIP, with the method's templates."""
    templates = {name: value for name, value in self.method.options.items() if name == "templates"}
    method = methods.build("zero_shot", self.spec, **templates)
    _, state = self.init(method)
    return make_predict(method, self.backbone, self.preprocessing)({}, state, self.prepared(method, state),
                                                                  self.batch["image"])

  @functools.cached_property
  def still(self) -> Method:
    """The method without randomness, on the same trainable."""
    if not self.expected.still:
      return self.method
    return self.last_stage({**self.expected.options, **self.expected.still})


def made_up_ids(spec, texts) -> np.ndarray:
  """Tokens [n, T] of texts for a CLIP without a tokenizer: a number for each word, between start and end."""
  start_, end = spec.vocabulary - 2, spec.vocabulary - 1
  ids = np.zeros((len(texts), spec.context), np.int32)
  for row, text in zip(ids, texts):
    words = [1 + zlib.crc32(word.encode()) % (start_ - 1) for word in text.split()]
    row[:len(words) + 2] = [start_, *words, end]
  return ids


def _lookup(method) -> Callable:
  if not isinstance(method, str):
    return method
  if method not in methods.METHODS:
    raise ValueError(f"method {method!r} is unknown; nearest: {', '.join(tree.nearest(method, methods.METHODS))}")
  return functools.partial(methods.build, method)


@functools.lru_cache(maxsize=8)
def _random_params(spec):
  """Random parameters of which none is 0 or 1 everywhere, as biases and norms are at initialisation; drawn on the host,
  because compiling the initialisers of all leaves takes longer than everything that is done with them."""
  rng = np.random.default_rng(0)
  def draw(name, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if name.endswith("scale"):
      return jnp.asarray(1 + 0.1 * noise)
    if name.endswith("var"):
      return jnp.asarray(1 + abs(noise))
    return jnp.asarray(noise * (np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1))
  shapes = tree.flatten(backbones.abstract_params(spec))
  return tree.unflatten({name: draw(name, leaf) for name, leaf in shapes.items()})


def _moved(params, seed: int, by: float = 0.1):
  """The parameters plus noise, drawn on the host."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(x + by * rng.standard_normal(x.shape).astype(np.float32)), params)


@functools.lru_cache(maxsize=32)
def _plain(spec, visit=backbones.ignore):
  """The compiled (params, images on 0 … 255) -> features [B, D] of the plain backbone with a visitor."""
  apply, S = backbones.build(spec).apply, spec.image_size
  features = jax.jit(lambda params, images: apply(params, to_inputs(images, Preprocessing(S)), visit, None)[0])
  return features.lower(backbones.abstract_params(spec), jax.ShapeDtypeStruct((ROWS, S, S, 3), jnp.uint8)).compile()


def _equal(what: str, found, wanted, tolerance: float = EXACT) -> None:
  """Two trees agree to `tolerance`, of the largest value if above 1, and to 1e-4 of a leaf's largest if less."""
  found, wanted = (tree.flatten(x if isinstance(x, dict) else {"": x}) for x in (found, wanted))
  if list(found) != list(wanted):
    raise Broken(f"{what}: different leaves, {tree.difference(found, wanted)}")
  for name, a in found.items():
    a, b = np.asarray(a, np.float64), np.asarray(wanted[name], np.float64)
    if a.shape != b.shape:
      raise Broken(f"{what}{name and ' at '}{name}: found shape {a.shape}, expected {b.shape}")
    largest = np.abs(b).max(initial=0.0)
    allowed = min(tolerance * max(1, largest), 1e-4 * largest + 1e-8) if tolerance else 0.0
    off = np.abs(a - b).max(initial=0.0)
    if not off <= allowed:
      raise Broken(f"{what}{name and ' at '}{name}: found a difference of {off:.2e} among values up to {largest:.2e}; "
                   f"expected at most {allowed:.2e}")


# --- Properties -----------------------------------------------------------------------------------------------------

def logits(case: Case) -> None:
  """Logits are [B, C], float32 whatever the backbone computes in, and finite."""
  for dtype in (jnp.float32, jnp.bfloat16):
    run = make_predict(case.method, backbones.build(case.spec, dtype), case.preprocessing)
    found = jax.eval_shape(run, case.trainable, case.state, case.frozen, case.batch["image"])
    if (found.shape, found.dtype) != ((ROWS, case.num_classes), jnp.float32):
      raise Broken(f"logits on a {np.dtype(dtype).name} backbone: found {found.dtype} {list(found.shape)}; expected "
                   f"float32 {[ROWS, case.num_classes]}")
  for name, trainable in (("initial", case.initial), ("moved", case.trainable)):
    if not np.isfinite(case.logits(trainable)).all():
      raise Broken(f"logits at {name} parameters: found NaN or infinity; expected finite numbers")


def identity(case: Case) -> None:
  """Training starts from the frozen model, where the method promises that."""
  if not case.expected.identity:
    raise Skip("does not promise to start from the frozen model")
  if case.method.prompts:
    _equal("logits at initialisation, against zero-shot", case.logits(case.initial), case.zero_shot())
    return
  visit = backbones.ignore if case.expected.identity is True else case.expected.identity
  features = _plain(case.spec, visit)(case.params, case.batch["image"])
  _equal("logits at initialisation, against the frozen model's features with the same classifier",
         case.logits(case.initial), classifier.apply(case.initial["classifier"], features))


def size(case: Case) -> None:
  """The number of trainable parameters follows the formula; a classifier has D C + C where it reads features of D."""
  found = sizes(case.method, case.params, case.num_classes)
  head = found.trainable - found.trainable_without_classifier
  leaves = tree.flatten(case.initial.get("classifier", {}))
  D = [leaf.shape[0] for name, leaf in leaves.items() if name.split("/")[-1] == "kernel"]  # parallel heads have several
  if head != (sum(D) + len(D)) * case.num_classes:
    each = ", ".join(f"{width} x {case.num_classes} + {case.num_classes}" for width in D)
    raise Broken(f"classifier: found {head} parameters; expected {each}")
  if case.expected.size is None:
    raise Skip("no formula given")
  expected = case.expected.size(case.spec)
  if found.trainable_without_classifier != expected:
    raise Broken(f"trainable parameters without the classifier: found {found.trainable_without_classifier:,}; "
                 f"expected {expected:,}")


def gradient(case: Case) -> None:
  """The gradient is finite and reaches every trainable leaf, at parameters moved away from initialisation."""
  for name, leaf in tree.flatten(case.train()["gradient"]).items():
    if not np.isfinite(leaf).all():
      raise Broken(f"gradient of {name}: found NaN or infinity; expected finite numbers")
    if not leaf.any():
      raise Broken(f"gradient of {name}: found zero everywhere; expected every trainable leaf to be reached")


def frozen(case: Case) -> None:
  """Two training steps change everything that trains and leave the backbone as it was, bit for bit."""
  step, params, batch, mesh = case.compiled()
  before = tree.flatten(jax.tree.map(np.array, params))
  run = case.run(mesh)
  for _ in range(2):
    run, _ = step(run, params, batch)
  for name, leaf in tree.flatten(params).items():
    if leaf.is_deleted() or not np.array_equal(leaf, before[name]):
      what = "donated" if leaf.is_deleted() else "changed"
      raise Broken(f"frozen parameter {name}: found it {what} after two steps; expected it bit-equal")
  start_ = tree.flatten(case.trainable)
  for name, leaf in tree.flatten(run.trainable).items():
    if np.array_equal(leaf, start_[name]):
      raise Broken(f"trainable {name}: found it unchanged after two steps; expected training to move it")


def writes_from(case: Case) -> None:
  """Block `writes_from` is the first whose computation depends on what trains."""
  def seen(trainable, images):
    inner, first = visitor(case.method, trainable, Context(state=case.state, frozen=case.frozen))
    def visit(carry, site, y, x):  # looks before the method writes
      mine, sites = carry
      sites = sites if y is None else {**sites, site: y}
      mine, y = inner(mine, site, y, x)
      return (mine, sites), y
    weights = case.method.weights(trainable, case.frozen)
    _, (_, sites) = case.backbone.apply(weights, to_inputs(images, case.preprocessing), visit, (first, {}))
    return {**sites, **tree.flatten(weights)}
  run = jax.jit(seen)
  a, b = run(case.initial, case.batch["image"]), run(case.trainable, case.batch["image"])
  changed = {name.removeprefix("image/").partition("/")[0] for name in a if not np.array_equal(a[name], b[name])}
  found = next((i for i in range(case.spec.depth) if f"block_{i:02d}" in changed), case.spec.depth)
  if found != case.method.writes_from:
    raise Broken(f"writes_from: found block {found} of {case.spec.depth} to be the first that depends on what trains; "
                 f"expected {case.method.writes_from}, as the method says")


def isolation(case: Case) -> None:
  """A method that only reads hands no gradient back into the backbone."""
  if case.method.writes_from < case.spec.depth or not case.method.frozen:
    raise Skip("writes into the backbone")
  def loss(params, images, batch):
    context = Context(batch, case.state, params, {}, jax.random.key(0), True)
    outputs = forward(case.method, case.backbone, case.trainable, images, context)
    return case.method.loss(case.trainable, outputs, context)
  batch = {**case.batch, "target": losses.targets(case.batch, case.num_classes)}
  images = to_inputs(jnp.asarray(case.batch["image"]), case.preprocessing)
  found = tree.flatten(jax.jit(jax.grad(loss, allow_int=True))(case.frozen, images, batch))
  if case.method.prompts:  # texts may be written to, and their features scaled
    found = {name: leaf for name, leaf in found.items() if name.startswith("image/")}
  reached = [name for name, leaf in found.items() if leaf.dtype != jax.dtypes.float0 and np.any(leaf)]
  if reached:
    raise Broken(f"isolation: found a gradient at frozen {', '.join(reached[:3])}; expected none, what is read needs "
                 "stop_gradient")


def cached(case: Case) -> None:
  """A method that says what it reads gives the same logits, loss and gradient from it as from the images."""
  if not case.method.reads:
    raise Skip("says nothing of what it reads")
  images = to_inputs(jnp.asarray(case.batch["image"]), case.preprocessing)
  batch = {**case.batch, "target": losses.targets(case.batch, case.num_classes)}
  def run(inputs, frozen):
    context = Context(batch, case.state, frozen, {}, jax.random.key(0), True)
    def loss(trainable):
      outputs = forward(case.method, case.backbone, trainable, inputs, context)
      return case.method.loss(trainable, outputs, context), outputs.logits
    (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(case.trainable)
    return {"loss": value, "logits": logits, **gradient}
  kept = jax.jit(lambda params: case.backbone.apply(params, images, collect(case.method.reads, params), {})[1])
  left = needed(case.method, case.frozen, case.spec.depth, cached=True)
  _equal("from cached activations, against from images", jax.jit(run)(kept(case.params), left),
         jax.jit(run)(images, case.frozen))


def save_load(case: Case) -> None:
  """An adapter file gives the same method, parameters and logits back, classifier included."""
  weights = _weights(case)
  names = [f"class {i}" for i in range(case.num_classes)]
  registered = case.method.name in methods.METHODS
  if not registered:  # a file names its method; outside of a test its author registers it in methods.METHODS
    methods.METHODS[case.method.name] = case.make
  try:
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / "adapter.safetensors"
      save_adapter(path, case.method, case.trainable, case.state, weights=weights, class_names=names)
      found = load_adapter(path)
  finally:
    if not registered:
      del methods.METHODS[case.method.name]
  if json.loads(json.dumps(found.method.options)) != json.loads(json.dumps(case.method.options)):
    raise Broken(f"options after loading: found {found.method.options}; expected {case.method.options}")
  if found.class_names != tuple(names):
    raise Broken(f"class names after loading: found {found.class_names}; expected {tuple(names)}")
  _equal("trainable after loading", found.trainable, case.trainable, 0)
  run, frozen = make_predict(found.method, case.backbone, found.preprocessing), case.prepared(found.method, found.state)
  _equal("logits after loading", run(found.trainable, found.state, frozen, case.batch["image"]),
         case.logits(case.trainable))


def merged(case: Case) -> None:
  """Merged weights on the plain backbone give the same logits, where merging is offered."""
  offered = case.method.merge is not None
  if case.expected.mergeable is not None and offered != case.expected.mergeable:
    raise Broken(f"merge: found it {'offered' if offered else 'missing'}; expected the opposite")
  if not offered:
    raise Skip("offers no merge")
  params = case.method.merge(case.trainable, case.params)
  features = _plain(case.spec)(params, case.batch["image"])
  _equal("logits of merged weights, against the adapted model",
         classifier.apply(case.trainable["classifier"], features), case.logits(case.trainable), 1e-5)


def devices_agree(case: Case) -> None:
  """1 device and 4 devices give the same loss, gradient and parameters after two steps."""
  if len(jax.devices()) < 4:
    raise Skip(f"{len(jax.devices())} devices; set jax.config.update('jax_num_cpu_devices', 4) before jax starts")
  _equal_runs("4 devices against 1", case.train(device_count=4), case.train())


def micro_batches(case: Case) -> None:
  """A batch in two parts gives the same loss, gradient and parameters as the whole one."""
  if case.method.whole_batch:
    raise Skip("needs its batches whole")
  whole = case.train(method=case.still) if case.expected.still else case.train()
  _equal_runs("a batch in 2 parts against the whole", case.train(method=case.still, micro_batches=2), whole)


def remat(case: Case) -> None:
  """Recomputing blocks in the backward pass changes nothing."""
  _equal_runs("remat against none", case.train(remat=True), case.train())


def _equal_runs(what: str, found: dict, wanted: dict) -> None:
  for part in ("loss", "gradient", "trainable"):
    _equal(f"{what}, {part}", found[part], wanted[part])


def resume(case: Case) -> None:
  """Two steps, a checkpoint, a fresh start from it and two more steps equal four steps, bit for bit."""
  step, params, batch, mesh = case.compiled()
  def advance(run, steps):
    for _ in range(steps):
      run, _ = step(run, params, batch)
    return run
  whole = advance(case.run(mesh), 4)
  with tempfile.TemporaryDirectory() as folder:
    before = Checkpoints(folder)
    before.save(2, {"run": advance(case.run(mesh), 2)}, {"note": 1})
    before.close()
    after = Checkpoints(folder)
    number, arrays, notes = after.restore({"run": case.run(mesh, case.initial)})
    after.close()
  if (number, notes) != (2, {"note": 1}):
    raise Broken(f"checkpoint: found step {number} and {notes}; expected step 2 and {{'note': 1}}")
  resumed = advance(arrays["run"], 2)
  for part in ("trainable", "state"):
    _equal(f"{part} after resuming", getattr(resumed, part), getattr(whole, part), 0)


def traced_once(case: Case) -> None:
  """Steps share one trace: a step gives back the types, weak ones included, that it takes."""
  step, params, batch, mesh = case.compiled()
  jitted, run, before = jax.jit(case.step(case.method)), case.run(mesh), case.traces
  for _ in range(3):
    jitted.trace(run, params, batch)  # what a call of the jitted step would do first; its cache is by types
    run, _ = step(run, params, batch)
  if case.traces - before != 1:
    raise Broken(f"traces of three steps: found {case.traces - before}; expected 1, so the run's shapes and types have "
                 "to leave a step as they entered it, weak types too")


def cost_class(case: Case) -> None:
  """A training step costs no more than the method's class allows."""
  if case.expected.cost is None:
    raise Skip("no bound given")
  train, once = cost.flops(case.compiled()[0]), cost.flops(_plain(case.spec))
  if not train <= case.expected.cost * once:
    raise Broken(f"FLOPs of a training step: found {train / once:.2f} times the forward pass; expected at most "
                 f"{case.expected.cost:g}")


def lowers(case: Case) -> None:
  """The training step on a bfloat16 backbone lowers for TPU and for CUDA, without having either."""
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  frozen = jax.eval_shape(lambda found: devices.cast(found, case.params, jnp.bfloat16), case.frozen)
  step = jax.jit(case.step(case.method, backbones.build(case.spec, jnp.bfloat16)))
  run, batch = jax.tree.map(shape, (start(case.trainable, case.state, case.optimiser), case.batch))
  for platform in ("tpu", "cuda"):
    try:
      jax.export.export(step, platforms=[platform])(run, frozen, batch)
    except Exception as error:
      cause = f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
      raise Broken(f"lowering for {platform}: found {cause}; expected a program") from error


PROPERTIES: dict[str, Callable[[Case], None]] = {
    "logits": logits, "identity": identity, "size": size, "gradient": gradient, "frozen": frozen,
    "writes_from": writes_from, "isolation": isolation, "cached": cached, "save_load": save_load, "merged": merged,
    "devices": devices_agree, "micro_batches": micro_batches, "remat": remat, "resume": resume,
    "traced_once": traced_once, "cost": cost_class, "lowers": lowers}


def _weights(case: Case) -> Weights:
  params = jax.tree.map(np.asarray, case.params)
  return Weights(case.spec, params, None, case.preprocessing, case.spec.name, "random", weights_hash(params, case.spec))


def check_method(method: str | Callable, backbone="vit_tiny_test", expected: Expected = Expected(), *,
                 num_classes: int = 5, properties=None) -> dict[str, str]:
  """Runs the conformance table on a method.

  Args:
    method: a function (spec, **options) -> Method, or a registered name.
    backbone: a spec, or an architecture's name; small ones do.
    expected: what the method promises, see `Expected`.
    num_classes: C.
    properties: names of the properties to run; default all of `PROPERTIES`.

  Returns:
    {property: "passed" or "skipped: why"}.

  Raises:
    Broken: one line per property that does not hold.
  """
  chosen = list(PROPERTIES if properties is None else properties)
  for name in chosen:
    if name not in PROPERTIES:
      raise ValueError(f"property {name!r} is unknown; nearest: {', '.join(tree.nearest(name, PROPERTIES))}; "
                       f"all: {', '.join(PROPERTIES)}")
  case = Case(method, backbone, expected, num_classes)
  found, broken = {}, []
  for name in chosen:
    try:
      PROPERTIES[name](case)
      found[name] = "passed"
    except Skip as reason:
      found[name] = f"skipped: {reason}"
    except Broken as error:
      broken.append(f"{case.method.name} on {case.spec.name}, {name}: {error}")
  if broken:
    raise Broken("\n".join(broken))
  return found
