"""Diffusion-KTO (arXiv 2404.04465) on tiny-sd: from images that are liked or not, without pairs.

    python -m jaxpref.main --config=configs/kto_tiny.py

About 4 minutes on 2 CPU cores, evaluation included; as many images as configs/dpo_tiny.py sees in pairs, and its other
numbers. beta is not the paper's 5000, but that of the other tiny recipes. Nothing was tuned.
"""

from jaxpref.config import default


def get_config():
  """The recipe."""
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
