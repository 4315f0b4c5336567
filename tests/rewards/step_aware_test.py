"""The step-aware preference model as a reward: what it is shown and what it is told."""

import jax.numpy as jnp
import numpy as np

from jaxpref.models.preference import StepAwareCLIPConfig, preprocess
from jaxpref.rewards import step_aware
from tests.stub_model import StubScorer, draw, init


def test_overshoot_is_clipped_after_the_resize():
  """As the published scorer does it; before it, edges would be other ones."""
  seen = []

  class Scorer:
    config = StepAwareCLIPConfig.from_dict(
      {"vision_config": {"image_size": 4, "patch_size": 2}, "text_config": {}, "projection_dim": 8}
    )

    def apply(self, variables, *args, method):
      seen.append(args[0])
      return args[0]

  images = jnp.asarray(2.0 * draw(0, 2, 8, 8, 3))
  step_aware.score_images(Scorer(), {}, images, jnp.zeros(2, jnp.int32), None)
  np.testing.assert_array_equal(seen[0], preprocess(images, 4))
  assert np.abs(seen[0] - preprocess(jnp.clip(images, -1, 1), 4)).max() > 0.1


def test_prompts_of_two_tokenizers_are_read_by_the_first():
  ids = np.arange(10, dtype=np.int32).reshape(1, 10)
  both, first = (step_aware.embed_prompts(StubScorer(), init()["spm"], jnp.asarray(i)) for i in (ids, ids[:, :5]))
  np.testing.assert_array_equal(both, first)
