"""The step-aware preference model of SPO (arXiv 2406.04314, Section 3.2) for tiny-sd, from tiny-clip.

    python -m jaxpref.main --config=configs/spm_tiny.py

Source: our own numbers; the pairs are the embedded emoji, ties included.
Differs: 800 steps of 32 pairs, rate 3e-4 with cosine decay.
Hardware: any CPU.
Expect: the tiny-spm that comes with jaxpref, which this recipe made.
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "spm"
  config.model = "tiny-sd"
  config.preference_model = "tiny-clip"
  config.update(num_steps=800, batch_size=32)
  config.data.ties = "keep"
  config.spm.guidance_scale = 3.5
  config.optimizer.update(learning_rate=3e-4, warmup_steps=50, schedule="cosine", weight_decay=0.01)
  config.logging.every = 10
  config.checkpoint.every = 200
  return config
