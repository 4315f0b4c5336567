"""The benchmark script: its recipes, its table, and one case end to end."""

import json
import math

import jax
import pytest

from scripts.bench import bench, count_lpo, time_lpo


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
    assert config.model == f"drawn:{size}" and config.dtype == "bfloat16"


def test_stable_diffusion_3_has_its_own_adapter_and_no_t5():
  assert bench.cases_of("sd35m") == ["dpo-lora", "dpo-full"] and bench.cases_of("smoke") == list(bench.CASES)
  config = bench.recipe("dpo-lora", "sd35m", None)
  assert config.family == "stable_diffusion_3" and config.model == "drawn:sd35-medium" and config.drop_t5
  assert (config.lora.rank, config.image_size, config.batch_size) == (32, 512, 4 * jax.device_count())
  assert bench.recipe("dpo-lora", "smoke-sd35m", None).model == "random:sd35-miniature"


def test_a_case_without_recipe_is_refused(capsys):
  with pytest.raises(SystemExit):
    bench.main(["--size=sd35m", "--cases", "spo-lora"])
  assert "spo-lora has no recipe at --size=sd35m; expected dpo-lora, dpo-full." in capsys.readouterr().err


@pytest.mark.slow
def test_a_case_is_timed_and_reported(tmp_path, monkeypatch):
  monkeypatch.setattr(bench, "matrix_peak", lambda dtype: (1e11, dtype))
  seen = []
  row = bench.measure("sample", "smoke", 1, steps=2, watch=lambda row: seen.append(len(row)))
  assert len(seen) > 3 and seen[-1] == len(row)  # what is known is said as it comes
  assert len(row["seconds"]) == 2 and row["seconds_a_step"] > 0 and row["tflop_a_step"] > 0
  assert row["share_of_peak"] == pytest.approx(row["tflop_per_second"] * 1e12 / 1e11)
  text = bench.table([json.loads(json.dumps(row)), {"case": "spm", "size": "smoke", "error": "out of memory"}])
  assert "| sample smoke |" in text and "| spm smoke | | out of memory |" in text


def test_a_table_of_missing_files_is_refused_in_a_sentence(tmp_path, capsys):
  with pytest.raises(SystemExit):
    bench.main(["--table", str(tmp_path / "gone.json")])
  assert f"--table: there is no {tmp_path}/gone.json; expected OUT.json files" in capsys.readouterr().err


def test_steps_stop_when_the_time_is_up():
  found = {}
  assert len(bench.timed_steps(lambda i: i, 10, lambda **fields: found.update(fields), deadline=0.0)) == 3
  assert len(found["seconds"]) == 3
  assert len(bench.timed_steps(lambda i: i, 10, lambda **fields: None, deadline=math.inf)) == 10


def test_memory_is_said_beside_the_compilers_and_whether_the_steps_reached_it():
  row = {"memory_is": "measured", "peak_memory_gib": 3.0, "peak_before_gib": 2.0, "compiled_bytes": 2.5 * 2**30}
  assert bench.memory_note(row) == " (compiler: 2.50)"
  assert bench.memory_note(row | {"peak_before_gib": 3.0}) == " (compiler: 2.50, reached before the steps)"
  assert bench.memory_note(row | {"memory_is": "the compiler's"}) == " (compiler)"


def test_a_score_of_spo_is_decoded_and_judged_and_denoises_what_is_dropped():
  parts = {"latent reward": 1.0, "guided call": 8.0, "decoder": 3.0, "image tower": 0.5}
  found = count_lpo.of_scores(parts, pool_size=4)
  assert found == {"step-aware, of a pool": 9.5, "step-aware without the call": 3.5}  # three of four are dropped


def test_parts_of_a_score_are_timed_in_turns(monkeypatch):
  order, times = [], iter([9.0, 9.0, 9.0, 9.0, *map(float, range(12))])
  names = ("latent reward", "guided call", "decoder", "image tower")
  shape = jax.ShapeDtypeStruct((2,), "float32")
  calls = {name: (lambda x, name=name: order.append(name) or x, (shape,)) for name in names}
  monkeypatch.setattr(count_lpo, "candidate_parts", lambda preset: calls)
  monkeypatch.setattr(time_lpo, "seconds", lambda fn: fn() is not None and next(times))
  found = time_lpo.measure("sd15", turns=3)
  assert order == list(names)  # each is traced once
  assert found["decoder"] == {"median": 6.0, "all": [2.0, 6.0, 10.0]}


def test_parts_of_a_score_have_the_shapes_of_a_miniature():
  parts = {name: jax.eval_shape(fn, *args) for name, (fn, args) in count_lpo.candidate_parts("sd15-miniature").items()}
  assert parts["latent reward"].shape == parts["image tower"].shape == (1,)
  assert parts["decoder"].shape == (1, 16, 16, 3) and parts["guided call"].shape == (1, 8, 8, 4)
  filled = time_lpo.fill({"f": jax.ShapeDtypeStruct((3,), "bfloat16"), "i": jax.ShapeDtypeStruct((2,), "int32")})
  assert filled["f"].dtype == "bfloat16" and filled["f"].any() and not filled["i"].any()
