r"""Diffusion-DPO on rectified flow: a miniature of Stable Diffusion 3.5 with random weights, to try its code path.

    python -m jaxpref.main --config=configs/dpo_sd35_tiny.py

Source: the settings of configs/dpo_sd35m.py; the pairs are the embedded emoji.
Differs: random weights, whose pictures show nothing; 20 steps of 8 pairs at 16 pixels, a LoRA of rank 4.
Hardware: any CPU.
Expect: a loss that begins at log 2 = 0.693, in about a minute.
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "dpo"
  config.family = "stable_diffusion_3"
  config.model = "random:sd35-miniature"
  config.update(num_steps=20, batch_size=8)
  config.loss.beta = 2000.0
  config.timesteps.density = "logit_normal"
  targets = r"\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"
  config.lora.update(rank=4, alpha=8.0, targets=targets, init="gaussian")
  config.data.caption_dropout = 0.1
  config.optimizer.update(learning_rate=1e-4, warmup_steps=2, weight_decay=1e-4)
  config.logging.every = 1
  config.checkpoint.every = 10
  config.evaluation.num_prompts = 0
  return config
