"""Image files of every kind, good and bad."""
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from transferlab.data import BadImage, decode, find_images


@pytest.fixture
def pixels():
  """A picture whose corners differ, [20, 30, 3]."""
  rng = np.random.default_rng(0)
  return np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((5, 5, 1))).astype(np.uint8)


def bad(path) -> str:
  with pytest.raises(BadImage) as error:
    decode(path)
  message = str(error.value)
  assert str(path) in message and "\n" not in message
  return message


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "PNG", "BMP"])
def test_lossless_formats_come_back_exactly(tmp_path, pixels, suffix):
  Image.fromarray(pixels).save(tmp_path / f"x.{suffix}")
  image = decode(tmp_path / f"x.{suffix}")
  assert image.dtype == np.uint8 and np.array_equal(image, pixels)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp", "gif"])
def test_lossy_formats_equal_pillow(tmp_path, pixels, suffix):
  Image.fromarray(pixels).save(tmp_path / f"x.{suffix}")
  expected = np.asarray(Image.open(tmp_path / f"x.{suffix}").convert("RGB"))
  assert np.array_equal(decode(tmp_path / f"x.{suffix}"), expected)
  assert np.abs(expected.astype(int) - pixels).mean() < 30


def test_grey_and_palette_and_bilevel(tmp_path, pixels):
  picture = Image.fromarray(pixels)
  for mode in ("L", "P", "1"):
    picture.convert(mode).save(tmp_path / "x.png")
    assert np.array_equal(decode(tmp_path / "x.png"), np.asarray(picture.convert(mode).convert("RGB")))


def test_cmyk_jpeg(tmp_path, pixels):
  Image.fromarray(pixels).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
  assert np.array_equal(decode(tmp_path / "x.jpg"), np.asarray(Image.open(tmp_path / "x.jpg").convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
  grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
  for name in ("x.png", "x.tif"):
    Image.fromarray(grey).save(tmp_path / name)
    image = decode(tmp_path / name)
    assert image.shape == (20, 30, 3) and image[0, 0, 0] == 0 and image[-1, -1, 0] == 255
    assert np.abs(image[..., 0] - grey / 257).max() <= 0.5
    assert np.array_equal(image[..., 0], image[..., 2])


def test_thirty_two_bit_pixels_are_refused(tmp_path):
  Image.fromarray(np.full((4, 4), 100_000, np.int32)).save(tmp_path / "i.tif")
  assert "expected 8 or 16 bits" in bad(tmp_path / "i.tif")
  Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
  assert "floats" in bad(tmp_path / "f.tif")


def test_transparency_shows_white(tmp_path):
  rgba = np.zeros((2, 3, 4), np.uint8)  # black, and...
  rgba[:, :, 3] = [255, 0, 128]         # opaque, invisible, half
  Image.fromarray(rgba).save(tmp_path / "x.png")
  assert decode(tmp_path / "x.png")[0, :, 0].tolist() == [0, 255, 127]
  Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
  assert decode(tmp_path / "la.png")[0, :, 0].tolist() == [0, 255, 127]
  palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.save(tmp_path / "p.png", transparency=1)
  assert decode(tmp_path / "p.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, pixels, orientation):
  # Stored so that a viewer which obeys the tag shows `pixels`.
  undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
          8: "ROTATE_270"}
  stored = Image.fromarray(pixels)
  if orientation in undo:
    stored = stored.transpose(Image.Transpose[undo[orientation]])
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored.save(tmp_path / "x.png", exif=exif)
  assert np.array_equal(decode(tmp_path / "x.png"), pixels)


def test_damaged_exif_leaves_the_pixels(tmp_path, pixels):
  Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00nonsense" * 3)
  assert decode(tmp_path / "x.jpg").shape == pixels.shape


def test_first_frame_of_an_animation(tmp_path):
  frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime")]
  frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
  assert decode(tmp_path / "x.gif")[0, 0].tolist() == [255, 0, 0]


def test_truncated_files(tmp_path):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  for suffix in ("jpg", "png", "webp", "tif", "bmp", "gif"):
    path = tmp_path / f"x.{suffix}"
    noise.save(path)
    whole = path.read_bytes()
    for part in (0.5, 0.9):
      path.write_bytes(whole[:int(len(whole) * part)])
      bad(path)


def test_a_text_file_an_empty_file_a_missing_file_and_a_folder(tmp_path):
  (tmp_path / "text.jpg").write_text("hello world, not an image")
  assert "not an image" in bad(tmp_path / "text.jpg") and "hello" in bad(tmp_path / "text.jpg")
  (tmp_path / "empty.jpg").touch()
  assert "empty" in bad(tmp_path / "empty.jpg")
  assert "no such file" in bad(tmp_path / "missing.jpg")
  (tmp_path / "folder.jpg").mkdir()
  bad(tmp_path / "folder.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on damaged TIFF tags
def test_damaged_bytes_never_raise_anything_else(tmp_path, pixels):
  rng = np.random.default_rng(1)
  for suffix in ("jpg", "png", "tif", "gif", "webp", "bmp"):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(40):
      broken = whole.copy()
      broken[rng.integers(len(whole), size=5)] = rng.integers(0, 256, 5)
      path.write_bytes(broken.tobytes())
      try:
        image = decode(path)
      except BadImage:
        continue
      assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_too_large_is_refused_before_its_pixels_are_unpacked(tmp_path, monkeypatch, pixels):
  Image.fromarray(pixels).save(tmp_path / "x.png")
  monkeypatch.setattr("transferlab.data.files.MAX_PIXELS", 599)
  assert "30x20 pixels" in bad(tmp_path / "x.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own guard, at twice this
  assert "exceeds limit" in bad(tmp_path / "x.png")


def test_a_png_with_an_oversized_text_chunk_is_bad_not_fatal(tmp_path, pixels):
  info = PngImagePlugin.PngInfo()
  info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
  Image.fromarray(pixels).save(tmp_path / "x.png", pnginfo=info)
  bad(tmp_path / "x.png")


def test_find_images_skips_what_is_none_and_survives_link_loops(tmp_path, pixels):
  top = tmp_path / "root" / "dog"
  (top / "deep").mkdir(parents=True)
  (tmp_path / "root" / "cat").mkdir()
  for name in ("dog/a.JPG", "dog/deep/b.png", "cat/c.png", "dog/.hidden.png", "dog/._d.jpg"):
    Image.fromarray(pixels).save(tmp_path / "root" / name, format="PNG")
  for name in ("Thumbs.db", ".DS_Store", "README.txt", "noext"):
    (top / name).write_text("x")
  (top / "self").symlink_to(top)
  (top / "up").symlink_to(tmp_path / "root")
  (top / "elsewhere").symlink_to(tmp_path / "other")
  (tmp_path / "other").mkdir()
  Image.fromarray(pixels).save(tmp_path / "other" / "e.png")
  names = [p.removeprefix(f"{top}/") for p in find_images(top)]
  assert names == ["a.JPG", "deep/b.png", "elsewhere/e.png"]
