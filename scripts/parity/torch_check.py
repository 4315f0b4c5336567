"""Shows that jaxpref and PyTorch compute the same training step, on miniatures: what bench_torch.py then times.

    python scripts/parity/torch_check.py --size sd15
    python scripts/parity/torch_check.py --size tiny --cases dpo-full spo-full

Both start from the same files, data and noise. Losses, the scores and pairs of SPO, and what one update changes are
printed and compared. Needs torch, diffusers, transformers and peft, and no accelerator.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))

from scripts.bench import bench, bench_torch  # noqa: E402
from scripts.parity import torch_steps  # noqa: E402

# Largest relative differences that are accepted, in float32.
BOUNDS = {"loss": 1e-3, "grad_norm": 1e-3, "scores": 1e-3, "update": 1e-2}


class Outcome(NamedTuple):
  """One step of a case, of either framework.

  Attributes:
    loss, grad_norm: those of its one update.
    change: what the update added to each trained parameter, by name and in the layout of PyTorch.
    scores: SPO's: f32[G,B,k].
    pairs: SPO's: winner, loser and valid, each [G,B].
  """

  loss: float
  grad_norm: float
  change: dict[str, np.ndarray]
  scores: np.ndarray | None = None
  pairs: tuple[np.ndarray, ...] | None = None


def check_recipe(case: str, size: str) -> Any:
  """Returns a case on a miniature of the size's topology (tiny: on tiny-sd itself), made to be compared.

  Float32, one update with all transitions, and SGD of rate 1: the update is the clipped gradient. AdamW's first step is
  nearly the sign of each entry of the gradient, so that it would show rounding of the smallest ones.
  """
  config = bench.recipe(case, size, None, dtype="float32", miniature=True)
  config.batch_size = 4 if config.objective == "dpo" else 2
  config.optimizer.update(name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, b1=0.0, weight_decay=0.0)
  config.spo.minibatch = sys.maxsize
  if config.objective == "dpo":
    config.accumulation = 1
    config.loss.beta = 500.0  # 5000 makes of one rounding of an error a change of the logit by 3e-4
  return config


def check_batch(config: Any, experiment: Any) -> dict[str, np.ndarray]:
  """Prompts and, for Diffusion-DPO, pairs of noise of which each image wins in some; for SDXL of different sizes."""
  rng, size = np.random.default_rng(2), config.batch_size
  batch = {"input_ids": np.asarray(experiment.tokenize(["a red apple", "cat", "two dogs", ""][:size]))}
  if config.objective == "dpo":
    height, width, _ = (n * experiment.model.unit for n in experiment.model.latent_shape)
    for i in (0, 1):
      batch[f"pixels_{i}"] = rng.integers(0, 256, (size, height, width, 3), np.uint8)
      if experiment.model.text_encoder_2 is not None:
        batch[f"sizes_{i}"] = rng.integers(0, 1024, (size, 6)).astype(np.float32)
    batch["label_0"] = np.arange(size, dtype=np.float32) % 2
  return batch


def fixed_noise(shape: Sequence[int]) -> np.ndarray:
  """Returns one array of normal numbers f32[...] that replaces all noise of that shape."""
  return np.resize(np.random.default_rng(0).standard_normal(2**16 + 1, np.float32), shape)


def fixed_members(n: int, k: int) -> np.ndarray:
  """Returns the candidates to continue from, instead of random ones."""
  return np.arange(n, dtype=np.int32) % k


@contextlib.contextmanager
def fixed_jax_draws() -> Iterator[None]:
  """Removes, while a step is traced, randomness from the noise and from the members of a pool."""
  import jax
  import jax.numpy as jnp

  normal = lambda key, shape=(), dtype=jnp.float32: jnp.asarray(fixed_noise(shape), dtype)
  randint = lambda key, shape, minval, maxval: jnp.asarray(fixed_members(shape[0], maxval))
  with mock.patch.object(jax.random, "normal", normal), mock.patch.object(jax.random, "randint", randint):
    yield


def perturbed(tree: Any, scale: float) -> Any:
  """Parameters f32 moved at random: each array by `scale` times its root mean square, or of 1 where it is zero."""
  import jax

  rng = np.random.default_rng(1)

  def move(x):
    x = np.asarray(x, np.float32)
    size = float(np.sqrt(np.mean(x**2))) or 1.0
    return x + np.float32(scale * size) * rng.standard_normal(x.shape, np.float32)

  return jax.tree.map(move, tree)


# How far the policy is moved away from its reference, so that no loss is log 2 and few ratios are clipped.
MOVED = 3e-3


def jax_outcome(case: str, size: str, folder: pathlib.Path, config: Any | None = None) -> Outcome:
  """jaxpref's own step; writes what it starts from into the folder: models, and CASE.npz with the timesteps as well."""
  import jax
  import safetensors.numpy

  from jaxpref.files import adapters, loading, tensors
  from jaxpref.objectives import spo
  from jaxpref.rewards.loading import load_scorer
  from jaxpref.training import build, programs, step

  config = check_recipe(case, size) if config is None else config
  experiment = build.build(config)
  params = perturbed(experiment.params, MOVED)
  frozen, ref_params = dict(experiment.frozen), experiment.params
  if "spm" in frozen and config.preference_model.startswith("random:"):
    frozen["spm"] = perturbed(frozen["spm"], 0.1)  # a fresh one does not know the time
  # The modules alone; the parameters are the experiment's.
  weights = {**frozen, **ref_params}
  pipe = loading.load_text_to_image(config.model.replace("random:", "zeros:"), dtype="float32")
  pipe = dataclasses.replace(pipe, params={name: weights[name] for name in pipe.params})
  scorer = None
  if "spm" in frozen:
    name = config.preference_model.replace("random:", "zeros:")
    scorer = (load_scorer(name, dtype="float32")[0], frozen["spm"])
  bench_torch.save_models(folder, config, pipe, scorer, params)
  batch = check_batch(config, experiment)
  assert experiment.tokenize is not None
  extra = {}
  optimizer, _ = programs.make_optimizer(config)
  step_fn = step.make_step(experiment.objective, optimizer, seed=config.seed)
  timesteps = step.timesteps(experiment.objective, config.batch_size, seed=config.seed, step=0)
  if timesteps is not None:
    extra["timesteps"] = timesteps
  bench_torch.save_inputs(folder / f"{case}.npz", batch | extra, experiment.tokenize([""]))

  seen: list[Any] = []

  def watched(*args, **kwargs):
    pairs = pool_rollout(*args, **kwargs)
    jax.debug.callback(seen.append, (pairs.scores.total, pairs.shared.valid))
    return pairs

  pool_rollout = spo.pool_rollout
  state = step.initial_state(params, ref_params, optimizer.init(params))
  with fixed_jax_draws(), mock.patch.object(spo, "pool_rollout", watched):
    run = jax.jit(step_fn).lower(state, frozen, batch).compile()
  after, metrics = jax.block_until_ready(run(state, frozen, batch))
  jax.effects_barrier()
  change = jax.tree.map(lambda a, b: np.asarray(a, np.float32) - b, after.params, params)
  if "unet_lora" in change:
    adapters.save_diffusers(folder / "change.safetensors", change["unet_lora"], 1.0)
  else:
    tensors.save_tree(folder / "change.safetensors", change["unet"])
  arrays = safetensors.numpy.load_file(folder / "change.safetensors")
  if "unet_lora" in change:
    arrays = {torch_steps.torch_name(name): value for name, value in arrays.items()}
  scores = pairs = None
  if seen:
    scores, valid = (np.asarray(v).swapaxes(0, 1) for v in seen[0])
    pairs = (scores.argmax(-1), scores.argmin(-1), valid)
  return Outcome(float(metrics["loss"]), float(metrics["grad_norm"]), arrays, scores, pairs)


