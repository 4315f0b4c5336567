"""Batches: order, sharding, resuming, randomness by record, and what happens to bad records."""

import io
import json
import logging
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from jaxpref.data import batching, emoji, pipeline, records

SIZE = 8


def tokenize(captions):
  """i32[n, 4] from which the caption's number can be read; the empty caption is all 0."""
  return np.array([[int(c.split()[-1]) + 1] * 4 if c else [0] * 4 for c in captions], np.int32)


def png(value, size=SIZE):
  """An image file: left half dark, right half of the given brightness."""
  pixels = np.zeros((size, size, 3), np.uint8)
  pixels[:, size // 2 :] = value
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def pairs(n, labels=(1.0, 0.0, 0.5)):
  return [
    {
      "id": f"pair-{i}",
      "caption": f"caption {i}",
      "image_0": png(10 + i),
      "image_1": png(120 + i),
      "label_0": labels[i % len(labels)],
      "num_example_per_prompt": 1 + i % 2,
    }
    for i in range(n)
  ]


def open_pairs(source, **changes):
  settings = dict(batch_size=4, image_size=SIZE, tokenize=tokenize, seed=3) | changes
  return pipeline.pair_batches(source, **settings)


def numbers(batch):
  return (batch["input_ids"][:, 0] - 1).tolist()


def take(batches, n):
  return [next(batches) for _ in range(n)]


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_pair_batch_holds_what_the_records_say():
  source = pairs(12)
  batch = next(open_pairs(source))
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "record": ((4,), "int32"),
    "input_ids": ((4, 4), "int32"),
    "pixels_0": ((4, SIZE, SIZE, 3), "uint8"),
    "pixels_1": ((4, SIZE, SIZE, 3), "uint8"),
    "sizes_0": ((4, 6), "float32"),
    "sizes_1": ((4, 6), "float32"),
    "label_0": ((4,), "float32"),
    "num_example_per_prompt": ((4,), "int32"),
    "weight": ((4,), "float32"),
  }
  for row, i in enumerate(numbers(batch)):
    assert batch["record"][row] == i
    assert batch["label_0"][row] == source[i]["label_0"]
    assert batch["num_example_per_prompt"][row] == source[i]["num_example_per_prompt"]
    assert batch["weight"][row] == 1 / source[i]["num_example_per_prompt"]
    np.testing.assert_allclose(batch["pixels_0"][row, 0, -1], 10 + i)
    np.testing.assert_allclose(batch["pixels_1"][row, 0, -1], 120 + i)
    np.testing.assert_array_equal(batch["pixels_0"][row, 0, 0], 0)
    for key in ("sizes_0", "sizes_1"):
      np.testing.assert_array_equal(batch[key][row], [SIZE, SIZE, 0, 0, SIZE, SIZE])


