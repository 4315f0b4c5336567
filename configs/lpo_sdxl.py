r"""LPO (arXiv 2502.01051) on SDXL with LoRA, the published hyper-parameters.

    python scripts/assets/convert_lrm.py LRM_SDXL models/lrm_sdxl
    python -m jaxpref.main --config=configs/lpo_sdxl.py \
      --config.preference_model=models/lrm_sdxl --config.data.path=4k_training_prompts.json
    python -m jaxpref.main --config=configs/lpo_sdxl.py:smoke    # the same code path on a miniature with random weights

The latent reward model is in casiatao/LRM on the Hugging Face hub (or configs/lrm_sdxl.py makes one). The run's name
there says 8,000 prompts; its configuration reads the 4,000 of Stable Diffusion 1.5, as here.

Source: lpo_sdxl_5ep_cfg75_8k_beta500_multiscale_wocfg_thresh45-6-sigma.py there: threshold from 0.45 to 0.6; LoRA of
  rank 64 and alpha 64; rate 1e-5; the VAE madebyollin/sdxl-vae-fp16-fix; the rest as for Stable Diffusion 1.5
  (configs/lpo_sd15.py). 5 epochs over 4,000 prompts, 4 prompts per GPU on 4 GPUs: 1,250 rollouts of 16 prompts. An
  update has 4 transitions per GPU, 16 in all.
Differs: bfloat16 (there float16), and what configs/lpo_sd15.py says.
Hardware: the paper's 4 x A100, 92 A100 hours with the latent reward model's training.
Expect: PickScore 22.86, from 21.65. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/lpo_sdxl.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "spo"
  config.reward = "latent"
  config.seed = 42
  config.model = "stabilityai/stable-diffusion-xl-base-1.0"
  config.vae_model = "madebyollin/sdxl-vae-fp16-fix"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=1250, batch_size=16)
  config.lora.update(rank=64, init="gaussian")
  config.loss.beta = 500.0
  config.optimizer.update(learning_rate=1e-5, weight_decay=1e-4, clip_norm=1.0)
  config.spo.update(num_inference_steps=20, eta=1.0, guidance_scale=5.0, warmup_steps=0, pool_size=4, inner_steps=0)
  config.spo.update(threshold=0.45, threshold_max=0.6, ratio_clip=0.1, minibatch=16, pool_last_step=True)
  config.data.source = "prompts"
  config.logging.every = 1
  config.checkpoint.every = 50
  config.evaluation.update(num_prompts=0, batch_size=8)  # for config.evaluation.scorers: 20 steps of DDIM, guidance 5
  if variant == "smoke":
    smoke(config, "sdxl-miniature")
  return config
