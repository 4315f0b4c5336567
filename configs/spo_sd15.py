r"""SPO (arXiv 2406.04314) on Stable Diffusion 1.5 with LoRA, the published hyper-parameters.

    python scripts/assets/convert_spm.py sd-v1-5_step-aware_preference_model.bin models/spm_sd15
    python -m jaxpref.main --config=configs/spo_sd15.py \
      --config.preference_model=models/spm_sd15 --config.data.path=4k_training_prompts.json
    python -m jaxpref.main --config=configs/spo_sd15.py:smoke    # the same code path on a miniature with random weights

The checkpoint is in SPO-Diffusion-Models/Step-Aware_Preference_Models on the Hugging Face hub (or configs/spm_sd15.py
makes one). The 4,000 prompts are in github.com/RockeyCoss/SPO (a list of {"caption": ...}); any text file with one
prompt per line works.

Source: configs/basic_config.py and configs/spo_sd-v1-5_4k-prompts_num-sam-4_10ep_bs10.py there: DDIM with 20 steps, eta
  1, guidance 5; from the fifth step on pools of 4; threshold 0.3; beta 10, ratio clipped to 1 +- 0.1; LoRA of rank 4
  and alpha 4 on to_q, to_k, to_v and to_out.0, A normal with a deviation of 1/4; AdamW (0.9, 0.999, 1e-8), weight decay
  1e-4, constant rate 6e-5; seed 42. 10 epochs over 4,000 prompts, 10 prompts per GPU on 4 GPUs: 1,000 rollouts of 40
  prompts, with 16 decisions per prompt, including the last step's (`pool_last_step`). An update has 10 transitions per
  GPU, 40 in all.
Differs: the gradient norm is clipped to 1 (there it is not: an exhausted iterator is clipped); bfloat16 (there
  float16).
Hardware: the paper's 4 x A100 (80 GB), 80 A100 hours with the preference model's training.
Expect: PickScore 21.43, from 20.53. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/spo_sd15.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "spo"
  config.seed = 42
  config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=1000, batch_size=40, vae_slicing=4)
  config.lora.update(rank=4, init="gaussian")
  config.loss.beta = 10.0
  config.optimizer.update(learning_rate=6e-5, weight_decay=1e-4, clip_norm=1.0)
  config.spo.update(num_inference_steps=20, eta=1.0, guidance_scale=5.0, warmup_steps=4, pool_size=4, inner_steps=0)
  config.spo.update(threshold=0.3, ratio_clip=0.1, minibatch=40, pool_last_step=True)
  config.data.source = "prompts"
  config.logging.every = 1
  config.checkpoint.every = 50
  config.evaluation.update(num_prompts=0, batch_size=8)  # for config.evaluation.scorers: 20 steps of DDIM, guidance 5
  if variant == "smoke":
    smoke(config, "sd15-miniature")
  return config
