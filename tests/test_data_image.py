"""Preprocessing: Pillow's resize, crops, normalisation; the pixels of the Hugging Face processor."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transferlab.backbones.spec import PILLOW_FILTERS, Preprocessing
from transferlab.backbones.weights.files import WeightsError
from transferlab.backbones.weights.preprocess import to_timm
from transferlab.data import normalise, preprocess
from transferlab.data.image import resize_tf1

GOLDEN = Path(__file__).resolve().parents[1] / ".." / "shared" / "golden" / "checkpoints" / "hf_vit" / "io.npz"


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("interpolation", PILLOW_FILTERS)
@pytest.mark.parametrize("shape", [(50, 70), (16, 16), (9, 300)])
def test_squash_is_pillows_resize(interpolation, shape):
  image = noise(*shape)
  expected = np.asarray(Image.fromarray(image).resize((32, 32), getattr(Image.Resampling, interpolation.upper())))
  assert np.array_equal(preprocess(image, Preprocessing(32, interpolation)), expected)


@pytest.mark.parametrize("shape, scaled", [
    ((100, 60), (60, 36)), ((60, 100), (36, 60)), ((36, 36), (36, 36)), ((10, 25), (36, 90))])
def test_centre_crop_is_resize_of_the_short_side_and_a_centred_cut(shape, scaled):
  image = noise(*shape)
  result = preprocess(image, Preprocessing(32, "bilinear", "center", 32 / 36))
  resized = np.asarray(Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BILINEAR))
  top, left = (scaled[0] - 32) // 2, (scaled[1] - 32) // 2
  assert np.array_equal(result, resized[top:top + 32, left:left + 32])


def test_centre_crop_keeps_the_centre_and_the_aspect():
  image = np.zeros((50, 200, 3), np.uint8)
  image[:, 75:125] = 255  # a square in the middle
  assert preprocess(image, Preprocessing(24, "nearest", "center")).min() == 255


def test_odd_longer_side_rounds_down_as_torchvision_does():
  image = noise(30, 45)
  resized = np.asarray(Image.fromarray(image).resize((31, 21), Image.Resampling.BICUBIC))  # 21 * 45 / 30 = 31.5
  assert np.array_equal(preprocess(image, Preprocessing(21, crop="center")), resized[:, 5:26])


def test_normalise():
  p = Preprocessing(2, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  images = noise(4, 4)[None]
  expected = (images.astype(np.float64) / 255 - np.array(p.mean)) / np.array(p.std)
  result = normalise(images, p)
  assert result.dtype == np.float32
  np.testing.assert_allclose(result, expected, atol=1e-6)
  assert normalise(np.array([[[0, 255, 127]]]), Preprocessing(1))[0, 0, :2].tolist() == [-1, 1]


@pytest.mark.skipif(not GOLDEN.is_file(), reason="goldens are not beside this checkout (../shared/golden)")
def test_equals_the_hugging_face_processor():
  golden = np.load(GOLDEN)
  p = Preprocessing(32, "bilinear")
  images = normalise(np.stack([preprocess(image, p) for image in golden["raw_uint8_nhwc"]]), p)
  np.testing.assert_allclose(images.transpose(0, 3, 1, 2), golden["images"], atol=1e-6)


def test_squash_with_a_crop_resizes_both_sides_and_cuts_the_centre():
  image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
  found = preprocess(image, Preprocessing(28, "bicubic", "squash", 0.875))
  resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(found, resized[2:30, 2:30])


# TensorFlow 1's bilinear resize

@pytest.mark.parametrize("name", ["up", "down_rect", "same"])
def test_bilinear_tf1_equals_tensorflow(golden, name):
  with np.load(golden("head2toe/06_preprocess.npz"), allow_pickle=False) as file:
    image, wanted, half_pixel = (file[f"{name}_{what}"] for what in ("in", "out48", "v2resize48"))
  p = Preprocessing(48, "bilinear_tf1")
  found = preprocess(image, p)
  assert found.dtype == p.pixels == "float32" and not np.array_equal(found, found.round())
  np.testing.assert_allclose(normalise(found, p), wanted, rtol=0, atol=1e-5)
  assert np.abs(normalise(found, p) - half_pixel).max() > 0.5
  assert np.array_equal(found, preprocess(Image.fromarray(image), p))  # as loaders take files


def test_bilinear_tf1_by_hand():
  row = np.float32([0, 90, 30])[None, :, None]
  np.testing.assert_allclose(resize_tf1(row, 1, 6)[0, :, 0], [0, 45, 90, 60, 30, 30])  # the last one has no neighbour
  np.testing.assert_allclose(resize_tf1(row, 1, 2)[0, :, 0], [0, 60])                  # at 0 and 1.5; nothing averaged
  np.testing.assert_allclose(resize_tf1(row.swapaxes(0, 1), 6, 1)[:, 0, 0], [0, 45, 90, 60, 30, 30])
  image = noise(7, 5)
  assert np.array_equal(resize_tf1(image, 7, 5), image)


def test_bilinear_tf1_is_cut_as_other_filters_are():
  image = noise(40, 90)
  found = preprocess(image, Preprocessing(28, "bilinear_tf1", "squash", 0.875))
  assert np.array_equal(found, resize_tf1(image, 32, 32)[2:30, 2:30])
  found = preprocess(noise(20, 900), Preprocessing(28, "bilinear_tf1", "center"))  # a strip
  assert found.shape == (28, 28, 3) and found.dtype == np.float32


def test_bilinear_tf1_can_be_asked_for_and_stored_but_timm_does_not_know_it():
  p = Preprocessing(24).changed("interpolation=bilinear_tf1,crop=squash")
  assert Preprocessing.from_dict(p.to_dict()) == p and "bilinear_tf1" in p.describe()
  assert Preprocessing(24).pixels == "uint8"
  with pytest.raises(WeightsError, match="timm has no interpolation 'bilinear_tf1'; expected one of nearest, "):
    to_timm(p)
  with pytest.raises(ValueError, match="interpolation 'bilinear_tf2' is unknown; expected one of nearest, "):
    p.changed("interpolation=bilinear_tf2")
