"""Plans a training step before it is compiled: the bytes it gets, and what would make it smaller."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.config import Config
from jaxpref.devices import sharding
from jaxpref.files import family as families
from jaxpref.files import loading
from jaxpref.models import lora, presets
from jaxpref.models.base import is_guided
from jaxpref.objectives import catalog
from jaxpref.recipes.rewards import of_preference_model, reward_terms
from jaxpref.rewards import base as rewards
from jaxpref.rewards import terms
from jaxpref.training import build, inputs, networks, programs, step

LORA_RANK = 64  # of the adapter that `changes` propose instead of full training


def without_weights(config: ConfigDict) -> ConfigDict:
  """Returns the same recipe on shapes alone, and on the embedded data resized to the model's images.

  Another VAE or UNet is planned like the model's own. Preference models and latent reward models are those of the
  preset; other rewards have their published shapes, or those of their folder's config.json (`rewards.shapes`). The
  folder of precomputed data (`data.path`) is not read and need not exist.

  Raises:
    ValueError: the shapes of a model or a reward are not known.
  """
  config = config.copy_and_resolve_references()
  of = catalog.method(config).facts
  model = families.get(config.family).without_values(loading.with_config(config.model, config.model_config))
  preset = model.partition(":")[2]
  scorer = f"zeros:{preset if preset in presets.PRESETS else 'sd15'}"
  reward = terms.without_values(config, scorer) if of.online else ""
  scored = of.scorer and (not of.online or bool(of_preference_model(reward_terms(config))))
  with config.unlocked():
    config.model = model
    config.model_config = config.vae_model = config.unet_model = None
    config.reward = reward
    config.preference_model = scorer if scored else None
    config.judge = None
    config.lora.init_from = None
    precomputed = config.data.source == "precomputed"
    config_lib.use_embedded_data(config)
    if precomputed:
      config.data.update(source="precomputed", path="not read")
  config_lib.check(config)
  return config


def _build(config: ConfigDict, batch_devices: int) -> tuple[build.Experiment, Any, Any]:
  """Returns the experiment of a config `without_weights`, and the shapes of its trained and its frozen parameters."""
  row = config.copy_and_resolve_references()
  row.batch_size = 1  # only the data depend on it
  row.data.source = "emoji"
  built: list[build.Experiment] = []

  def shapes():
    built.append(build.build(row, batch_devices=batch_devices))
    return built[0].params, built[0].frozen

  params, frozen = jax.eval_shape(shapes)
  unused = set(families.get(config.family).networks) - set(networks.needed(config))
  return built[0], params, {name: tree for name, tree in frozen.items() if name not in unused}


@dataclasses.dataclass(frozen=True)
class Planned:
  """A training step, and ShapeDtypeStructs of its arguments, with their shardings.

  Attributes:
    halves: those of `step.make_halves`, not yet jitted.
    reward: reward of an online method, if it has one.
    state, frozen, batch: arguments of the step.
  """

  halves: tuple[step.DrawFn, step.LearnFn]
  reward: rewards.Weighted | None
  state: Any
  frozen: Any
  batch: Any


def planned(config: ConfigDict, mesh: Mesh) -> Planned:
  """Returns the training step of a config `without_weights`."""
  experiment, params, frozen = _build(config, sharding.batch_devices(mesh))
  optimizer, _ = programs.make_optimizer(config)
  state, frozen = _placed(config, mesh, experiment, params, frozen)
  rows = sharding.batch_sharding(mesh)
  one = next(experiment.batches())
  if config.data.source == "precomputed":
    one = _precomputed(config, experiment, one)
  batch = {
    key: jax.ShapeDtypeStruct((config.batch_size, *value.shape[1:]), value.dtype, sharding=rows)
    for key, value in one.items()
  }
  return Planned(programs.make_halves(config, experiment, optimizer, mesh), experiment.reward, state, frozen, batch)


def abstract_inputs(config: ConfigDict, mesh: Mesh) -> tuple[Any, Any, Any, Any]:
  """Returns the step of a config `without_weights` as one program without host rewards; and its arguments.

  Returns:
    step, and its arguments: state, frozen, batch.
  """
  p = planned(config, mesh)
  return sharding.on_mesh(mesh, step.joined(*p.halves)), p.state, p.frozen, p.batch


def _precomputed(config: ConfigDict, experiment: build.Experiment, batch: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a batch of images and prompts as the shapes that `precompute` makes of them."""
  assert experiment.model is not None
  whole = config.copy_and_resolve_references()
  whole.data.source = "emoji"
  encoders = _build(whole, 1)[2]
  stored = functools.partial(jax.eval_shape, functools.partial(inputs.stored_moments, experiment.model), encoders)
  found: dict[str, Any] = {}
  for key, value in batch.items():
    if key == "input_ids" and not catalog.method(config).facts.encodes_text:
      found |= jax.eval_shape(functools.partial(inputs.stored_text, experiment.model), encoders, value)
    elif key.startswith("pixels"):
      found[key.replace("pixels", "moments")] = stored(value)
    else:
      found[key] = value
  return found


