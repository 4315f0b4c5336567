"""Timestep-aware DPO with a stable reference update (arXiv 2505.18736) on tiny-sd.

    python -m jaxpref.main --config=configs/tdpo_tiny.py

Source: our own numbers; gamma 0.9, delta 0.005 and the reward scale are the paper's.
Differs: beta 500 instead of 5000, 240 steps of 32 pairs.
Hardware: any CPU.
Expect: over seeds 0, 1 and 2 the share of the preferred style rises from 34.4 to 89.8, 89.5 and 93.0 %, and the win
  rate against the base model is 93.6, 92.6 and 93.4 % (`python scripts/study/tiny_results.py`).
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "tdpo"
  config.model = "tiny-sd"
  config.judge = "tiny-judge"
  config.evaluation.guidance_scale = 3.5
  config.update(num_steps=240, batch_size=32)
  config.loss.beta = 500.0
  config.data.caption_dropout = 0.1
  config.timesteps.update(gamma=0.9, reward_scale=True)
  config.reference.update(mode="update", tau=32, delta=0.005)
  config.optimizer.update(learning_rate=2e-5, warmup_steps=20)
  config.logging.every = 10
  config.checkpoint.every = 100
  config.sample.update(every=30, num_prompts=32)
  return config
