"""From raw files of each kind to trained steps: what a config opens, what it selects, and that training runs on it."""

import functools
import json
from typing import Any

import jax
import numpy as np
import pytest

from jaxpref import config
from jaxpref.data import emoji, emoji_pairs, records
from jaxpref.data.pickapic import __main__ as pickapic
from jaxpref.devices import sharding
from jaxpref.files import pipelines
from jaxpref.training import build, inputs, loop
from tests.data import pickapic_test
from tests.small_presets import drawn, smaller, with_one_attention

presets = build.presets


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  """A folder with the same 24 emoji as a file of pairs, as rankings, and as liked and disliked images."""
  folder = tmp_path_factory.mktemp("raw")
  chosen = emoji.load_index("core", "train")[:24]
  for style in emoji.STYLES:
    for e, tile in zip(chosen, emoji.load_tiles(style, 32, class_ids=[e.class_id for e in chosen]), strict=True):
      file = folder / "images" / f"{e.class_id}_{style}.png"
      file.parent.mkdir(exist_ok=True)
      records.Image.fromarray(tile).save(file)
  names = [[f"images/{e.class_id}_{style}.png" for style in emoji.STYLES] for e in chosen]
  pairs = [
    {"caption": e.caption, "image_0": n[i % 2], "image_1": n[1 - i % 2], "preferred": 1 - i % 2 if i % 6 else "tie"}
    for i, (e, n) in enumerate(zip(chosen, names, strict=True))
  ]
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
  rankings = [{"prompt": e.caption, "image_path": n, "rank": [2, 1, 3]} for e, n in zip(chosen, names, strict=True)]
  (folder / "test.json").write_text(json.dumps(rankings))
  liked = [f"{json.dumps(e.caption)},{n[k]},{k}" for e, n in zip(chosen, names, strict=True) for k in (0, 1)]
  (folder / "images.csv").write_text("\n".join(["caption,image,label", *liked]))
  (folder / "prompts.json").write_text(json.dumps([{"caption": e.caption} for e in chosen]))
  return folder


@pytest.fixture(scope="module")
def pickapic_folder(tmp_path_factory):
  """Pick-a-Pic's parquet files in miniature, through the command of docs/data.md."""
  folder = tmp_path_factory.mktemp("pickapic")
  for split in ("train", "validation_unique"):
    for shard in range(2):
      file = folder / f"{split}-{shard:05d}-of-00002-abc.parquet"
      pickapic_test.write_shard(file, pickapic_test.rows(20 * shard, 20))
  pickapic.main([f"--parquet={folder}", f"--out={folder / 'out'}"])
  return folder / "out"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("JAXPREF_DATA_DIR", str(tmp_path_factory.getbasetemp() / "datasets"))
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
  monkeypatch.setitem(presets.PRESETS, "one-level", with_one_attention(smaller(presets.ONE_LEVEL)))
  monkeypatch.setattr(pipelines, "random_pipeline", drawn)


def settings(**fields):
  c = config.default()
  c.update(objective="dpo", num_steps=2, batch_size=4, model="random:one-level")
  c.evaluation.num_prompts = 0
  c.logging.every = 1
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  config.check(c)
  return c


def trained(tmp_path, **fields):
  loop.run(settings(**fields), str(tmp_path / "run"))
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
  return rows


SPM = {"objective": "spm", "preference_model": "random:one-level", "data__ties": "keep"}


SPO: dict[str, Any] = {
  "spo__num_inference_steps": 4,
  "spo__warmup_steps": 2,
  "spo__pool_size": 2,
  "spo__threshold": 0.0,
}
SPO |= {"objective": "spo", "preference_model": "random:one-level", "batch_size": 2}
KTO = {"objective": "kto", "loss__beta": 10.0}


def fields_of(source, raw, pickapic_folder):
  path = {
    "tfds": pickapic_folder, "pairs_file": raw / "pairs.jsonl", "rankings": raw / "test.json",
    "unpaired_file": raw / "images.csv", "prompts": raw / "prompts.json",
  }[source]  # fmt: skip
  images = {"data__images": str(raw)} if source == "rankings" else {}
  return {"data__source": source, "data__path": str(path), **images}


@pytest.mark.parametrize(
  ("source", "method"),
  [("tfds", {}), ("pairs_file", {}), ("rankings", {}), ("unpaired_file", KTO), ("pairs_file", KTO), ("prompts", SPO)],
  ids=["tfds", "pairs_file", "rankings", "unpaired_file", "pairs_file-kto", "prompts"],
)
def test_batches_of_every_source_are_alike(raw, pickapic_folder, source, method):
  """In fields, shapes and types, so that a method that trains on one of them compiles to the same step on each."""
  shapes = lambda **fields: jax.tree.map(  # noqa: E731
    lambda x: (x.shape, x.dtype), next(build.build(settings(**method, **fields)).batches())
  )
  assert shapes(**fields_of(source, raw, pickapic_folder)) == shapes()


# The batches of the slow ones are those that others train on, see above.
@pytest.mark.parametrize(
  ("source", "method"),
  [
    ("tfds", SPM),
    pytest.param("tfds", {}, marks=pytest.mark.slow),
    pytest.param("pairs_file", {}, marks=pytest.mark.slow),
    pytest.param("rankings", SPM, marks=pytest.mark.slow),
    pytest.param("prompts", SPO, marks=pytest.mark.slow),
  ],
  ids=["tfds-spm", "tfds", "pairs_file", "rankings-spm", "prompts"],
)
def test_every_source_is_trained_on(raw, pickapic_folder, tmp_path, source, method):
  trained(tmp_path, **fields_of(source, raw, pickapic_folder), **method)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["unpaired_file", "pairs_file"])