def state_bytes(config: ConfigDict, mesh: Mesh) -> dict[str, int]:
  """Returns `argument_bytes` of a config `without_weights` except its batch, which stays 0; opens no data."""
  return argument_bytes(*_placed(config, mesh, *_build(config, sharding.batch_devices(mesh))))


def _placed(config: ConfigDict, mesh: Mesh, experiment: build.Experiment, params: Any, frozen: Any) -> tuple[Any, Any]:
  """Returns ShapeDtypeStructs of the state and of frozen parameters, with their shardings on a mesh."""
  optimizer, _ = programs.make_optimizer(config)
  state = jax.eval_shape(programs.state_initializer(experiment, optimizer), params)

  def placed(tree):
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
    return jax.tree.map(place, tree, sharding.tree_shardings(mesh, tree))

  return placed(state), placed(frozen)


def argument_bytes(state: Any, frozen: Any, batch: Any = None) -> dict[str, int]:
  """Returns the bytes a step gets on one device, by component; see `abstract_inputs` for the arguments."""
  return {
    "trained": device_bytes(state.params),
    "reference": device_bytes(state.ref_params),
    "optimizer": device_bytes(state.opt_state),
    **{f"frozen {name}": device_bytes(tree) for name, tree in frozen.items()},
    "batch": device_bytes(batch),
  }


def reward_sizes(reward: rewards.Weighted | None, frozen: Any) -> dict[str, dict[str, int]]:
  """Returns for each reward in the graph, by name, its `parameters` and their `bytes` on one device.

  Args:
    frozen: see `abstract_inputs`.
  """
  of_each = {} if reward is None else {r.name: frozen[r.component] for r, _ in reward.graph}
  count = lambda tree: sum(s.size for s in jax.tree.leaves(tree))
  return {name: {"parameters": count(tree), "bytes": device_bytes(tree)} for name, tree in of_each.items()}


def device_bytes(tree: Any) -> int:
  """Returns the bytes of ShapeDtypeStructs on one device."""
  return sum(int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in jax.tree.leaves(tree))


# ---- Sizes of updates -------------------------------------------------------------------------------------------


