"""docs/extending.md: what it shows trains as it says, from a folder of the user's own."""

import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from configs import grpo_tiny
from jaxpref import compile, export, precompute, sample
from jaxpref import config as config_lib
from jaxpref.config import Facts
from jaxpref.devices import sharding
from jaxpref.diffusion import samplers
from jaxpref.files import adapters
from jaxpref.files import family as families
from jaxpref.models import presets
from jaxpref.objectives import base, catalog, pairs
from jaxpref.planning import plan
from jaxpref.recipes.facts import FAMILY_FACTS, FamilyFacts, family_facts
from jaxpref.rewards import published
from jaxpref.rewards.base import Weighted
from jaxpref.rewards.python import PythonReward
from jaxpref.training import build, inputs, loop, metrics
from tests import QUICK_FLAGS
from tests.small_presets import smaller, with_one_attention
from tests.stub_model import draw

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
TINY = {
  "model": "random:one-level", "judge": None, "num_steps": 2, "batch_size": 8, "logging.every": 1,
  "sample.every": 0, "evaluation.num_prompts": 0, "accumulation": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
  """The folder with the modules of the page, which Python finds."""
  folder = tmp_path_factory.mktemp("mine")
  for name, code in re.findall(r"```python\n# (\w+)\.py[^\n]*\n(.*?)```", PAGE, re.DOTALL):
    with (folder / f"{name}.py").open("a") as file:
      file.write(code)
  names = {"mine", "winners", "rwr", "pixels", "pixels_dpo"}
  assert {p.stem for p in folder.iterdir()} == names
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))
  for name in names:
    sys.modules.pop(name, None)


def trained(config, folder):
  config.update_from_flattened_dict(TINY)
  small = with_one_attention(smaller(presets.ONE_LEVEL))
  with mock.patch.dict(presets.PRESETS, {"one-level": small}):
    loop.run(config, str(folder))
  return [row for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]


def test_a_loss_of_ones_own(mine):
  w, l = draw(0, 5), draw(1, 5)
  of_name = pairs.pair_loss("mine:squared_hinge", beta=2.0)
  np.testing.assert_allclose(of_name(w, l, None), np.maximum(0, 1 - 2.0 * (w - l)) ** 2, rtol=1e-6)
  np.testing.assert_allclose(of_name(w, l, 0.5 * np.ones(5)), np.maximum(0, 1 - (w - l)) ** 2, rtol=1e-6)


@pytest.mark.slow  # a method of one's own is trained with below
def test_a_loss_of_ones_own_is_trained_with(mine, tmp_path):
  config = config_lib.default()
  config.loss.name = "mine:squared_hinge"
  rows = trained(config, tmp_path / "run")
  assert abs(rows[0]["loss"] - 1.0) < 1e-2  # policy and reference agree, but for rounding, times beta
  assert rows[1]["loss"] != rows[0]["loss"]


def test_names_that_the_page_imports_are_public():
  section = PAGE.split("## What is public")[1].split("\n## ")[0]
  whole = set(re.findall(r"`(jaxpref\.[\w.]+)`", section))
  parts = set()
  for names, module in re.findall(r"((?:`\w+`(?:, | and )?)+) of `(jaxpref[\w.]+)`", section):
    parts |= {f"{module}.{name}" for name in re.findall(r"`(\w+)`", names)}
    whole.discard(module)
  code = "".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
  imported = set()
  for module, names in re.findall(r"^from (jaxpref[\w.]*) import ([\w, ]+)$", code, re.MULTILINE):
    imported |= {f"{module}.{name}" for name in names.split(", ")}
  used = {f"jaxpref.models.lora.{name}" for name in re.findall(r"\blora\.(\w+)\(", code)}
  imported = imported - {"jaxpref.models.lora"} | used
  assert "jaxpref.objectives.noising" in imported and "jaxpref.models.lora.apply" in imported
  assert not {name for name in imported if name not in whole | parts and name.rpartition(".")[0] not in whole}
  for name in whole | parts:
    module, _, last = name.rpartition(".")
    assert hasattr(importlib.import_module(module), last) or importlib.import_module(name), name


