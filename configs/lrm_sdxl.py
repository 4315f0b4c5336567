r"""The latent reward model of LPO (arXiv 2502.01051) for SDXL, from its own UNet and text encoders.

    python -m jaxpref.main --config=configs/lrm_sdxl.py --config.data.path=PICKAPIC
    python -m jaxpref.main --config=configs/lrm_sdxl.py:smoke    # the same code path on a miniature with random weights

PICKAPIC, the filter of its pairs and what can be precomputed are as for configs/lrm_sd15.py. To skip all this,
scripts/assets/convert_lrm.py turns the published model into a folder.

Source: lrm/lrm_xl/ of github.com/Kwai-Kolors/LPO: 3,520 features projected to 1,280, against the pooled text of the
  second text encoder; both text encoders are trained; 1024 pixels, of which the UNet gets 1024 x 1024 and no crop for
  any image; the VAE madebyollin/sdxl-vae-fp16-fix; 8,000 steps of 32 pairs (8 GPUs x 4), rate 1e-5, warm-up of 1,000
  steps; the rest as for Stable Diffusion 1.5.
Differs: what configs/lrm_sd15.py says.
Hardware: the paper's 8 A100; with LPO itself 92 A100 hours. 2,066 million parameters are trained: with AdamW 31 GiB of
  weights, moments and gradients in float32, which config.mesh.fsdp spreads over devices.
Expect: the accuracy on held-out pairs is not stated. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/lrm_sdxl.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "lrm"
  config.seed = 42
  config.model = "stabilityai/stable-diffusion-xl-base-1.0"
  config.vae_model = "madebyollin/sdxl-vae-fp16-fix"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=8000, batch_size=32, vae_slicing=1)
  config.lrm.guidance_scale = 7.5
  config.data.update(source="tfds", ties="keep", num_threads=16)
  config.optimizer.update(learning_rate=1e-5, warmup_steps=1000, schedule="linear", weight_decay=0.3, clip_norm=1.0)
  config.checkpoint.every = 1000
  if variant == "smoke":
    smoke(config, "sdxl-miniature")
  return config
