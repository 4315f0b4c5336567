"""The notebooks: what is committed is whole and small, and what they do still works."""

import json
import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = ["loss_around_a_toy_network", "align_tiny_sd"]
MAX_BYTES = 400_000  # of a notebook, with its pictures


def cells_of(name):
  return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def outputs_of(cells):
  return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def text_of(outputs):
  """What cells have printed."""
  return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


def test_each_notebook_is_tested():
  assert sorted(NAMES) == sorted(file.stem for file in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_what_its_cells_have_made(name):
  file = FOLDER / f"{name}.ipynb"
  cells = cells_of(name)
  numbers = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
  assert numbers == list(range(1, len(numbers) + 1)), "run all cells, in order, before it is committed"
  outputs = outputs_of(cells)
  assert not [o for o in outputs if o["output_type"] == "error"]
  assert any(set(o.get("data", {})) & {"image/png", "image/jpeg"} for o in outputs)
  assert file.stat().st_size < MAX_BYTES
  said = text_of(outputs)
  assert not re.search(r"(^|\s)/(home|root|opt|tmp|usr|work)/", said), "a path of the machine that ran it"
  assert "\r" not in said


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
  for cell in cells_of(name):
    text = "".join(cell["source"])
    for link in re.findall(r"\]\(([^)]+)\)", text) if cell["cell_type"] == "markdown" else ():
      assert (FOLDER / link).is_file(), link
    for file in re.findall(r"\b(?:configs|docs|jaxpref)/[\w/]+\.(?:py|md)\b", text):
      assert (ROOT / file).is_file(), file


def execute(name, folder):
  """Runs all cells in a folder that sees the recipes; returns the cells."""
  import nbclient
  import nbformat

  (folder / "configs").symlink_to(ROOT / "configs")
  notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  client = nbclient.NotebookClient(
    notebook, timeout=3000, kernel_name="python3", resources={"metadata": {"path": folder}}
  )
  client.execute(env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})
  return notebook.cells


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
  said = text_of(outputs_of(execute(name, tmp_path)))
  if name == "align_tiny_sd":
    before, after = (
      int(re.search(rf"{which} model[^;]*? (\d+)[ ,;]", said)[1]) for which in ("the base", "the aligned")
    )
    assert after > before + 10
    assert (tmp_path / "runs" / "notebook" / "index.html").is_file()
  else:
    shares = [int(share) for share in re.findall(r"(\d+)% of points at the right", said)]
    assert len(shares) == 3 and shares[1] > 80 > 50 > shares[0]
    assert "loss 0.6931 (log 2" in said
