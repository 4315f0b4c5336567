"""Stable Diffusion's process behind the interface: the numbers are those of the functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion

STABLE_DIFFUSION = {
  "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
  "set_alpha_to_one": False,
}  # fmt: skip


@pytest.mark.parametrize("prediction", diffusion.PREDICTION_TYPES)
def test_the_process_of_stable_diffusion(prediction):
  schedule = diffusion.schedule_from_config(STABLE_DIFFUSION | {"prediction_type": prediction})
  process: diffusion.Process = diffusion.VariancePreserving(schedule)
  x0, noise = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 3))
  t, prev_t = jnp.asarray([1, 250, 500, 750, 999]), jnp.asarray([-199, 0, 300, 700, 980])
  x_t = process.add_noise(x0, noise, t)
  np.testing.assert_array_equal(x_t, diffusion.add_noise(schedule, x0, noise, t))
  target = process.target(x0, noise, t)
  np.testing.assert_allclose(process.to_x0(target, x_t, t), x0, atol=2e-4)
  for found, expected in zip(
    process.transition(target, x_t, t, prev_t, eta=0.7),
    diffusion.ddim_mean_std(schedule, target, x_t, t, prev_t, eta=0.7),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(process.reward_scale(t), diffusion.timestep_reward_scale(schedule, t))
  key = jax.random.key(1)
  drawn = process.sample_times(key, 64, gamma=0.5, num_bins=10)
  options = dict(num_train_timesteps=1000, gamma=0.5, num_bins=10)
  np.testing.assert_array_equal(drawn, diffusion.sample_timesteps(key, 64, **options))
  assert process.num_train_timesteps == 1000 and drawn.mean() > 700


def test_the_grid_ends_where_a_density_is_left():
  process = diffusion.VariancePreserving(diffusion.schedule_from_config(STABLE_DIFFUSION))
  assert [v.tolist() for v in process.grid(5)] == [[801, 601, 401, 201, 1], [601, 401, 201, 1, -199]]
  assert process.grid(5, density=True)[1].tolist() == [601, 401, 201, 1, 0]
  with pytest.raises(ValueError, match="num_steps is 1001"):
    process.grid(1001)
