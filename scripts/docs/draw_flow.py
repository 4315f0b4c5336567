"""Draws docs/images/data_flow.svg: how a recipe becomes a training step, and what flows through it.

python scripts/docs/draw_flow.py
"""

import dataclasses
import html
import pathlib

OUT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "images" / "data_flow.svg"
WIDTH, HEIGHT, LINE = 920, 385, 16  # pixels: of the drawing, and of a line of text


@dataclasses.dataclass(frozen=True)
class Box:
  """A box with a title and lines of text, whose left upper corner is at (x, y)."""

  x: int
  y: int
  title: str
  lines: tuple[str, ...]
  fill: str = "#eef3fb"
  width: int = 200

  @property
  def height(self) -> int:
    return 34 + LINE * len(self.lines)

  def svg(self) -> str:
    middle = self.x + self.width // 2
    texts = [f'<text x="{middle}" y="{self.y + 22}" font-weight="bold">{html.escape(self.title)}</text>']
    texts += [
      f'<text x="{middle}" y="{self.y + 22 + LINE * (i + 1)}" fill="#444">{html.escape(line)}</text>'
      for i, line in enumerate(self.lines)
    ]
    shape = f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6" fill="{self.fill}"/>'
    return "\n".join([shape, *texts])


BOXES = {
  "recipe": Box(20, 20, "recipe", ("configs/NAME.py", "and the command line")),
  "config": Box(350, 20, "Config", ("dataclasses, each with its check", "refused before anything loads"), width=240),
  "model": Box(20, 130, "Model, Process", ("networks and their files", "noise: to x_t, and a step back"), "#eaf6ea"),
  "objective": Box(
    350, 130, "Objective", ("a method, whole, in one file", "loss; online also a rollout"), "#fdf3e1", 240
  ),
  "reward": Box(700, 130, "Reward", ("a network in the graph, or", "a Python function on the host"), "#eaf6ea"),
  "data": Box(20, 250, "data", ("pairs, likes or prompts", "B rows of a batch")),
  "step": Box(
    350, 250, "make_step", ("rows -> loss -> gradient -> update", "then the reference moves"), "#fdf3e1", 240
  ),
  "result": Box(700, 250, "result", ("checkpoints, metrics", "export/, table, pictures")),
}
ARROWS = (
  ("recipe", "config", ""),
  ("config", "objective", "names"),
  ("model", "objective", ""),
  ("reward", "objective", "scores"),
  ("objective", "step", "becomes one program"),
  ("data", "step", "batch"),
  ("step", "result", ""),
)


def arrow(start: Box, end: Box, label: str) -> str:
  """Returns a line between the facing sides of two boxes, which lie in a row or a column, and its label."""
  if start.y == end.y:
    right = end.x > start.x
    x1, x2 = (start.x + start.width, end.x) if right else (start.x, end.x + end.width)
    y1 = y2 = start.y + start.height // 2
    place = f'x="{(x1 + x2) // 2}" y="{y1 - 7}"'
  else:
    x1 = x2 = start.x + start.width // 2
    y1, y2 = start.y + start.height, end.y
    place = f'x="{x1 + 8}" y="{(y1 + y2) // 2 + 5}" text-anchor="start"'
  line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#555" marker-end="url(#head)"/>'
  return f'{line}\n<text {place} fill="#777" font-size="12">{html.escape(label)}</text>' if label else line


def drawing() -> str:
  """Returns the SVG."""
  head = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13" '
    'text-anchor="middle">'
  )
  marker = (
    '<defs><marker id="head" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">'
    '<path d="M0,0 L9,4 L0,8 z" fill="#555"/></marker></defs>'
  )
  ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
  arrows = [arrow(BOXES[start], BOXES[end], label) for start, end, label in ARROWS]
  weights = (
    '<text x="470" y="350" fill="#777" font-size="12">Weights: the policy (trained), the reference (frozen or moving), '
    "the base (frozen)</text>",
    '<text x="470" y="368" fill="#777" font-size="12">State: step, policy, reference, optimiser, statistics; all of it '
    "is in a checkpoint, with the place in the data</text>",
  )
  boxes = [box.svg() for box in BOXES.values()]
  return (
    "\n".join(
      [head, "<title>From a recipe to a training step</title>", marker, ground, *boxes, *arrows, *weights, "</svg>"]
    )
    + "\n"
  )


def main() -> None:
  OUT.parent.mkdir(parents=True, exist_ok=True)
  OUT.write_text(drawing(), encoding="utf-8")
  print(OUT)


if __name__ == "__main__":
  main()
