"""Makes an image file fit for the page: upright, of a bounded size, and without anything but its pixels.

A file may say which model and seed drew it, in its metadata. A PNG of pixels alone is sent as it is; every other file
is decoded as training decodes it, and encoded again.
"""

import io
import struct
from typing import NamedTuple

from jaxpref.data import records

MAX_SIDE = 2048  # pixels; larger pictures are made smaller
PLAIN_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
  """A picture of the page: the bytes of a PNG file, its width and height in pixels."""

  content: bytes
  width: int
  height: int


def for_page(image: bytes) -> Picture:
  """Returns an image file as a PNG of pixels alone, of at most MAX_SIDE pixels a side.

  Raises:
    records.UnreadableImage: the bytes are no picture, or a damaged one.
  """
  picture = records.open_image(image)
  if is_plain_png(image) and max(picture.size) <= MAX_SIDE:
    return Picture(image, *picture.size)
  picture.thumbnail((MAX_SIDE, MAX_SIDE))
  stream = io.BytesIO()
  picture.info.clear()
  picture.save(stream, "PNG", compress_level=1)  # a fifth of the time of the usual level, for files that nobody keeps
  return Picture(stream.getvalue(), *picture.size)


def is_plain_png(image: bytes) -> bool:
  """Returns whether a file is a PNG of 8 bits and no transparency that holds nothing but pixels."""
  if not image.startswith(SIGNATURE) or len(image) < 33 or image[24] > 8 or image[25] not in (0, 2, 3):
    return False
  place = len(SIGNATURE)
  while place + 12 <= len(image):
    length, name = struct.unpack(">I4s", image[place : place + 8])
    if name not in PLAIN_CHUNKS:
      return False
    place += 12 + length
    if name == b"IEND":
      return place == len(image)
  return False
