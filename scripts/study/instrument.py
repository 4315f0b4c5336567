"""Measures how well preference models see the study's hidden preferences, beside what any model can know.

    python scripts/study/instrument.py predictions                   # of the ground's pairs, once
    python scripts/study/instrument.py ceiling                       # trains two large models on the true scores
    python scripts/study/instrument.py accuracy NAME=runs/study/models/NAME/export ...
    python scripts/study/instrument.py report                        # docs/results/papers_instrument.json

A step-aware model sees a decoded guided prediction of the clean picture, made from its latent with noise up to time t.
What the noise has destroyed no model can know. `ceiling` trains the judge itself, with an embedding of t and a second,
larger tower, to tell the true scores of clean pictures from their predictions: it has the hidden scores' own weights to
start from, every true score to learn from (not one bit a pair, with noise), and trains until its accuracy on the
validation pairs stands still. The better of the two sizes is the ceiling.

The accuracy is the share of validation pairs that are ranked as the hidden score ranks them, in ten ranges of t. Only
pairs that matter count: those of which one picture is in the preferred style, or shows its caption, and the other does
not. The rater tosses a coin on most others.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
from jaxpref.data import emoji  # noqa: E402
from jaxpref.devices import sharding  # noqa: E402
from jaxpref.evaluation import judging, settings  # noqa: E402
from jaxpref.files.folders import read_json  # noqa: E402
from jaxpref.models.latent_reward import MODEL_TYPE as LATENT_REWARD  # noqa: E402
from jaxpref.models.preference import Judge, JudgeBlock, TimestepEmbedder  # noqa: E402
from jaxpref.models.vae import to_uint8  # noqa: E402
from jaxpref.objectives import noising  # noqa: E402
from jaxpref.rewards import latent, step_aware  # noqa: E402
from jaxpref.rewards.loading import load_judge, load_preference_model, open_latent_reward  # noqa: E402
from scripts.study import ground as ground_lib  # noqa: E402

BINS = 10
TIMES = 1000
GUIDANCE = 3.5
TRAIN_DRAWS = 2  # times of each training pair
BATCH = 64


def load_model() -> tuple[Any, Any, Any]:
  """Returns tiny-sd, its weights and its tokenizer."""
  parser = argparse.ArgumentParser()
  settings.add_arguments(parser)
  return settings.load("tiny-sd", [], parser.parse_args([]), sharding.make_mesh(devices=jax.local_devices()))


def drawn_times(name: str, pairs: int) -> np.ndarray:
  """Returns i64[D, N] times: of validation pairs one in each of the ten ranges, of training pairs any."""
  rng = np.random.default_rng([ground_lib.RATER_SEED, ord(name[0])])
  if name == "train":
    return rng.integers(0, TIMES, (TRAIN_DRAWS, pairs))
  width = TIMES // BINS
  return np.arange(BINS)[:, None] * width + rng.integers(0, width, (BINS, pairs))


def noisy_latents(ground: pathlib.Path, name: str, number: int) -> Any:
  """Yields (rows, input_ids, x_t, t) of batches of a split's pairs, both pictures with the same noise.

  Args:
    number: of the draw.
  Yields:
    rows i64[n] of pairs; ids i32[n, L]; x_t f32[2n, h, w, C], all first pictures in front; t i32[n]; and the model with
    its weights. The last batch is filled up.
  """
  model, weights, tokenize = load_model()
  images = ground_lib.read_images(ground, name)
  images = images.reshape(-1, *images.shape[2:])
  captions = [e.caption for e in ground_lib.split(name)]
  numbers = ground_lib.pair_numbers(len(captions))
  ids = tokenize(captions)
  times = drawn_times(name, len(numbers))[number]

  @jax.jit
  def noised(weights, pixels, t, key):
    x0 = model.encode_images(weights, pixels.astype(jnp.float32) / 127.5 - 1.0, jax.random.fold_in(key, 1))
    noise = jax.random.normal(key, (t.shape[0], *x0.shape[1:]))
    return model.process.add_noise(x0, jnp.concatenate([noise, noise]), jnp.concatenate([t, t]))

  for start in range(0, len(numbers), BATCH):
    rows = np.arange(start, min(start + BATCH, len(numbers)))
    padded = np.resize(rows, BATCH)
    pixels = np.concatenate([images[numbers[padded, 0]], images[numbers[padded, 1]]])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), number), start)
    t = jnp.asarray(times[padded], jnp.int32)
    prompts = ids[numbers[padded, 0] // ground_lib.PICTURES]
    yield rows, prompts, noised(weights, pixels, t, key), t, model, weights


def predictions(ground: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the decoded predictions of a split's pairs u8[D, N, 2, H, W, 3] and their times i64[D, N], made once."""
  file = ground / f"{name}_predictions.npz"
  if not file.is_file():
    pairs, made = len(ground_lib.pair_numbers(len(ground_lib.split(name)))), []
    times = drawn_times(name, pairs)

    @functools.cache
    def decoder(model):
      def decode(weights, x_t, t, ids):
        images = noising.decode_prediction(model, weights, x_t, jnp.concatenate([t, t]), ids, GUIDANCE)
        return to_uint8(images)

      return jax.jit(decode)

    for number in range(len(times)):
      started, parts = time.time(), []
      for rows, ids, x_t, t, model, weights in noisy_latents(ground, name, number):
        first, second = np.split(np.asarray(decoder(model)(weights, x_t, t, ids)), 2)
        parts.append(np.stack([first, second], axis=1)[: len(rows)])
      made.append(np.concatenate(parts))
      decoder.cache_clear()
      print(f"{name}: draw {number + 1} of {len(times)}, {time.time() - started:.0f} s", file=sys.stderr)
    ground_lib.save(file, {"images": np.stack(made), "times": times})
  with np.load(file) as stored:
    return stored["images"], stored["times"]


