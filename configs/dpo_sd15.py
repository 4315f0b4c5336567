r"""Diffusion-DPO (arXiv 2311.12908) on Stable Diffusion 1.5: all of the UNet, the published hyper-parameters.

    python -m jaxpref.main --config=configs/dpo_sd15.py --config.data.path=PICKAPIC
    python -m jaxpref.main --config=configs/dpo_sd15.py:smoke    # the same code path on a miniature with random weights

PICKAPIC is a folder that tensorflow_datasets wrote (ArrayRecord) with the features caption, image_0, image_1 and
label_0; the paper trains on Pick-a-Pic v2, 851,293 pairs without the ties.

Source: launchers/sd15.sh and train.py of github.com/SalesforceAIResearch/DiffusionDPO: 2,000 steps of 2,048 pairs (16
  GPUs x 1 pair x accumulation 128), beta 5000, AdamW (0.9, 0.999) with weight decay 0.01, rate 1e-8 per pair x 2,048,
  constant after a warm-up of 500 steps, gradient norm clipped to 1, 512 pixels, 20 % of the captions dropped, ties
  dropped. The paper writes the rate as 2.048e-8 x 2000 / beta and also uses beta 2000.
Differs: both images of a pair are mirrored together (there each separately), bfloat16 (there float16), Lanczos
  resampling (there bilinear).
Hardware: the paper's 16 x A100; the launcher says about 24 hours, 384 A100 hours. `accumulation` 128 leaves 16 pairs at
  a time, one per device on 16 devices; fewer devices can keep it, more need a lower one. The pixels of one batch are
  3 GB, in the memory of hosts and of devices together.
Expect: PickScore 20.98, from 20.53 (the table of SPO's paper, arXiv 2406.04314). This recipe has not been run at full
  size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/dpo_sd15.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "dpo"
  config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=2000, batch_size=2048, accumulation=128)
  config.loss.beta = 5000.0
  config.data.update(source="tfds", caption_dropout=0.2, flip=True, num_threads=16)
  config.optimizer.update(learning_rate=2.048e-5, warmup_steps=500, weight_decay=1e-2, clip_norm=1.0)
  config.checkpoint.every = 500
  # For config.evaluation.scorers, if any: draws as the papers of this line do.
  config.evaluation.update(num_prompts=0, num_inference_steps=50, guidance_scale=7.5, batch_size=8)
  if variant == "smoke":
    smoke(config, "sd15-miniature")
  return config
