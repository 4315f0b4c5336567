"""Draws what people look at: grids of pictures, and curves."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GAP = 2  # white pixels between pictures, before enlargement


def grid(images: np.ndarray, *, scale: int = 2) -> np.ndarray:
  """Tiles u8[rows, columns, H, W, 3] into one picture u8, enlarged by whole pixels."""
  rows, columns, height, width, _ = images.shape
  canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
  for r in range(rows):
    for c in range(columns):
      y, x = GAP + r * (height + GAP), GAP + c * (width + GAP)
      canvas[y : y + height, x : x + width] = images[r, c]
  return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def cut(picture: np.ndarray, *, columns: int, side: int, scale: int) -> np.ndarray:
  """Returns the tiles u8[rows, columns, side, side, 3] from which `grid` made a picture."""
  small = picture[::scale, ::scale]
  pitch = side + GAP
  rows = (small.shape[0] - GAP) // pitch
  starts = [[(GAP + r * pitch, GAP + c * pitch) for c in range(columns)] for r in range(rows)]
  return np.array([[small[y : y + side, x : x + side] for y, x in row] for row in starts])


def save_image(path: pathlib.Path, image: np.ndarray) -> None:
  """Writes u8[H, W, 3] as a PNG file."""
  from PIL import Image

  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def picture_table(path: pathlib.Path, columns: Mapping[str, np.ndarray], captions: Sequence[str]) -> None:
  """Writes a PNG file with one row per prompt: its caption, then each model's pictures of it, side by side.

  Args:
    columns: title -> u8[P, S, H, W, 3]; with the same prompts, and the same seeds if models are compared.
    captions: captions of the P prompts.
  """
  from PIL import Image, ImageDraw

  first = next(iter(columns.values()))
  scale = max(1, 64 // first.shape[2])
  grids = [grid(x, scale=scale) for x in columns.values()]
  text_width, header, gap = 190, 22 if any(columns) else 0, 24
  width = text_width + sum(g.shape[1] for g in grids) + gap * (len(grids) - 1)
  canvas = Image.new("RGB", (width, header + grids[0].shape[0]), "white")
  draw = ImageDraw.Draw(canvas)
  left = text_width
  for title, picture in zip(columns, grids, strict=True):
    canvas.paste(Image.fromarray(picture), (left, header))
    draw.text((left + 4, 6), title, fill="black")
    left += picture.shape[1] + gap
  row = (first.shape[2] + GAP) * scale
  for i, caption in enumerate(captions):
    words = caption if len(caption) < 30 else caption[:28] + "..."
    draw.text((6, header + GAP * scale + i * row + row // 2 - 8), words, fill="black")
  path.parent.mkdir(parents=True, exist_ok=True)
  canvas.save(path)


def curves(path: pathlib.Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
  """Plots the named metrics of metrics.jsonl rows against the step, with a panel for each that exists."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  present = [n for n in names if sum(n in r for r in rows) > 1]
  if not present:
    return
  columns = min(len(present), 5)
  rows_of_panels = -(-len(present) // columns)
  figure, axes = plt.subplots(
    rows_of_panels, columns, figsize=(3.2 * columns, 2.6 * rows_of_panels), squeeze=False, layout="constrained"
  )
  for axis in axes.flat[len(present) :]:
    axis.remove()
  for axis, name in zip(axes.flat, present, strict=False):
    points = [(r["step"], r[name]) for r in rows if name in r]
    steps, values = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    if len(values) < 24:
      axis.plot(steps, values, color="C0", marker=".")
    else:
      axis.plot(steps, values, color="0.8", linewidth=0.8)
      window = max(1, len(values) // 12)
      smooth = np.convolve(values, np.ones(window) / window, mode="valid")
      axis.plot(steps[window - 1 :], smooth, color="C0")
    axis.set_title(name.replace("_", " "), fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=7)
  figure.savefig(path, dpi=120)
  plt.close(figure)
