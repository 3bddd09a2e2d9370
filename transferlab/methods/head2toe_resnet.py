"""The activations of a ResNet that Head2Toe taps (Evci et al. 2022, arXiv 2201.03529; google-research/head2toe @
6277f63, called "the code" here).

The names are the code's, their order is that of the forward pass (the code's own is that of a Python set). A tap lies
after norm and ReLU, right before a convolution. That the 3x3 convolution's input counts with its border of zeros, and
the stem without norm, is our reading: with it the numbers of features are the published ones (ResNet-50 v2 at 224 px:
30440, 467688, 1696552 at T = 512, 8192, 24576), without the border they are not.
"""


def resnet_taps(spec) -> dict[str, str]:
  """{the code's name: site}: 52 of ResNet-50 with its logits (`backbones.weights.with_logits`), 51 without.

  Version 1 is not the paper's; its blocks are tapped at the same places, and `pre_logits_pre_pooling` is the last
  block's output.
  """
  taps = {"after_root": "stem/out"}
  for i in range(spec.depth):
    stage = spec.stage(i)
    unit = i - sum(spec.stages[:stage])
    for layer in range(3):
      taps[f"block{stage + 1}_unit{unit + 1}_layer{layer}"] = f"block_{i:02d}/conv{layer + 1}/in"
  taps["pre_logits_pre_pooling"] = "norm" if spec.version == 2 else f"block_{spec.depth - 1:02d}/out"
  taps["pre_logits"] = "pooled"
  return {**taps, "logits": "logits"} if spec.classes else taps
