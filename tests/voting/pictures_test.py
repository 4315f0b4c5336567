"""What is sent to the page is a picture and nothing else."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jaxpref.data import records
from jaxpref.voting import pictures
from tests.voting.made import png


def test_a_plain_png_is_sent_as_it_is():
  assert pictures.for_page(png(7)) == (png(7), 8, 8)


def test_what_a_file_says_of_itself_is_taken_out():
  info = PngImagePlugin.PngInfo()
  info.add_text("parameters", "a secret model, seed 42")
  with_text = png(7, pnginfo=info)
  assert b"secret" in with_text and not pictures.is_plain_png(with_text)
  found = pictures.for_page(with_text)
  assert b"secret" not in found.content and pictures.is_plain_png(found.content)
  assert (np.asarray(Image.open(io.BytesIO(found.content))) == 7).all()
  assert b"seed 42" not in pictures.for_page(png(7) + b"seed 42").content


def test_a_jpeg_is_turned_upright_and_its_exif_is_gone():
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = 6, "seed 42"
  stream = io.BytesIO()
  Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(stream, "JPEG", exif=exif)
  found = pictures.for_page(stream.getvalue())
  assert (found.width, found.height) == (4, 8) and b"seed 42" not in found.content
  assert pictures.is_plain_png(found.content)


def test_a_large_picture_is_made_smaller():
  stream = io.BytesIO()
  Image.new("RGB", (3000, 1500)).save(stream, "PNG")
  found = pictures.for_page(stream.getvalue())
  assert (found.width, found.height) == (2048, 1024)


@pytest.mark.parametrize(
  "content", [b"", b"no picture", b"<svg onload='alert(1)'/>", png(1)[:40], b"\x89PNG\r\n\x1a\n" * 9]
)
def test_what_is_no_picture_is_refused(content):
  with pytest.raises(records.UnreadableImage):
    pictures.for_page(content)
