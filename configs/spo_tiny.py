"""SPO (arXiv 2406.04314) on tiny-sd.

    python -m jaxpref.main --config=configs/spo_tiny.py

Source: our own numbers; beta 10, 20 steps and pools of 4 are the paper's.
Differs: pools from the eleventh step on, threshold 0.1, all of the UNet instead of LoRA.
Hardware: any CPU.
Expect: over seeds 0, 1 and 2 the share of the preferred style rises from 34.4 to 82.8, 76.2 and 78.1 %, and the win
  rate against the base model is 94.5, 91.4 and 91.4 % (`python scripts/study/tiny_results.py`).
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "spo"
  config.model = "tiny-sd"
  config.preference_model = "tiny-spm"
  config.judge = "tiny-judge"
  config.evaluation.guidance_scale = 3.5
  config.update(num_steps=25, batch_size=8)
  config.loss.beta = 10.0
  config.optimizer.update(learning_rate=2e-5, weight_decay=1e-4)
  # Pools begin half way, when the subject of the picture is settled: earlier ones cost captions
  # (docs/results/tiny_tuning.json).
  config.spo.update(num_inference_steps=20, guidance_scale=3.5, warmup_steps=10, pool_size=4, threshold=0.1)
  config.spo.minibatch = 20
  config.logging.every = 1
  config.checkpoint.every = 10
  config.sample.update(every=5, num_prompts=32)
  return config
