r"""The step-aware preference model of SPO (arXiv 2406.04314, Section 3.2) for SDXL, from PickScore.

    python -m jaxpref.score --config=configs/spm_sdxl.py --config.data.path=PICKAPIC --out=scores.npz
    python -m jaxpref.main --config=configs/spm_sdxl.py --config.data.path=PICKAPIC --config.data.scores=scores.npz
    python -m jaxpref.main --config=configs/spm_sdxl.py:smoke    # the same code path on a miniature with random weights

PICKAPIC is a folder as for configs/spm_sd15.py, Pick-a-Pic v1, but the labels are PickScore's, not people's. The first
command scores all images; an image wins if its share in the softmax of the two scores is more than 0.1 above the
other's, and the rest are ties. To skip all this, scripts/assets/convert_spm.py turns the published model into a folder.

Source: step_aware_preference_model/ of github.com/RockeyCoss/SPO, with the paper: 7,000 steps, rate 1e-6, 1024 pixels,
  the VAE madebyollin/sdxl-vae-fp16-fix, labels as above; the rest as for Stable Diffusion 1.5 (configs/spm_sd15.py).
Differs: SDXL gets each image's own size and crop (there 1024 x 1024 and none), and what configs/spm_sd15.py says.
Hardware: the paper's 4 x A100 (80 GB); part of the 234 A100 hours of SPO on SDXL.
Expect: the accuracy on held-out pairs is not stated. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/spm_sdxl.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "spm"
  config.seed = 42
  config.model = "stabilityai/stable-diffusion-xl-base-1.0"
  config.vae_model = "madebyollin/sdxl-vae-fp16-fix"
  config.preference_model = "yuvalkirstain/PickScore_v1"
  config.dtype = "bfloat16"
  config.update(num_steps=7000, batch_size=64, vae_slicing=1)
  config.spm.guidance_scale = 5.0
  config.data.update(source="tfds", ties="keep", labels="scores", min_gap=0.1, num_threads=16)
  config.optimizer.update(learning_rate=1e-6, warmup_steps=500, schedule="linear", weight_decay=0.3, clip_norm=1.0)
  config.checkpoint.every = 1000
  if variant == "smoke":
    smoke(config, "sdxl-miniature")
  return config