def test_a_loss_of_ones_own_with_a_number_of_ones_own(mine):
  import mine as module

  w, l = draw(0, 5), draw(1, 5)
  hinged = np.maximum(0, 1 - 2.0 * (w - l))
  np.testing.assert_allclose(pairs.pair_loss("mine:cubed_hinge", beta=2.0)(w, l, None), hinged**3, rtol=1e-5)
  config = config_lib.default()
  config.update(objective="mine:HINGE", options={"power": 4.0})
  config.loss.beta = 2.0
  config_lib.check(config)
  config = config_lib.typed(config)
  method = catalog.method(config)
  assert method.reference(config) and method.updates(config) == catalog.Updates(1, config.batch_size, 2)
  pair = pairs.DenoisedPair(*[None] * 8, w, l, np.ones(5, np.float32))
  np.testing.assert_allclose(module.HINGE.make(config, None, None).loss_fn(pair), hinged**4, rtol=1e-5)


def table(heading):
  """The rows of the page's first table with this heading, as cells."""
  lines = PAGE[PAGE.index(heading) :].splitlines()[2:]
  return [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in itertools.takewhile(lambda x: x[:1] == "|", lines)
  ]


def fields_of(data):
  """By field of a batch of such rows, what the page says of its dtype and number of axes."""
  found = {}
  for names, rows, kind, _ in table("| Field | Rows |"):
    if rows == "all" or data in rows.split(", "):
      dtype, axes = re.fullmatch(r"(\w+)\[(.*)\]", kind).groups()
      found |= {name: (dtype, len(axes.split(","))) for name in re.findall(r"`(\w+)`", names)}
  return found


def described(batch):
  return {k: (v.dtype.str[1] + str(8 * v.dtype.itemsize), v.ndim) for k, v in batch.items()}


@pytest.mark.parametrize(
  ("objective", "data"), [("dpo", "pair"), ("kto", "liked"), ("denoise", "image"), ("grpo", "prompt")]
)
def test_batches_have_the_fields_of_the_page(objective, data):
  config = config_lib.default()
  config.update(objective=objective, batch_size=4)
  config.data.num_threads = 0
  assert config_lib.facts(config).data == data
  tokenize = lambda captions: np.zeros((len(captions), 7), np.int32)
  config = config_lib.typed(config)
  batches = (
    inputs.prompt_batches(config, tokenize) if data == "prompt" else inputs.offline_batches(config, 16, tokenize)
  )
  batch = next(batches)
  assert described(batch) == fields_of(data)
  assert all(len(v) == 4 for v in batch.values())


def test_the_tables_of_facts_and_methods_name_all_fields():
  assert [row[0].strip("`") for row in table("| Field of `Facts` |")] == list(Facts._fields)
  fields = {field.name for field in dataclasses.fields(catalog.Method)}
  assert {row[0].strip("`") for row in table("| Field of `Method` |")} == fields - {"facts", "options"}
  of_offline = {name for row in table("| Function | `Offline` |") for name in re.findall(r"`(\w+)", row[0])}
  assert of_offline == {name for name in vars(base.Objective) if not name.startswith("_")} - {"kinds"}


def test_a_method_of_ones_own(mine, tmp_path):
  import winners

  config = winners.get_config()
  assert config.options.scale == 2.0
  rows = trained(config, tmp_path / "run")
  for row in rows:
    np.testing.assert_allclose(row["loss"], 2.0 * row["error"], rtol=1e-4)
  assert (tmp_path / "run" / "export" / "model_index.json").is_file()
  assert "images_per_second" in rows[-1] and jax.process_count() == 1


