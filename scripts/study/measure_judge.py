"""Measures the judge: whether it knows captions equally well in every style, and whether eyes agree with it on style.

    python scripts/study/measure_judge.py captions --out docs/results/judge
    python scripts/study/measure_judge.py draw --models tiny-sd runs/spo_tiny --out runs/sheet
    python scripts/study/measure_judge.py sort --drawn runs/sheet --by_eye docs/results/judge_by_eye.txt \\
      --out docs/results/judge_sheet

`captions` takes the tiles of the validation and the test split in each style, adds noise up to timestep t and lets
tiny-sd denoise them with DDIM and no caption, so that they are no longer the tiles but pictures of the model whose
caption is known and owes nothing to it. OUT.json and OUT.md: how many of these captions the judge picks among 16.

`draw` writes pictures of test prompts (to OUT.npy) and numbered sheets of them (OUT_1.png, ...). Before the judge is
asked, they are sorted by eye, into a file of two lines: `outlined` and their numbers, `unclear` and theirs. `sort`
writes OUT.png, the outlined ones first, those that are unclear last, and OUT.json: on how many of the others the judge
agrees.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

_HEAD = """# The judge

tiny-judge is a small ResNet (`jaxpref.models.preference.Judge`) that names the style and the caption of a picture, made
by configs/pretrain_tiny.py:judge. It knows the captions of all core emoji in all styles. Styles it was taught on the
emoji of the training split alone, so that it can be measured on the others: jaxpref/assets/tiny-judge/metrics.json.

Captions: tiles of the validation and the test split get noise up to timestep t and are denoised by tiny-sd without a
caption. The share of these pictures whose caption the judge picks among 16, in {count} pictures of each style, and how
far the styles are apart at most, with its 95 % interval over emoji; `python scripts/study/measure_judge.py captions`:

{table}
Style, by eye: pictures of test prompts, by the base model and by one that SPO aligned, mixed and sorted by eye before
the judge was asked (`python scripts/study/measure_judge.py draw` and `sort`). First come the outlined ones, then the
others, then those that are hard to say, mostly dark things. docs/results/judge_sheet.json says on how many of
the first two the judge agrees.

![Pictures sorted by eye](judge_sheet.png)
"""
TIMESTEPS = (0, 200, 400, 600)  # 0: encoded and decoded by the autoencoder
CANDIDATES = 16
COLUMNS = 16


def redrawer(model: Any, *, start: int) -> Any:
  """The jitted function (weights, pictures u8[N, 32, 32, 3], key) -> pictures with noise up to `start`, denoised."""
  import jax
  import jax.numpy as jnp

  from jaxpref import diffusion
  from jaxpref.models.vae import to_uint8

  schedule = model.process.schedule
  steps = diffusion.ddim_timesteps(schedule, 20)
  prev = np.asarray(diffusion.ddim_prev_timesteps(schedule, 20))[steps <= start]
  steps = steps[steps <= start]

  @jax.jit
  def redraw(weights, images, key):
    key_latents, key_noise = jax.random.split(key)
    x = model.encode_images(weights, images, key_latents)
    if len(steps) and start:
      cond = jax.tree.map(lambda c: jnp.repeat(c, len(images), axis=0), model.encode_empty(weights, 1))
      full = lambda t: jnp.full(len(images), t, jnp.int32)
      x = diffusion.add_noise(schedule, x, jax.random.normal(key_noise, x.shape), full(steps[0]))

      def step(x, ts):
        t, before = full(ts[0]), full(ts[1])
        return diffusion.ddim_mean_std(schedule, model.predict(weights, x, t, cond), x, t, before, eta=0.0)[0], None

      x, _ = jax.lax.scan(step, x, jnp.stack([jnp.asarray(steps), jnp.asarray(prev)], axis=1))
    return to_uint8(model.decode(weights, x))

  return redraw


def captions(judge_name: str, seeds: int) -> list[dict[str, Any]]:
  """One row a timestep: accuracy by style, and the largest difference with its interval over emoji."""
  import jax

  from jaxpref.data import emoji
  from jaxpref.evaluation import judging
  from jaxpref.files import loading
  from jaxpref.recipes.sizes import sides
  from jaxpref.rewards.loading import load_judge

  pipe = loading.load_text_to_image("tiny-sd", dtype="float32")
  model = loading.text_to_image(pipe)
  side, _ = sides(model.image_size)  # of squares
  weights = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  judge, params = load_judge(judge_name, style="openmoji", num_classes=emoji.num_classes("core"))
  assert judge is not None
  classes = [e.class_id for split in ("validation", "test") for e in emoji.load_index("core", split)]
  rows = []
  for start in TIMESTEPS:
    right = {}
    redraw = redrawer(model, start=start)
    for style in emoji.STYLES:
      tiles = emoji.load_tiles(style, side, class_ids=classes)
      pictures = np.stack([redraw(weights, tiles, jax.random.key(s)) for s in range(seeds)], axis=1)
      scores = judging.score(judge, params, pictures, classes, style=style, candidates=CANDIDATES, seed=0)
      right[style] = scores["correct"].mean(axis=1)
      print(f"t {start}, {style}: {right[style].mean():.1%}", file=sys.stderr)
    means = {style: float(values.mean()) for style, values in right.items()}
    order = sorted(means, key=lambda style: means[style])
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(classes), (2000, len(classes)))
    differences = (right[order[-1]] - right[order[0]])[drawn].mean(axis=1)
    rows.append(
      {
        "t": start,
        "pictures_per_style": len(classes) * seeds,
        "caption_accuracy": means,
        "largest_difference": means[order[-1]] - means[order[0]],
        "largest_difference_interval": [float(x) for x in np.quantile(differences, (0.025, 0.975))],
      }
    )
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown."""
  styles = list(rows[0]["caption_accuracy"])
  lines = [
    f"| noise up to t | {' | '.join(styles)} | largest difference, points |",
    "|---" * (len(styles) + 2) + "|",
  ]
  for row in rows:
    low, high = row["largest_difference_interval"]
    shares = " | ".join(f"{row['caption_accuracy'][s]:.1%}" for s in styles)
    name = "none (autoencoder)" if row["t"] == 0 else row["t"]
    difference = f"{100 * row['largest_difference']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    lines.append(f"| {name} | {shares} | {difference} |")
  return "\n".join(lines) + "\n"


