"""Code of one's own with faults: each is one sentence that names it, before a work folder is claimed."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import arguments, evaluate, export, precompute
from jaxpref import config as config_lib
from jaxpref.data import lease
from jaxpref.devices import sharding
from jaxpref.diffusion import VariancePreserving, schedule_from_config
from jaxpref.evaluation import drawing, settings
from jaxpref.files import family as families
from jaxpref.objectives import catalog
from jaxpref.recipes import own, places
from jaxpref.rewards import published, scorers, terms
from jaxpref.rewards.base import Weighted
from jaxpref.rewards.python import PythonReward
from jaxpref.training import build, checkpoint, loop, own_code, programs

MODULE = r'''
import dataclasses
import jax
import jax.numpy as jnp
import numpy as np
from jaxpref.config import Facts
from jaxpref.objectives.base import Offline
from jaxpref.objectives.catalog import Method

# Losses
def good(reward_w, reward_l, *, beta, weight):
  return -jax.nn.log_sigmoid(beta * (reward_w - reward_l))

def one_argument(reward_w):
  return reward_w

def no_beta(reward_w, reward_l):
  return reward_w

def nothing(reward_w, reward_l, *, beta, weight):
  pass

def scalar(reward_w, reward_l, *, beta, weight):
  return jnp.mean(reward_w)

def two(reward_w, reward_l, *, beta, weight):
  return reward_w, reward_l

def integers(reward_w, reward_l, *, beta, weight):
  return (reward_w > reward_l).astype(jnp.int32)

def of_numpy(reward_w, reward_l, *, beta, weight):
  return np.asarray(reward_w)

def branch(reward_w, reward_l, *, beta, weight):
  return reward_w if reward_w[0] > 0 else reward_l

def unpacks(reward_w, reward_l, *, beta, weight):
  a, b = (1,)

class Loss:
  def __init__(self, reward_w, reward_l, *, beta, weight):
    pass

number = 3

# Methods
class Base(Offline):
  def __init__(self, *_):
    pass

class Good(Base):
  def loss(self, w, e, key, statistics=None):
    error = jnp.sum((w.policy["w"] - jnp.mean(e["x"])) ** 2)
    return error, jnp.float32(4), {"error": (error, jnp.float32(4))}

class WrongLoss(Base):
  def loss(self, w, e):
    return 0.0, 1.0, {}

class TwoValues(Base):
  def loss(self, w, e, key, statistics=None):
    return jnp.zeros(()), jnp.ones(())

class NotScalar(Base):
  def loss(self, w, e, key, statistics=None):
    return w.policy["w"], jnp.ones(()), {}

class Integer(Base):
  def loss(self, w, e, key, statistics=None):
    return jnp.sum(w.policy["w"] > 0), jnp.ones(()), {}

class BadMetric(Base):
  def loss(self, w, e, key, statistics=None):
    return jnp.sum(w.policy["w"]), jnp.ones(()), {"mine": jnp.ones(())}

class BadKey(Base):
  def loss(self, w, e, key, statistics=None):
    return jnp.sum(e["winner"]), jnp.ones(()), {}

@dataclasses.dataclass(frozen=True)
class Options:
  margin: float = 0.1
  cap: float | None = None
  kind: str = "soft"
  most: float = float("inf")

  def check(self):
    if self.kind == "zero":
      1 / 0
    if self.kind not in ("soft", "hard"):
      raise ValueError(f"config.options.kind={self.kind!r}; expected soft or hard.")

def method(kind, **more):
  return Method(**({"facts": Facts("pair"), "make": lambda config, model, scorer: kind(model)} | more))

GOOD = method(Good, config=Options)
WRONG_LOSS, TWO, NOT_SCALAR, INTEGER, BAD_METRIC, BAD_KEY = map(
  method, (WrongLoss, TwoValues, NotScalar, Integer, BadMetric, BadKey))
NO_MAKE = Method(facts=Facts("pair"))
MAKE_ARITY = method(Good, make=lambda config: 1)
MAKE_NONE = method(Good, make=lambda config, model, scorer: None)
MAKE_RAISES = method(Good, make=lambda config, model, scorer: 1 / 0)
MAKE_SAYS = method(Good, make=lambda config, model, scorer: int("x"))
NO_ROLLOUT = method(Good, facts=Facts("prompt", online=True))
DATA, TRAINS, LOSSES, SECTION, PROMPT = (
  method(Good, facts=f) for f in (
    Facts("pairs"), Facts("pair", trains="unet"), Facts("pair", losses="own"), Facts("pair", section="mine"),
    Facts("prompt")))

# Families
class Family:
  networks, denoiser = ("net",), "net"
  def load(self, name, *, dtype, seed=0, param_dtype=None, sharding=None, vae_model=None, components=None):
    raise KeyError("weights")
  def model(self, pipe, **of_it): ...
  def save(self, folder, pipe, *, dtype): ...
  def load_adapter(self, file, pipe): ...
  def save_adapter(self, file, adapter, scale, *, name, form="lora", dtype=None): ...
  def with_adapters(self, pipe, loras): ...
  def without_values(self, name): ...
  def weight_files(self, name): return {}

class NoSave(Family):
  save = None

class NoDtype(Family):
  def load(self, name): ...

class NoDenoiser(Family):
  denoiser = "other"

class NoFiles(Family):
  def load(self, name, *, dtype, seed=0, param_dtype=None, sharding=None, vae_model=None, components=None):
    return Pipe({})
  def save(self, folder, pipe, *, dtype):
    1 / 0  # in save

@dataclasses.dataclass
class Pipe:
  params: dict

NO_FILES = NoFiles()
FAMILY, NO_SAVE, NO_DTYPE, NO_DENOISER = Family(), NoSave(), NoDtype(), NoDenoiser()

# Rewards
def mean(images, prompts):
  """Mean of a picture."""
  return [float(i.mean()) for i in images]

def few(images, prompts):
  return [1.0]

def no_number(images, prompts):
  return [float("nan")] * len(images)

def texts(images, prompts):
  return ["1.5"] * len(images)

def none(images, prompts):
  pass

def complex_numbers(images, prompts):
  return np.full(len(images), 1 + 2j)

def generator(images, prompts):
  return (1.0 for _ in images)

def only_images(images):
  return [1.0] * len(images)

def exits(images, prompts):
  raise SystemExit(3)

def raises(images, prompts):
  raise KeyError("mine")

async def coroutine(images, prompts):
  return [1.0] * len(images)

class Reward:
  def __init__(self, images, prompts): ...
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
  """The file of the module own_sample, which Python finds; own_exit ends the program."""
  folder = tmp_path_factory.mktemp("own")
  (folder / "own_sample.py").write_text(MODULE)
  (folder / "own_exit.py").write_text("import sys\nsys.exit(5)\n")
  sys.path.insert(0, str(folder))
  yield folder / "own_sample.py"
  sys.path.remove(str(folder))
  sys.modules.pop("own_sample", None)


def line_of(text):
  return next(i for i, line in enumerate(MODULE.splitlines(), 1) if text in line)


def recipe(**fields):
  config = config_lib.default()
  for name in ("objective", "loss__name", "family", "reward"):
    if (value := fields.get(name, "")).startswith(":"):
      fields[name] = f"own_sample{value}"
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  config_lib.fill_options(config, config.objective)
  return config


# ---- Losses ---------------------------------------------------------------------------------------------------------


def try_loss(name, **fields):
  config = recipe(loss__name=f":{name}", **fields)
  config_lib.check(config)
  catalog.try_losses(config_lib.typed(config))


@pytest.mark.parametrize(
  ("name", "sentence", "line"),
  [
    ("one_argument", "takes (reward_w)", "def one_argument"),
    ("no_beta", "takes (reward_w, reward_l)", "def no_beta"),
    ("nothing", "returned None", "def nothing"),
    ("scalar", "returned float32[]", "def scalar"),
    ("two", "returned 2 values", "def two"),
    ("integers", "returned int32[3]", "def integers"),
    ("of_numpy", "raised TracerArrayConversionError", "return np.asarray(reward_w)"),
    ("branch", "raised TracerBoolConversionError", "return reward_w if"),
    ("unpacks", "raised ValueError: not enough values to unpack (expected 2, got 1)", "a, b = (1,)"),
    ("Loss", "is the class Loss; expected", None),
    ("number", "is of type int; expected", None),
  ],
)
def test_a_loss_that_cannot_be_is_refused_before_anything_is_loaded(mine, name, sentence, line):
  with pytest.raises(own.OwnCodeError) as raised:
    try_loss(name)
  said = str(raised.value)
  assert said.startswith(f"config.loss.name=own_sample:{name} {sentence}") and "\n" not in said
  assert "expected a function of (reward_w, reward_l, *, beta, weight)" in said
  assert line is None or f"({mine}, line {line_of(line)})" in said


def test_a_good_loss_is_taken_with_and_without_a_weight(mine):
  try_loss("good")
  try_loss("good", objective="spo", preference_model="tiny-spm")


def test_the_losses_are_tried_before_the_data_are_looked_for(mine):
  config = recipe(loss__name=":scalar", data__source="pairs_file", data__path="/nowhere.jsonl")
  with pytest.raises(own.OwnCodeError, match="returned float32"):
    build.look_for(config_lib.typed(config))


def test_a_dot_in_the_place_of_the_colon_is_said(mine):
  with pytest.raises(ValueError, match=r"one of your own is package.module:NAME: own_sample:good\)"):
    config_lib.check(recipe(loss__name="own_sample.good"))
  with pytest.raises(ValueError, match=r"own_sample:GOOD\)"):
    config_lib.facts(config_lib.replace(recipe(), {"objective": "own_sample.GOOD"}))
  with pytest.raises(ValueError, match="such as own_sample:FAMILY"):
    families.get("own_sample.FAMILY")


def test_a_module_that_exits_at_import_is_one_sentence(mine):
  place = f"SystemExit: 5, {mine.with_name('own_exit.py')}, line 2"
  for ask in (
    lambda: config_lib.facts(config_lib.replace(recipe(), {"objective": "own_exit:X"})),
    lambda: published.load("own_exit:score"),
  ):
    with pytest.raises(own.OwnCodeError, match="cannot be imported") as raised:
      ask()
    assert place in str(raised.value)


# ---- Methods --------------------------------------------------------------------------------------------------------


class Batches:
  """As the data pipeline gives them."""

  def __next__(self):
    return {"x": np.ones(8, np.float32), "record": np.arange(8, dtype=np.int32)}

  def close(self):
    pass


def experiment(config, **fields):
  return build.Experiment(
    params={"w": jnp.zeros(4)},
    frozen={},
    objective=catalog.make(config, None),
    batches=Batches,
    export=lambda params, folder: None,
    **fields,
  )


def try_method(name, **fields):
  config = config_lib.typed(recipe(objective=f":{name}", batch_size=8, **fields))
  config_lib.check(config)
  own_code.try_own(
    config,
    experiment(config),
    programs.make_optimizer(config)[0],
    sharding.make_mesh(devices=jax.devices()[:1]),
    say=print,
  )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_good_method_is_taken(mine, accumulation):
  try_method("GOOD", accumulation=accumulation)


@pytest.mark.parametrize(
  ("name", "sentence", "line"),
  [
    ("WRONG_LOSS", "its loss raised TypeError", "def loss(self, w, e):"),
    ("TWO", "its loss returned 2 values", None),
    ("NOT_SCALAR", "its loss returned float32[4] among its sums", None),
    ("INTEGER", "its loss returned int32[] among its sums", None),
    ("BAD_METRIC", "its loss returned float32[] for the metric 'mine'", None),
    ("BAD_KEY", "its loss raised KeyError: 'winner'", 'e["winner"]'),
    ("NO_MAKE", "it has no make; expected make=", None),
    ("MAKE_ARITY", "its make takes (config)", "MAKE_ARITY ="),
    ("MAKE_NONE", "its make returned None, which has no kinds", None),
    ("MAKE_RAISES", "its make raised ZeroDivisionError: division by zero", "MAKE_RAISES ="),
    ("MAKE_SAYS", "its make raised ValueError: invalid literal", "MAKE_SAYS ="),
  ],
)
def test_a_method_that_cannot_be_is_one_sentence(mine, name, sentence, line):
  with pytest.raises(own.OwnCodeError) as raised:
    try_method(name)
  said = str(raised.value)
  assert said.startswith(f"config.objective=own_sample:{name}: {sentence}") and "\n" not in said, said
  assert line is None or f"({mine}, line {line_of(line)})" in said
  assert name != "BAD_KEY" or "of batches with record, x" in said


@pytest.mark.parametrize(
  ("name", "sentence"),
  [
    ("DATA", r"data='pairs'; expected one of 'pair', .*did you mean 'pair'"),
    ("TRAINS", "trains='unet'; expected one of 'denoiser'"),
    ("LOSSES", "losses='own'; expected one of '', 'denoised', 'pair'"),
    ("SECTION", "section='mine'; expected one of '', 'spo'"),
    ("PROMPT", "data='prompt' and online=False"),
  ],
)
def test_facts_that_cannot_be_are_refused_at_once(mine, name, sentence):
  with pytest.raises(ValueError, match=f"config.objective=own_sample:{name}: its Facts have {sentence}"):
    recipe(objective=f":{name}")


def test_a_method_that_says_it_draws_has_a_rollout(mine):
  with pytest.raises(ValueError, match=r"its make returned a Good with kinds=\(\), and its Facts say online=True"):
    catalog.make(config_lib.typed(recipe(objective=":NO_ROLLOUT")), None)


def test_a_method_with_a_loss_of_its_own_takes_none_by_name(mine):
  with pytest.raises(
    ValueError, match="loss.name='ipo'; expected one of sigmoid: own_sample:GOOD has a loss of its own"
  ):
    config_lib.check(recipe(objective=":GOOD", loss__name="ipo"))


def test_nothing_is_claimed_where_a_method_is_refused(mine, tmp_path, monkeypatch):
  made = lambda config, *_, **__: experiment(config)
  monkeypatch.setattr(build, "build", made)
  fields = {"batch_size": 8, "evaluation__num_prompts": 0, "num_steps": 1}
  with pytest.raises(own.OwnCodeError, match="its loss raised KeyError"):
    loop.run(recipe(objective=":BAD_KEY", **fields), str(tmp_path / "run"))
  assert not [p for p in (tmp_path / "run").glob("*") if not lease.is_lock(p.name)]


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("field", "value", "sentence"),
  [
    ("margin", float("nan"), "config.options.margin=nan; expected a finite number"),
    ("margin", float("inf"), "config.options.margin=inf; expected a finite number"),
    ("kind", "other", "config.options.kind='other'; expected soft or hard"),
    ("kind", "zero", r"the check of its options raised ZeroDivisionError: division by zero \(.*own_sample.py, line "),
  ],
)
def test_options_that_cannot_be_are_refused(mine, field, value, sentence):
  config = recipe(objective=":GOOD")
  config_lib.check(config)  # whose default of `most` is infinite
  config.options[field] = value
  with pytest.raises(ValueError, match=sentence):
    config_lib.check(config)


def test_nan_is_the_same_as_nan_in_a_work_folder(tmp_path):
  assert places.same(float("nan"), float("nan")) and not places.same(float("nan"), 1.0)
  checkpoint.claim_workdir(tmp_path, {"options": {"margin": float("nan")}})
  checkpoint.check_workdir(tmp_path, {"options": {"margin": float("nan")}})


def test_none_on_the_command_line_empties_what_may_be_none(mine):
  line = [
    "main",
    "--config=r.py",
    "--config.loss.safeguard=None",
    "--config.options.cap",
    "None",
    "--config.model=None",
  ]
  kept, emptied = arguments._without_nones([*line, "--config.options.margin=None", "--config.options.kind=None"])
  assert kept == ["main", "--config=r.py", "--config.model=None"]  # a text that cannot be None
  config = recipe(objective=":GOOD", loss__safeguard=0.5, preference_model="tiny-spm")
  config.options.cap = 1.0
  for name in ("config.loss.safeguard", "config.options.cap", "config.options.kind", "config.preference_model"):
    arguments._empty(config, name)
  assert (config.loss.safeguard, config.options.cap, config.preference_model) == (None, None, None)
  assert config.options.kind == "None" and set(emptied) >= {"config.options.cap", "config.loss.safeguard"}
  with pytest.raises(ValueError, match="config.options.margin=None; expected a value such as 0.1"):
    arguments._empty(config, "config.options.margin")
  later = ["main", "--config.loss.safeguard=None", "--config.loss.safeguard=0.5"]
  assert arguments._without_nones(later)[1] == []


# ---- Families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "sentence"),
  [
    ("NO_SAVE", "its save is of type NoneType; expected a function of (folder, pipe, dtype)"),
    ("NO_DTYPE", "its load takes (name)"),
    ("NO_DENOISER", "its networks are ('net',) and its denoiser is 'other'"),
  ],
)
def test_a_family_that_cannot_be_is_refused(mine, name, sentence):
  with pytest.raises(ValueError) as raised:
    families.get(f"own_sample:{name}")
  assert str(raised.value).startswith(f"config.family=own_sample:{name}: {sentence}")
  families.get("own_sample:FAMILY")


def test_a_family_is_an_instance(mine):
  place = rf"\({mine}, line {line_of('class Family')}\)"
  with pytest.raises(
    ValueError, match=rf"=own_sample:Family is a class {place}; expected an instance: NAME = Family\(\)"
  ):
    families.get("own_sample:Family")


def test_what_loading_raises_is_one_sentence(mine):
  place = rf"\({mine}, line {line_of('raise KeyError(')}\)"
  with pytest.raises(
    ValueError, match=rf"family=own_sample:FAMILY: opening its model raised KeyError: 'weights' {place}"
  ):
    build.build(recipe(family=":FAMILY", model="random"))


@pytest.mark.parametrize(
  ("family", "sentence", "line"),
  [
    ("FAMILY", "opening its model raised KeyError: 'weights'", "raise KeyError("),
    ("NO_FILES", "saving its model raised ZeroDivisionError: division by zero", "1 / 0  # in save"),
  ],
)
def test_what_an_export_raises_is_one_sentence(mine, monkeypatch, tmp_path, family, sentence, line):
  monkeypatch.setattr(checkpoint, "load_params", lambda run, step: ({"net": {"w": np.zeros(2)}}, 1))
  config = config_lib.typed(recipe(family=f":{family}", model="random", num_steps=1))
  checkpoint.claim_workdir(tmp_path / "run", config.to_dict())
  with pytest.raises(own.OwnCodeError) as raised:
    export.export(tmp_path / "run", "pipeline", tmp_path / "out")
  place = f"({mine}, line {line_of(line)})"
  assert str(raised.value).startswith(f"config.family=own_sample:{family}: {sentence} {place}; expected")


def test_what_opening_a_model_raises_in_precompute_is_one_sentence(mine, tmp_path):
  config = recipe(family=":FAMILY", model="random")
  with pytest.raises(own.OwnCodeError, match="family=own_sample:FAMILY: opening its model raised KeyError: 'weights'"):
    precompute.run(config, tmp_path / "data")


def test_what_opening_a_model_raises_in_commands_is_one_sentence(mine):
  args = evaluate.make_parser().parse_args(["--models", "a=random", "--prompts=emoji", "--family=own_sample:FAMILY"])
  with pytest.raises(own.OwnCodeError, match="--family=own_sample:FAMILY: opening its model raised KeyError"):
    settings.check_size("random", args)


@pytest.mark.parametrize("said", ["config.remat=full; expected none", "--format=kohya; expected lora", "clip_skip=1"])
def test_a_sentence_that_begins_with_a_field_passes(mine, said):
  with pytest.raises(ValueError, match=f"^{said}"), families.opened("own_sample:FAMILY"):
    raise ValueError(said)


def test_steps_without_a_density_are_refused_by_name():
  @dataclasses.dataclass
  class Model:
    process: VariancePreserving

  config = config_lib.typed(recipe(objective="grpo", grpo__num_inference_steps=10))
  build._check_steps(config, Model(VariancePreserving(schedule_from_config({"steps_offset": 1}))))
  with pytest.raises(ValueError, match="config.grpo.num_inference_steps=10: the last of 10 steps of this schedule"):
    build._check_steps(config, Model(VariancePreserving(schedule_from_config({}))))


# ---- Rewards --------------------------------------------------------------------------------------------------------


def try_reward(name):
  @dataclasses.dataclass
  class Model:
    image_size: tuple[int, int] = (8, 4)

  config = config_lib.typed(recipe(objective="grpo", reward=f":{name}", preference_model="tiny-spm"))
  config_lib.check(config)
  reward = Weighted((), ((PythonReward(published.load(config.reward), 60.0), 1.0),))
  one = build.Experiment({}, {}, lambda: None, print, None, reward=reward, model=Model(), captions=lambda: ["a", "b"])
  own_code.try_own(config, one, None, None, say=print)


@pytest.mark.parametrize(
  ("name", "sentence", "line"),
  [
    ("few", "returned numbers of shape [1] for 2 images", None),
    (
      "no_number",
      "gives nan to 2 of 2 images, the first of them number 0, expected finite scores; fix the function.",
      None,
    ),
    ("texts", "returned texts", "def texts"),
    ("none", "returned None", "def none"),
    ("complex_numbers", "returned complex numbers", "def complex"),
    ("generator", "returned a generator", "def generator"),
    ("only_images", "raised TypeError: only_images() takes 1", "def only_images"),
    ("exits", "raised SystemExit: 3", "raise SystemExit"),
    ("raises", "raised KeyError: 'mine'", 'raise KeyError("mine")'),
    ("coroutine", "is a coroutine; expected a function", None),
    ("Reward", "is a class; expected a function", None),
  ],
)
def test_a_reward_that_cannot_be_is_refused_on_blank_pictures(mine, name, sentence, line):
  with pytest.raises(ValueError) as raised:
    try_reward(name)
  said = str(raised.value)
  assert f"own_sample:{name} {sentence}" in said
  assert line is None or f"({mine}, line {line_of(line)})" in said


def test_a_good_reward_is_asked_for_two_pictures(mine, monkeypatch):
  import own_sample

  seen = []
  monkeypatch.setattr(own_sample, "mean", lambda images, prompts: seen.append((images, prompts)) or [0.0, 1.0])
  try_reward("mean")
  ((images, prompts),) = seen
  assert [i.shape for i in images] == [(8, 4, 3)] * 2 and prompts == ["a", "a"]


@pytest.mark.parametrize(
  ("reward", "sentence"),
  [
    ("tiny-clip:abc", "'tiny-clip:abc' is neither NAME:WEIGHT"),
    ("pickscore:1;aesthetic:2", "'pickscore:1;aesthetic' is neither NAME:WEIGHT"),
    ("pickscore:abc", "the weight 'abc' of pickscore is not a number"),
    ("picscore:1", r"\(did you mean 'pickscore'\?\)"),
    ("own_sample.mean", r"one of your own is package.module:NAME: own_sample:mean\)"),
  ],
)
def test_rewards_that_are_misspelt_are_not_taken_for_modules(reward, sentence):
  with pytest.raises(ValueError, match=sentence):
    terms.check(recipe(objective="grpo", reward=reward))
  with pytest.raises(ValueError, match=sentence):
    scorers.check(reward, given="--label")


def test_a_preference_model_that_the_reward_does_not_name_is_not_needed(mine):
  config = recipe(objective="grpo", reward=":mean", preference_model="/nowhere")
  config_lib.check(config)
  terms.check(config_lib.typed(config))
  found, params = terms.load(config_lib.typed(config))
  assert not params and [r.name for r, _ in found.host] == ["own_sample:mean"]


# ---- Runs that go on ------------------------------------------------------------------------------------------------


def test_a_module_that_has_changed_is_said_once(mine, tmp_path, monkeypatch):
  config = config_lib.typed(recipe(objective=":GOOD"))
  versions = own_code.versions(config)
  assert list(versions) == ["own_sample:GOOD"] and len(versions["own_sample:GOOD"]) == 16
  assert checkpoint.note_own_code(tmp_path, versions) == []
  assert checkpoint.note_own_code(tmp_path, versions) == []
  import linecache

  text = MODULE + "\n# another version\n"
  mine.write_text(text)
  linecache.checkcache(str(mine))
  changed = own_code.versions(config)
  mine.write_text(MODULE)
  linecache.checkcache(str(mine))
  assert checkpoint.note_own_code(tmp_path, changed) == ["own_sample:GOOD"]
  assert checkpoint.note_own_code(tmp_path, changed) == []


def test_a_run_without_code_of_ones_own_records_none(tmp_path):
  assert own_code.versions(config_lib.typed(recipe())) == {}
  assert checkpoint.note_own_code(tmp_path, {}) == [] and not list(tmp_path.iterdir())


def test_weights_are_exported_without_the_module(tmp_path, monkeypatch):
  values = config_lib.typed(recipe()).to_dict() | {"objective": "module_that_is_gone:X", "options": {"scale": 1.0}}
  values["lora"]["rank"] = 2
  (tmp_path / "config.json").write_text(json.dumps(values))
  adapter = {"down": {"to_q": {"lora_A": np.ones((4, 2), np.float32), "lora_B": np.ones((2, 4), np.float32)}}}
  monkeypatch.setattr(checkpoint, "load_params", lambda run, step: ({"unet_lora": adapter}, 3))
  assert export.export(tmp_path, "lora", tmp_path / "a.safetensors").is_file()
  monkeypatch.setattr(checkpoint, "load_params", lambda run, step: ({"spm": {}}, 3))
  with pytest.raises(ValueError, match="trained spm, expected unet"):
    export.export(tmp_path, "lora", tmp_path / "b.safetensors")


def test_a_sampler_that_a_process_of_ones_own_does_not_have_is_refused():
  model = types.SimpleNamespace(process=types.SimpleNamespace())
  with pytest.raises(ValueError, match="is for a process with solver_steps, which the model's SimpleNamespace has not"):
    drawing.make_sampler(model, num_inference_steps=2, guidance_scale=1.0, eta=0.0, seed=0, sampler="dpmpp_2m")
