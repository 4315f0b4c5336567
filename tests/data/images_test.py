"""Image files of every kind: what they become, and that those that cannot be read are skipped and counted."""

import io
import pickle
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from jaxpref.data import pipeline, records, samples

SIZE = 16


def quarters(height=32, width=48):
  """A picture that is another one however it is turned: red, green, blue and yellow quarters."""
  picture = np.zeros((height, width, 3), np.uint8)
  h, w = height // 2, width // 2
  picture[:h, :w], picture[:h, w:], picture[h:, :w], picture[h:, w:] = (
    (200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20)
  )  # fmt: skip
  return picture


def file_of(picture, kind, **options):
  stream = io.BytesIO()
  picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
  picture.save(stream, kind, **options)
  return stream.getvalue()


def close(found, expected, tolerance):
  found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
  assert found.shape == expected.shape
  assert np.abs(found - expected).mean() < tolerance, np.abs(found - expected).mean()


EXPECTED = records.decode(quarters(), SIZE)[0]
SECOND = Image.fromarray(255 - quarters())


@pytest.mark.parametrize(
  ("content", "tolerance"),
  [
    (file_of(quarters(), "PNG"), 0.01),
    (file_of(quarters(), "BMP"), 0.01),
    (file_of(quarters(), "TIFF"), 0.01),
    (file_of(quarters(), "JPEG", quality=95), 6),
    (file_of(quarters(), "JPEG", quality=95, progressive=True), 6),
    (file_of(quarters(), "WEBP", quality=95), 6),
    (file_of(quarters(), "GIF"), 6),
    (file_of(quarters(), "GIF", save_all=True, append_images=[SECOND, SECOND]), 6),
    (file_of(quarters(), "WEBP", save_all=True, append_images=[SECOND], lossless=True), 0.01),
    (file_of(quarters(), "PNG", save_all=True, append_images=[SECOND]), 0.01),
    (file_of(Image.fromarray(quarters()).convert("CMYK"), "JPEG", quality=95), 6),
    (file_of(Image.fromarray(quarters()).quantize(16), "PNG"), 6),
    (file_of(Image.fromarray(quarters()).convert("RGBA"), "PNG"), 0.01),
  ],
  ids="png bmp tiff jpeg progressive webp gif gif-animated webp-animated png-animated cmyk palette rgba".split(),
)
def test_every_image_format_is_decoded(content, tolerance):
  """Of an animation the first frame. What the file is called plays no part."""
  pixels, framing = records.decode(content, SIZE)
  close(pixels, EXPECTED, tolerance)
  assert framing[:2] == (32, 48)