def torch_outcome(case: str, size: str, folder: pathlib.Path, config: Any | None = None) -> Outcome:
  """Returns the same step in PyTorch, from what `jax_outcome` wrote."""
  import torch

  config = check_recipe(case, size) if config is None else config
  batch, empty_ids = torch_steps.load_batch(folder / f"{case}.npz", "cpu")
  models = torch_steps.load_models(folder, config, device="cpu", empty_ids=empty_ids)
  with np.load(folder / f"{case}.npz") as arrays:
    timesteps = torch.from_numpy(arrays["timesteps"]).long() if "timesteps" in arrays else None

  def normal(rows, shape):
    channels, height, width = shape
    return torch.from_numpy(fixed_noise((rows, height, width, channels))).permute(0, 3, 1, 2)

  draws = torch_steps.Draws(
    normal=normal,
    timesteps=lambda n: timesteps,
    members=lambda n, k: torch.from_numpy(fixed_members(n, k)).long(),
    order=torch.arange,
  )
  trained = {n: p for n, p in models.unet.named_parameters() if p.requires_grad}
  before = {n: p.detach().clone() for n, p in trained.items()}
  optimizer = torch_steps.make_optimizer(config, list(trained.values()))
  found = torch_steps.STEPS[config.objective](models, config, optimizer, batch, draws)
  assert found.counts.get("updates", 1) == 1
  change = {n: (p.detach() - before[n]).numpy() for n, p in trained.items()}
  scores = pairs = None
  if found.scores is not None:
    scores, pairs = found.scores.numpy(), tuple(v.numpy() for v in found.pairs)
  return Outcome(float(found.loss), float(found.grad_norm), change, scores, pairs)


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
  """Returns relative differences of loss, gradient norm, scores and update, and the share of pairs that differ."""
  relative = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a))
  if ours.change.keys() != theirs.change.keys():
    raise SystemExit(f"error: the two train other parameters: {sorted(ours.change.keys() ^ theirs.change.keys())[:4]}.")
  names = sorted(ours.change)
  flat = [np.concatenate([o.change[n].ravel() for n in names]).astype(np.float64) for o in (ours, theirs)]
  found = {
    "loss": relative(np.float64(ours.loss), theirs.loss),
    "grad_norm": relative(np.float64(ours.grad_norm), theirs.grad_norm),
    "update": relative(*flat),
  }
  if ours.scores is not None and ours.pairs is not None and theirs.pairs is not None:
    found["scores"] = relative(ours.scores, theirs.scores)
    same = [np.asarray(a == b) for a, b in zip(ours.pairs, theirs.pairs, strict=True)]
    found["other_pairs"] = 1.0 - float(np.mean(np.all(same, axis=0)))
  return found


