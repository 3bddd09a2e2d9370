"""Several processes read one data set: each its own rows of every batch, and its share of what all have to know."""
import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from transferlab import data
from transferlab.backbones.spec import Preprocessing
from transferlab.data import cache


def of(size: int) -> data.Split:
  """Random images [4, 4, 3] of three classes."""
  images = np.random.default_rng(0).integers(0, 256, (size, 4, 4, 3), np.uint8)
  return data.arrays(images, np.arange(size) % 3, ["a", "b", "c"], {"test": range(size)}).splits["test"]


def counting(split: data.Split) -> tuple[data.Split, list]:
  """The split, and the rows that are read of it."""
  read = []
  return dataclasses.replace(split, read=lambda row: read.append(row) or split.read(row), verified=False), read


@pytest.mark.parametrize("own, wanted", [((0, 4), [0, 1, 2, 3, 6, 7, 8, 9]), ((4, 8), [4, 5])])
def test_each_process_decodes_its_rows_alone(own, wanted):
  """Of batches of 6 of 10 images, filled up to 8; where a batch has none of them, one row is read for its shape."""
  whole = of(10)
  split, read = counting(whole)
  make = functools.partial(data.eval_loader, preprocessing=Preprocessing(4), batch_size=6, cache=False, own=own)
  found = [row for batch in make(dataclasses.replace(split, verified=True))
           for row in batch["index"][batch["weight"] > 0].tolist()]
  assert found == wanted and set(read) <= {*wanted, 6} and len(read) <= len(wanted) + 1


@pytest.mark.parametrize("budget, each", [(300, 5), (2**30, 9)])
def test_two_processes_share_the_pass_over_large_data(monkeypatch, budget, each):
  """What fits in memory is decoded by both, the others' images after their own; the unreadable one by one of them."""
  monkeypatch.setattr(cache, "CACHE_BYTES", budget)
  values, meet = [None, None], threading.Barrier(2)
  def gather(place, value):
    values[place] = value
    meet.wait(10)
    return list(values)
  def bad(row):
    if row == 5:
      raise data.BadImage("image 5 is none")
    return of(10).read(row)
  def one(place):
    split, read = counting(dataclasses.replace(of(10), read=bad))
    found, problems = data.read_once(split, "skip", None, (place, 2), functools.partial(gather, place))
    assert problems == ("image 5 is none",) and found.verified and found.keys[5] == split.keys[6]
    before = len(read)
    assert np.array_equal(found.read(5), bad(6)) and len(read) == before + (budget == 300)
    return read[:before]
  with ThreadPoolExecutor(2) as pool:
    reads = list(pool.map(one, (0, 1)))
  assert [set(read[:5]) for read in reads] == [{0, 2, 4, 6, 8}, {1, 3, 5, 7, 9}]
  assert [len(set(read)) for read in reads] == [each, each + (budget != 300)]
