"""What a backbone is, as plain data: its shape, its sites' geometry and the preprocessing that belongs to its weights.

Nothing here imports jax, so that data workers and command-line help stay light. Every number a method or a loader may
need about a backbone is a field or a method of its spec; the arithmetic itself lives in `vit.py` and its siblings.
"""
from transferlab.backbones.preprocessing import (CROPS as CROPS, INTERPOLATIONS as INTERPOLATIONS,
                                                 PILLOW_FILTERS as PILLOW_FILTERS, Preprocessing as Preprocessing)
from transferlab.backbones.resnet_spec import ResNetSpec as ResNetSpec
from transferlab.backbones.swin_spec import SwinSpec as SwinSpec
from transferlab.backbones.vit_spec import (GELUS as GELUS, POOLS as POOLS, BlockShape as BlockShape,
                                            ViTSpec as ViTSpec)
