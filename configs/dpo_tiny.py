"""Diffusion-DPO (arXiv 2311.12908) on tiny-sd.

    python -m jaxpref.main --config=configs/dpo_tiny.py

Source: our own numbers; the pairs are the embedded emoji.
Differs: beta 500 instead of 5000, 240 steps of 32 pairs.
Hardware: any CPU.
Expect: over seeds 0, 1 and 2 the share of the preferred style rises from 34.4 to 85.5, 82.8 and 86.7 %, and the win
  rate against the base model is 93.4, 93.0 and 93.8 % (`python scripts/study/tiny_results.py`).
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "dpo"
  config.model = "tiny-sd"
  config.judge = "tiny-judge"
  config.evaluation.guidance_scale = 3.5
  config.update(num_steps=240, batch_size=32)
  config.loss.beta = 500.0
  config.data.caption_dropout = 0.1
  config.optimizer.update(learning_rate=2e-5, warmup_steps=20)
  config.logging.every = 10
  config.checkpoint.every = 100
  config.sample.update(every=30, num_prompts=32)
  return config
