"""The latent reward model of LPO (arXiv 2502.01051) for tiny-sd, from its own UNet and text encoder.

    python -m jaxpref.main --config=configs/lrm_tiny.py

It scores noisy latents; `configs/lpo_tiny.py` trains with it.

Source: our own numbers; the pairs are the embedded emoji.
Differs: no filter of the pairs; 400 steps of 32 pairs.
Hardware: any CPU.
Expect: nothing was tuned. On noisy pairs LPO learns from it what docs/results/papers.md says.
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "lrm"
  config.model = "tiny-sd"
  config.update(num_steps=400, batch_size=32)
  config.data.ties = "keep"
  config.lrm.guidance_scale = 3.5
  config.optimizer.update(learning_rate=1e-4, warmup_steps=50, weight_decay=0.01)
  config.logging.every = 10
  config.checkpoint.every = 200
  return config
