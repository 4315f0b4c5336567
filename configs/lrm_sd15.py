r"""The latent reward model of LPO (arXiv 2502.01051) for Stable Diffusion 1.5, from its own UNet and text encoder.

    python -m jaxpref.main --config=configs/lrm_sd15.py --config.data.path=PICKAPIC
    python -m jaxpref.main --config=configs/lrm_sd15.py:smoke    # the same code path on a miniature with random weights

PICKAPIC is a folder as for configs/spm_sd15.py, Pick-a-Pic v1. No image is decoded, so precomputed data work:

    python -m jaxpref.precompute --config=configs/lrm_sd15.py --config.data.path=PICKAPIC --out=LATENTS
    python -m jaxpref.main --config=configs/lrm_sd15.py --config.data.source=precomputed \
      --config.data.path=LATENTS --config.evaluation.num_prompts=0

To skip this, scripts/assets/convert_lrm.py turns the published model into a folder.

Source: lrm/lrm_15/ of github.com/Kwai-Kolors/LPO: the means of the UNet's features of all levels (4,800 numbers, those
  of the middle guided with 7.5) projected to 768, against the text encoder's pooled output through CLIP-L's text
  projection, which is read from openai/clip-vit-large-patch14; UNet, text encoder and projections trained; separate
  noise for both images, at one of 1, 51, ..., 951; two-way cross-entropy, pairs weighted by 1 /
  num_example_per_prompt; 4,000 steps of 128 pairs (8 GPUs x 16), AdamW (0.9, 0.999) with weight decay 0.3, rate 1e-5,
  warm-up of 500 steps, then linear to 0 at the end (DeepSpeed's WarmupDecayLR), gradient norm clipped to 1; bfloat16.
Differs: the warm-up is linear (there logarithmic), and images are cropped (there squeezed to 512 x 512). All pairs are
  used. There they are filtered: preferences whose winner is ahead by more than -0.5 in aesthetic score, 0 in CLIP score
  and 0 in VQAScore, and ties whose images are closer than 0.2, 0.03 and 0.07; 169 k pairs. The scores are published
  with the code: leave out unwanted pairs when you write PICKAPIC.
Hardware: the paper's 8 A100; with LPO itself 23 A100 hours.
Expect: the accuracy on held-out pairs is not stated. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/lrm_sd15.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "lrm"
  config.seed = 42
  config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  config.preference_model = "openai/clip-vit-large-patch14"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=4000, batch_size=128, vae_slicing=4)
  config.lrm.guidance_scale = 7.5
  config.data.update(source="tfds", ties="keep", num_threads=16)
  config.optimizer.update(learning_rate=1e-5, warmup_steps=500, schedule="linear", weight_decay=0.3, clip_norm=1.0)
  config.checkpoint.every = 500
  if variant == "smoke":
    smoke(config, "sd15-miniature")
  return config