def draw(models: list[str], out: pathlib.Path, per_model: int) -> None:
  """Pictures of different test prompts, the models' mixed, and numbered sheets of them."""
  from PIL import Image, ImageDraw

  from jaxpref.data import emoji
  from jaxpref.evaluation import drawing
  from jaxpref.files import loading

  prompts = emoji.captions("test", "core")
  prompts = [prompts[i] for i in np.linspace(0, len(prompts) - 1, per_model).round().astype(int)]
  pictures = []
  for name in models:
    folder = pathlib.Path(name) / "export"
    pipe = loading.load_text_to_image(str(folder) if folder.is_dir() else name, dtype="float32")
    images = drawing.generate(
      loading.text_to_image(pipe),
      dict(pipe.params) | {"empty_ids": pipe.tokenize([""])},
      pipe.tokenize(prompts),
      seeds_per_prompt=1,
      num_inference_steps=20,
      guidance_scale=3.5,
      eta=0.0,
      seed=7,
      batch_size=64,
      progress=name,
    )
    pictures.append(images[:, 0])
  mixed = np.concatenate(pictures)
  mixed = mixed[np.random.default_rng(0).permutation(len(mixed))]
  np.save(out.with_suffix(".npy"), mixed)
  side, rows = 96, 8
  for page in range(-(-len(mixed) // (COLUMNS * rows))):
    sheet = Image.new("RGB", (COLUMNS * (side + 4), rows * (side + 16)), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(page * COLUMNS * rows, min((page + 1) * COLUMNS * rows, len(mixed))):
      row, column = divmod(i - page * COLUMNS * rows, COLUMNS)
      place = (column * (side + 4), row * (side + 16) + 14)
      sheet.paste(Image.fromarray(mixed[i]).resize((side, side), Image.Resampling.NEAREST), place)
      pen.text((place[0], place[1] - 13), str(i), fill="black")
    sheet.save(f"{out}_{page + 1}.png")


def agreement(pictures: np.ndarray, outlined: int, judge_name: str) -> dict[str, Any]:
  """The judge on pictures of which the first `outlined` are outlined, by eye, and the others not."""
  from jaxpref.data import emoji
  from jaxpref.evaluation import judging
  from jaxpref.rewards.loading import load_judge

  judge, params = load_judge(judge_name, style="openmoji", num_classes=emoji.num_classes("core"))
  assert judge is not None
  log_probs, _ = judging.judge_images(judge, params, pictures)
  said = np.argmax(log_probs, axis=1) == judge.config.styles.index("openmoji")
  eye = np.arange(len(pictures)) < outlined
  return {
    "pictures": len(pictures),
    "outlined_by_eye": outlined,
    "judge_agrees": float(np.mean(said == eye)),
    "judge_agrees_on_outlined": float(np.mean(said[eye])),
    "judge_agrees_on_others": float(np.mean(~said[~eye])),
    "disagreements": np.flatnonzero(said != eye).tolist(),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("captions", "draw", "sort"))
  parser.add_argument("--judge", default="tiny-judge", help="a folder or tiny-judge (default: %(default)s)")
  parser.add_argument("--seeds", type=int, default=4, help="noises of each tile (default: %(default)s)")
  parser.add_argument("--models", nargs="+", default=["tiny-sd"], help="folders of models or of runs")
  parser.add_argument("--pictures", type=int, default=96, help="of each model (default: %(default)s)")
  parser.add_argument("--drawn", type=pathlib.Path, help="what `draw` was given as --out")
  parser.add_argument("--by_eye", type=pathlib.Path, help="file of what `draw` made, sorted by eye")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="path of what is written, without its suffix")
  args = parser.parse_args()
  args.out.parent.mkdir(parents=True, exist_ok=True)
  if args.what == "captions":
    rows = captions(args.judge, args.seeds)
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    text = _HEAD.format(count=rows[0]["pictures_per_style"], table=table(rows))
    args.out.with_suffix(".md").write_text(text)
    print(table(rows))
  elif args.what == "draw":
    draw(args.models, args.out, args.pictures)
  else:
    from jaxpref.evaluation.pictures import grid, save_image

    pictures = np.load(args.drawn.with_suffix(".npy"), allow_pickle=False)
    lines = (line.split() for line in args.by_eye.read_text().splitlines())
    outlined, unclear = ([int(n) for n in line[1:]] for line in lines)
    others = [i for i in range(len(pictures)) if i not in outlined + unclear]
    pictures = pictures[outlined + others + unclear]
    blank = np.full((-len(pictures) % COLUMNS, *pictures.shape[1:]), 255, np.uint8)
    sheet = np.concatenate([pictures, blank]).reshape(-1, COLUMNS, *pictures.shape[1:])
    save_image(args.out.with_suffix(".png"), grid(sheet, scale=1))
    found = agreement(pictures[: len(outlined + others)], len(outlined), args.judge) | {"unclear_by_eye": len(unclear)}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
