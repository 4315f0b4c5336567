"""Runs the frozen networks over a recipe's data once, so that training needs neither the VAE nor the text encoders:

    python -m jaxpref.precompute --config=configs/dpo_sdxl.py --config.data.path=PICKAPIC --out=FOLDER
    python -m jaxpref.main --config=configs/dpo_sdxl.py --config.data.source=precomputed --config.data.path=FOLDER

Training then takes the same steps as without: it still draws from the VAE's posterior, drops captions and mirrors
images itself. The same command continues after any interruption; it fails while the first one still runs. All devices
of a host take part; with --config.mesh.fsdp=N, large networks such as T5 are split over N of them. Several hosts,
started as for training (docs/operations.md), share the files among them if they get the same FOLDER, on a disk that all
of them see or in a bucket (gs://); each waits at the end until all have finished.

    python -m jaxpref.precompute --verify --out=FOLDER    # reads all files and names the damaged ones

jaxpref/data/latents.py describes the files.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

import jaxpref
from jaxpref import arguments
from jaxpref import config as config_lib
from jaxpref.config import AnyConfig, Config
from jaxpref.data import batching, latents, lease, paths
from jaxpref.devices import chips, distributed, endings, sharding
from jaxpref.devices.progress import tqdm
from jaxpref.files import family as families
from jaxpref.files import loading
from jaxpref.models.base import Model
from jaxpref.training import build, inputs

GIB = 2.0**30
AGAIN = "run the same command again to continue"
WAIT_SECONDS = 5.0  # between two looks at the files of other processes
# Non-finite values raise; float16 ends at 65504.
REMEDY = "set config.dtype=float32, or config.vae_model to a VAE that is made for half precision"

Encode = Callable[[np.ndarray], Any]


def run(
  config: AnyConfig,
  out: str | os.PathLike,
  *,
  rows_per_file: int = 2048,
  batch_size: int = 8,
  process_index: int | None = None,
  process_count: int | None = None,
) -> bool:
  """Makes this process's files of a folder, and completes the folder if the others' files are there.

  JAX processes wait for each other's files, so that none leaves before the folder is complete: JAX ends all of them
  some minutes after the first one has left.

  Args:
    config: a recipe of dpo, tdpo, kto, lrm or denoise.
    out: a new folder, or one begun with the same config and weights.
    rows_per_file: pairs or images in a file. Processes share the work in units of a file, and lose at most one when
      they die.
    batch_size: images, or prompts, on each device at a time.
    process_index, process_count: number of this process and of all; JAX's by default.

  Returns:
    Whether the folder is complete.
  Raises:
    ValueError, OSError: one sentence on what is missing, does not fit, or cannot be written.
  """
  config = config_lib.typed(config)
  check(config, rows_per_file=rows_per_file, batch_size=batch_size)
  folder = paths.open_path(out)
  index = jax.process_index() if process_index is None else process_index
  count = jax.process_count() if process_count is None else process_count
  together = jax.process_count() > 1
  plan: dict[str, Any] = {
    "format": latents.FORMAT,
    "kind": inputs.precomputable(config_lib.facts(config)),
    "config": inputs.precomputed_fields(config) | {"image_size": config.image_size},
    "rows_per_file": rows_per_file,
  }
  latents.check_plan(folder, plan)  # before anything that takes time
  inputs.look_for(config)
  families.look_for(families.get(config.family), loading.model_name(config), vae_model=config.vae_model)
  build.check_image_size(config)
  plan |= {"weights": inputs.encoder_fingerprints(config), "data": inputs.data_fingerprint(config)}
  latents.check_plan(folder, plan)
  if is_complete(folder):
    _say(f"{folder} is complete.")
    return True
  # Processes that do not know of each other divide a folder by their numbers.
  name = lease.NAME if together or count == 1 else f"writer_lock_{index}.json"
  with lease.hold(folder, name=name) as held:
    return _run(config, folder, plan, held, batch_size=batch_size, index=index, count=count)


@dataclasses.dataclass(frozen=True)
class _Share:
  """Which files of a folder this process makes.

  Attributes:
    held: the lease of the folder, or of this process's share of it.
    index, count: number of this process and of all.
    together: whether these are JAX processes, which wait for each other.
  """

  folder: Any
  held: lease.Held
  rows_per_file: int
  index: int
  count: int
  together: bool

  def names(self, kind: str, num_rows: int) -> list[str]:
    """Returns the names of the files for a number of rows or prompts."""
    num_files = -(-num_rows // self.rows_per_file)
    return [latents.file_name(kind, i, num_files) for i in range(num_files)]

  def own(self, num_files: int) -> range:
    """Returns the numbers of this process's files."""
    return range(self.index, num_files, self.count)

  def part(self, i: int) -> slice:
    """Returns which of all rows or prompts file i holds."""
    return slice(i * self.rows_per_file, (i + 1) * self.rows_per_file)


