"""Loaders: order, resume, workers, padding, the pass before step 1, bad images."""
import json

import numpy as np
import pytest
from PIL import Image

import transferlab.data as data
from transferlab.backbones.spec import Preprocessing
from transferlab.data import Augmentation, BadImage, DataError, eval_loader, preprocess, train_loader
from transferlab.data import cache as cache_lib
from transferlab.data import files as files_lib

P = Preprocessing(12)


def split_of(n=10, size=9, classes=3, domains=False):
  """n random images in memory, labels going round."""
  images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
  split = data.arrays(images, np.arange(n) % classes, [str(c) for c in range(classes)], {"train": range(n)},
                      val_fraction=0, test_fraction=0).splits["train"]
  return split if not domains else data.Split("train", split.keys, split.labels, split.read, np.arange(n) % 2)


@pytest.fixture
def folder(tmp_path):
  """Eight JPEG files of two classes and different shapes."""
  rng = np.random.default_rng(0)
  for c in "ab":
    (tmp_path / c).mkdir()
    for k in range(4):
      Image.fromarray(rng.integers(0, 256, (10 + k, 14, 3), np.uint8)).save(tmp_path / c / f"{k}.jpg")
  return tmp_path


def files(folder, spoil=()):
  """The folder as a training split; files in `spoil` are cut short (class a) or become text (class b)."""
  for name in spoil:
    path = folder / name
    path.write_bytes(path.read_bytes()[:150] if name.startswith("a") else b"just text")
  return data.image_folder(folder, 0, 0).splits["train"]


def take(loader, n):
  return [next(loader) for _ in range(n)]


def assert_same(batches, others):
  assert len(batches) == len(others)
  for a, b in zip(batches, others):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