def test_rewards_weigh_the_samples_of_a_prompt(mine):
  import rwr

  config = config_lib.default()
  config.update(objective="rwr:RWR", preference_model="tiny-spm", batch_size=3)
  config.options.update(group_size=2, temperature=0.5, minibatch=4)
  config_lib.check(config)
  config = config_lib.typed(config)
  assert catalog.method(config).updates(config) == catalog.Updates(2, 4, 1)
  python = PythonReward(published.Scorer("mine:colours", "", "", None), 1.0)
  model = mock.Mock(process=module_of("pixels").Flow())
  method = rwr.RewardWeighted(model, Weighted((), ((python, 0.25),)), config.options)
  x0 = draw(0, 6, 2, 2, 3)
  in_graph = method.reward.score(None, None, np.zeros(6), ())
  score = np.array([1.0, 3.0, 2.0, 2.0, 8.0, 0.0], np.float32)
  experience, means = method.experience(base.Drawn((x0, in_graph, "cond")), {"mine:colours": score}, jax.random.key(0))
  (rows,) = experience.kinds
  powers = np.exp(score.reshape(3, 2) / 4 / 0.5)
  expected = 2 * powers / powers.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(rows.data.weight, expected.reshape(-1), rtol=1e-5)
  np.testing.assert_array_equal(rows.data.x0, x0)
  np.testing.assert_array_equal(rows.prompt, [0, 0, 1, 1, 2, 2])
  np.testing.assert_allclose(means["largest_weight"], expected.max(axis=1).mean(), rtol=1e-5)
  assert method.update_rows(6) == 4 and len(np.unique(rows.data.t)) == 6


def module_of(name):
  return importlib.import_module(name)


@pytest.mark.parametrize("reward", ["preference_model", "mine:colours:0.05"])
def test_a_method_of_ones_own_draws_and_learns(mine, tmp_path, reward):
  """With a reward in the graph as one program, with one in Python as two; on the family of the page, which is quick."""
  config = grpo_tiny.get_config()
  config.update(objective="rwr:RWR", reward=reward, family="pixels:PIXELS")
  config.options = {"num_inference_steps": 2, "group_size": 2, "minibatch": 8}
  in_python = ":" in reward
  if in_python:
    config.preference_model = None
  config.update_from_flattened_dict(TINY | {"model": "random"})
  loop.run(config, str(tmp_path / "run"))
  rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
  assert len(rows) == 2
  for row in rows:
    assert row["updates"] == 2 and row["skipped_updates"] == 0 and row["grad_norm"] > 0
    assert 1 < row["largest_weight"] < 2 and 0 < row["loss"] < 2 * row["error"]
    assert not in_python or 0 < row["reward"] < 13


GRPO = [
  "--config.num_steps=2", "--config.batch_size=4", "--config.grpo.group_size=2", "--config.grpo.num_inference_steps=2",
  "--config.grpo.minibatch=8", "--config.model=random:one-level", "--config.preference_model=", "--config.judge=",
  "--config.sample.every=2", "--config.evaluation.num_prompts=0", "--config.logging.every=1",
  "--config.sample.num_prompts=2", "--config.evaluation.num_inference_steps=2",
]  # fmt: skip


def processes(folder, port, *arguments):
  """Two of jaxpref.main with a reward of the page: (exit codes, what they said)."""
  command = [sys.executable, "-m", "jaxpref.main", "--config=configs/grpo_tiny.py", *GRPO, *arguments]
  command += [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS, "PYTHONPATH": f"{folder}:{ROOT}",
  }  # fmt: skip
  options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  running = [subprocess.Popen([*command, f"--process_id={i}"], env=environment, **options) for i in (0, 1)]
  said = [process.communicate(timeout=400)[0] for process in running]
  return [process.returncode for process in running], said


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


@pytest.mark.slow  # rewards/base_test.py has its parts
def test_a_reward_of_ones_own_on_two_processes(mine, tmp_path):
  """Each scores the pictures that lie there."""
  codes, said = processes(mine, free_port(), "--config.reward=mine:colours:0.05", f"--workdir={tmp_path / 'run'}")
  assert codes == [0, 0], said
  rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
  trained = [row for row in rows if "reward" in row]
  assert len(trained) == 2 and all(np.isfinite(row["loss"]) and 0 < row["reward"] < 13 for row in trained)
  assert all(row["score_gap"] > 0 for row in trained)
  assert [0 < row["validation_reward"] < 13 for row in rows if "validation_reward" in row] == [True, True]


FAILING = """
import sys
import jax
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxpref.rewards import published
from jaxpref.rewards.python import PythonReward
from jaxpref.training import host

def reward(images, prompts):
  return [1 / jax.process_index() for _ in images]

found = published.Scorer("mine", "", "", reward)
images = {jax.process_index(): np.zeros((2, 2, 3), np.uint8)}
try:
  host.score(((PythonReward(found, 60.0), 1.0),), images, ["a", "b"])
except ValueError as error:
  print(f"error: {error}")
"""


