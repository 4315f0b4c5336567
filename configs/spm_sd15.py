r"""The step-aware preference model of SPO (arXiv 2406.04314, Section 3.2) for Stable Diffusion 1.5, from PickScore.

    python -m jaxpref.main --config=configs/spm_sd15.py --config.data.path=PICKAPIC
    python -m jaxpref.main --config=configs/spm_sd15.py:smoke    # the same code path on a miniature with random weights

PICKAPIC is a folder that tensorflow_datasets wrote (ArrayRecord) with the splits train and validation and the features
caption, image_0, image_1, label_0 (0.5: a tie, kept) and num_example_per_prompt; the paper trains on Pick-a-Pic v1. To
skip this, scripts/assets/convert_spm.py turns the published model into a folder.

Source: step_aware_preference_model/ of github.com/RockeyCoss/SPO, with the paper: PickScore's CLIP-H with AdaLN that
  starts as the identity; t uniform in [0, 1000), one noise for both images, x0-predictions with guidance 5; two-way
  cross-entropy, ties to equal scores, pairs weighted by 1 / num_example_per_prompt; 8,000 steps of 64 pairs (4 GPUs x
  16), AdamW (0.9, 0.999) with weight decay 0.3, rate 3e-6, warm-up of 500 steps, then linear to 0 at the end
  (DeepSpeed's WarmupDecayLR), gradient norm clipped to 1, seed 42.
Differs: the warm-up is linear (there logarithmic). The public files do not state the compute dtype; PickScore's
  trainer, on which theirs builds, uses bfloat16, as here.
Hardware: the paper's 4 x A100 (80 GB); part of the 80 A100 hours of SPO on Stable Diffusion 1.5.
Expect: the accuracy on held-out pairs is not stated. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/spm_sd15.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "spm"
  config.seed = 42
  config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  config.preference_model = "yuvalkirstain/PickScore_v1"
  config.dtype = "bfloat16"
  config.update(num_steps=8000, batch_size=64)
  config.spm.guidance_scale = 5.0
  config.data.update(source="tfds", ties="keep", num_threads=16)
  config.optimizer.update(learning_rate=3e-6, warmup_steps=500, schedule="linear", weight_decay=0.3, clip_norm=1.0)
  config.checkpoint.every = 1000
  if variant == "smoke":
    smoke(config, "sd15-miniature")
  return config
