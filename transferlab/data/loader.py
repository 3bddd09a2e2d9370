"""Batches for training and evaluation, on grain: order, shuffling, randomness, workers and exact resume.

Every batch is a dict of numpy arrays with B = batch_size rows (as many of every domain, with per_domain):
  image        uint8 [B, S, S, 3], or float32 on the same 0..255 scale (erasing, mixup, cutmix, or a resize that gives
               fractions); not normalised
  label        int32 [B]
  weight       float32 [B], 1, or 0 for rows that only fill up the last batch
  index        int32 [B], row in the split that was given, -1 for filling
  domain       int32 [B], where the split has domains
  soft_label   float32 [B, C], with mixup, cutmix or label smoothing; 0 for filling
  activations  {slot: [B, …]} in place of `image`, where they are cached: in the order that the images would have
The randomness of an example depends on the seed, the epoch and its place in it, and on nothing that ran before: that is
why resuming, and any number of workers, give the same pixels.
"""
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from transferlab.backbones.spec import PILLOW_FILTERS, Preprocessing
from transferlab.data import cache as cache_lib
from transferlab.data.augment import Augmentation, preset
from transferlab.data.batch import (Attach, Augment, Batch, Batches, Collate, CollateRows, Cut, Mix, Rows,
                                    check_domains)
from transferlab.data.tasks import DataError, Split


def train_loader(split: Split, preprocessing: Preprocessing, *, batch_size: int, seed: int,
                 augmentation: Augmentation | str = "none", drop_last: bool = True, num_classes: int | None = None,
                 workers: int = 0, per_domain: bool = False, reshuffle: bool = True, cache: bool | str = "auto",
                 bad_images: str = "error", progress: cache_lib.Progress | None = None,
                 activations: Callable | None = None, own: tuple[int, int] | None = None) -> "TrainLoader":
  """Batches without end, each epoch in a new order unless `reshuffle` is False.

  Args:
    augmentation: an `Augmentation` or the name of a preset.
    drop_last: leave out the rows that do not fill a batch (others, each epoch); otherwise the last batch is filled up.
    num_classes: C of `soft_label`; needed only where the augmentation makes soft labels.
    workers: processes; 0 uses threads of this one, which is enough unless heavy augmentation is the bottleneck. A
      script that asks for workers needs the `if __name__ == "__main__":` guard.
    per_domain: a batch is `batch_size` rows of every domain, one domain after the other. Each domain is an endless
      stream of its own, all its images once and then all again in a new order: a small domain comes round more often,
      and `drop_last` has no meaning. (DomainBed draws with replacement instead.) An epoch is as many batches as show
      as many images as the split has.
    reshuffle: False keeps the order of the first epoch for all, and with `drop_last` what it leaves out; augmentation
      stays random.
    cache: keep the decoded images in memory: True, False, or "auto", if they fit in 1 GiB. Preprocessed ones, or the
      originals where a random crop needs them.
    bad_images: "error" stops at unreadable images; "skip" leaves them out and lists them in `problems`.
    progress: called with (done, total) during the pass that decodes all images before the first batch.
    activations: (rows [B], epoch) -> {slot: [B, …]} for batches of cached activations; no image is read then, and of
      the augmentation only label smoothing acts.
    own: (first, end) of the rows of each batch that are wanted here, the others being another process's; rows beyond
      the batch are filling. None for all. Where images are mixed, the whole batch is made and then cut.

  Raises:
    DataError: a batch larger than the split (with drop_last) or than a domain (with per_domain), a split without
      domains (with per_domain), labels beyond num_classes, a class left without images.
    BadImage: unreadable images, with bad_images="error".
  """
  augmentation = preset(augmentation) if isinstance(augmentation, str) else augmentation
  if augmentation.soft_labels and num_classes is None:
    raise ValueError("mixup, cutmix and label smoothing make soft labels; give num_classes")
  interpolation = augmentation.random_resized_crop and augmentation.crop_interpolation or preprocessing.interpolation
  if augmentation.eight_bit and interpolation not in PILLOW_FILTERS:
    raise ValueError(f"interpolation {interpolation!r} leaves fractions; colour jitter, grey and RandAugment need 8 "
                     "bits: use another augmentation, or a filter of Pillow's such as bilinear")
  if num_classes is not None and len(split) and not 0 <= split.labels.min() <= split.labels.max() < num_classes:
    raise DataError(f"labels of split {split.name!r} run from {split.labels.min()} to {split.labels.max()}; "
                    f"expected 0..{num_classes - 1}")
  examples = _examples(split, preprocessing, augmentation, activations, cache, bad_images, progress)
  lost = sorted(set(split.labels.tolist()) - set(examples.split.labels.tolist()))
  if lost:
    raise DataError(f"after leaving out {len(examples.problems)} unreadable images, class {lost[0]} of split "
                    f"{split.name!r} has none; replace them: {examples.problems[0]}")
  if per_domain:
    check_domains(examples.split, batch_size)
  elif batch_size < 1 or drop_last and batch_size > len(examples.split):
    raise DataError(f"batch_size {batch_size} does not suit the {len(examples.split)} images of split {split.name!r}; "
                    f"expected 1..{len(examples.split)}; lower batch_size, or use drop_last=False")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed is {seed}; expected a whole number from 0 to {2**32 - 1}")
  return TrainLoader(examples, preprocessing, augmentation, batch_size, seed, drop_last, num_classes, workers,
                     per_domain, reshuffle, activations, own)


