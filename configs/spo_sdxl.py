r"""SPO (arXiv 2406.04314) on SDXL with LoRA, the published hyper-parameters.

    python scripts/assets/convert_spm.py sdxl_step-aware_preference_model.bin models/spm_sdxl
    python -m jaxpref.main --config=configs/spo_sdxl.py \
      --config.preference_model=models/spm_sdxl --config.data.path=4k_training_prompts.json
    python -m jaxpref.main --config=configs/spo_sdxl.py:smoke    # the same code path on a miniature with random weights

The checkpoint is in SPO-Diffusion-Models/Step-Aware_Preference_Models on the Hugging Face hub (or configs/spm_sdxl.py
makes one). The 4,000 prompts are in github.com/RockeyCoss/SPO (a list of {"caption": ...}); any text file with one
prompt per line works.

Source: configs/spo_sdxl_4k-prompts_num-sam-2_3-is_10ep_bs2_gradacc2.py there, over configs/basic_config.py: pools of 2
  that run 4 steps before they are scored (3 inner steps); threshold 0.4; LoRA of rank 64 and alpha 64; rate 1e-5; the
  VAE madebyollin/sdxl-vae-fp16-fix; the rest as for Stable Diffusion 1.5 (configs/spo_sd15.py). 10 epochs over 4,000
  prompts, 2 prompts per GPU on 4 GPUs: 5,000 rollouts of 8 prompts. An update has 2 transitions per GPU x accumulation
  2, 16 in all: 4 that share their start, and the 12 of the inner steps, which do not and come in proportion.
Differs: bfloat16 (there float16), and what configs/spo_sd15.py says.
Hardware: the paper's 4 x A100 (80 GB), 234 A100 hours with the preference model's training. With 2 prompts per device a
  step takes 16.4 GiB of a GPU (docs/results/benchmarks.md): 4 cards of 24 GB suffice, or one with --config.batch_size=2
  --config.spo.minibatch=1 and a fourth of the updates' size.
Expect: PickScore 23.06, from 21.95. This recipe has not been run at full size.
"""

from jaxpref.config import default, smoke


def get_config(variant: str = ""):
  """Returns the recipe; `smoke` runs it on a miniature of the same topology in about a minute on a CPU."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/spo_sdxl.py:{variant} is unknown; expected nothing or smoke.")
  config = default()
  config.objective = "spo"
  config.seed = 42
  config.model = "stabilityai/stable-diffusion-xl-base-1.0"
  config.vae_model = "madebyollin/sdxl-vae-fp16-fix"
  config.dtype = "bfloat16"
  config.remat = "block"
  config.update(num_steps=5000, batch_size=8, accumulation=2, vae_slicing=1)
  config.lora.update(rank=64, init="gaussian")
  config.loss.beta = 10.0
  config.optimizer.update(learning_rate=1e-5, weight_decay=1e-4, clip_norm=1.0)
  config.spo.update(num_inference_steps=20, eta=1.0, guidance_scale=5.0, warmup_steps=4, pool_size=2, inner_steps=3)
  config.spo.update(threshold=0.4, ratio_clip=0.1, minibatch=4)
  config.data.source = "prompts"
  config.logging.every = 1
  config.checkpoint.every = 50
  config.evaluation.update(num_prompts=0, batch_size=8)  # for config.evaluation.scorers: 20 steps of DDIM, guidance 5
  if variant == "smoke":
    smoke(config, "sdxl-miniature")
  return config
