"""Makes tiny-sd, the small Stable Diffusion that is shipped, from the embedded emoji; each run is one stage.

    python -m jaxpref.main --config=configs/pretrain_tiny.py:vae
    python -m jaxpref.main --config=configs/pretrain_tiny.py:unet            # needs :vae
    python -m jaxpref.main --config=configs/pretrain_tiny.py:unet_restart    # needs :unet
    python -m jaxpref.main --config=configs/pretrain_tiny.py:clip
    python -m jaxpref.main --config=configs/pretrain_tiny.py:judge

`scripts/assets/make_tiny_sd.sh` runs all stages and `configs/spm_tiny.py`, and installs the results in
`jaxpref/assets`.

Source: our own numbers.
Differs: no published recipe.
Hardware: hours on two CPU cores for all stages, minutes on a GPU.
Expect: the models in jaxpref/assets; docs/results/judge.md measures the judge.
"""

from jaxpref.config import default

STAGES = ("vae", "unet", "unet_restart", "clip", "judge")


def get_config(stage: str = "unet"):
  """Returns the recipe of one stage."""
  if stage not in STAGES:
    raise ValueError(f"configs/pretrain_tiny.py:{stage} is unknown; expected one of {', '.join(STAGES)}.")
  config = default()
  config.data.split = "all"
  config.optimizer.update(name="adamw", schedule="cosine", warmup_steps=200, b2=0.99, weight_decay=1e-3)
  config.logging.every = 50
  config.checkpoint.every = 500
  if stage == "vae":
    config.objective = "autoencode"
    config.model = "random:tiny-sd"
    config.update(num_steps=1200, batch_size=48)
    config.data.flip = True
    config.optimizer.learning_rate = 3e-3
  elif stage in ("unet", "unet_restart"):
    config.objective = "denoise"
    # The restart repeats the schedule from where the first round ended.
    config.model = "runs/pretrain_tiny_vae/export" if stage == "unet" else "runs/pretrain_tiny_unet/export"
    config.seed = 0 if stage == "unet" else 1
    config.train_text_encoder = True
    config.update(num_steps=8000, batch_size=32)
    config.data.caption_dropout = 0.1
    config.optimizer.learning_rate = 1e-3
    config.sample.every = 2000
    config.evaluation.guidance_scale = 3.5
  elif stage == "clip":
    config.objective = "contrastive"
    config.update(num_steps=1600, batch_size=96)
    config.optimizer.learning_rate = 1e-3
  else:
    config.objective = "classify"
    config.data.subset = "all"  # more emoji to learn styles from
    config.update(num_steps=3600, batch_size=64, seed=1)
    config.optimizer.learning_rate = 2e-3
  return config