def test_a_reward_that_fails_in_one_process_ends_all_with_its_sentence():
  command = [sys.executable, "-c", FAILING, f"localhost:{free_port()}"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
  running = [subprocess.Popen([*command, str(i)], **options) for i in (0, 1)]
  said = [process.communicate(timeout=200) for process in running]
  sentence = "error: process 0: reward mine raised ZeroDivisionError: division by zero\n"
  assert all(out.endswith(sentence) for out, _ in said), said  # after what Gloo says of itself


@pytest.fixture(scope="module")
def pixels(mine, tmp_path_factory):
  """Work folder of the recipe for a family of one's own, trained with LoRA, and its config."""
  import pixels_dpo

  config = pixels_dpo.get_config()
  tiny = TINY | {"model": "random", "num_steps": 3, "lora.rank": 4, "lora.alpha": 8.0}
  config.update_from_flattened_dict(tiny)
  folder = tmp_path_factory.mktemp("pixels") / "run"
  loop.run(config, str(folder))
  return folder, config


def test_the_flow_of_the_page_ends_at_what_its_velocity_points_to(mine):
  """With the exact velocity of one image; and the steps of Flow-GRPO by its own formula."""
  import pixels as module

  flow = module.Flow()
  x0, x = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 3))
  exact = lambda x, t: (x - x0) / (t / 1000.0)[:, None, None, None]
  found = samplers.sample(exact, flow, x, jax.random.key(1), num_steps=6, eta=0.0)
  np.testing.assert_allclose(found, x0, atol=1e-5)
  t, prev_t = (np.full(3, v, np.float32) for v in (600.0, 400.0))
  mean, std = flow.transition(x0, x, t, prev_t, eta=0.7)
  a = 0.7 * np.sqrt(0.6 / 0.4)
  expected = x * (1 - a**2 / 1.2 * 0.2) - x0 * (1 + a**2 * 0.4 / 1.2) * 0.2
  np.testing.assert_allclose(mean, expected, atol=1e-5)
  np.testing.assert_allclose(std, a * np.sqrt(0.2), rtol=1e-5)


def test_a_family_of_ones_own_trains_and_opens_its_folder(pixels):
  import pixels as module

  folder, config = pixels
  rows = metrics.read(folder / "metrics.jsonl")
  np.testing.assert_allclose(rows[0]["loss"], np.log(2), rtol=1e-5)
  assert rows[-1]["loss"] != rows[0]["loss"] and np.isfinite(rows[-1]["loss_bin_09"])
  before = module.PIXELS.load("random", dtype="float32", seed=config.seed)
  after = module.PIXELS.load(folder / "export", dtype="float32")
  adapter, scale = module.PIXELS.load_adapter(folder / "export" / adapters.DIFFUSERS_FILE, after)
  assert scale == 2.0 and set(adapter) == {"to_in", "to_out"}
  for layer in ("to_in", "to_out"):
    change = after.params["network"][layer]["kernel"] - before.params["network"][layer]["kernel"]
    np.testing.assert_allclose(change, 2.0 * adapter[layer]["lora_A"] @ adapter[layer]["lora_B"], atol=2e-3)
  assert np.abs(adapter["to_out"]["lora_B"]).max() > 0


def test_a_family_of_ones_own_draws_exports_and_goes_on(pixels, tmp_path):
  folder, config = pixels
  common = ["--prompt", "red heart", "--steps", "4", "--seeds", "2", "--guidance_scale", "2"]
  sample.main([*common, "--model", str(folder), "--out", str(tmp_path / "merged")])
  export.main([str(folder), "--format=lora", f"--out={tmp_path / 'mine.safetensors'}"])
  of = ["--family=pixels:PIXELS", "--model=random", f"--lora={tmp_path / 'mine.safetensors'}"]
  sample.main([*common, *of, "--out", str(tmp_path / "adapter")])
  pictures = [
    [np.asarray(Image.open(p), np.int32) for p in sorted((tmp_path / name).glob("0*.png"))]
    for name in ("merged", "adapter")
  ]
  assert len(pictures[0]) == 2 and pictures[0][0].shape == (16, 16, 3)
  assert np.abs(np.stack(pictures[0]) - np.stack(pictures[1])).max() <= 2  # the folder is in half precision
  again = config_lib.default()
  again.update(config.to_dict())
  again.update(num_steps=1)
  again.lora.init_from = str(tmp_path / "mine.safetensors")
  loop.run(again, str(tmp_path / "again"))


