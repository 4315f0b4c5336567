"""What all objectives are made of."""

import jax
import numpy as np

from jaxpref.objectives.base import named_key


def test_named_keys_differ():
  keys = [named_key(jax.random.key(0), n) for n in ("t", "noise", "posterior", "reference")]
  assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == 4
