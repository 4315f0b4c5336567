"""The benchmark script: its recipes, its table, and one case end to end."""

import json

import jax
import pytest

from scripts import bench


@pytest.mark.parametrize("size", ["sdxl", "sd15", "tiny"])
@pytest.mark.parametrize("case", bench.CASES)
def test_cases_are_the_recipes_on_random_weights(case, size):
  config = bench.recipe(case, size, None)
  name, rank = bench.CASES[case]
  assert config.objective == name
  assert config.batch_size % jax.device_count() == 0
  if rank is not None:
    assert config.lora.rank == rank
  if size != "tiny":
    assert config.model == f"random:{size}" and config.dtype == "bfloat16"


def test_a_case_is_timed_and_reported(tmp_path, monkeypatch):
  monkeypatch.setattr(bench, "matrix_peak", lambda dtype: (1e11, dtype))
  row = bench.measure("sample", "smoke", 1, steps=2)
  assert len(row["seconds"]) == 2 and row["seconds_a_step"] > 0 and row["tflop_a_step"] > 0
  assert row["share_of_peak"] == pytest.approx(row["tflop_per_second"] * 1e12 / 1e11)
  text = bench.table([json.loads(json.dumps(row)), {"case": "spm", "size": "smoke", "error": "out of memory"}])
  assert "| sample smoke |" in text and "| spm smoke | | out of memory |" in text


def test_a_table_of_missing_files_is_refused_in_a_sentence(tmp_path, capsys):
  with pytest.raises(SystemExit):
    bench.main(["--table", str(tmp_path / "gone.json")])
  assert f"--table: there is no {tmp_path}/gone.json; expected OUT.json files" in capsys.readouterr().err
