"""An objective of one's own functions, for tests of what is around objectives."""

from jaxpref.objectives import base


class Toy(base.Offline):
  """Made of loss(w, batch, key), divergence(w, batch, key) and timesteps(key, size), each as of `base.Objective`."""

  def __init__(self, loss, divergence=None, timesteps=None):
    self._loss, self._divergence, self._timesteps = loss, divergence, timesteps

  def loss(self, w, e, key, statistics=None):
    assert statistics is None
    return self._loss(w, e, key)

  def divergence(self, w, batch, key):
    return self._divergence(w, batch, key)

  def timesteps(self, key, size):
    return None if self._timesteps is None else self._timesteps(key, size)
