"""What a voter may say about a pair, and what it means for the two images.

The page shows a pair as A (left, or above on a narrow screen) and B. Which image is A is drawn for each showing, so a
choice is about sides, and a verdict about images.
"""

CHOICES = ("left", "right", "tie", "skip", "bad")
FIRST, SECOND, TIE, BAD = "image_0", "image_1", "tie", "bad"
VERDICTS = (FIRST, SECOND, TIE, BAD)


def verdict(choice: str, swapped: bool) -> str | None:
  """Returns what a choice says about the images: one of VERDICTS, None for a skipped pair.

  >>> verdict("left", False), verdict("left", True), verdict("tie", True), verdict("skip", False)
  ('image_0', 'image_1', 'tie', None)

  Args:
    choice: one of CHOICES.
    swapped: whether image_1 was shown as A.
  """
  if choice == "skip":
    return None
  if choice in ("left", "right"):
    return SECOND if (choice == "left") == swapped else FIRST
  return choice


def share_of_first(said: str) -> float | None:
  """Returns how much a verdict prefers image_0: 1, 0, 0.5 for a tie; None if both images are bad."""
  return {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}.get(said)