def by_bin(scores: np.ndarray, ground: pathlib.Path, hidden: str) -> np.ndarray:
  """Returns f64[10]: the share of pairs in each range of t that scores f32[10, N, 2] rank as the hidden score does.

  Of the validation pairs those count of which one picture is in the preferred style, or shows its caption.
  """
  of_split = ground_lib.scores(ground, "validation")
  numbers = ground_lib.pair_numbers(len(ground_lib.split("validation")))
  first, second = of_split[f"{hidden}_share"].reshape(-1)[numbers].T
  matter = first != second
  return np.mean((scores[:, matter, 0] > scores[:, matter, 1]) == (first > second)[matter], axis=1)


# ---- The ceiling --------------------------------------------------------------------------------------------------


class Ceiling(nn.Module):
  """The judge, told the time, plus a tower of its own of `width` channels; scores of both hidden preferences.

  Attributes:
    judge: whose weights it starts from.
    width: factor on the channels of the second tower; 0 for none.
  """

  judge: Judge
  width: int

  @nn.compact
  def __call__(self, images: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    c = self.judge.config
    time = TimestepEmbedder(c.channels[0], 256, name="time")(t)
    style, classes = self.judge(
      images + nn.Dense(3, kernel_init=nn.initializers.zeros, name="shift")(time)[:, None, None]
    )
    # Each head may trust its logits less where there is more noise.
    gain = 1.0 + nn.Dense(2, kernel_init=nn.initializers.zeros, name="gain")(nn.silu(time))
    if self.width:
      x = nn.Conv(c.channels[0] * self.width, (3, 3), name="conv_in")(images)
      for level, channels in enumerate(c.channels):
        x = x + nn.Dense(x.shape[-1], name=f"time_{level}")(nn.silu(time))[:, None, None]
        x = JudgeBlock(channels * self.width, 2 if level else 1, c.norm_num_groups, name=f"own.{level}")(x)
      x = jnp.mean(nn.silu(nn.GroupNorm(c.norm_num_groups, name="norm")(x)), axis=(1, 2))
      style = style + nn.Dense(c.num_styles, kernel_init=nn.initializers.zeros, name="own_style")(x)
      classes = classes + nn.Dense(c.num_classes, kernel_init=nn.initializers.zeros, name="own_classes")(x)
    return style * gain[:, :1], classes * gain[:, 1:]


def train_ceiling(ground: pathlib.Path, width: int, *, most: int = 12, patience: int = 3) -> dict[str, Any]:
  """Trains a `Ceiling` until its accuracy on the validation pairs stands still; its best, by range of t.

  It learns the judge's own answers on the clean pictures (styles, and captions among all 1,021) by cross-entropy.
  """
  images, times = predictions(ground, "train")
  held, held_times = predictions(ground, "validation")
  clean = {n: ground_lib.read_images(ground, n) for n in ("train", "validation")}
  ids = {n: np.asarray([e.class_id for e in ground_lib.split(n)]) for n in clean}
  judge, judge_params = load_judge("tiny-judge", style=ground_lib.STYLE, num_classes=emoji.num_classes("core"))
  assert judge is not None
  pictures = clean["train"].reshape(-1, *clean["train"].shape[2:])
  styles, classes = map(jax.nn.softmax, judging.judge_images(judge, judge_params, pictures))
  module = Ceiling(judge, width)
  params = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1, jnp.int32))["params"]
  params = {**params, "judge": judge_params}
  numbers = ground_lib.pair_numbers(len(ids["train"]))
  flat = images.reshape(-1, *images.shape[3:])
  flat_times = np.repeat(times[..., None], 2, axis=-1).reshape(-1)
  sources = np.broadcast_to(numbers, (len(times), *numbers.shape)).reshape(-1)
  epoch = len(flat) // BATCH
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, epoch, most * epoch), weight_decay=1e-2)
  state = tx.init(params)

  @jax.jit
  def step(params, state, pixels, t, style, caption, key):
    x = pixels.astype(jnp.float32) / 127.5 - 1.0

    def loss(params):
      found_style, found_classes = module.apply({"params": params}, x, t)
      cross = optax.softmax_cross_entropy
      return jnp.mean(cross(found_style, style) + cross(found_classes, caption))

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  column = judge.config.styles.index(ground_lib.STYLE)

  @jax.jit
  def answer(params, pixels, t, caption):
    style, found = module.apply({"params": params}, pixels.astype(jnp.float32) / 127.5 - 1.0, t)
    style = jax.nn.log_softmax(style)[:, column]
    true = jnp.take_along_axis(jax.nn.log_softmax(found), caption[:, None], axis=1)[:, 0]
    return style - jnp.log1p(-jnp.minimum(jnp.exp(style), 1 - 1e-6)), true

  def measure(params):
    numbers = ground_lib.pair_numbers(len(ids["validation"]))
    caption = ids["validation"][numbers // ground_lib.PICTURES]
    found = {h: np.zeros((*held.shape[:2], 2), np.float32) for h in ground_lib.HIDDEN}
    for b in range(len(held)):
      for start in range(0, held.shape[1], 256):
        part = slice(start, start + 256)
        for side in (0, 1):
          out = answer(params, held[b, part, side], held_times[b, part], caption[part, side])
          for h, values in zip(ground_lib.HIDDEN, out, strict=True):
            found[h][b, part, side] = values
    return {h: by_bin(found[h], ground, h) for h in ground_lib.HIDDEN}

  rng, key = np.random.default_rng(0), jax.random.key(1)
  best: dict[str, tuple[float, int, list[float]]] = {}
  history: list[dict[str, float]] = []
  for number in range(most):
    order, losses = rng.permutation(len(flat)), []
    for start in range(0, epoch * BATCH, BATCH):
      rows = order[start : start + BATCH]
      key, own = jax.random.split(key)
      of = sources[rows]
      params, state, value = step(params, state, flat[rows], flat_times[rows], styles[of], classes[of], own)
      losses.append(value)
    found = measure(params)
    history.append({h: float(v.mean()) for h, v in found.items()} | {"loss": float(np.mean(losses))})
    print(f"width {width}, epoch {number + 1}: {history[-1]}", file=sys.stderr, flush=True)
    for h, values in found.items():
      if h not in best or values.mean() > best[h][0]:
        best[h] = (float(values.mean()), number, values.tolist())
    if number - max(n for _, n, _ in best.values()) >= patience:
      break
  return {"width": width, "history": history, "best": {h: {"epoch": n + 1, "bins": v} for h, (_, n, v) in best.items()}}


# ---- Preference models --------------------------------------------------------------------------------------------


def score_step_aware(ground: pathlib.Path, folder: str, *, told_time: bool = True) -> np.ndarray:
  """Returns the scores f32[10, N, 2] that a step-aware model gives the validation pairs' predictions."""
  scorer, params = load_preference_model(folder)[:2]
  images, times = predictions(ground, "validation")
  _, _, tokenize = load_model()
  numbers = ground_lib.pair_numbers(len(ground_lib.split("validation")))
  ids = tokenize([e.caption for e in ground_lib.split("validation")])[numbers[:, 0] // ground_lib.PICTURES]

  @jax.jit
  def score(params, pixels, t, ids):
    text = step_aware.embed_prompts(scorer, params, ids)
    return step_aware.score_images(scorer, params, pixels.astype(jnp.float32) / 127.5 - 1.0, t, text)

  found = np.zeros((*images.shape[:2], 2), np.float32)
  for b in range(len(images)):
    for start in range(0, images.shape[1], 256):
      part = slice(start, start + 256)
      t = times[b, part] if told_time else np.zeros_like(times[b, part])
      for side in (0, 1):
        found[b, part, side] = score(params, images[b, part, side], t, ids[part])
  return found


def score_latent(ground: pathlib.Path, folder: str) -> np.ndarray:
  """Returns the scores f32[10, N, 2] that a latent reward model gives the validation pairs' noisy latents."""
  scorer, params = open_latent_reward(folder)
  pairs = len(ground_lib.pair_numbers(len(ground_lib.split("validation"))))
  found = np.zeros((BINS, pairs, 2), np.float32)

  @jax.jit
  def score(params, x_t, t, ids, empty_ids):
    of_prompts = latent.embed_prompts(scorer, params, ids, empty_ids)
    prompts = jax.tree.map(lambda v: jnp.concatenate([v, v]), of_prompts)
    return latent.score_latents(scorer, params, x_t, jnp.concatenate([t, t]), prompts)

  for b in range(BINS):
    for rows, ids, x_t, t, _, weights in noisy_latents(ground, "validation", b):
      first, second = np.split(np.asarray(score(params, x_t, t, ids, weights["empty_ids"])), 2)
      found[b, rows] = np.stack([first, second], axis=1)[: len(rows)]
  return found


def report(ground: pathlib.Path) -> dict[str, Any]:
  """Returns the accuracies and the ceilings that were measured; `bins` and their `mean` are shares of pairs.

  The ceiling of a hidden preference is the better of the two sizes, at the epoch that was best.
  """
  models = {file.stem: json.loads(file.read_text()) for file in sorted((ground / "accuracy").glob("*.json"))}
  ceiling: dict[str, Any] = {}
  for file in sorted(ground.glob("ceiling_*.json")):
    trained = json.loads(file.read_text())
    for hidden, best in trained["best"].items():
      mean = float(np.mean(best["bins"]))
      if hidden not in ceiling or mean > ceiling[hidden]["mean"]:
        ceiling[hidden] = {"mean": mean, "width": trained["width"], **best, "epochs": len(trained["history"])}
  return {"command": "python scripts/study/instrument.py report", "models": models, "ceiling": ceiling}


def named_model(spec: str) -> tuple[str, str, bool]:
  """Returns the name and the folder of NAME=FOLDER, and whether it is a latent reward model.

  Raises:
    ValueError: it has another form, or no hidden preference in its name.
    FileNotFoundError: the folder is not one of a model.
  """
  name, _, folder = spec.partition("=")
  if not folder or name.partition("_")[0] not in ground_lib.HIDDEN or pathlib.PurePath(name).name != name:
    kinds = " or ".join(f"{hidden}_..." for hidden in ground_lib.HIDDEN)
    raise ValueError(f"{spec}: expected NAME=FOLDER, whose NAME is {kinds}: what the model was trained on.")
  config = read_json(pathlib.Path(folder) / "config.json")
  return name, folder, config.get("model_type") == LATENT_REWARD


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("predictions", "ceiling", "accuracy", "report"))
  parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="for accuracy; NAME: style_... or legible_...")
  parser.add_argument("--split", choices=tuple(ground_lib.DRAWN), help="for predictions (default: both)")
  parser.add_argument("--width", type=int, choices=(0, 2), help="for ceiling: of the second tower (default: both)")
  parser.add_argument("--ground", type=pathlib.Path, default=ROOT / "runs" / "study" / "ground")
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs" / "results", help="for report")
  args = parser.parse_args(arguments)
  if (args.what == "accuracy") != bool(args.models):
    parser.error("NAME=FOLDER of one or more models is for accuracy, which needs it.")
  ground = args.ground.resolve()
  if args.what == "report":
    (args.docs / "papers_instrument.json").write_text(json.dumps(report(ground), indent=1) + "\n")
  elif args.what == "predictions":
    for name in [args.split] if args.split else ground_lib.DRAWN:
      predictions(ground, name)
  elif args.what == "ceiling":
    for width in (0, 2) if args.width is None else (args.width,):
      (ground / f"ceiling_{width}.json").write_text(json.dumps(train_ceiling(ground, width), indent=1) + "\n")
  else:
    named = [named_model(spec) for spec in args.models]  # all of them, before the first is asked
    for name, folder, is_latent in named:
      if is_latent:
        found = score_latent(ground, folder)
      else:
        found = score_step_aware(ground, folder, told_time=not name.endswith("clean"))
      bins = by_bin(found, ground, name.partition("_")[0])
      place = ground / "accuracy"
      place.mkdir(exist_ok=True)
      (place / f"{name}.json").write_text(json.dumps({"bins": bins.tolist(), "mean": float(bins.mean())}) + "\n")
      print(f"{name}: {bins.mean():.3f} ({', '.join(f'{b:.3f}' for b in bins)})")


if __name__ == "__main__":
  try:
    main()
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