def test_grey_of_8_and_16_bits():
  grey = np.linspace(0, 255, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint8)
  expected = np.repeat(grey[..., None], 3, axis=-1)
  np.testing.assert_array_equal(records.decode(file_of(grey, "PNG"), SIZE)[0], expected)
  wide = Image.fromarray(grey.astype(np.uint16) * 257)
  assert wide.mode == "I;16"
  for kind in ("PNG", "TIFF"):
    np.testing.assert_array_equal(records.decode(file_of(wide, kind), SIZE)[0], expected)
  of_bits = file_of(Image.fromarray(grey > 100), "PNG")
  np.testing.assert_array_equal(records.decode(of_bits, SIZE)[0] > 100, expected > 100)


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_upright(orientation):
  """By the orientations 1 to 8 of EXIF; 0 and 9 say nothing."""
  stored = {
    2: quarters()[:, ::-1],
    3: quarters()[::-1, ::-1],
    4: quarters()[::-1],
    5: quarters().transpose(1, 0, 2),
    6: np.rot90(quarters()),
    7: np.rot90(quarters(), 2).transpose(1, 0, 2),
    8: np.rot90(quarters(), -1),
  }.get(orientation, quarters())
  exif = Image.Exif()
  exif[0x0112] = orientation
  for kind, tolerance in (("JPEG", 6), ("PNG", 0.01), ("WEBP", 8)):
    content = file_of(np.ascontiguousarray(stored), kind, exif=exif)
    pixels, framing = records.decode(content, SIZE)
    close(pixels, EXPECTED, tolerance)
    assert framing == records.framing_of(32, 48, SIZE)  # the original size is that of the picture as it is seen
    assert records.open_image(content).size == (48, 32)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_not_cost_the_picture():
  content = file_of(quarters(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
  close(records.decode(content, SIZE)[0], records.decode(file_of(quarters(), "JPEG"), SIZE)[0], 6)


GREY = np.linspace(0, 255, SIZE * SIZE).reshape(SIZE, SIZE).round().astype(np.uint8)
SCALES = {
  "float": (GREY / np.float32(255), {}),
  "float up to 255": (GREY.astype(np.float32), {341: 255.0}),
  "12 bits in 16": (np.rint(GREY / 255 * 4095).astype(np.uint16), {281: 4095}),
  "16 bits": (GREY.astype(np.uint16) * 257, {}),
  "16 bits, white is 0": (65535 - GREY.astype(np.uint16) * 257, {262: 0}),
  "16 bits and its largest value": (GREY.astype(np.uint16) * 257, {281: 65000}),
  "32 bits": (GREY.astype(np.int32) * 257, {281: 65535}),
}


def tiff(values, tags):
  directory = TiffImagePlugin.ImageFileDirectory_v2()
  for number, value in tags.items():
    directory[number] = value
  if 341 in tags:
    directory.tagtype[341] = 11  # float
  return file_of(Image.fromarray(values), "TIFF", tiffinfo=directory)


@pytest.mark.parametrize("name", SCALES)
def test_deep_samples_are_scaled_by_what_the_file_declares(name):
  pixels = records.decode(tiff(*SCALES[name]), SIZE)[0]
  np.testing.assert_allclose(pixels, np.repeat(GREY[..., None], 3, axis=-1), atol=1 if "12" in name else 0)


def test_deep_samples_of_other_formats():
  wide = Image.fromarray(GREY.astype(np.uint16) * 257)
  for kind in ("PNG", "PPM", "JPEG2000"):
    np.testing.assert_array_equal(records.decode(file_of(wide, kind), SIZE)[0][..., 0], GREY)
  transparent = file_of(wide, "PNG", transparency=int(GREY[0, 5]) * 257)
  assert records.decode(transparent, SIZE)[0][0, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
  ("values", "tags", "reason"),
  [
    (GREY.astype(np.int32), {}, "its integers, from 0 to 255, are of 32 bits or have a sign; save it with 8 bits"),
    (GREY.astype(np.float32), {}, "its samples are from 0 to 255, expected 0 to 1; save it with 8 bits"),
    (GREY - np.float32(1), {341: 255.0}, "its samples are from -1 to 254, expected 0 to 255"),
    (np.full((4, 4), np.nan, np.float32), {}, "its samples are from nan to nan, expected 0 to 1"),
    (GREY.astype(np.uint16) * 16, {}, "its samples of 16 bits end at 4080, and it does not say that they have fewer"),
  ],
)
def test_samples_of_an_unknown_scale_are_skipped_and_counted(values, tags, reason, caplog):
  good = {"image_0": file_of(quarters(), "PNG"), "image_1": file_of(255 - quarters(), "PNG")}
  rows = [{"caption": f"{i}", "id": f"pair {i}", **good, "label_0": 1.0} for i in range(3)]
  rows[1]["image_0"] = tiff(values, tags)
  batches = pipeline.pair_batches(rows, batch_size=3, image_size=SIZE, tokenize=tokens, seed=0, num_threads=0)
  assert sorted(next(batches)["input_ids"][:, 0]) == [0, 2, 2]
  assert batches.num_skipped() == 1
  assert f"skipped record 'pair 1', whose image cannot be read ({reason}" in caplog.text


def test_colours_of_16_bits_that_use_12_are_unreadable():
  assert samples.with_8_bits(Image.fromarray(quarters()), "RGB;16B").getextrema() == ((20, 200),) * 3
  with pytest.raises(ValueError, match=r"its colours of 16 bits use fewer of them \(the upper 8 end at 12\)"):
    samples.with_8_bits(Image.fromarray(quarters() // 16), "RGB;16B")


def tokens(captions):
  return np.asarray([[int(caption or 0)] for caption in captions])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_8_bits_is_the_same_picture(mode):
  picture = Image.fromarray(quarters())
  expected = np.asarray(picture.convert("L" if mode in ("1", "L", "LA") else "RGB").convert("RGB")).astype(int)
  if mode == "1":
    expected = np.where(expected > 127, 255, 0)
    picture = picture.convert("L").point(lambda value: 255 * (value > 127))
  if mode in ("P", "PA"):
    picture = picture.quantize(16)
  found = np.asarray(records.open_image(file_of(picture.convert(mode), "TIFF"))).astype(int)
  assert np.abs(found - expected).max() <= 8


def test_a_pair_of_the_same_bytes_with_a_winner_is_skipped_and_a_tie_is_kept(caplog):
  one, other = file_of(quarters(), "PNG"), file_of(255 - quarters(), "PNG")
  rows = [{"caption": f"{i}", "id": f"pair {i}", "image_0": one, "image_1": other, "label_0": 1.0} for i in range(4)]
  rows[1]["image_1"] = one
  rows[3] |= {"image_1": one, "label_0": 0.5}
  batches = pipeline.pair_batches(rows, batch_size=4, image_size=SIZE, tokenize=tokens, seed=0, num_threads=0)
  assert sorted(next(batches)["input_ids"][:, 0]) == [0, 2, 2, 3]
  assert "skipped record 'pair 1', whose two images are the same file, so that neither is better" in caplog.text


def test_very_small_and_very_large_pictures():
  pixels, framing = records.decode(file_of(np.full((1, 1, 3), 77, np.uint8), "PNG"), SIZE)
  assert (pixels == 77).all() and framing == (1, 1, 0, 0, 0)
  strip = np.zeros((2, 20_000, 3), np.uint8)
  strip[:, 9_990:10_010] = 99
  pixels, framing = records.decode(file_of(strip, "PNG"), SIZE)
  assert (pixels == 99).all() and framing.width == 20_000
  broad = Image.new("L", (20_000, 1_000), 55)
  pixels, framing = records.decode(file_of(broad, "JPEG"), SIZE)
  assert (pixels == 55).all() and framing[:2] == (1_000, 20_000)
  # 400 million pixels: a few kilobytes that would take gigabytes of memory.
  with pytest.raises(records.UnreadableImage, match="400000000 pixels"), warnings.catch_warnings(action="error"):
    records.decode(header_of_png(20_000, 20_000), SIZE)


def header_of_png(width, height):
  content = bytearray(file_of(quarters(), "PNG"))
  content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
  content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
  return bytes(content)


WHOLE = {kind: file_of(quarters(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")}
BROKEN = {
  "empty": b"",
  "text": b"<html>404: not found</html>",
  "truncated PNG": WHOLE["PNG"][:60],
  "truncated JPEG": WHOLE["JPEG"][: len(WHOLE["JPEG"]) // 2],
  "truncated WebP": WHOLE["WEBP"][: len(WHOLE["WEBP"]) // 2],
  "truncated GIF": WHOLE["GIF"][:30],
  "header alone": WHOLE["JPEG"][:20],
  "JPEG with the head of a PNG": WHOLE["PNG"][:8] + WHOLE["JPEG"][8:],
  "too many pixels": header_of_png(60_000, 60_000),
  "no pixels": header_of_png(0, 5),
  "flipped bits": WHOLE["PNG"][:50] + bytes(255 - b for b in WHOLE["PNG"][50:]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_pictures_are_skipped_and_counted(name, caplog):
  images = {"image_0": file_of(quarters(), "PNG"), "image_1": file_of(255 - quarters(), "PNG")}
  rows = [{"caption": f"{i}", "id": f"pair {i}", **images, "label_0": 1.0} for i in range(8)]
  rows[3]["image_1"] = BROKEN[name]
  batches = pipeline.pair_batches(
    rows, batch_size=8, image_size=SIZE, tokenize=lambda c: np.asarray([[int(x or 0)] for x in c]), seed=0,
    num_threads=0,
  )  # fmt: skip
  for _ in range(2):
    assert sorted(next(batches)["input_ids"][:, 0]) == [0, 1, 2, 4, 4, 5, 6, 7]
  batches.close()
  assert batches.skipped == ["'pair 3'"] and batches.num_skipped() == 1
  assert caplog.text.count("skipped record 'pair 3', whose image cannot be read (") == 1
  with pytest.raises(records.UnreadableImage):
    records.open_image(BROKEN[name])


def test_a_name_that_says_another_format_is_no_matter(tmp_path):
  """Files are known by their first bytes; sources hand over bytes alone."""
  for kind, content in WHOLE.items():
    assert records.open_image(content).size == (48, 32), kind
  assert pickle.loads(pickle.dumps(records.Skip(0, "a", "b"))) == records.Skip(0, "a", "b")
