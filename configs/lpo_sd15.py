r"""LPO (arXiv 2502.01051) on Stable Diffusion 1.5 with LoRA, the published hyper-parameters.

    python scripts/assets/convert_lrm.py LRM_SD15 models/lrm_sd15
    python -m jaxpref.main --config=configs/lpo_sd15.py \
      --config.preference_model=models/lrm_sd15 --config.data.path=4k_training_prompts.json
    python -m jaxpref.main --config=configs/lpo_sd15.py:smoke    # the same code path on a miniature with random weights

The latent reward model is in casiatao/LRM on the Hugging Face hub (or configs/lrm_sd15.py makes one). The 4,000 prompts
are in github.com/Kwai-Kolors/LPO (a list of {"caption": ...}); any text file with one prompt per line works.

Source: lpo/configs/basic_config.py and lpo_sd-v1-5_5ep_cfg75_4k_beta500_multiscale_wocfg_thresh035-05-sigma.py there:
  DDIM with 20 steps, eta 1, guidance 5; pools of 4 in every step; threshold linear in the step's noise from 0.35 to
  0.5; beta 500, ratio clipped to 1 +- 0.1; LoRA of rank 4 and alpha 4 on to_q, to_k, to_v and to_out.0, A normal with
  a deviation of 1/4; AdamW (0.9, 0.999, 1e-8), weight decay 1e-4, constant rate 6e-5; seed 42. 5 epochs over 4,000
  prompts, 5 prompts per GPU on 4 GPUs: 1,000 rollouts of 20 prompts. An update has 10 transitions per GPU, 40 in all.
Differs: the gradient norm is clipped to 1 (there it is not: an exhausted iterator is clipped); bfloat16 (there
  float16). docs/methods/lpo.md lists the rest; --config.spo.score_time=start gives the reward model the times that the
  code there does.
Hardware: the paper's 4 x A100, 23 A100 hours with the latent reward model's training.
Expect: PickScore 21.69, from 20.56. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/lpo_sd15.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "spo"
  config.reward = "latent"
  config.seed = 42
  config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=1000, batch_size=20)
  config.lora.update(rank=4, init="gaussian")
  config.loss.beta = 500.0
  config.optimizer.update(learning_rate=6e-5, weight_decay=1e-4, clip_norm=1.0)
  config.spo.update(num_inference_steps=20, eta=1.0, guidance_scale=5.0, warmup_steps=0, pool_size=4, inner_steps=0)
  config.spo.update(threshold=0.35, threshold_max=0.5, ratio_clip=0.1, minibatch=40, pool_last_step=True)
  config.data.source = "prompts"
  config.logging.every = 1
  config.checkpoint.every = 50
  config.evaluation.update(num_prompts=0, batch_size=8)  # for config.evaluation.scorers: 20 steps of DDIM, guidance 5
  if variant == "smoke":
    smoke(config, "sd15-miniature")
  return config