def disagreements(found: Mapping[str, float]) -> list[str]:
  """Returns which of `differences` are above their bounds; no pair may differ."""
  return [name for name, value in found.items() if not value <= BOUNDS.get(name, 0.0)]


def check(case: str, size: str) -> list[str]:
  """Runs both, prints the numbers, and returns what disagrees."""
  with tempfile.TemporaryDirectory() as folder:
    ours = jax_outcome(case, size, pathlib.Path(folder))
    theirs = torch_outcome(case, size, pathlib.Path(folder))
  found = differences(ours, theirs)
  bad = disagreements(found)
  parts = [
    f"loss {ours.loss:.6f} (jaxpref), {theirs.loss:.6f} (torch)",
    *(f"{name.replace('_', ' ')} {value:.1e}" for name, value in found.items()),
  ]
  if ours.pairs is not None:
    parts.append(f"{ours.pairs[2].size} pairs, {int(ours.pairs[2].sum())} of them valid")
  print(f"{case} {size}: {'; '.join(parts)}: {'DIFFERENT: ' + ', '.join(bad) if bad else 'the same'}", flush=True)
  return bad


def _failed(case: str, size: str) -> bool:
  """Returns whether a case's check failed; in a process without an accelerator, as TF32 is no float32."""
  done = bench_torch.child(["--child", case, "--size", size], script="torch_check.py", hidden=True)
  if done.returncode not in (0, 1) or (done.returncode == 1 and "Traceback" in done.stderr):
    print(done.stderr, file=sys.stderr)
  return done.returncode != 0


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=("smoke", *bench.BATCH), default="smoke", help="default: %(default)s")
  parser.add_argument("--cases", nargs="+", choices=bench_torch.CASES, default=bench_torch.CASES)
  parser.add_argument("--child", choices=bench_torch.CASES, help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.child:
    raise SystemExit(bool(check(args.child, args.size)))
  failed = [case for case in args.cases if _failed(case, args.size)]
  if failed:
    raise SystemExit(f"error: {', '.join(failed)}: not the same as jaxpref, or could not be run; see above.")


if __name__ == "__main__":
  main()
