"""Pictures side by side, and curves."""

import numpy as np

from jaxpref.evaluation import pictures


def test_grid_places_rows_and_columns(tmp_path):
  images = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((1, 1, 4, 5, 3), np.uint8)
  picture = pictures.grid(images, scale=2)
  assert picture.shape == (2 * (2 * 6 + 2), 2 * (3 * 7 + 2), 3)
  assert picture[2 * 8, 2 * 9, 0] == 4  # second row, second column
  pictures.picture_table(tmp_path / "a" / "b.png", {"before": images, "after": images}, ["one", "a very long " * 9])
  rows = [{"step": i, "loss": 1.0 / i} for i in range(1, 20)]
  pictures.curves(tmp_path / "curves.png", rows, ("loss", "reward"))
  assert (tmp_path / "a" / "b.png").stat().st_size > 0
  assert (tmp_path / "curves.png").stat().st_size > 0
