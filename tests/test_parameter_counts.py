"""Published numbers of trainable parameters, without the classifier, counted from shapes alone.

The tables are of Fu et al. 2024 (arXiv 2312.07856), tables 2 and 3, to the last digit as instantiating the released
classes gives them; papers print two.
"""
import pytest

from transferlab import backbones, methods
from transferlab.method import sizes

NOAH_DTD = {"prompts": (10, 5, 1, 1, 5, 10, 5, 1, 1, 5, 1, 1), "lora": (10, 5, 1, 1, 5, 10, 5, 1, 1, 5, 1, 1),
            "adapter": (1, 1, 1, 10, 1, 1, 10, 10, 10, 10, 10, 1)}
PUBLISHED = [  # backbone, method, options, parameters
    ("vit_b16", "full", {}, 85_798_656),
    ("vit_b16", "linear", {}, 0),
    ("vit_b16", "bitfit", {}, 102_912),
    ("vit_b16", "lora", {}, 294_912),
    ("vit_b16", "lora", {"form": "fused"}, 294_912),
    ("vit_b16", "dtl", {}, 36_864),
    ("vit_b16", "dtl", {"rank": 4}, 73_728),
    ("vit_b16", "dtl_plus", {"kernel": 3}, 43_776),
    ("vit_b16", "dtl_plus", {"kernel": 4}, 49_152),
    ("vit_b16", "dtl_plus", {}, 56_064),
    ("vit_b16", "dtl_plus_star", {"kernel": 3}, 43_776),
    ("vit_b16", "dtl_plus_star", {"kernel": 4}, 49_152),
    ("vit_b16", "dtl_plus_star", {}, 56_064),
    ("vit_b16", "adapter", {}, 156_768),
    ("vit_b16", "adaptformer", {}, 156_768),
    ("vit_b16", "adaptformer", {"bias": False}, 147_456),
    ("vit_b16", "fact_tt", {}, 61_440),
    ("vit_b16", "fact_tt", {"rank": 8}, 21_504),
    ("vit_b16", "fact_tk", {}, 30_976),
    ("vit_b16", "fact_tk", {"rank": 32}, 86_528),
    ("vit_b16", "lst", {}, 2_376_492),
    ("vit_b16", "noah", NOAH_DTD, 287_298),
    ("vit_b16", "noah", {**NOAH_DTD, "compat": "noah"}, 302_658),  # the first block's 10 prompts again, and positions
    ("vit_b16", "ssf", {}, 205_824),
    ("vit_b16", "vpt_shallow", {"prompts": 1}, 768),
    ("vit_b16", "vpt_deep", {"prompts": 1}, 9_216),
    ("swin_b", "full", {}, 86_743_224),
    ("swin_b", "bitfit", {}, 200_760),
    ("swin_b", "dtl", {}, 90_112),
    ("swin_b", "dtl", {"first_read": 0, "first_write": 1}, 96_256),
    ("swin_b", "dtl_plus", {}, 128_512),
    ("swin_b", "dtl_plus_star", {}, 144_256),
    ("swin_b", "ssf", {}, 267_264),
    ("swin_b", "vpt_shallow", {"prompts": 1}, 128),
    ("swin_b", "vpt_deep", {"prompts": 1}, 12_032),
]


@pytest.mark.parametrize("backbone, method, options, count", PUBLISHED, ids=lambda value: str(value).replace(" ", ""))
def test_parameters_are_the_published_number(backbone, method, options, count):
  spec = backbones.architecture(backbone)
  found = sizes(methods.build(method, spec, **options), backbones.abstract_params(spec), 100)
  assert found.trainable_without_classifier == count