@dataclasses.dataclass(frozen=True)
class _Networks:
  """A model, its parameters on every device of the mesh or split over its axis `fsdp`, and the mesh."""

  model: Model
  params: Any
  mesh: jax.sharding.Mesh


def _run(
  config: Config,
  folder: Any,
  plan: dict[str, Any],
  held: lease.Held,
  *,
  batch_size: int,
  index: int,
  count: int,
) -> bool:
  """Does the work of `run` in a folder, or a share of one, that only this run writes."""
  # ---- Networks and data -------------------------------------------------------------------------------------
  mesh = sharding.make_mesh(fsdp=math.gcd(config.mesh.fsdp, jax.local_device_count()), devices=jax.local_devices())
  split = mesh.shape["fsdp"] > 1
  where = functools.partial(sharding.tree_shardings, mesh) if split else sharding.replicated(mesh)
  of = families.get(config.family)
  with families.opened(config.family):
    pipe = of.load(
      loading.model_name(config),
      dtype=config.dtype,
      seed=config.seed,
      param_dtype=config.dtype,
      sharding=where,
      vae_model=config.vae_model,
      components=[name for name in of.networks if name not in families.of_denoiser(of)],
    )
    model = of.model(pipe, vae_slicing=config.vae_slicing * mesh.size or None)
  model = build.at_size(config, model)
  data = _open_data(config, model, pipe.tokenize)
  empty = pipe.tokenize([""])[0]
  plan |= {
    "image_size": model.image_size,
    "num_rows": data.num_records,
    "empty_prompt": latents.prompt_key(empty),
  }
  latents.start(folder, plan, process_index=index, process_count=count)

  # ---- Rows, prompts, and the end ----------------------------------------------------------------------------
  share = _Share(folder, held, plan["rows_per_file"], index, count, together=jax.process_count() > 1)
  networks = _Networks(model, pipe.params if split else jax.device_put(pipe.params, where), mesh)
  rows = _write_rows(share, networks, data, empty, config, batch_size=batch_size)
  if missing := _unfinished(folder, rows, wait=share.together):
    _say(f"{len(missing)} files of other processes are not finished; the last process completes {folder}.")
    return False
  keys, input_ids = latents.different_prompts(folder, rows)
  prompts = _write_prompts(share, networks, keys, input_ids, batch_size=batch_size)
  _unfinished(folder, prompts, wait=share.together)
  if share.together and index != 0:
    while not is_complete(folder):
      time.sleep(WAIT_SECONDS)
    return True
  held.check()
  latents.write_prompts(folder, keys, input_ids, process_index=index)
  versions = {"jaxpref": jaxpref.__version__} | {p: importlib.metadata.version(p) for p in ("jax", "flax", "numpy")}
  latents.write_manifest(folder, {"rows": rows, "prompts": prompts}, versions, process_index=index)
  _say(f"{folder} is complete: train with --config.data.source=precomputed --config.data.path={folder}")
  return True


