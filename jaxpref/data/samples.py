"""Converts pictures whose samples are not 8 bits, scaled by what the file declares, or says why that is unknown.

Pillow returns 16 bits of grey (modes I;16), 32-bit integers (I) and floats (F) unchanged, and the upper 8 bits of
colours with 16. A file declares its range by the bits of a sample, in TIFF also by MaxSampleValue. Without that, floats
are in [0, 1]. Integers of 32 bits, and 16 bits whose upper four are never used, may mean anything.
"""

import numpy as np
from PIL import Image

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT, S_MAX_SAMPLE_VALUE = 258, 262, 281, 339, 341  # TIFF tags
WHITE_IS_ZERO, UNSIGNED = 0, 1
REMEDY = "save it with 8 bits"


def raw_mode(picture: Image.Image) -> str:
  """Returns how the samples lie in the file, such as RGB;16B; known only until the picture is loaded."""
  tiles = getattr(picture, "tile", None)
  if not tiles:
    return ""
  arguments = tiles[0][3]
  return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def with_8_bits(picture: Image.Image, raw: str) -> Image.Image:
  """Returns a loaded picture with 8 bits per sample; `raw` is its `raw_mode` before loading.

  Raises:
    ValueError: it is unknown which value is white.
  """
  if picture.mode == "F" or picture.mode.startswith("I"):
    values = np.asarray(picture).astype(np.float64)
    white = _white(picture, values)
    grey = np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
    if _tag(picture, PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow leaves this to its caller
      grey = 255 - grey
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
      grey[values == transparent] = 255
    return Image.fromarray(grey)
  if ";16" in raw:
    extrema = picture.getextrema()
    colours = extrema[:1] if picture.mode in ("LA", "La") else extrema[:3]
    most = max(int(high) for _, high in colours)  # type: ignore[misc]
    if 0 < most < 16 or (_declared(picture) or 65535) < 65535:
      raise ValueError(f"its colours of 16 bits use fewer of them (the upper 8 end at {most}); {REMEDY}")
  return picture


def _white(picture: Image.Image, values: np.ndarray) -> float:
  """Returns the value that is white."""
  low, high = float(values.min()), float(values.max())
  declared = _declared(picture)
  bits, form = _tag(picture, BITS_PER_SAMPLE), _tag(picture, SAMPLE_FORMAT) or UNSIGNED
  if picture.mode == "F":
    white = declared or 1.0
  elif declared:
    white = declared
  elif picture.format == "PPM":
    white = 65535.0  # Pillow has scaled it by the file's maximum
  elif picture.mode == "I" and (bits != 16 or form != UNSIGNED):
    raise ValueError(f"its integers, from {low:g} to {high:g}, are of 32 bits or have a sign; {REMEDY}")
  else:
    white = 2.0 ** (bits or 16) - 1
    if white == 65535 and 0 < high < 4096:
      raise ValueError(f"its samples of 16 bits end at {high:g}, and it does not say that they have fewer; {REMEDY}")
  if not (np.isfinite(values).all() and low >= 0 and high <= white * 1.001):
    raise ValueError(f"its samples are from {low:g} to {high:g}, expected 0 to {white:g}; {REMEDY}")
  return white


def _tag(picture: Image.Image, number: int) -> int | float | None:
  """Returns the first value of a TIFF tag; None if there is none."""
  tags = getattr(picture, "tag_v2", None)
  value = None if tags is None else tags.get(number)
  return value[0] if isinstance(value, tuple) and value else value  # type: ignore[return-value]


def _declared(picture: Image.Image) -> float | None:
  """Returns the largest possible sample if it is 2^n - 1; another number is only the largest that occurs."""
  for number in (S_MAX_SAMPLE_VALUE, MAX_SAMPLE_VALUE):
    value = _tag(picture, number)
    if isinstance(value, int | float) and value >= 1 and np.log2(value + 1).is_integer():
      return float(value)
  return None
