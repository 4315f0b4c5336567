r"""Timestep-aware DPO with a stable reference update (arXiv 2505.18736) on SDXL, all of the UNet.

    python -m jaxpref.main --config=configs/tdpo_sdxl.py --config.data.path=PICKAPIC --config.mesh.fsdp=16
    python -m jaxpref.main --config=configs/tdpo_sdxl.py:smoke    # the same code path on a miniature

PICKAPIC is a folder that tensorflow_datasets wrote (ArrayRecord) with the features caption, image_0, image_1 and
label_0; the paper trains on Pick-a-Pic v2.

Source: the paper: delta = 0.002 for SDXL; the rest as for Stable Diffusion 1.5 (configs/tdpo_sd15.py). Batch, steps,
  warm-up, optimiser, VAE and augmentation are those of Diffusion-DPO on SDXL, on which the method builds
  (configs/dpo_sdxl.py says where they come from).
Differs: what configs/dpo_sdxl.py and configs/tdpo_sd15.py say; the paper leaves the same numbers unstated.
Hardware: that of Diffusion-DPO, 16 x A100, 30 hours for 200 steps, and every tau steps two more UNet calls on 8 images.
  Policy and reference, and here also the pre-trained UNet, are 2.6 billion parameters each; `mesh.fsdp` splits them
  over the devices. The pixels of one batch are 13 GB, in the memory of hosts and of devices together.
Expect: an average win rate of 60.9 % against Diffusion-DPO. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/tdpo_sdxl.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "tdpo"
  config.model = "stabilityai/stable-diffusion-xl-base-1.0"
  config.vae_model = "madebyollin/sdxl-vae-fp16-fix"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=2000, batch_size=2048, accumulation=128, vae_slicing=1)
  config.loss.beta = 5000.0
  config.timesteps.update(gamma=0.9, num_bins=20, reward_scale=True)
  config.reference.update(mode="update", alpha=1.0, rho=0.0, tau=32, delta=0.002, on_diverge="freeze")
  config.data.update(source="tfds", caption_dropout=0.2, flip=True, num_threads=16)
  config.optimizer.update(name="adafactor", learning_rate=2.048e-5, warmup_steps=200, weight_decay=1e-2, clip_norm=1.0)
  config.checkpoint.every = 200
  # For config.evaluation.scorers, if any: draws as the papers of this line do.
  config.evaluation.update(num_prompts=0, num_inference_steps=50, guidance_scale=7.5, batch_size=8)
  if variant == "smoke":
    smoke(config, "sdxl-miniature")
  return config
