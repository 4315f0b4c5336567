r"""Diffusion-DPO on rectified flow (Flow-DPO) with LoRA: Stable Diffusion 3.5 medium at 512 pixels.

    python -m jaxpref.precompute --config=configs/dpo_sd35m.py --config.data.path=PICKAPIC --out=FOLDER
    python -m jaxpref.main --config=configs/dpo_sd35m.py --config.data.source=precomputed --config.data.path=FOLDER
    python -m jaxpref.main --config=configs/dpo_sd35m.py:smoke    # the same code path on a miniature of random weights

PICKAPIC is a folder as for configs/dpo_sd15.py. On precomputed data, training loads the transformer alone, and T5 (4.7
billion parameters) is not in memory; python -m jaxpref.main --config=configs/dpo_sd35m.py --config.data.path=PICKAPIC
trains without that step and keeps all networks. --config.drop_t5=True leaves T5 out of training and of the export.

Source: the loss is Diffusion-DPO's (arXiv 2311.12908, Eq. 14) with the flow's velocity instead of the noise, and times
  from logit-normal(0, 1), as SD3 was trained (arXiv 2403.03206). beta 2000 is for errors that are means over a latent;
  for sums it is 2000 / 65536, as a latent has 64 x 64 x 16 numbers. Adapted layers, rank 32, alpha 64, their Gaussian
  start, weight decay, clipping and 128 tokens of T5 are Flow-GRPO's (arXiv 2505.05470) on this model.
Differs: published values of beta are 100 to 2000, mostly without saying whether errors are means or sums. Rate, batch
  and number of steps are our own.
Hardware: chosen for 8 chips of 80 GB or more; `accumulation` 8 leaves 8 pairs at a time.
Expect: nothing yet: this recipe has not been run at full size.
"""

from jaxpref.config import default, smoke

# Both streams of the joint attention, as Flow-GRPO adapts them.
TARGETS = r"\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/dpo_sd35m.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "dpo"
  config.family = "stable_diffusion_3"
  config.model = "stabilityai/stable-diffusion-3.5-medium"
  config.max_sequence_length = 128
  config.image_size = 512
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=2000, batch_size=64, accumulation=8)
  config.loss.beta = 2000.0
  config.timesteps.density = "logit_normal"
  config.lora.update(rank=32, alpha=64.0, targets=TARGETS, init="gaussian")
  config.data.update(source="tfds", caption_dropout=0.1, num_threads=16)
  config.optimizer.update(learning_rate=1e-4, warmup_steps=100, weight_decay=1e-4, clip_norm=1.0)
  config.checkpoint.every = 500
  # For config.evaluation.scorers, if any: draws as Flow-GRPO evaluates.
  config.evaluation.update(num_prompts=0, num_inference_steps=40, guidance_scale=4.5, batch_size=8)
  if variant == "smoke":
    smoke(config, "sd35-miniature")
  return config
