"""Each augmentation against a small independent reference or an invariant."""
import colorsys
import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from transferlab.backbones.spec import Preprocessing
from transferlab.data import PRESETS, Augmentation, normalise, preprocess
from transferlab.data.augment import (
    augment, color_jitter, crop_box, grayscale, preset, random_erasing, random_resized_crop)
from transferlab.data.mix import cut_box, cutmix, mix, mixup, smooth_one_hot
from transferlab.data.randaugment import OPERATIONS, Policy, apply_operation, parse_policy, rand_augment

P = Preprocessing(24)


def noise(height=40, width=50, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def rng(seed=0):
  return np.random.default_rng(seed)


class Never(np.random.Generator):
  """A generator that fails when drawn from."""

  def __init__(self):
    super().__init__(np.random.PCG64(0))

  def random(self, *args, **kwargs):
    raise AssertionError("drew a random number")


# Crop and flip

def test_no_augmentation_is_preprocessing_and_draws_nothing():
  assert np.array_equal(augment(noise(), Augmentation(), P, Never()), preprocess(noise(), P))
  assert augment(noise(24, 24), Augmentation(), P, Never(), resized=True).shape == (24, 24, 3)


def test_flip_is_a_mirror_half_of_the_time():
  plain = preprocess(noise(), P)
  results = [augment(noise(), PRESETS["flip"], P, rng(seed)) for seed in range(200)]
  mirrored = [np.array_equal(r, plain[:, ::-1]) for r in results]
  assert all(m or np.array_equal(r, plain) for m, r in zip(mirrored, results)) and 70 < sum(mirrored) < 130


@pytest.mark.parametrize("shape", [(40, 50), (300, 20), (7, 400), (1, 1)])
def test_crop_boxes_lie_inside_and_have_the_asked_area_and_aspect(shape):
  generator, fits, areas, aspects = rng(), 0, [], []
  for _ in range(2000):
    top, left, h, w = crop_box(*shape, generator, (0.08, 1.0), (3 / 4, 4 / 3))
    assert 0 <= top <= top + h <= shape[0] and 0 <= left <= left + w <= shape[1] and h > 0 and w > 0
    areas.append(h * w / (shape[0] * shape[1]))
    aspects.append(w / h)
    fits += 1
  if shape == (40, 50):
    assert min(areas) > 0.07 and max(areas) <= 1 and 0.70 < min(aspects) and max(aspects) < 1.42
    assert 0.42 < np.mean(areas) < 0.53  # uniform area; the largest boxes are rejected more often
    assert abs(np.mean(np.log(aspects))) < 0.04


def test_crop_of_an_image_that_no_box_fits_is_central():
  assert crop_box(20, 400, rng(), (0.9, 1.0), (1.0, 1.0)) == (0, 190, 20, 20)
  assert crop_box(400, 20, rng(), (0.9, 1.0), (1.0, 1.0)) == (190, 0, 20, 20)


def test_random_resized_crop_is_pillows_crop_and_resize():
  image = noise()
  top, left, h, w = crop_box(40, 50, rng(3), (0.08, 1.0), (3 / 4, 4 / 3))
  expected = Image.fromarray(image).crop((left, top, left + w, top + h)).resize((24, 24), Image.Resampling.BICUBIC)
  assert np.array_equal(random_resized_crop(image, 24, rng(3)), np.asarray(expected))
  bilinear = random_resized_crop(image, 24, rng(3), interpolation="bilinear")
  assert not np.array_equal(bilinear, np.asarray(expected))


def test_the_whole_image_at_scale_one():
  image = noise(30, 30)
  assert np.array_equal(random_resized_crop(image, 24, rng(), (1.0, 1.0), (1.0, 1.0)), preprocess(image, P))


# Colour

@pytest.mark.parametrize("position, enhancer", enumerate([
    ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]))
def test_color_jitter_of_one_property_is_pillows(position, enhancer):
  strengths = [0.0] * 4
  strengths[position] = 0.3
  generator = rng(5)
  generator.permutation(4)
  factor = generator.uniform(0.7, 1.3)
  expected = np.asarray(enhancer(Image.fromarray(noise())).enhance(factor))
  assert np.array_equal(color_jitter(noise(), rng(5), *strengths), expected) and not np.array_equal(expected, noise())


def test_hue_turns_colours_and_keeps_grey_and_value():
  image = noise()
  jittered = color_jitter(image, rng(2), 0, 0, 0, 0.5)
  assert np.abs(jittered.max(2).astype(int) - image.max(2)).max() <= 1  # V of HSV
  generator = rng(2)
  generator.permutation(4)
  turn = generator.uniform(-0.5, 0.5)
  for (r, g, b), found in zip(image[0], jittered[0]):
    h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    expected = 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
    assert np.abs(expected - found).max() < 12  # Pillow keeps hue and saturation in 8 bits
  grey = np.repeat(image[..., :1], 3, axis=2)
  assert np.array_equal(color_jitter(grey, rng(), 0, 0, 0, 0.5), grey)


def test_jitter_stays_in_range_and_order_is_random():
  orders = {color_jitter(noise(), rng(s), 0.3, 0.3, 0.3, 0.3).tobytes() for s in range(10)}
  assert len(orders) == 10


def test_grayscale_is_luma():
  image = noise()
  grey = grayscale(image)
  assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 0], grey[..., 2])
  assert np.abs(grey[..., 0] - image @ np.array([0.299, 0.587, 0.114])).max() <= 1
  always = dataclasses.replace(Augmentation(), grayscale=1.0)
  assert np.array_equal(augment(noise(24, 24), always, P, rng()), grayscale(noise(24, 24)))


