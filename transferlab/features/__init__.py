"""The activation cache: a backbone runs once over the images, and methods train from the activations that it kept.

What a method `reads` is kept as it leaves the frozen part, reduced, one row per image; `store.py` says how it lies on
the disk. Heads need nothing else of the backbone. A method that writes into it late, as dtl does, goes on from the
activations where it first writes: its epochs compute only the blocks above.

What a cache is of (weights, preprocessing, images, types, augmentation) is its key, so that activations of anything
else are never found. Of the images it has all names and labels, and the pixels of the first 32: where later files were
replaced under their old names, delete the cache. Methods that read the same activation share it; missing ones are
added.

Training images that are augmented at random have no one activation. Their cache holds a number of views instead, each
the whole split augmented under a seed of its own, and epoch e trains on view e modulo their number. Stochastic depth
draws once for each view in blocks that are cached, and in every step in those that are computed.
"""
from transferlab.features.batches import (cacheable, check, check_without, eval_loader, loaders, of_recipe,
                                          reads_only, train_loader, verified)
from transferlab.features.cache import Cache, Features, activation_shapes, bytes_per_image, columns, complete
from transferlab.features.fill import write

__all__ = ["Cache", "Features", "activation_shapes", "bytes_per_image", "cacheable", "check", "check_without",
           "columns", "complete", "eval_loader", "loaders", "of_recipe", "reads_only", "train_loader", "verified",
           "write"]
