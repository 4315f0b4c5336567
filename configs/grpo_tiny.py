"""GRPO (arXiv 2402.03300, on diffusion 2505.07818 and 2505.05470) on tiny-sd.

    python -m jaxpref.main --config=configs/grpo_tiny.py

Rewards are the shipped preference model's scores of the finished images. An iteration draws 4 prompts x 6 samples in 20
guided UNet calls each, 480 in all, about as many as configs/spo_tiny.py (520). DDPO (arXiv 2305.13301) draws the same
number of samples, each for its own prompt:

    python -m jaxpref.main --config=configs/grpo_tiny.py --workdir=runs/ddpo_tiny --config.batch_size=24 \\
      --config.grpo.group_size=1 --config.grpo.advantage=batch

Source: our own numbers.
Differs: ratios are clipped to 1 +- 1e-3, for the papers' 1e-4; all of the UNet is trained.
Hardware: any CPU.
Expect: no result is recorded.
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "grpo"
  config.model = "tiny-sd"
  config.preference_model = "tiny-spm"
  config.judge = "tiny-judge"
  config.evaluation.guidance_scale = 3.5
  config.update(num_steps=40, batch_size=4)
  config.optimizer.update(learning_rate=2e-5, weight_decay=1e-4)
  config.grpo.update(num_inference_steps=20, guidance_scale=3.5, group_size=6, ratio_clip=1e-3, minibatch=120)
  config.logging.every = 1
  config.checkpoint.every = 10
  config.sample.update(every=5, num_prompts=32)
  return config