HEAVY = Augmentation(random_resized_crop=True, flip=True, color_jitter=(0.3, 0.3, 0.3, 0.1), grayscale=0.2,
                     randaugment="rand-m9-mstd0.5-inc1", random_erasing=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


# Contents

def test_an_epoch_shows_every_example_once_with_its_own_pixels_and_label():
  split = split_of(12, domains=True)
  loader = train_loader(split, P, batch_size=4, seed=0)
  assert loader.steps_per_epoch == 3 and iter(loader) is loader
  batches = take(loader, 3)
  assert sorted(np.concatenate([b["index"] for b in batches]).tolist()) == list(range(12))
  for b in batches:
    assert {k: (v.dtype.name, v.shape) for k, v in b.items()} == {
        "image": ("uint8", (4, 12, 12, 3)), "label": ("int32", (4,)), "weight": ("float32", (4,)),
        "index": ("int32", (4,)), "domain": ("int32", (4,))}
    assert (b["weight"] == 1).all() and np.array_equal(b["label"], split.labels[b["index"]])
    assert np.array_equal(b["domain"], split.domains[b["index"]])
    for image, row in zip(b["image"], b["index"]):
      assert np.array_equal(image, preprocess(split.read(row), P))


def test_epochs_differ_seeds_differ_and_the_same_seed_repeats():
  def order(seed, n=6):
    return [b["index"].tolist() for b in take(train_loader(split_of(12), P, batch_size=4, seed=seed), n)]
  first = order(0)
  assert first == order(0) and first != order(1) and first[:3] != first[3:]
  assert len({tuple(sum(order(seed, 3), [])) for seed in range(20)}) == 20


def test_order_of_an_epoch_is_near_uniform():
  """The first example of an epoch should be any of the six."""
  loader = train_loader(split_of(6), P, batch_size=6, seed=7)
  first = np.bincount([b["index"][0] for b in take(loader, 120)], minlength=6)
  assert first.min() > 7 and first.max() < 38


def test_the_short_batch_is_left_out_or_filled_up():
  dropped = train_loader(split_of(10), P, batch_size=4, seed=0)
  assert dropped.steps_per_epoch == 2
  seen = [set(np.concatenate([b["index"] for b in take(dropped, 2)]).tolist()) for _ in range(20)]
  assert all(len(s) == 8 for s in seen) and set().union(*seen) == set(range(10))  # not always the same two are left out
  filled = train_loader(split_of(10), P, batch_size=4, seed=0, drop_last=False)
  assert filled.steps_per_epoch == 3
  for _ in range(3):
    batches = take(filled, 3)
    last = batches[-1]
    assert last["weight"].tolist() == [1, 1, 0, 0] and last["index"][2:].tolist() == [-1, -1]
    assert last["image"].shape == (4, 12, 12, 3) and not last["image"][2:].any() and not last["label"][2:].any()
    assert sorted(i for b in batches for i in b["index"].tolist() if i >= 0) == list(range(10))


def test_eval_is_in_order_finite_repeatable_and_filled_up():
  split = split_of(10, domains=True)
  loader = eval_loader(split, P, batch_size=4)
  assert len(loader) == 3
  for _ in range(2):
    batches = list(loader)
    assert np.concatenate([b["index"] for b in batches]).tolist() == [*range(10), -1, -1]
    assert sum(b["weight"].sum() for b in batches) == 10
    images = np.concatenate([b["image"] for b in batches])[:10]
    assert np.array_equal(images, np.stack([preprocess(split.read(i), P) for i in range(10)]))
  assert len(list(eval_loader(split, P, batch_size=64))) == 1
  next(iter(loader))  # leaving one early closes its threads


def test_soft_labels_with_mixing_leave_the_filling_alone():
  a = Augmentation(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
  loader = train_loader(split_of(10), P, batch_size=4, seed=0, augmentation=a, num_classes=3, drop_last=False)
  for batch in take(loader, 9):
    real = batch["weight"] == 1
    assert batch["soft_label"].shape == (4, 3) and batch["soft_label"].dtype == np.float32
    np.testing.assert_allclose(batch["soft_label"].sum(1), real, atol=1e-6)
    assert batch["image"].dtype == np.float32 and not batch["image"][~real].any()
    assert (batch["image"][real].mean((1, 2, 3)) > 60).all()  # filling was not mixed in
    assert 0 <= batch["image"].min() and batch["image"].max() <= 255
  a = Augmentation(label_smoothing=0.3)
  batch = next(train_loader(split_of(), P, batch_size=4, seed=0, augmentation=a, num_classes=3))
  assert batch["image"].dtype == np.uint8
  np.testing.assert_allclose(batch["soft_label"][np.arange(4), batch["label"]], 0.8, rtol=1e-6)


def test_a_repeated_image_is_augmented_differently_in_a_batch_and_between_epochs():
  split = split_of(8).select([3] * 8)
  loader = train_loader(split, P, batch_size=8, seed=0, augmentation="fewshot")
  images = np.concatenate([b["image"] for b in take(loader, 3)])
  assert len({i.tobytes() for i in images}) > 20


# Resume and workers

@pytest.mark.parametrize("augmentation, drop_last", [("none", True), (HEAVY, True), (HEAVY, False)])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_resume_is_bit_exact_within_and_between_epochs(augmentation, drop_last, stop):
  def make():
    return train_loader(split_of(10), P, batch_size=4, seed=3, augmentation=augmentation, num_classes=3,
                        drop_last=drop_last)
  whole = take(make(), 11)
  interrupted = make()
  take(interrupted, stop)
  state = json.loads(json.dumps(interrupted.get_state()))
  resumed = make()
  resumed.set_state(state)
  assert resumed.get_state() == state
  assert_same(whole[stop:], take(resumed, 11 - stop))
  interrupted.set_state({**state, "step": 2})  # a loader under way can be moved, too
  assert_same(whole[2:5], take(interrupted, 3))


def test_workers_and_caching_change_nothing(folder):
  split = files(folder)
  def make(**options):
    return train_loader(split, P, batch_size=3, seed=3, augmentation=HEAVY, num_classes=2, **options)
  expected = take(make(), 6)
  assert_same(expected, take(make(cache=False), 6))
  parallel = make(workers=2, cache=False)
  assert_same(expected[:4], take(parallel, 4))
  state = parallel.get_state()
  parallel.close()
  alone = make()
  alone.set_state(state)  # saved with two workers, continued with none
  assert_same(expected[4:], take(alone, 2))


def test_eval_with_workers(folder):
  assert_same(list(eval_loader(files(folder), P, batch_size=3)),
              list(eval_loader(files(folder), P, batch_size=3, workers=2, cache=False)))


# The order of the first epoch for all

def test_a_fixed_order_is_that_of_the_first_epoch():
  order = lambda batches: [b["index"].tolist() for b in batches]
  make = lambda **how: train_loader(split_of(10), P, batch_size=4, seed=3, **how)
  for drop_last, steps in ((True, 2), (False, 3)):
    fixed = take(make(drop_last=drop_last, reshuffle=False), 4 * steps)
    new = take(make(drop_last=drop_last), 4 * steps)
    assert_same(fixed[:steps], new[:steps])
    assert order(fixed) == 4 * order(fixed[:steps]) and order(new) != order(fixed)
  assert order(take(train_loader(split_of(10), P, batch_size=4, seed=4, reshuffle=False), 3)) != order(fixed[:3])


def test_in_a_fixed_order_augmentation_stays_random():
  flipped = train_loader(split_of(8), P, batch_size=8, seed=3, augmentation="flip", reshuffle=False)
  first, second = take(flipped, 2)
  assert np.array_equal(first["index"], second["index"]) and not np.array_equal(first["image"], second["image"])


@pytest.mark.parametrize("per_domain", [False, True])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_fixed_order_resumes_bit_for_bit(stop, per_domain):
  make = lambda **how: train_loader(split_of(10, domains=True), P, batch_size=4, seed=3, augmentation="flip",
                                    drop_last=False, per_domain=per_domain, **{"reshuffle": False, **how})
  whole, interrupted, resumed = take(make(), 9), make(), make()
  take(interrupted, stop)
  state = json.loads(json.dumps(interrupted.get_state()))
  resumed.set_state(state)
  assert_same(whole[stop:], take(resumed, 9 - stop))
  with pytest.raises(DataError, match="has reshuffle False; this run has True"):
    make(reshuffle=True).set_state(state)


def test_every_domain_keeps_an_order_of_its_own():
  def order(reshuffle):
    batches = take(train_loader(of_domains((6, 4)), P, batch_size=2, seed=0, per_domain=True, reshuffle=reshuffle), 12)
    return [np.concatenate([b["index"][b["domain"] == d] for b in batches]).tolist() for d in (0, 2)]
  fixed, new = order(False), order(True)
  for size, a, b in zip((6, 4), fixed, new):
    assert a == a[:size] * (24 // size) and a[:size] == b[:size] and a != b


# Pixels that are not on the uint8 grid

@pytest.mark.parametrize("cache", [True, False])
def test_a_resize_that_leaves_fractions_keeps_them(folder, cache):
  tf1, split = Preprocessing(12, "bilinear_tf1"), files(folder)
  wanted = np.stack([preprocess(split.read(i), tf1) for i in range(8)])
  batches = list(eval_loader(split, tf1, batch_size=8, cache=cache))
  assert batches[0]["image"].dtype == np.float32 and np.array_equal(batches[0]["image"], wanted)
  batch = next(train_loader(split, tf1, batch_size=8, seed=0, cache=cache))
  assert batch["image"].dtype == np.float32 and np.array_equal(batch["image"], wanted[batch["index"]])
  flipped = next(train_loader(split, tf1, batch_size=8, seed=0, cache=cache, augmentation="flip"))
  turned = (flipped["image"] != wanted[flipped["index"]]).any((1, 2, 3))
  assert turned.any() and np.array_equal(flipped["image"][turned], wanted[flipped["index"][turned]][:, :, ::-1])


def test_fractions_take_four_times_the_memory_in_the_budget(folder):
  tf1, split = Preprocessing(12, "bilinear_tf1"), files(folder)
  assert cache_lib.load(split, tf1, cache="auto", budget=8 * 12 * 12 * 3 * 4).images.dtype == np.float32
  assert cache_lib.load(split, tf1, cache="auto", budget=8 * 12 * 12 * 3 * 4 - 1).images is None


def test_augmentations_of_8_bits_refuse_fractions():
  tf1 = Preprocessing(12, "bilinear_tf1")
  for change in ({"color_jitter": (0.3, 0, 0, 0)}, {"grayscale": 0.5}, {"randaugment": "rand-m9-mstd0.5-inc1"}):
    for crop in (False, True):
      augmentation = Augmentation(random_resized_crop=crop, **change)
      with pytest.raises(ValueError, match="interpolation 'bilinear_tf1' leaves fractions; .* such as bilinear"):
        train_loader(split_of(), tf1, batch_size=2, seed=0, augmentation=augmentation)
  images = next(train_loader(split_of(), tf1, batch_size=2, seed=0, augmentation="fewshot"))["image"]
  assert images.dtype == np.uint8  # a random crop with a filter of its own
  for name in ("crop_flip", "timm"):
    images = next(train_loader(split_of(), tf1, batch_size=2, seed=0, augmentation=name, num_classes=3))["image"]
    assert images.dtype == np.float32 and images.shape == (2, 12, 12, 3)


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 5}, {"drop_last": False}, {"split": split_of(9)}])
def test_a_position_in_other_data_is_refused(change):
  arguments = {"split": split_of(10), "seed": 3, "batch_size": 4, "drop_last": True}
  make = lambda **a: train_loader(a.pop("split"), P, **a)  # noqa: E731
  with pytest.raises(DataError, match=f"has {next(iter(change))} "):
    make(**{**arguments, **change}).set_state(make(**arguments).get_state())