def test_every_record_comes_exactly_once_an_epoch_in_a_new_order():
  batches = open_pairs(pairs(10), batch_size=4)
  stream = [i for batch in take(batches, 10) for i in numbers(batch)]  # Batches straddle epochs.
  epochs = [stream[k : k + 10] for k in range(0, 40, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_and_contents_depend_on_the_seed_alone():
  settings = dict(caption_dropout=0.5, flip=True)
  a, b = (take(open_pairs(pairs(12), num_threads=n, **settings), 9) for n in (0, 3))
  for x, y in zip(a, b, strict=True):
    assert_same(x, y)
  c = take(open_pairs(pairs(12), seed=4), 3)
  d = take(open_pairs(pairs(12)), 3)
  assert [numbers(x) for x in c] != [numbers(x) for x in d]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_batches_of_a_single_one(processes):
  settings = dict(batch_size=6, caption_dropout=0.3, flip=True)
  whole = take(open_pairs(pairs(15), **settings), 7)
  parts = [
    take(open_pairs(pairs(15), process_index=p, process_count=processes, **settings), 7) for p in range(processes)
  ]
  for i, batch in enumerate(whole):
    assert_same(batch, {k: np.concatenate([part[i][k] for part in parts]) for k in batch})


def test_resuming_continues_exactly_even_with_other_processes():
  settings = dict(batch_size=6, caption_dropout=0.3, flip=True)
  batches = open_pairs(pairs(15), **settings)
  take(batches, 4)
  state = json.loads(json.dumps(batches.get_state()))
  rest = take(batches, 5)
  resumed = open_pairs(pairs(15), **settings)
  take(resumed, 2)  # What was prefetched before set_state must not show.
  resumed.set_state(state)
  for x, y in zip(rest, take(resumed, 5), strict=True):
    assert_same(x, y)
  second = open_pairs(pairs(15), process_index=1, process_count=2, **settings)
  second.set_state(state)
  for x, y in zip(rest, take(second, 5), strict=True):
    assert_same({k: v[3:] for k, v in x.items()}, y)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_all_processes_together_see_each_record_once_an_epoch(processes):
  """Epochs of 31 end inside of batches of 12, and inside of the parts of them that processes have."""
  prompts = [f"prompt {i}" for i in range(31)]
  settings = dict(batch_size=12, tokenize=tokenize, seed=5, process_count=processes)
  opened = [pipeline.prompt_batches(prompts, process_index=p, **settings) for p in range(processes)]
  stream = [i for _ in range(31) for part in opened for i in next(part)["record"].tolist()]
  assert len(stream) == 12 * 31
  for start in range(0, len(stream), 31):
    assert sorted(stream[start : start + 31]) == list(range(31))


@pytest.mark.parametrize("seed", range(5))
def test_no_record_is_lost_or_repeated_by_kills_and_other_numbers_of_processes(seed):
  """Killed at random batches, after random further ones that were not saved, resumed by random numbers of processes."""
  rng = np.random.default_rng(seed)
  num_records = int(rng.integers(12, 60))
  prompts = [f"prompt {i}" for i in range(num_records)]
  state, stream = None, []
  while len(stream) < 4 * num_records:
    processes = int(rng.choice([1, 2, 3, 4, 6, 12]))
    settings = dict(batch_size=12, tokenize=tokenize, seed=seed, process_count=processes)
    opened = [pipeline.prompt_batches(prompts, process_index=p, **settings) for p in range(processes)]
    for part in opened:
      if state is not None:
        part.set_state(json.loads(state))
    for _ in range(int(rng.integers(0, 4))):
      stream += [i for part in opened for i in next(part)["record"].tolist()]
    states = {json.dumps(part.get_state()) for part in opened}
    assert len(states) == 1  # any process may save it
    state = states.pop()
    for part in opened:
      take(part, int(rng.integers(0, 3)))  # trained on, or prefetched, and not saved
      part.close()
  for start in range(0, 4 * num_records, num_records):
    assert sorted(stream[start : start + num_records]) == list(range(num_records))


def test_a_state_of_other_data_is_refused():
  state = open_pairs(pairs(15)).get_state()
  with pytest.raises(ValueError, match="is for batch_size = 4, and this run has 5"):
    open_pairs(pairs(15), batch_size=5).set_state(state)
  with pytest.raises(ValueError, match="is for num_records = 15, and this run has 12"):
    open_pairs(pairs(12)).set_state(state)
  with pytest.raises(ValueError, match="is for seed = 3, and this run has 5"):
    open_pairs(pairs(15), seed=5).set_state(state)


def test_captions_are_dropped_at_the_given_rate_and_anew_each_epoch():
  batches = open_pairs(pairs(100), batch_size=100, caption_dropout=0.2)
  dropped = np.stack([batch["input_ids"][:, 0] == 0 for batch in take(batches, 20)])
  assert abs(dropped.mean() - 0.2) < 0.04
  assert not (open_pairs(pairs(8)).__next__()["input_ids"] == 0).any()
  kept = [set(numbers(b)) - {-1} for b in take(open_pairs(pairs(100), batch_size=100, caption_dropout=0.2), 2)]
  assert kept[0] != kept[1]


def test_both_images_of_a_pair_are_mirrored_together():
  flips = []
  for batch in take(open_pairs(pairs(20), batch_size=20, flip=True), 5):
    first = batch["pixels_0"][:, 0, 0, 0] > 0
    np.testing.assert_array_equal(first, batch["pixels_1"][:, 0, 0, 0] > 0)
    flips.append(first)
  assert 0.3 < np.mean(flips) < 0.7


def test_ties_are_dropped_on_request():
  batches = open_pairs(pairs(12), drop_ties=True)
  assert batches.num_records == 8
  stream = take(batches, 2)
  assert sorted(sum((numbers(b) for b in stream), [])) == [0, 1, 3, 4, 6, 7, 9, 10]
  labels = [r["label_0"] for r in pairs(12)]
  for x, y in zip(stream, take(open_pairs(pairs(12), drop_ties=True, labels=labels), 2), strict=True):
    assert_same(x, y)


class Counted:
  """Any number of pairs, made when they are asked for; remembers which were."""

  def __init__(self, num_records):
    self.num_records, self.asked = num_records, []

  def __len__(self):
    return self.num_records

  def __getitem__(self, i):
    self.asked.append(i)
    image = np.full((SIZE, SIZE, 3), i % 251, np.uint8)
    return {"caption": f"caption {i}", "image_0": image, "image_1": image, "label_0": "never looked at"}


def test_a_million_records_are_opened_without_reading_one():
  size = 1_000_000
  source = Counted(size)
  kept = np.flatnonzero(np.arange(size) % 10 != 3)
  labels, weights = np.full(len(kept), 0.75, np.float32), np.full(len(kept), 0.5, np.float32)
  tracemalloc.start()
  started = time.perf_counter()
  batches = open_pairs(source, batch_size=8, kept=kept, labels=labels, weights=weights, num_threads=0, drop_ties=True)
  seconds = time.perf_counter() - started
  assert source.asked == [] and batches.num_records == 900_000
  batch = next(batches)
  assert seconds < 2 and tracemalloc.get_traced_memory()[1] < 40e6  # three arrays of 16 bytes a record, and their masks
  tracemalloc.stop()
  assert sorted(source.asked) == sorted(numbers(batch)) and len(source.asked) == 8
  assert all(i % 10 != 3 for i in source.asked)
  np.testing.assert_array_equal(batch["label_0"], 0.75)
  np.testing.assert_array_equal(batch["weight"], 0.5)
  np.testing.assert_array_equal(batch["num_example_per_prompt"], 1)


def test_labels_come_from_the_index_of_a_source():
  source = Counted(20)
  label = np.linspace(0, 1, 21, dtype=np.float32)[:20]
  source.index = types.SimpleNamespace(label_0=label)
  for kept in (None, np.arange(5, 20)):
    batches = open_pairs(source, batch_size=5, kept=kept, num_threads=0, drop_ties=True)
    assert source.asked == [] and batches.num_records == (19 if kept is None else 14)  # without the tie, number 10
    for batch in take(batches, 3):
      np.testing.assert_array_equal(batch["label_0"], label[numbers(batch)])
    assert set(source.asked) <= set(range(20)) - {10}
    source.asked.clear()


def test_a_label_belongs_to_the_record_that_takes_a_place():
  source = pairs(12)
  source[5]["image_0"] = b"broken"
  labels, weights = np.arange(12) / 20, np.arange(12) / 7
  settings = dict(batch_size=11, kept=np.arange(1, 12), labels=labels[1:], weights=weights[1:])
  for batch in take(open_pairs(source, **settings), 3):
    np.testing.assert_allclose(batch["label_0"], labels[numbers(batch)], rtol=1e-6)
    np.testing.assert_allclose(batch["weight"], weights[numbers(batch)], rtol=1e-6)
    assert sorted(numbers(batch)) == [1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]


def test_a_selection_that_does_not_fit_is_an_error():
  with pytest.raises(ValueError, match="labels has 2 values for a source of 8 records"):
    open_pairs(pairs(8), labels=[1.0, 0.0])
  with pytest.raises(ValueError, match="weights has 8 values for a source of 4 records"):
    open_pairs(pairs(8), kept=range(4), weights=np.ones(8))
  with pytest.raises(ValueError, match="the label of record 6 is 1.5; expected a number from 0 to 1"):
    open_pairs(pairs(8), kept=[5, 6, 7, 1], labels=[0, 1.5, 1, 1])
  with pytest.raises(ValueError, match="expected places in a source of 8 records"):
    open_pairs(pairs(8), kept=[5, 6, 7, 8])


def test_captions_are_tokenized_when_they_are_needed_and_a_limited_number_is_remembered(monkeypatch):
  monkeypatch.setattr(batching, "CAPTIONS_KEPT", 20)
  seen = []

  def tokenize_and_note(captions):
    seen.extend(captions)
    return tokenize(captions)

  batches = open_pairs(pairs(16), tokenize=tokenize_and_note)
  assert seen == [""]
  take(batches, 20)
  assert sorted(seen) == sorted(["", *(f"caption {i}" for i in range(16))])
  seen.clear()
  batches = open_pairs(pairs(40), tokenize=tokenize_and_note, batch_size=30)
  for batch in take(batches, 8):
    for row, i in enumerate(numbers(batch)):
      assert batch["pixels_0"][row, 0, -1, 0] == 10 + i
  assert len(seen) > 80 and len(batches._ids["input_ids"]._ids) == 20


@pytest.mark.parametrize("num_threads", [0, 2])
def test_single_rows_can_be_made_in_any_order(num_threads):
  batches = open_pairs(pairs(12), flip=True, caption_dropout=0.5)
  expected = take(open_pairs(pairs(12), flip=True, caption_dropout=0.5), 2)
  first = next(batches)
  rows = list(batches.rows([7, 2, 7], num_threads=num_threads))
  mirrored = list(batches.rows([7], flipped=True))[0]
  assert [row["input_ids"].tolist() for row in rows] == [[8] * 4, [3] * 4, [8] * 4]
  assert rows[0].keys() == first.keys() and rows[0]["pixels_1"][0, -1, 0] == 127
  assert_same(rows[0], rows[2])
  np.testing.assert_array_equal(mirrored["pixels_1"], rows[0]["pixels_1"][:, ::-1])
  assert_same(first, expected[0])
  assert_same(next(batches), expected[1])  # the iterator stays where it was


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "shape"])
def test_an_unreadable_image_is_skipped_counted_and_named(damage, caplog):
  source = pairs(12)
  source[5]["id"] = damage
  whole = png(77, size=64)
  source[5]["image_1"] = {
    "truncated": whole[: len(whole) // 2],
    "garbage": b"not an image",
    "empty": b"",
    "shape": np.zeros((8, 8), np.uint8),
  }[damage]
  batches = open_pairs(source, num_threads=0)
  with caplog.at_level(logging.WARNING):
    stream = [i for batch in take(batches, 6) for i in numbers(batch)]
  assert 5 not in stream and len(stream) == 24 and set(stream) == set(range(12)) - {5}
  assert stream.count(6) == 4  # The next record takes its place.
  assert batches.skipped == [repr(damage)]
  assert batches.num_skipped() == 1
  warnings = [r.getMessage() for r in caplog.records if f"record {damage!r}" in r.getMessage()]
  assert len(warnings) == 1
  assert warnings[0].startswith(f"skipped record {damage!r}, whose image cannot be read (")
  assert warnings[0].endswith("; 1 of 12 records skipped so far")
  # Neither threads nor processes change which rows a batch holds.
  settings = dict(process_count=2, num_threads=2)
  parts = [take(open_pairs(source, process_index=p, **settings), 6) for p in range(2)]
  again = [i for a, b in zip(*parts, strict=True) for i in numbers(a) + numbers(b)]
  assert again == stream


def test_a_source_without_a_readable_image_is_an_error():
  source = [r | {"image_0": b"broken"} for r in pairs(12)]
  with pytest.raises(ValueError, match="none of 12 records in a row has readable images .*; check that"):
    next(open_pairs(source))


@pytest.mark.parametrize("label", [2.0, -1, 0.4, float("nan"), None, "left"])
def test_an_unknown_label_is_an_error_that_names_the_record(label):
  source = pairs(8)
  source[6]["label_0"] = label
  with pytest.raises(ValueError, match="record 'pair-6' has label_0 = .*; expected 1 .*0 .*0.5 .*correct or remove"):
    open_pairs(source)


def test_missing_fields_and_sizes_that_do_not_fit_are_errors():
  with pytest.raises(ValueError, match="record 'pair-0' has no field 'caption', only id, image_0"):
    open_pairs([{k: v for k, v in r.items() if k != "caption"} for r in pairs(8)])
  with pytest.raises(ValueError, match="record 'pair-.' has no field 'image_1', only"):
    next(open_pairs([{k: v for k, v in r.items() if k != "image_1"} for r in pairs(8)]))
  with pytest.raises(ValueError, match="has 3 usable records, fewer than the batch_size of 4"):
    open_pairs(pairs(3))
  with pytest.raises(ValueError, match="without its ties has 2 usable records, fewer"):
    open_pairs(pairs(4, labels=(0.5, 1.0)), drop_ties=True)
  with pytest.raises(ValueError, match="without its ties has no usable records: all are ties, or left out by"):
    open_pairs(pairs(4, labels=(0.5,)), drop_ties=True)
  with pytest.raises(ValueError, match="batch_size 4 cannot be shared by 3 processes; choose"):
    open_pairs(pairs(8), process_count=3)
  with pytest.raises(ValueError, match="process_index is 2; expected 0 to 1"):
    open_pairs(pairs(8), process_index=2, process_count=2)
  with pytest.raises(ValueError, match=r"tokenize returned float64\[1\] for 1 captions"):
    open_pairs(pairs(8), tokenize=lambda c: np.zeros(len(c)))


def test_records_may_be_arrays_and_bytes_strings_as_tfds_gives_them():
  source = [
    {
      "caption": f"caption {i}".encode(),
      "image_0": np.full((12, 20, 3), i, np.uint8),
      "image_1": np.full((SIZE, SIZE, 3), 255, np.uint8),
      "label_0": np.float32(1),
    }
    for i in range(8)
  ]
  batch = next(open_pairs(source))
  np.testing.assert_allclose(batch["pixels_0"][:, 0, 0, 0], np.array(numbers(batch)))
  np.testing.assert_array_equal(batch["num_example_per_prompt"], 1)


def test_decoding_crops_the_centre_and_puts_transparency_on_white():
  wide = np.zeros((10, 30, 3), np.uint8)
  wide[:, 10:20] = 200
  pixels, framing = records.decode(wide, 10)
  np.testing.assert_array_equal(pixels, 200)
  assert framing == (10, 30, 0, 10, 10)
  file = io.BytesIO()
  Image.new("RGBA", (6, 6), (9, 9, 9, 0)).save(file, "PNG")
  pixels, framing = records.decode(file.getvalue(), 6)
  np.testing.assert_array_equal(pixels, 255)
  assert framing == (6, 6, 0, 0, 0)


def jpeg(pixels, quality=90):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG", quality=quality)
  return file.getvalue()


def smooth(height, width):
  """Blurred noise, with contours."""
  noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
  picture = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)).copy()
  picture[height // 3 : height // 2, width // 3 : width // 2] = 240
  return picture


@pytest.mark.parametrize(
  ("height", "width", "reduced"), [(127, 300, 1), (128, 128, 2), (131, 257, 2), (255, 300, 2), (601, 259, 4)]
)
def test_large_jpeg_files_are_decoded_smaller_and_look_the_same(height, width, reduced):
  file, size = jpeg(smooth(height, width)), 64
  picture, found, by = records._open(file, at_least=size)
  assert (found, by) == ((height, width), reduced)
  assert picture.size == (-(-width // reduced), -(-height // reduced))
  for place in (None, (0.9, 0.2), (0.0, 0.99)):
    pixels, framing = records.decode(file, size, place)
    whole, same = records.decode(np.asarray(records.open_image(file)), size, place)
    assert framing == same
    error = np.mean((pixels.astype(float) - whole) ** 2)
    assert error < 255**2 / 10**3.4, 10 * np.log10(255**2 / error)  # 34 dB
    if reduced == 1:
      np.testing.assert_array_equal(pixels, whole)
  with pytest.raises(records.UnreadableImage):
    records.decode(file[: len(file) // 2], size)


# ---- Crops -------------------------------------------------------------------------------------------------------


def test_crops_are_drawn_once_for_a_pair_and_said_in_sizes():
  """Two images of one size are cropped at the same place; in the pixels stands which column it is."""
  source = [
    {
      "id": f"pair-{i}",
      "caption": f"caption {i}",
      "label_0": 1.0,
      "image_0": columns(SIZE, SIZE + 6),
      "image_1": columns(SIZE, SIZE + 6) + np.uint8(100),
    }
    for i in range(12)
  ]
  batches, places = open_pairs(source, batch_size=12, flip=True, random_crop=True), []
  for batch in take(batches, 20):
    first = batch["pixels_0"][:, 0, 0, 0].astype(int)
    last = batch["pixels_0"][:, 0, -1, 0].astype(int)
    np.testing.assert_array_equal(batch["pixels_1"], batch["pixels_0"] + 100)
    assert (np.abs(last - first) == SIZE - 1).all()
    mirrored = first > last
    # In the mirrored original the same pixels begin at this column.
    left = np.where(mirrored, SIZE + 5 - first, first)
    expected = [[SIZE, SIZE + 6, 0, x, SIZE, SIZE] for x in left]
    np.testing.assert_array_equal(batch["sizes_0"], expected)
    np.testing.assert_array_equal(batch["sizes_1"], expected)
    places += np.minimum(first, last).tolist()
  counts = np.bincount(places, minlength=7)
  assert len(counts) == 7 and counts.min() > 240 / 7 / 2  # all places, about equally often
  again = take(open_pairs(source, batch_size=12, flip=True, random_crop=True, num_threads=0), 2)
  other = take(open_pairs(source, batch_size=12, flip=True, num_threads=0), 2)
  for x, y, centred in zip(
    again, take(open_pairs(source, batch_size=12, flip=True, random_crop=True), 2), other, strict=True
  ):
    assert_same(x, y)
    np.testing.assert_array_equal(x["input_ids"], centred["input_ids"])  # the order does not depend on it
    assert set(centred["sizes_0"][:, 3]) == {3}


def test_a_crop_lies_in_the_same_share_of_images_of_different_sizes():
  source = shapes(8, image_0=columns(SIZE, SIZE + 4), image_1=columns(SIZE, SIZE + 9))
  for batch in take(open_pairs(source, batch_size=8, random_crop=True), 5):
    a, b = (batch[f"sizes_{n}"][:, 3] for n in "01")
    assert (np.abs(a / 5 - b / 10) < 0.2).all()


def test_images_are_cropped_at_random_places_too():
  source = [{"image": columns(SIZE + 6, SIZE)} for _ in range(12)]
  batch = next(pipeline.image_batches(source, batch_size=12, image_size=SIZE, seed=0, random_crop=True))
  top = batch["pixels"][:, 0, 0, 0]
  np.testing.assert_array_equal(batch["sizes"][:, 2], top)
  assert len(set(top.tolist())) > 3


# ---- What SDXL is conditioned on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("height", "width", "image_size", "expected"),
  [
    (64, 64, 64, (0, 0, 0)),
    (512, 512, 64, (0, 0, 0)),  # smaller, and nothing is left out
    (700, 1000, 512, (0, 110, 110)),  # 150 columns on each side x 512 / 700 = 109.7
    (1000, 700, 512, (110, 0, 0)),
    (8, 13, 4, (0, 1, 2)),  # 2 columns to the left and 3 to the right, at half of the size
    (8, 12, 64, (0, 16, 16)),  # enlarged
  ],
)
def test_framings_of_hand_worked_sizes(height, width, image_size, expected):
  assert records.framing_of(height, width, image_size) == (height, width, *expected)
  _, framing = records.decode(np.zeros((height, width, 3), np.uint8), image_size)
  assert framing == (height, width, *expected)
  top, left, right = expected
  for flip, side in ((False, left), (True, right)):
    found = records.sizes(framing, image_size, flip=flip)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [height, width, top, side, image_size, image_size])


def test_crops_lie_where_diffusers_would_crop_the_resized_image():
  """Its script resizes the shorter side to the target size, whole pixels, and then takes the centre."""
  rng = np.random.default_rng(0)
  for _ in range(2000):
    size = int(rng.choice([256, 512, 1024]))
    height, width = (int(n) for n in rng.integers(size, 4000, 2))
    shorter = min(height, width)
    resized = [int(size * n / shorter) for n in (height, width)]
    expected = [int(round((n - size) / 2)) for n in resized]
    framing = records.framing_of(height, width, size)
    assert np.abs(np.subtract([framing.top, framing.left], expected)).max() <= 1
    assert abs(framing.right - framing.left) <= 1
    assert abs(framing.left + size + framing.right - resized[1]) <= 2


def columns(height, width):
  """An image in which each pixel holds the number of its column, or of its row where it is taller than wide."""
  image = np.zeros((height, width, 3), np.uint8)
  image[:] = np.arange(width)[None, :, None] if width > height else np.arange(height)[:, None, None]
  return image


def shapes(n=8, **fields):
  """Pairs of a wide image and a tall one, neither in need of resizing."""
  return [
    {
      "id": f"pair-{i}",
      "caption": f"caption {i}",
      "image_0": columns(SIZE, SIZE + 5),
      "label_0": 1.0,
      "image_1": columns(SIZE + 3, SIZE),
    }
    | fields
    for i in range(n)
  ]


def test_sizes_say_where_the_pixels_come_from_mirrored_or_not():
  batch = next(open_pairs(shapes(), batch_size=8, flip=True))
  wide, tall = (batch[k][:, 0, 0, 0].astype(float) for k in ("pixels_0", "pixels_1"))
  mirrored = wide == SIZE + 1  # the last of columns 2 to 9, the first in the mirrored image
  assert mirrored.any() and not mirrored.all() and (wide[~mirrored] == 2).all() and (tall == 1).all()
  expected = np.array([[SIZE, SIZE + 5, 0, 3 if m else 2, SIZE, SIZE] for m in mirrored])
  np.testing.assert_array_equal(batch["sizes_0"], expected)
  np.testing.assert_array_equal(batch["sizes_1"], [[SIZE + 3, SIZE, 1, 0, SIZE, SIZE]] * 8)
  # In the mirrored original the same pixels begin at the given column.
  original = columns(SIZE, SIZE + 5)[:, ::-1]
  np.testing.assert_array_equal(original[0, 3 : 3 + SIZE, 0][:1], wide[mirrored][:1])


def test_the_size_before_an_image_was_stored_comes_from_its_own_field():
  batch = next(open_pairs(shapes(original_size_1=np.array([1100, 800]))))
  np.testing.assert_array_equal(batch["sizes_0"], [[SIZE, SIZE + 5, 0, 2, SIZE, SIZE]] * 4)
  np.testing.assert_array_equal(batch["sizes_1"], [[1100, 800, 1, 0, SIZE, SIZE]] * 4)
  batch = next(open_pairs(shapes(original_size_0=(480, 640), original_size_1=None)))
  np.testing.assert_array_equal(batch["sizes_0"], [[480, 640, 0, 2, SIZE, SIZE]] * 4)
  np.testing.assert_array_equal(batch["sizes_1"], [[SIZE + 3, SIZE, 1, 0, SIZE, SIZE]] * 4)
  images = [{"image": png(i, size=16), "original_size": [320, 320]} for i in range(4)]
  batch = next(pipeline.image_batches(images, batch_size=4, image_size=SIZE, seed=0))
  np.testing.assert_array_equal(batch["sizes"], [[320, 320, 0, 0, SIZE, SIZE]] * 4)


@pytest.mark.parametrize("value", [512, [512], [512, 0], [-1, 512], [512, 512, 3], "x", [float("nan"), 1], [1, np.inf]])
def test_an_original_size_that_is_none_is_an_error_that_names_the_record(value):
  source = shapes(4)
  source[2]["original_size_1"] = value
  with pytest.raises(
    ValueError, match=r"record 'pair-2' has original_size_1 = .*; expected \[height, width\] .*; correct or remove"
  ):
    open_pairs(source)
  with pytest.raises(ValueError, match="record 'pair-2' has original_size_1"):
    next(open_pairs(source, labels=[1.0] * 4))  # then the source is not read first


def test_kept_images_keep_their_sizes(monkeypatch):
  """Whether decoded images are kept or not, every epoch says the same; kept records are read once."""

  class Counted(list):
    reads = 0

    def __getitem__(self, index):
      self.reads += 1
      return super().__getitem__(index)

  results = []
  for cache_bytes, reads in ((records.CACHE_BYTES, 8), (0, 24)):
    monkeypatch.setattr(records, "CACHE_BYTES", cache_bytes)
    source = Counted(shapes(original_size_1=[1100, 800]))
    batches = open_pairs(source, batch_size=8, flip=True, num_threads=0, labels=[1.0] * 8)
    results.append(take(batches, 3))
    assert source.reads == reads
  for kept, anew in zip(*results, strict=True):
    assert_same(kept, anew)


def test_emoji_images_come_once_an_epoch_in_all_styles():
  def tokenize_captions(captions):
    return np.array([[len(c)] for c in captions], np.int32)

  batches = pipeline.image_batches(batch_size=31, image_size=16, tokenize=tokenize_captions, seed=0, split="validation")
  assert batches.num_records == 3 * 93
  seen, tiles = [], {s: emoji.load_tiles(s, 16) for s in emoji.STYLES}
  captions = emoji.captions()
  for batch in take(batches, 9):
    assert batch["pixels"].shape == (31, 16, 16, 3) and batch["pixels"].dtype == np.uint8
    for pixels, style, class_id, ids in zip(
      batch["pixels"], batch["style"], batch["class_id"], batch["input_ids"], strict=True
    ):
      np.testing.assert_array_equal(pixels, tiles[emoji.STYLES[style]][class_id])
      assert ids[0] == len(captions[class_id])
      seen.append((int(style), int(class_id)))
  assert len(set(seen)) == 3 * 93
  assert {c for _, c in seen} == {e.class_id for e in emoji.load_index("core", "validation")}


def test_images_may_have_labels():
  source = [{"image": png(i), "label": i % 2, "caption": f"caption {i}"} for i in range(6)]
  batch = next(pipeline.image_batches(source, batch_size=6, image_size=SIZE, seed=0, tokenize=tokenize))
  np.testing.assert_array_equal(batch["label"], np.array(numbers(batch)) % 2)
  assert batch["label"].dtype == np.float32


def test_images_need_neither_captions_nor_classes_of_a_source_of_ones_own():
  source = [{"image": png(i)} for i in range(6)]
  batch = next(pipeline.image_batches(source, batch_size=6, image_size=SIZE, seed=0))
  assert batch.keys() == {"record", "pixels", "sizes", "style", "class_id"}
  np.testing.assert_array_equal(batch["class_id"], -1)


def test_prompts_come_with_their_place():
  prompts = [f"prompt {i}" for i in range(7)]
  batches = pipeline.prompt_batches(prompts, batch_size=7, tokenize=tokenize, seed=0)
  for batch in take(batches, 2):
    assert sorted(batch["record"].tolist()) == list(range(7))
    assert numbers(batch) == batch["record"].tolist()
  assert batches.num_skipped() == 0
  batches.close()
  default = pipeline.prompt_batches(batch_size=4, tokenize=lambda c: np.ones((len(c), 2), np.int32), seed=0)
  assert default.num_records == 832


# ---- Worker processes --------------------------------------------------------------------------------------------


def test_worker_processes_change_neither_order_nor_contents():
  source = pairs(13)
  source[5]["image_1"] = b"broken"
  settings = dict(caption_dropout=0.3, flip=True, random_crop=True)
  expected = take(open_pairs(source, **settings), 9)
  batches = open_pairs(source, num_workers=2, **settings)
  found = take(batches, 4)
  state = json.loads(json.dumps(batches.get_state()))
  assert state["next_batch"] == 4
  workers = multiprocessing.active_children()
  assert len(workers) == 2
  for worker in workers:  # as when a whole job is told to end: this process finishes its step
    os.kill(worker.pid, signal.SIGTERM)
  found += take(batches, 5)
  batches.close()
  assert not any(worker.is_alive() for worker in workers)
  for x, y in zip(expected, found, strict=True):
    assert_same(x, y)
  assert batches.skipped == ["'pair-5'"]  # the workers' news have come here
  resumed = open_pairs(source, **settings)
  resumed.set_state(state)
  for x, y in zip(expected[4:], take(resumed, 5), strict=True):
    assert_same(x, y)
  # From threads to workers, and on another process.
  resumed = open_pairs(source, num_workers=1, process_index=1, process_count=2, **settings)
  resumed.set_state(state)
  for x, y in zip(expected[4:], take(resumed, 5), strict=True):
    assert_same({name: values[2:] for name, values in x.items()}, y)
  resumed.close()


def test_workers_end_with_a_process_that_is_killed():
  code = """
import multiprocessing, os, signal
from tests.data import pipeline_test
if __name__ == "__main__":
  batches = pipeline_test.open_pairs(pipeline_test.pairs(8), num_workers=1)
  next(batches)
  print(multiprocessing.active_children()[0].pid, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""
  command, root = [sys.executable, "-c", code], pathlib.Path(__file__).parents[2]
  with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
    status = pathlib.Path("/proc", run.stdout.readline().strip(), "stat")
    run.wait()

  def runs():
    try:
      return status.read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
      return False

  end = time.monotonic() + 20
  while runs() and time.monotonic() < end:
    time.sleep(0.1)
  assert not runs()


def test_what_is_wrong_in_a_worker_is_raised_here():
  source = [{k: v for k, v in r.items() if k != "image_1"} for r in pairs(8)]
  batches = open_pairs(source, num_workers=1)
  with pytest.raises(ValueError, match="record 'pair-.' has no field 'image_1', only"):
    next(batches)
  batches.close()


# ---- Ahead of the devices ----------------------------------------------------------------------------------------


class Slow:
  """Numbered batches with a state; counts how many were drawn."""

  def __init__(self, fails_at=None):
    self.drawn, self.fails_at = 0, fails_at

  def __next__(self):
    if self.drawn == self.fails_at:
      raise ValueError("a broken batch")
    self.drawn += 1
    return self.drawn

  def get_state(self):
    return {"next_batch": self.drawn}

  def close(self):
    self.closed = True


def test_a_prefetched_batch_comes_with_the_state_after_it():
  batches = Slow()
  ahead = batching.Prefetched(batches, lambda number: -number, count=6, depth=2)
  for number in range(1, 7):
    assert next(ahead) == (-number, {"next_batch": number})
    time.sleep(0.02)
    assert batches.drawn == min(number + 2, 6)  # never more than two wait
  with pytest.raises(StopIteration):
    next(ahead)
  ahead.close()
  assert batches.drawn == 6 and batches.closed


def test_a_prefetching_thread_hands_errors_on_and_ends():
  ahead = batching.Prefetched(Slow(fails_at=2), lambda number: number, count=9)
  assert [next(ahead)[0] for _ in range(2)] == [1, 2]
  with pytest.raises(ValueError, match="a broken batch"):
    next(ahead)
  ahead.close()
  ahead = batching.Prefetched(Slow(), lambda number: number, count=9)
  next(ahead)
  ahead.close()
  ahead.close()
  assert "jaxpref-prefetch" not in [thread.name for thread in threading.enumerate()]


def test_a_real_run_of_batches_resumes_at_the_one_that_was_trained_on():
  expected = take(open_pairs(pairs(15), flip=True), 9)
  ahead = batching.Prefetched(open_pairs(pairs(15), flip=True), lambda batch: batch, count=9)
  for _ in range(4):
    _, state = next(ahead)
  ahead.close()
  batches = open_pairs(pairs(15), flip=True)
  batches.set_state(state)
  for x, y in zip(expected[4:], take(batches, 5), strict=True):
    assert_same(x, y)