def test_liked_images_are_trained_on(raw, tmp_path, source):
  rows = trained(tmp_path, **fields_of(source, raw, None), **KTO)
  np.testing.assert_allclose(rows[0]["loss"], 0.5, rtol=1e-3)  # policy and reference agree


@pytest.mark.parametrize(("source", "count"), [("unpaired_file", 48), ("pairs_file", 2 * 20)])
def test_half_of_the_images_are_liked(raw, source, count):
  """4 of 24 pairs are ties."""
  found = inputs.unpaired_source(settings(**fields_of(source, raw, None), **KTO))
  assert len(found) == count and found.index.label_0.mean() == 0.5


def test_prompts_that_are_held_out_are_not_rolled_out(raw):
  tokenize = lambda captions: np.array([[sum(map(ord, c))] for c in captions], np.int32)  # noqa: E731
  fields = {"objective": "spo", "preference_model": "random:one-level", "batch_size": 1}
  fields |= {"data__source": "prompts", "data__path": str(raw / "prompts.json")}
  drawn = {}
  for split in ("train", "validation"):
    batches = inputs.prompt_batches(settings(**fields, data__validation_share=0.3, data__split=split), tokenize)
    drawn[split] = {int(next(batches)["input_ids"][0, 0]) for _ in range(24)}
  everything = {int(tokenize([row["caption"]])[0, 0]) for row in json.loads((raw / "prompts.json").read_text())}
  assert drawn["train"] and drawn["validation"] and drawn["train"] | drawn["validation"] == everything
  assert not drawn["train"] & drawn["validation"]
  with pytest.raises(ValueError, match="config.data.split='test': .* has no splits; hold out a share"):
    inputs.prompt_batches(settings(**fields, data__split="test"), tokenize)


def test_a_preference_model_is_measured_on_few_pairs_or_says_what_is_missing(raw):
  fields = {"objective": "spm", "preference_model": "random:one-level", "evaluation__num_prompts": 8}
  fields |= {"data__source": "pairs_file", "data__path": str(raw / "pairs.jsonl"), "batch_size": 8}
  with pytest.raises(ValueError, match="has no validation split to measure .* config.data.validation_share"):
    build.build(settings(**fields))
  with pytest.raises(ValueError, match="config.data.validation_share=1e-06 holds out no pair of .* a larger share"):
    build.build(settings(**fields, data__validation_share=1e-6))
  c = settings(**fields, data__validation_share=0.3, data__flip_labels=0.9, data__caption_dropout=0.9)
  batches = build.build(c).held_out()
  found = {tuple(row) for row in next(batches)["input_ids"]}
  batches.close()
  held_out = inputs.pairs_source(settings(**fields, data__validation_share=0.3, data__split="validation"))
  assert batches.batch_size == len(held_out) < c.batch_size and len(found) == len(held_out)  # none is empty


def test_what_is_selected_is_what_is_drawn(raw):
  fields = {"data__source": "pairs_file", "data__path": str(raw / "pairs.jsonl")}
  drop, keep = (inputs.pairs_source(settings(**fields, data__ties=ties)) for ties in ("drop", "keep"))
  assert (len(drop), len(keep)) == (20, 24)
  turned = inputs.pairs_source(settings(**fields, data__flip_labels=0.5))
  assert 0.2 < (turned.index.label_0 != drop.index.label_0).mean() < 0.8
  fields["data__validation_share"] = 0.3
  parts = [inputs.pairs_source(settings(**fields, data__split=split)) for split in ("train", "validation")]
  prompts = [set(part.index.prompt.tolist()) for part in parts]
  assert sum(map(len, parts)) == 20 and not prompts[0] & prompts[1] and len(parts[1]) > 0
  batch = next(build.build(settings(**fields)).batches())
  assert set(batch["label_0"]) <= {0.0, 1.0}


def test_labels_of_emoji_are_as_they_were():
  """The embedded pairs go through the same selection: those without ties, in their order."""
  source = inputs.pairs_source(settings(data__split="validation"))
  expected = [r for r in emoji_pairs.records(split="validation") if r["label_0"] != 0.5]
  assert [records.text(source[i]["id"]) for i in range(0, len(source), 50)] == [r["id"] for r in expected[::50]]
  assert len(source) == len(expected)


def test_pairs_of_the_best_image_of_a_ranking(raw):
  fields = {"data__source": "rankings", "data__path": str(raw / "test.json"), "data__images": str(raw)}
  every, best = (inputs.pairs_source(settings(**fields, data__ranking_pairs=pairs)) for pairs in ("all", "winner"))
  assert (len(every), len(best)) == (3 * 24, 2 * 24)
  with pytest.raises(ValueError, match="data.ranking_pairs='best'; expected one of all, winner"):
    settings(data__ranking_pairs="best")


def test_pairs_without_a_caption_are_left_out_and_counted(monkeypatch, caplog):
  source = emoji_pairs.prepare()["validation"]
  rows = [dict(source[i]) | ({"caption": b""} if i in (0, 3) else {}) for i in range(12)]
  monkeypatch.setattr(emoji_pairs, "prepare", lambda **_: {"train": rows})
  chosen = inputs.pairs_source(settings(data__ties="keep"))
  assert len(chosen) == 10 and "2 of 12 pairs have no caption and are left out" in caplog.text


def test_a_file_has_no_splits(raw):
  c = settings(data__source="pairs_file", data__path=str(raw / "pairs.jsonl"), data__split="test")
  with pytest.raises(ValueError, match="config.data.split='test': .*pairs.jsonl has no splits; hold out a share"):
    inputs.pairs_source(c)
