"""Searching among variants of one trained stage on the validation split, for methods that do (`Method.search`)."""
import jax
import numpy as np

from transferlab import cost, devices, methods
from transferlab.evaluate import known_of
from transferlab.method import Context, Method, forward
from transferlab.progress import Progress
from transferlab.stage import Stage
from transferlab.step import inputs_of

SIDE_BY_SIDE = 10  # most variants that one call of the program evaluates; fewer where memory is short


def check(method: Method, splits) -> None:
  """Raises `ValueError` where a method has to search and there is nothing to search on."""
  if method.search and "val" not in splits:
    raise ValueError(f"{method.name} searches on a validation split and the task has splits {', '.join(splits)}; give "
                     "it a val split (a suite's task: phase=tune), or train what a search has found, see the method")


def search(stage: Stage) -> None:
  """Lets a trained stage's method search, if it does, and says what follows; `stage.state` is then what it found."""
  if not stage.method.search:
    return
  score, rounds = Score(stage), 0

  def scored(variants: list[dict]) -> list[float]:
    nonlocal rounds
    found, rounds = score(variants), rounds + 1
    # Behind the stage's last step, so that a run that is resumed there logs its search once.
    stage.log({"step": stage.total + rounds, "search": {"best": max(found), "mean": float(np.mean(found)),
                                                        "scored": len(found)}})
    stage.tell(f"search, round {rounds}: {len(found)} scored, best val accuracy {max(found):.4f}")
    return found

  stage.state = stage.method.search(stage.trainable, stage.state, scored)
  if stage.method.then:
    stage.tell(f"found: {as_flags(stage.method.then(stage.trainable, stage.state))}")


def as_flags(method: Method) -> str:
  """A method as the command line takes it, options that are not the defaults included."""
  usual = methods.options_of(method.name) if method.name in methods.METHODS else {}
  own = {name: value for name, value in method.options.items() if name not in usual or value != usual[name]}
  return " ".join([f"--config.method={method.name}", *(f'--config.options.{name}="{own[name]}"' for name in own)])


class Score:
  """score([vary, …]) -> [accuracy on the validation split], of a trained stage under each of these ctx.vary; the mean
  over domains where the recipe goes by that."""

  def __init__(self, stage: Stage):
    self.stage, self.loader, self.size, self.program = stage, stage.val_loader, 0, None
    self.arrays = stage.trainable, stage.state, stage.frozen
    domains = self.loader.split.domains
    self.share = np.ones(len(self.loader.split))
    if stage.criterion == "mean_over_domains":
      self.share = 1 / np.bincount(domains)[domains]  # every domain counts the same

  def __call__(self, variants: list[dict]) -> list[float]:
    if self.program is None:
      self.compile(variants)
    found = []
    with Progress(len(variants), "searching", quiet=self.stage.quiet) as progress:
      for first in range(0, len(variants), self.size):
        chunk = variants[first:first + self.size]
        right = self.right(chunk + chunk[-1:] * (self.size - len(chunk)))[:len(chunk)]                     # [K, N]
        found += (right @ self.share / self.share.sum()).tolist()
        progress.update(len(chunk))
    return found

  def compile(self, variants: list[dict]) -> None:
    """Compiles the program for as many variants at once as there are, may be and fit."""
    stage, count = self.stage, min(SIDE_BY_SIDE, len(variants))

    def one(arrays, batch, vary):
      trainable, state, frozen = arrays
      context = Context(state=state, frozen=frozen, vary=vary)
      inputs = inputs_of(batch, stage.preprocessing)
      return forward(stage.method, stage.backbone, trainable, inputs, context).logits.argmax(-1)           # [B]

    many, batch = jax.jit(jax.vmap(one, in_axes=(None, None, 0))), self.put(next(iter(self.loader)))
    lower = lambda parts: many.lower(self.arrays, batch, self.stacked(variants[:count // parts]))
    self.program, parts = cost.largest_that_fits(lambda parts: lower(parts).compile(), count)
    self.size = count // parts
    stage.tell(f"search: {self.size} variants at once, peak {cost.peak_bytes(self.program) / 2**20:.1f} MiB")

  def right(self, variants: list[dict]) -> np.ndarray:
    """Whether each variant classifies each example right, [K, N]."""
    vary, found = self.stacked(variants), []
    for batch in self.loader:
      put = self.put(batch)
      predicted, known = devices.whole((self.program(self.arrays, put, vary), known_of(put)))              # [K, B]
      rows = known["weight"] > 0
      found.append(predicted[:, rows] == known["label"][rows])
    return np.concatenate(found, axis=1)

  def put(self, batch: dict) -> dict:
    """What predicting and counting take of a batch, on the devices."""
    wanted = {name: batch[name] for name in ("image", "activations", "label", "weight") if name in batch}
    return devices.put_batch(wanted, self.stage.mesh)

  def stacked(self, variants: list[dict]) -> dict:
    """{name: [K, …]}, on the devices."""
    return devices.replicate(jax.tree.map(lambda *leaves: np.stack(leaves), *variants), self.stage.mesh)