def eval_loader(split: Split, preprocessing: Preprocessing, *, batch_size: int, workers: int = 0,
                cache: bool | str = "auto", bad_images: str = "error", progress: cache_lib.Progress | None = None,
                augmentation: Augmentation | str = "none", seed: int = 0, activations: Callable | None = None,
                own: tuple[int, int] | None = None) -> "EvalLoader":
  """Every example once, in order, the last batch filled up; each `iter()` starts anew. Arguments as `train_loader`."""
  if batch_size < 1:
    raise DataError(f"batch_size is {batch_size}; expected at least 1")
  augmentation = preset(augmentation) if isinstance(augmentation, str) else augmentation
  examples = _examples(split, preprocessing, augmentation, activations, cache, bad_images, progress)
  return EvalLoader(examples, preprocessing, augmentation, batch_size, seed, workers, activations, own)


class TrainLoader:
  """The endless iterator `train_loader` returns.

  Attributes:
    split: what is trained on: the given split without unreadable images.
    problems: one line per unreadable image.
    steps_per_epoch: batches in an epoch.
    rows_per_step: rows of a batch: batch_size, or that of every domain.
  """

  def __init__(self, examples: cache_lib.Examples, preprocessing: Preprocessing, augmentation: Augmentation,
               batch_size: int, seed: int, drop_last: bool, num_classes: int | None, workers: int, per_domain: bool,
               reshuffle: bool, activations: Callable | None, own: tuple[int, int] | None):
    import grain
    self.split, self.problems = examples.split, examples.problems
    pixels = None if activations else Augment(preprocessing, augmentation, _resized(examples, augmentation))
    if per_domain:
      streams = _of_every_domain(examples, pixels, seed, reshuffle)
    else:
      streams = (_shuffled(examples, None, pixels, seed, reshuffle).repeat(),)
    N, B = len(self.split), batch_size * len(streams)
    self.rows_per_step = B
    self.steps_per_epoch = N // B if drop_last and not per_domain else -(-N // B)
    own = own or (0, B)
    mixes = bool(augmentation.mixup or augmentation.cutmix)
    made = (0, max(B, own[1])) if mixes else own
    collate = CollateRows(self.split, made[1] - made[0]) if activations else Collate(made[1] - made[0])
    batches = grain.MapDataset.source(Batches(streams, batch_size, None if per_domain else N, self.steps_per_epoch,
                                              made, collate, endless=True)).seed(seed)
    if augmentation.soft_labels:
      batches = batches.random_map(Mix(augmentation, num_classes))
    batches = batches.map(Cut(*own)) if mixes else batches
    self._batches = batches.map_with_index(Attach(activations, self.steps_per_epoch)) if activations else batches
    self._workers, self._cached = 0 if activations else workers, activations is not None
    self._identity = {"seed": seed, "batch_size": batch_size, "drop_last": drop_last, "per_domain": per_domain,
                      "reshuffle": reshuffle, "split": self.split.hash()}
    self._step, self._batch_iterator = 0, None

  def __iter__(self) -> "TrainLoader":
    return self

  def __next__(self) -> Batch:
    if self._batch_iterator is None:
      # A slice, not the state of grain's iterator, which depends on the number of workers.
      remaining = self._batches[self._step:]
      self._batch_iterator = _iterate(remaining, self._workers, self._cached)
      self._finalizer = weakref.finalize(self, self._batch_iterator.close)
    try:
      batch = next(self._batch_iterator)
    except BaseException:  # an image that became unreadable under way; asked again, the loader tries again
      self.close()
      raise
    self._step += 1
    return batch

  def get_state(self) -> dict:
    """JSON-able; `set_state` of a loader made from the same arguments continues with the next batch, bit for bit."""
    return {**self._identity, "step": self._step}

  def set_state(self, state: dict) -> None:
    """Raises `DataError` where the state comes from other data, another seed or another batch size."""
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise DataError(f"the saved data position has {name} {state.get(name)!r}; this run has {value!r}; continue "
                        "with the same data and options, or start in another workdir")
    self.close()
    self._step = int(state["step"])

  def close(self) -> None:
    """Ends threads and workers; the next batch starts them again."""
    if self._batch_iterator is not None:
      self._finalizer()
      self._batch_iterator = None