# RandAugment

def test_policy_strings():
  assert parse_policy("rand-m9-mstd0.5-inc1") == Policy(9, 2, 0.5)
  assert parse_policy("rand-m5-n3-inc1") == Policy(5, 3, 0)
  for wrong in ("rand-m9", "rand-m9-inc0", "augmix-m3-inc1", "rand-m9-x2-inc1", "rand-inc1", "rand-m20-inc1",
                "rand-m9-mstd-inc1"):
    with pytest.raises(ValueError, match="rand"):
      parse_policy(wrong)


def operation(name, level, seed=0, image=None, fill=(1, 2, 3)):
  picture = Image.fromarray(noise() if image is None else image)
  return np.asarray(apply_operation(picture, name, level, rng(seed), fill, Image.Resampling.BICUBIC))


def test_there_are_fifteen_operations():
  assert len(OPERATIONS) == len(set(OPERATIONS)) == 15


@pytest.mark.parametrize("name, reference", [
    ("auto_contrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize), ("invert", ImageOps.invert)])
def test_operations_without_a_level(name, reference):
  assert np.array_equal(operation(name, 3), np.asarray(reference(Image.fromarray(noise()))))


@pytest.mark.parametrize("level, bits", [(0, 4), (2, 4), (2.6, 3), (9, 1), (10, 0)])
def test_posterize_keeps_fewer_bits_as_the_level_rises(level, bits):
  mask = 0xFF & ~(2**(8 - bits) - 1)
  assert np.array_equal(operation("posterize", level), noise() & mask)


@pytest.mark.parametrize("level, threshold", [(0, 256), (5, 128), (9, 26), (10, 0)])
def test_solarize_inverts_more_as_the_level_rises(level, threshold):
  image = noise()
  assert np.array_equal(operation("solarize", level), np.where(image < threshold, image, 255 - image))


def test_solarize_add_brightens_the_dark_half():
  image = noise().astype(int)
  assert np.array_equal(operation("solarize_add", 9), np.where(image < 128, np.minimum(255, image + 99), image))


@pytest.mark.parametrize("name, enhancer", [
    ("color", ImageEnhance.Color), ("contrast", ImageEnhance.Contrast), ("brightness", ImageEnhance.Brightness),
    ("sharpness", ImageEnhance.Sharpness)])
def test_enhancers_go_both_ways_from_one(name, enhancer):
  found = {operation(name, 9, seed).tobytes() for seed in range(10)}
  picture = Image.fromarray(noise())
  assert found == {np.asarray(enhancer(picture).enhance(f)).tobytes() for f in (1 + 0.9 * 0.9, 1 - 0.9 * 0.9)}
  assert operation(name, 0).tobytes() == noise().tobytes()


def test_geometry_moves_by_the_level_and_fills():
  image = noise(40, 50)
  shifted = operation("translate_x", 10 / 0.45 * 0.1)  # 10 % of 50 pixels are 5
  right = np.array_equal(shifted[:, 5:], image[:, :-5]) and (shifted[:, :5] == (1, 2, 3)).all()
  left = np.array_equal(shifted[:, :-5], image[:, 5:]) and (shifted[:, -5:] == (1, 2, 3)).all()
  assert right or left
  shifted = operation("translate_y", 10 / 0.45 * 0.1)
  assert np.array_equal(shifted[4:], image[:-4]) or np.array_equal(shifted[:-4], image[4:])
  for name in ("shear_x", "shear_y", "rotate", "translate_x", "translate_y"):
    assert len({operation(name, 9, seed).tobytes() for seed in range(8)}) == 2, name  # the two signs
    assert operation(name, 0).tobytes() == image.tobytes()
  turned = {np.asarray(Image.fromarray(image).rotate(a, Image.Resampling.BICUBIC, fillcolor=(1, 2, 3))).tobytes()
            for a in (-27, 27)}
  assert {operation("rotate", 9, seed).tobytes() for seed in range(8)} == turned
  # A shear of 0.3 at level 10 moves the last of 40 rows by 0.3 * 39.5 pixels.
  line = np.zeros((40, 50, 3), np.uint8)
  line[:, 24:26] = 255
  columns = operation("shear_x", 10, image=line, fill=(0, 0, 0))[..., 0] @ np.arange(50) / 510
  assert abs(abs(columns[39] - columns[0]) - 0.3 * 39) < 0.5


def test_rand_augment_is_deterministic_changes_images_and_draws_every_operation(monkeypatch):
  policy = parse_policy("rand-m9-mstd0.5-inc1")
  results = [rand_augment(noise(), policy, rng(seed)) for seed in range(40)]
  assert all(np.array_equal(r, rand_augment(noise(), policy, rng(s))) for s, r in enumerate(results))
  unchanged = sum(np.array_equal(r, noise()) for r in results)
  assert 2 <= unchanged <= 20  # each of two layers is skipped half of the time
  drawn, levels = [], []
  monkeypatch.setattr("transferlab.data.randaugment.apply_operation",
                      lambda picture, name, level, *rest: (drawn.append(name), levels.append(level), picture)[-1])
  generator = rng()
  for _ in range(1500):
    rand_augment(noise(4, 4), policy, generator)
  share = np.array([drawn.count(name) for name in OPERATIONS]) / len(drawn)
  assert abs(len(drawn) / 1500 - 1) < 0.08 and share.min() > 0.045 and share.max() < 0.09
  assert abs(np.mean(levels) - 9) < 0.05 and 0.4 < np.std(levels) < 0.55 and max(levels) <= 10


# Erasing

def test_erasing_is_standard_normal_after_normalisation_and_covers_the_asked_area():
  p = Preprocessing(64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  image = np.full((64, 64, 3), -1000, np.float32)
  values, areas, generator = [], [], rng()
  for _ in range(300):
    erased = random_erasing(image, generator, p)
    where = (erased != -1000).all(axis=2)
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    if len(rows):
      assert where[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()  # one box
      h, w = len(rows), len(columns)
      assert 0.25 < h / w < 4
      areas.append(h * w / 64**2)
      values.append(normalise(erased, p)[where])
  assert (image == -1000).all() and len(areas) > 290
  assert 0.015 < min(areas) and max(areas) < 0.35 and abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.02
  values = np.concatenate(values)
  assert np.abs(values.mean(0)).max() < 0.01 and np.abs(values.std(0) - 1).max() < 0.01


def test_erasing_happens_with_its_probability():
  a = Augmentation(random_erasing=0.25)
  plain = preprocess(noise(), P).astype(np.float32)
  erased = sum(not np.array_equal(augment(noise(), a, P, rng(seed)), plain) for seed in range(400))
  assert 70 < erased < 130


# Mixing

def test_smoothed_labels():
  soft = smooth_one_hot(np.array([2, 0]), 4, 0.1)
  np.testing.assert_allclose(soft, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], rtol=1e-6)
  assert np.array_equal(smooth_one_hot(np.array([1]), 2), [[0, 1]])


def test_mixup_by_hand():
  values = np.array([[0.0], [10.0], [4.0], [20.0]], np.float32)
  np.testing.assert_allclose(mixup(values, 0.75), [[5], [8.5], [5.5], [15]])


def test_cutmix_lambda_is_the_area_that_stays():
  images = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None, None, None], (5, 20, 30, 3))
  generator = rng()
  for _ in range(100):
    mixed, lam = cutmix(images, float(generator.uniform()), generator)
    for i in (0, 1, 3, 4):
      assert (mixed[i] == i).mean() == pytest.approx(lam) and set(np.unique(mixed[i])) <= {i, 4 - i}
    assert (mixed[2] == 2).all()


def test_cut_boxes_without_the_border_have_one_minus_lambda_of_the_area():
  for seed in range(50):
    top, bottom, left, right = cut_box(100, 100, 0.75, rng(seed))
    assert 0 <= top < bottom <= 100 and 0 <= left < right <= 100
    if 25 <= top and bottom <= 75 and 25 <= left and right <= 75:
      assert (bottom - top) * (right - left) == 2500


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixed_labels_follow_the_pixels_and_sum_to_one(alphas):
  images = np.broadcast_to(np.array([0, 1, 2, 3], np.float32)[:, None, None, None], (4, 16, 16, 3)).copy()
  kinds = set()
  for seed in range(60):
    mixed, soft = mix(images, smooth_one_hot(np.arange(4), 4), rng(seed), *alphas)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), soft @ np.arange(4), atol=1e-5)  # lambda of pixels = of labels
    kinds.add("cut" if len(np.unique(mixed[0])) == 2 else "up")
  assert kinds >= ({"cut", "up"} if all(alphas) else {"cut"} if alphas[1] else {"up"})
  assert mix(images, images, rng(), 0, 0)[0] is images


# The dataclass

def test_presets_are_the_papers():
  assert list(PRESETS) == ["none", "flip", "crop_flip", "fewshot", "domainbed", "timm"]
  assert PRESETS["none"] == Augmentation()
  assert PRESETS["domainbed"].scale == (0.7, 1.0) and PRESETS["domainbed"].color_jitter == (0.3,) * 4
  assert not PRESETS["fewshot"].floats and not PRESETS["fewshot"].soft_labels
  assert PRESETS["timm"].floats and PRESETS["timm"].soft_labels
  for a in PRESETS.values():
    image = augment(noise(), a, P, rng())
    assert image.shape == (24, 24, 3) and image.dtype == (np.float32 if a.floats else np.uint8)
  with pytest.raises(ValueError, match="did you mean 'fewshot'"):
    preset("few_shot")


@pytest.mark.parametrize("wrong", [
    {"grayscale": 1.5}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 2.0)}, {"color_jitter": (0.3, 0.3, 0.3)},
    {"mixup": -1.0}, {"color_jitter": (0, 0, 0, 0.6)}, {"randaugment": "rand"}, {"crop_interpolation": "cubic"},
    {"label_smoothing": 2}])
def test_wrong_settings_are_refused(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    Augmentation(**wrong)
