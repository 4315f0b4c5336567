"""LPO (arXiv 2502.01051) on tiny-sd: SPO that chooses among noisy latents, by a latent reward model.

    python -m jaxpref.main --config=configs/lrm_tiny.py --workdir=runs/lrm_tiny
    python -m jaxpref.main --config=configs/lpo_tiny.py --config.preference_model=runs/lrm_tiny/export

Source: the numbers of configs/spo_tiny.py, and a threshold that grows with the noise as in the paper.
Differs: pools from the eleventh step on, threshold from 0.1 to 0.2, all of the UNet instead of LoRA.
Hardware: any CPU.
Expect: no result is recorded on the embedded pairs. On noisy pairs, where twice this rate was chosen, 30 iterations
  raise the share of the preferred style from 35.1 to 85.7 %, the mean of four seeds, 84.5 to 86.6 %
  (`python scripts/study/study.py --only "B lpo$"`, docs/results/papers.md).
"""

from jaxpref.config import default


def get_config():
  """Returns the recipe."""
  config = default()
  config.objective = "spo"
  config.reward = "latent"
  config.model = "tiny-sd"
  config.judge = "tiny-judge"
  config.evaluation.guidance_scale = 3.5
  config.update(num_steps=25, batch_size=8)
  config.loss.beta = 10.0
  config.optimizer.update(learning_rate=2e-5, weight_decay=1e-4)
  config.spo.update(num_inference_steps=20, guidance_scale=3.5, warmup_steps=10, pool_size=4, pool_last_step=True)
  config.spo.update(threshold=0.1, threshold_max=0.2, minibatch=20)
  config.logging.every = 1
  config.checkpoint.every = 10
  config.sample.update(every=5, num_prompts=32)
  return config