def test_steps_of_the_page_all_have_a_density(mine):
  flow = module_of("pixels").Flow()
  for t, prev_t in zip(*flow.grid(5, density=True), strict=True):
    x = np.zeros((1, 2, 2, 3), np.float32)
    _, std = flow.transition(x, x, np.float32([t]), np.float32([prev_t]), eta=0.7)
    assert std[0] > 0.1


def test_a_family_of_ones_own_refuses_what_it_does_not_have(pixels, tmp_path):
  folder, config = pixels
  with pytest.raises(ValueError, match="--format=kohya; expected lora or pipeline"):
    export.export(folder, "kohya", tmp_path / "x.safetensors")
  assert not list(tmp_path.iterdir())
  for field, value in (("vae_model", "tiny-sd"), ("remat", "block")):
    other = config_lib.default()
    other.update(config.to_dict())
    other[field] = value
    with pytest.raises(ValueError, match=f"^config.{field}={value}; expected no"):
      build.build(other)
  of = module_of("pixels").PIXELS
  with pytest.raises(ValueError, match="^clip_skip=2; expected nothing"):
    of.model(of.load("random", dtype="float32", components=()), clip_skip=2)
  with pytest.raises(ValueError, match="^--scheduler=dpmpp_2m; expected ddim"):
    of.model(of.load("random", dtype="float32", components=()), sampler="dpmpp_2m")


def test_a_family_of_ones_own_precomputes(pixels, tmp_path):
  _, config = pixels
  whole = config_lib.default()
  whole.update(config.to_dict())
  whole.update(num_steps=1)
  loop.run(whole, str(tmp_path / "from_images"))
  precompute.run(whole, tmp_path / "data")
  whole.data.update(source="precomputed", path=str(tmp_path / "data"))
  loop.run(whole, str(tmp_path / "from_data"))
  batch = described(next(inputs.offline_batches(config_lib.typed(whole), 16, None)))
  fields = fields_of("pair")
  replaced = {"moments_0": ("f16", 4), "moments_1": ("f16", 4), "text": ("f16", 2)}
  assert batch == {k: v for k, v in fields.items() if k not in ("input_ids", "pixels_0", "pixels_1")} | replaced
  losses = [metrics.read(tmp_path / name / "metrics.jsonl")[-1] for name in ("from_images", "from_data")]
  np.testing.assert_allclose(losses[0]["grad_norm"], losses[1]["grad_norm"], rtol=2e-2)


def test_a_family_of_ones_own_compiles_on_shapes_alone(pixels):
  """For devices that are not there; here for some that are."""
  _, config = pixels
  report = compile.compile_step(plan.without_weights(config), sharding.make_mesh(devices=jax.devices()[:2]))
  assert report["flop"] > 0 and report["arguments"]["trained"] > 0


def test_planning_leaves_out_what_a_family_of_ones_own_refuses(pixels):
  """Its `model` refuses each `remat`; the default `targets` match none of its layers, so it has no adapter either."""
  _, config = pixels
  config = plan.without_weights(config)
  config.update(accumulation=1)
  config.lora.update(rank=0, targets=config_lib.default().lora.targets)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  arguments = plan.argument_bytes(*plan.abstract_inputs(config, mesh)[1:])
  report = {"arguments": arguments, "peak": 2 * sum(arguments.values())}
  changes = [change for change, _ in plan.estimates(config, jax.devices()[:1], report)]
  assert changes and {(change.remat, change.rank) for change in changes} == {("none", 0)}