# The pass before step 1

@pytest.mark.parametrize("cache", [True, False, "auto"])
@pytest.mark.parametrize("augmentation", ["flip", "crop_flip"])
def test_unreadable_images_stop_the_run_or_are_left_out(folder, cache, augmentation):
  split = files(folder, spoil=["a/2.jpg", "b/1.jpg"])
  options = {"batch_size": 3, "seed": 0, "cache": cache, "augmentation": augmentation}
  with pytest.raises(BadImage) as error:
    train_loader(split, P, **options)
  message = str(error.value)
  assert "2 of 8 images" in message and "a/2.jpg" in message and "--bad_images=skip" in message and "\n" not in message
  loader = train_loader(split, P, bad_images="skip", **options)
  assert len(loader.split) == 6 and loader.steps_per_epoch == 2 and len(loader.problems) == 2
  assert "a/2.jpg" in loader.problems[0] and "b/1.jpg" in loader.problems[1]
  for batch in take(loader, 4):  # `index` still means a row of the split that was given
    assert not set(batch["index"].tolist()) & {2, 5} and np.array_equal(batch["label"], split.labels[batch["index"]])


def test_unreadable_images_in_evaluation(folder):
  split = files(folder, spoil=["a/2.jpg"])
  with pytest.raises(BadImage, match="1 of 8"):
    eval_loader(split, P, batch_size=4)
  batches = list(eval_loader(split, P, batch_size=4, bad_images="skip"))
  assert np.concatenate([b["index"] for b in batches]).tolist() == [0, 1, 3, 4, 5, 6, 7, -1]
  images = np.concatenate([b["image"] for b in batches])[:7]  # each still has its own pixels
  assert np.array_equal(images, np.stack([preprocess(split.read(i), P) for i in (0, 1, 3, 4, 5, 6, 7)]))


