"""Makes what the study of methods stands on: prompts, pictures by tiny-sd, and two hidden preferences and their raters.

    python scripts/study/ground.py                # draws and labels into runs/study/ground; resumes where it stopped
    python scripts/study/ground.py --report       # only docs/results/papers_ground.json, from what is there

The 1,021 core emoji are split by a hash of their code points: 256 test captions, 128 for validation, and the rest for
training, all of which tiny-sd can draw. `python -m jaxpref.pairs` draws 16 pictures of each caption that is not a test
caption. The 120 pairs of a training prompt's pictures are the data, 76,440 in all.

Two scores that no training sees say which picture is the better one. Both come from tiny-judge:

  style    log-odds of OpenMoji, the outlined style: "other" rather than better
  legible  log-probability of the caption among all 1,021: better, as a picture that shows what it should

A simulated rater prefers by Bradley and Terry's model with these scores. Its temperature is chosen such that it agrees
with the score in 60, 70, 85 or 100 % of the training pairs. The rater draws one uniform number a pair, so that the
labels of a noisy rater differ from those of a less noisy one only where noise turned them.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
from jaxpref import pairs  # noqa: E402
from jaxpref.data import emoji, labels, paths  # noqa: E402
from jaxpref.evaluation import folder as evaluation_folder  # noqa: E402
from jaxpref.evaluation import judging  # noqa: E402
from jaxpref.rewards.loading import load_judge  # noqa: E402

SPLITS = {"test": 256, "validation": 128, "train": None}  # captions; None: the rest
DRAWN = {"train": 1, "validation": 2}  # the seed of their noise
PICTURES = 16  # of a prompt
DRAW = ("--model=tiny-sd", f"--seeds={PICTURES}", "--steps=20", "--guidance_scale=3.5", "--batch_size=64")
STYLE = "openmoji"
HIDDEN = ("style", "legible")
AGREEMENTS = (60, 70, 85, 100)  # percent of the training pairs in which the rater says what the hidden score says
RATER_SEED = 2026


def split(name: str) -> list[emoji.Emoji]:
  """Returns the emoji of a split of the study, in order of a hash of their code points."""
  by_hash = lambda e: hashlib.sha256(b"jaxpref study " + e.id.encode()).hexdigest()
  rows, start = sorted(emoji.load_index("core"), key=by_hash), 0
  for known, size in SPLITS.items():
    part = rows[start : len(rows) if size is None else start + size]
    if known == name:
      return part
    start += len(part)
  raise ValueError(f"{name!r} is no split of the study; expected one of {', '.join(SPLITS)}.")


def prompts_file(ground: pathlib.Path, name: str) -> pathlib.Path:
  """Writes the captions of a split, one a line, and returns the file."""
  file = ground / f"{name}.txt"
  file.parent.mkdir(parents=True, exist_ok=True)
  paths.write(file, "".join(f"{e.caption}\n" for e in split(name)).encode())
  return file


def draw(ground: pathlib.Path, name: str) -> None:
  """Draws the pictures of a split by the command that users have; those that are there stay.

  Raises:
    RuntimeError: the command failed.
  """
  command = [sys.executable, "-m", "jaxpref.pairs", *DRAW, f"--prompts={prompts_file(ground, name)}"]
  command += [f"--seed={DRAWN[name]}", f"--out={ground / name}"]
  if subprocess.run(command, cwd=ROOT).returncode:
    raise RuntimeError(f"{' '.join(command)} failed")


def hidden_scores(images: np.ndarray, class_ids: np.ndarray) -> dict[str, np.ndarray]:
  """Returns both hidden scores and what shares are counted by, each f32[P, S].

  Args:
    images: u8[P, S, H, W, 3].
    class_ids: i64[P] of the captions.
  Returns:
    `style` and `legible`, the hidden scores in logits and log-probabilities; `style_share` and `legible_share`, 1 where
    the style is the likeliest of three and the caption the likeliest of 1,021; `correct`, 1 where the caption is
    recognised among 16.
  """
  judge, params = load_judge("tiny-judge", style=STYLE, num_classes=emoji.num_classes("core"))
  assert judge is not None
  shape = images.shape[:2]
  styles, classes = judging.judge_images(judge, params, images.reshape(-1, *images.shape[2:]))
  styles, classes = styles.reshape(*shape, -1).astype(np.float64), classes.reshape(*shape, -1).astype(np.float64)
  column = judge.config.styles.index(STYLE)
  others = np.logaddexp.reduce(np.delete(styles, column, axis=-1), axis=-1)
  true = np.take_along_axis(classes, class_ids[:, None, None], axis=-1)[..., 0]
  return {
    "style": (styles[..., column] - others).astype(np.float32),
    "legible": (true - np.logaddexp.reduce(classes, axis=-1)).astype(np.float32),
    "style_share": (styles.argmax(-1) == column).astype(np.float32),
    "legible_share": (classes.argmax(-1) == class_ids[:, None]).astype(np.float32),
    "correct": judging.caption_accuracy(classes, class_ids.tolist(), candidates=16, seed=12345),
  }


def read_images(ground: pathlib.Path, name: str) -> np.ndarray:
  """Returns the pictures of a split, u8[P, 16, H, W, 3]."""
  file = lambda p, i: evaluation_folder.image_file(ground / name, "model", p, i)
  read = evaluation_folder.read_image
  return np.stack([np.stack([read(file(p, i)) for i in range(PICTURES)]) for p in range(len(split(name)))])


def save(file: pathlib.Path, arrays: np.ndarray | Mapping[str, np.ndarray]) -> None:
  """Writes an .npz of arrays by name, or an .npy of one, so that the file is whole or not there."""
  part = file.with_suffix(f".part{file.suffix}")
  if isinstance(arrays, np.ndarray):
    np.save(part, arrays, allow_pickle=False)
  else:
    np.savez(part, **arrays)  # type: ignore[arg-type]
  part.replace(file)


def scores(ground: pathlib.Path, name: str) -> dict[str, np.ndarray]:
  """Returns `hidden_scores` of the pictures of a split, computed once."""
  file = ground / f"{name}_scores.npz"
  if not file.is_file():
    found = hidden_scores(read_images(ground, name), np.asarray([e.class_id for e in split(name)]))
    save(file, found)
  with np.load(file) as stored:
    return dict(stored)


def pair_numbers(prompts: int) -> np.ndarray:
  """Returns i64[8 P, 2]: the pictures of pairs to measure on, no picture in two of them."""
  return np.arange(prompts * PICTURES).reshape(-1, 2)


def rated_pairs(prompts: int) -> np.ndarray:
  """Returns i64[120 P, 2]: the pictures of the pairs that a rater labels, all of each prompt."""
  return labels.pairs_of_prompts(prompts, PICTURES).reshape(-1, 2)


def rater(of_split: Mapping[str, np.ndarray], hidden: str, agreement: int) -> np.ndarray:
  """Returns label_0 f32[120 P] of `rated_pairs` of a split, as the rater of that agreement says it.

  Args:
    of_split: `scores`.
    hidden: "style" or "legible".
    agreement: percent of the pairs.
  """
  flat = of_split[hidden].reshape(-1).astype(np.float64)
  score_0, score_1 = flat[rated_pairs(len(of_split[hidden]))].T
  temperature = labels.temperature_for(score_0, score_1, agreement=agreement / 100)
  rng = np.random.default_rng([RATER_SEED, HIDDEN.index(hidden)])
  return labels.noisy_labels(score_0, score_1, rng, temperature=temperature)


def labels_file(ground: pathlib.Path, hidden: str, agreement: int) -> pathlib.Path:
  """Returns the training pairs as that rater labelled them, a `pairs_file`."""
  return ground / "train" / f"{hidden}_{agreement}.jsonl"


def write_labels(ground: pathlib.Path) -> None:
  """Writes a file of labelled pairs for each hidden preference and agreement."""
  of_train, pictures = scores(ground, "train"), pairs.read_pictures(ground / "train")
  numbers = rated_pairs(len(of_train["style"]))
  for hidden in HIDDEN:
    for agreement in AGREEMENTS:
      said = rater(of_train, hidden, agreement)
      rows = [
        {
          "caption": pictures[i].caption,
          "image_0": pictures[i].image,
          "image_1": pictures[j].image,
          "label_0": float(l),
        }
        for (i, j), l in zip(numbers, said, strict=True)
      ]
      paths.write(labels_file(ground, hidden, agreement), "".join(json.dumps(row) + "\n" for row in rows).encode())


def missing_labels(ground: pathlib.Path) -> pathlib.Path | None:
  """Returns the first file that `write_labels` has not written yet; None if all are there."""
  files = (labels_file(ground, hidden, agreement) for hidden in HIDDEN for agreement in AGREEMENTS)
  return next((file for file in files if not file.is_file()), None)


def describe(ground: pathlib.Path) -> dict[str, object]:
  """Returns what the report says of pictures and raters."""
  found: dict[str, object] = {"command": "python scripts/study/ground.py", "draw": " ".join(DRAW)}
  for name in DRAWN:
    of_split = scores(ground, name)
    told: dict[str, object] = {"prompts": len(of_split["style"]), "pictures": int(of_split["style"].size)}
    told |= {f"{share}": float(of_split[share].mean()) for share in ("style_share", "legible_share", "correct")}
    centred = [of_split[h] - of_split[h].mean(axis=1, keepdims=True) for h in HIDDEN]
    told["correlation_within_prompts"] = float(np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1])
    for hidden in HIDDEN:
      flat = of_split[hidden].reshape(-1)
      score_0, score_1 = flat[rated_pairs(len(of_split[hidden]))].T
      right = {a: (rater(of_split, hidden, a) == 1.0) == (score_0 > score_1) for a in AGREEMENTS}
      told[f"{hidden}_agreement"] = {f"{a}": float(np.mean(r)) for a, r in right.items()}
      told[f"{hidden}_best_of_16"] = float(of_split[f"{hidden}_share"].max(axis=1).mean())
    told["pairs"] = len(rated_pairs(len(of_split["style"])))
    found[name] = told
  return found


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--ground", type=pathlib.Path, default=ROOT / "runs" / "study" / "ground")
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs" / "results")
  parser.add_argument("--report", action="store_true", help="draw nothing")
  args = parser.parse_args(arguments)
  ground = args.ground.resolve()
  prompts_file(ground, "test")
  if not args.report:
    for name in DRAWN:
      draw(ground, name)
    write_labels(ground)
  (args.docs / "papers_ground.json").write_text(json.dumps(describe(ground), indent=2) + "\n")


if __name__ == "__main__":
  try:
    main()
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
