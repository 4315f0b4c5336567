"""Eight virtual CPU devices, and no silent broadcasting between arrays of different rank."""

import functools
import gc
import importlib.util
import os
import pathlib
import tempfile

from tests import QUICK_FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  f" {QUICK_FLAGS}"
  # Eight devices that share two busy cores may wait long for one another; by default they are given up after 40 s.
  " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
)

# What one test has compiled another one need not, in any process of these tests; removed with the first of them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _programs = tempfile.TemporaryDirectory(prefix="jaxpref_tests_", ignore_cleanup_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

os.environ.setdefault("NPROC", "32")  # threads: a device that waits for another one holds one, and all may wait at once

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Traces make many objects that live: looking for circles among them as often as by default takes a fifth of a test.
gc.set_threshold(200_000, 20, 1000)


# The files that take longest. They begin first, so that none runs when the other process has nothing left to do.
LONGEST = (
  "training/command_test.py",
  "training/loop_test.py",
  "sd3_run_test.py",
  "bad_input_test.py",
  "extending_test.py",
  "numbers_test.py",
  "rewards/published_test.py",
  "models/unet_test.py",
  "image_sizes_test.py",
  "sample_test.py",
  "models/sd3/transformer_test.py",
  "precompute_test.py",
  "files/adapters_test.py",
  "training/step_test.py",
  "planning/plan_test.py",
  "cost_test.py",
  "objectives/pairs_test.py",
  "replay_test.py",
  "evaluate_test.py",
  "text_to_image_test.py",
  "objectives/spo_test.py",
  "data/pipeline_test.py",
  "files/single_file_test.py",
  "objectives/policy_gradient_test.py",
  "models/sd3/model_test.py",
  "files/sd3_adapters_test.py",
  "diffusion/flow_test.py",
  "mesh_test.py",
  "models/lora_test.py",
  "configs_test.py",
  "data/emoji_pairs_test.py",
)


def pytest_collection_modifyitems(items):
  order = {pathlib.Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_addoption(parser):
  parser.addoption(
    "--all-compilers",
    action="store_true",
    help="fail where a compiler for absent devices is missing, rather than skip",
  )


def pytest_runtest_setup(item):
  for marker in item.iter_markers("compiler"):
    (module,) = marker.args
    try:
      missing = importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # of the package that it lies in
      missing = True
    if missing:
      (pytest.fail if item.config.getoption("--all-compilers") else pytest.skip)(f"needs {module}")


@pytest.fixture(autouse=True, scope="session")
def networks_are_traced_once():
  """The shapes of a network's parameters, and those that start constant, which every loading asks for."""
  from jaxpref.models import presets

  shapes = functools.cache(presets.abstract_params)
  compute, computed = presets._constant_params, {}

  def constants(module):
    """Copies, since training may donate them."""
    if module not in computed:
      found = compute(module)
      if any(isinstance(x, jax.core.Tracer) for x in found):
        return found
      computed[module] = jax.device_get(found)
    return [jax.numpy.array(x) for x in computed[module]]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(presets, "abstract_params", lambda module: jax.tree.map(lambda shape: shape, shapes(module)))
    patch.setattr(presets, "_constant_params", constants)
    yield


@pytest.fixture(scope="module")
def one_device():
  """Commands and runs of a file use one device, for which a program takes less time to compile than for eight."""
  from jaxpref.devices import sharding

  make_mesh = sharding.make_mesh

  def of_one(*args, devices=None, **kwargs):
    of_all = devices is None or len(devices) == jax.device_count()
    return make_mesh(*args, devices=jax.devices()[:1] if of_all else devices, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", of_one)
    yield


@pytest.fixture(autouse=True, scope="module")
def free_what_a_file_compiled():
  """A program stays in JAX's caches as long as the process does, and no file runs what another one compiled.

  What is left then are modules, mostly: frozen, the next collection need not look at them, which takes a second.
  """
  yield
  jax.clear_caches()
  gc.collect()
  gc.freeze()
