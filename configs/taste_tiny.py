"""Diffusion-DPO (arXiv 2311.12908) of a LoRA of tiny-sd on a few hundred votes.

    python -m jaxpref.main --config=configs/taste_tiny.py --config.data.path=VOTES
    python -m jaxpref.taste --config=configs/taste_tiny.py --prompts=prompts.txt --out=my_taste

VOTES is what `python -m jaxpref.vote PAIRS --export=VOTES` wrote; the second command draws the pairs, too.

Source: our own numbers.
Differs: beta 500 instead of 5000, a LoRA of rank 16, 120 steps of 16 pairs, so that 50 votes are seen 38 times. Rate,
steps and beta are the best of nine tries with 200 votes (docs/results/votes.md). At 1e-2, with a beta of 50, or after
240 steps the pictures lose their captions.
Hardware: any CPU.
Expect: from 100 simulated votes 28 points more of the preferred style, and 7 points less of caption accuracy; with 50
votes take 60 steps (docs/results/votes.md).
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "dpo"
  config.model = "tiny-sd"
  config.judge = None
  config.evaluation.update(num_prompts=0, guidance_scale=3.5)
  config.update(num_steps=120, batch_size=16)
  config.loss.beta = 500.0
  config.lora.rank = 16
  config.data.source = "pairs_file"
  config.data.caption_dropout = 0.1
  config.optimizer.update(learning_rate=3e-3, warmup_steps=5)
  config.logging.every = 5
  config.checkpoint.every = 30
  config.sample.update(every=20, num_prompts=8)
  return config
