"""A Python function as a reward: it runs on the host, on the rows of each process, within a time limit."""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from jaxpref.rewards import published


@dataclasses.dataclass(frozen=True, eq=False)
class PythonReward:
  """The `HostReward` of a user's own function.

  Attributes:
    scorer: the function, with checks of its inputs and outputs.
    seconds: time that a call may take.
  """

  scorer: published.Scorer
  seconds: float
  scale = 1.0

  @property
  def name(self) -> str:
    return self.scorer.name

  def score_images(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Scores images u8[H,W,3] and their prompts as f32[N].

    Raises:
      ValueError: one sentence: the function raised, returned anything but N finite numbers, or took too long.
    """
    found: list[np.ndarray] = []
    raised: list[BaseException] = []

    def work() -> None:
      try:
        found.append(self.scorer.score(images, captions))
      except BaseException as error:  # a user's function may raise anything
        raised.append(error)

    thread = threading.Thread(target=work, daemon=True)  # so that a hanging one does not keep the process
    thread.start()
    thread.join(self.seconds)
    if raised:
      error = raised[0]
      if isinstance(error, ValueError) and str(error).startswith((f"scorer {self.name}", f"reward {self.name}")):
        raise error
      raise ValueError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
    if not found:
      raise ValueError(
        f"reward {self.name} took longer than {self.seconds:g} s for {len(images)} images; make it faster, or allow "
        "more time with config.reward_timeout."
      )
    return found[0]
