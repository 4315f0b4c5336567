r"""Diffusion-DPO (arXiv 2311.12908) of a LoRA of SDXL on a few hundred votes of your own.

    python -m jaxpref.main --config=configs/taste_sdxl.py --config.data.path=VOTES
    python -m jaxpref.taste --config=configs/taste_sdxl.py --prompts=prompts.txt --out=my_taste
    python -m jaxpref.main --config=configs/taste_sdxl.py:smoke    # on a miniature with random weights

VOTES is what `python -m jaxpref.vote PAIRS --export=VOTES` wrote; the second command draws the pairs, too.

Source: beta 5000 and AdamW are Diffusion-DPO's. Rank and rate are those with which SPO trains LoRA (arXiv 2406.04314).
Differs: 200 steps of 8 pairs, so that 200 votes are seen 8 times.
Hardware: one GPU of 24 GB (docs/results/benchmarks.md has the memory of a LoRA of SDXL).
Expect: this recipe has not been run at full size. docs/results/votes.md has how many votes tiny-sd takes.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/taste_sdxl.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "dpo"
  config.model = "stabilityai/stable-diffusion-xl-base-1.0"
  config.vae_model = "madebyollin/sdxl-vae-fp16-fix"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=200, batch_size=8, accumulation=8, vae_slicing=1)
  config.loss.beta = 5000.0
  config.lora.rank = 64
  config.data.update(source="pairs_file", caption_dropout=0.1)
  config.optimizer.update(learning_rate=1e-5, warmup_steps=10, weight_decay=1e-2, clip_norm=1.0)
  config.logging.every = 5
  config.checkpoint.every = 50
  config.sample.update(every=50, num_prompts=8)
  config.evaluation.update(num_prompts=0, num_inference_steps=30, guidance_scale=5.0)
  if variant == "smoke":
    smoke(config, "sdxl-miniature")
  return config
