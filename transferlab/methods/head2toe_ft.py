"""Head2Toe-FT: the features are selected on the frozen backbone, then the backbone is trained with the new head."""
from transferlab.method import Method, collect
from transferlab.methods.full import full
from transferlab.methods.head2toe import on_selected, two_stages


def head2toe_ft(spec, *, fraction: float = 0.01, coefficient: float = 1e-4, sites: str | tuple = "paper",
                target_size: int = 512, cls: str = "normal", normalisation: str = "unit",
                compat: str | None = None) -> Method:
  """Head2Toe-FT, two stages: `head2toe`'s first, then a new head on its selection together with the whole backbone.

  Args:
    fraction: share of the features that stay. 1.0 keeps all and needs no first stage: `sites="pooled", fraction=1.0` is
      the code's fine-tuning baseline, whose features are scaled to length 1 like all others (`full` does not do so).
    spec, coefficient, sites, target_size, cls, normalisation, compat: as of `head2toe`; so are the differences.

  Features are recomputed and normalised in every step; which ones they are stays fixed. Trainable of the second stage:
  {"backbone": the backbone's parameters, "classifier": {"kernel": [K, C], "bias": [C]}}. State: {"kept": [K] int32}.
  Does not merge.

  The second stage begins its schedule anew, with the recipe's whole duration and rate and a head drawn at random: that
  is the code's way, whose backbone has the head's rate unless one gives a factor. Here `optim.lr` is the backbone's
  rate and `optim.lr_factors=(("classifier/.*", 100.0),)` makes the heads of both stages faster (a pattern has to match
  in each of them, and the first has no backbone to train).

  Difference from the code: that runs the backbone in training mode, so a ResNet's batch norm follows the batches; here
  its statistics stay. The paper's rates and durations of fine-tuning are not known to us.
  """
  return two_stages(spec, "head2toe_ft", {
      "fraction": fraction, "coefficient": coefficient, "sites": sites, "target_size": target_size, "cls": cls,
      "normalisation": normalisation, "compat": compat}, second=_tuned)


def _tuned(spec, name: str, options: dict, source, kept) -> Method:
  """The second stage on the features `kept`."""
  head, backbone = on_selected(spec, name, options, source, kept), full(spec)

  def init(rng, frozen, num_classes):
    trainable, state = head.init(rng, frozen, num_classes)
    return {**backbone.init(rng, frozen, num_classes)[0], **trainable}, state

  def visit(trainable, ctx):
    return collect(source.reads, backbone.weights(trainable, ctx.frozen), stop=False)

  return head._replace(init=init, visit=visit, carry={}, weights=backbone.weights, frozen=backbone.frozen, reads={},
                       writes_from=0)