def _write_rows(
  share: _Share, networks: _Networks, data: batching.Batches, empty: np.ndarray, config: Config, *, batch_size: int
) -> list[str]:
  """Makes this process's files of rows that do not exist yet.

  Args:
    empty: i32[L], the empty prompt.
    batch_size: images on each device at a time.

  Returns:
    The names of all files, including those of other processes.
  """
  model, mesh, flip = networks.model, networks.mesh, config.data.flip
  names = share.names("rows", data.num_records)
  num_files = len(names)
  pairs = inputs.precomputable(config_lib.facts(config)) == "pairs"
  images_per_row = (2 if pairs else 1) * (2 if flip else 1)
  rows_at_a_time = max(1, batch_size * mesh.size // images_per_row)
  encode = _encoder(networks, inputs.stored_moments, rows_at_a_time * images_per_row)
  size = data.num_records * images_per_row * 2 * int(np.prod(model.latent_shape)) * np.dtype(latents.DTYPE).itemsize
  _say(f"{data.num_records} rows, {images_per_row} images each: {size / GIB:.1f} GiB in {num_files} files, and prompts")
  mine = [i for i in share.own(num_files) if latents.finished(share.folder, names[i]) is None]
  places = {i: range(data.num_records)[share.part(i)] for i in mine}
  num_images = images_per_row * sum(map(len, places.values()))
  with tqdm(total=num_images, desc="images", unit=" images", disable=share.index != 0) as bar:
    for i, positions in places.items():
      known = set(data.skipped)
      share.held.check()
      records = _row_records(
        _numbered_rows(data, positions, flip=flip, num_threads=config.data.num_threads),
        empty,
        encode,
        rows_at_a_time,
        on_rows=lambda n: bar.update(n * images_per_row),
      )
      latents.write_file(
        share.folder,
        names[i],
        records,
        skipped=lambda known=known: set(data.skipped) - known,  # type: ignore[misc]
        process_index=share.index,
      )
  return names


def _write_prompts(
  share: _Share, networks: _Networks, keys: np.ndarray, input_ids: np.ndarray, *, batch_size: int
) -> list[str]:
  """Makes the missing files of prompts: this process's, or all of them if processes do not wait for each other.

  Args:
    keys, input_ids: i64[n] and i32[n, L] of all different prompts.
    batch_size: prompts on each device at a time.

  Returns:
    The names of all files.
  """
  names = share.names("prompts", len(keys))
  rows_at_a_time = batch_size * networks.mesh.size
  encode = _encoder(networks, inputs.stored_text, rows_at_a_time)
  mine = share.own(len(names)) if share.together else range(len(names))
  with tqdm(total=len(mine), desc="prompts", unit=" files", disable=share.index != 0) as bar:
    for i in mine:
      share.held.check()
      part = share.part(i)
      if latents.finished(share.folder, names[i]) is None:
        records = _prompt_records(keys[part], input_ids[part], encode, rows_at_a_time)
        latents.write_file(share.folder, names[i], records, process_index=share.index)
      bar.update()
  return names


def check(config: Config, *, rows_per_file: int, batch_size: int) -> None:
  """Raises ValueError for what cannot be precomputed, before anything is loaded."""
  config_lib.check(config)
  counts = argparse.Namespace(rows_per_file=rows_per_file, batch_size=batch_size)
  arguments.check_numbers(counts, "rows_per_file")
  arguments.check_numbers(counts, "batch_size", most=arguments.MAX_AT_A_TIME)
  if inputs.precomputable(config_lib.facts(config)) is None:
    raise ValueError(
      f"config.objective={config.objective!r} needs the VAE while it trains, so nothing can be precomputed for it; "
      f"expected one of {', '.join(n for n, facts in config_lib.FACTS.items() if inputs.precomputable(facts))}."
    )
  if config.data.source == "precomputed":
    raise ValueError(
      "config.data.source='precomputed' is what this command makes; set the source of the images to make it from."
    )
  if config.train_text_encoder:
    raise ValueError(
      "config.train_text_encoder=True changes the text encoder, so prompts cannot be encoded beforehand."
    )
  if config.data.random_crop:
    raise ValueError("config.data.random_crop=True draws other crops each epoch; precomputed data need it to be False.")


def is_complete(folder: Any) -> bool:
  """Returns whether all files exist in their full size."""
  try:
    latents.open_folder(folder)
  except (FileNotFoundError, latents.DamagedFile):
    return False
  return True


def _unfinished(folder: Any, names: Sequence[str], *, wait: bool) -> list[str]:
  """Returns the files that do not exist yet; with `wait`, waits until there are none."""
  told = False
  while missing := [name for name in names if latents.finished(folder, name) is None]:
    if not wait:
      break
    if not told:
      _say(f"waiting for {len(missing)} files of other processes ...")
    told = True
    time.sleep(WAIT_SECONDS)
  return missing


def _open_data(config: Config, model: Model, tokenize: batching.Tokenize) -> batching.Batches:
  """Returns the recipe's data, whose rows are read one by one."""
  config = config_lib.replace(
    config, {"batch_size": jax.process_count()}
  )  # the smallest possible: batches are never read
  return inputs.offline_batches(config, model.image_size, tokenize)


def _encoder(networks: _Networks, stored: Callable[..., Any], rows: int) -> Encode:
  """Returns a function of at most `rows` rows x that calls (model, params, x) on all devices, as a single program."""
  mesh = networks.mesh
  rows = -(-rows // mesh.size) * mesh.size
  function: Callable[..., Any] = functools.partial(stored, networks.model)
  if mesh.shape["fsdp"] > 1:
    function = sharding.on_mesh(mesh, function)
  compiled = jax.jit(function, compiler_options=chips.compiler_options())

  def encode(x: np.ndarray) -> Any:
    padded = np.concatenate([x, np.broadcast_to(x[-1:], (rows - len(x), *x.shape[1:]))])
    return compiled(networks.params, jax.device_put(padded, sharding.batch_sharding(mesh)))

  return encode


def _numbered_rows(
  data: batching.Batches, positions: range, *, flip: bool, num_threads: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yields rows of the data with their positions; with `flip` also the rows with mirrored images."""
  rows = data.rows(positions, num_threads=num_threads)
  if flip:
    mirrored = data.rows(positions, flipped=True, num_threads=num_threads)
    rows = (a | {f"{latents.FLIPPED}{k}": v for k, v in b.items()} for a, b in zip(rows, mirrored, strict=True))
  return zip(positions, rows, strict=True)


def _row_records(
  rows: Iterator[tuple[int, dict[str, np.ndarray]]],
  empty: np.ndarray,
  encode: Encode,
  rows_at_a_time: int,
  *,
  on_rows: Callable[[int], object],
) -> Iterator[latents.Record]:
  """Yields the records of one file. The devices encode while the next images are read.

  Args:
    rows: rows of the data with their positions.
    empty: i32[L], the empty prompt.
    encode: function of images u8[n, H, W, 3].
    rows_at_a_time: rows whose images are encoded together.
    on_rows: called with the number of rows done.
  """
  prompts = {latents.prompt_key(empty): empty}

  def records(chunk: list[tuple[int, dict[str, np.ndarray]]], encoded: Any) -> Iterator[latents.Record]:
    moments = iter(np.asarray(encoded))
    for position, row in chunk:
      record = {}
      for field, value in row.items():
        if "pixels" in field:
          record[field.replace("pixels", "moments")] = found = next(moments)
          if not np.isfinite(found).all():
            raise ValueError(
              f"row {position} of the data: the VAE makes no finite float16 latents of {field}; {REMEDY}."
            )
        elif field.endswith("input_ids"):
          key = latents.prompt_key(value)
          prompts[key] = value
          record[field.replace("input_ids", "prompt")] = np.asarray(key)
        else:
          record[field] = value
      yield record
    on_rows(len(chunk))

  before: tuple[list[tuple[int, dict[str, np.ndarray]]], Any] | None = None
  while chunk := list(itertools.islice(rows, rows_at_a_time)):
    now = chunk, encode(np.stack([v for _, row in chunk for field, v in row.items() if "pixels" in field]))
    if before is not None:
      yield from records(*before)
    before = now
  if before is not None:
    yield from records(*before)
  yield {"input_ids": np.stack(list(prompts.values()))}


def _prompt_records(
  keys: np.ndarray, input_ids: np.ndarray, encode: Encode, rows_at_a_time: int
) -> Iterator[latents.Record]:
  """Yields the records of one file of prompts, i64[n] and i32[n, L]."""
  for start in range(0, len(keys), rows_at_a_time):
    part = slice(start, start + rows_at_a_time)
    fields = jax.tree.map(np.asarray, encode(input_ids[part]))
    for i, key in enumerate(keys[part]):
      record = {name: values[i] for name, values in fields.items()}
      if not all(np.isfinite(value).all() for value in record.values()):
        bad = next(name for name, value in record.items() if not np.isfinite(value).all())
        kind = np.dtype(record[bad].dtype).name
        raise ValueError(f"the text encoders make no finite {kind} of the prompt with ids {input_ids[start + i]}.")
      yield record | {"prompt": np.asarray(key)}


def verify(folder: str | os.PathLike) -> list[str]:
  """Reads all files of a complete folder; returns a sentence for each damaged one."""
  problems = []
  for name, error in (bar := tqdm(latents.damaged_files(folder), unit=" files")):
    bar.set_postfix_str(name, refresh=False)
    if error is not None:
      problems.append(str(error))
  return problems


def _say(message: str) -> None:
  tqdm.write(message, file=sys.stderr)


def main(argv: list[str]) -> None:
  """Precomputes or verifies; an expected error ends the program with one sentence."""
  del argv
  options = flags.FLAGS
  if not options["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  expected = (ValueError, OSError) if logging.get_verbosity() <= 0 else ()
  with endings.one_sentence(*expected, doing=f"precomputing into {options.out}", again=AGAIN):
    if options.verify:
      problems = verify(options.out)
      sys.exit("\n".join(f"error: {p}" for p in problems) if problems else 0)
    if options.config is None:
      raise ValueError("--config is missing; give the recipe, e.g. --config=configs/dpo_sdxl.py.")
    launch = distributed.find_launch(**distributed.given_flags())
    with distributed.joined(launch, options.out, expected=expected):
      run(options.config, options.out, rows_per_file=options.rows_per_file, batch_size=options.batch_size)


def start() -> None:
  """Runs the command: the console entry point."""
  config_flags.DEFINE_config_file("config", None, "The recipe. Change a field with --config.NAME=VALUE.")
  arguments.define_place("out", None, "The folder to make, to continue or to verify.")
  flags.DEFINE_integer("rows_per_file", 2048, "Pairs or images in a file; a process that dies loses at most one file.")
  flags.DEFINE_integer("batch_size", 8, "Images, or prompts, on each device at a time.")
  flags.DEFINE_bool("verify", False, "Only compare all files with the checksums of manifest.json.")
  distributed.define_flags()
  flags.mark_flag_as_required("out")
  with endings.one_sentence(doing="precomputing", again=AGAIN):
    app.run(main, flags_parser=arguments.parse_flags)


if __name__ == "__main__":
  start()
