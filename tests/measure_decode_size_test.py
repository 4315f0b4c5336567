"""What decoding at smaller sizes changes, and how it is compared."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import spo_sd15
from jaxpref.files import loading, pipelines
from jaxpref.planning import flops
from scripts.bench import measure_decode_size
from scripts.bench.measure_decode_size import compared


def test_pairs_of_other_scores():
  truth = np.float32([[[0, 1, 2, 3], [3, 2, 1, 0], [0, 0.01, 0.02, 0.03]]])  # the last is no valid pair
  assert compared(truth, truth, 0.3) == {
    "same_winner": 1.0, "same_loser": 1.0, "order_kept": 1.0, "valid": 2 / 3, "truly_valid": 2 / 3,
  }  # fmt: skip
  other = np.float32([[[0, 1, 5, 3], [0, 2, 1, 3], [3, 0, 0, -3]]])  # another winner; the other way round; valid
  found = compared(truth, other, 0.3)
  assert found["same_winner"] == 0.0 and found["same_loser"] == 0.5 and found["valid"] == 1.0
  np.testing.assert_allclose(found["order_kept"], 1 / 3)


@pytest.mark.slow
def test_smaller_pictures_cost_fewer_operations(monkeypatch):
  """On a miniature, by what its VAE saves: every candidate is decoded once (and resized for the preference model)."""
  smoke = types.SimpleNamespace(get_config=lambda: spo_sd15.get_config("smoke"))
  monkeypatch.setattr(measure_decode_size.bench, "recipe_module", lambda file: smoke)
  whole, small = (measure_decode_size.operations("spo_sd15", size) for size in (0, 8))
  pipe = pipelines.random_pipeline("sd15-miniature", 0)
  model = loading.text_to_image(pipe)
  latents = jnp.zeros((1, *model.latent_shape))
  of = lambda size: flops.count(lambda z: model.decode(pipe.params, z, size=size), latents)
  s = spo_sd15.get_config("smoke").spo
  candidates = (s.num_inference_steps - s.warmup_steps) * s.pool_size  # groups of one step, and in the last, too
  np.testing.assert_allclose(whole - small, candidates * (of(0) - of(8)), rtol=1e-2)


def test_the_tables_show_shares_and_operations():
  share = {"same_winner": 0.9, "same_loser": 0.8, "order_kept": 0.95, "valid": 0.5, "truly_valid": 0.6}
  report = {
    "model": "m", "preference_model": "p", "image_size": 32, "groups": 10, "pool": 4, "truly_valid": 0.6,
    "rows": [{"pictures": "decoded", "size": 16, "against": "whole", **share}],
    "operations": [{"recipe": "spo_sdxl", "size": 224, "tflop": 12.3456, "share": 0.75}],
  }  # fmt: skip
  text = measure_decode_size.tables(report)
  assert "| decoded | 16 | whole | 90.0 % | 80.0 % | 95.0 % | 50.0 % |" in text
  assert "| spo_sdxl | 224 | 12.35 | 75.0 % |" in text


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--config=configs/dpo_tiny.py"], "has the objective dpo; expected a recipe of spo"),
    (["--config=configs/nowhere.py"], "there is no configs/nowhere.py; expected the file of an SPO recipe"),
    (["--prompts=0"], "--prompts=0: expected at least 1"),
    (["--sizes", "7"], "images of 7 x 7 pixels, expected multiples of 4"),
    (["--sizes", "24", "64"], "--sizes: 64 is more than the 32 pixels of tiny-sd's images"),
  ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(arguments, sentence, capsys, monkeypatch):
  monkeypatch.chdir(measure_decode_size.ROOT)
  with pytest.raises(SystemExit):
    measure_decode_size.main(arguments)
  assert sentence in capsys.readouterr().err