def denoiser_rows(config: Config, devices: int) -> int:
  """Returns the rows that the denoiser has on one device in a micro-batch of an update.

  Args:
    devices: number of devices that the batch is spread over.
  """
  micro = lambda rows: -(-rows // (config.accumulation * devices))
  method = catalog.method(config)
  u = method.updates(config)
  rows = u.passes * micro(u.rows) + u.other_passes * micro(u.other_rows)
  guided = method.facts.online and method.options and is_guided(getattr(config, method.options).guidance_scale)
  return rows * (2 if guided else 1)


# ---- What would make it fit ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
  """Other values of the settings that decide about memory.

  Attributes:
    accumulation: number of micro-batches in an update.
    fsdp: number of devices that parameters are split over.
    remat: what the denoiser's backward pass recomputes.
    rank: rank of an adapter that is trained instead of the network; 0: none.
  """

  accumulation: int
  fsdp: int
  remat: str
  rank: int

  def apply(self, config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config with these values."""
    new = config.copy_and_resolve_references()
    new.update(accumulation=self.accumulation, remat=self.remat)
    if self.fsdp != config.mesh.fsdp:
      new.mesh.update(data=-1, fsdp=self.fsdp)
    if self.rank:
      new.lora.rank = self.rank
      new.optimizer.name = "adamw"
    return new

  def flags(self, config: ConfigDict) -> str:
    """Returns what to add to a config's command line for this change."""
    new, found = self.apply(config), []
    for name in ("accumulation", "mesh.data", "mesh.fsdp", "remat", "lora.rank", "optimizer.name"):
      before, after = (functools.reduce(lambda c, key: c[key], name.split("."), c) for c in (config, new))
      found += [f"--config.{name}={after}"] if before != after else []
    return " ".join(found)


def changes(config: ConfigDict, devices: int) -> Iterator[Change]:
  """Yields changes in the order of their cost.

  More micro-batches only cost launches, more sharding costs communication, recomputation costs operations, and LoRA is
  another training; the more expensive ones come with each choice of the cheaper ones.
  """
  rows = devices // config.mesh.tensor
  method = catalog.method(config)
  most = -(-method.updates(config).rows // rows) if method.facts.online else config.batch_size // rows
  accumulations = [n for n in range(config.accumulation, most + 1) if most % n == 0] or [config.accumulation]
  sizes = [n for n in range(config.mesh.fsdp, rows + 1) if rows % n == 0]
  # Otherwise it is one for each level, or not used.
  known = config.remat in config_lib.REMAT and method.facts.trains not in ("scorer", "latent_scorer")
  policies = config_lib.REMAT[config_lib.REMAT.index(config.remat) :] if known else (config.remat,)
  full = not config.lora.rank and method.facts.aligns
  for rank, remat, fsdp, accumulation in itertools.product(
    (0, LORA_RANK) if full else (0,), policies, sizes, accumulations
  ):
    change = Change(accumulation, fsdp, remat, rank)
    if change.flags(config):
      yield change


def estimates(config: ConfigDict, devices: Sequence[Any], report: Mapping[str, Any]) -> Iterator[tuple[Change, float]]:
  """Yields for each of `changes` the peak of bytes on a device, without compiling.

  Changes that a family of one's own refuses are left out. The arguments are exact. Of the temporaries, gradients have
  the size of the trained parameters. The rest is assumed to grow with the denoiser's rows of a micro-batch, less what
  its backward pass no longer keeps under another `remat`.

  Args:
    config: config `without_weights` that was compiled.
    devices: devices that it was compiled for.
    report: report of `compile.compile_step`: `arguments` and `peak`.
  """
  rows = len(devices) // config.mesh.tensor
  old = report["arguments"]
  # The gradients' sum, and those of a micro-batch.
  copies = lambda c: 2 if c.accumulation > 1 or catalog.method(c).facts.online else 1
  activations = max(report["peak"] - sum(old.values()) - copies(config) * old["trained"], 0)
  arguments: dict[tuple[int, int], dict[str, int] | None] = {}
  kept: dict[str, int | None] = {}
  refusals: type[ValueError] = ValueError if ":" in config.family else lora.RankError
  for change in changes(config, len(devices)):
    new = change.apply(config)
    key = change.fsdp, change.rank
    if key not in arguments:
      mesh = sharding.make_mesh(**new.mesh, devices=devices)
      try:
        arguments[key] = state_bytes(new, mesh) | {"batch": old["batch"]}
      except refusals:  # the network is smaller than the adapter, or has none
        arguments[key] = None
    known = arguments[key]
    if known is None:
      continue
    for remat in {config.remat, change.remat} - set(kept) if change.remat != config.remat else ():
      policy = config.copy_and_resolve_references()
      policy.remat = remat
      try:
        kept[remat] = kept_bytes(policy, denoiser_rows(config, rows))
      except refusals:  # a family that has no such policy
        kept[remat] = None
    before, after = (0, 0) if change.remat == config.remat else (kept[config.remat], kept[change.remat])
    if before is None or after is None:
      continue
    saved = before - after
    share = denoiser_rows(new, rows) / denoiser_rows(config, rows)
    yield (
      change,
      sum(known.values()) + copies(new) * known["trained"] + max(activations - saved, 0) * share,
    )


def kept_bytes(config: ConfigDict, rows: int) -> int:
  """Returns the bytes that a backward pass of the denoiser keeps of a forward pass on some rows, and parameters."""
  whole = config.copy_and_resolve_references()
  whole.data.source = "emoji"  # with text encoders, which give the shapes of the conditioning
  experiment, params, frozen = _build(whole, 1)
  model = experiment.model
  assert model is not None

  def backward(params, frozen):
    ids = jnp.broadcast_to(frozen["empty_ids"], (rows, frozen["empty_ids"].shape[1]))
    cond = jax.lax.stop_gradient(model.encode_text(frozen, ids))
    x = jnp.zeros((rows, *model.latent_shape))
    predict = lambda p: model.predict({**frozen, **p}, x, jnp.zeros((rows,), jnp.int32), cond)
    return jax.vjp(predict, params)[1]

  return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(jax.eval_shape(backward, params, frozen)))