class EvalLoader:
  """What `eval_loader` returns: a finite iterable with `len()` = number of batches; attributes as `TrainLoader`."""

  def __init__(self, examples: cache_lib.Examples, preprocessing: Preprocessing, augmentation: Augmentation,
               batch_size: int, seed: int, workers: int, activations: Callable | None, own: tuple[int, int] | None):
    import grain
    self.split, self.problems, self._cached = examples.split, examples.problems, activations is not None
    N, own = len(self.split), own or (0, batch_size)
    pixels = None if activations else Augment(preprocessing, augmentation, _resized(examples, augmentation))
    rows = _dataset(examples, None, pixels, seed)
    rows = rows.random_map(pixels) if pixels else rows
    collate = CollateRows(self.split, own[1] - own[0]) if activations else Collate(own[1] - own[0])
    batches = grain.MapDataset.source(Batches((rows,), batch_size, N, -(-N // batch_size), own, collate, endless=False))
    self._batches = batches.map_with_index(Attach(activations, len(batches))) if activations else batches
    self._workers = 0 if activations else workers

  def __len__(self) -> int:
    return len(self._batches)

  def __iter__(self) -> Iterator[Batch]:
    return self.batches()

  def batches(self, start: int = 0) -> Iterator[Batch]:
    """From batch `start` on."""
    return _iterate(self._batches[start:], self._workers, self._cached)


def _resized(examples: cache_lib.Examples, augmentation: Augmentation) -> bool:
  return examples.images is not None and not augmentation.random_resized_crop


def _examples(split: Split, preprocessing: Preprocessing, augmentation: Augmentation, activations, cache, bad_images,
              progress) -> cache_lib.Examples:
  if activations:
    return cache_lib.Examples(split, np.arange(len(split), dtype=np.int32), None, ())
  return cache_lib.load(split, None if augmentation.random_resized_crop else preprocessing, cache=cache,
                        bad_images=bad_images, progress=progress)


def _dataset(examples: cache_lib.Examples, rows: np.ndarray | None, pixels: Augment | None, seed: int):
  """Examples in order, or the numbers of their rows where no pixels are wanted."""
  import grain  # imports jax where that is installed, which reading a folder's labels need not wait for
  rows = np.arange(len(examples.split)) if rows is None else rows
  return grain.MapDataset.source(rows if pixels is None else Rows(examples, rows)).seed(seed)


def _shuffled(examples: cache_lib.Examples, rows: np.ndarray | None, pixels: Augment | None, seed: int,
              reshuffle: bool):
  """Augmented examples in a new order each epoch, or in the first epoch's always."""
  shuffled = _dataset(examples, rows, pixels, seed).shuffle()
  shuffled = shuffled if reshuffle else shuffled.repeat(1, reseed_each_epoch=False)
  return shuffled if pixels is None else shuffled.random_map(pixels)


def _of_every_domain(examples: cache_lib.Examples, pixels: Augment | None, seed: int, reshuffle: bool) -> tuple:
  """An endless stream of each domain, shuffled and augmented under a seed of its own."""
  streams = []
  for domain in np.unique(examples.split.domains).tolist():
    own_seed = int(np.random.SeedSequence([seed, domain]).generate_state(1)[0])
    rows = np.flatnonzero(examples.split.domains == domain)
    streams.append(_shuffled(examples, rows, pixels, own_seed, reshuffle).repeat())
  return tuple(streams)


def _iterate(batches, workers: int, cached: bool) -> Iterator[Batch]:
  """The batches of a grain MapDataset, a few of them made ahead; of activations, which need no work and may take a
  gigabyte, two."""
  import grain
  threads = 1 if cached else max(1, cache_lib.THREADS // max(workers, 1))
  batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
  if workers:
    from absl import flags
    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which nobody parses in a notebook or a test
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
                                  worker_init_fn=_begin_worker)
  iterator = iter(batches)
  try:
    for batch in iterator:
      # Workers send memory that they share and take back; the caller may keep what it gets.
      yield {name: np.array(values) for name, values in batch.items()} if workers else batch
  finally:
    iterator.close()


def _begin_worker(*_) -> None:
  """Leaves the signals that a scheduler sends to all of a job to the process that wants the batches, which has a step
  to finish and to save; and ends when that process does."""
  for name in ("SIGTERM", "SIGUSR1"):
    if hasattr(signal, name):
      signal.signal(getattr(signal, name), signal.SIG_IGN)
  threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
