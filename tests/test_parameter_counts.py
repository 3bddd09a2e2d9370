"""Published numbers of trainable parameters, without the classifier, counted from shapes alone.

The tables are of Fu et al. 2024 (arXiv 2312.07856), tables 2 and 3, to the last digit as instantiating the released
classes gives them; papers print two.
"""
import pytest

from transferlab import backbones, methods
from transferlab.method import sizes

PUBLISHED = [  # backbone, method, options, parameters
    ("vit_b16", "full", {}, 85_798_656),
    ("vit_b16", "linear", {}, 0),
    ("vit_b16", "bitfit", {}, 102_912),
    ("vit_b16", "lora", {}, 294_912),
    ("vit_b16", "lora", {"form": "fused"}, 294_912),
    ("vit_b16", "dtl", {}, 36_864),
    ("swin_b", "full", {}, 86_743_224),
    ("swin_b", "bitfit", {}, 200_760),
]


@pytest.mark.parametrize("backbone, method, options, count", PUBLISHED, ids=lambda value: str(value).replace(" ", ""))
def test_parameters_are_the_published_number(backbone, method, options, count):
  spec = backbones.architecture(backbone)
  found = sizes(methods.build(method, spec, **options), backbones.abstract_params(spec), 100)
  assert found.trainable_without_classifier == count
