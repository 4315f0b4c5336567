"""Diffusion-KTO (arXiv 2404.04465) on tiny-sd: from images that are liked or not, without pairs.

    python -m jaxpref.main --config=configs/kto_tiny.py

Source: the numbers of configs/dpo_tiny.py, with as many images as it sees in pairs.
Differs: beta 500, as in the other tiny recipes, instead of the paper's 5000.
Hardware: 2 CPU cores, about 4 minutes, evaluation included.
Expect: no result is recorded; nothing was tuned.
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "kto"
  config.model = "tiny-sd"
  config.judge = "tiny-judge"
  config.evaluation.guidance_scale = 3.5
  config.update(num_steps=300, batch_size=64)
  config.loss.beta = 500.0
  config.data.caption_dropout = 0.1
  config.optimizer.update(learning_rate=2e-5, warmup_steps=20)
  config.logging.every = 10
  config.checkpoint.every = 100
  config.sample.update(every=30, num_prompts=32)
  return config