@pytest.mark.parametrize(
  ("family", "sentence"),
  [
    (
      "sd3",
      "config.family='sd3'; expected one of stable_diffusion, stable_diffusion_3, or your own as package.module:NAME",
    ),
    ("pixels:PIXEL", "config.family=pixels:PIXEL: the module pixels has no PIXEL .did you mean PIXELS"),
    (
      "mine:WINNERS",
      "config.family=mine:WINNERS: it has no networks, .*, load, .*; expected a jaxpref.files",
    ),
  ],
)
def test_a_family_that_is_not_there_is_refused(mine, family, sentence):
  config = config_lib.default()
  config.update(family=family, model="random:one-level")
  with pytest.raises(ValueError, match=sentence):
    build.build(config)


def of_mine(**options):
  config = config_lib.default()
  config.objective = "mine:WINNERS"
  config.options.update(options)
  return config


def test_options_of_ones_own_have_types_and_defaults(mine):
  import mine as module

  assert config_lib.typed(of_mine()).options == module.Options(scale=1.0)
  assert config_lib.typed(of_mine(scale=2)).options == module.Options(scale=2.0)
  assert config_lib.typed(of_mine(scale=2)).to_dict()["options"] == {"scale": 2.0}


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    ({"scal": 2.0}, "config.options.scal is not a field; did you mean config.options.scale?"),
    ({"scale": "two"}, "config.options.scale='two'; expected a number."),
    ({"scale": None}, "config.options.scale=None; expected a number."),
    ({"scale": -1.0}, "config.options.scale=-1.0; expected a number above 0."),
  ],
)
def test_options_that_cannot_be_are_refused(mine, options, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    config_lib.check(of_mine(**options))


@dataclasses.dataclass(frozen=True)
class Needed:
  folder: str
  share: float | None = None


NEEDS = catalog.Method(Facts("pair"), config=Needed)
NO_CLASS = catalog.Method(Facts("pair"), config=Needed("x"))


def test_an_option_without_a_default_must_be_set():
  config = config_lib.default()
  config.objective = "tests.extending_test:NEEDS"
  with pytest.raises(ValueError, match=r"config\.options\.folder=None; expected a text\."):
    config_lib.typed(config)
  config_lib.fill_options(config, config.objective)  # as the command line does, which can set both now
  config.options.update(folder="x", share=0.5)
  assert config_lib.typed(config).options == Needed("x", 0.5)
  config.objective = "tests.extending_test:NO_CLASS"
  with pytest.raises(ValueError, match=r"its config is Needed.*; expected a dataclass\."):
    config_lib.typed(config)


# Prints the exit code of each command line of argv[1] and what it says. Each has its process, which has all imports.
PARSE = """
import contextlib, io, json, os, sys
from absl import flags
from jaxpref import arguments, main
from jaxpref.training import build  # has most of what the page's modules import

for line in json.loads(sys.argv[1]):
  read, write = os.pipe()
  if not os.fork():
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      try:
        sys.argv[1:] = line
        arguments.parse_flags(sys.argv)
        print(flags.FLAGS.config.options.to_dict())
      except SystemExit as ended:
        code = 1 if isinstance(ended.code, str) else ended.code
        print(ended.code)
    os.write(write, json.dumps([code, said.getvalue()]).encode())
    os._exit(0)
  os.close(write)
  print(os.fdopen(read).read())
  os.wait()
"""
COMMAND_LINES = [
  (["--config=winners.py"], "{'scale': 2.0}"),
  (["--config=winners.py", "--config.options.scale=3"], "{'scale': 3.0}"),
  (["--config=RECIPE", "--config.objective=mine:WINNERS"], "{'scale': 1.0}"),
  (["--config=RECIPE", "--config.objective", "mine:WINNERS", "--config.options.scale", "3"], "{'scale': 3.0}"),
  (
    ["--config=winners.py", "--config.options.scal=3"],
    "error: --config.options.scal is not an option; did you mean --config.options.scale?",
  ),
  (["--config=RECIPE", "--config.options.scale=3"], "error: --config.options.scale is not an option; dpo has none."),
  (["--config=winners.py", "--config.options.scale=x"], "--config.options.scale=x"),
  (["--config=winners.py", "--config.objective=mine:WINNER"], "has no WINNER (did you mean WINNERS?)"),
]


def test_the_command_line_knows_the_options(mine):
  repository = pathlib.Path(__file__).parents[1]
  recipe = str(repository / "configs" / "dpo_tiny.py")
  lines = [[a.replace("RECIPE", recipe) for a in arguments] for arguments, _ in COMMAND_LINES]
  environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{mine}", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", PARSE, json.dumps(lines)], cwd=mine, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  for (arguments, said), answer in zip(COMMAND_LINES, done.stdout.splitlines(), strict=True):
    code, text = json.loads(answer)
    assert len(text.splitlines()) == 1 and said in text, (arguments, text)
    assert code == (1 if text.startswith("error: ") else 0), arguments


