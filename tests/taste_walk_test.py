"""The path of docs/taste.md, from a LoRA and twenty prompts of one's own to a blind test, on a miniature of SDXL."""

import io
import json
import re
import shlex
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

from jaxpref.files import adapters, pipelines
from jaxpref.models import lora, presets
from tests import QUICK_FLAGS
from tests.blind_test import Running, free_port
from tests.small_presets import smaller

# What the recipe leaves to machines: sizes, and what costs time.
SMALL = (
  "--config.vae_model=None", "--config.remat=none", "--config.num_steps=4", "--config.batch_size=4",
  "--config.accumulation=1", "--config.sample.every=0", "--config.checkpoint.every=4",
  "--config.optimizer.learning_rate=1e-3", "--config.optimizer.warmup_steps=0",
)  # fmt: skip
DRAW = ("--steps=2", "--guidance_scale=3")
RANK, STRENGTH = 3, 0.8


def random_adapter(params, targets, seed):
  rng = np.random.default_rng(seed)
  fresh = lora.init_lora(jax.random.key(seed), params, rank=RANK, targets=targets)
  return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), fresh)


def command(*words):
  """Runs a command as a user does, and returns what it prints."""
  done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


class Voter(Running):
  """Votes on the page for the redder of two pictures, until there is nothing left to vote on."""

  def red(self, ask, side):
    request = urllib.request.Request(
      f"{self.address}/picture/{ask}/{side}", headers={"Authorization": f"Bearer {self.token}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
      picture = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"), float)
    return picture[..., 0].mean() - picture[..., 1:].mean()

  def judge_all(self):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
      found = self.ask("/api/next", {"voter": "a script"})
      if found["progress"]["state"] in ("done", "ended"):
        return self.interrupt()
      for pair in found["pairs"][:1]:
        a, b = (self.red(pair["ask"], side) for side in "ab")
        choice = "left" if a > b else "right"
        self.ask("/api/vote", {"voter": "a script", "ask": pair["ask"], "choice": choice})
      if not found["pairs"]:
        time.sleep(0.2)
    raise AssertionError("no more pairs came")


def judge(said, *words):
  """Votes with the command that another one printed."""
  line = shlex.split(next(line for line in said.splitlines() if line.startswith("  python -m jaxpref.")))[2:]
  line = [words[0] if word == "--prompts=PROMPTS" else word for word in line]
  assert Voter(*line, f"--port={free_port()}", cwd=None).judge_all()[0] == 130


@pytest.mark.slow
def test_from_a_lora_and_twenty_prompts_to_a_blind_test(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)
  pipe = pipelines.random_pipeline(smaller(presets.get_preset("sdxl-miniature")), 1)
  base, mine, new = tmp_path / "sdxl", tmp_path / "mine.safetensors", tmp_path / "new.safetensors"
  pipelines.save_pipeline(base, pipe)
  unet = random_adapter(pipe.params["unet"], r"(to_q|to_v|to_out\.0|ff\.net\.2)$", 0)
  of_clip = r"(_proj|fc1|fc2)$"  # as kohya does it
  text = {name: random_adapter(pipe.params[name], of_clip, 1) for name in ("text_encoder", "text_encoder_2")}
  adapters.save_kohya(mine, unet, 0.5, pipe.unet.config, text=text)
  (tmp_path / "prompts.txt").write_text("".join(f"a red fox number {n}\n" for n in range(20)))
  (tmp_path / "others.txt").write_text("".join(f"a blue house number {n}\n" for n in range(6)))

  # ---- Two rounds: draw, vote, train -----------------------------------------------------------------------------
  taste = [
    *("jaxpref.taste", "--config=configs/taste_sdxl.py", f"--model={base}", f"--lora={mine}:{STRENGTH}", *DRAW),
    *(f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'taste'}", "--seeds=2", "--rounds=2", *SMALL),
  ]
  for number in range(2):
    said = command(*taste)
    assert f"round {number + 1} of 2: 0 of 20 pairs are judged" in said
    judge(said)
  said = command(*taste)
  run = tmp_path / "taste" / "runs" / "round_1"
  assert f"aligned in 2 rounds: {run}" in said

  # ---- The file: the LoRA of the beginning, continued ------------------------------------------------------------
  command("jaxpref.export", run, "--format=kohya", f"--out={new}")
  before, of_before, text_before = adapters.load_pipeline_lora(mine, pipe.unet.config, pipe.params)
  after, of_after, text_after = adapters.load_pipeline_lora(new, pipe.unet.config, pipe.params)
  assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, before)
  change = [np.abs(a[1] * of_after - b[1] * of_before * STRENGTH).max() for a, b in zip(
    lora.to_layers(after).values(), lora.to_layers(before).values(), strict=True)]  # fmt: skip
  assert 1e-3 < max(change) < 0.05
  for name, adapter in adapters.merge_text_encoders(pipe.params, text_after).items():
    if name in text:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        adapter,
        lora.merge_lora(pipe.params[name], text_before[name], STRENGTH),
      )

  # ---- It draws with plain SDXL what the run does, in jaxpref and in diffusers -------------------------------------
  latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
  np.save(tmp_path / "latents.npy", latents)

  def draw(name, *model):
    command("jaxpref.sample", *model, "--prompt=a fox", "--seeds=1", *DRAW,
            f"--latents={tmp_path / 'latents.npy'}", f"--out={tmp_path / name}")  # fmt: skip
    return np.asarray(Image.open(tmp_path / name / "0000_0_a-fox.png"), float)

  ours = draw("of_file", f"--model={base}", "--lora", str(new))
  old = draw("of_mine", f"--model={base}", "--lora", f"{mine}:{STRENGTH}")
  merged = draw("of_run", f"--model={run}")
  theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
  theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
  theirs.load_lora_weights(str(new))
  settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
  expected = theirs("a fox", latents=torch.from_numpy(latents), **settings).images[0] * 255
  assert np.abs(ours - expected).max() <= 1
  assert np.abs(merged - ours).mean() < 1 < np.abs(old - ours).max()

  # ---- The blind test, on prompts that were not voted on -----------------------------------------------------------
  judge(said, f"--prompts={tmp_path / 'others.txt'}")
  found = json.loads((tmp_path / "taste" / "blind" / "blind_results.json").read_text())
  assert found["ended"] and found["pairs"] == 6 and found["baseline"] == "before"
  one = found["comparisons"]["after"]
  assert one["prompts_won"] + one["prompts_lost"] == 6 and one["verdict"]
  page = (tmp_path / "taste" / "blind" / "blind.html").read_text()
  assert "Blind comparison with before" in page and re.search(r'<th scope="row">after</th><td>[\d.]+%</td>', page)