def test_a_class_that_loses_all_images(folder):
  split = files(folder, spoil=[f"b/{k}.jpg" for k in range(4)])
  with pytest.raises(DataError, match="class 1 .* has none"):
    train_loader(split, P, batch_size=2, seed=0, bad_images="skip")
  split = files(folder, spoil=[f"a/{k}.jpg" for k in range(4)])
  with pytest.raises(DataError, match="none of the 8 images"):
    train_loader(split, P, batch_size=2, seed=0, bad_images="skip")


def test_check_images_and_progress(folder):
  calls = []
  split, problems = data.check_images(files(folder), progress=lambda done, total: calls.append((done, total)))
  assert problems == () and split.verified and calls[-1] == (8, 8)
  calls.clear()
  train_loader(split, P, batch_size=2, seed=0, cache=False, progress=lambda *c: calls.append(c))
  assert calls == []  # verified images are not tried again
  train_loader(split, P, batch_size=2, seed=0, progress=lambda *c: calls.append(c))
  assert calls == [(8, 8)]
  split, problems = data.check_images(files(folder, spoil=["a/0.jpg"]), bad_images="skip")
  assert len(split) == 7 and len(problems) == 1 and split.keys[0] == "a/1.jpg"


def test_images_that_go_straight_to_their_size_have_the_pixels_of_those_that_were_arrays(tmp_path):
  """Loaders take Pillow's own image from a file, and the array that `read` gives from everything else."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (30, 44, 3), np.uint8)
  turned = Image.Exif()
  turned[0x0112] = 6
  Image.fromarray(pixels).save(tmp_path / "0.jpg", exif=turned)
  Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(tmp_path / "1.png")  # transparent
  Image.fromarray(rng.integers(0, 65536, (30, 44), np.uint16)).save(tmp_path / "2.png")
  Image.fromarray(pixels[..., 0]).save(tmp_path / "3.png")
  Image.fromarray(np.tile(pixels[:3], (1, 3, 1))).save(tmp_path / "4.png")  # a strip
  Image.fromarray(pixels).convert("P").save(tmp_path / "5.gif")
  split = data.image_files(tmp_path)
  arrays = data.Split("test", split.keys, split.labels, lambda row: split.read(row))
  assert split.read(0).shape == (44, 30, 3) and split.picture(0).size == (30, 44)
  assert np.array_equal(split.select([2, 0]).picture(1), split.read(0)) and isinstance(arrays.picture(0), np.ndarray)
  for preprocessing in (P, Preprocessing(12, "bilinear", "center", 0.875), Preprocessing(13, "lanczos", "center")):
    for cache in (True, False):
      assert_same(*(list(eval_loader(s, preprocessing, batch_size=4, cache=cache)) for s in (split, arrays)))
  for augmentation in ("crop_flip", HEAVY):
    options = {"batch_size": 4, "seed": 0, "augmentation": augmentation, "num_classes": 1}
    assert_same(take(train_loader(split, P, cache=False, **options), 4),
                take(train_loader(arrays, P, cache=True, **options), 4))


def test_auto_caches_within_its_budget_only(folder, monkeypatch):
  split = files(folder)
  sizes = sum(split.read(i).nbytes for i in range(8))
  for preprocessing, needed in ((P, 8 * 12 * 12 * 3), (None, sizes)):
    assert cache_lib.load(split, preprocessing, cache="auto", budget=needed).images is not None
    assert cache_lib.load(split, preprocessing, cache="auto", budget=needed - 1).images is None
    assert cache_lib.load(split, preprocessing, cache=True, budget=0).images is not None
    assert cache_lib.load(split, preprocessing, cache=False).images is None
  reads = []
  loader = train_loader(split, P, batch_size=4, seed=0)
  monkeypatch.setattr("transferlab.data.files.picture", lambda path: reads.append(path))
  take(loader, 6)
  assert reads == []


def test_a_file_that_vanishes_under_way_is_named(folder):
  loader = train_loader(files(folder), P, batch_size=8, seed=0, cache=False)
  (folder / "b" / "2.jpg").unlink()
  with pytest.raises(BadImage, match=r"b/2\.jpg"):
    next(loader)
  with pytest.raises(BadImage):  # and again, rather than an end of data
    next(loader)


# Arguments

def test_a_batch_larger_than_the_data():
  with pytest.raises(DataError) as error:
    train_loader(split_of(10), P, batch_size=11, seed=0)
  assert "batch_size 11" in str(error.value) and "10 images" in str(error.value) and "\n" not in str(error.value)
  assert train_loader(split_of(10), P, batch_size=11, seed=0, drop_last=False).steps_per_epoch == 1
  assert train_loader(split_of(10), P, batch_size=10, seed=0).steps_per_epoch == 1


def test_wrong_arguments():
  with pytest.raises(DataError, match="batch_size 0"):
    train_loader(split_of(), P, batch_size=0, seed=0)
  with pytest.raises(DataError, match=r"from 0 to 2; expected 0\.\.1"):
    train_loader(split_of(), P, batch_size=2, seed=0, num_classes=2)
  with pytest.raises(ValueError, match="num_classes"):
    train_loader(split_of(), P, batch_size=2, seed=0, augmentation="timm")
  with pytest.raises(ValueError, match="seed"):
    train_loader(split_of(), P, batch_size=2, seed=-1)
  with pytest.raises(ValueError, match="skip"):
    train_loader(split_of(), P, batch_size=2, seed=0, bad_images="ignore")
  with pytest.raises(ValueError, match="did you mean"):
    train_loader(split_of(), P, batch_size=2, seed=0, augmentation="flipp")
  with pytest.raises(DataError, match="no image"):
    eval_loader(split_of().select([]), P, batch_size=2)


def test_batches_are_plain_arrays_that_the_caller_may_keep(folder):
  batches = take(train_loader(files(folder), P, batch_size=4, seed=0, workers=1, cache=False), 2)
  assert all(type(v) is np.ndarray and v.flags.writeable for b in batches for v in b.values())


def test_the_files_of_a_small_task_are_decoded_once(tmp_path, monkeypatch):
  for i in range(6):
    Image.fromarray(np.full((9, 7, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
  paths = tuple(str(tmp_path / f"{i}.png") for i in range(6))
  split, decoded = data.Split("train", paths, np.arange(6) % 2, files_lib.FileReader(paths)), []
  picture = files_lib.picture
  monkeypatch.setattr(files_lib, "picture", lambda path, content=None: decoded.append(path) or picture(path, content))
  kept, problems = data.read_once(split)
  pixels = [kept.read(i) for i in range(6)] + [kept.select([4]).read(0)]
  next(train_loader(kept, Preprocessing(8), batch_size=2, seed=0))
  assert sorted(decoded) == sorted(paths) and not problems and kept.hash() == split.hash()
  assert [int(p[0, 0, 0]) for p in pixels] == [0, 40, 80, 120, 160, 200, 160]


# A batch of every domain

def of_domains(sizes=(5, 9, 4), size=9):
  """Random images of three classes; domains 0, 2, 3 ... of these sizes, mixed (there need not be a domain 1)."""
  split = split_of(sum(sizes), size)
  ids = np.repeat([0, *range(2, 1 + len(sizes))], sizes)
  ids = np.random.default_rng(1).permutation(ids)
  return data.Split("train", split.keys, split.labels, split.read, ids)


def test_a_step_has_a_batch_of_every_domain_with_its_own_pixels():
  split = of_domains()
  loader = train_loader(split, P, batch_size=3, seed=0, per_domain=True)
  assert loader.rows_per_step == 9 and loader.steps_per_epoch == 2  # 18 images
  for b in take(loader, 10):
    assert b["domain"].tolist() == [0] * 3 + [2] * 3 + [3] * 3 and (b["weight"] == 1).all()
    assert {k: (v.dtype.name, v.shape) for k, v in b.items()} == {
        "image": ("uint8", (9, 12, 12, 3)), "label": ("int32", (9,)), "weight": ("float32", (9,)),
        "index": ("int32", (9,)), "domain": ("int32", (9,))}
    assert np.array_equal(b["label"], split.labels[b["index"]])
    assert np.array_equal(b["domain"], split.domains[b["index"]])
    for image, row in zip(b["image"], b["index"]):
      assert np.array_equal(image, preprocess(split.read(row), P))


def test_every_domain_is_a_stream_of_passes_each_in_a_new_order():
  """All its images before any comes again, and the small domain comes round more often."""
  split = of_domains()
  batches = take(train_loader(split, P, batch_size=3, seed=0, per_domain=True), 60)
  for domain, size in ((0, 5), (2, 9), (3, 4)):
    stream = np.concatenate([b["index"][b["domain"] == domain] for b in batches]).tolist()
    passes = [stream[i:i + size] for i in range(0, len(stream) - size + 1, size)]
    assert len(passes) == 180 // size and {tuple(sorted(p)) for p in passes} == {
        tuple(np.flatnonzero(split.domains == domain).tolist())}
    assert len({tuple(p) for p in passes}) > len(passes) / 2


def test_domains_of_one_size_are_shuffled_independently():
  batches = take(train_loader(of_domains((8, 8)), P, batch_size=8, seed=0, per_domain=True), 4)
  split = of_domains((8, 8))
  for b in batches:
    ranks = [np.searchsorted(np.flatnonzero(split.domains == d), b["index"][b["domain"] == d]).tolist() for d in (0, 2)]
    assert ranks[0] != ranks[1]


def test_seeds_differ_between_runs_of_every_domain_and_the_same_seed_repeats():
  def order(seed):
    loader = train_loader(of_domains(), P, batch_size=2, seed=seed, per_domain=True)
    return [b["index"].tolist() for b in take(loader, 4)]
  assert order(0) == order(0) and order(0) != order(1)


@pytest.mark.parametrize("stop", [1, 5])
def test_batches_of_every_domain_resume_bit_for_bit(stop):
  make = lambda: train_loader(of_domains(size=15), P, batch_size=2, seed=3, augmentation=HEAVY, num_classes=3,
                              per_domain=True)
  whole = take(make(), 9)
  interrupted = make()
  assert_same(take(interrupted, stop), whole[:stop])
  state = json.loads(json.dumps(interrupted.get_state()))
  resumed = make()
  resumed.set_state(state)
  assert_same(take(resumed, 9 - stop), whole[stop:])
  other = train_loader(of_domains(size=15), P, batch_size=2, seed=3)
  with pytest.raises(DataError, match="saved data position has per_domain True; this run has False"):
    other.set_state(state)


def test_workers_give_the_same_batches_of_every_domain():
  make = lambda workers: train_loader(of_domains(size=15), P, batch_size=2, seed=3, augmentation=HEAVY, num_classes=3,
                                      per_domain=True, workers=workers)
  parallel = make(2)
  assert_same(take(parallel, 5), take(make(0), 5))
  parallel.close()


def test_batches_of_every_domain_can_be_mixed():
  augmentation = Augmentation(mixup=1.0)
  b = take(train_loader(of_domains(), P, batch_size=3, seed=0, augmentation=augmentation, num_classes=3,
                        per_domain=True), 1)[0]
  assert b["soft_label"].shape == (9, 3) and np.allclose(b["soft_label"].sum(1), 1)
  assert b["image"].dtype == np.float32 and not np.array_equal(b["image"], b["image"].round())


def test_batches_of_every_domain_need_domains_that_are_large_enough(folder):
  with pytest.raises(DataError, match="split 'train' has no domains, and one batch of every domain is asked for"):
    train_loader(split_of(10), P, batch_size=2, seed=0, per_domain=True)
  for batch_size in (5, 0):
    with pytest.raises(DataError, match=rf"batch_size {batch_size} of every domain .* has 4 images; expected 1..4"):
      train_loader(of_domains(), P, batch_size=batch_size, seed=0, per_domain=True)
  train_loader(of_domains(), P, batch_size=4, seed=0, per_domain=True)
  split = files(folder, spoil=["a/0.jpg"])
  split = data.Split("train", split.keys, split.labels, split.read, np.arange(8) // 4)
  with pytest.raises(DataError, match=r"smallest domain \(of 'a/1.jpg'\) has 3 images"):
    train_loader(split, P, batch_size=4, seed=0, per_domain=True, bad_images="skip")