def test_a_work_folder_from_before_the_options_can_be_continued(mine, tmp_path):
  before = config_lib.typed(of_mine()).to_dict() | {"options": {}}
  del before["timesteps"]  # as if it had been made before these fields, too
  (tmp_path / "config.json").write_text(json.dumps(before))
  loop._check_folder(config_lib.typed(of_mine()), tmp_path)
  with pytest.raises(ValueError, match="config.options.scale is 1.0 there and 2.0 now"):
    loop._check_folder(config_lib.typed(of_mine(scale=2.0)), tmp_path)


def test_a_run_with_options_can_be_exported(mine, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(config_lib.typed(of_mine(scale=2.0)).to_dict()))
  found = export.read_config(tmp_path)
  assert found.options.scale == 2.0 and config_lib.facts(found) == Facts("pair")


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"objective": "nowhere:X"}, "config.objective=nowhere:X: the module nowhere cannot be imported .ModuleNotFound"),
    ({"objective": "tpdo"}, "config.objective='tpdo'; expected one of spo, .*did you mean 'tdpo'"),
    ({"objective": "mine:WINNER"}, "config.objective=mine:WINNER: the module mine has no WINNER .did you mean WINNERS"),
    ({"objective": "mine:Winners"}, "config.objective=mine:Winners: it is of type type; expected a jaxpref.objectives"),
    ({"loss.name": "mine:squared"}, "config.loss.name=mine:squared: the module mine has no squared"),
    ({"objective": "kto", "loss.name": "mine:squared_hinge"}, "loss.name='mine:squared_hinge'; expected sigmoid: kto"),
    ({"objective": "mine:WINNERS", "data.source": "prompts"}, "expected another source for objective mine:WINNERS"),
    ({"objective": "mine:WINNERS", "loss.name": "ipo"}, "config.loss.name='ipo'; expected one of sigmoid"),
  ],
)
def test_what_is_not_there_is_refused(mine, fields, sentence):
  config = config_lib.default()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=sentence):
    config_lib.check(config)


def test_a_reference_that_cannot_move_is_refused(mine, tmp_path):
  import winners

  config = winners.get_config()
  config.reference.mode = "update"
  with pytest.raises(ValueError, match="reference.mode='update'; expected 'frozen', as mine:WINNERS has no reference"):
    trained(config, tmp_path / "run")
  assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json"))


def test_an_unknown_method_is_one_sentence_everywhere():
  config = config_lib.default()
  config.update(objective="tpdo", model="random:sd15")
  for ask in (catalog.method, config_lib.facts, lambda c: config_lib.smoke(c, "sd15-miniature"), plan.without_weights):
    with pytest.raises(ValueError, match="did you mean 'tdpo'"):
      ask(config)


def test_the_config_knows_the_facts_of_each_family():
  assert set(FAMILY_FACTS) == set(families.FAMILIES)
  assert family_facts("pixels:PIXELS") == FamilyFacts()  # whose own code refuses what it cannot do


def test_the_tables_of_names_agree():
  assert set(catalog.METHODS) == set(config_lib.FACTS)
  for name, method in catalog.METHODS.items():
    assert method.facts == config_lib.FACTS[name]
    assert method.options == (None if name == "lrm" else method.facts.section or None)  # which draws nothing
  for name in config_lib.DENOISED_LOSSES:
    pairs.denoised_loss(name, beta=0.1)
  for name in config_lib.PAIR_LOSSES:
    pairs.pair_loss(name, beta=0.1)
  with pytest.raises(ValueError, match="unknown"):
    pairs.denoised_loss("sigmod", beta=0.1)
